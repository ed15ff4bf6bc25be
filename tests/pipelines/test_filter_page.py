"""The filter's page: what plan and selection say is on it, of a filter that really ran."""

import html
import re

import pytest

from declip_filter import FilterPairs, MeasureImages
from declip_filter.plan import PlanFilter
from declip_filter.plan_files import plan_path, read_plan
from declip_shards import DeclipError, Stage, Store, layout, sidecars
from declip_shards.fakes import write_fake_dataset
from pipelines.filter_page import KEPT, filter_page, read_filter_facts

EVIL = "<script>alert(1)</script> & more"


def caption(color: str, shape: str) -> str:
    return "word" if color == "red" else f"a {color} {shape} in the park, {EVIL}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two shards, measured and filtered; the second is held out, one color has a short caption."""
    root = str(tmp_path_factory.mktemp("filtered") / "data")
    store = write_fake_dataset(root, num_shards=2, samples_per_shard=24, caption=caption)
    rules = ("picked: aspect > 7",)
    stages: list[Stage] = [
        MeasureImages(root=root),
        PlanFilter(root=root, signals=("basic",), rules=rules),
        FilterPairs(root=root, signals=("basic",), rules=rules),
    ]
    for stage in stages:
        work = stage.worker()
        for task in stage.tasks():
            work(task)
    return store


def reasons(store: Store) -> dict[str, str]:
    """Key -> drop reason."""
    return {
        row["key"]: row["reason"]
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.selection_path("default", shard))
    }


def words(page: bytes) -> str:
    """The page's text without its markup."""
    return html.unescape(re.sub(r"<[^>]+>", " ", page.decode().partition("<body>")[2]))


def test_counts_are_those_of_the_selection(made):
    facts = read_filter_facts(made, "default", 100, 0)
    found = reasons(made)
    assert facts.num_samples == len(found) == 48
    assert facts.num_kept == list(found.values()).count("")
    by_reason = {reason: {key for _, key in own} for reason, own in facts.examples.items()}
    for reason, keys in by_reason.items():
        assert keys == {key for key, why in found.items() if why == reason}
    assert set(by_reason) == set(found.values())
    told = dict(facts.figures())
    assert told["samples"] == "48"
    assert told[KEPT].startswith(f"{facts.num_kept} (")


def test_every_rule_signal_and_reason_is_on_the_page(made):
    facts = read_filter_facts(made, "default", 3, 0)
    page = filter_page(made, facts)
    text = words(page)
    plan = read_plan(made, "default")
    for rule in plan["rules"]:
        assert rule["reason"] in text
        assert rule["expression"] in text
    for signal in plan["histograms"]:
        assert signal in text
    for sentence in plan["warnings"]:
        assert sentence in text
    compared = {limit["signal"] for rule in plan["rules"] for limit in rule["limits"]}
    drawn = {signal for signal, drawn in plan["histograms"].items() if "edges" in drawn}
    assert compared & drawn, "no threshold to draw"
    assert page.count(b'class="reference"') >= 2 * len(compared & drawn)
    assert page.count(b"data:image/") == sum(map(len, facts.examples.values()))
    assert b"<script" not in page
    assert EVIL in text


def test_the_same_seed_shows_the_same_samples_and_no_more_than_asked_for(made):
    few = read_filter_facts(made, "default", 2, 7)
    assert few == read_filter_facts(made, "default", 2, 7)
    assert max(map(len, few.examples.values())) == 2
    assert few.examples != read_filter_facts(made, "default", 2, 8).examples


def test_a_plan_that_is_missing_or_of_a_newer_format_is_refused(made, tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=1, samples_per_shard=4)
    with pytest.raises(DeclipError, match=r"'selection/default/plan.json' is missing; run the"):
        read_filter_facts(store, "default", 3, 0)
    newer = made.read_bytes(plan_path("default")).replace(
        b'"format_version": 1', b'"format_version": 99'
    )
    store.write_bytes(plan_path("default"), newer)
    with pytest.raises(DeclipError, match=r"newer version \(format 99.*upgrade opendeclip"):
        read_filter_facts(store, "default", 3, 0)
