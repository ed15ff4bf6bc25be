"""The doctor's network causes: each ledger made to show one trouble is told as that trouble."""

import dataclasses
from typing import TYPE_CHECKING

import pytest

from declip_ingest.causes import Evidence
from declip_ingest.doctor import CAUSES, rank_causes
from declip_ingest.probe import Probe, ProbedHost
from declip_ingest.stages import DownloadShards

if TYPE_CHECKING:
    from tests.ingest.ledger_tables import CONTENT_TROUBLES, rows, stats_of, web
else:
    # conftest.py puts this folder on the path.
    from ledger_tables import CONTENT_TROUBLES, rows, stats_of, web

PROBE = Probe(
    names_resolve=True, false_addresses=(), is_reachable=True, proxies=(), descriptor_limit=65536
)
INGEST = DownloadShards(root="x")


def probed(reason: str, now: str, count: int = 10, resolved: int = 10) -> tuple[ProbedHost, ...]:
    return tuple(
        ProbedHost(
            reason=reason,
            host=f"gone{i}.example",
            url=f"http://gone{i}.example/",
            addresses=("93.184.216.34",) if i < resolved else (),
            now=now,
            milliseconds=10,
        )
        for i in range(count)
    )


def names(*made, ingest=INGEST, probe=None, proxies=(), repeats=()) -> list[str]:
    evidence = Evidence(
        stats=stats_of(*made), ingest=ingest, probe=probe, proxies=proxies, repeats=repeats
    )
    return [cause.name for cause in rank_causes(evidence)]


TROUBLES = {
    "no_network": [rows(400, "dns_failure"), rows(50, "timeout"), rows(50, "host_unreachable")],
    "resolver_overloaded": [web(600), rows(500, "dns_failure")],
    "rewritten_names": [rows(300, "forbidden_address", hosts=200), rows(20)],
    "own_certificates": [rows(300, "tls_error", scheme="https"), rows(100)],
    "foreign_certificates": [web(), rows(60, "tls_error", host="bad{}.example", hosts=3)],
    "throttled": [web(), rows(300, "http_429", host="cdn{}.example", hosts=2)],
    "slow_line": [rows(600, milliseconds=8000), rows(300, "timeout", milliseconds=10_000)],
    "hosts_down": [web(), rows(200, "connection_refused", host="down{}.example", hosts=4)],
    "failing_servers": [web(), rows(100, "http_500"), rows(50, "short_body")],
    "dead_links": [web(), rows(300, "http_404"), rows(20, "http_410")],
}


@pytest.mark.parametrize("name", TROUBLES)
def test_a_ledger_made_to_show_one_trouble_is_told_as_that_trouble(name):
    assert names(*TROUBLES[name])[:1] == [name]


def test_a_healthy_ledger_shows_no_cause():
    for size in (10, 100, 1000, 10_000):
        assert names(web(size)) == []
        assert names(web(size), probe=PROBE) == []
    assert names(rows(50)) == []


def test_blocked_by_403_on_a_few_hosts_is_throttling_and_lone_ones_are_not():
    assert names(web(), rows(200, "http_403", host="cdn.example"))[0] == "throttled"
    assert names(web(), rows(40, "http_403", hosts=40)) == []


def test_a_throttled_ledger_asks_for_a_contact_only_where_there_is_none():
    def remedy(ingest):
        evidence = Evidence(stats=stats_of(*TROUBLES["throttled"]), ingest=ingest)
        return " ".join(rank_causes(evidence)[0].remedy)

    assert "user-agent-contact" in remedy(INGEST)
    known = dataclasses.replace(INGEST, user_agent_contact="me@example.org")
    assert "user-agent-contact" not in remedy(known)
    assert "declip refetch --reason http_429 --ingest.host-requests-per-second 2" in remedy(known)


def test_names_that_do_not_exist_are_no_fault_of_the_resolver():
    gone = rows(300, "dns_failure", hosts=200, host="gone{}.example")
    dead = dataclasses.replace(PROBE, hosts=probed("dns_failure", "dns_failure", resolved=0))
    assert names(web(), gone, probe=dead) == ["dead_links"]
    alive = dataclasses.replace(PROBE, hosts=probed("dns_failure", "", resolved=9))
    assert names(web(), gone, probe=alive)[0] == "resolver_overloaded"


def test_hosts_that_answered_other_rows_prove_the_resolver_guilty_without_a_probe():
    assert names(web(), rows(100, "dns_failure")) == ["resolver_overloaded"]
    evidence = Evidence(stats=stats_of(web(), rows(100, "dns_failure")), ingest=INGEST)
    (cause,) = rank_causes(evidence)
    assert cause.num_rows == 100
    assert "declip refetch --reason dns --ingest.thread-count 16" in cause.remedy


def test_offline_now_offline_then_or_behind_a_proxy():
    offline = TROUBLES["no_network"]
    unreachable = dataclasses.replace(PROBE, is_reachable=False, names_resolve=False)
    proxy = dataclasses.replace(unreachable, proxies=("HTTPS_PROXY",))

    def first(probe=None, proxies=()):
        stats = stats_of(*offline)
        return rank_causes(Evidence(stats=stats, ingest=INGEST, probe=probe, proxies=proxies))[0]

    assert first().title == "this machine has no network"
    assert first(unreachable).title == "this machine has no network"
    assert first(PROBE).title.endswith("there is now")
    assert first(proxy).name == first(proxies=("HTTP_PROXY",)).name == "proxy_only"
    assert "HTTPS_PROXY" in " ".join(first(proxy).evidence)
    assert first().num_rows == 500


def test_a_few_rows_are_no_network_trouble():
    assert names(rows(3, "dns_failure"), rows(1, "timeout")) == []


def test_captive_portals_are_told_by_pages_everywhere_and_by_false_names():
    pages = rows(300, "not_image", hosts=100, http_status=200)
    assert names(pages, rows(20))[0] == "rewritten_names"
    liar = dataclasses.replace(PROBE, false_addresses=("10.0.0.1",))
    few = rows(60, "not_image", hosts=3, http_status=200)
    assert names(web(), few, probe=liar)[0] == "rewritten_names"
    assert names(web(), few, probe=PROBE) == ["no_pictures"]


def test_addresses_in_the_list_are_no_sign_of_a_lying_resolver():
    assert names(rows(100, "forbidden_address", host="10.0.0.{}"), rows(900)) == []


def test_timeouts_of_dead_hosts_are_not_the_lines_fault():
    dead = rows(200, "timeout", host="dead{}.example", milliseconds=10_000)
    assert names(web(), dead) == ["hosts_down"]
    # Nor are they on hosts that answer, while the successes are quick.
    assert "slow_line" not in names(web(), rows(200, "timeout", milliseconds=10_000))


def test_the_order_is_by_rows_explained():
    stats = stats_of(web(), rows(300, "http_404"), rows(200, "http_429"), rows(100, "http_500"))
    found = rank_causes(Evidence(stats=stats, ingest=INGEST))
    assert [cause.name for cause in found] == ["dead_links", "throttled", "failing_servers"]
    assert [c.num_rows for c in found] == sorted((c.num_rows for c in found), reverse=True)
    assert all(0 < cause.num_rows <= stats.num_failed for cause in found)


def test_every_cause_is_tried_by_some_ledger():
    told = {name for made in TROUBLES.values() for name in names(*made)}
    told |= {name for made in CONTENT_TROUBLES.values() for name in names(*made)}
    known = {judge.__name__ for judge in CAUSES}
    aliases = {"wrong_hash_column": "wrong_hashes", "changed_pictures": "wrong_hashes"}
    assert {aliases.get(name, name) for name in told} == known
