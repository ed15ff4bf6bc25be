import json
import math

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st

from declip_filter.evaluation import as_column
from declip_filter.histograms import MAX_VALUES, NUM_BINS, Histograms

SHARD = st.lists(
    st.tuples(st.none() | st.floats(width=32) | st.sampled_from([0.1, 0.2, 7.0]), st.booleans()),
    min_size=1,
    max_size=40,
)


def filled(shards):
    made = Histograms()
    for rows in shards:
        columns = {
            "x": as_column(pa.array([value for value, _ in rows], pa.float32())),
            "kept": as_column(pa.array([kept for _, kept in rows])),
        }
        made.add(columns, np.array([kept for _, kept in rows]))
    return made.result()


@runs(deadline=None)
@given(st.lists(SHARD, min_size=1, max_size=4))
def test_every_sample_is_in_one_bin_and_order_does_not_matter(shards):
    found = filled(shards)
    assert found == filled(shards[::-1])
    json.dumps(found, allow_nan=False)
    rows = [row for rows in shards for row in rows]
    there = [v for v, _ in rows if v is not None and not math.isnan(v)]
    if there:
        x = found["x"]
        assert sum(x["counts"]) == len(there)
        assert sum(x["counts"]) + x["num_null"] == len(rows)
        assert len(x["edges"]) == len(x["counts"]) + 1 == len(x["kept"]) + 1
        assert len(x["counts"]) <= NUM_BINS + 1
        assert x["edges"] == sorted(x["edges"])
        kept = [v for v, is_kept in rows if is_kept and v is not None and not math.isnan(v)]
        assert sum(x["kept"]) == len(kept)
    flags = dict(zip(found["kept"]["values"], found["kept"]["counts"], strict=True))
    assert flags.get(True, 0) == sum(is_kept for _, is_kept in rows)
    assert dict(zip(found["kept"]["values"], found["kept"]["kept"], strict=True)).get(False, 0) == 0


def test_counts_are_exact_for_the_edges():
    values = np.concatenate([np.linspace(0.11, 0.45, 5000), [0.0, 3.0]]).astype(np.float32)
    made = Histograms()
    made.add({"x": pa.array(values)}, values > 0.3)
    found = made.result()["x"]
    edges = np.array(found["edges"])
    assert len(edges) > 20
    for low, high, count, kept in zip(
        edges, edges[1:], found["counts"], found["kept"], strict=False
    ):
        inside = (values >= low) & (values < high)
        assert count == inside.sum()
        assert kept == (inside & (values > 0.3)).sum()


def test_of_texts_only_those_named_are_counted_and_none_of_many_values():
    made, named = Histograms(), ("many", "few")
    many = pa.array([f"{n}" for n in range(MAX_VALUES + 1)])
    few = pa.array(["en", "de", None] * 67)
    first = {"many": many, "few": few, "author": few, "boxes": pa.array([[1]] * 201)}
    made.add(first, np.ones(201, bool), named)
    made.add({"many": few, "few": few, "author": few}, np.zeros(201, bool), named)
    assert made.result() == {
        "few": {"values": ["de", "en"], "counts": [134, 134], "kept": [67, 67], "num_null": 134}
    }
