import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest
from ray_stages import Trouble
from toy_stages import MakeNumbers, SumNumbers

from declip_filter import MeasureImages
from declip_shards import DeclipError, Store, rewrite
from declip_shards.fakes import write_fake_dataset
from pipelines import lease
from pipelines.pipeline import Pipeline, Step
from pipelines.runner import run_pipeline, run_step
from pipelines.states import pipeline_states


def toy(root, *, factor=1.0, **numbers):
    return Pipeline(
        recipe="toy",
        root=str(root),
        steps=(
            Step(name="numbers", stage=MakeNumbers(root=str(root), **numbers), on_ray=True),
            Step(name="sum", stage=SumNumbers(root=str(root), factor=factor), reads=("numbers",)),
        ),
    )


def run(pipeline, runner="local", **choice):
    return {r.step: r for r in run_pipeline(pipeline, pipeline.choose(**choice), runner=runner)}


def manifests(root):
    return {
        name: hashlib.sha256((root / "manifests" / f"{name}.json").read_bytes()).hexdigest()
        for name in ("numbers", "sum")
    }


def test_a_second_run_does_nothing_and_does_not_start_ray(tmp_path):
    first = run(toy(tmp_path))
    assert not first["sum"].skipped
    before = manifests(tmp_path)
    second = run(toy(tmp_path), runner="ray")
    assert all(r.skipped for r in second.values())
    assert manifests(tmp_path) == before
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized()


def test_a_change_reruns_what_follows_and_nothing_before(tmp_path):
    run(toy(tmp_path))
    changed = run(toy(tmp_path, factor=2.0))
    assert changed["numbers"].skipped
    assert not changed["sum"].skipped
    assert (tmp_path / "sum.txt").read_text() == "270"
    changed = run(toy(tmp_path, factor=2.0, count=3))
    assert not changed["numbers"].skipped
    assert (tmp_path / "sum.txt").read_text() == "18"


def test_why_says_the_setting_with_both_values(tmp_path):
    run(toy(tmp_path))
    states = {s.step: s for s in pipeline_states(toy(tmp_path, count=7))}
    assert states["numbers"].why == "numbers.count changed from 10 to 7"
    assert states["sum"].why == "reads numbers, which is out of date"
    (tmp_path / "numbers" / "00001.txt").unlink()
    states = {s.step: s for s in pipeline_states(toy(tmp_path))}
    assert states["numbers"].why == "numbers/00001.txt is missing or has another size"
    assert [s.state for s in pipeline_states(toy(tmp_path / "else"))] == ["new", "new"]


def test_results_of_two_settings_are_never_mixed(tmp_path):
    run(toy(tmp_path, num_tasks=5))
    run(toy(tmp_path, num_tasks=2))
    assert sorted(p.name for p in (tmp_path / "numbers").glob("*.txt")) == [
        "00000.txt",
        "00001.txt",
    ]


def test_a_failed_task_is_named_the_others_are_kept_and_nothing_is_published(tmp_path):
    with pytest.raises(DeclipError, match=r"(?s)1 of 3 tasks of 'numbers' failed.*00001.*told to"):
        run(toy(tmp_path, fail_task="00001"))
    assert not (tmp_path / "manifests" / "numbers.json").exists()
    assert pipeline_states(toy(tmp_path, fail_task="00001"))[0].why.startswith(
        "interrupted: 2 tasks are done"
    )


def test_only_the_missing_task_is_done_again(tmp_path):
    run(toy(tmp_path))
    clean = manifests(tmp_path)
    times = {p.name: p.read_text() for p in (tmp_path / "numbers").glob("*.time")}
    (tmp_path / "manifests" / "numbers.json").unlink()
    (tmp_path / "numbers" / "00002.txt").unlink()
    run(toy(tmp_path))
    again = {p.name: p.read_text() for p in (tmp_path / "numbers").glob("*.time")}
    assert {n for n in times if times[n] != again[n]} == {"00002.time"}
    assert manifests(tmp_path) == clean


def test_a_stage_left_out_must_be_done_as_now_set(tmp_path):
    with pytest.raises(DeclipError, match=r"'sum' reads 'numbers', which is new .*--from numbers"):
        run(toy(tmp_path), only="sum")
    run(toy(tmp_path))
    with pytest.raises(DeclipError, match="count changed from 10 to 5"):
        run(toy(tmp_path, count=5), only="sum")


def test_a_misspelt_stage_gets_the_nearest_name(tmp_path):
    with pytest.raises(DeclipError, match="Did you mean 'numbers'"):
        toy(tmp_path).choose(only="number")


def test_foreign_shards_are_left_alone(tmp_path):
    Store(str(tmp_path)).write_bytes("shards/00000.tar", b"theirs")
    with pytest.raises(DeclipError, match="no recipe of ours made"):
        run(toy(tmp_path))
    assert (tmp_path / "shards" / "00000.tar").read_bytes() == b"theirs"


def test_a_second_run_in_the_same_folder_is_refused_by_process(tmp_path):
    code = (
        "import time; from declip_shards import Store; from pipelines.lock import workspace_lock\n"
        f"with workspace_lock(Store({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(DeclipError, match=f"process {holder.pid}"):
            run(toy(tmp_path))
        holder.kill()
        holder.wait()
    run(toy(tmp_path))


def test_kill_at_random_moments_ends_in_the_manifests_of_a_clean_run(tmp_path):
    run(toy(tmp_path / "clean", num_tasks=40))
    clean = manifests(tmp_path / "clean")
    code = (
        "import sys; from test_runner import toy, run\n"
        f"run(toy({str(tmp_path / 'killed')!r}, num_tasks=40))"
    )
    paths = [os.path.dirname(__file__), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    for delay in (0.15, 0.2, 0.3, 0.4, 0.5):
        with subprocess.Popen([sys.executable, "-c", code], env=env) as process:
            while (
                not (tmp_path / "killed" / "manifests" / "lock").exists() and process.poll() is None
            ):
                time.sleep(0.01)
            time.sleep(delay / 10)
            process.kill()
    run(toy(tmp_path / "killed", num_tasks=40))
    assert manifests(tmp_path / "killed") == clean


@pytest.mark.ray
def test_ray_gives_the_same_manifests_even_when_a_worker_dies(tmp_path):
    run(toy(tmp_path / "here", num_tasks=6))
    mark = tmp_path / "died"
    run(toy(tmp_path / "ray", num_tasks=6, die_once=str(mark)), runner="ray")
    assert mark.exists()
    assert manifests(tmp_path / "ray") == manifests(tmp_path / "here")


@pytest.mark.ray
def test_ray_names_the_failed_task(tmp_path):
    with pytest.raises(
        DeclipError, match=r"(?s)1 of 3 tasks.*00002 +1  task 00002 was told to fail"
    ):
        run(toy(tmp_path, fail_task="00002"), runner="ray")


SLOW_RUN = (
    "import sys\n"
    "from pipelines.pipeline import Pipeline, Step\n"
    "from pipelines.runner import run_pipeline\n"
    "from ray_stages import Trouble\n"
    "root, runner = sys.argv[1:]\n"
    "names = tuple(f'fine{n:02d}' for n in range(12))\n"
    "stage = Trouble(root=root, names=names, seconds=0.4)\n"
    "steps = (Step(name='trouble', stage=stage, on_ray=True),)\n"
    "try: run_pipeline(Pipeline(recipe='toy', root=root, steps=steps), steps, runner=runner)\n"
    "except KeyboardInterrupt: sys.exit(130)\n"
)


def slow_run(root, runner):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    command = [sys.executable, "-c", SLOW_RUN, str(root), runner]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


@pytest.mark.parametrize(
    ("runner", "number", "status"),
    [
        ("local", signal.SIGTERM, 143),
        ("local", signal.SIGINT, 130),
        pytest.param("ray", signal.SIGTERM, 143, marks=[pytest.mark.ray, pytest.mark.slow]),
    ],
)
def test_a_signal_stops_a_run_in_time_and_what_is_done_is_kept(tmp_path, runner, number, status):
    receipts = tmp_path / "manifests" / "trouble"
    process = slow_run(tmp_path, runner)
    while len(list(receipts.glob("*.json"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    start = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert time.monotonic() - start < 10
    if number == signal.SIGTERM:
        assert b"declip: stopped by SIGTERM; what is done is kept" in errors
    assert b"Traceback" not in errors
    done = {p.name: p.stat().st_mtime_ns for p in receipts.glob("*.json")}
    assert 3 <= len(done) < 12
    again = slow_run(tmp_path, "local")
    told, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert f"{12 - len(done)} tasks ({len(done)} already done)".encode() in told
    assert done.items() <= {p.name: p.stat().st_mtime_ns for p in receipts.glob("*.json")}.items()


def test_what_is_hopeless_is_not_tried_for_every_task(tmp_path):
    names = ("fine-0", "full", "fine-1", "fine-2")
    stage = Trouble(root=str(tmp_path), names=names)
    steps = (Step(name="trouble", stage=stage),)
    with pytest.raises(DeclipError) as told:
        run(Pipeline(recipe="toy", root=str(tmp_path), steps=steps))
    lines = str(told.value).splitlines()
    assert lines[0] == "1 of 4 tasks of 'trouble' failed:"
    assert lines[1].split() == ["task", "tried", "first", "cause"]
    assert f"no space to write to {str(tmp_path)!r}" in lines[2]
    assert lines[3] == "2 more were not started: they would have failed alike."
    # Each file of this stage has 6 bytes a thousand times.
    assert "the 3 tasks that are left need about 18.0 KB" in lines[4]
    assert lines[5].startswith("What is done is kept")


def test_a_change_that_was_cut_short_is_finished_first(tmp_path, capsys):
    run(toy(tmp_path))
    store = Store(str(tmp_path))
    rewrite.prepare(store, "refetch", {"numbers/00001.txt": b"1"})
    changed = run(toy(tmp_path))
    assert (
        "finished a change of several files that was cut short: refetch" in capsys.readouterr().out
    )
    # And what came of it is seen by the steps.
    assert not changed["numbers"].skipped
    assert not (tmp_path / "staging" / "refetch").exists()


def test_a_run_that_lost_its_hold_publishes_nothing_more(tmp_path):
    class Lost:
        def check(self):
            raise DeclipError("the lease is lost")

    pipeline = toy(tmp_path)
    with pytest.raises(DeclipError, match="the lease is lost"):
        run_step(pipeline, pipeline.steps[0], runner="local", hold=Lost())
    assert list(tmp_path.rglob("*.json")) == []


def test_a_remote_dataset_is_built_under_a_lease(monkeypatch, tmp_path):
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.01)
    root = f"memory://{tmp_path.name}"
    assert run(toy(root))["sum"].num_out == 3
    assert all(report.skipped for report in run(toy(root)).values())
    with (
        lease.hold_lease(Store(root)),
        pytest.raises(DeclipError, match=f"another run \\(process {os.getpid()} on"),
    ):
        run(toy(root, count=4))


def test_ingest_ends_with_a_table_of_reasons_and_what_to_do(tmp_path, capsys):
    stage = MakeNumbers(root=str(tmp_path), style="even")
    steps = (Step(name="ingest", stage=stage),)
    run(Pipeline(recipe="toy", root=str(tmp_path), steps=steps))
    told = capsys.readouterr().out
    assert "  reason  rows  share\n  odd       15  50.0%\n" in told
    assert f"declip doctor ingest --out {tmp_path}" in told


def test_stage_protocol_is_met_by_the_toys(tmp_path):
    from declip_shards import Stage

    for step in toy(tmp_path).steps:
        assert isinstance(step.stage, Stage)
        assert dataclasses.is_dataclass(step.stage)


def test_another_name_leaves_what_the_first_one_wrote(tmp_path):
    root = str(tmp_path)
    write_fake_dataset(root, num_shards=2)
    (tmp_path / "manifests").mkdir()

    def pipeline(name):
        step = Step(name="measure", stage=MeasureImages(root=root, name=name))
        return Pipeline(recipe="toy", root=root, steps=[step])

    def measure(name):
        run_pipeline(pipeline(name), pipeline(name).steps, runner="local")
        return {p.name: p.read_bytes() for p in (tmp_path / "signals" / name).iterdir()}

    first = measure("one")
    assert measure("two") == first
    assert {p.name for p in (tmp_path / "signals").iterdir()} == {"one", "two"}
    assert measure("one") == first
