"""The whole demo at the size of a test: real Ray, real HTTP, the real deepspeed launcher."""

import json
import random
import re
import resource
import shutil
import subprocess
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import tiny_demo

from declip_shards import Store, layout, sidecars
from pipelines import recipes
from pipelines.options import apply_overrides
from pipelines.runner import remove_outputs

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.distributed]

IDLE = ("train_index", "fill_index")
"""Not needed at this size: their tasks are of tens of thousands of rows."""
STAGES = [s for s in apply_overrides(recipes.build("demo", "runs"), []).names() if s not in IDLE]
NAMED_FAILURES = {
    "bad_scheme": "bad_scheme",
    "connection_refused": "connection_refused",
    "decompression_bomb": "too_many_pixels",
    "empty_body": "empty_body",
    "gone": "http_410",
    "html_as_image": "not_image",
    "not_found": "http_404",
    "redirect_loop": "redirect_loop",
    "redirect_private": "forbidden_address",
    "server_error": "http_500",
    "slow_body": "timeout",
    "timeout": "timeout",
    "truncated_body": "short_body",
    "truncated_image": "truncated_image",
}
"""What the demo's server does -> how ingest calls it."""
GRACE_SECONDS = 15.0
"""Within which the processes of a killed run must be gone: training's own grace, and a margin."""

LOCAL = ("--runner", "local")
"""Without Ray, whose start is most of a small run's time: the bytes must be the same."""
ON_RAY = ("ingest", "neighbors")
"""Stages that are killed while Ray runs them; the others' tasks run in the killed process."""

RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's helpers, idle, which look for their dead head for a minute if they were just starting."""
RAY_AGENT_SECONDS = 90.0


@dataclass(frozen=True)
class CleanRun:
    fakes: Path
    out: Path
    port: int
    stdout: str

    def seconds(self, stage: str) -> float:
        record = json.loads((self.out / f"manifests/{stage}.run.json").read_text())
        return float(record["seconds"])

    def copy(self, folder: Path) -> Path:
        shutil.copytree(self.out, folder)
        return folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    fakes, out, port = folder / "fakes", folder / "clean", tiny_demo.free_port()
    mark = uuid.uuid4().hex
    ended = tiny_demo.run_tiny(fakes, out, port=port, mark=mark)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    assert not tiny_demo.wait_until_gone(mark, GRACE_SECONDS)
    return CleanRun(fakes=fakes, out=out, port=port, stdout=ended.stdout)


def manifests(out):
    """Name -> bytes of every manifest; times are beside them, in *.run.json."""
    files = (out / "manifests").glob("*.json")
    return {p.stem: p.read_bytes() for p in files if not p.name.endswith(".run.json")}


def without_idle(found):
    return {name: data for name, data in found.items() if name not in IDLE}


def stages_run(ended):
    """Stages that did something, by what the terminal says."""
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    return re.findall(
        r"^(\w+): [\d,]+ in, [\d,]+ out, [\d.]+ s(?: \(.*\))?$", ended.stdout, re.MULTILINE
    )


def stages_skipped(ended):
    return re.findall(r"^(\w+): nothing to do \(", ended.stdout, re.MULTILINE)


def read_shards(out):
    store = Store(str(out))
    return [
        row
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.shard_parquet_path(shard))
    ]


def test_every_stage_ends_with_a_manifest_whose_counts_add_up(clean):
    found = {name: json.loads(data) for name, data in manifests(clean.out).items()}
    assert set(found) == {*STAGES, *IDLE}
    assert [found[name]["num_tasks"] for name in IDLE] == [0, 0]
    for manifest in found.values():
        assert manifest["num_in"] == manifest["num_out"] + sum(manifest["reasons"].values())
    assert found["measure"]["num_in"] == found["ingest"]["num_out"]
    assert found["embed"]["num_out"] == found["filter"]["num_out"] == found["index"]["num_in"]
    assert found["train"]["num_out"] == found["filter"]["num_out"]


def test_failures_turn_up_under_the_names_they_were_made_for(clean):
    made_to_fail = [row for row in read_shards(clean.out) if row["expected_status"]]
    assert len(made_to_fail) == 28
    pairs = {(r["expected_status"], r["error_message"].partition(":")[0]) for r in made_to_fail}
    assert pairs == set(NAMED_FAILURES.items())
    reasons = json.loads(manifests(clean.out)["ingest"])["reasons"]
    assert reasons == Counter(r["error_message"].partition(":")[0] for r in made_to_fail)


def test_training_ran_in_two_processes_and_left_its_records(clean):
    train = clean.out / "train"
    assert len(list(train.glob("checkpoints/*/step_00000012/rank_*.json"))) == 2
    assert list(train.glob("tensorboard/events*"))
    steps = [json.loads(line)["step"] for line in (train / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))


class _References(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        names = ("src", "href", "xlink:href", "srcset", "poster", "data", "action")
        self.found += [(tag, value) for name, value in attributes if name in names]


def test_the_report_stands_alone_and_shows_pictures(clean):
    page = (clean.out / "report/report.html").read_text()
    parser = _References()
    parser.feed(page)
    assert any(tag == "img" for tag, _ in parser.found)
    assert [r for r in parser.found if not (r[1] or "").startswith(("data:", "#"))] == []
    assert [u for u in re.findall(r"url\(([^)]*)", page) if not u.startswith(("data:", "#"))] == []
    assert "@import" not in page
    assert f"Report: {clean.out / 'report/report.html'}" in clean.stdout
    assert "acc1" in clean.stdout
    assert "chance" in clean.stdout


def test_a_second_run_does_nothing_says_so_and_loads_nothing_heavy(clean):
    before = manifests(clean.out)
    words = tiny_demo.command(clean.fakes, "run", "demo", "--out", str(clean.out))
    words[1:1] = ["-X", "importtime"]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [*words, *tiny_demo.options(tiny_demo.TINY | {"prepare.port": clean.port})],
        env=tiny_demo.environment(),
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 0
    assert stages_skipped(ended) == STAGES
    assert "Nothing has changed: nothing was run." in ended.stdout
    assert manifests(clean.out) == before
    modules = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "pyarrow" in modules  # it is a list of imports
    assert not modules & {"torch", "ray", "faiss", "sklearn", "transformers", "deepspeed", "cv2"}
    # 0.6 s of a quiet core; torch alone would take twice as long as all of it.
    assert (after.ru_utime + after.ru_stime) - (used.ru_utime + used.ru_stime) < 2.5


def test_status_says_why_a_stage_would_rerun(clean):
    ended = tiny_demo.run_tiny(
        clean.fakes, clean.out, port=clean.port, command_name="status", filter_min_words=2
    )
    states = {row.split()[0]: row for row in ended.stdout.splitlines() if row.split()}
    assert states["measure"].split()[1] == "done"
    assert "filter.min-words changed from 1 to 2" in states["filter"]
    assert "filter.min-words changed from 1 to 2" in states["plan"]
    assert "reads filter, which is out of date" in states["embed"]
    assert [s for s in STAGES if states[s].split()[1] == "stale"] == STAGES[STAGES.index("plan") :]


def test_a_changed_threshold_reruns_the_filter_and_what_follows(clean, tmp_path):
    out = clean.copy(tmp_path / "out")
    ended = tiny_demo.run_tiny(
        clean.fakes, out, "--until", "index", *LOCAL, port=clean.port, filter_min_words=2
    )
    changed = STAGES[STAGES.index("plan") : STAGES.index("index") + 1]
    assert stages_run(ended) == changed
    assert stages_skipped(ended) == ["prepare", "ingest", "measure", "duplicates"]
    assert json.loads(manifests(out)["filter"])["reasons"]["caption_too_short"] > 0
    # Back again: the same bytes as before the detour.
    again = tiny_demo.run_tiny(clean.fakes, out, "--until", "neighbors", *LOCAL, port=clean.port)
    assert stages_run(again) == changed
    assert manifests(out) == manifests(clean.out)


def test_a_changed_learning_rate_reruns_train_eval_and_report_alone(clean, tmp_path):
    out = clean.copy(tmp_path / "out")
    ended = tiny_demo.run_tiny(clean.fakes, out, port=clean.port, train_peak_lr=5e-4)
    assert stages_run(ended) == ["train", "eval", "report"]
    old, new = json.loads(manifests(clean.out)["train"]), json.loads(manifests(out)["train"])
    assert new["settings"]["peak_lr"] == 5e-4
    assert {f["path"] for f in old["files"]} == {f["path"] for f in new["files"]}
    assert old["files"] != new["files"]


def test_a_changed_port_reaches_the_server_and_ingest(clean, tmp_path):
    out = clean.copy(tmp_path / "out")
    port = tiny_demo.free_port()
    ended = tiny_demo.run_tiny(clean.fakes, out, "--until", "ingest", *LOCAL, port=port)
    assert stages_run(ended) == ["prepare", "ingest"]
    rows, before = read_shards(out), read_shards(clean.out)
    assert {urlsplit(row["url"]).port for row in rows} == {port, port + 1, None}
    assert outcomes(rows) == outcomes(before)


def outcomes(rows):
    """What became of each URL, whatever its port."""
    return {urlsplit(r["url"]).path: (r["error_message"], r["sha256"]) for r in rows}


def test_a_lost_report_is_drawn_again(clean, tmp_path):
    out = clean.copy(tmp_path / "out")
    (out / "report/report.html").unlink()
    ended = tiny_demo.run_tiny(clean.fakes, out, port=clean.port)
    assert stages_run(ended) == ["report"]
    assert (out / "report/report.html").is_file()


def wait_for_steps(out, num_steps):
    """Until the log of training has so many records."""
    log = out / "train/log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if log.is_file() and len(log.read_text().splitlines()) >= num_steps:
            return
        time.sleep(0.02)
    raise AssertionError("training did not begin")


def kill_during(clean, out, stage, rng, share, mark):
    """Kill a run while ``stage`` is at work; returns what was printed before."""
    printed = []
    runner = () if stage in ON_RAY else LOCAL
    with tiny_demo.started(clean.fakes, out, *runner, port=clean.port, mark=mark) as process:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if re.match(rf"{stage}: .* tasks?( \(.*)?$", line):
                break
        else:
            raise AssertionError(f"{stage!r} was not reached: {''.join(printed)}")
        if stage == "train":
            wait_for_steps(out, rng.randint(1, 11))
        else:
            time.sleep(rng.uniform(0, share) * clean.seconds(stage))
        process.kill()
    return "".join(printed)


def test_killed_in_every_stage_in_turn_it_ends_in_the_manifests_of_a_clean_run(clean, tmp_path):
    out, mark = tmp_path / "out", uuid.uuid4().hex
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    expected = manifests(clean.out)
    for stage in STAGES:
        for share in (0.8, 0.4, 0.1, 0.02, 0.0):
            kill_during(clean, out, stage, rng, share, mark)
            killed_at = time.time()
            if stage == "ingest":
                # Workers of Ray outlive the run for a moment, without its HTTP server: what they
                # see then must not count as done.
                time.sleep(2)
                receipts = (out / "manifests/ingest").glob("*.json")
                assert all(path.stat().st_mtime < killed_at for path in receipts)
            if stage not in manifests(out):
                break
            for name in STAGES[STAGES.index(stage) :]:  # faster than the kill: once more
                remove_outputs(Store(str(out)), name)
        assert stage not in manifests(out), f"{stage} was never caught (seed {seed})"
        # What the run before left half done is whole, and as it should be.
        done = STAGES[: STAGES.index(stage)]
        assert without_idle(manifests(out)) == {name: expected[name] for name in done}, (
            f"{stage}, seed {seed}"
        )
    ended = tiny_demo.run_tiny(clean.fakes, out, *LOCAL, port=clean.port, mark=mark)
    assert stages_run(ended) == ["report"]
    assert manifests(out) == expected, f"seed {seed}"
    left = tiny_demo.wait_until_gone(mark, GRACE_SECONDS)
    ours = {pid: words for pid, words in left.items() if not words.startswith(RAY_AGENTS)}
    assert not ours, f"seed {seed}: {ours}"
    left = tiny_demo.wait_until_gone(mark, RAY_AGENT_SECONDS)
    assert not left, f"seed {seed}: {left}"
