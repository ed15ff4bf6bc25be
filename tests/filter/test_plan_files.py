import json
import math

import numpy as np
import pytest

from declip_filter.balance import Balance, ConceptMatcher
from declip_filter.expressions import WholeFigure
from declip_filter.filter_recipes import Rule
from declip_filter.plan_files import (
    concepts_path,
    concepts_table,
    count_path,
    count_table,
    pack_plan,
    plan_path,
    read_figures,
    read_plan,
    require_same_rules,
)
from declip_filter.whole_figures import ValueCounts
from declip_shards import DeclipError, Store, sidecars


@pytest.fixture
def plain_store(tmp_path):
    return Store(str(tmp_path))


def write_plan(store, **change):
    plan = {
        "format_version": 1,
        "rules": [{"reason": "a", "expression": "x < 3"}],
        "figures": {"top_fraction(x, 0.3)": 0.1, "count(y)": 4, "balanced_out(7)": 2},
        "concepts_sha256": "",
        **change,
    }
    store.write_bytes(plan_path("default"), json.dumps(plan).encode())


def test_what_is_read_is_what_was_written(plain_store):
    write_plan(plain_store)
    counts = ValueCounts(np.array([3, 9], np.uint64), np.array([4, 5]), 4)
    matcher, totals = ConceptMatcher(["cat", "red dog"]), np.array([3, 0])
    table = concepts_table(matcher, totals)
    sidecars.write_table(plain_store, count_path("default", "y"), count_table(counts))
    sidecars.write_table(plain_store, concepts_path("default"), table)
    rules = [
        Rule("a", "top_fraction(x, 0.3) or count(y) > 3"),
        Rule("b", "balanced_out(7)"),
    ]
    found = read_figures(plain_store, "default", rules, 11)
    assert found[WholeFigure("top_fraction", "x", 0.3)] == 0.1
    read = found[WholeFigure("count", "y")]
    assert (read.hashes.tolist(), read.counts.tolist(), read.least) == ([3, 9], [4, 5], 4)
    balance = found[WholeFigure("balanced_out", "", 7)]
    assert isinstance(balance, Balance)
    assert (balance.cap, balance.seed, balance.totals.tolist()) == (7, 11, [3, 0])
    assert balance.matcher.concepts == ["cat", "red dog"]


def test_what_is_no_json_is_never_written():
    assert json.loads(pack_plan({"a": [1.5, None]})) == {"a": [1.5, None]}
    for value in (math.inf, math.nan):
        with pytest.raises(ValueError, match="not JSON compliant"):
            pack_plan({"figures": {"x": value}})


def test_plans_of_others_are_refused(plain_store):
    with pytest.raises(DeclipError, match=r"plan.json' is missing; run the stage that plans"):
        read_plan(plain_store, "default")
    for damaged in (b"{", b"[]", b"{}"):
        plain_store.write_bytes(plan_path("default"), damaged)
        with pytest.raises(DeclipError, match="is damaged; delete it"):
            read_plan(plain_store, "default")
    write_plan(plain_store, format_version=2)
    with pytest.raises(DeclipError, match=r"newer version \(format 2, this one reads up to 1\)"):
        read_plan(plain_store, "default")
    write_plan(plain_store)
    require_same_rules(plain_store, "default", ["a: x < 3"], "")
    with pytest.raises(DeclipError, match=r"other rules \(such as 'a: x < 4'\)"):
        require_same_rules(plain_store, "default", ["a: x < 4"], "")
    with pytest.raises(DeclipError, match="another list of concepts"):
        require_same_rules(plain_store, "default", ["a: x < 3"], "12")
