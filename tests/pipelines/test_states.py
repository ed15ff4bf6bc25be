"""What stands, what would run again, and the words for why."""

import dataclasses

import pytest
import toy_stages
from toy_stages import MakeNumbers, SumNumbers

from declip_shards import Store, TaskStats, manifest
from pipelines.pipeline import Pipeline, Step
from pipelines.states import input_digests, pipeline_states, step_state


def toy(root, *, factor=1.0, **numbers):
    """Two steps that work, and a third that reads both."""
    return Pipeline(
        recipe="toy",
        root=str(root),
        steps=(
            Step(name="numbers", stage=MakeNumbers(root=str(root), **numbers)),
            Step(name="sum", stage=SumNumbers(root=str(root), factor=factor), reads=("numbers",)),
            Step(name="page", stage=SumNumbers(root=str(root)), reads=("numbers", "sum")),
        ),
    )


def receipts(store, step, tasks=None):
    """Do the tasks of a step, all by default, and leave their receipts."""
    inputs = input_digests(store, step)
    digest = manifest.fingerprint(step.stage, step.code_version, inputs)
    work = step.stage.worker()
    found = []
    for task in step.stage.tasks() if tasks is None else tasks:
        stats = work(task)
        if step.name == "page":  # like the report: nothing but a file that holds times
            store.write_bytes("page.html", b"drawn at noon")
            stats = TaskStats(num_in=1, num_out=1, volatile_files=("page.html",))
        found.append(manifest.make_receipt(store, task, digest, stats))
        manifest.write_receipt(store, step.name, found[-1])
    return found


def finish(store, step):
    done = manifest.build_manifest(
        step=step.name,
        stage=step.stage,
        code_version=step.code_version,
        inputs=input_digests(store, step),
        receipts=receipts(store, step),
    )
    manifest.write_manifest(store, done)
    return done


@pytest.fixture
def finished(tmp_path):
    """Folder of a toy pipeline that has run."""
    for step in toy(tmp_path).steps:
        finish(Store(str(tmp_path)), step)
    return tmp_path


def states(pipeline):
    return {s.step: (s.state, s.why) for s in pipeline_states(pipeline)}


def all_done(root):
    return [s.state for s in pipeline_states(toy(root))] == ["done"] * 3


def test_nothing_done_is_new_and_looking_makes_no_folder(tmp_path):
    found = pipeline_states(toy(tmp_path / "none"))
    assert [(s.step, s.state, s.why, s.last) for s in found] == [
        (name, "new", "never finished", None) for name in ("numbers", "sum", "page")
    ]
    assert not (tmp_path / "none").exists()


def test_done_has_no_why_and_carries_its_manifest(finished):
    before = sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*"))
    found = pipeline_states(toy(finished))
    assert [(s.state, s.why) for s in found] == [("done", "")] * 3
    assert [s.last.num_in for s in found if s.last] == [30, 3, 1]
    assert sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*")) == before


def test_partial_counts_the_tasks_that_are_kept(tmp_path):
    store, pipeline = Store(str(tmp_path)), toy(tmp_path)
    receipts(store, pipeline.step("numbers"), ["00000", "00002"])
    assert states(pipeline) == {
        "numbers": ("partial", "interrupted: 2 tasks are done and are kept"),
        "sum": ("new", "never finished"),
        "page": ("new", "never finished"),
    }


def test_what_reads_an_unfinished_step_says_so(finished):
    (finished / "manifests" / "numbers.json").unlink()
    found = states(toy(finished))
    assert found["numbers"] == ("partial", "interrupted: 3 tasks are done and are kept")
    # The manifest it was made from is gone, and with it the proof that it is of these inputs.
    assert found["sum"] == ("stale", "what it reads from numbers changed")


@pytest.mark.parametrize(
    ("state", "words"),
    [("out of date", "which is out of date"), ("unfinished", "which is unfinished")],
)
def test_a_step_whose_own_settings_stand_waits_for_what_reruns(finished, state, words):
    step = toy(finished).step("sum")
    found = step_state(Store(str(finished)), step, {"numbers": state})
    assert (found.state, found.why) == ("stale", f"reads numbers, {words}")
    # Only what it reads matters to it.
    assert step_state(Store(str(finished)), step, {"elsewhere": state}).state == "done"


def test_a_changed_setting_is_named_with_both_values_and_reaches_what_follows(finished):
    assert states(toy(finished, count=7)) == {
        "numbers": ("stale", "numbers.count changed from 10 to 7"),
        "sum": ("stale", "reads numbers, which is out of date"),
        "page": ("stale", "reads numbers, which is out of date"),
    }
    assert states(toy(finished, factor=2.0)) == {
        "numbers": ("done", ""),
        "sum": ("stale", "sum.factor changed from 1.0 to 2.0"),
        "page": ("stale", "reads sum, which is out of date"),
    }
    assert states(toy(finished, num_tasks=2))["numbers"][1] == (
        "numbers.num-tasks changed from 3 to 2"
    )


def test_a_setting_that_cannot_change_the_bytes_changes_nothing(finished, tmp_path_factory):
    assert set(states(toy(finished, die_once="mark")).values()) == {("done", "")}
    moved = tmp_path_factory.mktemp("moved") / "data"
    finished.rename(moved)
    assert all_done(moved)


def test_another_version_of_the_code_is_named(finished, monkeypatch):
    before = toy(finished).step("sum").code_version
    monkeypatch.setattr(toy_stages, "__version__", "2")
    after = toy(finished).step("sum").code_version
    assert before != after
    why = f"code version changed from {before} to {after}"
    assert set(states(toy(finished)).values()) == {("stale", why)}


def test_another_stage_of_the_same_name_is_named(finished):
    store, step = Store(str(finished)), toy(finished).step("sum")
    last = manifest.read_manifest(store, "sum")
    assert last is not None
    manifest.write_manifest(store, dataclasses.replace(last, stage="AddNumbers"))
    found = step_state(store, step, {})
    assert found.why == "it was made by AddNumbers, the recipe now has SumNumbers"


def test_a_manifest_of_other_bytes_makes_its_readers_stale(finished):
    store = Store(str(finished))
    last = manifest.read_manifest(store, "numbers")
    assert last is not None
    manifest.write_manifest(store, dataclasses.replace(last, extra={"00000": {"more": 1}}))
    found = states(toy(finished))
    assert found["numbers"] == ("done", "")
    assert found["sum"] == ("stale", "what it reads from numbers changed")


def test_a_fingerprint_that_is_not_its_own_counts_for_nothing(finished):
    store = Store(str(finished))
    last = manifest.read_manifest(store, "numbers")
    assert last is not None
    manifest.write_manifest(store, dataclasses.replace(last, fingerprint="0" * 64))
    assert states(toy(finished))["numbers"] == ("stale", "its fingerprint changed")


def test_a_lost_or_cut_file_is_named(finished):
    path = finished / "numbers" / "00001.txt"
    whole = path.read_bytes()
    damaged = ("stale", "numbers/00001.txt is missing or has another size")
    path.write_bytes(whole[:-1])
    assert states(toy(finished))["numbers"] == damaged
    path.unlink()
    assert states(toy(finished))["numbers"] == damaged
    path.write_bytes(whole)
    assert all_done(finished)


def test_logs_may_go_but_not_what_is_all_that_a_step_made(finished):
    for path in (finished / "numbers").glob("*.time"):
        path.unlink()
    assert all_done(finished)
    (finished / "page.html").write_bytes(b"drawn again")
    assert all_done(finished)
    (finished / "page.html").unlink()
    assert states(toy(finished))["page"] == ("stale", "page.html is missing")


def test_a_torn_manifest_counts_as_none_and_the_receipts_stand(finished):
    path = finished / "manifests" / "numbers.json"
    path.write_bytes(path.read_bytes()[:40])
    assert states(toy(finished))["numbers"][0] == "partial"


def test_digests_of_inputs_are_of_the_manifests_and_empty_without(tmp_path):
    store, step = Store(str(tmp_path)), toy(tmp_path).step("page")
    assert input_digests(store, step) == {"numbers": "", "sum": ""}
    finish(store, toy(tmp_path).step("numbers"))
    assert input_digests(store, step) == {
        "numbers": store.sha256("manifests/numbers.json"),
        "sum": "",
    }
