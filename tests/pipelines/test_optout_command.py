"""``declip optout`` at the terminal."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from declip_shards import DeclipError
from pipelines.optout_command import main

if TYPE_CHECKING:
    from tests.pipelines.optout_dataset import build, files_of, list_rows
else:
    from optout_dataset import build, files_of, list_rows

ROWS = list_rows()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("command") / "data")
    build(root)
    return root


@pytest.fixture
def root(built: str, tmp_path: Path) -> str:
    target = tmp_path / "data"
    shutil.copytree(built, target)
    return str(target)


@pytest.fixture
def listed(tmp_path: Path) -> str:
    path = tmp_path / "list.txt"
    path.write_text(f"{ROWS[7]['url']}\n0000102\nhttps://nobody.example/x.jpg\n")
    return str(path)


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(root, listed, capsys):
    before = files_of(root)
    assert main([listed, "--out", root, "--dry-run"]) == 0
    assert files_of(root) == before
    said = capsys.readouterr().out
    assert "3 entries, 2 matched." in said
    assert "Would remove 2 samples and 0 failed rows from 2 shards: 0000007, 0000102." in said
    with pytest.raises(DeclipError, match="--report is of a removal"):
        main([listed, "--out", root, "--dry-run", "--report", "x.json"])


def test_it_says_what_was_done_and_a_second_time_that_nothing_is(root, listed, tmp_path, capsys):
    report = tmp_path / "proof.json"
    assert main([listed, "--out", root, "--report", str(report)]) == 0
    said = capsys.readouterr().out
    assert "3 entries, 2 matched: 2 samples and 0 failed rows removed." in said
    assert "1 matched no row (later ingests leave them out): https://nobody.example/x.jpg." in said
    assert ": 0 hits." in said
    assert json.loads(report.read_bytes())["removed"]["keys"] == ["0000007", "0000102"]
    (name,) = Path(root, "optout").glob("report-*.json")
    assert report.read_bytes() == name.read_bytes()
    before = files_of(root)
    assert main([listed, "--out", root]) == 0
    assert "Nothing to do: this list was applied before; no file was changed." in (
        capsys.readouterr().out
    )
    assert files_of(root) == before


def test_places_that_still_name_a_sample_are_listed(root, listed, capsys):
    Path(root, "source").mkdir()
    Path(root, "source/pairs.csv").write_text(ROWS[7]["url"])
    assert main([listed, "--out", root]) == 0
    said = capsys.readouterr().out
    assert "source/pairs.csv (bytes): 1 x url: your own list; remove it there" in said


def test_wrong_folders_are_refused(listed, tmp_path):
    with pytest.raises(DeclipError, match="is a file; choose another --out"):
        main([listed, "--out", listed])
    with pytest.raises(DeclipError, match="no complete shard"):
        main([listed, "--out", str(tmp_path / "empty")])
