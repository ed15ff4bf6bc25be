"""Write a checkpoint's files, at once or in a thread while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from declip_train.checkpoint_files import FileRecord, StateFile, write_bytes, write_state

__all__ = ["BackgroundWrite", "write_files"]


def write_files(folder: Path, files: Sequence[StateFile]) -> tuple[str | None, list[FileRecord]]:
    """Write files durably.

    Returns:
        Why one could not be written, in words (None when all were), and the records of those that
        were.
    """
    records = []
    try:
        for file in files:
            write = write_bytes if isinstance(file.content, bytes) else write_state
            records.append(write(folder / file.name, file.content))
    except OSError as error:
        return error.strerror or str(error), records
    return None, records


class BackgroundWrite:
    """Files on their way to the disk. The tensors in them must be copies that nobody changes.

    Not a daemon thread: an interpreter that ended under it would leave torch's writer in mid-air.

    Args:
        folder: to write to.
        files: what to write.
        step: of the checkpoint.
    """

    def __init__(self, folder: Path, files: Sequence[StateFile], step: int) -> None:
        self.step = step
        self._outcome: tuple[str | None, list[FileRecord]] | None = None
        self._fault: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(folder, tuple(files)), name="save-checkpoint"
        )
        self._thread.start()

    def _run(self, folder: Path, files: tuple[StateFile, ...]) -> None:
        try:
            self._outcome = write_files(folder, files)
        except BaseException as error:  # Told by result(), on the thread that can act on it.
            self._fault = error

    @property
    def is_done(self) -> bool:
        """Whether the files are written, or cannot be."""
        return not self._thread.is_alive()

    def result(self) -> tuple[str | None, list[FileRecord]]:
        """What :func:`write_files` returned; waits for it."""
        self._thread.join()
        if self._fault is not None:
            raise self._fault
        assert self._outcome is not None
        return self._outcome
