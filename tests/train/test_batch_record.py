"""A kept batch comes back as it was; missing and damaged shares are named."""

import dataclasses
import json

import pytest
import torch

from declip_shards import DeclipError
from declip_train.batch import Batch
from declip_train.batch_record import (
    BatchRecord,
    GeneratorStates,
    newest_step,
    read_records,
    read_weights,
    write_record,
    write_weights,
)
from declip_train.device_views import ColorBatch
from declip_train.settings import TrainSettings

CPU = torch.device("cpu")


def make_batch(step=7, *, rows=3, colors=False):
    ids = torch.arange(rows * 5).view(rows, 5)
    drawn = ColorBatch(
        order=torch.arange(4).repeat(rows, 1),
        factors=torch.rand(rows, 4),
        jitter=torch.ones(rows, dtype=torch.bool),
        gray=torch.zeros(rows, dtype=torch.bool),
        sigma=torch.rand(rows),
    )
    return Batch(
        step=step,
        epoch=2,
        images=torch.randint(0, 255, (1, rows, 4, 4, 3), dtype=torch.uint8)
        if colors
        else torch.randn(1, rows, 3, 4, 4),
        token_ids=ids,
        # Shares its memory, as a loader's tensors may.
        targets=ids,
        mask_positions=ids > 4,
        sample_ids=torch.arange(rows),
        caption_ids=torch.arange(rows),
        lengths={"token_ids": torch.full((rows,), 5)},
        colors=drawn if colors else None,
    )


def make_record(rank=0, world_size=1, batch=None):
    batch = batch or make_batch()
    return BatchRecord(
        step=batch.step,
        rank=rank,
        world_size=world_size,
        fault="the loss term 'contrastive' became nan",
        terms={"contrastive": "nan", "total": "nan"},
        keys=["000000001", "000000002", "ü\udc80"],
        bad_keys=["000000002"],
        bad_parameter=None,
        previous_keys=[],
        settings=TrainSettings(root="/somewhere", model="test"),
        batch=batch,
        generators=GeneratorStates.take(CPU),
    )


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            same(one[name], other[name])
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            same(*pair)
    else:
        assert one == other


@pytest.mark.parametrize("colors", [False, True])
def test_reading_inverts_writing(tmp_path, colors):
    record = make_record(batch=make_batch(colors=colors))
    path = write_record(tmp_path / "bad_batches", record)
    assert path.name == "step_00000007_rank_00000.json"
    (found,) = read_records(path.parent, 7)
    same(found, dataclasses.replace(record, settings=TrainSettings(model="test")))


def test_the_same_record_is_the_same_bytes(tmp_path):
    record = make_record()
    paths = [write_record(tmp_path / name, record) for name in "ab"]
    for suffix in (".json", ".safetensors"):
        one, other = (path.with_suffix(suffix).read_bytes() for path in paths)
        assert one == other


def test_shares_come_in_the_order_of_processes(tmp_path):
    for rank in (2, 0, 1):
        write_record(tmp_path, make_record(rank, 3))
    assert [record.rank for record in read_records(tmp_path, 7)] == [0, 1, 2]
    assert newest_step(tmp_path) == 7
    write_record(tmp_path, make_record(batch=make_batch(40)))
    assert newest_step(tmp_path) == 40
    assert newest_step(tmp_path / "nothing") is None


def test_what_cannot_be_replayed_is_refused(tmp_path):
    with pytest.raises(DeclipError, match=r"holds no batch of step 7; training keeps one there"):
        read_records(tmp_path, 7)
    write_record(tmp_path, make_record(1, 2))
    with pytest.raises(DeclipError, match=r"the shares of processes \[1\] of step 7, but 2"):
        read_records(tmp_path, 7)
    path = write_record(tmp_path, make_record(0, 2))
    write_record(tmp_path, make_record(1, 2))
    whole = path.read_text()
    path.write_text(whole[:100])
    with pytest.raises(DeclipError, match=r"rank_00000.json' cannot be read .*fails at the same"):
        read_records(tmp_path, 7)
    path.write_text(json.dumps(json.loads(whole) | {"format_version": 9}))
    with pytest.raises(DeclipError, match=r"has format 9, not 1; read it with the version"):
        read_records(tmp_path, 7)
    path.write_text(whole)
    tensors = path.with_suffix(".safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(DeclipError, match=r"cannot be read .*run the training again"):
        read_records(tmp_path, 7)


def test_weights_with_shared_memory_come_back(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    module[0].bias = module[1].bias
    assert read_weights(tmp_path, 5) is None
    path = write_weights(tmp_path, 5, module)
    found = read_weights(tmp_path, 5)
    same(found, dict(module.state_dict()))
    path.write_bytes(b"xyz")
    with pytest.raises(DeclipError, match=r"weights.safetensors' cannot be read .*; delete it"):
        read_weights(tmp_path, 5)


def test_generators_go_on_from_where_they_were():
    torch.manual_seed(5)
    states = GeneratorStates.take(CPU)
    first = torch.rand(4)
    states.put_back(CPU)
    assert torch.equal(torch.rand(4), first)
