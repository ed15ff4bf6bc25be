"""Every recipe builds; settings that must agree do, and a user's table counts by its content."""

import dataclasses
import functools
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_ingest.stages import DownloadShards
from declip_ingest.table import table_digest
from declip_shards import DeclipError, Stage, manifest
from pipelines import recipes
from pipelines.demo_server import DemoServer
from pipelines.options import apply_overrides

CAPTIONS = ["a red square", "a blue circle"]


def write_pairs(path, captions=CAPTIONS):
    urls = [f"http://127.0.0.1:9/{n}.jpg" for n in range(len(captions))]
    pq.write_table(pa.table({"url": urls, "caption": captions}), path)
    return path


def fingerprint(pipeline, name):
    step = pipeline.step(name)
    return manifest.fingerprint(step.stage, step.code_version, {})


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_every_recipe_builds_and_says_its_command_and_what_to_expect(name):
    text = recipes.describe(name)
    first, *others = text.splitlines()
    assert first.endswith(".")
    command = next(line for line in others if line.startswith("Command: "))
    assert f"declip run {name}" in command
    assert any(line.startswith("Expect: ") for line in others)
    pipeline = recipes.build(name, "somewhere")
    assert pipeline.recipe == name
    for step in pipeline.steps:
        assert {f.name for f in dataclasses.fields(step.stage)} >= {"root"}  # type: ignore[arg-type]
        assert isinstance(step.stage, Stage)
        assert re.fullmatch(r"[a-z_]+", step.name)
        assert step.summary
        assert manifest.settings_of(step.stage, hashed_only=False)["root"] == "somewhere"
    assert f"  {name}" in recipes.listing()


@pytest.mark.parametrize("step", recipes.build("demo", "x").steps, ids=lambda step: step.name)
def test_the_code_of_every_step_has_a_version(step):
    # It is part of the fingerprint: without it a new release would not run the step again.
    assert re.fullmatch(r"declip_shards \d+\.\d+\.\d+(, \w+ \d+\.\d+\.\d+)+", step.code_version)


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_where_the_dataset_lies_is_in_no_fingerprint(name, tmp_path):
    here = recipes.build(name, str(tmp_path / "here"))
    there = recipes.build(name, str(tmp_path / "there"))
    for step in here.steps:
        assert fingerprint(here, step.name) == fingerprint(there, step.name)


def test_every_step_of_the_demo_reads_what_it_needs():
    demo = recipes.build("demo", "x")
    reads = {step.name: set(step.reads) for step in demo.steps}
    assert reads["prepare"] == set()
    assert reads["ingest"] == {"prepare"}
    # What a change must reach, by whichever way.
    reached = {name: set(found) for name, found in reads.items()}
    for name in demo.names():
        reached[name] |= set().union(*(reached[other] for other in reads[name]))
    assert reached["report"] == set(demo.names()) - {"report"}
    assert "filter" in reached["train"]
    assert "filter" not in reached["measure"]


def test_the_demos_port_is_set_once(tmp_path):
    demo = apply_overrides(recipes.build("demo", str(tmp_path)), [("--prepare.port", "20200")])
    ingest = demo.step("ingest")
    assert manifest.settings_of(ingest.stage, hashed_only=True)["allow_addresses"] == [
        "127.0.0.1:20200",
        "127.0.0.1:20201",
    ]
    (tmp_path / "source").mkdir()
    assert ingest.service is not None
    server = ingest.service()
    assert isinstance(server, DemoServer)
    assert server.port == 20200
    own = apply_overrides(
        recipes.build("demo", str(tmp_path)), [("--ingest.allow-addresses", "127.0.0.1:5")]
    )
    settings = manifest.settings_of(own.step("ingest").stage, hashed_only=True)
    assert settings["allow_addresses"] == ["127.0.0.1:5"]


def test_results_bear_the_name_of_the_model_that_was_trained_unless_told_otherwise(tmp_path):
    def name(*overrides):
        pipeline = apply_overrides(recipes.build("demo", str(tmp_path)), overrides)
        return manifest.settings_of(pipeline.step("eval").stage, hashed_only=True)["model"]

    assert name() == recipes.DEMO_TRAINING["model"]
    assert name(("--train.model", "test")) == "test"
    assert name(("--train.model", "test"), ("--eval.model", "mine")) == "mine"


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build = functools.partial(recipes.build, "pairs", str(tmp_path / "out"))
    return lambda *overrides: apply_overrides(build(), overrides)


def ingest_of(pipeline):
    stage = pipeline.step("ingest").stage
    assert isinstance(stage, DownloadShards)
    return stage


def test_a_table_is_found_from_where_the_command_is_given(pairs, tmp_path):
    (tmp_path / "lists").mkdir()
    table = write_pairs(tmp_path / "lists" / "mine.parquet")
    by_name = ingest_of(pairs(("--ingest.table", "lists/mine.parquet")))
    assert by_name.table_location() == str(table)
    assert by_name.tasks() == ["00000"]
    by_path = ingest_of(pairs(("--ingest.table", str(table))))
    assert by_path == by_name
    by_url = ingest_of(pairs(("--ingest.table", f"file://{table}")))
    assert by_url.table_sha256 == by_name.table_sha256


def test_a_table_counts_by_its_content_not_its_place(pairs, tmp_path):
    table = write_pairs(tmp_path / "mine.parquet")
    first = pairs(("--ingest.table", "mine.parquet"))
    assert ingest_of(first).table_sha256 == table_digest(str(table))
    table.rename(tmp_path / "moved.parquet")
    moved = pairs(("--ingest.table", "moved.parquet"))
    assert fingerprint(moved, "ingest") == fingerprint(first, "ingest")
    write_pairs(tmp_path / "moved.parquet", [*CAPTIONS, "a green cross"])
    changed = pairs(("--ingest.table", "moved.parquet"))
    assert fingerprint(changed, "ingest") != fingerprint(first, "ingest")
    assert fingerprint(changed, "filter") == fingerprint(first, "filter")


def test_a_digest_of_ones_own_is_kept_and_held_to(pairs, tmp_path):
    write_pairs(tmp_path / "mine.parquet")
    given = pairs(("--ingest.table", "mine.parquet"), ("--ingest.table-sha256", "0" * 64))
    with pytest.raises(DeclipError, match="has changed"):
        ingest_of(given).tasks()


def test_a_missing_table_is_a_sentence_with_the_option(pairs, tmp_path):
    with pytest.raises(DeclipError, match=r"no list is named; .*--sources\.lists FILE"):
        pairs()
    with pytest.raises(DeclipError, match=r"gone\.tsv'"):
        pairs(("--sources.lists", "gone.tsv"))
    with pytest.raises(DeclipError, match=r"'file:///no/where\.csv' does not exist"):
        pairs(("--ingest.table", "file:///no/where.csv"))


def test_another_table_in_the_demo_counts_by_its_content_too(tmp_path):
    table = write_pairs(tmp_path / "mine.parquet")

    def ingest():
        demo = recipes.build("demo", str(tmp_path / "out"))
        return ingest_of(apply_overrides(demo, [("--ingest.table", str(table))]))

    before = ingest().table_sha256
    write_pairs(table, CAPTIONS[:1])
    assert before
    assert ingest().table_sha256 != before
    # The demo's own is known by the manifest of the step that wrote it.
    own = recipes.build("demo", str(tmp_path / "out"))
    assert ingest_of(apply_overrides(own, [])).table_sha256 == ""


def test_an_unknown_recipe_gets_the_nearest_name():
    with pytest.raises(DeclipError, match=r"no recipe 'pars'\. Did you mean 'pairs'"):
        recipes.build("pars", "x")


def test_a_name_set_once_reaches_the_steps_that_read_what_it_names():
    overrides = [("--filter.name", "strict"), ("--neighbors.name", "near"), ("--embed.name", "t")]
    settings = {
        step.name: manifest.settings_of(step.stage, hashed_only=False)
        for step in apply_overrides(recipes.build("demo", "somewhere"), overrides).steps
    }
    assert [settings[s]["selection"] for s in ("embed", "train", "report")] == ["strict"] * 3
    assert [settings[s]["neighbors"] for s in ("train", "report")] == ["near"] * 2
    assert settings["index"]["embeddings"] == "t"


def test_our_own_checkpoint_is_an_encoder_by_its_name():
    overrides = [("--embed.encoder", "checkpoint:train/export"), ("--embed.images", "true")]
    pipeline = apply_overrides(recipes.build("demo", "somewhere"), overrides)
    stage = manifest.settings_of(pipeline.step("embed").stage, hashed_only=False)
    assert stage["encoder_factory"] == "pipelines.encoders:checkpoint_encoder"
