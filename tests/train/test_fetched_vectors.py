"""Rows of .npy files at URLs are those that NumPy reads of the files; what is none is refused."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from declip_shards import DeclipError
from declip_train import network_tries
from declip_train.fetched_vectors import FetchedVectors
from declip_train.tar_cache import TarFiles, find_tar

if TYPE_CHECKING:
    from tests.train.foreign_tars import served
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from foreign_tars import served


def packed(table: Any) -> bytes:
    sink = io.BytesIO()
    np.save(sink, table)
    return sink.getvalue()


def vectors(address: str, folder: Path, room: float, *names: str) -> FetchedVectors:
    tars = TarFiles([], folder / "cache", room)
    sources = [find_tar(f"{address}/{name}") for name in names]
    return FetchedVectors(tars.beside(sources, ("embeddings", "vectors")))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_tries, "_SECONDS_BETWEEN_TRIES", 0.001)


@pytest.mark.parametrize("room", [1e9, 0.0], ids=["cached", "by ranges"])
def test_rows_are_numpys(tmp_path: Path, room: float) -> None:
    rng = np.random.default_rng(0)
    tables = {f"{t}.npy": rng.normal(size=(9, 6)).astype(t) for t in ("f2", "f4", "f8")}
    for name, table in tables.items():
        (tmp_path / name).write_bytes(packed(table))
    with served(tmp_path) as (address, server):
        found = vectors(address, tmp_path, room, *tables)
        assert [found.shape(n) for n in range(3)] == [(9, 6)] * 3
        server.asked.clear()
        numbers, rows = rng.integers(0, 3, 40), rng.integers(0, 9, 40)
        expected = [list(tables.values())[n][r] for n, r in zip(numbers, rows, strict=True)]
        np.testing.assert_array_equal(found.rows(numbers, rows), np.array(expected, np.float32))
        assert bool(server.asked) == (room == 0)
        assert found.rows(numbers[:0], rows[:0]).shape == (0, 6)
        with found.open_whole(1) as file:
            assert file.read() == (tmp_path / "f4.npy").read_bytes()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"not numpy's", "is damaged .*; delete it and rerun the embed step"),
        (packed(np.zeros((4, 3)))[:-1], "is damaged .it has 223 bytes, its shape .4, 3. takes 224"),
        (packed(np.zeros((4, 3), np.int64)), "holds int64 of shape .4, 3., but embeddings are flo"),
        (packed(np.zeros(4)), "holds float64 of shape .4,., but embeddings are floats"),
        (packed(np.zeros((4, 3), order="F")), "float64 of shape .4, 3., column by column, but"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with served(tmp_path) as (address, _), pytest.raises(DeclipError, match=sentence):
        vectors(address, tmp_path, 0.0, "a.npy")


def test_a_file_that_goes_or_changes_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(packed(np.zeros((4, 3))))
    with served(tmp_path) as (address, server):
        gone, changed = (vectors(address, tmp_path, 0.0, "a.npy") for _ in range(2))
        server.faults["a.npy"] = 99
        with pytest.raises(DeclipError, match=r"a.npy' cannot be read .*; start the training aga"):
            gone.rows(np.array([0]), np.array([2]))
        server.faults.clear()
        (tmp_path / "a.npy").write_bytes(packed(np.zeros((9, 3))))
        with pytest.raises(DeclipError, match="is another file than the one whose samples were"):
            vectors_again(changed).rows(np.array([0]), np.array([2]))


def vectors_again(found: FetchedVectors) -> FetchedVectors:
    """The same files as another process would have them, that has asked for none yet."""
    found.files._seen.clear()
    return found


def test_vectors_get_what_room_the_tars_leave(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.tar").write_bytes(b"t" * 1000)
    (tmp_path / "a.npy").write_bytes(packed(np.zeros((4, 3))))
    with served(tmp_path) as (address, _):
        sources = [find_tar(f"{address}/{name}") for name in ("t.tar", "a.npy")]
        for room, tar_is_kept, vectors_are in ((1300, True, True), (1200, True, False)):
            folder = tmp_path / f"{room}"
            tars = TarFiles(sources[:1], folder, room)
            assert tars.read(0, 0, 5) == b"ttttt"
            FetchedVectors(tars.beside(sources[1:], ("embeddings", "vectors")))
            kept = sorted(path.stat().st_size for path in (folder / "tars").glob("*.tar"))
            assert kept == [224] * vectors_are + [1000] * tar_is_kept
    said = capfd.readouterr().err
    assert said.count("of which the tars take 0.0: vectors are fetched one by one") == 1
