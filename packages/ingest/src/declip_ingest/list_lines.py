"""Tab-separated lists without a header and without quotes: CC3M, CC12M and CC12M's hashes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from declip_ingest.list_columns import KINDS, tag_hashes
from declip_ingest.list_files import ListFile, open_stream, reading
from declip_ingest.list_kinds import Found
from declip_ingest.list_rows import OnBytes, Rows, first_rows, to_mask, to_text
from declip_ingest.url_digests import Digests, DigestTable, digest_texts
from declip_shards import DeclipError

BLOCK_BYTES = 4 << 20
"""Bytes parsed at a time; a line may not be longer."""
Numbers = npt.NDArray[np.int64]
LABELLED = ("caption", "url", "labels", "mids", "scores")
"""CC3M's labelled train file (method_facts 9.4)."""


class _Skipped:
    """Remembers the lines of another number of fields, which the parser leaves out."""

    def __init__(self) -> None:
        self.lines: list[int] = []

    def __call__(self, row: Any) -> str:
        self.lines.append(int(row.number))
        return "skip"

    def take(self, num_header_lines: int) -> Numbers:
        """The numbers of those found since; the parser counts from 1, the header too."""
        numbers = np.array(self.lines, np.int64) - 1 - num_header_lines
        self.lines.clear()
        return numbers


def read_lines(
    file: ListFile,
    names: Sequence[str],
    on_bytes: OnBytes,
    *,
    has_header: bool = False,
    wanted: Sequence[str] | None = None,
) -> Iterator[tuple[Numbers, pa.Table, Numbers]]:
    """Blocks of a file: the rows' numbers, a table of bytes, and the numbers of bad rows.

    Bad rows come with the next good ones, so that all numbers of a block lie above those before.

    Args:
        file: tab-separated, every line with as many fields as ``names``.
        names: what the fields are called.
        on_bytes: is told of stored bytes.
        has_header: whether the first line is left out; it has no number.
        wanted: fields that are read; all by default.

    Raises:
        DeclipError: a line longer than :data:`BLOCK_BYTES`, or more bad lines than good ones.
    """
    skipped = _Skipped()
    parse = pa.csv.ParseOptions(
        delimiter="\t",
        quote_char=False,
        escape_char=False,
        ignore_empty_lines=False,
        invalid_row_handler=skipped,
    )
    fields = list(wanted or names)
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(fields, pa.binary()),
        include_columns=fields,
        strings_can_be_null=False,
    )
    read = pa.csv.ReadOptions(
        block_size=BLOCK_BYTES,
        use_threads=False,
        column_names=list(names),
        skip_rows=int(has_header),
    )
    next_line, num_bad = 0, 0
    waiting = np.zeros(0, np.int64)
    with open_stream(file, on_bytes) as stream:
        for batch in _open(file, stream, read, parse, convert):
            waiting = np.concatenate([waiting, skipped.take(int(has_header))])
            count = batch.num_rows
            if not count:
                continue
            here = np.arange(next_line, next_line + count + len(waiting), dtype=np.int64)
            numbers = np.setdiff1d(here, waiting, assume_unique=True)[:count]
            passed = waiting < numbers[-1]
            bad, waiting = waiting[passed], waiting[~passed]
            next_line, num_bad = int(numbers[-1]) + 1, num_bad + len(bad)
            if num_bad > 100 and 2 * num_bad > next_line:
                raise _not_such(file, len(names), int(bad[0]))
            yield numbers, pa.Table.from_batches([batch]), bad
        bad = np.concatenate([waiting, skipped.take(int(has_header))])
        if num_bad + len(bad) > next_line - num_bad:
            raise _not_such(file, len(names), int(bad[0]) if len(bad) else 0)
        if len(bad):
            empty = pa.schema([(name, pa.binary()) for name in fields]).empty_table()
            yield bad[:0], empty, bad


def _open(
    file: ListFile, stream: Any, read: Any, parse: Any, convert: Any
) -> Iterator[pa.RecordBatch]:
    try:
        with reading(file.location):
            opened = pa.csv.open_csv(
                stream, read_options=read, parse_options=parse, convert_options=convert
            )
        while True:
            with reading(file.location):
                batch = opened.read_next_batch()
            yield batch
    except StopIteration:
        return
    except pa.ArrowInvalid as error:
        if "straddling" in str(error):
            raise DeclipError(
                f"list {file.location!r} has a line longer than {BLOCK_BYTES >> 20} MiB; mend it."
            ) from error
        raise DeclipError(
            f"list {file.location!r} cannot be read as tab-separated lines "
            f"({str(error).splitlines()[0][:200].rstrip('.')}); fetch it again."
        ) from error


def _not_such(file: ListFile, num_fields: int, row: int) -> DeclipError:
    return DeclipError(
        f"list {file.location!r} has more lines that are not of {num_fields} tab-separated fields "
        f"than lines that are (row {row} is one; the first is 0); it is another kind of list, or "
        "damaged."
    )


class PairLines:
    """CC3M (caption, url), its labelled train file (five fields), or CC12M (url, caption)."""

    def __init__(self, files: Sequence[ListFile], founds: Sequence[Found]) -> None:
        self.kind = founds[0].kind
        self._files, self._founds = list(files), list(founds)
        is_labelled = any(found.num_fields == 5 for found in founds)
        extras = LABELLED[2:] if is_labelled else ()
        self.schema = pa.schema(
            [("url", pa.string()), ("caption", pa.string()), *((x, pa.string()) for x in extras)]
        )

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self._files)

    def read(self, on_bytes: OnBytes, max_rows: int | None = None) -> Iterator[Rows]:
        """The rows of all files in turn; ``max_rows`` of them in all."""
        left = max_rows
        for file, found in zip(self._files, self._founds, strict=True):
            names = {
                "cc3m": LABELLED[: found.num_fields],
                "cc12m": ("url", "caption"),
            }[self.kind]
            blocks = read_lines(file, names, on_bytes, has_header=found.has_header)
            for numbers, table, bad in blocks:
                rows = self._rows(file, numbers, table).with_lost_rows(bad)
                if left is not None:
                    rows = first_rows(rows, left)
                    left -= len(rows.numbers)
                yield rows
                if left == 0:
                    return

    def _rows(self, file: ListFile, numbers: npt.NDArray[np.int64], raw: pa.Table) -> Rows:
        arrays, bad = [], {}
        for name in self.schema.names:
            if name not in raw.column_names:
                arrays.append(pa.nulls(raw.num_rows, pa.string()))
                continue
            array, bad[name] = to_text(raw[name])
            arrays.append(array)
        rows = Rows(
            name=file.name,
            numbers=numbers,
            table=pa.table(arrays, schema=self.schema),
            faults=np.zeros(raw.num_rows, np.uint8),
        )
        for name, mask in bad.items():
            rows = rows.with_fault(_REASONS.get(name, "bad_row"), mask)
        return rows


_REASONS = {"url": "bad_url", "caption": "bad_caption"}


def read_hashes(files: Sequence[ListFile], founds: Sequence[Found]) -> tuple[DigestTable, str]:
    """CC12M's hash file: URL -> digest, in 52 bytes a row (sha256) or 36 (md5 alone).

    Returns:
        The table, and the algorithm of its digests.

    Raises:
        DeclipError: no such file.
    """
    keys: list[Digests] = []
    values: list[npt.NDArray[np.uint8]] = []
    algorithm = ""
    for file, found in zip(files, founds, strict=True):
        if found.kind != "hashes":
            raise DeclipError(
                f"{file.location!r}, named with hashes, is no file of URLs and their sha256 or "
                f"md5 (it looks like {found.kind}); name CC12M's hash file."
            )
        names = tuple(f"f{i}" for i in range(found.num_fields))
        for _, table, _ in read_lines(file, names, lambda count: None, has_header=found.has_header):
            if not table.num_rows:
                continue
            url, digest, algorithm = _hash_columns(file, table, algorithm)
            is_good = ~to_mask(pc.is_null(digest)) & ~to_mask(pc.is_null(url))
            mask = pa.array(is_good)
            keys.append(digest_texts(url.filter(mask)))
            values.append(_hex_bytes(digest.filter(mask), algorithm))
    high = np.concatenate([k.high for k in keys] or [np.zeros(0, np.uint64)])
    low = np.concatenate([k.low for k in keys] or [np.zeros(0, np.uint64)])
    keys.clear()
    width = {"sha256": 32, "md5": 16}.get(algorithm, 32)
    data = np.concatenate(values or [np.zeros((0, width), np.uint8)])
    return DigestTable(Digests(high=high, low=low), data), algorithm or "sha256"


def _hash_columns(
    file: ListFile, table: pa.Table, algorithm: str
) -> tuple[pa.Array, pa.Array, str]:
    """The URL column and that of the longest digests, told by what stands in them."""
    url: pa.Array | None = None
    by_name: dict[str, pa.Array] = {}
    for column in table.column_names:
        texts, _ = to_text(table[column])
        texts = pc.utf8_trim_whitespace(texts)
        if to_mask(pc.match_substring(texts, "://")).mean() > 0.5:
            url = texts
            continue
        for name in ("sha256", "md5"):
            tagged = tag_hashes(texts, name)
            if 2 * tagged.null_count < len(tagged):
                by_name[name] = tagged
    chosen = algorithm or next((name for name in ("sha256", "md5") if name in by_name), "")
    if url is None or chosen not in by_name:
        raise DeclipError(
            f"{file.location!r}, named with hashes, must hold URLs and their sha256 or md5, "
            "tab-separated and of one kind throughout; name CC12M's hash file."
        )
    return url, by_name[chosen], chosen


def _hex_bytes(tagged: pa.Array, algorithm: str) -> npt.NDArray[np.uint8]:
    """(n, width) bytes of tagged hex digests."""
    width = {"sha256": 32, "md5": 16}[algorithm]
    data = bytes.fromhex("".join(pc.utf8_slice_codeunits(tagged, len(algorithm) + 1).to_pylist()))
    return np.frombuffer(data, np.uint8).reshape(-1, width)


def look_up_hashes(
    table: DigestTable, algorithm: str, urls: pa.Array | pa.ChunkedArray
) -> pa.Array:
    """The digest of each URL as ``sha256:<hex>``; null where there is none."""
    values, is_found = table.look_up(digest_texts(urls.fill_null("")))
    text = values.tobytes().hex()
    width = 2 * values.shape[1]
    tagged = [
        f"{algorithm}:{text[i * width : (i + 1) * width]}" if found else None
        for i, found in enumerate(is_found)
    ]
    return pa.array(tagged, KINDS["expected_hash"])
