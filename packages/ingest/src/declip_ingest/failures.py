"""Why a row failed: a closed vocabulary, the same on every run, never an address, port or time."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

Status = Literal["failed_to_download", "failed_to_resize"]
"""img2dataset's words for the two halves of the work."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """What is known of a reason, beside its name."""

    meaning: str
    """One line for a person."""
    group: str
    """The family that ``declip refetch --reason`` and the doctor know it by."""
    is_passing: bool = False
    """Whether another attempt a little later may well succeed."""


def _group(group: str, reasons: dict[str, str], passing: Iterable[str] = ()) -> dict[str, Reason]:
    passing = set(passing)
    return {
        name: Reason(meaning=meaning, group=group, is_passing=name in passing)
        for name, meaning in reasons.items()
    }


FETCH_REASONS: dict[str, Reason] = {
    **_group(
        "row",
        {
            "missing_url": "the row has no URL",
            "missing_caption": "the row has no caption, so the picture is not fetched",
        },
    ),
    **_group(
        "url",
        {
            "bad_url": "not an absolute URL, too long, with control characters or a user name",
            "bad_scheme": "a scheme other than http or https",
            "forbidden_address": "the host resolves to an address that is not public, nor allowed",
            "forbidden_port": "a port other than 80 and 443 that is not allowed",
            "bad_redirect": "a redirect without a target, or to a URL that may not be fetched",
            "redirect_loop": "a redirect to a URL already seen, or more than max_redirects",
        },
    ),
    **_group(
        "dns",
        {"dns_failure": "the host name did not resolve, or not in time"},
        passing=["dns_failure"],
    ),
    **_group(
        "connection",
        {
            "connection_refused": "nothing listens there",
            "connection_reset": "the server hung up before the body was complete",
            "host_unreachable": "no route to the host",
            "network_error": "another fault of the network; its errno name follows",
        },
        passing=["connection_refused", "connection_reset", "host_unreachable", "network_error"],
    ),
    **_group(
        "timeout",
        {"timeout": "no connection, no answer, too slow a body, or too long in all"},
        passing=["timeout"],
    ),
    **_group("tls", {"tls_error": "the certificate or the handshake is not valid"}),
    **_group(
        "answer",
        {
            "bad_response": "not HTTP, or headers that contradict each other",
            "content_encoding": "compressed although only plain bytes were asked for",
            "too_large": "more bytes than max_body_bytes",
            "short_body": "fewer bytes than the server announced",
            "empty_body": "no bytes at all",
        },
        passing=["short_body", "empty_body"],
    ),
    **_group(
        "opt_out",
        {
            "opted_out": "an X-Robots-Tag header forbids the use",
            "robots_denied": "the host's robots.txt forbids the path to our name",
            "robots_unavailable": "the host's robots.txt could not be had, so nothing is taken",
            "opt_out_list": "somebody asked for its removal (declip optout)",
        },
        passing=["robots_unavailable"],
    ),
    **_group(
        "policy",
        {
            "blocked": "the bytes are on a blocklist; they were never written",
            "hash_mismatch": "other bytes than those that the list names by their hash",
            "placeholder": "a known 'photo unavailable' picture in place of the photo",
            "repeated_image": "the same bytes from placeholder_repeats URLs of one shard or more",
        },
    ),
}
"""Reasons of ``failed_to_download``; besides them ``http_404`` and the like, by status code."""

DECODE_REASONS: dict[str, Reason] = {
    **_group(
        "image",
        {
            "not_image": "the bytes are no picture, whatever the headers said",
            "unsupported_format": "a picture of a format that is not taken; its name follows",
            "corrupt_image": "the decoder refused the file",
            "truncated_image": "the file ends before the picture does",
        },
    ),
    **_group(
        "size",
        {
            "too_many_pixels": "more pixels than max_pixels, by the header or once resized",
            "image_too_small": "the shorter side is under min_image_size",
            "aspect_ratio_too_large": "longer side over shorter side is above max_aspect_ratio, or "
            "stored it would be longer than a JPEG's 65,500 pixels",
        },
    ),
    **_group(
        "decoder",
        {
            "decoder_crash": "the decoder's process died of it; the bytes are in quarantine/",
            "decoder_timeout": "the decoder was still at it after decode_timeout_seconds",
            "decoder_memory": "the decoder wanted more memory than decode_memory_bytes",
            "bad_boxes": "the boxes to blur are no list of left, top, right, bottom within 0 to 1",
        },
    ),
}
"""Reasons of ``failed_to_resize``."""

_HTTP_REASON = re.compile(r"http_[1-5]\d\d")
_PASSING_CODES = (
    "http_408",
    "http_425",
    "http_429",
    "http_500",
    "http_502",
    "http_503",
    "http_504",
)
PASSING_REASONS: frozenset[str] = frozenset(
    [n for n, about in (FETCH_REASONS | DECODE_REASONS).items() if about.is_passing]
).union(_PASSING_CODES)
"""Failures that another attempt a little later may well mend."""
GROUPS: tuple[str, ...] = tuple(
    dict.fromkeys([*(r.group for r in (FETCH_REASONS | DECODE_REASONS).values()), "http"])
)
"""Families of reasons; ``http`` are the status codes."""


def reason_of(name: str) -> Reason:
    """What is known of a reason.

    Raises:
        KeyError: no reason of ours.
    """
    if _HTTP_REASON.fullmatch(name):
        return Reason(
            meaning=f"the server answered with status {name[5:]}",
            group="http",
            is_passing=name in _PASSING_CODES,
        )
    return (FETCH_REASONS | DECODE_REASONS)[name]


def is_reason(name: str) -> bool:
    """Whether this is a reason of ours."""
    return name in FETCH_REASONS or name in DECODE_REASONS or bool(_HTTP_REASON.fullmatch(name))


def match_reasons(asked: Iterable[str]) -> frozenset[str] | None:
    """Turn names of reasons and of families into a set of reasons; ``None`` is every one.

    ``all`` is every failure, ``passing`` those that another attempt may mend; ``http`` stands for
    all status codes and is kept as it is (see :func:`is_asked`).

    Raises:
        DeclipError: a name that is neither; the nearest is offered.
    """
    known = FETCH_REASONS | DECODE_REASONS
    found: set[str] = set()
    for name in asked:
        if name == "all":
            return None
        if name == "passing":
            found |= PASSING_REASONS
        elif name == "http" or name in known or _HTTP_REASON.fullmatch(name):
            found.add(name)
        elif name in GROUPS:
            found |= {r for r, about in known.items() if about.group == name}
        else:
            near = did_you_mean(name, ["all", "passing", *GROUPS, *known])
            raise DeclipError(f"there is no failure reason {name!r}.{near}")
    if not found:
        raise DeclipError("no failure reason is named; name one, a family, or 'all'.")
    return frozenset(found)


def is_asked(reason: str, asked: frozenset[str] | None) -> bool:
    """Whether a row's reason is among those of :func:`match_reasons`."""
    if asked is None:
        return True
    return reason in asked or ("http" in asked and _HTTP_REASON.fullmatch(reason) is not None)


class RowFailureError(Exception):
    """One row failed for a named reason; the shard goes on without it."""

    status: Status = "failed_to_download"
    """What img2dataset's ``status`` column says of such a row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        """Stable name, counted in the receipt."""
        self.detail = detail
        """A short stable word more, or empty."""

    def __reduce__(self) -> tuple[type["RowFailureError"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)

    @property
    def message(self) -> str:
        """The row's ``error_message``: the reason, and where it helps a short stable detail.

        What passes has none there: where a timeout or a busy host was noticed depends on the
        moment, and a shard's bytes may not. The ledger has it.
        """
        is_passing = is_reason(self.reason) and reason_of(self.reason).is_passing
        return self.reason if is_passing else str(self)


class FetchError(RowFailureError):
    """The bytes could not be had: a name of :data:`FETCH_REASONS` or ``http_NNN``."""

    def __init__(self, reason: str, detail: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(reason, detail)
        self.retry_after = retry_after
        """Seconds the server asked us to wait (``Retry-After``)."""


class DecodeError(RowFailureError):
    """The bytes came but are no usable picture: a name of :data:`DECODE_REASONS`."""

    status = "failed_to_resize"
