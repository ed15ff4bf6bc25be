"""Batch norm: torch's own in one process, and that of the whole batch over several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_train.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    frozen_statistics,
    synchronize_batch_norm,
)

if TYPE_CHECKING:
    from tests.train import batch_norm_workers
    from tests.train.several_processes import run_processes
else:
    # The name under which other processes find it, whatever pytest calls this module.
    import batch_norm_workers
    from several_processes import run_processes


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("synchronized", [False, True])
def test_one_process_has_torchs_own_layer(synchronized: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for ours, theirs, shape in (
        (BatchNorm1d(4, synchronized), nn.BatchNorm1d(4), (6, 4)),
        (BatchNorm1d(4, synchronized, momentum=None), nn.BatchNorm1d(4, momentum=None), (6, 4, 3)),
        (BatchNorm2d(4, synchronized, affine=False), nn.BatchNorm2d(4, affine=False), (2, 4, 3, 3)),
    ):
        assert isinstance(ours, type(theirs))
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for _ in range(3):
            values = torch.randn(shape, generator=generator)
            assert torch.equal(ours(values), theirs(values))
        assert all(torch.equal(b, theirs.state_dict()[n]) for n, b in ours.state_dict().items())
        values = torch.randn(shape, generator=generator)
        assert torch.equal(ours.eval()(values), theirs.eval()(values))
        assert f"synchronized={synchronized}" in repr(ours)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What 2 and 4 processes found, by number of processes and by process."""
    found = {}
    for processes in (2, 4):
        folder = tmp_path_factory.mktemp(f"processes_{processes}")
        run_processes(batch_norm_workers.run, processes, str(folder))
        found[processes] = [
            torch.load(Path(folder) / f"{process}.pt", weights_only=True)
            for process in range(processes)
        ]
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", batch_norm_workers.CASES)
def test_processes_are_one_with_the_whole_batch(
    results: dict[int, list[dict[str, Any]]], processes: int, case: str
) -> None:
    expected = batch_norm_workers.outcome_of(case, slice(None))
    assert any(name.startswith("gradient") for name in expected)
    assert any(name.endswith("running_var") for name in expected)
    for process, result in enumerate(results[processes]):
        found = result[case]
        assert found.keys() == expected.keys()
        rows = batch_norm_workers.shares(process, processes)
        for name, whole in expected.items():
            if name == "output":
                whole = whole[rows]
            elif name == "input gradient":
                # Each process's loss is a mean over its own rows; their mean is the whole loss.
                whole = whole[rows] * processes
            elif name.startswith("state"):
                assert torch.equal(found[name], results[processes][0][case][name])
            torch.testing.assert_close(found[name], whole, rtol=1e-9, atol=1e-11)
    gradients = [g for name, g in expected.items() if "radient" in name]
    assert all(g.abs().max() > 1e-6 for g in gradients[:2])


@pytest.mark.distributed
def test_without_the_switch_processes_are_not_one(
    results: dict[int, list[dict[str, Any]]],
) -> None:
    module = batch_norm_workers.module_of("vectors")
    assert synchronize_batch_norm(module, False) == 1
    alone = module(batch_norm_workers.inputs("vectors")[-1][batch_norm_workers.shares(0, 2)])
    assert (alone - results[2][0]["vectors"]["output"]).abs().max() > 0.1


@pytest.mark.distributed
def test_processes_may_have_different_numbers_of_rows_and_a_mean_far_from_zero(
    results: dict[int, list[dict[str, Any]]],
) -> None:
    first, second = (result["uneven"] for result in results[2])
    exact = nn.BatchNorm1d(16).double()
    for name, offset in (("empty", 0.0), ("far", 1e4)):
        values = (batch_norm_workers.inputs("vectors")[0] + offset).float().double()
        values.requires_grad_()
        out = exact(values)
        (out.tanh() * torch.arange(16)).sum().backward()
        assert values.grad is not None
        for part, whole in (("output", out.detach()), ("gradient", values.grad)):
            both = torch.cat([first[f"{name} {part}"], second[f"{name} {part}"]])
            torch.testing.assert_close(both, whole.float(), rtol=1e-4, atol=1e-3)
    for name, buffer in exact.named_buffers():
        torch.testing.assert_close(first[name].double(), buffer.double(), rtol=1e-4, atol=1e-5)
        assert torch.equal(first[name], second[name])


@pytest.mark.distributed
def test_half_precision_has_float32_statistics(results: dict[int, list[dict[str, Any]]]) -> None:
    out = torch.cat([result["half"] for result in results[2]])
    assert out.dtype == torch.bfloat16
    whole = nn.BatchNorm1d(16)(batch_norm_workers.inputs("vectors")[0].bfloat16().float())
    torch.testing.assert_close(out.float(), whole.detach(), rtol=2**-8, atol=2**-8)


@pytest.mark.distributed
def test_compiled_processes_are_one_with_the_whole_batch(
    results: dict[int, list[dict[str, Any]]],
) -> None:
    module = batch_norm_workers.module_of("vectors")
    values = batch_norm_workers.inputs("vectors")[0].requires_grad_()
    out = module(values)
    out.tanh().mean().backward()
    assert values.grad is not None
    found = {
        name: torch.cat([result["compiled"][name] for result in results[2]])
        for name in ("output", "gradient")
    }
    torch.testing.assert_close(found["output"], out.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found["gradient"] / 2, values.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.distributed
def test_one_row_on_all_processes_is_refused_on_each(
    results: dict[int, list[dict[str, Any]]],
) -> None:
    for result in results[2]:
        assert result["one row"] == (
            "Batch norm was given a batch of 1 on all processes together, but it needs at least 2 "
            "in training: raise global_batch_size."
        )


@pytest.mark.parametrize("kind", [BatchNorm1d, nn.BatchNorm1d])
def test_frozen_statistics_normalize_by_the_batch_and_stay(
    kind: type[nn.BatchNorm1d],
) -> None:
    module = nn.Sequential(kind(3), nn.Linear(3, 3), kind(3))
    batch, later = 5 + torch.randn(6, 3), torch.randn(6, 3)
    module(later)
    before = buffers(module)
    with frozen_statistics(module):
        frozen = module(batch)
        with frozen_statistics(module):
            module(batch)
        module(batch)
        assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())
        module.eval()
        in_evaluation = module(batch)
        module.train()
    assert torch.equal(frozen, module(batch))
    assert not any(torch.equal(b, before[n]) for n, b in module.named_buffers())
    module.load_state_dict(module.state_dict() | before)
    assert torch.equal(module.eval()(batch), in_evaluation)


def test_statistics_move_again_after_an_error() -> None:
    norm = BatchNorm1d(3)

    def fail() -> None:
        with frozen_statistics(norm):
            raise RuntimeError("as a loss may")

    with pytest.raises(RuntimeError, match="as a loss may"):
        fail()
    norm(torch.randn(4, 3))
    assert int(norm.state_dict()["num_batches_tracked"]) == 1


def test_wrong_sizes_and_one_value_are_refused_in_a_sentence() -> None:
    with pytest.raises(DeclipError, match="num_features is 0, but batch norm needs at least 1"):
        BatchNorm1d(0)
    with pytest.raises(
        DeclipError, match=r"a batch of 1 on this process, but it needs .*: raise global_batch_size"
    ):
        BatchNorm1d(3, True)(torch.randn(1, 3))
    with pytest.raises(DeclipError, match="a batch of 0 on this process"):
        BatchNorm2d(3)(torch.randn(0, 3, 2, 2))
    assert BatchNorm2d(3)(torch.randn(1, 3, 2, 2)).shape == (1, 3, 2, 2)
    assert BatchNorm1d(3).eval()(torch.randn(1, 3)).shape == (1, 3)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        BatchNorm1d(3)(torch.randn(2, 3, 2, 2))
