"""A dataset folder with a list of trouble in it, ready to be ingested."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from declip_shards import Store
from declip_shards.optout import LIST, make_optout

if TYPE_CHECKING:
    from tests.ingest.chaos_kinds import Row, listed_digest
    from tests.ingest.chaos_server import Places
else:
    from chaos_kinds import Row, listed_digest
    from chaos_server import Places

SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("expected_hash", pa.string()),
        ("boxes", pa.list_(pa.list_(pa.float64()))),
        ("kind", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of the time that the rows of a run may take."""

    timeout_seconds: float = 3.0
    decode_timeout_seconds: float = 2.0


def settings(folder: Path, places: Places, limits: Limits) -> dict[str, Any]:
    """The stage's settings beside its root and shard size; writes the files that they name."""
    folder.mkdir(parents=True, exist_ok=True)
    lists = {}
    for name in ("blocked", "placeholder"):
        lists[name] = folder / f"{name}.txt"
        lists[name].write_text(f"{listed_digest(name)}  chaos\n")
    return {
        "allow_addresses": places.allowed(),
        "blocklists": (str(lists["blocked"]),),
        "placeholders": (str(lists["placeholder"]),),
        "boxes_column": "boxes",
        "min_image_size": 4,
        "max_body_bytes": 2_000_000,
        "timeout_seconds": limits.timeout_seconds,
        "first_byte_timeout_seconds": limits.timeout_seconds,
        "connect_timeout_seconds": min(2.0, limits.timeout_seconds),
        "decode_timeout_seconds": limits.decode_timeout_seconds,
        "decode_memory_bytes": 256 << 20,
        "max_retry_after_seconds": 5.0,
    }


def write_dataset(root: Path, rows: Sequence[Row], opted_out: Sequence[str]) -> None:
    """The list and the opt-out list."""
    (root / "source").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), root / "source/pairs.parquet")
    store = Store(str(root))
    store.write_bytes(LIST, make_optout([("url", url) for url in opted_out]).pack())
