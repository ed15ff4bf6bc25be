"""Zero-shot evaluation by open_clip, in the peers' environment: ``zeroshot_peer.py REQUEST.json``.

Its own parts, as ``open_clip_train.main`` puts them together: torchvision's ImageFolder with the
model's own preprocessing in a DataLoader, `build_zero_shot_classifier` with ten classes at a time,
and the loop of ``open_clip_train.zero_shot.run``, but that it keeps the similarities. The clock
starts when the packages are imported and the model is loaded.
"""

import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


def processor_seconds() -> float:
    """Of this process, all threads, and of those that it waited for."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def evaluate(given: dict[str, Any], model: Any, preprocess: Any) -> dict[str, Any]:
    """The whole evaluation; seconds by part. The similarities go to a file."""
    marks = [("", time.perf_counter(), processor_seconds())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter(), processor_seconds()))

    dataset = ImageFolder(str(Path(given["root"]) / "test"), transform=preprocess)
    loader = DataLoader(dataset, batch_size=given["batch"], num_workers=given["workers"])
    mark("list")
    classifier = open_clip.build_zero_shot_classifier(
        model,
        tokenizer=open_clip.get_tokenizer(f"local-dir:{given['model']}"),
        classnames=given["classes"],
        templates=given["templates"],
        num_classes_per_batch=10,
        device="cpu",
    )
    mark("classifier")
    top1, scores = 0.0, []
    with torch.inference_mode():
        for images, target in loader:
            output = model(image=images)
            features = output["image_features"] if isinstance(output, dict) else output[0]
            logits = 100.0 * features @ classifier
            best = logits.topk(5, 1, True, True)[1]
            top1 += float((best[:, 0] == target).sum())
            scores.append(logits / 100.0)
    mark("images")
    np.save(given["scores"], torch.cat(scores).numpy())
    return {
        "wall_seconds": marks[-1][1] - marks[0][1],
        "processor_seconds": marks[-1][2] - marks[0][2],
        "by_part": {after[0]: after[2] - before[2] for before, after in itertools.pairwise(marks)},
        "acc1": top1 / len(dataset),
    }


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_bytes())
    torch.set_num_threads(given["threads"])
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{given['model']}")
    model.eval()
    print(json.dumps(evaluate(given, model, preprocess)))


if __name__ == "__main__":
    main()
