"""The memory bank: a queue, searched exactly, the same on all processes and after a resume."""

from __future__ import annotations

import copy
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from declip_shards import DeclipError
from declip_train.bank import BankNeighbors, NeighborBank, neighbor_metrics

if TYPE_CHECKING:
    from tests.train import bank_workers
    from tests.train.several_processes import run_processes
else:
    # The name under which other processes find it, whatever pytest calls this module.
    import bank_workers
    from several_processes import run_processes

DIM = 5
Entry = tuple[Tensor, int, int]


def rows_of(number: int, seed: int, samples: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """Random features with sample and caption ids."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(number, DIM, generator=generator)
    sample_ids = torch.randint(samples, (number,), generator=generator)
    return features, sample_ids, 10_000 + sample_ids


def filled(size: int, number: int, **settings: int) -> NeighborBank:
    bank = NeighborBank(size, DIM, **settings)
    if number:
        bank.store(*rows_of(number, seed=7))
    return bank


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 17), batches=st.lists(st.integers(0, 17), max_size=12))
def test_it_is_a_first_in_first_out_queue(size: int, batches: list[int]) -> None:
    bank = NeighborBank(size, DIM)
    queue: deque[Entry] = deque(maxlen=size)
    for seed, number in enumerate(min(batch, size) for batch in batches):
        features, sample_ids, caption_ids = rows_of(number, seed)
        bank.store(features, sample_ids, caption_ids)
        unit = F.normalize(features, dim=-1)
        queue.extend(zip(unit, sample_ids.tolist(), caption_ids.tolist(), strict=True))
        # The oldest entry stands at the cursor once the bank is full, else in the first slot.
        start = int(bank.cursor) if len(queue) == size else 0
        order = [(start + place) % size for place in range(len(queue))]
        assert bank.sample_ids[order].tolist() == [entry[1] for entry in queue]
        assert bank.caption_ids[order].tolist() == [entry[2] for entry in queue]
        if queue:
            assert torch.equal(bank.features[order], torch.stack([entry[0] for entry in queue]))
        assert int(bank.num_entries()) == len(queue)


def brute_force(bank: NeighborBank, queries: Tensor, sample_ids: Tensor) -> list[int]:
    """Slot of each query's neighbor by plain loops in float64, -1 for none."""
    slots = []
    for query, own in zip(queries.double(), sample_ids.tolist(), strict=True):
        allowed = [s for s, o in enumerate(bank.sample_ids.tolist()) if o not in (-1, own)]
        near = {s: float(query @ bank.features[s].double()) for s in allowed}
        slots.append(max(near, key=lambda slot: near[slot]) if near else -1)
    return slots


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 23),
    number=st.integers(0, 23),
    block_rows=st.integers(1, 30),
    samples=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_lookup_is_brute_force(
    size: int, number: int, block_rows: int, samples: int, seed: int
) -> None:
    bank = NeighborBank(size, DIM, block_rows)
    bank.store(*rows_of(min(number, size), seed, samples))
    queries, sample_ids, _ = rows_of(6, seed + 1, samples)
    near = bank.lookup(100 * queries, sample_ids)
    slots = brute_force(bank, queries, sample_ids)
    assert near.found.tolist() == [slot >= 0 for slot in slots]
    for row, slot in enumerate(slots):
        if slot < 0:
            assert near.caption_ids[row] == -1
            assert near.similarity[row] == 0
            assert not near.features[row].any()
        else:
            assert near.caption_ids[row] == bank.caption_ids[slot]
            assert torch.equal(near.features[row], bank.features[slot])
            cosine = F.cosine_similarity(queries[row], bank.features[slot], dim=0)
            torch.testing.assert_close(near.similarity[row], cosine, rtol=0, atol=1e-6)


def test_a_sample_does_not_find_itself_of_an_earlier_epoch() -> None:
    bank = NeighborBank(4, 2)
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    bank.store(features, torch.tensor([3, 4]), torch.tensor([30, 40]))
    assert bank.lookup(features, torch.tensor([9, 9])).caption_ids.tolist() == [30, 40]
    near = bank.lookup(features, torch.tensor([3, 4]))
    assert near.caption_ids.tolist() == [40, 30]
    torch.testing.assert_close(near.similarity, torch.tensor([0.6, 0.6]))
    # Both views of the own sample, and nothing else: nothing is found.
    bank = NeighborBank(2, 2)
    bank.store(features, torch.tensor([3, 3]), torch.tensor([30, 30]))
    assert bank.lookup(features, torch.tensor([3, 3])).found.tolist() == [False, False]


def test_an_empty_bank_finds_nothing() -> None:
    queries, sample_ids, _ = rows_of(3, 0)
    near = NeighborBank(8, DIM).lookup(queries, sample_ids)
    assert not near.found.any()
    assert not near.features.any()
    assert near.caption_ids.tolist() == [-1] * 3


def test_equally_near_entries_give_the_lowest_slot_whatever_the_blocks() -> None:
    for block_rows in (1, 2, 3, 100):
        bank = NeighborBank(9, 2, block_rows)
        same = torch.ones(9, 2)
        bank.store(same, torch.arange(9), torch.arange(9))
        assert bank.lookup(same[:2], torch.tensor([0, 5])).caption_ids.tolist() == [1, 0]


@settings(max_examples=25, deadline=None)
@given(straight=st.integers(0, 5), after=st.integers(0, 5), rows=st.integers(1, 7))
def test_a_resumed_bank_is_a_straight_one(straight: int, after: int, rows: int) -> None:
    bank = NeighborBank(7, DIM)
    for seed in range(straight):
        bank.store(*rows_of(rows, seed))
    resumed = NeighborBank(7, DIM)
    resumed.store(*rows_of(3, 99))
    resumed.load_state_dict(copy.deepcopy(bank.state_dict()))
    for seed in range(straight, straight + after):
        for one in (bank, resumed):
            one.store(*rows_of(rows, seed))
    assert list(bank.state_dict()) == ["features", "sample_ids", "caption_ids", "cursor"]
    for name, buffer in bank.state_dict().items():
        assert torch.equal(buffer, resumed.state_dict()[name])
    assert_same(*(one.lookup(*rows_of(4, 50)[:2]) for one in (bank, resumed)))


def assert_same(one: BankNeighbors, other: BankNeighbors) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def test_half_precision_neither_rounds_nor_blurs_it() -> None:
    bank = filled(64, 64)
    before = bank.features.clone()
    nn.ModuleList([bank]).half().bfloat16()
    assert bank.features.dtype == torch.float32
    assert torch.equal(bank.features, before)
    assert nn.ModuleList([bank]).double().to("cpu")[0] is bank
    assert bank.features.dtype == torch.float32
    queries, sample_ids, caption_ids = rows_of(32, 1)
    exact = bank.lookup(queries, sample_ids)
    other = copy.deepcopy(bank)
    other.store(queries, sample_ids, caption_ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(bank.lookup(queries, sample_ids), exact)
        bank.store(queries, sample_ids, caption_ids)
    assert torch.equal(bank.features, other.features)
    assert bank.lookup(queries.bfloat16(), sample_ids).features.dtype == torch.float32
    assert bank.lookup(queries.double(), sample_ids).features.dtype == torch.float64


def test_it_moves_with_the_module_and_is_no_parameter() -> None:
    module = nn.ModuleDict({"bank": NeighborBank(8, DIM)})
    assert not list(module.parameters())
    assert {buffer.device.type for buffer in module.to("meta").buffers()} == {"meta"}
    assert module.to_empty(device="cpu")["bank"].get_buffer("features").shape == (8, DIM)


def test_no_gradient_flows_and_storing_does_not_disturb_a_graph() -> None:
    bank = filled(8, 8)
    queries, sample_ids, caption_ids = rows_of(4, 3)
    queries.requires_grad_()
    near = bank.lookup(queries, sample_ids)
    assert not near.features.requires_grad
    assert not near.similarity.requires_grad
    loss = (queries * near.features).sum()
    expected = near.features.clone()
    for _ in range(2):
        bank.store(queries, sample_ids, caption_ids)
    assert not bank.features.requires_grad
    loss.backward()
    assert queries.grad is not None
    assert torch.equal(queries.grad, expected)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0])
def test_a_row_without_a_direction_leaves_its_slot_empty(wrong: float) -> None:
    bank = filled(6, 6)
    features, sample_ids, caption_ids = rows_of(3, 4)
    features[1] = wrong
    bank.store(features, sample_ids, caption_ids)
    assert bank.sample_ids.tolist()[:3] == [sample_ids[0], -1, sample_ids[2]]
    assert bank.caption_ids[1] == -1
    assert int(bank.cursor) == 3
    assert bank.features.isfinite().all()
    near = bank.lookup(torch.randn(50, DIM), torch.full((50,), 5000))
    assert near.found.all()
    assert (near.caption_ids >= 0).all()
    queries, ids, _ = rows_of(2, 5)
    queries[0] = float("nan")
    assert bank.lookup(queries, ids).found.tolist() == [False, True]


def test_compiled_it_is_the_same_without_a_break() -> None:
    bank, other = filled(11, 9, block_rows=4), filled(11, 9, block_rows=4)

    def step(features: Tensor, sample_ids: Tensor, caption_ids: Tensor) -> BankNeighbors:
        near = bank.lookup(features, sample_ids)
        bank.store(features, sample_ids, caption_ids)
        return near

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        rows = rows_of(5, seed)
        found = compiled(*rows)
        assert_same(BankNeighbors(*found), other.lookup(*rows[:2]))
        other.store(*rows)
    for name, buffer in bank.state_dict().items():
        assert torch.equal(buffer, other.state_dict()[name])


class Watch(TorchDispatchMode):
    """Sees every operation: the largest result, and whether the host asked for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.asked = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            self.largest = max(self.largest, value.numel() if isinstance(value, Tensor) else 0)
        self.asked |= "_local_scalar_dense" in str(func) or "nonzero" in str(func)
        return result


def test_a_lookup_takes_a_block_of_memory_and_the_host_never_waits() -> None:
    queries, sample_ids, caption_ids = rows_of(64, 1)
    for size, block_rows in ((2048, 256), (4096, 256), (4096, 4096)):
        bank = filled(size, 100, block_rows=block_rows)
        with Watch() as watch:
            bank.lookup(queries, sample_ids)
        assert watch.largest == 64 * block_rows
        with Watch() as watch:
            bank.store(queries, sample_ids, caption_ids)
            bank.lookup(queries, sample_ids)
            neighbor_metrics(caption_ids, caption_ids, caption_ids > 0, queries[:, 0])
        assert not watch.asked
    with Watch() as watch:
        int(bank.cursor)
    assert watch.asked


@pytest.mark.distributed
def test_processes_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    processes = 2
    run_processes(bank_workers.run, processes, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    for one in found:
        assert one.pop("refused") == (
            "bank_size is 15, but a step brings 16 features at once: set bank_size to at least 16, "
            "or lower global_batch_size."
        )
    whole = bank_workers.steps(slice(None))
    shares: list[float] = []
    for name, expected in whole.items():
        parts = [one[name] for one in found]
        if expected.ndim == 0:
            torch.testing.assert_close(torch.stack(parts).mean(), expected, rtol=1e-6, atol=1e-7)
            shares += [float(part) for part in parts] if "differs" in name else []
        elif name in ("features", "sample_ids", "caption_ids", "cursor"):
            assert all(torch.equal(part, expected) for part in parts)
        else:
            torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-6, atol=1e-7)
    assert len({round(share, 3) for share in shares}) > 2


def test_metrics_of_neighbors_and_their_means_over_processes() -> None:
    own = torch.tensor([1, 2, 3, 4, 5, 6])
    near = torch.tensor([1, 9, 8, 4, -1, 6])
    found = torch.tensor([True, True, True, True, False, True])
    similarity = torch.tensor([0.9, 0.5, 0.1, 1.0, float("nan"), 0.5])
    whole = neighbor_metrics(own, near, found, similarity)
    assert sorted(whole) == ["neighbor_differs", "neighbor_found", "neighbor_similarity"]
    assert float(whole["neighbor_found"]) == pytest.approx(5 / 6)
    assert float(whole["neighbor_differs"] / whole["neighbor_found"]) == pytest.approx(2 / 5)
    assert float(whole["neighbor_similarity"] / whole["neighbor_found"]) == pytest.approx(3.0 / 5)
    halves = [
        neighbor_metrics(own[rows], near[rows], found[rows], similarity[rows])
        for rows in (slice(0, 3), slice(3, 6))
    ]
    for name, value in whole.items():
        mean = (halves[0][name] + halves[1][name]) / 2
        torch.testing.assert_close(mean, value)
    nothing = neighbor_metrics(own, near, torch.zeros(6, dtype=torch.bool), similarity)
    assert [float(value) for value in nothing.values()] == [0.0, 0.0, 0.0]


def test_wrong_input_is_refused_in_a_sentence() -> None:
    with pytest.raises(DeclipError, match="size of the neighbor bank is 0, but it must be at leas"):
        NeighborBank(0, 4)
    with pytest.raises(DeclipError, match="block_rows of the neighbor bank is -1"):
        NeighborBank(4, 4, -1)
    bank = NeighborBank(4, DIM)
    with pytest.raises(
        DeclipError, match="bank_size is 4, but a step brings 5 features at once: set bank_size to"
    ):
        bank.store(*rows_of(5, 0))
    features, sample_ids, caption_ids = rows_of(3, 0)
    with pytest.raises(ValueError, match=r"given features \(3, 4\), but holds vectors of 5"):
        bank.lookup(features[:, :4], sample_ids)
    with pytest.raises(ValueError, match=r"sample_ids are \(2,\) torch.int64, but must be \(3,\)"):
        bank.lookup(features, sample_ids[:2])
    with pytest.raises(ValueError, match=r"caption_ids are \(3,\) torch.int32, but must be"):
        bank.store(features, sample_ids, caption_ids.int())
    with pytest.raises(ValueError, match=r"similarity \(2,\): give vectors of one length"):
        neighbor_metrics(sample_ids, caption_ids, caption_ids > 0, torch.zeros(2))
    with pytest.raises(ValueError, match="with at least one row"):
        neighbor_metrics(*[torch.zeros(0, dtype=torch.int64)] * 4)
    assert int(bank.num_entries()) == 0
