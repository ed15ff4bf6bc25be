import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as runs
from hypothesis import strategies as st
from stage_runs import digests, run_stage

from declip_filter import FilterPairs, MeasureImages
from declip_filter.filter_recipes import NO_NOUN, RECIPES
from declip_filter.plan import PlanFilter, warnings
from declip_filter.plan_files import read_plan
from declip_shards import DeclipError, Store, layout, sidecars

CAPTIONS = ("a red dog", "a cat", "the cat and a dog", "no pets", "", "an axolotl in a bowl")
NO_DEFAULT: dict[str, Any] = {"recipe": "datacomp_clip_fraction:0.4"}


def write_tables(root, shards, *, seed=0, scores=True):
    """A dataset of tables alone: shards' rows, signals ``basic`` and ``scores``; no pictures."""
    store = Store(str(root))
    rng = np.random.default_rng(seed)
    for number, rows in enumerate(shards):
        shard = layout.shard_name(number)
        keys = [f"{number:05d}{row:03d}" for row in range(len(rows))]
        words = [len(CAPTIONS[row[0]].split()) for row in rows]
        basic = {
            "key": pa.array(keys, pa.string()),
            "caption_words": pa.array(words, pa.int32()),
            "caption_sha": pa.array([f"{row[0]:032x}" for row in rows], pa.string()),
            "caption_language": pa.array([("en", "de", None)[row[0] % 3] for row in rows]),
            "is_odd": pa.array([bool(row[0] % 2) for row in rows], pa.bool_()),
        }
        sidecars.write_table(store, layout.signals_path("basic", shard), pa.table(basic))
        if scores:
            table = {
                "key": basic["key"],
                "clip_score": pa.array([row[1] for row in rows], pa.float32()),
            }
            sidecars.write_table(store, layout.signals_path("scores", shard), pa.table(table))
        own = {
            "key": [*keys, f"{number:05d}999"],
            "status": ["success"] * len(keys) + ["failed_to_download"],
            "caption": [*(CAPTIONS[row[0]] for row in rows), "lost"],
            "split": [*("test" if row[2] else "train" for row in rows), "train"],
        }
        order = rng.permutation(len(keys) + 1)
        sidecars.write_table(store, layout.shard_parquet_path(shard), pa.table(own).take(order))
        store.write_bytes(layout.shard_stats_path(shard), b"{}")
    return str(root)


ROWS = st.lists(
    st.tuples(
        st.integers(0, len(CAPTIONS) - 1),
        st.none() | st.sampled_from([0.1, 0.2, 0.25, 0.3, float("nan")]),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


def concepts_file(folder):
    path = Path(folder) / "concepts.txt"
    path.write_text("dog\ncat\naxolotl\nred dog\n")
    return str(path)


def settings_of_all(folder) -> dict[str, Any]:
    """Rules that need the whole dataset in every way."""
    return {
        "signals": ("basic", "scores"),
        "recipe": "datacomp_clip_fraction:0.5",
        "rules": ("frequent: count(caption_sha) > 3", "short: caption_words < 2"),
        "concepts": concepts_file(folder),
        "concept_cap": 2,
    }


@runs(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ROWS, min_size=1, max_size=3))
def test_plan_and_filter_agree_and_lose_nothing(tmp_path_factory, shards):
    root = write_tables(tmp_path_factory.mktemp("data"), shards)
    given_settings = settings_of_all(root)
    planned = run_stage(PlanFilter(root=root, **given_settings))["all"]
    plan = read_plan(Store(root), "default")
    stage = FilterPairs(root=root, **given_settings)
    done = run_stage(stage)
    total = sum(map(len, shards))
    assert plan["num_samples"] == planned.num_in == total
    reasons: Counter[str] = Counter()
    for stat in done.values():
        reasons.update(stat.reasons)
    assert plan["kept"] == sum(stat.num_out for stat in done.values())
    assert plan["kept"] + reasons.total() == total
    told: Counter[str] = Counter()
    left = total
    for rule in plan["rules"]:
        told[rule["reason"]] += rule["in_order"]
        left -= rule["in_order"]
        assert rule["left"] == left
        assert rule["in_order"] <= rule["alone"] <= total
    assert +told == reasons
    for histogram in plan["histograms"].values():
        assert sum(histogram["counts"]) + histogram["num_null"] == total
        assert sum(histogram["kept"]) <= plan["kept"]
    # A plain loop over all rows says the same of what needs the whole dataset.
    rows = [row for rows in shards for row in rows]
    scores = sorted((r[1] for r in rows if r[1] is not None and r[1] == r[1]), reverse=True)
    if scores:
        limit = plan["figures"]["top_fraction(clip_score, 0.5)"]
        assert limit == np.float32(scores[max(int(len(scores) * 0.5 + 0.5), 1) - 1])
    texts = Counter(row[0] for row in rows)
    frequent = next(rule for rule in plan["rules"] if rule["reason"] == "frequent")
    assert frequent["alone"] == sum(texts[row[0]] > 3 for row in rows)


def test_order_of_shards_and_kills_change_no_byte(tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    shards = [
        [(int(rng.integers(6)), float(rng.random()), bool(rng.random() < 0.2)) for _ in range(30)]
        for _ in range(5)
    ]
    root = write_tables(tmp_path, shards)
    given_settings = settings_of_all(tmp_path)
    run_stage(PlanFilter(root=root, **given_settings))
    stage = FilterPairs(root=root, **given_settings)
    run_stage(stage)
    before = digests(root, "selection")
    assert len(before) == 5 + 3
    listed = stage.tasks()
    monkeypatch.setattr("declip_filter.plan.shard_tasks", lambda root: listed[::-1])
    run_stage(PlanFilter(root=root, **given_settings))
    run_stage(FilterPairs(root=root, **given_settings), listed[::-1])
    assert digests(root, "selection") == before
    # Nothing in the plan says where or when it was made, or whose samples they are.
    text = Path(root, "selection/default/plan.json").read_text()
    assert not [part for part in (str(tmp_path), *CAPTIONS[:4], "00000000") if part in text]


def test_filtering_what_was_kept_drops_nothing_more_where_rules_promise_it(tmp_path):
    rng = np.random.default_rng(5)
    rows = [
        (int(rng.integers(6)), float(rng.random()), bool(rng.random() < 0.2)) for _ in range(90)
    ]
    chosen: dict[str, Any] = {
        "signals": ("basic", "scores"),
        "recipe": "datacomp_clip_threshold:0.3",
        "rules": ("frequent: count(caption_sha) > 16", "short: caption_words < 2"),
    }
    root = write_tables(tmp_path / "a", [rows[:50], rows[50:]])
    run_stage(PlanFilter(root=root, **chosen))
    run_stage(FilterPairs(root=root, **chosen))
    store, kept = Store(root), []
    for number, start in ((0, 0), (1, 50)):
        table = sidecars.read_table(store, layout.selection_path("default", f"{number:05d}"))
        is_kept = table.column("keep").to_pylist()
        kept += [rows[start + n] for n, keep in enumerate(is_kept) if keep]
    assert 0 < len(kept) < len(rows)
    again = write_tables(tmp_path / "b", [kept])
    run_stage(PlanFilter(root=again, **chosen))
    stats = run_stage(FilterPairs(root=again, **chosen))
    assert stats["00000"].num_out == len(kept)


def test_a_rule_that_drops_everything_or_nothing_is_told(tmp_path, caplog):
    root = write_tables(tmp_path, [[(0, 0.3, False), (1, 0.2, False)]])
    chosen: dict[str, Any] = {
        "signals": ("basic", "scores"),
        "recipe": "datacomp_clip_threshold:0.1",
        "rules": ("all: caption_words > 1", "none: caption_words > 99"),
    }
    with caplog.at_level(logging.WARNING):
        stats = run_stage(PlanFilter(root=root, **chosen))["all"]
    told = [
        "rule 'all' (caption_words > 1) would drop all 2 samples; look at its limit.",
        "4 of 5 rules drop nothing of 2 samples: clip_score_missing, clip_score_low, none, "
        "held_out.",
        "no sample is left of 2; rule 'all' drops most (2).",
    ]
    assert read_plan(Store(root), "default")["warnings"] == told
    assert stats.extra["warnings"] == told
    assert [record.getMessage() for record in caplog.records] == [f"plan: {t}" for t in told]
    assert warnings([], 0, 0) == []


def test_thresholds_change_without_reading_a_picture(fake_root, store):
    run_stage(MeasureImages(root=fake_root))
    for shard in layout.list_shards(store):
        store.remove(layout.tar_path(shard))
    for words in (3, 7):
        run_stage(PlanFilter(root=fake_root, min_words=words))
        stats = run_stage(FilterPairs(root=fake_root, min_words=words))
        kept = sum(stat.num_out for stat in stats.values())
        plan = read_plan(store, "default")
        assert kept == plan["kept"]
        assert (kept > 0) == (words == 3)
    rule = next(rule for rule in plan["rules"] if rule["expression"] == "caption_words < 7")
    limit = {"signal": "caption_words", "operator": "<", "value": 7.0, "is_enough": True}
    assert rule["limits"] == [limit]
    assert {"contrast", "aspect", "caption_is_url", "split"} <= set(plan["histograms"])
    assert not {"key", "caption_sha", "image_dhash"} & set(plan["histograms"])
    json.dumps(plan, allow_nan=False)


def test_the_filter_asks_for_its_plan_and_refuses_another(tmp_path):
    root = write_tables(tmp_path, [[(0, 0.3, False), (1, 0.2, False)]])
    chosen: dict[str, Any] = {"signals": ("basic", "scores"), **NO_DEFAULT}
    stage = FilterPairs(root=root, **chosen)
    with pytest.raises(DeclipError, match=r"plan.json' is missing; run the stage that plans"):
        stage.worker()
    run_stage(PlanFilter(root=root, **chosen))
    assert stage.worker()("00000").num_in == 2
    other = FilterPairs(root=root, **chosen, rules=("x: caption_words < 3",))
    with pytest.raises(DeclipError, match=r"is of other rules \(such as 'x: caption_words < 3'\)"):
        other.worker()
    run_stage(FilterPairs(root=root, recipe="cc3m", rules=(), keep_splits=()), ())


def test_what_nobody_measured_is_told_and_by_which_setting_it_is(tmp_path, caplog):
    """A rule over an empty signal drops nobody, though the recipe's source asks for it."""
    root = write_tables(tmp_path, [[(0, None, False), (1, None, False)]])
    store = Store(root)
    path = layout.signals_path("basic", "00000")
    table = sidecars.read_table(store, path)
    empty = {"caption_nouns": pa.int32(), "my_score": pa.float32(), "duplicate_bytes_of": "string"}
    for name, kind in empty.items():
        table = table.append_column(name, pa.nulls(2, kind))
    sidecars.write_table(store, path, table)
    chosen: dict[str, Any] = {
        "signals": ("basic", "scores"),
        "recipe": "datacomp_clip_threshold",
        "drop_duplicates": ("bytes",),
        "rules": (f"no_noun: {NO_NOUN.expression}", "low: my_score < 1", "odd: caption_words < 0"),
    }
    assert NO_NOUN in RECIPES["cc3m"]()
    assert NO_NOUN in RECIPES["cc12m"]()
    with caplog.at_level(logging.WARNING):
        run_stage(PlanFilter(root=root, **chosen))
    told = [
        "signal 'caption_nouns' has no value in any of 2 samples, so what rule 'no_noun' asks of "
        "it is not applied; MeasureImages makes it: set --measure.wordnet FOLDER, and run again.",
        "signal 'clip_score' has no value in any of 2 samples, so what rule 'clip_score_low' asks "
        "of it is not applied; ScorePairs makes it: set --score.scorer clip:cosine, and run again.",
        "signal 'my_score' has no value in any of 2 samples, so what rule 'low' asks of it is not "
        "applied; fill it, or leave the rule out.",
    ]
    assert read_plan(store, "default")["warnings"][:3] == told
    assert not [w for w in read_plan(store, "default")["warnings"][3:] if "no value" in w]
    assert [record.getMessage() for record in caplog.records][:3] == [f"plan: {t}" for t in told]


def test_the_plan_is_the_same_whatever_a_file_of_rules_is_called(tmp_path):
    """Its name is no part of the fingerprint, so it must not be one of the bytes; and a rule of
    several lines is the same to the plan and to the filter."""
    root = write_tables(tmp_path / "data", [[(0, 0.3, False), (1, 0.2, False)]])
    plans = []
    for name in ("one.toml", "other.toml"):
        path = tmp_path / name
        drop = "\n  top_fraction(clip_score, 0.5)\n  or caption_words < 1\n"
        path.write_text(f'[[rules]]\nreason = "high"\ndrop = """{drop}"""\n')
        chosen: dict[str, Any] = {"signals": ("basic", "scores"), "recipe": f"{path}+datacomp_text"}
        chosen["concepts"] = concepts_file(tmp_path)
        run_stage(PlanFilter(root=root, **chosen))
        stats = run_stage(FilterPairs(root=root, **chosen))["00000"]
        assert stats.reasons == {"high": 1, "caption_not_english": 1}
        plans.append(Path(root, "selection/default/plan.json").read_bytes())
    assert plans[0] == plans[1]
    assert json.loads(plans[0])["recipe"] == "(file)+datacomp_text"


def test_a_draw_in_brackets_balances(tmp_path):
    """However it is written: the same samples."""
    rows = [(n % 3, 0.3, False) for n in range(30)]
    kept = []
    for number, text in enumerate(("balanced_out(3)", "(balanced_out(3))")):
        root = write_tables(tmp_path / str(number), [rows])
        chosen: dict[str, Any] = {
            "recipe": "datacomp_text", "rules": (f"x: {text}", "y: caption_words > 4"),
            "concepts": concepts_file(tmp_path), "signals": ("basic",),
        }  # fmt: skip
        run_stage(PlanFilter(root=root, **chosen))
        kept.append(run_stage(FilterPairs(root=root, **chosen))["00000"].reasons)
    assert kept[0] == kept[1]
    assert kept[0]["x"] > 0


def test_infinite_values_lie_beyond_a_limit_and_not_in_the_plan(tmp_path):
    scores = [math.inf, math.inf, 0.1, 0.2, 0.3, -math.inf]
    root = write_tables(tmp_path, [[(0, score, False) for score in scores]])
    chosen: dict[str, Any] = {
        "signals": ("basic", "scores"),
        "recipe": "datacomp_clip_threshold:-9",
        "rules": ("high: top_fraction(clip_score, 0.34)",),
    }
    run_stage(PlanFilter(root=root, **chosen))
    plan = json.loads(
        Path(root, "selection/default/plan.json").read_bytes(),
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    assert plan["figures"] == {"top_fraction(clip_score, 0.34)": pytest.approx(0.3)}
    stats = run_stage(FilterPairs(root=root, **chosen))["00000"]
    assert stats.reasons == {"clip_score_low": 1, "high": 3}


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({**NO_DEFAULT, "signals": ("basic",)}, r"no signal 'clip_score' in basic"),
        (
            {**NO_DEFAULT, "signals": ("basic", "ratings")},
            r"no signal 'clip_score' in basic.*Signals ratings are named but not there",
        ),
        (
            {"recipe": "datacomp_clip_threshold", "signals": ("basic", "scores"),
             "rules": ("x: not top_fraction(caption_sha, 0.1)",)},
            r"rule 'x': top_fraction\(\) wants a number, not a text",
        ),
        (
            {"recipe": "datacomp_clip_threshold", "signals": ("basic", "scores"),
             "rules": ("x: caption_word < 3",)},
            r"no signal 'caption_word' in basic, scores.*Did you mean 'caption_words'",
        ),
    ],
)  # fmt: skip
def test_a_plan_over_what_is_not_there_is_refused(tmp_path, chosen, sentence):
    root = write_tables(tmp_path, [[(0, 0.3, False)], [(1, None, False)]])
    with pytest.raises(DeclipError, match=f"(?s){sentence}"):
        run_stage(PlanFilter(root=root, **chosen))
    assert not Path(root, "selection").exists()
