"""The recipe that repacks, and other recipes in what it made: run by the real runner."""

import dataclasses
import hashlib
import shutil
from pathlib import Path

import pytest

from declip_filter import FilterPairs, MeasureImages
from declip_filter.plan import PlanFilter
from declip_filter.repack import RepackShards
from declip_filter.repack_state import (
    SIZES_PATH,
    STEP,
    finish,
    is_repacked,
    is_unfinished,
    mark_path,
)
from declip_ingest.stages import DownloadShards
from declip_shards import DeclipError, Store, TaskStats, layout, manifest, read_samples
from declip_shards.fakes import write_fake_dataset
from pipelines.options import apply_overrides
from pipelines.pipeline import Pipeline, Step
from pipelines.recipes import RECIPES
from pipelines.repack_recipe import derive_repack, on_repacked, repack
from pipelines.runner import run_pipeline
from pipelines.states import pipeline_states

NUM_SHARDS, PER_SHARD = 3, 16
SETTINGS = [("--repack.shard-size", "10")]


def recipe(root: str) -> Pipeline:
    """What every recipe begins with, without what needs a model."""
    steps = [
        Step(name="ingest", stage=DownloadShards(root=root)),
        Step(name="measure", stage=MeasureImages(root=root), reads=("ingest",)),
        Step(
            name="plan",
            stage=PlanFilter(root=root, signals=("basic",)),
            reads=("measure",),
            settings_of="filter",
        ),
        Step(
            name="filter",
            stage=FilterPairs(root=root, signals=("basic",)),
            reads=("measure", "plan"),
        ),
    ]
    return Pipeline(recipe="small", root=root, steps=steps)


@pytest.fixture
def store(made: Store, tmp_path: Path) -> Store:
    """A copy of one's own."""
    return Store(str(shutil.copytree(made.root, tmp_path / "copy")))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A dataset with ingest's manifest, measured and filtered by the runner; shard 2 is dropped."""
    root = str(tmp_path_factory.mktemp("made") / "data")
    store = write_fake_dataset(root, num_shards=NUM_SHARDS, samples_per_shard=PER_SHARD)
    pipeline = recipe(root)
    ingest = pipeline.steps[0]
    receipts = []
    digest = manifest.fingerprint(ingest.stage, ingest.code_version, {})
    for shard in layout.list_shards(store):
        files = [layout.tar_path(shard), layout.shard_parquet_path(shard)]
        stats = TaskStats(
            num_in=PER_SHARD,
            num_out=PER_SHARD,
            files=files,
            volatile_files=[layout.shard_stats_path(shard)],
        )
        receipts.append(manifest.make_receipt(store, shard, digest, stats))
        manifest.write_receipt(store, "ingest", receipts[-1])
    made = manifest.build_manifest(
        step="ingest",
        stage=ingest.stage,
        code_version=ingest.code_version,
        inputs={},
        receipts=receipts,
    )
    manifest.write_manifest(store, made)
    run_pipeline(pipeline, pipeline.steps[1:], runner="local")
    return store


def run(root: str) -> Store:
    """Repack by the recipe; the new dataset."""
    pipeline = apply_overrides(repack(root), SETTINGS)
    run_pipeline(pipeline, pipeline.steps, runner="local")
    return Store(f"{root}/repacked/selected")


def digests(store: Store) -> dict[str, str]:
    return {
        str(path.relative_to(store.root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(store.root).rglob("*"))
        if path.is_file()
    }


def test_a_second_run_has_nothing_to_do_and_a_changed_selection_runs_again(store):
    target = run(store.url)
    num = sum(len(list(read_samples(target, s))) for s in layout.list_shards(target))
    assert num == 2 * PER_SHARD
    pipeline = apply_overrides(repack(store.url), SETTINGS)
    assert [state.state for state in pipeline_states(pipeline)] == ["done", "done"]
    filters = apply_overrides(recipe(store.url), [("--filter.keep-splits", "test")])
    run_pipeline(filters, filters.steps[1:], runner="local")
    pipeline = apply_overrides(repack(store.url), SETTINGS)
    states = pipeline_states(pipeline)
    assert [state.state for state in states] == ["stale", "stale"]
    assert "repack.inputs-sha256 changed" in states[0].why
    target = run(store.url)
    keys = [s.key for s in read_samples(target, "00000")]
    assert keys
    assert all(key.startswith("00002") for key in keys)
    assert layout.list_shards(target) == ["00000", "00001"], "shards of the first run are left"


def test_a_recipe_finds_done_in_the_repacked_dataset_what_was_carried_over(store):
    target = run(store.url)
    assert is_repacked(target)
    assert not is_repacked(store)
    pipeline = apply_overrides(on_repacked(recipe(target.url)), [])
    states = {state.step: (state.state, state.why) for state in pipeline_states(pipeline)}
    assert states == dict.fromkeys((STEP, "measure", "plan", "filter"), ("done", ""))
    before = digests(target)
    reports = run_pipeline(pipeline, pipeline.steps, runner="local")
    assert all(report.skipped for report in reports)
    assert {k: v for k, v in digests(target).items() if k in before} == before


def test_another_filter_runs_in_the_repacked_dataset_and_leaves_its_shards(store):
    target = run(store.url)
    before = {k: v for k, v in digests(target).items() if k.startswith("shards/")}
    overrides = [("--filter.min-chars", "12")]
    pipeline = apply_overrides(on_repacked(recipe(target.url)), overrides)
    reports = run_pipeline(pipeline, pipeline.steps, runner="local")
    assert {r.step for r in reports if r.skipped} == {STEP, "measure"}
    assert reports[-1].num_in == 2 * PER_SHARD
    # As after an upgrade: the step that stands for ingest runs again, and no shard goes.
    target.remove(mark_path())
    run_pipeline(pipeline, pipeline.steps, runner="local")
    assert {k: v for k, v in digests(target).items() if k.startswith("shards/")} == before


def test_the_check_leaves_the_manifest_that_the_repack_wrote(store):
    target = run(store.url)
    written = target.read_bytes(mark_path())
    target.remove(mark_path())
    pipeline = apply_overrides(on_repacked(recipe(target.url)), [])
    run_pipeline(pipeline, pipeline.steps, runner="local")
    assert target.read_bytes(mark_path()) == written


def test_no_recipe_runs_in_a_repack_that_was_killed(store, monkeypatch):
    """Another size of shards over a finished repack, killed in its second of four shards."""
    target = run(store.url)
    other = apply_overrides(repack(store.url), [("--repack.shard-size", "8")])
    write = Store.write_bytes

    def kill(self: Store, path: str, data: bytes) -> None:
        if path.endswith("shards/00001.tar"):
            raise KeyboardInterrupt
        write(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_bytes", kill)
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(other, other.steps, runner="local")
    assert layout.list_shards(target) == ["00000"]
    assert not is_repacked(target)
    assert is_unfinished(target)
    with pytest.raises(DeclipError, match="is a repacked dataset that was not finished"):
        on_repacked(recipe(target.url))
    run_pipeline(other, other.steps, runner="local")
    assert is_repacked(target)
    before = digests(target)
    shutil.rmtree(target.url)
    for step in ("repack", "finish"):
        store.remove(layout.manifest_path(step))
    run_pipeline(other, other.steps, runner="local")
    assert digests(target) == before


def test_shards_that_are_none_of_the_repack_are_refused_though_a_manifest_says_done(store):
    target = run(store.url)
    stats = layout.shard_stats_path("00001")
    data = target.read_bytes(stats)
    target.remove(stats)
    with pytest.raises(DeclipError, match=r"names '00001.tar', which is not whole there"):
        on_repacked(recipe(target.url))
    target.write_bytes(stats, data)
    on_repacked(recipe(target.url))
    for path in (layout.tar_path, layout.shard_parquet_path, layout.shard_stats_path):
        target.write_bytes(path("00009"), target.read_bytes(path("00001")))
    with pytest.raises(DeclipError, match=r"does not name '00009.tar', which is there"):
        on_repacked(recipe(target.url))


def test_settings_of_steps_that_fetch_are_refused_there(store):
    target = run(store.url)
    with pytest.raises(DeclipError, match=r"--ingest.image-size is 32, but .* is a repacked"):
        apply_overrides(on_repacked(recipe(target.url)), [("--ingest.image-size", "32")])


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"repack"}))
def test_every_recipe_can_run_in_a_repacked_dataset(name, tmp_path):
    Store(str(tmp_path)).write_bytes(SIZES_PATH, b"{}")
    finish(Store(str(tmp_path)), "of a test")
    pipeline = RECIPES[name](str(tmp_path))
    there = apply_overrides(on_repacked(pipeline), [])
    assert there.names()[0] == STEP
    assert not {"ingest", "sources", "prepare"} & {n for s in there.steps for n in s.reads}
    assert "train" in there.names()


def test_a_digest_of_ones_own_is_left_and_another_dataset_refused(store):
    pipeline = repack(store.url)
    stage = pipeline.step("repack").stage
    assert isinstance(stage, RepackShards)
    pinned = dataclasses.replace(stage, inputs_sha256="0" * 64)
    step = dataclasses.replace(pipeline.steps[0], stage=pinned)
    derived = derive_repack(dataclasses.replace(pipeline, steps=[step]))
    assert derived.steps[0].stage == pinned
    with pytest.raises(DeclipError, match="it was changed after the run was planned"):
        pinned.worker()


def test_a_folder_without_shards_is_told(tmp_path):
    pipeline = apply_overrides(repack(str(tmp_path)), [])
    with pytest.raises(DeclipError, match="there is no complete shard under"):
        run_pipeline(pipeline, pipeline.steps, runner="local")
