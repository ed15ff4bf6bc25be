"""``declip eval`` end to end on real labelled sets, with a trained model and with drawn weights.

    python benchmarks/eval_real.py --out FOLDER --pairs DATASET [--images 20000] [--epochs 3]
        [--cache FOLDER] [--json benchmarks/results/eval-real-cpu.json]

DATASET is a dataset of ours whose column ``split`` holds samples out, such as the demo's
(``declip run demo --until filter``). A CLIP of 48 pixels learns for some minutes from the first
--images of CIFAR-10's training pictures, captioned by their class, and from the dataset's training
pairs. Then, each by the command a user would give: zero-shot, probe and few-shot on CIFAR-10 and
scikit-learn's digits, retrieval on the pairs held out; --draws models with drawn weights; one, two
and three ranks; a kill in the middle and the same command again; compare; table. What was trained
on is searched for the test pictures, and a dataset with planted test pictures, too.

Status 1 if something that must hold does not. What stands in FOLDER of the training is kept; give
another folder to time all of it.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from declip_eval.labelled_sets import DatasetError, LabelledSet
from declip_eval.results import EvalResult, read_result
from declip_shards import DeclipError, Store
from eval_real_data import draw_model, make_training_data, plant, train
from eval_sets import write_pairs, write_set
from pipelines.demo_packages import default_cache
from pipelines.eval_contamination import find_overlap, picture_marks
from surroundings import describe

T = TypeVar("T")
TASKS = ("zeroshot_classification", "linear_probe", "few_shot")
FEW_SHOT = ("1", "4", "16")
MAIN = ("acc1", "lp_acc1", "image_retrieval_recall@5", "text_retrieval_recall@5")
"""What must be above chance after training."""
LEVEL = 0.95
SMALL_CHUNK = "64"
"""Pictures of a chunk where ranks and kills are tried: many chunks of small sets."""
POLL_SECONDS = 0.02
SUMMARY = "eval_summary.jsonl"
_OUTSIDE = re.compile(r"""(?:src|href)=["'](?!data:|#)|@import|url\((?!["']?(?:data:|#))""")
"""What a page would have to fetch."""


class Steps:
    """Runs steps one after the other and notes what each cost."""

    def __init__(self) -> None:
        self.costs: dict[str, dict[str, float]] = {}
        self.checks: dict[str, bool] = {}

    def timed(self, name: str, work: Callable[[], T]) -> T:
        """Do something, and note seconds and processor seconds, with all processes it started."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        start, before = time.perf_counter(), cpu_seconds()
        found = work()
        self.costs[name] = {
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(cpu_seconds() - before, 1),
        }
        return found

    def check(self, name: str, holds: bool) -> None:
        """Note whether something that must hold does."""
        self.checks[name] = bool(holds)
        print(f"{'holds' if holds else 'FAILS'}: {name}", file=sys.stderr, flush=True)


def cpu_seconds() -> float:
    """Of this process and of all that it waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in both)


def command(*words: str | Path) -> list[str]:
    """A command of ours as a process of its own."""
    return [sys.executable, "-m", "pipelines", *map(str, words)]


def run(*words: str | Path) -> str:
    """What a command prints.

    Raises:
        RuntimeError: its status is not 0.
    """
    done = subprocess.run(command(*words), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"status {done.returncode} of {words}: {(done.stderr + done.stdout)[-2000:]}"
        )
    return done.stdout


def results_of(folder: Path) -> list[EvalResult]:
    """All results of a folder, by file name."""
    return [read_result(path) for path in results_in(folder)]


def results_in(folder: Path) -> list[Path]:
    """Result files of a folder."""
    return sorted(folder.glob("*.json"))


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of each file by its name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def scores(results: Sequence[EvalResult]) -> list[dict[str, Any]]:
    """Each result's metrics with intervals and chance, and without the overlap."""
    rows = []
    for result in results:
        known = result.provenance
        assert known is not None
        shots = int(result.metrics.get("fewshot_k", -1))
        without = dict(known.contamination.get("metrics_without_overlap", {}))
        rows.append(
            {
                "dataset": result.dataset,
                "task": result.task if shots < 1 else f"{shots} a class",
                "num_samples": known.num_samples,
                "num_overlap": known.contamination.get("num_overlap"),
                "metrics": {
                    name: {
                        "value": round(value, 5),
                        "interval": [round(end, 5) for end in known.intervals.get(name, ())],
                        "chance": known.chance.get(name),
                        "without_overlap": without.get(name),
                    }
                    for name, value in result.metrics.items()
                    if name != "fewshot_k"
                },
            }
        )
    return rows


def over_draws(found: Sequence[Sequence[EvalResult]]) -> list[dict[str, Any]]:
    """Means over models of drawn weights, with Student's intervals.

    One such model is a fixed function of the picture, which favors some classes, so it may lie off
    chance by more than its sampling error; what is at chance is the mean over the draws.
    """
    from scipy import stats

    rows = []
    for place, first in enumerate(found[0]):
        assert first.provenance is not None
        for name in (n for n in first.metrics if n in first.provenance.chance):
            values = np.array([results[place].metrics[name] for results in found])
            half = float(stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * stats.sem(values))
            chance = first.provenance.chance[name]
            rows.append(
                {
                    "dataset": first.dataset,
                    "task": first.task,
                    "metric": name,
                    "values": [round(float(value), 5) for value in values],
                    "mean": round(float(values.mean()), 5),
                    "interval": [round(float(values.mean()) + s * half, 5) for s in (-1, 1)],
                    "chance": chance,
                    "holds_chance": bool(abs(values.mean() - chance) <= half),
                }
            )
    return rows


class Benchmark:
    """The steps, in a folder."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.out: Path = given.out
        self.steps = Steps()
        self.sets = self.out / "sets"
        self.common = ("--dataset-root", self.sets, "--device", "cpu", "--quiet")

    def run(self) -> dict[str, Any]:
        """Everything; the figures."""
        given, steps = self.given, self.steps
        sets = steps.timed("write sets", self.write_sets)
        data = self.out / "data"
        num_samples = steps.timed(
            "write training data",
            lambda: make_training_data(data, sets["cifar10 train"], given.images, given.pairs),
        )
        export = steps.timed("train", lambda: train(data, given.model, given.epochs, 2))
        steps.timed("evaluate the trained model", lambda: self.evaluate_trained(export, data))
        trained = results_of(self.out / "trained")
        drawn = steps.timed("evaluate drawn weights", self.evaluate_drawn)
        figures = {
            "num_training_samples": num_samples,
            "sets": {name: describe_set(data) for name, data in sets.items()},
            "trained": scores(trained),
            "drawn": over_draws(drawn),
            "ranks": steps.timed("1, 2 and 3 ranks", lambda: self.shard(export)),
            "kill": steps.timed("kill and rerun", lambda: self.kill(export)),
            "planted": steps.timed("planted pictures", lambda: self.search_planted(sets)),
            "compare": steps.timed("compare", self.compare),
            "table": steps.timed("table", self.table),
        }
        self.check_scores(figures)
        return figures

    def write_sets(self) -> dict[str, LabelledSet]:
        """CIFAR-10, digits and pairs."""
        options: dict[str, Any] = {"cache": self.given.cache, "seed": 0}
        found = {
            f"{name} {split}": write_set(self.sets, name, split, **options)
            for name in ("cifar10", "digits")
            for split in ("train", "test")
        }
        return found | {"pairs test": write_pairs(self.sets, self.given.pairs, "test_vendor")}

    def evaluate_trained(self, export: Path, data: Path) -> None:
        """Every task, with the training data searched for the test pictures."""
        shutil.rmtree(self.out / "trained", ignore_errors=True)
        shutil.rmtree(self.out / "features", ignore_errors=True)
        words = ("--output", self.out / "trained", "--feature-root", self.out / "features")
        more = ("--train-data", data, "--fewshot-k", *FEW_SHOT)
        run("eval", "--model", export, "--dataset", "cifar10", "digits",
            "--task", *TASKS, *more, *words, *self.common)  # fmt: skip
        run("eval", "--model", export, "--dataset", "pairs", "--train-data", data, *words,
            *self.common)  # fmt: skip

    def evaluate_drawn(self) -> list[list[EvalResult]]:
        """The zero-shot tasks by models that have learned nothing."""
        found = []
        shutil.rmtree(self.out / "drawn", ignore_errors=True)
        for seed in range(self.given.draws):
            folder = draw_model(self.out / f"model-{seed}", self.given.model, seed)
            output = self.out / "drawn" / str(seed)
            run("eval", "--model", folder, "--dataset", "cifar10", "digits", "pairs",
                "--output", output, "--feature-root", self.out / "features",
                *self.common)  # fmt: skip
            found.append(results_of(output))
        return found

    def _small(self, export: Path, name: str, *more: str | Path) -> tuple[str | Path, ...]:
        """An evaluation of small sets into folders of its own."""
        return ("eval", "--model", export, "--dataset", "digits", "pairs", "--task", "auto",
                "--output", self.out / name / "results", "--chunk-images", SMALL_CHUNK,
                "--feature-root", self.out / name / "features", *self.common, *more)  # fmt: skip

    def shard(self, export: Path) -> dict[str, Any]:
        """The same by one, two and three processes: the same files."""
        found = {}
        for num_ranks in (1, 2, 3):
            name = f"ranks-{num_ranks}"
            shutil.rmtree(self.out / name, ignore_errors=True)
            run(*self._small(export, name, "--num-ranks", str(num_ranks)))
            found[num_ranks] = files_of(self.out / name / "results")
        same = all(files == found[1] for files in found.values())
        self.steps.check("1, 2 and 3 ranks write the same bytes", same)
        return {"num_files": len(found[1]), "identical": same}

    def kill(self, export: Path) -> dict[str, Any]:
        """Kill in the middle of a set's chunks, run again, and once more when all is there."""
        name = "killed"
        shutil.rmtree(self.out / name, ignore_errors=True)
        words = self._small(export, name)
        process = subprocess.Popen(
            command(*words),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        first_set = self.out / name / "results"
        while process.poll() is None:
            # When the first set is done and the second begun.
            if results_in(first_set) and num_chunks(self.out / name) >= 9:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(POLL_SECONDS)
        status = process.wait()
        before = {p: p.stat().st_mtime_ns for p in (self.out / name).rglob("*") if p.is_file()}
        run(*words)
        chunks = [path for path in before if path.name.startswith("chunk-")]
        finished = [path for path in results_in(first_set) if path in before]
        untouched = [
            path for path in before if path.exists() and path.stat().st_mtime_ns == before[path]
        ]
        whole = files_of(self.out / "ranks-1" / "results")
        again = files_of(first_set)
        # What became of each evaluation is told by the summary, and differs: one was kept.
        del whole[SUMMARY], again[SUMMARY]
        same = again == whole
        self.steps.check("the kill met it at work", status == -signal.SIGKILL)
        self.steps.check("chunks of the killed run are kept", set(chunks) <= set(untouched))
        self.steps.check("datasets of the killed run are kept", set(finished) <= set(untouched))
        self.steps.check("killed and rerun writes the same bytes", same)
        run(*words)
        entries = [json.loads(line) for line in (first_set / SUMMARY).read_text().splitlines()]
        kept = [entry["status"] for entry in entries]
        self.steps.check("a third run computes nothing", kept == ["kept"] * 2)
        return {
            "chunks_at_kill": len(chunks),
            "chunks_in_all": num_chunks(self.out / name),
            "datasets_at_kill": len(finished),
            "identical": same,
        }

    def search_planted(self, sets: dict[str, LabelledSet]) -> dict[str, Any]:
        """How many planted test pictures are found, and how many others."""
        test = sets["cifar10 test"]
        root = self.out / "planted"
        planted = plant(root, test, sets["cifar10 train"], self.given.plants)
        clean = [row for row in range(len(test)) if row not in planted][: 10 * len(planted)]
        rows = [*planted, *clean]
        overlap = find_overlap(picture_marks(test.read_images(rows)), train_root=str(root))
        found = overlap.mask[: len(planted)]
        kinds = list(planted.values())
        by_kind = {
            kind: f"{sum(bool(f) for f, k in zip(found, kinds, strict=True) if k == kind)}"
            f" of {kinds.count(kind)}"
            for kind in dict.fromkeys(kinds)
        }
        same = [bool(f) for f, k in zip(found, kinds, strict=True) if k == "the same file"]
        self.steps.check("every planted file is found", all(same))
        self.steps.check("9 of 10 planted pictures are found", float(np.mean(found)) >= 0.9)
        return {
            "found": by_kind,
            "others_found": int(overlap.mask[len(planted) :].sum()),
            "others": len(clean),
            "by_rung": overlap.record()["by_rung"],
        }

    def compare(self) -> dict[str, Any]:
        """The trained model against the first one of drawn weights."""
        text = run("compare", self.out / "drawn" / "0", self.out / "trained", "--metric", "all",
                   "--json")  # fmt: skip
        contest = json.loads(text)
        rows = [
            {name: row[name] for name in ("task", "dataset", "metric", "difference", "p_adjusted")}
            | {"verdict": row["verdict"]}
            for row in contest["comparisons"]
        ]
        learned = [r for r in rows if r["dataset"] in ("cifar10", "pairs") and r["metric"] in MAIN]
        settled = bool(learned) and all(row["verdict"] == "B better" for row in learned)
        self.steps.check("the trained model is better than drawn weights", settled)
        return {"comparisons": rows}

    def table(self) -> dict[str, Any]:
        """The page of both."""
        place = self.out / "table.html"
        run("table", self.out / "trained", self.out / "drawn" / "0", "--format", "html",
            "--out", place)  # fmt: skip
        page = place.read_text()
        self.steps.check("the page needs no other file", not _OUTSIDE.search(page))
        self.steps.check("the page has pictures", "data:image/" in page)
        return {"bytes": len(page.encode())}

    def check_scores(self, figures: dict[str, Any]) -> None:
        """A trained model is above chance where it was taught, drawn weights are at chance."""
        for row in figures["trained"]:
            if row["dataset"] == "digits" and row["task"] == "zeroshot_classification":
                continue  # It has never seen one.
            for name, value in row["metrics"].items():
                if name in MAIN and value["chance"] is not None:
                    above = value["interval"][0] > value["chance"]
                    label = f"{row['dataset']} {row['task']} {name} is above chance"
                    self.steps.check(label, above)
        held = [row["holds_chance"] for row in figures["drawn"]]
        # Of so many intervals of 95% some miss by chance; more than a fifth must not.
        self.steps.check("drawn weights are at chance", sum(held) >= 0.8 * len(held))


def num_chunks(folder: Path) -> int:
    """Files of features."""
    return sum(1 for _ in folder.rglob("chunk-*.npz"))


def describe_set(data: LabelledSet) -> dict[str, Any]:
    """What a set is."""
    return {"num_samples": len(data), "kind": data.kind, "digest": data.digest()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments.

    Raises:
        DeclipError: a number out of its range, or a dataset that is none.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of all that is made")
    add("--pairs", required=True, metavar="DATASET", help="with train and test_vendor in `split`")
    add("--images", type=int, default=20_000, help="of CIFAR-10 to train on (20000)")
    add("--epochs", type=float, default=3.0, help="of training (3)")
    add("--model", default="ViT-Ti-8-48", help="a model of 48 pixels (ViT-Ti-8-48)")
    add("--draws", type=int, default=8, help="models of drawn weights (8)")
    add("--plants", type=int, default=100, help="planted pictures of each kind (100)")
    add("--cache", type=Path, default=default_cache(), help="of packages")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    given = parser.parse_args(argv)
    for name, least, most in (("images", 256, 50_000), ("draws", 2, 50), ("plants", 1, 333)):
        if not least <= getattr(given, name) <= most:
            raise DeclipError(
                f"--{name} is {getattr(given, name)}; it must lie between {least} and {most}."
            )
    if not Store(given.pairs).exists("manifests/ingest.json"):
        raise DeclipError(
            f"--pairs {given.pairs!r} is no dataset with an ingest manifest; make one by "
            "`declip run demo --until filter`."
        )
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    given = parse(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    head = describe(["torch", "numpy", "scipy", "scikit-learn", "pillow"])
    benchmark = Benchmark(given)
    start = time.perf_counter()
    figures = benchmark.run()
    report = {
        "surroundings": head,
        "settings": {
            n: getattr(given, n) for n in ("images", "epochs", "model", "draws", "plants")
        },
        "seconds": round(time.perf_counter() - start, 1),
        "costs": benchmark.steps.costs,
        "checks": benchmark.steps.checks,
        **figures,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    if given.json:
        given.json.write_text(text)
    print(text)
    return 0 if all(benchmark.steps.checks.values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DeclipError, DatasetError) as error:
        sys.exit(str(error))
