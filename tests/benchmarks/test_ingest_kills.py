"""Small versions of the kill benchmark, and what it computes."""

import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

import ingest_kills
from ingest_kills import Kill, Report, plan_kills, result_of, table_text


@pytest.mark.parametrize("number", [1, 7, 50, 1000])
def test_a_plan_has_every_kind_by_its_share(number):
    plan = plan_kills(number, random.Random(0))
    assert len(plan) == number
    assert set(plan) <= set(ingest_kills.KINDS)
    counts = Counter(plan)
    if number >= 50:
        for kind, share in ingest_kills.KINDS.items():
            assert counts[kind] / number == pytest.approx(share, abs=0.02)
    assert plan == plan_kills(number, random.Random(0))


def test_a_build_that_differs_anywhere_is_not_equal(tmp_path):
    def build(name, **changes):
        out = tmp_path / name
        (out / "manifests").mkdir(parents=True)
        (out / "shards").mkdir()
        (out / "manifests" / "ingest.json").write_text('{"files": [{"path": "shards/a.tar"}]}')
        (out / "shards" / "a.tar").write_text(changes.get("tar", "same"))
        for extra in changes.get("extra", ()):
            (out / "shards" / extra).write_text("x")
        judged = {"status": changes.get("status", 0)}
        ingest_kills.judge(out, clean, judged)
        return judged

    clean: dict[str, str] = {}
    build("clean")
    clean = result_of(tmp_path / "clean")
    assert len(clean) == 2
    assert build("same")["equal"]
    assert build("other", tar="flipped")["differing_files"] == ["shards/a.tar"]
    assert not build("failed", status=1)["equal"]
    assert not build("left", extra=["b.tar.part-1-0123abcd"])["equal"]
    assert result_of(tmp_path / "nothing") == {}


def test_the_table_counts_kills_and_tells_a_difference():
    report = Report(seed=3, num_shards=9, shard_size=5, clean_seconds=10.0)
    report.kills = [Kill("worker", 0, 3, 1.0), Kill("driver", 0, 4, 2.0)]
    report.builds = [{"seconds": 16.0, "equal": True}]
    text = table_text(report)
    assert "worker         1  yes" in text
    assert "raylet         0  yes" in text
    assert "clean 10.0 s; 3.0 s lost a kill" in text
    report.builds.append({"seconds": 16.0, "equal": False})
    assert "NO" in table_text(report)


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_a_driver_and_a_node_are_lost_and_the_bytes_are_those_of_a_clean_run(tmp_path):
    # In a process of its own: Ray keeps the first token that a process has shown.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        report = process.submit(
            ingest_kills.run,
            plan=["worker", "driver", "worker"],
            shards=24,
            shard_size=4,
            seed=1,
            delay=0.3,
            folder=Path(tmp_path),
            num_losses=1,
            longest_pause=0.3,
        ).result()
    assert all(build["equal"] for build in report.builds), report.builds
    assert Counter(kill.kind for kill in report.kills) == {"worker": 2, "driver": 1}
    assert report.nodes["equal"], report.nodes
    assert report.nodes["losses"] == 1
    # Something was under way each time.
    assert all(kill.num_done > 0 for kill in report.kills)
