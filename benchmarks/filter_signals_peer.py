"""What data-juicer's own operators cost, for filter_signals.py: run in an environment of its own.

    PEER/bin/python benchmarks/filter_signals_peer.py FOLDER ROUNDS

FOLDER holds ``captions.json`` (a list of texts) and ``pictures/*.jpg``. Prints one line of JSON:
the processor seconds an item by operator, the least of the rounds. An operator's statistics are
computed as its executor does it, in batches of 1,000 (``compute_stats_batched``).
"""

import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH = 1000
STATS = "__dj__stats__"
TEXT = ("text_length", "words_num", "alphanumeric", "special_characters", "word_repetition",
        "character_repetition")  # fmt: skip
IMAGE = ("image_shape", "image_aspect_ratio", "image_size")


def load(name: str) -> Any:
    """An operator by its name, with its own defaults."""
    module = importlib.import_module(f"data_juicer.ops.filter.{name}_filter")
    return getattr(module, "".join(part.title() for part in f"{name}_filter".split("_")))()


def batches(column: str, values: list[Any]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(values), BATCH):
        part = values[start : start + BATCH]
        yield {column: part, STATS: [{} for _ in part]}


def seconds(name: str, column: str, values: list[Any], rounds: int) -> float:
    """Least processor time an item."""
    operator = load(name)
    found = []
    for _ in range(rounds + 1):  # the first one loads what it needs
        start = time.process_time()
        for batch in batches(column, values):
            operator.compute_stats_batched(batch)
        found.append((time.process_time() - start) / len(values))
    return min(found[1:])


def main() -> None:
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    captions = json.loads((folder / "captions.json").read_text())
    pictures = [[str(path)] for path in sorted((folder / "pictures").iterdir())]
    result = {name: seconds(name, "text", captions, rounds) for name in TEXT}
    result |= {name: seconds(name, "images", pictures, rounds) for name in IMAGE}
    version = importlib.metadata.version("py-data-juicer")
    print(json.dumps({"version": version, "seconds": result}))


if __name__ == "__main__":
    main()
