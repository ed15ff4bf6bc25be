"""What a tar holds, by its headers alone: contents are jumped over, unless they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from declip_eval.set_files import DatasetError

__all__ = ["TarMember", "walk_tar"]

_BLOCK = 512
_READ = 4 * _BLOCK
"""Bytes read at once: a header, and with it the whole of a label or of most captions."""
_PLAIN = (b"0", b"\0", b"7")
_LONG_NAME, _PAX, _PAX_GLOBAL = b"L", b"x", b"g"
_COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")
"""First bytes of gzip, bzip2, xz and zstd."""


class TarMember(NamedTuple):
    """One plain file of a tar."""

    name: str
    offset: int
    """First byte of its content in the tar."""
    size: int
    data: bytes | None
    """Its content, where it was asked for."""


def walk_tar(path: str, wants: Callable[[str], bool], shown: str) -> Iterator[TarMember]:
    """Yield the plain files of an uncompressed tar (POSIX ustar and pax, GNU) in their order.

    `tarfile` takes a damaged header for the end and says nothing; here every header's sum is
    checked, and that the archive ends as archives end, so that a cut one is never read as a short
    one.

    Args:
        path: of this machine.
        wants: name -> whether the member's content is read too.
        shown: what errors call the tar.

    Raises:
        DatasetError: the tar is compressed, cut or damaged, or cannot be read.
    """
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DatasetError(f"{shown} cannot be read ({error.strerror}): bring it back.") from error
    try:
        yield from _walk(number, os.fstat(number).st_size, wants, shown)
    finally:
        os.close(number)


def _walk(number: int, total: int, wants: Callable[[str], bool], shown: str) -> Iterator[TarMember]:
    if os.pread(number, 2, 0) in _COMPRESSED:
        raise DatasetError(
            f"{shown} is compressed, so its pictures cannot be read by their places: unpack it "
            "(pictures are compressed already)."
        )
    position = 0
    more: dict[str, str] = {}
    while position + _BLOCK <= total:
        block = os.pread(number, _READ, position)
        header = block[:_BLOCK]
        if header.count(0) == _BLOCK:
            break
        _check_sum(header, shown, position)
        kind, first = header[156:157], position + _BLOCK
        extended = kind in (_LONG_NAME, _PAX, _PAX_GLOBAL)
        size = int(more.get("size", -1)) if not extended else -1
        size = _number(header[124:136]) if size < 0 else size
        if size < 0 or first + size > total:
            raise DatasetError(_cut(shown, total))
        position = first + -(-size // _BLOCK) * _BLOCK
        if extended:
            if kind != _PAX_GLOBAL:
                more |= _extension(kind, os.pread(number, size, first))
            continue
        name, more = more.get("path") or _name(header), {}
        if kind in _PLAIN:
            data = None
            if wants(name):
                inside = _BLOCK + size <= len(block)
                data = block[_BLOCK : _BLOCK + size] if inside else os.pread(number, size, first)
            yield TarMember(name, first, size, data)
    _check_end(number, position, total, shown)


def _cut(shown: str, total: int) -> str:
    return f"{shown} is cut short at byte {total}: fetch it again."


def _check_sum(header: bytes, shown: str, position: int) -> None:
    # The sum's own eight bytes count as spaces (POSIX.1-1988, ustar).
    expected = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _number(header[148:156]) != expected:
        raise DatasetError(
            f"{shown} is damaged: byte {position} is no header of a member; fetch it again."
        )


def _check_end(number: int, position: int, total: int, shown: str) -> None:
    """What follows the last member must be empty blocks, two at least, up to the file's end."""
    if total - position < 2 * _BLOCK:
        raise DatasetError(_cut(shown, total))
    while block := os.pread(number, 1 << 20, position):
        if block.strip(b"\0"):
            raise DatasetError(
                f"{shown} is damaged: data follow the mark of its end after byte {position}; fetch "
                "it again."
            )
        position += len(block)


def _number(digits: bytes) -> int:
    """An octal or (GNU, for large files) base-256 number; -1 where it is neither."""
    if digits[0] & 0x80:
        return int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:], "big")
    try:
        return int(digits.strip(b"\0 ") or b"0", 8)
    except ValueError:
        return -1


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    # Only POSIX's magic has a prefix there; GNU keeps times in those bytes.
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
    """The path and size that an extended header gives the member behind it."""
    if kind == _LONG_NAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    while data:
        length = data.partition(b" ")[0]
        if not length.isdigit() or not 0 < int(length) <= len(data):
            break
        keyword, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if keyword == b"path" or (keyword == b"size" and value.isdigit()):
            found[keyword.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return found
