"""Each known list is told by its content, and a kind that the content denies is refused."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_ingest.list_files import find_files
from declip_ingest.list_kinds import PUBLISHED, Found, agree, compare_counts, recognize
from declip_shards import DeclipError

URL = "http://a.example/1.jpg"
YFCC = "\t".join(["1", "6985418911", "ab" * 16, *["x"] * 13, URL, *["y"] * 7, "0"])
TEXTS = {
    "cc3m": f"a cat\t{URL}\n",
    "cc12m": f"{URL}\ta cat\n",
    "yfcc15m_v1": f"12\t6985418911\t{'ab' * 16}\n",
    "yfcc100m": YFCC + "\n",
    "yfcc15m_v2": json.dumps({"caption": ["a"], "filename": "x.jpg", "url": URL}) + "\n",
}


def found(tmp_path: Path, text: str | bytes, name: str = "list.tsv") -> Found:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return recognize(find_files(str(path))[0])


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", ["list.tsv", "list", "list.json", "list.txt"])
def test_known_lists_are_told_whatever_they_are_called(tmp_path, kind, name):
    assert found(tmp_path, TEXTS[kind] * 3, name).kind == kind
    assert found(tmp_path, TEXTS[kind].rstrip("\n"), name).kind == kind
    assert found(tmp_path, "\ufeff" + TEXTS[kind].replace("\n", "\r\n"), name).kind == kind


def test_the_older_yfcc_release_and_labelled_cc3m(tmp_path):
    older = "\t".join(["6985418911", *["x"] * 13, URL, *["y"] * 7, "1"])
    assert found(tmp_path, older + "\n").num_fields == 23
    labelled = f"a cat\t{URL}\tcat,pet\t/m/01,/m/02\t0.9,0.8\n"
    assert (found(tmp_path, labelled).kind, found(tmp_path, labelled).num_fields) == ("cc3m", 5)


def test_most_lines_decide_not_the_first(tmp_path):
    assert found(tmp_path, f"\t{URL}\n" + TEXTS["cc3m"] * 3).kind == "cc3m"
    assert found(tmp_path, f"http://x/ is nice\t{URL}\n" + TEXTS["cc3m"] * 3).kind == "cc3m"
    assert found(tmp_path, f"\ta caption\n{URL}\tb\n").kind == "cc12m"
    assert found(tmp_path, "cut line\n" + TEXTS["cc3m"] * 3).kind == "cc3m"
    with pytest.raises(DeclipError, match="say which it is with kind"):
        found(tmp_path, f"{URL}\t{URL}\n")


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("laion", ["SAMPLE_ID", "URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE", "NSFW", "similarity"]),
        ("laion", ["URL", "TEXT", "punsafe"]),
        ("datacomp", ["uid", "url", "text", "clip_b32_similarity_score", "sha256"]),
        ("coyo", ["id", "url", "text", "width", "height", "image_phash"]),
        ("table", ["url", "caption"]),
        ("table", ["uid", "url", "text"]),
    ],
)
def test_named_columns_tell_the_kind_in_every_form(tmp_path, kind, columns):
    row = dict.fromkeys(columns, "x")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    assert recognize(find_files(str(tmp_path / "p.parquet"))[0]).kind == kind
    assert found(tmp_path, json.dumps(row) + "\n", "t.jsonl").kind == kind
    assert found(tmp_path, json.dumps([row]), "t.json").kind == kind
    assert found(tmp_path, "\t".join(columns) + "\n").kind == kind
    assert found(tmp_path, ",".join(columns) + "\n", "t.csv").kind == kind


def test_a_header_on_ccs_file_is_quoted_or_not_by_the_kind(tmp_path):
    text = f"caption\turl\n{TEXTS['cc3m']}"
    header = found(tmp_path, text)
    assert (header.kind, header.form, header.has_header) == ("table", "tsv", True)
    agreed = agree("x", "cc3m", header)
    assert (agreed.kind, agreed.form, agreed.has_header) == ("cc3m", "lines", True)
    with pytest.raises(DeclipError, match="was said to be cc12m"):
        agree("x", "cc12m", header)


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("cc3m", TEXTS["cc12m"], "cc3m (caption<TAB>url), but it looks like cc12m"),
        ("laion", '{"url": "u", "caption": "c"}', "it has no column 'text'; it has: url, caption"),
        ("yfcc15m_v2", '{"url": "u", "caption": "c"}', "has no column 'filename'"),
        ("table", TEXTS["cc3m"], "table (named columns), but it looks like cc3m"),
        ("cc33m", TEXTS["cc3m"], "Did you mean 'cc3m'"),
        ("auto", f"{URL}\ta\tb\tc\n", "lines of 4 tab-separated fields without a header"),
    ],
)
def test_the_user_and_the_content_must_agree(tmp_path, kind, text, said):
    with pytest.raises(DeclipError) as caught:
        agree("the-list", kind, found(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_called_parquet_that_is_none(tmp_path):
    with pytest.raises(DeclipError, match="is called parquet but does not begin as one"):
        found(tmp_path, "url,caption\n", "t.parquet")


def test_counts_are_compared_with_the_nearest_published_one():
    known, line = compare_counts("cc3m", 15_840) or (None, "")
    assert known is not None
    assert known.what == "CC3M validation"
    assert "as published" in line
    assert "333 fewer than published" in (compare_counts("cc3m", 3_318_000) or ("", ""))[1]
    assert "as published" in (compare_counts("cc12m", 12_200_000) or ("", ""))[1]
    assert "more than published" in (compare_counts("yfcc15m_v1", 15_388_848) or ("", ""))[1]
    assert compare_counts("laion", 5) is None
    assert {p.num_rows for ps in PUBLISHED.values() for p in ps} == {
        3_318_333,
        15_840,
        2_007_090,
        12_000_000,
        100_000_000,
        14_829_396,
        15_388_848,
    }
