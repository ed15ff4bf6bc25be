"""Text from outside, made safe to stand in Markdown: it is shown as it is and marks nothing up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Control characters, and those that turn the direction of the text around them.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]+"
)
_MARKS = re.compile(r"[\\`*_{}\[\]<>|#~!$]")
_LINE_START = re.compile(r"^(\s*)([-+=:]|\d+(?=[.)](\s|$)))")
_LINK = re.compile(r"(?i)\b(https?|ftp|mailto|www)(:|\.)")


def plain(text: object, most: int = 300) -> str:
    """Show text word for word: on one line, without markup, HTML or links, at most so long.

    Args:
        text: from data, file names or other people.
        most: characters kept; a longer text ends in an ellipsis.
    """
    line = " ".join(_UNPRINTABLE.sub(" ", str(text)).split())
    if len(line) > most:
        line = line[: most - 1] + "…"
    line = _MARKS.sub(_escaped, line.replace("&", "&amp;"))
    line = _LINE_START.sub(
        lambda found: (
            f"{found[1]}\\{found[2]}" if not found[2].isdigit() else f"{found[1]}{found[2]}\\"
        ),
        line,
    )
    # GitHub makes links of bare addresses, which nobody vouches for.
    return _LINK.sub(lambda found: f"{found[1]}{'&#58;' if found[2] == ':' else '&#46;'}", line)


def _escaped(found: re.Match[str]) -> str:
    """A mark as HTML's entity or behind a backslash; an underscore inside a word stays."""
    mark, text = found[0], found.string
    if mark == "<":
        return "&lt;"
    if mark == ">":
        return "&gt;"
    if mark == "_":
        before, after = text[: found.start()][-1:], text[found.end() :][:1]
        if before.isalnum() and after.isalnum():
            return mark
    return f"\\{mark}"


def markdown_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, num_text_columns: int = 1
) -> str:
    """A table of cells that are Markdown already (see `plain`), the others aligned to the right.

    Raises:
        ValueError: a row whose number of cells is not the number of columns.
    """
    lines = [list(columns), *([*row] for row in rows)]
    for number, line in enumerate(lines):
        if len(line) != len(columns):
            raise ValueError(
                f"Row {number} has {len(line)} cells, but the table has {len(columns)} columns."
            )
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    rule = [
        "-" * width if i < num_text_columns else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i < num_text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in [lines[0], rule, *lines[1:]]
    )
