"""``declip refresh``: a neighbor table by a newer encoder, taken by a training run that goes on."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from declip_filter.table_versions import finished_versions, table_figures
from declip_shards import DeclipError, Store, neighbor_tables
from declip_shards.errors import did_you_mean
from pipelines.arguments import ArgumentParser
from pipelines.options import take_overrides
from pipelines.refresh import Outcome, refresh, refresh_hold
from pipelines.runner import RUNNERS, check_location


def build_parser() -> ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="declip refresh",
        description="Embed the selected pairs by a newer encoder, make a neighbor table from that, "
        "and put it into use by one rename. A training run in the same folder may go on: when its "
        "next epoch begins it takes the table, and logs its ID, its age and what has changed.",
        epilog="Settings of the steps follow as --embed.FIELD VALUE and --neighbors.FIELD VALUE; "
        "where none is given they are those of the table. Killed and run again, it goes on.",
    )
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder of the dataset")
    parser.add_argument(
        "--encoder",
        metavar="KIND:MODEL",
        help="checkpoint:FOLDER (an export, a checkpoint, or train/checkpoints for the newest one; "
        "relative to the dataset), sentence:MODEL or open_clip:MODEL/PRETRAINED",
    )
    parser.add_argument("--table", metavar="NAME", default="captions", help="name of the table")
    parser.add_argument(
        "--keep", metavar="N", type=int, help="remove older refreshed tables; unset: keep all"
    )
    parser.add_argument(
        "--runner", metavar="|".join(RUNNERS), default="ray", help="where tasks run (ray)"
    )
    parser.add_argument(
        "--use", metavar="VERSION", help="make nothing; put this table into use (see --list)"
    )
    parser.add_argument("--list", action="store_true", help="make nothing; list the tables")
    return parser


def main(argv: Sequence[str]) -> int:
    """Entry point of ``declip refresh``; returns the exit status.

    Raises:
        DeclipError: a wrong option, or what :func:`pipelines.refresh.refresh` refuses.
    """
    overrides, others = take_overrides(argv)
    arguments = build_parser().parse_args(others)
    check_location(arguments.out)
    store = Store(arguments.out)
    ways = [arguments.encoder is not None, arguments.use is not None, arguments.list]
    if sum(ways) != 1:
        raise DeclipError("give one of --encoder, --use and --list: what to do with the table.")
    if arguments.runner not in RUNNERS:
        raise DeclipError(
            f"--runner is {arguments.runner!r}.{did_you_mean(arguments.runner, RUNNERS)}"
        )
    if arguments.list:
        print(listing(store, arguments.table))
    elif arguments.use is not None:
        put_into_use(store, arguments.table, arguments.use)
        print(f"table {arguments.table} in use: {arguments.use}")
    else:
        outcome = refresh(
            arguments.out,
            arguments.encoder,
            table=arguments.table,
            keep=arguments.keep,
            runner=arguments.runner,
            overrides=overrides,
        )
        print(summary(outcome))
    return 0


def put_into_use(store: Store, table: str, folder: str) -> None:
    """Point to a table that stands: a refreshed one, or the pipeline's own (its name).

    Raises:
        DeclipError: there is no such table; the nearest is offered.
    """
    known = [table, *(name for _, name in finished_versions(store, table))]
    if folder not in known:
        raise DeclipError(f"--use is {folder!r}.{did_you_mean(folder, known)}")
    with refresh_hold(store):
        neighbor_tables.point_to(store, table, folder)


def listing(store: Store, table: str) -> str:
    """A line a table: its folder, its encoder, the step of its checkpoint, its figures."""
    current = neighbor_tables.resolve_table(store, table).folder
    folders = [table, *(folder for _, folder in finished_versions(store, table))]
    rows = [("", "table", "encoder", "step", "with a neighbor", "useful")]
    for folder in folders:
        version = neighbor_tables.read_version(store, folder)
        record = neighbor_tables.read_version_record(store, folder) or {}
        figures = record.get("figures") or _figures(store, folder)
        shares = (figures.get(f"fraction_{name}") for name in ("with_neighbor", "useful"))
        with_neighbor, useful = ("-" if share is None else f"{share:.1%}" for share in shares)
        step = "-" if version.step is None else str(version.step)
        mark = "*" if folder == current else ""
        rows.append((mark, folder, version.encoder or "-", step, with_neighbor, useful))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _figures(store: Store, folder: str) -> dict[str, Any]:
    """Figures of a table that no refresh has summed up; none of one that is not there whole."""
    try:
        figures = table_figures(store, folder)
    except DeclipError:
        return {}
    return asdict(figures) if figures.num_rows else {}


def summary(outcome: Outcome) -> str:
    """What a refresh came to, in a few lines."""
    figures, change = outcome.record["figures"], outcome.record["change"]
    what = "in use now" if outcome.is_new else "in use already: nothing has changed"
    lines = [
        f"{outcome.folder}: {what}, by {outcome.record['encoder']}",
        f"  {figures['num_rows']:,} samples, {figures['fraction_with_neighbor']:.1%} with a "
        f"neighbor, {figures['fraction_useful']:.1%} with one of cosine "
        f"{figures['useful_score']:g} or more",
        f"  {change['num_changed']:,} lists are other ones than in {outcome.record['before']}, "
        f"with {change['num_new_neighbors']:,} new neighbors",
    ]
    if outcome.removed:
        lines.append(f"  removed: {', '.join(outcome.removed)}")
    return "\n".join(lines)
