"""Every way a server can misbehave ends in its own stable reason, in bounded time and bytes."""

import asyncio
import datetime
import email.utils
import errno
import gzip
import pickle
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from declip_ingest.bodies import MIN_RATE_GRACE_SECONDS
from declip_ingest.failures import DECODE_REASONS, FETCH_REASONS, FetchError, reason_of
from declip_ingest.fetch import (
    RETRYABLE_REASONS,
    Fetched,
    Fetcher,
    FetchPolicy,
)
from declip_shards import DeclipError

if TYPE_CHECKING:
    from tests.ingest.misbehaving_server import MisbehavingServer, encode, response
else:
    # conftest.py puts this folder on the path.
    from misbehaving_server import MisbehavingServer, encode, response

PICTURE = encode()
LARGEST_OVERSHOOT_BYTES = 1 << 16
LARGEST_OVERSHOOT_SECONDS = 1.0


def policy(server: MisbehavingServer | None = None, **settings: Any) -> FetchPolicy:
    allowed = (server.address,) if server else ()
    given = {"timeout_seconds": 5, "retries": 0, "robots": "ignore", "allow_addresses": allowed}
    return FetchPolicy(**{**given, **settings})


def fetch_all(urls: list[str], policy: FetchPolicy, **options: Any) -> list[Fetched]:
    """All at once, with one fetcher."""

    async def run() -> list[Fetched]:
        async with Fetcher(policy, **options) as fetcher:
            return await asyncio.gather(*map(fetcher.fetch, urls))

    return asyncio.run(run())


def fetch_in_turn(urls: list[str], policy: FetchPolicy, **options: Any) -> list[Fetched]:
    """One after another, with one fetcher."""

    async def run() -> list[Fetched]:
        async with Fetcher(policy, **options) as fetcher:
            return [await fetcher.fetch(url) for url in urls]

    return asyncio.run(run())


def fetch(url: str, policy: FetchPolicy, **options: Any) -> Fetched:
    [fetched] = fetch_all([url], policy, **options)
    assert (fetched.body is None) is (fetched.failure is not None)
    return fetched


def body(url: str, policy: FetchPolicy, **options: Any) -> bytes:
    fetched = fetch(url, policy, **options)
    assert fetched.body is not None, fetched
    return fetched.body


def failure(url: str, policy: FetchPolicy, **options: Any) -> FetchError:
    fetched = fetch(url, policy, **options)
    assert fetched.failure is not None, fetched
    return fetched.failure


def reset(conn: socket.socket) -> None:
    """Close with RST instead of FIN."""
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    conn.close()


def reset_in_body(conn: socket.socket) -> None:
    conn.sendall(response(b"x" * 10, length=20))
    time.sleep(0.05)
    reset(conn)


def endless_chunks(conn: socket.socket) -> None:
    conn.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        conn.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")


def test_a_body_comes_back_byte_for_byte(server):
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b"%x\r\n" % len(PICTURE) + PICTURE + b"\r\n0\r\n\r\n"

    def until_close(conn):
        conn.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + PICTURE)

    urls = [
        server.add("/a", response(PICTURE)),
        server.add("/chunked", chunked),
        server.add("/close", until_close),
        server.add("/identity", response(PICTURE, Content_Encoding="identity")),
    ]
    assert [f.body for f in fetch_in_turn(urls, policy(server))] == [PICTURE] * 4


def test_the_kind_that_is_announced_does_not_matter(server):
    """Judged by its bytes alone, by the decoder."""
    login = b"<html>log in</html>"
    html = server.add("/html", response(PICTURE, Content_Type="text/html"))
    picture = server.add("/picture", response(login, Content_Type="image/jpeg"))
    assert [f.body for f in fetch_all([html, picture], policy(server))] == [PICTURE, login]


@pytest.mark.parametrize("path", ["/a b/ü.jpg?q=1&r=ñ#top", "/a%20b/%C3%BC.jpg?q=1&r=%C3%B1"])
def test_spaces_and_letters_beyond_ascii_are_escaped_as_browsers_do(server, path):
    server.add("/a%20b/%C3%BC.jpg?q=1&r=%C3%B1", response(PICTURE))
    raw = response(status="302 Found", Location="/ü.jpg".encode().decode("latin-1"))
    server.add("/raw", raw)
    server.add("/%C3%BC.jpg", response(b"redirected"))
    assert body(server.url(path), policy(server)) == PICTURE
    assert body(server.url("/raw"), policy(server)) == b"redirected"


@pytest.mark.parametrize(
    "path", ["/a%2Fb%7Ec~d;v=1,2!*'()?sig=%2B+a%3D%3D&x=%27'", "/x/../y/./z//w", "/%zz%"]
)
def test_what_is_legal_in_a_url_is_sent_as_it_stands(server, path):
    """A signature of the path would not survive any tidying."""
    assert body(server.add(path, response(PICTURE)), policy(server)) == PICTURE


def test_connections_are_reused(server):
    paths = [f"/{i}" for i in range(20)]
    for path in paths[::2]:
        server.add(path, response(PICTURE))
    server.add(paths[3], response(status="302 Found", Location="/0"))
    fetched = fetch_in_turn([server.url(path) for path in paths], policy(server))
    assert sum(f.body == PICTURE for f in fetched) == 11
    assert server.connections == 1, "errors and redirects with short bodies keep theirs too"


def test_connections_to_many_hosts_do_not_pile_up(server):
    """Each would stay idle for a while; a list has millions of hosts."""
    port = server.address.partition(":")[2]
    hosts = [f"h{i}.example:{port}" for i in range(60)]
    server.add("/a", response(PICTURE))
    limits = policy(allow_addresses=hosts)

    async def run() -> int:
        options: Any = {"max_connections": 4, "lookup": lambda host: ["127.0.0.1"]}
        async with Fetcher(limits, **options) as fetcher:
            for host in hosts:
                assert (await fetcher.fetch(f"http://{host}/a")).body == PICTURE
            return fetcher.num_sockets

    assert asyncio.run(run()) <= 4 * 4 + 4, "idle ones and those in use"


def test_we_say_who_we_are_and_ask_for_plain_bytes(server):
    url = server.add("/a", response(PICTURE, Set_Cookie="id=1"))
    fetch_in_turn([url, url], policy(server, user_agent_contact="ops@example.org"))
    headers = dict(
        line.lower().split(": ", 1) for line in server.requests[1].split("\r\n")[1:] if line
    )
    assert headers["user-agent"].startswith("opendeclip/")
    assert "+ops@example.org" in headers["user-agent"]
    assert "mozilla" not in headers["user-agent"]
    assert headers["accept-encoding"] == "identity"
    assert headers["host"] == server.address
    assert "cookie" not in headers


def test_proxies_of_the_environment_play_no_part(server, closed_port, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port}")
    assert body(server.add("/a", response(PICTURE)), policy(server)) == PICTURE


def test_what_happened_is_told(server):
    server.add("/a", response(status="302 Found", Location="/b"))
    server.add("/b", response(status="503 Busy", Retry_After="3600"))
    fetched = fetch(server.url("/a"), policy(server, retries=2))
    assert fetched.failure is not None
    assert fetched.failure.message == "http_503"
    assert fetched.failure.retry_after == 3600
    assert (fetched.http_status, fetched.attempts) == (503, 1)
    assert (fetched.host, fetched.final_url) == (server.address, server.url("/b"))
    assert fetched.url == server.url("/a")
    assert pickle.loads(pickle.dumps(fetched)).failure.message == "http_503"
    bad = fetch("gopher://a/", policy())
    assert (bad.http_status, bad.attempts, bad.host, bad.final_url) == (None, 0, "", "")
    good = fetch(server.add("/c", response(PICTURE)), policy(server))
    assert (good.http_status, good.attempts) == (200, 1)
    assert 0 <= good.milliseconds < 5000


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (response(status="404 Not Found"), "http_404"),
        (response(status="410 Gone"), "http_410"),
        (response(status="451 Unavailable For Legal Reasons"), "http_451"),
        (response(status="500 Internal Server Error"), "http_500"),
        (response(status="204 No Content"), "http_204"),
        (response(b"some", status="206 Partial Content"), "http_206"),
        (response(b""), "empty_body"),
        (response(b"x" * 1001), "too_large"),
        (response(b"x", length=5_000_000_000), "too_large"),
        (response(gzip.compress(PICTURE), Content_Encoding="gzip"), "content_encoding"),
        (response(PICTURE, Content_Encoding="br"), "content_encoding"),
        (response(PICTURE, X_Robots_Tag="noai"), "opted_out"),
        (response(PICTURE, X_Robots_Tag="OpenDeCLIP: noindex"), "opted_out"),
        (response(status="302 Found"), "bad_redirect"),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "bad_response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", "bad_response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello", "bad_response"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", "bad_response"),
        (endless_chunks, "too_large"),
        (reset, "connection_reset"),
        (reset_in_body, "connection_reset"),
        (lambda conn: None, "connection_reset"),
        (lambda conn: conn.sendall(response(b"x" * 10, length=20)), "short_body"),
        (
            lambda conn: conn.sendall(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n" + b"x" * 50
            ),
            "short_body",
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nxx\r\n", "bad_response"),
    ],
)
def test_each_fault_has_its_reason(server, answer, reason):
    url = server.add("/x", answer)
    error = failure(url, policy(server, max_body_bytes=1000))
    assert error.reason == reason
    assert reason.startswith("http_") or reason in FETCH_REASONS
    assert error.status == "failed_to_download"
    assert server.address.rpartition(":")[2] not in error.message, "a port would not be stable"


def test_reasons_that_are_tried_again_are_all_the_passing_ones_but_robots():
    named = FETCH_REASONS | DECODE_REASONS
    codes = [f"http_{number}" for number in range(100, 600)]
    passing = {reason for reason in [*named, *codes] if reason_of(reason).is_passing}
    assert passing - RETRYABLE_REASONS == {"robots_unavailable"}
    assert passing >= RETRYABLE_REASONS
    assert {"http_500", "http_425", "short_body", "empty_body"} <= RETRYABLE_REASONS


@pytest.mark.parametrize(
    "first",
    [
        response(status="500 Oops"),
        response(status="425 Too Early"),
        response(PICTURE[:20], length=len(PICTURE)),
        response(b""),
    ],
)
def test_what_passes_is_tried_again(server, first):
    answers = [first, response(PICTURE)]
    url = server.add("/x", lambda conn: conn.sendall(answers.pop(0)))
    fetched = fetch(url, policy(server, retries=1))
    assert (fetched.body, fetched.attempts) == (PICTURE, 2)


@pytest.mark.parametrize("status", ["404 Gone", "501 Not Implemented", "505 No", "999 Denied"])
def test_what_does_not_pass_is_tried_once(server, status):
    fetched = fetch(server.add("/x", response(status=status)), policy(server, retries=3))
    assert fetched.attempts == 1
    assert fetched.failure is not None
    assert fetched.failure.reason == f"http_{status[:3]}"


def test_an_announced_length_over_the_cap_is_not_read(server):
    sent = []

    def big(conn):
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 500000000\r\n\r\n")
        for _ in range(500):
            conn.sendall(b"x" * 1_000_000)
            sent.append(1)

    assert failure(server.add("/big", big), policy(server)).reason == "too_large"
    # What the kernel's buffers swallow before the hang-up arrives, no more.
    assert len(sent) < 20


@pytest.mark.parametrize("cap", [1000, 300_000, 9_000_000])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_without_end_is_read_little_beyond_the_cap(server, cap, is_chunked, monkeypatch):
    """Counted where aiohttp takes it from the socket; what lies in the kernel is nobody's yet."""
    read = [0]
    feed = aiohttp.StreamReader.feed_data

    def count(self, data, *others):
        read[0] += len(data)
        return feed(self, data, *others)

    monkeypatch.setattr(aiohttp.StreamReader, "feed_data", count)

    def endless(conn):
        coding = b"Transfer-Encoding: chunked\r\n" if is_chunked else b""
        conn.sendall(b"HTTP/1.1 200 OK\r\n" + coding + b"\r\n")
        block = b"x" * 0xFFF
        while True:
            conn.sendall(b"fff\r\n" + block + b"\r\n" if is_chunked else block)

    fetched = fetch(server.add("/x", endless), policy(server, max_body_bytes=cap))
    assert fetched.failure is not None
    assert fetched.failure.reason == "too_large"
    assert cap < read[0] <= cap + LARGEST_OVERSHOOT_BYTES
    assert fetched.milliseconds < 2000, "a stream that stalls would cost the row its deadline"


def test_a_shorter_announced_length_hands_over_only_that(server):
    """The surplus must not be taken for the next answer."""
    liar = server.add("/liar", response(PICTURE + b"HTTP/1.1", length=len(PICTURE)))
    later = server.add("/next", response(b"next"))
    first, second = fetch_in_turn([liar, later], policy(server, retries=1))
    assert first.body in (PICTURE, None)
    assert second.body == b"next"


def test_no_byte_of_an_opted_out_body_is_kept(server):
    url = server.add("/x", response(PICTURE, X_Robots_Tag="noimageai"))
    fetched = fetch(url, policy(server))
    assert fetched.body is None
    assert fetched.failure is not None
    assert fetched.failure.__traceback__ is None, "it would hold on to what was read"
    assert body(url, policy(server, disallowed_header_directives=("noindex",))) == PICTURE


def test_a_gzip_bomb_on_a_redirect_is_not_unpacked(server):
    bomb = gzip.compress(b"\0" * 50_000_000)
    target = server.add("/ok", response(PICTURE))
    url = server.add("/bomb", response(bomb, "302 Found", Content_Encoding="gzip", Location=target))
    short = gzip.compress(b"\0" * 5_000_000)
    again = server.add("/short", response(short, "302 F", Content_Encoding="gzip", Location=target))
    assert [f.body for f in fetch_all([url, again], policy(server))] == [PICTURE] * 2


def test_a_connection_refused_is_named(closed_port):
    limits = policy(allow_addresses=(f"127.0.0.1:{closed_port}",))
    url = f"http://127.0.0.1:{closed_port}/a.jpg"
    assert failure(url, limits).message == "connection_refused"


@pytest.mark.parametrize(
    "kind", ["silent", "slow_headers", "slow_body", "slow_chunk", "slow_error", "slow_redirect"]
)
def test_no_server_holds_a_row_beyond_its_deadline(server, kind):
    answer = {
        "silent": server.hang,
        "slow_headers": server.drip(b"HTTP/1.1 200 OK\r\nX-A: ", 0.05),
        "slow_body": server.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", 0.05),
        "slow_chunk": server.drip(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n", 1
        ),
        "slow_error": server.drip(b"HTTP/1.1 404 No\r\nContent-Length: 999\r\n\r\n", 0.05),
        "slow_redirect": server.drip(
            b"HTTP/1.1 302 F\r\nLocation: /x\r\nContent-Length: 999\r\n\r\n", 0.05
        ),
    }[kind]
    fetched = fetch(server.add("/x", answer), policy(server, timeout_seconds=0.6, retries=3))
    assert fetched.failure is not None
    expected = {"slow_error": "http_404", "slow_redirect": "redirect_loop"}
    assert fetched.failure.reason == expected.get(kind, "timeout")
    assert fetched.milliseconds < 1000 * (0.6 + LARGEST_OVERSHOOT_SECONDS)


def test_slow_hosts_do_not_hold_up_the_others(server):
    slow = [server.add(f"/slow{i}", server.hang) for i in range(8)]
    quick = [server.add(f"/{i}", response(PICTURE)) for i in range(40)]
    port = server.address.partition(":")[2]
    limits = policy(
        server,
        timeout_seconds=2,
        host_connections=8,
        allow_addresses=(server.address, f"slow.example:{port}"),
    )
    slow = [url.replace("127.0.0.1", "slow.example") for url in slow]
    fetched = fetch_all(slow + quick, limits, lookup=lambda host: ["127.0.0.1"], max_connections=16)
    assert [f.failure.reason for f in fetched[:8] if f.failure] == ["timeout"] * 8
    assert all(f.body == PICTURE and f.milliseconds < 1900 for f in fetched[8:])


def test_a_slow_body_ends_by_its_rate_before_the_deadline(server):
    drip = server.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", 0.1)
    fetched = fetch(server.add("/x", drip), policy(server, timeout_seconds=30))
    assert fetched.failure is not None
    assert fetched.failure.reason == "timeout"
    assert 1000 * MIN_RATE_GRACE_SECONDS - 100 < fetched.milliseconds < 6000


def test_no_rate_is_asked_for_when_it_is_0(server):
    drip = server.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", 0.1)
    limits = policy(server, timeout_seconds=2.5, min_bytes_per_second=0)
    assert fetch(server.add("/x", drip), limits).milliseconds > 2400


def test_the_first_byte_has_a_limit_of_its_own_and_is_tried_again(server):
    limits = policy(server, timeout_seconds=20, first_byte_timeout_seconds=0.2, retries=1)
    fetched = fetch(server.add("/x", server.hang), limits)
    assert fetched.failure is not None
    assert fetched.failure.message == "timeout"
    assert server.hits["/x"] == fetched.attempts == 2
    assert fetched.milliseconds < 5000


def test_a_connection_that_is_never_made_is_a_timeout():
    """A full queue of connections: the kernel answers nothing at all."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(address)
        limits = policy(allow_addresses=(f"127.0.0.1:{address[1]}",), connect_timeout_seconds=0.3)
        fetched = fetch(f"http://127.0.0.1:{address[1]}/", limits)
        for sock in waiting:
            sock.close()
    assert fetched.failure is not None
    assert str(fetched.failure) == "timeout: connect"
    assert fetched.milliseconds < 2000


@pytest.mark.parametrize(
    ("status", "times"),
    [("404 Not Found", 1), ("500 Oh", 3), ("503 Busy", 3), ("502 Bad", 3), ("408 Slow", 3)],
)
def test_only_passing_failures_are_tried_again(server, status, times):
    fetched = fetch(server.add("/x", response(status=status)), policy(server, retries=2))
    assert fetched.failure is not None
    assert fetched.failure.reason == f"http_{status[:3]}"
    assert server.hits["/x"] == fetched.attempts == times


def test_a_retry_can_succeed(server):
    answers = [reset, reset, lambda conn: conn.sendall(response(PICTURE))]
    url = server.add("/x", lambda conn: answers[server.hits["/x"] - 1](conn))
    fetched = fetch(url, policy(server, retries=2))
    assert (fetched.body, fetched.attempts) == (PICTURE, 3)


def test_a_connection_that_went_stale_costs_no_attempt(server):
    """Nor does a reset of a new one send the request twice."""

    def answer_once(conn: socket.socket) -> None:
        conn.sendall(response(PICTURE))
        time.sleep(0.05)  # then the connection is closed

    url = server.add("/x", answer_once)
    dead = server.add("/dead", reset)
    fetched = fetch_in_turn([url, url, url, dead], policy(server))
    assert [f.body for f in fetched] == [PICTURE] * 3 + [None]
    assert [f.attempts for f in fetched] == [1] * 4
    assert server.hits["/x"] == 3
    assert server.hits["/dead"] <= 2


def busy_once(
    server: MisbehavingServer, path: str, seconds: str
) -> Callable[[socket.socket], None]:
    def answer(conn: socket.socket) -> None:
        busy = response(status="429 Too Many Requests", Retry_After=seconds)
        conn.sendall(busy if server.hits[path] == 1 else response(PICTURE))

    return answer


def test_retry_after_is_waited_for_beyond_the_time_for_work(server):
    url = server.add("/x", busy_once(server, "/x", "2"))
    fetched = fetch(url, policy(server, retries=1, timeout_seconds=1))
    assert fetched.body == PICTURE
    assert 1950 < fetched.milliseconds < 8000


def test_a_busy_host_is_left_alone_by_all_its_rows(server):
    """Between its 429 and the end of the pause it asked for, the server sees no request."""
    times: list[float] = []

    def answer(conn: socket.socket) -> None:
        times.append(time.monotonic())
        is_first = len(times) == 1
        busy = response(status="429 Too Many Requests", Retry_After="1")
        conn.sendall(busy if is_first else response(PICTURE))

    urls = [server.add(f"/{i}", answer) for i in range(12)]

    async def run() -> list[Fetched]:
        async with Fetcher(policy(server, retries=1)) as fetcher:
            first = asyncio.create_task(fetcher.fetch(urls[0]))
            while not times:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            return [await first, *await asyncio.gather(*map(fetcher.fetch, urls[1:]))]

    assert all(f.body == PICTURE for f in asyncio.run(run()))
    assert min(times[1:]) - times[0] >= 0.99


@pytest.mark.parametrize("pause", ["30", "3600", "-"])
def test_a_longer_pause_than_the_limit_is_not_waited_for(server, pause):
    if pause == "-":
        pause = email.utils.formatdate(time.time() + 3000, usegmt=True)
    url = server.add("/x", response(status="429 Too Many Requests", Retry_After=pause))
    limits = policy(server, retries=5, max_retry_after_seconds=10)
    first, other = fetch_in_turn([url, server.url("/other")], limits)
    assert first.failure is not None
    assert other.failure is not None
    assert (first.failure.message, first.attempts) == ("http_429", 1)
    # Nor is the host asked for anything else meanwhile.
    assert (str(other.failure), other.attempts) == ("http_429: host paused", 0)
    assert server.hits == {"/x": 1}
    assert first.milliseconds + other.milliseconds < 2000


def test_redirects_are_followed_up_to_the_limit(server):
    for hop in range(60):
        server.add(f"/{hop}", response(status="302 Found", Location=f"/{hop + 1}"))
    server.add("/60", response(PICTURE))
    assert body(server.url("/55"), policy(server)) == PICTURE
    assert failure(server.url("/54"), policy(server)).reason == "redirect_loop"
    assert failure(server.url("/0"), policy(server)).reason == "redirect_loop"
    assert body(server.url("/58"), policy(server, max_redirects=2)) == PICTURE
    assert failure(server.url("/59"), policy(server, max_redirects=0)).reason == "redirect_loop"
    assert body(server.url("/60"), policy(server, max_redirects=0)) == PICTURE


def test_a_redirect_loop_is_named_at_its_first_return(server):
    server.add("/a", response(status="301 Moved", Location="/b"))
    server.add("/b", response(status="307 Temporary Redirect", Location="/a"))
    assert failure(server.url("/a"), policy(server)).reason == "redirect_loop"
    assert server.hits == {"/a": 1, "/b": 1}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://169.254.169.254/latest/meta-data/", "forbidden_address"),
        ("http://10.0.0.1/", "forbidden_address"),
        ("http://[::1]/", "forbidden_address"),
        ("http://[::ffff:127.0.0.1]/", "forbidden_address"),
        ("http://1.1.1.1:22/", "forbidden_port"),
        ("file:///etc/passwd", "bad_redirect: bad_scheme"),
        ("ftp://example.org/a.jpg", "bad_redirect: bad_scheme"),
        ("gopher://127.0.0.1:70/", "bad_redirect: bad_scheme"),
        ("http://user:secret@example.org/", "bad_redirect: bad_url"),
        ("http://[half/", "bad_redirect: bad_url"),
        ("", "bad_redirect: no target"),
    ],
)
def test_every_hop_is_vetted(server, target, message):
    url = server.add("/x", response(status="302 Found", Location=target))
    assert failure(url, policy(server)).message == message


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "bad_url: empty"),
        ("http://a@127.0.0.1/", "bad_url: user name"),
        ("http://example.org/a\r\nHost: evil", "bad_url: control"),
        ("example.org/a.jpg", "bad_url: not absolute"),
        ("file:///etc/passwd", "bad_scheme"),
        ("data:image/png;base64,iVBORw0KGgo=", "bad_scheme"),
    ],
)
def test_urls_that_are_never_fetched(url, message):
    assert failure(url, policy()).message == message


def test_a_name_that_does_not_exist_is_a_dns_failure_and_tried_again():
    asked = []

    def lookup(host: str) -> list[str]:
        asked.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    fetched = fetch("http://gone.example/a.jpg", policy(retries=1), lookup=lookup)
    assert fetched.failure is not None
    assert fetched.failure.message == "dns_failure"
    assert len(asked) == fetched.attempts == 2
    assert failure("http://no-such-host.invalid/a.jpg", policy()).message == "dns_failure"


def test_a_resolver_that_hangs_is_not_waited_for():
    release = threading.Event()

    def lookup(host: str) -> list[str]:
        release.wait(10)
        return []

    fetched = fetch("http://slow.example/", policy(timeout_seconds=0.3), lookup=lookup)
    release.set()
    assert fetched.failure is not None
    assert fetched.failure.message == "dns_failure"
    assert fetched.milliseconds < 1300


def test_no_file_descriptor_left_is_this_machines_fault(server, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    url = server.add("/a", response(PICTURE))

    async def run() -> None:
        async with Fetcher(policy(server)) as fetcher:
            with monkeypatch.context() as patch:
                patch.setattr("declip_ingest.guard.socket.socket", full)
                await fetcher.fetch(url)

    with pytest.raises(DeclipError, match=r"no file descriptor left .*ulimit -n"):
        asyncio.run(run())


def test_one_fetcher_serves_many_at_once(server):
    urls = [server.add(f"/{i}", response(b"%d" % i)) for i in range(200)]
    fetched = fetch_all(urls, policy(server), max_connections=16)
    assert [f.body for f in fetched] == [b"%d" % i for i in range(200)]
    assert server.connections <= 16


def test_no_more_connections_to_a_host_than_it_is_to_bear(server):
    active, most = [0], [0]
    lock = threading.Lock()

    def answer(conn: socket.socket) -> None:
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
        time.sleep(0.03)
        with lock:
            active[0] -= 1
        conn.sendall(response(PICTURE))

    urls = [server.add(f"/{i}", answer) for i in range(20)]
    fetched = fetch_all(urls, policy(server, host_connections=3))
    assert all(f.body == PICTURE for f in fetched)
    assert 1 < most[0] <= 3


def test_no_more_requests_a_second_than_a_host_is_to_bear(server):
    times: list[float] = []

    def answer(conn: socket.socket) -> None:
        times.append(time.monotonic())
        conn.sendall(response(PICTURE))

    urls = [server.add(f"/{i}", answer) for i in range(11)]
    limits = policy(server, host_requests_per_second=20.0, timeout_seconds=0.4)
    fetched = fetch_all(urls, limits)
    assert all(f.body == PICTURE for f in fetched), "waiting for a turn costs no row its time"
    # The first may have come late; none can have come early.
    assert max(times) - min(times) >= 10 / 20 - 0.05


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("timeout_seconds", 0),
        ("timeout_seconds", float("inf")),
        ("connect_timeout_seconds", -1),
        ("first_byte_timeout_seconds", float("nan")),
        ("retries", -1),
        ("max_redirects", -1),
        ("max_body_bytes", 0),
        ("min_bytes_per_second", -1),
        ("max_retry_after_seconds", -1.0),
        ("host_connections", 0),
        ("host_requests_per_second", float("nan")),
        ("robots", "sometimes"),
        ("allow_addresses", ("127.0.0.1",)),
        ("disallowed_header_directives", ("noia",)),
        ("user_agent_contact", "a\r\nX: y"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_value(setting, value):
    with pytest.raises(DeclipError) as caught:
        FetchPolicy(**{setting: value})
    assert setting in str(caught.value)
    shown = value[0] if isinstance(value, tuple) else value
    assert str(shown) in str(caught.value) or repr(shown) in str(caught.value)
    assert ";" in str(caught.value), "the remedy follows"


def make_certificate(path: Path, name: str, *, days_left: int = 1) -> Path:
    """Key and self-signed certificate for ``name`` in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=30))
        .not_valid_after(now + datetime.timedelta(days=days_left))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


class TLSServer:
    """Answers every request with ``answer``; notes the names asked for by SNI."""

    def __init__(self, certificate: Path) -> None:
        self.names: list[str | None] = []
        self.answer: Callable[[ssl.SSLSocket], None] = lambda conn: conn.sendall(response(PICTURE))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        self._context.sni_callback = lambda sock, name, ctx: self.names.append(name)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                conn, _ = self._listener.accept()
            except OSError:
                return
            try:
                with self._context.wrap_socket(conn, server_side=True) as secure:
                    secure.recv(65536)
                    self.answer(secure)
            except OSError:
                continue

    def policy(self, **settings: Any) -> FetchPolicy:
        return policy(
            allow_addresses=(f"localhost:{self.port}", f"127.0.0.1:{self.port}"), **settings
        )

    def url(self, host: str = "localhost") -> str:
        return f"https://{host}:{self.port}/a"

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls") / "localhost.pem", "localhost")


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[TLSServer]:
    running = TLSServer(certificate)
    yield running
    running.close()


def test_tls_is_verified_against_the_name_while_the_address_is_pinned(
    tls_server, certificate, monkeypatch
):
    limits = tls_server.policy()
    assert failure(tls_server.url(), limits).message == "tls_error", "self-signed"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert body(tls_server.url(), limits) == PICTURE
    assert failure(tls_server.url("127.0.0.1"), limits).message == "tls_error", "wrong host"
    assert "localhost" in tls_server.names


@pytest.mark.parametrize(("name", "days"), [("localhost", -1), ("other.example", 1)])
def test_a_certificate_that_is_not_valid_is_a_tls_error(tmp_path, monkeypatch, name, days):
    path = make_certificate(tmp_path / "bad.pem", name, days_left=days)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    running = TLSServer(path)
    try:
        assert failure(running.url(), running.policy()).message == "tls_error"
        assert body(running.url(), running.policy(insecure_tls=True)) == PICTURE
    finally:
        running.close()


def test_the_deadline_holds_under_tls(tls_server, certificate, monkeypatch):
    def stall(conn: ssl.SSLSocket) -> None:
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
        conn.recv(1)

    tls_server.answer = stall
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    fetched = fetch(tls_server.url(), tls_server.policy(timeout_seconds=0.6))
    assert fetched.failure is not None
    assert fetched.failure.message == "timeout"
    assert fetched.milliseconds < 1600


def test_a_handshake_that_never_ends_is_a_timeout():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        limits = policy(allow_addresses=(f"127.0.0.1:{port}",), timeout_seconds=0.4)
        fetched = fetch(f"https://127.0.0.1:{port}/", limits)
    assert fetched.failure is not None
    assert fetched.failure.message == "timeout"
    assert fetched.milliseconds < 1400


def test_a_body_without_end_is_read_little_beyond_the_cap_under_tls(
    tls_server, certificate, monkeypatch
):
    sent = [0]

    def endless(conn: ssl.SSLSocket) -> None:
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        conn.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            conn.sendall(b"x" * 4096)
            sent[0] += 4096

    tls_server.answer = endless
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    limits = tls_server.policy(max_body_bytes=500_000)
    assert failure(tls_server.url(), limits).reason == "too_large"
    assert 500_000 < sent[0] <= 500_000 + LARGEST_OVERSHOOT_BYTES


def test_plain_http_on_a_tls_url_is_a_tls_error():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve():
            conn, _ = listener.accept()
            with conn:
                conn.recv(65536)
                conn.sendall(response(status="400 Bad Request"))

        threading.Thread(target=serve, daemon=True).start()
        limits = policy(allow_addresses=(f"127.0.0.1:{port}",))
        assert failure(f"https://127.0.0.1:{port}/", limits).message == "tls_error"
