"""Pools and joins: every key finds its row, whatever the order."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_shards import DeclipError
from declip_train.column_files import cached_columns
from declip_train.sample_columns import (
    PIECE,
    RowFinder,
    SamplePool,
    fingerprint_of,
    joined_neighbors,
    piece_columns,
    piece_of,
    pool_columns,
)

KEYS = st.lists(st.text("abz", min_size=1, max_size=3), unique=True, max_size=12)


def piece(keys):
    """A tar of pairs that follow from their keys."""
    size = len(keys)
    return pa.table(
        {
            "key": keys,
            "caption": [f"about {key[0]}" for key in keys],
            "offset": np.arange(size, dtype=np.int64) * 1000,
            "size": np.arange(size, dtype=np.int32) + 7,
            "height": np.full(size, 3, np.int32),
            "width": np.full(size, 4, np.int32),
        },
        schema=PIECE,
    )


def pool_of(base, pieces, *, by_key, name="0" * 64):
    return SamplePool.of(
        cached_columns(base, "k", name, lambda: pool_columns(pieces, by_key=by_key), what="x")
    )


@settings(max_examples=20, deadline=None)
@given(keys=KEYS, cut=st.integers(0, 12), by_key=st.booleans())
def test_a_pool_holds_every_pair_once(tmp_path_factory, keys, cut, by_key):
    pieces = [piece(keys[:cut]), piece([]), piece(keys[cut:])]
    pool = pool_of(tmp_path_factory.mktemp("c"), pieces, by_key=by_key)
    assert list(pool.keys) == (sorted(keys) if by_key else keys)
    whole = pa.concat_tables(pieces).to_pylist()
    truth = {row["key"]: (*row.values(),) for row in whole}
    sizes = np.zeros((0, 2)) if pool.image_sizes is None else pool.image_sizes
    found = zip(pool.keys, pool.captions, pool.offsets, pool.sizes, *sizes.T, strict=True)
    assert [*map(tuple, found)] == [truth[key] for key in pool.keys]
    for number in range(3):
        own = pool.keys.take(pool.rows_of_tar(number))
        assert sorted(own) == sorted(pieces[number].column("key").to_pylist())
    captions = list(pool.captions)
    ids = pool.caption_ids.tolist()
    assert len(set(zip(captions, ids, strict=True))) == len(set(captions)) == len(set(ids))
    assert [captions[row] for row in pool.caption_firsts] == list(dict.fromkeys(captions))


def test_a_pool_without_sizes_says_none(tmp_path):
    table = piece(["a"])
    for side in ("height", "width"):
        at = table.schema.get_field_index(side)
        table = table.set_column(at, PIECE.field(side), pa.array([0], pa.int32()))
    assert pool_of(tmp_path, [table], by_key=True).image_sizes is None


def test_a_piece_comes_back(tmp_path):
    table = piece(["b", "a", "c"]).slice(1)
    columns = cached_columns(
        tmp_path, "k", "1" * 64, lambda: (piece_columns(table.combine_chunks()), {}), what="x"
    )
    assert piece_of(columns).equals(table)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), group=st.integers(1, 9))
def test_neighbors_are_joined_as_a_dictionary_would(tmp_path_factory, data, group):
    keys = sorted(data.draw(KEYS.filter(len)))
    spread = data.draw(st.permutations(keys))
    tars = [spread[first : first + 2] for first in range(0, len(keys), 2)]
    pool = pool_of(tmp_path_factory.mktemp("c"), [piece(own) for own in tars], by_key=True)
    rows = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=12, max_size=12))[: len(keys)])
    near = {k: data.draw(st.lists(st.sampled_from(keys), max_size=3)) for k in keys}
    listed = spread[: data.draw(st.integers(0, len(keys)))]
    tables = [
        (
            f"{first}.parquet",
            pa.table(
                {
                    "key": pa.array(some, pa.string()),
                    "neighbor_keys": pa.array([near[k] for k in some], pa.list_(pa.string())),
                }
            ),
        )
        for first in range(0, len(listed), 2)
        for some in [listed[first : first + 2]]
    ]
    starts, found = joined_neighbors(tables, pool, rows, group)
    assert len(starts) == len(rows) + 1
    for sample, row in enumerate(rows):
        own = [keys[n] for n in found[starts[sample] : starts[sample + 1]]]
        assert own == (near[keys[row]] if keys[row] in listed else [])


@pytest.mark.parametrize(
    ("row", "what"),
    [({"key": "q", "neighbor_keys": ["a"]}, "sample"), ({"key": "a", "neighbor_keys": ["q"]}, "n")],
)
def test_a_table_of_other_shards_is_named(tmp_path, row, what):
    pool = pool_of(tmp_path, [piece(["a", "b"])], by_key=True)
    tables = [("n/0.parquet", pa.Table.from_pylist([row]))]
    with pytest.raises(DeclipError, match=f"'n/0.parquet' names the {what}.* 'q', which no shard"):
        joined_neighbors(tables, pool, np.arange(2), 10)


def test_a_file_of_another_tar_is_named(tmp_path):
    pool = pool_of(tmp_path, [piece(["a", "b"]), piece(["c"])], by_key=True)
    files = [
        (f"n/{number}.parquet", pa.Table.from_pylist([{"key": key, "neighbor_keys": ["b"]}]))
        for number, key in enumerate("cc")
    ]
    with pytest.raises(DeclipError, match=r"'n/0.parquet' names the sample 'c', which another"):
        joined_neighbors(files, pool, np.arange(3), 10)


def test_rows_are_found_and_missing_ones_told(tmp_path):
    pool = pool_of(tmp_path, [piece(["a", "c"])], by_key=True)
    assert RowFinder(pool.keys)(pa.array(["c", "b", "a"])).tolist() == [1, -1, 0]


def test_the_fingerprint_is_of_the_rows_and_not_of_how_they_lie(tmp_path):
    keys = [f"{n:02d}" for n in range(20)]
    whole = piece(keys)
    cuts = {"1": [whole], "2": [whole.slice(0, 7), whole.slice(7)], "3": [whole, piece(["99"])]}
    prints = {
        fingerprint_of(pool_of(tmp_path, cut, by_key=True, name=name * 64), np.arange(20))
        for name, cut in cuts.items()
    }
    assert len(prints) == 1
    pool = pool_of(tmp_path, [whole], by_key=True, name="1" * 64)
    assert fingerprint_of(pool, np.arange(19)) not in prints
    assert fingerprint_of(pool, np.arange(20), ("parts",)) not in prints
    for column, value in (("caption", "other"), ("offset", 5), ("size", 5), ("key", "000")):
        values = whole.column(column).to_pylist()
        at = PIECE.get_field_index(column)
        changed = pa.array([value, *values[1:]], PIECE.field(column).type)
        table = whole.set_column(at, PIECE.field(column), changed)
        other = pool_of(tmp_path, [table], by_key=True, name=f"{at + 4}" * 64)
        assert fingerprint_of(other, np.arange(20)) not in prints
