"""Expressions over signals: a small part of Python's grammar, compiled to whole-column operations.

Nothing is ever handed to ``eval``: the text is parsed, every node of the tree is checked against
what is listed here, and pyarrow's kernels do the work.

A value may be missing (null, and NaN counts as null). A comparison with a missing value is neither
true nor false but missing itself; ``and``, ``or`` and ``not`` follow Kleene's three-valued logic,
as in SQL; what is missing at the end does not drop. ``missing(signal)`` asks for it.
"""

import ast
import functools
import io
import re
import sys
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from declip_shards import DeclipError

MAX_CHARS = 20_000
"""Longest expression: parsing is recursive."""
FUNCTIONS = {
    "missing": "missing(signal): whether there is no value",
    "matches": "matches(signal, 'regex'): whether the text has a match (RE2's syntax)",
    "top_fraction": "top_fraction(signal, 0.3): whether among the dataset's highest 30 %",
    "bottom_fraction": "bottom_fraction(signal, 0.3): whether among the dataset's lowest 30 %",
    "count": "count(signal): how many samples of the dataset have the same value",
    "min": "min(a, b, ...): the least of numbers",
    "max": "max(a, b, ...): the greatest of numbers",
    "abs": "abs(a): the number without its sign",
    "balanced_out": "balanced_out(20000): whether the balancing over concepts draws the sample out",
}
"""What may be called, and what it says."""
WHOLE_DATASET = ("top_fraction", "bottom_fraction", "count", "balanced_out")
"""Functions whose value depends on the other samples."""
_GREATEST = sys.float_info.max
_LINE_BREAK = re.compile(r"\r\n|\r|\n")
LITERALS = {"true": True, "false": False}
"""Names that are constants, beside Python's own."""
_COMPARISONS = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.In: "in",
    ast.NotIn: "not in",
}
_ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


@dataclass(frozen=True)
class WholeFigure:
    """A figure of the whole dataset that an expression needs before it can be evaluated."""

    function: str
    """One of :data:`WHOLE_DATASET`."""
    column: str
    """The signal; empty for ``balanced_out``."""
    argument: float = 0
    """The fraction, or the cap; 0 for ``count``."""

    @property
    def name(self) -> str:
        """As it is written, in one spelling: ``top_fraction(clip_score, 0.3)``."""
        inside = [self.column] if self.column else []
        return f"{self.function}({', '.join([*inside, *self._argument()])})"

    def _argument(self) -> list[str]:
        return [] if self.function == "count" else [f"{self.argument:g}"]


@dataclass(frozen=True)
class Limit:
    """A comparison of one signal with a number: where a report draws a line."""

    signal: str
    operator: str
    """``<``, ``<=``, ``>`` or ``>=``: samples on that side are the ones that the rule names."""
    value: float
    is_enough: bool
    """Whether this comparison alone makes the condition hold; else another must hold with it."""


@dataclass(frozen=True)
class Expression:
    """A checked condition; :func:`parse` makes it, :mod:`declip_filter.evaluation` computes it."""

    text: str
    tree: ast.expr
    columns: tuple[str, ...]
    """Signals that it reads, sorted."""
    compared: tuple[str, ...]
    """Those of them whose values matter, not only whether there is one: it says nothing of a
    sample without a value of the signal."""
    figures: tuple[WholeFigure, ...]
    """What must be known of the whole dataset, sorted by name."""

    def fault(self, node: ast.AST, what: str) -> DeclipError:
        """An error that shows the expression and where in it."""
        return _fault(self.text, node, what)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (parse, (self.text,))


def _fault(text: str, node: ast.AST, what: str) -> DeclipError:
    start = getattr(node, "col_offset", 0)
    end = getattr(node, "end_col_offset", None) or start + 1
    # ast counts bytes of UTF-8, a reader counts characters.
    encoded = text.encode()
    first, last = len(encoded[:start].decode()), len(encoded[:end].decode())
    return show_fault(text, first, max(last - first, 1), what)


def show_fault(text: str, start: int, length: int, what: str) -> DeclipError:
    """``what``, then the expression with a mark under the characters meant."""
    return DeclipError(
        f"{what} At character {start + 1} of\n  {text}\n  {' ' * start}{'^' * length}"
    )


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> Expression:
    """Check an expression.

    Args:
        text: such as ``caption_words < 3 or aspect > 3``. Allowed are signals' names, numbers,
            strings, ``true`` and ``false``, comparisons (chains too), ``in`` and ``not in`` a list
            of constants, ``and``, ``or``, ``not``, ``+ - * /`` and the functions of
            :data:`FUNCTIONS`. It may run over several lines; :attr:`Expression.text` is on one.

    Raises:
        DeclipError: it is none; the expression, the place and what is allowed are shown.
    """
    text = _on_one_line(text)
    if not text:
        raise DeclipError("an expression is empty; write a condition such as caption_words < 3.")
    if len(text) > MAX_CHARS:
        raise DeclipError(
            f"an expression has {len(text)} characters; it may have {MAX_CHARS}. Split it into "
            "several rules."
        )
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        # An expression that ends too early is reported at column 0.
        start = error.offset - 1 if error.offset else len(text)
        said = f"not an expression: {error.msg}."
        if "=" in text[start : start + 2] and "==" not in text[start : start + 2]:
            said += " Equality is written ==."
        raise show_fault(text, min(start, len(text)), 1, said) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise DeclipError(f"not an expression ({error}): {text[:200]!r}") from None
    try:
        checker = _Checker(text)
        checker.condition(tree)
    except RecursionError:
        raise DeclipError(f"an expression is nested too deeply: {text[:200]!r}") from None
    if not checker.columns and not checker.figures:
        raise _fault(text, tree, "no signal is read, so it is the same for all samples.")
    figures = tuple(sorted(checker.figures, key=lambda figure: figure.name))
    is_draw = isinstance(tree, ast.Call) and ast.unparse(tree.func) == "balanced_out"
    if any(figure.function == "balanced_out" for figure in figures) and not is_draw:
        raise _fault(text, tree, "balanced_out() must be the whole expression.")
    return Expression(
        text=text,
        tree=tree,
        columns=tuple(sorted(checker.columns)),
        compared=tuple(sorted(checker.compared)),
        figures=figures,
    )


def _on_one_line(text: str) -> str:
    """The same expression without line breaks.

    Raises:
        DeclipError: that would change it, for there is a comment, or a string of several lines.
    """
    lines = [line.strip() for line in _LINE_BREAK.split(text)]
    joined = " ".join(line for line in lines if line)
    if len(lines) == 1 and "#" not in joined:
        return joined
    try:
        # Within brackets line breaks mean nothing.
        tokens = list(tokenize.generate_tokens(io.StringIO(f"({text}\n)").readline))
    except (tokenize.TokenError, SyntaxError):
        return joined  # parsing it tells what is wrong
    for token in tokens:
        if token.type == tokenize.COMMENT:
            raise DeclipError(
                f"an expression has a comment, {token.string!r}; leave it out, or write it outside "
                "of the expression."
            )
        if token.start[0] != token.end[0] and token.type == tokenize.STRING:
            raise DeclipError(
                f"an expression has a string of several lines, {token.string!r}; write \\n for a "
                "line break in it."
            )
    return joined


class _Checker:
    """Walks a tree once and refuses what is not listed; types are known at evaluation only."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns: set[str] = set()
        self.compared: set[str] = set()
        self.figures: set[WholeFigure] = set()

    def fail(self, node: ast.AST, what: str) -> DeclipError:
        return _fault(self.text, node, what)

    def condition(self, node: ast.expr) -> None:
        """A node whose value is true or false."""
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self.condition(value)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self.condition(node.operand)
        elif isinstance(node, ast.Compare):
            self.comparison(node)
        elif isinstance(node, ast.Name | ast.Call):
            self.value(node)
        else:
            raise self.fail(node, "this is no condition; compare it with something.")

    def comparison(self, node: ast.Compare) -> None:
        self.value(node.left)
        for operator, right in zip(node.ops, node.comparators, strict=True):
            if type(operator) not in _COMPARISONS:
                raise self.fail(right, "'is' is not allowed; use == or missing(signal).")
            if isinstance(operator, ast.In | ast.NotIn):
                self.constants(right)
            else:
                self.value(right)

    def constants(self, node: ast.expr) -> None:
        if not isinstance(node, ast.List | ast.Tuple | ast.Set) or not node.elts:
            raise self.fail(node, "after 'in' comes a list of constants, such as ['en', 'de'].")
        for element in node.elts:
            self.finite(element)
        kinds = {type(constant_of(element)) for element in node.elts}
        if None.__class__ in kinds:
            raise self.fail(node, "the list may hold constants only, such as ['en', 'de'].")
        if len({kind if kind in (str, bool) else float for kind in kinds}) > 1:
            raise self.fail(node, "the constants of a list must be of one kind.")

    def finite(self, node: ast.expr) -> None:
        """Refuse a constant beyond the range of double precision: 1e999 is infinite."""
        value = constant_of(node)
        if isinstance(value, int | float) and not -_GREATEST <= value <= _GREATEST:
            raise self.fail(
                node, f"a number must be finite and at most {_GREATEST:.3g}; choose a smaller one."
            )

    def value(self, node: ast.expr) -> None:
        if constant_of(node) is not None:
            self.finite(node)
            return
        if isinstance(node, ast.Name):
            self.columns.add(node.id)
            self.compared.add(node.id)
        elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            self.value(node.left)
            self.value(node.right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            self.value(node.operand)
        elif isinstance(node, ast.Call):
            self.call(node)
        elif isinstance(node, ast.Compare | ast.BoolOp):
            raise self.fail(node, "a condition stands where a value is due.")
        else:
            raise self.fail(
                node,
                "this is not allowed; write signals, constants, comparisons, and/or/not, + - * / "
                f"and {', '.join(FUNCTIONS)}.",
            )

    def call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if name not in FUNCTIONS or node.keywords:
            told = "; ".join(FUNCTIONS.values())
            raise self.fail(node, f"{name!r} with these arguments is no function here. {told}.")
        getattr(self, f"_{name}")(node)

    def _signal(self, node: ast.Call, num_arguments: int) -> str:
        """The first argument, which must be a signal's name."""
        first = node.args[0] if node.args else None
        if len(node.args) != num_arguments or not isinstance(first, ast.Name):
            assert isinstance(node.func, ast.Name)
            raise self.fail(node, f"it is used so: {FUNCTIONS[node.func.id]}.")
        self.columns.add(first.id)
        if not (isinstance(node.func, ast.Name) and node.func.id == "missing"):
            self.compared.add(first.id)
        return first.id

    def _missing(self, node: ast.Call) -> None:
        self._signal(node, 1)

    def _count(self, node: ast.Call) -> None:
        self.figures.add(WholeFigure("count", self._signal(node, 1)))

    def _matches(self, node: ast.Call) -> None:
        self._signal(node, 2)
        pattern = constant_of(node.args[1])
        if not isinstance(pattern, str):
            raise self.fail(node, f"it is used so: {FUNCTIONS['matches']}.")
        try:
            pc.match_substring_regex(pa.array([""]), pattern)
        except pa.ArrowInvalid as error:
            raise self.fail(node.args[1], f"not a regular expression of RE2 ({error}).") from None

    def _fraction(self, node: ast.Call) -> None:
        assert isinstance(node.func, ast.Name)
        column = self._signal(node, 2)
        fraction = constant_of(node.args[1])
        if isinstance(fraction, bool | str) or fraction is None or not 0 < fraction < 1:
            raise self.fail(node.args[1], "a fraction must be a number above 0 and below 1.")
        self.figures.add(WholeFigure(node.func.id, column, float(fraction)))

    _top_fraction = _fraction
    _bottom_fraction = _fraction

    def _balanced_out(self, node: ast.Call) -> None:
        cap = constant_of(node.args[0]) if len(node.args) == 1 else None
        if not isinstance(cap, int) or isinstance(cap, bool) or cap < 1:
            raise self.fail(node, f"it is used so: {FUNCTIONS['balanced_out']}.")
        self.figures.add(WholeFigure("balanced_out", "", cap))

    def _several(self, node: ast.Call) -> None:
        assert isinstance(node.func, ast.Name)
        if len(node.args) < (1 if node.func.id == "abs" else 2) or (
            node.func.id == "abs" and len(node.args) > 1
        ):
            raise self.fail(node, f"it is used so: {FUNCTIONS[node.func.id]}.")
        for argument in node.args:
            self.value(argument)

    _min = _several
    _max = _several
    _abs = _several


def constant_of(node: ast.expr) -> "bool | int | float | str | None":
    """The value of a constant, its sign included; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str):
        return node.value
    if isinstance(node, ast.Name) and node.id in LITERALS:
        return LITERALS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = constant_of(node.operand)
        if isinstance(inner, int | float) and not isinstance(inner, bool):
            return -inner if isinstance(node.op, ast.USub) else inner
    return None


_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}


def limits(expression: Expression, figures: Mapping[WholeFigure, Any]) -> list[Limit]:
    """The numbers that a condition compares single signals with, in the order they stand.

    ``not`` is taken into account; a fraction counts with the value it came to.
    """
    found: list[Limit] = []

    def add(node: ast.expr, operator: str, value: Any, negated: bool, is_enough: bool) -> None:
        names = [node] if isinstance(node, ast.Name) else []
        side = _NEGATED.get(operator, "") if negated else operator
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            # min(a, b) < 3 is the same as a < 3 or b < 3; min(a, b) > 3 as a > 3 and b > 3.
            either = {"min": ("<", "<="), "max": (">", ">=")}.get(node.func.id)
            names = [a for a in node.args if isinstance(a, ast.Name)] if either else []
            is_enough = is_enough and side in (either or ())
        if isinstance(value, int | float) and not isinstance(value, bool) and side in _NEGATED:
            found.extend(Limit(name.id, side, float(value), is_enough) for name in names)

    def walk(node: ast.expr, negated: bool, is_enough: bool) -> None:
        if isinstance(node, ast.BoolOp):
            # not (a and b) is (not a) or (not b).
            is_either = isinstance(node.op, ast.Or) != negated
            for value in node.values:
                walk(value, negated, is_enough and is_either)
        elif isinstance(node, ast.UnaryOp):
            walk(node.operand, negated != isinstance(node.op, ast.Not), is_enough)
        elif isinstance(node, ast.Compare):
            is_enough = is_enough and (negated or len(node.ops) == 1)
            operands = [node.left, *node.comparators]
            for left, kind, right in zip(operands, node.ops, operands[1:], strict=False):
                operator = _COMPARISONS[type(kind)]
                add(left, operator, constant_of(right), negated, is_enough)
                add(right, _MIRRORED.get(operator, ""), constant_of(left), negated, is_enough)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            side = {"top_fraction": ">=", "bottom_fraction": "<="}.get(node.func.id)
            if side and isinstance(node.args[0], ast.Name):
                fraction = constant_of(node.args[1])
                assert isinstance(fraction, int | float)
                figure = WholeFigure(node.func.id, node.args[0].id, float(fraction))
                add(node.args[0], side, figures.get(figure), negated, is_enough)

    walk(expression.tree, False, True)
    return found
