"""One run of our loader, in a process of its own: ``loader_worker.py ROOT RUN OPTIONS``.

Views of 224 pixels and token ids in batches of 128, as the trainer takes them; nothing is kept
decoded from one pass to the next. "for a GPU" hands over 8-bit views, whose colors the GPU changes
in batches; "on the CPU" does it all. Two views are DeCLIP's, with its masked and second captions,
which the peer's two views lack. The process keeps the memory that it frees, as training on CPUs
does: fresh pages for float32 batches would cost a quarter of a millisecond a view.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from declip_shards.allocator import keep_freed_memory
from declip_train.loader import BatchLoader
from declip_train.samples import training_samples
from declip_train.settings import TrainSettings

if TYPE_CHECKING:
    from benchmarks.loader_measure import measure
else:
    from loader_measure import measure

BATCH = 128
OPEN_CLIP_CROP = 0.9
"""Least share of the area, as open_clip crops unless told otherwise."""
RUNS: dict[str, dict[str, Any]] = {
    "one view, for a GPU": {"method": "clip", "photometric": "device"},
    "one view, on the CPU": {"method": "clip", "photometric": "cpu"},
    "one view, plain Python": {"method": "clip", "photometric": "cpu", "decoder": "python"},
    "two views, for a GPU": {"method": "declip", "photometric": "device"},
    "two views, on the CPU": {"method": "declip", "photometric": "cpu"},
}


def run_settings(root: str, run: str, *, threads: int, cache: Path) -> TrainSettings:
    """Settings of one of ``RUNS``."""
    given = dict(RUNS[run])
    if given["method"] == "clip":
        given |= {"augmentation": "light", "crop_scale_min": OPEN_CLIP_CROP}
    else:
        given |= {"neighbor_source": "bank"}
    return TrainSettings(
        root=root,
        selection="",
        model="ViT-B-32",
        global_batch_size=BATCH,
        max_steps=10**9,
        warmup_steps=1,
        loader_threads=threads,
        decoded_cache_megabytes=0,
        cache=str(cache),
        **given,
    )


def main() -> None:
    root, run, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    keep_freed_memory()

    def start() -> Iterator[int]:
        cache = Path(options["cache"])
        settings = run_settings(root, run, threads=options["threads"], cache=cache)
        loader = BatchLoader(training_samples(settings), settings, 0, 1)
        return (len(batch) for batch in loader.batches(0))

    row = measure(
        start,
        warm_up=options["warm_up"],
        samples=options["samples"],
        minutes=options["minutes"],
    )
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
