"""A recipe's training on a dataset that lies elsewhere: what it reads, runs again for, refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from declip_filter.repack_state import SIZES_PATH, STATE_PATH, STEP
from declip_shards import DeclipError, Store, TaskStats, layout
from declip_train.stages import TrainModel
from pipelines import train_command
from pipelines.dry_run import count_samples
from pipelines.options import apply_overrides
from pipelines.other_data import reads_other_data
from pipelines.pipeline import Pipeline
from pipelines.recipes import RECIPES
from pipelines.runner import run_pipeline
from pipelines.states import pipeline_states

READ = ("ingest", "filter", "neighbors")


def dataset(url: str, *steps: str) -> Store:
    """Nothing but the manifests of some steps."""
    store = Store(url)
    for step in steps:
        store.write_bytes(layout.manifest_path(step), json.dumps({"step": step}).encode())
    return store


def pipeline(root: object, url: str, *more: tuple[str, str], recipe: str = "pairs") -> Pipeline:
    given = [("--train.data-root", url), ("--train.model", "test"), *more]
    return apply_overrides(RECIPES[recipe](str(root)), given)


def trained(found: Pipeline) -> bool:
    """Run it; whether it trained."""
    (report,) = run_pipeline(found, found.choose(only="train"), runner="local")
    return not report.skipped


@pytest.fixture
def fake_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that writes one file."""

    def worker(stage: TrainModel) -> Callable[[str], TaskStats]:
        def work(task: str) -> TaskStats:
            Store(stage.root).write_bytes("train/weights", stage.digest().encode())
            return TaskStats(num_in=3, num_out=3, files=["train/weights"])

        return work

    monkeypatch.setattr(TrainModel, "worker", worker)


@pytest.mark.usefixtures("fake_training")
def test_what_is_read_counts_and_not_where_it_lies(tmp_path: Path) -> None:
    urls = [f"memory://{tmp_path.name}/{name}" for name in "ab"]
    first, second = (dataset(url, *READ) for url in urls)
    found = pipeline(tmp_path / "run", urls[0])
    assert found.names() == ["train"]
    assert found.step("train").reads == READ
    assert trained(found)
    assert not trained(found)
    assert not trained(pipeline(tmp_path / "run", urls[1]))
    second.write_bytes(layout.manifest_path("filter"), b"{}")
    other = pipeline(tmp_path / "run", urls[1])
    (state,) = pipeline_states(other)
    assert (state.state, state.why) == ("stale", "what it reads from filter changed")
    assert not trained(found)
    assert trained(other)
    # Nothing was written where the data lie.
    for store in (first, second):
        files = store.fs.find(store.root)
        assert sorted(Path(name).stem for name in files) == sorted(READ)
    second.remove(layout.manifest_path("neighbors"))
    with pytest.raises(DeclipError, match=r"no manifests/neighbors.json: run that stage there to"):
        trained(other)


def test_steps_are_read_only_where_training_reads_what_they_made(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/clip"
    for recipe in ("pairs", "demo"):
        clip = pipeline(tmp_path, url, ("--train.method", "clip"), recipe=recipe)
        assert clip.step("train").reads == ("ingest", "filter")
    chosen = ("--train.method", "clip"), ("--train.selection", "")
    assert pipeline(tmp_path, url, *chosen).step("train").reads == ("ingest",)
    repacked = json.dumps({"format_version": 1, "repack": "d", "state": "finished"})
    for path in (STATE_PATH, SIZES_PATH):
        Store(url).write_bytes(path, repacked.encode())
    assert pipeline(tmp_path, url).step("train").reads == (STEP, "filter", "neighbors")
    assert not reads_other_data(RECIPES["pairs"](str(tmp_path)))
    assert not reads_other_data(RECIPES["repack"](str(tmp_path)))


def test_samples_are_counted_where_the_data_lie(tmp_path: Path) -> None:
    found = pipeline(tmp_path, f"memory://{tmp_path.name}/empty")
    stage = found.step("train").stage
    assert isinstance(stage, TrainModel)
    states = {state.step: state for state in pipeline_states(found)}
    assert count_samples(found, stage, states, None).number is None


def test_refusals_are_sentences(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/none"
    with pytest.raises(DeclipError, match=r"--filter.min-words is given, but training reads the"):
        pipeline(tmp_path, url, ("--filter.min-words", "3"))
    with pytest.raises(DeclipError, match="is of a kind that fsspec cannot open here"):
        pipeline(tmp_path, "nosuch://a")
    far = pipeline(url, f"{url}/data")
    with pytest.raises(DeclipError, match=r"'memory://.*' is no folder of this machine, and train"):
        run_pipeline(far, far.steps, runner="local")
    assert not Store(url).fs.exists(Store(url).root)
    command = ["--train.model", "test", "--train.method", "clip"]
    with pytest.raises(DeclipError, match="is no folder of this machine, and training writes"):
        train_command.main([*command, "--out", url])
    with pytest.raises(DeclipError, match="both name what is trained on"):
        train_command.main([*command, "--train.data-root", url, "--train-data", "a.tar"])
    with pytest.raises(DeclipError, match=r"or a dataset elsewhere by --train.data-root"):
        train_command.main(command)


def test_the_command_takes_a_dataset_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--train.data-root", "s3://b/data", "--train.model", "test", "--name", "mine"]
    assert train_command.main([*given, "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["root"], shown["data_root"]) == ("logs/mine", "s3://b/data")
