import importlib
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray_stages
import yaml

from declip_shards import DeclipError
from pipelines import ray_runner, ray_tasks
from pipelines.cli import main

LOOPBACK = (
    "127.0.0.1:6379",
    "127.9.9.9:6379",
    "localhost:6379",
    "[::1]:6379",
    "ray://127.0.0.1:10001",
    "ray://[::1]:10001",
)
ELSEWHERE = (
    "10.0.0.1:6379",
    "ray://10.0.0.1:10001",
    "0.0.0.0:6379",
    "[::]:6379",
    "[2001:db8::1]:6379",
    "[::ffff:10.0.0.1]:6379",
    "head.example.com:6379",
    "localhost.example.com:6379",
    "127.0.0.1.example.com:6379",
)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("10.0.0.1:6379", ("", "10.0.0.1", 6379)),
        ("ray://10.0.0.1:10001", ("ray://", "10.0.0.1", 10001)),
        ("[::1]:6379", ("", "::1", 6379)),
        ("localhost:1", ("", "localhost", 1)),
        ("ray://head:65535", ("ray://", "head", 65535)),
    ],
)
def test_addresses_are_split(address: str, parts: tuple[str, str, int]) -> None:
    assert ray_runner.split_address(address) == parts


@pytest.mark.parametrize(
    "address",
    ["auto", "10.0.0.1", "http://127.0.0.1:8265", "127.0.0.1:", ":6379", "h:65536", "h:0", "h:-1"],
)
def test_an_address_that_names_no_one_head_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(DeclipError, match=r"RAY_ADDRESS is .*HOST:PORT \(127.0.0.1:6379\)") as e:
        ray_runner.start()
    assert repr(address) in str(e.value)


@pytest.mark.parametrize("address", ELSEWHERE)
def test_a_head_elsewhere_must_ask_for_a_token(address: str) -> None:
    with pytest.raises(DeclipError, match="start it again with RAY_AUTH_MODE=token") as e:
        ray_runner.check_address(address, is_guarded=False)
    assert repr(address) in str(e.value)
    ray_runner.check_address(address, is_guarded=True)


@pytest.mark.parametrize("address", LOOPBACK)
def test_a_head_on_loopback_may_go_without(address: str) -> None:
    ray_runner.check_address(address, is_guarded=False)
    ray_runner.check_address(address, is_guarded=True)


Handler = Callable[[bytes, Any], bytes]


@pytest.fixture
def serve() -> Iterator[Callable[[str, Handler], int]]:
    """Start a gRPC server with one call, on loopback; returns its port."""
    grpc: Any = importlib.import_module("grpc")
    servers = []

    def start(call: str, handler: Handler) -> int:
        _, service, method = call.split("/")
        server = grpc.server(ThreadPoolExecutor(1))
        behavior = grpc.unary_unary_rpc_method_handler(handler)
        generic = grpc.method_handlers_generic_handler(service, {method: behavior})
        server.add_generic_rpc_handlers((generic,))
        port: int = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return port

    yield start
    for server in servers:
        server.stop(None).wait(10)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_whether_a_head_is_guarded_is_asked_of_the_head(
    scheme: str, serve: Callable[[str, Handler], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    grpc: Any = importlib.import_module("grpc")

    def refuse(request: bytes, context: Any) -> bytes:
        assert "authorization" not in dict(context.invocation_metadata())
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        return b""

    # What is set here says nothing of the head.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token-of-the-tests-only")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    guarded = serve(ray_runner.PROBES[scheme], refuse)
    open_to_all = serve(ray_runner.PROBES[scheme], lambda request, context: b"")
    another = serve("/some.Other/Call", lambda request, context: b"")
    assert ray_runner.asks_for_token(f"{scheme}127.0.0.1:{guarded}")
    assert not ray_runner.asks_for_token(f"{scheme}127.0.0.1:{open_to_all}")
    assert not ray_runner.asks_for_token(f"{scheme}127.0.0.1:{another}")


def test_a_head_that_is_not_there_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(DeclipError, match=r"no Ray head answers at '127.0.0.1:1'.*--runner local"):
        ray_runner.start()


@pytest.mark.parametrize("in_job", [False, True])
def test_a_run_on_an_open_head_elsewhere_fails_with_one_sentence(
    in_job: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "t.csv").write_text("url,caption\nhttp://127.0.0.1:1/x.jpg,a cat\n")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray_runner, "asks_for_token", lambda address: False)
    if in_job:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    out = tmp_path / "out"
    command = ["run", "pairs", "--out", str(out), "--only", "ingest"]
    assert main([*command, "--ingest.table", str(tmp_path / "t.csv")]) == 1
    assert capsys.readouterr().err.startswith("declip: the Ray head at '10.0.0.1:6379' is on")
    assert [p.name for p in out.rglob("*") if p.is_file() and p.parent.name != "manifests"] == []


def test_a_relative_folder_is_refused_on_a_cluster_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("", "local"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        ray_runner.check_shared_root("runs/pairs")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    for root in ("/mnt/shared/pairs", "s3://bucket/pairs"):
        ray_runner.check_shared_root(root)
    with pytest.raises(DeclipError, match=r"'runs/pairs' is relative.*--out an absolute path"):
        next(ray_runner.run_on_ray("runs/pairs", "hold", ray_stages.HoldCores(), ["0"], "x"))


def test_what_a_job_is_sent_is_what_a_driver_sends() -> None:
    folder = Path(ray_runner.__file__).parent
    env = yaml.safe_load((folder / "runtime_env.yaml").read_text())
    sent = {Path(module).name for module in env["py_modules"]}
    assert sent | {"pipelines"} == set(ray_runner.OUR_PACKAGES)  # pipelines is in working_dir
    assert all((folder.parent / module / "py.typed").is_file() for module in env["py_modules"])
    assert env["env_vars"] == ray_runner.WORKER_ENVIRONMENT


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cluster for several laws, for it takes seconds to start."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(ray_tasks, "LOST_WORKER_RETRIES", 1)
    monkeypatch.setattr(ray_tasks, "BACK_OFF_SECONDS", 0.05)
    root = str(tmp_path)

    def run(stage: Any, digest: str) -> dict[str, tuple[bool, str]]:
        tasks = ["0"] if stage.dies else stage.tasks()
        ended = ray_runner.run_on_ray(root, "hold", stage, tasks, digest)
        return {task: (receipt is not None, cause) for task, receipt, cause in ended}

    # Of its own, and short: Ray's sockets have 107 characters.
    with (
        tempfile.TemporaryDirectory(prefix="rr", dir="/tmp") as folder,
        ray_runner.shut_down_after(),
    ):
        monkeypatch.setenv("RAY_TMPDIR", folder)
        # Tasks that take all cores never overlap.
        assert run(ray_stages.HoldCores(root=root), "a") == dict.fromkeys("012", (True, ""))
        spans = sorted(json.loads((tmp_path / f"{task}.json").read_text()) for task in "012")
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
        # One whose worker dies every time is given up, and says so.
        died = run(ray_stages.HoldCores(root=root, dies=True), "b")
        assert {cause.partition(":")[0] for _, cause in died.values()} == {
            "its worker was lost 2 times"
        }
        # What fits on no node is refused at once.
        for stage in (ray_stages.HoldTooMuch(root=root), ray_stages.HoldAccelerators(root=root)):
            with pytest.raises(DeclipError, match="add a larger node"):
                run(stage, "c")
        # A cluster that stands is used again, and takes nobody without its token.
        ray = ray_runner.start()
        assert ray is sys.modules["ray"]
        assert ray_runner.asks_for_token(ray.get_runtime_context().gcs_address)
    assert not sys.modules["ray"].is_initialized()
