"""The ``declip`` command."""

import argparse
import importlib
import io
import logging
import os
import select
import sys
import textwrap
from collections.abc import Sequence

from declip_filter.repack_state import is_repacked, is_unfinished
from declip_shards import DeclipError, Store
from declip_shards.errors import did_you_mean
from pipelines import __version__, recipes
from pipelines.options import (
    apply_overrides,
    kind_name,
    options_of,
    parse_value,
    split_overrides,
    take_overrides,
)
from pipelines.pipeline import Pipeline
from pipelines.repack_recipe import on_repacked
from pipelines.runner import RUNNERS, check_location, read_run_record, run_pipeline
from pipelines.states import pipeline_states
from pipelines.wiring import allow_missing_table

EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PIPE = 1, 130, 141
OTHER_COMMANDS = {
    "sources": "look at lists of URLs, and at how two of them overlap",
    "refetch": "fetch rows that failed again, by reason, into the same dataset",
    "doctor": "say why so many rows failed, or what holds a training back, and what to do",
    "optout": "remove samples from a dataset and all that was made of it, and prove it",
    "look": "draw pages: what a filter drops, duplicates, neighbors",
    "search": "search an index for a text or a picture",
    "index": "look at an index, append new shards to it, remove samples",
    "refresh": "make a neighbor table anew with another encoder, also during training",
    "train": "train on any shards, with open_clip's flags or ours",
    "eval": "zero-shot, probes and retrieval of a model on labelled sets, as CLIP_benchmark",
    "compare": "say which of two models is better, dataset by dataset, with a paired test",
    "table": "results as a table: Markdown, CSV, or a page with pictures",
    "card": "write a model card from a run and its results",
    "export": "write a trained model, or a checkpoint of one, in another form",
    "replay": "compute a batch again whose loss was not finite, and say what broke first",
    "convert": "write a dataset in another form: files, parquet, energon",
}
"""Commands with a module of their own, ``pipelines.NAME_command``, and what they are for."""
COMMANDS = ("run", "status")
"""Commands of a recipe."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="declip",
        description="From image URLs and captions to a CLIP-style model and an honest table.",
        epilog="Recipes:\n" + recipes.listing() + "\n\nTry: declip run demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"opendeclip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run a recipe's stages; what is done and unchanged is skipped",
        add_help=False,
        allow_abbrev=False,
    )
    status = commands.add_parser(
        "status",
        help="each stage's state, counts, and why it would rerun",
        add_help=False,
        allow_abbrev=False,
    )
    for name, purpose in OTHER_COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)  # see main: it reads the rest
    for command in (run, status):
        command.add_argument("recipe", nargs="?", metavar="RECIPE", help="name of a recipe")
        command.add_argument(
            "-h", "--help", action="store_true", help="this text and every setting"
        )
        command.add_argument(
            "--out", metavar="FOLDER", help="folder or fsspec URL of the dataset (runs/RECIPE)"
        )
    run.add_argument("--only", metavar="STAGE", help="run this stage alone")
    run.add_argument("--from", metavar="STAGE", dest="first", help="start at this stage")
    run.add_argument("--until", metavar="STAGE", help="stop after this stage")
    run.add_argument(
        "--runner",
        metavar="|".join(RUNNERS),
        default="ray",
        help="where tasks run: ray (a cluster, or this machine's cores), or local, in this process",
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="show settings, sizes, FLOPs, memory and schedule; start and write nothing",
    )
    run.add_argument(
        "--num-samples",
        metavar="N",
        help="samples to plan the schedule for, with --dry-run (else: the selection's, if there)",
    )
    return parser


def _options_text(pipeline: Pipeline) -> str:
    """Every setting of a recipe with its help line and value."""
    lines = ["", f"settings of {pipeline.recipe} (--stage.field VALUE):"]
    for option in options_of(pipeline):
        value = option.value
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        lines.append(f"  {option.flag} {kind_name(option.kind)}")
        text = f"{option.help} (default: {value if value != '' else 'empty'})"
        lines += textwrap.wrap(text, 92, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _print_help(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    choices = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    print(choices[arguments.command].format_help().rstrip())
    if arguments.recipe:
        print("\n" + recipes.describe(arguments.recipe))
        print(_options_text(recipes.build(arguments.recipe, f"runs/{arguments.recipe}")))
    else:
        print("\nrecipes:\n" + recipes.listing())


def _check_command(arguments: Sequence[str]) -> None:
    """Offer the nearest name for a misspelt command, as for recipes, stages and settings."""
    known = (*COMMANDS, *OTHER_COMMANDS)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        raise DeclipError(
            f"there is no command {arguments[0]!r}.{did_you_mean(arguments[0], known)}"
        )


def _print_status(pipeline: Pipeline) -> None:
    store = Store(pipeline.root)
    print(f"{pipeline.recipe} in {pipeline.root}\n")
    print(f"{'stage':<13}{'state':<9}{'in':>9}{'out':>9}{'seconds':>9}  why it would rerun")
    for state in pipeline_states(pipeline):
        counts = (f"{state.last.num_in:,}", f"{state.last.num_out:,}") if state.last else ("-", "-")
        seconds = read_run_record(store, state.step).get("seconds", "-") if state.last else "-"
        row = f"{state.step:<13}{state.state:<9}{counts[0]:>9}{counts[1]:>9}{seconds!s:>9}"
        print(f"{row}  {state.why}".rstrip())


def _show_log_lines() -> None:
    """Let the stages' own progress lines reach the terminal; other libraries stay silent."""
    logger = logging.getLogger("pipelines")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("  %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _num_samples(arguments: argparse.Namespace) -> int | None:
    """What --num-samples says, which means something for --dry-run alone."""
    if arguments.num_samples is None:
        return None
    if not arguments.dry_run:
        raise DeclipError(
            f"--num-samples {arguments.num_samples} plans a run that --dry-run shows; add that, or "
            "leave it out: a run counts its samples itself."
        )
    number: int = parse_value(arguments.num_samples, int, "--num-samples")
    if number < 1:
        raise DeclipError(f"--num-samples is {number}; it must be at least 1.")
    return number


def _execute(arguments: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> None:
    root = os.path.join("runs", arguments.recipe) if arguments.out is None else arguments.out
    check_location(root)
    pipeline = recipes.build(arguments.recipe, root)
    if is_repacked(Store(root)) or is_unfinished(Store(root)):
        pipeline = on_repacked(pipeline)
    is_dry = arguments.command == "run" and arguments.dry_run
    if is_dry:
        pipeline = allow_missing_table(pipeline)
    pipeline = apply_overrides(pipeline, overrides)
    if arguments.command == "status":
        _print_status(pipeline)
        return
    num_samples = _num_samples(arguments)
    steps = pipeline.choose(only=arguments.only, first=arguments.first, until=arguments.until)
    if is_dry:
        if arguments.runner not in RUNNERS:
            raise DeclipError(
                f"--runner is {arguments.runner!r}.{did_you_mean(arguments.runner, RUNNERS)}"
            )
        # Nobody else needs it.
        from pipelines.dry_run import dry_run_text

        print(dry_run_text(pipeline, steps, num_samples=num_samples))
        return
    reports = run_pipeline(pipeline, steps, runner=arguments.runner)
    if all(report.skipped for report in reports):
        print("Nothing has changed: nothing was run.")
    if {"eval", "report"} & {step.name for step in steps}:
        recipes.finish(pipeline)


def _print_what_the_terminal_cannot() -> None:
    """Let a caption that a terminal of another encoding cannot show come out escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _reader_is_gone() -> bool:
    """Whether whoever read our output has gone (``| head -1``); then the rest goes nowhere."""
    stdout = sys.stdout.fileno()
    poll = select.poll()
    poll.register(stdout, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False  # another pipe broke
    # Else the interpreter tries again at its end, and complains.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def _dispatch(arguments: Sequence[str]) -> int:
    """Do what the command line says; returns the exit status."""
    _check_command(arguments)
    if arguments and arguments[0] in OTHER_COMMANDS:
        module = importlib.import_module(f"pipelines.{arguments[0]}_command")
        status: int = module.main(arguments[1:])
        return status
    parser = build_parser()
    overrides, others = take_overrides(arguments)
    known, rest = parser.parse_known_args(others)
    if known.help or not known.recipe:
        _print_help(parser, known)
        return 0 if known.help else 2
    _execute(known, [*overrides, *split_overrides(rest)])
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 failed, 2 wrong usage.

    130 after Ctrl-C, 143 and 129 after SIGTERM and SIGHUP (pipelines.stopping), 141 where the
    reader of our output has gone.
    """
    _show_log_lines()
    _print_what_the_terminal_cannot()
    try:
        try:
            status = _dispatch(sys.argv[1:] if argv is None else list(argv))
        except SystemExit as stop:  # of --help and --version
            if not stop.code:
                sys.stdout.flush()
            raise
        sys.stdout.flush()
    except DeclipError as error:
        print(f"declip: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return EXIT_PIPE
        where = f": {error.filename!r}" if error.strerror and error.filename else ""
        print(
            f"declip: {error.strerror or error}{where}; what is done is kept, run the same command "
            "again after mending it.",
            file=sys.stderr,
        )
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(
            "\ndeclip: interrupted; what is done is kept, run the same command again.",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    return status
