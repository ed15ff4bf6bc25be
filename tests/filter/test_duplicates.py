import json
import random

import numpy as np
import pytest
from duplicates_dataset import cropped, jpeg, patches, png, shrunk, write_pairs
from PIL import Image
from stage_runs import HASHING, digests, run_stage

from declip_filter import EmbedPairs
from declip_filter.duplicates import RUNGS, FindDuplicates, report_path
from declip_shards import DeclipError, Store, layout, sidecars

WHITE = Image.new("RGB", (160, 120), "white")


def almost_white(level):
    return Image.new("RGB", (160, 120), (level,) * 3)


@pytest.fixture(scope="module")
def entries():
    """(picture, caption, original side): photographs, copies of some, and flat pictures."""
    photos = patches(8)
    found = [(jpeg(photo), f"photo {n}", 400 + n) for n, photo in enumerate(photos)]
    found += [
        (jpeg(photos[0]), "the same file", 100),
        (jpeg(photos[1], 50), "recompressed", 100),
        (jpeg(shrunk(photos[2], 0.5), 80), "resized", 900),
        (png(cropped(photos[3], 0.01)), "cropped", 100),
        (jpeg(photos[1], 70), "PHOTO  1", 50),
        (png(WHITE), "white", 100),
        (png(almost_white(254)), "nearly white", 100),
        (png(almost_white(253)), "", 100),
        (png(almost_white(252)), "", 100),
    ]
    return found


@pytest.fixture
def root(tmp_path, entries):
    write_pairs(str(tmp_path), [entries[:6], [], entries[6:]])
    return str(tmp_path)


def duplicates_of(root, name="duplicates"):
    store = Store(root)
    return {
        row["key"]: row
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.signals_path(name, shard))
    }


def report_of(root, name="duplicates"):
    return json.loads(Store(root).read_bytes(report_path(name)))


def test_copies_are_found_and_named(root):
    stats = run_stage(FindDuplicates(root=root))["all"]
    rows = duplicates_of(root)
    pairs = {
        rung: {
            key: row[f"duplicate_{rung}_of"]
            for key, row in rows.items()
            if row[f"duplicate_{rung}_of"]
        }
        for rung in ("bytes", "caption", "perceptual")
    }
    assert pairs["bytes"] == {"000020002": "000000000"}
    assert pairs["caption"] == {"000020006": "000000001"}
    assert pairs["perceptual"] == {
        "000020002": "000000000",  # the same file
        "000020003": "000000001",  # recompressed
        "000000002": "000020004",  # the copy says that its original was larger
        "000020005": "000000003",  # cropped
        "000020006": "000000001",
    }
    assert rows["000020002"]["duplicate_perceptual_distance"] == 0
    assert 0 <= rows["000020003"]["duplicate_perceptual_distance"] <= 4
    assert rows["000000000"]["duplicate_perceptual_distance"] is None
    assert (stats.num_in, stats.num_out) == (17, 17)
    assert stats.extra == {"bytes": 1, "caption": 1, "perceptual": 5}


def test_the_report_counts_alone_and_as_a_ladder(root):
    run_stage(FindDuplicates(root=root))
    report = report_of(root)
    rungs = report["rungs"]
    assert [rungs[r]["alone"] for r in ("bytes", "caption", "perceptual")] == [1, 1, 5]
    assert [rungs[r]["ladder"] for r in ("bytes", "caption", "perceptual")] == [1, 1, 3]
    assert [rungs[r]["left"] for r in ("bytes", "caption", "perceptual")] == [16, 15, 12]
    assert report["kept"] + sum(r["ladder"] for r in rungs.values()) == report["num_samples"] == 17
    assert rungs["perceptual"]["group_sizes"] == {"2": 3, "3": 1}
    assert rungs["perceptual"]["largest_groups"] == [3, 2, 2, 2]
    assert sum(rungs["perceptual"]["distances"]) == 5
    assert rungs["perceptual"]["says_too_little"] == 4
    assert rungs["caption"]["without_caption"] == 2
    assert "00002" not in json.dumps(rungs)


def test_rerun_with_parts_of_any_size_gives_the_same_bytes(root):
    run_stage(FindDuplicates(root=root))
    before = digests(root, "signals/duplicates")
    for path in before:
        Store(root).remove(path)
    stage = FindDuplicates(root=root, max_pairs=1)
    assert not stage.is_done("all")
    run_stage(stage)
    assert digests(root, "signals/duplicates") == before


def test_how_samples_lie_in_shards_changes_no_group(tmp_path, entries):
    groups = []
    for seed in range(3):
        order = list(range(len(entries)))
        random.Random(seed).shuffle(order)
        cut = 3 + 4 * seed
        parts = [[entries[n] for n in order[:cut]], [entries[n] for n in order[cut:]]]
        root = str(tmp_path / str(seed))
        write_pairs(root, parts)
        run_stage(FindDuplicates(root=root))
        place = {
            f"{shard:05d}{index:04d}": order[index + (cut if shard else 0)]
            for shard, part in enumerate(parts)
            for index in range(len(part))
        }
        groups.append(
            {
                (rung, place[key], place[row[f"duplicate_{rung}_of"]])
                for key, row in duplicates_of(root).items()
                for rung in ("bytes", "caption", "perceptual")
                if row[f"duplicate_{rung}_of"]
            }
        )
    assert groups[0] == groups[1] == groups[2]
    assert len(groups[0]) == 7


@pytest.mark.parametrize(
    "dropped", [("bytes",), ("perceptual",), ("bytes", "caption", "perceptual")]
)
def test_removing_duplicates_twice_is_once(tmp_path, root, entries, dropped):
    run_stage(FindDuplicates(root=root))
    rows = duplicates_of(root)
    kept = [
        entry
        for (key, row), entry in zip(sorted(rows.items()), entries, strict=True)
        if not any(row[f"duplicate_{rung}_of"] for rung in dropped)
    ]
    again = str(tmp_path / "again")
    write_pairs(again, [kept[:4], kept[4:]])
    run_stage(FindDuplicates(root=again, rungs=dropped))
    assert report_of(again)["kept"] == report_of(again)["num_samples"] == len(kept) < len(entries)


def test_kept_samples_are_kept_at_their_rung(root):
    run_stage(FindDuplicates(root=root))
    rows = duplicates_of(root)
    for row in rows.values():
        for rung in ("bytes", "caption", "perceptual"):
            of = row[f"duplicate_{rung}_of"]
            assert of is None or rows[of][f"duplicate_{rung}_of"] is None


def test_the_difference_hash_is_used_where_there_is_no_other(tmp_path, entries):
    write_pairs(str(tmp_path), [entries], hashes=False)
    run_stage(FindDuplicates(root=str(tmp_path)))
    found = report_of(str(tmp_path))["rungs"]["perceptual"]
    assert found["picture_hash"] == "image_dhash"
    assert (found["max_hash_distance"], found["brightness_compared"]) == (1, False)
    assert duplicates_of(str(tmp_path))["000000008"]["duplicate_perceptual_of"] == "000000000"
    stage = FindDuplicates(root=str(tmp_path), picture_hash="image_phash")
    with pytest.raises(DeclipError, match=r"no signal 'image_phash' in 'basic' of shard 00000"):
        run_stage(stage)


def test_a_lost_table_is_not_done(root):
    stage = FindDuplicates(root=root, rungs=("bytes",))
    run_stage(stage)
    Store(root).remove(layout.signals_path("duplicates", "00001"))
    assert not stage.is_done("all")


def test_only_the_rungs_asked_for_have_columns(root):
    run_stage(FindDuplicates(root=root, rungs=("caption",), name="texts"))
    assert set(duplicates_of(root, "texts")["000000000"]) == {"key", "duplicate_caption_of"}


def test_semantic_rung_finds_like_captions_of_the_embedded(tmp_path, entries):
    texts = [
        f"a {word} on the hill" for word in ("temple", "tree", "river", "cloud", "door", "wall")
    ]
    changed = [(image, texts[n % 6], side) for n, (image, _, side) in enumerate(entries)]
    root = str(tmp_path)
    write_pairs(root, [changed[:9], changed[9:]])
    run_stage(EmbedPairs(root=root, name="text", selection="", **HASHING))
    stage = FindDuplicates(
        root=root,
        rungs=("caption", "semantic"),
        semantic_embeddings="text",
        semantic_kind="text_emb",
        min_cosine=0.99,
        num_clusters=1,
    )
    run_stage(stage)
    rows = duplicates_of(root)
    by_text = {key: row["duplicate_caption_of"] for key, row in rows.items()}
    assert {key: row["duplicate_semantic_of"] for key, row in rows.items()} == by_text
    assert sum(of is not None for of in by_text.values()) == 11
    cosines = [r["duplicate_semantic_cosine"] for r in rows.values() if r["duplicate_semantic_of"]]
    assert np.allclose(cosines, 1, atol=1e-3)
    found = report_of(root)["rungs"]["semantic"]
    assert (found["encoder"], found["without_vector"]) == ("hashing:64", 0)
    assert (found["alone"], found["ladder"]) == (11, 0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rungs": ("byte",)}, r"rungs has 'byte'. Did you mean 'bytes'\?"),
        ({"rungs": ("bytes", "bytes")}, r"rungs names bytes, bytes; name each only once"),
        ({"rungs": ()}, r"rungs and eval_sets are both empty"),
        ({"rungs": ("semantic",)}, r"'semantic' and the name of embeddings go together"),
        ({"semantic_embeddings": "text"}, r"'semantic' and the name of embeddings go together"),
        ({"max_hash_distance": 17}, r"max_hash_distance is 17; it must be from 0 to 16"),
        ({"min_cosine": 1.5}, r"min_cosine is 1.5; it must be from 0 to 1"),
        ({"name": "basic"}, r"name is 'basic', the signals that are read; choose another"),
        ({"eval_rungs": ("semantic",)}, r"eval_rungs has 'semantic'"),
        ({"eval_sets": ("x",), "eval_rungs": ()}, r"eval_sets are named and eval_rungs is empty"),
        ({"picture_hash": "phash"}, r"picture_hash has 'phash'. Did you mean 'image_phash'\?"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence):
    with pytest.raises(DeclipError, match=sentence):
        FindDuplicates(**settings)


def test_a_missing_set_of_signals_is_refused(root):
    with pytest.raises(DeclipError, match=r"signals 'basics' lack shard 00000"):
        run_stage(FindDuplicates(root=root, signals="basics"))


def test_the_rungs_of_the_ladder_go_from_sure_to_unsure():
    assert RUNGS == ("bytes", "caption", "perceptual", "semantic")
