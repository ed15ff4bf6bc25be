"""Lists become one table: every row has one fate, and the same rows give the same bytes."""

import dataclasses
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_ingest import json_rows, list_lines, list_tables
from declip_ingest.list_rows import DROP_REASONS
from declip_ingest.sources import DROPPED_PATH, PAIRS_PATH, ReadPairs, pin_lists
from declip_ingest.table import open_pairs, plan_shards
from declip_shards import DeclipError, Stage, Store, TaskStats

CC3M = [("a red apple", "http://a.example/1.jpg"), ("a dog", "http://a.example/2.jpg?x=1,2")]


def read(
    root, *lists: object, **options: Any
) -> tuple[TaskStats, list[dict[str, Any]], list[tuple[Any, ...]]]:
    stage = pin_lists(ReadPairs(root=str(root), lists=tuple(map(str, lists)), **options))
    (task,) = stage.tasks()
    stats = stage.worker()(task)
    assert stats.num_in == stats.num_out + sum(stats.reasons.values())
    assert set(stats.reasons) <= set(DROP_REASONS)
    assert stage.is_done(task)
    store = Store(str(root))
    with store.open(PAIRS_PATH) as f:
        pairs = pq.read_table(f).to_pylist()
    with store.open(DROPPED_PATH) as f:
        dropped = [tuple(row.values()) for row in pq.read_table(f).to_pylist()]
    assert len(pairs) == stats.num_out
    assert Counter(reason for _, _, reason in dropped) == stats.reasons
    return stats, pairs, dropped


def refusal(root, *lists: object, **options: Any) -> str:
    with pytest.raises(DeclipError) as caught:
        read(root, *lists, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def cc3m(path: Path, rows=CC3M) -> Path:
    path.write_text("".join(f"{caption}\t{url}\n" for caption, url in rows), newline="")
    return path


def test_the_stage_is_one(tmp_path):
    stage = ReadPairs(root=str(tmp_path))
    assert isinstance(stage, Stage)
    with pytest.raises(DeclipError, match="no list is named"):
        stage.tasks()


def test_reading_inverts_writing(tmp_path):
    stats, pairs, dropped = read(tmp_path / "o", cc3m(tmp_path / "Train.tsv"))
    assert pairs == [{"url": url, "caption": caption} for caption, url in CC3M]
    assert dropped == []
    assert stats.extra["lists"][0]["kind"] == "cc3m"


def test_reading_its_own_table_again_changes_no_byte(tmp_path):
    rows = [
        {"url": f"http://a.example/{i}", "text": f"c{i}", "uid": f"{i:032x}", "sha256": "ab" * 32}
        | {"face_bboxes": [[0.1, 0.2, 0.3, 0.4]], "original_width": i, "license": "CC0", "x": i / 2}
        for i in range(50)
    ]
    rows[3]["face_bboxes"] = []
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    read(tmp_path / "a", tmp_path / "d.parquet")
    read(tmp_path / "b", tmp_path / "a" / PAIRS_PATH)
    first, second = ((tmp_path / x / PAIRS_PATH).read_bytes() for x in "ab")
    assert first == second


@given(
    st.lists(
        st.tuples(
            # Python strips the control characters 1c to 1f as white space, Arrow does not.
            st.text(
                st.characters(
                    exclude_characters="\t\r\n\x1c\x1d\x1e\x1f", exclude_categories=["Cs"]
                )
            ),
            st.sampled_from(["", " ", *(f"http://a.example/{i}.jpg" for i in range(9))]),
        ),
        min_size=1,
        max_size=40,
    )
)
@settings(max_examples=40, deadline=None)
def test_every_row_has_the_fate_that_a_plain_loop_gives_it(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("fates")
    rows = [("caption", "http://a.example/first"), *rows]
    _, pairs, dropped = read(folder / "o", cc3m(folder / "l.tsv", rows), kind="cc3m")
    kept, fates, seen = [], [], set()
    for number, (caption, url) in enumerate(rows):
        reason = ""
        if not url.strip():
            reason = "missing_url"
        elif not caption.strip():
            reason = "missing_caption"
        elif url in seen:
            reason = "duplicate_url"
        else:
            seen.add(url)
            kept.append({"url": url, "caption": caption})
        if reason:
            fates.append(("l.tsv", number, reason))
    assert pairs == kept
    assert dropped == fates


@pytest.mark.parametrize("block", [300, 1000])
@pytest.mark.parametrize("form", ["lines", "csv", "jsonl", "json"])
def test_the_bytes_do_not_depend_on_the_blocks(tmp_path, monkeypatch, form, block):
    rows = [(f"caption {i} {'x' * (i % 50)}", f"http://a.example/{i % 70}") for i in range(100)]
    path = cc3m(tmp_path / "l.tsv", rows)
    if form == "lines":
        lines = path.read_text().splitlines()
        lines[7] = lines[50] = lines[99] = "cut"
        path.write_text("\n".join(lines))
    else:
        path = tmp_path / f"l.{form}"
        texts = [json.dumps({"url": url, "caption": text}) for text, url in rows]
        path.write_text(
            {
                "csv": "url,caption\n" + "".join(f'{u},"{t}"\n' for t, u in rows),
                "jsonl": "\n".join(texts),
                "json": "[" + ",\n".join(texts) + "]",
            }[form]
        )
    read(tmp_path / "a", path)
    monkeypatch.setattr(list_lines, "BLOCK_BYTES", block)
    monkeypatch.setattr(list_tables, "BLOCK_BYTES", block)
    monkeypatch.setattr(json_rows, "BLOCK_BYTES", block)
    read(tmp_path / "b", path)
    for name in (PAIRS_PATH, DROPPED_PATH):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_several_lists_in_their_order_first_of_duplicates_kept(tmp_path):
    one = cc3m(tmp_path / "one.tsv")
    two = tmp_path / "two.csv"
    two.write_text("url,caption,license\nhttp://a.example/2.jpg?x=1,no,\n")
    two.write_text(
        'URL,caption,license\n"http://a.example/2.jpg?x=1,2",again,CC0\nhttp://b/,b,CC0\n'
    )
    stats, pairs, dropped = read(tmp_path / "o", one, two)
    assert [row["caption"] for row in pairs] == ["a red apple", "a dog", "b"]
    assert [row["license"] for row in pairs] == [None, None, "CC0"]
    assert dropped == [("two.csv", 0, "duplicate_url")]
    assert [about["num_kept"] for about in stats.extra["lists"]] == [2, 1]
    stats, pairs, dropped = read(tmp_path / "o", one, two, dedup="none")
    assert len(pairs) == 4
    assert not dropped


def test_lists_on_object_stores_and_a_dataset_there(tmp_path):
    data = cc3m(tmp_path / "l.tsv").read_bytes()
    fsspec.filesystem("memory").pipe_file("/cc/Train.tsv.gz", gzip.compress(data))
    _, pairs, _ = read("memory://sources-dataset", "memory://cc/Train.tsv.gz")
    assert [row["caption"] for row in pairs] == ["a red apple", "a dog"]


def test_captions_of_every_odd_kind_are_kept_exactly_or_dropped_by_name(tmp_path):
    texts: list[Any] = [
        "plain",
        'comma, "quote" and\ttab\nline',
        "nul \0 inside",
        "\u202bעברית\u202c",
        "x" * 1_000_000,
        "  spaces around  ",
        None,
        float("nan"),
        "",
        "   ",
        "half \ud800 a pair",
        17,
        ["a", "b"],
    ]
    path = tmp_path / "odd.jsonl"
    rows = [{"url": f"http://a.example/{i}", "caption": text} for i, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, rows)))
    _, pairs, dropped = read(tmp_path / "o", path)
    assert [row["caption"] for row in pairs] == texts[:6]
    assert [reason for _, _, reason in dropped] == ["missing_caption"] * 4 + ["bad_caption"] * 3
    kept = [text for text in texts if isinstance(text, str) and text.strip()][:6]
    for form in ("parquet", "csv"):
        table = pa.table({"url": [f"http://a.example/{i}" for i in range(6)], "caption": kept})
        place = tmp_path / f"odd.{form}"
        if form == "csv":
            import csv

            with place.open("w", newline="") as f:
                csv.writer(f).writerows([table.schema.names, *zip(*table.to_pydict().values())])
        else:
            pq.write_table(table, place)
        _, pairs, _ = read(tmp_path / form, place)
        assert [row["caption"] for row in pairs] == kept


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    for name, text in (
        ("cc3m.tsv", "a red apple\thttp://a.example/1.jpg\r\na dog\thttp://a.example/2.jpg\r\n"),
        ("t.csv", "caption,url\r\na red apple,http://a.example/1.jpg\r\nb,http://b/\r\n"),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        _, pairs, dropped = read(tmp_path / "o", tmp_path / name)
        assert pairs[0] == {"url": "http://a.example/1.jpg", "caption": "a red apple"}
        assert (len(pairs), len(dropped)) == (2, 0)


def test_hashes_are_joined_by_url(tmp_path):
    urls = [f"http://a.example/{i}.jpg" for i in range(5)]
    path = tmp_path / "cc12m.tsv"
    path.write_text("".join(f"{url}\tcaption {i}\n" for i, url in enumerate(urls)))
    digests = {url: f"{i:064x}" for i, url in enumerate(urls) if i != 2}
    hashes = tmp_path / "hashes.txt"
    lines = [f"{url}\t{digest}\t{'0' * 32}\n" for url, digest in reversed(digests.items())]
    for header in ("", "url\tsha256\tmd5\n"):
        hashes.write_text(header + "".join(lines))
        stats, pairs, _ = read(tmp_path / "o", path, hashes=(str(hashes),))
        assert [row["expected_hash"] for row in pairs] == [
            f"sha256:{digests[url]}" if url in digests else None for url in urls
        ]
        assert stats.extra["num_hashes_found"] == 4
    assert "is no file of URLs and their sha256" in refusal(
        tmp_path / "o", path, hashes=(str(path),)
    )
    assert "holds URLs and hashes but no captions" in refusal(tmp_path / "o", hashes)


def test_max_rows_is_of_each_list(tmp_path):
    rows = [(f"c{i}", f"http://a.example/{i}") for i in range(30)]
    for name in ("a", "b"):
        cc3m(tmp_path / f"{name}.tsv", [(name + c, u + name) for c, u in rows])
    stats, pairs, _ = read(tmp_path / "o", tmp_path / "a.tsv", tmp_path / "b.tsv", max_rows=7)
    assert [row["caption"] for row in pairs] == [f"{x}c{i}" for x in "ab" for i in range(7)]
    assert stats.num_in == 14
    assert "max_rows is 0 but must be at least 1" in refusal(tmp_path, "x", max_rows=0)


def test_a_list_that_changed_since_the_plan_is_refused(tmp_path):
    path = cc3m(tmp_path / "l.tsv")
    stage = pin_lists(ReadPairs(root=str(tmp_path / "o"), lists=(str(path),)))
    cc3m(path, [*CC3M, ("more", "http://a.example/3")])
    with pytest.raises(DeclipError, match="has changed since the run was planned"):
        stage.worker()("all")
    assert not stage.is_done("all")
    again = pin_lists(dataclasses.replace(stage, list_digests=()))
    assert again.list_digests != stage.list_digests
    again.worker()("all")
    assert again.is_done("all")


def test_a_list_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = cc3m(tmp_path / "l.tsv")
    stage = ReadPairs(root=str(tmp_path / "o"), lists=(str(path),))
    real = list_lines.read_lines

    def meddle(file, *arguments, **options):
        yield from real(file, *arguments, **options)
        cc3m(path, [*CC3M, ("late", "http://a.example/late")])

    monkeypatch.setattr(list_lines, "read_lines", meddle)
    with pytest.raises(DeclipError, match="changed while it was read"):
        stage.worker()("all")
    assert not stage.is_done("all")


def test_digests_that_are_none_are_refused(tmp_path):
    with pytest.raises(DeclipError, match="not a sha256 of 64 hex digits"):
        ReadPairs(lists=("x",), list_digests=("ab",))
    with pytest.raises(DeclipError, match="has 2 digests for 1 lists"):
        ReadPairs(lists=("x",), list_digests=("a" * 64, "b" * 64))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cc12m", "was said to be cc12m (url<TAB>caption), but it looks like cc3m"),
        ("yfcc100m", "was said to be yfcc100m"),
        ("laion", "was said to be laion"),
        ("table", "was said to be table"),
    ],
)
def test_a_kind_that_the_content_denies_is_refused(tmp_path, kind, said):
    assert said in refusal(tmp_path / "o", cc3m(tmp_path / "l.tsv"), kind=kind)


def test_settings_that_no_list_would_obey_are_refused(tmp_path):
    path = cc3m(tmp_path / "l.tsv")
    assert "metadata is set, but no list is YFCC15M V1's" in refusal(
        tmp_path / "o", path, metadata=(str(path),)
    )
    assert "no list has titles and descriptions" in refusal(
        tmp_path / "o", path, caption_rule="title"
    )
    assert "whose columns have no names" in refusal(tmp_path / "o", path, url_column="u")


def test_wrong_columns_are_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("url,caption\na cat,b\nc,d\n")
    assert "the first value is 'a cat'; name the column of URLs" in refusal(tmp_path / "o", path)
    path = tmp_path / "t.jsonl"
    path.write_text('{"url": "http://a/", "caption": 7}\n{"url": "http://b/", "caption": 8}\n')
    assert "no text in the caption of any of its first 2 rows" in refusal(tmp_path / "o", path)
    path.write_text('{"url": null, "caption": "x"}\n{"url": "http://a/", "caption": ""}\n')
    assert "none has a URL and a caption" in refusal(tmp_path / "o", path)


def test_a_refused_run_leaves_the_earlier_tables(tmp_path):
    read(tmp_path / "o", cc3m(tmp_path / "l.tsv"))
    before = (tmp_path / "o" / PAIRS_PATH).read_bytes()
    path = tmp_path / "cut.jsonl"
    path.write_text('{"url": "http://a/", "caption": "x"}\n' * 3 + '{"url')
    assert "row 3 (the first is 0) is no whole JSON" in refusal(tmp_path / "o", path)
    assert (tmp_path / "o" / PAIRS_PATH).read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "o" / "source").iterdir()) == [
        "dropped.parquet",
        "pairs.parquet",
    ]


def test_columns_that_clash_between_lists_are_named(tmp_path):
    for name, value in (("a", 1), ("b", "x")):
        row = {"url": f"http://{name}/", "caption": "c", "n": value}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
    said = refusal(tmp_path / "o", tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert "column 'n' of list" in said
    assert "b.parquet" in said


def test_published_counts_stand_beside_the_lists_own(tmp_path, capsys):
    stats, _, _ = read(tmp_path / "o", cc3m(tmp_path / "l.tsv"))
    said = capsys.readouterr().err
    assert "2 rows" in said
    assert "CC3M validation has 15,840" in said
    assert stats.extra["lists"][0]["published"]["num_rows"] == 15_840
    stats, _, _ = read(tmp_path / "o", cc3m(tmp_path / "l.tsv"), max_rows=1)
    assert "published" not in stats.extra["lists"][0]


def test_the_place_of_a_list_changes_no_byte_and_no_digest(tmp_path):
    stages = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = cc3m(tmp_path / folder / "l.tsv", [*CC3M, ("", "x")])
        stages.append(pin_lists(ReadPairs(root=str(tmp_path / folder), lists=(str(path),))))
        stages[-1].worker()("all")
    assert stages[0].list_digests == stages[1].list_digests
    for name in (PAIRS_PATH, DROPPED_PATH):
        first, second = ((tmp_path / x / name).read_bytes() for x in "ab")
        assert first == second


def test_ingest_reads_the_table_by_ranges_of_rows(tmp_path):
    count = 25_000
    rows = [(f"c{i}", f"http://a.example/{i}") for i in np.random.default_rng(0).permutation(count)]
    _, pairs, _ = read(tmp_path / "o", cc3m(tmp_path / "l.tsv", rows))
    table = open_pairs(str(tmp_path / "o" / PAIRS_PATH))
    shards = plan_shards(table.num_rows, 1000)
    assert len(shards) == 25
    parts = [table.read(1000 * i, 1000 * (i + 1)).to_pylist() for i in range(25)]
    assert [row for part in parts for row in part] == pairs
    assert table.read(9_990, 10_010).to_pylist() == pairs[9_990:10_010]
