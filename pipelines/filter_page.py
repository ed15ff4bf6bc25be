"""What a filter did: every rule alone and in order, signals with the thresholds, dropped pairs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from declip_eval import html
from declip_eval.charts import bar_chart
from declip_filter.plan_files import read_plan
from declip_shards import Store, layout, sidecars
from pipelines.sheets import FOOTER, Cell, cell_of, pictures_of, sheet
from pipelines.signal_histogram import Limit, binned_histogram

KEPT = "kept"
"""What the samples without a drop reason are called."""
VALUES_SHOWN = 20
"""Most frequent values of a signal that is no number."""


@dataclass(frozen=True)
class FilterFacts:
    """A plan and the samples that are shown."""

    name: str
    plan: Mapping[str, Any]
    examples: Mapping[str, Sequence[tuple[str, str]]]
    """Reason (empty for kept) -> (shard, key) of samples."""

    @property
    def num_samples(self) -> int:
        return int(self.plan["num_samples"])

    @property
    def num_kept(self) -> int:
        return int(self.plan["kept"])

    def figures(self) -> list[tuple[str, str]]:
        """(name, value) for the terminal."""
        share = self.num_kept / self.num_samples if self.num_samples else 0.0
        rules = [
            (
                str(rule["reason"]),
                f"{rule['in_order']:,} dropped, {rule['alone']:,} if alone",
            )
            for rule in self.plan["rules"]
            if rule["in_order"] or rule["alone"]
        ]
        return [
            ("selection", self.name),
            ("recipe", str(self.plan.get("recipe", ""))),
            ("samples", f"{self.num_samples:,}"),
            (KEPT, f"{self.num_kept:,} ({share:.2%})"),
            *rules,
        ]


def read_filter_facts(store: Store, name: str, num_samples: int, seed: int) -> FilterFacts:
    """Read the plan, and draw samples of each reason.

    Shards are read in an order drawn by chance until there are enough of every reason, so that a
    large dataset is not read through for a few pictures; samples of one reason may therefore be of
    one shard.

    Args:
        store: the dataset.
        name: of the selection.
        num_samples: samples of each reason, and of the kept ones.
        seed: of the drawing.

    Raises:
        DeclipError: the plan or the selection is missing or damaged, or the plan is of a newer
            format.
    """
    plan = read_plan(store, name)
    left = {reason: min(num, num_samples) for reason, num in _by_reason(plan).items() if num}
    examples: dict[str, list[tuple[str, str]]] = {reason: [] for reason in left}
    rng = np.random.default_rng(seed)
    shards = layout.list_shards(store)
    for shard in (shards[i] for i in rng.permutation(len(shards))):
        if not any(left.values()):
            break
        table = sidecars.read_table(
            store, layout.selection_path(name, shard), ["key", "keep", "reason"]
        )
        keys, reasons = table.column("key").to_pylist(), table.column("reason").to_pylist()
        for row in rng.permutation(len(keys)).tolist():
            reason = reasons[row] or ""
            if left.get(reason):
                left[reason] -= 1
                examples[reason].append((shard, keys[row]))
    return FilterFacts(name=name, plan=plan, examples=examples)


def _by_reason(plan: Mapping[str, Any]) -> dict[str, int]:
    """Samples of each reason, and of the empty one, the kept: rules may share a reason."""
    counts: Counter[str] = Counter({"": int(plan["kept"])})
    for rule in plan["rules"]:
        counts[str(rule["reason"])] += int(rule["in_order"])
    return dict(counts)


def filter_page(store: Store, facts: FilterFacts) -> bytes:
    """The page: rules in order and alone, histograms with thresholds, dropped and kept pairs."""
    dropped = facts.num_samples - facts.num_kept
    tiles = [
        ("Samples", f"{facts.num_samples:,}", "judged"),
        ("Kept", f"{facts.num_kept:,}", f"{facts.num_kept / max(facts.num_samples, 1):.1%}"),
        ("Dropped", f"{dropped:,}", f"by {sum(r['in_order'] > 0 for r in _rules(facts))} rules"),
        ("Recipe", str(facts.plan.get("recipe", "")), f"{len(_rules(facts))} rules"),
    ]
    warnings = [html.callout(str(text), tone="warn") for text in facts.plan["warnings"]]
    page = html.page(
        f"Filter: {facts.name}",
        [_rules_section(facts), _signals_section(facts), _examples_section(store, facts)],
        subtitle="What was kept, what was dropped, and why.",
        summary=[html.stat_tiles(tiles), *warnings],
        footer=FOOTER,
    )
    return page.encode()


def _rules(facts: FilterFacts) -> Sequence[Mapping[str, Any]]:
    rules: Sequence[Mapping[str, Any]] = facts.plan["rules"]
    return rules


def _rules_section(facts: FilterFacts) -> html.Section:
    rules = _rules(facts)
    if not rules:
        return html.section("Rules", html.callout("There is no rule: everything is kept."))
    table = html.table(
        ["reason", "drops what is", "alone", "in order", "left"],
        [
            [
                str(rule["reason"]),
                str(rule["expression"]),
                f"{rule['alone']:,}",
                f"{rule['in_order']:,}",
                f"{rule['left']:,}",
            ]
            for rule in rules
        ],
        caption="Every rule in its order",
        text_columns=(0, 1),
    )
    charts = [
        bar_chart(
            [(_label(rule, rules), float(rule[entry])) for rule in rules if rule[entry]],
            title=title,
            unit="samples",
        )
        for entry, title in (
            ("in_order", "Dropped by the first rule that a sample fails"),
            ("alone", "What each rule would drop alone"),
        )
        if any(rule[entry] for rule in rules)
    ]
    return html.section(
        "Rules",
        table,
        *charts,
        lead="A sample is dropped by the first rule that it fails, so a rule behind others drops "
        "less in order than it would alone; left is what is kept behind it.",
    )


def _label(rule: Mapping[str, Any], rules: Sequence[Mapping[str, Any]]) -> str:
    """The rule's reason; with its expression where others give the same reason."""
    reason = str(rule["reason"])
    is_shared = sum(other["reason"] == rule["reason"] for other in rules) > 1
    return f"{reason}: {rule['expression']}" if is_shared else reason


def _limits_of(facts: FilterFacts, signal: str) -> list[Limit]:
    """The numbers that rules compare a signal with."""
    found = {}
    for rule in _rules(facts):
        for limit in rule.get("limits", ()):
            value = limit.get("value")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if limit.get("signal") == signal and is_number and np.isfinite(value):
                label = f"{rule['reason']} {limit.get('operator', '')}".strip()
                found[label, float(value)] = Limit(label, float(value))
    return list(found.values())


def _signals_section(facts: FilterFacts) -> html.Section:
    charts: list[html.Content] = []
    histograms: Mapping[str, Mapping[str, Any]] = facts.plan["histograms"]
    limits = {signal: _limits_of(facts, signal) for signal in histograms}
    # Those that decide come first.
    for signal in sorted(histograms, key=lambda name: (not limits[name], name)):
        drawn, num_null = histograms[signal], int(histograms[signal].get("num_null", 0))
        note = f"{num_null:,} without a value" if num_null else ""
        if "values" in drawn:
            charts.append(_values_table(signal, drawn, note))
            continue
        charts.append(
            binned_histogram(
                drawn["edges"],
                drawn["counts"],
                title=signal,
                note=note,
                kept=drawn["kept"],
                limits=limits[signal],
            )
        )
    return html.section(
        "Signals",
        *(charts or [html.callout("The plan holds no histogram.")]),
        lead="All samples are faint, the kept ones full. A bar that stands apart holds all up to "
        "the axis or beyond it; its width has no meaning. A line is a threshold of a rule; one "
        "that lies beyond the values stands at the end.",
    )


def _values_table(signal: str, drawn: Mapping[str, Any], note: str) -> html.Markup:
    """Counts of a signal's values, most frequent first."""
    rows = [
        [str(value), f"{count:,}", f"{kept:,}"]
        for value, count, kept in zip(drawn["values"], drawn["counts"], drawn["kept"], strict=True)
    ]
    more = f"; {len(rows) - VALUES_SHOWN:,} more" if len(rows) > VALUES_SHOWN else ""
    caption = f"{signal}{more}{'; ' if note else ''}{note}"
    return html.table(["value", "samples", KEPT], rows[:VALUES_SHOWN], caption=caption)


def _examples_section(store: Store, facts: FilterFacts) -> html.Section:
    by_shard: dict[str, list[str]] = {}
    for found in facts.examples.values():
        for shard, key in found:
            by_shard.setdefault(shard, []).append(key)
    pictures = pictures_of(store, by_shard)
    counts = _by_reason(facts.plan)
    titles, rows = [], list[list[Cell]]()
    for reason in sorted(facts.examples, key=lambda name: (name == "", -counts[name], name)):
        titles.append(f"{reason or KEPT}: {counts[reason]:,}")
        rows.append([cell_of(pictures, key) for _, key in facts.examples[reason]])
    return html.section(
        "Dropped and kept pairs",
        *(sheet([row], row_titles=[title]) for row, title in zip(rows, titles, strict=True)),
        lead="Drawn by chance, by the reason for which they were dropped; kept ones come last.",
    )
