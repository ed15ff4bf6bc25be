"""Tasks on Ray: bounded in flight, workers loaded once a process, nothing started when idle."""

import contextlib
import ipaddress
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from declip_shards import DeclipError, Stage, Store, TaskStats, manifest
from declip_shards.manifest import Receipt

LOST_WORKER_RETRIES = 3
"""Times that Ray runs a task again whose worker died. The task is idempotent."""


_workers: dict[str, Callable[[str], TaskStats]] = {}
"""Fingerprint of a stage -> its worker, loaded once in this process."""


def _loaded_worker(stage: Stage, digest: str) -> Callable[[str], TaskStats]:
    if digest not in _workers:
        _workers.clear()  # Ray reuses processes: the models of an earlier stage go
        _workers[digest] = stage.worker()
    return _workers[digest]


def _ray_task(
    root: str, step: str, stage: Stage, task: str, digest: str
) -> tuple[str, Receipt | None, str]:
    try:
        store = Store(root)
        receipt = manifest.make_receipt(store, task, digest, _loaded_worker(stage, digest)(task))
        manifest.write_receipt(store, step, receipt)
    except DeclipError as error:
        return task, None, str(error)
    except Exception:  # reported with the task; the others go on
        return task, None, traceback.format_exc()
    return task, receipt, ""


def check_address(address: str, token: str | None) -> None:
    """Refuse a head on another machine unless it asks for a token.

    Ray's dashboard runs whatever it is sent (CVE-2023-48022), so a head without authentication
    is safe on this machine only.
    """
    host = address.removeprefix("ray://").rpartition(":")[0].strip("[]") or address
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host in ("localhost", "auto", "local")
    if not is_loopback and not token:
        raise DeclipError(
            f"the Ray head at {address!r} is not on this machine and no token is set: anyone who "
            "reaches it could run code on it. Start it with RAY_AUTH_MODE=token and set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) here."
        )


def start() -> Any:
    """Connect to the cluster of ``RAY_ADDRESS``, or start one of this machine's cores."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return ray
    address = os.environ.get("RAY_ADDRESS", "")
    in_job = bool(os.environ.get("RAY_JOB_ID") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))
    if address and not in_job:
        token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
        if os.environ["RAY_AUTH_MODE"] != "token":
            token = None
        check_address(address, token)
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": "ERROR"}
    if not address:
        # Workers import our packages from the paths that this process has.
        paths = os.pathsep.join(p for p in sys.path if p)
        options |= {
            "address": "local",
            "include_dashboard": False,
            "runtime_env": {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
        }
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError) as error:
        raise DeclipError(
            f"cannot reach Ray at {address or 'this machine'!r}: {error}; start it "
            "(RAY_AUTH_MODE=token ray start --head --node-ip-address 127.0.0.1) or use "
            "--runner local."
        ) from error
    return ray


@contextlib.contextmanager
def shut_down_after() -> Iterator[None]:
    """Stop the cluster at the end if this run started one; a run with nothing to do has not."""
    try:
        yield
    finally:
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            ray.shutdown()


def run_on_ray(
    root: str, step: str, stage: Stage, tasks: Sequence[str], digest: str
) -> Iterator[tuple[str, Receipt | None, str]]:
    """Run tasks on the cluster, at most twice as many in flight as its cores carry.

    Yields each task as it ends, with its receipt or the first cause of its failure. A task whose
    worker died is run again by Ray up to :data:`LOST_WORKER_RETRIES` times.
    """
    ray = start()
    remote = ray.remote(
        num_cpus=stage.num_cpus, num_gpus=stage.num_gpus, max_retries=LOST_WORKER_RETRIES
    )(_ray_task)
    handle = ray.put(stage)
    names: dict[Any, str] = {}
    queue = list(reversed(tasks))
    while queue or names:
        cores = ray.cluster_resources().get("CPU", 1.0)
        if stage.num_cpus > cores and not names:
            raise DeclipError(
                f"a task of {step!r} needs {stage.num_cpus:g} cores and the cluster has {cores:g}; "
                "add a larger node, or use --runner local."
            )
        limit = max(2, int(2 * cores / max(stage.num_cpus, 0.1)))
        while queue and len(names) < limit:
            task = queue.pop()
            names[remote.remote(root, step, handle, task, digest)] = task
        done, _ = ray.wait(list(names), num_returns=1, timeout=5.0)
        for reference in done:
            task = names.pop(reference)
            try:
                yield ray.get(reference)
            except ray.exceptions.RayError as error:
                yield task, None, f"its worker was lost {LOST_WORKER_RETRIES + 1} times: {error}"
