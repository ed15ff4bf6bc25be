"""A dataset at a URL is trained on as one on the disk: the same samples, losses and weights."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from torch.multiprocessing.spawn import ProcessExitedException

from declip_shards import DeclipError, Store, layout, sidecars
from declip_train import network_tries
from declip_train.dataset_files import RemoteStore, finished_shards, open_dataset, output_folder
from declip_train.monitor import VOLATILE, read_log
from declip_train.samples import training_samples
from declip_train.settings import TrainSettings, read_settings
from declip_train.stages import CONFIG, EXPORT_FILES, TrainModel

if TYPE_CHECKING:
    from tests.train import resume_workers as workers
    from tests.train.foreign_tars import served
    from tests.train.several_processes import run_processes
    from tests.train.training_data import write_embeddings, write_training_data
else:
    sys.path.insert(0, str(Path(__file__).parent))
    import resume_workers as workers
    from foreign_tars import served
    from several_processes import run_processes
    from training_data import write_embeddings, write_training_data

STEPS, KILLED_AT = 6, 3
SETTINGS = TrainSettings(
    model="test",
    method="declip",
    augmentation="demo",
    neighbor_feature="stored",
    projector_dim=32,
    predictor_hidden_dim=16,
    global_batch_size=16,
    max_steps=STEPS,
    warmup_steps=2,
    log_every_steps=1,
    checkpoint_every_steps=2,
    stall_seconds=0.0,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose selection drops samples, with neighbor table and embeddings."""
    root = tmp_path_factory.mktemp("data") / "data"
    write_embeddings(write_training_data(root, samples_per_shard=30, dropped=4))
    return root


@pytest.fixture
def site(data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """Its URL, and the server, which has index pages."""
    monkeypatch.setattr(network_tries, "_SECONDS_BETWEEN_TRIES", 0.001)
    with served(data.parent, lists=True) as (address, server):
        yield f"{address}/data", server


def settings_of(run: Path, url: str | None, gigabytes: float = 1.0) -> TrainSettings:
    """A run in a folder of its own, with a cache of its own."""
    run.mkdir(exist_ok=True)
    return dataclasses.replace(
        SETTINGS,
        root=str(run),
        data_root=url,
        cache=str(run / "cache"),
        cache_gigabytes=gigabytes,
    )


def test_what_is_read_is_the_same(data: Path, site: tuple[str, Any]) -> None:
    url, _ = site
    near, far = open_dataset(str(data)), open_dataset(url)
    assert isinstance(far, RemoteStore)
    assert isinstance(pickle.loads(pickle.dumps(far)), RemoteStore)
    assert finished_shards(near) == finished_shards(far) == ["00000", "00001"]
    path = layout.selection_path("default", "00001")
    assert far.read_bytes(path) == near.read_bytes(path)
    assert sidecars.read_table(far, path).equals(sidecars.read_table(near, path))
    assert far.sha256(path) == near.sha256(path)
    assert far.list("shards", ".tar") == near.list("shards", ".tar")
    for missing in ("shards/9.tar", "nowhere/at/all"):
        assert not far.exists(missing)
        assert far.list(missing) == []
        with pytest.raises(FileNotFoundError):
            far.read_bytes(missing)


@pytest.mark.parametrize("gigabytes", [1.0, 0.0], ids=["cached", "by ranges"])
def test_samples_are_the_same(
    data: Path, site: tuple[str, Any], tmp_path: Path, gigabytes: float
) -> None:
    url, server = site
    near = training_samples(settings_of(tmp_path / "near", str(data)))
    settings = settings_of(tmp_path / "far", url, gigabytes)
    far = training_samples(settings)
    assert len(near) == 2 * 26
    assert far.digest() == near.digest()
    server.asked.clear()
    assert far.read_images([7, 0, 51]) == near.read_images([7, 0, 51])
    assert bool(server.asked) == (gigabytes == 0)
    assert far.neighbor_captions_of([3, 30]) == near.neighbor_captions_of([3, 30])
    vectors = [each.stored_vectors_of([3, 30, 3], [0, 1, 0]) for each in (near, far)]
    assert vectors[0].tobytes() == vectors[1].tobytes()
    # The lists of a second start are in the cache: no table and no tar is asked for again.
    server.asked.clear()
    assert training_samples(settings).digest() == near.digest()
    assert not [name for name, _ in server.asked if name.endswith((".parquet", ".tar"))]


def test_a_server_that_is_busy_for_a_moment(
    data: Path, site: tuple[str, Any], tmp_path: Path
) -> None:
    url, server = site
    names = ("shards", "default", "00000.parquet", "HEAD 00001.parquet", "text_emb_0.npy")
    server.faults.update(dict.fromkeys(names, 2))
    far = training_samples(settings_of(tmp_path / "far", url))
    assert far.digest() == training_samples(settings_of(tmp_path / "near", str(data))).digest()
    assert not any(server.faults.values())
    server.faults["shards"] = 9
    with pytest.raises(DeclipError, match=r"'shards' of the dataset .* cannot be reached \(503"):
        training_samples(settings_of(tmp_path / "other", url))


def test_faults_are_sentences(site: tuple[str, Any], tmp_path: Path) -> None:
    url, server = site

    def refused(sentence: str, **changes: Any) -> None:
        settings = settings_of(tmp_path / "run", changes.pop("data_root", url))
        with pytest.raises(DeclipError, match=sentence):
            training_samples(dataclasses.replace(settings, **changes))

    refused("'http.*/data/none' holds no finished shard; run ingest, or", data_root=f"{url}/none")
    refused("selection 'mine' does not cover shard 00000; run the filter", selection="mine")
    refused("neighbor table 'mine' does not cover shard 00000; run the", neighbors="mine")
    refused("'mine' hold no vectors of captions", neighbor_embeddings="mine")
    refused("'nosuch://a' is of a kind that fsspec cannot open here .*s3fs", data_root="nosuch://a")
    shutil.copytree(server.folder / "data", tmp_path / "data")
    Store(str(tmp_path / "data")).write_bytes(layout.manifest_path("ingest"), b"{}")
    server.folder, server.lists = tmp_path, False
    refused("its server lists no folders, or they were removed; use a server that lists")
    refused("cannot be reached .*see that this machine may read it", data_root="http://127.0.0.1:1")


def test_outputs_need_a_disk(tmp_path: Path) -> None:
    assert output_folder(str(tmp_path)) == tmp_path
    assert output_folder(f"file://{tmp_path}") == tmp_path
    for start in (output_folder, lambda root: TrainModel(root=root).worker()("all")):
        with pytest.raises(DeclipError, match=r"no folder of this .* --train.data-root memory://x"):
            start("memory://x")
    with pytest.raises(DeclipError, match="both name what is trained on"):
        TrainSettings(data_root="memory://x", train_data=("a.tar",), method="clip")
    with pytest.raises(DeclipError, match="data_root is ''"):
        TrainSettings(data_root="")


def test_where_the_data_lie_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    one = TrainModel(root="a", data_root="s3://one/data")
    assert one.digest() == TrainModel(root="b").digest()
    assert (one.dataset, TrainModel(root="b").dataset) == ("s3://one/data", "b")
    path = tmp_path / "run" / CONFIG
    path.parent.mkdir(parents=True)
    places = {"../../data": str(tmp_path / "data"), "s3://b/d": "s3://b/d", None: None}
    for given, read in places.items():
        path.write_bytes(TrainSettings(root="..", data_root=given).to_json())
        found = read_settings(path)
        assert (found.root, found.data_root) == (str(tmp_path / "run"), read)


def train(settings: TrainSettings, *, kill: int = -1) -> None:
    """Train in a forked process; SIGKILL ends it when it is given batch ``kill``."""
    config = Path(settings.root) / "config.json"
    config.write_bytes(settings.to_json())
    run_processes(workers.train, settings.num_ranks, str(config), str(kill), "0")


def result(run: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """What the log says of every step, but for times, and the exported bytes."""
    records = {
        record["step"]: {n: v for n, v in record.items() if n not in VOLATILE}
        for record in read_log(run / "train")
        if "total" in record
    }
    weights = [name for name in EXPORT_FILES if name.endswith(".bin")]
    return list(records.values()), [(run / name).read_bytes() for name in weights]


@pytest.mark.distributed
def test_losses_and_weights_are_those_of_the_disk(
    data: Path, site: tuple[str, Any], tmp_path: Path
) -> None:
    url, server = site
    copy = tmp_path / "disk"
    shutil.copytree(data, copy)
    train(settings_of(copy, None))
    records, weights = expected = result(copy)
    assert len(records) == STEPS
    assert all(record["neighbor"] > 0 for record in records)
    assert weights

    cached = settings_of(tmp_path / "cached", url)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        train(cached, kill=KILLED_AT)
    # A run goes on wherever the data come from.
    moved = dataclasses.replace(cached, data_root=url.replace("127.0.0.1", "localhost"))
    server.asked.clear()
    train(moved)
    assert "continuing after step" in (tmp_path / "cached" / "said_0.txt").read_text()
    assert result(tmp_path / "cached") == expected

    ranges = settings_of(tmp_path / "ranges", url, gigabytes=1e-6)
    train(ranges)
    assert "pictures are fetched one by one" in (tmp_path / "ranges" / "said_0.txt").read_text()
    assert result(tmp_path / "ranges") == expected
    sizes = [path.stat().st_size for path in (tmp_path / "ranges" / "cache/tars").glob("*.tar")]
    assert len(sizes) <= 1
