"""FILIP as evaluation uses it."""

import numpy as np
import pytest
import torch
from torch import nn

from declip_eval.zeroshot import prompt_ensemble_scores
from declip_shards import DeclipError
from declip_shards.fakes import draw
from declip_train.export import PreprocessSettings, export_open_clip
from declip_train.heads import TokenHeads
from declip_train.model_config import get_model_config
from declip_train.towers import CLIP
from pipelines.encoders import checkpoint_encoder
from pipelines.eval_models import TokenFeatures, load_eval_model

NAMES = ("red circle", "blue square that is large", "ring")
TEMPLATES = ("a photo of a {}.", "{}", "itap of a {}, at night")
TEXTS = ["a red circle", "a much longer caption of a blue square, seen at night", "x", "x"]


def export(folder, method):
    generator = torch.Generator().manual_seed(0)
    config = get_model_config("test")
    model = CLIP(config, generator=generator).eval()
    heads = nn.ModuleDict({"tokens": TokenHeads(config, 8, generator)})
    export_open_clip(model, heads, folder, PreprocessSettings(), {"method": method})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filip")
    export(folder, "filip")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_eval_model(str(folder))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [draw(("red", "green", "blue")[n % 3], "circle", 16 + n, rng) for n in range(21)]


@pytest.fixture(scope="module")
def encoded(model, images):
    return model.encode(model.prepare(images)[0])


@pytest.fixture(scope="module")
def reference(folder):
    return checkpoint_encoder(str(folder), root="", device="cpu")


def test_tokens_and_probe_are_those_of_the_encoder(model, encoded, reference, images):
    assert isinstance(encoded, TokenFeatures)
    assert (model.scoring, model.probe_features) == ("token-wise", reference.probe_features)
    expected = reference.encode_image_tokens(images).numpy()
    np.testing.assert_allclose(encoded.tokens, expected, atol=1e-5)
    np.testing.assert_allclose(encoded.probe, reference.encode_probe(images), atol=1e-4)


def test_both_directions_are_those_of_the_encoder(model, encoded, reference):
    to_text, to_image = model.score_texts(encoded, TEXTS)
    tokens = torch.from_numpy(encoded.tokens)
    expected = reference.token_similarity(tokens, TEXTS)
    np.testing.assert_allclose(to_text, expected[0], atol=1e-5)
    np.testing.assert_allclose(to_image, expected[1], atol=1e-5)
    assert not np.allclose(to_text, to_image.T, atol=1e-3)


def test_an_ensemble_averages_similarities(model, encoded, reference):
    tokens = torch.from_numpy(encoded.tokens)
    expected = prompt_ensemble_scores(
        lambda prompts: reference.token_similarity(tokens, prompts)[0], NAMES, TEMPLATES
    )
    found = model.score_classes(encoded, [(name,) for name in NAMES], TEMPLATES)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_chunks_and_threads_change_no_bit(folder, encoded):
    names = [(name,) for name in NAMES]
    found = []
    for threads in (1, 3):
        model = load_eval_model(str(folder), num_threads=threads)
        # The second time with the texts' tokens remembered.
        for _ in range(2):
            part = TokenFeatures(encoded.tokens[:16], encoded.probe[:16])
            found.append(
                (model.score_classes(part, names, TEMPLATES), model.score_texts(part, TEXTS))
            )
    for classes, (to_text, to_image) in found[1:]:
        np.testing.assert_array_equal(classes, found[0][0])
        np.testing.assert_array_equal(to_text, found[0][1][0])
        np.testing.assert_array_equal(to_image, found[0][1][1])


def test_nothing_gives_empty_scores(model, encoded):
    none = TokenFeatures(encoded.tokens[:0], encoded.probe[:0])
    assert model.score_texts(none, TEXTS)[0].shape == (0, 4)
    assert model.score_texts(encoded, [])[1].shape == (0, 21)


def test_there_is_no_single_vector(model):
    with pytest.raises(DeclipError, match="compares token by token and has no one vector a text"):
        model.encode_texts(TEXTS)
    with pytest.raises(DeclipError, match="take its scores"):
        model.classifier([("cat",)], TEMPLATES)


def test_a_model_that_trains_both_is_scored_by_its_global_embeddings(tmp_path, model):
    export(tmp_path, "defilip")
    other = load_eval_model(str(tmp_path))
    assert other.scoring == "global"
    assert other.digest != model.digest
