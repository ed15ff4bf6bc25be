"""A dry run shows what a run would do (settings, steps, sizes, schedule), and changes nothing."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_demo

from declip_shards import Store, TaskStats, manifest
from declip_train.optimizer import learning_rate as trainers_learning_rate
from declip_train.settings import TrainSettings
from pipelines import cli, recipes
from pipelines.dry_run import (
    TEXT_LENGTHS,
    count_samples,
    dry_run_text,
    learning_rate,
    schedule_text,
    settings_text,
)
from pipelines.options import apply_overrides, options_of
from pipelines.states import pipeline_states
from pipelines.wiring import allow_missing_table


def text_of(recipe, root, *overrides, num_samples=None, only=None):
    pipeline = apply_overrides(allow_missing_table(recipes.build(recipe, str(root))), overrides)
    return dry_run_text(pipeline, pipeline.choose(only=only), num_samples=num_samples)


@pytest.mark.parametrize("recipe", sorted(recipes.RECIPES))
def test_every_recipe_can_be_looked_at_and_nothing_is_written(recipe, tmp_path):
    root = tmp_path / "out"
    text = text_of(recipe, root)
    for heading in ("parameters\n", "FLOPs ", "memory of ", "schedule\n"):
        assert (f"\n\n{heading}" in text) == (recipe != "repack")  # which trains nothing
    for name in re.findall(r"^(\w+): .*\(\* differs", text, re.MULTILINE):
        assert f"--{name.replace('_', '-')}." in text
    assert not root.exists()


def test_every_resolved_setting_is_shown_and_marked_where_it_differs(tmp_path):
    overrides = [("--filter.min-words", "4"), ("--train.seed", "3")]
    pipeline = apply_overrides(recipes.build("demo", str(tmp_path)), overrides)
    for step in (step for step in pipeline.steps if not step.settings_of):
        lines = settings_text(step).splitlines()[1:]
        flags = [line.split()[1] if line.startswith("*") else line.split()[0] for line in lines]
        shown = [o.flag for o in options_of(pipeline) if o.step == step.name]
        assert flags == shown
        stage: Any = step.stage
        defaults = {f.name: f.default for f in dataclasses.fields(stage)}
        options = [option for option in options_of(pipeline) if option.step == step.name]
        for line, option in zip(lines, options, strict=True):
            differs = option.value != defaults[option.field]
            assert line.startswith("*") == differs, option.flag
            assert ("(default: " in line) == differs, option.flag
    text = settings_text(pipeline.step("filter"))
    assert re.search(r"^\* --filter\.min-words +4  \(default: 2\)$", text, re.MULTILINE)
    assert re.search(r"^  --filter\.max-words +128$", text, re.MULTILINE)


def finished(store, pipeline, name, num_out):
    """Write the manifest of a finished run of a step, of no files."""
    step = pipeline.step(name)
    inputs = {other: manifest.manifest_digest(store, other) or "" for other in step.reads}
    stats = TaskStats(num_in=num_out, num_out=num_out, reasons={}, files=[])
    receipt = manifest.make_receipt(
        store, "all", manifest.fingerprint(step.stage, step.code_version, inputs), stats
    )
    manifest.write_receipt(store, name, receipt)
    built = manifest.build_manifest(
        step=name,
        stage=step.stage,
        code_version=step.code_version,
        inputs=inputs,
        receipts=[receipt],
    )
    manifest.write_manifest(store, built)


def test_samples_are_the_commands_else_the_selections_else_the_lists(tmp_path):
    pipeline = apply_overrides(
        allow_missing_table(recipes.build("cc3m-clip-vit-b-32", str(tmp_path))), []
    )
    train = pipeline.step("train").stage
    assert isinstance(train, TrainSettings)

    def count(given=None):
        states = {state.step: state for state in pipeline_states(pipeline)}
        found = count_samples(pipeline, train, states, given)
        return found.number, found.source

    assert count() == (3_318_333, "rows of the published list CC3M")
    store = Store(str(tmp_path))
    for name in ("sources", "ingest", "measure", "plan", "filter"):
        finished(store, pipeline, name, 2_905_954)
    assert count() == (2_905_954, "kept by the last run of filter")
    assert count(7) == (7, "from --num-samples")
    # Another filter: the number is the old one's, and says so.
    pipeline = apply_overrides(
        allow_missing_table(recipes.build("cc3m-clip-vit-b-32", str(tmp_path))),
        [("--filter.min-words", "3")],
    )
    assert count() == (2_905_954, "kept by the last run of filter, which is out of date")


def test_what_would_run_and_why_is_what_status_says(tmp_path):
    def lines(**chosen):
        text = text_of("cc3m-clip-vit-b-32", tmp_path, **chosen)
        rows = text.split("\n\n")[1].splitlines()[1:]
        return {row.split()[0]: row for row in rows if not row.startswith(" ")}

    assert all(" runs  " in line and "never finished" in line for line in lines().values())
    alone = lines(only="filter")
    assert " runs " in alone["filter"]
    assert all(" left " in line for name, line in alone.items() if name != "filter")
    pipeline = apply_overrides(
        allow_missing_table(recipes.build("cc3m-clip-vit-b-32", str(tmp_path))), []
    )
    for name in ("sources", "ingest"):
        finished(Store(str(tmp_path)), pipeline, name, 5)
    assert re.search(r"^ingest +done +kept +done, and nothing has changed", lines()["ingest"])


@pytest.mark.parametrize("warmup", [0, 1, 2, 7])
def test_the_schedule_is_the_trainers_own(warmup):
    settings = TrainSettings(
        method="clip", warmup_steps=warmup, start_lr=1e-4, peak_lr=1e-3, end_lr=1e-5
    )
    for step in range(40):
        assert learning_rate(settings, step, 40) == trainers_learning_rate(settings, step, 40)


def test_a_table_that_is_not_there_is_told(tmp_path):
    missing = str(tmp_path / "none.parquet")
    sentence = f"the table {missing!r} is not there; name yours with --ingest.table FILE"
    assert sentence in text_of("pairs", tmp_path, ("--ingest.table", missing))
    gone = str(tmp_path / "gone.tsv")
    sentence = f"the list {gone!r} is not there; --sources.lists FILE"
    assert sentence in text_of("pairs", tmp_path, ("--sources.lists", gone))
    assert "no list is named yet: --sources.lists FILE" in text_of("pairs", tmp_path)
    # The demo makes its own.
    assert "is not there" not in text_of("demo", tmp_path)


def rates(text):
    found = re.findall(r"^    step +([\d,]+)  (\S+)$", text, re.MULTILINE)
    return {int(step.replace(",", "")): float(rate) for step, rate in found}


def test_the_published_schedule_is_shown(tmp_path):
    text = text_of("yfcc15m-v2-declip-vit-b-32", tmp_path)
    assert "128,001 of 4,096 samples: 524,292,096 seen, 34.07 epochs" in text
    shown = rates(text)
    assert shown[1] == 1e-4
    assert shown[2500] == max(shown.values()) == 1e-3
    assert shown[128_001] == 0
    assert "15,388,848 (rows of the published list YFCC15M V2)" in text


def test_a_schedule_that_cannot_be_is_told_and_the_rest_is_shown(tmp_path):
    text = text_of("cc3m-clip-vit-b-32", tmp_path, num_samples=100)
    assert "cannot run: global_batch_size 4096 is larger than the 100" in text
    assert "\n\nmemory of each of 8 processes" in text
    none = schedule_text(TrainSettings(method="clip"), count_samples_of_nothing())
    assert "unknown" in none
    assert "--num-samples" in none


def count_samples_of_nothing():
    pipeline = allow_missing_table(recipes.build("pairs", "nowhere"))
    states = {state.step: state for state in pipeline_states(pipeline)}
    train = pipeline.step("train").stage
    assert isinstance(train, TrainSettings)
    return count_samples(pipeline, train, states, None)


def test_captions_as_long_as_the_context_are_shown_last(tmp_path):
    text = text_of("yfcc15m-v2-clip-vit-b-32", tmp_path)
    rows = re.findall(
        r"^  (\d+) tokens +([\d,.]+) GF +([\d,.]+) GF +([\d,.]+) TF$", text, re.MULTILINE
    )
    assert [int(row[0]) for row in rows] == [*TEXT_LENGTHS, 77]
    image = float(re.findall(r"an image, forward +([\d.]+) GF, 1 a sample", text)[0])
    for row in rows:
        caption, sample, step = (float(number.replace(",", "")) for number in row[1:])
        # Both towers three times; the loss's products are less than a hundredth of that.
        assert sample == pytest.approx(3 * (image + caption), rel=0.01)
        assert step == pytest.approx(sample * 4096 / 1e3, rel=1e-3)


def test_what_is_computed_again_is_told(tmp_path):
    text = text_of("yfcc15m-v2-clip-vit-b-32", tmp_path)
    assert "computed again" not in text
    text = text_of("yfcc15m-v2-clip-vit-b-32", tmp_path, ("--train.accumulation-steps", "4"))
    # Each tower once more beside its three times.
    assert "computed again and not counted: 33%, for accumulation_steps 4" in text
    assert "128 samples at a time" in text


COMMAND = """
import sys, time
began = time.perf_counter()
from pipelines.cli import main
status = main(sys.argv[1:])
print("loaded", *sys.modules)
print("took", time.process_time())
sys.exit(status)
"""


def run_command(tmp_path, *words):
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *words],
        env=tiny_demo.environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_is_quick_loads_nothing_heavy_and_leaves_no_trace(tmp_path):
    ended = run_command(tmp_path, "run", "yfcc15m-v2-defilip-rn50", "--dry-run")
    assert ended.returncode == 0, ended.stderr
    told, _, rest = ended.stdout.partition("\nloaded ")
    loaded, took = rest.split("\ntook ")
    assert "a dry run; nothing is started or written" in told
    heavy = {"torch", "ray", "deepspeed", "faiss", "sklearn", "transformers", "cv2"}
    assert not set(loaded.split()) & heavy
    assert float(took) < 2.0  # seconds of processor time
    assert os.listdir(tmp_path) == []


def test_a_run_in_progress_may_be_looked_at(tmp_path, monkeypatch, capsys):
    # No lock is taken, and a table that is there is read for its digest alone.
    table = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": ["http://127.0.0.1:9/a.jpg"], "caption": ["a"]}), table)
    monkeypatch.chdir(tmp_path)
    before = time.time()
    words = [
        "run",
        "pairs",
        "--dry-run",
        "--ingest.table",
        "list.parquet",
        "--num-samples",
        "90000",
    ]
    assert cli.main(words) == 0
    assert "90,000 (from --num-samples)" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["list.parquet"]
    assert table.stat().st_mtime <= before
