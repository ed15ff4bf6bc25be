"""One run of one downloader, in a process of its own; started by ingest.py.

    python benchmarks/ingest_worker.py ours|peer SETTINGS.json

SETTINGS holds ``out`` (a folder), ``table`` (parquet of url and caption), ``shard_size``,
``threads``, ``allow`` (host:port that may be reached), ``settings`` (further fields of
DownloadShards, or arguments of img2dataset), ``without`` (parts of ours to take out, see PARTS) and
``marks``, a file to which each shard adds a line: its seconds, and the processor time of this
process and all below it. Ours runs as on a cluster's worker: ``DownloadShards(...).worker()``
called for one shard after the other; Ray itself takes no part.
"""

import asyncio
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks import process_tree
else:
    import process_tree

PARTS = ("decoder_process", "ledger")
"""What has no switch of its own and is taken out by replacing it."""


@contextlib.contextmanager
def marked(path: str) -> Iterator[None]:
    """Write down what the block took."""
    start, cpu = time.monotonic(), process_tree.cpu_seconds(os.getpid())
    yield
    cpu = process_tree.cpu_seconds(os.getpid()) - cpu
    line = {"seconds": time.monotonic() - start, "cpu_seconds": cpu}
    with open(path, "a") as marks:
        marks.write(json.dumps(line) + "\n")


def _without_decoder_process() -> None:
    """Decode in a thread-free call on the loop itself: no child, no time-out, no memory limit."""
    from declip_ingest import download
    from declip_ingest.decode import ImageNormalizer
    from declip_ingest.image_policy import DecodedImage, ImagePolicy

    class InProcess:
        def __init__(self, policy: ImagePolicy, **_limits: object) -> None:
            self._normalize = ImageNormalizer(policy)

        async def decode(self, data: bytes, boxes: Sequence[Any] = ()) -> DecodedImage:
            await asyncio.sleep(0)
            return self._normalize(data, boxes)

        async def __aenter__(self) -> "InProcess":
            return self

        async def __aexit__(self, *_: object) -> None:
            return None

    setattr(download, "DecoderPool", InProcess)  # noqa: B010 - mypy holds classes for constants


def _without_ledger() -> None:
    from declip_ingest import download

    def write_nothing(*_args: object) -> None:
        return None

    setattr(download, "write_ledger", write_nothing)  # noqa: B010


def run_ours(given: dict[str, Any]) -> None:
    """Download every shard of the table."""
    from declip_ingest.stages import DownloadShards

    removers: dict[str, Callable[[], None]] = {
        "decoder_process": _without_decoder_process,
        "ledger": _without_ledger,
    }
    for part in given["without"]:
        removers[part]()
    changed: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given["settings"].items()
    }
    stage = DownloadShards(
        root=given["out"],
        table=given["table"],
        shard_size=given["shard_size"],
        thread_count=given["threads"],
        allow_addresses=tuple(given["allow"]),
        **changed,
    )
    work: Any = stage.worker()
    for task in stage.tasks():
        with marked(given["marks"]):
            work(task)
    work.close()


def run_peer(given: dict[str, Any]) -> None:
    """img2dataset's own entry point, one process."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    os.environ["INGEST_MARKS"] = given["marks"]  # its own worker process is another one
    import img2dataset

    peer = importlib.import_module("ingest_peer")

    # The package's attribute ``main`` is a function that hides the module of that name.
    setattr(sys.modules["img2dataset.main"], "Downloader", peer.MarkedDownloader)  # noqa: B010
    img2dataset.download(
        url_list=given["table"],
        output_folder=str(Path(given["out"], "shards")),
        input_format="parquet",
        url_col="url",
        caption_col="caption",
        output_format="webdataset",
        processes_count=1,
        thread_count=given["threads"],
        number_sample_per_shard=given["shard_size"],
        enable_wandb=False,
        **given["settings"],
    )


if __name__ == "__main__":
    {"ours": run_ours, "peer": run_peer}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
