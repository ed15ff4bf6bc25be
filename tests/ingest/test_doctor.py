"""The doctor: from a dataset's files to a diagnosis in words and in JSON."""

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from declip_ingest.digests import read_digests
from declip_ingest.doctor import diagnose, diagnosis_json, diagnosis_text, failed_hosts
from declip_ingest.failures import GROUPS, reason_of
from declip_ingest.ledger import write_ledger
from declip_ingest.stages import DownloadShards, store_settings
from declip_shards import DeclipError, Store, layout, write_shard

if TYPE_CHECKING:
    from tests.ingest.ledger_tables import ledger_rows, rows, stats_of, web
else:
    # conftest.py puts this folder on the path.
    from ledger_tables import ledger_rows, rows, stats_of, web


def write_dataset(root: str, made: list[dict[str, Any]], **settings: Any) -> Store:
    """Ledger, settings and parquets of a dataset whose rows ended so."""
    store, every = Store(root), ledger_rows(made)
    store_settings(DownloadShards(root=root, **settings))
    for number in range(3):
        part, shard = every[number::3], layout.shard_name(number)
        write_ledger(store, shard, part)
        table = [
            {
                "key": row.key,
                "url": row.url,
                "sha256": None if row.reason else f"{int(row.key):064x}",
            }
            for row in part
        ]
        write_shard(store, shard, [], pa.Table.from_pylist(table), {})
    return store


def test_the_text_says_figures_causes_and_commands(tmp_path):
    made = [*web(), *rows(400, "http_429", host="cdn.example")]
    write_dataset(str(tmp_path), made)
    found = diagnose(str(tmp_path), num_probes=0)
    text = diagnosis_text(found)
    assert text.startswith("950 of 1,400 rows are pictures (67.9 %)")
    line = next(line for line in text.splitlines() if line.startswith("http_429"))
    assert line.split()[:4] == ["http_429", "400", "28.57", "%"]
    assert "cdn.example 400" in line
    assert "1. hosts refuse us" in text
    assert "> declip refetch --reason http_429" in text
    assert [cause.name for cause in found.causes] == ["throttled"]


def test_a_healthy_dataset_is_told_as_one(tmp_path):
    write_dataset(str(tmp_path), web())
    found = diagnose(str(tmp_path), num_probes=0)
    assert found.causes == ()
    assert "No cause stands out" in diagnosis_text(found)


def test_json_holds_the_same(tmp_path):
    write_dataset(str(tmp_path), [*web(), *rows(400, "http_429", host="cdn.example")])
    found = diagnose(str(tmp_path), num_probes=0)
    value = json.loads(json.dumps(diagnosis_json(found)))
    assert (value["num_rows"], value["num_success"]) == (1400, 950)
    assert sum(reason["count"] for reason in value["reasons"].values()) == 1400
    assert value["reasons"]["http_429"]["hosts"] == {"cdn.example": 400}
    assert value["causes"][0]["name"] == "throttled"
    assert value["probe"] is None


def test_placeholders_across_shards_are_listed_as_a_file_of_digests(tmp_path):
    store = write_dataset(str(tmp_path), web(), placeholder_repeats=12)
    for number in range(3):
        table = [
            {"key": f"{number}{i:07d}", "url": f"http://h/{number}/{i}", "sha256": "ab" * 32}
            for i in range(5)
        ]
        write_shard(store, layout.shard_name(number), [], pa.Table.from_pylist(table), {})
    found = diagnose(str(tmp_path), num_probes=0)
    assert [(r.sha256, r.num_urls) for r in found.repeats] == [("ab" * 32, 15)]
    assert [cause.name for cause in found.causes] == ["placeholders"]
    lines = diagnosis_text(found).splitlines()
    place = lines.index("ab" * 32)
    assert lines[place - 1] == "# 15 URLs, such as 00000000 http://h/0/0"
    listed = tmp_path / "placeholders.txt"
    listed.write_text("\n".join(lines[place - 1 :]))
    assert read_digests([str(listed)], "placeholders") == {"sha256": frozenset({"ab" * 32})}


def test_a_probe_tells_a_lying_resolver_from_dead_names(server, tmp_path):
    gone = rows(300, "dns_failure", hosts=40, host="gone{}.example")
    write_dataset(
        str(tmp_path), [*web(), *gone], allow_addresses=(server.address,), robots="ignore"
    )
    host, port = server.server_address[:2]

    def causes(exist: bool) -> list[str]:
        async def resolver(name: str) -> list[str]:
            if name == "example.com" or (exist and name.startswith("gone")):
                return ["127.0.0.1"]
            raise OSError

        found = diagnose(
            str(tmp_path),
            num_probes=8,
            resolver=resolver,
            public_addresses=[(str(host), int(port))],
        )
        assert found.probe is not None
        assert found.probe.of_reason("dns_failure")
        assert "dns_failure: " in diagnosis_text(found)
        return [cause.name for cause in found.causes]

    assert causes(exist=True)[0] == "resolver_overloaded"
    assert causes(exist=False)[0] == "dead_links"


def test_a_machine_without_a_network_says_exactly_that(tmp_path, closed_port):
    write_dataset(str(tmp_path), rows(100, "dns_failure", hosts=50))

    async def resolver(name: str) -> list[str]:
        raise OSError

    found = diagnose(
        str(tmp_path), resolver=resolver, public_addresses=[("127.0.0.1", closed_port)],
        environment={},
    )  # fmt: skip
    text = diagnosis_text(found)
    assert "1. this machine has no network (100 rows, 100 % of the failed ones)" in text
    assert "this machine reaches no public address" in text


def test_the_sample_is_in_proportion_and_no_host_is_in_it_twice():
    stats = stats_of(
        rows(600, "timeout", hosts=300),
        rows(300, "http_503", hosts=300, host="b{}.example"),
        rows(100, "dns_failure", hosts=100, host="c{}.example"),
        rows(500, "corrupt_image"),
        rows(500, "bad_scheme"),
    )
    chosen = failed_hosts(stats, 100)
    counts = {r: sum(h.reason == r for h in chosen) for r in ("timeout", "http_503", "dns_failure")}
    assert counts == {"timeout": 60, "http_503": 30, "dns_failure": 10}
    assert len({h.host for h in chosen}) == len(chosen) == 100
    assert failed_hosts(stats, 100) == chosen
    assert failed_hosts(stats_of(rows(50)), 100) == []
    assert all(reason_of(h.reason).group in GROUPS for h in chosen)


def test_no_dataset_and_no_ledger_are_told(tmp_path):
    with pytest.raises(DeclipError, match="holds no dataset"):
        diagnose(str(tmp_path))
    store_settings(DownloadShards(root=str(tmp_path)))
    with pytest.raises(DeclipError, match="has no ledger"):
        diagnose(str(tmp_path))
