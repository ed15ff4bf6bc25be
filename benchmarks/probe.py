"""The linear probe's whole sweep against scikit-learn, strength by strength: same answers, faster.

    python benchmarks/probe.py --threads 2 --pairs FOLDER

Ours runs CLIP's sweep (15 strengths on four fifths of 50,000 rows of 768 features, the chosen one
again on all). scikit-learn's LogisticRegression then fits each of the very same strengths on the
very same rows, as float32 (its faster way), with its default tolerance (--peer-tolerance) and
CLIP's 1,000 iterations, and the strength of its own choice again on all. Both have the same
threads, in one process. Where scikit-learn ends above the optimum (weak strengths: its 1,000
iterations are spent, or its gradient is small far from it) its accuracy is another model's; that
shows in the objective, and accuracies are compared where it does get there and anywhere. The
strengths where it does get there are timed once more by themselves (`converged`), ours all
together and scikit-learn's sum; more of them do with --peer-iterations 10000 and fewer --rows.

Three kinds of features: `made-up`, Gaussian classes whose variances fall over four decades as
those of real features do; `real` ones with --pairs, a folder with pairs.parquet and its pictures
of CIFAR-10: rectified responses to 192 of the pictures' own whitened patches, summed over four
quarters (Coates, Lee and Ng 2011); or --features FILE.npz of arrays `features` and `labels`.
There is no test set in these; what is compared is validation accuracy by strength, and the last
classifiers' predictions. For every strength the objective is evaluated in float64 at both answers.
With --device cuda ours runs there. Writes benchmarks/results/probe-cpu.json (or --json FILE).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped,unused-ignore]

from declip_eval.linear_probe import MAX_ITERATIONS, stratified_split
from declip_eval.logistic import LogisticModel, LogisticProblem, blas_threads
from declip_eval.strength_sweep import Sweep, sweep_like_clip
from surroundings import describe

RESULTS = Path(__file__).parent / "results" / "probe-cpu.json"
Features = NDArray[np.float32]
Labels = NDArray[np.int64]

SAME_OPTIMUM = 1e-4
"""How far above ours, relatively, scikit-learn's objective may end and still be the optimum's."""


def made_up(num_rows: int, dim: int, num_classes: int, seed: int) -> tuple[Features, Labels]:
    """Classes that overlap, variances falling as 1 / rank**1.3 in turned axes, and a mean."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows)
    spread = 10.0 * np.arange(1, dim + 1) ** -0.65
    centers = rng.standard_normal((num_classes, dim)) * 4.4 / np.sqrt(dim)
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    mean = rng.standard_normal(dim)
    features = np.empty((num_rows, dim), dtype=np.float32)
    for start in range(0, num_rows, 4096):
        block = slice(start, start + 4096)
        noise = rng.standard_normal((len(labels[block]), dim))
        features[block] = ((centers[labels[block]] + noise) * spread) @ turn + mean
    return features, labels


def of_pictures(folder: Path, num_rows: int) -> tuple[Features, Labels]:
    """768 features of CIFAR-10's pictures in `folder`, drawn at random, and their classes."""
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(folder / "pairs.parquet", columns=["path", "source", "class_label"])
    rows = [row for row in table.to_pylist() if row["source"] == "cifar10-train"]
    if not rows:
        raise SystemExit(f"{folder} has no pictures of source 'cifar10-train': take --features.")
    rng = np.random.default_rng(0)
    rows = [rows[i] for i in rng.permutation(len(rows))[:num_rows]]
    _, labels = np.unique([row["class_label"] for row in rows], return_inverse=True)
    pictures = np.empty((len(rows), 32, 32, 3), dtype=np.float32)
    for picture, row in zip(pictures, rows, strict=True):
        with Image.open(folder / row["path"]) as image:
            picture[:] = np.asarray(image.convert("RGB").resize((32, 32)))
    few = rng.choice(len(pictures), min(400, len(pictures)), replace=False)
    sample = patches(pictures[few]).reshape(-1, 108)
    mean = sample.mean(axis=0)
    axes, variances, _ = np.linalg.svd(np.cov(sample.T))
    whiten = axes / np.sqrt(variances + 0.1) @ axes.T
    filters = (sample[rng.choice(len(sample), 192, replace=False)] - mean) @ whiten
    filters /= np.linalg.norm(filters, axis=1, keepdims=True)
    turn = (whiten @ filters.T).astype(np.float32)
    found = np.empty((len(pictures), 768), dtype=np.float32)
    for start in range(0, len(pictures), 500):
        answers = (patches(pictures[start : start + 500]) - mean) @ turn
        answers = np.maximum(answers - 0.5, 0)
        half = answers.shape[1] // 2
        quarters = [answers[:, y, x] for y in _halves(half) for x in _halves(half)]
        found[start : start + 500] = np.concatenate([q.sum((1, 2)) for q in quarters], axis=1)
    return found / found.std(), labels.astype(np.int64)


def _halves(half: int) -> tuple[slice, slice]:
    return slice(None, half), slice(half, None)


def patches(pictures: Features) -> Features:
    """All 6 x 6 patches two pixels apart, (n, 14, 14, 108), each of mean 0 and like contrast."""
    windows = np.lib.stride_tricks.sliding_window_view(pictures, (6, 6), axis=(1, 2))
    windows = windows[:, ::2, ::2].reshape(len(pictures), 14, 14, 108)
    windows = windows - windows.mean(axis=-1, keepdims=True)
    return np.asarray(windows / np.sqrt(windows.var(axis=-1, keepdims=True) + 10))


class Ours:
    """Our sweep: what it chose, each strength's model, and the seconds."""

    def __init__(self, features: Features, labels: Labels, device: str) -> None:
        self.device = device
        start, cpu = time.perf_counter(), time.process_time()
        fit, held_out = stratified_split(labels, 0.2, seed=0)
        self.models: dict[float, LogisticModel] = {}
        problem = self._problem(features[fit], labels[fit], device)

        def score(strengths: Any) -> list[float]:
            models = problem.fit(strengths)
            self.models |= dict(zip(strengths, models, strict=True))
            return [
                accuracy(model.scores(features[held_out]), labels[held_out]) for model in models
            ]

        self.sweep: Sweep = sweep_like_clip(score)
        self.last = self._problem(features, labels, device).fit([self.sweep.best])[0]
        self.wall, self.processor = time.perf_counter() - start, time.process_time() - cpu

    def time_again(
        self, strengths: list[float], theirs: Theirs, rows: Features, labels: Labels
    ) -> dict[str, Any]:
        """Fit some strengths only, from nothing, and compare with what scikit-learn took."""
        start = time.perf_counter()
        self._problem(rows, labels, self.device).fit(strengths)
        wall, other = time.perf_counter() - start, sum(theirs.fit_seconds[s] for s in strengths)
        return {
            "strengths": len(strengths),
            "fit_seconds": [round(wall, 2), round(other, 2)],
            "times_faster": round(other / wall, 2),
        }

    @staticmethod
    def _problem(features: Features, labels: Labels, device: str) -> LogisticProblem:
        num_classes = int(labels.max()) + 1
        if device == "cpu":
            return LogisticProblem(features, labels, num_classes=num_classes)
        from declip_eval.logistic_torch import TorchLogisticProblem

        return TorchLogisticProblem(features, labels, num_classes=num_classes, device=device)


class Theirs:
    """scikit-learn on the same strengths."""

    def __init__(
        self, features: Features, labels: Labels, strengths: list[float], given: argparse.Namespace
    ) -> None:
        self.settings = {"tol": given.peer_tolerance, "max_iter": given.peer_iterations}
        # The way there is not to be timed.
        self._fit(features[:1000], labels[:1000], 1e6)
        start, cpu = time.perf_counter(), time.process_time()
        fit, held_out = stratified_split(labels, 0.2, seed=0)
        rows, of_rows = features[fit], labels[fit]
        self.models, self.scores, self.seconds, self.fit_seconds = {}, {}, {}, {}
        for strength in strengths:
            before = time.perf_counter()
            model = self._fit(rows, of_rows, strength)
            self.fit_seconds[strength] = time.perf_counter() - before
            self.scores[strength] = float(model.score(features[held_out], labels[held_out]))
            self.models[strength] = model
            self.seconds[strength] = time.perf_counter() - before
            print(
                f"  scikit-learn {strength:10.3g}: {self.seconds[strength]:6.1f} s, "
                f"{model.n_iter_[0]} iterations, {self.scores[strength]:.4f}",
                flush=True,
            )
        self.best = max(strengths, key=lambda s: (self.scores[s], s))
        self.last = self._fit(features, labels, self.best)
        self.wall, self.processor = time.perf_counter() - start, time.process_time() - cpu

    def _fit(self, features: Features, labels: Labels, strength: float) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LogisticRegression(C=1 / strength, **self.settings)
            return model.fit(features, labels)


def accuracy(scores: NDArray[Any], labels: Labels) -> float:
    return float((scores.argmax(axis=1) == labels).mean())


def objective(weights: Any, bias: Any, strength: float, rows: Features, labels: Labels) -> float:
    """Mean loss plus penalty in float64; the softmax's, for three classes and more."""
    total = 0.0
    for start in range(0, len(rows), 4096):
        block = slice(start, start + 4096)
        scores = rows[block].astype(np.float64) @ weights + bias
        scores -= scores.max(axis=1, keepdims=True)
        right = scores[np.arange(len(scores)), labels[block]]
        total += float((np.log(np.exp(scores).sum(axis=1)) - right).sum())
    return total / len(rows) + 0.5 * strength / len(rows) * float((weights**2).sum())


def compare(ours: Ours, theirs: Theirs, features: Features, labels: Labels) -> dict[str, Any]:
    """One entry a strength, and what follows from all."""
    fit, _ = stratified_split(labels, 0.2, seed=0)
    rows, of_rows = features[fit], labels[fit]
    strengths: list[dict[str, Any]] = []
    for strength, model in sorted(ours.models.items()):
        other = theirs.models[strength]
        weights, bias = other.coef_.T.astype(np.float64), other.intercept_
        strengths.append(
            {
                "l2_strength": strength,
                "iterations": [model.num_iterations, int(other.n_iter_[0])],
                "validation_acc1": [ours.sweep.scores[strength], theirs.scores[strength]],
                "objective": [
                    objective(model.weights, model.bias, strength, rows, of_rows),
                    objective(weights, bias, strength, rows, of_rows),
                ],
                "scikit_learn_seconds": round(theirs.seconds[strength], 2),
            }
        )
    same = [s for s in strengths if s["objective"][1] <= s["objective"][0] * (1 + SAME_OPTIMUM)]
    gaps = {s["l2_strength"]: abs(np.diff(s["validation_acc1"])[0]) for s in strengths}
    reached = [s["l2_strength"] for s in same]
    own = ours.last.scores(features).argmax(axis=1)
    return {
        "chosen": [ours.sweep.best, theirs.best],
        "validation_acc1": [ours.sweep.score, theirs.scores[theirs.best]],
        "same_predictions": float((own == theirs.last.predict(features)).mean()),
        "strengths_tried": len(strengths),
        "strengths_where_scikit_learn_reached_the_optimum": len(same),
        "strengths_where_scikit_learn_spent_its_iterations": sum(
            s["iterations"][1] >= theirs.settings["max_iter"] for s in strengths
        ),
        "strengths_where_ours_did_not_converge": sum(
            not model.converged for model in ours.models.values()
        ),
        "largest_difference_of_accuracy_there": max((gaps[s] for s in reached), default=None),
        "largest_difference_of_accuracy_anywhere": max(gaps.values()),
        "converged": None if not reached else ours.time_again(reached, theirs, rows, of_rows),
        "largest_excess_of_our_objective": max(
            s["objective"][0] - s["objective"][1] for s in strengths
        ),
        "wall_seconds": [round(ours.wall, 2), round(theirs.wall, 2)],
        "processor_seconds": [round(ours.processor, 2), round(theirs.processor, 2)],
        "times_faster": round(theirs.wall / ours.wall, 2),
        "strengths": strengths,
    }


def measure(name: str, features: Features, labels: Labels, given: argparse.Namespace) -> Any:
    labels = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    if labels.max() < 2:
        raise SystemExit(f"{name} has fewer than 3 classes, but this compares the multinomial fit.")
    print(f"{name}: {features.shape}, {labels.max() + 1} classes", flush=True)
    with threadpool_limits(given.threads):
        if given.device != "cpu":  # The first product on a device loads its libraries.
            Ours(features[:2000], labels[:2000], given.device)
        ours = Ours(features, labels, given.device)
        print(f"  ours {ours.wall:.1f} s, chosen {ours.sweep.best:.3g}", flush=True)
        theirs = Theirs(features, labels, list(ours.models), given)
        compared = compare(ours, theirs, features, labels)
    found = {"shape": list(features.shape), "classes": int(labels.max()) + 1}
    found |= {"peer_tolerance": given.peer_tolerance, "peer_iterations": given.peer_iterations}
    found |= {"threads": given.threads, "device": given.device}
    found |= compared
    shown = {k: v for k, v in found.items() if k != "strengths"}
    print(json.dumps(shown, indent=2), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--classes", type=int, nargs="*", default=[10, 100], help="of made-up ones")
    parser.add_argument("--pairs", type=Path, help="folder with pairs.parquet and images/")
    parser.add_argument("--features", type=Path, help=".npz with features and labels")
    parser.add_argument("--threads", type=int, default=blas_threads())
    parser.add_argument("--peer-tolerance", type=float, default=1e-4)
    parser.add_argument("--peer-iterations", type=int, default=MAX_ITERATIONS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    start = {"surroundings": describe(["numpy", "scipy", "scikit-learn", "torch"])}
    sets: dict[str, Any] = {}
    if given.pairs:
        features, labels = of_pictures(given.pairs, given.rows)
        sets["real"] = measure("real", features, labels, given)
    if given.features:
        with np.load(given.features) as file:
            features, labels = file["features"].astype(np.float32), file["labels"]
        name = given.features.stem
        sets[name] = measure(name, features[: given.rows], labels[: given.rows], given)
    for num_classes in given.classes:
        features, labels = made_up(given.rows, given.dim, num_classes, seed=0)
        name = f"made-up, {num_classes} classes"
        sets[name] = measure(name, features, labels, given)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(start | {"sets": sets}, indent=2) + "\n")
    print(f"written to {given.json}")


if __name__ == "__main__":
    main()
