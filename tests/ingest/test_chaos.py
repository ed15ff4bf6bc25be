"""A list in which every kind of trouble stands at least twice, through the real stage."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from declip_shards import Store
from declip_shards.manifest import make_receipt

if TYPE_CHECKING:
    from tests.ingest import chaos_server, chaos_stage
    from tests.ingest.chaos_certificates import TLS_KINDS
    from tests.ingest.chaos_checks import Verdict, digests, judge, kind_of
    from tests.ingest.chaos_dataset import Limits, settings, write_dataset
    from tests.ingest.chaos_kinds import KINDS, PLAIN, Row, make_rows
    from tests.ingest.chaos_server import Places
else:
    # conftest.py puts this folder on the path.
    import chaos_server
    import chaos_stage
    from chaos_certificates import TLS_KINDS
    from chaos_checks import Verdict, digests, judge, kind_of
    from chaos_dataset import Limits, settings, write_dataset
    from chaos_kinds import KINDS, PLAIN, Row, make_rows
    from chaos_server import Places

NUM_ROWS, SHARD_SIZE, SEED = 400, 200, 4
LIMITS = Limits(timeout_seconds=2.5, decode_timeout_seconds=1.5)
OVERSHOOT_SECONDS = 3.0
"""Of a machine that does other things as well; benchmarks/ingest_chaos.py holds one second."""


@dataclass
class Outcome:
    """What a run left."""

    rows: list[Row]
    verdict: Verdict
    digests: dict[str, str]
    canary_hits: list[str]


def ingest(
    folder: Path, server: chaos_server.ChaosServer, rows: list[Row], *, threads: int, shards: int
) -> Outcome:
    """The first shards in this process, one after the other."""
    root = folder / "data"
    opted_out = [row["url"] for row in rows if kind_of(row["kind"]).opted_out]
    write_dataset(root, rows, opted_out)
    stage = chaos_stage.ChaosDownload(
        root=str(root),
        shard_size=SHARD_SIZE,
        thread_count=threads,
        **settings(folder / "lists", server.places, LIMITS),
    )
    work = stage.worker()
    for task in stage.tasks()[:shards]:
        # A receipt refuses rows that are neither stored nor explained.
        make_receipt(Store(stage.root), task, "digest", work(task))
    work.close()  # type: ignore[attr-defined]
    rows = rows[: shards * SHARD_SIZE]
    verdict = judge(root, rows, SHARD_SIZE, LIMITS.timeout_seconds, OVERSHOOT_SECONDS)
    return Outcome(rows, verdict, digests(root), server.stats()["canary_hits"])


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Outcome, Outcome]]:
    """The same list twice: the second time with other delays, fewer rows at a time, one shard."""
    folder = tmp_path_factory.mktemp("chaos")
    remove = chaos_stage.install()
    try:
        with pytest.MonkeyPatch.context() as patch:
            with chaos_server.running(folder / "one") as server:
                patch.setenv("SSL_CERT_FILE", server.places.certificate)
                rows = make_rows(SEED, NUM_ROWS, 0.3, server.places, SHARD_SIZE)
                first = ingest(folder / "one", server, rows, threads=128, shards=2)
            like = server.places
            with chaos_server.running(folder / "two", like=like, delays=7) as server:
                patch.setenv("SSL_CERT_FILE", server.places.certificate)
                second = ingest(folder / "two", server, rows, threads=80, shards=1)
        yield first, second
    finally:
        remove()


def test_every_row_ends_as_its_kind_must(outcomes):
    for outcome in outcomes:
        assert outcome.verdict.faults == [], outcome.verdict.table()
        assert outcome.verdict.num_ok + outcome.verdict.num_failed == len(outcome.rows)


def test_nobody_reached_the_canary(outcomes):
    assert [outcome.canary_hits for outcome in outcomes] == [[], []]


def test_the_bytes_do_not_depend_on_the_order_of_completion(outcomes):
    first, second = outcomes
    assert second.digests
    assert second.digests.items() <= first.digests.items()


def test_the_list_has_every_kind_twice_and_is_made_by_its_seed(outcomes):
    rows = outcomes[0].rows
    count = {kind.name: 0 for kind in (*KINDS, PLAIN)}
    for row in rows:
        count[row["kind"]] += 1
    assert min(count.values()) >= 2
    assert len(rows) == NUM_ROWS
    assert {kind.row for kind in KINDS} == set(range(1, 29)), "a row of the catalogue is left out"
    places = Places(web=1, closed=2, tls=dict.fromkeys(TLS_KINDS, 3),
                    canaries=(("127.0.0.1", 5000),), certificate="")  # fmt: skip
    assert make_rows(1, 600, 0.3, places, 100) == make_rows(1, 600, 0.3, places, 100)
    assert make_rows(1, 600, 0.3, places, 100) != make_rows(2, 600, 0.3, places, 100)
