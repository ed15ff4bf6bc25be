import hashlib
import json

import numpy as np
import pytest
from duplicates_dataset import cropped, jpeg, patches, png, shrunk, write_pairs
from hypothesis import given
from hypothesis import strategies as st
from stage_runs import digests, run_stage

from declip_filter.contamination import OVERLAPS_SCHEMA, match_digests
from declip_filter.duplicates import FindDuplicates, overlaps_path, report_path
from declip_shards import DeclipError, Store, layout, sidecars


@given(st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)), st.data())
def test_digests_match_as_by_comparing_all(base, wanted, data):
    def pack(values):
        # The first halves of 0 and 3 are equal, those of others differ.
        raw = [bytes([v % 3] * 8 + [v] * 8) for v in values]
        return np.frombuffer(b"".join(raw), dtype=np.uint8).reshape(len(values), 16)

    known = np.array([data.draw(st.booleans()) for _ in base], dtype=bool)
    owner = np.arange(len(wanted), dtype=np.int64) + 10
    found = [
        pair
        for rows, owners, _ in match_digests(pack(base), known, pack(wanted), owner)
        for pair in zip(rows.tolist(), owners.tolist(), strict=True)
    ]
    assert sorted(found) == [
        (row, place + 10)
        for row, value in enumerate(base)
        for place, other in enumerate(wanted)
        if known[row] and value == other
    ]


@pytest.fixture(scope="module")
def photos():
    return patches(9)


@pytest.fixture
def root(tmp_path, photos):
    """Pictures 0 to 5 of nine; the third shard has copies of evaluation pictures."""
    shards = [
        [(jpeg(photos[n]), f"photo number {n}", 300) for n in (0, 1)],
        [(jpeg(photos[n]), f"photo number {n}", 300) for n in (2, 3)],
        [(jpeg(photos[n]), f"photo number {n}", 300) for n in (4, 5)],
    ]
    write_pairs(str(tmp_path / "data"), shards)
    return str(tmp_path / "data")


def rows_of(root):
    store = Store(root)
    return {
        row["key"]: row
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.signals_path("duplicates", shard))
    }


def write_set(place, entries):
    place.mkdir(parents=True)
    for name, data in entries.items():
        (place / name).write_bytes(data)
    return place


def test_copies_in_evaluation_sets_are_named_with_the_rung(tmp_path, root, photos):
    came = b"as it came" + jpeg(photos[4])
    first = {
        "exact.jpg": jpeg(photos[0]),
        "came.jpg": came,
        "resized.jpg": jpeg(shrunk(photos[1], 0.6), 80),
        "other.jpg": jpeg(photos[7]),
    }
    second = {"same.png": png(photos[1]), "cut.png": png(cropped(photos[8], 0.01))}
    sets = (f"one={write_set(tmp_path / 'a', first)}", f"two={write_set(tmp_path / 'b', second)}")
    stats = run_stage(FindDuplicates(root=root, eval_sets=sets))["all"]
    rows = rows_of(root)
    named = {k: (r["contaminated_by"], r["contaminated_rung"]) for k, r in rows.items()}
    assert named == {
        "000000000": ("one:exact.jpg", "bytes"),
        # PNG is nearer than a recompressed, smaller copy.
        "000000001": ("two:same.png", "perceptual"),
        "000010000": (None, None),
        "000010001": (None, None),
        "000020000": ("one:came.jpg", "bytes"),
        "000020001": (None, None),
    }
    assert stats.extra["contaminated"] == 3
    report = json.loads(Store(root).read_bytes(report_path("duplicates")))
    one = report["eval_sets"]["one"]
    assert (one["entries"], one["pictures"], one["undecodable"]) == (4, 4, 1)
    assert one["entries_that_occur"] == 3
    assert one["rungs"]["bytes"] == {"entries": 2, "samples": 2, "counts_as_contaminated": True}
    assert one["rungs"]["perceptual"]["entries"] == 2  # the exact copy looks alike, too
    assert report["eval_sets"]["two"]["entries_that_occur"] == 1
    table = sidecars.read_table(Store(root), overlaps_path("duplicates"))
    assert table.schema.names == OVERLAPS_SCHEMA.names
    assert {(r["set"], r["eval_key"], r["rung"]) for r in table.to_pylist()} == {
        ("one", "exact.jpg", "bytes"), ("one", "came.jpg", "bytes"),
        ("one", "exact.jpg", "perceptual"), ("one", "resized.jpg", "perceptual"),
        ("two", "same.png", "perceptual"),
    }  # fmt: skip


def test_pictures_cropped_or_padded_by_ingest_are_found(tmp_path, photos):
    square = photos[0].crop((20, 0, 140, 120))
    write_pairs(str(tmp_path / "data"), [[(jpeg(square), "a square", 120)]])
    place = write_set(tmp_path / "set", {"whole.png": png(photos[0])})
    run_stage(FindDuplicates(root=str(tmp_path / "data"), eval_sets=(f"s={place}",)))
    assert rows_of(str(tmp_path / "data"))["000000000"]["contaminated_by"] == "s:whole.png"


def test_captions_are_counted_and_taken_only_on_request(tmp_path, root, photos):
    place = write_set(tmp_path / "set", {"x.png": png(photos[8]), "x.txt": b"Photo  NUMBER 3"})
    sets = (f"s={place}",)
    run_stage(FindDuplicates(root=root, eval_sets=sets))
    assert not any(row["contaminated_by"] for row in rows_of(root).values())
    report = json.loads(Store(root).read_bytes(report_path("duplicates")))
    assert report["eval_sets"]["s"]["rungs"]["caption"] == {
        "entries": 1, "samples": 1, "counts_as_contaminated": False,
    }  # fmt: skip
    run_stage(FindDuplicates(root=root, eval_sets=sets, eval_rungs=("bytes", "caption")))
    assert rows_of(root)["000010001"]["contaminated_rung"] == "caption"


def test_order_of_sets_and_number_of_threads_change_nothing(tmp_path, root, photos):
    one = write_set(tmp_path / "a", {"p.png": png(photos[1]), "q.png": png(photos[2])})
    two = write_set(tmp_path / "b", {"p.png": png(photos[1])})
    seen = []
    for sets, num_threads in (((f"a={one}", f"b={two}"), 1), ((f"b={two}", f"a={one}"), 3)):
        run_stage(FindDuplicates(root=root, eval_sets=sets, num_threads=num_threads))
        seen.append(digests(root, "signals/duplicates"))
    assert seen[0] == seen[1]
    assert rows_of(root)["000000001"]["contaminated_by"] == "a:p.png"


def test_sets_of_one_name_are_refused(tmp_path, root, photos):
    place = write_set(tmp_path / "set", {"p.png": png(photos[1])})
    stage = FindDuplicates(root=root, eval_sets=(f"s={place}", f"s={tmp_path}"))
    with pytest.raises(DeclipError, match=r"two sets of one name; give them as NAME=PATH"):
        run_stage(stage)


def test_the_report_names_no_path_and_tells_the_content(tmp_path, root, photos):
    place = write_set(tmp_path / "set", {"p.png": png(photos[1])})
    run_stage(FindDuplicates(root=root, eval_sets=(f"s={place}",)))
    text = Store(root).read_bytes(report_path("duplicates")).decode()
    assert str(tmp_path) not in text
    assert hashlib.sha256(png(photos[1])).hexdigest() not in text
    assert len(json.loads(text)["eval_sets"]["s"]["content_sha256"]) == 64
