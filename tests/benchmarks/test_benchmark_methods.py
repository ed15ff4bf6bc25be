"""The table of the five methods: what its runs share, what is counted, and one run of it."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import tiny_demo

import methods
from declip_eval.results import EvalResult, Provenance, write_result
from declip_shards import DeclipError, Store
from declip_shards.manifest import settings_of
from declip_train.methods import METHODS, TERMS
from pipelines import recipes
from pipelines.options import apply_overrides

STEPS = ["ingest", "neighbors"]


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def data(tmp_path):
    files = {
        "shards/00000.tar": "pictures",
        "neighbors/captions/00000.parquet": "neighbors",
        "embeddings/text/text_emb/text_emb_0.npy": "vectors",
        "manifests/ingest.json": "1",
        "manifests/neighbors.json": "2",
        "manifests/ingest/00000.json": "receipt",
        "manifests/lock": "",
    }
    write(tmp_path / "data", files)
    return tmp_path / "data"


def files_under(folder):
    found = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_text() for p in found}


def test_a_run_shares_the_datas_files_and_nothing_else(data, tmp_path):
    run = tmp_path / "run"
    methods.share_data(data, run, STEPS)
    expected = {n: t for n, t in files_under(data).items() if not n.endswith(("0.json", "lock"))}
    assert files_under(run) == expected
    for name in ("shards/00000.tar", "embeddings/text/text_emb/text_emb_0.npy"):
        assert (run / name).samefile(data / name)


def test_what_a_run_made_itself_stays_when_data_is_shared_again(data, tmp_path):
    run = tmp_path / "run"
    methods.share_data(data, run, STEPS)
    own = {
        "train/export.json": "model",
        "eval/table.txt": "table",
        "embeddings/model/img_emb/0.npy": "own",
        "manifests/train.json": "3",
    }
    write(run, own)
    before = files_under(run)
    inode = (run / "shards").stat().st_ino
    methods.share_data(data, run, STEPS)
    assert files_under(run) == before
    assert (run / "shards").stat().st_ino == inode  # Nothing was linked again.
    # Other data: stale shards go, new ones come, one's own stays.
    (data / "shards/00000.tar").unlink()
    (data / "manifests/ingest.json").unlink()
    write(data, {"shards/00001.tar": "other", "manifests/ingest.json": "changed"})
    methods.share_data(data, run, STEPS)
    after = files_under(run)
    assert {n: after[n] for n in own} == own
    assert after["shards/00001.tar"] == "other"
    assert "shards/00000.tar" not in after
    assert after["manifests/ingest.json"] == "changed"


def test_sharing_that_was_interrupted_is_done_again(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    methods.share_data(data, run, STEPS)
    expected = files_under(run)
    (data / "manifests/ingest.json").unlink()
    write(data, {"manifests/ingest.json": "changed"})

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(methods.shutil, "copytree", killed)
        with pytest.raises(KeyboardInterrupt):
            methods.share_data(data, run, STEPS)
    assert not list(run.glob("manifests/*.json"))
    methods.share_data(data, run, STEPS)
    assert files_under(run) == expected | {"manifests/ingest.json": "changed"}


def test_files_are_copied_where_there_are_no_hard_links(data, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("not on this file system")

    monkeypatch.setattr(methods.os, "link", refuse)
    methods.share_data(data, tmp_path / "run", STEPS)
    assert (tmp_path / "run/shards/00000.tar").read_text() == "pictures"
    assert not (tmp_path / "run/shards/00000.tar").samefile(data / "shards/00000.tar")


def test_methods_differ_in_method_and_seed_alone():
    _, overrides = methods.parse(["--out", "x", "--epochs", "4"])

    def settings(method, seed=0):
        pipeline = methods.make_pipeline(Path("x"), overrides, method, seed)
        found = settings_of(pipeline.step("train").stage, hashed_only=True)
        assert (found.pop("method"), found.pop("seed")) == (method, seed)
        return found

    common = settings("clip")
    assert all(settings(method, seed) == common for method in METHODS for seed in (0, 1))
    assert common["epochs"] == 4
    assert common["warmup_steps"] == recipes.DEMO_TRAINING["warmup_steps"] / 2
    assert common["augmentation"] == common["ssl_augmentation"] == "demo"


def test_settings_of_the_recipe_reach_every_run_and_ours_are_refused():
    _, overrides = methods.parse(["--out", "x", "--train.peak-lr", "0.5", "--train.token-dim", "8"])
    stage = methods.make_pipeline(Path("x"), overrides, "filip", 1).step("train").stage
    assert (stage.peak_lr, stage.token_dim) == (0.5, 8)
    for flag in methods.OURS:
        with pytest.raises(DeclipError, match="is set by this command's --methods, --seeds"):
            methods.parse(["--out", "x", flag, "1"])


def test_time_is_that_of_the_steps_whatever_the_run_was_interrupted_by():
    log = [
        {"step": 10, "time": 100.0, "samples_per_second": 40.0},
        {"step": 20, "time": 9000.0, "samples_per_second": 80.0},  # resumed hours later
        {"step": 25, "time": 9001.0, "samples_per_second": 20.0},
    ]
    assert methods.training_seconds(log, batch=8) == pytest.approx(2 + 1 + 2)


RATES = {"clip": (0.2, 0.3, 0.4), "filip": (0.1, 0.1, 0.4)}
"""Method -> what each of its seeds gets everywhere."""


def finish_run(folder, method, seed):
    """What a trained and evaluated run leaves, with one rate for every figure."""
    rate = RATES[method][seed]
    rows: dict[tuple[str, str], list[str]] = {}
    for figure in methods.FIGURES:
        rows.setdefault((figure.split, figure.task), []).append(figure.metric)
    for (split, task), names in rows.items():
        result = EvalResult(
            dataset=f"demo/{split}",
            model="test",
            pretrained=method,
            task=task,
            metrics=dict.fromkeys(names, rate),
            provenance=Provenance(
                num_samples=100,
                chance=dict.fromkeys(names, 0.05),
                intervals=dict.fromkeys(names, (rate - 0.1, rate + 0.1)),
                settings={"scoring": "global"},
            ),
        )
        write_result(result, folder / "eval")
    term = "tokenwise" if method == "filip" else "contrastive"
    log = [
        {"step": step, "samples_per_second": 32.0 * (seed + 1), "total": 1.0, term: float(step)}
        for step in range(1, 21)
    ]
    write(folder, {"train/log.jsonl": "".join(json.dumps(r) + "\n" for r in log)})


@pytest.fixture
def runs(tmp_path):
    found = []
    for method in RATES:
        for seed in range(3):
            finish_run(tmp_path / f"{method}-{seed}", method, seed)
            found.append(methods.collect(tmp_path / f"{method}-{seed}", method, seed, batch=16))
    return found


def test_a_run_is_its_figures_times_and_last_losses(runs):
    run = runs[1]
    assert (run["method"], run["seed"], run["num_steps"]) == ("clip", 1, 20)
    assert set(run["figures"].values()) == {0.3}
    assert run["train_seconds"] == pytest.approx(20 * 16 / 64)
    assert run["samples_per_second"] == pytest.approx(64)
    assert run["terms"] == {"contrastive": 19.5}  # Mean of the last tenth: 19 and 20.
    assert json.loads(json.dumps(run)) == run


def test_the_table_has_means_and_spreads_of_the_seeds(runs):
    rows = methods.rows_of(runs)
    for figure in methods.FIGURES:
        for method, rates in RATES.items():
            cell = rows[figure.label][method]
            assert cell["mean"] == pytest.approx(100 * statistics.fmean(rates))
            assert cell["std"] == pytest.approx(100 * statistics.stdev(rates))
            assert cell["num"] == 3
    assert set(rows["loss term tokenwise"]) == {"filip"}
    columns, lines = methods.table_of(runs)
    assert columns[1:] == ["chance", "clip", "filip"]
    assert lines[0][1:] == ["5.00", "30.0 ± 10.0", "20.0 ± 17.3"]
    by_label = {line[0]: line[1:] for line in lines}
    assert by_label["loss term contrastive"] == ["", "19.50 ± 0.00", "-"]
    assert set(by_label) <= set(rows)
    assert len({len(line) for line in methods.format_table(columns, lines).splitlines()}) == 1
    # One seed has no spread to tell.
    assert methods.table_of(runs[:1])[1][0][2] == "20.0"


def test_runs_above_chance_are_counted_by_their_intervals(runs):
    found = methods.above_chance(runs)
    assert set(found) == {f.label for f in methods.FIGURES if f.label.startswith("zero-shot")}
    assert all(row == {"clip": "3 of 3", "filip": "1 of 3"} for row in found.values())


def test_the_page_draws_every_figure_with_its_spread(runs):
    html = methods.draw(runs, "about")
    assert html.count("<figure") == len(methods.FIGURES) + 2
    assert "30.0 ± 10.0" in html
    assert 'class="spread"' in html
    assert 'class="spread"' not in methods.draw(runs[:1], "about")


@pytest.mark.slow
@pytest.mark.distributed
def test_it_runs_and_a_second_time_does_nothing(tmp_path, monkeypatch, capfd):
    import pipelines.prepare as prepare_module
    from pipelines.demo_data import prepare_demo
    from pipelines.demo_fakes import make_fake_packages

    def prepare(folder, cache, **others):
        packages, client = make_fake_packages(tmp_path / "origin")
        cache = tmp_path / "cache"
        return prepare_demo(folder, cache, packages=packages, client=client, **others)

    monkeypatch.setattr(prepare_module, "prepare_demo", prepare)
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    settings = tiny_demo.TINY | {
        "prepare.port": tiny_demo.free_port(),
        "prepare.num-failures": 0,
        "train.max-steps": 4,
        "train.num-ranks": 1,
    }
    words = ["--out", str(tmp_path / "out"), "--methods", "filip", "--seeds", "3"]
    words += ["--runner", "local", *tiny_demo.options(settings)]
    assert methods.main(words) == 0
    table = capfd.readouterr().out
    content = json.loads((tmp_path / "out/methods.json").read_text())
    (run,) = content["runs"]
    assert (run["method"], run["seed"], run["num_steps"]) == ("filip", 3, 4)
    assert run["scoring"] == "token-wise"
    assert set(run["terms"]) == {"tokenwise"} < set(TERMS)
    assert str(tmp_path) not in json.dumps(content)
    assert "zero-shot top-1, test_vendor, %" in table
    folder = tmp_path / "out/filip-3"
    assert not Store(str(folder)).exists("embeddings/model")  # Untrained: not written.
    marks = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert methods.main(words) == 0
    again = capfd.readouterr().out
    names = apply_overrides(recipes.build("demo", "x"), []).names()
    # All but the report; an index of so few samples has no parts.
    num_idle = again.count("not needed")
    assert again.count("nothing to do") == len(names) - 1 - num_idle
    assert num_idle == 2
    changed = {p.name for p, at in marks.items() if p.stat().st_mtime_ns != at}
    assert changed <= {"lock", "tasks.lock"}
    assert json.loads((tmp_path / "out/methods.json").read_text()) == content
