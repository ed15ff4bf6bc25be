"""The report of a small run: what is on disk is on the page, and nothing else is."""

import html
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from declip_eval.outcomes import outcomes_path, write_outcomes
from declip_eval.results import EvalResult, Provenance, write_result
from declip_eval.score_outcomes import classification_outcomes
from declip_filter import FilterPairs, MeasureImages
from declip_filter import neighbors as neighbor_table
from declip_filter.selection import selected_keys
from declip_shards import DeclipError, Store, TaskStats, layout, manifest, sidecars
from declip_shards.fakes import write_fake_dataset
from declip_train.methods import TERMS
from declip_train.stages import TrainModel
from pipelines.evaluate import EvaluateModel
from pipelines.pipeline import Pipeline, Step
from pipelines.prepare import PrepareDemo
from pipelines.recipes import finish
from pipelines.report import CARD_PATH, NEIGHBORS_SHOWN, PATH, WriteReport
from pipelines.runner import run_pipeline, write_run_record
from pipelines.states import input_digests, step_state

SECTIONS = [
    "Results",
    "Stages",
    "Kept and dropped",
    "Nearest neighbors",
    "Training",
    "Zero-shot",
    "Retrieval",
    "Sources and licenses",
]
ALL = {"num_neighbors": 200, "num_predictions": 200, "num_queries": 200}
"""Settings that show every row of the small run."""
NUM_STEPS = 54_321
ACC1 = 0.4625
WORDS_OF_A_GONE_RUN = "of_a_gone_run"


def caption(color, shape):
    """Good captions, some with markup in them, and two kinds that the filter drops."""
    if color == "yellow":
        return "yellow"
    if color == "blue":
        return "IMG_0001.jpg"
    return f"a {color} {shape} <script>alert('{color}')</script> & more"


def pipeline_of(root):
    """The demo's steps that the report tells of, those before training made small."""
    return Pipeline(
        recipe="small",
        root=str(root),
        steps=(
            # Any stage will do for what only a manifest is read of.
            Step(name="ingest", stage=PrepareDemo(root=str(root))),
            Step(name="measure", stage=MeasureImages(root=str(root)), reads=("ingest",)),
            Step(
                name="filter",
                stage=FilterPairs(root=str(root), keep_splits=()),
                reads=("measure",),
            ),
            Step(
                name="neighbors",
                stage=neighbor_table.BuildNeighbors(root=str(root)),
                reads=("filter",),
            ),
            Step(name="train", stage=TrainModel(root=str(root)), reads=("neighbors",)),
            Step(name="eval", stage=EvaluateModel(root=str(root)), reads=("train",)),
        ),
    )


def rows_of(store):
    """Attempted rows of all shards, by key."""
    rows: dict[str, dict[str, str]] = {}
    for shard in layout.list_shards(store):
        table = sidecars.read_rows(store, layout.shard_parquet_path(shard))
        rows |= {row["key"]: row for row in table}
    return rows


def good_rows(store):
    return [row for row in rows_of(store).values() if row["status"] == "success"]


def add_sources(store):
    for shard in ("00000", "00001"):
        path = layout.shard_parquet_path(shard)
        table = sidecars.read_table(store, path)
        values = {"source": [f"shapes of {shard}"] * len(table)}
        values["license"] = ["CC0 <b>1.0</b>"] * len(table)
        for name, column in values.items():
            table = table.append_column(name, pa.array(column))
        sidecars.write_table(store, path, table)


def make_ingest(store):
    rows = rows_of(store)
    failed = sum(row["status"] != "success" for row in rows.values())
    return TaskStats(
        num_in=len(rows),
        num_out=len(rows) - failed,
        reasons={"failed_to_download": failed},
        files=[f"shards/{name}" for name in store.list("shards")],
    )


def make_neighbors(store):
    """Each kept pair's next four kept pairs of its shard; the last pair of a shard has none."""
    files, num_rows = [], 0
    for shard in layout.list_shards(store):
        keys = selected_keys(store, "default", shard)
        found = [keys[n + 1 : n + 5] for n in range(len(keys))]
        scores = [[0.9 - n / 1000 - m / 10 for m in range(len(f))] for n, f in enumerate(found)]
        columns = {"key": keys, "neighbor_keys": found, "scores": scores}
        columns |= {name: ["0" * 64] * len(keys) for name in ("index_sha256", "table_sha256")}
        files.append(layout.neighbors_path("captions", shard))
        sidecars.write_table(store, files[-1], pa.table(columns, schema=neighbor_table.SCHEMA))
        num_rows += len(keys)
    return TaskStats(num_in=num_rows, num_out=num_rows, files=files)


def make_train(store):
    log = Path(store.local_path("train/log.jsonl"))
    log.parent.mkdir()
    records = []
    for step in range(10, 101, 10):
        record = {"step": step, "num_steps": NUM_STEPS, "time": 1.7e9 + step}
        record |= {"samples_seen": step * 64}
        record |= {name: 5 / math.sqrt(step) + n for n, name in enumerate(TERMS)}
        record |= {"total": 3.0, "logit_scale": 14.3, "learning_rate": 1e-3, "epoch": step / 50}
        record |= {"samples_per_second": 123.0, "data_wait": 0.1}
        records.append(json.dumps(record) + "\n")
    log.write_text("".join(records))
    settings = {"method": "declip", "model": "test", "selection": "default", "splits": []}
    store.write_bytes("train/config.json", json.dumps(settings).encode())
    kept = sum(len(selected_keys(store, "default", s)) for s in layout.list_shards(store))
    return TaskStats(
        num_in=kept,
        num_out=kept,
        volatile_files=["train/config.json", "train/log.jsonl"],
        extra={"num_steps": 100, "samples_seen": 6_400},
    )


def result(task, pretrained="weights", **metrics):
    chance = {name: value / 8 for name, value in metrics.items()}
    return EvalResult(
        dataset="small/test",
        model="test",
        pretrained=pretrained,
        task=task,
        metrics=metrics,
        provenance=Provenance(num_samples=20, chance=chance),
    )


def make_eval(store):
    """Zero-shot answers that are wrong every third time, and five pictures for each caption."""
    folder = store.local_path("eval")
    paths = [
        write_result(result("zeroshot_classification", acc1=ACC1), folder),
        write_result(result("zeroshot_retrieval", **{"image_retrieval_recall@5": 0.875}), folder),
        write_result(result("linear_probe", lp_acc1=0.625), folder),
    ]
    write_result(result("linear_probe", WORDS_OF_A_GONE_RUN, lp_acc1=0.3131), folder)
    rows = good_rows(store)
    labels = sorted({row["label"] for row in rows})
    predictions, retrieved = [], []
    for n, row in enumerate(rows):
        others = [name for name in labels if name != row["label"]]
        best = [row["label"], *others] if n % 3 else [*others[:2], row["label"]]
        answer = {name: row[name] for name in ("split", "key", "label", "category")}
        predictions.append(answer | {"predicted": best[:5], "scores": [0.5] * 5})
        found = [rows[(n + m) % len(rows)]["key"] for m in range(5)]
        retrieved.append(
            {
                "split": row["split"],
                "caption": row["caption"],
                "keys": found,
                "right": [m == n % 7 for m in range(5)],
                "scores": [0.8 - n / 1000 - m / 10 for m in range(5)],
            }
        )
    answers = np.eye(5, dtype=np.float32)
    outcomes = classification_outcomes(list("abcde"), answers, np.arange(5))
    paths += [write_outcomes(outcomes, outcomes_path(path)) for path in paths]
    files = [f"eval/{path.name}" for path in paths]
    for name, table in (("predictions", predictions), ("retrieval", retrieved)):
        files.append(f"eval/{name}.parquet")
        sidecars.write_table(store, files[-1], pa.Table.from_pylist(table))
    return TaskStats(num_in=len(rows), num_out=len(rows), files=files)


MAKERS = {
    "ingest": make_ingest,
    "neighbors": make_neighbors,
    "train": make_train,
    "eval": make_eval,
}
"""Step -> what writes its files here; the others run as they are."""


def publish(store, step):
    """Do a step and leave what the runner leaves."""
    inputs = input_digests(store, step)
    digest = manifest.fingerprint(step.stage, step.code_version, inputs)
    if step.name in MAKERS:
        done = {"all": MAKERS[step.name](store)}
    else:
        work = step.stage.worker()
        done = {task: work(task) for task in step.stage.tasks()}
    receipts = [manifest.make_receipt(store, task, digest, stats) for task, stats in done.items()]
    made = manifest.build_manifest(
        step=step.name,
        stage=step.stage,
        code_version=step.code_version,
        inputs=inputs,
        receipts=receipts,
    )
    manifest.write_manifest(store, made)
    write_run_record(store, made, seconds=1.5, runner="local")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a small run in which all but the report is done."""
    root = tmp_path_factory.mktemp("run")
    store = write_fake_dataset(str(root), fail_every=8, caption=caption)
    add_sources(store)
    for step in pipeline_of(root).steps:
        publish(store, step)
    return root


@pytest.fixture
def run(finished, tmp_path):
    """A copy to change."""
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    return tmp_path / "run"


def write(root, **settings):
    stage = WriteReport(root=str(root), **settings)
    stats = stage.worker()("all")
    assert stage.is_done("all")
    assert stats.num_in == stats.num_out + sum(stats.reasons.values())
    return (root / PATH).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(finished):
    return write(finished, **ALL)


def sections(page):
    """Title -> markup."""
    found = re.findall(r"<section [^>]*><h2>(.*?)</h2>(.*?)</section>", page, re.DOTALL)
    return dict(found)


def spans(markup, kind):
    found = re.findall(rf'<span class="{kind}"[^>]*>(.*?)</span>', markup, re.DOTALL)
    return [html.unescape(text) for text in found]


def neighbor_rows(markup):
    """(captions of query and found, scores of the found) of each row, sorted."""
    rows = markup.split('<div class="neighbors">')[1:]
    return sorted((spans(row, "caption"), spans(row, "score")) for row in rows)


def test_every_section_is_there_in_order(page):
    assert list(sections(page)) == SECTIONS
    for title in SECTIONS:
        assert re.search(rf'<a href="#[^"]+">{title}</a>', page)


def test_results_are_those_of_evals_manifest_beside_chance(finished, page):
    results = sections(page)["Results"]
    for metric, value in (
        ("acc1", ACC1),
        ("image_retrieval_recall@5", 0.875),
        ("lp_acc1", 0.625),
    ):
        cells = f"<td>{metric}</td>" + "".join(
            f'<td class="number">{text}</td>' for text in (f"{value:.4f}", f"{value / 8:.4f}")
        )
        assert cells in results
    # It lies in the folder, from other settings, but the last evaluation did not write it.
    assert list((finished / "eval").glob(f"*{WORDS_OF_A_GONE_RUN}*"))
    assert "0.3131" not in page


def test_stages_carry_fingerprints_and_counts(finished, page):
    store = Store(str(finished))
    rows = re.findall(r"<tr>(.*?)</tr>", sections(page)["Stages"], re.DOTALL)[1:]
    cells = {found[0]: found[1:] for found in (re.findall(r">([^<]+)</td>", r) for r in rows)}
    assert set(cells) == set(pipeline_of(finished).names())
    reads = {step.name: step.reads for step in pipeline_of(finished).steps}
    names = list(cells)
    assert all(names.index(read) < names.index(name) for name in names for read in reads[name])
    for name, found in cells.items():
        done = manifest.read_manifest(store, name)
        assert done is not None
        counts = [done.num_in, done.num_out, sum(done.reasons.values())]
        assert found == [done.fingerprint[:12], *(f"{n:,}" for n in counts), "1.50"]


def test_each_drop_and_failure_reason_has_its_count(finished, page):
    rows = rows_of(Store(str(finished))).values()
    expected = Counter(
        "http_404"
        if row["status"] != "success"
        else {"yellow": "caption_too_short", "IMG_0001.jpg": "caption_is_file_name"}.get(
            row["caption"], "kept"
        )
        for row in rows
    )
    assert len(expected) == 4
    shown = sections(page)["Kept and dropped"]
    for reason, count in expected.items():
        assert f"{reason}: {count}" in shown
        if reason != "http_404":
            assert f"<figcaption>{reason}: {count}</figcaption>" in shown
    assert sum(expected.values()) == len(rows)
    assert "held_out:" not in shown


def test_samples_of_a_reason_are_of_that_reason_and_not_too_many(finished):
    shown = sections(write(finished, num_examples=2))["Kept and dropped"]
    store = Store(str(finished))
    reasons = {
        row["key"]: row["reason"] or "kept"
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.selection_path("default", shard))
    }
    grids = re.findall(r"<figcaption>(\w+): \d+</figcaption>(.*?)</figure>", shown, re.DOTALL)
    assert {reason for reason, _ in grids} == set(reasons.values())
    for reason, grid in grids:
        keys = spans(grid, "note")
        assert len(keys) == 2
        assert {reasons[key] for key in keys} == {reason}
        assert grid.count("<img ") == 2


def test_neighbors_stand_with_captions_and_scores(finished, page):
    store = Store(str(finished))
    captions = {key: row["caption"] for key, row in rows_of(store).items()}
    expected, num_rows = [], 0
    for shard in layout.list_shards(store):
        for row in sidecars.read_rows(store, layout.neighbors_path("captions", shard)):
            num_rows += 1
            found = row["neighbor_keys"][:NEIGHBORS_SHOWN]
            scores = [f"{score:.3f}" for score in row["scores"][:NEIGHBORS_SHOWN]]
            if found:
                expected.append(([captions[key] for key in (row["key"], *found)], scores))
    shown = sections(page)["Nearest neighbors"]
    assert neighbor_rows(shown) == sorted(expected)
    assert len(expected) == num_rows - 2
    assert f"{len(expected) / num_rows:.1%} of the training pairs have a neighbor" in shown


def test_training_names_its_terms_and_not_what_is_no_loss(page):
    shown = sections(page)["Training"]
    for name in (*TERMS, "total"):
        assert re.search(rf"\b{name}\b", shown)
    for other in ("num_steps", "samples_seen", f"{NUM_STEPS}", f"{NUM_STEPS:,}"):
        assert other not in shown
    assert "100 steps, 6,400 samples seen" in shown


def test_a_run_without_a_term_has_no_line_of_it(run):
    log = run / "train" / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        for name in TERMS[1:]:
            del record[name]
    # The last line is cut, as it is while a run writes.
    log.write_text("\n".join(map(json.dumps, records)) + '\n{"step": 110, "num')
    shown = sections(write(run))["Training"]
    assert TERMS[0] in shown
    assert not any(name in shown for name in TERMS[1:])


def test_answers_are_marked_right_and_wrong(finished, page):
    rows = sidecars.read_rows(Store(str(finished)), "eval/predictions.parquet")
    shown = sections(page)["Zero-shot"]
    cards = re.findall(
        r'<div class="card (good|bad|neutral)">(.*?)</div></div>(?=<div class="card|</div>)',
        shown,
        re.DOTALL,
    )
    expected = sorted(
        (
            "good" if row["predicted"][0] == row["label"] else "bad",
            row["label"],
            f"{row['split']}; answered: " + "; ".join(row["predicted"][:3]),
        )
        for row in rows
    )
    found = sorted((tone, spans(c, "caption")[0], spans(c, "note")[0]) for tone, c in cards)
    assert found == expected
    assert shown.count('aria-label="right"') == sum(tone == "good" for tone, *_ in expected)
    assert shown.count('aria-label="wrong"') == sum(tone == "bad" for tone, *_ in expected)
    for split, count in Counter(row["split"] for row in rows).items():
        assert f"{split}: {count:,} images by category" in shown


def test_as_many_right_as_wrong_answers_are_drawn(finished):
    shown = sections(write(finished, num_predictions=8))["Zero-shot"]
    assert (shown.count('class="card good"'), shown.count('class="card bad"')) == (4, 4)


def test_retrieved_pictures_stand_with_scores_and_a_tick_at_the_right_one(finished, page):
    store = Store(str(finished))
    captions = {key: row["caption"] for key, row in rows_of(store).items()}
    rows = sidecars.read_rows(store, "eval/retrieval.parquet")
    shown = sections(page)["Retrieval"]
    assert neighbor_rows(shown) == sorted(
        (
            [row["caption"], *(captions[key] for key in row["keys"])],
            [f"{score:.3f}" for score in row["scores"]],
        )
        for row in rows
    )
    assert shown.count('class="card good"') == sum(sum(row["right"]) for row in rows)
    assert 'class="card bad"' not in shown
    assert shown.count("<img ") == sum(len(row["keys"]) for row in rows)


def test_sources_are_counted_without_the_failed(finished, page):
    shown = sections(page)["Sources and licenses"]
    found = [
        tuple(map(html.unescape, cells))
        for cells in re.findall(
            r'<tr><td>(.*?)</td><td>(.*?)</td><td class="number">(.*?)</td>', shown
        )
    ]
    counts = Counter(
        (row["source"], row["license"]) for row in good_rows(Store(str(finished)))
    ).items()
    assert found == sorted((*names, str(count)) for names, count in counts)
    assert len(found) == 2


def test_data_is_shown_and_never_markup(page):
    assert "<script" not in page.lower()
    assert "<b>" not in page
    assert "&lt;script&gt;alert(&#x27;red&#x27;)&lt;/script&gt; &amp; more" in page


def test_nothing_is_fetched(page):
    rest = re.sub(r'xmlns(:\w+)?="http://www\.w3\.org/[^"]*"', "", page)
    assert not re.findall(r"https?:", rest)
    assert not re.findall(r"<(?:link|iframe|object|embed)\b|@import|\burl\(", rest)
    assert all(s.startswith("data:image/") for s in re.findall(r'\bsrc="([^"]*)', rest))
    assert all(s.startswith("#") for s in re.findall(r'\bhref="([^"]*)', rest))


def test_the_same_run_gives_the_same_page(finished, page):
    assert write(finished, **ALL) == page
    assert write(finished, **ALL, title="A <small> run").count("A &lt;small&gt; run") == 2


@pytest.fixture
def reported(run, capsys):
    """A pipeline whose report is drawn, too."""
    last = Step(name="report", stage=WriteReport(root=str(run)), reads=("ingest", "eval"))
    pipeline = Pipeline(recipe="small", root=str(run), steps=(*pipeline_of(run).steps, last))
    run_pipeline(pipeline, [last], runner="local")
    assert "report:" in capsys.readouterr().out
    return pipeline


def test_the_manifest_names_the_card_with_a_hash_and_the_page_without(reported, capsys):
    done = manifest.read_manifest(Store(reported.root), "report")
    assert done is not None
    assert [record.path for record in done.files] == [CARD_PATH]
    assert list(done.volatile_files) == [PATH]
    finish(reported)
    told = capsys.readouterr().out
    for path in (PATH, CARD_PATH):
        assert str(Path(reported.root, path)) in told


@pytest.mark.parametrize("lost", [PATH, CARD_PATH])
def test_a_lost_page_or_card_makes_the_step_stale(reported, lost):
    store, step = Store(reported.root), reported.step("report")
    assert step_state(store, step, {}).state == "done"
    Path(reported.root, lost).unlink()
    state = step_state(store, step, {})
    assert (state.state, lost in state.why) == ("stale", True)


def test_the_card_is_of_this_run_and_holds_no_times(run, tmp_path):
    write(run)
    card = (run / CARD_PATH).read_text(encoding="utf-8")
    (line,) = [
        line for line in card.splitlines() if line.startswith("| small/test") and " acc1 " in line
    ]
    assert f" {100 * ACC1:.2f} " in line
    assert "# test weights" in card
    assert re.search(r"\| steps +\| 100 ", card)
    assert re.search(r"\| samples seen +\| 6,400 ", card)
    assert "31.31" not in card  # Of results that the last evaluation did not write.
    assert "seconds" not in card
    assert "a second" not in card
    # The same run in another folder, at another time and speed.
    other = tmp_path / "elsewhere"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("report"))
    log = other / "train" / "log.jsonl"
    log.write_text(log.read_text().replace("123.0", "77.0").replace('"total": 3.0', '"total": 2.0'))
    for path in (other / "manifests").glob("*.run.json"):
        path.write_text(path.read_text().replace("1.5", "9.5"))
    page = write(other)
    assert "9.5" in page
    assert (other / CARD_PATH).read_bytes() == (run / CARD_PATH).read_bytes()


def test_another_selection_and_table_are_shown(run):
    for folder, old, new in (("selection", "default", "mine"), ("neighbors", "captions", "theirs")):
        (run / folder / old).rename(run / folder / new)
    # What was trained on has the name, too: the card counts it.
    config = run / "train" / "config.json"
    config.write_text(config.read_text().replace("default", "mine"))
    named = write(run, selection="mine", neighbors="theirs")
    with pytest.raises(DeclipError, match=r"selection/default/00000\.parquet' is missing"):
        write(run)
    with pytest.raises(DeclipError, match=r"neighbors/captions/00000\.parquet' is missing"):
        write(run, selection="mine")
    assert list(sections(named)) == SECTIONS


@pytest.mark.parametrize("torn", [False, True])
def test_a_missing_or_empty_training_log_is_one_sentence(run, torn):
    log = run / "train" / "log.jsonl"
    log.unlink()
    if torn:
        log.write_text('{"step": 10, "to')
    with pytest.raises(DeclipError) as error:
        write(run)
    assert str(error.value) == ("train/log.jsonl is missing or empty; run the train stage again.")
    assert not (run / PATH).exists()


def test_a_missing_evaluation_is_one_sentence(run):
    (run / "manifests" / "eval.json").unlink()
    with pytest.raises(DeclipError, match=r"run eval first\.$"):
        write(run)


def test_neighbors_of_other_samples_are_refused(run):
    path = layout.neighbors_path("captions", "00001")
    table = sidecars.read_table(Store(str(run)), path)
    rows = table.to_pylist()
    rows[0]["key"] = "somebody else"
    sidecars.write_table(Store(str(run)), path, pa.Table.from_pylist(rows, schema=table.schema))
    with pytest.raises(DeclipError, match="of other samples than are selected now"):
        write(run)


@pytest.mark.parametrize("value", [0, -1, 201])
@pytest.mark.parametrize(
    "name", ["num_examples", "num_neighbors", "num_predictions", "num_queries"]
)
def test_wrong_numbers_are_refused_at_once(name, value):
    with pytest.raises(DeclipError, match=rf"^{name} is {value}; it must lie between 1 and 200: "):
        WriteReport(root="x", **{name: value})
