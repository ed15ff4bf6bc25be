"""Compute an expression over a table of signals, column by column."""

import ast
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from declip_filter.expressions import Expression, WholeFigure, constant_of
from declip_shards.errors import did_you_mean

Column: TypeAlias = pa.Array
"""One value a sample, not chunked; float columns without NaN."""
Columns: TypeAlias = Mapping[str, Column]
Figures: TypeAlias = Mapping[WholeFigure, Any]
"""What is known of the whole dataset: the limit of a fraction (a float, or None where no sample has
a value), and for counts and balancing a function from the column to one value a sample."""

NOTHING = "nothing"
"""Kind of a column of a table in which no sample has a value: it has no type."""
USABLE = ("number", "text", "boolean")
"""Kinds of columns that can be compared and counted; of others ``missing()`` can be asked."""
_INT64 = range(-(2**63), 2**63)
_COMPARE: dict[type[ast.cmpop], Callable[..., Any]] = {
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
}
_COMPUTE: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: pc.divide,
}


def as_column(values: Any) -> Column:
    """A column as expressions want it: in one piece, plain, null where it was NaN."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    elif not isinstance(values, pa.Array):
        values = pa.array(values)
    if isinstance(values, pa.ChunkedArray):  # combine_chunks of an empty one
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_float16(values.type):
        values = values.cast(pa.float32())  # half precision lacks most operations
    if pa.types.is_floating(values.type):
        is_nan = pc.is_nan(values)
        if pc.any(is_nan).as_py():
            values = pc.if_else(is_nan, pa.scalar(None, values.type), values)
    return values


def kind_of(kind: pa.DataType) -> str:
    """``number``, ``text``, ``boolean``, :data:`NOTHING`, or a type that expressions cannot use."""
    if pa.types.is_null(kind):
        return NOTHING
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    return str(kind)


def evaluate(expression: Expression, columns: Columns, figures: Figures) -> pa.BooleanArray:
    """Where a condition holds.

    Args:
        columns: what the expression reads, by name, all of one length.
        figures: of the whole dataset, for all of the expression's ``figures``.

    Returns:
        One boolean a sample, null where it is neither true nor false.

    Raises:
        DeclipError: a column is not there (the nearest name is told), values of different kinds
            are compared, or a column's are of a kind that nothing can be done with.
    """
    try:
        return _Evaluation(expression, columns, figures).condition(expression.tree)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        kinds = ", ".join(f"{name} is {columns[name].type}" for name in expression.columns)
        told = str(error).splitlines()[0]
        raise expression.fault(
            expression.tree, f"this cannot be computed of these columns ({kinds}): {told}."
        ) from error


class _Evaluation:
    def __init__(self, expression: Expression, columns: Columns, figures: Figures) -> None:
        self.expression = expression
        self.columns = columns
        self.figures = figures
        self.fail = expression.fault

    def condition(self, node: ast.expr) -> Any:
        if isinstance(node, ast.BoolOp):
            kernel = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
            return functools.reduce(kernel, [self.condition(value) for value in node.values])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return pc.invert(self.condition(node.operand))
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            parts = [
                self.comparison(left, operator, right)
                for left, operator, right in zip(operands, node.ops, operands[1:], strict=False)
            ]
            return functools.reduce(pc.and_kleene, parts)
        found = self.value(node)
        if self._kind(found) == NOTHING:
            return self._unknown()
        if not isinstance(found, pa.Array) or not pa.types.is_boolean(found.type):
            raise self.fail(node, f"this is a {self._kind(found)}; compare it with something.")
        return found

    def comparison(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(operator, ast.In | ast.NotIn):
            return self._membership(left, right, negated=isinstance(operator, ast.NotIn))
        a, b = self.value(left), self.value(right)
        kinds = self._kind(a), self._kind(b)
        if NOTHING in kinds:
            return self._unknown()
        for node, kind in zip((left, right), kinds, strict=True):
            self._require_usable(node, kind)
        if kinds[0] != kinds[1]:
            raise self.fail(left, f"a {kinds[0]} cannot be compared with a {kinds[1]}.")
        if kinds[0] == "boolean" and not isinstance(operator, ast.Eq | ast.NotEq):
            raise self.fail(left, "booleans can only be compared by == and !=.")
        if kinds[0] == "number":
            a, b = _aligned(a, b)
        found = _COMPARE[type(operator)](a, b)
        if isinstance(found, pa.Scalar):  # both sides are constants
            return pa.repeat(found, self._length())
        return found

    def _membership(self, node: ast.expr, listed: ast.expr, *, negated: bool) -> Any:
        assert isinstance(listed, ast.List | ast.Tuple | ast.Set)
        values = self.value(node)
        if not isinstance(values, pa.Array):
            raise self.fail(node, "before 'in' comes a signal.")
        if self._kind(values) == NOTHING:
            return self._unknown()
        wanted = [constant_of(element) for element in listed.elts]
        kind = self._kind(values)
        self._require_usable(node, kind)
        if kind != self._kind(wanted[0]):
            raise self.fail(listed, f"a list of {self._kind(wanted[0])}s has no {kind} in it.")
        if kind == "number":
            # Rounded as the column is, so that a value equal to a constant is found.
            is_single = pa.types.is_float32(values.type)
            values = values if is_single else _double(values)
            numbers = np.asarray(wanted, dtype=np.float32 if is_single else np.float64)
            value_set = pa.array(numbers)
        else:
            value_set = pa.array(wanted, type=values.type)
        found = pc.is_in(values, value_set=value_set)
        if values.null_count:
            found = pc.if_else(pc.is_valid(values), found, pa.scalar(None, pa.bool_()))
        return pc.invert(found) if negated else found

    def value(self, node: ast.expr) -> Any:
        """An array, or a Python constant."""
        constant = constant_of(node)
        if constant is not None:
            return constant
        if isinstance(node, ast.Name):
            return self.column(node)
        if isinstance(node, ast.BinOp):
            return self._arithmetic(node)
        if isinstance(node, ast.UnaryOp):
            inner = self._number(node.operand)
            if isinstance(node.op, ast.UAdd):
                return inner
            is_signed = not pa.types.is_unsigned_integer(inner.type)
            return pc.negate(inner if is_signed else _double(inner))
        assert isinstance(node, ast.Call)
        assert isinstance(node.func, ast.Name)
        return self.call(node.func.id, node)

    def column(self, node: ast.expr) -> Column:
        assert isinstance(node, ast.Name)
        if node.id not in self.columns:
            raise self.fail(node, f"no signal {node.id!r}.{did_you_mean(node.id, self.columns)}")
        return self.columns[node.id]

    def call(self, name: str, node: ast.Call) -> Any:
        if name == "missing":
            return pc.is_null(self.column(node.args[0]))
        if name == "matches":
            column = self.column(node.args[0])
            if self._kind(column) == NOTHING:
                return self._unknown()
            if kind_of(column.type) != "text":
                raise self.fail(node.args[0], f"matches() wants text, not a {self._kind(column)}.")
            return pc.match_substring_regex(column, constant_of(node.args[1]))
        if name in ("min", "max"):
            return self._extreme(name, node.args)
        if name == "abs":
            return pc.abs(self._number(node.args[0]))
        return self._whole(name, node)

    def _whole(self, name: str, node: ast.Call) -> Any:
        """Functions that need to know the dataset; the plan has found that out before."""
        if name == "balanced_out":
            cap = constant_of(node.args[0])
            assert isinstance(cap, int)
            return self.figures[WholeFigure(name, "", cap)](self.columns)
        column = self.column(node.args[0])
        assert isinstance(node.args[0], ast.Name)
        if name == "count":
            if self._kind(column) != NOTHING:
                self._require_usable(node.args[0], self._kind(column))
            return self.figures[WholeFigure(name, node.args[0].id)](column)
        if self._kind(column) not in ("number", NOTHING):
            raise self.fail(node.args[0], f"{name}() wants a number, not a {self._kind(column)}.")
        fraction = constant_of(node.args[1])
        assert isinstance(fraction, int | float)
        limit = self.figures[WholeFigure(name, node.args[0].id, float(fraction))]
        if limit is None or self._kind(column) == NOTHING:
            return self._unknown()
        kernel = pc.greater_equal if name == "top_fraction" else pc.less_equal
        return kernel(*_aligned(column, limit))

    def _extreme(self, name: str, nodes: Sequence[ast.expr]) -> Any:
        found = [self._number(node) for node in nodes]
        kernel = pc.min_element_wise if name == "min" else pc.max_element_wise
        if len({value.type for value in found}) > 1:
            found = [_double(value) for value in found]
        return kernel(*found, skip_nulls=False)

    def _arithmetic(self, node: ast.BinOp) -> Any:
        """In double precision; a result that is not finite (a division by zero) is missing."""
        left, right = self._number(node.left), self._number(node.right)
        found = _COMPUTE[type(node.op)](_double(left), _double(right))
        is_finite = pc.is_finite(found)
        if pc.all(is_finite).as_py() is False:
            found = pc.if_else(is_finite, found, pa.scalar(None, pa.float64()))
        return found

    def _number(self, node: ast.expr) -> Column:
        found = self.value(node)
        if self._kind(found) == NOTHING:
            return pa.nulls(self._length(), pa.float64())
        if self._kind(found) != "number":
            raise self.fail(node, f"a number is due here, not a {self._kind(found)}.")
        if isinstance(found, pa.Array):
            return found
        return pa.repeat(_scalar(found), self._length())

    def _require_usable(self, node: ast.expr, kind: str) -> None:
        if kind not in USABLE:
            raise self.fail(
                node,
                f"this is {kind}; only numbers, texts and booleans can be compared and counted: "
                "name a column of those, or ask for missing() of it.",
            )

    def _unknown(self) -> pa.BooleanArray:
        """Missing for every sample."""
        return pa.nulls(self._length(), pa.bool_())

    def _length(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def _kind(self, value: Any) -> str:
        if isinstance(value, pa.Array):
            return kind_of(value.type)
        if isinstance(value, bool):
            return "boolean"
        return "text" if isinstance(value, str) else "number"


def _double(column: Column) -> Column:
    """In double precision; whole numbers beyond 2**53 are rounded to it."""
    return column.cast(pa.float64(), safe=False)


def _scalar(value: float) -> pa.Scalar:
    """A constant: whole where it fits into 64 bits."""
    if isinstance(value, int) and value in _INT64:
        return pa.scalar(value, pa.int64())
    return pa.scalar(float(value), pa.float64())


def _aligned(left: Any, right: Any) -> tuple[Any, Any]:
    """Two numbers of which one at least is a column, in a type that both have.

    A constant is rounded as the single-precision column is that it stands against, so that a
    value equal to the limit is equal to it: 3.1 is not 3.1 in single and in double precision.
    """
    if not isinstance(left, pa.Array):
        if not isinstance(right, pa.Array):
            return _scalar(left), _scalar(right)
        right, left = _aligned(right, left)
        return left, right
    if isinstance(right, pa.Array):
        if left.type != right.type:
            return _double(left), _double(right)
        return left, right
    if pa.types.is_float32(left.type):
        with np.errstate(over="ignore"):
            return left, pa.scalar(np.float32(right), pa.float32())
    if pa.types.is_integer(left.type) and isinstance(right, int) and right in _INT64:
        if pa.types.is_uint64(left.type):
            return _double(left), pa.scalar(float(right))
        return left, pa.scalar(right, pa.int64())
    try:
        number = float(right)
    except OverflowError:
        number = math.copysign(math.inf, right)
    return _double(left), pa.scalar(number, pa.float64())
