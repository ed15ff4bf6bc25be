"""Gathered features: many processes have the loss and the gradient of one with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from declip_train.distributed import gather_features, rank, world_size

if TYPE_CHECKING:
    from tests.train import gather_workers
    from tests.train.several_processes import run_processes
else:
    # The name under which other processes find it, whatever pytest calls this module.
    import gather_workers
    from several_processes import run_processes


def test_one_process_is_no_special_case() -> None:
    first, second = torch.randn(3, 4), torch.randn(3, 2)
    assert (rank(), world_size()) == (0, 1)
    gathered = gather_features(first, second)
    assert gathered[0] is first
    assert gathered[1] is second


def test_features_that_do_not_fit_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="was given no features: give at least one matrix"):
        gather_features()
    with pytest.raises(ValueError, match=r"shapes \(3, 4\), \(2, 4\): all must be matrices"):
        gather_features(torch.randn(3, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match="all must be matrices"):
        gather_features(torch.randn(3))


@pytest.mark.distributed
def test_gradients_are_those_of_the_big_batch(tmp_path: Path) -> None:
    processes = 2
    run_processes(gather_workers.run, processes, str(tmp_path))
    for process in range(processes):
        results = torch.load(tmp_path / f"{process}.pt", weights_only=True)
        for kind in gather_workers.LOSSES:
            loss, found = results[kind]
            big_loss, expected = gather_workers.gradients_of(kind, slice(None))
            torch.testing.assert_close(loss, big_loss, rtol=0, atol=1e-12)
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)
            assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
