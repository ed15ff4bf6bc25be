"""Ledgers made up to show exactly one trouble, for the tests of the doctor."""

from collections.abc import Iterable
from typing import Any

from declip_ingest.failures import DECODE_REASONS
from declip_ingest.ledger import LedgerRow, ledger_table
from declip_ingest.ledger_stats import LedgerStats, add_rows

Row = dict[str, Any]


def rows(count: int, reason: str = "", *, hosts: int = 20, host: str = "h{}.example",
         scheme: str = "http", **values: Any) -> list[Row]:  # fmt: skip
    """``count`` rows that ended alike, spread over ``hosts`` hosts."""
    answered = not reason or reason.startswith("http_")
    defaults = {
        "reason": reason,
        "scheme": scheme,
        "http_status": (int(reason[5:]) if reason else 200) if answered else None,
        "attempts": 1,
        "milliseconds": 300,
        "num_bytes": 40_000 if not reason else None,
    }
    return [{**defaults, "host": host.format(i % hosts), **values} for i in range(count)]


def web(count: int = 1000) -> list[Row]:
    """A healthy download: what the web always does, and nothing else."""
    return [
        *rows(count * 95 // 100, scheme="https"),
        *rows(count * 2 // 100, "http_404"),
        *rows(count // 100, "dns_failure", host="gone{}.example"),
        *rows(count // 100, "timeout", host="slow{}.example", milliseconds=10_000),
        *rows(count // 200, "not_image", http_status=200),
        *rows(count // 200, "tls_error", scheme="https", host="old{}.example"),
    ]


def ledger_rows(made: Iterable[Row]) -> list[LedgerRow]:
    """The rows as the ledger has them, under keys of their own."""
    found = []
    for number, row in enumerate(made):
        row = dict(row)
        scheme, reason = row.pop("scheme"), row["reason"]
        status = "failed_to_resize" if reason in DECODE_REASONS else "failed_to_download"
        found.append(
            LedgerRow(
                key=f"{number:09d}",
                url=f"{scheme}://{row['host']}/{number}.jpg",
                status=status if reason else "success",
                attempted_at="2026-01-01T00:00:00Z",
                **row,
            )
        )
    return found


def stats_of(*made: Iterable[Row]) -> LedgerStats:
    """Figures of such rows, in shards of 97."""
    stats = LedgerStats()
    every = ledger_rows(row for part in made for row in part)
    for start in range(0, len(every), 97):
        add_rows(stats, ledger_table(every[start : start + 97]))
    return stats


CONTENT_TROUBLES = {
    "opted_out": [web(), rows(60, "opted_out", http_status=200), rows(30, "robots_denied")],
    "placeholders": [web(), rows(60, "repeated_image", http_status=200)],
    "wrong_hash_column": [rows(400, "hash_mismatch", http_status=200), rows(60)],
    "changed_pictures": [web(), rows(150, "hash_mismatch", http_status=200)],
    "strict_sizes": [web(), rows(200, "image_too_small", http_status=200)],
    "decoder_trouble": [web(), rows(6, "decoder_memory", http_status=200)],
    "no_pictures": [web(), rows(150, "corrupt_image", http_status=200)],
    "bad_list": [web(), rows(80, "missing_caption"), rows(40, "bad_scheme")],
}
"""Cause -> a ledger that shows it alone: the list's, the pictures' and the settings' side."""
