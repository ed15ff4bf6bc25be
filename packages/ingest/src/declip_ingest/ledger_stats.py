"""Figures of a ledger, read shard by shard: what the doctor judges by.

Memory does not grow with the dataset: times are kept as histograms, hosts as the busiest ones.
"""

import heapq
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from declip_ingest.failures import reason_of
from declip_ingest.ledger import iter_ledgers, no_ledger
from declip_shards import Store

COLUMNS = ("url", "host", "reason", "http_status", "attempts", "milliseconds", "num_bytes")
SILENT_GROUPS = ("dns", "connection", "timeout", "url", "row", "tls")
"""Families of reasons that do not tell of an answer."""
SILENT = ("robots_unavailable", "opt_out_list")
"""Further such reasons."""
REDIRECTED = ("bad_redirect", "redirect_loop")
"""Reasons of family ``url`` that do."""
MAX_HOSTS = 50_000
"""Hosts that are remembered; beyond twice as many, those with the fewest rows are forgotten."""
MAX_SAMPLES = 512
"""Failed URLs that are remembered of each reason, one a host, for the probe."""
BIN_WIDTH = math.log(1.05)
"""Of a histogram of times: a quantile is right to 5 %."""
NUM_BINS = 512


class LogHistogram:
    """Counts of non-negative numbers in bins that grow by 5 %."""

    def __init__(self) -> None:
        self.counts = np.zeros(NUM_BINS, dtype=np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count each of ``values``."""
        bins = (np.log1p(np.maximum(values, 0)) / BIN_WIDTH).astype(np.int64)
        self.counts += np.bincount(np.minimum(bins, NUM_BINS - 1), minlength=NUM_BINS)

    def quantile(self, share: float) -> int | None:
        """The number below which this share lies, to 5 %; None where there are none."""
        total = int(self.counts.sum())
        if not total:
            return None
        rank = min(max(math.ceil(share * total), 1), total)
        place = int(np.searchsorted(np.cumsum(self.counts), rank))
        return round(math.expm1((place + 0.5) * BIN_WIDTH))


@dataclass(kw_only=True)
class ReasonStats:
    """Rows that ended alike; the empty reason is success."""

    count: int = 0
    milliseconds: LogHistogram = field(default_factory=LogHistogram)
    hosts: Counter[str] = field(default_factory=Counter)
    """Rows by host, of the busiest hosts."""
    samples: dict[str, str] = field(default_factory=dict)
    """Host -> one of its URLs, of a fair draw of the hosts."""


@dataclass(kw_only=True)
class LedgerStats:
    """Figures of all rows."""

    num_rows: int = 0
    num_answered: int = 0
    """Rows to which some server gave an HTTP answer."""
    num_https: int = 0
    """Rows whose URL is of https."""
    num_https_success: int = 0
    reasons: dict[str, ReasonStats] = field(default_factory=dict)
    hosts: dict[str, Counter[str]] = field(default_factory=dict)
    """Host -> reason -> rows, of the busiest hosts."""
    num_forgotten_hosts: int = 0
    """Hosts with few rows that were dropped from ``hosts``; some may be counted twice."""
    bytes_per_second: LogHistogram = field(default_factory=LogHistogram)
    """Of successes: the body's bytes over all the time spent on it."""

    @property
    def num_success(self) -> int:
        """Rows with a picture."""
        return self.count("")

    @property
    def num_failed(self) -> int:
        """Rows without one."""
        return self.num_rows - self.num_success

    def count(self, *reasons: str) -> int:
        """Rows of these reasons together."""
        return sum(self.reasons[r].count for r in reasons if r in self.reasons)

    def share(self, count: int) -> float:
        """``count`` as a fraction of all rows."""
        return count / self.num_rows if self.num_rows else 0.0

    def in_group(self, *groups: str) -> list[str]:
        """Reasons that occur, of these families."""
        return [r for r in self.reasons if r and _group_of(r) in groups]

    def rows_of(self, host: str, reasons: Iterable[str]) -> int:
        """Rows of one host that ended so."""
        return sum(self.hosts.get(host, Counter())[r] for r in reasons)

    def hosts_with(self, reasons: Iterable[str]) -> Counter[str]:
        """Rows by host of these reasons together, among the hosts that are remembered."""
        wanted = list(reasons)
        counts = {host: sum(tally[r] for r in wanted) for host, tally in self.hosts.items()}
        return Counter({host: count for host, count in counts.items() if count})

    def is_alive(self, host: str) -> bool:
        """Whether some row of the host had an answer: a picture, a status code, bytes."""
        return any(
            not r or r in REDIRECTED or (_group_of(r) not in SILENT_GROUPS and r not in SILENT)
            for r in self.hosts.get(host, ())
        )

    def sample_urls(self, reason: str) -> Iterator[tuple[str, str]]:
        """(host, URL) of failed rows, one a host, in an order that tells nothing of the list's."""
        if reason in self.reasons:
            samples = self.reasons[reason].samples
            for host in sorted(samples, key=_place):
                yield host, samples[host]


def _group_of(reason: str) -> str:
    try:
        return reason_of(reason).group
    except KeyError:
        return ""  # of another version; counted, but no cause is made of it


def gather_stats(store: Store) -> LedgerStats:
    """Figures of a dataset's ledger.

    Raises:
        DeclipError: there is no ledger, or a damaged one.
    """
    stats = LedgerStats()
    for _, table in iter_ledgers(store, columns=COLUMNS):
        add_rows(stats, table)
    if not stats.num_rows:
        raise no_ledger(store)
    return stats


def add_rows(stats: LedgerStats, table: pa.Table) -> None:
    """Add one shard's rows (columns :data:`COLUMNS`) to the figures."""
    stats.num_rows += table.num_rows
    is_https = pc.starts_with(pc.utf8_lower(pc.fill_null(table["url"], "")), "https:")
    is_success = pc.equal(table["reason"], "")
    stats.num_https += _num_true(is_https)
    stats.num_https_success += _num_true(pc.and_(is_https, is_success))
    stats.num_answered += _num_true(pc.or_(is_success, pc.is_valid(table["http_status"])))
    _add_times(stats, table)
    groups = table.group_by(["host", "reason"], use_threads=False)
    for row in groups.aggregate([("url", "min"), ("reason", "count")]).to_pylist():
        host, reason, count = row["host"] or "", row["reason"], row["reason_count"]
        stats.hosts.setdefault(host, Counter())[reason] += count
        about = stats.reasons[reason]
        about.hosts[host] += count
        if reason and host and row["url_min"]:
            _draw(about, host, row["url_min"])
    _forget_small_hosts(stats)


def _num_true(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask).as_py() or 0)


def _add_times(stats: LedgerStats, table: pa.Table) -> None:
    reasons = np.asarray(table["reason"].to_pylist(), dtype=object)
    spent = pc.fill_null(table["milliseconds"], 0).to_numpy()
    tried = pc.fill_null(table["attempts"], 0).to_numpy() > 0
    for reason in dict.fromkeys(reasons.tolist()):
        about = stats.reasons.setdefault(reason, ReasonStats())
        mask = reasons == reason
        about.count += int(mask.sum())
        about.milliseconds.add(spent[mask & tried])
    sizes = pc.fill_null(table["num_bytes"], 0).to_numpy()
    measured = (reasons == "") & (spent > 0) & (sizes > 0)
    stats.bytes_per_second.add(1000 * sizes[measured] / spent[measured])


def _draw(about: ReasonStats, host: str, url: str) -> None:
    """Keep the hosts whose names have the smallest checksums: a fair draw, the same each time."""
    about.samples[host] = min(url, about.samples.get(host, url))
    if len(about.samples) > 2 * MAX_SAMPLES:
        drawn = heapq.nsmallest(MAX_SAMPLES, about.samples, key=_place)
        about.samples = {host: about.samples[host] for host in drawn}


def _place(host: str) -> tuple[int, str]:
    return zlib.crc32(host.encode()), host


def _forget_small_hosts(stats: LedgerStats) -> None:
    if len(stats.hosts) > 2 * MAX_HOSTS:
        busiest = heapq.nlargest(MAX_HOSTS, stats.hosts, key=lambda h: stats.hosts[h].total())
        stats.num_forgotten_hosts += len(stats.hosts) - len(busiest)
        stats.hosts = {host: stats.hosts[host] for host in busiest}
    for about in stats.reasons.values():
        if len(about.hosts) > 2 * MAX_HOSTS:
            about.hosts = Counter(dict(about.hosts.most_common(MAX_HOSTS)))
