"""A run that was killed again and again ends with the bits of one that never was; and on other
processes and ZeRO stages it goes on with the same batches and, but for rounding, losses."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from torch.multiprocessing.spawn import ProcessExitedException

from declip_train.settings import TrainSettings

if TYPE_CHECKING:
    from tests.train import resume_workers as workers
    from tests.train.several_processes import run_processes
    from tests.train.training_data import write_training_data
else:
    import resume_workers as workers
    from several_processes import run_processes
    from training_data import write_training_data

pytestmark = pytest.mark.distributed
STEPS, HALFWAY = 60, 54
SETTINGS = TrainSettings(
    model="test",
    method="clip",
    global_batch_size=8,
    max_steps=STEPS,
    warmup_steps=5,
    start_lr=1e-5,
    peak_lr=1e-4,
    # Adam divides by the root of the mean square: a gradient that is nothing but rounding would
    # move its weight as far as any other.
    eps=1e-6,
    num_ranks=1,
    zero_stage=1,
    checkpoint_every_steps=18,
    keep_every_steps=HALFWAY,
    log_every_steps=1,
    stall_seconds=0.0,
)


def run(root: Path, settings: TrainSettings, *, kill: tuple[int, int] = (-1, -1)) -> None:
    """Train in forked processes; ``kill`` is the step and the process that SIGKILL ends."""
    config = root / "config.json"
    config.write_bytes(dataclasses.replace(settings, root=str(root)).to_json())
    run_processes(workers.train, settings.num_ranks, str(config), str(kill[0]), str(kill[1]))


def records(root: Path) -> dict[int, dict[str, Any]]:
    """The log's records by step; a step that was done twice counts as it was done last."""
    lines = (root / "train" / "log.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {record["step"]: record for record in found if "total" in record}


def losses(root: Path) -> dict[int, dict[str, float]]:
    names = ("total", "contrastive", "logit_scale", "learning_rate")
    return {s: {n: r[n] for n in names if n in r} for s, r in records(root).items()}


def batches(root: Path) -> dict[int, list[int]]:
    """The samples of every step over all processes, sorted."""
    found: dict[int, dict[str, list[int]]] = {}
    for path in root.glob("keys_*.jsonl"):
        for line in path.read_text().splitlines():
            step, samples = json.loads(line)
            before = found.setdefault(step, {}).setdefault(path.name, samples)
            assert before == samples, "a repeated step brought another batch"
    return {s: sorted(i for part in own.values() for i in part) for s, own in found.items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps that nothing disturbs."""
    root = tmp_path_factory.mktemp("straight") / "data"
    write_training_data(root, samples_per_shard=20)
    shutil.copytree(root, root.parent / "fresh")
    run(root, SETTINGS)
    return root


def copy_of_data(straight: Path, name: str) -> Path:
    root = straight.parent / name
    shutil.copytree(straight.parent / "fresh", root)
    return root


def test_five_kills_change_no_bit(straight: Path) -> None:
    root = copy_of_data(straight, "killed")
    draw = random.Random(6)
    settings = dataclasses.replace(
        SETTINGS, async_save=True, checkpoint_every_steps=4, keep_every_steps=None
    )
    for step in sorted(draw.sample(range(6, STEPS), 5)):
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            run(root, settings, kill=(step, 0))
    run(root, settings)
    said = (root / "said_0.txt").read_text()
    assert said.count("continuing after step") == 5
    assert losses(root) == losses(straight)
    assert len(losses(root)) == STEPS
    assert batches(root) == batches(straight)
    exported = [p.name for p in (straight / "train/export").iterdir() if p.suffix == ".bin"]
    assert exported
    for name in exported:
        one, other = (r / "train/export" / name for r in (straight, root))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (4, 2)])
def test_other_processes_and_stages_go_on(straight: Path, ranks: int, stage: int) -> None:
    root = copy_of_data(straight, f"on_{ranks}_in_{stage}")
    (run_folder,) = (straight / "train/checkpoints").iterdir()
    target = root / "train/checkpoints" / run_folder.name
    tag = f"step_{HALFWAY:08d}"
    shutil.copytree(run_folder / tag, target / tag)
    run(root, dataclasses.replace(SETTINGS, num_ranks=ranks, zero_stage=stage))
    assert (
        f"continuing after step {HALFWAY}, written by 1 process and ZeRO stage 1, in {ranks} "
        f"process{'' if ranks == 1 else 'es'} and ZeRO stage {stage}"
    ) in (root / "said_0.txt").read_text()
    expected = {s: v for s, v in batches(straight).items() if s >= HALFWAY}
    assert batches(root) == expected
    found, before = losses(root), losses(straight)
    assert sorted(found) == list(range(HALFWAY + 1, STEPS + 1))
    for step, values in found.items():
        assert values == pytest.approx(before[step], abs=1e-5), step
