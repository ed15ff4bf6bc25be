"""Hashes of evaluated sets' files, read through once: a record of them lies in the feature cache.

A file is known again by its place, size and times, or by what a remote file system says of its
content (an ETag, a checksum); a file of which only the size is known is read each time. Ranks share
the reading without waiting for each other: each begins at a part of its own, writes down what it
has read, and goes on with what nobody has written down yet.
"""

import contextlib
import hashlib
import io
import itertools
import json
import logging
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from declip_eval.content_hashes import FileState, SetFile, hash_file, look_at
from declip_eval.labelled_sets import LabelledSet
from declip_shards.store import atomic_write
from pipelines.eval_cache_room import FolderHold
from pipelines.eval_ranks import Ranks
from pipelines.progress import Progress

log = logging.getLogger(__name__)

FORMAT = 1
"""Counts up when records change."""
MOST_PARTS = 128
"""Parts of a record, the unit that threads and ranks share out."""
REMOTE_THREADS = 16
"""Remote files that are read side by side, at least."""
SETTLED_NS = 2 * 10**9
"""A file that was changed less than this long ago is not put down: after another change within
the same tick of its disk's clock (2 s, of FAT) it would look the same."""

Known = dict[bytes, str]
"""What a file is known by -> its sha256 (hex)."""


class ContentHashes:
    """Gives sets their digests.

    Args:
        root: of the feature cache, shared by all ranks.
        ranks: this process and the others.
        num_threads: files that are read side by side.
    """

    def __init__(self, root: Path, ranks: Ranks, num_threads: int) -> None:
        self.root, self.ranks, self.num_threads = root, ranks, num_threads

    def digest(self, data: LabelledSet) -> str:
        """The digest of a set; what is on record of its files is not read again."""
        return data.digest(lambda files: self.hashes(files, f"eval: {data.name} {data.split}"))

    def hashes(self, files: Sequence[SetFile], name: str) -> list[str | None]:
        """sha256 (hex) of each file; None for one that cannot be read.

        Args:
            files: of one split of a set.
            name: of the split, for progress.
        """
        if not files:
            return []
        record = _Record(self.root, files)
        hold = FolderHold(record.folder)
        try:
            with ThreadPoolExecutor(self._num_threads(files[0]), "contents") as pool:
                known: Known = {}
                for part in pool.map(record.read, range(record.num_parts)):
                    known |= part
                found = list(pool.map(lambda n: record.find(n, known), range(record.num_parts)))
                missing = [number for number, part in enumerate(found) if None in part]
                if missing:
                    self._read(record, pool, known, found, missing, name)
        finally:
            hold.release()
        return list(itertools.chain.from_iterable(found))

    def _num_threads(self, file: SetFile) -> int:
        """A server is waited for more than it is worked for."""
        return self.num_threads if file.folder is None else max(self.num_threads, REMOTE_THREADS)

    def _read(
        self,
        record: "_Record",
        pool: ThreadPoolExecutor,
        known: Known,
        found: list[list[str | None]],
        missing: Sequence[int],
        name: str,
    ) -> None:
        """Read what is missing, own parts first, and put it down."""
        own = [n for n in missing if n % self.ranks.size == self.ranks.rank]
        others = [n for n in missing if n % self.ranks.size != self.ranks.rank]
        # Each rank begins elsewhere with what the others have left.
        turn = len(others) * self.ranks.rank // self.ranks.size
        order = [*own, *others[turn:], *others[:turn]]

        def work(number: int) -> tuple[int, list[str | None]]:
            return number, record.complete(number, known)

        with contextlib.ExitStack() as stack:
            bar = None
            if self.ranks.rank == 0:
                bar = stack.enter_context(Progress(f"{name}, files", len(order), unit="files"))
            for number, hashes in pool.map(work, order):
                found[number] = hashes
                if bar is not None:
                    bar.advance(len(hashes))


class _Record:
    """What was read of the files of one split, in parts that are written whole."""

    def __init__(self, root: Path, files: Sequence[SetFile]) -> None:
        self._files = files
        self._size = -(-len(files) // MOST_PARTS)
        # By where the set lies and the first folder in it, so that files may come and go.
        first = files[0]
        place = [first.place.removesuffix(first.name), first.name.partition("/")[0]]
        key = json.dumps({"kind": "contents", "format": FORMAT, "place": place}, sort_keys=True)
        self.folder = root / hashlib.sha256(key.encode()).hexdigest()[:32]

    @property
    def num_parts(self) -> int:
        return -(-len(self._files) // self._size)

    def files(self, number: int) -> Sequence[SetFile]:
        return self._files[number * self._size : (number + 1) * self._size]

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.npz"

    def read(self, number: int) -> Known:
        """What a part says; nothing where it is absent or damaged."""
        try:
            with np.load(self._path(number), allow_pickle=False) as file:
                rows: Iterator[tuple[bytes, bytes]] = zip(
                    *(map(bytes, file[name]) for name in ("keys", "hashes")), strict=True
                )
                return {key: digest.hex() for key, digest in rows}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return {}

    def find(self, number: int, known: Known) -> list[str | None]:
        """The hashes of a part's files, None for those that are not known as they are now."""
        states = [(file, look_at(file)) for file in self.files(number)]
        return [known.get(_key(file, state)) if state else None for file, state in states]

    def complete(self, number: int, known: Known) -> list[str | None]:
        """Read the files of a part that are not known yet, and put the part down."""
        later = self.read(number)  # Another rank may have been here meanwhile.
        now = time.time_ns()
        hashes: list[str | None] = []
        rows: list[tuple[bytes, str]] = []
        for file in self.files(number):
            state = look_at(file)
            key = _key(file, state) if state else b""
            content = known.get(key) or later.get(key)
            if content is None:
                content, state = hash_file(file)
            hashes.append(content)
            if content and state and state.changed_ns < now - SETTLED_NS:
                rows.append((_key(file, state), content))
        self._write(number, rows)
        return hashes

    def _write(self, number: int, rows: Sequence[tuple[bytes, str]]) -> None:
        if not rows:
            return
        content = io.BytesIO()
        np.savez(
            content,
            keys=np.frombuffer(b"".join(key for key, _ in rows), np.uint8).reshape(-1, 16),
            hashes=np.frombuffer(
                b"".join(bytes.fromhex(digest) for _, digest in rows), np.uint8
            ).reshape(-1, 32),
        )
        try:
            atomic_write(self._path(number), content.getbuffer())
        except OSError as error:
            log.warning(
                "what was read of a set's files cannot be put down in %s (%s), so they are read "
                "again next time; make room there, or name another --feature-root",
                *(self.folder, error.strerror),
            )


def _key(file: SetFile, state: FileState) -> bytes:
    text = json.dumps([file.place, state.text])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
