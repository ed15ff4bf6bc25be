"""Tars of others: what open_clip would train on, once each, and every fault by name."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import braceexpand
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from declip_shards import DeclipError
from declip_train import foreign_shards, tar_listing
from declip_train.foreign_shards import data_entries, expand_braces, foreign_pool
from declip_train.samples import training_samples
from declip_train.settings import TrainSettings

if TYPE_CHECKING:
    from tests.train.foreign_tars import picture, served, write_pairs, write_tar
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from foreign_tars import picture, served, write_pairs, write_tar


def load(tmp_path, *entries, weights=(), **changed):
    given: dict[str, Any] = {"method": "clip", "global_batch_size": 2, "model": "test"} | changed
    return training_samples(
        TrainSettings(
            train_data=entries, data_weights=weights, cache=str(tmp_path / "cache"), **given
        )
    )


@settings(max_examples=100, deadline=None)
@given(pattern=st.text("ab0129{},.", max_size=14))
def test_braces_are_a_shells(pattern):
    depths = np.cumsum([(letter == "{") - (letter == "}") for letter in pattern], dtype=int)
    assume(not depths.size or (depths.min() >= 0 and not depths[-1]))
    assert expand_braces(pattern) == list(braceexpand.braceexpand(pattern, escape=False))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{00..02}.tar", ["00.tar", "01.tar", "02.tar"]),
        ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
        ("{a,b{0..1}}x", ["ax", "b0x", "b1x"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..6..3}", ["0", "3", "6"]),
        ("{x}", ["{x}"]),
        ("plain", ["plain"]),
    ],
)
def test_patterns(pattern, names):
    assert expand_braces(pattern) == names


def test_patterns_that_are_wrong_are_refused():
    with pytest.raises(DeclipError, match="whose brace is never closed"):
        expand_braces("a{00..01.tar")
    with pytest.raises(DeclipError, match="more than 1000000 tars"):
        expand_braces("{0..999999999}.tar")
    with pytest.raises(DeclipError, match="from a number to a letter"):
        expand_braces("{0..z}.tar")
    assert data_entries(["a::b", "c"]) == ["a", "b", "c"]


def test_pairs_are_those_of_webdataset(tmp_path):
    odd = [
        ("folder/a.jpg", picture(1)),
        ("folder/a.txt", b"first"),
        ("folder/a.json", b"{}"),
        ("b.TXT", "zweite, größer".encode()),
        ("b.PNG", b"not decoded here"),
        ("c.jpg", picture(2)),
        ("d.txt", b"no picture"),
        ("e.extra.jpg", picture(3)),
        ("e.txt", b"not its own extension"),
        ("f.webp", b"w"),
        ("f.txt", b""),
        ("g.jpg", picture(4)),
        ("g.png", b"second choice"),
        ("g.txt", b"both"),
        ("h.jpg", picture(5)),
        ("h.txt", b"\xff\xfe"),
        ("__MACOSX/x.jpg", b""),
        (".hidden.jpg", b""),
    ]
    write_tar(tmp_path / "a.tar", odd)
    samples = load(tmp_path, str(tmp_path / "a.tar"))

    truth = []
    for sample in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False):
        image = next((sample[e] for e in ("jpg", "png", "jpeg", "webp") if e in sample), None)
        try:
            text = sample["txt"].decode()
        except (KeyError, UnicodeDecodeError):
            continue
        if image is not None:
            truth.append((sample["__key__"], text, image))
    found = list(
        zip(samples.keys, samples.captions, samples.read_images(range(len(samples))), strict=True)
    )
    assert found == truth
    assert [key for key, *_ in found] == ["folder/a", "b", "f", "g"]
    assert samples.dropped == {"no picture": 2, "no caption": 1, "caption is not UTF-8": 1}


def test_a_caption_may_be_the_json_s_and_sizes_too(tmp_path):
    details = {"caption": "told", "width": 30, "height": 40}
    members = [
        ("a.jpg", picture(1)),
        ("a.json", json.dumps(details).encode()),
        ("b.jpg", picture(2)),
        ("b.json", b"[1]"),
        ("b.txt", b"text"),
        ("c.jpg", picture(3)),
        ("c.json", b'{"caption": 7, "width": -1}'),
    ]
    write_tar(tmp_path / "a.tar", members)
    samples = load(tmp_path, str(tmp_path / "a.tar"))
    assert list(samples.captions) == ["told", "text"]
    np.testing.assert_array_equal(samples.image_sizes([0, 1]), [[40, 30], [0, 0]])


def test_a_table_beside_says_sizes_and_must_agree(tmp_path):
    write_pairs(tmp_path / "a.tar", ["x", "y"])
    assert load(tmp_path, str(tmp_path / "a.tar")).image_sizes([0]) is None

    def table(keys):
        size = len(keys)
        columns = {
            "key": keys,
            "status": ["success"] * size,
            "height": [20] * size,
            "width": [24] * size,
        }
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")

    table(["y", "x"])
    sizes = load(tmp_path, str(tmp_path / "a.tar")).image_sizes([0, 1])
    np.testing.assert_array_equal(sizes, [[20, 24]] * 2)
    table(["x"])
    with pytest.raises(DeclipError, match=r"holds 2 samples, but its table .*a\.parquet' lists 1"):
        load(tmp_path, str(tmp_path / "a.tar"))


def test_sizes_json_must_agree(tmp_path):
    write_pairs(tmp_path / "a.tar", ["x", "y"])
    (tmp_path / "sizes.json").write_text('{"a.tar": 2}')
    assert len(load(tmp_path, str(tmp_path / "a.tar"))) == 2
    (tmp_path / "sizes.json").write_text('{"a.tar": 3}')
    with pytest.raises(DeclipError, match=r"holds 2 samples, but sizes\.json beside it says 3"):
        load(tmp_path, str(tmp_path / "a.tar"))
    (tmp_path / "sizes.json").write_text("[")
    with pytest.raises(DeclipError, match=r"sizes\.json' is damaged .*delete it"):
        load(tmp_path, str(tmp_path / "a.tar"))


def test_a_tar_is_read_once_until_it_changes(tmp_path, monkeypatch):
    walked = []
    walk = tar_listing.walk_tar

    def counted(path, *more):
        walked.append(Path(path).name)
        return walk(path, *more)

    monkeypatch.setattr(foreign_shards, "walk_tar", counted)
    for n in range(3):
        write_pairs(tmp_path / f"{n}.tar", [f"{n}a", f"{n}b"])
    pattern = str(tmp_path / "{0..2}.tar")
    first = load(tmp_path, pattern)
    assert load(tmp_path, pattern).fingerprint() == first.fingerprint()
    assert sorted(walked) == ["0.tar", "1.tar", "2.tar"]
    assert list(load(tmp_path, str(tmp_path / "{1..2}.tar")).keys) == ["1a", "1b", "2a", "2b"]
    assert len(walked) == 3
    write_pairs(tmp_path / "1.tar", ["1a", "1c"])
    assert load(tmp_path, pattern).fingerprint() != first.fingerprint()
    assert walked[3:] == ["1.tar"]
    os.utime(tmp_path / "1.tar", (1, 1))
    load(tmp_path, pattern)
    assert walked[4:] == ["1.tar"]


def test_the_fingerprint_does_not_follow_the_place(tmp_path):
    prints = set()
    for folder in ("here", "there"):
        write_pairs(tmp_path / folder / "a.tar", ["x", "y"])
        prints.add(load(tmp_path, str(tmp_path / folder / "a.tar")).fingerprint())
    assert len(prints) == 1


def test_keys_that_several_samples_share_become_their_own(tmp_path):
    write_pairs(tmp_path / "p/0.tar", ["a", "b"])
    write_pairs(tmp_path / "p/1.tar", ["a", "c"], 10)
    write_tar(tmp_path / "p/2.tar", [(f"c.{e}", picture(9)) for e in ("jpg", "txt")] * 2)
    write_tar(
        tmp_path / "p/2.tar",
        [("d.jpg", picture(9)), ("d.txt", b"1"), ("d.jpg", picture(8)), ("d.txt", b"2")],
    )
    samples = load(tmp_path, str(tmp_path / "p/{0..2}.tar"))
    assert list(samples.keys) == ["0/a", "b", "1/a", "c", "2/d", "2/d#2"]
    assert samples.read_image(5) == picture(8)


def test_entries_are_parts_with_weights(tmp_path):
    write_pairs(tmp_path / "a/0.tar", [f"a{n}" for n in range(6)])
    write_pairs(tmp_path / "b/0.tar", [f"b{n}" for n in range(4)])
    entries = f"{tmp_path}/a/0.tar::{tmp_path}/b/{{0..0}}.tar"
    samples = load(tmp_path, entries, weights=("2::0.5",))
    assert samples.part_sizes == (6, 4)
    assert samples.epoch_length == 14
    keys = samples.keys_of(samples.epoch_sequence(0, 0))
    counts = {key: keys.count(key) for key in samples.keys}
    assert [counts[f"a{n}"] for n in range(6)] == [2] * 6
    assert sorted(counts[f"b{n}"] for n in range(4)) == [0, 0, 1, 1]
    with pytest.raises(DeclipError, match="data_weights has 1 numbers, but train_data has 2"):
        load(tmp_path, entries, weights=("2",))
    with pytest.raises(DeclipError, match=r"0.1 for .*b/\{0..0\}.tar', of whose 4 pairs an epoch"):
        load(tmp_path, entries, weights=("2::0.1",))


def test_tars_at_a_url(tmp_path):
    pairs = write_pairs(tmp_path / "w/00.tar", ["x", "y"])
    pairs |= write_pairs(tmp_path / "w/01.tar", ["z"], 5)
    with served(tmp_path / "w") as (address, server):
        for room in (1.0, 0.0):
            samples = load(tmp_path, f"{address}/{{00..01}}.tar", cache_gigabytes=room)
            assert list(samples.captions) == [caption for _, caption in pairs.values()]
            assert samples.read_images([2, 0]) == [pairs["z"][0], pairs["x"][0]]
        with pytest.raises(DeclipError, match=r"02\.tar' cannot be reached"):
            load(tmp_path, f"{address}/{{00..02}}.tar")
    assert server.asked


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"method": "declip"}, "reads the neighbor table 'captions', but train_data are tars"),
        ({"splits": ("train",)}, r"splits is \['train'\], but train_data are tars"),
        ({"selection": "strict"}, "selection is 'strict', but train_data are tars"),
    ],
)
def test_what_only_a_dataset_of_ours_has_is_refused(tmp_path, changed, sentence):
    write_pairs(tmp_path / "a.tar", ["x", "y"])
    with pytest.raises(DeclipError, match=sentence):
        load(tmp_path, str(tmp_path / "a.tar"), **changed)


def test_wrong_entries_are_refused(tmp_path):
    write_tar(tmp_path / "empty.tar", [("a.txt", b"alone")])
    (tmp_path / "folder").mkdir()
    for entry, sentence in (
        (str(tmp_path / "none.tar"), r"none\.tar' cannot be read \(No such file"),
        (str(tmp_path / "folder"), r"has the folder .*must name tars, as in .*\{00000\.\.00999\}"),
        ("pipe:cat a.tar", "no commands are run"),
        (str(tmp_path / "{a,a}.tar"), r"names .*a\.tar' twice"),
        (str(tmp_path / "empty.tar"), r"hold no pair .*left out were \{'no picture': 1\}"),
    ):
        with pytest.raises(DeclipError, match=sentence):
            load(tmp_path, entry)


def test_a_list_that_was_cut_short_by_a_kill_goes_on(tmp_path, monkeypatch):
    for n in range(3):
        write_pairs(tmp_path / f"{n}.tar", [f"{n}a"])
    entries = [str(tmp_path / "{0..2}.tar")]
    scan = foreign_shards._scan

    def dies(path, *more):
        if path.endswith("2.tar"):
            raise KeyboardInterrupt
        return scan(path, *more)

    monkeypatch.setattr(foreign_shards, "_scan", dies)
    with pytest.raises(KeyboardInterrupt):
        foreign_pool(entries, tmp_path / "cache", 1e9)
    calls = []

    def counted(path, *more):
        calls.append(path)
        return scan(path, *more)

    monkeypatch.setattr(foreign_shards, "_scan", counted)
    assert len(foreign_pool(entries, tmp_path / "cache", 1e9).pool) == 3
    assert [Path(path).name for path in calls] == ["2.tar"]
