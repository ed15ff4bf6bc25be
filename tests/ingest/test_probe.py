"""The look from this machine: names, addresses, proxies, failed hosts; never for long."""

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from declip_ingest.fetch import FetchPolicy
from declip_ingest.probe import FailedHost, Probe, host_name, is_address, proxy_variables, run_probe

if TYPE_CHECKING:
    from tests.ingest.misbehaving_server import MisbehavingServer, encode, response
else:
    # conftest.py puts this folder on the path.
    from misbehaving_server import MisbehavingServer, encode, response

NAMES = {"example.com": ["93.184.216.34"], "cdn.example": ["203.0.113.7", "203.0.113.8"]}


async def resolve(name: str) -> list[str]:
    if name not in NAMES:
        raise OSError(f"no such name {name}")
    return NAMES[name]


def look(server: MisbehavingServer, failed: list[FailedHost], **options: Any) -> Probe:
    host, port = server.server_address[:2]
    policy = FetchPolicy(
        allow_addresses=(server.address,), retries=0, robots="ignore", timeout_seconds=20.0
    )
    given = {"resolver": resolve, "public_addresses": [(str(host), int(port))], "environment": {}}
    return asyncio.run(run_probe(failed, policy, **{**given, **options}))


def test_failed_hosts_are_asked_once_and_what_they_say_now_is_told(server):
    good = server.add("/good", response(encode()))
    gone = server.add("/gone", response(status="410 Gone"))
    told = []
    probe = look(
        server,
        [
            FailedHost(reason="timeout", host=server.address, url=good),
            FailedHost(reason="http_503", host=server.address, url=gone),
            FailedHost(reason="dns_failure", host="cdn.example", url="http://10.1.2.3/x"),
            FailedHost(reason="dns_failure", host="nowhere.example", url="file:///etc/passwd"),
        ],
        on_host=lambda: told.append(1),
    )
    assert {(h.reason, h.host): h.now for h in probe.hosts} == {
        ("timeout", server.address): "",
        ("http_503", server.address): "http_410",
        ("dns_failure", "cdn.example"): "forbidden_address",
        ("dns_failure", "nowhere.example"): "bad_scheme",
    }
    assert {h.host: h.addresses for h in probe.of_reason("dns_failure")} == {
        "cdn.example": ("203.0.113.7", "203.0.113.8"),
        "nowhere.example": (),
    }
    assert probe.of_reason("timeout")[0].addresses == ("127.0.0.1",)
    assert len(told) == 4
    assert server.hits == {"/good": 1, "/gone": 1}
    assert probe.names_resolve
    assert probe.is_reachable
    assert probe.has_network
    assert probe.num_left == 0
    assert probe.descriptor_limit > 0


def test_a_machine_without_a_network_is_told_and_asks_nobody(server, closed_port):
    async def fail(name: str) -> list[str]:
        raise OSError

    url = server.add("/", response(encode()))
    probe = look(
        server,
        [FailedHost(reason="timeout", host=server.address, url=url)],
        resolver=fail,
        public_addresses=[("127.0.0.1", closed_port)],
    )
    assert not probe.has_network
    assert not probe.names_resolve
    assert not probe.is_reachable
    assert probe.hosts == ()
    assert probe.num_left == 1
    assert not server.hits


def test_a_resolver_that_answers_for_names_that_cannot_exist_is_told(server):
    async def lie(name: str) -> list[str]:
        return ["10.9.8.7"]

    assert look(server, [], resolver=lie).false_addresses == ("10.9.8.7",)
    assert look(server, []).false_addresses == ()


def test_it_ends_in_time_and_counts_those_it_did_not_ask(server):
    slow = [
        FailedHost(reason="timeout", host=f"h{i}", url=server.add(f"/{i}", server.hang))
        for i in range(30)
    ]
    start = time.monotonic()
    probe = look(server, slow, seconds=1.0)
    assert time.monotonic() - start < 10
    assert probe.num_left == 30
    assert len(server.hits) <= 8, "few at a time"


def test_a_look_up_that_hangs_is_not_waited_for(server, monkeypatch):
    async def hang(name: str) -> list[str]:
        await asyncio.sleep(60)
        return []

    monkeypatch.setattr("declip_ingest.probe.LOOKUP_SECONDS", 0.2)
    start = time.monotonic()
    assert not look(server, [], resolver=hang).names_resolve
    assert time.monotonic() - start < 10


def test_proxies_are_named_without_their_values(server):
    environment = {"https_proxy": "http://me:secret@proxy:3128", "NO_PROXY": "x", "HTTP_PROXY": ""}
    assert proxy_variables(environment) == ("https_proxy",)
    assert "secret" not in repr(look(server, [], environment=environment))


@pytest.mark.parametrize(
    ("host", "name", "is_ip"),
    [
        ("cdn.example", "cdn.example", False),
        ("cdn.example:8080", "cdn.example", False),
        ("10.0.0.1:80", "10.0.0.1", True),
        ("[::1]:80", "::1", True),
        ("[2001:db8::1]", "2001:db8::1", True),
        ("", "", False),
    ],
)
def test_hosts_are_taken_apart(host, name, is_ip):
    assert host_name(host) == name
    assert is_address(name) == is_ip
