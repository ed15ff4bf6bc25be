"""A checkpoint continues on any number of processes and in any ZeRO stage, with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from declip_shards import DeclipError
from declip_train.elastic import MASTER, TrainedStates

if TYPE_CHECKING:
    from tests.train import elastic_workers as workers
    from tests.train.several_processes import run_processes
else:
    import elastic_workers as workers
    from several_processes import run_processes


@pytest.mark.distributed
def test_states_survive_every_change_of_processes_and_stage(tmp_path: Path) -> None:
    """Weights, moments, counts, loss scale and buffers, read back through DeepSpeed itself; and
    where DeepSpeed's own program for universal checkpoints works, it finds the same bits."""
    stages = {(a[0], b[0]) for a, b in zip(workers.LAYOUTS, workers.LAYOUTS[1:], strict=False)}
    assert stages == {(a, b) for a in range(3) for b in range(3)}
    run_processes(workers.convert, 4, str(tmp_path))
    for name, (_, _, layouts) in workers.CHAINS.items():
        steps = sorted(path.name for path in (tmp_path / name / "run").glob("step_*"))
        assert len(steps) == len(layouts)


def test_pieces_make_a_whole_whatever_their_order() -> None:
    values = torch.arange(10.0)
    states = TrainedStates()
    for start, end in ((7, 10), (0, 3), (3, 7)):
        states.add("a", MASTER, start, values[start:end])
    for start in range(10):
        for count in range(10 - start + 1):
            part = states.part("a", MASTER, start, count)
            assert torch.equal(part, values[start : start + count])


def test_a_hole_is_refused_and_a_missing_moment_is_zero() -> None:
    states = TrainedStates()
    states.add("a", MASTER, 0, torch.ones(3))
    states.add("a", MASTER, 5, torch.ones(2))
    with pytest.raises(DeclipError, match=r"holds 5 of 7 numbers of 'a' \(fp32\); delete it"):
        states.part("a", MASTER, 0, 7)
    assert torch.equal(states.part("a", "exp_avg", 0, 7), torch.zeros(7))


def test_counts_of_a_group_are_its_largest() -> None:
    states = TrainedStates(counts={"a": torch.tensor(3.0), "b": torch.tensor(5.0)})
    assert float(states.count_of(["a", "b", "c"])) == 5
    assert states.count_of(["c"]) is None
