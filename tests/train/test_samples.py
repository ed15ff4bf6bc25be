"""The list of training samples: what is selected, where it lies, what its neighbors say."""

import dataclasses
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from declip_shards import DeclipError, layout, read_samples, sidecars
from declip_train import shard_listing, tar_cache
from declip_train.sample_columns import NeighborColumns
from declip_train.samples import load_samples, num_changed, training_samples
from declip_train.settings import TrainSettings

if TYPE_CHECKING:
    from tests.train.training_data import write_embeddings, write_training_data
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from training_data import write_embeddings, write_training_data


def test_every_sample_is_the_shards_own(tmp_path):
    store = write_training_data(tmp_path)
    samples = load_samples(str(tmp_path), selection="default", neighbors="captions")
    truth = {s.key: s for shard in layout.list_shards(store) for s in read_samples(store, shard)}
    assert list(samples.keys) == sorted(truth)
    for index, key in enumerate(samples.keys):
        assert samples.read_image(index) == truth[key].image
        assert samples.captions[index] == truth[key].caption
    Image.open(io.BytesIO(samples.read_image(0))).verify()


def test_neighbors_are_joined_by_key(tmp_path):
    store = write_training_data(tmp_path)
    samples = load_samples(str(tmp_path), selection="default", neighbors="captions")
    captions = dict(zip(samples.keys, samples.captions, strict=True))
    for shard in layout.list_shards(store):
        rows = sidecars.read_rows(store, layout.neighbors_path("captions", shard))
        for row in rows:
            own = samples.neighbor_captions[list(samples.keys).index(row["key"])]
            assert own == tuple(captions[k] for k in row["neighbor_keys"])
    assert samples.num_without_neighbor == 2


def test_caption_numbers_are_equal_where_captions_are_and_only_there(tmp_path):
    write_training_data(tmp_path)
    samples = load_samples(
        str(tmp_path), selection="default", splits=("train",), neighbors="captions"
    )
    near = [caption for captions in samples.neighbor_captions for caption in captions]
    texts = [*samples.captions, *near]
    numbers = [*samples.caption_ids.tolist(), *samples.neighbor_caption_ids.tolist()]
    assert len(texts) == len(numbers)
    assert len(set(texts)) == len(set(numbers)) == len(set(zip(texts, numbers, strict=True)))
    assert set(near) - set(samples.captions), "a neighbor outside of the split"
    for index, captions in enumerate(samples.neighbor_captions):
        first, last = samples.neighbor_starts[index : index + 2]
        assert near[first:last] == list(captions)


@pytest.mark.parametrize(
    ("changed", "stored", "joined"),
    [
        ({}, False, True),
        ({"neighbor_feature": "stored"}, True, True),
        ({"method": "clip"}, False, False),
        ({"method": "slip", "neighbor_feature": "stored"}, False, False),
        ({"neighbor_source": "bank"}, False, False),
    ],
)
def test_a_run_reads_what_its_method_asks_for(tmp_path, changed, stored, joined):
    store = write_training_data(tmp_path)
    write_embeddings(store)
    settings = TrainSettings(root=str(tmp_path), model="test", global_batch_size=12, **changed)
    samples = training_samples(settings)
    assert (samples.stored is not None) == stored
    assert any(samples.neighbor_captions) == joined


def test_stored_rows_are_those_of_the_neighbors(tmp_path):
    store = write_training_data(tmp_path)
    vectors = write_embeddings(store)
    samples = load_samples(
        str(tmp_path),
        selection="default",
        splits=("test",),
        neighbors="captions",
        neighbor_embeddings="captions",
        embed_dim=16,
    )
    near = {
        row["key"]: row["neighbor_keys"]
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.neighbors_path("captions", shard))
    }
    wanted = [vectors[key] for own in samples.keys for key in near[own]]
    assert samples.stored is not None
    found = samples.stored.vectors(samples.stored_rows)
    np.testing.assert_allclose(found, np.array(wanted, np.float32), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_a_neighbor_without_a_vector_is_named(tmp_path):
    store = write_training_data(tmp_path)
    rows = sidecars.read_rows(store, layout.neighbors_path("captions", "00000"))
    gone = rows[1]["neighbor_keys"][0]
    write_embeddings(store, without={gone})
    with pytest.raises(DeclipError, match=f"no vector of the neighbor '{gone}'.*rerun the embed"):
        load_samples(
            str(tmp_path),
            selection="default",
            neighbors="captions",
            neighbor_embeddings="captions",
            embed_dim=16,
        )


def test_a_missing_caption_is_an_empty_one(tmp_path):
    store = write_training_data(tmp_path)
    path = layout.shard_parquet_path("00000")
    table = sidecars.read_table(store, path)
    captions = [None, *table.column("caption").to_pylist()[1:]]
    place = table.column_names.index("caption")
    sidecars.write_table(store, path, table.set_column(place, "caption", pa.array(captions)))
    samples = load_samples(str(tmp_path), selection="default")
    assert [c for c in samples.captions if not c] == [""]
    assert samples.captions[samples.keys.index(table.column("key")[0].as_py())] == ""


def test_more_tars_than_may_be_open(tmp_path, monkeypatch):
    store = write_training_data(tmp_path, num_shards=5, samples_per_shard=4)
    monkeypatch.setattr(tar_cache, "_OPEN_TARS", 2)
    samples = load_samples(str(tmp_path), selection="default")
    truth = {s.key: s for shard in layout.list_shards(store) for s in read_samples(store, shard)}
    before = len(os.listdir("/dev/fd"))
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    for index in order:
        assert samples.read_image(index) == truth[samples.keys[index]].image
    assert len(os.listdir("/dev/fd")) <= before + 2


def test_selection_and_split_drop(tmp_path):
    write_training_data(tmp_path, dropped=4)
    everyone = load_samples(str(tmp_path), selection="")
    selected = load_samples(str(tmp_path), selection="default")
    train = load_samples(str(tmp_path), selection="default", splits=("train",))
    assert (len(everyone), len(selected), len(train)) == (48, 40, 20)
    assert train.num_selected == 40
    assert set(train.keys) < set(selected.keys) < set(everyone.keys)


def test_the_digest_follows_the_content(tmp_path):
    write_training_data(tmp_path / "a")
    write_training_data(tmp_path / "b")
    digest = load_samples(str(tmp_path / "a"), selection="default").digest()
    assert load_samples(str(tmp_path / "b"), selection="default").digest() == digest
    write_training_data(tmp_path / "b", dropped=1)
    assert load_samples(str(tmp_path / "b"), selection="default").digest() != digest


def test_the_digest_follows_the_stored_vectors(tmp_path):
    store = write_training_data(tmp_path)
    digests = []
    for dtype in (np.float16, np.float32, np.float16):
        write_embeddings(store, dtype=dtype)
        samples = load_samples(
            str(tmp_path),
            selection="default",
            neighbors="captions",
            neighbor_embeddings="captions",
            embed_dim=16,
        )
        digests.append(samples.digest())
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"selection": "strict"}, "run the filter step"),
        ({"selection": "default", "splits": ("val",)}, "0 of 48 samples"),
        ({"selection": "default", "neighbors": "images"}, "run the neighbors step"),
    ],
)
def test_missing_parts_are_named(tmp_path, arguments, sentence):
    write_training_data(tmp_path)
    with pytest.raises(DeclipError, match=sentence):
        load_samples(str(tmp_path), **arguments)


def test_a_folder_without_shards(tmp_path):
    with pytest.raises(DeclipError, match="holds no finished shard"):
        load_samples(str(tmp_path), selection="default")


def test_a_table_of_other_shards(tmp_path):
    store = write_training_data(tmp_path)
    path = layout.neighbors_path("captions", "00000")
    rows = {"key": ["0000000"], "neighbor_keys": [["9999999"]], "scores": [[1.0]]}
    sidecars.write_table(store, path, pa.table(rows))
    with pytest.raises(DeclipError, match="the table is of other shards"):
        load_samples(str(tmp_path), selection="default", neighbors="captions")


def test_a_tar_cut_during_training(tmp_path):
    write_training_data(tmp_path)
    samples = load_samples(str(tmp_path), selection="default")
    tar = Path(samples.tars.paths[-1])
    tar.write_bytes(tar.read_bytes()[: samples.pool.offsets[-1] + 10])
    with pytest.raises(DeclipError, match="was cut short during training"):
        samples.read_image(len(samples) - 1)


def records(store, shards, **wrong):
    """Ingest's receipts of some shards' tars."""
    for shard in shards:
        path = layout.tar_path(shard)
        digest = wrong.get(f"s{shard}", store.sha256(path))
        content = {"files": [{"path": path, "sha256": digest, "size": store.size(path)}]}
        store.write_bytes(layout.receipt_path("ingest", shard), json.dumps(content).encode())


def test_a_tar_that_is_not_the_one_of_the_manifest_is_named(tmp_path):
    store = write_training_data(tmp_path)
    shards = layout.list_shards(store)
    records(store, shards)
    before = load_samples(str(tmp_path), selection="default")
    path = Path(store.local_path(layout.tar_path("00001")))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[700] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DeclipError, match=r"00001\.tar' is not the file of ingest's man.*rerun"):
        load_samples(str(tmp_path), selection="default")
    # Of a picture that is read before anybody lists the samples again.
    found = before.read_images([0, len(before) - 1])
    assert isinstance(found[0], bytes)
    assert found[1] == f"{str(path)!r} was changed during training"
    path.unlink()
    with pytest.raises(DeclipError, match=r"00001\.tar' cannot be read .*rerun ingest"):
        load_samples(str(tmp_path), selection="default")
    path.write_bytes(whole[: len(whole) // 2])
    store.remove(layout.receipt_path("ingest", "00001"))
    with pytest.raises(DeclipError, match=r"00001\.tar' is cut short at byte"):
        load_samples(str(tmp_path), selection="default")


def test_a_tar_without_its_pictures_is_named(tmp_path):
    store = write_training_data(tmp_path)
    path = store.local_path(layout.tar_path("00000"))
    with tarfile.open(path) as tar:
        names = tar.getnames()[3:]
        kept = [(info, tar.extractfile(info)) for info in tar if info.name in names]
        with tarfile.open(tmp_path / "less.tar", "w") as less:
            for info, content in kept:
                less.addfile(info, content)
    (tmp_path / "less.tar").replace(path)
    with pytest.raises(DeclipError, match="lists 24 wanted samples but its tar holds 23 of them"):
        load_samples(str(tmp_path), selection="default")


def test_what_was_listed_is_listed_once(tmp_path, monkeypatch):
    store = write_training_data(tmp_path, dropped=2)
    first = load_samples(str(tmp_path), selection="default", neighbors="captions")

    def never(*_):
        raise AssertionError("a tar was read again")

    monkeypatch.setattr(shard_listing, "walk_tar", never)
    again = load_samples(str(tmp_path), selection="default", neighbors="captions")
    assert again.digest() == first.digest()
    assert list(again.keys) == list(first.keys)
    assert list(again.neighbor_captions) == list(first.neighbor_captions)
    assert len(load_samples(str(tmp_path), selection="")) == 48
    # Another selection and another table under the same names.
    path = layout.selection_path("default", "00000")
    rows = sidecars.read_rows(store, path)
    sidecars.write_table(store, path, pa.Table.from_pylist([r | {"keep": False} for r in rows]))
    assert len(load_samples(str(tmp_path), selection="default")) == 22
    path = layout.neighbors_path("captions", "00001")
    rows = sidecars.read_rows(store, path)
    sidecars.write_table(
        store, path, pa.Table.from_pylist([r | {"neighbor_keys": [r["key"]]} for r in rows])
    )
    other = load_samples(str(tmp_path), selection="default", neighbors="captions")
    assert list(other.neighbor_captions) == [(caption,) for caption in other.captions]


def test_keys_that_do_not_ascend_are_sorted(tmp_path):
    """Shards whose numbers do not follow their keys, as refetching may leave them."""
    store = write_training_data(tmp_path, num_shards=3, samples_per_shard=6)
    for kind in (layout.tar_path, layout.shard_parquet_path):
        store.move(kind("00000"), "spare")
        store.move(kind("00002"), kind("00000"))
        store.move("spare", kind("00002"))
    samples = load_samples(str(tmp_path), selection="")
    truth = {s.key: s for shard in layout.list_shards(store) for s in read_samples(store, shard)}
    assert list(samples.keys) == sorted(truth)
    assert samples.read_images(range(18)) == [truth[key].image for key in sorted(truth)]
    assert list(samples.captions) == [truth[key].caption for key in sorted(truth)]


def test_picture_sizes_are_the_tables(tmp_path):
    store = write_training_data(tmp_path)
    samples = load_samples(str(tmp_path), selection="default")
    np.testing.assert_array_equal(samples.image_sizes([0, 40]), [[32, 32]] * 2)
    for shard in layout.list_shards(store):
        path = layout.shard_parquet_path(shard)
        table = sidecars.read_table(store, path).drop_columns(["width", "height"])
        sidecars.write_table(store, path, table)
    assert load_samples(str(tmp_path), selection="default").image_sizes([0]) is None


def test_a_dataset_at_a_url(tmp_path):
    write_training_data(tmp_path)
    memory = fsspec.filesystem("memory")
    name = f"/{tmp_path.name}"
    memory.put(str(tmp_path), name, recursive=True)
    cache = str(tmp_path / "cache")
    try:
        far = load_samples(
            f"memory:/{name}", selection="default", neighbors="captions", cache=cache
        )
        near = load_samples(str(tmp_path), selection="default", neighbors="captions")
        assert far.digest() == near.digest()
        assert far.read_images([3, 1]) == near.read_images([3, 1])
    finally:
        memory.rm(name, recursive=True)


def test_changed_neighbors_are_counted(tmp_path):
    write_training_data(tmp_path)
    before = load_samples(str(tmp_path), selection="default", neighbors="captions")
    assert before.near is not None
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.integers(0, 4, len(before))
        counts[5:] = np.where(rng.random(len(before) - 5) < 0.5, 3, counts[5:])
        starts = np.concatenate([[0], counts.cumsum()])
        rows = rng.integers(0, len(before.pool), int(starts[-1])).astype(np.int32)
        near = NeighborColumns(starts=starts, rows=rows)
        after = dataclasses.replace(before, near=near)
        pairs = zip(before.neighbor_captions, after.neighbor_captions, strict=True)
        assert num_changed(before, after) == sum(old != new for old, new in pairs)
    assert num_changed(before, before) == 0
