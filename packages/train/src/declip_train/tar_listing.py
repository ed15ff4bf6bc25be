"""What a tar holds, going by its headers: the pictures themselves are jumped over."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from declip_shards import DeclipError

__all__ = ["TarMember", "walk_tar"]

_BLOCK = tarfile.BLOCKSIZE
_READ = 4 * _BLOCK
"""Read at once: a header, and with it the whole of most captions."""
_REGULAR = (b"0", b"\0", b"7")
_LONG_NAME, _PAX, _PAX_GLOBAL = b"L", b"x", b"g"
_BASE_256 = 0x80
_COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")
"""Beginnings of gzip, bzip2, xz and zstd; no name in a dataset begins so."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """One plain file of a tar."""

    name: str
    offset: int
    """First byte of its content in the tar."""
    size: int
    data: bytes | None
    """Its content, where it was asked for."""


def walk_tar(path: str, wants: Callable[[str], bool], shown: str = "") -> Iterator[TarMember]:
    """The plain files of a tar in order.

    Every header's checksum is checked, and that the archive ends with the two empty blocks that end
    an archive: one that was cut, even between two files, is an error.

    Args:
        path: of this machine.
        wants: (name) -> whether the member's content is read.
        shown: what errors call the tar; empty: its path.

    Raises:
        DeclipError: the tar is cut or damaged.
    """
    shown = shown or path
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DeclipError(
            f"the tar {shown!r} cannot be read ({error.strerror}); correct its path, or bring it "
            "back."
        ) from error
    try:
        yield from _walk(number, os.fstat(number).st_size, wants, shown)
    finally:
        os.close(number)


def _walk(number: int, total: int, wants: Callable[[str], bool], shown: str) -> Iterator[TarMember]:
    if os.pread(number, 2, 0) in _COMPRESSED:
        raise DeclipError(
            f"the tar {shown!r} is compressed, so its pictures cannot be read by their places; "
            "unpack it first (pictures are compressed already)."
        )
    position = 0
    headers: list[bytes] = []
    more: dict[str, str] = {}
    while position + _BLOCK <= total:
        block = os.pread(number, _READ, position)
        header = block[:_BLOCK]
        if header.count(0) == _BLOCK:
            break
        headers.append(header)
        if len(headers) == 4096:
            _check_headers(headers, shown, position)
            headers.clear()
        size, kind = _size(header, shown, position), header[156:157]
        first = position + _BLOCK
        if first + size > total:
            raise DeclipError(_cut(shown, total, f"inside of member {_name(header)!r}"))
        position = first + -(-size // _BLOCK) * _BLOCK
        if kind in (_LONG_NAME, _PAX, _PAX_GLOBAL):
            if kind != _PAX_GLOBAL:
                more.update(_more(kind, os.pread(number, size, first)))
            continue
        size = int(more.get("size", size))
        name = more.get("path") or _name(header)
        if "size" in more:
            position = first + -(-size // _BLOCK) * _BLOCK
        more = {}
        if kind not in _REGULAR:
            continue
        data = None
        if wants(name):
            inside = _BLOCK + size <= len(block)
            data = block[_BLOCK : _BLOCK + size] if inside else os.pread(number, size, first)
            if len(data) != size:
                raise DeclipError(_cut(shown, total, f"inside of member {name!r}"))
        yield TarMember(name, first, size, data)
    _check_headers(headers, shown, position)
    _check_end(number, position, total, shown)


def _cut(shown: str, total: int, where: str) -> str:
    return (
        f"the tar {shown!r} is cut short at byte {total} {where}; fetch it again (shards of ours: "
        "rerun ingest for this shard)."
    )


def _check_end(number: int, position: int, total: int, shown: str) -> None:
    """What follows the last member must be empty blocks, two at least, up to the file's end."""
    if total - position < 2 * _BLOCK:
        raise DeclipError(_cut(shown, total, "before the mark of its end"))
    while block := os.pread(number, 1 << 20, position):
        if block.strip(b"\0"):
            raise DeclipError(
                f"the tar {shown!r} is damaged after byte {position}: data follow the mark of its "
                "end; fetch it again (shards of ours: rerun ingest for this shard)."
            )
        position += len(block)


def _check_headers(headers: list[bytes], shown: str, position: int) -> None:
    """The sums of many headers at once: one by one they would take most of the time."""
    if not headers:
        return
    bytes_of = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _BLOCK)
    sums = bytes_of.sum(axis=1, dtype=np.int64) - bytes_of[:, 148:156].sum(axis=1) + 8 * ord(" ")
    for header, found in zip(headers, sums.tolist(), strict=True):
        digits = header[148:156].strip(b"\0 ")
        if digits and _octal(digits) == found:
            continue
        raise DeclipError(
            f"the tar {shown!r} is damaged: the header of a member before byte {position} "
            f"({_name(header)!r}) has a wrong sum; fetch it again (shards of ours: rerun ingest "
            "for this shard)."
        )


def _octal(digits: bytes) -> int:
    try:
        return int(digits, 8)
    except ValueError:
        return -1


def _size(header: bytes, shown: str, position: int) -> int:
    field = header[124:136]
    if field[0] & _BASE_256:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    size = _octal(field.strip(b"\0 ") or b"0")
    if size < 0:
        raise DeclipError(
            f"the tar {shown!r} is damaged: byte {position} is no header of a member; fetch it "
            "again (shards of ours: rerun ingest for this shard)."
        )
    return size


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    # Only POSIX's magic has a prefix there; GNU's keeps times in those bytes.
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _more(kind: bytes, data: bytes) -> dict[str, str]:
    """What an extended header says of the member behind it."""
    if kind == _LONG_NAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    while data:
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or not 0 < int(digits) <= len(data):
            break
        name, _, value = data[len(digits) + 1 : int(digits) - 1].partition(b"=")
        if name in (b"path", b"size"):
            found[name.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[int(digits) :]
    return found
