"""Which neighbor tables a training run reads or is about to read, told to who removes old ones.

    train/tables.lock    the tables' folders as JSON; its kernel lock is held by who reads or writes

A run decides on a table epochs before its log names it, and a checkpoint may bring back one that is
in use no more. So the decision and its note are made under one lock, and so are the look at the
note and the removal of a table's mark: either the note is seen, or the run finds the mark gone.
The note counts as long as its run holds ``train/lock``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Collection, Iterator
from pathlib import Path

NOTE = "tables.lock"


class TablesInUse:
    """The note, while its lock is held."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> frozenset[str]:
        """Folders under ``neighbors/``; none where nothing was noted (a kill may have torn it)."""
        try:
            folders = json.loads(self._path.read_bytes())
        except ValueError:
            return frozenset()
        return frozenset(map(str, folders)) if isinstance(folders, list) else frozenset()

    def write(self, folders: Collection[str]) -> None:
        """Replace what is noted. In place: another file would not be the one that is locked."""
        self._path.write_bytes(json.dumps(sorted(folders)).encode())


@contextlib.contextmanager
def hold_tables(folder: Path) -> Iterator[TablesInUse]:
    """Hold the lock of the note in ``folder`` (the dataset's train/); waits for who has it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NOTE
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield TablesInUse(path)
