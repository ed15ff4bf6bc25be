"""The list of training samples: what is selected, where it lies, what its neighbors say."""

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from PIL import Image

from declip_shards import DeclipError, layout, read_samples, sidecars
from declip_train.samples import load_samples

if TYPE_CHECKING:
    from tests.train.training_data import write_training_data
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from training_data import write_training_data


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
    tar = Path(samples.tar_paths[-1])
    tar.write_bytes(tar.read_bytes()[: samples.offsets[-1] + 10])
    with pytest.raises(DeclipError, match="was cut short during training"):
        samples.read_image(len(samples) - 1)
