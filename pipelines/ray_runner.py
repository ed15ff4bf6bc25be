"""Tasks on Ray: which cluster, who may reach it, and nothing started when idle."""

import contextlib
import faulthandler
import importlib
import ipaddress
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from declip_shards import DeclipError, Stage, Store, manifest
from declip_shards.manifest import Receipt
from pipelines.ray_tasks import TaskRun
from pipelines.task_end import TaskEnd

PROBE_SECONDS = 10.0
"""For a Ray head to answer at all; Ray itself would wait for minutes."""
START_SECONDS = 120.0
"""For Ray to start or to be connected to; what takes longer hangs."""
PROBES = {
    "": "/ray.rpc.NodeInfoGcsService/CheckAlive",
    "ray://": "/ray.rpc.RayletDriver/ClusterInfo",
}
"""Address's scheme -> a call that changes nothing and that a head with a token refuses without."""
OUR_PACKAGES = (
    "declip_shards",
    "declip_pixels",
    "declip_ingest",
    "declip_filter",
    "declip_train",
    "declip_eval",
    "pipelines",
)
"""What travels to a cluster's workers; runtime_env.yaml says the same for Ray jobs."""
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
"""A task is one core's work, and img2dataset's albumentations must not call home."""


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
    if root.startswith("memory:"):
        raise DeclipError(
            f"the output folder {root!r} lies in the memory of one process, and Ray's tasks are "
            "others; use --runner local, or give --out a folder or a URL that all of them see."
        )
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


@contextlib.contextmanager
def _exit_if_it_hangs() -> Iterator[None]:
    """End this process, with status 1 and its stacks told, if Ray does not start.

    Ray's start waits in C++ without end, holding Python's lock, for a raylet that has lost a
    worker in the wrong moment: neither a signal nor a thread of ours could end that.
    """
    if sys.__stderr__ is None:
        yield
        return
    faulthandler.dump_traceback_later(START_SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def start() -> Any:
    """Connect to the cluster of ``RAY_ADDRESS``, or start one of this machine's cores.

    Raises:
        DeclipError: no head there, one without a token in others' reach, or a token it refuses.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return sys.modules["ray"]
    options = _options()
    import ray

    ours = signal.getsignal(signal.SIGTERM)
    try:
        with _exit_if_it_hangs():
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
    if threading.current_thread() is threading.main_thread() and ours is not None:
        signal.signal(signal.SIGTERM, ours)  # Ray's would exit with status 15
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


def run_tasks(
    root: str, step: str, stage: Stage, tasks: Sequence[str], digest: str
) -> Iterator[TaskEnd]:
    """Run tasks on the cluster and yield each as it ends; their receipts are not written.

    Raises:
        DeclipError: no node carries a task, the folder is none that nodes share, or the cluster
            is lost.
    """
    check_shared_root(root)
    run = TaskRun(
        start,
        root,
        step,
        stage,
        tasks,
        digest,
        is_own_cluster=has_own_cluster(),
        is_client=os.environ.get("RAY_ADDRESS", "").startswith("ray://"),
    )
    yield from run.ends()


def run_on_ray(
    root: str, step: str, stage: Stage, tasks: Sequence[str], digest: str
) -> Iterator[tuple[str, Receipt | None, str]]:
    """Run tasks on the cluster and write the receipt of each.

    Yields:
        The task's name, its receipt or None, the first cause of its failure.
    """
    store = Store(root)
    for end in run_tasks(root, step, stage, tasks, digest):
        if end.receipt is not None:
            # Here and not in the worker, which may outlive a killed run for a moment: what it
            # does then, for instance after the run's own HTTP server has gone, must not count.
            manifest.write_receipt(store, step, end.receipt)
        yield end.task, end.receipt, end.cause
