"""Lists of digests and hashes of rows: what must be, what must not be, what is no photo."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import fsspec

from declip_ingest.failures import FetchError
from declip_shards import DeclipError

ALGORITHMS = {32: "md5", 64: "sha256", 128: "sha512"}
"""Hex digits of a digest -> the algorithm that makes so many."""
_HEX = re.compile(r"[0-9a-f]+")
PLACEHOLDER_URLS = (
    re.compile(
        r"//[^/]*(?:yimg\.com|flickr\.com|staticflickr\.com)/.*/?photo_(?:un|not_?)available"
    ),
    re.compile(r"//i\.imgur\.com/removed\.png"),
)
"""Where hosts redirect to once a photo is gone: Flickr's and Imgur's notices, with status 200."""


def read_digests(locations: Sequence[str], option: str) -> dict[str, frozenset[str]]:
    """Read files of hex digests, one at the start of each line: algorithm -> digests.

    What follows a digest on its line (a file name, a reason) is free; ``#`` begins a comment.

    Raises:
        DeclipError: a file is missing (nothing is fetched then: a list that cannot be had must not
            be a list without entries), holds no digest at all, or has a line that begins with no
            md5, sha256 or sha512.
    """
    found: dict[str, set[str]] = {}
    for location in locations:
        num_digests = 0
        for number, line in enumerate(_text(location, option).splitlines(), start=1):
            word = line.split("#", 1)[0].replace(",", " ").split()
            if not word:
                continue
            digest = word[0].lower()
            algorithm = ALGORITHMS.get(len(digest))
            if algorithm is None or not _HEX.fullmatch(digest):
                raise DeclipError(
                    f"line {number} of {location!r} ({option}) begins with {word[0]!r:.80}, which "
                    "is no md5, sha256 or sha512 in hex; mend the line or put # before it."
                )
            found.setdefault(algorithm, set()).add(digest)
            num_digests += 1
        if not num_digests:
            raise DeclipError(
                f"{location!r}, named by {option}, holds no digest, as a list that was cut short "
                "may; write it again, or leave it out of the setting."
            )
    return {algorithm: frozenset(digests) for algorithm, digests in found.items()}


def _text(location: str, option: str) -> str:
    fs, path = fsspec.core.url_to_fs(location)
    try:
        data: bytes = fs.cat_file(path)
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"fails: {error}"
        raise DeclipError(
            f"{location!r}, named by {option}, {reason}; give its path, or leave the setting out."
        ) from error


def is_listed(data: bytes, listed: dict[str, frozenset[str]]) -> bool:
    """Whether the bytes' digest stands in a list; only the algorithms that it has are computed."""
    for algorithm, digests in listed.items():
        if hashlib.new(algorithm, data).hexdigest() in digests:
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class ExpectedHash:
    """What a list says of a picture's bytes."""

    algorithm: str
    """md5, sha256 or sha512."""
    digest: str
    """Hex, lower case."""

    @classmethod
    def parse(cls, text: str) -> "ExpectedHash | None":
        """``sha256:<hex>``, or hex alone, whose length tells the algorithm; None for no digest."""
        algorithm, _, digest = text.strip().lower().rpartition(":")
        algorithm = algorithm or ALGORITHMS.get(len(digest), "")
        if ALGORITHMS.get(len(digest)) != algorithm or not _HEX.fullmatch(digest):
            return None
        return cls(algorithm=algorithm, digest=digest)

    def matches(self, data: bytes) -> bool:
        """Whether ``data`` are the bytes that the list meant."""
        return hashlib.new(self.algorithm, data).hexdigest() == self.digest


def check_hash(data: bytes, expected: str | None) -> bool:
    """Compare the bytes with what the list says of them.

    Returns:
        Whether there was a digest to compare with.

    Raises:
        FetchError: ``hash_mismatch``; with ``digest`` where the list's value is none.
    """
    if not expected:
        return False
    hash_ = ExpectedHash.parse(expected)
    if hash_ is None:
        raise FetchError("hash_mismatch", "digest")
    if not hash_.matches(data):
        raise FetchError("hash_mismatch")
    return True


def is_placeholder_url(url: str) -> bool:
    """Whether a redirect ended at a host's notice that the photo is gone."""
    return any(pattern.search(url) for pattern in PLACEHOLDER_URLS)


def host_of(url: str) -> str:
    """Host and port as they stand in ``url``, lower case; empty where there is none."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""
