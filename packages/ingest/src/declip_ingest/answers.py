"""What a server's answer, or the lack of one, means: opt-outs, pauses, named faults."""

import email.utils
import errno
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime

import aiohttp

from declip_ingest.failures import FetchError
from declip_ingest.robots import USER_AGENT_TOKEN
from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

VALUED_DIRECTIVES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
"""Directives with a colon of their own, which is no robot's name."""

KNOWN_DIRECTIVES = frozenset(
    {"noai", "noimageai", "noml", "noindex", "noimageindex", "noarchive", "nocache", "nosnippet"}
    | {"nofollow", "notranslate", "none", "all", "index", "follow", "indexifembedded", "noodp"}
    | {"noydir", *VALUED_DIRECTIVES}
)
"""What search engines and hosts of art document for X-Robots-Tag and the robots meta tag."""


def check_directives(directives: Sequence[str]) -> None:
    """Refuse a directive that no server sends: a misspelt one would be an opt-out not obeyed.

    Raises:
        DeclipError: naming it; the nearest is offered.
    """
    for directive in directives:
        if directive.strip().lower() not in KNOWN_DIRECTIVES:
            raise DeclipError(
                f"disallowed_header_directives holds {directive!r}, which is no directive of "
                f"X-Robots-Tag; name those that forbid the use."
                f"{did_you_mean(directive.strip().lower(), KNOWN_DIRECTIVES)}"
            )


def is_opted_out(values: Sequence[str], directives: Sequence[str]) -> bool:
    """Whether X-Robots-Tag headers forbid the use, for everyone or for our name.

    ``noai``, ``opendeclip: noindex`` and ``otherbot: noai, opendeclip: noai`` are understood; a
    name holds until the header's end or the next name. ``none`` in a header means ``noindex`` and
    ``nofollow``.
    """
    refused = {d.strip().lower() for d in directives}
    if refused & {"noindex", "nofollow"}:
        refused.add("none")
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
    digits = value.strip()
    if digits.isascii() and digits.isdecimal():
        return float(digits[:12])
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def network_failure(error: BaseException) -> FetchError:
    """The stable name of a fault of the network or of the protocol.

    Raises:
        DeclipError: the fault is this machine's (no file descriptors left): not the row's failure.
    """
    cause = getattr(error, "os_error", error)
    if isinstance(cause, FetchError):
        return cause
    if isinstance(cause, TimeoutError):
        is_connecting = isinstance(cause, aiohttp.ConnectionTimeoutError)
        return FetchError("timeout", "connect" if is_connecting else "")
    if isinstance(error, aiohttp.ClientSSLError) or isinstance(cause, ssl.SSLError):
        return FetchError("tls_error")
    if isinstance(cause, aiohttp.ClientPayloadError):
        return FetchError("short_body")
    if isinstance(cause, aiohttp.ServerDisconnectedError | ConnectionError):
        refused = isinstance(cause, ConnectionRefusedError)
        return FetchError("connection_refused" if refused else "connection_reset")
    if isinstance(cause, OSError):
        return errno_failure(cause)
    if isinstance(cause, aiohttp.InvalidURL | UnicodeError):
        return FetchError("bad_url")
    return FetchError("bad_response")


def errno_failure(error: OSError) -> FetchError:
    """As :func:`network_failure`, by the error's number."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise DeclipError(
            "this process has no file descriptor left for a connection; lower thread_count or "
            "raise the limit with 'ulimit -n'."
        ) from error
    by_number = {
        errno.ECONNREFUSED: "connection_refused",
        errno.ECONNRESET: "connection_reset",
        errno.EPIPE: "connection_reset",
        errno.EHOSTUNREACH: "host_unreachable",
        errno.ENETUNREACH: "host_unreachable",
        errno.ETIMEDOUT: "timeout",
    }
    reason = by_number.get(error.errno or 0)
    if reason is not None:
        return FetchError(reason)
    return FetchError("network_error", errno.errorcode.get(error.errno or 0, ""))


async def name_faults(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Turn aiohttp's faults into ours at once: it would send some requests again by itself."""
    try:
        return await handler(request)
    except aiohttp.ClientError as error:
        raise network_failure(error) from error
