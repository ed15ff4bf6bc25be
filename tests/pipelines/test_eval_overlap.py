"""The overlap with the training data, beside the score."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_sets import COLORS, TEMPLATES, ColorModel, pictures, write_colors

from declip_eval.labelled_sets import write_webdataset
from declip_eval.outcomes import metrics_of, outcomes_path, read_outcomes
from declip_eval.results import read_result
from declip_shards import DeclipError, layout, read_samples
from declip_shards.fakes import write_fake_dataset
from pipelines.eval_jobs import plan_jobs
from pipelines.eval_options import parse_options
from pipelines.eval_ranks import Ranks
from pipelines.eval_tasks import Evaluation

NUM_TRAINED = 3


def write_trained(folder):
    """A dataset whose shards tell the digests of their files, as ingested ones do."""
    store = write_fake_dataset(str(folder), num_shards=1, image_size=40)
    (shard,) = layout.list_shards(store)
    samples = list(read_samples(store, shard))
    path = store.local_path(layout.shard_parquet_path(shard))
    table = pq.read_table(path)
    digests = pa.array([hashlib.sha256(sample.image).hexdigest() for sample in samples])
    assert table["key"].to_pylist() == [sample.key for sample in samples]
    pq.write_table(table.set_column(table.column_names.index("sha256"), "sha256", digests), path)
    return samples


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A training dataset, and sets of which some pictures are from it, byte by byte."""
    root = tmp_path_factory.mktemp("overlap")
    trained = write_trained(root / "train")[:NUM_TRAINED]
    clean = pictures(12, "c")
    items = [(f"x{n}", sample.image, n % 4) for n, sample in enumerate(trained)] + clean
    write_webdataset(
        root / "sets/mixed", items, class_names=list(COLORS), templates=TEMPLATES, shard_size=6
    )
    captioned = [(key, data, (f"a {key}", f"the {key}")) for key, data, _ in items]
    write_webdataset(root / "sets/pairs", captioned, kind="retrieval")
    write_colors(root / "sets/colors")
    return root


def run(root, folder, words):
    words = (
        f"--model m --dataset-root {root}/sets --output {folder}/out --feature-root {folder}/f "
        f"--num-resamples 100 --num-examples 0 --train-data {root}/train {words}"
    )
    options = parse_options(words.split())
    report = Evaluation(
        options, plan_jobs(options), Ranks(), "cpu", lambda spec: ColorModel()
    ).run()
    return report.entries


def test_the_overlap_stands_beside_the_score_with_the_score_without_it(root, tmp_path):
    run(root, tmp_path, "--dataset mixed pairs --recall-k 1 5")
    for path in sorted((tmp_path / "out").glob("benchmark*.json")):
        result = read_result(path)
        assert result.provenance is not None
        record = result.provenance.contamination
        assert record["num_overlap"] == NUM_TRAINED
        assert record["by_rung"]["exact"] == NUM_TRAINED
        assert record["first_pairs"][0]["key"] == "x0"
        outcomes = read_outcomes(outcomes_path(path))
        marked = [
            key
            for key, is_in in zip(outcomes.keys, outcomes.columns["overlap"], strict=True)
            if is_in
        ]
        assert {key.partition("#")[0] for key in marked} == {"x0", "x1", "x2"}
        assert len(marked) == (NUM_TRAINED if result.task == "zeroshot_classification" else 9)
        without = metrics_of(outcomes, result.metrics, without_overlap=True)
        assert record["metrics_without_overlap"] == without
        assert set(record["intervals_without_overlap"]) == set(result.metrics)
        assert "perceptual" in {**record["checked"], **record["unchecked"]}


def test_a_clean_set_has_none_and_what_was_looked_for_is_part_of_what_is_kept(root, tmp_path):
    entries = run(
        root, tmp_path, "--dataset colors --task auto linear_probe few_shot --fewshot-k 2"
    )
    assert [entry.status for entry in entries] == ["done"] * 3
    for path in (tmp_path / "out").glob("benchmark*.json"):
        result = read_result(path)
        assert result.provenance is not None
        record = result.provenance.contamination
        assert record["num_overlap"] == 0
        measured = {name: v for name, v in result.metrics.items() if name != "fewshot_k"}
        assert record["metrics_without_overlap"] == pytest.approx(measured)
    again = run(root, tmp_path, "--dataset colors --task auto")
    assert [entry.status for entry in again] == ["kept"]


def test_training_data_that_is_not_there_is_told_before_anything_is_done(root, tmp_path):
    with pytest.raises(DeclipError, match="shard"):
        run(root, tmp_path, f"--dataset colors --train-data {tmp_path}")
    assert not (tmp_path / "out").exists()


def test_a_set_that_was_trained_on_whole_has_no_score_without_it(root, tmp_path):
    samples = write_trained(tmp_path / "train")[:4]
    items = [(s.key, s.image, n) for n, s in enumerate(samples)]
    folder = tmp_path / "sets/whole"
    write_webdataset(folder, items, class_names=list(COLORS), templates=TEMPLATES)
    entries = run(tmp_path, tmp_path, "--dataset whole")
    assert [entry.status for entry in entries] == ["done"]
    (path,) = (tmp_path / "out").glob("benchmark*.json")
    known = read_result(path).provenance
    assert known is not None
    assert known.contamination["metrics_without_overlap"] == {}
    assert "overlap with the training data" in known.contamination["why_none"]
