"""The law of the opt-out, with the real downloader: taking samples out is never having taken them.

The rest of its laws: tests/pipelines/test_optout.py.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_ingest.failures import FetchError
from declip_ingest.guard import check_url
from declip_ingest.ledger import read_ledger
from declip_ingest.stages import DownloadShards
from declip_shards import Store, layout
from declip_shards.optout import LIST, url_digest
from declip_shards.sidecars import read_rows
from pipelines.optout import opt_out
from pipelines.optout_list import Entry
from pipelines.pipeline import Pipeline, Step
from pipelines.runner import run_pipeline
from pipelines.states import pipeline_states

if TYPE_CHECKING:
    from tests.ingest.misbehaving_server import MisbehavingServer, encode, response
else:
    from misbehaving_server import MisbehavingServer, encode, response

PER_SHARD = 12
NUM_ROWS = 22


def make_list(server: MisbehavingServer, path: Path) -> list[dict[str, Any]]:
    """Good pictures, dead links, cut files, one picture under two URLs; columns of all kinds."""
    rows = []
    for number in range(NUM_ROWS):
        body = encode(seed=3 if number == 17 else number)
        if number % 7 == 5:
            url = server.add(f"/{number}/gone.jpg", response(b"", status="404 Not Found"))
        elif number % 7 == 6:
            url = server.add(f"/{number}/cut.jpg", response(body[: len(body) // 2]))
        else:
            url = server.add(f"/{number}/good.jpg", response(body))
        rows.append(
            {
                "url": url,
                "caption": f"the caption of number {number:03d}, „quoted“",
                "author": None if number % 4 == 0 else f"author {number}",
                "width_of_list": number,
                "boxes": [[0.1, 0.2, 0.3, 0.4]] * (number % 3),
                "expected_hash": f"md5:{hashlib.md5(body).hexdigest()}" if number == 9 else None,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path, store_schema=False)
    return rows


def ingest(root: Path, table: Path, server: MisbehavingServer, **changed: Any) -> Pipeline:
    own: dict[str, Any] = {"shard_size": PER_SHARD, **changed}
    stage = DownloadShards(
        root=str(root),
        table=str(table),
        image_size=32,
        allow_addresses=(server.address,),
        robots="ignore",
        retries=0,
        thread_count=8,
        **own,
    )
    pipeline = Pipeline(recipe="law", root=str(root), steps=[Step(name="ingest", stage=stage)])
    run_pipeline(pipeline, pipeline.steps, runner="local")
    return pipeline


def files_of(root: Path) -> dict[str, bytes]:
    """Shards, receipts and manifest, without what holds times."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in ("shards", "manifests")
        for path in sorted((root / folder).rglob("*"))
        if path.is_file() and not path.name.endswith(("_stats.json", ".run.json", "lock"))
    }


def ledger_of(root: Path) -> list[dict[str, Any]]:
    """What the ledger names; how hard each run tried is its own."""
    columns = ("key", "url", "host", "status", "reason", "detail")
    rows: list[dict[str, Any]] = read_ledger(Store(str(root)), columns=columns).to_pylist()
    return rows


@pytest.mark.parametrize("kind", ["url", "key", "sha256", "md5", "all"])
def test_taking_out_is_never_having_taken(server, tmp_path, kind):
    table = tmp_path / "list.parquet"
    rows = make_list(server, table)
    entries: dict[str, list[Entry]] = {
        # A success, a dead link, a cut file.
        "url": [("url", rows[number]["url"]) for number in (0, 5, 6)],
        "key": [("key", "0000003"), ("key", "0000109")],
        "sha256": [("sha256", hashlib.sha256(encode(seed=3)).hexdigest())],
        "md5": [("md5", hashlib.md5(encode(seed=9)).hexdigest())],
    }
    listed = entries[kind] if kind != "all" else [e for own in entries.values() for e in own]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    pipeline = ingest(ours, table, server)
    before = files_of(ours)
    report = opt_out(Store(str(ours)), listed).report
    num_removed = {"url": 3, "key": 3, "sha256": 2, "md5": 1, "all": 7}[kind]
    assert report["removed"]["rows"] == num_removed
    assert report["search"]["hits"] == []
    assert files_of(ours) != before
    Store(str(theirs)).write_bytes(LIST, (ours / LIST).read_bytes())
    ingest(theirs, table, server)
    found, expected = files_of(ours), files_of(theirs)
    assert sorted(found) == sorted(expected)
    assert [path for path in found if found[path] != expected[path]] == []
    assert ledger_of(ours) == ledger_of(theirs)
    assert pipeline_states(pipeline)[0].state == "done"


def urls_of(root: Path) -> dict[str, str | None]:
    """URL of each row that still has one -> why it failed."""
    store = Store(str(root))
    return {
        row["url"]: row["error_message"]
        for shard in layout.list_shards(store)
        for row in read_rows(store, layout.shard_parquet_path(shard), ["url", "error_message"])
        if row["url"] is not None
    }


def test_a_key_takes_the_same_rows_out_after_a_change_of_the_shard_size(server, tmp_path):
    table, root = tmp_path / "list.parquet", tmp_path / "data"
    rows = make_list(server, table)
    ingest(root, table, server)
    before = urls_of(root)
    opt_out(Store(str(root)), [("key", "0000103"), ("key", "0000001")])
    gone = {rows[number]["url"] for number in (15, 1)}
    assert urls_of(root) == {url: why for url, why in before.items() if url not in gone}
    # Of shards of 5 rows, 0000103 would be row 8.
    ingest(root, table, server, shard_size=5)
    assert urls_of(root) == {url: why for url, why in before.items() if url not in gone}


NUM_SAME = 10


def make_repeats(server: MisbehavingServer, path: Path) -> list[str]:
    """URLs of one picture, each of its own, and one of another picture."""
    urls = [server.add(f"/same/{n}.jpg", response(encode(seed=77))) for n in range(NUM_SAME)]
    urls.append(server.add("/other.jpg", response(encode(seed=78))))
    rows = [{"url": url, "caption": f"of number {n:03d}"} for n, url in enumerate(urls)]
    pq.write_table(pa.Table.from_pylist(rows), path, store_schema=False)
    return urls


def test_an_opt_out_stores_no_picture_that_had_come_from_too_many_urls(server, tmp_path):
    """The exception to the law: an ingest that knew the list would count one URL less."""
    table, ours, theirs = (tmp_path / name for name in ("list.parquet", "ours", "theirs"))
    urls = make_repeats(server, table)
    limit = {"placeholder_repeats": NUM_SAME}
    pipeline = ingest(ours, table, server, **limit)
    notice = f"repeated_image: {hashlib.sha256(encode(seed=77)).hexdigest()}"
    assert urls_of(ours) == dict.fromkeys(urls[:-1], notice) | {urls[-1]: None}
    opt_out(Store(str(ours)), [("url", urls[0])])
    assert urls_of(ours) == dict.fromkeys(urls[1:-1], notice) | {urls[-1]: None}
    assert pipeline_states(pipeline)[0].state == "done"
    Store(str(theirs)).write_bytes(LIST, (ours / LIST).read_bytes())
    ingest(theirs, table, server, **limit)
    assert urls_of(theirs) == dict.fromkeys(urls[1:])


@pytest.mark.parametrize("by", ["sha256", "key"])
def test_by_its_hash_a_repeated_picture_goes_as_if_never_taken(server, tmp_path, by):
    table, ours, theirs = (tmp_path / name for name in ("list.parquet", "ours", "theirs"))
    urls = make_repeats(server, table)
    digest = hashlib.sha256(encode(seed=77)).hexdigest()
    rows: list[Entry] = [("key", f"00000{n:02d}") for n in range(NUM_SAME)]
    limit = {"placeholder_repeats": NUM_SAME}
    ingest(ours, table, server, **limit)
    report = opt_out(Store(str(ours)), rows if by == "key" else [("sha256", digest)]).report
    assert report["removed"]["rows"] == NUM_SAME
    assert urls_of(ours) == {urls[-1]: None}
    Store(str(theirs)).write_bytes(LIST, (ours / LIST).read_bytes())
    ingest(theirs, table, server, **limit)
    assert files_of(ours) == files_of(theirs)


# Spellings ---------------------------------------------------------------------------------------

HOSTS = st.sampled_from(
    [
        ("example.org", "EXAMPLE.org", "example.org.", "ｅxample.org"),
        ("127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.01", "127.1.", "１２７.0.0.1"),
        ("münchen.de", "xn--mnchen-3ya.de", "MÜNCHEN。de"),
        ("[2001:db8::1]", "[2001:DB8:0:0::0001]"),
    ]
)
PORTS = st.sampled_from([("", ":", ":80", ":0080"), (":443", ":0443"), (":8080", ":08080")])
PATHS = st.sampled_from(
    [
        ("", "/", "/#top", "?"),
        ("/é b?x=ü", "/%C3%A9%20b?x=%C3%BC", "/é%20b?x=ü#y"),
        ("/\udc80", "/%80"),
        ("/\u00a0", "/%C2%A0"),
        ("/a|b", "/a%7Cb"),
    ]
)


@st.composite
def spellings(draw: st.DrawFn) -> str:
    """A URL in one of its spellings."""
    host, port, path = (draw(st.sampled_from(draw(s))) for s in (HOSTS, PORTS, PATHS))
    scheme, space = (
        draw(st.sampled_from(["http", "HTTP", "https"])),
        draw(st.sampled_from(["", " "])),
    )
    return f"{space}{scheme}://{host}{port}{path}{space}"


def asked(url: str) -> str | None:
    """What would be asked for; None where nothing is."""
    try:
        return check_url(url).url
    except FetchError:
        return None


@given(st.lists(spellings(), min_size=2, max_size=30))
@settings(max_examples=100, deadline=None)
def test_what_the_fetcher_takes_for_one_url_the_opt_out_does_too(urls):
    digests: dict[str | None, set[str]] = {}
    for url in urls:
        digests.setdefault(asked(url), set()).add(url_digest(url))
    assert None not in digests
    assert all(len(found) == 1 for found in digests.values())


@given(st.text(max_size=30), st.text("aA.0x1:[]é。ß%-", min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_the_form_asked_for_is_as_the_url_itself(text, host):
    for url in (f"http://{host}/{text}", f"https://example.org/{text}", f"http://{host}?{text}"):
        target = asked(url)
        assert target is None or url_digest(target) == url_digest(url)
