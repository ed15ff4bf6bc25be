"""JSON of any size, a block at a time: an object a line, or one list of objects."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from declip_ingest.list_files import ListFile, open_stream, reading
from declip_shards import DeclipError

BLOCK_BYTES = 4 << 20
"""Bytes read at a time; one object may be longer."""
MAX_OBJECT_BYTES = 256 << 20
"""An object longer than this is taken for a damaged file."""

Objects = list[dict[str, Any]]


def read_objects(
    file: ListFile, *, is_lines: bool, on_bytes: Callable[[int], None]
) -> Iterator[tuple[int, Objects]]:
    """(number of the first, objects) in order. Bytes that are no UTF-8 become half surrogates.

    Raises:
        DeclipError: a line or item that is no object, by number; a file that ends early.
    """
    number = 0
    blocks = _lines(file, on_bytes) if is_lines else _items(file, on_bytes)
    for rows in blocks:
        if is_lines:
            objects = _parse_lines(file, number, rows)
        else:
            objects = [_object(file, number + i, row) for i, row in enumerate(rows)]
        if objects:
            yield number, objects
        number += len(objects)


def _lines(file: ListFile, on_bytes: Callable[[int], None]) -> Iterator[list[str]]:
    rest, is_first = b"", True
    with open_stream(file, on_bytes) as stream:
        while True:
            with reading(file.location):
                block = stream.read(BLOCK_BYTES)
            data = rest + block
            if is_first and (len(data) > 3 or not block):
                data, is_first = data.removeprefix(b"\xef\xbb\xbf"), False
            if len(data) > MAX_OBJECT_BYTES:
                raise _no_json(file, "a line", "it is longer than 256 MiB")
            whole, _, rest = data.rpartition(b"\n") if block else (data, b"", b"")
            if whole:
                text = whole.decode("utf-8", "surrogateescape")
                yield [line for line in text.split("\n") if line and not line.isspace()]
            if not block:
                return


def _parse_lines(file: ListFile, start: int, lines: list[str]) -> Objects:
    # All at once takes half the time; where that fails, or gives another number of values than
    # there are lines, the line is looked for.
    try:
        rows = json.loads(f"[{','.join(lines)}]")
        if len(rows) == len(lines) and all(type(row) is dict for row in rows):
            return list(rows)
    except (ValueError, RecursionError):
        pass
    objects: Objects = []
    for number, line in enumerate(lines, start):
        try:
            objects.append(_object(file, number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise _no_json(file, f"row {number} (the first is 0)", error) from error
    return objects


def _items(file: ListFile, on_bytes: Callable[[int], None]) -> Iterator[list[Any]]:
    """The items of one long list, decoded as far as the bytes reach."""
    decoder = json.JSONDecoder()
    text, pending, is_open = "", b"", False
    with open_stream(file, on_bytes) as stream:
        while True:
            with reading(file.location):
                block = stream.read(BLOCK_BYTES)
            pending += block
            # A character may be cut in two by the block's end: keep back the last few bytes.
            cut = len(pending) if not block else max(0, _whole_characters(pending))
            text += pending[:cut].decode("utf-8", "surrogateescape")
            pending = pending[cut:]
            if not is_open:
                text = text.lstrip("\ufeff \t\r\n")
                is_open, text = bool(text), text[1:]
            items, text, is_end = _decode_items(decoder, text, is_last=not block, file=file)
            if items:
                yield items
            if is_end:
                return
            if len(text) > MAX_OBJECT_BYTES:
                raise _no_json(file, "an object", "it is longer than 256 MiB")
            if not block:
                raise _no_json(file, "the list", "it ends early")


def _whole_characters(data: bytes) -> int:
    """Bytes up to the start of the last character, which may not be whole yet."""
    end = len(data)
    while end > 0 and len(data) - end < 4 and data[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1


def _decode_items(
    decoder: json.JSONDecoder, text: str, *, is_last: bool, file: ListFile
) -> tuple[list[Any], str, bool]:
    """(items, what is left, whether the list's end was there)."""
    items: list[Any] = []
    at = 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at == len(text):
            return items, "", False
        if text[at] == "]":
            return items, text[at + 1 :], True
        try:
            item, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if is_last or isinstance(error, RecursionError):
                raise _no_json(file, "the list", error) from error
            return items, text[at:], False
        if not isinstance(item, dict):
            return [*items, item], text[end:], False  # the caller refuses it by its number
        items.append(item)
        at = end


def _object(file: ListFile, number: int, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise DeclipError(
        f"list {file.location!r}: row {number} (the first is 0) is {value!r:.60}, not an object; "
        "mend or drop it."
    )


def _no_json(file: ListFile, what: str, why: object) -> DeclipError:
    if isinstance(why, RecursionError):
        why = "it is nested too deeply"
    first_line = str(why).split("\n")[0].rstrip(".")
    return DeclipError(
        f"list {file.location!r}: {what} is no whole JSON ({first_line}); fetch or write it again."
    )
