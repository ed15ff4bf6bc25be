"""No socket is opened to an address that was not vetted; URLs are read in one way only."""

import asyncio
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_ingest import guard
from declip_ingest.failures import FetchError
from declip_ingest.guard import AddressGuard, NameCache, check_url, is_public, parse_allowed
from declip_shards import DeclipError

PRIVATE = [
    *("127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1"),
    *("169.254.169.254", "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1"),
    *("192.88.99.1", "168.63.129.16", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1"),
    *("fd12::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1"),
    *("::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001:db8::1"),
    *("2001::1", "3fff::1", "5f00::1", "4000::1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_what_is_not_on_the_public_internet_is_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"],
)
def test_public_addresses_are_public(address):
    assert is_public(address)


@given(st.ip_addresses(v=4))
def test_every_way_to_embed_an_ipv4_address_is_judged_as_it_is(ip):
    number = int(ip)
    high, low = number >> 16, number & 0xFFFF
    for wrapped in (f"::ffff:{ip}", f"64:ff9b::{high:x}:{low:x}", f"2002:{high:x}:{low:x}::1"):
        assert is_public(wrapped) is is_public(str(ip))


@given(st.ip_addresses(v=4))
def test_every_notation_of_an_address_is_read_as_the_same(ip):
    a, b, c, d = ip.packed
    for host in (
        *(str(ip), f"{ip}.", str(int(ip)), hex(int(ip)), f"0{int(ip):o}", f"{a}.{b}.{c << 8 | d}"),
        *(f"0x{a:x}.{b}.0{c:o}.{d}", f"{a}.{b << 16 | c << 8 | d}"),
    ):
        assert check_url(f"http://{host}/").host == str(ip)


@given(st.ip_addresses(v=6))
def test_ipv6_is_read_in_any_length(ip):
    assert check_url(f"http://[{ip.exploded.upper()}]:8080/").host == str(ip)


@given(st.text(max_size=60) | st.text(max_size=40).map(lambda text: f"http://{text}"))
def test_no_text_breaks_the_url_check_and_what_it_reads_it_reads_again(text):
    reason = "none"
    try:
        target = check_url(text)
    except FetchError as error:
        reason = error.reason
    assert reason in ("none", "bad_url", "bad_scheme", "forbidden_address")
    if reason == "none":
        assert target.scheme in ("http", "https")
        assert check_url(target.url) == target
        assert urlsplit(target.url).hostname == target.host
        assert target.url.isascii()
        assert not any(c.isspace() for c in target.url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "bad_url: empty"),
        ("   ", "bad_url: empty"),
        ("http://a@127.0.0.1/", "bad_url: user name"),
        ("http://user:secret@example.org/a.jpg", "bad_url: user name"),
        ("http://example.org/a\r\nHost: evil", "bad_url: control"),
        ("http://example.org/a\tb", "bad_url: control"),
        ("http://example.org/" + "a" * 100_000, "bad_url: length"),
        ("example.org/a.jpg", "bad_url: not absolute"),
        ("//example.org/a.jpg", "bad_url: not absolute"),
        ("http:///a.jpg", "bad_url: not absolute"),
        ("http://example.org:99999/", "bad_url"),
        ("http://example.org:0/", "bad_url"),
        ("http://ex ample.org/", "bad_url: host"),
        ("http://a..b/", "bad_url: host"),
        ("http://" + "a" * 64 + ".org/", "bad_url: host"),
        ("http://example.org/\ud800", "bad_url"),
        ("file:///etc/passwd", "bad_scheme"),
        ("ftp://example.org/a.jpg", "bad_scheme"),
        ("data:image/png;base64,iVBORw0KGgo=", "bad_scheme"),
    ],
)
def test_urls_that_are_never_fetched(url, message):
    with pytest.raises(FetchError) as caught:
        check_url(url)
    assert caught.value.message == message


def test_a_url_is_read_as_browsers_read_it():
    target = check_url(" HTTPS://Bücher.Example.:443/a b/ü?q=ñ&r=%2B#top ")
    assert target.url == "https://xn--bcher-kva.example/a%20b/%C3%BC?q=%C3%B1&r=%2B"
    assert check_url("http://example.org").url == "http://example.org/"
    assert check_url("http://example.org:8080?q").url == "http://example.org:8080/?q"
    assert check_url("http://my_host.example/").host == "my_host.example"
    assert check_url("http://[2606:4700::1111]/").origin == "http://[2606:4700::1111]"


def resolve(guarded: AddressGuard, host: str, port: int) -> list[tuple[str, int]]:
    async def run() -> list[tuple[str, int]]:
        return [(a["host"], a["port"]) for a in await guarded.resolve(host, port)]

    return asyncio.run(run())


def answering(*addresses: str) -> Any:
    return lambda host: list(addresses)


def test_one_private_address_among_public_ones_condemns_the_name():
    for answer in (("1.1.1.1", "10.0.0.1"), ("10.0.0.1", "1.1.1.1"), ("1.1.1.1", "::1")):
        with pytest.raises(FetchError, match=r"^forbidden_address$"):
            resolve(AddressGuard(lookup=answering(*answer)), "example.org", 80)


def test_ports_other_than_the_webs_need_leave():
    lookup = answering("1.1.1.1")
    assert resolve(AddressGuard(lookup=lookup), "example.org", 443) == [("1.1.1.1", 443)]
    with pytest.raises(FetchError, match=r"^forbidden_port$"):
        resolve(AddressGuard(lookup=lookup), "example.org", 22)
    assert resolve(AddressGuard(["EXAMPLE.org:22"], lookup=lookup), "example.org", 22)


def test_leave_for_one_name_is_no_leave_for_another_that_leads_there():
    guarded = AddressGuard(["127.0.0.1:8000"], lookup=answering("127.0.0.1"))
    with pytest.raises(FetchError, match=r"^forbidden_address$"):
        resolve(guarded, "evil.example", 8000)


def test_of_many_addresses_a_few_are_tried():
    guarded = AddressGuard(lookup=answering(*(f"1.1.1.{i}" for i in range(12))))
    assert len(resolve(guarded, "many.example", 80)) == guard.MAX_ADDRESSES_TRIED


def tcp(address: str, port: int) -> Any:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))


@pytest.mark.parametrize(
    ("url", "address", "port", "reason"),
    [
        ("http://1.1.1.1/", "127.0.0.1", 80, "forbidden_address"),
        ("http://example.org/", "10.0.0.1", 80, "forbidden_address"),
        ("http://example.org/", "::1", 80, "forbidden_address"),
        ("http://example.org/", "1.1.1.1", 22, "forbidden_port"),
        ("http://images.lan:8000/", "10.0.0.1", 8001, "forbidden_port"),
    ],
)
def test_a_socket_is_vetted_again_where_it_is_made(url, address, port, reason):
    """Whatever the connector may do: a cached, a raced or a literal address ends here too."""

    async def run() -> None:
        guarded = AddressGuard(["images.lan:8000"])
        guarded.start(check_url(url))
        with pytest.raises(FetchError, match=f"^{reason}$"):
            guarded.open_socket(tcp(address, port))
        assert guarded.count_sockets(enough=0) == 0
        guarded.start(check_url("http://images.lan:8000/"))
        guarded.open_socket(tcp("10.0.0.1", 8000)).close()

    asyncio.run(run())


def test_without_a_destination_a_socket_is_judged_by_its_address():
    guarded = AddressGuard(["images.lan:80"])
    with pytest.raises(FetchError, match=r"^forbidden_address$"):
        guarded.open_socket(tcp("10.0.0.1", 80))
    guarded.open_socket(tcp("1.1.1.1", 80)).close()


def look_up(names: NameCache, hosts: Sequence[str]) -> list[Any]:
    async def run() -> list[Any]:
        found = await asyncio.gather(*map(names.addresses, hosts), return_exceptions=True)
        await names.close()
        return found

    return asyncio.run(run())


def test_a_name_is_looked_up_once_for_all_who_ask():
    asked = []

    def lookup(host: str) -> list[str]:
        asked.append(host)
        time.sleep(0.02)
        return ["1.1.1.1"]

    names = NameCache(lookup)
    assert look_up(names, ["a.example"] * 50) == [("1.1.1.1",)] * 50
    assert look_up(names, ["a.example", "b.example"]) == [("1.1.1.1",)] * 2
    assert asked == ["a.example", "b.example"]


@pytest.mark.parametrize(
    ("code", "times"), [(socket.EAI_NONAME, 1), (socket.EAI_AGAIN, 2), (None, 1)]
)
def test_a_name_that_does_not_exist_is_remembered_a_resolver_in_trouble_is_not(code, times):
    asked = []

    def lookup(host: str) -> list[str]:
        asked.append(host)
        if code is None:
            return []
        raise socket.gaierror(code, "no")

    names = NameCache(lookup)
    for _ in range(2):
        [failure] = look_up(names, ["a.example"])
        assert failure.message == "dns_failure"
    assert len(asked) == times


def test_answers_go_stale_and_the_oldest_is_forgotten(monkeypatch):
    asked = []

    def lookup(host: str) -> list[str]:
        asked.append(host)
        return ["1.1.1.1"]

    monkeypatch.setattr(guard, "MAX_CACHED_NAMES", 2)
    names = NameCache(lookup)
    for host in ("a", "b", "c", "c", "b", "a"):
        look_up(names, [host])
    assert asked == ["a", "b", "c", "a"]
    names = NameCache(lookup, ttl_seconds=0)
    look_up(names, ["d"])
    look_up(names, ["d"])
    assert asked[-2:] == ["d", "d"]


def test_a_look_up_that_hangs_holds_up_no_other_and_no_exit():
    release = threading.Event()

    def lookup(host: str) -> list[str]:
        if host == "slow.example":
            release.wait(20)
        return ["1.1.1.1"]

    async def run() -> float:
        names = NameCache(lookup)
        start = time.monotonic()
        slow = asyncio.create_task(names.addresses("slow.example"))
        assert await names.addresses("quick.example") == ("1.1.1.1",)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(slow, 0.1)
        await names.close()
        return time.monotonic() - start

    assert asyncio.run(run()) < 5
    assert all(t.daemon for t in threading.enumerate() if t.name.startswith("look up"))
    release.set()


def test_a_fault_of_this_machine_is_not_taken_for_the_names():
    def lookup(host: str) -> list[str]:
        raise OSError(24, "Too many open files")

    [failure] = look_up(NameCache(lookup), ["a.example"])
    assert isinstance(failure, OSError)
    assert failure.errno == 24


@pytest.mark.parametrize(
    "entry",
    ["127.0.0.1", "127.0.0.1:", ":80", "a:0", "a:65536", "::1:80", "", "a b:80", "[::1%1]:80"],
)
def test_an_entry_that_is_not_host_and_port_is_refused(entry):
    with pytest.raises(DeclipError, match="allow_addresses holds"):
        parse_allowed([entry])


def test_allowed_entries_are_read():
    entries = ["LocalHost:80", "[::1]:8000", "[0:0::1]:81", "127.1:82"]
    expected = {("localhost", 80), ("::1", 8000), ("::1", 81), ("127.0.0.1", 82)}
    assert parse_allowed(entries) == expected
