"""What must hold of a dataset that was made of a list of trouble, whatever the trouble was."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from declip_ingest.failures import DECODE_REASONS, reason_of
from declip_ingest.ledger import read_ledger
from declip_shards import Store, layout, read_samples
from declip_shards.sidecars import read_table

if TYPE_CHECKING:
    from tests.ingest.chaos_kinds import BY_NAME, PLAIN, Kind, Row
else:
    from chaos_kinds import BY_NAME, PLAIN, Kind, Row

OVERSHOOT_SECONDS = 1.0
"""That a row may take beyond its time."""
KILLERS = ("decoder_crash", "decoder_timeout", "decoder_memory")


@dataclass(kw_only=True)
class KindFigures:
    """What became of the rows of one kind."""

    kind: Kind
    rows: int = 0
    got: Counter[str] = field(default_factory=Counter)
    slowest_milliseconds: int = 0


@dataclass(kw_only=True)
class Verdict:
    """All rows together."""

    kinds: dict[str, KindFigures] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """What should not be; empty where all is well."""
    num_ok: int = 0
    num_failed: int = 0

    def table(self) -> str:
        """kind | rows | expected | got | slowest."""
        lines = [f"{'kind':<20}{'no.':>4}{'rows':>6}  {'slowest s':>9}  got (expected)"]
        for figures in sorted(self.kinds.values(), key=lambda f: (f.kind.row, f.kind.name)):
            got = ", ".join(f"{name or 'ok'} {n}" for name, n in figures.got.most_common())
            expected = "|".join(name or "ok" for name in figures.kind.reasons)
            lines.append(
                f"{figures.kind.name:<20}{figures.kind.row:>4}{figures.rows:>6}  "
                f"{figures.slowest_milliseconds / 1000:>9.2f}  {got} ({expected})"
            )
        return "\n".join(lines)


def kind_of(name: str) -> Kind:
    """The kind that a row's column names."""
    return PLAIN if name == PLAIN.name else BY_NAME[name]


def judge(
    root: Path,
    rows: Sequence[Row],
    shard_size: int,
    timeout_seconds: float,
    overshoot_seconds: float = OVERSHOOT_SECONDS,
) -> Verdict:
    """Compare a finished dataset with the list that it was made of, row by row."""
    store = Store(str(root))
    verdict = Verdict()
    seconds = timeout_seconds + overshoot_seconds
    ledger = {row["key"]: row for row in read_ledger(store).to_pylist()}
    stored: dict[str, bytes] = {}
    found: list[Row] = []
    for number in range(-(-len(rows) // shard_size)):
        shard = layout.shard_name(number)
        found += read_table(store, layout.shard_parquet_path(shard)).to_pylist()
        stored |= {sample.key: sample.image for sample in read_samples(store, shard)}
    if len(found) != len(rows):
        verdict.faults.append(f"{len(rows)} rows in the list, {len(found)} in the shards")
    for number, (row, now) in enumerate(zip(rows, found, strict=False)):
        kind = kind_of(row["kind"])
        faults = [
            *_row_faults(row, now, kind, number, shard_size),
            *_ledger_faults(now, ledger.pop(now["key"], None), kind, seconds),
            *_stored_faults(store, now, stored.pop(now["key"], None)),
        ]
        verdict.faults += [f"row {number} ({kind.name}, {row['url']!r:.120}): {f}" for f in faults]
        verdict.num_ok += now["status"] == "success"
        verdict.num_failed += now["status"] != "success"
        figures = verdict.kinds.setdefault(kind.name, KindFigures(kind=kind))
        figures.rows += 1
        figures.got[_reason(now)] += 1
    verdict.faults += [f"the ledger has a row {key!r} of no shard" for key in ledger]
    verdict.faults += [f"the tars have a sample {key!r} of no row" for key in stored]
    _add_times(verdict, store, rows)
    return verdict


def _add_times(verdict: Verdict, store: Store, rows: Sequence[Row]) -> None:
    for row, line in zip(rows, read_ledger(store).to_pylist(), strict=False):
        figures = verdict.kinds[row["kind"]]
        figures.slowest_milliseconds = max(figures.slowest_milliseconds, line["milliseconds"])


def _reason(row: Row) -> str:
    return (row["error_message"] or "").partition(":")[0]


def _row_faults(row: Row, now: Row, kind: Kind, number: int, shard_size: int) -> list[str]:
    faults = []
    key = layout.sample_key(number // shard_size, number % shard_size, shard_size)
    if now["key"] != key:
        faults.append(f"its key is {now['key']}, not {key}")
    reason = _reason(now)
    if reason not in kind.reasons:
        expected = "|".join(name or "ok" for name in kind.reasons)
        faults.append(f"it ended as {now['error_message'] or 'ok'!r}, expected {expected}")
    if now["status"] != "success":
        try:
            reason_of(reason)
        except KeyError:
            faults.append(f"{reason!r} is no reason of the vocabulary")
        wanted = "failed_to_resize" if reason in DECODE_REASONS else "failed_to_download"
        if now["status"] != wanted:
            faults.append(f"{reason} has status {now['status']}, not {wanted}")
    kept = ("url", "caption", "expected_hash", "boxes", "kind")
    for name in kept:
        value = None if kind.opted_out else row[name]
        if now[name] != value:
            faults.append(f"{name} is {now[name]!r:.80}, not {value!r:.80}")
    return faults


def _ledger_faults(now: Row, line: dict[str, Any] | None, kind: Kind, seconds: float) -> list[str]:
    if line is None:
        return ["the ledger has no line of it"]
    faults = []
    if (line["status"], line["reason"]) != (now["status"], _reason(now)):
        faults.append(f"the ledger says {line['status']} {line['reason']!r}")
    limit = seconds + kind.extra_seconds
    if line["milliseconds"] > 1000 * limit:
        faults.append(f"it took {line['milliseconds']} ms, its limit is {limit:g} s")
    return faults


def _stored_faults(store: Store, now: Row, image: bytes | None) -> list[str]:
    faults = []
    if (now["status"] == "success") != (image is not None):
        faults.append(f"{now['status']}, yet the tar has {'a' if image else 'no'} picture of it")
    if image is not None:
        if not (image.startswith(b"\xff\xd8\xff") and image.endswith(b"\xff\xd9")):
            faults.append("what is stored is no whole JPEG, or has something behind it")
        if b"Exif\0\0" in image[:4096] or b"serial " in image[:4096]:
            faults.append("what is stored holds metadata of the original")
    is_quarantined = store.exists(layout.quarantine_path(now["key"]))
    if is_quarantined != (_reason(now) in KILLERS):
        faults.append(f"its bytes are {'' if is_quarantined else 'not '}in quarantine")
    return faults


def digests(root: Path) -> dict[str, str]:
    """sha256 of every file of the shards that may not differ between two runs."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((root / "shards").iterdir())
        if not path.name.endswith("_stats.json")
    }
