"""Where a run reads its dataset and where it writes: two folders, of which the first may be a URL.

What is read of a remote dataset are listings and small tables, each fetched whole and asked for
again where the network fails (:class:`RemoteStore`), and large files by place
(:mod:`declip_train.tar_cache`). What is written (checkpoints, logs, exports) needs renames and
locks that hold, so it lies on a disk.
"""

from __future__ import annotations

import contextlib
import io
import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from declip_shards import DeclipError, Store, layout
from declip_shards.store import TEMPORARY_MARK
from declip_train.network_tries import asked_again, is_final, words_of

__all__ = ["RemoteStore", "finished_shards", "open_dataset", "output_folder"]

_Answer = TypeVar("_Answer")


class RemoteStore(Store):
    """A dataset at a URL, to be read: whatever the network does, its files are there, are not, or
    cannot be reached, and the last is said in words.

    Raises:
        FileNotFoundError: by what reads a file that is not there.
        DeclipError: by everything, where the URL cannot be reached.
    """

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return (RemoteStore, (self.url,))

    def exists(self, relative: str) -> bool:
        try:
            self._asked(relative, lambda: self.fs.info(self.path(relative)))
        except FileNotFoundError:
            return False
        return True

    def read_bytes(self, relative: str) -> bytes:
        return self._asked(relative, lambda: bytes(self.fs.cat_file(self.path(relative))))

    @contextlib.contextmanager
    def open(self, relative: str) -> Iterator[BinaryIO]:
        """Open for reading, seekable: tables are fetched whole."""
        yield io.BytesIO(self.read_bytes(relative))

    def list(self, folder: str, suffix: str = "") -> list[str]:
        full = self.path(folder)
        self.fs.invalidate_cache(full)
        try:
            infos = self._asked(folder, lambda: self.fs.ls(full, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (posixpath.basename(i["name"].rstrip("/")) for i in infos if i["type"] == "file")
        return sorted(n for n in names if n.endswith(suffix) and TEMPORARY_MARK not in n)

    def _asked(self, relative: str, ask: Callable[[], _Answer]) -> _Answer:
        try:
            return asked_again(ask)
        except (FileNotFoundError, NotADirectoryError) as error:
            if is_final(error):
                raise
            fault: Exception = error
        except Exception as error:  # file systems raise what they like
            fault = error
        raise DeclipError(
            f"{relative!r} of the dataset {self.url!r} cannot be reached ({words_of(fault)}); "
            "correct the address, see that this machine may read it, or start again when the "
            "network is back."
        ) from fault


def open_dataset(url: str) -> Store:
    """A dataset to read.

    Args:
        url: a folder, or any fsspec URL.

    Raises:
        DeclipError: nothing that is installed opens such a URL.
    """
    try:
        store = Store(url)
    except (ValueError, ImportError) as error:
        raise DeclipError(
            f"the dataset {url!r} is of a kind that fsspec cannot open here ({error}); correct "
            "it, or install the package that serves it (s3fs, gcsfs, ...)."
        ) from error
    return store if store.is_local else RemoteStore(url)


def finished_shards(store: Store) -> list[str]:
    """The shards of a dataset.

    Raises:
        DeclipError: it has none.
    """
    shards = layout.list_shards(store)
    if shards:
        return shards
    if not store.is_local and store.exists(layout.manifest_path("ingest")):
        raise DeclipError(
            f"the dataset {store.url!r} has a manifest of ingest, but its shards are not listed: "
            "its server lists no folders, or they were removed; use a server that lists (s3://, "
            "gs://, HTTP with index pages), or bring them back."
        )
    raise DeclipError(f"{store.url!r} holds no finished shard; run ingest, or correct the folder.")


def output_folder(root: str) -> Path:
    """The folder of this machine that a run writes ``train/`` into.

    Raises:
        DeclipError: ``root`` is elsewhere.
    """
    store = open_dataset(root)
    if not store.is_local:
        raise DeclipError(
            f"{root!r} is no folder of this machine, and training writes checkpoints, logs and "
            f"exports into one; name a local folder for them (--out, root in a configuration) and "
            f"give the dataset by --train.data-root {root} (data_root)."
        )
    return Path(store.path("."))
