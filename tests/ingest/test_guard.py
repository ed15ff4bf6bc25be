"""No socket is opened to an address that was not vetted."""

import socket
import threading

import pytest

from declip_ingest import guard
from declip_ingest.failures import FetchError
from declip_ingest.guard import AddressGuard, Deadline, is_public, parse_allowed, running_under
from declip_shards import DeclipError

PRIVATE = [
    "127.0.0.1",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "169.254.169.254",
    "224.0.0.1",
    "255.255.255.255",
    "240.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd12::1",
    "fec0::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "2001:db8::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_what_is_not_on_the_public_internet_is_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1"]
)
def test_public_addresses_are_public(address):
    assert is_public(address)


def addresses(guarded: AddressGuard, host: str, port: int):
    with running_under(Deadline(5)):
        return guarded.addresses(host, port)


@pytest.mark.parametrize("host", ["1.1.1.1", "2606:4700::1111", "[2606:4700::1111]"])
def test_an_address_is_not_looked_up(monkeypatch, host):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the resolver"))
    [(family, sockaddr)] = addresses(AddressGuard(), host, 443)
    assert sockaddr[:2] == (host.strip("[]"), 443)
    assert family == (socket.AF_INET if "." in host else socket.AF_INET6)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "169.254.169.254", "[::ffff:10.0.0.1]"])
def test_an_address_that_needs_no_lookup_is_vetted_all_the_same(host):
    with pytest.raises(FetchError, match="forbidden_address"):
        addresses(AddressGuard(), host, 80)


@pytest.fixture
def resolver(monkeypatch):
    """Names resolve as told: the one thing a loopback test cannot ask the real resolver for."""
    answers: list[list[str]] = []
    asked: list[str] = []

    def getaddrinfo(host, port, **_):
        asked.append(host)
        ips = answers.pop(0)
        return [
            (socket.AF_INET6 if ":" in ip else socket.AF_INET, 1, 6, "", (ip, port)) for ip in ips
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answers, asked


def test_one_private_address_among_public_ones_condemns_the_name(resolver):
    answers, _ = resolver
    answers.append(["1.1.1.1", "10.0.0.1"])
    with pytest.raises(FetchError, match=r"^forbidden_address$"):
        addresses(AddressGuard(), "example.org", 80)


def test_a_name_is_resolved_once_and_the_socket_goes_to_that_answer(resolver, monkeypatch):
    """A second look-up, which a rebinding server would answer differently, never happens."""
    answers, asked = resolver
    answers += [["1.1.1.1"], ["127.0.0.1"]]
    reached = []
    monkeypatch.setattr(guard.DeadlineSocket, "connect", lambda self, at: reached.append(at))
    with running_under(Deadline(5)):
        AddressGuard().connect("rebind.example", 80).close()
    assert reached == [("1.1.1.1", 80)]
    assert asked == ["rebind.example"]


def test_ports_other_than_the_webs_need_leave(resolver):
    answers, _ = resolver
    answers += [["1.1.1.1"]] * 3
    assert addresses(AddressGuard(), "example.org", 443)
    with pytest.raises(FetchError, match=r"^forbidden_port$"):
        addresses(AddressGuard(), "example.org", 22)
    assert addresses(AddressGuard(["example.org:22"]), "EXAMPLE.org", 22)


def test_leave_for_one_name_is_no_leave_for_another_that_leads_there(resolver):
    answers, _ = resolver
    answers.append(["127.0.0.1"])
    with pytest.raises(FetchError, match=r"^forbidden_address$"):
        addresses(AddressGuard(["127.0.0.1:8000"]), "evil.example", 8000)


def test_a_resolver_that_hangs_is_not_waited_for(monkeypatch, stopwatch):
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(10) and [])
    with running_under(Deadline(0.2)), pytest.raises(FetchError, match=r"^dns_failure$"):
        AddressGuard().addresses("slow.example", 80)
    assert stopwatch() < 1
    release.set()


def test_the_next_address_is_tried_when_one_is_dead(resolver, closed_port):
    answers, _ = resolver
    with socket.create_server(("127.0.0.2", closed_port)):
        answers.append(["127.0.0.1", "127.0.0.2"])
        with running_under(Deadline(5)):
            sock = AddressGuard([f"two.example:{closed_port}"]).connect("two.example", closed_port)
        assert sock.getpeername() == ("127.0.0.2", closed_port)
        sock.close()


@pytest.mark.parametrize(
    "entry", ["127.0.0.1", "127.0.0.1:", ":80", "a:0", "a:65536", "::1:80", ""]
)
def test_an_entry_that_is_not_host_and_port_is_refused(entry):
    with pytest.raises(DeclipError, match="allow_addresses holds"):
        parse_allowed([entry])


def test_allowed_entries_are_read():
    assert parse_allowed(["LocalHost:80", "[::1]:8000"]) == {("localhost", 80), ("::1", 8000)}


def test_a_guarded_socket_outside_a_deadline_is_a_defect():
    left, right = socket.socketpair()
    sock = guard.DeadlineSocket(fileno=left.detach())
    with right, sock, pytest.raises(RuntimeError, match="running_under"):
        sock.recv_into(bytearray(1))
