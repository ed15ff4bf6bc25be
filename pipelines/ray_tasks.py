"""A stage's tasks on Ray: bounded in flight, lost ones run again, hung ones ended.

Ray's own retries are off. They do not tell a worker that a task kills from a node that goes away,
they do not pause, and without a bound they run a task for ever that runs out of memory.
"""

import contextlib
import heapq
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from declip_shards import DeclipError, Stage, Store, TaskStats, manifest
from declip_shards.manifest import Receipt
from pipelines.lock import task_lock
from pipelines.task_end import TaskEnd, describe, size_text

LOST_WORKER_RETRIES = 3
"""Times that a task is run again whose worker died: it may be the task that kills it."""
LOST_NODE_RETRIES = 20
"""Times that it is run again because its node went away; none of the task's doing."""
TIMEOUT_RETRIES = 1
"""Times that it is run again after its deadline."""
BACK_OFF_SECONDS = 1.0
"""Before the first further try; doubled for each one more."""
LONGEST_BACK_OFF_SECONDS = 30.0
"""Between two tries."""
PLACEMENT_SECONDS = 600.0
"""For a cluster to bring a node that carries a task: one that grows on demand starts small."""
WAITING_LINE_SECONDS = 60.0
"""Between two lines while no node carries a task."""
LOOK_SECONDS = 1.0
"""Between two looks at deadlines, nodes and tasks that wait for their next try."""
MARGIN = 4
"""Tasks in flight beyond those that run, at least: a cluster grows for tasks that it sees wait."""


_workers: dict[str, Callable[[str], TaskStats]] = {}
"""Fingerprint of a stage -> its worker, loaded once in this process."""

Outcome = tuple[Receipt | None, str, bool]
"""(receipt or None, first cause of failure, whether it is hopeless to go on)."""


def _loaded_worker(stage: Stage, digest: str) -> Callable[[str], TaskStats]:
    if digest not in _workers:
        # Ray reuses processes: the models and connections of an earlier stage go.
        for worker in _workers.values():
            getattr(worker, "close", lambda: None)()
        _workers.clear()
        _workers[digest] = stage.worker()
    return _workers[digest]


def do_task(root: str, stage: Stage, task: str, digest: str) -> Outcome:
    """Run one task in this process; whatever it raises comes back in words."""
    store = Store(root)
    try:
        with task_lock(store):
            stats = _loaded_worker(stage, digest)(task)
            return manifest.make_receipt(store, task, digest, stats), "", False
    except Exception as error:  # reported with the task; the others go on
        cause, is_hopeless = describe(error, store)
        return None, cause, is_hopeless


def _ray_task(root: str, stage: Stage, task: str, digest: str) -> Iterator[Any]:
    """First where it runs, for the driver counts its time from then; then how it ended."""
    import ray

    yield os.getpid(), ray.get_runtime_context().get_node_id()
    yield do_task(root, stage, task, digest)


def kill_worker(process: int) -> None:
    """End a worker of Ray on this machine at once, even a stopped one, and nothing else."""
    with contextlib.suppress(OSError):
        if b"ray::" in Path(f"/proc/{process}/cmdline").read_bytes():
            os.kill(process, signal.SIGKILL)


@dataclass
class _Story:
    """What has become of a task so far."""

    tries: int = 0
    lost_on: list[str] = field(default_factory=list)
    """Nodes on which its worker died; empty string for one that is not known."""
    num_displaced: int = 0
    num_timeouts: int = 0


@dataclass
class _Attempt:
    """A task in flight."""

    task: str
    reference: Any
    """What Ray gave for it."""
    submitted: float
    started: float | None = None
    """When its worker said that it begins (monotonic); None while it waits."""
    process: int = 0
    node: str = ""


def carried(resources: Mapping[str, float], stage: Stage) -> int:
    """How many tasks of a stage a node of such resources carries at once."""
    needs = {
        "CPU": stage.num_cpus,
        "GPU": stage.num_gpus,
        "memory": float(getattr(stage, "memory_bytes", None) or 0),
    }
    counts = [int(resources.get(name, 0.0) // need) for name, need in needs.items() if need > 0]
    return min(counts, default=1)


def placement_fault(step: str, stage: Stage, nodes: Sequence[Mapping[str, float]]) -> str:
    """Why no node carries a task of the stage."""
    cores = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    gpus = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    memory = float(getattr(stage, "memory_bytes", None) or 0)
    needed, largest = "", ""
    if memory:
        most = max((node.get("memory", 0.0) for node in nodes), default=0.0)
        needed, largest = f", {size_text(memory)} of memory", f", {size_text(most)} of memory"
    remedy = ", lower memory_bytes" if memory else ""
    return (
        f"a task of {step!r} needs {stage.num_cpus:g} cores{needed} and {stage.num_gpus:g} GPUs on "
        f"one node, and the largest of {len(nodes)} nodes have {cores:g} cores{largest} and "
        f"{gpus:g} GPUs; add a larger node{remedy}, or use --runner local."
    )


class TaskRun:
    """Run tasks and hand back each as it ends.

    Args:
        connect: gives the connected ``ray``, starting or restarting what is needed.
        root: folder of the dataset.
        step: name of the step, for sentences.
        stage: the stage. Beside its five members it may have ``task_seconds`` (a task that works
            longer is ended by force) and ``memory_bytes`` (that Ray keeps free for a task).
        tasks: names, in the order in which they are started.
        digest: fingerprint for their receipts.
        is_own_cluster: whether the cluster is this process's: it never grows, and is started
            anew where it breaks.
        is_client: whether the driver is outside of the cluster (``ray://``), where tasks cannot
            say when they begin: then no more are in flight than run.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        root: str,
        step: str,
        stage: Stage,
        tasks: Sequence[str],
        digest: str,
        *,
        is_own_cluster: bool,
        is_client: bool = False,
    ) -> None:
        self.connect, self.root, self.step, self.stage = connect, root, step, stage
        self.digest, self.is_own_cluster, self.is_client = digest, is_own_cluster, is_client
        self.seconds: float | None = getattr(stage, "task_seconds", None)
        self.waiting = [(0.0, number, task) for number, task in enumerate(tasks)]
        self.flying: dict[Any, _Attempt] = {}
        self.stories = {task: _Story() for task in tasks}
        self.order = {task: number for number, task in enumerate(tasks)}
        self.num_restarts = 0
        self.is_hopeless = False
        self._fitted = self._told = time.monotonic()
        self._submit()

    def _submit(self) -> None:
        """Make the remote function, on a cluster that may be a new one.

        The stage goes along with each task, by value, for it is small. In Ray's object store it
        would be lost with the raylet, and Ray ends a driver that it cannot give its object back.
        """
        self.ray = self.connect()
        memory = getattr(self.stage, "memory_bytes", None)
        options: dict[str, Any] = {"memory": memory} if memory else {}
        if self.stage.num_gpus:
            # By default Ray ends the process after each task that had a GPU: every shard would
            # load the model again.
            options["max_calls"] = 0
        if not self.is_client:
            options["num_returns"] = "streaming"
        self.remote = self.ray.remote(
            num_cpus=self.stage.num_cpus, num_gpus=self.stage.num_gpus, max_retries=0, **options
        )(do_task if self.is_client else _ray_task)

    def ends(self) -> Iterator[TaskEnd]:
        """Each task as it ends.

        Raises:
            DeclipError: no node carries a task and none comes, or the cluster is gone.
        """
        while (self.waiting and not self.is_hopeless) or self.flying:
            self._launch(self._slots())
            references = list(self.flying)
            if not references:
                time.sleep(LOOK_SECONDS / 5)  # all wait for their next try, or for a node
                continue
            done, _ = self.ray.wait(references, num_returns=1, timeout=LOOK_SECONDS)
            for reference in done:
                if (attempt := self.flying.get(reference)) is not None:
                    yield from self._take(attempt)
            yield from self._end_late_ones()

    def _slots(self) -> int:
        """Tasks that the cluster carries at once; waits for a node for a bounded time."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        slots = sum(carried(node, self.stage) for node in nodes)
        now = time.monotonic()
        if slots:
            self._fitted = self._told = now
            return slots
        # Without any node a cluster of our own is broken, and the tasks in flight say so.
        if (self.is_own_cluster and nodes) or now - self._fitted > PLACEMENT_SECONDS:
            raise DeclipError(placement_fault(self.step, self.stage, nodes))
        if now - self._told > WAITING_LINE_SECONDS:
            self._told = now
            left = PLACEMENT_SECONDS - (now - self._fitted)
            print(
                f"  {self.step}: none of {len(nodes)} nodes carries a task now; waiting "
                f"{left / 60:.0f} min more for the cluster to bring one",
                file=sys.stderr,
                flush=True,
            )
        return 0

    def _launch(self, slots: int) -> None:
        """Start waiting tasks whose time has come, as many as may be in flight."""
        limit = max(1, slots) if self.is_client else max(2 * slots, slots + MARGIN)
        now = time.monotonic()
        while self.waiting and len(self.flying) < limit and not self.is_hopeless:
            if self.waiting[0][0] > now:
                return
            _, _, task = heapq.heappop(self.waiting)
            self.stories[task].tries += 1
            reference = self.remote.remote(self.root, self.stage, task, self.digest)
            self.flying[reference] = _Attempt(task, reference, now)

    def _take(self, attempt: _Attempt) -> Iterator[TaskEnd]:
        """Read what has come of a task: that it begins, its end, or that it was lost."""
        errors = self.ray.exceptions
        try:
            value = self._value(attempt)
        except errors.LocalRayletDiedError as error:
            yield from self._restart(error)
            return
        except (errors.NodeDiedError, errors.RayActorError, errors.ObjectLostError) as error:
            del self.flying[attempt.reference]
            yield from self._displaced(attempt, error)
            return
        except (
            errors.WorkerCrashedError,
            errors.OutOfMemoryError,
            errors.RuntimeEnvSetupError,
        ) as error:
            del self.flying[attempt.reference]
            yield from self._lost(attempt, error)
            return
        except errors.RayError as error:
            del self.flying[attempt.reference]
            yield self._failure(attempt.task, f"Ray could not run it: {_last_line(error)}")
            return
        if attempt.started is None and not self.is_client:
            attempt.process, attempt.node = value
            attempt.started = time.monotonic()
            return
        del self.flying[attempt.reference]
        receipt, cause, is_hopeless = value
        self.is_hopeless |= is_hopeless
        if receipt is None:
            yield self._failure(attempt.task, cause, is_hopeless=is_hopeless)
        else:
            tries = self.stories[attempt.task].tries
            yield TaskEnd(task=attempt.task, receipt=receipt, tries=tries)

    def _value(self, attempt: _Attempt) -> Any:
        if self.is_client:
            return self.ray.get(attempt.reference)
        try:
            return self.ray.get(next(attempt.reference))
        except StopIteration:
            # It ended without its second word; Ray has said why with the first, or never will.
            raise self.ray.exceptions.WorkerCrashedError from None

    def _failure(self, task: str, cause: str, *, is_hopeless: bool = False) -> TaskEnd:
        tries = self.stories[task].tries
        return TaskEnd(task=task, cause=cause, tries=tries, is_hopeless=is_hopeless)

    def _again(self, task: str, number: int) -> None:
        """Try a task once more, after a pause that doubles with each number."""
        pause = min(BACK_OFF_SECONDS * 2 ** (number - 1), LONGEST_BACK_OFF_SECONDS)
        heapq.heappush(self.waiting, (time.monotonic() + pause, self.order[task], task))

    def _displaced(self, attempt: _Attempt, error: Exception) -> Iterator[TaskEnd]:
        story = self.stories[attempt.task]
        story.num_displaced += 1
        if story.num_displaced > LOST_NODE_RETRIES:
            lost = f"its node was lost {story.num_displaced} times: {_first_line(error)}"
            yield self._failure(attempt.task, f"{lost} Use nodes that last as long as a task.")
            return
        self._again(attempt.task, 1)

    def _lost(self, attempt: _Attempt, error: Exception) -> Iterator[TaskEnd]:
        story = self.stories[attempt.task]
        story.lost_on.append(attempt.node)
        # A worker goes before Ray knows that its node went: such a loss does not count later on.
        dead = {node["NodeID"] for node in self.ray.nodes() if not node["Alive"]}
        number = sum(node not in dead for node in story.lost_on)
        if number <= LOST_WORKER_RETRIES and len(story.lost_on) <= LOST_NODE_RETRIES:
            self._again(attempt.task, max(1, number))
            return
        cause = f"its worker was lost {len(story.lost_on)} times: {_first_line(error)}"
        if isinstance(error, self.ray.exceptions.OutOfMemoryError):
            memory = getattr(self.stage, "memory_bytes", None)
            asked = f"memory_bytes is {memory:,}; raise it" if memory else "it asks for no memory"
            times = len(story.lost_on)
            cause = (
                f"Ray's memory monitor killed it {times} times ({_first_line(error)}): "
                f"{asked}, so that fewer tasks share a node, make shards smaller, or use nodes "
                "with more memory."
            )
        yield self._failure(attempt.task, cause)

    def _end_late_ones(self) -> Iterator[TaskEnd]:
        """End tasks that work longer than they may, wherever they hang, and start them anew."""
        if self.seconds is None:
            return
        now = time.monotonic()
        for attempt in list(self.flying.values()):
            start = attempt.submitted if self.is_client else attempt.started
            if start is None or now - start <= self.seconds:
                continue
            del self.flying[attempt.reference]  # whatever it still says, nobody listens
            self._end_by_force(attempt)
            story = self.stories[attempt.task]
            story.num_timeouts += 1
            if story.num_timeouts <= TIMEOUT_RETRIES:
                self._again(attempt.task, 1)
                continue
            yield self._failure(
                attempt.task,
                f"it was still at work after {self.seconds:g} s, {story.num_timeouts} times, and "
                "was ended; look at its input, or give tasks more time.",
            )

    def _end_by_force(self, attempt: _Attempt) -> None:
        """Ray asks a worker to end itself; one that is stopped hears only the kernel."""
        with contextlib.suppress(Exception):  # it may have ended in this very moment
            self.ray.cancel(attempt.reference, force=True)
        if self.is_own_cluster:
            kill_worker(attempt.process)
        elif attempt.node:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            there = NodeAffinitySchedulingStrategy(attempt.node, soft=False)
            kill = self.ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)
            kill(kill_worker).remote(attempt.process)

    def _restart(self, error: Exception) -> Iterator[TaskEnd]:
        """The cluster of this process broke: start it anew with all that was in flight."""
        attempts = list(self.flying.values())
        self.flying.clear()
        if not self.is_own_cluster:
            raise DeclipError(
                "the Ray node that this run is connected to died; what is done is kept: run the "
                "same command again."
            )
        self.num_restarts += 1
        if self.num_restarts > LOST_NODE_RETRIES:
            raise DeclipError(
                f"Ray's raylet on this machine died {self.num_restarts} times "
                f"({_first_line(error)}); look for what kills it (memory, disk), or use "
                "--runner local."
            )
        print(f"  {self.step}: Ray died on this machine; it is started anew", file=sys.stderr)
        self.ray.shutdown()
        self._submit()
        self._fitted = self._told = time.monotonic()
        for attempt in attempts:
            yield from self._displaced(attempt, error)


def _first_line(error: Exception) -> str:
    """What Ray says, without its pages."""
    text = str(error).strip().splitlines()
    line = text[0].strip() if text else type(error).__name__
    return line if line.endswith(".") else f"{line}."


def _last_line(error: Exception) -> str:
    """The error itself of what comes with a worker's stack."""
    text = str(error).strip().splitlines()
    return text[-1].strip() if text else type(error).__name__
