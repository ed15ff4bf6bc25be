"""Evaluation at both ends: chance for a model that knows nothing, all for one that knows."""

import hashlib
import io
import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

from declip_eval.outcomes import metrics_of, outcomes_path, read_outcomes
from declip_eval.results import read_result
from declip_eval.retrieval import group_captions, retrieval
from declip_eval.templates import SIMPLE_TEMPLATES
from declip_eval.zeroshot import build_classifier, zeroshot_classification
from declip_shards import (
    DeclipError,
    Sample,
    Store,
    layout,
    manifest,
    read_samples,
    write_shard,
)
from declip_train.augment import eval_images
from declip_train.export import PreprocessSettings, export_open_clip
from declip_train.heads import TokenHeads
from declip_train.model_config import get_model_config
from declip_train.tokenizer import CaptionTokenizer
from declip_train.tokenwise import tokenwise_info_nce
from declip_train.towers import CLIP
from pipelines import encoders
from pipelines.evaluate import EvaluateModel, read_held_out

NUM_CLASSES = 300
NUM_TRAIN = 40
SYLLABLES = ("ba", "co", "di", "fu", "ge", "ha", "ki", "lo", "mu", "ne", "po", "ri", "sa", "tu")
TASK: dict[str, Any] = {
    "zeroshot_splits": ("test",),
    "retrieval_splits": ("test",),
    "probe_test_split": "test",
    "probe_l2_strengths": (1.0,),
}


def words(num, seed=0):
    """Distinct made-up names of three syllables, none inside another."""
    rng = random.Random(seed)
    found: set[str] = set()
    while len(found) < num:
        found.add("".join(rng.choices(SYLLABLES, k=3)))
    return sorted(found, key=lambda w: hashlib.sha256(w.encode()).digest())


def noise(rng):
    sink = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def write_noise(root, *, columns=("label", "category", "split")):
    """A picture of noise for each of NUM_CLASSES names to test on, and a few to train a probe."""
    store, rng = Store(str(root)), np.random.default_rng(0)
    names = words(NUM_CLASSES + NUM_TRAIN)
    for shard_id, chosen in enumerate((names[:NUM_CLASSES], names[NUM_CLASSES:])):
        samples, rows = [], []
        for index, name in enumerate(chosen):
            key = layout.sample_key(shard_id, index, 1000)
            row: dict[str, str | None] = {
                "url": f"http://x.invalid/{key}",
                "caption": f"noise called {name}",
                "key": key,
            }
            row |= {"status": "success", "error_message": None}
            values = {"label": name, "category": ("even", "odd")[index % 2]}
            values["split"] = "test" if shard_id == 0 else "train"
            row |= {column: values[column] for column in columns}
            rows.append(row)
            samples.append(
                Sample(key=key, image=noise(rng), caption=str(row["caption"]), metadata=row)
            )
        table = pa.Table.from_pylist(rows)
        write_shard(store, layout.shard_name(shard_id), samples, table, {"count": len(rows)})
    return store


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("noise")
    write_noise(root)
    return root


def export_untrained(root, seed):
    model = CLIP(get_model_config("test"), generator=torch.Generator().manual_seed(seed))
    export_open_clip(model, None, root / "train/export", PreprocessSettings(), {"seed": seed})


def export_filip(root, seed=0, learn=(), num_steps=100):
    """FILIP as it was drawn, or after it learned the (picture, name) pairs of ``learn``."""
    generator = torch.Generator().manual_seed(seed)
    config = get_model_config("test")
    clip, heads = CLIP(config, generator=generator), TokenHeads(config, 32, generator)
    if learn:
        pixels = eval_images([image for image, _ in learn], config.vision.image_size)
        ids = torch.from_numpy(CaptionTokenizer()([name for _, name in learn], trim=True))
        mask = torch.arange(ids.shape[1]) <= ids.argmax(dim=1, keepdim=True)
        optimizer = torch.optim.Adam([*clip.parameters(), *heads.parameters()], lr=3e-3)
        for _ in range(num_steps):
            patches = clip.forward_image(pixels, need_tokens=True).tokens
            states = clip.forward_text(ids, need_hidden=True).hidden
            assert patches is not None
            assert states is not None
            tokens = heads.project_image(patches), heads.project_text(states)
            loss = tokenwise_info_nce(*tokens, mask, torch.tensor(20.0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    parts = nn.ModuleDict({"tokens": heads})
    provenance = {"seed": seed, "method": "filip"}
    export_open_clip(clip, parts, root / "train/export", PreprocessSettings(), provenance)


def evaluate(root, **settings):
    stage = EvaluateModel(root=str(root), model="test", **(TASK | settings))
    stats = stage.worker()("all")
    assert stage.is_done("all")
    assert stats.num_in == stats.num_out + sum(stats.reasons.values())
    found = [read_result(path) for path in sorted((root / "eval").glob("benchmark_*.json"))]
    return {result.task: result for result in found}


def num_trials(result, metric):
    trials = result.provenance.num_trials
    return trials[metric] if trials else result.provenance.num_samples


def hits(result, metric):
    return round(result.metrics[metric] * num_trials(result, metric))


def binomial_range(trials, chance):
    """Fewest and most hits within the middle 99.9 % of what guessing gives."""
    below = 0.0
    found: list[int] = []
    for k in range(trials + 1):
        below += math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k)
        found += [k] * sum(below >= edge for edge in (0.0005, 0.9995)[len(found) :])
        if len(found) == 2:
            return found
    raise AssertionError("the probabilities do not sum to 1")


CHANCE = {
    ("zeroshot_classification", "acc1"): 1 / NUM_CLASSES,
    ("zeroshot_classification", "acc5"): 5 / NUM_CLASSES,
    ("zeroshot_retrieval", "image_retrieval_recall@1"): 1 / NUM_CLASSES,
    ("zeroshot_retrieval", "image_retrieval_recall@5"): 5 / NUM_CLASSES,
    ("zeroshot_retrieval", "text_retrieval_recall@5"): 5 / NUM_CLASSES,
}
"""(task, metric) -> what guessing gives where every class has one picture and one caption."""


@pytest.mark.parametrize(
    ("export", "seed"), [(export_untrained, seed) for seed in (0, 1, 2, 3)] + [(export_filip, 0)]
)
def test_an_untrained_model_sits_at_chance(dataset, tmp_path, export, seed):
    root = tmp_path / "data"
    shutil.copytree(dataset, root)
    export(root, seed)
    results = evaluate(root)
    for (task, metric), chance in CHANCE.items():
        result = results[task]
        trials = num_trials(result, metric)
        assert trials == NUM_CLASSES
        assert result.provenance.chance[metric] == pytest.approx(chance)
        low, high = binomial_range(trials, chance)
        assert low <= hits(result, metric) <= high, (task, metric)
    # The probe learns two categories that noise does not have.
    probe = results["linear_probe"]
    assert probe.provenance.chance["lp_acc1"] == 0.5
    low, high = binomial_range(NUM_CLASSES, 0.5)
    assert low <= hits(probe, "lp_acc1") <= high


class Planted:
    """Knows by heart which name the first ``num_right`` pictures have, mistakes all others.

    Every name has an axis of its own, so its answers are exact.
    """

    supports_text = supports_image = has_global_features = True
    name, method, probe_features = "checkpoint:planted", "clip", "parity"
    digest = "0" * 64

    def __init__(self, root, num_right):
        self.names = words(NUM_CLASSES + NUM_TRAIN)
        self.dim = len(self.names)
        store = Store(str(root))
        pictures = [s.image for n in layout.list_shards(store) for s in read_samples(store, n)]
        answers = np.arange(self.dim)
        answers[num_right:NUM_CLASSES] = np.roll(answers[num_right:NUM_CLASSES], 1)
        self.answer = dict(zip(pictures, answers, strict=True))

    def encode_text(self, texts):
        rows = [next(i for i, n in enumerate(self.names) if n in text) for text in texts]
        return np.eye(self.dim, dtype=np.float32)[rows]

    def encode_image(self, images):
        return np.eye(self.dim, dtype=np.float32)[[self.answer[image] for image in images]]

    def encode_probe(self, images):
        parity = [[float(self.answer[image] % 2), 1.0] for image in images]
        return np.array(parity, dtype=np.float32)


@pytest.mark.parametrize("num_right", [NUM_CLASSES, 120])
def test_a_planted_model_gets_exactly_what_it_knows(dataset, tmp_path, monkeypatch, num_right):
    root = tmp_path / "data"
    shutil.copytree(dataset, root)
    planted = Planted(root, num_right)
    monkeypatch.setattr(encoders, "checkpoint_encoder", lambda model, **others: planted)
    results = evaluate(root)
    share = num_right / NUM_CLASSES
    zeroshot, retrieval = results["zeroshot_classification"], results["zeroshot_retrieval"]
    assert zeroshot.metrics["acc1"] == pytest.approx(share)
    assert retrieval.metrics["image_retrieval_recall@1"] == pytest.approx(share)
    assert retrieval.metrics["text_retrieval_recall@1"] == pytest.approx(share)
    if num_right == NUM_CLASSES:
        assert results["linear_probe"].metrics["lp_acc1"] == 1.0
    chance = zeroshot.provenance.chance["acc1"]
    assert hits(zeroshot, "acc1") > binomial_range(NUM_CLASSES, chance)[1]
    low, high = zeroshot.provenance.intervals["acc1"]
    assert low <= share <= high


def test_a_model_whose_tokens_know_the_names_is_found_to_know_them(dataset, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(dataset, root)
    names = words(NUM_CLASSES + NUM_TRAIN)[:NUM_CLASSES]
    pictures = [sample.image for sample in read_samples(Store(str(root)), "00000")]
    num_learned = 40
    export_filip(root, learn=list(zip(pictures, names, strict=True))[:num_learned])
    results = evaluate(root, templates="name_only")
    zeroshot = results["zeroshot_classification"]
    table = pa.parquet.read_table(root / "eval/predictions.parquet").to_pylist()
    right = [row["predicted"][0] == row["label"] for row in table]
    assert np.mean(right[:num_learned]) > 0.9
    assert zeroshot.metrics["acc1"] == np.mean(right)
    for task in ("zeroshot_classification", "zeroshot_retrieval"):
        assert results[task].provenance.settings["scoring"] == "token-wise"
    assert results["linear_probe"].provenance.settings["features"] == "mean of patch tokens"
    # Its global embeddings were never trained: nothing of them is written, or believed.
    assert not (root / "embeddings").exists()
    with pytest.raises(DeclipError, match="trains no global embeddings"):
        evaluate(root, scoring="global")


def test_global_embeddings_are_scored_as_ever_and_say_so(dataset, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(dataset, root)
    export_untrained(root, 0)
    results = evaluate(root)
    data = read_held_out(Store(str(root)), "model")
    rows = data.rows(["test"])
    assert data.images is not None
    encoder = encoders.checkpoint_encoder("train/export", root=str(root), device="cpu")
    classes = sorted({data.labels[i] for i in rows})
    labels = np.array([classes.index(data.labels[i]) for i in rows])
    classifier = build_classifier(encoder.encode_text, classes, SIMPLE_TEMPLATES)
    expected, _ = zeroshot_classification(data.images[rows], classifier, labels)
    assert results["zeroshot_classification"].metrics == expected
    texts, positives = group_captions([data.captions[i] for i in rows])
    expected = retrieval(data.images[rows], encoder.encode_text(texts), positives)
    assert results["zeroshot_retrieval"].metrics == expected
    for task in ("zeroshot_classification", "zeroshot_retrieval"):
        assert results[task].provenance.settings["scoring"] == "global"
    with pytest.raises(DeclipError, match="'unknown' has no token projections"):
        evaluate(root, scoring="token-wise")


def test_only_the_asked_for_splits_are_tested_and_twice_gives_the_same_bytes(dataset, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(dataset, root)
    export_untrained(root, 0)
    stage = EvaluateModel(root=str(root), model="test", **TASK)
    first = stage.worker()("all")
    assert (first.num_in, first.num_out) == (NUM_CLASSES + NUM_TRAIN, NUM_CLASSES)
    assert first.reasons == {"not_in_an_evaluated_split": NUM_TRAIN}
    before = {path: (root / path).read_bytes() for path in first.files}
    assert stage.worker()("all") == first
    assert {path: (root / path).read_bytes() for path in first.files} == before
    text = (root / "eval/table.txt").read_text()
    assert "chance" in text
    for path in sorted((root / "eval").glob("benchmark_*.json")):
        result = read_result(path)
        # Every answer stands beside the number that sums it up, and how sure that number is.
        outcomes = read_outcomes(outcomes_path(path))
        assert metrics_of(outcomes, result.metrics) == pytest.approx(dict(result.metrics))
        assert result.provenance is not None
        assert result.provenance.num_unreadable == 0
        assert set(result.provenance.intervals) == set(result.metrics)
        for low, high in result.provenance.intervals.values():
            assert f"{low:.4f} to {high:.4f}" in text
    result = json.loads(next((root / "eval").glob("*classification*.json")).read_text())
    assert str(tmp_path) not in json.dumps(result)


def test_fewer_classes_and_pairs_are_drawn_by_the_seed(dataset, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(dataset, root)
    export_untrained(root, 0)
    limits = {"max_classes": 20, "max_retrieval_samples": 30}
    results = evaluate(root, **limits)
    assert results["zeroshot_classification"].provenance.num_classes == 20
    assert results["zeroshot_classification"].provenance.num_samples == 20
    assert results["zeroshot_retrieval"].provenance.num_samples == 30
    table = (root / "eval/predictions.parquet").read_bytes()
    evaluate(root, **limits)
    assert (root / "eval/predictions.parquet").read_bytes() == table
    evaluate(root, **limits, seed=1)
    assert (root / "eval/predictions.parquet").read_bytes() != table


@pytest.mark.parametrize(
    "settings",
    [{"zeroshot_splits": ("tset",)}, {"retrieval_splits": ("tset",)}, {"probe_test_split": "tset"}],
)
def test_a_split_that_is_not_there_is_a_sentence_with_those_that_are(dataset, tmp_path, settings):
    root = tmp_path / "data"
    shutil.copytree(dataset, root)
    export_untrained(root, 0)
    with pytest.raises(DeclipError) as error:
        evaluate(root, **settings)
    assert "split 'tset' has no sample; the shards have test, train" in str(error.value)
    assert not (root / "eval").exists()


def test_a_probe_without_two_shared_categories_is_a_sentence(dataset, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(dataset, root)
    export_untrained(root, 0)
    with pytest.raises(DeclipError, match=r"needs two categories.*there are 0"):
        evaluate(root, probe_train_splits=("nothing",))


def test_shards_without_the_columns_are_a_sentence(tmp_path):
    write_noise(tmp_path, columns=("split",))
    export_untrained(tmp_path, 0)
    with pytest.raises(DeclipError, match=r"has no column '(label|category)'; it has: url, "):
        evaluate(tmp_path)


def test_a_missing_or_damaged_export_is_a_sentence(dataset, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(dataset, root)
    with pytest.raises(
        DeclipError, match=r"has no open_clip_config\.json: give the folder of an export"
    ):
        evaluate(root)
    export_untrained(root, 0)
    weights = next((root / "train/export").glob("*.bin"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        DeclipError, match=r"open_clip_pytorch_model\.bin cannot be read .* export the model again"
    ):
        evaluate(root)


def test_embeddings_of_other_samples_are_refused(dataset, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(dataset, root)
    export_untrained(root, 0)
    evaluate(root)
    path = Path(root) / layout.shard_parquet_path("00001")
    table = pa.parquet.read_table(path)
    pa.parquet.write_table(table.slice(1), path)
    with pytest.raises(DeclipError, match="not of its samples"):
        read_held_out(Store(str(root)), "model")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_classes": 0}, "max_classes is 0; it must be at least 1"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"templates": "simpel"}, "simple"),
        ({"probe_l2_strengths": ()}, "probe_l2_strengths"),
        ({"probe_l2_strengths": (0.0,)}, "above 0"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, sentence):
    with pytest.raises(DeclipError, match=sentence):
        EvaluateModel(root="x", **settings)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training stage's manifest says that evaluation asks for."""

    selection: str = ""
    splits: tuple[str, ...] = ()


@pytest.mark.parametrize("splits", [("train",), ("train", "test"), ()])
def test_samples_that_were_trained_on_are_not_called_held_out(dataset, tmp_path, splits):
    root = tmp_path / "noise"
    shutil.copytree(dataset, root)
    export_untrained(root, 0)
    trained = manifest.build_manifest(
        step="train", stage=Trained(splits=splits), code_version="1", inputs={}, receipts=[]
    )
    manifest.write_manifest(Store(str(root)), trained)
    if splits == ("train",):
        assert evaluate(root)
        return
    with pytest.raises(DeclipError, match=r"300 samples of the test splits were trained on"):
        evaluate(root)
