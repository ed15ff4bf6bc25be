"""Check that a shard is what its tables say."""

from declip_shards import layout, reader, sidecars
from declip_shards.store import Store


def check_shard(store: Store, shard: str) -> list[str]:
    """What is wrong with a shard, in words; empty when tar and parquet agree.

    The tar must hold exactly the rows whose status is ``success``, in the order of their keys.
    """
    rows = sidecars.read_rows(store, layout.shard_parquet_path(shard), ["key", "status"])
    expected = sorted(r["key"] for r in rows if r["status"] == "success")
    found = [sample.key for sample in reader.read_samples(store, shard)]
    faults = []
    if len({r["key"] for r in rows}) != len(rows):
        faults.append(f"shard {shard}: a key occurs twice in the parquet")
    if found != sorted(found):
        faults.append(f"shard {shard}: keys of the tar are not in order")
    if sorted(found) != expected:
        lost = sorted(set(expected) - set(found))[:3]
        extra = sorted(set(found) - set(expected))[:3]
        faults.append(
            f"shard {shard}: tar has {len(found)} samples, parquet says {len(expected)} "
            f"(missing {lost}, unknown {extra})"
        )
    return faults
