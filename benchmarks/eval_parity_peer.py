"""CLIP_benchmark's own metric code, in the peers' environment: ``eval_parity_peer.py REQUEST.npz``.

Its `evaluate` functions run whole. They need a model, a loader and a tokenizer; these here look the
features up: an image is its row number, a token sequence the row number of its text.
"""

import json
import sys
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

BATCH = 64
PACKAGES = ("clip_benchmark", "scikit-learn", "torch", "numpy")


class LookedUp:
    """A model and tokenizer of rows."""

    def __init__(self, images: Any, texts: Any, names: list[str]) -> None:
        self.images, self.texts = torch.from_numpy(images), torch.from_numpy(texts)
        self.row_of = {name: row for row, name in enumerate(names)}

    def encode_image(self, rows: Any) -> Any:
        return self.images[rows]

    def encode_text(self, rows: Any) -> Any:
        return self.texts[rows]

    def tokenize(self, texts: list[str]) -> Any:
        return torch.tensor([self.row_of[text] for text in texts])


class Loader(list[Any]):
    """Batches, with the classes of their dataset."""

    def __init__(self, batches: list[Any], classes: list[str]) -> None:
        super().__init__(batches)
        self.dataset = SimpleNamespace(classes=classes)


def batches(num_rows: int) -> list[Any]:
    return list(torch.arange(num_rows).split(BATCH))


def classify(given: Any) -> dict[str, Any]:
    """Metrics of `zeroshot_classification.evaluate`, and the logits that they were computed from.

    Names of classes are their numbers, templates are "p0 of {c}", "p1 of {c}", ...
    """
    num_classes, num_templates = int(given["num_classes"]), int(given["num_templates"])
    classes = [str(c) for c in range(num_classes)]
    templates = [f"p{t} of {{c}}" for t in range(num_templates)]
    names = [template.format(c=c) for c in classes for template in templates]
    model = LookedUp(given["images"], given["texts"], names)
    labels = torch.from_numpy(given["labels"])
    loader = Loader([(rows, labels[rows]) for rows in batches(len(labels))], classes)
    metrics = zeroshot_classification.evaluate(
        model, loader, model.tokenize, classes, templates, "cpu", amp=False
    )
    classifier = zeroshot_classification.zero_shot_classifier(
        model, model.tokenize, classes, templates, "cpu", amp=False
    )
    logits, _ = zeroshot_classification.run_classification(
        model, classifier, loader, "cpu", amp=False
    )
    return {"metrics": metrics, "logits": logits.numpy()}


def retrieve(given: Any) -> dict[str, Any]:
    """Metrics of `zeroshot_retrieval.evaluate`; image n has the texts n * m to n * m + m - 1."""
    images, texts = given["images"], given["texts"]
    a_picture = len(texts) // len(images)
    model = LookedUp(images, texts, [str(row) for row in range(len(texts))])
    loader = [
        (rows, [[str(row * a_picture + n) for n in range(a_picture)] for row in rows.tolist()])
        for rows in batches(len(images))
    ]
    metrics = zeroshot_retrieval.evaluate(
        model, loader, model.tokenize, "cpu", amp=False, recall_k_list=given["recall_k"].tolist()
    )
    return {"metrics": metrics}


def main() -> None:
    path = sys.argv[1]
    with np.load(path) as given:
        found = retrieve(given) if "recall_k" in given else classify(given)
    if "logits" in found:
        np.save(path + ".logits.npy", found["logits"])
    with open(path + ".json", "w", encoding="utf-8") as file:
        versions = {name: version(name) for name in PACKAGES}
        json.dump({"metrics": found["metrics"], "versions": versions}, file)


if __name__ == "__main__":
    main()
