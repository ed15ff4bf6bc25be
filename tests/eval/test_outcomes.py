"""Outcomes: the reader inverts the writer, and every metric comes out of them again, to the bit."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    roc_auc_score,
    top_k_accuracy_score,
)

from declip_eval.metrics import average_precision, eleven_point_ap, roc_auc
from declip_eval.outcomes import (
    concatenate,
    drop_overlap,
    metric_names,
    metrics_of,
    outcomes_path,
    read_outcomes,
    write_outcomes,
)
from declip_eval.retrieval import retrieval
from declip_eval.score_outcomes import (
    classification_outcomes,
    classification_outcomes_of_features,
    multilabel_outcomes,
    retrieval_outcomes,
)
from declip_eval.zeroshot import zeroshot_classification

RNG = np.random.default_rng(7)
NUM = 60
KEYS = [f"test/{n:04d}.jpg" for n in range(NUM)]
IMAGES = RNG.normal(size=(NUM, 16)).astype(np.float32)
CLASSIFIER = np.linalg.qr(RNG.normal(size=(16, 9)))[0].astype(np.float32)
LABELS = RNG.integers(0, 9, NUM)
UNREADABLE = np.arange(NUM) % 13 != 5
CAPTIONS_OF = [[n, NUM + n // 2] for n in range(NUM)]


def every_kind():
    texts = RNG.normal(size=(NUM + NUM // 2, 16))
    return {
        "classification": classification_outcomes_of_features(
            KEYS, IMAGES, CLASSIFIER, LABELS, is_readable=UNREADABLE
        ),
        "binary": classification_outcomes(KEYS, IMAGES[:, :2], LABELS % 2, is_readable=UNREADABLE),
        "multilabel": multilabel_outcomes(
            KEYS, IMAGES[:, :4], RNG.random((NUM, 4)) < 0.3, is_readable=UNREADABLE
        ),
        "retrieval": retrieval_outcomes(
            KEYS,
            [f"text {n}" for n in range(len(texts))],
            IMAGES,
            texts,
            CAPTIONS_OF,
            is_readable=UNREADABLE,
        ),
    }


OUTCOMES = every_kind()


@pytest.mark.parametrize("kind", OUTCOMES)
def test_reader_inverts_writer_and_metrics_survive_to_the_bit(tmp_path, kind):
    before = OUTCOMES[kind].with_overlap(np.arange(len(OUTCOMES[kind])) % 3 == 0)
    after = read_outcomes(write_outcomes(before, tmp_path / "r.outcomes.parquet"))
    assert after == before
    assert after.with_overlap(~after.columns["overlap"]) != before
    names = metric_names(before)
    assert metrics_of(after, names) == metrics_of(before, names)
    assert set(metrics_of(after, names, without_overlap=True)) == set(names)


def test_the_file_has_lists_without_padding(tmp_path):
    table = pq.read_table(write_outcomes(OUTCOMES["classification"], tmp_path / "x"))
    assert table.column_names == ["key", "label", "rank", "predicted", "scores"]
    assert table["predicted"].type == pa.list_(pa.int32())
    lengths = [len(row) for row in table["scores"].to_pylist()]
    assert lengths == [5 if readable else 0 for readable in UNREADABLE]
    found = pq.read_table(write_outcomes(OUTCOMES["retrieval"], tmp_path / "y"))
    assert found["best"].type == pa.list_(pa.string())
    assert set(found["direction"].to_pylist()) == {"image", "text"}


def test_equal_outcomes_give_equal_bytes(tmp_path):
    first = write_outcomes(OUTCOMES["classification"], tmp_path / "a").read_bytes()
    shuffled = dataclasses.replace(
        OUTCOMES["classification"], columns=dict(OUTCOMES["classification"].columns)
    )
    assert write_outcomes(shuffled, tmp_path / "b").read_bytes() == first


def test_classification_metrics_equal_the_direct_ones():
    outcomes = classification_outcomes_of_features(KEYS, IMAGES, CLASSIFIER, LABELS)
    direct = zeroshot_classification(IMAGES, CLASSIFIER, LABELS).metrics
    assert metrics_of(outcomes, direct) == direct
    probe = {f"lp_{name}": value for name, value in direct.items()}
    assert metrics_of(outcomes, probe) == probe
    known = metrics_of(outcomes, ["acc1", "acc5", "mean_acc1_acc5"])
    assert known["mean_acc1_acc5"] == (known["acc1"] + known["acc5"]) / 2


def test_scores_of_multilabel_and_binary_equal_the_direct_ones():
    positive = RNG.random((NUM, 4)) < 0.4
    outcomes = multilabel_outcomes(KEYS, IMAGES[:, :4], positive)
    assert metrics_of(outcomes, metric_names(outcomes)) == {
        "mean_average_precision": average_precision(IMAGES[:, :4], positive).mean(),
        "mean_average_precision_11": eleven_point_ap(IMAGES[:, :4], positive).mean(),
    }
    binary = classification_outcomes(KEYS, IMAGES[:, :2], LABELS % 2)
    difference = IMAGES[:, 1].astype(float) - IMAGES[:, 0]
    assert metrics_of(binary, ["roc_auc"])["roc_auc"] == roc_auc(difference, LABELS % 2)


def test_every_metric_of_scores_equals_scikit_learns():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(200, 7)), rng.integers(0, 7, 200)
    scores[np.arange(200), labels] += 1
    keys = [str(n) for n in range(200)]
    found = metrics_of(
        classification_outcomes(keys, scores, labels), ["acc1", "acc5", "mean_per_class_recall"]
    )
    assert found == pytest.approx(
        {
            "acc1": top_k_accuracy_score(labels, scores, k=1),
            "acc5": top_k_accuracy_score(labels, scores, k=5),
            "mean_per_class_recall": balanced_accuracy_score(labels, scores.argmax(axis=1)),
        },
        abs=1e-9,
    )
    positive = np.eye(7, dtype=int)[labels] | (rng.random((200, 7)) < 0.1)
    several = multilabel_outcomes(keys, scores, positive)
    assert metrics_of(several, ["mean_average_precision"])["mean_average_precision"] == (
        pytest.approx(average_precision_score(positive, several.columns["scores"]), abs=1e-9)
    )
    binary = classification_outcomes(keys, scores[:, :2], labels % 2)
    assert metrics_of(binary, ["roc_auc"])["roc_auc"] == pytest.approx(
        roc_auc_score(labels % 2, scores[:, 1] - scores[:, 0]), abs=1e-9
    )


def test_retrieval_metrics_equal_the_direct_ones():
    texts = RNG.normal(size=(NUM + NUM // 2, 16))
    outcomes = retrieval_outcomes(
        KEYS, [str(n) for n in range(len(texts))], IMAGES, texts, CAPTIONS_OF
    )
    direct = retrieval(IMAGES, texts, CAPTIONS_OF)
    assert metrics_of(outcomes, metric_names(outcomes)) == direct


def test_parts_joined_are_the_whole_and_taking_all_changes_nothing():
    whole = OUTCOMES["classification"]
    parts = [whole.take(np.arange(start, min(start + 7, NUM))) for start in range(0, NUM, 7)]
    assert concatenate(parts) == whole
    assert whole.take(np.ones(NUM, dtype=bool)) == whole
    with pytest.raises(ValueError, match="Outcomes of multilabel with 4 classes and columns"):
        concatenate([whole, OUTCOMES["multilabel"]])
    with pytest.raises(ValueError, match="parts is empty"):
        concatenate([])


def test_metrics_without_the_overlap_are_those_of_the_rest():
    whole = OUTCOMES["classification"]
    overlap = np.arange(NUM) % 4 == 0
    names = metric_names(whole)
    without = metrics_of(whole.with_overlap(overlap), names, without_overlap=True)
    assert without == metrics_of(whole.take(~overlap), names)
    with pytest.raises(ValueError, match="have no column 'overlap': evaluate with the training"):
        drop_overlap(whole)
    with pytest.raises(ValueError, match="All 60 samples overlap with the training data"):
        drop_overlap(whole.with_overlap(np.ones(NUM, dtype=bool)))


def test_the_metrics_that_apply_depend_on_the_kind():
    names = {kind: metric_names(outcomes) for kind, outcomes in OUTCOMES.items()}
    assert names["classification"] == ("acc1", "acc5", "mean_per_class_recall", "mean_acc1_acc5")
    assert names["binary"] == ("acc1", "mean_per_class_recall", "roc_auc")
    assert names["multilabel"] == ("mean_average_precision", "mean_average_precision_11")
    assert metric_names(OUTCOMES["retrieval"], [2]) == (
        "image_retrieval_recall@2",
        "text_retrieval_recall@2",
    )
    for name in ("roc_auc", "mean_average_precision", "accuracy", "acc0", "lp_acc"):
        with pytest.raises(ValueError, match=f"'{name}' is no metric of these classification out"):
            metrics_of(OUTCOMES["classification"], [name])
    one_way = OUTCOMES["retrieval"]
    one_way = one_way.take(one_way.columns["direction"] == "text")
    with pytest.raises(ValueError, match="asks for images, but no query does"):
        metrics_of(one_way, ["image_retrieval_recall@1"])


def test_outcomes_stand_beside_their_result():
    assert outcomes_path("out/benchmark_x_v1.5.json").as_posix() == (
        "out/benchmark_x_v1.5.outcomes.parquet"
    )


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_outcomes(OUTCOMES["binary"], tmp_path / "x.outcomes.parquet")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_outcomes(OUTCOMES["multilabel"], path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("identity", ["[1]", "{", '{"version": 1}', '{"version": 1, "kind": 3}'])
def test_an_identity_that_is_none_is_refused(tmp_path, identity):
    path = write_outcomes(OUTCOMES["binary"], tmp_path / "a.outcomes.parquet")
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"opendeclip.outcomes": identity}), path)
    with pytest.raises(ValueError, match=r"a\.outcomes\.parquet(: kind is| does not say)"):
        read_outcomes(path)


def test_a_file_with_one_byte_changed_is_read_or_refused(tmp_path):
    path = write_outcomes(OUTCOMES["classification"], tmp_path / "a.outcomes.parquet")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            read_outcomes(path)
        except ValueError:
            refused += 1
    assert refused > 50


def test_what_is_no_outcomes_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is missing: evaluate again to write it"):
        read_outcomes(tmp_path / "none.parquet")
    path = tmp_path / "x.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="is not parquet"):
        read_outcomes(path)
    pq.write_table(pa.table({"key": ["a"]}), path)
    with pytest.raises(ValueError, match="has outcomes of version None, but this program reads"):
        read_outcomes(path)
    table = pq.read_table(write_outcomes(OUTCOMES["binary"], tmp_path / "y"))
    pq.write_table(table.drop_columns(["rank"]), path)
    with pytest.raises(ValueError, match=r"x\.parquet: classification outcomes lack the column"):
        read_outcomes(path)
    empty = OUTCOMES["classification"].take(np.zeros(NUM, dtype=bool))
    with pytest.raises(ValueError, match="There are no outcomes, so there is no metric"):
        metrics_of(empty, ["acc1"])
