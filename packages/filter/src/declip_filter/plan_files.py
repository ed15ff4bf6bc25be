"""The files of a filter's plan: what the rules need to know of the whole dataset.

``selection/NAME/plan.json`` and, where rules need them, ``count_SIGNAL.parquet`` and
``concepts.parquet`` in ``selection/NAME/plan/``.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from declip_filter.balance import Balance, ConceptMatcher
from declip_filter.evaluation import Figures
from declip_filter.expressions import WholeFigure
from declip_filter.filter_recipes import Rule
from declip_filter.whole_figures import ValueCounts
from declip_shards import DeclipError, Store, sidecars
from declip_shards.manifest import canonical_json

FORMAT_VERSION = 1
"""Of plan.json; a reader refuses a higher one."""
RERUN = "run the stage that plans the filter (PlanFilter) first"


def plan_path(name: str) -> str:
    """Of the selection ``name``."""
    return f"selection/{name}/plan.json"


def count_path(name: str, column: str) -> str:
    """Values of a signal that occur often: ``value_hash`` (uint64, sorted), ``count``."""
    return f"selection/{name}/plan/count_{column}.parquet"


def concepts_path(name: str) -> str:
    """``concept``, and ``count``: the captions it is in, of those that the other rules keep."""
    return f"selection/{name}/plan/concepts.parquet"


def pack_plan(plan: dict[str, Any]) -> bytes:
    """plan.json's bytes; a number that JSON cannot hold is a fault of ours and never written."""
    json.dumps(plan, allow_nan=False)
    return canonical_json(plan)


def read_plan(store: Store, name: str) -> dict[str, Any]:
    """The plan of a selection.

    Raises:
        DeclipError: it is missing, damaged, or of a newer format.
    """
    path = plan_path(name)
    try:
        plan: dict[str, Any] = json.loads(store.read_bytes(path))
        version = plan["format_version"]
    except FileNotFoundError as error:
        raise DeclipError(f"{path!r} is missing; {RERUN}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DeclipError(f"{path!r} is damaged; delete it and {RERUN}.") from error
    if version > FORMAT_VERSION:
        raise DeclipError(
            f"{path!r} was written by a newer version (format {version}, this one reads up to "
            f"{FORMAT_VERSION}); upgrade opendeclip."
        )
    return plan


def require_same_rules(store: Store, name: str, rules: Sequence[str], concepts_sha256: str) -> None:
    """Refuse a plan that was made for other rules or another list of concepts.

    Raises:
        DeclipError: the first difference is told.
    """
    plan = read_plan(store, name)
    planned = [f"{rule['reason']}: {rule['expression']}" for rule in plan["rules"]]
    if planned != list(rules):
        other = [text for text in (*rules, *planned) if (text in planned) != (text in rules)]
        told = f" (such as {other[0]!r})" if other else ""
        raise DeclipError(f"{plan_path(name)!r} is of other rules{told}; {RERUN}.")
    if plan["concepts_sha256"] != concepts_sha256:
        raise DeclipError(f"{plan_path(name)!r} is of another list of concepts; {RERUN}.")


def read_figures(store: Store, name: str, rules: Sequence[Rule], seed: int) -> Figures:
    """What a plan found out for its rules, as :func:`declip_filter.evaluation.evaluate` wants it.

    Raises:
        DeclipError: a file is missing or damaged.
    """
    plan = read_plan(store, name)
    found: dict[WholeFigure, Any] = {}
    for figure in {figure for rule in rules for figure in rule.parsed.figures}:
        if figure.function == "count":
            table = sidecars.read_table(store, count_path(name, figure.column))
            found[figure] = ValueCounts(
                table.column("value_hash").to_numpy(),
                table.column("count").to_numpy(),
                plan["figures"][figure.name],
            )
        elif figure.function == "balanced_out":
            matcher, totals = read_totals(store, name)
            found[figure] = Balance(matcher, totals, int(figure.argument), seed)
        else:
            found[figure] = plan["figures"][figure.name]
    return found


def read_totals(store: Store, name: str) -> tuple[ConceptMatcher, Any]:
    """The concepts of a plan, and the captions that each is in."""
    table = sidecars.read_table(store, concepts_path(name), ["concept", "count"])
    return ConceptMatcher(table.column("concept").to_pylist()), table.column("count").to_numpy()


def concept_counter(
    store: Store, name: str, rules: Sequence[Rule], figures: Figures
) -> Callable[[pa.Array], pa.Array] | None:
    """Counts the concepts of captions, where a rule reads ``num_concepts``."""
    if not any("num_concepts" in rule.parsed.columns for rule in rules):
        return None
    for figure in figures.values():
        if isinstance(figure, Balance):
            return figure.matcher.count
    return read_totals(store, name)[0].count


def count_table(counts: ValueCounts) -> pa.Table:
    return pa.table(
        {
            "value_hash": pa.array(counts.hashes, pa.uint64()),
            "count": pa.array(counts.counts, pa.int64()),
        }
    )


def concepts_table(matcher: ConceptMatcher, totals: "np.ndarray[Any, Any]") -> pa.Table:
    return pa.table(
        {
            "concept": pa.array(matcher.concepts, pa.string()),
            "count": pa.array(totals, pa.int64()),
        }
    )
