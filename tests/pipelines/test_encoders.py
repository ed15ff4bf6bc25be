"""An export of the trainer, read back as an encoder."""

import numpy as np
import pytest
import torch
from torch import nn

from declip_filter import encoders
from declip_filter.encoders import TokenEncoder, load_encoder
from declip_filter.image_feed import picture_preparer
from declip_shards import DeclipError
from declip_shards.fakes import draw
from declip_train.augment import eval_images
from declip_train.export import PreprocessSettings, export_open_clip
from declip_train.heads import TokenHeads
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


def test_pictures_prepared_apart_give_the_same_bits(encoder, images):
    assert picture_preparer(encoder) == encoder.prepare_image
    prepared = np.stack([encoder.prepare_image(image) for image in images])
    assert prepared.dtype == np.uint8
    assert prepared.shape == (len(images), encoder.image_size, encoder.image_size, 3)
    np.testing.assert_array_equal(encoder.encode_prepared(prepared), encoder.encode_image(images))


def test_texts_tokenized_apart_are_those_of_the_tokenizer(encoder):
    reader: TokenEncoder = encoder
    assert reader.reads_tokens
    tokens = encoder.tokenize(TEXTS)
    padded = CaptionTokenizer()(TEXTS)
    for ids, row in zip(tokens.ids, padded, strict=True):
        assert list(ids) == row[: row.argmax() + 1].tolist()
    mixed = encoder.encode_tokens(tokens.ids)
    for number, ids in enumerate(tokens.ids):
        np.testing.assert_allclose(encoder.encode_tokens([ids])[0], mixed[number], atol=1e-5)


def test_texts_that_are_longer_than_the_tower_reads_are_told(encoder):
    # 75 words of a token each fit between start and end.
    tokens = encoder.tokenize(["a " * 75, "a " * 76, "a"])
    assert tokens.is_cut == [False, True, False]
    assert [len(ids) for ids in tokens.ids] == [77, 77, 3]


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


def test_its_name_is_known_to_a_process_that_registers_nothing(root, encoder, monkeypatch):
    """Ray's workers are such processes."""
    monkeypatch.setattr(encoders, "_FACTORIES", {})
    loaded = load_encoder("checkpoint:train/export", root=str(root))
    assert (loaded.name, loaded.digest) == (encoder.name, encoder.digest)


def test_no_export_there_is_a_sentence(root, tmp_path):
    for folder in ("train/other", str(tmp_path)):
        with pytest.raises(
            DeclipError, match=r"has no open_clip_config\.json: give the folder of an export\.$"
        ):
            checkpoint_encoder(folder, root=str(root), device="cpu")


def test_a_dataset_that_is_not_on_a_disk_is_a_sentence():
    with pytest.raises(DeclipError, match="'memory://data' is not a local folder"):
        checkpoint_encoder("train/export", root="memory://data", device="cpu")


def export_tokens(folder, *, seed=0, method="filip", leave_out=""):
    model, heads = make_model(0), nn.ModuleDict()
    generator = torch.Generator().manual_seed(seed)
    heads["tokens"] = TokenHeads(model.config, 8, generator)
    if leave_out:
        delattr(heads["tokens"], leave_out)
    export_open_clip(model, heads, folder, PreprocessSettings(), {"method": method})
    return CheckpointEncoder(folder, "checkpoint:x")


def test_untrained_global_embeddings_are_refused(tmp_path, images):
    encoder = export_tokens(tmp_path)
    assert not encoder.supports_text
    assert not encoder.supports_image
    assert not encoder.reads_tokens
    prepared = np.stack([encoder.prepare_image(images[0])])
    for call, given in (
        (encoder.encode_text, TEXTS),
        (encoder.encode_image, images),
        (encoder.encode_prepared, prepared),
    ):
        with pytest.raises(DeclipError, match=r"method 'filip', which trains no global embeddings"):
            call(given)


def test_filips_probe_reads_the_mean_of_its_unprojected_patches(tmp_path, model, images):
    encoder = export_tokens(tmp_path)
    with torch.inference_mode():
        pixels = eval_images(images, encoder.image_size)
        patches = model.forward_image(pixels, need_tokens=True).tokens.numpy()
    found = encoder.encode_probe(images)
    assert (found.dtype, found.shape) == (np.float32, (len(images), model.config.vision.width))
    np.testing.assert_allclose(found, patches.mean(axis=1), atol=1e-5)
    assert encoder.probe_features == "mean of patch tokens"


def test_other_methods_probe_reads_before_the_projection(encoder, tmp_path, images):
    assert encoder.probe_features == "before the projection"
    for other in (encoder, export_tokens(tmp_path, method="defilip")):
        np.testing.assert_array_equal(
            other.encode_probe(images), encoder.encode_image_both(images)[1]
        )


def test_tokens_are_unit_length_and_padding_is_marked(tmp_path, images):
    encoder = export_tokens(tmp_path)
    tokens = encoder.encode_image_tokens(images)
    assert tokens.shape == (len(images), 4, 8)
    assert unit_length(tokens.flatten(0, 1).numpy())
    tokens, mask = encoder.encode_text_tokens(TEXTS)
    ids = CaptionTokenizer()(TEXTS)
    assert mask.sum(dim=1).tolist() == (ids.argmax(axis=1) + 1).tolist()
    assert mask.shape == tokens.shape[:2]
    assert all(row[: int(row.sum())].all() for row in mask)
    alone, _ = encoder.encode_text_tokens(TEXTS[:1])
    np.testing.assert_allclose(tokens[0][mask[0]].numpy(), alone[0].numpy(), atol=1e-5)


def test_the_digest_covers_the_token_projections(encoder, tmp_path):
    digests = {export_tokens(tmp_path / str(seed), seed=seed).digest for seed in (0, 1, 2)}
    assert len(digests | {encoder.digest}) == 4
    assert export_tokens(tmp_path / "again", seed=1).digest in digests


def test_missing_or_other_token_projections_are_a_sentence(encoder, tmp_path, images):
    with pytest.raises(DeclipError, match=r"has no token projections to compare tokens with"):
        encoder.encode_image_tokens(images)
    export(make_model(0), tmp_path / "none", method="filip")
    with pytest.raises(DeclipError, match=r"is of method 'filip' but has no token projections"):
        CheckpointEncoder(tmp_path / "none", "x")
    for part in ("text_projection", "image_projection"):
        with pytest.raises(DeclipError, match=r"token projections in .* do not fit .*: export the"):
            export_tokens(tmp_path / part, leave_out=part)
