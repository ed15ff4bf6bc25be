"""An export of the trainer, read back as an encoder."""

import numpy as np
import pytest
import torch

from declip_filter.encoders import load_encoder
from declip_shards import DeclipError
from declip_shards.fakes import draw
from declip_train.augment import eval_images
from declip_train.export import PreprocessSettings, export_open_clip
from declip_train.model_config import get_model_config
from declip_train.tokenizer import CaptionTokenizer
from declip_train.towers import CLIP
from pipelines.encoders import CheckpointEncoder, checkpoint_encoder
from pipelines.evaluate import FACTORY

TEXTS = ["a red circle", "a much longer caption of a blue square, seen at night", "x"]


def make_model(seed):
    return CLIP(get_model_config("test"), generator=torch.Generator().manual_seed(seed)).eval()


def export(model, folder, **provenance):
    export_open_clip(model, None, folder, PreprocessSettings(), provenance)


@pytest.fixture(scope="module")
def model():
    return make_model(0)


@pytest.fixture(scope="module")
def root(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    export(model, root / "train/export", steps=7)
    return root


@pytest.fixture(scope="module")
def encoder(root):
    return checkpoint_encoder("train/export", root=str(root), device="cpu")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    colors = ("red", "green", "blue", "purple")
    sides = (16, 24, 32, 48)
    return [draw(color, "circle", side, rng) for color, side in zip(colors, sides, strict=True)]


def unit_length(features):
    return np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


def test_texts_are_unit_length_and_the_models_own(encoder, model):
    found = encoder.encode_text(TEXTS)
    assert (found.dtype, found.shape) == (np.float32, (len(TEXTS), encoder.dim))
    assert unit_length(found)
    ids = torch.from_numpy(CaptionTokenizer()(TEXTS))
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model.encode_text(ids), dim=-1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_pictures_are_unit_length_and_the_models_own(encoder, model, images):
    found = encoder.encode_image(images)
    assert (found.dtype, found.shape) == (np.float32, (len(images), encoder.dim))
    assert unit_length(found)
    with torch.inference_mode():
        pixels = eval_images(images, model.config.vision.image_size)
        expected = torch.nn.functional.normalize(model.encode_image(pixels), dim=-1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_before_the_projection_is_what_the_projection_reads(encoder, model, images):
    features, pooled = encoder.encode_image_both(images)
    assert (pooled.dtype, pooled.shape) == (np.float32, (len(images), model.config.vision.width))
    np.testing.assert_array_equal(features, encoder.encode_image(images))
    with torch.inference_mode():
        output = model.forward_image(eval_images(images, encoder.image_size))
    np.testing.assert_allclose(pooled, output.pooled.numpy(), atol=1e-5)
    assert not unit_length(pooled)


def test_a_feature_does_not_depend_on_what_is_encoded_beside_it(encoder, images):
    together, texts = encoder.encode_image(images), encoder.encode_text(TEXTS)
    for n, image in enumerate(images):
        np.testing.assert_allclose(encoder.encode_image([image])[0], together[n], atol=1e-5)
    # A short caption beside a long one is padded further.
    for n, text in enumerate(TEXTS):
        np.testing.assert_allclose(encoder.encode_text([text])[0], texts[n], atol=1e-5)


def test_the_digest_is_of_the_weights_and_of_nothing_else(encoder, root, tmp_path):
    digest = encoder.digest
    assert len(digest) == 64
    assert CheckpointEncoder(root / "train/export", "other name").digest == digest
    export(make_model(0), tmp_path / "same", steps=8)
    assert CheckpointEncoder(tmp_path / "same", "x").digest == digest
    export(make_model(1), tmp_path / "else", steps=7)
    assert CheckpointEncoder(tmp_path / "else", "x").digest != digest
    changed = make_model(0)
    with torch.no_grad():
        next(iter(changed.parameters())).view(-1)[0] += 1e-3
    export(changed, tmp_path / "changed", steps=7)
    assert CheckpointEncoder(tmp_path / "changed", "x").digest != digest


def test_using_it_does_not_change_its_digest(root, images):
    fresh = checkpoint_encoder("train/export", root=str(root), device="cpu")
    fresh.encode_image(images)
    fresh.encode_text(TEXTS)
    assert fresh.digest == checkpoint_encoder("train/export", root=str(root), device="cpu").digest


def test_where_the_weights_come_from_is_kept(encoder):
    assert encoder.provenance == {"steps": 7}
    assert encoder.name == "checkpoint:train/export"
    assert encoder.supports_text
    assert encoder.supports_image


def test_a_relative_folder_is_of_the_dataset_whatever_the_working_folder(
    root, encoder, tmp_path, monkeypatch
):
    export(make_model(1), tmp_path / "train/export")
    monkeypatch.chdir(tmp_path)
    assert checkpoint_encoder("train/export", root=str(root), device="cpu").digest == encoder.digest
    absolute = str(root / "train/export")
    assert checkpoint_encoder(absolute, root=str(tmp_path), device="cpu").digest == encoder.digest
    assert checkpoint_encoder("train/export", root=".", device="cpu").digest != encoder.digest


def test_the_dotted_path_loads_it_as_the_embedding_stage_does(root, encoder):
    loaded = load_encoder("checkpoint:train/export", root=str(root), factory=FACTORY)
    assert (loaded.name, loaded.digest, loaded.dim) == (encoder.name, encoder.digest, encoder.dim)
    np.testing.assert_array_equal(loaded.encode_text(TEXTS), encoder.encode_text(TEXTS))


def test_no_export_there_is_a_sentence(root, tmp_path):
    for folder in ("train/other", str(tmp_path)):
        with pytest.raises(
            DeclipError, match=r"has no open_clip_config\.json: give the folder of an export\.$"
        ):
            checkpoint_encoder(folder, root=str(root), device="cpu")


def test_a_dataset_that_is_not_on_a_disk_is_a_sentence():
    with pytest.raises(DeclipError, match="'memory://data' is not a local folder"):
        checkpoint_encoder("train/export", root="memory://data", device="cpu")
