"""Why a row failed: stable names, the same on every run, never an address, a port or a time."""

FETCH_REASONS = {
    "missing_url": "the row has no URL",
    "missing_caption": "the row has no caption, so the picture is not fetched",
    "bad_url": "not an absolute URL, too long, with control characters, or with a user name",
    "bad_scheme": "a scheme other than http or https",
    "dns_failure": "the host name did not resolve, or not in time",
    "forbidden_address": "the host resolves to an address that is not public and not allowed",
    "forbidden_port": "a port other than 80 and 443 that is not allowed",
    "connection_refused": "nothing listens there",
    "connection_reset": "the server hung up before the body was complete",
    "host_unreachable": "no route to the host",
    "tls_error": "the certificate or the handshake is not valid",
    "timeout": "no connection, no answer, too slow a body, or too long in all",
    "bad_response": "not HTTP, or headers that contradict each other",
    "bad_redirect": "a redirect without a target, or to a URL that may not be fetched",
    "redirect_loop": "a redirect to a URL already seen, or more than five redirects",
    "content_encoding": "compressed although only plain bytes were asked for",
    "opted_out": "an X-Robots-Tag header forbids the use",
    "too_large": "more bytes than max_body_bytes",
    "short_body": "fewer bytes than the server announced",
    "empty_body": "no bytes at all",
    "network_error": "another fault of the network; its errno name follows",
}
"""Reasons of ``failed_to_download``; besides them ``http_404`` and the like, by status code."""

DECODE_REASONS = {
    "not_image": "the bytes are no picture, whatever the headers said",
    "unsupported_format": "a picture of a format that is not taken; its name follows",
    "corrupt_image": "the decoder refused the file",
    "truncated_image": "the file ends before the picture does",
    "too_many_pixels": "more pixels than max_pixels, read from the header before any decoding",
    "image_too_small": "the shorter side is under min_image_size",
    "aspect_ratio_too_large": "longer side over shorter side is above max_aspect_ratio",
    "resize_failed": "img2dataset's resizer refused the picture",
}
"""Reasons of ``failed_to_resize``."""


class RowFailureError(Exception):
    """One row failed for a named reason; the shard goes on without it."""

    status = "failed_to_download"
    """What img2dataset's ``status`` column says of such a row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        """Stable name, counted in the receipt."""

    @property
    def message(self) -> str:
        """The row's ``error_message``: the reason, and where it helps a short stable detail."""
        return str(self)


class FetchError(RowFailureError):
    """The bytes could not be had: a name of :data:`FETCH_REASONS` or ``http_NNN``."""

    def __init__(self, reason: str, detail: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(reason, detail)
        self.retry_after = retry_after
        """Seconds the server asked us to wait (``Retry-After``)."""


class DecodeError(RowFailureError):
    """The bytes came but are no usable picture: a name of :data:`DECODE_REASONS`."""

    status = "failed_to_resize"
