"""Fetch the bytes of a URL, or say by a stable name why not.

A list of URLs from the web is hostile input: it names private addresses, files, endless bodies and
servers that never answer. Every limit below holds for each redirect too.
"""

import asyncio
import math
import re
import ssl
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urljoin

import aiohttp
from yarl import URL

from declip_ingest import __version__
from declip_ingest.answers import (
    check_directives,
    is_opted_out,
    name_faults,
    network_failure,
    retry_after_seconds,
)
from declip_ingest.bodies import SMALL_BUFFER_BYTES, SMALL_LIMIT_BYTES, drain, read_body, read_start
from declip_ingest.failures import PASSING_REASONS, FetchError
from declip_ingest.guard import (
    AddressGuard,
    Destination,
    Lookup,
    NameCache,
    Target,
    check_url,
    parse_allowed,
    system_lookup,
)
from declip_ingest.hosts import HostLimits, Turn
from declip_ingest.robots import MAX_ROBOTS_BYTES, USER_AGENT_TOKEN, RobotsCache
from declip_shards import DeclipError

OPT_OUT_DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex")
"""X-Robots-Tag directives that forbid the use; img2dataset's default list."""
THROTTLE_REASONS = frozenset({"http_429", "http_503"})
"""The host is busy: it is left alone as long as it asks for."""
# What a host's robots.txt came to is kept for half a minute, which a row's retries do not outlast.
RETRYABLE_REASONS = PASSING_REASONS - {"robots_unavailable"}
"""Failures after which a URL is tried again while time remains."""
UNREACHABLE_REASONS = frozenset(
    {"dns_failure", "connection_refused", "host_unreachable", "network_error", "tls_error"}
    | {"forbidden_address", "forbidden_port"}
)
"""When robots.txt fails so, the picture would too, for the same reason."""
ROBOTS_SHARE = 0.75
"""Of a URL's time that the host's robots.txt may take."""
FIRST_BACKOFF_SECONDS = 0.25
"""Doubles with every retry."""
MAX_HEADER_BYTES = 1 << 15
"""Of one header line."""
KEEP_ALIVE_SECONDS = 15.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NOT_FOUND = re.compile(r"http_4(?!29)\d\d")


@dataclass(frozen=True, kw_only=True)
class FetchPolicy:
    """The limits of a fetch; each is checked when the policy is made."""

    timeout_seconds: float = 10.0
    """Of work for one URL in all: look-ups, connections, redirects, retries, body, robots.txt.

    Pauses that a server asked for, and waiting for a host's turn, come on top.
    """
    connect_timeout_seconds: float = 5.0
    """For one connection to be made."""
    first_byte_timeout_seconds: float = 10.0
    """For one request until its headers are there, the making of a connection included."""
    retries: int = 2
    """Further attempts after a passing failure, while time remains."""
    max_redirects: int = 5
    """Followed at most for one URL; each is vetted like the first."""
    max_body_bytes: int = 20_000_000
    """A longer body is refused."""
    min_bytes_per_second: int = 1024
    """A body that comes slower, after two seconds of grace, counts as a timeout; 0 is no limit."""
    max_retry_after_seconds: float = 60.0
    """A host that asks for a longer pause is not waited for; its rows fail meanwhile."""
    host_connections: int = 16
    """Requests under way at one host at most."""
    host_requests_per_second: float = 0.0
    """Requests started at one host at most; 0 is no limit."""
    robots: Literal["obey", "ignore"] = "obey"
    """Whether robots.txt is asked for and obeyed."""
    allow_addresses: Sequence[str] = ()
    """``host:port`` that may be reached though private or of another port than 80 and 443."""
    insecure_tls: bool = False
    """Take any certificate: expired, self-signed, of another host."""
    user_agent_contact: str = ""
    """Address or URL under which operators of web servers reach you."""
    disallowed_header_directives: Sequence[str] = OPT_OUT_DIRECTIVES
    """X-Robots-Tag directives that forbid the use of a picture."""

    def __post_init__(self) -> None:
        for name in ("timeout_seconds", "connect_timeout_seconds", "first_byte_timeout_seconds"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise DeclipError(
                    f"{name} is {value} but must be above 0 and finite; give seconds such as 10."
                )
        for name in ("max_retry_after_seconds", "host_requests_per_second"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise DeclipError(
                    f"{name} is {value} but must be at least 0 and finite; raise it, or leave it "
                    "out."
                )
        least = {"retries": 0, "max_redirects": 0, "max_body_bytes": 1}
        least |= {"min_bytes_per_second": 0, "host_connections": 1}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise DeclipError(
                    f"{name} is {getattr(self, name)} but must be at least {limit}; raise it."
                )
        if self.robots not in ("obey", "ignore"):
            raise DeclipError(f"robots is {self.robots!r} but must be obey or ignore; pick one.")
        parse_allowed(self.allow_addresses)
        check_directives(self.disallowed_header_directives)
        contact = self.user_agent_contact
        if not contact.isascii() or (contact and not contact.isprintable()):
            raise DeclipError(
                f"user_agent_contact is {contact!r}, which an HTTP header cannot hold; give an "
                "e-mail address or URL in plain ASCII."
            )

    @property
    def user_agent(self) -> str:
        """Who we are; no browser's name is borrowed."""
        contact = f"; +{self.user_agent_contact}" if self.user_agent_contact else ""
        return f"{USER_AGENT_TOKEN}/{__version__} (image dataset downloader{contact})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """What became of one URL: a body or a failure, never both."""

    url: str
    """As it was asked for."""
    body: bytes | None
    """Never empty, never cut."""
    failure: FetchError | None
    http_status: int | None
    """Of the last answer; None where none came."""
    attempts: int
    """Times that the URL was tried, redirects not counted; 0 if it may not be fetched at all."""
    milliseconds: int
    """From the call to the outcome, pauses included."""
    host: str
    """Of ``url``, with its port where that is not the scheme's own; empty for what is no URL."""
    final_url: str
    """The last URL asked for, after redirects; empty where nothing was."""


@dataclass(kw_only=True, slots=True)
class _Trip:
    """One URL's way: what it has left, and what is known of it."""

    seconds_left: float
    """Of work."""
    for_robots: bool = False
    """Whether it is a robots.txt, of which the beginning will do."""
    attempts: int = 0
    http_status: int | None = None
    target: Target | None = None
    """Where it stands."""
    is_final: bool = False
    """Whether another attempt is known to be no use."""


def _tls_context(policy: FetchPolicy) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if policy.insecure_tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Fetcher:
    """One for a process and its loop: pooled connections under one policy.

    Create it and use it within the running loop. ``fetch`` may run any number of times at once;
    what is over ``max_connections``, or over a host's share, waits its turn.

    Args:
        policy: the limits.
        max_connections: requests under way at a time.
        robots_cache: shared robots.txt; None keeps them in this fetcher's memory. It is closed
            with the fetcher.
        lookup: blocking look-up of a host name.
    """

    def __init__(
        self,
        policy: FetchPolicy | None = None,
        *,
        max_connections: int = 64,
        robots_cache: RobotsCache | None = None,
        lookup: Lookup = system_lookup,
    ) -> None:
        self.policy = policy = policy or FetchPolicy()
        # With a small limit already the first read could bring more than it allows.
        is_small = policy.max_body_bytes < SMALL_LIMIT_BYTES
        self._guard = AddressGuard(
            policy.allow_addresses,
            lookup=lookup,
            receive_buffer_bytes=SMALL_BUFFER_BYTES if is_small else None,
        )
        self._hosts = HostLimits(
            policy.host_connections,
            policy.host_requests_per_second,
            policy.max_retry_after_seconds,
        )
        self._robots = robots_cache or RobotsCache()
        self._places = asyncio.Semaphore(max_connections)
        self._max_sockets = 4 * max_connections
        context = _tls_context(policy)
        self._session = self._open_session(context, keep_alive=True)
        self._crowded_session = self._open_session(context, keep_alive=False)

    def _open_session(self, context: ssl.SSLContext, *, keep_alive: bool) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                # Turns and places are given out by us; the connector's own limit would eat the
                # URL's time.
                limit=0,
                resolver=self._guard,
                use_dns_cache=False,
                socket_factory=self._guard.open_socket,
                ssl=context,
                force_close=not keep_alive,
                keepalive_timeout=KEEP_ALIVE_SECONDS if keep_alive else None,
            ),
            # Identity only: a compressed body is a bomb until proven otherwise, and a picture
            # gains nothing by it.
            headers={
                "User-Agent": self.policy.user_agent,
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            timeout=aiohttp.ClientTimeout(
                total=None,
                sock_connect=self.policy.connect_timeout_seconds,
                ceil_threshold=math.inf,
            ),
            read_bufsize=1 << 15,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            middlewares=(name_faults,),
        )

    @property
    def names(self) -> NameCache:
        """The look-ups; their times to live can be changed."""
        return self._guard.names

    @property
    def num_sockets(self) -> int:
        """Connections open now, in use or idle."""
        return self._guard.count_sockets(enough=0)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._robots.aclose()
        await self._session.close()
        await self._crowded_session.close()
        await self._guard.close()

    async def __aenter__(self) -> "Fetcher":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def fetch(self, url: str) -> Fetched:
        """Fetch the body behind ``url``, or the reason why not.

        Raises:
            DeclipError: a fault of this machine, such as no file descriptor left.
        """
        start = time.monotonic()
        trip = _Trip(seconds_left=self.policy.timeout_seconds)
        body: bytes | None = None
        failure: FetchError | None = None
        host = ""
        try:
            target = check_url(url)
            host = target.netloc
            body = await self._try_often(target, trip)
        except FetchError as error:
            # A new one: the old one's traceback holds on to what was read.
            failure = FetchError(error.reason, error.detail, retry_after=error.retry_after)
        return Fetched(
            url=url,
            body=body,
            failure=failure,
            http_status=trip.http_status,
            attempts=trip.attempts,
            milliseconds=round((time.monotonic() - start) * 1000),
            host=host,
            final_url=trip.target.url if trip.target else "",
        )

    async def _try_often(self, target: Target, trip: _Trip) -> bytes:
        """Attempts with pauses between them.

        The spread of the pauses, which keeps requests from knocking together, comes from the URL
        and not from a random generator: a rerun does the same.
        """
        spread = 0.5 + zlib.crc32(target.url.encode()) / 2**32
        for attempt in range(self.policy.retries + 1):
            trip.attempts += 1
            try:
                return await self._follow(target, trip)
            except FetchError as error:
                failure = error
            if failure.detail == "host paused":
                trip.attempts -= 1
            if failure.reason not in RETRYABLE_REASONS or trip.is_final or trip.seconds_left <= 0:
                break
            if failure.reason in THROTTLE_REASONS:
                # The host's next turn waits for the pause's end, if that is not too far.
                if trip.target and not self._hosts.is_waited_for(trip.target.server):
                    break
                continue
            pause = FIRST_BACKOFF_SECONDS * 2**attempt * spread
            if attempt == self.policy.retries or pause >= trip.seconds_left:
                break
            trip.seconds_left -= pause
            await asyncio.sleep(pause)
        raise failure

    async def _follow(self, target: Target, trip: _Trip) -> bytes:
        """One attempt, redirects included."""
        seen = set()
        for _ in range(self.policy.max_redirects + 1):
            if target.url in seen:
                break
            seen.add(target.url)
            trip.target = target
            # What may not be reached is not even asked for its robots.txt.
            self._guard.vet_literal(target)
            if self.policy.robots == "obey" and not trip.for_robots:
                await self._ask_robots(target, trip)
            answer = await self._visit(target, trip)
            if isinstance(answer, bytes):
                return answer
            try:
                target = check_url(urljoin(target.url, answer.strip()))
            except FetchError as error:
                if error.reason == "forbidden_address":
                    raise
                raise FetchError("bad_redirect", error.reason) from error
            except ValueError as error:
                raise FetchError("bad_redirect", "bad_url") from error
        raise FetchError("redirect_loop")

    async def _ask_robots(self, target: Target, trip: _Trip) -> None:
        """Raise unless the host's robots.txt lets us have ``target``."""
        rules = self._robots.known(target.origin)
        if rules is None:
            start = time.monotonic()
            try:
                rules = await self._robots.rules(target.origin, self._download_robots)
            except FetchError as error:
                trip.is_final = True
                if error.reason in UNREACHABLE_REASONS or error.detail == "connect":
                    raise
                raise FetchError("robots_unavailable", error.reason) from error
            finally:
                # No more than its own work may have taken: pauses are not charged to the row.
                waited = time.monotonic() - start
                trip.seconds_left -= min(waited, ROBOTS_SHARE * self.policy.timeout_seconds)
        if not rules.allows(target.url):
            raise FetchError("robots_denied")

    async def _download_robots(self, url: str) -> str | None:
        """The text of a robots.txt; None where there is none."""
        trip = _Trip(seconds_left=ROBOTS_SHARE * self.policy.timeout_seconds, for_robots=True)
        try:
            body = await self._try_often(check_url(url), trip)
        except FetchError as error:
            if _NOT_FOUND.fullmatch(error.reason):
                return None
            raise
        return body.decode("utf-8", "replace")

    async def _visit(self, target: Target, trip: _Trip) -> bytes | str:
        """One request, when its turn has come: the body, or where it redirects to."""
        turn = await self._hosts.turn(target.server)
        async with turn, self._places:
            start = asyncio.get_running_loop().time()
            end = start + trip.seconds_left
            destination = self._guard.start(target)
            try:
                first_byte = start + self.policy.first_byte_timeout_seconds
                async with asyncio.timeout_at(min(first_byte, end)) as limit:
                    response = await self._open(target, destination)
                    limit.reschedule(end)
                    return await self._read(response, trip, turn, limit)
            except TimeoutError as error:
                if destination.is_resolving:
                    raise FetchError("dns_failure") from error
                raise network_failure(error) from error
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise network_failure(error) from error
            finally:
                trip.seconds_left -= asyncio.get_running_loop().time() - start

    async def _open(self, target: Target, destination: Destination) -> aiohttp.ClientResponse:
        """Send the request; the answer's headers, its body unread."""
        # A list of a million hosts would leave a million idle connections.
        is_crowded = self._guard.count_sockets(self._max_sockets) >= self._max_sockets
        session = self._crowded_session if is_crowded else self._session
        url = URL(target.url, encoded=True)
        while True:
            try:
                return await session.get(url, allow_redirects=False)
            except FetchError as error:
                # A server may hang up on an idle connection at any time: that says nothing of
                # this URL.
                if error.reason != "connection_reset" or destination.is_new:
                    raise

    async def _read(
        self, response: aiohttp.ClientResponse, trip: _Trip, turn: Turn, limit: asyncio.Timeout
    ) -> bytes | str:
        """What an answer comes to: a body, or where it redirects to."""
        try:
            trip.http_status = response.status
            if response.status in _REDIRECTS:
                turn.served()
                location = response.headers.get("Location")
                limit.reschedule(None)  # the outcome is known; draining has a limit of its own
                await drain(response)
                if not location:
                    raise FetchError("bad_redirect", "no target")
                return location
            if (failure := self._judge_status(response, turn, trip)) is not None:
                limit.reschedule(None)
                await drain(response)
                raise failure
            self._check_headers(response, trip)
            if trip.for_robots:
                return await read_start(response, MAX_ROBOTS_BYTES)
            return await read_body(
                response, self.policy.max_body_bytes, self.policy.min_bytes_per_second
            )
        finally:
            # Unread bytes would be the next answer's first: the connection goes, unless the body
            # was read to its end, when it is back in the pool already.
            response.close()

    def _judge_status(
        self, response: aiohttp.ClientResponse, turn: Turn, trip: _Trip
    ) -> FetchError | None:
        status = response.status
        if status == 200 or (trip.for_robots and 200 < status < 300):
            turn.served()
            return None
        failure = FetchError(
            f"http_{status}",
            retry_after=retry_after_seconds(response.headers.get("Retry-After")),
        )
        if failure.reason in THROTTLE_REASONS:
            turn.throttled(failure.reason, failure.retry_after)
        elif status < 500:
            turn.served()
        return failure

    def _check_headers(self, response: aiohttp.ClientResponse, trip: _Trip) -> None:
        headers = response.headers
        tags = headers.getall("X-Robots-Tag", ())
        if (
            tags
            and not trip.for_robots
            and is_opted_out(tags, self.policy.disallowed_header_directives)
        ):
            raise FetchError("opted_out")
        if headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise FetchError("content_encoding")
        if not trip.for_robots and (response.content_length or 0) > self.policy.max_body_bytes:
            raise FetchError("too_large")
