import re
from typing import Any

import pyarrow as pa
import pytest

from declip_filter.columns import ColumnReader
from declip_shards import DeclipError, Store, layout, sidecars


@pytest.fixture
def tables(tmp_path):
    """Two signal sets and a shard's table, whose rows are in another order and have a failure."""
    store = Store(str(tmp_path))
    basic = {"key": ["a", "b"], "words": [1, 2], "both": [5, 6]}
    scores = {"key": ["a", "b"], "score": [0.5, float("nan")], "kind": ["x", None]}
    own = {
        "key": ["b", "c", "a"],
        "status": ["success", "failed_to_download", "success"],
        "caption": ["cap b", "cap c", None],
        "both": ["own", "own", "own"],
        "fold": [2, 3, 1],
    }
    for path, table in (
        (layout.signals_path("basic", "00000"), basic),
        (layout.signals_path("scores", "00000"), scores),
        (layout.shard_parquet_path("00000"), own),
    ):
        sidecars.write_table(store, path, pa.table(table))
    return store


def read(store, wanted, **settings):
    settings = {"signals": ("basic", "scores", "absent"), **settings}
    reader = ColumnReader(store=store, wanted=wanted, **settings)
    return {name: column.to_pylist() for name, column in reader.read("00000").items()}


def test_columns_are_joined_by_key_and_signals_come_first(tables):
    found = read(tables, ("words", "both", "score", "kind", "caption"))
    assert found == {
        "key": ["a", "b"],
        "words": [1, 2],
        "both": [5, 6],
        "score": [0.5, None],
        "kind": ["x", None],
        "caption": [None, "cap b"],
    }


def test_nothing_else_is_read(tables):
    tables.remove(layout.signals_path("scores", "00000"))
    assert read(tables, ("words",)) == {"key": ["a", "b"], "words": [1, 2]}
    tables.remove(layout.shard_parquet_path("00000"))
    with pytest.raises(DeclipError, match=r"^'shards/00000.parquet' is missing; rerun the stage"):
        read(tables, ("words",), is_checked=True)


def test_a_split_is_text_and_may_be_missing_where_a_value_stands_in(tables):
    found = read(tables, ("fold",), split_column="fold")
    assert found["fold"] == ["1", "2"]
    assert read(tables, ("split",), fallback={"split": "train"})["split"] == ["train"] * 2
    assert read(tables, ("both",), split_column="both")["both"] == ["own", "own"]
    with pytest.raises(DeclipError, match=r"split_column is 'folds'.*Did you mean 'fold'"):
        read(tables, ("folds",), split_column="folds")


def test_concepts_are_counted_in_captions(tables):
    def count(captions):
        return pa.array([len(text or "") for text in captions.to_pylist()])

    assert read(tables, ("num_concepts",), count_concepts=count)["num_concepts"] == [0, 5]


def test_what_is_nowhere_is_refused_with_the_nearest_name(tables):
    hint = r"no signal 'scor' in basic, scores.*Did you mean 'score'.*absent are named but not"
    with pytest.raises(DeclipError, match=hint):
        read(tables, ("scor",))
    for column, made in (
        ("clip_score", "ScorePairs makes it: set --score.scorer clip:cosine; name"),
        ("aesthetics_score", "ScorePairs makes it: set --score.scorer aesthetics:FILE; name"),
        ("image_cluster_is_referenced", "ClusterImages makes it: set --cluster.references FILE"),
        ("duplicate_caption_of", "FindDuplicates makes it: set --duplicates.rungs bytes,caption;"),
        ("contaminated_by", "FindDuplicates makes it: set --duplicates.eval-sets NAME=PATH; name"),
        ("caption_nouns", "MeasureImages makes it: set --measure.wordnet FOLDER; name its set in"),
        ("entropy", "MeasureImages makes it: run the stage that measures; name its set in"),
    ):
        with pytest.raises(DeclipError, match=re.escape(made)):
            read(tables, (column,))
    with pytest.raises(DeclipError) as caught:
        read(tables, ("scor",))
    known = str(caught.value).partition("Known: ")[2].partition(".")[0].split(", ")
    assert len(known) == len(set(known)), "both sides have a column of this name"
    with pytest.raises(DeclipError, match=r"signals 'nosuch' lack shard 00000"):
        read(tables, ("words",), signals=("nosuch",))


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (layout.signals_path("scores", "00000"), "signals 'basic' and 'scores' of shard 00000"),
        (layout.shard_parquet_path("00000"), "signals 'basic' of shard 00000 are of other samples"),
    ],
)
def test_tables_of_other_samples_are_refused(tables, path, sentence):
    sidecars.write_table(tables, path, sidecars.read_table(tables, path).slice(1))
    with pytest.raises(DeclipError, match=sentence):
        read(tables, ("words", "score", "caption"))


def test_a_column_of_two_sets_is_refused(tables):
    path = layout.signals_path("scores", "00000")
    table = sidecars.read_table(tables, path).append_column("words", pa.array([1, 2]))
    sidecars.write_table(tables, path, table)
    with pytest.raises(DeclipError, match="both have a column 'words'"):
        read(tables, ("words",))


def test_types_are_known_without_reading_rows(tables, monkeypatch):
    wanted = ("words", "score", "caption", "split", "num_concepts")
    settings: dict[str, Any] = {"signals": ("basic", "scores"), "fallback": {"split": "train"}}

    def count(captions):
        return pa.array([len(text or "") for text in captions.to_pylist()], pa.int32())

    reader = ColumnReader(store=tables, wanted=wanted, count_concepts=count, **settings)
    whole = {name: column.type for name, column in reader.read("00000").items()}
    monkeypatch.setattr(sidecars, "read_table", None)
    empty = ColumnReader(store=tables, wanted=wanted, **settings).empty("00000")
    assert {name: column.type for name, column in empty.items()} == whole
    assert {len(column) for column in empty.values()} == {0}


def test_a_split_of_no_texts_is_refused(tables):
    path = layout.shard_parquet_path("00000")
    table = sidecars.read_table(tables, path).append_column("boxes", pa.array([[1], [2], []]))
    sidecars.write_table(tables, path, table)
    for ask in ("read", "empty"):
        reader = ColumnReader(
            store=tables, wanted=("boxes",), signals=("basic",), split_column="boxes"
        )
        with pytest.raises(DeclipError, match=r"column 'boxes' is list<.*; set split_column to"):
            getattr(reader, ask)("00000")


def test_types_of_all_signals_are_told_without_reading_rows(tables):
    reader = ColumnReader(store=tables, wanted=(), signals=("basic", "scores", "absent"))
    with pytest.raises(DeclipError, match=r"^signals 'nosuch' lack shard 00000: 'signals/nosuch"):
        ColumnReader(store=tables, wanted=(), signals=("nosuch",)).schema("00000")
    kinds = reader.schema("00000")
    assert list(kinds) == ["words", "both", "score", "kind"]
    assert kinds["score"] == pa.float64()
