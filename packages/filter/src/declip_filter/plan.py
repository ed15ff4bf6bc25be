"""Look at all signals once before filtering: what each rule does, and what rules need to know."""

import dataclasses
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from declip_filter import plan_files
from declip_filter.balance import Balance, ConceptMatcher, read_concepts
from declip_filter.columns import CAPTION, KEY, ColumnReader, how_made
from declip_filter.evaluation import NOTHING, USABLE, Columns, kind_of
from declip_filter.expressions import WholeFigure, limits
from declip_filter.filter_recipes import Rule
from declip_filter.histograms import Histograms
from declip_filter.rules import DEFAULT_SPLIT_COLUMN, FilterPairs, column_reader, drops, file_digest
from declip_filter.signals import shard_tasks
from declip_filter.whole_figures import CountSearch, RankSearch, ValueCounts, least_count
from declip_shards import DeclipError, Store, TaskStats, layout, sidecars

TASK = "all"
NUM_THREADS = 2
"""Shards that are read at a time."""
TEXTS_SHOWN = ("caption_language", "caption_personal_data")
"""Signals that are texts and whose values plan.json counts, beside the split."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PlanFilter(FilterPairs):
    """Count what every rule drops, alone and in order, and write it down before any is dropped.

    What a rule needs to know of the whole dataset (limits of fractions, counts of values, the
    balancing over concepts) is found here and read by :class:`FilterPairs`. It streams the signals:
    memory does not grow with the dataset, save for the values that ``count`` must tell apart.
    """

    num_cpus: ClassVar[float] = NUM_THREADS

    def tasks(self) -> Sequence[str]:
        """One; the rules are held against the first shard's columns before."""
        super().tasks()
        return (TASK,)

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(plan_files.plan_path(self.name))

    def worker(self) -> Callable[[str], TaskStats]:
        def run(task: str) -> TaskStats:
            with ThreadPoolExecutor(NUM_THREADS) as pool:
                return _Planner(self, pool).run()

        return run


class _Planner:
    """One run over the dataset: the searches first, then the counts."""

    def __init__(self, settings: FilterPairs, pool: ThreadPoolExecutor) -> None:
        self.settings = settings
        self.pool = pool
        self.store = Store(settings.root)
        self.shards = shard_tasks(settings.root)
        self.rules = settings.parsed_rules()
        self.figures: dict[WholeFigure, Any] = {}
        self.matcher: ConceptMatcher | None = None
        self.totals: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        if settings.concepts:
            if file_digest(settings.concepts) != settings.concepts_sha256:
                raise DeclipError(
                    f"concepts {settings.concepts!r} changed meanwhile; run the command again."
                )
            self.matcher = ConceptMatcher(read_concepts(settings.concepts))

    def run(self) -> TaskStats:
        files = self._search()
        if self.matcher:
            files.append(self._balance(self.matcher))
        counts = self._count()
        plan = self._plan(counts)
        for sentence in plan["warnings"]:
            _log.warning("plan: %s", sentence)
        # The plan is the mark of done: it comes last.
        path = plan_files.plan_path(self.settings.name)
        self.store.write_bytes(path, plan_files.pack_plan(plan))
        return TaskStats(
            num_in=counts.num_samples,
            num_out=counts.num_samples,
            files=[*files, path],
            extra={"kept": plan["kept"], "warnings": plan["warnings"]},
        )

    def each_shard(self, work: Callable[[str], None]) -> None:
        """``work`` on every shard, a few at a time; the first fault ends it."""
        waiting: deque[Future[None]] = deque()
        try:
            for shard in self.shards:
                if len(waiting) > NUM_THREADS:
                    waiting.popleft().result()
                waiting.append(self.pool.submit(work, shard))
            while waiting:
                waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _search(self) -> list[str]:
        """Limits of fractions and counts of values; the files that hold the latter."""
        wanted = {f for rule in self.rules for f in rule.parsed.figures if f.column}
        searches: dict[WholeFigure, RankSearch | CountSearch] = {}
        for figure in sorted(wanted, key=lambda f: f.name):
            if figure.function == "count":
                expressions = [rule.parsed for rule in self.rules]
                searches[figure] = CountSearch(
                    least_count(expressions, figure), self._num_samples()
                )
            else:
                is_top = figure.function == "top_fraction"
                searches[figure] = RankSearch(figure.argument, is_top=is_top)
        while open_ones := {f: s for f, s in searches.items() if not s.is_done}:
            self._pass(open_ones)
        files = []
        for figure, search in searches.items():
            if isinstance(search, RankSearch):
                self.figures[figure] = search.limit
                continue
            counts = self.figures[figure] = search.result()
            path = plan_files.count_path(self.settings.name, figure.column)
            sidecars.write_table(self.store, path, plan_files.count_table(counts))
            files.append(path)
        return files

    def _num_samples(self) -> int:
        first = self.settings.signals[0]
        paths = (layout.signals_path(first, shard) for shard in self.shards)
        try:
            return sum(sidecars.num_rows(self.store, path) for path in paths)
        except FileNotFoundError as error:
            # The error itself names a path of this machine.
            lost = [s for s in self.shards if not self.store.exists(layout.signals_path(first, s))]
            raise DeclipError(
                f"signals {first!r} lack shard {', '.join(lost[:3])}; rerun the stage that writes "
                "them."
            ) from error

    def _pass(self, searches: dict[WholeFigure, "RankSearch | CountSearch"]) -> None:
        columns = {figure.column for figure in searches}
        reader = self._reader(sorted(columns))

        def work(shard: str) -> None:
            found = reader.read(shard)
            for figure, search in searches.items():
                kind = kind_of(found[figure.column].type)
                wanted = USABLE if figure.function == "count" else ("number",)
                if kind not in (*wanted, NOTHING):
                    raise DeclipError(
                        f"{figure.name} wants a {' or a '.join(wanted)}, but {figure.column} is "
                        f"{kind} in shard {shard}."
                    )
                search.add(found[figure.column])

        self.each_shard(work)
        for search in searches.values():
            search.end_pass()

    def _reader(self, wanted: Sequence[str]) -> ColumnReader:
        """Reads these columns as the rules' reader does; the samples are compared in the end."""
        counter = self.matcher.count if self.matcher else None
        made = column_reader(self.settings, self.store, self.rules, counter)
        return ColumnReader(
            store=self.store,
            signals=made.signals,
            wanted=tuple(wanted),
            fallback=made.fallback,
            split_column=made.split_column,
            count_concepts=counter,
            is_checked=False,
        )

    def _balance(self, matcher: ConceptMatcher) -> str:
        """Count the captions of each concept, of those that all other rules keep."""
        others = [rule for rule in self.rules if not rule.draws]
        counter = matcher.count
        made = column_reader(self.settings, self.store, others, counter)
        reader = self._reader(sorted({*made.wanted, CAPTION}))
        parts: list[npt.NDArray[np.int64]] = [np.zeros(len(matcher.concepts), dtype=np.int64)]

        lock = threading.Lock()

        def work(shard: str) -> None:
            columns = reader.read(shard)
            dropped = np.zeros(len(columns[KEY]), dtype=bool)
            for rule in others:
                dropped |= drops(rule, columns, self.figures)
            mine = matcher.totals(columns[CAPTION], ~dropped)
            with lock:
                parts[0] += mine

        self.each_shard(work)
        self.totals = parts[0]
        for figure in {f for rule in self.rules for f in rule.parsed.figures}:
            if figure.function == "balanced_out":
                seed = self.settings.concept_seed
                self.figures[figure] = Balance(matcher, self.totals, int(figure.argument), seed)
        path = plan_files.concepts_path(self.settings.name)
        sidecars.write_table(self.store, path, plan_files.concepts_table(matcher, self.totals))
        return path

    def _count(self) -> "_Counts":
        counter = self.matcher.count if self.matcher else None
        made = column_reader(self.settings, self.store, self.rules, counter)
        kinds = made.schema(self.shards[0])
        shown = [n for n, kind in kinds.items() if kind_of(kind) in ("number", "boolean")]
        reader = self._reader(sorted({*made.wanted, *shown}))
        counts = _Counts(len(self.rules))
        texts = {*TEXTS_SHOWN, self.settings.split_column or DEFAULT_SPLIT_COLUMN}

        def work(shard: str) -> None:
            columns = reader.read(shard)
            dropped = [drops(rule, columns, self.figures) for rule in self.rules]
            counts.add(columns, dropped, texts)

        self.each_shard(work)
        return counts

    def _plan(self, counts: "_Counts") -> dict[str, Any]:
        described = []
        left = counts.num_samples
        found = {figure: v for figure, v in self.figures.items() if not callable(v)}
        for number, rule in enumerate(self.rules):
            left -= int(counts.in_order[number])
            described.append(
                {
                    "reason": rule.reason,
                    "expression": rule.expression,
                    "alone": int(counts.alone[number]),
                    "in_order": int(counts.in_order[number]),
                    "left": left,
                    "limits": [dataclasses.asdict(m) for m in limits(rule.parsed, found)],
                }
            )
        return {
            "format_version": plan_files.FORMAT_VERSION,
            "name": self.settings.name,
            "signals": list(self.settings.signals),
            "recipe": self.settings.recipe_name,
            "num_samples": counts.num_samples,
            "kept": left,
            "rules": described,
            "figures": {f.name: _plain(value) for f, value in self.figures.items()},
            "concepts_sha256": self.settings.concepts_sha256,
            "histograms": counts.histograms.result(),
            "warnings": [
                *without_values(self.rules, counts.num_valid, counts.num_samples),
                *warnings(described, counts.num_samples, left),
            ],
        }


def _plain(value: Any) -> Any:
    """A figure as plan.json tells it; tables are beside it."""
    if isinstance(value, ValueCounts):
        return value.least
    return len(value.totals) if isinstance(value, Balance) else value


class _Counts:
    """What the rules do, summed up over shards."""

    def __init__(self, num_rules: int) -> None:
        self.num_samples = 0
        self.alone = np.zeros(num_rules, dtype=np.int64)
        self.in_order = np.zeros(num_rules, dtype=np.int64)
        self.histograms = Histograms()
        self.num_valid: Counter[str] = Counter()
        """By column, the samples that have a value."""
        self._lock = threading.Lock()

    def add(
        self, columns: Columns, dropped: Sequence[npt.NDArray[np.bool_]], texts: Collection[str]
    ) -> None:
        num = len(columns[KEY])
        left = np.ones(num, dtype=bool)
        in_order = []
        for mask in dropped:
            in_order.append(int(np.count_nonzero(mask & left)))
            left &= ~mask
        self.histograms.add(columns, left, texts)
        with self._lock:
            self.num_samples += num
            self.num_valid.update({n: num - c.null_count for n, c in columns.items()})
            self.alone += [int(np.count_nonzero(mask)) for mask in dropped]
            self.in_order += in_order


def without_values(
    rules: Sequence[Rule], num_valid: Mapping[str, int], num_samples: int
) -> list[str]:
    """Sentences on rules that say nothing because nobody measured what they compare.

    A rule over a signal that is empty everywhere drops nobody, whatever its source asks for.
    """
    found = []
    for column in sorted({name for rule in rules for name in rule.parsed.compared}):
        if not num_samples or num_valid.get(column, 0):
            continue
        names = [rule.reason for rule in rules if column in rule.parsed.compared]
        made = how_made(column)
        remedy = f"{made}, and run again" if made else "fill it, or leave the rule out"
        found.append(
            f"signal {column!r} has no value in any of {num_samples} samples, so what "
            f"{_told(names)} asks of it is not applied; {remedy}."
        )
    return found


def _told(reasons: Sequence[str]) -> str:
    quoted = ", ".join(repr(reason) for reason in dict.fromkeys(reasons))
    return f"rule {quoted}"


def warnings(rules: Sequence[dict[str, Any]], num_samples: int, kept: int) -> list[str]:
    """Sentences on rules that drop all samples or none, and on a selection that keeps none."""
    found = [
        f"rule {rule['reason']!r} ({rule['expression']}) would drop all {num_samples} samples; "
        "look at its limit."
        for rule in rules
        if num_samples and rule["alone"] == num_samples
    ]
    idle = [rule["reason"] for rule in rules if num_samples and not rule["alone"]]
    if idle:
        names = ", ".join(
            f"{reason} ({num} rules)" if num > 1 else reason
            for reason, num in Counter(idle).items()
        )
        found.append(
            f"{len(idle)} of {len(rules)} rules drop nothing of {num_samples} samples: {names}."
        )
    if num_samples and not kept:
        most = max(rules, key=lambda rule: int(rule["in_order"]))
        found.append(
            f"no sample is left of {num_samples}; rule {most['reason']!r} drops most "
            f"({most['in_order']})."
        )
    return found
