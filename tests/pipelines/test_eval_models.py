"""Our exports as evaluation uses them."""

import json

import numpy as np
import pytest
import torch

from declip_eval.zeroshot import build_classifier
from declip_shards import DeclipError
from declip_shards.fakes import draw
from declip_train.export import CONFIG_NAME, PreprocessSettings, export_open_clip
from declip_train.model_config import get_model_config
from declip_train.towers import CLIP
from pipelines.encoders import checkpoint_encoder
from pipelines.eval_models import ImageFeatures, find_export, load_eval_model, preparation_of

NAMES = (("red circle",), ("blue square", "square that is blue"), ("green ring",))
TEMPLATES = ("a photo of a {}.", "a {}", "a photo of many {}, at night", "itap of a {}")
TEXTS = ["a red circle", "a much longer caption of a blue square, seen at night", "x", "x"]


def export(folder, seed=0, preprocess=None, **provenance):
    model = CLIP(get_model_config("test"), generator=torch.Generator().manual_seed(seed)).eval()
    export_open_clip(model, None, folder, preprocess or PreprocessSettings(), provenance)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    export(root / "train/export", model="test", steps=7)
    return root


@pytest.fixture(scope="module")
def model(root):
    return load_eval_model(str(root))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    colors = ("red", "green", "blue", "purple")
    return [draw(colors[n % 4], "circle", 16 + n, rng) for n in range(40)]


@pytest.fixture(scope="module")
def reference(root):
    return checkpoint_encoder("train/export", root=str(root), device="cpu")


def test_pictures_are_those_of_the_encoder(model, reference, images):
    views, reasons = model.prepare(images)
    assert reasons == [None] * len(images)
    found = model.encode(views)
    features, probe = reference.encode_image_both(images)
    assert found.features.dtype == found.probe.dtype == np.float32
    np.testing.assert_allclose(found.features, features, atol=1e-5)
    np.testing.assert_allclose(found.probe, probe, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found.features, axis=1), 1, atol=1e-5)


def test_texts_and_classifier_are_those_of_the_encoder(model, reference):
    np.testing.assert_allclose(model.encode_texts(TEXTS), reference.encode_text(TEXTS), atol=1e-5)
    names = [names[0] for names in NAMES]
    expected = build_classifier(reference.encode_text, names, TEMPLATES)
    found = model.classifier([(name,) for name in names], TEMPLATES)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_threads_and_calls_change_no_bit(root, model, images):
    views, _ = model.prepare(images)
    expected = model.encode(views), model.classifier(NAMES, TEMPLATES)
    for threads in (1, 2, 3):
        other = load_eval_model(str(root), num_threads=threads)
        np.testing.assert_array_equal(other.prepare(images)[0], views)
        for array, same in zip(other.encode(views), expected[0], strict=True):
            np.testing.assert_array_equal(array, same)
        np.testing.assert_array_equal(other.classifier(NAMES, TEMPLATES), expected[1])


def test_the_number_of_torchs_threads_is_as_before(model, images):
    before = torch.get_num_threads()
    model.encode(model.prepare(images)[0])
    assert torch.get_num_threads() == before


def test_a_row_does_not_depend_on_the_others(model, images):
    views, _ = model.prepare(images)
    whole = model.encode(views)
    order = np.random.default_rng(0).permutation(len(images))
    for array, moved in zip(whole, model.encode(views[order]), strict=True):
        np.testing.assert_allclose(moved, array[order], atol=1e-5)
    texts = [f"{text} {n}" for n in range(20) for text in TEXTS]
    alone = np.concatenate([model.encode_texts([text]) for text in texts[:8]])
    np.testing.assert_allclose(model.encode_texts(texts)[:8], alone, atol=1e-5)


def test_scores_are_products(model, images):
    found = model.encode(model.prepare(images)[0])
    np.testing.assert_array_equal(
        model.score_classes(found, NAMES, TEMPLATES),
        found.features @ model.classifier(NAMES, TEMPLATES),
    )
    to_text, to_image = model.score_texts(found, TEXTS)
    assert to_text.shape == (len(images), len(TEXTS))
    np.testing.assert_array_equal(to_image, to_text.T)


def test_other_templates_give_another_classifier(model):
    first = model.classifier(NAMES, TEMPLATES)
    assert not np.allclose(first, model.classifier(NAMES, TEMPLATES[:1]))
    np.testing.assert_array_equal(first, model.classifier(NAMES, TEMPLATES))


def test_nothing_gives_no_row(model):
    views, reasons = model.prepare([])
    found = model.encode(views)
    assert (views.shape, reasons) == ((0, 16, 16, 3), [])
    assert (found.features.shape, found.probe.shape) == ((0, 16), (0, 32))
    assert model.encode_texts([]).shape == (0, 16)


def test_a_dataset_a_run_and_an_export_are_the_same_model(root, model):
    for place in (root, root / "train", root / "train/export"):
        found = load_eval_model(str(place))
        assert (found.digest, found.name, found.image_size) == (model.digest, "test", 16)
        assert find_export(place) == root / "train/export"


def test_the_digest_is_of_weights_and_arithmetic_alone(model, tmp_path):
    export(tmp_path / "same", steps=1, run="another")
    export(tmp_path / "other", seed=1)
    assert load_eval_model(str(tmp_path / "same")).digest == model.digest
    assert load_eval_model(str(tmp_path / "other")).digest != model.digest
    config = json.loads((tmp_path / "same" / CONFIG_NAME).read_bytes())
    config["model_cfg"]["quick_gelu"] = not config["model_cfg"]["quick_gelu"]
    (tmp_path / "same" / CONFIG_NAME).write_text(json.dumps(config))
    assert load_eval_model(str(tmp_path / "same")).digest != model.digest


def test_the_exports_own_normalization_is_used(model, images, tmp_path):
    half = (0.5, 0.5, 0.5)
    export(tmp_path, preprocess=PreprocessSettings(mean=half, std=half))
    other = load_eval_model(str(tmp_path))
    views, _ = other.prepare(images)
    assert other.preprocessing != model.preprocessing
    assert other.digest == model.digest
    towers = CLIP(get_model_config("test"), generator=torch.Generator().manual_seed(0)).eval()
    with torch.inference_mode():
        pixels = torch.from_numpy(views).movedim(-1, 1) / 127.5 - 1
        expected = towers.encode_image(pixels, normalize=True).numpy()
    found = other.encode(views)
    assert isinstance(found, ImageFeatures)
    np.testing.assert_allclose(found.features, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"size": 32}, "prepares pictures of 32 pixels, but its image tower takes 16"),
        ({"size": [16, 8]}, r"preprocess size is \[16, 8\], but views are square"),
        ({"size": "16"}, "preprocess size is '16', but views are square"),
        ({"std": [0.2, 0, 0.2]}, "std above 0"),
        ({"std": 0.5}, "preprocess std is 0.5, but must be a list of three numbers"),
        ({"mean": [0.5, 0.5]}, "must be three finite numbers"),
        ({"mean": "imagenet"}, "preprocess mean is 'imagenet', but must be a list of three"),
    ],
)
def test_preprocessing_that_does_not_fit_is_refused(given, sentence, tmp_path):
    export(tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_bytes())
    config["preprocess_cfg"] |= given
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(DeclipError, match=sentence):
        load_eval_model(str(tmp_path))


def test_absent_entries_are_open_clips_defaults():
    found = preparation_of({"size": [16, 16], "mean": [0.5, 0.5, 0.5], "std": None}, 224)
    assert (found.size, found.mean) == (16, (0.5, 0.5, 0.5))
    assert found.std == PreprocessSettings().std
    assert preparation_of({}, 224).size == 224
    with pytest.raises(DeclipError, match="must be a table"):
        preparation_of(["size"], 224)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(DeclipError, match=r"is no model: it holds no open_clip_config\.json"):
        load_eval_model(str(tmp_path))
    with pytest.raises(DeclipError, match="num_threads is 0"):
        load_eval_model(str(tmp_path), num_threads=0)
    with pytest.raises(DeclipError, match="device is 'gpu'"):
        load_eval_model(str(tmp_path), device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeclipError, match="torch finds no GPU"):
            load_eval_model(str(tmp_path), device="cuda")
