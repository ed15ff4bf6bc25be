"""Refusing wrong settings: the value, the limit and the remedy, in one sentence."""

import math
import re

from declip_shards import DeclipError

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REASON = re.compile(r"[a-z][a-z0-9_]*")


def require_between(
    setting: str,
    value: float | None,
    minimum: float,
    maximum: float = math.inf,
    *,
    remedy: str = "",
) -> None:
    """Refuse a number outside ``minimum..maximum`` (both allowed), or one that is not finite.

    ``None`` means that the setting is off and passes.

    Raises:
        DeclipError: names the setting, the value, the limit and what to do.
    """
    if value is None or (math.isfinite(value) and minimum <= value <= maximum):
        return
    limit = f"at least {minimum:g}" if math.isinf(maximum) else f"from {minimum:g} to {maximum:g}"
    raise DeclipError(f"{setting} is {value:g}; it must be {limit}. {remedy or 'Choose another.'}")


def require_folder_name(setting: str, value: str) -> None:
    """Refuse a name that could not be a single folder.

    Raises:
        DeclipError: ``value`` is empty, or has a slash or another unusual character.
    """
    if not _FOLDER_NAME.fullmatch(value):
        raise DeclipError(
            f"{setting} is {value!r}; it must be one folder name of letters, digits, dot, dash or "
            "underscore that starts with a letter or digit. Choose a name such as 'default'."
        )


def require_reason(value: str) -> None:
    """Refuse a drop reason that is no plain word: it becomes a column's value and a row of tables.

    Raises:
        DeclipError: ``value`` is empty or has another character.
    """
    if not _REASON.fullmatch(value):
        raise DeclipError(
            f"a rule's reason is {value!r}; it must be small letters, digits and underscores, and "
            "start with a letter, such as caption_too_short."
        )
