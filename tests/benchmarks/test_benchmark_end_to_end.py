"""The end-to-end benchmark: its shards are whole, and it reads open_clip's log."""

import io
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

import end_to_end


def test_drawn_shards_hold_pairs(tmp_path):
    kilobytes = end_to_end.draw_shards(tmp_path / "s", 600, 64, 48)
    tars = sorted((tmp_path / "s").glob("*.tar"))
    assert [t.name for t in tars] == ["00000.tar", "00001.tar"]
    assert end_to_end.tar_pattern(tmp_path / "s").endswith("/{00000..00001}.tar")
    sizes, names = [], set()
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                names.add(member.name)
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    data = file.read()
                    sizes.append(len(data))
                    assert Image.open(io.BytesIO(data)).size == (64, 48)
    assert len(names) == 1200
    assert np.isclose(np.mean(sizes) / 1024, kilobytes)


def test_open_clips_log_line_is_read():
    line = (
        "2026-11-21,21:53:59 | INFO | Train Epoch: 0 [ 48/48 (100%)] Data (t): 0.012 "
        "Batch (t): 3.412, 2.34433/s, 2.34433/s/gpu LR: 0.000100 Logit Scale: 14.286"
    )
    assert end_to_end.RATE.findall(line) == [("0.012", "3.412", "2.34433")]


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ([], "/wheels"),
        (["--peer-path", "/other"], "/other"),
        (["--peer-python", "/other/python"], None),
        (["--peer-python", "/other/python", "--peer-path", "/other"], "/other"),
    ],
)
def test_open_clip_finds_its_packages(monkeypatch, words, path):
    monkeypatch.setenv("PYTHONPATH", "/wheels")
    given = end_to_end.build_parser().parse_args(words)
    assert end_to_end.peer_environment(given).get("PYTHONPATH") == path
    assert (given.peer_python == sys.executable) == ("--peer-python" not in words)


def test_utilizations_are_as_rates():
    mine = {"samples_per_second": 3000.0, "flop_utilization": 0.3}
    peer = {"samples_per_second": 2000.0, "data_wait": 0.1}
    results: dict[str, object] = {"clip": mine, "open_clip": peer}
    end_to_end.compare_with_peer(results)
    assert results["times_open_clip"] == 1.5
    assert peer["flop_utilization"] == 0.2
    failed = {"clip": {"error": "x"}, "open_clip": peer}
    end_to_end.compare_with_peer(failed)
    assert "times_open_clip" not in failed
