"""Other people's readers over our folder: they take it for their own, and read every sample.

tests/ingest/test_stages.py has img2dataset's incremental mode over a folder that ingest made; here
it meets one out of which samples were taken. benchmarks/read_by_energon.py is for Megatron-Energon,
which needs an environment of its own.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from declip_shards import Store, layout, sidecars
from declip_shards.export_files import export
from declip_shards.fakes import write_fake_dataset
from declip_shards.optout import drop_from_shard

PER_SHARD, NUM_SHARDS = 20, 3
GONE = {"0000003", "0000110"}
STAND_IN = Path(__file__).parents[1] / "train"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three shards with failures, out of which two samples were taken, ready for open_clip."""
    root = str(tmp_path_factory.mktemp("clients") / "data")
    numbers = iter(range(1000))
    store = write_fake_dataset(
        root,
        num_shards=NUM_SHARDS,
        samples_per_shard=PER_SHARD,
        fail_every=7,
        caption=lambda color, shape: f"{color} {shape}, number {next(numbers)}: naïve “quotes” 雪",
    )
    for shard in layout.list_shards(store):
        for path, data in drop_from_shard(store, shard, GONE).items():
            assert data is not None
            store.write_bytes(path, data)
    export(store, Store(store.path("shards")), "energon")
    return store


def successes(store: Store) -> dict[str, str]:
    """Key -> caption of every success that the tables list."""
    return {
        row["key"]: row["caption"]
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.shard_parquet_path(shard))
        if row["status"] == "success"
    }


def run_script(script: str, *arguments: str, **environment: str) -> Any:
    """The JSON that a Python script prints last, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


WEBDATASET = """
import json, pickle, subprocess, sys
import webdataset
def refuse(*args, **kwargs):
    raise AssertionError("our shards need no pipe and no pickle")
subprocess.Popen = pickle.loads = refuse
dataset = webdataset.WebDataset(sys.argv[1], shardshuffle=False).decode("pilrgb")
found = [(s["__key__"], s["txt"], s["json"]["key"], list(s["jpg"].size)) for s in dataset]
print(json.dumps(found))
"""


def test_webdataset_yields_exactly_the_successes_without_pipe_or_pickle(dataset):
    """WDS_SECURE=1, which forbids both, is unknown to 0.2.111: the script forbids them itself."""
    pattern = f"{dataset.path('shards')}/{{00000..{NUM_SHARDS - 1:05d}}}.tar"
    found = run_script(WEBDATASET, pattern, WDS_SECURE="1")
    assert {key: caption for key, caption, _, _ in found} == successes(dataset)
    assert [key for key, *_ in found] == sorted(successes(dataset))
    assert all(key == named and size == [32, 32] for key, _, named, size in found)


OPEN_CLIP = """
import functools, json, sys, types
sys.path.insert(0, sys.argv[2])
import torchvision_stand_in
torchvision_stand_in.install()
datasets = types.ModuleType("torchvision.datasets")
sys.modules["torchvision"].datasets = sys.modules["torchvision.datasets"] = datasets
from types import SimpleNamespace
import numpy, torch
from open_clip_train import data
from open_clip_train.data import get_dataset_size, get_wds_dataset
# open_clip 3.3.0 asks for webdataset <= 0.2.86; later ones mark a tar's end by an empty sample.
data.tar_file_expander = functools.partial(data.tar_file_expander, eof_value=None)
texts = []
def tokenize(text):
    texts.append(text)
    return torch.tensor([[len(texts) - 1]])
def preprocess(image):
    return torch.from_numpy(numpy.asarray(image).copy())
args = SimpleNamespace(
    train_data=sys.argv[1], val_data=sys.argv[1], train_num_samples=None, val_num_samples=None,
    train_data_upsampling_factors=None, dataset_resampled=False, batch_size=8, workers=0,
    world_size=1, seed=0)
size = get_dataset_size(sys.argv[1])
seen, shapes = [], set()
for images, ids in get_wds_dataset(args, preprocess, is_train=False, tokenizer=tokenize).dataloader:
    seen += [texts[int(i)] for i in ids.flatten()]
    shapes.add(tuple(images.shape[1:]))
training = get_wds_dataset(args, preprocess, is_train=True, tokenizer=tokenize)
num_trained = sum(len(ids) for _, ids in training.dataloader)
print(json.dumps([size, seen, sorted(shapes), training.dataloader.num_samples, num_trained]))
"""


@pytest.mark.slow
def test_open_clips_loader_yields_exactly_the_successes(dataset):
    """Its own get_wds_dataset; the number of samples from what lies beside the tars."""
    folder = dataset.path("shards")
    pattern = f"{folder}/{{00000..{NUM_SHARDS - 1:05d}}}.tar"
    size, seen, shapes, num_planned, num_trained = run_script(OPEN_CLIP, pattern, str(STAND_IN))
    expected = successes(dataset)
    assert size == [len(expected), NUM_SHARDS]
    assert sorted(seen) == sorted(expected.values())
    assert shapes == [[32, 32, 3]]
    assert num_planned == num_trained == -(-len(expected) // 8) * 8


class CountingServer(http.server.ThreadingHTTPServer):
    """Counts whoever asks for anything."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CountingHandler)
        self.hits = 0


class CountingHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, CountingServer)
        self.server.hits += 1
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[CountingServer]:
    with CountingServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


IMG2DATASET = """
import json, sys
from img2dataset import download
if __name__ == "__main__":
    table, folders = sys.argv[1], json.loads(sys.argv[2])
    for form, folder in folders.items():
        download(url_list=table, output_folder=folder, input_format="parquet",
            url_col="url", caption_col="caption", output_format=form, processes_count=1,
            thread_count=1, image_size=32, number_sample_per_shard=int(sys.argv[3]),
            incremental_mode="incremental")
    print(json.dumps("done"))
"""


@pytest.mark.slow
def test_img2datasets_incremental_run_skips_all(dataset, server, tmp_path):
    """Over our shards after an opt-out, and over both of its other forms that we export."""
    folders = {"webdataset": dataset.path("shards")}
    for form in ("files", "parquet"):
        folders[form] = str(tmp_path / form)
        export(dataset, Store(folders[form]), form)
    urls = [f"http://127.0.0.1:{server.server_port}/{n}.jpg" for n in range(NUM_SHARDS * PER_SHARD)]
    table = pa.table({"url": urls, "caption": [f"caption {url}" for url in urls]})
    Store(str(tmp_path)).write_bytes("list.parquet", sidecars.pack_table(table))
    before = {form: files_of(folder) for form, folder in folders.items()}
    list_path = str(tmp_path / "list.parquet")
    assert run_script(IMG2DATASET, list_path, json.dumps(folders), str(PER_SHARD)) == "done"
    assert server.hits == 0
    assert {form: files_of(folder) for form, folder in folders.items()} == before


def files_of(folder: str) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of every file."""
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}
