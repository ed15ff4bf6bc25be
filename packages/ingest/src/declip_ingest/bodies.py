"""Read a body up to a limit, at a least rate, and little beyond."""

import asyncio
import time
from typing import Any

import aiohttp
from aiohttp.connector import Connection

from declip_ingest.answers import errno_failure, network_failure
from declip_ingest.failures import FetchError

MIN_RATE_GRACE_SECONDS = 2.0
"""A body may be slower than the minimum rate this long."""
DRAIN_BYTES = 1 << 15
"""A redirect's or an error's body up to this length is read so that its connection is kept."""
DRAIN_SECONDS = 0.5
SMALL_LIMIT_BYTES = 1 << 20
"""Under such a limit a connection's first read may bring too much: its buffer is small at once."""
SMALL_BUFFER_BYTES = 1 << 14
"""The kernel's buffer of these connections; Linux takes twice as much as is asked for."""
READ_BYTES = 1 << 15
"""What one read may bring of a body of unknown length, under a larger limit."""


async def read_body(
    response: aiohttp.ClientResponse, max_bytes: int, min_bytes_per_second: int
) -> bytes:
    """The whole body, which must have its announced length and not be empty.

    Raises:
        FetchError: ``too_large``, ``short_body``, ``empty_body``, ``timeout`` for a slow one,
            ``connection_reset``, ``bad_response``.
    """
    connection, content = response.connection, response.content
    if response.content_length is None:
        _limit_reads(connection)
    blocks: list[bytes] = []
    size = 0
    start = time.monotonic()
    try:
        while True:
            block = await content.readany()
            if not block:
                break
            blocks.append(block)
            size += len(block)
            if size > max_bytes:
                raise FetchError("too_large")
            elapsed = time.monotonic() - start
            if elapsed > MIN_RATE_GRACE_SECONDS and size < elapsed * min_bytes_per_second:
                raise FetchError("timeout")
    except aiohttp.ClientPayloadError as error:
        raise _payload_failure(error, connection) from error
    if not size:
        raise FetchError("empty_body")
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


async def read_start(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """At most ``max_bytes`` of the body; what lies behind is left unread.

    Raises:
        FetchError: ``short_body``, ``connection_reset``, ``bad_response``.
    """
    connection, content = response.connection, response.content
    start = bytearray()
    try:
        while len(start) < max_bytes and (block := await content.readany()):
            start += block
    except aiohttp.ClientPayloadError as error:
        raise _payload_failure(error, connection) from error
    return bytes(start[:max_bytes])


async def drain(response: aiohttp.ClientResponse) -> None:
    """Read a short body that nobody wants, for then its connection can be used again."""
    length = response.content_length
    if length is None or length > DRAIN_BYTES:
        return
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            await response.content.read()
    except (aiohttp.ClientError, OSError):
        pass  # the status is known, and the connection goes


def _limit_reads(connection: Connection | None) -> None:
    """Keep asyncio from reading 256 KiB at a time towards a limit that may lie anywhere.

    The kernel's own buffer is left alone: shrunk under a stream that runs, it stalls for seconds.
    """
    transport: Any = connection.transport if connection is not None else None
    if hasattr(transport, "max_size"):
        transport.max_size = READ_BYTES


def _payload_failure(
    error: aiohttp.ClientPayloadError, connection: Connection | None
) -> FetchError:
    """Cut by the server's good-bye (short_body), or by a reset."""
    protocol = connection.protocol if connection is not None else None
    cause = protocol.exception() if protocol is not None else None
    if isinstance(cause, ConnectionError):
        return FetchError("connection_reset")
    if isinstance(cause, OSError):
        return errno_failure(cause)
    return network_failure(error)
