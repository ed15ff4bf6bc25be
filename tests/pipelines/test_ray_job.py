"""The documented ``ray job submit``, against a real head with a token."""

import contextlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray_head
from ray_head import Head

from declip_shards.fakes import COLORS, SHAPES, draw
from pipelines import ray_runner
from pipelines.cli import main

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = ("ingest", "measure", "filter", "embed", "index")
NUM_PICTURES = 18
DECOYS = (".env", ".git/objects/x", ".venv/lib/x.py", "runs/pairs/x.tar", "tests/x.py", "docs/x.md")
"""Files of a checkout that must stay at home."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python: Path = ray_head.make_environment(tmp_path_factory.mktemp("workers") / "venv")
    return python


@pytest.fixture(scope="module")
def head(python: Path) -> Iterator[Head]:
    with ray_head.running_head(python) as head:
        yield head


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's code with decoys beside it, and no .gitignore that would hide them."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("packages", "pipelines", "requirements"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ray_head.REPOSITORY / name, folder / name, ignore=ignored)
    for decoy in DECOYS:
        (folder / decoy).parent.mkdir(parents=True, exist_ok=True)
        (folder / decoy).write_bytes(os.urandom(100_000))
    return folder


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """(URL table, host:port of its web server); one URL leads nowhere."""
    folder = tmp_path_factory.mktemp("web")
    rng = np.random.default_rng(0)

    def handler(*args: object) -> _Quiet:
        return _Quiet(*args, directory=str(folder))  # type: ignore[arg-type]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        address = f"127.0.0.1:{server.server_port}"
        rows = []
        for n in range(NUM_PICTURES):
            color, shape = COLORS[n % len(COLORS)], SHAPES[n % len(SHAPES)]
            (folder / f"{n}.jpg").write_bytes(draw(color, shape, 224, rng))
            rows.append(
                {"url": f"http://{address}/{n}.jpg", "caption": f"the {n}th {color} {shape}"}
            )
        rows.append({"url": f"http://{address}/none.jpg", "caption": "a picture that is not there"})
        path = tmp_path_factory.mktemp("table") / "pairs.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield path, address
        server.shutdown()
        thread.join(timeout=10)


def settings(table: tuple[Path, str], out: Path) -> list[str]:
    path, address = table
    options = ["--ingest.table", str(path), "--ingest.allow-addresses", address]
    options += ["--ingest.shard-size", "10", "--ingest.image-size", "64"]
    return ["run", "pairs", *options, "--out", str(out), "--until", "index"]


def manifests(out: Path) -> dict[str, bytes]:
    return {step: (out / "manifests" / f"{step}.json").read_bytes() for step in STEPS}


@pytest.fixture(scope="module")
def submitted(
    head: Head, checkout: Path, table: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """(folder that a Ray job has filled, the job's log)."""
    out = tmp_path_factory.mktemp("cluster") / "out"
    done = head.submit("python", "-m", "pipelines", *settings(table, out), checkout=checkout)
    assert done.returncode == 0, done.stdout
    return out, done.stdout


def test_the_head_has_the_dependencies_and_none_of_our_packages(head: Head) -> None:
    names = ["ray", "torch", "faiss", "img2dataset", "sentence_transformers", "pyarrow"]
    ours = ["declip_shards", "declip_ingest", "declip_filter", "declip_train", "pipelines"]
    code = (
        "from importlib.util import find_spec as f;"
        f"print('missing', [n for n in {names + ours} if f(n) is None])"
    )
    done = head.submit("python", "-c", code)
    assert f"missing {ours}" in done.stdout
    assert done.returncode == 0


def test_a_job_ends_in_the_manifests_of_a_local_run(
    submitted: tuple[Path, str], table: tuple[Path, str], tmp_path: Path, head: Head
) -> None:
    out, log = submitted
    # A driver that had started a cluster of its own would not be known to this one.
    assert head.jobs()[0]["driver_info"] is not None
    records = [json.loads((out / "manifests" / f"{step}.run.json").read_text()) for step in STEPS]
    assert {record["runner"] for record in records} == {"ray"}
    assert f"ingest: {NUM_PICTURES + 1} in, {NUM_PICTURES} out" in log
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*settings(table, tmp_path / "here"), "--runner", "local"]) == 0
    assert manifests(out) == manifests(tmp_path / "here")


def times_of(out: Path) -> dict[Path, int]:
    """When each file was last written, locks aside."""
    locks = ("lock", "tasks.lock")
    files = (p for p in out.rglob("*") if p.is_file() and p.name not in locks)
    return {p: p.stat().st_mtime_ns for p in files}


def test_a_second_job_does_nothing_and_starts_no_driver(
    submitted: tuple[Path, str], head: Head, checkout: Path, table: tuple[Path, str]
) -> None:
    out, _ = submitted
    before = times_of(out)
    done = head.submit("python", "-m", "pipelines", *settings(table, out), checkout=checkout)
    assert "Nothing has changed: nothing was run." in done.stdout
    assert done.returncode == 0
    assert head.jobs()[0]["driver_info"] is None
    assert times_of(out) == before


def test_a_failed_stage_fails_the_job_and_its_sentence_is_in_the_log(
    head: Head, checkout: Path, table: tuple[Path, str], tmp_path: Path
) -> None:
    command = [*settings(table, tmp_path / "out"), "--ingest.caption-column", "title"]
    done = head.submit("python", "-m", "pipelines", *command, checkout=checkout)
    assert done.returncode == 1
    sentence = next(line for line in done.stdout.splitlines() if line.startswith("declip: "))
    assert "'title'" in sentence
    assert "Traceback" not in done.stdout
    assert not list((tmp_path / "out").rglob("*.tar"))
    assert not (tmp_path / "out" / "manifests" / "ingest.json").exists()


def test_only_our_code_travels(submitted: tuple[Path, str], head: Head, checkout: Path) -> None:
    resources = head.folder / "ray" / "session_latest" / "runtime_resources"
    (copy,) = [p.parent for p in (resources / "working_dir_files").glob("*/pipelines")]
    arrived = [p.relative_to(copy) for p in copy.rglob("*") if p.is_file()]
    assert {p.parts[0] for p in arrived} == {"packages", "pipelines", "requirements"}
    assert sum((copy / p).stat().st_size for p in arrived if p.suffix != ".pyc") < 5_000_000
    modules = {p.name for p in (resources / "py_modules_files").glob("*/*") if p.is_dir()}
    assert modules == {p.name for p in checkout.glob("packages/*/src/declip_*")}


DRIVER = """
import sys
from declip_shards import DeclipError
from pipelines import ray_runner
try:
    ray = ray_runner.start()
except DeclipError as error:
    sys.exit(f"declip: {error}")
print("nodes", len(ray.nodes()), "cores", ray.cluster_resources()["CPU"])
print("head", ray.get_runtime_context().gcs_address)
def importable(names):
    from importlib.util import find_spec
    return [name for name in names if find_spec(name)]
print("workers have", ray.get(ray.remote(importable).remote(ray_runner.OUR_PACKAGES)))
"""
"""Starts Ray as a run does, and says where it landed."""


def drive(head: Head, address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run outside a Ray job, of somebody who has our packages."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-c", DRIVER],
        env=head.environment(None, RAY_ADDRESS=address, PYTHONPATH=paths, **environment),
        cwd=head.folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_driver_outside_a_job_brings_our_packages(head: Head) -> None:
    address = f"127.0.0.1:{head.gcs_port}"
    assert ray_runner.asks_for_token(address)
    assert ray_runner.asks_for_token(f"ray://127.0.0.1:{head.client_port}")
    # The mode is not set: the head says that it asks for one.
    done = drive(head, address, RAY_AUTH_TOKEN=ray_head.TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"workers have {list(ray_runner.OUR_PACKAGES)}" in done.stdout
    assert f":{head.gcs_port}\n" in done.stdout


def test_a_driver_without_the_token_gets_one_sentence(head: Head) -> None:
    done = drive(head, f"127.0.0.1:{head.gcs_port}")
    assert done.returncode == 1
    assert "takes no connection" in done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_of_our_own_never_joins_one_that_runs_here(head: Head) -> None:
    # Ray keeps the address of the last started head in this folder; ours must not look there.
    done = drive(head, "", RAY_TMPDIR=str(head.folder), **{ray_head.MARK: str(head.folder)})
    assert done.returncode == 0, done.stderr
    assert f"nodes 1 cores {float(os.cpu_count() or 1)}" in done.stdout
    assert f":{head.gcs_port}\n" not in done.stdout


def test_without_the_token_nothing_runs(head: Head, tmp_path: Path) -> None:
    before, mark = [job["submission_id"] for job in head.jobs()], tmp_path / "mark"
    body = json.dumps({"entrypoint": f"touch {mark}"}).encode()
    for token in (None, "wrong-token"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            head.get("/api/jobs/", token=token, data=body)
        assert refused.value.code in (401, 403)
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "job"]
    done = subprocess.run(
        [*command, "submit", "--address", head.dashboard, "--", "touch", str(mark)],
        env=head.environment(token=None, RAY_AUTH_MODE="disabled"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "401" in done.stdout or "authentication token" in done.stdout.lower()
    assert [job["submission_id"] for job in head.jobs()] == before
    assert not mark.exists()
