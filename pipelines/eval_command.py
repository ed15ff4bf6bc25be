"""``declip eval``: models on labeled sets, as CLIP_benchmark does it, and several ranks of it."""

import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from declip_eval.results import EvalResult, format_results_table
from declip_shards import DeclipError
from pipelines.eval_jobs import Job, plan_jobs
from pipelines.eval_options import EvalOptions, parse_options
from pipelines.eval_ranks import Ranks, local_ranks, ranks_of_launcher
from pipelines.stopping import stop_on_signals

if TYPE_CHECKING:
    from pipelines.eval_models import EvalModel
    from pipelines.eval_tasks import Report


def main(argv: Sequence[str]) -> int:
    """Entry point of ``declip eval``; returns the exit status.

    0: all that was asked for is there. 1: a dataset is missing or failed.

    Raises:
        DeclipError: a wrong option, a misspelt dataset, or no model.
    """
    options = parse_options(argv)
    shared = Path(options.feature_root)
    try:
        shared.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeclipError(
            f"--feature-root {options.feature_root!r} cannot be made a folder ({error}); name "
            "another one."
        ) from error
    _refuse_no_folder(options.output)
    jobs = plan_jobs(options)
    launched = ranks_of_launcher(os.environ, shared, asked=options.distributed)
    if launched.parent is not None:
        return _run(options, jobs, launched)
    with stop_on_signals():
        if launched.size > 1 and options.num_ranks > 1:
            raise DeclipError(
                f"--num-ranks is {options.num_ranks}, but a launcher has started {launched.size} "
                "processes (WORLD_SIZE); leave --num-ranks out."
            )
        if launched.size > 1 or options.num_ranks == 1:
            return _run(options, jobs, launched)
        with local_ranks(list(argv), options.num_ranks, shared) as ranks:
            return _run(options, jobs, ranks)


def _refuse_no_folder(output: str) -> None:
    """Refuse a place for results that cannot be made, before hours of work.

    Raises:
        DeclipError: a file stands where a folder must.
    """
    from pipelines.eval_summary import output_folder

    folder = output_folder(output).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written to" if there.is_dir() else "is no folder"
        raise DeclipError(f"--output {output!r}: {str(there)!r} {why}; name another one.")


def _run(options: EvalOptions, jobs: Sequence[Job], ranks: Ranks) -> int:
    from pipelines.eval_summary import exit_status
    from pipelines.eval_tasks import Evaluation, num_cores

    device = choose_device(options.device, ranks)
    num_threads = options.num_workers or num_cores(ranks)

    def load(spec: str) -> "EvalModel":
        from pipelines.eval_models import load_eval_model

        return load_eval_model(spec, device=device, num_threads=num_threads)

    evaluation = Evaluation(options, jobs, ranks, device, load)
    with ranks.beating():
        report = evaluation.run()
    if ranks.rank != 0:
        return 0  # A launcher ends all processes with the first that fails; rank 0 judges.
    if not options.quiet:
        print(closing_text(report))
    return exit_status(report.entries, allow_missing=options.allow_missing)


def choose_device(asked: str, ranks: Ranks) -> str:
    """``cpu``, or a GPU of this machine for each of its ranks."""
    if asked == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        if asked == "cuda":
            raise DeclipError("--device is cuda, but torch finds no GPU here; give cpu.")
        return "cpu"
    return f"cuda:{ranks.local_rank % torch.cuda.device_count()}"


def closing_text(report: "Report") -> str:
    """The table of results, and a line for each dataset without one."""
    parts = []
    by_model: dict[str, list[EvalResult]] = {}
    for result in report.results:
        by_model.setdefault(f"{result.model} {result.pretrained}", []).append(_shown(result))
    for name, results in by_model.items():
        title = f"{name}\n" if len(by_model) > 1 else ""
        parts.append(title + format_results_table(results))
    tasks: dict[tuple[str, ...], list[str]] = {}
    for entry in report.entries:
        if entry.note:
            what = (entry.status, entry.dataset, entry.model, entry.note)
            tasks.setdefault(what, []).append(entry.task)
    if tasks:
        parts.append(
            "\n".join(
                f"{status}: {dataset} ({', '.join(names)}; {model}): {note}"
                for (status, dataset, model, note), names in tasks.items()
            )
        )
    return "\n\n".join(parts) or "No results."


def _shown(result: EvalResult) -> EvalResult:
    """A result as the table has it: the number of shots belongs to the dataset's name."""
    shots = result.metrics.get("fewshot_k", -1)
    dataset = f"{result.dataset}, {int(shots)} a class" if shots > 0 else result.dataset
    metrics = {name: value for name, value in result.metrics.items() if name != "fewshot_k"}
    return dataclasses.replace(result, dataset=dataset, metrics=metrics)


def _main_of_rank() -> int:
    """A rank that this machine's rank 0 started, which tells, and which ends it."""
    logging.disable(logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return main(sys.argv[1:])
    except DeclipError:
        return 1


if __name__ == "__main__":
    sys.exit(_main_of_rank())
