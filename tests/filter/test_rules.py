import dataclasses
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as runs
from hypothesis import strategies as st
from stage_runs import digests, run_stage

from declip_filter import FilterPairs, MeasureImages, duplicates
from declip_filter.captions import measure_caption
from declip_filter.plan import PlanFilter
from declip_filter.rules import RUNGS, rules, select_pairs
from declip_filter.signals import SCHEMA as SIGNALS
from declip_shards import DeclipError, layout, sidecars
from declip_shards.manifest import fingerprint

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
    assert rules(FilterPairs())[-1].reason == "held_out"


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
    every = [rule.reason for rule in rules(FilterPairs())]
    fewer = [
        rule.reason for rule in rules(dataclasses.replace(FilterPairs(), **{setting: OFF[setting]}))
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


def test_duplicates_and_contamination_are_dropped_where_asked_for(fake_root, store):
    run_stage(MeasureImages(root=fake_root))
    for shard in layout.list_shards(store):
        keys = sidecars.read_table(store, layout.signals_path("basic", shard), ["key"])
        others = [None] * len(keys)
        table = keys.append_column("duplicate_bytes_of", pa.array(["x", *others[1:]], pa.string()))
        table = table.append_column("contaminated_by", pa.array([*others[1:], "s:x"], pa.string()))
        sidecars.write_table(store, layout.signals_path("duplicates", shard), table)
    plain = run_stage(FilterPairs(root=fake_root))
    assert "duplicate_bytes" not in plain["00000"].reasons
    asked = FilterPairs(root=fake_root, drop_duplicates=("bytes",), drop_contaminated=True)
    stats = run_stage(asked)
    assert stats["00000"].reasons == {"duplicate_bytes": 1, "contaminated": 1}
    assert stats["00000"].num_out == plain["00000"].num_out - 2
    told = r"no signal 'duplicate_perceptual_of' in basic, duplicates.*Did you mean 'duplicate_byte"
    with pytest.raises(DeclipError, match=told):
        run_stage(FilterPairs(root=fake_root, drop_duplicates=("perceptual",)))
    for shard in layout.list_shards(store):
        store.remove(layout.signals_path("duplicates", shard))
    with pytest.raises(DeclipError, match="duplicates are named but not there: run the stage"):
        run_stage(asked)


def test_rungs_are_those_that_can_be_found():
    assert RUNGS == duplicates.RUNGS


def test_a_draw_in_brackets_is_a_draw(tmp_path):
    concepts = tmp_path / "c.txt"
    concepts.write_text("cat")
    settings = FilterPairs(rules=("x: (balanced_out(3))",), concepts=str(concepts))
    assert settings.resolved_rules[-1] == "x: (balanced_out(3))", "it comes after the hold-out"
    with pytest.raises(DeclipError, match="2 rules balance over concepts"):
        dataclasses.replace(settings, concept_cap=3)


def test_rules_are_held_against_the_columns_before_anything_is_removed(fake_root, store):
    """The runner asks for the tasks before it removes an earlier plan or selection."""
    with pytest.raises(DeclipError, match=r"^signals 'basic' lack shard 00000"):
        FilterPairs(root=fake_root).tasks()
    run_stage(MeasureImages(root=fake_root))
    for shard in layout.list_shards(store):
        path = layout.shard_parquet_path(shard)
        table = sidecars.read_table(store, path)
        boxes = pa.array([[1.0]] * len(table))
        sidecars.write_table(store, path, table.append_column("boxes", boxes))
    for settings, sentence in (
        ({"signals": ("nosuch",)}, r"^signals 'nosuch' lack shard 00000: 'signals/nosuch/00000"),
        ({"rules": ("x: entrpy < 3",)}, r"no signal 'entrpy' in basic.*Did you mean 'entropy'"),
        ({"rules": ("x: entropy == 'a'",)}, "rule 'x': a number cannot be compared with a text"),
        ({"rules": ("x: boxes == boxes",)}, "rule 'x': this is list<.*only numbers, texts and"),
        ({"rules": ("x: count(boxes) > 3",)}, "rule 'x': this is list<.*only numbers, texts and"),
        ({"rules": ("x: top_fraction(caption, 0.5)",)}, "rule 'x': .* wants a number, not a text"),
        ({"drop_duplicates": ("bytes",)}, "FindDuplicates makes it: set --duplicates.rungs bytes"),
        ({"split_column": "folds"}, "split_column is 'folds', which"),
    ):
        for stage in (FilterPairs, PlanFilter):
            made = stage(root=fake_root, **settings)
            with pytest.raises(DeclipError, match=f"(?s){sentence}"):
                made.tasks()
    assert PlanFilter(root=fake_root).tasks() == ("all",)


def test_order_of_rules_is_recipe_duplicates_own_hold_out_and_balancing(tmp_path):
    concepts = tmp_path / "c.txt"
    concepts.write_text("cat")
    found = FilterPairs(
        recipe="metaclip:5+datacomp_clip_threshold",
        rules=("a: x < 1", "b: y in [1", " 2]", "c: matches(caption", " 'p: q')"),
        drop_duplicates=("bytes", "bytes"),
        drop_contaminated=True,
        concepts=str(concepts),
    ).resolved_rules
    assert found == (
        "no_concept: num_concepts < 1",
        "clip_score_missing: missing(clip_score)",
        "clip_score_low: clip_score <= 0.28",
        "duplicate_bytes: not missing(duplicate_bytes_of)",
        "contaminated: not missing(contaminated_by)",
        "a: x < 1",
        "b: y in [1, 2]",
        "c: matches(caption, 'p: q')",
        "held_out: missing(split) or split not in ['train']",
        "concept_too_frequent: balanced_out(5)",
    )


def test_what_a_recipe_comes_to_decides_about_a_rerun_and_not_where_its_file_lies(tmp_path):
    def print_of(**settings):
        return fingerprint(FilterPairs(**settings), "", {})

    text = "[[rules]]\nreason = 'dull'\ndrop = 'entropy < 3'\n"
    for name in ("a.toml", "b.toml"):
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.txt").write_text("cat\n")
    first = print_of(recipe=str(tmp_path / "a.toml"))
    assert first == print_of(recipe=str(tmp_path / "b.toml"))
    (tmp_path / "b.toml").write_text(text.replace("3", "4"))
    assert first != print_of(recipe=str(tmp_path / "b.toml"))
    concepts: dict[str, Any] = {"recipe": "datacomp_text", "concepts": str(tmp_path / "a.toml.txt")}
    other: dict[str, Any] = {**concepts, "concepts": str(tmp_path / "b.toml.txt")}
    assert print_of(**concepts) == print_of(**other)
    (tmp_path / "b.toml.txt").write_text("dog\n")
    assert print_of(**concepts) != print_of(**other)


def test_a_stage_needs_no_file_of_the_user_once_it_is_made(tmp_path, fake_root):
    run_stage(MeasureImages(root=fake_root))
    path = tmp_path / "mine.toml"
    path.write_text("[[rules]]\nreason = 'dull'\ndrop = 'caption_words < 99'\n")
    stage = pickle.loads(pickle.dumps(FilterPairs(root=fake_root, recipe=str(path))))
    path.unlink()
    assert set(run_stage(stage)["00000"].reasons) == {"dull"}


def test_settings_that_a_recipe_does_not_read_are_told():
    assert FilterPairs().unread() == {}
    assert FilterPairs(recipe="default+filip").unread() == {}
    unread = FilterPairs(recipe="filip").unread()
    assert set(unread) == set(OFF) - {"keep_splits"}
    assert set(unread.values()) == {"recipe 'default'"}
    changed = dataclasses.replace(FilterPairs(recipe="filip"), min_words=50, max_aspect=9)
    assert changed.resolved_rules == FilterPairs(recipe="filip").resolved_rules


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"signals": ()}, "signals is empty"),
        ({"signals": ("basic", "a/b")}, "signals is 'a/b'; it must be one folder name"),
        ({"recipe": "flip"}, "recipe is 'flip'. Did you mean 'filip'"),
        ({"rules": ("entropy < 3",)}, "rule 'entropy < 3' has no reason"),
        ({"rules": ("dull: entropy <",)}, "(?s)rule 'dull': not an expression.*At character 10 of"),
        (
            {"drop_duplicates": ("bytes!",)},
            "'bytes!', which is no rung .* mean 'bytes'?",
        ),
        ({"drop_duplicates": ("sha256",)}, "'sha256', which is no rung of the ladder. Known: byt"),
        ({"concepts": "/"}, "concepts '/' is a folder; name a file in it"),
        ({"recipe": "default+/.toml"}, "recipe '/.toml' does not exist"),
        ({"recipe": "metaclip"}, "rule 'concept_too_frequent' needs a list of concepts"),
        ({"recipe": "datacomp_text"}, "rule 'no_concept' needs a list of concepts"),
        ({"concept_cap": 9}, "rule 'concept_too_frequent' needs a list of concepts"),
        ({"concept_cap": 0}, "concept_cap is 0; it must be at least 1"),
        ({"concepts": "no/such.txt"}, "no/such.txt' does not exist"),
        ({"split_column": "my split"}, "split_column is 'my split'; a rule can name columns of"),
    ],
)
def test_wrong_rules_are_refused(settings, sentence):
    with pytest.raises(DeclipError, match=sentence):
        FilterPairs(**settings)


def test_a_list_of_concepts_that_nothing_reads_is_refused(tmp_path):
    path = tmp_path / "c.txt"
    path.write_text("cat")
    with pytest.raises(DeclipError, match="but no rule reads it; set concept_cap"):
        FilterPairs(concepts=str(path))
    with pytest.raises(DeclipError, match="2 rules balance over concepts; one is allowed"):
        FilterPairs(concepts=str(path), recipe="metaclip", concept_cap=3)
