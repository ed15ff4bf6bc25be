"""Every way a server can misbehave ends in its own stable reason, in bounded time and bytes."""

import email.utils
import gzip
import importlib
import socket
import ssl
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_ingest.failures import FETCH_REASONS, FetchError
from declip_ingest.fetch import (
    MAX_REDIRECTS,
    Fetcher,
    FetchPolicy,
    check_url,
    is_opted_out,
    retry_after_seconds,
)
from declip_shards import DeclipError

if TYPE_CHECKING:
    from tests.ingest.misbehaving_server import encode, response
else:
    # conftest.py puts this folder on the path.
    from misbehaving_server import encode, response

PICTURE = encode()


def fetcher(server, **settings) -> Fetcher:
    settings = {"timeout_seconds": 5, "retries": 0, **settings}
    return Fetcher(FetchPolicy(allow_addresses=(server.address,), **settings))


def failure(server, url: str, **settings) -> FetchError:
    with fetcher(server, **settings) as f, pytest.raises(FetchError) as caught:
        f.fetch(url)
    return caught.value


def reset(conn: socket.socket) -> None:
    """Close with RST instead of FIN."""
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    conn.close()


def endless_chunks(conn: socket.socket) -> None:
    conn.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        conn.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")


def test_a_body_comes_back_byte_for_byte(server):
    with fetcher(server) as f:
        assert f.fetch(server.add("/a", response(PICTURE))) == PICTURE
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunked += b"%x\r\n" % len(PICTURE) + PICTURE + b"\r\n0\r\n\r\n"
        assert f.fetch(server.add("/chunked", chunked)) == PICTURE

        def until_close(conn):
            conn.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + PICTURE)

        assert f.fetch(server.add("/close", until_close)) == PICTURE


@pytest.mark.parametrize("path", ["/a b/ü.jpg?q=1&r=ñ#top", "/a%20b/%C3%BC.jpg?q=1&r=%C3%B1"])
def test_spaces_and_letters_beyond_ascii_are_escaped_as_browsers_do(server, path):
    server.add("/a%20b/%C3%BC.jpg?q=1&r=%C3%B1", response(PICTURE))
    raw = response(status="302 Found", Location="/ü.jpg".encode().decode("latin-1"))
    server.add("/raw", raw)
    server.add("/%C3%BC.jpg", response(b"redirected"))
    with fetcher(server) as f:
        assert f.fetch(server.url(path)) == PICTURE
        assert f.fetch(server.url("/raw")) == b"redirected"


def test_connections_are_reused(server):
    with fetcher(server) as f:
        for i in range(20):
            f.fetch(server.add(f"/{i}", response(PICTURE)))
    assert server.connections == 1


def test_we_say_who_we_are_and_ask_for_plain_bytes(server):
    url = server.add("/a", response(PICTURE))
    with fetcher(server, user_agent_contact="ops@example.org") as f:
        f.fetch(url)
    headers = dict(
        line.lower().split(": ", 1) for line in server.requests[0].split("\r\n")[1:] if line
    )
    assert headers["user-agent"].startswith("opendeclip/")
    assert "+ops@example.org" in headers["user-agent"]
    assert "mozilla" not in headers["user-agent"]
    assert headers["accept-encoding"] == "identity"
    assert headers["host"] == server.address


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (response(status="404 Not Found"), "http_404"),
        (response(status="410 Gone"), "http_410"),
        (response(status="451 Unavailable For Legal Reasons"), "http_451"),
        (response(status="500 Internal Server Error"), "http_500"),
        (response(status="204 No Content"), "http_204"),
        (response(b""), "empty_body"),
        (response(b"x" * 1001), "too_large"),
        (response(b"x", length=5_000_000_000), "too_large"),
        (response(gzip.compress(PICTURE), Content_Encoding="gzip"), "content_encoding"),
        (response(PICTURE, X_Robots_Tag="noai"), "opted_out"),
        (response(status="302 Found"), "bad_redirect"),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "bad_response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", "bad_response"),
        (endless_chunks, "too_large"),
        (reset, "connection_reset"),
        (lambda conn: None, "connection_reset"),
        (lambda conn: conn.sendall(response(b"x" * 10, length=20)), "short_body"),
        (
            lambda conn: conn.sendall(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n" + b"x" * 50
            ),
            "short_body",
        ),
    ],
)
def test_each_fault_has_its_reason(server, answer, reason):
    url = server.add("/x", answer)
    error = failure(server, url, max_body_bytes=1000)
    assert error.reason == reason
    assert reason.startswith("http_") or reason in FETCH_REASONS
    assert error.status == "failed_to_download"
    assert server.address.rpartition(":")[2] not in error.message, "a port would not be stable"


def test_an_announced_length_over_the_cap_is_not_read(server):
    sent = []

    def big(conn):
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 500000000\r\n\r\n")
        for _ in range(500):
            conn.sendall(b"x" * 1_000_000)
            sent.append(1)

    assert failure(server, server.add("/big", big)).reason == "too_large"
    # What the kernel's buffers swallow before the hang-up arrives, no more.
    assert len(sent) < 20


def test_a_shorter_announced_length_hands_over_only_that(server):
    """The surplus must not be taken for the next answer."""
    with fetcher(server, retries=1) as f:
        assert f.fetch(server.add("/liar", response(PICTURE + b"HTTP/1.1", length=len(PICTURE))))
        time.sleep(0.05)
        assert f.fetch(server.add("/next", response(b"next"))) == b"next"


def test_a_gzip_bomb_on_a_redirect_is_not_unpacked(server):
    bomb = gzip.compress(b"\0" * 50_000_000)
    target = server.add("/ok", response(PICTURE))
    url = server.add("/bomb", response(bomb, "302 Found", Content_Encoding="gzip", Location=target))
    with fetcher(server) as f:
        assert f.fetch(url) == PICTURE


def test_a_connection_refused_is_named(server, closed_port):
    policy = FetchPolicy(retries=0, allow_addresses=(f"127.0.0.1:{closed_port}",))
    with Fetcher(policy) as f, pytest.raises(FetchError, match=r"^connection_refused$"):
        f.fetch(f"http://127.0.0.1:{closed_port}/a.jpg")


@pytest.mark.parametrize("kind", ["silent", "slow_headers", "slow_body", "slow_chunk"])
def test_no_server_holds_a_row_beyond_its_deadline(server, stopwatch, kind):
    answer = {
        "silent": server.hang,
        "slow_headers": server.drip(b"HTTP/1.1 200 OK\r\nX-A: ", 0.05),
        "slow_body": server.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", 0.05),
        "slow_chunk": server.drip(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n", 1
        ),
    }[kind]
    error = failure(server, server.add("/x", answer), timeout_seconds=0.6, retries=3)
    assert error.reason == "timeout"
    assert stopwatch() < 1.6


def test_a_slow_body_ends_by_its_rate_before_the_deadline(server, stopwatch):
    drip = server.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", 0.1)
    assert failure(server, server.add("/x", drip), timeout_seconds=30).reason == "timeout"
    assert 1.9 < stopwatch() < 4


def test_the_first_byte_has_a_limit_of_its_own_and_is_tried_again(server, stopwatch):
    url = server.add("/x", server.hang)
    error = failure(server, url, timeout_seconds=20, first_byte_timeout_seconds=0.2, retries=1)
    assert error.reason == "timeout"
    assert server.hits["/x"] == 2
    assert stopwatch() < 3


@pytest.mark.parametrize(
    ("status", "times"), [("404 Not Found", 1), ("500 Oh", 1), ("503 Busy", 3), ("502 Bad", 3)]
)
def test_only_passing_failures_are_tried_again(server, status, times):
    url = server.add("/x", response(status=status))
    assert failure(server, url, retries=2).reason == f"http_{status[:3]}"
    assert server.hits["/x"] == times


def test_a_retry_can_succeed(server):
    answers = [reset, reset, lambda conn: conn.sendall(response(PICTURE))]
    url = server.add("/x", lambda conn: answers[server.hits["/x"] - 1](conn))
    with fetcher(server, retries=2) as f:
        assert f.fetch(url) == PICTURE


def test_retry_after_is_waited_for_within_the_deadline(server, stopwatch):
    def busy_once(conn):
        first = server.hits["/x"] == 1
        conn.sendall(
            response(status="429 Too Many Requests", Retry_After="1")
            if first
            else response(PICTURE)
        )

    with fetcher(server, retries=1) as f:
        assert f.fetch(server.add("/x", busy_once)) == PICTURE
    assert 0.95 < stopwatch() < 3


@pytest.mark.parametrize("pause", ["30", "3600", "-"])
def test_a_longer_pause_than_the_deadline_is_not_waited_for(server, stopwatch, pause):
    if pause == "-":
        pause = email.utils.formatdate(time.time() + 3000, usegmt=True)
    url = server.add("/x", response(status="429 Too Many Requests", Retry_After=pause))
    assert failure(server, url, retries=5, timeout_seconds=3).reason == "http_429"
    assert server.hits["/x"] == 1
    assert stopwatch() < 1


def test_retry_after_reads_numbers_and_dates():
    assert retry_after_seconds("7") == 7
    assert retry_after_seconds("soon") is None
    assert retry_after_seconds(None) is None
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 95 < (retry_after_seconds(date) or 0) <= 100
    assert retry_after_seconds("Thu, 01 Jan 1970 00:00:00 GMT") == 0


def test_redirects_are_followed_up_to_five(server):
    for hop in range(MAX_REDIRECTS + 1):
        server.add(f"/{hop}", response(status="302 Found", Location=f"/{hop + 1}"))
    server.add(f"/{MAX_REDIRECTS + 1}", response(PICTURE))
    with fetcher(server) as f:
        assert f.fetch(server.url("/1")) == PICTURE
    assert failure(server, server.url("/0")).reason == "redirect_loop"


def test_a_redirect_loop_is_named_at_its_first_return(server):
    server.add("/a", response(status="301 Moved", Location="/b"))
    server.add("/b", response(status="307 Temporary Redirect", Location="/a"))
    assert failure(server, server.url("/a")).reason == "redirect_loop"
    assert server.hits == {"/a": 1, "/b": 1}


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data/", "forbidden_address"),
        ("http://10.0.0.1/", "forbidden_address"),
        ("http://[::1]/", "forbidden_address"),
        ("http://[::ffff:127.0.0.1]/", "forbidden_address"),
        ("file:///etc/passwd", "bad_redirect"),
        ("ftp://example.org/a.jpg", "bad_redirect"),
        ("gopher://127.0.0.1:70/", "bad_redirect"),
        ("http://user:secret@example.org/", "bad_redirect"),
        ("http://[half/", "bad_redirect"),
    ],
)
def test_every_hop_is_vetted(server, target, reason):
    url = server.add("/x", response(status="302 Found", Location=target))
    assert failure(server, url).reason == reason


def test_a_private_address_is_refused_unless_it_is_allowed(server):
    """The canary sees no connection at all, not just no request."""
    url = server.add("/x", response(PICTURE))
    port = url.split(":")[2].split("/")[0]
    with Fetcher(FetchPolicy(allow_addresses=("127.0.0.1:1",))) as f:
        for name in ("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "0177.0.0.1"):
            with pytest.raises(FetchError, match=r"^forbidden_address$"):
                f.fetch(f"http://{name}:{port}/x")
    assert server.connections == 0
    with fetcher(server) as f:
        assert f.fetch(url) == PICTURE


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "bad_url: empty"),
        ("http://a@127.0.0.1/", "bad_url: user name"),
        ("http://user:secret@example.org/a.jpg", "bad_url: user name"),
        ("http://example.org/a\r\nHost: evil", "bad_url: control"),
        ("http://example.org/" + "a" * 100_000, "bad_url: length"),
        ("example.org/a.jpg", "bad_url: not absolute"),
        ("http:///a.jpg", "bad_url: not absolute"),
        ("http://example.org:99999/", "bad_url"),
        ("file:///etc/passwd", "bad_scheme"),
        ("ftp://example.org/a.jpg", "bad_scheme"),
        ("data:image/png;base64,iVBORw0KGgo=", "bad_scheme"),
    ],
)
def test_urls_that_are_never_fetched(url, message):
    with Fetcher() as f, pytest.raises(FetchError) as caught:
        f.fetch(url)
    assert caught.value.message == message


@given(st.text(max_size=60))
def test_no_text_breaks_the_url_check(text):
    try:
        parts = check_url(text)
    except FetchError as error:
        outcome: object = error.reason
    else:
        outcome = (parts.scheme, parts.auth)
    assert outcome in ("bad_url", "bad_scheme", ("http", None), ("https", None))


def test_a_name_that_does_not_exist_is_a_dns_failure():
    with Fetcher(FetchPolicy(retries=0)) as f, pytest.raises(FetchError, match=r"^dns_failure$"):
        f.fetch("http://no-such-host.invalid/a.jpg")


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        (["noai"], True),
        (["NoIndex, nofollow"], True),
        (["nofollow"], False),
        (["otherbot: noindex, nofollow"], False),
        (["opendeclip: noindex"], True),
        (["otherbot: nofollow, OpenDeCLIP: noai"], True),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noimageai"], True),
        (["otherbot: noai", "noindex"], True),
        ([], False),
    ],
)
def test_opt_outs_are_obeyed_as_far_as_they_reach(values, refused):
    assert is_opted_out(values, ("noai", "noimageai", "noindex")) is refused
    assert not is_opted_out(values, ())


def test_the_opt_out_list_is_obeyed_by_the_fetcher(server):
    url = server.add("/x", response(PICTURE, X_Robots_Tag="noai"))
    with fetcher(server, disallowed_header_directives=("noindex",)) as f:
        assert f.fetch(url) == PICTURE


def test_one_fetcher_serves_many_threads(server):
    urls = [server.add(f"/{i}", response(b"%d" % i)) for i in range(200)]
    with fetcher(server) as f, ThreadPoolExecutor(16) as pool:
        assert list(pool.map(f.fetch, urls)) == [b"%d" % i for i in range(200)]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("timeout_seconds", 0),
        ("connect_timeout_seconds", -1),
        ("first_byte_timeout_seconds", float("nan")),
        ("retries", -1),
        ("max_body_bytes", 0),
        ("min_bytes_per_second", -1),
        ("user_agent_contact", "a\r\nX: y"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_value(setting, value):
    with pytest.raises(DeclipError) as caught:
        FetchPolicy(**{setting: value})
    assert setting in str(caught.value)
    assert str(value) in str(caught.value) or repr(value) in str(caught.value)
    assert ";" in str(caught.value), "the remedy follows"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """Key and self-signed certificate for ``localhost`` in one file."""
    x509 = importlib.import_module("cryptography.x509")
    import datetime

    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path: Path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def tls_server(certificate):
    """(port, list of SNI names asked for, what it sends next)."""
    names: list[str | None] = []
    answers: list[bytes] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda sock, name, ctx: names.append(name)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                conn, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(conn, server_side=True) as secure:
                    secure.recv(65536)
                    secure.sendall(answers[0])
                    if b"X-Hang" in answers[0]:
                        secure.recv(1)
            except OSError:
                continue

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1], names, answers
    listener.close()


def test_tls_is_verified_against_the_name_while_the_address_is_pinned(
    tls_server, certificate, monkeypatch
):
    port, names, answers = tls_server
    answers.append(response(PICTURE))
    policy = FetchPolicy(
        retries=0,
        timeout_seconds=5.0,
        allow_addresses=(f"localhost:{port}", f"127.0.0.1:{port}"),
    )
    with Fetcher(policy) as f, pytest.raises(FetchError, match=r"^tls_error$"):
        f.fetch(f"https://localhost:{port}/self-signed")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with Fetcher(policy) as f:
        assert f.fetch(f"https://localhost:{port}/trusted") == PICTURE
        with pytest.raises(FetchError, match=r"^tls_error$"):
            f.fetch(f"https://127.0.0.1:{port}/wrong-name")
    assert "localhost" in names


def test_the_deadline_holds_under_tls(tls_server, certificate, monkeypatch, stopwatch):
    port, _, answers = tls_server
    answers.append(b"HTTP/1.1 200 OK\r\nX-Hang: 1\r\nContent-Length: 10\r\n\r\n12345")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    policy = FetchPolicy(allow_addresses=(f"localhost:{port}",), retries=0, timeout_seconds=0.6)
    with Fetcher(policy) as f, pytest.raises(FetchError, match=r"^timeout$"):
        f.fetch(f"https://localhost:{port}/")
    assert stopwatch() < 2


def test_plain_http_on_a_tls_url_is_a_tls_error():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve():
            conn, _ = listener.accept()
            with conn:
                conn.recv(65536)
                conn.sendall(response(status="400 Bad Request"))

        threading.Thread(target=serve, daemon=True).start()
        policy = FetchPolicy(allow_addresses=(f"127.0.0.1:{port}",), retries=0)
        with Fetcher(policy) as f, pytest.raises(FetchError, match=r"^tls_error$"):
            f.fetch(f"https://127.0.0.1:{port}/")
