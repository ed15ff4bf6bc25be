"""Fetch the bytes of a URL, or say by a stable name why not.

A list of URLs from the web is hostile input: it names private addresses, files, endless bodies and
servers that never answer. Every limit below holds for each redirect too.
"""

import email.utils
import errno
import http.client
import re
import ssl
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urljoin

from urllib3 import exceptions as faults
from urllib3.response import BaseHTTPResponse
from urllib3.util import Url, parse_url

from declip_ingest import __version__
from declip_ingest.failures import FetchError
from declip_ingest.guard import (
    AddressGuard,
    Deadline,
    guarded_pool_manager,
    parse_allowed,
    running_under,
)
from declip_shards import DeclipError

USER_AGENT_TOKEN = "opendeclip"  # noqa: S105 - a robot's name, no secret
"""The name by which an X-Robots-Tag header may address us."""
OPT_OUT_DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex")
"""X-Robots-Tag directives that forbid the use; img2dataset's default list."""
VALUED_DIRECTIVES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
"""Directives with a colon of their own, which is no robot's name."""
MAX_REDIRECTS = 5
MAX_URL_LENGTH = 8192
"""Characters; longer ones are no picture's address."""
MAX_RETRY_AFTER_SECONDS = 60.0
"""A server that asks for a longer pause is not waited for."""
RETRYABLE_REASONS = frozenset(
    {"dns_failure", "connection_refused", "connection_reset", "timeout"}
    | {"http_429", "http_502", "http_503", "http_504"}
)
FIRST_BACKOFF_SECONDS = 0.25
"""Doubles with every retry."""
MIN_RATE_GRACE_SECONDS = 2.0
"""A body may be slower than the minimum rate this long."""
READ_BYTES = 1 << 16
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class FetchPolicy:
    """The limits of a fetch; each is checked when the policy is made."""

    timeout_seconds: float = 10.0
    """For one URL in all: look-up, connections, redirects, retries and pauses, body."""
    connect_timeout_seconds: float = 5.0
    """For one connection to be made."""
    first_byte_timeout_seconds: float = 10.0
    """For one request until its headers are there, the making of a connection included."""
    retries: int = 2
    """Further attempts after a passing failure, while time remains."""
    max_body_bytes: int = 20_000_000
    """A longer body is refused."""
    min_bytes_per_second: int = 1024
    """A body that comes slower, after two seconds of grace, counts as a timeout; 0 is no limit."""
    allow_addresses: Sequence[str] = ()
    """``host:port`` that may be reached though private or of another port than 80 and 443."""
    user_agent_contact: str = ""
    """Address or URL under which operators of web servers reach you."""
    disallowed_header_directives: Sequence[str] = OPT_OUT_DIRECTIVES
    """X-Robots-Tag directives that forbid the use of a picture."""

    def __post_init__(self) -> None:
        for name in ("timeout_seconds", "connect_timeout_seconds", "first_byte_timeout_seconds"):
            if not getattr(self, name) > 0:
                raise DeclipError(
                    f"{name} is {getattr(self, name)} but must be above 0; give seconds such as 10."
                )
        for name, least in (("retries", 0), ("max_body_bytes", 1), ("min_bytes_per_second", 0)):
            if getattr(self, name) < least:
                raise DeclipError(
                    f"{name} is {getattr(self, name)} but must be at least {least}; raise it."
                )
        parse_allowed(self.allow_addresses)
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


def check_url(url: str) -> Url:
    """Parse ``url``; refuse what is never fetched.

    Raises:
        FetchError: ``bad_url`` or ``bad_scheme``.
    """
    if not url or len(url) > MAX_URL_LENGTH or _CONTROL.search(url):
        detail = "empty" if not url else "length" if len(url) > MAX_URL_LENGTH else "control"
        raise FetchError("bad_url", detail)
    try:
        parts = parse_url(url)
    except (faults.LocationParseError, ValueError) as error:
        raise FetchError("bad_url") from error
    if parts.scheme is not None and parts.scheme not in ("http", "https"):
        raise FetchError("bad_scheme")
    if parts.scheme is None or not parts.host:
        raise FetchError("bad_url", "not absolute")
    if parts.auth is not None:
        raise FetchError("bad_url", "user name")
    return parts


def is_opted_out(values: Sequence[str], directives: Sequence[str]) -> bool:
    """Whether X-Robots-Tag headers forbid the use, for everyone or for our name.

    ``noai``, ``opendeclip: noindex`` and ``otherbot: noai, opendeclip: noai`` are understood; a
    name holds until the header's end or the next name.
    """
    refused = {d.strip().lower() for d in directives}
    for value in values:
        robot = None
        for part in value.lower().split(","):
            name, colon, rest = (piece.strip() for piece in part.partition(":"))
            directive = name
            if colon and name not in VALUED_DIRECTIVES:
                robot, directive = name, rest
            if robot in (None, USER_AGENT_TOKEN) and directive in refused:
                return True
    return False


def retry_after_seconds(value: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for: a number, or a date from now on."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _root_cause(error: BaseException) -> BaseException:
    """What urllib3 wrapped: ``ProtocolError("...", cause)``."""
    if isinstance(error, faults.ProtocolError) and len(error.args) > 1:
        cause = error.args[1]
        if isinstance(cause, BaseException):
            return cause
    return error


def _network_failure(error: Exception) -> FetchError:
    """The stable name of a fault of the network or of the protocol.

    Raises:
        DeclipError: the fault is this machine's (no file descriptors left): not the row's failure.
    """
    cause = _root_cause(error)
    if isinstance(cause, faults.TimeoutError | TimeoutError):
        return FetchError("timeout")
    if isinstance(cause, faults.SSLError | ssl.SSLError | ssl.CertificateError):
        return FetchError("tls_error")
    if isinstance(cause, http.client.IncompleteRead):
        return FetchError("short_body")
    # http.client.RemoteDisconnected is a ConnectionResetError.
    if isinstance(cause, ConnectionResetError | BrokenPipeError | ConnectionAbortedError):
        return FetchError("connection_reset")
    if isinstance(cause, ConnectionRefusedError):
        return FetchError("connection_refused")
    if isinstance(cause, OSError):
        if cause.errno in (errno.EMFILE, errno.ENFILE):
            raise DeclipError(
                "this process has no file descriptor left for a connection; lower thread_count or "
                "raise the limit with 'ulimit -n'."
            ) from error
        if cause.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
            return FetchError("host_unreachable")
        return FetchError("network_error", errno.errorcode.get(cause.errno or 0, ""))
    if isinstance(cause, faults.LocationValueError | http.client.InvalidURL | UnicodeError):
        return FetchError("bad_url")
    return FetchError("bad_response")


class Fetcher:
    """One for a process, shared by its threads: pooled connections under one policy.

    Args:
        policy: the limits.
        max_connections: idle connections kept; the number of threads that fetch.
    """

    def __init__(self, policy: FetchPolicy | None = None, max_connections: int = 32) -> None:
        self.policy = policy or FetchPolicy()
        self._guard = AddressGuard(self.policy.allow_addresses, self.policy.connect_timeout_seconds)
        self._pools = guarded_pool_manager(self._guard, max_connections)
        # Identity only: a compressed body is a bomb until proven otherwise, and a picture gains
        # nothing by it.
        self._headers = {
            "User-Agent": self.policy.user_agent,
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "identity",
        }

    def close(self) -> None:
        self._pools.clear()
        self._guard.close()

    def __enter__(self) -> "Fetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fetch(self, url: str) -> bytes:
        """The body behind ``url``; never empty, never cut.

        Raises:
            FetchError: with one of the stable reasons; after the retries for a passing one.
        """
        deadline = Deadline(self.policy.timeout_seconds)
        for pause in self._pauses(url):
            try:
                with running_under(deadline):
                    return self._follow(url, deadline)
            except FetchError as error:
                failure = error
            if failure.reason not in RETRYABLE_REASONS or pause is None:
                break
            if failure.retry_after is not None:
                pause = failure.retry_after
            if pause > MAX_RETRY_AFTER_SECONDS or time.monotonic() + pause >= deadline.end:
                break
            time.sleep(pause)
        raise failure

    def _pauses(self, url: str) -> Iterator[float | None]:
        """Seconds to wait after each attempt; None after the last.

        The spread, which keeps threads from knocking together, comes from the URL and not from a
        random generator: a rerun does the same.
        """
        spread = 0.5 + zlib.crc32(url.encode("utf-8", "surrogatepass")) / 2**32
        for attempt in range(self.policy.retries):
            yield FIRST_BACKOFF_SECONDS * 2**attempt * spread
        yield None

    def _follow(self, url: str, deadline: Deadline) -> bytes:
        """One attempt, redirects included."""
        seen = set()
        for hop in range(MAX_REDIRECTS + 1):
            try:
                target = check_url(url).url
            except FetchError as error:
                if hop == 0:
                    raise
                raise FetchError("bad_redirect", error.reason) from error
            if target in seen:
                raise FetchError("redirect_loop")
            seen.add(target)
            location = self._request(target, deadline)
            if isinstance(location, bytes):
                return location
            try:
                url = urljoin(target, location)
            except ValueError as error:
                raise FetchError("bad_redirect", "bad_url") from error
        raise FetchError("redirect_loop")

    def _request(self, url: str, deadline: Deadline) -> bytes | str:
        """One request: the body, or where it redirects to."""
        response: BaseHTTPResponse | None = None
        deadline.start_phase(self.policy.first_byte_timeout_seconds)
        try:
            response = self._pools.urlopen(
                "GET",
                url,
                headers=self._headers,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
                timeout=deadline.remaining(),
            )
            deadline.end_phase()
            if response.status in _REDIRECTS:
                location = response.headers.get("Location")
                if not location:
                    raise FetchError("bad_redirect", "no target")
                # http.client reads headers as Latin-1; a raw UTF-8 path is what servers send.
                return location.encode("latin-1", "replace").decode("utf-8", "replace")
            self._check_headers(response)
            return self._read_body(response)
        except (faults.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            raise _network_failure(error) from error
        finally:
            if response is not None:
                # Unread bytes would be the next answer's first: the connection goes, unless the
                # body was read to its end, when it is back in the pool already.
                response.close()
                response.release_conn()

    def _check_headers(self, response: BaseHTTPResponse) -> None:
        headers = response.headers
        if response.status != http.HTTPStatus.OK:
            raise FetchError(
                f"http_{response.status}",
                retry_after=retry_after_seconds(headers.get("Retry-After")),
            )
        if is_opted_out(headers.getlist("X-Robots-Tag"), self.policy.disallowed_header_directives):
            raise FetchError("opted_out")
        if headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise FetchError("content_encoding")
        announced = headers.get("Content-Length", "")
        if announced.isdecimal() and int(announced) > self.policy.max_body_bytes:
            raise FetchError("too_large")

    def _read_body(self, response: BaseHTTPResponse) -> bytes:
        """At most ``max_body_bytes`` and one read; urllib3 compares with Content-Length."""
        body = bytearray()
        start = time.monotonic()
        while block := response.read1(READ_BYTES, decode_content=False):
            body += block
            if len(body) > self.policy.max_body_bytes:
                raise FetchError("too_large")
            elapsed = time.monotonic() - start
            if (
                elapsed > MIN_RATE_GRACE_SECONDS
                and len(body) < elapsed * self.policy.min_bytes_per_second
            ):
                raise FetchError("timeout")
        if not body:
            raise FetchError("empty_body")
        return bytes(body)
