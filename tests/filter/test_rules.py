import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as runs
from hypothesis import strategies as st
from stage_runs import digests, run_stage

from declip_filter import FilterPairs, MeasureImages
from declip_filter.captions import measure_caption
from declip_filter.rules import rules, select_pairs
from declip_filter.signals import SCHEMA as SIGNALS
from declip_shards import DeclipError, layout, sidecars

GOOD = {
    "key": "000000",
    "width": 64,
    "height": 64,
    "original_width": 400,
    "original_height": 300,
    "aspect": 4 / 3,
    "num_bytes": 2000,
    "contrast": 0.2,
    "entropy": 5.0,
    "image_dhash": "0" * 16,
    "split": "train",
}


def columns(*samples: dict[str, Any]) -> dict[str, np.ndarray]:
    """Signals as the stage holds them."""
    rows = [GOOD | dict(measure_caption("a red apple on a table")) | s for s in samples]
    types = {f.name: f.type.to_pandas_dtype() for f in SIGNALS}
    return {
        name: np.asarray([row[name] for row in rows], dtype=types.get(name, object))
        for name in rows[0]
    }


def reasons(settings: FilterPairs, *samples: dict[str, Any]) -> list[str]:
    found: list[str] = select_pairs(settings, columns(*samples)).column("reason").to_pylist()
    return found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        (measure_caption("  "), "caption_empty"),
        (measure_caption("apple"), "caption_too_short"),
        (measure_caption("a b"), ""),
        (measure_caption("word " * 129), "caption_too_long"),
        (measure_caption("ab " + "c" * 1000), "caption_too_long"),
        (measure_caption("IMG_1234.jpg"), "caption_is_file_name"),
        (measure_caption("http://example.invalid/x"), "caption_is_url"),
        (measure_caption("12 34 (56) a"), "caption_few_letters"),
        (measure_caption("sale sale sale sale"), "caption_repetitive"),
        (measure_caption("bye bye"), ""),
        ({"original_width": 31}, "image_too_small"),
        ({"original_height": 32}, ""),
        ({"aspect": 3.01}, "image_extreme_aspect"),
        ({"aspect": 3.0}, ""),
        ({"contrast": 0.0199}, "image_flat"),
        ({"contrast": 0.02}, ""),
        ({"entropy": 0.1}, "image_low_entropy"),
        ({"split": "test"}, "held_out"),
        ({"split": ""}, "held_out"),
    ],
)
def test_each_rule_names_its_drop_and_a_limit_itself_passes(change, reason):
    assert reasons(FilterPairs(), dict(change)) == [reason]


def test_first_failing_rule_names_the_drop_and_the_hold_out_comes_last():
    assert reasons(FilterPairs(), {"aspect": 9.0, "contrast": 0.0, "split": "test"}) == [
        "image_extreme_aspect"
    ]
    assert rules(FilterPairs())[-1].name == "held_out"


OFF: dict[str, Any] = {
    "min_words": None, "min_chars": None, "max_words": None, "max_chars": None,
    "min_letters": None, "max_repetition": None, "min_side_pixels": None, "max_aspect": None,
    "min_contrast": None, "min_entropy": None, "drop_file_names": False, "drop_urls": False,
    "keep_splits": (),
}  # fmt: skip


def test_switched_off_rules_drop_nothing_but_empty_captions():
    settings = FilterPairs(**OFF)
    bad = {"aspect": 99.0, "contrast": 0.0, "entropy": 0.0, "original_width": 1, "split": "x"}
    assert reasons(
        settings, bad, dict(measure_caption("http://a.invalid")), dict(measure_caption(""))
    ) == [
        "",
        "",
        "caption_empty",
    ]


@pytest.mark.parametrize("setting", sorted(OFF))
def test_each_switch_removes_its_own_rules_only(setting):
    every = [rule.name for rule in rules(FilterPairs())]
    fewer = [
        rule.name for rule in rules(dataclasses.replace(FilterPairs(), **{setting: OFF[setting]}))
    ]
    assert len(fewer) == len(every) - 1


@runs(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.text(max_size=30), st.integers(1, 500), st.floats(1, 9, width=32),
            st.sampled_from(["train", "test"]),
        ),
        min_size=1,
        max_size=20,
    )
)  # fmt: skip
def test_filtering_what_was_kept_keeps_it_and_order_does_not_matter(samples):
    rows = [
        {
            "key": f"{n:03d}",
            **measure_caption(text),
            "original_width": side,
            "aspect": aspect,
            "split": split,
        }
        for n, (text, side, aspect, split) in enumerate(samples)
    ]
    settings = FilterPairs()
    found = dict(zip([r["key"] for r in rows], reasons(settings, *rows), strict=True))
    backwards = dict(
        zip([r["key"] for r in rows[::-1]], reasons(settings, *rows[::-1]), strict=True)
    )
    assert found == backwards
    kept = [row for row in rows if found[row["key"]] == ""]
    if kept:
        assert set(reasons(settings, *kept)) == {""}


def test_stage_accounts_for_every_success_and_rewrites_the_same_bytes(fake_root, store):
    run_stage(MeasureImages(root=fake_root))
    stage = FilterPairs(root=fake_root, min_words=3)
    stats = run_stage(stage)
    before = digests(fake_root, "selection")
    shards_before = digests(fake_root, "shards")
    run_stage(stage, list(reversed(stage.tasks())))
    assert digests(fake_root, "selection") == before
    assert digests(fake_root, "shards") == shards_before
    for shard, stat in stats.items():
        rows = sidecars.read_rows(store, layout.selection_path("default", shard))
        assert len(rows) == stat.num_in
        assert sum(row["keep"] for row in rows) == stat.num_out
        assert all(row["keep"] == (row["reason"] == "") for row in rows)
    assert stats["00002"].reasons == {"held_out": stats["00002"].num_in}


def test_splits_can_be_chosen_and_a_table_without_one_is_kept_whole(fake_root, store):
    run_stage(MeasureImages(root=fake_root))
    both = run_stage(FilterPairs(root=fake_root, keep_splits=("train", "test")))
    assert not any(s.reasons for s in both.values())
    by_shape = run_stage(
        FilterPairs(root=fake_root, split_column="category", keep_splits=("cross",))
    )
    assert 0 < sum(s.num_out for s in by_shape.values()) < sum(s.num_in for s in by_shape.values())
    for shard in layout.list_shards(store):
        path = layout.shard_parquet_path(shard)
        sidecars.write_table(store, path, sidecars.read_table(store, path).drop_columns(["split"]))
    assert not any(s.reasons for s in run_stage(FilterPairs(root=fake_root)).values())
    with pytest.raises(DeclipError, match=r"split_column is 'categories'.*Did you mean 'category'"):
        run_stage(FilterPairs(root=fake_root, split_column="categories"))


def test_signals_of_another_dataset_are_refused(fake_root, store):
    run_stage(MeasureImages(root=fake_root))
    path = layout.signals_path("basic", "00001")
    sidecars.write_table(store, path, sidecars.read_table(store, path).slice(1))
    with pytest.raises(DeclipError, match=r"signals 'basic' of shard 00001 are of other samples"):
        run_stage(FilterPairs(root=fake_root))
    store.remove(path)
    with pytest.raises(DeclipError, match=r"signals/basic/00001.parquet' is missing; rerun"):
        run_stage(FilterPairs(root=fake_root))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"min_words": -1}, r"min_words is -1; it must be at least 0"),
        ({"max_words": 0}, r"max_words is 0; it must be at least 1"),
        ({"min_words": 9, "max_words": 3}, r"min_words is 9 and max_words is 3: no caption passes"),
        ({"max_aspect": 0.5}, r"max_aspect is 0.5; it must be at least 1"),
        ({"min_contrast": 0.6}, r"min_contrast is 0.6; it must be from 0 to 0.5"),
        ({"min_letters": 1.5}, r"min_letters is 1.5; it must be from 0 to 1"),
        ({"min_entropy": 9}, r"min_entropy is 9; it must be from 0 to 8"),
        ({"name": "a/b"}, r"name is 'a/b'; it must be one folder name"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence):
    with pytest.raises(DeclipError, match=sentence):
        FilterPairs(**settings)
