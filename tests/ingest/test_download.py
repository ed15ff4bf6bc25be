"""A shard's download: fair to hosts, deaf to order, and loud when the fault is ours."""

import asyncio
import dataclasses
import hashlib
import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_ingest.decoder_pool import DecoderPool
from declip_ingest.download import HostQueue, RowOutcome, ShardDownloader
from declip_ingest.failures import DecodeError, FetchError
from declip_ingest.fetch import Fetcher
from declip_ingest.ledger import read_ledger
from declip_ingest.stages import DownloadShards
from declip_shards import DeclipError, Store, layout, read_samples
from declip_shards.sidecars import read_rows

if TYPE_CHECKING:
    from tests.ingest.misbehaving_server import MisbehavingServer, encode, response
else:
    # conftest.py puts this folder on the path.
    from misbehaving_server import MisbehavingServer, encode, response


@settings(max_examples=50, deadline=None)
@given(
    hosts=st.lists(st.integers(0, 4), max_size=40),
    per_host=st.integers(1, 4),
    num_workers=st.integers(1, 12),
    seed=st.integers(0, 999),
)
def test_every_row_comes_once_and_no_host_has_more_than_its_share(
    hosts: list[int], per_host: int, num_workers: int, seed: int
) -> None:
    rows = [{"key": str(i), "url": f"http://h{host}/{i}"} for i, host in enumerate(hosts)]
    chance, seen, most = random.Random(seed), [], Counter[str]()

    async def run() -> None:
        queue, active = HostQueue(rows, per_host), Counter[str]()

        async def work() -> None:
            while (row := await queue.next()) is not None:
                host = row["url"].split("/")[2]
                active[host] += 1
                most[host] = max(most[host], active[host])
                seen.append(row["key"])
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
                active[host] -= 1
                queue.done(row)

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for _ in range(num_workers):
                group.create_task(work())

    asyncio.run(run())
    assert sorted(seen, key=int) == [row["key"] for row in rows]
    assert all(count <= per_host for count in most.values())


def test_a_host_that_never_answers_leaves_places_to_the_others(
    server: MisbehavingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty rows that hang come first; eight places would all be theirs without shares."""
    rows = [(server.add(f"/slow/{i}", server.hang), "a") for i in range(30)]
    other = f"localhost:{server.address.rpartition(':')[2]}"
    for i in range(10, 20):
        server.add(f"/{i}", response(encode(seed=i)))
        rows.append((f"http://{other}/{i}", "b"))
    stage = make_stage(
        tmp_path,
        server,
        rows,
        allow_addresses=(server.address, other),
        thread_count=8,
        host_connections=4,
        timeout_seconds=1.0,
        retries=0,
    )
    finished: list[str] = []
    work = stage.worker()
    assert isinstance(work, ShardDownloader)
    one = work._one

    async def note(row: Any, *others: Any) -> Any:
        outcome = await one(row, *others)
        finished.append(row["caption"])
        return outcome

    monkeypatch.setattr(work, "_one", note)
    stats = work("00000")
    work.close()
    assert stats.reasons == {"timeout": 30}
    # All good rows are through while most of the slow host's are still to come.
    assert "".join(finished).rindex("b") < 25


def make_stage(
    root: Path, server: MisbehavingServer, rows: list[tuple[Any, ...]], **others: Any
) -> DownloadShards:
    (root / "source").mkdir(parents=True, exist_ok=True)
    names = ["url", "caption", "expected_hash"][: len(rows[0])]
    table = pa.Table.from_pylist([dict(zip(names, row)) for row in rows])
    pq.write_table(table, root / "source" / "pairs.parquet")
    standard = {"image_size": 32, "allow_addresses": (server.address,), "robots": "ignore"}
    return DownloadShards(root=str(root), **{**standard, **others})


def run(stage: DownloadShards) -> Counter[str]:
    """Reasons of all shards."""
    work = stage.worker()
    assert isinstance(work, ShardDownloader)
    try:
        return sum((Counter(work(task).reasons) for task in stage.tasks()), Counter())
    finally:
        work.close()


def test_a_picture_that_many_urls_give_is_a_placeholder_and_duplicates_are_not(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    gone, twice = response(encode(seed=1)), response(encode(seed=2))
    rows = [(server.add(f"/gone/{i}", gone), f"g{i}") for i in range(5)]
    rows += [(server.add(f"/twice/{i}", twice), f"t{i}") for i in range(2)]
    rows += [(rows[-1][0], f"again {i}") for i in range(6)]  # one URL, however often, is one
    stage = make_stage(tmp_path, server, rows, placeholder_repeats=5)
    assert run(stage) == {"repeated_image": 5}
    off = dataclasses.replace(stage, root=str(tmp_path / "off"), placeholder_repeats=0,
                              table=stage.table_location())  # fmt: skip
    assert run(off) == {}


def test_listed_bytes_are_blocked_or_known_for_placeholders(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    bodies = [encode(seed=i) for i in range(4)]
    rows = [(server.add(f"/{i}", response(body)), f"c{i}") for i, body in enumerate(bodies)]
    (tmp_path / "block.txt").write_text(hashlib.sha256(bodies[0]).hexdigest())
    (tmp_path / "notice.txt").write_text(hashlib.md5(bodies[1]).hexdigest())
    stage = make_stage(
        tmp_path,
        server,
        rows,
        blocklists=(str(tmp_path / "block.txt"),),
        placeholders=(str(tmp_path / "notice.txt"),),
    )
    assert run(stage) == {"blocked": 1, "placeholder": 1}
    planned = dataclasses.replace(stage, lists_sha256=stage.digest_lists())
    planned.tasks()
    (tmp_path / "block.txt").write_text(hashlib.sha256(bodies[2]).hexdigest())
    with pytest.raises(DeclipError, match="blocklists or placeholders has changed"):
        planned.tasks()
    (tmp_path / "block.txt").unlink()
    with pytest.raises(DeclipError, match=r"block\.txt.*does not exist"):
        stage.tasks()


def test_a_wrong_hash_fails_the_row_and_a_wrong_column_the_shard(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    bodies = [encode(seed=i) for i in range(30)]
    good = [hashlib.sha256(body).hexdigest() for body in bodies]
    urls = [server.add(f"/{i}", response(body)) for i, body in enumerate(bodies)]
    rows = [(u, "c", None if i == 1 else "0" * 64 if i == 2 else f"sha256:{h}")
            for i, (u, h) in enumerate(zip(urls, good))]  # fmt: skip
    stage = make_stage(tmp_path / "row", server, rows)
    assert run(stage) == {"hash_mismatch": 1}
    assert run(dataclasses.replace(stage, verify_hash=False)) == {}
    wrong = make_stage(tmp_path / "column", server, [(u, "c", "0" * 64) for u in urls])
    with pytest.raises(DeclipError, match=r"30 of 30 pictures .*'expected_hash'.*--ingest\.hash"):
        run(wrong)
    assert not Store(wrong.root).list("shards")
    with pytest.raises(DeclipError, match="no carried column 'sha'"):
        dataclasses.replace(stage, hash_column="sha").tasks()


def test_a_shard_without_a_resolver_is_left_for_later(
    server: MisbehavingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(f"http://h{i}.invalid/", "c") for i in range(25)]
    rows += [(server.add(f"/{i}", response(encode(seed=i))), "c") for i in range(25)]

    async def no_dns(self: Any, row: Any, *others: Any) -> Any:
        if ".invalid" in row["url"]:
            return RowOutcome(result=FetchError("dns_failure"), fetched=None)
        return await one(self, row, *others)

    one = ShardDownloader._one
    monkeypatch.setattr(ShardDownloader, "_one", no_dns)
    stage = make_stage(tmp_path, server, rows)
    with pytest.raises(DeclipError, match=r"25 of 26 host names did not resolve.*doctor ingest"):
        run(stage)
    assert not Store(stage.root).list("shards")
    # The doctor can look at what happened.
    assert Counter(read_ledger(Store(stage.root), "00000")["reason"].to_pylist()) == {
        "dns_failure": 25,
        "": 25,
    }
    assert run(dataclasses.replace(stage, max_dns_failure_share=1.0)) == {"dns_failure": 25}


def test_one_name_that_is_gone_costs_its_own_rows_alone(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    rows = [(f"http://gone.invalid/{i}", "c") for i in range(25)]
    rows += [(server.add(f"/{i}", response(encode(seed=i))), "c") for i in range(5)]
    assert run(make_stage(tmp_path, server, rows, retries=0)) == {"dns_failure": 25}


def test_what_an_earlier_run_left_is_swept_and_the_rest_stays(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    rows = [(server.add(f"/{i}", response(encode(seed=i))), "c") for i in range(6)]
    stage = make_stage(tmp_path, server, rows, shard_size=2)
    run(stage)
    store = Store(stage.root)
    store.write_bytes("shards/sizes.json", b"{}")
    before = {f: set(store.list(f)) for f in ("shards", "ledger/ingest")}
    stage.sweep(["00000", "00002"])
    gone = {"00001.tar", "00001.parquet", "00001_stats.json"}
    assert before["shards"] - set(store.list("shards")) == gone
    assert before["ledger/ingest"] - set(store.list("ledger/ingest")) == {"00001.parquet"}


def test_bytes_that_kill_a_decoder_are_kept_for_whoever_asks(
    server: MisbehavingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = encode(seed=3)
    rows = [
        (server.add("/killer", response(body)), "c"),
        (server.add("/1", response(encode())), "d"),
    ]

    async def crash(self: Any, data: bytes, boxes: Any = ()) -> Any:
        if data == body:
            raise DecodeError("decoder_crash")
        return await decode(self, data, boxes)

    decode = DecoderPool.decode
    monkeypatch.setattr(DecoderPool, "decode", crash)
    stage = make_stage(tmp_path, server, rows)
    work = stage.worker()
    stats = work("00000")
    assert stats.reasons == {"decoder_crash": 1}
    assert Store(stage.root).read_bytes(layout.quarantine_path("00000000")) == body
    assert layout.quarantine_path("00000000") in stats.volatile_files


def test_the_ledger_has_a_line_for_every_row(server: MisbehavingServer, tmp_path: Path) -> None:
    body = encode(seed=3)
    rows = [
        (server.add("/ok", response(body)), "c"),
        (server.add("/gone", response(status="404 Not Found")), "c"),
        (None, "c"),
        ("file:///etc/passwd", "c"),
        (server.add("/text", response(b"<html>")), "c"),
    ]
    stage = make_stage(tmp_path, server, rows)
    run(stage)
    lines = read_ledger(Store(stage.root), "00000").to_pylist()
    assert [line["key"] for line in lines] == [f"00000{i:03d}" for i in range(5)]
    assert [line["url"] for line in lines] == [row[0] for row in rows]
    reasons = ["", "http_404", "missing_url", "bad_scheme", "not_image"]
    assert [line["reason"] for line in lines] == reasons
    assert [line["http_status"] for line in lines] == [200, 404, None, None, 200]
    assert [line["num_bytes"] for line in lines] == [len(body), None, None, None, 6]
    assert lines[0]["host"] == lines[1]["host"] == server.address
    assert lines[0]["attempts"] == 1
    assert lines[0]["milliseconds"] >= 0
    table = {row["key"]: row for row in read_rows(Store(stage.root), "shards/00000.parquet")}
    assert all(line["status"] == table[line["key"]]["status"] for line in lines)


def test_boxes_are_blurred_and_nonsense_in_their_column_fails_the_row(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    url = server.add("/1", response(encode(size=(64, 64))))
    table = pa.table(
        {"url": [url] * 3, "caption": ["c"] * 3,
         "faces": [[], [[0.0, 0.0, 1.0, 1.0]], [[0.0, 2.0, 1.0, 1.0]]]}
    )  # fmt: skip
    (tmp_path / "source").mkdir()
    pq.write_table(table, tmp_path / "source/pairs.parquet")
    stage = DownloadShards(
        root=str(tmp_path), allow_addresses=(server.address,), boxes_column="faces", image_size=64
    )
    assert run(stage) == {"bad_boxes": 1}
    plain, blurred = (s.image for s in read_samples(Store(str(tmp_path)), "00000"))
    assert len(blurred) < len(plain) / 2, "noise that was blurred compresses well"
    with pytest.raises(DeclipError, match="no carried column 'face'"):
        dataclasses.replace(stage, boxes_column="face").tasks()


def test_a_fault_of_this_machine_stops_the_shard_in_one_sentence(
    server: MisbehavingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: Any, url: str) -> Any:
        raise DeclipError("no file descriptor is left; raise the limit.")

    monkeypatch.setattr(Fetcher, "fetch", broken)
    stage = make_stage(tmp_path, server, [(server.url("/1"), "c")])
    with pytest.raises(DeclipError, match=r"^no file descriptor is left"):
        run(stage)
