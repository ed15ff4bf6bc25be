"""Copy samples from tar to tar as they lie there: headers, bytes and padding, nothing decoded."""

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

from declip_filter.repack_plan import Piece
from declip_shards import DeclipError, Store, layout
from declip_shards.reader import TAR_BLOCK


@dataclass(frozen=True)
class Span:
    """Where all members of a sample lie in a tar."""

    key: str
    start: int
    """First byte of its first header."""
    stop: int
    """First byte behind its last member's padding."""


def sample_spans(store: Store, path: str) -> list[Span]:
    """Every sample of a tar, in the tar's order.

    Raises:
        DeclipError: the tar is damaged or cut, a member is no plain file, or the members of a key
            do not follow one another.
    """
    spans: list[Span] = []
    seen: set[str] = set()
    try:
        with store.open(path) as f:
            with tarfile.open(fileobj=f, mode="r:") as tar:
                for info in tar:
                    if not info.isreg():
                        raise DeclipError(f"{path!r}: member {info.name!r} is not a plain file.")
                    key = info.name.partition(".")[0]
                    stop = info.offset_data + -(-info.size // TAR_BLOCK) * TAR_BLOCK
                    if spans and spans[-1].key == key:
                        spans[-1] = Span(key, spans[-1].start, stop)
                        continue
                    if key in seen:
                        raise DeclipError(
                            f"{path!r}: the members of sample {key!r} do not follow one another, "
                            "so no reader of webdataset sees it whole; write this tar anew with "
                            "the members of a key together, or ingest its shard again."
                        )
                    seen.add(key)
                    spans.append(Span(key, info.offset, stop))
            end = spans[-1].stop if spans else 0
            f.seek(end)
            tail = f.read()
    except tarfile.TarError as error:
        raise DeclipError(f"{path!r} is not a readable tar ({error}); rerun ingest.") from error
    # tarfile takes a damaged header for the end of the archive and says nothing.
    if len(tail) < 2 * TAR_BLOCK or tail.strip(b"\0"):
        raise DeclipError(
            f"{path!r} is damaged after byte {end}: rerun ingest to fetch this shard again."
        )
    return spans


def check_digest(store: Store, path: str, digest: str) -> None:
    """Refuse a tar whose bytes are not those that ingest wrote; ``""`` where nobody knows.

    Raises:
        DeclipError: the file has changed.
    """
    if digest and store.sha256(path) != digest:
        raise DeclipError(
            f"{path!r} is damaged or was changed since it was written; make it again with declip "
            "run, then repack again."
        )


def copy_samples(store: Store, pieces: Sequence[Piece]) -> bytearray:
    """A tar of the pieces' samples, byte for byte as they lie in their tars.

    Returns:
        The whole tar: within a piece in the order of its tar, at the end two empty blocks and
        padding to whole records, as tar writers do.

    Raises:
        DeclipError: a tar is missing or damaged, or lacks one of the samples.
    """
    made = bytearray()
    for piece in pieces:
        path = layout.tar_path(piece.shard)
        if not store.exists(path):
            raise DeclipError(f"{path!r} is missing; rerun ingest.")
        wanted = set(piece.names())
        taken = [span for span in sample_spans(store, path) if span.key in wanted]
        if len(taken) != len(wanted):
            lost = min(wanted - {span.key for span in taken})
            raise DeclipError(
                f"{path!r} has no sample {lost!r}, which is kept; rerun the filter, or ingest if "
                "the shard's table lists it as a success."
            )
        with store.open(path) as f:
            for start, stop in _joined(taken):
                f.seek(start)
                data = f.read(stop - start)
                if len(data) != stop - start:
                    raise DeclipError(f"{path!r} is cut short at byte {start + len(data)}.")
                made += data
    made += bytes(2 * TAR_BLOCK)
    made += bytes(-len(made) % tarfile.RECORDSIZE)
    return made


def _joined(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Ranges of bytes; samples that follow one another are read at once."""
    ranges: list[tuple[int, int]] = []
    for span in spans:
        if ranges and ranges[-1][1] == span.start:
            ranges[-1] = (ranges[-1][0], span.stop)
        else:
            ranges.append((span.start, span.stop))
    return ranges
