"""robots.txt is obeyed as RFC 9309 has it, fetched once, and shared between processes."""

import asyncio
import json
import socket
import time
import urllib.robotparser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from declip_ingest import robots
from declip_ingest.failures import FetchError
from declip_ingest.fetch import Fetched, Fetcher, FetchPolicy
from declip_ingest.robots import MAX_ROBOTS_BYTES, RobotRules, RobotsCache
from declip_shards import Store

if TYPE_CHECKING:
    from tests.ingest.misbehaving_server import MisbehavingServer, response
else:
    # conftest.py puts this folder on the path.
    from misbehaving_server import MisbehavingServer, response

SITE = "http://example.org"


def allows(text: str, path: str) -> bool:
    return RobotRules(text, expires=0).allows(SITE + path)


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("", "/a", True),
        ("User-agent: *\nDisallow: /", "/a", False),
        ("User-agent: *\nDisallow:", "/a", True),
        ("User-agent: *\nDisallow: /private/", "/private/a.jpg", False),
        ("User-agent: *\nDisallow: /private/", "/public/a.jpg", True),
        # The longest match decides, not the first.
        ("User-agent: *\nDisallow: /\nAllow: /img/", "/img/a.jpg", True),
        ("User-agent: *\nAllow: /\nDisallow: /img/", "/img/a.jpg", False),
        ("User-agent: *\nDisallow: /*.jpg$", "/x/a.jpg", False),
        ("User-agent: *\nDisallow: /*.jpg$", "/x/a.jpg?size=2", True),
        ("User-agent: *\nDisallow: /*?size=", "/a.jpg?size=2", False),
        # Our own group counts alone.
        ("User-agent: *\nDisallow: /\nUser-agent: OpenDeCLIP\nDisallow: /no/", "/a", True),
        ("User-agent: *\nDisallow:\nUser-agent: opendeclip\nDisallow: /", "/a", False),
        ("User-agent: a\nUser-agent: opendeclip\nDisallow: /", "/a", False),
        ("User-agent: otherbot\nDisallow: /", "/a", True),
        ("User-agent: opendeclip2\nDisallow: /", "/a", True),
        # Escapes are compared in one form.
        ("User-agent: *\nDisallow: /ü", "/%C3%BC.jpg", False),
        ("User-agent: *\nDisallow: /%7Ejoe/", "/~joe/a", False),
        ("\ufeffUser-agent: *\r\nDisallow: /\r\n", "/a", False),
        ("# only\n\n <html>404</html>", "/a", True),
        ("user-AGENT : * # all\n disallow : /a # this", "/ab", False),
    ],
)
def test_the_rules_are_read_as_rfc_9309_has_them(text, path, expected):
    assert allows(text, path) is expected


def test_why_the_standard_librarys_parser_will_not_do():
    """It knows neither wildcards nor the longest match; should it learn them, protego can go."""
    parser = urllib.robotparser.RobotFileParser()
    parser.parse("User-agent: *\nDisallow: /\nAllow: /img/\n".splitlines())
    assert not parser.can_fetch("opendeclip", f"{SITE}/img/a.jpg")
    parser = urllib.robotparser.RobotFileParser()
    parser.parse("User-agent: *\nDisallow: /*.jpg$\n".splitlines())
    assert parser.can_fetch("opendeclip", f"{SITE}/x/a.jpg")


def fetch_all(urls: list[str], server: MisbehavingServer, **options: Any) -> list[Fetched]:
    usual = {"timeout_seconds": 5, "retries": 0, "allow_addresses": (server.address,)}
    policy = FetchPolicy(**{**usual, **options.pop("settings", {})})

    async def run() -> list[Fetched]:
        async with Fetcher(policy, **options) as fetcher:
            return await asyncio.gather(*map(fetcher.fetch, urls))

    return asyncio.run(run())


def message(server: MisbehavingServer, answer: Any, **settings: Any) -> str:
    server.add("/robots.txt", answer)
    [fetched] = fetch_all([server.add("/a", response(b"picture"))], server, settings=settings)
    return str(fetched.failure) if fetched.failure else "fetched"


def test_it_is_fetched_once_for_many_urls_and_obeyed(server):
    server.add("/robots.txt", response(b"User-agent: opendeclip\nDisallow: /no/"))
    yes = [server.add(f"/yes/{i}", response(b"%d" % i)) for i in range(40)]
    no = [server.add(f"/no/{i}", response(b"%d" % i)) for i in range(10)]
    fetched = fetch_all(yes + no, server)
    assert [f.body for f in fetched[:40]] == [b"%d" % i for i in range(40)]
    for outcome in fetched[40:]:
        assert outcome.failure is not None
        assert outcome.failure.message == "robots_denied"
        assert outcome.body is None
    assert server.hits["/robots.txt"] == 1
    assert not any(path.startswith("/no/") for path in server.hits)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_a_host_without_one_allows_everything(server, status):
    assert message(server, response(status=f"{status} No")) == "fetched"


def test_an_empty_one_allows_everything(server):
    assert message(server, response(b"")) == "fetched"
    assert message(server, response(status="204 No Content")) == "fetched"


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (response(status="500 Oh"), "http_500"),
        (response(status="503 Busy", Retry_After="3600"), "http_503"),
        (response(status="429 Too Many Requests", Retry_After="3600"), "http_429"),
        (b"no http\r\n\r\n", "bad_response"),
        (lambda conn: None, "connection_reset"),
        (response(b"User-agent: *", length=100), "timeout"),
        (response(b"x", Content_Encoding="gzip"), "content_encoding"),
        (response(status="302 Found", Location="/robots.txt"), "redirect_loop"),
        (response(status="302 Found", Location="file:///etc/passwd"), "bad_redirect"),
    ],
)
def test_one_that_cannot_be_had_allows_nothing(server, answer, detail):
    said = message(server, answer, timeout_seconds=1.0)
    assert said == f"robots_unavailable: {detail}"
    assert "/a" not in server.hits


def test_one_that_hangs_takes_no_row_beyond_its_time(server):
    server.add("/robots.txt", server.hang)
    urls = [server.add(f"/{i}", response(b"x")) for i in range(5)]
    for fetched in fetch_all(urls, server, settings={"timeout_seconds": 0.8, "retries": 2}):
        assert fetched.failure is not None
        assert str(fetched.failure) == "robots_unavailable: timeout"
        assert fetched.milliseconds < 1800
    assert server.hits["/robots.txt"] == 1


def test_a_slow_one_leaves_the_row_time_for_its_picture(server):
    def slow(conn: socket.socket) -> None:
        time.sleep(1.2)
        conn.sendall(response(b""))

    server.add("/robots.txt", slow)
    url = server.add("/a", response(b"picture"))
    [fetched] = fetch_all([url], server, settings={"timeout_seconds": 2.0})
    assert fetched.body == b"picture"


def test_a_host_that_is_not_there_is_named_by_that(server, closed_port):
    policy = FetchPolicy(allow_addresses=(f"127.0.0.1:{closed_port}",), retries=0)

    async def run() -> list[Fetched]:
        async with Fetcher(policy) as fetcher:
            urls = [f"http://127.0.0.1:{closed_port}/a", "http://no-such-host.invalid/a"]
            return [await fetcher.fetch(url) for url in [*urls, *urls]]

    reasons = [f.failure.message for f in asyncio.run(run()) if f.failure]
    assert reasons == ["connection_refused", "dns_failure"] * 2


def test_a_busy_host_is_asked_again_when_its_pause_is_over(server):
    def busy_once(conn: socket.socket) -> None:
        busy = response(status="503 Busy", Retry_After="1")
        is_first = server.hits["/robots.txt"] == 1
        conn.sendall(busy if is_first else response(b"User-agent: *\nDisallow: /no"))

    server.add("/robots.txt", busy_once)
    urls = [server.add(path, response(b"picture")) for path in ("/a", "/no")]
    yes, no = fetch_all(urls, server, settings={"retries": 1, "timeout_seconds": 1.0})
    assert yes.body == b"picture"
    assert no.failure is not None
    assert no.failure.message == "robots_denied"
    assert server.hits["/robots.txt"] == 2


def test_a_redirect_is_followed_and_vetted(server):
    server.add("/moved", response(b"User-agent: *\nDisallow: /"))
    assert message(server, response(status="301 Moved", Location="/moved")) == "robots_denied"
    metadata = response(status="301 Moved", Location="http://169.254.169.254/")
    assert message(server, metadata) == "forbidden_address"


def test_a_long_one_is_read_up_to_its_limit(server):
    line = b"Disallow: /no/\n"
    start = b"User-agent: *\n" + line
    padding = b"# " + b"x" * (MAX_ROBOTS_BYTES - len(start) - 3) + b"\n"
    sent = []

    def endless(conn: socket.socket) -> None:
        conn.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + start + padding + b"Disallow: /\n")
        while True:
            conn.sendall(b"# " + b"x" * 9997 + b"\n")
            sent.append(10_000)

    server.add("/robots.txt", endless)
    urls = [server.add(path, response(b"x")) for path in ("/a", "/no/a")]
    yes, no = fetch_all(urls, server)
    assert yes.body == b"x", "what lies behind the limit is not read"
    assert no.failure is not None
    assert no.failure.message == "robots_denied"
    assert sum(sent) < 20_000_000


def test_every_hop_asks_its_own_host(server):
    port = server.address.partition(":")[2]
    server.add("/robots.txt", response(b"User-agent: *\nDisallow: /b"))
    server.add("/a", response(status="302 Found", Location=f"http://other.example:{port}/b"))
    [fetched] = fetch_all(
        [server.url("/a")],
        server,
        settings={"allow_addresses": (server.address, f"other.example:{port}")},
        lookup=lambda host: ["127.0.0.1"],
    )
    assert fetched.failure is not None
    assert fetched.failure.message == "robots_denied"
    assert fetched.final_url == f"http://other.example:{port}/b"
    assert server.hits == {"/a": 1, "/robots.txt": 2}


def test_it_is_not_asked_for_where_the_setting_says_ignore(server):
    denied = response(b"User-agent: *\nDisallow: /")
    assert message(server, denied, robots="ignore") == "fetched"
    assert "/robots.txt" not in server.hits
    assert message(server, denied, robots="obey") == "robots_denied"


class Web:
    """Downloads of a test: notes each, and gives what it is told."""

    def __init__(self, *answers: str | FetchError | None) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def download(self, url: str) -> str | None:
        self.asked.append(url)
        await asyncio.sleep(0.01)
        answer = self.answers.pop(0)
        if isinstance(answer, FetchError):
            raise answer
        return answer


def ask(cache: RobotsCache, web: Web, times: int = 1) -> list[bool | str]:
    """Whether the site lets us have ``/no``, or the reason why nothing is known."""

    async def once() -> bool | str:
        try:
            return (await cache.rules(SITE, web.download)).allows(f"{SITE}/no")
        except FetchError as failure:
            return failure.reason

    async def run() -> list[bool | str]:
        answers = await asyncio.gather(*(once() for _ in range(times)))
        await cache.aclose()
        return answers

    return asyncio.run(run())


DENIED = "User-agent: *\nDisallow: /no"


@pytest.mark.parametrize(("text", "allowed"), [(DENIED, False), ("", True), (None, True)])
def test_processes_share_what_one_of_them_fetched(tmp_path, text, allowed):
    web = Web(text)
    for _ in range(3):
        # A new cache is what another process has.
        assert ask(RobotsCache(Store(str(tmp_path))), web, times=5) == [allowed] * 5
    assert web.asked == [f"{SITE}/robots.txt"]
    [path] = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert path.is_relative_to(tmp_path / "cache" / "robots")


def test_memory_alone_will_do_too():
    web, cache = Web(DENIED), RobotsCache()
    assert ask(cache, web) == ask(cache, web) == [False]
    assert len(web.asked) == 1


def test_a_day_later_it_is_fetched_again(tmp_path, monkeypatch):
    web = Web(DENIED, None, DENIED)
    cache = RobotsCache(Store(str(tmp_path)))
    assert ask(cache, web) == [False]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86_390)
    assert ask(cache, web) == ask(RobotsCache(Store(str(tmp_path))), web) == [False]
    monkeypatch.setattr(time, "time", lambda: now + 86_410)
    assert ask(cache, web) == [True]
    assert ask(RobotsCache(Store(str(tmp_path)), ttl_seconds=0), web) == [False]


def test_while_a_host_is_out_of_reach_the_old_one_stands_in(tmp_path, monkeypatch):
    down = FetchError("timeout")
    web = Web(DENIED, down, down)
    assert ask(RobotsCache(Store(str(tmp_path))), web) == [False]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * 86_400)
    assert ask(RobotsCache(Store(str(tmp_path))), web) == [False]
    monkeypatch.setattr(time, "time", lambda: now + 40 * 86_400)
    assert ask(RobotsCache(Store(str(tmp_path))), web) == ["timeout"]


def test_a_failure_is_remembered_for_a_while_and_not_stored(tmp_path, monkeypatch):
    web = Web(FetchError("http_500"), DENIED)
    cache = RobotsCache(Store(str(tmp_path)))
    assert ask(cache, web, times=3) == ask(cache, web) * 3 == ["http_500"] * 3
    assert len(web.asked) == 1
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + robots.UNAVAILABLE_SECONDS + 1)
    assert ask(cache, web) == [False]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        json.dumps({"origin": SITE, "fetched_at": "now", "text": None}).encode(),
        json.dumps({"origin": "http://other.example", "fetched_at": 2e9, "text": None}).encode(),
        json.dumps({"origin": SITE, "fetched_at": 2e9, "text": 7}).encode(),
        json.dumps({"origin": SITE, "fetched_at": float("nan"), "text": None}).encode(),
    ],
)
def test_a_file_that_makes_no_sense_is_fetched_anew(tmp_path, damage):
    ask(RobotsCache(Store(str(tmp_path))), Web(None))
    [path] = [p for p in tmp_path.rglob("*") if p.is_file()]
    path.write_bytes(damage)
    web = Web(DENIED)
    assert ask(RobotsCache(Store(str(tmp_path))), web) == [False]
    assert ask(RobotsCache(Store(str(tmp_path))), web) == [False], "and mended"


def test_a_store_out_of_order_costs_no_row(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert ask(RobotsCache(Store(str(tmp_path))), Web(DENIED)) == [False]


def test_a_row_that_gives_up_leaves_the_fetch_to_the_others():
    web, cache = Web(DENIED), RobotsCache()

    async def run() -> bool:
        first = asyncio.create_task(cache.rules(SITE, web.download))
        second = asyncio.create_task(cache.rules(SITE, web.download))
        await asyncio.sleep(0)
        first.cancel()
        return (await second).allows(f"{SITE}/no")

    assert asyncio.run(run()) is False
    assert len(web.asked) == 1


def test_memory_is_bounded_in_hosts_and_in_text(monkeypatch):
    monkeypatch.setattr(robots, "MAX_ORIGINS_IN_MEMORY", 10)
    monkeypatch.setattr(robots, "MAX_TEXT_IN_MEMORY", 1000)

    async def run() -> RobotsCache:
        cache = RobotsCache()
        for i in range(30):
            await cache.rules(f"http://h{i}.example", Web("#" * 400).download)
        return cache

    cache = asyncio.run(run())
    known = [i for i in range(30) if cache.known(f"http://h{i}.example") is not None]
    assert known == [28, 29]


def test_a_hostile_file_is_read_and_asked_in_little_time():
    lines = ["User-agent: *"] + [f"Disallow: /{'*a' * 8}{i}$" for i in range(15_000)]
    start = time.process_time()
    rules = RobotRules("\n".join(lines)[:MAX_ROBOTS_BYTES], expires=0)
    assert rules.allows(f"{SITE}/{'a' * 2000}")
    assert time.process_time() - start < 5


def test_no_other_files_are_made(tmp_path: Path):
    ask(RobotsCache(Store(str(tmp_path))), Web(None))
    assert {p.name for p in tmp_path.iterdir()} == {"cache"}
