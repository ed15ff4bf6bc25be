"""Change several files of a dataset as one: all of it or nothing, whenever the process dies.

Refetch and opt-out replace a tar, its parquet, its stats and its receipt together. Each is one
rename by itself, but a kill between two of them would leave a tar that no receipt knows. So the new
files are written aside first, then a list of the moves, then the moves are made; who finds such a
list makes the moves that are still to make.
"""

import hashlib
import json
from collections.abc import Mapping

from declip_shards.errors import DeclipError
from declip_shards.manifest import canonical_json
from declip_shards.store import Store

FOLDER = "staging"
"""Where transactions lie while they are prepared; empty between runs."""
COMMIT = "commit.json"
"""A transaction's list of moves; it is written last, and decides."""


def prepare(store: Store, transaction: str, files: Mapping[str, bytes | None]) -> None:
    """Write the new files aside, and the list of moves last: from then on they will happen.

    Args:
        store: the dataset.
        transaction: name, unique among those that are open.
        files: relative path -> its new bytes; None removes the file.
    """
    moves = []
    for number, (path, data) in enumerate(sorted(files.items())):
        if data is None:
            moves.append({"to": path, "from": None, "sha256": None})
            continue
        staged = f"{FOLDER}/{transaction}/{number:05d}"
        store.write_bytes(staged, data)
        moves.append({"to": path, "from": staged, "sha256": hashlib.sha256(data).hexdigest()})
    store.write_bytes(f"{FOLDER}/{transaction}/{COMMIT}", canonical_json(moves))


def commit(store: Store, transaction: str) -> None:
    """Make a prepared transaction's moves, those that are still to make, and forget it.

    Raises:
        DeclipError: a file that was set aside is gone and its target is not the new one.
    """
    listing = f"{FOLDER}/{transaction}/{COMMIT}"
    for move in json.loads(store.read_bytes(listing)):
        if move["from"] is None:
            store.remove(move["to"])
        elif store.exists(move["from"]):
            store.move(move["from"], move["to"])
        elif not store.exists(move["to"]) or store.sha256(move["to"]) != move["sha256"]:
            raise DeclipError(
                f"the change of {move['to']!r} in {store.url!r} was cut short and its new bytes "
                f"are gone from {move['from']!r}; restore the folder {FOLDER}/ or ingest again."
            )
    store.remove(listing)
    _forget(store, transaction)


def recover(store: Store) -> list[str]:
    """Finish the transactions whose list of moves stands; forget those without one.

    Returns:
        Names of the finished ones. Call it under the workspace's lock.
    """
    finished = []
    for transaction in store.list_folders(FOLDER):
        if store.exists(f"{FOLDER}/{transaction}/{COMMIT}"):
            commit(store, transaction)
            finished.append(transaction)
        else:
            _forget(store, transaction)
    return finished


def _forget(store: Store, transaction: str) -> None:
    store.remove_folder(f"{FOLDER}/{transaction}")
