"""What a result says of how it came about."""

import dataclasses

import pytest
from tiny_sets import ColorModel, write_colors, write_pairs

from declip_eval.labelled_sets import open_labelled_set
from declip_eval.outcomes import outcomes_path, write_outcomes
from declip_eval.results import write_result
from pipelines.eval_features import FeatureWork
from pipelines.eval_jobs import Job
from pipelines.eval_measures import Subject, zeroshot_retrieval
from pipelines.eval_options import parse_options
from pipelines.eval_ranks import Ranks
from pipelines.eval_records import ResultPlan


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    write_colors(root / "colors")
    write_pairs(root / "pairs")
    return root


def make(root, folder, words="", *, name="colors", task="zeroshot_classification", model=None):
    """Subject, plan and options of a task."""
    options = parse_options(
        f"--model m --dataset {name} --output {folder} --recall-k 1 5 --num-resamples 100 "
        f"--task few_shot {words}".split()
    )
    job = Job(
        dataset=name,
        info=None,
        language="en",
        train_split="train",
        val_split=None,
        val_proportion=0.2,
    )
    work = FeatureWork(
        model=model or ColorModel(),
        root=folder,
        batch_size=options.batch_size,
        chunk_images=options.chunk_images,
        device="cpu",
        ranks=Ranks(),
    )
    is_probe = task in ("linear_probe", "few_shot")
    subject = Subject(
        work=work,
        options=options,
        info=None,
        test=open_labelled_set(str(root), name),
        train=open_labelled_set(str(root), name, "train") if is_probe else None,
    )
    return subject, ResultPlan.make(subject, job, task, options), options


CHANGES = ("--seed 1", "--batch-size 3", "--chunk-images 3", "--num-resamples 200")


@pytest.mark.parametrize("words", [*CHANGES, "--unreadable-budget 0.1", "--num-examples 3"])
def test_what_a_number_follows_from_changes_the_digest(root, tmp_path, words):
    assert make(root, tmp_path, words)[1].digest != make(root, tmp_path)[1].digest


@pytest.mark.parametrize(
    "words",
    [
        "--num-ranks 3",
        "--num-workers 2",
        "--view-cache-gb 0 --feature-cache-gb 0",
        "--feature-root x --quiet",
    ],
)
def test_what_changes_no_number_does_not_change_the_digest(root, tmp_path, words):
    assert make(root, tmp_path, words)[1].digest == make(root, tmp_path)[1].digest


def test_each_task_follows_from_its_own_settings(root, tmp_path):
    def digest(words, task, name="colors"):
        return make(root, tmp_path, words, task=task, name=name)[1].digest

    shots = "--fewshot-seeds 2"
    assert digest(shots, "few_shot") != digest("", "few_shot")
    assert digest(shots, "linear_probe") == digest("", "linear_probe")
    recall = "--recall-k 1"
    retrieval = [digest(words, "zeroshot_retrieval", "pairs") for words in (recall, "")]
    assert retrieval[0] != retrieval[1]
    assert digest(recall, "linear_probe") == digest("", "linear_probe")


def test_other_weights_and_other_data_change_the_digest(root, tmp_path):
    other = ColorModel()
    other.digest = "e" * 64
    plans = [make(root, tmp_path)[1], make(root, tmp_path, model=other)[1]]
    assert plans[0].digest != plans[1].digest
    assert plans[0].hashes["data"] == plans[1].hashes["data"]


def test_a_result_stands_as_long_as_it_and_its_outcomes_fit(root, tmp_path):
    task = "zeroshot_retrieval"
    subject, plan, options = make(root, tmp_path, name="pairs", task=task)
    assert plan.standing(options) is None
    measured = zeroshot_retrieval(subject)
    assert measured is not None
    result = plan.result(subject, measured, options, {})
    assert result.provenance is not None
    assert result.provenance.num_trials == {
        "image_retrieval_recall@1": 24,
        "image_retrieval_recall@5": 24,
        "text_retrieval_recall@1": 12,
        "text_retrieval_recall@5": 12,
    }
    (path,) = plan.paths(options)
    write_result(result, options.output)
    assert plan.standing(options) is None, "outcomes are missing"
    write_outcomes(measured.outcomes[0], outcomes_path(path))
    assert plan.standing(options) == [result]
    assert dataclasses.replace(plan, digest="0" * 64).standing(options) is None
    path.write_text("{}")
    assert plan.standing(options) is None
