"""The demo's server: good files come back whole, and each failure fails in its own way."""

import http.client
import io
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from declip_shards.errors import DeclipError
from pipelines.demo_server import FAILURE_KINDS, DemoServer, _find_file

FILES = {
    "files/noto/1f34e.png": b"\x89PNG not really",
    "files/met/a b&c.jpg": b"jpeg" * 5000,
    "files/x.webp": b"w",
    "pairs.parquet": b"PAR1",
    "empty.bin": b"",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    for name, data in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root.parent / "secret.txt").write_text("secret")
    (root / "files" / "link.txt").symlink_to(root.parent / "secret.txt")
    (root / "files" / "half.png.part-123").write_bytes(b"half")
    return root


@pytest.fixture(scope="module")
def server(folder):
    with DemoServer(folder, 0) as running:
        yield running


def connect(server, timeout=5.0):
    return http.client.HTTPConnection(server.host, server.port, timeout=timeout)


def get(server, path, method="GET"):
    connection = connect(server)
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


@pytest.mark.parametrize("name", FILES)
def test_serves_the_very_bytes(server, name):
    response, body = get(server, "/" + urllib.request.pathname2url(name))
    assert response.status == 200
    assert body == FILES[name]
    assert int(response.headers["Content-Length"]) == len(body)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("files/noto/1f34e.png", "image/png"),
        ("files/met/a%20b%26c.jpg", "image/jpeg"),
        ("files/x.webp", "image/webp"),
        ("empty.bin", "application/octet-stream"),
    ],
)
def test_content_type_follows_the_extension(server, name, kind):
    assert get(server, "/" + name)[0].headers["Content-Type"] == kind


def test_one_connection_serves_many_requests(server):
    connection = connect(server)
    for _ in range(3):
        for name in ("/files/noto/1f34e.png", "/missing", "/files/x.webp", "/fail/gone/1"):
            connection.request("GET", name)
            sock = connection.sock
            connection.getresponse().read()
            assert connection.sock is sock is not None
    connection.close()


def test_head_tells_the_length_and_sends_no_body(server):
    response, body = get(server, "/files/met/a%20b%26c.jpg", "HEAD")
    assert (response.status, body) == (200, b"")
    assert int(response.headers["Content-Length"]) == 20000


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/files/../../secret.txt",
        "/files/link.txt",
        "/files/half.png.part-123",
        "//etc/passwd",
        "/files",
        "/",
        "/files/%00",
        "/files/..%5c..%5csecret.txt",
        "/" + "a" * 5000,
    ],
)
def test_nothing_outside_the_folder_is_served(server, path):
    response, body = get(server, path)
    assert response.status == 404
    assert b"secret" not in body


@given(parts=st.lists(st.text(max_size=8) | st.sampled_from(["..", ".", "files", "met"])))
@settings(max_examples=100, deadline=None)
def test_any_parts_stay_inside(folder, parts):
    found = _find_file(folder.resolve(), parts)
    assert found is None or found.is_relative_to(folder.resolve())


def test_writing_is_not_offered(server):
    assert get(server, "/files/x.webp", "PUT")[0].status == 501
    assert get(server, "/files/x.webp", "DELETE")[0].status == 501


@pytest.mark.parametrize(
    ("kind", "status"), [("not_found", 404), ("gone", 410), ("server_error", 500)]
)
def test_error_statuses(server, kind, status):
    assert get(server, f"/fail/{kind}/3")[0].status == status


def test_timeout_never_answers(server):
    connection = connect(server, timeout=0.3)
    connection.request("GET", "/fail/timeout/0")
    with pytest.raises(TimeoutError):
        connection.getresponse()
    connection.close()


def test_slow_body_keeps_every_single_read_short_of_a_socket_timeout(server):
    connection = connect(server, timeout=2)
    connection.request("GET", "/fail/slow_body/0")
    response = connection.getresponse()
    start = time.monotonic()
    assert response.read(2)
    assert time.monotonic() - start > 0.4
    assert int(response.headers["Content-Length"]) > 500
    connection.close()


def test_truncated_body_is_shorter_than_its_length(server):
    with pytest.raises(http.client.IncompleteRead):
        get(server, "/fail/truncated_body/1")


def test_truncated_image_has_the_right_length_and_does_not_decode(server):
    response, body = get(server, "/fail/truncated_image/1")
    assert int(response.headers["Content-Length"]) == len(body)
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(body)).load()


def test_html_pretends_to_be_an_image(server):
    response, body = get(server, "/fail/html_as_image/1")
    assert response.headers["Content-Type"] == "image/jpeg"
    assert body.startswith(b"<!DOCTYPE html")


def test_empty_body_is_a_success_without_bytes(server):
    response, body = get(server, "/fail/empty_body/1")
    assert (response.status, body) == (200, b"")


def test_redirect_loop_is_noticed_by_a_client(server):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError, match="infinite loop"):
        opener.open(f"{server.url}/fail/redirect_loop/0", timeout=5)


def test_redirect_private_points_at_a_private_address(server):
    response, _ = get(server, "/fail/redirect_private/0")
    assert response.status == 302
    assert response.headers["Location"].startswith("http://169.254.")


def test_bomb_is_small_and_claims_to_be_huge(server):
    _, body = get(server, "/fail/decompression_bomb/0")
    assert len(body) < 1000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(body))


def test_unknown_failure_offers_the_nearest(server):
    response, body = get(server, "/fail/timout/0")
    assert response.status == 400
    assert b"Did you mean 'timeout'?" in body


def test_every_kind_but_the_two_without_a_route_is_a_route(server):
    hanging = {"timeout", "slow_body", "truncated_body"}
    for kind in set(FAILURE_KINDS) - hanging - {"connection_refused", "bad_scheme"}:
        assert get(server, f"/fail/{kind}/0")[0].status != 400


def test_stops_fast_while_requests_hang(folder):
    server = DemoServer(folder, 0)
    server.start()
    connections = [connect(server, timeout=10) for _ in range(20)]
    for number, connection in enumerate(connections):
        connection.request("GET", ["/fail/timeout/0", "/fail/slow_body/0"][number % 2])
    time.sleep(0.2)
    before = threading.active_count()
    start = time.monotonic()
    server.stop()
    assert time.monotonic() - start < 2
    server.stop()
    for connection in connections:
        connection.close()
    deadline = time.monotonic() + 2
    while threading.active_count() > before - 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before - 20
    with pytest.raises(ConnectionRefusedError):
        get(server, "/files/x.webp")


def free_pair():
    """A port that is free together with the next one."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def test_the_next_port_refuses_connections_and_is_held(folder):
    port = free_pair()
    with DemoServer(folder, port) as server:
        assert server.url == f"http://127.0.0.1:{port}"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port + 1), timeout=2)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port + 1))
    with DemoServer(folder, port):  # both are free again at once
        pass


@pytest.mark.parametrize("offset", [0, 1])
def test_a_taken_port_is_named_with_the_option(folder, offset):
    port = free_pair()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + offset))
        taken.listen()
        with pytest.raises(DeclipError, match=rf"port {port + offset} .*--prepare\.port"):
            DemoServer(folder, port).start()


def test_wrong_arguments_are_refused(folder):
    with pytest.raises(DeclipError, match=r"port 65535 is not between 0 and 65534"):
        DemoServer(folder, 65535)
    with pytest.raises(DeclipError, match="is not a folder"):
        DemoServer(folder / "nowhere", 0)


def test_command_serves_until_terminated(folder):
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.demo_server", str(folder), "--port", "0"],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        url = line.split(" at ")[1].split(";")[0]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{url}/files/x.webp", timeout=5) as response:
            assert response.read() == b"w"
        process.terminate()
        assert process.wait(timeout=5) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_command_says_one_sentence_and_exits_with_1(tmp_path, capsys):
    from pipelines.demo_server import main

    assert main([str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
