"""``declip doctor ingest`` from the command line."""

import json
import shutil
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from declip_ingest.doctor import diagnose
from pipelines import doctor_command
from pipelines.cli import main

sys.path.append(str(Path(__file__).parents[1] / "ingest"))
if TYPE_CHECKING:
    from tests.ingest.misbehaving_server import MisbehavingServer
    from tests.ingest.refetch_runs import DOWN, GONE, NUM_ROWS, all_files, ingest, make_stage, serve
else:
    from misbehaving_server import MisbehavingServer
    from refetch_runs import DOWN, GONE, NUM_ROWS, all_files, ingest, make_stage, serve


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """An ingest while half of the server was down."""
    with MisbehavingServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        serve(server, is_up=False)
        root = tmp_path_factory.mktemp("once")
        ingest(make_stage(root, server))
        server.stopping.set()
        server.shutdown()
    return root


@pytest.fixture
def dataset(once, tmp_path):
    return shutil.copytree(once, tmp_path / "dataset")


def test_it_reads_alone_and_writes_nothing(dataset, capsys):
    before = all_files(dataset)
    assert main(["doctor", "ingest", "--out", str(dataset), "--no-probe"]) == 0
    said = capsys.readouterr().out
    assert f"{NUM_ROWS - len(DOWN) - len(GONE)} of {NUM_ROWS} rows are pictures" in said
    assert "http_404" in said
    assert all_files(dataset) == before


def test_json_can_be_read_by_programs(dataset, capsys):
    assert main(["doctor", "ingest", "--out", str(dataset), "--no-probe", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["num_rows"] == NUM_ROWS
    assert value["reasons"]["http_404"]["count"] == len(GONE)


def test_it_probes_as_many_hosts_as_it_is_told(dataset, capsys, monkeypatch):
    asked = {}

    def look(root, **options):
        asked.update(options)
        return diagnose(root, num_probes=0)

    monkeypatch.setattr(doctor_command, "diagnose", look)
    assert main(["doctor", "ingest", "--out", str(dataset), "--probe-urls", "7"]) == 0
    assert asked["num_probes"] == 7
    capsys.readouterr()


@pytest.mark.parametrize("number", ["0", "-5", "20000"])
def test_a_sample_that_is_none_is_refused(dataset, capsys, number):
    assert main(["doctor", "ingest", "--out", str(dataset), "--probe-urls", number]) == 1
    assert f"--probe-urls is {number} but must lie between 1 and 10,000" in capsys.readouterr().err


def test_a_folder_without_a_dataset_is_told(tmp_path, capsys):
    assert main(["doctor", "ingest", "--out", str(tmp_path / "none")]) == 1
    assert "holds no dataset" in capsys.readouterr().err


def test_another_subject_is_refused(capsys):
    assert main(["doctor", "trian", "--out", "x"]) == 1
    assert "WHAT is 'trian'. Did you mean 'train'? Known: ingest, train." in capsys.readouterr().err
    assert main(["doctor", "train", "--out", "x"]) == 1
    assert "holds no log of a training" in capsys.readouterr().err
