"""The same features through CLIP_benchmark's metric code, scikit-learn's, and ours.

``python benchmarks/eval_parity.py --peers PYTHON``, where PYTHON is of an environment with
CLIP_benchmark 1.6.2 (and open_clip, scikit-learn, pycocoevalcap and cloudpickle, which it imports).
Its `evaluate` functions run whole, from features to metrics. Then our result files of these cases
go through its ``build``, and the CSV is read back. Writes results/eval-parity-cpu.json; fails where
any difference is above 1e-6.

From features, the two sides multiply in different precision (theirs float32, ours float64), so
scores that differ in their last bits may change places; "from scores" feeds our code the very
logits that CLIP_benchmark computed.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    roc_auc_score,
    top_k_accuracy_score,
)

from declip_eval.outcomes import Outcomes, metric_names, metrics_of, outcomes_path, write_outcomes
from declip_eval.results import EvalResult, Provenance, read_result, write_result
from declip_eval.score_outcomes import (
    classification_outcomes,
    classification_outcomes_of_features,
    multilabel_outcomes,
    retrieval_outcomes,
)
from declip_eval.zeroshot import build_classifier
from surroundings import describe

LIMIT = 1e-6
"""Largest difference of two metrics, both fractions of 1."""

PEER = Path(__file__).with_name("eval_parity_peer.py")


@dataclass(frozen=True)
class Case:
    """Made-up features of one dataset: arrays as the peer reads them."""

    name: str
    arrays: Mapping[str, Any]
    is_retrieval: bool = False

    @property
    def is_multilabel(self) -> bool:
        """Whether an image may have several classes."""
        return not self.is_retrieval and self.arrays["labels"].ndim == 2


def classes(
    name: str, num_images: int, num_classes: int, num_templates: int, seed: int, *, several: bool
) -> Case:
    """Classes of unequal size around their prompts, hard enough for every metric to be inside."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(num_classes, 64))
    texts = centers[:, None] + 0.5 * rng.normal(size=(num_classes, num_templates, 64))
    shares = rng.dirichlet(np.full(num_classes, 2.0))
    labels = rng.choice(num_classes, p=shares, size=num_images)
    images = centers[labels] + 3 * rng.normal(size=(num_images, 64))
    if several:
        positive = rng.random((num_images, num_classes)) < 0.05
        positive[np.arange(num_images), labels] = True
        images += positive @ centers
        labels = positive.astype(np.int64)
    arrays = {
        "images": images.astype(np.float32),
        "texts": texts.reshape(-1, 64).astype(np.float32),
        "labels": labels.astype(np.int64),
        "num_classes": num_classes,
        "num_templates": num_templates,
    }
    return Case(name, arrays)


def pairs(name: str, num_images: int, a_picture: int, seed: int) -> Case:
    """Images with some texts each, in the order of the images."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(num_images, 32))
    texts = np.repeat(images, a_picture, axis=0) + 2 * rng.normal(size=(num_images * a_picture, 32))
    arrays = {
        "images": images.astype(np.float32),
        "texts": texts.astype(np.float32),
        "recall_k": np.array([1, 5, 10]),
    }
    return Case(name, arrays, is_retrieval=True)


def make_cases() -> list[Case]:
    """Sizes of the published sets' kinds: few and many classes, two, several at once, captions."""
    return [
        classes("many_classes", 3000, 100, 8, 0, several=False),
        classes("few_classes", 1500, 10, 18, 1, several=False),
        classes("four_classes", 500, 4, 3, 2, several=False),
        classes("two_classes", 500, 2, 1, 3, several=False),
        classes("several_at_once", 2000, 20, 1, 4, several=True),
        pairs("five_captions", 300, 5, 5),
        pairs("one_caption", 500, 1, 6),
    ]


def our_outcomes(case: Case, logits: Any = None) -> Outcomes:
    """Ours, from the features or, where given, from another's logits."""
    arrays = case.arrays
    keys = [f"{row:06d}" for row in range(len(arrays["images"]))]
    if case.is_retrieval:
        a_picture = len(arrays["texts"]) // len(keys)
        texts_of = [range(row * a_picture, (row + 1) * a_picture) for row in range(len(keys))]
        text_keys = [f"text {row}" for row in range(len(arrays["texts"]))]
        return retrieval_outcomes(keys, text_keys, arrays["images"], arrays["texts"], texts_of)
    num_classes, num_templates = arrays["num_classes"], arrays["num_templates"]
    if logits is not None:
        make = multilabel_outcomes if case.is_multilabel else classification_outcomes
        return make(keys, logits, arrays["labels"])
    templates = [f"p{t} of {{}}" for t in range(num_templates)]
    names = [str(c) for c in range(num_classes)]
    row_of = {
        template.replace("{}", name): row
        for row, (name, template) in enumerate((n, t) for n in names for t in templates)
    }
    classifier = build_classifier(
        lambda texts: arrays["texts"][[row_of[text] for text in texts]], names, templates
    )
    if case.is_multilabel:
        images = arrays["images"].astype(np.float64)
        images /= np.linalg.norm(images, axis=1, keepdims=True)
        return multilabel_outcomes(keys, images @ classifier, arrays["labels"])
    return classification_outcomes_of_features(keys, arrays["images"], classifier, arrays["labels"])


def library_metrics(case: Case, logits: Any) -> dict[str, float]:
    """scikit-learn's, from scores."""
    labels, num_classes = case.arrays["labels"], case.arrays["num_classes"]
    if case.is_multilabel:
        return {"mean_average_precision": average_precision_score(labels, logits, average="macro")}
    known = np.arange(num_classes)
    metrics = {"mean_per_class_recall": balanced_accuracy_score(labels, logits.argmax(axis=1))}
    if num_classes == 2:
        metrics["roc_auc"] = roc_auc_score(labels, logits[:, 1].astype(float) - logits[:, 0])
        metrics["acc1"] = float((logits.argmax(axis=1) == labels).mean())
        return metrics
    for k in (1, 5):
        if k < num_classes:
            metrics[f"acc{k}"] = top_k_accuracy_score(labels, logits, k=k, labels=known)
    return metrics


def voc_eleven_points(case: Case, logits: Any) -> dict[str, float]:
    """PASCAL VOC 2007's average precision by its definition, one threshold after the other."""
    of_classes = []
    for c in range(case.arrays["num_classes"]):
        order = np.argsort(-logits[:, c], kind="stable")
        found = np.cumsum(case.arrays["labels"][order, c])
        precision = found / np.arange(1, len(found) + 1)
        points = [precision[10 * found >= level * found[-1]].max() for level in range(11)]
        of_classes.append(sum(points) / 11)
    return {"mean_average_precision_11": float(np.mean(of_classes))}


def compare(
    case: Case, source: str, reference: str, theirs: Mapping[str, float], outcomes: Outcomes
) -> list[dict[str, Any]]:
    """One row a metric that both have."""
    names = [name for name, value in theirs.items() if value == value]  # CLIP_benchmark's NaN acc5
    ours = metrics_of(outcomes, names)
    return [
        {
            "case": case.name,
            "source": source,
            "reference": reference,
            "metric": name,
            "ours": ours[name],
            "theirs": float(theirs[name]),
            "difference": abs(ours[name] - float(theirs[name])),
        }
        for name in names
    ]


def run_peer(python: str, case: Case, folder: Path) -> tuple[dict[str, Any], Any]:
    """CLIP_benchmark's metrics of a case with the versions, and its logits."""
    path = folder / f"{case.name}.npz"
    np.savez(path, **dict(case.arrays))
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    subprocess.run([python, str(PEER), str(path)], check=True, cwd=folder, env=environment)
    found = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    return found, None if case.is_retrieval else np.load(f"{path}.logits.npy")


def check_build(python: str, cases: list[Case], folder: Path) -> dict[str, Any]:
    """Let CLIP_benchmark's ``build`` read our result files, and compare its CSV with them."""
    results = folder / "results"
    for case in cases:
        outcomes = our_outcomes(case)
        metrics = metrics_of(outcomes, metric_names(outcomes))
        result = EvalResult(
            dataset=f"wds/{case.name}",
            model="ViT-B-32",
            pretrained="parity",
            task="zeroshot_retrieval" if case.is_retrieval else "zeroshot_classification",
            metrics=metrics,
            provenance=Provenance(num_samples=len(case.arrays["images"])),
        )
        write_outcomes(outcomes, outcomes_path(write_result(result, results)))
    table = folder / "benchmark.csv"
    subprocess.run(
        [python, "-m", "clip_benchmark.cli", "build", str(results), "--output", str(table)],
        check=True,
        cwd=folder,
    )
    with open(table, newline="", encoding="utf-8") as file:
        rows = {row["dataset"]: row for row in csv.DictReader(file)}
    written = {result.dataset: result for result in map(read_result, results.glob("*.json"))}
    largest = max(
        abs(float(rows[dataset][name]) - value)
        for dataset, result in written.items()
        for name, value in result.metrics.items()
    )
    is_same = set(rows) == set(written) and all(
        row["model_fullname"] == "ViT-B-32 parity" and row["task"] == written[dataset].task
        for dataset, row in rows.items()
    )
    return {"files": len(written), "rows": len(rows), "is_same": is_same, "difference": largest}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--peers", default=sys.executable, help="Python of the peers' environment")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"), help="folder")
    given = parser.parse_args()
    cases = make_cases()
    rows: list[dict[str, Any]] = []
    peer_versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in cases:
            found, logits = run_peer(given.peers, case, folder)
            theirs, peer_versions = found["metrics"], found["versions"]
            rows += compare(case, "features", "CLIP_benchmark", theirs, our_outcomes(case))
            if logits is None:
                continue
            same_scores = our_outcomes(case, logits)
            rows += compare(case, "scores", "CLIP_benchmark", theirs, same_scores)
            rows += compare(
                case, "scores", "scikit-learn", library_metrics(case, logits), same_scores
            )
            if case.is_multilabel:
                by_definition = voc_eleven_points(case, logits)
                rows += compare(case, "scores", "definition", by_definition, same_scores)
        build = check_build(given.peers, cases, folder)
    for row in rows:
        print(
            f"{row['case']:16}  {row['source']:8}  {row['reference']:14}  {row['metric']:26}  "
            f"{row['ours']:.8f}  {row['theirs']:.8f}  {row['difference']:.1e}"
        )
    largest = max(row["difference"] for row in rows)
    print(f"largest difference: {largest:.1e} of {LIMIT:.0e} allowed; build: {build}")
    content = {
        "surroundings": describe(["numpy", "scikit-learn", "pyarrow"]),
        "peer_versions": peer_versions,
        "limit": LIMIT,
        "largest_difference": largest,
        "build": build,
        "rows": rows,
    }
    path = Path(given.out) / "eval-parity-cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if largest <= LIMIT and build["is_same"] and build["difference"] <= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
