"""``declip refetch`` from the command line: what it says, what it refuses, its exit status."""

import dataclasses
import shutil
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from declip_filter import MeasureImages
from declip_ingest.refetch import PATIENCE
from declip_ingest.refetch_run import RefetchReport
from declip_ingest.stages import DownloadShards, stored_ingest
from declip_shards import DeclipError, Store, layout, manifest
from pipelines import ray_runner, recipes, refetch_command
from pipelines.cli import main
from pipelines.lock import workspace_lock
from pipelines.pipeline import Pipeline, Step
from pipelines.refetch_command import change_settings, may_change, report_text
from pipelines.runner import run_pipeline
from pipelines.states import pipeline_states

sys.path.append(str(Path(__file__).parents[1] / "ingest"))
if TYPE_CHECKING:
    from tests.ingest.misbehaving_server import MisbehavingServer
    from tests.ingest.refetch_runs import (
        DOWN,
        NUM_ROWS,
        all_files,
        hashed_files,
        ingest,
        make_stage,
        mend,
        serve,
    )
else:
    from misbehaving_server import MisbehavingServer
    from refetch_runs import (
        DOWN,
        NUM_ROWS,
        all_files,
        hashed_files,
        ingest,
        make_stage,
        mend,
        serve,
    )


@pytest.fixture(scope="module")
def server():
    with MisbehavingServer() as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.stopping.set()
        running.shutdown()


@pytest.fixture(scope="module")
def once_broken(server, tmp_path_factory):
    serve(server, is_up=False)
    root = tmp_path_factory.mktemp("once") / "broken"
    ingest(make_stage(root, server))
    return root


@pytest.fixture
def broken(server, once_broken, tmp_path):
    """A dataset that was ingested while the server was half down; the server is up again."""
    serve(server, is_up=True)
    return Path(shutil.copytree(once_broken, tmp_path / "broken"))


def refetch(root: Path, *arguments: str, reason: str = "http_503,http_500") -> int:
    return main(
        ["refetch", "--out", str(root), "--reason", reason, "--runner", "local", *arguments]
    )


def test_it_mends_says_so_and_a_second_run_changes_nothing(broken, capsys):
    assert refetch(broken) == 0
    said = capsys.readouterr().out
    assert "2 shards with rows that failed for http_503, http_500" in said
    assert any(line.split() == ["all", "5", "5", "0"] for line in said.splitlines())
    assert "out of date now: run declip run again" in said
    before = all_files(broken)
    assert refetch(broken) == 0
    assert "there is nothing to fetch" in capsys.readouterr().out
    assert all_files(broken) == before


def test_nothing_to_do_starts_nothing(broken, monkeypatch, capsys):
    before = all_files(broken)
    monkeypatch.setattr(ray_runner, "start", lambda: pytest.fail("Ray is started"))
    assert main(["refetch", "--out", str(broken), "--reason", "dns,timeout"]) == 0
    assert "no row of" in capsys.readouterr().out
    assert all_files(broken) == before


@pytest.mark.ray
def test_on_ray_it_leaves_the_same_bytes(broken, tmp_path, capsys):
    here = Path(shutil.copytree(broken, tmp_path / "here"))
    mend(here, "http_503", "http_500")
    assert main(["refetch", "--out", str(broken), "--reason", "http_503,http_500"]) == 0
    files = hashed_files(broken)
    for own in ("manifests/lock", "manifests/tasks.lock"):
        files.pop(own, None)
    assert files == hashed_files(here)
    assert not (broken / "staging").exists() or not any((broken / "staging").iterdir())
    assert f"{len(DOWN)}" in capsys.readouterr().out


def test_the_run_sees_ingest_as_done_and_later_steps_as_stale(server, tmp_path):
    serve(server, is_up=False)
    root = str(tmp_path)
    stage = make_stage(tmp_path, server)
    steps = [
        Step(name="ingest", stage=stage),
        Step(name="measure", stage=MeasureImages(root=root), reads=("ingest",)),
    ]
    pipeline = Pipeline(recipe="two", root=root, steps=steps)
    run_pipeline(pipeline, steps, runner="local")
    assert [s.state for s in pipeline_states(pipeline)] == ["done", "done"]
    serve(server, is_up=True)
    assert refetch(tmp_path) == 0
    states = pipeline_states(pipeline)
    assert [s.state for s in states] == ["done", "stale"]
    assert states[1].why == "what it reads from ingest changed"
    reports = run_pipeline(pipeline, steps, runner="local")
    assert [report.skipped for report in reports] == [True, False]
    assert reports[1].num_in == NUM_ROWS - 3


def test_a_shard_that_cannot_be_done_is_told_by_the_exit_status(broken, capsys):
    tar = broken / layout.tar_path("00000")
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    assert refetch(broken) == 1
    said = capsys.readouterr().out
    assert "shards that could not be done and are as they were: 1" in said
    assert "00000: 'shards/00000.tar' in" in said
    assert "declip run fetches this shard again" in said
    assert tar.read_bytes() == data, "it is as it was"
    store = Store(str(broken))
    assert manifest.read_receipts(store, "ingest")["00001"].reasons == {"http_404": 1}


def test_it_waits_for_nobody(broken, capsys):
    with workspace_lock(Store(str(broken))):
        assert refetch(broken) == 1
    assert "another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ingest.image-size", "64"], "would make the fetched rows differ from the others"),
        (["--ingest.robots", "ignore"], "would make the fetched rows differ"),
        (["--ingest.timeout-second", "9"], "Did you mean '--ingest.timeout-seconds'"),
        (["--ingest.retries", "many"], "not a whole number"),
        (["--ingest.retries", "-1"], "retries is -1"),
        (["--ingest.root", "/x"], "there is no option --ingest.root"),
        (["--train.epochs", "2"], "--train.epochs is no setting of ingest"),
        (["--runner", "rai"], "--runner is 'rai'. Did you mean 'ray'"),
    ],
)
def test_what_it_refuses(broken, capsys, arguments, said):
    before = all_files(broken)
    assert refetch(broken, *arguments) == 1
    assert said in capsys.readouterr().err
    assert all_files(broken) == before


def test_a_reason_that_is_none_and_a_folder_that_is_none(broken, tmp_path, capsys):
    assert refetch(broken, reason="timeuot") == 1
    assert "Did you mean 'timeout'" in capsys.readouterr().err
    assert refetch(broken, reason=",") == 1
    assert "no failure reason is named" in capsys.readouterr().err
    assert refetch(tmp_path / "empty") == 1
    assert "holds no dataset that declip has begun to download" in capsys.readouterr().err
    assert main(["refetch", "--reason", "dns"]) == 1
    assert "Name its folder with --out" in capsys.readouterr().err


def test_another_version_of_the_code_is_refused(broken, capsys):
    store = Store(str(broken))
    done = manifest.read_manifest(store, "ingest")
    assert done is not None
    manifest.write_manifest(store, dataclasses.replace(done, code_version="declip_ingest 0.0.1"))
    assert refetch(broken) == 1
    assert "was ingested by declip_ingest 0.0.1, and this is" in capsys.readouterr().err


def test_patient_settings_are_obeyed_and_stored_ones_are_kept(broken):
    stored = stored_ingest(str(broken))
    changed = change_settings(
        stored, [("--ingest.timeout-seconds", "40"), ("--ingest.thread_count", "3")]
    )
    assert (changed.timeout_seconds, changed.thread_count) == (40.0, 3)
    assert dataclasses.replace(changed, timeout_seconds=10.0, thread_count=8) == stored
    assert (
        set(PATIENCE) <= set(may_change()) <= {f.name for f in dataclasses.fields(DownloadShards)}
    )
    assert not {"root", "image_size", "encode_quality", "robots", "insecure_tls"} & set(
        may_change()
    )


def test_the_server_of_a_recipe_runs_meanwhile(broken, monkeypatch):
    running: list[str] = []

    class Service:
        def __enter__(self):
            running.append("up")

        def __exit__(self, *_: object):
            running.append("down")

    stage: Any = stored_ingest(str(broken))

    def build(name: str, root: str) -> Pipeline:
        return Pipeline(
            recipe=name, root=root, steps=[Step(name="ingest", stage=stage, service=Service)]
        )

    monkeypatch.setattr(recipes, "build", build)
    arguments = ["demo", "--out", str(broken), "--runner", "local"]
    assert refetch_command.main([*arguments, "--reason", "http_500"]) == 0
    assert running == ["up", "down"]
    with pytest.raises(DeclipError, match=r"has no option --train\.epochs"):
        refetch_command.main([*arguments, "--reason", "http_503", "--train.epochs", "2"])


def test_the_table_adds_up():
    text = report_text(
        RefetchReport(
            asked={"timeout": 1200, "http_503": 5},
            mended={"timeout": 1000},
            still={"timeout": 199, "http_410": 1, "http_503": 5},
            num_changed=1001,
            failures={f"{i:05d}": "lost" for i in range(25)},
        )
    )
    lines = text.splitlines()
    assert lines[0].split() == ["reason", "asked", "mended", "fail", "now"]
    assert "shards that could not be done and are as they were: 25" in lines
    assert any(line.split() == ["timeout", "1,200", "1,000", "199"] for line in lines)
    assert any(line.split() == ["http_410", "0", "0", "1"] for line in lines)
    assert any(line.split() == ["all", "1,205", "1,000", "205"] for line in lines)
    assert "... and 5 more" in text
