"""All evaluations, one after the other."""

import dataclasses
import json
import shutil
import tarfile
import threading

import pytest
from tiny_sets import COLORS, ColorModel, write_colors, write_multilabel, write_pairs

from declip_eval.dataset_table import find_dataset
from declip_eval.labelled_sets import open_labelled_set
from declip_eval.outcomes import metrics_of, outcomes_path, read_outcomes
from declip_eval.results import read_result
from declip_shards import DeclipError
from pipelines.eval_examples import read_examples
from pipelines.eval_jobs import plan_jobs
from pipelines.eval_options import parse_options
from pipelines.eval_ranks import Ranks
from pipelines.eval_summary import SUMMARY, exit_status, locked
from pipelines.eval_tasks import Evaluation


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    write_colors(root / "colors")
    write_colors(root / "broken", broken=1)
    write_pairs(root / "pairs")
    write_multilabel(root / "multi")
    return root


@pytest.fixture
def run(root, tmp_path):
    """Evaluate, and return the report and how many pictures went through the model."""

    def evaluate(words, model=None, load=None, info=None):
        model = model or ColorModel()
        words = (
            f"--dataset-root {root} --output {tmp_path / 'out'} --feature-root {tmp_path / 'f'} "
            f"--num-resamples 100 --num-examples 4 --model m {words}"
        )
        options = parse_options(words.split())
        before = model.num_encoded
        jobs = plan_jobs(options)
        if info is not None:
            jobs = [dataclasses.replace(job, info=info) for job in jobs]
        evaluation = Evaluation(options, jobs, Ranks(), "cpu", load or (lambda spec: model))
        report = evaluation.run()
        return report, model.num_encoded - before

    return evaluate


def statuses(report):
    return [(entry.dataset, entry.task, entry.status) for entry in report.entries]


def summary(folder):
    return [json.loads(line) for line in (folder / SUMMARY).read_text().splitlines()]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != SUMMARY}


def test_results_hold_what_was_measured_and_their_outcomes_give_it_again(run, tmp_path):
    report, _ = run("--dataset colors pairs multi --task auto linear_probe --recall-k 1 5")
    assert [status for *_, status in statuses(report)].count("done") == 5
    for entry in report.entries:
        for name in entry.results:
            path = tmp_path / "out" / name
            result = read_result(path)
            again = metrics_of(
                read_outcomes(outcomes_path(path)), [m for m in result.metrics if m != "fewshot_k"]
            )
            assert again == {m: v for m, v in result.metrics.items() if m != "fewshot_k"}
            known = result.provenance
            assert known is not None
            assert known.num_samples == entry.num_samples
            assert known.data["digest"] == known.hashes["data"]
            assert path.with_suffix("").with_suffix(".examples.parquet").exists()
    told = [entry["status"] for entry in summary(tmp_path / "out")]
    assert (told.count("done"), told.count("other_kind")) == (5, 1)


def test_what_stands_and_fits_is_kept_and_what_does_not_is_computed_anew(run, tmp_path):
    words = "--dataset colors --task zeroshot_classification few_shot --fewshot-k 1 2"
    first, num_encoded = run(words)
    assert num_encoded == 24 + 32
    before = files(tmp_path / "out")
    again, num_encoded = run(words)
    assert num_encoded == 0
    assert {status for *_, status in statuses(again)} == {"kept"}
    assert again.results == first.results
    assert files(tmp_path / "out") == before
    outcomes = next((tmp_path / "out").glob("*classification.outcomes.parquet"))
    outcomes.unlink()
    mended, num_encoded = run(words)
    assert [status for *_, status in statuses(mended)] == ["done", "kept"]
    assert num_encoded == 0, "features are kept, too"
    assert files(tmp_path / "out") == before
    other, _ = run(words + " --seed 1")
    assert {status for *_, status in statuses(other)} == {"done"}
    trained = ColorModel()
    trained.digest = "e" * 64
    _, num_encoded = run(words + " --seed 1", trained)
    assert num_encoded == 24 + 32, "another model is another cache"
    overwritten, _ = run(words + " --seed 1 --overwrite", trained)
    assert {status for *_, status in statuses(overwritten)} == {"done"}


def test_a_swapped_picture_of_equal_size_is_seen(root, run, tmp_path):
    shutil.copytree(root / "colors", tmp_path / "sets" / "colors")
    words = f"--dataset colors --dataset-root {tmp_path / 'sets'}"
    first, _ = run(words)
    assert run(words)[0].entries[0].status == "kept"
    tar = tmp_path / "sets" / "colors" / "test" / "0.tar"
    whole = tar.read_bytes()
    with tarfile.open(tar) as opened:
        member = opened.getmember("t0001.jpg")
    at = member.offset_data + member.size // 2
    tar.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
    second, num_encoded = run(words)
    assert [entry.status for entry in second.entries] == ["done"]
    assert num_encoded == 24
    digests = [report.results[0].provenance.hashes["data"] for report in (first, second)]
    assert digests[0] != digests[1]
    tar.write_bytes(whole)
    third, num_encoded = run(words)
    assert (third.results, num_encoded) == (first.results, 0), "its features are there still"


def test_features_beyond_the_limit_make_room_when_the_evaluation_is_over(run, tmp_path):
    run("--dataset colors pairs")
    sets = {path.parent for path in (tmp_path / "f").glob("*/chunk*.npz")}
    assert len(sets) == 2
    run("--dataset colors pairs --feature-cache-gb 0")
    assert not list((tmp_path / "f").glob("*/*.npz"))
    assert list((tmp_path / "f" / "views").iterdir())


def test_few_shot_results_stand_beside_the_probe_and_have_no_outcomes_of_one_draw(run, tmp_path):
    run("--dataset colors --task linear_probe few_shot --fewshot-k 2")
    names = {path.name for path in (tmp_path / "out").glob("*.json")}
    assert names == {
        "benchmark_colors_v1_colors_en_linear_probe.json",
        "benchmark_colors_v1_colors_en_linear_probe_fewshot_2.json",
    }
    assert len(list((tmp_path / "out").glob("*.outcomes.parquet"))) == 1


def test_a_missing_or_wrong_dataset_is_told_and_the_others_go_on(run, tmp_path):
    report, _ = run("--dataset mnist broken colors")
    assert [status for *_, status in statuses(report)] == ["missing", "failed", "done"]
    assert "The dataset 'mnist' has no split 'test' here" in report.entries[0].note
    assert "cannot be read" in report.entries[1].note
    assert not list((tmp_path / "out").glob("*broken*"))
    assert exit_status(report.entries, allow_missing=False) == 1
    assert exit_status(report.entries, allow_missing=True) == 1, "one has failed"
    assert exit_status([report.entries[0], report.entries[2]], allow_missing=True) == 0
    assert exit_status(report.entries[2:], allow_missing=False) == 0


def test_a_task_of_another_kind_is_a_fault_where_nothing_else_was_done(run):
    alone, _ = run("--dataset pairs --task linear_probe --recall-k 1")
    assert statuses(alone) == [("pairs", "linear_probe", "other_kind")]
    assert exit_status(alone.entries, allow_missing=False) == 1
    beside, _ = run("--dataset pairs --task auto linear_probe --recall-k 1")
    assert exit_status(beside.entries, allow_missing=False) == 0


@pytest.mark.parametrize("split", ["--train-split test", "--val-split test"])
def test_a_probe_is_not_chosen_by_its_own_test(run, split):
    report, _ = run(f"--dataset colors --task linear_probe {split}")
    (entry,) = report.entries
    assert (entry.status, split.split()[0] in entry.note) == ("failed", True)
    assert "the very pictures of the test split" in entry.note


def test_the_summary_keeps_what_other_runs_wrote_into_the_folder(run, tmp_path):
    out = tmp_path / "out"
    run("--dataset colors mnist")
    run("--dataset colors --task linear_probe --overwrite")
    run("--dataset colors")
    assert {entry["schema_version"] for entry in summary(out)} == {1}
    assert [(e["dataset"], e["task"], e["status"]) for e in summary(out)] == [
        ("mnist", "zeroshot_classification", "missing"),
        ("colors", "linear_probe", "done"),
        ("colors", "zeroshot_classification", "kept"),
    ]
    with (out / SUMMARY).open("a") as file:
        file.write('{"half')
    run("--dataset colors")
    assert len(summary(out)) == 3


def test_clip_benchmarks_build_takes_every_json_of_the_folder_for_a_result(run, tmp_path):
    run("--dataset colors mnist")
    found = list((tmp_path / "out").glob("*.json"))
    assert [json.loads(path.read_text())["dataset"] for path in found] == ["colors"]


def test_what_failed_under_auto_is_forgotten_when_it_is_done(run, tmp_path):
    for root, status in ((tmp_path / "none", "missing"), (tmp_path / "sets", "done")):
        (root / "mine").mkdir(parents=True)
        if status == "done":
            write_colors(root / "mine")
        report, _ = run(f"--dataset mine --dataset-root {root}")
        assert [entry.status for entry in report.entries] == [status]
        assert [entry["status"] for entry in summary(tmp_path / "out")] == [status]


def test_two_runs_at_once_lose_no_line_of_the_summary(run, tmp_path):
    with locked(tmp_path / "out"):
        thread = threading.Thread(target=run, args=("--dataset colors mnist",))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive(), "another one writes"
        (tmp_path / "out" / SUMMARY).write_text(
            '{"dataset": "pets", "language": "en", "model": "m", "status": "done", "task": "auto"}'
        )
    thread.join()
    assert [entry["dataset"] for entry in summary(tmp_path / "out")] == ["pets", "colors", "mnist"]


def test_a_name_that_another_result_has_is_refused_and_that_one_stays(run, tmp_path):
    run("--dataset colors")
    before = files(tmp_path / "out")
    other = ColorModel()
    other.pretrained = "elsewhere/v1"
    report, num_encoded = run("--dataset colors --overwrite", other)
    assert num_encoded == 0
    assert [entry.status for entry in report.entries] == ["failed"]
    assert "holds the one of 'v1', and this is of 'elsewhere/v1'" in report.entries[0].note
    assert files(tmp_path / "out") == before
    report, _ = run(f"--dataset colors multi --output {tmp_path}/one.json")
    assert [entry.status for entry in report.entries] == ["done", "failed"]


def test_examples_of_earlier_weights_do_not_stand_beside_a_result(run, tmp_path):
    run("--dataset colors")
    assert len(list((tmp_path / "out").glob("*.examples.parquet"))) == 1
    run("--dataset colors --num-examples 0")
    assert not list((tmp_path / "out").glob("*.examples.parquet"))


def test_classes_of_another_set_are_told_by_its_names_and_probes_by_the_sets_own(
    root, run, tmp_path
):
    """ObjectNet's way: prompts of other classes, of which some are right for each label."""
    own = tuple((name,) for name in COLORS)
    objectnet = find_dataset("objectnet")
    assert objectnet is not None
    info = dataclasses.replace(
        objectnet,
        name="colors",
        num_classes=4,
        num_test=24,
        num_train=None,
        class_names=(("gray",), *own, ("orange",)),
        candidates=((1,), (2,), (3,), (4, 5)),
        label_names=own,
    )
    data = open_labelled_set(str(root), "colors")
    assert data.labels is not None
    color_of = dict(zip(data.keys, (own[label][0] for label in data.labels), strict=True))
    report, _ = run("--dataset colors --task auto linear_probe", info=info)
    assert [entry.status for entry in report.entries] == ["done", "done"]
    for entry in report.entries:
        for example in read_examples(tmp_path / "out" / entry.results[0]):
            right = example.text.split(", ")
            assert right[0] == color_of[example.key]
            assert example.found_right == tuple(name in right for name in example.found)


def test_a_fault_inside_of_the_model_is_told_and_the_others_go_on(run):
    model = ColorModel()

    def encode(prepared):
        raise RuntimeError("out of memory")

    model.encode = encode
    report, _ = run("--dataset colors mnist", model)
    assert [entry.status for entry in report.entries] == ["failed", "missing"]
    assert report.entries[0].note == "RuntimeError: out of memory"


def test_a_model_that_cannot_be_loaded_stops_alone_and_is_told_among_others(run):
    def load(spec):
        if spec == "m":
            raise DeclipError("'m' is no model.")
        return ColorModel()

    with pytest.raises(DeclipError, match="is no model"):
        run("--dataset colors", load=load)
    report, _ = run("--dataset colors --model m n", load=load)
    assert [(e.model, e.status) for e in report.entries] == [("m", "failed"), ("n", "done")]


def test_class_names_in_another_order_are_refused_and_other_words_are_not(run, tmp_path):
    path = tmp_path / "names.txt"
    for names, status in (
        ("red green yellow blue", "failed"),
        ("Red green blue yellow", "done"),
        ("rosso verde blu giallo", "done"),
    ):
        path.write_text("\n".join(names.split()) + "\n")
        report, _ = run(f"--dataset colors --classnames {path}")
        assert [entry.status for entry in report.entries] == [status], names
        if status == "failed":
            assert "its line 3 is 'yellow', but label 2 is 'blue'" in report.entries[0].note


def test_templates_by_name_change_the_prompts_and_are_told(run):
    own, _ = run("--dataset colors")
    named, _ = run("--dataset colors --templates name_only")
    prompts = [report.results[0].provenance.hashes["prompts"] for report in (own, named)]
    assert prompts[0] != prompts[1]
    assert named.results[0].provenance.templates == "name_only"


def test_output_may_be_a_template(run, root, tmp_path):
    run(f"--dataset colors --output {tmp_path}/x/{{dataset}}_{{task}}.json")
    assert read_result(tmp_path / "x/colors_zeroshot_classification.json").dataset == "colors"
    assert (tmp_path / "x" / SUMMARY).exists()
