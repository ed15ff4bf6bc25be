"""Towers: open_clip's parameters, and short cuts that change no number."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from declip_shards import DeclipError
from declip_train.model_config import (
    MODEL_CONFIGS,
    ModelConfig,
    VisionConfig,
    get_model_config,
)
from declip_train.tokenizer import EOT_ID, SOT_ID, CaptionTokenizer
from declip_train.towers import CLIP, ModifiedResNet, TwoTowers, VisionTransformer

CAPTIONS = ["a red apple", "a", "two small dogs run along a beach in the evening sun", "tree"]


def parity_cases() -> list[tuple[ModelConfig, str, float]]:
    """Sizes, dtype, and how far values and gradients may be off.

    Whole models of full size take minutes; benchmarks/parity.py has them.
    """
    base, resnet = get_model_config("ViT-B-32"), get_model_config("RN50")
    assert isinstance(base.vision, VisionConfig)
    shallow = replace(
        base, vision=replace(base.vision, layers=2), text=replace(base.text, layers=2)
    )
    narrow = replace(
        get_model_config("test"),
        vision=replace(resnet.vision, width=16, image_size=96),
        quick_gelu=False,
        init_logit_bias=-3.0,
    )
    return [
        (get_model_config("test"), "float64", 1e-11),
        (get_model_config("test-rn"), "float64", 1e-11),
        (shallow, "float32", 1e-5),
        # In float32, a deep net with batch norm over so few rows amplifies rounding (open_clip's
        # own, too): ReLUs near zero flip.
        (narrow, "float64", 1e-9),
    ]


@pytest.fixture(scope="module")
def open_clip_side() -> Any:
    """The answer of open_clip_towers.py, which runs both models in a process of its own."""
    folder = Path(__file__).parent
    request = {
        "shapes": {name: config.to_open_clip() for name, config in MODEL_CONFIGS.items()},
        "parity": [
            {"config": config.to_open_clip(), "dtype": dtype, "rows": 4}
            for config, dtype, _ in parity_cases()
        ],
    }
    answer = subprocess.run(
        [sys.executable, str(folder / "open_clip_towers.py")],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env={"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    return json.loads(answer.stdout)


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
def test_every_named_model_has_open_clips_names_and_shapes(open_clip_side: Any) -> None:
    assert open_clip_side["shapes"].keys() == MODEL_CONFIGS.keys()
    for name, theirs in open_clip_side["shapes"].items():
        model = meta_model(name)
        state = {key: list(value.shape) for key, value in model.state_dict().items()}
        assert state == theirs["state"]
        # DeepSpeed and the optimizer know parameters by this name: it must be the same one.
        assert sorted(key for key, _ in model.named_parameters()) == sorted(theirs["parameters"])


@pytest.mark.slow
def test_values_and_gradients_are_open_clips(open_clip_side: Any) -> None:
    for (_, _, tolerance), found in zip(parity_cases(), open_clip_side["parity"], strict=True):
        assert not found["missing"]
        assert max(found["images"], found["texts"], found["statistics"]) < tolerance
        assert max(found["gradients"].values()) < tolerance, found["gradients"]


def test_parameter_counts_of_the_published_model() -> None:
    model = meta_model("ViT-B-32")
    visual = sum(parameter.numel() for parameter in model.visual.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert visual == 87_849_216
    assert total - visual - 1 == 63_428_096
    assert total == 151_277_313


def test_a_pair_of_towers_without_its_text_side_is_none() -> None:
    class ImagesAlone(TwoTowers):
        pass

    with pytest.raises(TypeError, match="abstract"):
        ImagesAlone()  # type: ignore[abstract]


def test_towers_go_with_their_configuration() -> None:
    assert isinstance(meta_model("RN50").visual, ModifiedResNet)
    assert isinstance(meta_model("ViT-L-14").visual, VisionTransformer)
    config = get_model_config("test")
    shallow = replace(config, text=replace(config.text, layers=1))
    assert len(CLIP(shallow).transformer.resblocks) == 1


def test_logit_bias_is_there_where_the_configuration_has_one() -> None:
    plain = CLIP(get_model_config("test"))
    assert plain.logit_bias is None
    assert "logit_bias" not in plain.state_dict()
    config = replace(get_model_config("test"), init_logit_bias=-10, init_logit_scale=math.log(10))
    siglip = CLIP(config)
    assert dict(siglip.named_parameters())["logit_bias"].item() == -10
    assert siglip.logit_scale.exp().item() == pytest.approx(10)


def test_weights_are_drawn_at_the_published_scales() -> None:
    model = CLIP(get_model_config("ViT-Ti-8-48"), torch.Generator().manual_seed(0))
    width, layers = 128, 4
    assert isinstance(model.visual, VisionTransformer)
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


def ask(token_ids: Tensor, *places: tuple[int, int]) -> Tensor:
    asked = torch.zeros_like(token_ids, dtype=torch.bool)
    for row, place in places:
        asked[row, place] = True
    return asked


@pytest.mark.parametrize(
    "places",
    [
        [(0, 1), (2, 3), (2, 7), (2, 5), (3, 1)],
        [(0, 0)],
        [],
        [(2, place) for place in range(12)],
        # The end token, and padding behind it.
        [(1, 2), (1, 6)],
        [(1, 40)],
    ],
)
def test_asked_states_are_those_of_the_whole_pass(
    model: CLIP, token_ids: Tensor, places: list[tuple[int, int]]
) -> None:
    asked = ask(token_ids, *places)
    whole = model.forward_text(token_ids, need_hidden=True, trim=False)
    assert whole.hidden is not None
    for trim in (True, False):
        short = model.forward_text(token_ids, state_positions=asked, trim=trim)
        assert short.hidden is None
        torch.testing.assert_close(short.states, whole.hidden[asked], rtol=0, atol=1e-12)
        torch.testing.assert_close(short.features, whole.features, rtol=0, atol=1e-12)
    both = model.forward_text(token_ids, state_positions=asked, need_hidden=True)
    assert both.hidden is not None
    torch.testing.assert_close(both.states, whole.hidden[asked], rtol=0, atol=1e-12)


def test_asked_states_have_the_gradients_of_the_whole_pass(model: CLIP, token_ids: Tensor) -> None:
    asked = ask(token_ids, (0, 1), (2, 3), (2, 7), (3, 2))
    weights = torch.randn(4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = []
    for whole in (False, True):
        model.zero_grad()
        found = model.forward_text(token_ids, state_positions=asked, need_hidden=whole)
        assert found.states is not None
        ((found.states * weights).sum() + found.features.sin().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=0, atol=1e-10)


def test_one_caption_and_none_pass(model: CLIP, token_ids: Tensor) -> None:
    whole = model.forward_text(token_ids)
    alone = model.forward_text(token_ids[2:3], state_positions=ask(token_ids[2:3], (0, 4)))
    torch.testing.assert_close(alone.features, whole.features[2:3])
    none = model.forward_text(token_ids[:0], state_positions=ask(token_ids[:0]))
    assert none.features.shape == (0, 16)
    assert none.states is not None
    assert none.states.shape == (0, 32)


def test_captions_without_an_end_are_refused_and_not_misread(
    model: CLIP, token_ids: Tensor
) -> None:
    padding = token_ids.clone()
    padding[1] = 0
    cut_off = token_ids.clone()
    cut_off[2, int(token_ids[2].argmax()) :] = 0
    for wrong in (padding, cut_off):
        with pytest.raises(ValueError, match=r"has no end token .* leave such samples out"):
            model.forward_text(wrong)
        with pytest.raises(ValueError, match="has no end token"):
            model.forward_text(wrong, state_positions=ask(wrong, (0, 1)), trim=False)
        # Without a wait for the device, it is the device that refuses.
        with pytest.raises(RuntimeError, match="has no end token"):
            model.forward_text(wrong, trim=False)


def test_compiled_towers_give_the_same(model: CLIP, images: Tensor, token_ids: Tensor) -> None:
    asked = ask(token_ids, (0, 1), (2, 3))
    image_pass = torch.compile(model.forward_image, backend="eager", fullgraph=True)
    fixed = torch.compile(model.forward_text, backend="eager", fullgraph=True, dynamic=True)
    cutting = torch.compile(model.forward_text, backend="eager", dynamic=True)
    torch.testing.assert_close(image_pass(images).features, model.forward_image(images).features)
    expected = model.forward_text(token_ids, state_positions=asked)
    for rows in (slice(4), slice(2, 3)):
        short = fixed(token_ids[rows], trim=False)
        torch.testing.assert_close(short.features, expected.features[rows])
    found = cutting(token_ids, state_positions=asked)
    torch.testing.assert_close(found.states, expected.states)
    found.features.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["test", "test-rn"])
def test_sixteen_bit_weights_stay_near(name: str, dtype: torch.dtype, token_ids: Tensor) -> None:
    model = CLIP(get_model_config(name), torch.Generator().manual_seed(0))
    size = model.config.vision.image_size
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(5))
    asked = ask(token_ids, (0, 1), (2, 3), (2, 4))
    exact = model.forward_text(token_ids, state_positions=asked), model.forward_image(images, True)
    model.to(dtype)
    text = model.forward_text(token_ids, state_positions=asked)
    image = model.forward_image(images, need_tokens=True)
    assert text.states is not None
    assert image.tokens is not None
    assert {text.features.dtype, text.states.dtype, image.features.dtype} == {dtype}
    for fine, rough in zip((*exact[0], *exact[1]), (*text, *image), strict=True):
        if fine is not None and rough is not None:
            gap = (fine - rough.float()).square().mean().sqrt()
            assert gap < 0.03 * fine.square().mean().sqrt()
    (text.states.sum() + image.features.sum() + text.features.sum()).backward()
    for key, parameter in model.named_parameters():
        if key != "logit_scale":
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all(), key


def test_frozen_patch_embedding_gets_no_gradient(images: Tensor) -> None:
    model = make_model()
    model.freeze_patch_embedding()
    model.encode_image(images).sum().backward()
    assert isinstance(model.visual, VisionTransformer)
    assert model.visual.conv1.weight.grad is None
    assert model.visual.proj.grad is not None
    with pytest.raises(DeclipError, match="image tower is a ResNet, which has none: choose a ViT"):
        CLIP(get_model_config("test-rn")).freeze_patch_embedding()


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
    with pytest.raises(ValueError, match=r"\(4, 0\), but this tower takes"):
        model.forward_text(token_ids[:, :0])
    for wrong in (token_ids > 5)[:, :9], token_ids:
        with pytest.raises(ValueError, match=r"must be torch.bool in the shape of .* \(4, 77\)"):
            model.forward_text(token_ids, state_positions=wrong)


def test_autocast_to_bfloat16_stays_near(model: CLIP, images: Tensor, token_ids: Tensor) -> None:
    model = model.float()
    exact = model(images.float(), token_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = model(images.float(), token_ids)
    for fine, rough in zip(exact, coarse, strict=True):
        torch.testing.assert_close(fine, rough.float(), atol=0.05, rtol=0.05)
