"""Laws of a repack: nothing is changed, nothing is lost, nothing depends on how it was run."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stage_runs import digests, run_one, run_stage

from declip_filter import BuildNeighbors
from declip_filter import repack_plan as planning
from declip_filter.embeddings import read_metadata, read_parts, read_vectors
from declip_filter.index_files import load_index
from declip_filter.repack import CarryWhole, CheckRepacked, RepackShards
from declip_filter.repack_carry import place_file
from declip_filter.repack_plan import RepackPlan, as_keys, inputs_digest, target_store
from declip_filter.repack_state import is_repacked, is_unfinished, mark_path
from declip_filter.repack_tars import sample_spans
from declip_filter.table_versions import check_table
from declip_filter.vectors import StoredVectors
from declip_shards import DeclipError, Store, layout, read_samples, sidecars
from declip_shards.fakes import write_fake_dataset
from declip_shards.optout import PENDING

SIZE = 30
"""Samples of an output shard in most tests: no multiple of what an input shard holds."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the dataset of conftest.py's `indexed_root` is kept once it is made."""
    return tmp_path_factory.mktemp("made") / "data"


@pytest.fixture
def root(made: Path, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A copy of that dataset of one's own: making it takes longer than most tests do."""
    if not made.exists():
        shutil.copytree(request.getfixturevalue("indexed_root"), made)
    return str(shutil.copytree(made, tmp_path / "copy"))


def write_selection(store: Store, name: str, drops: Callable[[int], bool]) -> None:
    """The default selection's kept samples, less those whose place in their shard `drops` takes."""
    for shard in layout.list_shards(store):
        table = sidecars.read_table(store, layout.selection_path("default", shard))
        keep = [
            kept and not drops(place) for place, kept in enumerate(table.column("keep").to_pylist())
        ]
        reasons = ["" if kept else "of_a_test" for kept in keep]
        sidecars.write_table(
            store,
            layout.selection_path(name, shard),
            table.set_column(1, "keep", pa.array(keep)).set_column(2, "reason", pa.array(reasons)),
        )


def repack(root: str, **settings: Any) -> Store:
    """Repack by both stages, in order."""
    settings = {"shard_size": SIZE, **settings}
    run_stage(RepackShards(root=root, **settings))
    run_stage(CarryWhole(root=root, **settings))
    return target_store(Store(root), str(settings.get("name", "selected")))


def samples(store: Store) -> dict[str, tuple[bytes, str, str]]:
    """Key -> picture, caption and metadata of every tar member."""
    found = [s for shard in layout.list_shards(store) for s in read_samples(store, shard)]
    assert len({s.key for s in found}) == len(found), "a key twice"
    return {s.key: (s.image, s.caption, json.dumps(s.metadata)) for s in found}


def selected(store: Store, name: str = "default") -> list[str]:
    """Kept keys in order."""
    rows = [
        row
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.selection_path(name, shard))
    ]
    return [row["key"] for row in rows if row["keep"]]


def rows_by_key(store: Store) -> dict[str, dict[str, object]]:
    return {
        row["key"]: row
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.shard_parquet_path(shard))
    }


# The samples --------------------------------------------------------------------------------------


def test_every_kept_sample_is_there_once_with_the_same_bytes_and_row(root):
    store = Store(root)
    target = repack(root)
    kept, before, after = selected(store), samples(store), samples(target)
    assert after == {key: before[key] for key in kept}
    rows = rows_by_key(store)
    assert rows_by_key(target) == {key: rows[key] for key in kept}
    assert list(rows_by_key(target)) == kept, "in another order"


def test_shards_are_balanced_and_counted(root):
    store, target = Store(root), repack(root)
    shards = layout.list_shards(target)
    sizes = [len(list(read_samples(target, shard))) for shard in shards]
    num = len(selected(store))
    assert sum(sizes) == num
    assert max(sizes) <= SIZE
    assert max(sizes) - min(sizes) <= 1
    assert len(shards) == -(-num // SIZE), "more shards than it takes"
    assert json.loads(target.read_bytes("shards/sizes.json")) == {
        f"{shard}.tar": size for shard, size in zip(shards, sizes, strict=True)
    }
    for shard, size in zip(shards, sizes, strict=True):
        stats = json.loads(target.read_bytes(layout.shard_stats_path(shard)))
        assert stats["count"] == stats["successes"] == size


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum),
    size=st.integers(1, 50),
)
def test_a_plan_takes_every_sample_once_in_balanced_shards(lengths, size):
    keys = [as_keys([f"{n:05d}{i:03d}" for i in range(m)]) for n, m in enumerate(lengths)]
    plan = RepackPlan(tuple(layout.shard_name(n) for n in range(len(keys))), tuple(keys), size)
    taken = {out: [k for p in plan.pieces(out) for k in p.names()] for out in plan.outputs}
    everything = [key.decode() for own in keys for key in own.tolist()]
    assert [key for out in plan.outputs for key in taken[out]] == everything
    sizes = [len(own) for own in taken.values()]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    places = plan.places(as_keys([*everything, "no such key"]))
    assert places.tolist() == [*range(len(everything)), -1]
    named = dict(zip(everything, plan.output_of(places[:-1]), strict=True))
    assert named == {key: out for out, own in taken.items() for key in own}


def test_identity_leaves_the_bytes_of_tars_and_tables(tmp_path):
    """Nothing dropped, the same size of a shard: the same files."""
    root = str(tmp_path / "data")
    store = write_fake_dataset(root, num_shards=3, samples_per_shard=20)
    target = repack(root, selection="", shard_size=20)
    for shard in layout.list_shards(store):
        for path in (layout.tar_path(shard), layout.shard_parquet_path(shard)):
            assert target.read_bytes(path) == store.read_bytes(path), path


def test_repacking_in_other_sizes_and_back_leaves_the_bytes(root):
    """Through shards of 14 to shards of 30, and at once: the same dataset, sidecars included."""
    straight = repack(root)
    small = repack(root, name="small", shard_size=14)
    back = repack(small.url)
    for folder in ("shards", "signals", "selection", "embeddings", "neighbors", "index"):
        assert digests(straight.url, folder) == digests(back.url, folder), folder


def test_tasks_in_any_order_and_of_other_processes_give_the_same_bytes(root, tmp_path):
    other = shutil.copytree(root, tmp_path / "other")
    first = repack(root)
    stage = RepackShards(root=str(other), shard_size=SIZE)
    *rest, last = stage.tasks()
    script = (
        "import sys; sys.path[:0] = sys.argv[3:]\n"
        "from declip_filter.repack import RepackShards\n"
        "from stage_runs import run_one\n"
        f"run_one(RepackShards(root=sys.argv[1], shard_size={SIZE}), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, str(other), last, *sys.path], check=True)
    for task in reversed(rest):
        run_one(stage, task)
    run_stage(CarryWhole(root=str(other), shard_size=SIZE))
    assert digests(first.url, ".") == digests(f"{other}/repacked/selected", ".")


@pytest.mark.parametrize("num_writes", [0, 4, 12])
def test_killed_and_run_again_it_has_the_same_bytes(root, monkeypatch, num_writes):
    target = repack(root)
    whole = digests(target.url, ".")
    shutil.rmtree(target.url)
    write, left = Store.write_bytes, iter(range(num_writes))

    def cut_short(self: Store, path: str, data: bytes) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_bytes", cut_short)
        with pytest.raises(KeyboardInterrupt):
            repack(root)
    done = [t for t in ("00000", "00001") if RepackShards(root=root).is_done(t)]
    assert all(target.exists(layout.tar_path(task)) for task in done)
    repack(root)
    assert digests(target.url, ".") == whole


def test_a_killed_repack_of_smaller_shards_leaves_none_behind(root):
    run_stage(RepackShards(root=root, shard_size=14))
    target = repack(root)
    RepackShards(root=root, shard_size=SIZE).sweep(["00000", "00001", "00002"])
    assert len(samples(target)) == len(selected(Store(root)))


# What lies beside ---------------------------------------------------------------------------------


def check_resolves(target: Store) -> None:
    """Every row of every table beside the shards is of one tar member, of the right shard."""
    shards = layout.list_shards(target)
    keys = {shard: [s.key for s in read_samples(target, shard)] for shard in shards}
    everywhere = {key for own in keys.values() for key in own}
    for shard in shards:
        for name in ("signals/basic", "selection/default"):
            rows = sidecars.read_rows(target, f"{name}/{shard}.parquet")
            assert [row["key"] for row in rows] == keys[shard], name
        table = sidecars.read_rows(target, layout.neighbors_path("captions", shard))
        assert {row["key"] for row in table} <= set(keys[shard])
        for row in table:
            assert set(row["neighbor_keys"]) <= everywhere - {row["key"]}
            assert len(row["neighbor_keys"]) == len(row["scores"])
    check_table(target, "captions")
    parts = read_parts(target, "text", shards)
    for part in parts:
        rows = read_metadata(target, "text", part)
        assert {row["shard"] for row in rows} <= {part.shard}
        assert {row["key"] for row in rows} <= set(keys[part.shard])
        assert [row["key"] for row in rows] == read_vectors(target, "text", "text_emb", part)[1]
    loaded = load_index(target, "captions")
    in_order = [row["key"] for part in parts for row in read_metadata(target, "text", part)]
    assert loaded.keys.tolist() == in_order
    assert all(key in keys[shard] for key, shard in zip(loaded.keys, loaded.shards, strict=True))
    rows = sidecars.read_table(target, "index/captions/rows.parquet")
    assert rows.column("row").to_pylist() == list(range(len(in_order)))


def test_every_row_beside_the_shards_resolves_to_one_tar_member(root):
    target = repack(root)
    check_resolves(target)
    one = (target.local_path(p) for p in ("index/captions/index.faiss",))
    source = Store(root).local_path("index/captions/index.faiss")
    assert all(os.path.samefile(path, source) for path in one), "copied where a link would do"


def test_vectors_and_neighbors_are_those_of_before(root):
    store, target = Store(root), repack(root)

    def vectors(of: Store) -> dict[str, bytes]:
        parts = read_parts(of, "text", layout.list_shards(of))
        stored = StoredVectors(of, "text", "text_emb", parts)
        rows = [row["key"] for part in parts for row in read_metadata(of, "text", part)]
        matrix = stored.read(0, stored.num_rows)
        return {key: row.tobytes() for key, row in zip(rows, matrix, strict=True)}

    def lists(of: Store) -> dict[str, object]:
        return {
            row["key"]: (row["neighbor_keys"], row["scores"])
            for shard in layout.list_shards(of)
            for row in sidecars.read_rows(of, layout.neighbors_path("captions", shard))
        }

    assert vectors(store) == vectors(target)
    assert lists(store) == lists(target)


def test_neighbors_looked_up_in_the_repacked_dataset_are_the_same(root):
    target = repack(root)
    run_stage(BuildNeighbors(root=target.url, name="again", k=4, num_candidates=8))
    for shard in layout.list_shards(target):
        made, carried = (
            sidecars.read_table(target, layout.neighbors_path(name, shard)).select(
                ["key", "neighbor_keys", "scores"]
            )
            for name in ("again", "captions")
        )
        assert made.equals(carried)


def test_a_stricter_selection_than_was_embedded_takes_rows_out_everywhere(root):
    store = Store(root)
    write_selection(store, "strict", lambda place: place % 3 == 1)
    kept = set(selected(store, "strict"))
    assert 0 < len(kept) < len(selected(store)), "the selections must differ"
    target = repack(root, selection="strict", shard_size=9)
    check_resolves(target)
    assert set(samples(target)) == kept
    before = {
        row["key"]: [
            pair
            for pair in zip(row["neighbor_keys"], row["scores"], strict=True)
            if pair[0] in kept
        ]
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.neighbors_path("captions", shard))
    }
    for shard in layout.list_shards(target):
        for row in sidecars.read_rows(target, layout.neighbors_path("captions", shard)):
            pairs = list(zip(row["neighbor_keys"], row["scores"], strict=True))
            assert pairs == before[row["key"]]
    loaded = load_index(target, "captions")
    parts = read_parts(target, "text", layout.list_shards(target))
    vectors = StoredVectors(target, "text", "text_emb", parts)
    queries = vectors.read(0, vectors.num_rows).astype(np.float32)
    scores, _ = loaded.faiss_index.search(queries, 1)
    assert np.allclose(scores[:, 0], 1, atol=5e-3), "a row of another vector"


def test_a_duplicate_of_a_sample_that_is_not_kept_is_blanked(root):
    store = Store(root)
    kept, everyone = selected(store), list(samples(store))
    (gone, *_) = sorted(set(everyone) - set(kept))
    names = {kept[1]: kept[0], kept[2]: gone}
    for shard in layout.list_shards(store):
        keys = [s.key for s in read_samples(store, shard)]
        table = {
            "key": keys,
            "duplicate_perceptual_of": pa.array([names.get(k) for k in keys], pa.string()),
            "duplicate_perceptual_distance": pa.array(
                [3 if k in names else None for k in keys], pa.int32()
            ),
        }
        sidecars.write_table(store, layout.signals_path("duplicates", shard), pa.table(table))
    target = repack(root)
    rows = {
        row["key"]: (row["duplicate_perceptual_of"], row["duplicate_perceptual_distance"])
        for shard in layout.list_shards(target)
        for row in sidecars.read_rows(target, layout.signals_path("duplicates", shard))
    }
    assert rows[kept[1]] == (kept[0], 3)
    assert rows[kept[2]] == (None, None)


def test_a_set_that_lacks_a_shard_is_left_out_and_named(root):
    store = Store(root)
    store.remove(layout.signals_path("basic", "00001"))
    store.remove("embeddings/text/parts/00002.json")
    run_stage(RepackShards(root=root, shard_size=SIZE))
    done = run_stage(CarryWhole(root=root, shard_size=SIZE))["all"]
    assert done.extra["left_out"] == "signals/basic, embeddings/text, index/captions"
    target = target_store(store, "selected")
    assert not target.list_folders("signals")
    assert not target.list_folders("index")
    assert target.list("neighbors/captions", ".parquet")


def test_nothing_is_carried_when_nothing_is_asked_for(root):
    target = repack(root, carry=())
    assert sorted(os.listdir(target.url)) == ["manifests", "repack.json", "shards"]


def test_the_check_of_a_repacked_dataset_finds_a_lost_shard(root):
    target = repack(root)
    assert run_stage(CheckRepacked(root=target.url))["all"].num_out == len(samples(target))
    fewer = sidecars.read_table(target, layout.shard_parquet_path("00001")).slice(1)
    table = target.read_bytes(layout.shard_parquet_path("00001"))
    sidecars.write_table(target, layout.shard_parquet_path("00001"), fewer)
    with pytest.raises(DeclipError, match=r"shard 00001 in .* is not the one of .*; run declip"):
        run_stage(CheckRepacked(root=target.url))
    target.write_bytes(layout.shard_parquet_path("00001"), table)
    target.remove(layout.tar_path("00001"))
    with pytest.raises(DeclipError, match=r"names '00001.tar', which is not whole there; run decl"):
        run_stage(CheckRepacked(root=target.url))


def test_a_repack_that_was_cut_short_is_no_whole_one(root):
    """Whatever an earlier repack of other settings had finished there."""
    target = repack(root)
    assert is_repacked(target)
    other = RepackShards(root=root, shard_size=14)
    first, *_ = other.tasks()
    assert is_repacked(target), "asking for the tasks changes nothing"
    run_one(other, first)
    assert not is_repacked(target)
    assert is_unfinished(target)
    assert not target.exists(mark_path())
    assert not target.exists("shards/sizes.json")
    with pytest.raises(DeclipError, match="was not finished: it may be half of one and half of a"):
        run_stage(CheckRepacked(root=target.url))
    with pytest.raises(DeclipError, match="are none, or of other settings; run the stage that rep"):
        run_stage(CarryWhole(root=root, shard_size=SIZE))
    assert is_repacked(repack(root))
    # The same settings: a shard that is made again is a repack that is not finished, too.
    run_one(RepackShards(root=root, shard_size=SIZE), "00001")
    assert is_unfinished(target)


def test_what_is_announced_is_what_will_be_written(root, capsys, monkeypatch):
    """Shards of other settings count as work to do, and as room once they have gone."""

    def announced(**settings: Any) -> str:
        capsys.readouterr()
        RepackShards(root=root, **settings).tasks()
        said: str = capsys.readouterr().err
        return said.partition(" of ")[0]

    num = len(selected(Store(root)))
    target = repack(root)
    assert announced(shard_size=SIZE) == ""
    num_shards = -(-num // 14)
    assert announced(shard_size=14) == f"repack: {num} samples into {num_shards} shards"
    write_selection(Store(root), "strict", lambda place: place % 3 == 1)
    num_strict = len(selected(Store(root), "strict"))
    said = announced(shard_size=SIZE, selection="strict")
    assert said == f"repack: {num_strict} samples into {-(-num_strict // SIZE)} shards"
    target.remove(layout.shard_stats_path("00001"))
    assert announced(shard_size=SIZE).endswith("samples into 1 shards")
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000))
    with pytest.raises(DeclipError, match=r"5.0 KB are free"):
        announced(shard_size=SIZE)
    target.write_bytes(layout.shard_stats_path("00001"), b"{}")
    needed = planning.estimate_bytes(
        Store(root), planning.plan_repack(Store(root), "default", 14), planning.CARRIED
    )
    free = needed - planning.replaced_bytes(target)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    announced(shard_size=14)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free - 1))
    with pytest.raises(DeclipError, match="make space, or keep fewer samples"):
        announced(shard_size=14)


# What is refused ----------------------------------------------------------------------------------


def read_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(info)
    assert stream is not None
    return stream.read()


def scatter(path: Path) -> None:
    """Write a tar again with its captions behind all of its pictures."""
    with tarfile.open(path) as tar:
        members = [(info, read_member(tar, info)) for info in tar]
    members.sort(key=lambda member: member[0].name.endswith(".txt"))
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))


def test_members_of_a_key_that_are_not_together_are_refused_by_file_name(root):
    scatter(Path(root, "shards", "00001.tar"))
    with pytest.raises(
        DeclipError, match=r"'shards/00001.tar': the members of sample '\d+' do not"
    ):
        repack(root)


def test_members_of_other_tar_writers_are_copied_as_they_are(tmp_path):
    """Names too long for a plain header have one of their own, which belongs to the member."""
    root = str(tmp_path / "data")
    store = write_fake_dataset(root, num_shards=1, samples_per_shard=6)
    path = Path(root, "shards", "00000.tar")
    with tarfile.open(path) as tar:
        members = [(info, read_member(tar, info)) for info in tar]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(path, "w", format=form) as tar:
            for info, data in members:
                key, _, extension = info.name.partition(".")
                info.name = f"{key}.{'x' * 120 + '.' if extension == 'json' else ''}{extension}"
                tar.addfile(info, io.BytesIO(data))
                info.name = f"{key}.{extension}"
        target = repack(root, selection="", shard_size=6)
        assert target.read_bytes("shards/00000.tar") == path.read_bytes()
        assert len(sample_spans(store, "shards/00000.tar")) == 6


@pytest.mark.parametrize("cut", [700, 20_000])
def test_a_cut_tar_is_refused_by_file_name(root, cut):
    path = Path(root, "shards", "00001.tar")
    path.write_bytes(path.read_bytes()[:-cut] if cut > 10_240 else b"\1" * cut)
    with pytest.raises(DeclipError, match=r"'shards/00001.tar' is"):
        repack(root)


def test_a_kept_sample_that_the_tar_lacks_is_named(root):
    shutil.copy(f"{root}/shards/00000.tar", f"{root}/shards/00001.tar")
    with pytest.raises(DeclipError, match=r"'shards/00001.tar' has no sample '0000\d+', which is"):
        repack(root)


def test_one_key_in_two_shards_is_refused(tmp_path):
    root = str(tmp_path / "data")
    store = write_fake_dataset(root, num_shards=2, samples_per_shard=6)
    for name in (".tar", ".parquet", "_stats.json"):
        store.write_bytes(f"shards/00001{name}", store.read_bytes(f"shards/00000{name}"))
    with pytest.raises(DeclipError, match=r"'000000' is in shard 00000 and in shard 00001; keys"):
        repack(root, selection="")


def test_a_disk_with_less_space_is_refused_before_anything_is_written(root, monkeypatch):
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000))
    with pytest.raises(DeclipError, match=r"will write about .* KB, and 5.0 KB are free in"):
        RepackShards(root=root).tasks()
    assert not Store(root).exists("repacked")


def test_the_estimate_is_near_to_what_is_written(root, capsys):
    store = Store(root)
    plan = planning.plan_repack(store, "default", SIZE)
    estimate = planning.estimate_bytes(store, plan, planning.CARRIED)
    target = repack(root)
    assert f"about {planning.size_text(estimate)} to write" in capsys.readouterr().err
    written = sum(p.stat().st_size for p in Path(target.url).rglob("*") if p.is_file())
    assert 0.8 * written < estimate < 1.3 * written


def test_a_dataset_that_changed_after_planning_is_refused(root):
    planned = inputs_digest(Store(root), "default", planning.CARRIED)
    stage = RepackShards(root=root, shard_size=SIZE, inputs_sha256=planned)
    stage.worker()
    write_selection(Store(root), "default", lambda place: place == 4)
    with pytest.raises(DeclipError, match="was changed after the run was planned; run it again"):
        stage.worker()


def test_an_optout_that_was_cut_short_comes_first(root):
    Store(root).write_bytes(PENDING, b"{}")
    with pytest.raises(DeclipError, match="run declip optout again first"):
        repack(root)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"shard_size": 0}, "shard_size is 0; it must be at least 1. Try 10000."),
        ({"name": "a/b"}, "name is 'a/b'; it must be one folder name"),
        ({"carry": ("signal",)}, "carry has 'signal', which is nothing beside the shards."),
        ({"carry": ("index",)}, "carry has 'index' without 'embeddings'"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence):
    with pytest.raises(DeclipError) as caught:
        RepackShards(root="nowhere", **settings)
    assert str(caught.value).startswith(sentence)


def test_an_empty_selection_says_what_dropped_all(root):
    write_selection(Store(root), "none", lambda place: True)
    with pytest.raises(DeclipError, match=r"selection 'none' has 0 samples kept of"):
        RepackShards(root=root, selection="none").tasks()


# Other readers ------------------------------------------------------------------------------------


def test_webdataset_reads_every_kept_sample_once(root):
    """webdataset's own reader, with sizes.json as open_clip finds it beside the tars."""
    import webdataset

    target = repack(root)
    sizes = json.loads(target.read_bytes("shards/sizes.json"))
    urls = [str(target.local_path(f"shards/{name}")) for name in sizes]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("pilrgb")
    found = [(s["__key__"], s["txt"], s["jpg"].size) for s in dataset]
    assert len(found) == sum(sizes.values())
    kept = rows_by_key(target)
    assert {key: text for key, text, _ in found} == {k: r["caption"] for k, r in kept.items()}
    assert {size for _, _, size in found} == {(32, 32)}


def test_a_file_is_copied_where_it_cannot_be_linked(tmp_path, monkeypatch):
    source, target = Store(str(tmp_path / "a")), Store(str(tmp_path / "b"))
    source.write_bytes("index/x", b"content")

    def refuse(*args: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    for _ in range(2):
        place_file(source, target, "index/x")
        assert target.read_bytes("index/x") == b"content"
    assert os.listdir(tmp_path / "b" / "index") == ["x"]


def test_a_table_of_all_nulls_in_one_shard_joins_the_others():
    table = pa.table({"key": ["a"], "sha256": pa.nulls(1)})
    other = pa.table({"key": ["b"], "sha256": pa.array(["x"])})
    from declip_filter.repack_tables import _stacked

    joined = _stacked([table, other], "shards")
    assert joined.column("sha256").to_pylist() == [None, "x"]
    assert pc.is_null(joined.column("sha256")).to_pylist() == [True, False]
