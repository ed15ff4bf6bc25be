"""What becomes of tasks that lose their worker or node, hang, or fit nowhere."""

import contextlib
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray_head
import ray_stages

from declip_shards import DeclipError
from pipelines import ray_runner, ray_tasks
from pipelines.ray_tasks import TaskRun, carried, kill_worker, placement_fault
from pipelines.task_end import TaskEnd

psutil: Any = importlib.import_module("psutil")
GPUS = {"CPU": 1.0, "GPU": 1000.0}


def test_what_a_node_carries() -> None:
    stage = ray_stages.Trouble(memory_bytes=1_000)
    assert carried({"CPU": 4.0, "memory": 1e9}, stage) == 4
    assert carried({"CPU": 4.0, "memory": 2_500.0}, stage) == 2
    assert carried({"CPU": 4.0}, stage) == 0
    assert carried({"CPU": 4.0}, ray_stages.Trouble()) == 4
    accelerated = ray_stages.HoldAccelerators()
    assert carried(GPUS, accelerated) == 1
    assert carried({"CPU": 8.0}, accelerated) == 0


def test_what_fits_nowhere_is_told_with_the_remedy() -> None:
    split = [{"CPU": 8.0}, {"GPU": 10.0}]
    text = placement_fault("hold", ray_stages.HoldAccelerators(), split)
    assert "'hold' needs 1 cores and 1000 GPUs on one node" in text
    assert "largest of 2 nodes have 8 cores and 10 GPUs; add a larger node, or" in text
    text = placement_fault("x", ray_stages.Trouble(memory_bytes=10**12), [{"memory": 2e9}])
    assert "1 cores, 1.0 TB of memory and 0 GPUs" in text
    assert "2.0 GB of memory" in text
    assert "lower memory_bytes" in text
    assert "of 0 nodes have 0 cores" in placement_fault("x", ray_stages.Trouble(), [])


class FakeCluster:
    """A Ray whose nodes come and go, and whose tasks end as the test says."""

    class exceptions:
        class RayError(Exception):
            pass

        class LocalRayletDiedError(RayError):
            pass

        class NodeDiedError(RayError):
            pass

        class RayActorError(RayError):
            pass

        class ObjectLostError(RayError):
            pass

        class WorkerCrashedError(RayError):
            pass

        class OutOfMemoryError(RayError):
            pass

        class RuntimeEnvSetupError(RayError):
            pass

    def __init__(self, *resources: dict[str, float]) -> None:
        self.alive = {f"n{k}": r for k, r in enumerate(resources)}
        self.dead: set[str] = set()
        self.flying: list[Any] = []
        self.most_in_flight = 0
        self.outcomes: dict[str, list[Any]] = {}
        self.submitted: list[str] = []

    def nodes(self) -> list[dict[str, Any]]:
        alive = [{"NodeID": n, "Alive": True, "Resources": r} for n, r in self.alive.items()]
        return alive + [{"NodeID": n, "Alive": False, "Resources": {}} for n in self.dead]

    def remote(self, **options: Any) -> Any:
        assert options["max_retries"] == 0
        cluster = self

        class Remote:
            def __call__(self, function: Any) -> "Remote":
                return self

            def remote(self, root: str, stage: Any, task: str, digest: str) -> Any:
                cluster.submitted.append(task)
                outcome = cluster.outcomes.get(task, [])
                words = [(1, "n0"), outcome.pop(0) if outcome else (task, "", False)]
                reference = iter(words)
                cluster.flying.append(reference)
                cluster.most_in_flight = max(cluster.most_in_flight, len(cluster.flying))
                return reference

        return Remote()

    def wait(self, references: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
        return references[:1], references[1:]

    def get(self, word: Any) -> Any:
        if isinstance(word, Exception):
            raise word
        return word


def fake_run(
    cluster: FakeCluster, tasks: list[str], monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> list[TaskEnd]:
    monkeypatch.setattr(ray_tasks, "BACK_OFF_SECONDS", 0.001)
    monkeypatch.setattr(ray_tasks, "LOOK_SECONDS", 0.01)
    stage = ray_stages.Trouble(root="x", names=tuple(tasks), **settings)
    run = TaskRun(lambda: cluster, "x", "step", stage, tasks, "d", is_own_cluster=False)
    ends = []
    for end in run.ends():
        cluster.flying = list(run.flying)
        ends.append(end)
    return ends


@pytest.mark.parametrize(("cores", "most"), [(1.0, 5), (4.0, 8), (100.0, 200)])
def test_tasks_in_flight_are_bounded_and_more_than_run(
    cores: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = FakeCluster({"CPU": cores})
    tasks = [f"{n:03d}" for n in range(300)]
    ends = fake_run(cluster, tasks, monkeypatch)
    assert sorted(end.task for end in ends) == tasks
    assert cluster.most_in_flight == most
    assert cluster.submitted == tasks


def test_the_bound_follows_a_cluster_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster({"CPU": 2.0})
    wait, calls = cluster.wait, []

    def grow(references: list[Any], **options: Any) -> Any:
        calls.append(len(references))
        if len(calls) == 20:
            cluster.alive["n9"] = {"CPU": 30.0}
        return wait(references, **options)

    monkeypatch.setattr(cluster, "wait", grow)
    fake_run(cluster, [f"{n:03d}" for n in range(200)], monkeypatch)
    assert max(calls[:20]) == 6
    assert max(calls[20:]) == 64


def crash() -> Exception:
    return FakeCluster.exceptions.WorkerCrashedError("the worker died")


def test_lost_workers_count_and_lost_nodes_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = FakeCluster.exceptions.NodeDiedError("the node went away")
    cluster = FakeCluster({"CPU": 2.0})
    cluster.outcomes = {
        "crashing": [crash() for _ in range(9)],
        "lucky": [crash() for _ in range(3)],
        "preempted": [gone] * 20,
        "unlucky": [gone] * 30,
    }
    ends = {end.task: end for end in fake_run(cluster, list(cluster.outcomes), monkeypatch)}
    assert ends["crashing"].cause == "its worker was lost 4 times: the worker died."
    assert (ends["crashing"].tries, ends["lucky"].tries) == (4, 4)
    assert ends["lucky"].receipt is not None
    assert ends["preempted"].receipt is not None
    assert ends["preempted"].tries == 21
    assert ends["unlucky"].tries == 21
    assert ends["unlucky"].cause.startswith("its node was lost 21 times: the node went away.")


def test_a_worker_lost_with_its_node_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's end is seen at once, the node's only after missed heartbeats."""
    cluster = FakeCluster({"CPU": 2.0})
    cluster.dead = {"n0"}
    cluster.alive = {"n1": {"CPU": 2.0}}
    cluster.outcomes = {"task": [crash() for _ in range(10)]}
    (end,) = fake_run(cluster, ["task"], monkeypatch)
    assert end.receipt is not None
    assert end.tries == 11


def test_a_task_without_memory_says_what_to_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed() -> Exception:
        return FakeCluster.exceptions.OutOfMemoryError("1 worker was killed\npages of text")

    for memory, remedy in ((5_000, "memory_bytes is 5,000; raise it"), (0, "asks for no memory")):
        cluster = FakeCluster({"CPU": 2.0, "memory": 1e9})
        cluster.outcomes = {"big": [killed() for _ in range(9)]}
        (end,) = fake_run(cluster, ["big"], monkeypatch, memory_bytes=memory)
        assert end.cause.startswith("Ray's memory monitor killed it 4 times (1 worker was killed.)")
        assert remedy in end.cause
        assert "pages" not in end.cause


def test_what_the_task_itself_says_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster({"CPU": 2.0})
    cluster.outcomes = {"bad": [(None, "a sentence", False)]}
    ends = fake_run(cluster, ["bad", "good"], monkeypatch)
    assert {end.task: (end.cause, end.tries) for end in ends} == {
        "bad": ("a sentence", 1),
        "good": ("", 1),
    }


def test_after_a_full_disk_nothing_more_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster({"CPU": 1.0})
    cluster.outcomes = {"000": [(None, "no space", True)]}
    ends = fake_run(cluster, [f"{n:03d}" for n in range(100)], monkeypatch)
    assert ends[0].is_hopeless
    assert len(ends) == len(cluster.submitted) == 5


def test_a_cluster_without_a_node_is_waited_for_and_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_tasks, "PLACEMENT_SECONDS", 0.5)
    monkeypatch.setattr(ray_tasks, "WAITING_LINE_SECONDS", 0.1)
    cluster = FakeCluster()

    def wait(references: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
        time.sleep(0.01)
        return [], references

    monkeypatch.setattr(cluster, "wait", wait)
    with pytest.raises(DeclipError, match="of 0 nodes have 0 cores"):
        fake_run(cluster, ["a", "b"], monkeypatch)
    assert "step: none of 0 nodes carries a task now; waiting" in capsys.readouterr().err
    # Tasks wait in flight meanwhile, or no autoscaler would bring a node.
    assert cluster.submitted == ["a", "b"]


def test_only_workers_of_ray_are_killed() -> None:
    process = ray_head.subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
    try:
        kill_worker(process.pid)
        time.sleep(0.1)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    kill_worker(process.pid)  # one that is gone is no error


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray_tasks, "BACK_OFF_SECONDS", 0.05)


def ends_of(root: Path, names: tuple[str, ...], digest: str, **settings: Any) -> dict[str, TaskEnd]:
    stage = ray_stages.Trouble(root=str(root), names=names, **settings)
    ended = ray_runner.run_tasks(str(root), "trouble", stage, names, digest)
    return {end.task: end for end in ended}


@pytest.mark.ray
@pytest.mark.slow
def test_every_trouble_ends(quick: None, tmp_path: Path) -> None:
    """One cluster of this machine for several laws, for it takes seconds to start."""
    with ray_runner.shut_down_after():
        ends = ends_of(tmp_path, ("fine", "kill-2", "kill-9", "refuse", "defect"), "a")
        tries = {task: end.tries for task, end in ends.items()}
        assert tries == {"fine": 1, "kill-2": 3, "kill-9": 4, "refuse": 1, "defect": 1}
        done = {task for task, end in ends.items() if end.receipt is not None}
        assert done == {"fine", "kill-2"}
        assert ends["refuse"].cause == "told to refuse"
        assert ends["defect"].cause.rstrip().endswith("ZeroDivisionError: a defect")
        # Stopped or hanging, once or always: ended at the deadline, in the kernel if need be.
        ends = ends_of(tmp_path, ("stop-1", "hang-9"), "b", task_seconds=2.0)
        assert ends["stop-1"].receipt is not None
        assert ends["stop-1"].tries == ends["hang-9"].tries == 2
        assert ends["hang-9"].cause.startswith("it was still at work after 2 s, 2 times")
        for mark in (tmp_path / "tries").glob("[sh]*-*.0"):
            with contextlib.suppress(psutil.NoSuchProcess):
                assert psutil.Process(int(mark.read_text())).wait(timeout=30) is None
        # What needs more memory than there is says so at once.
        with pytest.raises(DeclipError, match=r"1000\.0 TB of memory"):
            ends_of(tmp_path, ("fine",), "c", memory_bytes=10**15)
        assert ends_of(tmp_path, ("fine",), "d", memory_bytes=10**6)["fine"].receipt is not None
        # A raylet that dies takes the cluster with it: it is started anew, and the tasks go on.
        names = tuple(f"fine-{n}" for n in range(8))
        stage = ray_stages.Trouble(root=str(tmp_path), names=names, seconds=0.3)
        done_again: dict[str, TaskEnd] = {}
        for end in ray_runner.run_tasks(str(tmp_path), "trouble", stage, names, "e"):
            if not done_again:
                kill_raylet()
            done_again[end.task] = end
        assert sorted(done_again) == sorted(names)
        assert all(end.receipt is not None for end in done_again.values())
        assert max(end.tries for end in done_again.values()) == 2


def kill_raylet() -> None:
    """Of the cluster that this process has started."""
    for process in psutil.Process(os.getpid()).children(recursive=True):
        if process.name().startswith("raylet"):
            process.send_signal(signal.SIGKILL)
