"""gpu.sh names real scripts with options that they have, and measures on the GPU."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def commands(name: str) -> list[list[str]]:
    """The words after each `benchmarks/NAME.py` of the script."""
    text = SCRIPT.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if f"benchmarks/{name}.py" in line]
    return [
        shlex.split(line)[shlex.split(line).index(f"benchmarks/{name}.py") + 1 :] for line in lines
    ]


@pytest.mark.parametrize(
    "name", ["parity", "losses", "step", "end_to_end", "probe", "deepspeed_overhead"]
)
def test_what_can_run_on_either_is_run_on_the_gpu(name: str) -> None:
    found = commands(name)
    assert found
    for words in found:
        assert words[words.index("--device") + 1] == "cuda"


def test_checks_are_chosen_by_title_and_another_name_is_told(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho "runs $*"\n')
    stand_in.chmod(0o755)
    run = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path), "probe", "no such check"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(stand_in)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert re.findall(r"^== (.*)", run.stdout, re.MULTILINE) == ["probe"]
    assert "runs benchmarks/probe.py --device cuda" in run.stdout
    assert "-- there is no check 'no such check'" in run.stdout


def test_checks_without_time_are_named_and_fail(tmp_path: Path) -> None:
    run = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path), "probe"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "true", "BUDGET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "-- probe: no time left" in run.stdout
    assert "== probe" not in run.stdout
