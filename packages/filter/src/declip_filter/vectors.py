"""All vectors of stored embeddings as one tall matrix, of which only what is asked for is read.

Rows are numbered through the shards in order, within a shard as stored: the numbering of the
index's ``rows.parquet`` and of a neighbor graph.
"""

import contextlib
import functools
import io
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from declip_filter.embeddings import KINDS, Half, Part, check_vectors, read_metadata
from declip_shards import DeclipError, Store, layout
from declip_shards.errors import did_you_mean

SIDES = (*KINDS, "both")
"""What a row may be: its text's vector, its image's, or both."""

MOST_OPEN = 256
"""Files that are mapped at a time; a process may often have no more than 1,024."""

Rows = npt.NDArray[np.int64]


def side_kinds(side: str) -> tuple[str, ...]:
    """The stored kinds that make up a side.

    Raises:
        DeclipError: an unknown side.
    """
    if side not in SIDES:
        raise DeclipError(f"kind is {side!r}.{did_you_mean(side, SIDES)}")
    return tuple(KINDS) if side == "both" else (side,)


@dataclass(frozen=True)
class StoredVectors:
    """Read-only matrix (num_rows, dim) of float16 unit vectors over the files of some shards.

    With side ``both`` a row is text and image vector one after the other, divided by the square
    root of two: still of unit length, and an inner product of two rows is the mean of the
    cosines of their texts and of their images.

    On a local disk the files are mapped, never read whole, and a few stay open at a time: a dataset
    has more shards than a process may have files. Elsewhere the file last used is kept.
    """

    store: Store
    name: str
    side: str
    parts: Sequence[Part]
    """One a shard, in the order of the shards; empty ones too."""
    _cache: OrderedDict[str, Half] = field(default_factory=OrderedDict, repr=False)
    """Open files, the one used last at the end."""

    @functools.cached_property
    def starts(self) -> Rows:
        """First row of each part, and the number of all rows at the end: (parts + 1,)."""
        counts = [part.num_rows for part in self.parts]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    @property
    def dim(self) -> int:
        """Length of a row: twice the encoder's where the side is ``both``."""
        return (self.parts[0].dim if self.parts else 0) * len(side_kinds(self.side))

    def reopened(self) -> "StoredVectors":
        """The same with no file open."""
        return StoredVectors(self.store, self.name, self.side, self.parts)

    def read(self, start: int, stop: int) -> Half:
        """Rows ``start`` to ``stop`` (not included): float16 (stop - start, dim)."""
        return self.take(np.arange(start, stop, dtype=np.int64))

    def take(self, rows: npt.NDArray[np.integer]) -> Half:
        """The rows named, in the order named: float16 (len(rows), dim).

        Raises:
            DeclipError: a file is missing, cut, or of another shape than its part says.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        found = np.empty((len(wanted), self.dim), dtype=np.float16)
        owner = np.searchsorted(self.starts, wanted, side="right") - 1
        for number in np.unique(owner).tolist():
            mine = np.flatnonzero(owner == number)
            local = wanted[mine] - self.starts[number]
            if len(local) and int(local[-1]) - int(local[0]) == len(local) - 1:
                chosen = slice(int(local[0]), int(local[-1]) + 1)
                if not np.array_equal(local, np.arange(chosen.start, chosen.stop)):
                    chosen = local
            else:
                chosen = local
            found[mine] = self._part_rows(number, chosen)
        return found

    def check_part(self, number: int) -> None:
        """Refuse a part with a row that is not finite or not of unit length, by file and key.

        Raises:
            DeclipError: the file, the sample's key and the remedy.
        """
        part = self.parts[number]
        if not part.num_rows:
            return
        keys = [str(row["key"]) for row in read_metadata(self.store, self.name, part)]
        for kind in side_kinds(self.side):
            path = layout.embedding_path(self.name, kind, part.partition)
            check_vectors(self._map(number, kind), part.dim, keys, repr(path))

    def _part_rows(self, number: int, chosen: "slice | Rows") -> Half:
        kinds = side_kinds(self.side)
        if len(kinds) == 1:
            return self._map(number, kinds[0])[chosen]
        halves = [self._map(number, kind)[chosen].astype(np.float32) for kind in kinds]
        return (np.concatenate(halves, axis=1) / np.float32(math.sqrt(2))).astype(np.float16)

    def _map(self, number: int, kind: str) -> Half:
        """A part's file as an array, mapped where it lies on a local disk."""
        part = self.parts[number]
        if kind not in part.kinds:
            raise DeclipError(
                f"embeddings {self.name!r} hold {', '.join(part.kinds)}, not {kind!r}; choose one "
                "of those, or embed again with it switched on."
            )
        path = layout.embedding_path(self.name, kind, part.partition)
        kept = self._cache.get(path)
        if kept is not None:
            with contextlib.suppress(KeyError):  # another thread may have closed it meanwhile
                self._cache.move_to_end(path)
            return kept
        most = MOST_OPEN if self.store.is_local else 1
        while len(self._cache) >= most:
            with contextlib.suppress(KeyError):
                self._cache.popitem(last=False)
        array: Half
        try:
            if self.store.is_local:
                array = np.load(self.store.local_path(path), mmap_mode="r", allow_pickle=False)
            else:
                array = np.load(io.BytesIO(self.store.read_bytes(path)), allow_pickle=False)
        except FileNotFoundError as error:
            raise DeclipError(f"{path!r} is missing; rerun the stage that embeds.") from error
        except (ValueError, EOFError) as error:
            raise DeclipError(
                f"{path!r} is damaged ({error}); delete it and rerun the stage that embeds."
            ) from error
        except OSError as error:
            raise DeclipError(
                f"{path!r} cannot be opened ({error.strerror or error}); give the process more "
                "files (ulimit -n) or mend the disk, and run the same command again."
            ) from error
        if array.shape != (part.num_rows, part.dim) or array.dtype != np.float16:
            raise DeclipError(
                f"{path!r} holds {array.dtype} of shape {array.shape} where float16 "
                f"({part.num_rows}, {part.dim}) is due; it is of another model or shard: delete it "
                "and rerun the stage that embeds."
            )
        self._cache[path] = array
        return array
