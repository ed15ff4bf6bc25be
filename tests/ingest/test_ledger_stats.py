"""Figures of a ledger: counts conserved, quantiles right to 5 %, memory bounded."""

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from declip_ingest import ledger_stats
from declip_ingest.ledger import ledger_table, write_ledger
from declip_ingest.ledger_stats import LedgerStats, LogHistogram, add_rows, gather_stats
from declip_shards import DeclipError, Store

if TYPE_CHECKING:
    from tests.ingest.ledger_tables import ledger_rows, rows, stats_of, web
else:
    # conftest.py puts this folder on the path.
    from ledger_tables import ledger_rows, rows, stats_of, web


@pytest.mark.parametrize("scale", [1, 50, 10_000, 5_000_000])
def test_quantiles_are_right_to_five_percent(scale):
    values = np.random.default_rng(0).exponential(scale, 5000) + 1
    histogram = LogHistogram()
    for part in np.array_split(values, 7):
        histogram.add(part)
    for share in (0.01, 0.5, 0.95, 1.0):
        exact = float(np.sort(values)[max(int(np.ceil(share * len(values))) - 1, 0)])
        found = histogram.quantile(share)
        assert found is not None
        assert abs(found - exact) <= 0.06 * exact + 1
    assert LogHistogram().quantile(0.5) is None


def test_every_row_is_counted_once_however_the_shards_are_cut():
    made = web(2000)
    random.Random(1).shuffle(made)
    every = ledger_rows(made)
    whole, parts = LedgerStats(), stats_of(made)
    add_rows(whole, ledger_table(every))
    for stats in (whole, parts):
        assert stats.num_rows == len(made) == stats.num_success + stats.num_failed
        assert sum(about.count for about in stats.reasons.values()) == stats.num_rows
        assert sum(tally.total() for tally in stats.hosts.values()) == stats.num_rows
        assert all(a.hosts.total() == a.count for a in stats.reasons.values())
    assert whole.hosts == parts.hosts
    assert whole.num_answered == sum(row["http_status"] is not None for row in made)
    assert whole.num_https == sum(row["scheme"] == "https" for row in made)
    for reason, about in whole.reasons.items():
        assert (about.milliseconds.counts == parts.reasons[reason].milliseconds.counts).all()
        assert list(whole.sample_urls(reason)) == list(parts.sample_urls(reason))


def test_a_host_is_alive_when_one_of_its_rows_had_an_answer():
    stats = stats_of(
        rows(3, "timeout", host="both.example"),
        rows(1, "http_404", host="both.example"),
        rows(3, "dns_failure", host="none.example"),
        rows(3, "forbidden_address", host="none.example"),
        rows(1, "redirect_loop", host="loop.example"),
        rows(1, "robots_unavailable", host="none.example"),
    )
    assert [h for h in sorted(stats.hosts) if stats.is_alive(h)] == ["both.example", "loop.example"]
    assert stats.hosts_with(["timeout", "dns_failure"]) == {"both.example": 3, "none.example": 3}


def test_memory_does_not_grow_with_the_number_of_hosts(monkeypatch):
    monkeypatch.setattr(ledger_stats, "MAX_HOSTS", 20)
    monkeypatch.setattr(ledger_stats, "MAX_SAMPLES", 10)
    stats = stats_of(
        rows(3000, "timeout", hosts=3000, host="rare{}.example"), rows(300, hosts=1, host="busy")
    )
    assert stats.num_rows == 3300
    assert stats.count("timeout") == 3000
    assert len(stats.hosts) <= 40
    assert stats.num_forgotten_hosts > 0
    assert len(stats.reasons["timeout"].hosts) <= 40
    assert len(list(stats.sample_urls("timeout"))) <= 20
    assert stats.hosts["busy"][""] == 300


def test_the_figures_come_from_every_shard(tmp_path):
    store, every = Store(str(tmp_path)), ledger_rows(web())
    with pytest.raises(DeclipError, match="has no ledger"):
        gather_stats(store)
    for shard in range(4):
        write_ledger(store, f"{shard:05d}", every[shard::4])
    stats = gather_stats(store)
    assert stats.hosts == stats_of(web()).hosts
    assert stats.bytes_per_second.quantile(0.5) == pytest.approx(40_000 / 0.3, rel=0.06)
