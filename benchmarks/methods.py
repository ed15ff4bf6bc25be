"""The five methods on the demo's data, each with several seeds: a table, its figures, a chart.

    python benchmarks/methods.py --out FOLDER [--methods clip slip] [--seeds 0 1 2] [--epochs 3]
        [--json FILE] [--html FILE] [--runner ray|local] [--STAGE.FIELD VALUE ...]

FOLDER/data is made once, by the demo's recipe up to its neighbor table. FOLDER/METHOD-SEED is a
dataset of its own that shares those files as hard links and holds its own training and evaluation,
by the same recipe. What is finished is kept: the same command again goes on, and a run whose
settings, data or code changed is done again.

All methods get the demo's training (recipes.DEMO_TRAINING), so they differ in their loss terms and
views and in nothing else: the demo's augmentation in place of each method's published one (SLIP's
self-supervised views too), one optimizer, one number of epochs. Heads that the demo does not size
are a quarter of their published size, as its SimSiam projector is. Other settings of the recipe may
be given as to ``declip run demo``. The default length is chosen for about 40 minutes of two idle
cores for all fifteen runs.

A table on 8,000 pictures and a small ViT shows that every method learns, and what it costs here. It
does not rank the methods: published differences come from 15 million pairs and batches of 4,096.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from declip_eval.charts import bar_chart
from declip_eval.html import page, section
from declip_eval.html import table as html_table
from declip_eval.results import EvalResult, read_result
from declip_shards import DeclipError
from declip_shards.store import atomic_write
from declip_train.methods import METHODS, TERMS
from declip_train.monitor import read_log
from pipelines import recipes
from pipelines.options import apply_overrides, take_overrides
from pipelines.pipeline import Pipeline
from pipelines.runner import run_pipeline

DATA_UNTIL = "neighbors"
"""Last step that all runs share."""
SIZED_LIKE_THE_DEMO = {"simclr_hidden_dim": 1024, "simclr_dim": 64, "token_dim": 64}
"""A quarter of what the papers have, as DEMO_TRAINING's projector_dim is."""
OURS = ("--train.method", "--train.seed", "--train.epochs")
"""Settings that the options of this command set."""
TAIL = 0.1
"""Share of the log, at its end, that a loss term is averaged over."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of the table."""

    label: str
    """With its unit."""
    split: str
    task: str
    metric: str

    def of(
        self, results: Mapping[tuple[str, str], EvalResult]
    ) -> tuple[float, float, tuple[float, float]]:
        """Value, chance and 95% interval, fractions of 1."""
        result = results[self.split, self.task]
        about = result.provenance
        assert about is not None
        low, high = about.intervals[self.metric]
        return result.metrics[self.metric], about.chance[self.metric], (low, high)


def _of_split(split: str) -> list[Figure]:
    retrieval = [
        Figure(
            label=f"{kind} retrieval R@5, {split}, %",
            split=split,
            task="zeroshot_retrieval",
            metric=f"{kind}_retrieval_recall@5",
        )
        for kind in ("image", "text")
    ]
    label, task = f"zero-shot top-1, {split}, %", "zeroshot_classification"
    return [Figure(label=label, split=split, task=task, metric="acc1"), *retrieval]


FIGURES = (
    *_of_split("test_vendor"),
    *_of_split("test_concept"),
    Figure(
        label="linear probe top-1, %", split="test_vendor", task="linear_probe", metric="lp_acc1"
    ),
)
"""The table's rows with a chance level."""


def make_pipeline(
    folder: Path, overrides: Sequence[tuple[str, str]], method: str = "", seed: int = 0
) -> Pipeline:
    """The demo's pipeline in ``folder``; with a method, its training and evaluation set to it."""
    pairs = [(f"--train.{n.replace('_', '-')}", str(v)) for n, v in SIZED_LIKE_THE_DEMO.items()]
    demo = recipes.DEMO_TRAINING["augmentation"]
    pairs += [("--train.ssl-augmentation", str(demo)), *overrides]
    if method:
        pairs += [
            ("--train.method", method),
            ("--train.seed", str(seed)),
            ("--eval.pretrained", f"{method}_seed_{seed}"),
        ]
    # One method's settings are another's leftovers.
    pipeline = apply_overrides(recipes.build("demo", str(folder)), pairs, refuse_unread=False)
    steps = [
        replace(step, summary=f"train {method}, seed {seed}") if step.name == "train" else step
        for step in pipeline.steps
    ]
    return replace(pipeline, steps=steps)


def length_of_training(epochs: float) -> list[tuple[str, str]]:
    """Epochs, and the demo's warm-up as the same share of them."""
    demo = recipes.DEMO_TRAINING
    warmup = max(1, round(demo["warmup_steps"] * epochs / demo["epochs"]))
    return [("--train.epochs", str(epochs)), ("--train.warmup-steps", str(warmup))]


def share_data(data: Path, folder: Path, steps: Iterable[str]) -> None:
    """Give ``folder`` the files that ``steps`` left in ``data``, as hard links.

    Stages never change a file in place, so a run cannot reach another's. Where the file system has
    no hard links, files are copied. The manifests are the mark that all is there: they go first
    where the data is another than before, and come last.
    """
    manifests = [Path("manifests") / f"{step}.json" for step in steps]
    if all(_same(data / name, folder / name) for name in manifests):
        return
    for name in manifests:
        (folder / name).unlink(missing_ok=True)
    shared = [p for p in data.iterdir() if p.is_dir() and p.name not in ("manifests", "embeddings")]
    # The model's own embeddings stand beside the shared ones.
    shared += [p for p in data.glob("embeddings/*") if p.is_dir()]
    for source in shared:
        target = folder / source.relative_to(data)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, copy_function=_link)
    (folder / "manifests").mkdir(parents=True, exist_ok=True)
    for name in manifests:
        _link(data / name, folder / name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _same(first: Path, second: Path) -> bool:
    return second.is_file() and first.read_bytes() == second.read_bytes()


def collect(folder: Path, method: str, seed: int, batch: int) -> dict[str, Any]:
    """What a finished run measured.

    Args:
        folder: its dataset.
        method: its method.
        seed: its seed.
        batch: samples a step.
    """
    found = [read_result(path) for path in sorted((folder / "eval").glob("benchmark_*.json"))]
    results = {(result.dataset.partition("/")[2], result.task): result for result in found}
    log = read_log(folder / "train")
    seconds = training_seconds(log, batch)
    tail = log[-max(1, round(len(log) * TAIL)) :]
    measured = {figure.label: figure.of(results) for figure in FIGURES}
    return {
        "method": method,
        "seed": seed,
        "figures": {label: value for label, (value, _, _) in measured.items()},
        "chance": {label: chance for label, (_, chance, _) in measured.items()},
        "intervals": {label: list(ends) for label, (_, _, ends) in measured.items()},
        "scoring": _scoring(results),
        "num_steps": log[-1]["step"],
        "train_seconds": seconds,
        "samples_per_second": log[-1]["step"] * batch / seconds,
        "terms": {
            term: statistics.fmean(record[term] for record in tail)
            for term in TERMS
            if term in log[-1]
        },
    }


def _scoring(results: Mapping[tuple[str, str], EvalResult]) -> str:
    provenance = results["test_vendor", "zeroshot_classification"].provenance
    assert provenance is not None
    return str(provenance.settings["scoring"])


def training_seconds(log: Sequence[Mapping[str, Any]], batch: int) -> float:
    """Time that the steps took, start-up left out; of all attempts of a run that was resumed."""
    seconds, done = 0.0, 0
    for record in log:
        seconds += (record["step"] - done) * batch / record["samples_per_second"]
        done = record["step"]
    return seconds


def summarize(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, sample standard deviation (None for one value) and number."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "num": len(values)}


def rows_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Row's label -> method -> mean and spread over its runs; what a method has not is left out."""
    methods = list(dict.fromkeys(str(run["method"]) for run in runs))
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for method in methods:
        own = [run for run in runs if run["method"] == method]
        values = {f.label: [100 * run["figures"][f.label] for run in own] for f in FIGURES}
        values["training, seconds"] = [run["train_seconds"] for run in own]
        values["training, samples/s"] = [run["samples_per_second"] for run in own]
        for term in own[0]["terms"]:
            values[f"loss term {term}"] = [run["terms"][term] for run in own]
        for label, numbers in values.items():
            rows.setdefault(label, {})[method] = summarize(numbers)
    order = [*(f.label for f in FIGURES), "training, seconds", "training, samples/s"]
    order += [f"loss term {term}" for term in TERMS]
    return {label: rows[label] for label in order if label in rows}


def chance_of(runs: Sequence[Mapping[str, Any]], label: str) -> float | None:
    """Chance of a row in percent; None where it has none."""
    level = runs[0]["chance"].get(label)
    return None if level is None else 100 * float(level)


def table_of(runs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table, as text."""
    methods = list(dict.fromkeys(str(run["method"]) for run in runs))
    lines = []
    for label, cells in rows_of(runs).items():
        digits = 2 if label.startswith("loss") else 0 if label.startswith("training") else 1
        chance = chance_of(runs, label)
        line = [label, "" if chance is None else f"{chance:.2f}"]
        lines.append(line + [_cell(cells.get(method), digits) for method in methods])
    return ["mean ± standard deviation over seeds", "chance", *methods], lines


def _cell(summary: Mapping[str, Any] | None, digits: int) -> str:
    if summary is None:
        return "-"
    spread = "" if summary["std"] is None else f" ± {summary['std']:.{digits}f}"
    return f"{summary['mean']:.{digits}f}{spread}"


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text aligned in columns, the first to the left."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (columns, *rows)
    )


def above_chance(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Zero-shot row -> method -> in how many of its runs the 95% interval lies above chance."""
    found: dict[str, dict[str, str]] = {}
    for figure in FIGURES:
        if figure.task != "zeroshot_classification":
            continue
        for method in dict.fromkeys(str(run["method"]) for run in runs):
            own = [run for run in runs if run["method"] == method]
            above = [r for r in own if r["intervals"][figure.label][0] > r["chance"][figure.label]]
            found.setdefault(figure.label, {})[method] = f"{len(above)} of {len(own)}"
    return found


def draw(runs: Sequence[Mapping[str, Any]], about: str) -> str:
    """One HTML page: a bar chart a figure, standard deviations as lines, and the table."""
    charts = []
    for label, cells in rows_of(runs).items():
        if label.startswith("loss"):
            continue
        name, _, unit = label.rpartition(", ")
        chance = chance_of(runs, label)
        spreads = [cell["std"] for cell in cells.values()]
        charts.append(
            bar_chart(
                [(method, cell["mean"]) for method, cell in cells.items()],
                title=name,
                unit=unit if None in spreads else f"{unit}, mean ± standard deviation over seeds",
                reference=None if chance is None else ("chance", chance),
                decimals=0 if chance is None else 1,
                spreads=None if None in spreads else spreads,
            )
        )
    sections = [
        section("Figures", *charts),
        section("Table", html_table(*table_of(runs))),
    ]
    return page("Five methods on the demo's data", sections, subtitle=about)


def describe(given: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    """What all runs had in common."""
    import torch

    stage: Any = pipeline.step("train").stage
    names = sorted({*recipes.DEMO_TRAINING, *SIZED_LIKE_THE_DEMO, "ssl_augmentation", "peak_lr"})
    names += ["optimizer", "weight_decay", "max_steps", "threads_per_rank", "precision"]
    return {
        "recipe": "demo",
        "methods": list(given.methods),
        "seeds": list(given.seeds),
        "training": {name: getattr(stage, name) for name in names},
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def run_all(
    given: argparse.Namespace, overrides: Sequence[tuple[str, str]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Make the data, then every run that is not done; return what they measured and failures."""
    data = given.out / "data"
    pipeline = make_pipeline(data, overrides)
    shared = pipeline.choose(until=DATA_UNTIL)
    run_pipeline(pipeline, shared, runner=given.runner)
    runs: list[dict[str, Any]] = []
    failures: list[str] = []
    todo = [(method, seed) for seed in given.seeds for method in given.methods]
    for number, (method, seed) in enumerate(todo, 1):
        print(f"\n{method}, seed {seed}: run {number} of {len(todo)}", flush=True)
        folder = given.out / f"{method}-{seed}"
        share_data(data, folder, [step.name for step in shared])
        pipeline = make_pipeline(folder, overrides, method, seed)
        try:
            run_pipeline(pipeline, pipeline.choose(first="train", until="eval"), runner="local")
        except DeclipError as error:
            # One diverged run must not cost the night's others.
            failures.append(f"{method}, seed {seed}: {error}")
            print(failures[-1], file=sys.stderr)
            continue
        stage: Any = pipeline.step("train").stage
        runs.append(collect(folder, method, seed, stage.global_batch_size))
    runs.sort(key=lambda run: (given.methods.index(run["method"]), run["seed"]))
    return runs, failures


def publish(given: argparse.Namespace, about: Mapping[str, Any], runs: list[dict[str, Any]]) -> str:
    """Write the figures and the chart; return what the terminal shows."""
    content = {
        **about,
        "runs": runs,
        "summary": rows_of(runs),
        "above_chance": above_chance(runs),
    }
    atomic_write(given.json, (json.dumps(content, indent=2) + "\n").encode())
    training = about["training"]
    subtitle = (
        f"{training['model']}, {runs[0]['num_steps']} steps of {training['global_batch_size']} "
        f"samples, {len(given.seeds)} seeds, {about['cores']} cores"
    )
    atomic_write(given.html, draw(runs, subtitle).encode())
    lines = ["", subtitle, format_table(*table_of(runs)), ""]
    for label, methods in above_chance(runs).items():
        counts = ", ".join(f"{method} {count}" for method, count in methods.items())
        lines.append(f"runs whose 95% interval lies above chance: {label}: {counts}")
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """This command's options, and settings of the recipe.

    Raises:
        DeclipError: a setting that this command sets itself.
    """
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the data and the runs")
    names = list(METHODS)
    parser.add_argument("--methods", nargs="+", default=names, choices=names, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--epochs", type=float, default=3.0, help="of every method")
    parser.add_argument("--json", type=Path, help="figures of every run (OUT/methods.json)")
    parser.add_argument("--html", type=Path, help="the chart (OUT/methods.html)")
    parser.add_argument("--runner", choices=("ray", "local"), default="ray", help="of the data")
    overrides, others = take_overrides(argv)
    given = parser.parse_args(others)
    given.methods, given.seeds = list(dict.fromkeys(given.methods)), sorted(set(given.seeds))
    for flag, _ in overrides:
        if flag.replace("_", "-") in OURS:
            raise DeclipError(f"{flag} is set by this command's --methods, --seeds and --epochs.")
    given.json = given.json or given.out / "methods.json"
    given.html = given.html or given.out / "methods.html"
    return given, [*length_of_training(given.epochs), *overrides]


def main(argv: Sequence[str]) -> int:
    """Status 0, or 1 where a run failed."""
    try:
        given, overrides = parse(argv)
        about = describe(given, make_pipeline(given.out / "data", overrides))
        runs, failures = run_all(given, overrides)
    except DeclipError as error:
        print(f"methods: {error}", file=sys.stderr)
        return 1
    if runs:
        print(publish(given, about, runs))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
