"""Ingest end to end over loopback: rows conserved, bytes the same on every run, real readers."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from declip_ingest.download import ShardDownloader
from declip_ingest.failures import DECODE_REASONS, FETCH_REASONS
from declip_ingest.fetch import FetchPolicy
from declip_ingest.image_policy import ImagePolicy
from declip_ingest.stages import DownloadShards
from declip_ingest.table import table_digest
from declip_shards import DeclipError, Stage, Store, TaskStats, layout, read_samples
from declip_shards.manifest import make_receipt
from declip_shards.sidecars import read_table
from declip_shards.validation import check_shard

if TYPE_CHECKING:
    from tests.ingest.misbehaving_server import MisbehavingServer, encode, response
else:
    # conftest.py puts this folder on the path.
    from misbehaving_server import MisbehavingServer, encode, response

NUM_ROWS = 53
SHARD_SIZE = 20
IMAGE_SIZE = 32


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def make_rows(server: MisbehavingServer) -> list[dict[str, Any]]:
    """Good pictures of several kinds, with a failure of another kind as every fourth row."""
    bad: list[tuple[str, Any]] = [
        ("http_404", response(status="404 Not Found")),
        ("http_410", response(status="410 Gone")),
        ("truncated_image", response(cut(encode()))),
        ("not_image", response(b"<html>log in</html>", Content_Type="image/jpeg")),
        ("short_body", lambda conn: conn.sendall(response(encode()[:99], length=5000))),
        ("empty_body", response(b"")),
        ("timeout", server.hang),
        ("unsupported_format", response(encode("TIFF"))),
        ("forbidden_address", response(status="302 Found", Location="http://169.254.169.254/")),
        ("opted_out", response(encode(), X_Robots_Tag="noai")),
        ("bad_scheme", "file:///etc/passwd"),
        ("missing_url", None),
        ("missing_caption", response(encode())),
    ]
    rows = []
    for i in range(NUM_ROWS):
        if i % 4 == 3:
            expected, answer = bad[i // 4]
            served = answer is not None and not isinstance(answer, str)
            url = server.add(f"/bad/{i}", answer) if served else answer
        else:
            kind = ("JPEG", "PNG", "WEBP", "GIF")[i % 4]
            expected, url = "", server.add(f"/{i}", response(encode(kind, (40 + i, 50), seed=i)))
        caption = None if expected == "missing_caption" else f"picture {i}, say “üñí” \u2028 漢字"
        rows.append({"url": url, "caption": caption, "label": f"l{i}", "n": i, "x": i / 7,
                     "expected": expected})  # fmt: skip
    return rows


def make_stage(root: Path, server: MisbehavingServer, rows: list[dict[str, Any]], **settings):
    (root / "source").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "source" / "pairs.parquet")
    settings = {
        "shard_size": SHARD_SIZE,
        "image_size": IMAGE_SIZE,
        "resize_mode": "border",
        "timeout_seconds": 2.0,
        "retries": 0,
        "allow_addresses": (server.address,),
        **settings,
    }
    return DownloadShards(root=str(root), **settings)


def run(stage: DownloadShards) -> list[TaskStats]:
    work = stage.worker()
    assert isinstance(work, ShardDownloader)
    try:
        return [work(task) for task in stage.tasks()]
    finally:
        work.close()


def hashes(root: Path) -> dict[str, str]:
    """Digest of every file that a receipt hashes."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted((root / "shards").iterdir())
        if not p.name.endswith("_stats.json")
    }


@pytest.fixture
def ingested(server, tmp_path):
    rows = make_rows(server)
    stage = make_stage(tmp_path, server, rows)
    return stage, rows, run(stage)


def all_rows(stage: DownloadShards) -> list[dict[str, Any]]:
    store = Store(stage.root)
    tables = [read_table(store, layout.shard_parquet_path(task)) for task in stage.tasks()]
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return rows


def test_the_stage_has_the_five_members():
    stage = DownloadShards(root="x")
    assert isinstance(stage, Stage)
    assert pickle.loads(pickle.dumps(stage)) == stage, "Ray sends it so"
    assert (stage.num_cpus, stage.num_gpus) == (1, 0)


def test_every_row_is_accounted_for_under_its_reason(ingested):
    stage, rows, stats = ingested
    assert sum(s.num_in for s in stats) == NUM_ROWS
    reasons: Counter[str] = sum((Counter(s.reasons) for s in stats), Counter())
    assert reasons == Counter(r["expected"] for r in rows if r["expected"])
    store = Store(stage.root)
    for task, one in zip(stage.tasks(), stats):
        assert one.num_in == one.num_out + sum(one.reasons.values())
        assert make_receipt(store, task, "f", one).num_out == one.num_out
        assert check_shard(store, task) == []
        assert stage.is_done(task)
    for row in all_rows(stage):
        reason = (row["error_message"] or "").partition(":")[0]
        assert reason == row["expected"]
        table = {"failed_to_download": FETCH_REASONS, "failed_to_resize": DECODE_REASONS}
        if row["status"] != "success":
            assert reason.startswith("http_") or reason in table[row["status"]]
            assert row["sha256"] is row["width"] is None


def test_the_table_comes_back_out_of_the_shards(ingested):
    """url, caption and every carried column, untouched, in the table's order; keys number them."""
    stage, rows, _ = ingested
    found = all_rows(stage)
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    assert [row["key"] for row in found] == [
        layout.sample_key(i // SHARD_SIZE, i % SHARD_SIZE, SHARD_SIZE) for i in range(NUM_ROWS)
    ]


def test_samples_are_the_pictures_with_their_own_rows(ingested, server):
    stage, rows, _ = ingested
    store = Store(stage.root)
    by_key = {row["key"]: row for row in all_rows(stage)}
    count = 0
    for task in stage.tasks():
        for sample in read_samples(store, task):
            row = by_key[sample.key]
            assert sample.metadata == row
            assert sample.caption == row["caption"]
            body = server.routes["/" + row["url"].rpartition("/")[2]].partition(b"\r\n\r\n")[2]
            assert row["sha256"] == hashlib.sha256(body).hexdigest()
            original = Image.open(io.BytesIO(body))
            assert (row["original_width"], row["original_height"]) == original.size
            stored = Image.open(io.BytesIO(sample.image))
            assert (stored.format, stored.mode) == ("JPEG", "RGB")
            assert stored.size == (row["width"], row["height"]) == (IMAGE_SIZE, IMAGE_SIZE)
            count += 1
    assert count == sum(not row["expected"] for row in rows)


def test_stats_have_img2datasets_keys_and_are_not_hashed(ingested):
    stage, _, stats = ingested
    for task, one in zip(stage.tasks(), stats):
        text = Store(stage.root).read_bytes(layout.shard_stats_path(task))
        value = json.loads(text)
        assert set(value) == {
            "count", "successes", "failed_to_download", "failed_to_resize",
            "duration", "start_time", "end_time", "status_dict",
        }  # fmt: skip
        assert value["count"] == one.num_in == sum(value["status_dict"].values())
        assert value["successes"] == one.num_out
        assert layout.shard_stats_path(task) in one.volatile_files
        assert layout.shard_stats_path(task) not in one.files


def test_a_rerun_gives_the_same_bytes_whatever_the_threads(ingested, server, tmp_path):
    stage, rows, first = ingested
    before = hashes(tmp_path)
    for threads in (1, 7):
        again = make_stage(tmp_path / f"again{threads}", server, rows, thread_count=threads)
        assert run(again) == first
        assert hashes(tmp_path / f"again{threads}") == before
    work = stage.worker()
    for task in reversed(stage.tasks()):
        work(task)
    assert hashes(tmp_path) == before


def test_killed_at_any_moment_and_rerun_gives_the_same_bytes(server, tmp_path):
    rows = [row for row in make_rows(server) if row["expected"] != "timeout"]
    clean = make_stage(tmp_path / "clean", server, rows)
    run(clean)
    torn = make_stage(tmp_path / "torn", server, rows)
    script = (
        "import json, sys\n"
        "from declip_ingest.stages import DownloadShards\n"
        "settings = json.loads(sys.argv[1])\n"
        "settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}\n"
        "stage = DownloadShards(**settings)\n"
        "work = stage.worker()\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for task in stage.tasks(): work(task)\n"
    )
    settings = json.dumps(dataclasses.asdict(torn))
    with subprocess.Popen(
        [sys.executable, "-c", script, settings], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGKILL)
    # What is under its final name is whole: a tar reads to its end, a done shard checks out.
    for task in torn.tasks():
        if Store(torn.root).exists(layout.tar_path(task)):
            list(read_samples(Store(torn.root), task))
        if torn.is_done(task):
            assert check_shard(Store(torn.root), task) == []
    run(torn)
    expected = hashes(tmp_path / "clean")
    found = {k: v for k, v in hashes(tmp_path / "torn").items() if ".part-" not in k}
    assert found == expected


def test_a_shard_is_not_done_without_each_of_its_files(ingested):
    stage, _, _ = ingested
    store = Store(stage.root)
    for path in (layout.tar_path, layout.shard_parquet_path, layout.shard_stats_path):
        kept = store.read_bytes(path("00001"))
        store.remove(path("00001"))
        assert not stage.is_done("00001")
        assert stage.is_done("00000")
        store.write_bytes(path("00001"), kept)
        assert stage.is_done("00001")


def test_one_slow_row_does_not_hold_up_the_others(server, tmp_path, stopwatch):
    """Forty rows that each hang for 0.5 s: one after another they would take 20 s."""
    rows = [
        {"url": server.add(f"/{i}", server.hang), "caption": "x", "expected": "timeout"}
        for i in range(40)
    ]
    stage = make_stage(tmp_path, server, rows, timeout_seconds=0.5, shard_size=40, thread_count=20)
    work = stage.worker()
    start = stopwatch()
    assert work("00000").reasons == {"timeout": 40}
    assert stopwatch() - start < 5


def test_values_that_json_lacks_are_spelled_out(server, tmp_path):
    import datetime
    import decimal

    url = server.add("/1", response(encode()))
    table = pa.table(
        {
            "url": [url],
            "caption": ["x"],
            "when": [datetime.datetime(2020, 1, 2, 3, 4, 5)],
            "price": [decimal.Decimal("1.50")],
            "score": [float("nan")],
            "tags": [["a", "b"]],
        }
    )
    (tmp_path / "source").mkdir()
    pq.write_table(table, tmp_path / "source/pairs.parquet")
    stage = DownloadShards(root=str(tmp_path), allow_addresses=(server.address,), image_size=32)
    run(stage)
    meta = next(read_samples(Store(str(tmp_path)), "00000")).metadata
    assert meta["when"] == "2020-01-02T03:04:05"
    assert (meta["price"], meta["score"], meta["tags"]) == ("1.50", None, ["a", "b"])
    kept = read_table(Store(str(tmp_path)), "shards/00000.parquet").select(table.column_names)
    assert kept.drop(["score"]).to_pylist() == table.drop(["score"]).to_pylist()
    assert np.isnan(kept["score"][0].as_py())


def test_a_store_that_is_no_local_folder_will_do(server, tmp_path):
    rows = [{"url": server.add("/1", response(encode())), "caption": "x"}]
    store = Store("memory://ingest-test")
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    store.write_bytes("source/pairs.parquet", sink.getvalue())
    stage = DownloadShards(root="memory://ingest-test", allow_addresses=(server.address,))
    assert [s.num_out for s in run(stage)] == [1]
    assert check_shard(store, "00000") == []


def test_a_table_may_lie_anywhere_but_relative_means_the_dataset(server, tmp_path):
    rows = [{"url": server.add("/1", response(encode())), "caption": "x"}]
    make_stage(tmp_path, server, rows)
    outside = DownloadShards(root=str(tmp_path / "other"), table=f"{tmp_path}/source/pairs.parquet")
    assert outside.tasks() == ["00000"]
    with pytest.raises(DeclipError, match=r"'\.\./pairs\.parquet' is taken from the dataset's"):
        DownloadShards(root=str(tmp_path), table="../pairs.parquet").tasks()
    with pytest.raises(DeclipError, match="does not exist"):
        DownloadShards(root=str(tmp_path), table="source/nothing.parquet").tasks()


def test_a_table_that_changed_since_the_plan_is_refused(server, tmp_path):
    rows = [{"url": server.add("/1", response(encode())), "caption": "x"}]
    stage = make_stage(tmp_path, server, rows)
    planned = dataclasses.replace(stage, table_sha256=table_digest(stage.table_location()))
    assert planned.tasks() == ["00000"]
    make_stage(tmp_path, server, rows * 2)
    with pytest.raises(DeclipError, match="has changed"):
        planned.tasks()
    with pytest.raises(DeclipError, match="has changed"):
        planned.worker()


def test_a_bad_table_stops_before_anything_is_fetched(server, tmp_path):
    rows = [{"url": server.add("/1", response(encode())), "caption": 7}]
    stage = make_stage(tmp_path, server, rows)
    with pytest.raises(DeclipError, match="must hold text, but row 0"):
        stage.tasks()
    assert not server.hits
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("shard_size", 0),
        ("thread_count", 0),
        ("table_sha256", "abc"),
        ("image_size", -1),
        ("resize_mode", "stretch"),
        ("timeout_seconds", 0.0),
        ("retries", -1),
        ("allow_addresses", ("127.0.0.1",)),
    ],
)
def test_a_wrong_setting_is_refused_when_the_stage_is_made(setting, value):
    with pytest.raises(DeclipError) as caught:
        DownloadShards(root="x", **{setting: value})
    assert setting in str(caught.value)


@pytest.mark.parametrize("policy", [FetchPolicy, ImagePolicy])
def test_every_setting_of_the_policies_is_a_setting_of_the_stage(policy):
    mine: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(DownloadShards)}
    for f in dataclasses.fields(policy):
        assert f.name in mine
        assert mine[f.name] == f.default, f.name


def test_every_setting_is_explained():
    import ast
    import inspect

    body = ast.parse(inspect.getsource(DownloadShards)).body[0].body  # type: ignore[attr-defined]
    explained = {
        node.target.id  # type: ignore[union-attr]
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    assert {f.name for f in dataclasses.fields(DownloadShards)} <= explained


@pytest.mark.parametrize("pattern", ["brace", "list"])
def test_webdatasets_reader_yields_exactly_our_samples(ingested, pattern):
    import webdataset

    stage, _, stats = ingested
    folder = Path(stage.root) / "shards"
    last = stage.tasks()[-1]
    urls = (
        f"{folder}/{{00000..{last}}}.tar"
        if pattern == "brace"
        else [str(folder / f"{task}.tar") for task in stage.tasks()]
    )
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    found = list(dataset.decode("pil").to_tuple("jpg", "txt", "json"))
    ours = [s for task in stage.tasks() for s in read_samples(Store(stage.root), task)]
    assert len(found) == len(ours) == sum(s.num_out for s in stats)
    for (image, text, meta), sample in zip(found, ours):
        assert text == sample.caption
        assert meta == sample.metadata
        assert np.array_equal(
            np.asarray(image), np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB"))
        )
