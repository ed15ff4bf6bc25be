"""However many processes share a batch, in however many parts, its gradient is that of one process
that computes it at once: for every method, ZeRO stage and source of neighbors.

Where rows meet before the losses, that holds by definition only if they meet all others: batch norm
in the heads (SLIP, DeCLIP, DeFILIP) and in ResNet towers sees one process's rows by default, as in
the published models. The switch ``batch_norm = synchronized`` lets it see all processes' rows; the
gradients without it are shown to differ here. ResNet towers also run over the parts of an
accumulated batch one by one, and no switch makes that exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.train import exact_gradient_workers as workers
    from tests.train.several_processes import run_processes
    from tests.train.training_data import write_training_data
else:
    import exact_gradient_workers as workers
    from several_processes import run_processes
    from training_data import write_training_data

pytestmark = pytest.mark.distributed
Gradients = dict[str, dict[str, torch.Tensor]]


def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp() / "exact_gradients"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Gradients]:
    """Gradients of every case, by the number of processes."""
    folder = folder_of(tmp_path_factory)
    root = folder / "data"
    write_training_data(root)
    for processes in (1, 2, 4):
        run_processes(workers.run, processes, str(root), str(folder))
    return {n: torch.load(Path(folder) / f"{n}.pt", weights_only=True) for n in (1, 2, 4)}


@pytest.fixture(scope="module")
def refusals(
    found: dict[int, Gradients], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[str]]:
    """What each process said to a batch that is not a number on the last one alone."""
    return {n: workers.read_refusals(folder_of(tmp_path_factory), n) for n in (2, 4)}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest distance of two gradients of a parameter, relative to the gradient's norm.

    Some gradients are zero by construction (of a bias before a batch norm): each process has a part
    of them that is not, and the sum is rounding. They are compared with a hundredth of the largest
    norm instead.
    """
    assert one.keys() == other.keys()
    floor = 1e-2 * max(float(gradient.norm()) for gradient in other.values())
    return max(
        float((one[name] - other[name]).norm()) / max(float(other[name].norm()), floor)
        for name in other
    )


@pytest.mark.parametrize(
    ("processes", "case"),
    [(n, case) for n in (2, 4) for case in workers.cases(n) if case not in workers.LOCAL],
    ids=str,
)
def test_gradients_are_those_of_one_process(
    found: dict[int, Gradients], processes: int, case: workers.Case
) -> None:
    expected = found[1][case.reference.name]
    assert largest_difference(found[processes][case.name], expected) < 1e-5


@pytest.mark.parametrize("case", workers.METHODS, ids=lambda case: case.name)
def test_a_batch_in_parts_is_the_batch(found: dict[int, Gradients], case: workers.Case) -> None:
    in_parts = found[1][case._replace(accumulation_steps=4).name]
    assert largest_difference(in_parts, found[1][case.name]) < 1e-5


@pytest.mark.parametrize("case", workers.LOCAL, ids=lambda case: case.name)
def test_batch_norm_over_fewer_rows_is_another_gradient(
    found: dict[int, Gradients], case: workers.Case
) -> None:
    """The named limits: without synchronization, and with a ResNet's batch in parts."""
    assert largest_difference(found[2][case.name], found[1][case.reference.name]) > 1e-3


def test_a_loss_gone_wrong_on_one_process_stops_all_of_them(refusals: dict[int, list[str]]) -> None:
    """At the same step, with the same sentence, before anything is updated or stored."""
    for processes in (2, 4):
        assert len(refusals[processes]) == processes
        (sentence,) = set(refusals[processes])
        assert sentence.startswith(
            f"the loss term 'contrastive' became nan at step 5 on process {processes - 1}: the "
            "features of its samples 'row "
        )
        assert "are not finite; lower peak_lr or raise warmup_steps" in sentence


def test_every_trained_parameter_has_a_gradient(found: dict[int, Gradients]) -> None:
    """But for biases before a batch norm, which takes them out again."""
    for case in workers.METHODS:
        still = {name for name, g in found[1][case.name].items() if not g.abs().max() > 0}
        allowed = {name for name in still if ".linear_" in name and name.endswith(".bias")}
        assert still == allowed, case
