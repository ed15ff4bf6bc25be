"""Laws of an opt-out: as if the samples had never been taken, everywhere, and provably."""

import contextlib
import dataclasses
import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from declip_filter.embeddings import read_parts, read_vectors
from declip_filter.neighbor_graph import read_graph
from declip_filter.neighbor_rows import read_table_rows
from declip_filter.neighbors import load_index, read_neighbors
from declip_shards import DeclipError, Store, layout, manifest, read_samples, rewrite, sidecars
from declip_shards.manifest import canonical_json
from declip_shards.optout import LIST, PENDING, REASON, load_optout, make_optout
from declip_shards.validation import check_shard
from pipelines import recipes
from pipelines.lock import workspace_lock
from pipelines.options import apply_overrides
from pipelines.optout import SIZES, finish_pending, opt_out, plan_only, report_path
from pipelines.optout_list import Entry
from pipelines.pipeline import Step
from pipelines.runner import run_pipeline
from pipelines.states import pipeline_states

if TYPE_CHECKING:
    from tests.pipelines.optout_dataset import build, files_of, list_rows, make_pipeline, served
else:
    from optout_dataset import build, files_of, list_rows, make_pipeline, served

ROWS = list_rows()
LISTED: list[Entry] = [
    ("url", ROWS[7]["url"]),
    ("url", ROWS[8]["url"]),  # a row that had failed
    ("url", ROWS[11]["url"].replace("https://example.org", "HTTP://EXAMPLE.org:80")),
    ("url", "https://nobody.example/x.jpg"),
    ("key", "0000102"),
    ("key", "0000205"),  # held out
]
GONE = {"0000007", "0000008", "0000011", "0000102", "0000205"}
STEPS = (
    "ingest",
    "measure",
    "duplicates",
    "plan",
    "filter",
    "embed",
    "index",
    "graph",
    "neighbors",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The dataset before anybody asked for anything; tests copy it."""
    root = str(tmp_path_factory.mktemp("optout") / "data")
    build(root)
    return root


@pytest.fixture
def root(built: str, tmp_path: Path) -> str:
    target = tmp_path / "data"
    shutil.copytree(built, target)
    return str(target)


@pytest.fixture(scope="module")
def opted_out(built: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The dataset after LISTED; for tests that only look."""
    target = str(tmp_path_factory.mktemp("gone") / "data")
    shutil.copytree(built, target)
    opt_out(Store(target), LISTED)
    return target


def keys_of(root: str) -> set[str]:
    """Keys of the successes."""
    store = Store(root)
    return {
        row["key"]
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.shard_parquet_path(shard))
        if row["status"] == "success"
    }


def test_it_is_as_if_ingest_had_known_the_list(opted_out, tmp_path):
    """Shards, signals, selection, embeddings: byte for byte; of ingest and of what was measured
    also receipts and manifests. What was counted over all samples (plan, duplicates) stays."""
    fresh = str(tmp_path / "fresh")
    Store(fresh).write_bytes(LIST, Path(opted_out, LIST).read_bytes())
    build(fresh, until="embed")
    ours, theirs = files_of(opted_out), files_of(fresh)
    folders = ("shards", "signals/basic", "selection/default/0", "embeddings")
    steps = tuple(f"manifests/{step}" for step in STEPS[:2])
    compared = [p for p in {*ours, *theirs} if p.startswith((*folders, *steps))]
    assert len(compared) > 25
    assert [p for p in sorted(compared) if ours.get(p) != theirs.get(p)] == []


def test_a_flat_index_is_as_if_built_anew(tmp_path):
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "fresh")
    build(ours, index_type="Flat", until="index")
    opt_out(Store(ours), LISTED)
    Store(theirs).write_bytes(LIST, Path(ours, LIST).read_bytes())
    build(theirs, index_type="Flat", until="index")
    for name in ("index.faiss", "rows.parquet"):
        path = f"index/captions/{name}"
        assert Path(ours, path).read_bytes() == Path(theirs, path).read_bytes()


def test_status_says_done_and_a_run_has_nothing_to_do(opted_out, root, capsys):
    assert [(s.step, s.state, s.why) for s in pipeline_states(make_pipeline(opted_out))] == [
        (step, "done", "") for step in STEPS
    ]
    opt_out(Store(root), LISTED)
    before = files_of(root)
    pipeline = make_pipeline(root)
    reports = run_pipeline(pipeline, pipeline.steps, runner="local")
    assert all(report.skipped for report in reports)
    assert files_of(root) == before
    for step in STEPS:
        done = manifest.read_manifest(Store(root), step)
        assert done is not None
        assert manifest.damaged_files(Store(root), done, deep=True) == []
        assert done.num_in == done.num_out + sum(done.reasons.values())


def test_shards_stay_whole_and_no_key_moves(built, opted_out):
    store = Store(opted_out)
    for shard in layout.list_shards(store):
        assert check_shard(store, shard) == []
        rows = sidecars.read_rows(store, layout.shard_parquet_path(shard))
        for row in rows:
            if row["key"] in GONE:
                others = {n: v for n, v in row.items() if v is not None}
                assert others == {
                    "key": row["key"],
                    "status": "failed_to_download",
                    "error_message": REASON,
                }
        stats = json.loads(store.read_bytes(layout.shard_stats_path(shard)))
        assert stats["count"] == len(rows)
        assert stats["successes"] == sum(row["status"] == "success" for row in rows)
        assert stats["duration"] == 1.5
    assert keys_of(built) - keys_of(opted_out) == GONE - {"0000008"}


def test_every_embedding_index_row_and_neighbor_resolves_to_one_tar_member(built, opted_out):
    store, alive = Store(opted_out), keys_of(opted_out)
    shards = layout.list_shards(store)
    loaded = load_index(store, "captions")
    embedded = []
    for part in read_parts(store, "text", shards):
        vectors, keys = read_vectors(store, "text", "text_emb", part)
        images, same = read_vectors(store, "text", "img_emb", part)
        assert same == keys
        assert len(vectors) == len(images) == len(keys)
        embedded += keys
        table = read_neighbors(store, "captions", part.shard, keys).to_pylist()
        old = {
            row["key"]: dict(zip(row["neighbor_keys"], row["scores"], strict=True))
            for row in sidecars.read_rows(
                Store(built), layout.neighbors_path("captions", part.shard)
            )
        }
        for row in table:
            assert set(row["neighbor_keys"]) <= alive
            # Shorter, in the same order, each neighbor with the score it had.
            kept = [(k, s) for k, s in old[row["key"]].items() if k not in GONE]
            assert list(zip(row["neighbor_keys"], row["scores"], strict=True)) == kept
    assert set(embedded) <= alive
    assert loaded.keys.tolist() == embedded
    rows = sidecars.read_rows(store, "index/captions/rows.parquet")
    assert [row["row"] for row in rows] == list(range(len(embedded)))


def test_the_index_answers_as_before_without_the_samples(built, opted_out):
    before, after = (load_index(Store(r), "captions") for r in (built, opted_out))
    queries = np.random.default_rng(0).normal(size=(20, 32)).astype(np.float32)
    width = before.num_rows
    old_scores, old_rows = before.faiss_index.search(queries, width)
    new_scores, new_rows = after.faiss_index.search(queries, after.num_rows)
    for query in range(len(queries)):
        old = [
            (before.keys[row], score)
            for row, score in zip(old_rows[query], old_scores[query], strict=True)
            if row >= 0 and before.keys[row] not in GONE
        ]
        new = [
            (after.keys[row], score)
            for row, score in zip(new_rows[query], new_scores[query], strict=True)
            if row >= 0
        ]
        assert new == old
    assert after.faiss_index.nprobe == before.faiss_index.nprobe
    built_as = after.info["built as"]
    assert built_as == {
        "nb vectors": before.num_rows,
        "index_sha256": before.info["index_sha256"],
    }
    assert after.info["recall@10"] == before.info["recall@10"]


def test_neither_the_order_of_the_list_nor_its_spelling_matters(root, opted_out):
    shuffled = [*LISTED, LISTED[0]]
    random.Random(5).shuffle(shuffled)
    opt_out(Store(root), shuffled)
    assert files_of(root) == files_of(opted_out)


def test_one_list_after_the_other_is_both_at_once(root, opted_out):
    opt_out(Store(root), LISTED[:3])
    opt_out(Store(root), LISTED[3:])
    ours, theirs = files_of(root), files_of(opted_out)
    different = {p for p in {*ours, *theirs} if ours.get(p) != theirs.get(p)}
    assert all(path.startswith("optout/report-") for path in different), different


def test_twice_is_once_and_says_so(root, opted_out):
    opt_out(Store(root), LISTED)
    times = {p: p.stat().st_mtime_ns for p in Path(root).rglob("*") if not p.name.endswith("lock")}
    outcome = opt_out(Store(root), LISTED)
    assert not outcome.is_changed
    assert outcome.report == json.loads(Path(root, report_path(make_optout(LISTED))).read_bytes())
    same = {p: p.stat().st_mtime_ns for p in Path(root).rglob("*") if not p.name.endswith("lock")}
    assert {p: t for p, t in same.items() if p.is_file()} == {
        p: t for p, t in times.items() if p.is_file()
    }


def test_the_proof_counts_and_finds_nothing_left(built, opted_out):
    report = json.loads(Path(opted_out, report_path(make_optout(LISTED))).read_bytes())
    assert report["removed"] == {"rows": 5, "samples": 4, "keys": sorted(GONE)}
    assert report["list"]["matched"] == 5
    (unmatched,) = report["list"]["unmatched"]
    assert unmatched == {"kind": "url", "digest": make_optout([LISTED[3]]).pairs()[0][1]}
    assert report["artefacts"]["shards"] == {"rows": [90, 90], "samples": [80, 76]}
    assert report["artefacts"]["embeddings/text"]["rows"] == [54, 51]
    assert report["artefacts"]["index/captions"]["rows"] == [54, 51]
    search = report["search"]
    assert search["hits"] == []
    assert search["files"] > 50
    assert search["needles"]["key"] == 5
    assert search["needles"]["picture"] > 0
    # Row 41 is row 7's picture under another URL, and row 50 has row 11's caption: both stay.
    assert search["shared"] >= 2
    text = json.dumps(report)
    assert "example.org" not in text
    assert "garden" not in text


def test_the_first_and_the_last_of_a_shard_leave_no_trace_in_statistics(root):
    """A parquet's footer holds the least and the greatest value of each column in the clear."""
    entries: list[Entry] = [("url", ROWS[number]["url"]) for number in (0, 29, 30, 59)]
    report = opt_out(Store(root), entries).report
    assert report["removed"]["rows"] == 4
    assert report["search"]["hits"] == []
    assert report["search"]["emptied_rows_that_keep_their_key"] == 4


def test_what_names_a_sample_in_a_place_of_its_owner_is_told(root):
    store = Store(root)
    row = ROWS[7]
    store.write_bytes("source/mine.csv", f"{row['url']}\n".encode())
    store.write_bytes("notes/more.json", json.dumps([row["caption"]]).encode())
    hits = opt_out(store, LISTED).report["search"]["hits"]
    assert {(hit["path"], hit["what"]) for hit in hits} == {
        ("source/mine.csv", "url"),
        ("notes/more.json", "caption"),
    }
    why = {hit["path"]: hit["why"] for hit in hits}
    assert why["source/mine.csv"].startswith("your own list; remove it there")


def test_results_that_show_a_sample_go_and_others_stay(root):
    store = Store(root)
    store.write_bytes("report/report.html", f"<p>{ROWS[7]['caption']}</p>".encode())
    store.write_bytes("eval/predictions.parquet", b"of other samples")
    opt_out(store, LISTED)
    assert not store.exists("report/report.html")
    assert store.exists("eval/predictions.parquet")


def test_a_hash_of_the_file_or_of_the_stored_picture_finds_the_sample(root):
    store = Store(root)
    (row,) = [r for r in sidecars.read_rows(store, "shards/00000.parquet") if r["key"] == "0000007"]
    data = served(ROWS[7]["url"])
    assert data is not None
    by_file = plan_only(store, [("sha256", row["sha256"].upper())])
    by_md5 = plan_only(store, [("md5", hashlib.md5(data).hexdigest())])
    # Both URLs of the same bytes; a URL alone takes one.
    assert by_file.keys == by_md5.keys == {"0000007", "0000111"}
    assert plan_only(store, [("url", ROWS[7]["url"])]).keys == {"0000007"}


def test_a_key_stands_for_its_content_too(root):
    """The same picture under another URL goes with it, now and at every later ingest."""
    store = Store(root)
    opt_out(store, [("key", "0000007")])
    assert keys_of(root) & {"0000007", "0000111"} == set()
    listed = load_optout(store)
    assert listed.blocks_url(ROWS[7]["url"])
    assert not listed.of("key"), "after a change of the shard size it is another row's"


def test_the_same_key_again_is_nothing_to_do(root):
    opt_out(Store(root), [("key", "0000007"), ("key", "9999999")])
    before = files_of(root)
    outcome = opt_out(Store(root), [("key", "9999999"), ("key", "0000007")])
    assert not outcome.is_changed
    assert outcome.report["list"]["matched"] == 1
    assert files_of(root) == before


def test_a_shard_that_loses_all_its_samples_has_no_vectors_left(root):
    opt_out(Store(root), [("url", row["url"]) for row in ROWS[:30]])
    store = Store(root)
    assert not store.exists("embeddings/text/text_emb/text_emb_0.npy")
    assert [s.state for s in pipeline_states(make_pipeline(root))] == ["done"] * len(STEPS)
    assert check_shard(store, "00000") == []


def test_what_matches_nothing_changes_the_list_alone(root):
    before = files_of(root)
    outcome = opt_out(Store(root), [LISTED[3]])
    assert outcome.report["removed"]["rows"] == 0
    after = files_of(root)
    assert set(after) - set(before) == {LIST, outcome.path}
    assert all(after[path] == before[path] for path in before)
    assert load_optout(Store(root)).blocks_url(LISTED[3][1])


def test_a_step_that_was_out_of_date_stays_so(root):
    step = make_pipeline(root).step("filter")
    stage: Any = dataclasses.replace(step.stage, min_words=3)  # type: ignore[type-var]
    other = dataclasses.replace(step, stage=stage)
    opt_out(Store(root), LISTED)
    steps = [other if s.name == "filter" else s for s in make_pipeline(root).steps]
    states = pipeline_states(dataclasses.replace(make_pipeline(root), steps=steps))
    (why,) = [state.why for state in states if state.step == "filter"]
    assert why == "filter.min-words changed from 2 to 3"


# Trainings ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainModel:
    """Stands for a training: what counts is its manifest."""

    root: str = dataclasses.field(default="", metadata={"fingerprint": False})
    method: str = "declip"
    selection: str = "default"
    splits: tuple[str, ...] = ("train",)
    neighbors: str = "captions"
    neighbor_source: str = "index"


def add_training(root: str, **settings: Any) -> Step:
    """A finished training of ``root`` by its manifest."""
    store = Store(root)
    stage: Any = TrainModel(root=root, **settings)
    step = Step(name="train", stage=stage, reads=("ingest", "filter", "neighbors"))
    inputs = {name: manifest.manifest_digest(store, name) or "" for name in step.reads}
    digest = manifest.fingerprint(stage, step.code_version, inputs)
    store.write_bytes("train/export.json", b"{}")
    receipt = manifest.Receipt(
        task="all",
        fingerprint=digest,
        num_in=54,
        num_out=54,
        reasons={},
        files=[
            manifest.FileRecord(
                path="train/export.json", size=2, sha256=store.sha256("train/export.json")
            )
        ],
        volatile_files=[],
        extra={},
    )
    manifest.write_receipt(store, "train", receipt)
    done = manifest.build_manifest(
        step="train", stage=stage, code_version=step.code_version, inputs=inputs, receipts=[receipt]
    )
    manifest.write_manifest(store, done)
    return step


@pytest.mark.parametrize(
    ("entries", "state", "seen", "near"),
    [
        ([("key", "0000007")], "stale", ["0000007"], True),
        ([("key", "0000205")], "done", [], False),  # held out: neither trained on nor a neighbor
        ([("url", ROWS[8]["url"])], "done", [], False),  # had failed
    ],
)
def test_a_training_is_stale_only_if_it_had_seen_a_sample(root, entries, state, seen, near):
    step = add_training(root)
    pipeline = dataclasses.replace(make_pipeline(root), steps=[*make_pipeline(root).steps, step])
    assert pipeline_states(pipeline)[-1].state == "done"
    report = opt_out(Store(root), entries).report
    (run,) = report["trainings"]
    assert set(seen) <= set(run["keys"])
    assert bool(run["keys"]) == bool(seen)
    assert bool(run["neighbor_keys"]) == near
    assert [s.state for s in pipeline_states(pipeline)] == ["done"] * len(STEPS) + [state]


# Kills -------------------------------------------------------------------------------------------


class KilledError(BaseException):
    """Stands for SIGKILL."""


def count_or_kill(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[int]:
    """Let the ``limit``-th change of any file be the last one, half of the time after it."""
    count = [0]
    for name in ("write_bytes", "move", "remove", "remove_folder"):
        original = getattr(Store, name)

        def change(self: Store, *args: Any, _original: Any = original) -> None:
            count[0] += 1
            if count[0] == limit and limit % 2:
                raise KilledError
            _original(self, *args)
            if count[0] == limit:
                raise KilledError

        monkeypatch.setattr(Store, name, change)
    return count


def killed_and_run_again(root: str, limit: int) -> tuple[dict[str, bytes], int]:
    with pytest.MonkeyPatch.context() as patch:
        count = count_or_kill(patch, limit)
        with contextlib.suppress(KilledError):
            opt_out(Store(root), LISTED)
    opt_out(Store(root), LISTED)
    return files_of(root), count[0]


def kill_everywhere(built: str, opted_out: str, tmp_path: Path, step: int) -> int:
    expected, limit = files_of(opted_out), 1
    while True:
        root = str(tmp_path / str(limit))
        shutil.copytree(built, root)
        found, count = killed_and_run_again(root, limit)
        assert found == expected, limit
        shutil.rmtree(root)
        if count < limit:
            return count
        limit += step


def test_killed_at_a_change_and_run_again_it_ends_with_the_same_bytes(built, opted_out, tmp_path):
    assert kill_everywhere(built, opted_out, tmp_path, step=19) > 60


@pytest.mark.slow
def test_killed_at_many_changes(built, opted_out, tmp_path):
    """With step=1, at every one, it takes half a minute of processor time and holds, too."""
    assert kill_everywhere(built, opted_out, tmp_path, step=5) > 60


@pytest.mark.parametrize("by_a_run", [False, True])
def test_one_that_was_cut_short_is_finished_before_all_else(root, opted_out, by_a_run):
    with pytest.MonkeyPatch.context() as patch:
        count_or_kill(patch, 20)
        with pytest.raises(KilledError):
            opt_out(Store(root), LISTED)
    store = Store(root)
    if by_a_run:
        pipeline = make_pipeline(root)
        reports = run_pipeline(pipeline, pipeline.steps, runner="local")
        assert all(report.skipped for report in reports), "nothing is embedded anew"
    else:
        rewrite.recover(store)
        assert store.exists(PENDING)
        assert finish_pending(store)
    assert not store.exists(PENDING)
    assert not finish_pending(store)
    assert files_of(root) == files_of(opted_out)


# Refusals ----------------------------------------------------------------------------------------


def test_a_folder_that_is_being_written_is_refused(root):
    with (
        workspace_lock(Store(root)),
        pytest.raises(DeclipError, match=r"is (writing to|running in|using)"),
    ):
        opt_out(Store(root), LISTED)


def flip(path: Path) -> None:
    """One bit, in the middle of a tar's first picture or wherever the file has its middle."""
    data = bytearray(path.read_bytes())
    data[700 if path.suffix == ".tar" else len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    "path",
    [
        "shards/00000.tar",
        "signals/basic/00000.parquet",
        "embeddings/text/text_emb/text_emb_1.npy",  # of a shard that keeps all its samples
        "index/captions/index.faiss",
    ],
)
def test_damage_is_refused_and_not_signed_as_sound(root, path):
    store = Store(root)
    failed: list[Entry] = [("url", ROWS[8]["url"])]
    flip(Path(root, path))
    before = files_of(root)
    with pytest.raises(DeclipError, match=r"is missing, damaged or was changed .* declip run"):
        opt_out(store, failed)
    assert files_of(root) == before
    Path(root, path).unlink()
    with pytest.raises(DeclipError):
        opt_out(store, failed)
    del before[path]
    assert files_of(root) == before


def test_damage_between_a_kill_and_the_rerun_is_not_signed_either(root):
    with pytest.MonkeyPatch.context() as patch:
        count_or_kill(patch, 60)
        with pytest.raises(KilledError):
            opt_out(Store(root), LISTED)
    assert Store(root).exists(PENDING)
    assert "0000007" not in {s.key for s in read_samples(Store(root), "00000")}, "it is done"
    flip(Path(root, "shards/00000.tar"))
    opt_out(Store(root), LISTED)
    done = manifest.read_manifest(Store(root), "ingest")
    assert done is not None
    assert manifest.damaged_files(Store(root), done, deep=True) == ["shards/00000.tar"]


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(DeclipError, match="there is no complete shard"):
        opt_out(Store(str(tmp_path)), LISTED)


def test_a_plan_of_a_newer_version_is_refused(root):
    store = Store(root)
    value = {"format_version": 99}
    store.write_bytes(PENDING, canonical_json(value))
    with pytest.raises(DeclipError, match="is of a newer version; upgrade opendeclip"):
        opt_out(store, LISTED)


# What is made of samples together ----------------------------------------------------------------


def test_the_graph_is_of_the_samples_that_are_left(opted_out):
    store = Store(opted_out)
    stage: Any = make_pipeline(opted_out).step("neighbors").stage
    table, _ = read_table_rows(stage, store)
    ids, _ = read_graph(stage, store, table)  # which refuses one of other rows
    assert len(ids) == table.num_rows
    assert ids.max() < table.num_rows
    own = np.arange(len(ids))[:, None]
    assert not (ids == own).any()
    behind = np.diff((ids < 0).astype(int), axis=1)
    assert (behind >= 0).all()  # nothing comes behind an end


def test_what_was_repacked_loses_the_samples_too(root):
    pipeline = apply_overrides(recipes.build("repack", root), [("--repack.shard-size", "20")])
    run_pipeline(pipeline, pipeline.choose(), runner="local")
    copy = Store(f"{root}/repacked/selected")
    before = json.loads(copy.read_bytes(SIZES))
    outcome = opt_out(Store(root), LISTED)
    gone = set(outcome.report["removed"]["keys"])
    assert outcome.repacked == (f"repacked/selected/{outcome.path}",)
    assert outcome.report["search"]["hits"] == []
    after = json.loads(copy.read_bytes(SIZES))
    keys = [s.key for shard in layout.list_shards(copy) for s in read_samples(copy, shard)]
    assert not gone & set(keys)
    assert sum(after.values()) == len(keys) < sum(before.values())
    assert not opt_out(Store(root), LISTED).is_changed


def test_a_repack_that_was_not_finished_goes_as_a_whole(root):
    Store(root).write_bytes("repacked/half/shards/00000.tar", b"x")
    opt_out(Store(root), LISTED)
    assert not Store(root).exists("repacked/half/shards/00000.tar")
