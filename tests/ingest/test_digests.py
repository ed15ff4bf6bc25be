"""Lists of digests fail closed; a hash is compared with the bytes, whatever its algorithm."""

import hashlib
from pathlib import Path

import pytest

from declip_ingest.digests import (
    ExpectedHash,
    check_hash,
    host_of,
    is_listed,
    is_placeholder_url,
    read_digests,
)
from declip_ingest.failures import FetchError
from declip_shards import DeclipError

DATA = b"bytes of a picture"
HASHES = {name: hashlib.new(name, DATA).hexdigest() for name in ("md5", "sha256", "sha512")}


def test_digests_are_read_by_their_length_and_comments_skipped(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    lines = ["# from a report", "", *(f"{h.upper()}  name.jpg" for h in HASHES.values())]
    file.write_text("\ufeff" + "\r\n".join(lines))
    assert read_digests([str(file)], "blocklists") == {k: {v} for k, v in HASHES.items()}
    assert read_digests([], "blocklists") == {}


@pytest.mark.parametrize("content", ["not hex", "abcdef", "g" * 64, "a" * 63])
def test_a_line_that_is_no_digest_is_refused_with_its_number(tmp_path: Path, content: str) -> None:
    file = tmp_path / "list.txt"
    file.write_text(f"{HASHES['md5']}\n{content}\n")
    with pytest.raises(DeclipError, match=r"line 2 of .*blocklists.*no md5, sha256 or sha512"):
        read_digests([str(file)], "blocklists")


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing yet\n", "\ufeff"])
@pytest.mark.parametrize("option", ["blocklists", "placeholders"])
def test_a_list_without_a_digest_is_refused(tmp_path: Path, content: str, option: str) -> None:
    full, empty = tmp_path / "full.txt", tmp_path / "empty.txt"
    full.write_text(HASHES["md5"])
    empty.write_text(content)
    with pytest.raises(DeclipError, match=rf"empty\.txt', named by {option}, holds no digest"):
        read_digests([str(full), str(empty)], option)


def test_a_missing_list_is_no_empty_list(tmp_path: Path) -> None:
    with pytest.raises(DeclipError, match=r"gone\.txt.*placeholders.*does not exist"):
        read_digests([str(tmp_path / "gone.txt")], "placeholders")


@pytest.mark.parametrize("algorithm", HASHES)
def test_bytes_are_found_by_any_algorithm(algorithm: str) -> None:
    listed = {algorithm: frozenset({HASHES[algorithm]})}
    assert is_listed(DATA, listed)
    assert not is_listed(b"other bytes", listed)


@pytest.mark.parametrize("algorithm", HASHES)
@pytest.mark.parametrize("prefix", [True, False])
def test_a_hash_is_checked_with_and_without_its_name(algorithm: str, prefix: bool) -> None:
    text = f"{algorithm}:{HASHES[algorithm]}" if prefix else HASHES[algorithm].upper()
    assert ExpectedHash.parse(text) == ExpectedHash(algorithm=algorithm, digest=HASHES[algorithm])
    assert check_hash(DATA, text)
    with pytest.raises(FetchError, match=r"^hash_mismatch$"):
        check_hash(DATA + b".", text)


def test_a_row_without_a_hash_is_not_checked_and_one_with_nonsense_fails() -> None:
    assert not check_hash(DATA, None)
    assert not check_hash(DATA, "")
    for nonsense in ("crc32:abcd", "md5:" + "0" * 64, "z" * 32):
        with pytest.raises(FetchError, match=r"^hash_mismatch: digest$"):
            check_hash(DATA, nonsense)


@pytest.mark.parametrize(
    ("url", "is_one"),
    [
        ("https://s.yimg.com/pw/images/en-us/photo_unavailable.png", True),
        ("https://live.staticflickr.com/123/456_o.jpg", False),
        ("http://i.imgur.com/removed.png", True),
        ("http://i.imgur.com/Remov3d.png", False),
        ("http://example.com/photo_unavailable.png", False),
    ],
)
def test_notices_of_hosts_are_known_by_their_address(url: str, is_one: bool) -> None:
    assert is_placeholder_url(url) is is_one


def test_hosts_are_named_with_their_port_and_nonsense_is_no_host() -> None:
    assert host_of("HTTP://User@Example.COM:8080/a") == "example.com:8080"
    assert host_of("http://[::1") == host_of("") == ""
