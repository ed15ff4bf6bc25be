"""Steps and settings that must agree: what a training recipe runs depends on what it reads."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_ingest.stages import DownloadShards
from declip_shards import DeclipError
from declip_shards.manifest import settings_of
from pipelines import recipes
from pipelines.options import apply_overrides
from pipelines.wiring import NEIGHBOR_STEPS, allow_missing_table

RECIPE = "cc3m-declip-vit-b-32"


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": ["http://127.0.0.1:9/a.jpg"], "caption": ["a"]}), path)
    return ("--ingest.table", str(path))


def built(tmp_path, *overrides, recipe=RECIPE):
    return apply_overrides(recipes.build(recipe, str(tmp_path / "out")), overrides)


def test_with_a_bank_nothing_is_embedded(tmp_path, table):
    pipeline = built(tmp_path, table)
    assert pipeline.names() == ["ingest", "measure", "plan", "filter", "train"]
    assert set(pipeline.step("train").reads) == {"ingest", "filter"}


def test_with_the_index_its_steps_are_back_and_names_are_carried(tmp_path, table):
    index = ("--train.neighbor-source", "index")
    pipeline = built(tmp_path, table, index, ("--neighbors.name", "near"))
    assert set(NEIGHBOR_STEPS) < set(pipeline.names())
    assert "neighbors" in pipeline.step("train").reads
    assert getattr(pipeline.step("train").stage, "neighbors") == "near"  # noqa: B009
    # A method without neighbors reads no table, whatever its source would be.
    clip = built(tmp_path, table, recipe="cc3m-clip-vit-b-32")
    assert not set(NEIGHBOR_STEPS) & set(clip.names())


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--embed.name", "texts"), ("--index.recall-target", "0.5"), ("--neighbors.name", "near")],
)
def test_settings_of_a_step_that_is_left_out_are_refused(tmp_path, table, flag, value):
    with pytest.raises(DeclipError, match=rf"{flag} is .*neighbor_source bank.*source index"):
        built(tmp_path, table, (flag, value))


def test_a_selections_name_reaches_training_where_nothing_is_embedded(tmp_path, table):
    pipeline = built(tmp_path, table, ("--filter.name", "strict"))
    assert getattr(pipeline.step("train").stage, "selection") == "strict"  # noqa: B009


@pytest.mark.parametrize("recipe", ["pairs", RECIPE])
def test_a_table_may_be_missing_only_where_nothing_is_run(tmp_path, recipe, table):
    missing = ("--ingest.table", str(tmp_path / "none.parquet"))
    pipeline = recipes.build(recipe, str(tmp_path / "out"))
    with pytest.raises(DeclipError, match=r"none\.parquet' does not exist; .*--ingest\.table"):
        apply_overrides(pipeline, [missing])
    looked_at = apply_overrides(allow_missing_table(pipeline), [missing])
    ingest = looked_at.step("ingest").stage
    assert isinstance(ingest, DownloadShards)
    assert ingest.table_sha256 == ""
    # One that is there counts by its content all the same.
    there = apply_overrides(allow_missing_table(pipeline), [table]).step("ingest").stage
    assert there == apply_overrides(pipeline, [table]).step("ingest").stage


@pytest.fixture
def list_(tmp_path):
    path = tmp_path / "list.tsv"
    path.write_text("http://example.com/a.jpg\ta cat on a mat\nhttp://example.com/b.jpg\ta dog\n")
    return ("--sources.lists", str(path))


@pytest.mark.parametrize("recipe", ["pairs", RECIPE])
def test_lists_are_read_by_a_step_of_their_own_and_count_by_their_content(tmp_path, recipe, list_):
    first = built(tmp_path, list_, recipe=recipe)
    assert first.names()[:2] == ["sources", "ingest"]
    assert first.step("ingest").reads == ("sources",)
    copy = tmp_path / "elsewhere" / "list.tsv"
    copy.parent.mkdir()
    copy.write_bytes((tmp_path / "list.tsv").read_bytes())
    again = built(tmp_path, ("--sources.lists", str(copy)), recipe=recipe)

    def digests(pipeline):
        return settings_of(pipeline.step("sources").stage, hashed_only=True)

    assert digests(again) == digests(first)
    copy.write_text("http://example.com/c.jpg\ta third\n")
    assert digests(built(tmp_path, ("--sources.lists", str(copy)), recipe=recipe)) != digests(first)


def test_a_list_and_a_table_of_ones_own_exclude_each_other(tmp_path, table, list_):
    with pytest.raises(DeclipError, match=r"--sources\.lists and --ingest\.table exclude"):
        built(tmp_path, table, list_, recipe="pairs")
    own = built(tmp_path, table, recipe="pairs")
    assert "sources" not in own.names()
    assert own.step("ingest").reads == ()


def test_other_digests_are_another_run_wherever_the_file_lies(tmp_path, list_, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.txt").write_text("0" * 64)

    def ingest(*overrides):
        stage = built(tmp_path, list_, *overrides, recipe="pairs").step("ingest").stage
        return settings_of(stage, hashed_only=True)

    blocked = ("--ingest.blocklists", "block.txt")
    first = ingest(blocked)
    assert first != ingest()
    assert first == ingest(("--ingest.blocklists", str(tmp_path / "block.txt")))
    (tmp_path / "block.txt").write_text("1" * 64)
    assert first != ingest(blocked)
    with pytest.raises(DeclipError, match=r"gone\.txt'.*does not exist"):
        ingest(("--ingest.blocklists", "gone.txt"))
