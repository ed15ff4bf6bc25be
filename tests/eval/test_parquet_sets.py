"""Hugging Face's parquet: every row has its picture, and no part of the files is missing."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_eval.parquet_sets import read_parquet_split
from declip_eval.set_files import DatasetError, SetFolder

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"},
}
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path, columns, features=None, row_group_size=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, path, row_group_size=row_group_size)


def pictures(rows):
    values = [{"bytes": f"picture {row}".encode(), "path": f"{row}.jpg"} for row in rows]
    return pa.array(values, PICTURE)


def write_parts(root, num_parts=2, rows=5, place="data"):
    for part in range(num_parts):
        of_part = range(part * rows, (part + 1) * rows)
        write(
            root / place / f"test-{part:05d}-of-{num_parts:05d}.parquet",
            {"image": pictures(of_part), "label": [row % 3 for row in of_part]},
            FEATURES,
        )


def read(root, split="test", info=None):
    return read_parquet_split(SetFolder(str(root)), split, info)


@pytest.mark.parametrize("place", ["data", "", "test", "plain_text"])
def test_rows_of_all_files_are_read_in_order(tmp_path, place):
    write_parts(tmp_path, place=place)
    parts = read(tmp_path)
    assert parts.keys == [f"{row:08d}" for row in range(10)]
    assert parts.labels.tolist() == [row % 3 for row in range(10)]
    assert parts.label_names == (("cat",), ("dog",), ("owl",))
    wanted = [9, 0, 4, 5, 4]
    assert parts.places.read(wanted) == [f"picture {row}".encode() for row in wanted]
    assert read(tmp_path, "train") is None


def test_places_reach_another_process_without_pictures(tmp_path):
    write_parts(tmp_path)
    places = read(tmp_path).places
    places.read([0])
    copy = pickle.loads(pickle.dumps(places))
    assert b"picture" not in pickle.dumps(places)
    assert copy.read([7]) == [b"picture 7"]


def test_a_missing_part_is_refused(tmp_path):
    write_parts(tmp_path, num_parts=3)
    (tmp_path / "data" / "test-00001-of-00003.parquet").unlink()
    with pytest.raises(DatasetError, match="one of 3 parquet files, but part 00001 is not there"):
        read(tmp_path)


def test_files_of_two_copies_are_refused(tmp_path):
    write_parts(tmp_path, num_parts=2)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", {"image": pictures([0]), "label": [0]})
    with pytest.raises(DatasetError, match="there are other parts too"):
        read(tmp_path)


def test_a_cut_file_is_refused(tmp_path):
    write_parts(tmp_path, num_parts=1)
    file = tmp_path / "data" / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="is no readable parquet"):
        read(tmp_path)


def test_a_column_split_is_obeyed(tmp_path):
    columns = {
        "image": pictures(range(4)),
        "caption": [["a", "b"], ["c"], ["d"], ["e"]],
        "split": ["train", "test", "test", "val"],
    }
    write(tmp_path / "test-00000-of-00001.parquet", columns)
    parts = read(tmp_path)
    assert parts.captions == [("c",), ("d",)]
    assert parts.places.read([0, 1]) == [b"picture 1", b"picture 2"]
    write(tmp_path / "dev.parquet", columns)
    with pytest.raises(DatasetError, match="with test, train, val, and no row of 'dev'"):
        read(tmp_path, "dev")


def test_keys_are_the_files_own_where_they_have_some(tmp_path):
    columns = {"__key__": ["x", "y"], "png": [b"one", b"two"], "cls": [1, 0]}
    write(tmp_path / "test.parquet", columns)
    parts = read(tmp_path)
    assert (parts.keys, parts.labels.tolist()) == (["x", "y"], [1, 0])
    assert parts.places.read([1]) == [b"two"]


def test_a_row_without_picture_is_said_in_words(tmp_path):
    image = pa.array([{"bytes": None, "path": "a.jpg"}, None, {"bytes": b"x"}], PICTURE)
    write(tmp_path / "test.parquet", {"image": image, "label": [0, 0, 0]})
    found = read(tmp_path).places.read([0, 1, 2])
    assert "only a path is stored, no picture (a.jpg)" in str(found[0])
    assert "no picture is stored" in str(found[1])
    assert found[2] == b"x"


def test_a_file_that_went_away_is_said_in_words(tmp_path):
    write_parts(tmp_path)
    places = read(tmp_path).places
    (tmp_path / "data" / "test-00001-of-00002.parquet").unlink()
    found = places.read([9, 0])
    assert found[1] == b"picture 0"
    assert "cannot be read at row group" in str(found[0])
