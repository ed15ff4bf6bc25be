"""Options of a recipe, made from the fields of its stages; a misspelt one is refused."""

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean
from pipelines.other_data import on_other_data, reads_other_data
from pipelines.pipeline import Pipeline

OWN_FLAGS = (
    "--out",
    "--only",
    "--from",
    "--until",
    "--runner",
    "--dry-run",
    "--num-samples",
    "--help",
)
"""Flags of the command itself, offered as well for a misspelt one."""
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One setting that the command line can change."""

    flag: str
    """``--filter.min-words``"""
    step: str
    field: str
    kind: Any
    """The field's annotation."""
    value: Any
    """What the recipe sets."""
    help: str
    """One line: meaning and unit."""


@functools.cache
def field_docs(kind: type) -> Mapping[str, str]:
    """Docstring literals under the fields of a dataclass and its bases: name -> first line."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for here, below in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(here, ast.AnnAssign)
                and isinstance(here.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                docs[here.target.id] = " ".join(below.value.value.split())
    return docs


def flag_of(step: str, field: str) -> str:
    """``--filter.min-words``"""
    return f"--{step}.{field}".replace("_", "-")


def options_of(pipeline: Pipeline) -> list[Option]:
    """Every setting of every step, save ``root``, which ``--out`` sets.

    A step that has another's settings has none of its own.
    """
    options = []
    for step in pipeline.steps:
        if step.settings_of:
            continue
        kind = type(step.stage)
        docs, hints = field_docs(kind), typing.get_type_hints(kind)
        for field in dataclasses.fields(step.stage):  # type: ignore[arg-type]
            if field.name == "root" or not field.init:
                continue
            options.append(
                Option(
                    flag=flag_of(step.name, field.name),
                    step=step.name,
                    field=field.name,
                    kind=hints[field.name],
                    value=getattr(step.stage, field.name),
                    help=docs.get(field.name, ""),
                )
            )
    return options


def kind_name(kind: Any) -> str:
    """How ``--help`` names a type."""
    if typing.get_origin(kind) is Literal:
        return "|".join(str(a) for a in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a,b,..."
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        inner = [a for a in typing.get_args(kind) if a is not type(None)]
        return f"{kind_name(inner[0])}|none"
    return str(getattr(kind, "__name__", kind))


def parse_value(text: str, kind: Any, flag: str) -> Any:
    """``text`` as the field's type.

    Raises:
        DeclipError: naming the flag, the value and what is allowed.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if text.lower() == "none":
            return None
        return parse_value(text, next(a for a in arguments if a is not type(None)), flag)
    if origin is Literal:
        for allowed in arguments:
            if str(allowed) == text:
                return allowed
        raise DeclipError(f"{flag} is {text!r}.{did_you_mean(text, [str(a) for a in arguments])}")
    if origin is tuple:
        if text.lower() == "none":
            return ()
        # Within quotes an empty piece is part of a rule such as matches(caption, ',,').
        has_quotes = "'" in text or '"' in text
        pieces = [piece for piece in text.split(",") if piece or has_quotes]
        return tuple(parse_value(piece, arguments[0], flag) for piece in pieces)
    if kind is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        raise DeclipError(f"{flag} is {text!r}; it may be true or false.")
    try:
        return kind(text)
    except ValueError:
        raise DeclipError(f"{flag} is {text!r}, which is not {_article(kind)}.") from None


def _article(kind: Any) -> str:
    return {int: "a whole number", float: "a number"}.get(kind, f"a {kind_name(kind)}")


def take_overrides(
    arguments: Sequence[str],
) -> tuple[list[tuple[str, str]], list[str]]:
    """Settings (``--stage.field VALUE``), wherever they stand, and the arguments that are left."""
    overrides: list[tuple[str, str]] = []
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name = argument.partition("=")[0]
        if not (name.startswith("--") and "." in name):
            others.append(argument)
            continue
        value = [] if "=" in argument else rest[:1]
        overrides += split_overrides([argument, *value])
        del rest[: len(value)]
    return overrides, others


def split_overrides(arguments: Iterable[str]) -> list[tuple[str, str]]:
    """``--a.b value`` and ``--a.b=value`` as pairs; anything else is refused."""
    pairs: list[tuple[str, str]] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise DeclipError(
                f"{argument!r} is not an option; settings look like --stage.field VALUE."
            )
        flag, equals, value = argument.partition("=")
        if not equals:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                if "." not in flag:
                    near = did_you_mean(flag, OWN_FLAGS).split(" Known:")[0]
                    raise DeclipError(
                        f"there is no option {flag}.{near} Settings look like --stage.field VALUE."
                    )
                raise DeclipError(f"{flag} needs a value: {flag} VALUE.")
            value = following
        pairs.append((flag, value))
    return pairs


def apply_overrides(
    pipeline: Pipeline, overrides: Sequence[tuple[str, str]], *, refuse_unread: bool = True
) -> Pipeline:
    """The pipeline with the named settings changed.

    Args:
        pipeline: a recipe's.
        overrides: pairs of a flag and its text.
        refuse_unread: whether a setting that would change nothing is a fault; not where the same
            overrides go to pipelines of several kinds.

    Raises:
        DeclipError: unknown flag (the nearest is offered), a value that a stage refuses, or a
            setting that nothing reads.
    """
    known = {option.flag: option for option in options_of(pipeline)}
    changes: dict[str, dict[str, Any]] = {}
    for flag, text in overrides:
        option = known.get(flag.replace("_", "-"))
        if option is None:
            _refuse_follower(pipeline, flag, known)
            near = did_you_mean(flag, [*known, *OWN_FLAGS]).split(" Known:")[0]
            raise DeclipError(
                f"recipe {pipeline.recipe!r} has no option {flag}.{near} "
                f"All of them: declip run {pipeline.recipe} --help."
            )
        changes.setdefault(option.step, {})[option.field] = parse_value(text, option.kind, flag)
    steps = [
        dataclasses.replace(step, stage=dataclasses.replace(step.stage, **changes[step.name]))  # type: ignore[type-var]
        if step.name in changes
        else step
        for step in pipeline.steps
    ]
    changed = dataclasses.replace(pipeline, steps=steps)
    if reads_other_data(changed):
        changed = on_other_data(changed, changes)
    changed = changed.derive(changed) if changed.derive else changed
    changed = changed.with_followers()
    if refuse_unread:
        _refuse_unread(changed, changes)
    return changed


def _refuse_follower(pipeline: Pipeline, flag: str, known: Mapping[str, Option]) -> None:
    """Say where the settings of a step are set that has another's."""
    name, _, field = flag.removeprefix("--").replace("_", "-").partition(".")
    for step in pipeline.steps:
        if step.settings_of and step.name.replace("_", "-") == name:
            owner = flag_of(step.settings_of, field)
            told = f"give {owner}" if owner in known else f"there is no {owner} either"
            raise DeclipError(
                f"stage {name!r} of recipe {pipeline.recipe!r} has the settings of stage "
                f"{step.settings_of!r}: {told} instead of {flag}. "
                f"All of them: declip run {pipeline.recipe} --help."
            )


def _refuse_unread(pipeline: Pipeline, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """A stage may tell which of its settings nothing reads, given the others: who asks for one of
    those should know. What a recipe sets is left alone."""
    for step in pipeline.steps:
        unread: Mapping[str, str] = getattr(step.stage, "unread", dict)()
        for field in changes.get(step.name, {}):
            if field in unread:
                raise DeclipError(
                    f"{flag_of(step.name, field)} would change nothing: it is read by "
                    f"{unread[field]} alone; leave it out, or choose that."
                )
