"""Every kind of trouble, what a row of it must end as, and lists of rows made of them by a seed.

A kind's number is its row in the fault catalogue. ``reasons`` are all that may come of it, named as
in :mod:`declip_ingest.failures`; the empty string is success. A kind with one reason is strict;
several stand where the network may show the same fault in more than one way.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from tests.ingest.chaos_pictures import BodyMaker
    from tests.ingest.chaos_server import Places
else:
    from chaos_pictures import BodyMaker
    from chaos_server import Places

Row = dict[str, Any]
UrlMaker = Callable[[Places, int], str | None]
OK = ("",)
FORBIDDEN = ("forbidden_address", "forbidden_port")
CUT_OFF = ("connection_reset", "short_body")
TEST_DOMAIN = ".chaos.test"
"""Names that only the injected resolver knows (chaos_stage.py)."""
REPEATS = 12
"""Rows of ``repeated`` that stand together: more than placeholder_repeats."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of row."""

    name: str
    row: int
    """Number in the catalogue."""
    reasons: tuple[str, ...]
    """What a row of it may end as."""
    url: UrlMaker
    extra_seconds: float = 0.0
    """That the server's own pauses may take, on top of the time for a URL."""
    caption: Callable[[int], str | None] = lambda serial: f"picture number {serial}"
    expected_hash: str = ""
    """``right``, ``wrong`` or ``garbled`` digest in the list; none otherwise."""
    boxes: Any = None
    """For the column of boxes to blur."""
    share: float = 1.0
    """How often it stands in a list, against the others; dear ones are rare."""
    body: str = ""
    """Name of the picture where its digest matters."""
    together: int = 1
    """Rows that must stand in one shard."""
    opted_out: bool = False
    """Whether its URLs are on the opt-out list."""


def at(path: str, group: str = "web") -> UrlMaker:
    """URLs of the web, ``path`` followed by the serial number."""
    return lambda places, serial: f"http://{places.host(group, serial)}/{path}/{serial}.jpg"


def fixed(*urls: str | None) -> UrlMaker:
    """URLs in turn; ``{port}`` is the canary's, ``{web}`` the web's, ``{n}`` the serial."""

    def make(places: Places, serial: int) -> str | None:
        url = urls[serial % len(urls)]
        if url is None:
            return None
        values = {"port": places.canary_port, "web": places.web, "n": serial}
        for name, value in values.items():
            url = url.replace("{" + name + "}", str(value))
        return url

    return make


def to(*targets: str) -> UrlMaker:
    """Redirects to these URLs in turn."""

    def make(places: Places, serial: int) -> str:
        target = fixed(*targets)(places, serial)
        assert target is not None
        host = places.host("web", serial)
        return f"http://{host}/redirect_to/{quote(target, safe='')}/{serial}.jpg"

    return make


def tls(kind: str) -> UrlMaker:
    """URLs of a listener that speaks TLS in its own way."""
    return lambda places, serial: f"https://127.0.0.1:{places.tls[kind]}/good/jpeg/{serial}.jpg"


def named(label: str, port: str = "{port}") -> UrlMaker:
    """URLs whose host only the injected resolver knows."""
    return fixed(f"http://{label}-{{n}}{TEST_DOMAIN}:{port}/good/jpeg/{{n}}.jpg")


def _kind(name: str, row: int, reasons: str | tuple[str, ...], url: UrlMaker, **rest: Any) -> Kind:
    found = (reasons,) if isinstance(reasons, str) else reasons
    return Kind(name=name, row=row, reasons=found, url=url, **rest)


FORBIDDEN_HOSTS = (
    "127.0.0.1", "127.1", "0x7f.1", "0177.0.0.1", "2130706433", "0x7f000001", "127.0.0.53",
    "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "localhost",
    "LOCALHOST.", "10.0.0.1", "192.168.1.1", "172.16.0.9", "169.254.169.254", "100.64.0.1",
    "[fc00::1]", "[fe80::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "224.0.0.1",
    "255.255.255.255", "198.18.0.1", "240.0.0.1",
)  # fmt: skip
"""Hosts that must never be reached, in every notation that resolvers understand."""
_FORBIDDEN_URLS = tuple(f"http://{host}:{{port}}/{{n}}.jpg" for host in FORBIDDEN_HOSTS)
_REFUSED_SCHEMES = ("file:///etc/passwd", "ftp://127.0.0.1:{port}/{n}.jpg", "javascript:alert({n})",
                    "data:image/png;base64,AAAA", "gopher://127.0.0.1:{port}/{n}")  # fmt: skip
_BAD_URLS = (
    "", " ", "{n}", "//127.0.0.1/{n}.jpg", "http://", "http:///{n}.jpg", "http://a b.test/{n}.jpg",
    "http://127.0.0.1:99999/{n}.jpg", "http://x.test/\r\nHost: y/{n}.jpg", "http://x.test/\x00{n}",
    "http://user:secret@127.0.0.1:{port}/{n}.jpg", "http://[::1/{n}.jpg",
    "http://x.test/" + "a" * 100_000 + "{n}", "http://" + "a" * 300 + ".test/{n}.jpg",
)  # fmt: skip
_ODD_CAPTIONS = (
    "nul \x00 inside", "\u202eright to left\u202c", 'a "quoted", comma', "line\nbreak\ttab", "",
    " ", "\u0645\u0631\u062d\u0628\u0627", "\U0001f600" * 50, "x" * 1_000_000,
)  # fmt: skip

KINDS: tuple[Kind, ...] = (
    _kind("dns_unknown", 1, "dns_failure", named("unknown", "80")),
    _kind("dns_again", 1, "dns_failure", named("again", "80")),
    _kind("dns_hang", 1, ("dns_failure", "timeout"), named("hang", "80"), share=0.3),
    _kind("refused", 2, "connection_refused",
          lambda places, serial: f"http://127.0.0.1:{places.closed}/{serial}.jpg"),
    _kind("reset_at_once", 2, "connection_reset", at("reset_at_once/jpeg")),
    _kind("reset_in_body", 2, CUT_OFF, at("reset_in_body/jpeg")),
    _kind("closed_at_once", 2, "connection_reset", at("closed_at_once/jpeg")),
    _kind("keepalive_closed", 2, OK, at("closing_after/jpeg")),
    _kind("slow_headers", 3, "timeout", at("slow_headers/jpeg", "slow"), share=0.5),
    _kind("slow_body", 3, "timeout", at("slow_body/jpeg", "slow"), share=0.5),
    _kind("stalled_body", 3, "timeout", at("stalling/jpeg", "slow"), share=0.5),
    _kind("no_answer", 4, "timeout", at("hanging/jpeg", "slow"), share=0.5),
    _kind("short_body", 5, CUT_OFF, at("closed_in_body/jpeg")),
    _kind("length_too_small", 5, ("truncated_image", "bad_response", "short_body"),
          at("length_too_small/jpeg")),
    _kind("chunked", 5, OK, at("chunked/jpeg")),
    _kind("chunked_cut", 5, CUT_OFF, at("chunked_cut/jpeg")),
    _kind("chunked_garbled", 5, "bad_response", at("chunked_garbled/jpeg")),
    _kind("until_closed", 5, OK, at("until_closed/jpeg")),
    _kind("two_lengths", 5, ("bad_response", "truncated_image", "short_body", "not_image"),
          at("two_lengths/jpeg")),
    _kind("bad_length", 5, "bad_response", at("bad_length/jpeg")),
    _kind("not_http", 5, "bad_response", at("not_http/jpeg")),
    _kind("many_headers", 5, ("bad_response", "too_large"), at("many_headers/jpeg"), share=0.5),
    _kind("endless_chunks", 6, "too_large", at("endless/jpeg"), share=0.5),
    _kind("endless_plain", 6, "too_large", at("endless_plain/jpeg"), share=0.5),
    _kind("huge_length", 6, "too_large", at("huge_length/jpeg")),
    _kind("gzip_bomb", 7, "content_encoding", at("gzip_bomb/jpeg")),
    _kind("gzip_redirect", 7, OK, at("gzip_redirect/jpeg")),
    _kind("redirect", 8, OK, at("redirect/jpeg/301/1")),
    _kind("redirect_five", 8, OK, at("redirect/jpeg/307/5")),
    _kind("redirect_utf8", 8, OK, at("redirect_utf8/jpeg")),
    _kind("redirect_fifty", 8, "redirect_loop", at("redirect/jpeg/302/50")),
    _kind("redirect_loop", 8, "redirect_loop", at("redirect_loop/jpeg")),
    _kind("redirect_nowhere", 8, "bad_redirect", at("redirect_nowhere/jpeg")),
    _kind("redirect_scheme", 8, "bad_redirect", to(*_REFUSED_SCHEMES)),
    _kind("redirect_inside", 9, (*FORBIDDEN, "bad_redirect"), to(*_FORBIDDEN_URLS), share=2),
    _kind("inside", 10, (*FORBIDDEN, "bad_url"), fixed(*_FORBIDDEN_URLS), share=2),
    _kind("name_of_inside", 10, FORBIDDEN, named("inside")),
    _kind("name_of_both", 10, FORBIDDEN, named("both")),
    # The first answer is an address that is public by its form and that nothing routes.
    _kind("rebinding", 11, (*FORBIDDEN, "host_unreachable", "network_error", "timeout"),
          named("rebinding", "80"), share=0.3),
    _kind("refused_scheme", 12, ("bad_scheme", "bad_url"), fixed(*_REFUSED_SCHEMES)),
    _kind("bad_url", 12, ("bad_url", "bad_scheme", "missing_url"), fixed(*_BAD_URLS)),
    _kind("no_url", 12, "missing_url", fixed(None)),
    _kind("tls_good", 13, OK, tls("good")),
    _kind("tls_expired", 13, "tls_error", tls("expired")),
    _kind("tls_self_signed", 13, "tls_error", tls("self_signed")),
    _kind("tls_wrong_host", 13, "tls_error", tls("wrong_host")),
    _kind("tls_plain", 13, ("tls_error", "bad_response"), tls("plain")),
    _kind("tls_mute", 13, ("timeout", "robots_unavailable"), tls("mute"), share=0.3),
    *(
        _kind(f"status_{code}", 14, f"http_{code}", at(f"status/{code}"), share=0.5)
        for code in (204, 206, 304, 400, 401, 403, 404, 410, 451, 500, 501)
    ),
    _kind("pause_once", 14, OK, at("pausing/jpeg/1/1", "pause"), extra_seconds=20, share=0.5),
    _kind("pause_always", 14, "http_429", at("pausing/jpeg/1/99", "pause_always"),
          extra_seconds=40, share=0.3),
    _kind("pause_long", 14, "http_429", at("pausing/jpeg/86400/99", "pause_long"), share=0.5,
          extra_seconds=20),
    _kind("busy_once", 14, OK, at("failing_once/jpeg", "busy"), extra_seconds=20, share=0.5),
    _kind("login_page", 15, "not_image", at("good/html")),
    _kind("html_as_image", 15, "not_image", at("typed/html/image-jpeg")),
    _kind("image_as_html", 15, OK, at("typed/jpeg/text-html")),
    _kind("json_answer", 15, "not_image", at("typed/json/application-json")),
    _kind("empty", 16, "empty_body", at("empty/jpeg")),
    _kind("placeholder", 16, "placeholder", at("good/placeholder"), body="placeholder"),
    _kind("repeated", 16, "repeated_image", at("good/repeated"), together=REPEATS, share=2),
    _kind("cut_jpeg", 17, "truncated_image", at("good/cut_jpeg")),
    _kind("cut_jpeg_late", 17, "truncated_image", at("good/cut_jpeg_late")),
    _kind("cut_png", 17, "truncated_image", at("good/cut_png")),
    _kind("cut_webp", 17, "truncated_image", at("good/cut_webp")),
    _kind("bad_jpeg", 17, ("corrupt_image", "truncated_image"), at("good/bad_jpeg")),
    _kind("bad_png", 17, ("corrupt_image", "truncated_image"), at("good/bad_png")),
    _kind("gigapixel_png", 18, "too_many_pixels", at("good/gigapixel_png")),
    _kind("header_png", 18, "too_many_pixels", at("good/header_png")),
    _kind("header_jpeg", 18, "too_many_pixels", at("good/header_jpeg")),
    _kind("many_frames", 18, OK, at("good/many_frames"), share=0.5),
    _kind("decoder_crash", 19, "decoder_crash", at("good/killer_crash"), share=0.25),
    _kind("decoder_hang", 19, "decoder_timeout", at("good/killer_hang"), share=0.25),
    _kind("decoder_memory", 19, "decoder_memory", at("good/killer_memory"), share=0.25),
    _kind("exif", 20, OK, at("good/exif")),
    _kind("bad_exif", 20, OK, at("good/bad_exif")),
    _kind("gps_exif", 20, OK, at("good/gps_exif")),
    *(
        _kind(name, 21, OK, at(f"good/{name}"), share=0.5)
        for name in ("cmyk", "sixteen_bit", "gray_alpha", "palette_alpha", "gray", "progressive")
    ),
    _kind("one_pixel", 21, "image_too_small", at("good/one_pixel")),
    _kind("strip", 21, "aspect_ratio_too_large", at("good/strip")),
    *(
        _kind(name, 22, OK, at(f"good/{name}"), share=0.5)
        for name in ("png", "webp", "gif", "animated_gif", "animated_webp")
    ),
    *(
        _kind(name, 22, "unsupported_format", at(f"good/{name}"), share=0.5)
        for name in ("svg", "heic", "tiff", "eps", "bmp")
    ),
    _kind("jpeg_zip", 23, OK, at("good/jpeg_zip")),
    _kind("jpeg_html", 23, OK, at("good/jpeg_html")),
    _kind("noai", 24, "opted_out", at("tagged/jpeg/noai")),
    _kind("noindex", 24, "opted_out", at("tagged/jpeg/all%2C%20NoIndex")),
    _kind("noai_for_us", 24, "opted_out", at("tagged/jpeg/opendeclip%3A%20noai")),
    _kind("noai_for_another", 24, OK, at("tagged/jpeg/otherbot%3A%20noai")),
    _kind("robots_deny", 24, "robots_denied", at("good/jpeg", "robots_deny")),
    _kind("robots_scoped", 24, "robots_denied", at("good/jpeg", "robots_scoped")),
    _kind("robots_scoped_free", 24, OK, at("typed/jpeg/image-jpeg", "robots_scoped")),
    _kind("robots_error", 24, "robots_unavailable", at("good/jpeg", "robots_error"),
          extra_seconds=10),
    _kind("robots_hang", 24, ("robots_unavailable", "timeout"), at("good/jpeg", "robots_hang"),
          extra_seconds=10, share=0.3),
    _kind("robots_reset", 24, "robots_unavailable", at("good/jpeg", "robots_reset"),
          extra_seconds=10),
    _kind("robots_huge", 24, OK, at("good/jpeg", "robots_huge"), extra_seconds=10),
    _kind("robots_html", 24, OK, at("good/jpeg", "robots_html")),
    _kind("hash_right", 25, OK, at("good/png"), expected_hash="right", body="png", share=3),
    _kind("hash_wrong", 25, "hash_mismatch", at("good/png"), expected_hash="wrong"),
    _kind("hash_garbled", 25, "hash_mismatch", at("good/png"), expected_hash="garbled", share=0.5),
    _kind("blocked", 26, "blocked", at("good/blocked"), body="blocked"),
    _kind("opt_out_list", 26, "opt_out_list", at("good/jpeg"), opted_out=True),
    _kind("same_url", 27, OK,
          lambda places, serial: f"http://{places.host('web', 0)}/good/jpeg/{serial % 3}.jpg"),
    _kind("no_caption", 28, "missing_caption", at("good/jpeg"), caption=lambda serial: None),
    _kind("odd_caption", 28, ("", "bad_caption"), at("good/jpeg"),
          caption=lambda serial: _ODD_CAPTIONS[serial % len(_ODD_CAPTIONS)], share=0.5),
    _kind("boxes", 28, OK, at("good/jpeg"), boxes=[[0.1, 0.1, 0.5, 0.5]]),
    _kind("bad_boxes", 28, "bad_boxes", at("good/jpeg"), boxes=[[0.1, 0.1, 7.0]]),
)  # fmt: skip
BY_NAME = {kind.name: kind for kind in KINDS}
PLAIN = _kind("plain", 0, OK, at("good/jpeg"), share=0)
"""What all the rest of a list is: a good picture from a good host."""


def make_rows(seed: int, count: int, share: float, places: Places, shard_size: int) -> list[Row]:
    """``count`` rows of which ``share`` misbehave, every kind at least twice; by the seed alone.

    Columns: ``url``, ``caption``, ``expected_hash``, ``boxes`` and ``kind``. Rows that are about
    their neighbors (a repeated picture) stand in one shard, wherever the shuffle puts them.

    Raises:
        ValueError: too few rows for every kind to stand in twice.
    """
    dice = random.Random(seed)
    blocks = _blocks(round(count * share))
    num_bad = sum(len(block) for block in blocks)
    if num_bad > count or max(map(len, blocks)) > shard_size:
        raise ValueError(f"{count} rows in shards of {shard_size} are too few for {num_bad} rows")
    slots: list[list[Kind]] = [[] for _ in range(-(-count // shard_size))]
    room = [min(shard_size, count - number * shard_size) for number in range(len(slots))]
    dice.shuffle(blocks)
    for block in sorted(blocks, key=len, reverse=True):
        number = dice.choice(
            [i for i in range(len(slots)) if room[i] - len(slots[i]) >= len(block)]
        )
        slots[number] += block
    serials = dict.fromkeys((kind.name for kind in (*KINDS, PLAIN)), 0)
    bodies = BodyMaker()
    rows = []
    for slot, size in zip(slots, room, strict=True):
        slot += [PLAIN] * (size - len(slot))
        dice.shuffle(slot)
        for kind in slot:
            serial = serials[kind.name]
            serials[kind.name] += 1
            # Serial numbers of kinds that share a path are kept apart, or they would share URLs.
            number = serial if kind.name == "same_url" else serial + 100_000 * _offset(kind)
            rows.append(_row(kind, number, places, bodies))
    return rows


def _offset(kind: Kind) -> int:
    return 0 if kind is PLAIN else 1 + KINDS.index(kind)


def _blocks(total: int) -> list[list[Kind]]:
    """About ``total`` rows of all kinds by their shares, in blocks that stay together."""
    weight = sum(kind.share for kind in KINDS)
    blocks = []
    for kind in KINDS:
        wanted = max(2, round(total * kind.share / weight))
        if kind.together > 1:
            blocks += [[kind] * kind.together] * max(1, wanted // kind.together)
        else:
            blocks += [[kind]] * wanted
    return blocks


def _row(kind: Kind, serial: int, places: Places, bodies: BodyMaker) -> Row:
    digest = None
    if kind.expected_hash == "right":
        digest = "sha256:" + hashlib.sha256(bodies.body(kind.body, serial)).hexdigest()
    elif kind.expected_hash == "wrong":
        digest = "md5:" + hashlib.md5(b"%d" % serial, usedforsecurity=False).hexdigest()
    elif kind.expected_hash == "garbled":
        digest = "not a digest"
    return {
        "url": kind.url(places, serial),
        "caption": kind.caption(serial),
        "expected_hash": digest,
        "boxes": kind.boxes,
        "kind": kind.name,
    }


def listed_digest(name: str) -> str:
    """sha256 of the one body of a kind: for the files of blocked bytes and of placeholders."""
    return hashlib.sha256(BodyMaker().body(BY_NAME[name].body, 0)).hexdigest()
