"""Tab-separated lines: every line has its number, good or bad, whatever the blocks were."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_ingest import list_lines
from declip_ingest.list_files import find_files
from declip_ingest.list_lines import read_hashes, read_lines
from declip_ingest.list_readers import ListOptions, open_list, recognize_all
from declip_ingest.url_digests import digest_texts
from declip_shards import DeclipError


def read(path, *, has_header=False) -> tuple[dict[int, tuple[str, str]], list[int]]:
    good, bad = {}, []
    last = -1
    file = find_files(str(path))[0]
    for numbers, table, lost in read_lines(
        file, ("a", "b"), lambda count: None, has_header=has_header
    ):
        both = sorted([*numbers.tolist(), *lost.tolist()])
        assert both[0] > last
        last = both[-1]
        bad += lost.tolist()
        for number, a, b in zip(numbers, table["a"].to_pylist(), table["b"].to_pylist()):
            good[int(number)] = (a.decode(), b.decode())
    return good, bad


@given(
    st.lists(st.sampled_from(["a\tb", 'say "hi"\tx', "cut", "x\ty\tz", "", "'\t,"]), min_size=1),
    st.sampled_from([16, 40, 1 << 20]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_lines_are_split_as_pythons_split_does(tmp_path_factory, lines, block, has_header):
    lines = ["first\tline"] * 4 + lines
    # The parser takes an empty line for two empty fields; it is a row without a URL.
    expected_bad = [n for n, line in enumerate(lines) if line.count("\t") != 1 and line]
    path = tmp_path_factory.mktemp("l") / "t.tsv"
    path.write_text(("a\tb\n" if has_header else "") + "".join(f"{line}\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(list_lines, "BLOCK_BYTES", block)
        if 2 * len(expected_bad) > len(lines):
            with pytest.raises(DeclipError, match="more lines that are not of 2"):
                read(path, has_header=has_header)
            return
        good, bad = read(path, has_header=has_header)
    assert bad == expected_bad
    assert good == {
        n: tuple(line.split("\t")) if line else ("", "")
        for n, line in enumerate(lines)
        if n not in expected_bad
    }


def test_a_line_longer_than_a_block_is_refused_and_a_megabyte_is_not(tmp_path, monkeypatch):
    path = tmp_path / "t.tsv"
    path.write_text("x" * 1_000_000 + "\thttp://a/\n")
    assert len(read(path)[0][0][0]) == 1_000_000
    monkeypatch.setattr(list_lines, "BLOCK_BYTES", 1 << 16)
    with pytest.raises(DeclipError, match="has a line longer than"):
        read(path)


def test_labelled_cc3m_carries_its_labels(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("a cat\thttp://a/1\tcat,pet\t/m/01\t0.9\nplain\thttp://a/2\t\t\t\n")
    (rows,) = open_list(str(path), ListOptions()).read(lambda count: None)
    assert rows.table.to_pylist()[0] == {
        "url": "http://a/1",
        "caption": "a cat",
        "labels": "cat,pet",
        "mids": "/m/01",
        "scores": "0.9",
    }


@pytest.mark.parametrize("columns", [("url", "md5"), ("sha256", "url", "md5")])
def test_hash_files_are_read_by_what_stands_in_them(tmp_path, columns):
    values = {"url": "http://a/{}", "sha256": "{:064x}", "md5": "{:032x}"}
    path = tmp_path / "hashes.tsv"
    lines = ["\t".join(values[name].format(i) for name in columns) for i in range(9)]
    path.write_text("\n".join(lines) + "\n")
    files = find_files(str(path))
    table, algorithm = read_hashes(files, recognize_all(files))
    assert algorithm == ("sha256" if "sha256" in columns else "md5")
    import pyarrow as pa

    found, is_found = table.look_up(digest_texts(pa.array(["http://a/3", "http://none/"])))
    assert is_found.tolist() == [True, False]
    width = {"sha256": 32, "md5": 16}[algorithm]
    assert found[0].tobytes().hex() == f"{3:0{2 * width}x}"
    assert np.array_equal(found[1], np.zeros(width, np.uint8))
