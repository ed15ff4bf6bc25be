"""Packed linear layers against torch's own."""

import copy

import pytest
import torch
from torch import nn

from declip_train.model_config import get_model_config
from declip_train.towers import CLIP
from declip_train.transformer import ResidualAttentionBlock
from pipelines import eval_packed
from pipelines.eval_packed import PackedLinear, pack_linears


def make_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Sequential(nn.Linear(40, 8, bias=False)))


@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (3, 5, 24), (900, 24)])
def test_results_are_those_of_the_layers(shape):
    plain, packed = make_layers(), make_layers()
    number = pack_linears(packed, "cpu")
    assert number == (2 if torch.backends.mkldnn.is_available() else 0)
    x = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), plain(x), atol=1e-5, rtol=1e-5)


def test_a_view_that_is_not_contiguous_is_taken_as_it_is():
    plain, packed = make_layers(), make_layers()
    pack_linears(packed, "cpu")
    x = torch.randn(24, 9).T
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), plain(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_the_tower(causal):
    def make_block():
        torch.manual_seed(0)
        block = ResidualAttentionBlock(32, 2, quick_gelu=True)
        nn.init.normal_(block.attn.in_proj_weight, std=0.1)
        nn.init.normal_(block.attn.in_proj_bias)
        return block.eval()

    plain, packed = make_block(), make_block()
    assert pack_linears(packed, "cpu") == (4 if torch.backends.mkldnn.is_available() else 0)
    x, ends = torch.randn(3, 7, 32), torch.tensor([6, 2, 0])
    with torch.inference_mode():
        torch.testing.assert_close(packed(x, causal), plain(x, causal), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            packed.forward_pooled(x, ends), plain.forward_pooled(x, ends), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", ["test", "test-rn"])
def test_towers_are_the_same_whatever_their_kind(name):
    config = get_model_config(name)
    plain = CLIP(config, generator=torch.Generator().manual_seed(0)).eval()
    packed = copy.deepcopy(plain)
    assert (pack_linears(packed, "cpu") > 0) == torch.backends.mkldnn.is_available()
    images = torch.randn(3, 3, config.vision.image_size, config.vision.image_size)
    texts = torch.from_numpy(plain.make_tokenizer()(["a cat", "a much longer dog", ""]))
    with torch.inference_mode():
        for found, expected in zip(
            (*packed.forward_image(images, need_tokens=True), packed.encode_text(texts)),
            (*plain.forward_image(images, need_tokens=True), plain.encode_text(texts)),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_other_devices_and_types_are_left_alone():
    assert pack_linears(make_layers(), "cuda") == 0
    assert pack_linears(make_layers().double(), "cpu") == 0


@pytest.mark.parametrize("fault", ["absent", "other numbers"])
def test_what_cannot_be_packed_stays_and_works(monkeypatch, fault):
    class Faulty(PackedLinear):
        def __init__(self, linear):
            if fault == "absent":
                raise AttributeError("no such operation")
            super().__init__(linear)

        def forward(self, x):
            return super().forward(x) + 1

    monkeypatch.setattr(eval_packed, "PackedLinear", Faulty)
    layers = make_layers()
    assert pack_linears(layers, "cpu") == 0
    x = torch.randn(3, 24)
    with torch.inference_mode():
        torch.testing.assert_close(layers(x), make_layers()(x))
