"""Read selections, and refuse one that keeps nothing."""

from collections import Counter
from collections.abc import Sequence

import pyarrow.compute as pc

from declip_filter.rules import SCHEMA
from declip_filter.signals import read_successes
from declip_shards import DeclipError, Store, layout, sidecars


def selected_keys(store: Store, name: str, shard: str) -> list[str]:
    """Keys of a shard's kept samples, in order; ``name=""`` means every success.

    Raises:
        DeclipError: the selection is missing or damaged.
    """
    if not name:
        return [str(row["key"]) for row in read_successes(store, shard, ["key"])]
    table = sidecars.read_table(store, layout.selection_path(name, shard), SCHEMA.names)
    return sorted(table.filter(table.column("keep")).column("key").to_pylist())


def require_selection(store: Store, name: str, shards: Sequence[str]) -> None:
    """Refuse a selection that keeps no sample of the whole dataset.

    A stage that reads a selection calls this once a process. Reading stops at the first shard
    that keeps a sample, so it costs one small file as a rule.

    Raises:
        DeclipError: no sample is kept; the drop reasons are named, most frequent first.
    """
    if any(selected_keys(store, name, shard) for shard in shards):
        return
    if not name:
        raise DeclipError(
            f"0 of the samples in {len(shards)} shards were downloaded: there is nothing to work "
            "on; look at the reasons in the shards' parquet and rerun ingest."
        )
    reasons: Counter[str] = Counter()
    for shard in shards:
        path = layout.selection_path(name, shard)
        counted = pc.value_counts(sidecars.read_table(store, path, ["reason"]).column("reason"))
        reasons.update({entry["values"]: entry["counts"] for entry in counted.to_pylist()})
    told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(5))
    raise DeclipError(
        f"selection {name!r} has 0 samples kept of {reasons.total()} (dropped: {told or 'none'}); "
        "loosen the rule that drops most and rerun the filter."
    )
