"""The tasks, against the package's own formulas on the same features."""

import dataclasses

import pytest
from tiny_sets import COLORS, TEMPLATES, ColorModel, write_colors, write_multilabel, write_pairs

from declip_eval.few_shot import few_shot as fit_few_shot
from declip_eval.labelled_sets import DatasetError, open_labelled_set
from declip_eval.linear_probe import fit_probe
from declip_eval.outcomes import metrics_of
from declip_eval.retrieval import retrieval
from declip_eval.zeroshot import zeroshot_classification as classify
from pipelines.eval_features import FeatureWork
from pipelines.eval_measures import (
    Subject,
    few_shot_probes,
    linear_probe,
    zeroshot_classification,
    zeroshot_retrieval,
)
from pipelines.eval_options import parse_options
from pipelines.eval_ranks import Ranks

NAMES = tuple((name,) for name in COLORS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    write_colors(root / "colors", num_test=24, num_train=40)
    write_colors(root / "broken", num_test=24, num_train=40, broken=3)
    write_pairs(root / "holes", broken=2)
    write_pairs(root / "pairs")
    write_multilabel(root / "multi")
    return root


@pytest.fixture
def subject(root, tmp_path):
    def make(name, words="", *, scoring="global", probe=False, rank=0):
        options = parse_options(["--model", "m", "--dataset", name, *words.split()])
        ranks = Ranks(rank=rank, size=rank + 1, folder=tmp_path / "signs" if rank else None)
        work = FeatureWork(
            model=ColorModel(scoring),
            root=tmp_path,
            batch_size=8,
            chunk_images=10,
            device="cpu",
            ranks=ranks,
        )
        return Subject(
            work=work,
            options=options,
            info=None,
            test=open_labelled_set(str(root), name),
            train=open_labelled_set(str(root), name, "train") if probe else None,
        )

    return make


def there(found):
    """What rank 0 gets."""
    assert found is not None
    return found


def features(data, model=None):
    model = model or ColorModel()
    return model.encode(model.prepare(data.read_images(range(len(data))))[0])


@pytest.mark.parametrize("scoring", ["global", "token-wise"])
def test_zero_shot_is_the_packages_own(subject, scoring):
    one = subject("colors", scoring=scoring)
    measured = there(zeroshot_classification(one))
    model = ColorModel()
    images = features(one.test).features
    expected = classify(images, model.classifier(NAMES, TEMPLATES), one.test.labels).metrics
    assert {n: v for n, v in measured.metrics.items() if n in expected} == pytest.approx(expected)
    assert measured.metrics["acc1"] > 0.5 > measured.chance["acc1"]
    assert measured.metrics == metrics_of(measured.outcomes[0], measured.metrics)


@pytest.mark.parametrize("scoring", ["global", "token-wise"])
def test_retrieval_is_the_packages_own_where_captions_differ(subject, scoring):
    one = subject("pairs", "--recall-k 1 5", scoring=scoring)
    measured = there(zeroshot_retrieval(one))
    texts = [text for some in one.test.captions for text in some]
    same = [[i for i, text in enumerate(texts) if text in some] for some in one.test.captions]
    text_features = ColorModel().encode_texts(texts)
    expected = retrieval(features(one.test).features, text_features, same, recall_k=(1, 5))
    assert measured.metrics == pytest.approx(expected)
    assert measured.settings["num_captions"] == 24
    assert measured.settings["num_distinct_captions"] == 16


def test_more_candidates_than_there_are_are_refused(subject):
    with pytest.raises(DatasetError, match="--recall-k has 13, but pairs has 12 pictures"):
        zeroshot_retrieval(subject("pairs", "--recall-k 1 13"))


def test_probes_are_the_packages_own(subject):
    one = subject("colors", "--task few_shot --fewshot-k 2 --fewshot-seeds 2", probe=True)
    train, test = features(one.train).probe, features(one.test).probe
    labels = one.train.labels, one.test.labels
    whole = fit_probe(train, labels[0], test, labels[1], seed=0, sweep="clip").metrics
    measured = there(linear_probe(one))
    assert measured.metrics["lp_acc1"] == whole["lp_acc1"]
    assert measured.settings["l2_strength"] == whole["l2_strength"]
    for found, k in zip(there(few_shot_probes(one)), (2,), strict=True):
        expected = fit_few_shot(train, labels[0], test, labels[1], k=k, seeds=(0, 1))
        assert found.shots == k
        assert found.metrics["lp_acc1"] == pytest.approx(expected.metrics["lp_acc1"])
        assert len(found.outcomes) == 2
        assert found.intervals["lp_acc1"] == expected.intervals["lp_acc1"]


def test_several_classes_a_picture_are_measured_by_mean_average_precision(subject):
    one = subject("multi", probe=True)
    for measured in map(there, (zeroshot_classification(one), linear_probe(one))):
        names = {name.removeprefix("lp_") for name in measured.metrics}
        assert names == {"mean_average_precision", "mean_average_precision_11"}
        assert measured.outcomes[0].kind == "multilabel"


def test_unreadable_pictures_are_refused_over_the_budget_and_wrong_within_it(subject):
    with pytest.raises(DatasetError) as error:
        zeroshot_classification(subject("broken"))
    assert "3 of 24 pictures of broken (test) cannot be read, 12.50%" in str(error.value)
    assert "'t0000': it is no picture, or one cut off in its header. Fetch" in str(error.value)
    with pytest.raises(DatasetError, match="cannot be read"):
        linear_probe(subject("broken", probe=True))
    allowed = there(zeroshot_classification(subject("broken", "--unreadable-budget 0.2")))
    clean = there(zeroshot_classification(subject("colors")))
    assert len(allowed.unreadable) == 3
    assert allowed.num_samples == 24
    num_right = [round(m.metrics["acc1"] * 24) for m in (clean, allowed)]
    lost = int((clean.outcomes[0].columns["rank"][:3] == 0).sum())
    assert num_right[1] == num_right[0] - lost


def test_an_unreadable_picture_is_wrong_in_retrieval_and_the_others_are_told(subject):
    with pytest.raises(DatasetError, match="2 of 12 pictures of holes"):
        zeroshot_retrieval(subject("holes", "--recall-k 1"))
    measured = there(zeroshot_retrieval(subject("holes", "--recall-k 1 --unreadable-budget 0.2")))
    assert (measured.num_samples, len(measured.unreadable)) == (12, 2)
    assert measured.settings["num_pictures_to_find"] == 10
    outcomes = measured.outcomes[0]
    rank_of = dict(zip(outcomes.keys, outcomes.columns["rank"].tolist(), strict=True))
    # Of two captions the second is its picture's alone; the first one is other pictures', too.
    assert [rank_of[key] for key in ("p0000", "p0001", "p0000#1", "p0001#1")] == [24, 24, 12, 12]
    assert max(rank for key, rank in rank_of.items() if key > "p0002") < 10


def test_other_ranks_take_their_part_and_return_nothing(subject):
    for task, name, probe in (
        (zeroshot_classification, "colors", False),
        (zeroshot_retrieval, "pairs", False),
        (linear_probe, "colors", True),
        (few_shot_probes, "colors", True),
    ):
        assert task(subject(name, probe=probe, rank=1)) is None


def test_without_names_or_templates_there_are_no_prompts(root, tmp_path, subject):
    one = subject("colors")
    for changes, sentence in (
        ({"class_names": None}, "has no class names"),
        ({"templates": ()}, "has no prompt templates"),
    ):
        poorer = dataclasses.replace(one, test=dataclasses.replace(one.test, **changes))
        with pytest.raises(DatasetError, match=sentence):
            zeroshot_classification(poorer)
