"""A location becomes the reader of its kind."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from declip_ingest.list_columns import ColumnNames
from declip_ingest.list_files import ListFile, find_files
from declip_ingest.list_kinds import EXPLAINED, Found, agree, recognize
from declip_ingest.list_lines import PairLines
from declip_ingest.list_rows import ListReader
from declip_ingest.list_tables import TableList
from declip_ingest.yfcc import YfccMetadata, YfccSubset
from declip_shards import DeclipError


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """How lists are read."""

    kind: str = "auto"
    metadata: tuple[str, ...] = ()
    """YFCC100M's metadata files, for YFCC15M V1."""
    caption_rule: str = "title_description"
    columns: ColumnNames = field(default_factory=ColumnNames)
    needs_pairs: bool = True
    """Whether YFCC15M V1 without its metadata is refused; else it has photo ids alone."""


def open_list(location: str, options: ListOptions) -> ListReader:
    """Find a list's files, tell what they are, and make their reader.

    Raises:
        DeclipError: nothing there, no known kind, or another than the user says.
    """
    files = find_files(location)
    founds = recognize_all(files)
    found = agree(location, options.kind, founds[0])
    if found.kind in ("cc3m", "cc12m"):
        agreed = [agree(file.location, options.kind, f) for file, f in zip(files, founds)]
        _refuse_columns(location, found, options.columns)
        return PairLines(files, agreed)
    if found.kind == "yfcc100m":
        return _metadata(files, founds, options)
    if found.kind == "yfcc15m_v1":
        metadata = None
        if options.metadata:
            named = [file for name in options.metadata for file in find_files(name)]
            metadata = _metadata(named, recognize_all(named), options)
        elif options.needs_pairs:
            raise DeclipError(
                f"list {location!r} is YFCC15M V1's subset, which holds photo ids but no URLs or "
                "captions; name YFCC100M's metadata files with metadata."
            )
        return YfccSubset(location, files, metadata)
    return TableList(location, files, found, options.columns)


def _metadata(
    files: Sequence[ListFile], founds: Sequence[Found], options: ListOptions
) -> YfccMetadata:
    extra = options.columns.extra
    return YfccMetadata(files, founds, caption_rule=options.caption_rule, extra=extra)


def recognize_all(files: Sequence[ListFile]) -> list[Found]:
    """What each file is; they must be of one kind and form.

    Of many parquet files the first is looked at: the reader checks the columns of all.

    Raises:
        DeclipError: two kinds in one location.
    """
    first = recognize(files[0])
    if first.form == "parquet":
        return [first] * len(files)
    founds = [first, *(recognize(file) for file in files[1:])]
    for file, found in zip(files, founds, strict=True):
        if (found.kind, found.form) != (first.kind, first.form):
            raise DeclipError(
                f"{file.location!r} looks like {found.kind} ({found.form}), but "
                f"{files[0].location!r} like {first.kind} ({first.form}); name lists of two kinds "
                "one by one."
            )
    return founds


def _refuse_columns(location: str, found: Found, columns: ColumnNames) -> None:
    """A setting that names a column of a list without names would be ignored."""
    if replace(columns, extra=ColumnNames.extra) != ColumnNames():
        raise DeclipError(
            f"list {location!r} is {found.kind} ({EXPLAINED[found.kind]}), whose columns have no "
            "names; leave the settings of column names out."
        )
