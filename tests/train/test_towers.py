"""Towers: open_clip's parameters, and short cuts that change no number."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from declip_shards import DeclipError
from declip_train.model_config import MODEL_CONFIGS, get_model_config
from declip_train.tokenizer import EOT_ID, SOT_ID, CaptionTokenizer
from declip_train.towers import CLIP

CAPTIONS = ["a red apple", "a", "two small dogs run along a beach in the evening sun", "tree"]

OPEN_CLIP_SIDE = """
import sys, json
import torchvision_stand_in
torchvision_stand_in.install()
import torch, open_clip
shapes = {}
for name, config in json.load(sys.stdin).items():
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    shapes[name] = {key: list(value.shape) for key, value in model.state_dict().items()}
json.dump(shapes, sys.stdout)
"""


def meta_model(name: str) -> CLIP:
    """A model without memory: names and shapes only."""
    with torch.device("meta"):
        return CLIP(get_model_config(name))


def make_model(seed: int = 0) -> CLIP:
    """A tiny model in float64, moved off its initial values."""
    generator = torch.Generator().manual_seed(seed)
    model = CLIP(get_model_config("test"), generator).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def model() -> CLIP:
    return make_model()


@pytest.fixture(scope="module")
def token_ids() -> Tensor:
    return torch.from_numpy(CaptionTokenizer()(CAPTIONS))


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)


@pytest.mark.slow
def test_every_named_model_has_open_clips_names_and_shapes() -> None:
    configs = {name: config.to_open_clip() for name, config in MODEL_CONFIGS.items()}
    answer = subprocess.run(
        [sys.executable, "-c", OPEN_CLIP_SIDE],
        input=json.dumps(configs),
        capture_output=True,
        check=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    for name, theirs in json.loads(answer.stdout).items():
        model = meta_model(name)
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == theirs
        # DeepSpeed and the optimizer know parameters by this name: it must be the same one.
        assert {key for key, _ in model.named_parameters()} == theirs.keys()


def test_parameter_counts_of_the_published_model() -> None:
    model = meta_model("ViT-B-32")
    visual = sum(parameter.numel() for parameter in model.visual.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert visual == 87_849_216
    assert total - visual - 1 == 63_428_096
    assert total == 151_277_313


def test_weights_are_drawn_at_the_published_scales() -> None:
    model = CLIP(get_model_config("ViT-Ti-8-48"), torch.Generator().manual_seed(0))
    width, layers = 128, 4
    block, text_block = model.visual.transformer.resblocks[1], model.transformer.resblocks[2]
    expected = {
        model.visual.conv1.weight: width**-0.5,
        model.visual.positional_embedding: 0.01,
        model.visual.proj: width**-0.5,
        model.token_embedding.weight: 0.02,
        model.positional_embedding: 0.01,
        model.text_projection: width**-0.5,
    }
    for each in (block, text_block):
        expected[each.get_parameter("attn.in_proj_weight")] = width**-0.5
        expected[each.get_parameter("attn.out_proj.weight")] = (width * 2 * layers) ** -0.5
        expected[each.get_parameter("mlp.c_proj.weight")] = (width * 2 * layers) ** -0.5
        expected[each.get_parameter("mlp.c_fc.weight")] = (2 * width) ** -0.5
    for parameter, std in expected.items():
        assert parameter.std().item() == pytest.approx(std, rel=0.06)
        assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel())
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln_" in f".{name}":
            assert (parameter == 1).all(), name
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_own_generator_decides_the_weights_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = CLIP(get_model_config("test"), torch.Generator().manual_seed(3)).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    second = CLIP(get_model_config("test"), torch.Generator().manual_seed(3)).state_dict()
    other = CLIP(get_model_config("test"), torch.Generator().manual_seed(4)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])


def test_pooling_alone_gives_what_the_whole_last_block_gives(
    model: CLIP, images: Tensor, token_ids: Tensor
) -> None:
    short, whole = model.forward_image(images), model.forward_image(images, need_tokens=True)
    torch.testing.assert_close(short.features, whole.features, rtol=0, atol=1e-12)
    torch.testing.assert_close(short.pooled, whole.pooled, rtol=0, atol=1e-12)
    assert short.tokens is None
    assert whole.tokens is not None
    assert whole.tokens.shape == (4, 4, 32)
    text = model.forward_text(token_ids)
    with_states = model.forward_text(token_ids, need_hidden=True)
    torch.testing.assert_close(text.features, with_states.features, rtol=0, atol=1e-12)
    assert text.hidden is None


def test_short_cut_has_the_same_gradients(model: CLIP, images: Tensor, token_ids: Tensor) -> None:
    gradients = []
    for full in (False, True):
        model.zero_grad()
        image = model.forward_image(images, need_tokens=full).features
        text = model.forward_text(token_ids, need_hidden=full).features
        (image * text).sin().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cutting_captions_is_exact(model: CLIP, token_ids: Tensor, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    for need_hidden in (False, True):
        cut = model.forward_text(token_ids, need_hidden=need_hidden)
        kept = model.forward_text(token_ids, need_hidden=need_hidden, trim=False)
        rounding = 3e-6 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(cut.features, kept.features, rtol=0, atol=rounding)
    longest = int(token_ids.argmax(dim=-1).max()) + 1
    assert cut.hidden is not None
    assert kept.hidden is not None
    assert cut.hidden.shape == (4, longest, 32)
    assert kept.hidden.shape == (4, 77, 32)
    torch.testing.assert_close(cut.hidden, kept.hidden[:, :longest], rtol=0, atol=1e-5)


def test_a_caption_does_not_depend_on_its_batch(model: CLIP, token_ids: Tensor) -> None:
    together = model.encode_text(token_ids)
    alone = torch.cat([model.encode_text(row[None]) for row in token_ids])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model.encode_text(token_ids[order]), together[order])


def test_nothing_behind_a_token_reaches_it(model: CLIP, token_ids: Tensor) -> None:
    changed = token_ids.clone()
    changed[2, 5] = 320
    before = model.forward_text(token_ids, need_hidden=True).hidden
    after = model.forward_text(changed, need_hidden=True).hidden
    assert before is not None
    assert after is not None
    torch.testing.assert_close(before[2, :5], after[2, :5])
    assert not torch.allclose(before[2, 5:8], after[2, 5:8])
    padded = token_ids.clone()
    padded[1, 3:] = 999
    torch.testing.assert_close(model.encode_text(padded), model.encode_text(token_ids))


def test_mask_embedding_acts_as_the_embedding_of_a_token_of_its_own(
    model: CLIP, token_ids: Tensor
) -> None:
    unused = 40_000
    mask_embedding = torch.linspace(-1, 1, 32, dtype=torch.float64)
    mask_positions = torch.zeros_like(token_ids, dtype=torch.bool)
    mask_positions[0, 2] = mask_positions[2, 1] = mask_positions[2, 7] = True
    masked = model.forward_text(
        token_ids, need_hidden=True, mask_positions=mask_positions, mask_embedding=mask_embedding
    )
    with torch.no_grad():
        model.token_embedding.weight[unused] = mask_embedding
    spelled = model.forward_text(token_ids.masked_fill(mask_positions, unused), need_hidden=True)
    torch.testing.assert_close(masked.features, spelled.features)
    torch.testing.assert_close(masked.hidden, spelled.hidden)
    # Rows without a mask are untouched, and the end token is found where it was.
    plain = model.forward_text(token_ids).features
    torch.testing.assert_close(masked.features[[1, 3]], plain[[1, 3]])
    assert not torch.allclose(masked.features[0], plain[0])


def test_normalized_features_have_unit_length(
    model: CLIP, images: Tensor, token_ids: Tensor
) -> None:
    image_features, text_features, scale = model(images, token_ids)
    ones = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(image_features.norm(dim=-1), ones)
    torch.testing.assert_close(text_features.norm(dim=-1), ones)
    torch.testing.assert_close(scale.log(), model.logit_scale)


def test_recomputing_blocks_changes_no_gradient(
    model: CLIP, images: Tensor, token_ids: Tensor
) -> None:
    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        image_features, text_features, scale = model(images, token_ids)
        (scale * image_features @ text_features.T).logsumexp(dim=-1).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.set_grad_checkpointing()
    recomputed = gradients()
    assert plain.keys() == recomputed.keys() == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_logit_scale_is_kept_in_its_interval(model: CLIP) -> None:
    for start, expected in ((-1.0, 0.0), (2.0, 2.0), (9.0, math.log(100))):
        with torch.no_grad():
            model.logit_scale.fill_(start)
        model.clamp_logit_scale()
        assert model.logit_scale.item() == pytest.approx(expected)
    model.clamp_logit_scale(5.0, 6.0)
    assert model.logit_scale.item() == 5.0
    with pytest.raises(DeclipError, match=r"between 3\.0 and 2\.0: give a minimum below"):
        model.clamp_logit_scale(3.0, 2.0)


def test_wrong_inputs_are_refused_in_a_sentence(
    model: CLIP, images: Tensor, token_ids: Tensor
) -> None:
    with pytest.raises(ValueError, match=r"\(4, 3, 16, 8\), but this tower takes \(batch, 3, 16"):
        model.encode_image(images[..., :8])
    too_long = torch.zeros(1, 80, dtype=torch.long)
    too_long[0, 0], too_long[0, 79] = SOT_ID, EOT_ID
    with pytest.raises(ValueError, match=r"\(1, 80\), but this tower takes \(batch, at most 77\)"):
        model.encode_text(too_long)
    with pytest.raises(ValueError, match="belong together: give both, or none"):
        model.forward_text(token_ids, mask_positions=token_ids > 5)


def test_autocast_to_bfloat16_stays_near(model: CLIP, images: Tensor, token_ids: Tensor) -> None:
    model = model.float()
    exact = model(images.float(), token_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = model(images.float(), token_ids)
    for fine, rough in zip(exact, coarse, strict=True):
        torch.testing.assert_close(fine, rough.float(), atol=0.05, rtol=0.05)
