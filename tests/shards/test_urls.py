"""Spellings of a URL have one form. Against the fetcher's own: tests/ingest/test_optout_law.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_shards.urls import canonical_url


@pytest.mark.parametrize(
    ("url", "form"),
    [
        ("https://example.org", "http://example.org/"),
        ("https://example.org:018080/a", "http://example.org:18080/a"),
        ("http://example.org:0080/a", "http://example.org/a"),
        ("http://example.org:443/a", "http://example.org/a"),
        ("https://example.org:80/a", "http://example.org/a"),
        ("https://example.org./a", "http://example.org/a"),
        ("https://example.org.:443/a", "http://example.org/a"),
        ("http://2130706433/a", "http://127.0.0.1/a"),
        ("http://0x7f.1:8080/a", "http://127.0.0.1:8080/a"),
        ("http://0177.0.0.1/a", "http://127.0.0.1/a"),
        ("http://127.0.0.256/a", "http://127.0.0.256/a"),
        ("http://1.2.3.4.5/a", "http://1.2.3.4.5/a"),
        ("http://0X7G.1/a", "http://0x7g.1/a"),
        ("http://[2001:DB8:0::1]:80/a", "http://[2001:db8::1]/a"),
        ("http://[fe80::1%25Eth0]/a", "http://[fe80::1%25Eth0]/a"),
        ("https://münchen.de/a", "http://xn--mnchen-3ya.de/a"),
        ("https://MÜNCHEN。de/a", "http://xn--mnchen-3ya.de/a"),
        ("https://xn--mnchen-3ya.DE/a", "http://xn--mnchen-3ya.de/a"),
        ("https://faß.de/a", "http://xn--fa-hia.de/a"),
        ("https://example.org/b/../a.jpg", "http://example.org/a.jpg"),
        ("https://example.org/b/%2e%2E/./a.jpg", "http://example.org/a.jpg"),
        ("https://example.org/a/b/..", "http://example.org/a/"),
        ("https://example.org/../../a", "http://example.org/a"),
        ("https://example.org/a//../b", "http://example.org/a/b"),
        ("https://example.org/.", "http://example.org/"),
        ("https://example.org/a?b=/x/../y", "http://example.org/a?b=/x/../y"),
        ("https://Me:Secret@EXAMPLE.org:443/a", "http://Me:Secret@example.org/a"),
        ("https://a b.example/x", "http://a b.example/x"),
        ("https://example.org:99999/a", "https://example.org:99999/a"),
        ("ftp://Example.org/a", "ftp://Example.org/a"),
        ("http:///a", "http:///a"),
        (" text\n", "text"),
    ],
)
def test_the_form(url, form):
    assert canonical_url(url) == form
    assert canonical_url(form) == form


HOSTS = st.one_of(
    st.text("aA1.0xX:[]@é。-_\u00df%", max_size=12),
    st.sampled_from(["example.org", "127.1", "[::1]", "münchen.de.", "a..", "u@h:080"]),
)


@given(st.text(max_size=40), HOSTS)
def test_the_form_is_its_own(text, host):
    for url in (text, f"https://example.org/{text}", f"HTTP://{host}/{text}", f"http://{host}"):
        form = canonical_url(url)
        assert canonical_url(form) == form
