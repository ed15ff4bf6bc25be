"""Named rules over the signals: which pairs are kept, and why the others are not."""

import ast
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from declip_filter.columns import ColumnReader
from declip_filter.evaluation import Column, Columns, Figures, as_column, evaluate
from declip_filter.expressions import WholeFigure
from declip_filter.filter_recipes import (
    DEFAULT,
    EMPTY,
    FILE_NAME,
    JOIN,
    NO_CONCEPT,
    URL,
    Rule,
    named_rules,
    recipe_name,
)
from declip_filter.limits import require_between, require_folder_name
from declip_filter.plan_files import concept_counter, read_figures, require_same_rules
from declip_filter.signals import shard_tasks
from declip_filter.user_files import read_user_file
from declip_shards import DeclipError, Store, TaskStats, layout, sidecars
from declip_shards.errors import did_you_mean

DEFAULT_SPLIT_COLUMN = "split"
MIN_WORDS_FOR_REPETITION = 4
"""Shorter captions repeat themselves by chance: "bye bye"."""
RUNGS = ("bytes", "caption", "perceptual", "semantic")
"""Ways of finding duplicates whose signals may be there."""
KEPT = np.int32(-1)
"""Number of the rule that drops a kept sample: none."""
_RULE = re.compile(r"\s*([a-z][a-z0-9_]*)\s*:(.*)", re.DOTALL)

SCHEMA = pa.schema([("key", pa.string()), ("keep", pa.bool_()), ("reason", pa.string())])
"""Columns of ``selection/NAME/NNNNN.parquet``, one row a success, ordered by key."""


@dataclass(frozen=True, kw_only=True)
class FilterPairs:
    """Write which pairs are kept, with the first failing rule for each other one.

    No picture is read and no shard rewritten, so another threshold costs seconds. A limit that
    is unset (none) is not applied. Rules run in the order of :func:`rules`; what a rule needs to
    know of the whole dataset comes of :class:`declip_filter.plan.PlanFilter`.
    """

    root: str = field(default="", metadata={"fingerprint": False})
    """Dataset folder, any fsspec URL."""
    signals: tuple[str, ...] = ("basic", "duplicates")
    """Names of the signals to read, from signals/NAME/; a set that no rule needs may be missing."""
    name: str = "default"
    """Name of the selection: it goes to selection/NAME/."""
    recipe: str = field(default=DEFAULT, metadata={"fingerprint": False})
    """Rules by name, such as cc3m or datacomp_basic+datacomp_clip_fraction:0.3, or a .toml file."""
    rules: tuple[str, ...] = field(default=(), metadata={"fingerprint": False})
    """Further rules, each 'reason: expression', such as 'dull: entropy < 3 or contrast < 0.1'."""
    drop_duplicates: tuple[str, ...] = ()
    """Rungs whose later members are dropped: bytes, caption, perceptual, semantic; none: keep."""
    drop_contaminated: bool = False
    """Drop what also occurs in an evaluation set, as the signals of duplicates say."""
    concepts: str = field(default="", metadata={"fingerprint": False})
    """File with a concept a line, for balancing and for the signal num_concepts; empty: none."""
    concept_cap: int | None = None
    """About how many samples a concept keeps (MetaCLIP's t); unset: as the recipe says."""
    concept_seed: int = 0
    """Seed of the draw of balancing; another seed draws other samples."""
    min_words: int | None = 2
    """Fewest words of a caption."""
    min_chars: int | None = 3
    """Fewest characters of a caption."""
    max_words: int | None = 128
    """Most words of a caption."""
    max_chars: int | None = 1000
    """Most characters of a caption."""
    drop_file_names: bool = True
    """Drop captions that are a file's name, such as IMG_1234.jpg."""
    drop_urls: bool = True
    """Drop captions that are a web address and nothing else."""
    min_letters: float | None = 0.5
    """Least share of letters among a caption's characters, spaces not counted, 0 to 1."""
    max_repetition: float | None = 0.6
    """Most repetition of words: 1 - distinct words / words, 0 to 1; captions of 4 words or more."""
    min_side_pixels: int | None = 32
    """Least shorter side of the original picture, in pixels."""
    max_aspect: float | None = 3.0
    """Most longer side over shorter side of the original picture, 1 or more."""
    min_contrast: float | None = 0.02
    """Least standard deviation of the picture's luma, 0 to 0.5."""
    min_entropy: float | None = 0.2
    """Least entropy of the picture's gray levels, in bits, 0 to 8."""
    keep_splits: tuple[str, ...] = ("train",)
    """Values of the split column to keep, the others are dropped as held_out; none: keep all."""
    split_column: str | None = None
    """Column of the shards with the split; unset: 'split' where there is one, else keep all."""
    recipe_name: str = field(init=False, default="")
    """The recipe without the names of the user's files: what may be told of it."""
    resolved_rules: tuple[str, ...] = field(init=False, default=())
    """All rules as 'reason: expression', in order: what recipe, files and settings come to."""
    concepts_sha256: str = field(init=False, default="")
    """Digest of the file of concepts."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def __post_init__(self) -> None:
        given: Any = self.signals
        if isinstance(given, str):
            object.__setattr__(self, "signals", (given,))
        if not self.signals:
            raise DeclipError("signals is empty; name at least one set, such as basic.")
        for name in self.signals:
            require_folder_name("signals", name)
        require_folder_name("name", self.name)
        _check_limits(self)
        if self.concepts:
            where = self.concepts if "://" in self.concepts else os.path.abspath(self.concepts)
            object.__setattr__(self, "concepts", where)
            object.__setattr__(self, "concepts_sha256", file_digest(where))
        found = rules(self)
        _check_concepts(self, found)
        object.__setattr__(self, "recipe_name", recipe_name(self.recipe))
        object.__setattr__(self, "resolved_rules", tuple(rule.text for rule in found))

    def unread(self) -> Mapping[str, str]:
        """Settings that this recipe does not read, and what does."""
        if DEFAULT in self.recipe.split(JOIN):
            return {}
        return dict.fromkeys(DEFAULT_RECIPE_SETTINGS, "recipe 'default'")

    def parsed_rules(self) -> list[Rule]:
        """The rules, from what the settings came to: no file is read again."""
        return [parse_rule(text) for text in self.resolved_rules]

    def tasks(self) -> Sequence[str]:
        """The shards; the rules are held against the columns of the first one before.

        Raises:
            DeclipError: a rule does not fit: nothing of an earlier selection has been touched yet.
        """
        shards = shard_tasks(self.root)
        check_rules(self, Store(self.root), shards[0])
        return shards

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(layout.selection_path(self.name, task))

    def worker(self) -> Callable[[str], TaskStats]:
        store = Store(self.root)
        found = self.parsed_rules()
        figures: Figures = {}
        if any(rule.parsed.figures or "num_concepts" in rule.parsed.columns for rule in found):
            require_same_rules(store, self.name, self.resolved_rules, self.concepts_sha256)
            figures = read_figures(store, self.name, found, self.concept_seed)
        counter = concept_counter(store, self.name, found, figures)
        reader = column_reader(self, store, found, counter)

        def run(task: str) -> TaskStats:
            columns = reader.read(task)
            table = _selection(found, columns, first_failing(found, columns, figures))
            path = layout.selection_path(self.name, task)
            sidecars.write_table(store, path, table)
            counts = pc.value_counts(table.column("reason")).to_pylist()
            reasons = {entry["values"]: entry["counts"] for entry in counts}
            num_kept = reasons.pop("", 0)
            return TaskStats(num_in=table.num_rows, num_out=num_kept, reasons=reasons, files=[path])

        return run


DEFAULT_RECIPE_SETTINGS = (
    "min_words", "min_chars", "max_words", "max_chars", "drop_file_names", "drop_urls",
    "min_letters", "max_repetition", "min_side_pixels", "max_aspect", "min_contrast", "min_entropy",
)  # fmt: skip
"""Settings that make up the recipe ``default`` and are read by no other."""


def _check_limits(settings: FilterPairs) -> None:
    for setting in ("min_words", "min_chars", "min_side_pixels", "concept_seed"):
        require_between(setting, getattr(settings, setting), 0)
    for setting in ("max_words", "max_chars", "concept_cap"):
        require_between(setting, getattr(settings, setting), 1)
    for setting in ("min_letters", "max_repetition"):
        require_between(setting, getattr(settings, setting), 0, 1)
    require_between("max_aspect", settings.max_aspect, 1)
    require_between("min_contrast", settings.min_contrast, 0, 0.5)
    require_between("min_entropy", settings.min_entropy, 0, 8)
    for rung in settings.drop_duplicates:
        if rung not in RUNGS:
            raise DeclipError(
                f"drop_duplicates has {rung!r}, which is no rung of the ladder."
                f"{did_you_mean(rung, RUNGS)}"
            )
    for unit in ("words", "chars"):
        low, high = getattr(settings, f"min_{unit}"), getattr(settings, f"max_{unit}")
        if low is not None and high is not None and low > high:
            raise DeclipError(
                f"min_{unit} is {low} and max_{unit} is {high}: no caption passes; "
                f"lower min_{unit} or raise max_{unit}."
            )


def file_digest(path: str) -> str:
    """sha256 of a user's file of concepts.

    Raises:
        DeclipError: it cannot be read.
    """
    return hashlib.sha256(read_user_file("concepts", path)).hexdigest()


def _check_concepts(settings: FilterPairs, found: Sequence[Rule]) -> None:
    """Refuse rules over concepts without a list of them, and a list that no rule reads."""
    draws = [rule for rule in found if rule.draws]
    reads = draws or [rule for rule in found if "num_concepts" in rule.parsed.columns]
    if reads and not settings.concepts:
        raise DeclipError(
            f"rule {reads[0].reason!r} needs a list of concepts; name a file with one a line by "
            "concepts."
        )
    if settings.concepts and not reads:
        raise DeclipError(
            f"concepts is {settings.concepts!r}, but no rule reads it; set concept_cap, choose a "
            "recipe such as metaclip or datacomp_text, or leave it out."
        )
    if len(draws) > 1:
        raise DeclipError(
            f"{len(draws)} rules balance over concepts; one is allowed: set concept_cap, or choose "
            "the recipe metaclip (metaclip:20000), not both."
        )


def rules(settings: FilterPairs) -> list[Rule]:
    """The rules that the settings switch on, in the order in which they name a drop.

    A limit itself passes: ``min_words=3`` keeps captions of three words. First those of the recipe,
    then duplicates, contamination and the user's own. What the hold-out keeps back comes after
    them, so its count says how many good pairs were held out; balancing comes last of all, for it
    balances what is left.
    """
    s = settings
    found = named_rules(s.recipe, lambda: default_rules(s))
    for rung in dict.fromkeys(s.drop_duplicates):
        found.append(Rule(f"duplicate_{rung}", f"not missing(duplicate_{rung}_of)"))
    if s.drop_contaminated:
        found.append(Rule("contaminated", "not missing(contaminated_by)"))
    found += [parse_rule(text) for text in joined_rules(s.rules)]
    if s.keep_splits:
        column = s.split_column or DEFAULT_SPLIT_COLUMN
        if not column.isidentifier():
            raise DeclipError(
                f"split_column is {column!r}; a rule can name columns of letters, digits and "
                "underscores only. Rename the column."
            )
        kept = ", ".join(repr(value) for value in s.keep_splits)
        found.append(Rule("held_out", f"missing({column}) or {column} not in [{kept}]"))
    if s.concept_cap is not None:
        found += [NO_CONCEPT, Rule("concept_too_frequent", f"balanced_out({s.concept_cap})")]
    found = list(dict.fromkeys(found))
    # Stable: the order of all others stays.
    return sorted(found, key=lambda rule: rule.draws)


def default_rules(settings: FilterPairs) -> list[Rule]:
    """The recipe ``default``: our own rules, made out of the settings."""
    s = settings
    found = [EMPTY]

    def add(reason: str, is_on: bool, expression: str) -> None:
        if is_on:
            found.append(Rule(reason, expression))

    def limit(reason: str, column: str, operator: str, value: float | None) -> None:
        add(reason, value is not None, f"{column} {operator} {value!r}")

    # What a caption *is* comes before how long it is: a file's name is also a short caption,
    # and the more telling reason should be the one that is counted.
    add("caption_is_file_name", s.drop_file_names, FILE_NAME.expression)
    add("caption_is_url", s.drop_urls, URL.expression)
    limit("caption_too_short", "caption_words", "<", s.min_words)
    limit("caption_too_short", "caption_chars", "<", s.min_chars)
    limit("caption_too_long", "caption_words", ">", s.max_words)
    limit("caption_too_long", "caption_chars", ">", s.max_chars)
    limit("caption_few_letters", "caption_letters", "<", s.min_letters)
    enough_words = f"caption_words >= {MIN_WORDS_FOR_REPETITION} and caption_repetition"
    limit("caption_repetitive", enough_words, ">", s.max_repetition)
    limit("image_too_small", "min(original_width, original_height)", "<", s.min_side_pixels)
    limit("image_extreme_aspect", "aspect", ">", s.max_aspect)
    limit("image_flat", "contrast", "<", s.min_contrast)
    limit("image_low_entropy", "entropy", "<", s.min_entropy)
    return found


def parse_rule(text: str) -> Rule:
    """``reason: expression`` as a rule.

    Raises:
        DeclipError: there is no reason, or the expression is none.
    """
    match = _RULE.fullmatch(text)
    if not match:
        raise DeclipError(
            f"rule {text!r} has no reason; write 'reason: expression', such as 'dull: entropy < 3'."
        )
    return Rule(match[1], match[2].strip())


def joined_rules(pieces: Sequence[str]) -> list[str]:
    """Rules that a command line cut at commas, in one piece again.

    A piece begins a rule if it looks like ``reason:`` and what came before it is complete.
    """
    found: list[str] = []
    for piece in pieces:
        if found and not (_RULE.fullmatch(piece) and _is_complete(found[-1])):
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return found


def _is_complete(text: str) -> bool:
    match = _RULE.fullmatch(text)
    try:
        ast.parse(match[2].strip() if match else text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def first_failing(
    found: Sequence[Rule], columns: Columns, figures: Figures
) -> npt.NDArray[np.int32]:
    """For each sample the number of the first rule that drops it, :data:`KEPT` where none does."""
    first = np.full(len(columns["key"]), KEPT, dtype=np.int32)
    for number in range(len(found) - 1, -1, -1):
        first[drops(found[number], columns, figures)] = number
    return first


def drops(rule: Rule, columns: Columns, figures: Figures) -> npt.NDArray[np.bool_]:
    """Where a rule drops the sample: one boolean each; what is neither true nor false does not.

    Raises:
        DeclipError: the rule does not fit the columns; it is named.
    """
    try:
        held = evaluate(rule.parsed, columns, figures)
    except DeclipError as error:
        raise DeclipError(f"rule {rule.reason!r}: {error}") from None
    if held.null_count:
        held = held.fill_null(False)
    mask: npt.NDArray[np.bool_] = held.to_numpy(zero_copy_only=False)
    return mask


def check_rules(settings: FilterPairs, store: Store, shard: str) -> None:
    """Refuse rules that do not fit a shard's columns: by names and types, no row is read.

    Raises:
        DeclipError: a set or a column is not there, or is of a kind that a rule cannot use.
    """
    found = settings.parsed_rules()
    columns = column_reader(settings, store, found, None).empty(shard)
    figures: dict[WholeFigure, Any] = {}
    for figure in {figure for rule in found for figure in rule.parsed.figures}:
        if figure.function == "balanced_out":
            figures[figure] = lambda columns: pa.array([], pa.bool_())
        elif figure.function == "count":
            figures[figure] = lambda column: pa.array([], pa.int64())
        else:
            figures[figure] = 0.0
    for rule in found:
        drops(rule, columns, figures)


def _selection(found: Sequence[Rule], columns: Columns, first: npt.NDArray[np.int32]) -> pa.Table:
    """A table of :data:`SCHEMA`."""
    names = pa.array([*(rule.reason for rule in found), ""])
    reason = names.take(pa.array(np.where(first == KEPT, len(found), first)))
    return pa.table({"key": columns["key"], "keep": first == KEPT, "reason": reason}, schema=SCHEMA)


def select_pairs(
    settings: FilterPairs, columns: Mapping[str, Any], figures: Figures | None = None
) -> pa.Table:
    """Apply the rules to samples' signals.

    Args:
        columns: what the rules read, by name, and ``key``; arrays of one length.
        figures: what the rules need to know of the whole dataset, if anything.

    Returns:
        A table of :data:`SCHEMA`; ``reason`` is empty for a kept sample and else the first
        failing rule's name.
    """
    held = {name: as_column(values) for name, values in columns.items()}
    found = settings.parsed_rules()
    return _selection(found, held, first_failing(found, held, figures or {}))


def column_reader(
    settings: FilterPairs,
    store: Store,
    found: Sequence[Rule],
    count_concepts: Callable[[Column], Column] | None,
) -> ColumnReader:
    """Reads of each shard what these rules need and nothing else."""
    wanted: set[str] = set()
    for rule in found:
        wanted |= set(rule.parsed.columns)
        if rule.draws:
            wanted.add("caption")
    fallback = {}
    if settings.split_column is None and settings.keep_splits:
        # A table without a split has no hold-out: every sample counts as of the first kept one.
        fallback[DEFAULT_SPLIT_COLUMN] = settings.keep_splits[0]
    return ColumnReader(
        store=store,
        signals=settings.signals,
        wanted=tuple(sorted(wanted)),
        fallback=fallback,
        split_column=settings.split_column,
        count_concepts=count_concepts,
    )


assert set(DEFAULT_RECIPE_SETTINGS) <= {f.name for f in fields(FilterPairs)}
