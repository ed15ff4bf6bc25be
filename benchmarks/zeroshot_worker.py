"""Zero-shot evaluation by ours, in a process of its own: ``zeroshot_worker.py REQUEST.json``.

The clock starts when the packages are imported and the model is loaded, as for the peer
(zeroshot_peer.py): listing the set, tokenizing, encoding, classifying.
"""

import itertools
import json
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from declip_eval.labelled_sets import open_labelled_set
from declip_eval.zeroshot import zeroshot_classification
from pipelines.eval_contents import ContentHashes
from pipelines.eval_models import EvalModel, ImageFeatures, load_eval_model
from pipelines.eval_ranks import Ranks
from pipelines.eval_views import ViewCache

CHUNK = 512
"""Pictures at once."""


def processor_seconds() -> float:
    """Of this process, all threads, and of those that it waited for."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def evaluate(given: dict[str, Any], model: EvalModel) -> dict[str, Any]:
    """The whole evaluation; seconds by part. The similarities go to a file."""
    marks = [("", time.perf_counter(), processor_seconds())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter(), processor_seconds()))

    data = open_labelled_set(given["root"], "benchmark", "test", cache=None)
    root = Path(given["cache"])
    digest = ContentHashes(root, Ranks(), given["threads"]).digest(data)
    cache = ViewCache(root / "views", digest, model.preparation, given["cache_bytes"])
    mark("list")
    classifier = model.classifier([(name,) for name in given["classes"]], given["templates"])
    mark("classifier")
    parts = []
    for start in range(0, len(data), CHUNK):
        rows = range(start, min(start + CHUNK, len(data)))
        read = partial(data.read_images, rows)
        views, reasons = cache.get(rows.start, rows.stop, read, given["threads"])
        if any(reasons):
            raise SystemExit(f"a picture cannot be read: {next(filter(None, reasons))}")
        mark("views")
        found = model.encode(views)
        assert isinstance(found, ImageFeatures)
        parts.append(found.features)
        mark("encode")
    images = np.concatenate(parts)
    scores = images @ classifier
    assert data.labels is not None
    metrics = zeroshot_classification(images, classifier, data.labels).metrics
    mark("classify")
    np.save(given["scores"], scores)
    by_part: dict[str, float] = {}
    for before, after in itertools.pairwise(marks):
        by_part[after[0]] = by_part.get(after[0], 0.0) + after[2] - before[2]
    return {
        "wall_seconds": marks[-1][1] - marks[0][1],
        "processor_seconds": marks[-1][2] - marks[0][2],
        "by_part": by_part,
        "acc1": metrics["acc1"],
    }


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_bytes())
    torch.set_num_threads(given["threads"])
    model = load_eval_model(given["model"], num_threads=given["threads"])
    print(json.dumps(evaluate(given, model)))


if __name__ == "__main__":
    main()
