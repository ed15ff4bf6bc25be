"""Tasks on Ray: bounded in flight, workers loaded once a process, nothing started when idle."""

import contextlib
import importlib
import ipaddress
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from declip_shards import DeclipError, Stage, Store, TaskStats, manifest
from declip_shards.manifest import Receipt

LOST_WORKER_RETRIES = 3
"""Times that Ray runs a task again whose worker died. The task is idempotent."""
PROBE_SECONDS = 10.0
"""For a Ray head to answer at all; Ray itself would wait for minutes."""
PLACEMENT_SECONDS = 600.0
"""For a cluster to bring a node that carries a task: one that grows on demand starts small."""
PROBES = {
    "": "/ray.rpc.NodeInfoGcsService/CheckAlive",
    "ray://": "/ray.rpc.RayletDriver/ClusterInfo",
}
"""Address's scheme -> a call that changes nothing and that a head with a token refuses without."""
OUR_PACKAGES = (
    "declip_shards",
    "declip_ingest",
    "declip_filter",
    "declip_train",
    "declip_eval",
    "pipelines",
)
"""What travels to a cluster's workers; runtime_env.yaml says the same for Ray jobs."""
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
"""A task is one core's work, and img2dataset's albumentations must not call home."""


_workers: dict[str, Callable[[str], TaskStats]] = {}
"""Fingerprint of a stage -> its worker, loaded once in this process."""


def _loaded_worker(stage: Stage, digest: str) -> Callable[[str], TaskStats]:
    if digest not in _workers:
        _workers.clear()  # Ray reuses processes: the models of an earlier stage go
        _workers[digest] = stage.worker()
    return _workers[digest]


def _ray_task(root: str, stage: Stage, task: str, digest: str) -> tuple[str, Receipt | None, str]:
    try:
        store = Store(root)
        receipt = manifest.make_receipt(store, task, digest, _loaded_worker(stage, digest)(task))
    except DeclipError as error:
        return task, None, str(error)
    except OSError as error:
        return task, None, f"{type(error).__name__}: {error}"
    except Exception:  # reported with the task; the others go on
        return task, None, traceback.format_exc()
    return task, receipt, ""


def split_address(address: str) -> tuple[str, str, int]:
    """``[ray://]HOST:PORT`` as (scheme, host, port); an IPv6 host stands in brackets.

    Raises:
        DeclipError: another form. ``auto`` is refused too: it takes whatever cluster was started
            last on this machine, perhaps somebody else's.
    """
    scheme = "ray://" if address.startswith("ray://") else ""
    host, _, port = address.removeprefix(scheme).rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise DeclipError(
            f"RAY_ADDRESS is {address!r}; it must name one head as HOST:PORT (127.0.0.1:6379) or "
            "ray://HOST:PORT, or be empty for a cluster of this machine's cores; a dashboard's "
            "http:// address is for ray job submit."
        )
    return scheme, host, int(port)


def asks_for_token(address: str) -> bool:
    """Whether the head refuses a call that bears no token; nothing on it is changed.

    Under TLS it cannot be asked without the head's certificates, and False is the answer.

    Raises:
        DeclipError: nobody answers within :data:`PROBE_SECONDS`.
    """
    grpc: Any = importlib.import_module("grpc")  # comes with ray[default]
    scheme, host, port = split_address(address)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    # A proxy of the environment must not see the call, nor answer in the head's place.
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(PROBES[scheme])(b"", timeout=PROBE_SECONDS)
        except grpc.RpcError as error:
            code = error.code()
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                    return False
                raise DeclipError(
                    f"no Ray head answers at {address!r} ({error.details()}); start it "
                    "(docs/cluster.md), mend RAY_ADDRESS, or use --runner local."
                ) from None
            return bool(code == grpc.StatusCode.UNAUTHENTICATED)
    return False


def check_address(address: str, *, is_guarded: bool) -> None:
    """Refuse a head that others can reach unless it asks for a token.

    Ray's dashboard runs whatever it is sent (CVE-2023-48022), so a head without authentication
    is safe on this machine only.

    Args:
        is_guarded: what :func:`asks_for_token` found: what is set here says nothing of the head.
    """
    host = split_address(address)[1]
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if not is_loopback and not is_guarded:
        raise DeclipError(
            f"the Ray head at {address!r} is on another address than loopback and asks for no "
            "token: anyone who reaches it can run code on it. Stop it, start it again with "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH), and set both here."
        )


def has_own_cluster() -> bool:
    """Whether tasks run on a cluster that this process starts and stops itself."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def check_shared_root(root: str) -> None:
    """Refuse a folder that the nodes of a cluster would each take for another one.

    A Ray job runs in a temporary copy of the checkout, which Ray deletes: what it wrote to a
    relative folder would be lost.
    """
    if not has_own_cluster() and "://" not in root and not os.path.isabs(root):
        raise DeclipError(
            f"the output folder {root!r} is relative, and on a cluster each process has a current "
            "folder of its own that Ray deletes; give --out an absolute path that all nodes share, "
            "or a URL (s3://...)."
        )


def _options() -> dict[str, Any]:
    """What ``ray.init`` is told.

    RAY_AUTH_MODE stays unset where it is: Ray then asks for a token in a cluster of its own, and
    sends the one it finds to another's. Set by us, it would be read only if Ray has not been
    imported yet, and img2dataset imports it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": "ERROR"}
    if has_own_cluster():
        # Workers import our packages from the paths that this process has.
        paths = os.pathsep.join(p for p in sys.path if p)
        env_vars = {"PYTHONPATH": paths, **WORKER_ENVIRONMENT}
        return options | {
            "address": "local",
            "include_dashboard": False,
            "runtime_env": {"env_vars": env_vars},
        }
    address = os.environ["RAY_ADDRESS"]
    is_guarded = asks_for_token(address)
    check_address(address, is_guarded=is_guarded)
    if is_guarded and "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # a missing token is then named at once
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # in a job, Ray's own runtime env holds
        # __path__, for a package without __init__.py has no __file__.
        folders = [next(iter(importlib.import_module(p).__path__)) for p in OUR_PACKAGES]
        options["runtime_env"] = {"py_modules": folders, "env_vars": WORKER_ENVIRONMENT}
    return options


def start() -> Any:
    """Connect to the cluster of ``RAY_ADDRESS``, or start one of this machine's cores.

    Raises:
        DeclipError: no head there, one without a token in others' reach, or a token it refuses.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return sys.modules["ray"]
    options = _options()
    import ray

    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        if has_own_cluster():
            raise DeclipError(
                f"cannot start Ray on this machine: {error}; use --runner local."
            ) from error
        raise DeclipError(
            f"the Ray head at {os.environ['RAY_ADDRESS']!r} answers but takes no connection: "
            f"{error}. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the "
            "head's token, and use the head's versions of Python and Ray."
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


def _check_placement(ray: Any, step: str, stage: Stage, seconds_waited: float) -> None:
    """Refuse a stage whose tasks no node can carry: Ray would keep them waiting for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(
        node.get("CPU", 0.0) >= stage.num_cpus and node.get("GPU", 0.0) >= stage.num_gpus
        for node in nodes
    ):
        return
    if has_own_cluster() or seconds_waited > PLACEMENT_SECONDS:
        cores = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
        gpus = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
        raise DeclipError(
            f"a task of {step!r} needs {stage.num_cpus:g} cores and {stage.num_gpus:g} GPUs on one "
            f"node, and the largest nodes have {cores:g} cores and {gpus:g} GPUs; "
            "add a larger node, or use --runner local."
        )


def run_on_ray(
    root: str, step: str, stage: Stage, tasks: Sequence[str], digest: str
) -> Iterator[tuple[str, Receipt | None, str]]:
    """Run tasks on the cluster, at most twice as many in flight as its cores carry.

    Yields each task as it ends, with its receipt or the first cause of its failure. A task whose
    worker died is run again by Ray up to :data:`LOST_WORKER_RETRIES` times.
    """
    check_shared_root(root)
    store, ray = Store(root), start()
    remote = ray.remote(
        num_cpus=stage.num_cpus, num_gpus=stage.num_gpus, max_retries=LOST_WORKER_RETRIES
    )(_ray_task)
    handle = ray.put(stage)
    names: dict[Any, str] = {}
    queue = list(reversed(tasks))
    last_end = time.monotonic()
    while queue or names:
        _check_placement(ray, step, stage, time.monotonic() - last_end)
        cores = ray.cluster_resources().get("CPU", 1.0)
        limit = max(2, int(2 * cores / max(stage.num_cpus, 0.1)))
        while queue and len(names) < limit:
            task = queue.pop()
            names[remote.remote(root, handle, task, digest)] = task
        done, _ = ray.wait(list(names), num_returns=1, timeout=5.0)
        for reference in done:
            task, last_end = names.pop(reference), time.monotonic()
            try:
                result = ray.get(reference)
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
                cause = f"its worker was lost {LOST_WORKER_RETRIES + 1} times: {error}"
                result = task, None, cause
            except ray.exceptions.RayError as error:
                result = task, None, f"Ray could not run it: {error}"
            if result[1] is not None:
                # Here and not in the worker, which may outlive a killed run for a moment: what it
                # does then, for instance after the run's own HTTP server has gone, must not count.
                manifest.write_receipt(store, step, result[1])
            yield result
