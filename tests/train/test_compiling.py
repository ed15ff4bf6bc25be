"""Compiled towers: the names and the results of plain ones; a machine without a compiler."""

from dataclasses import replace

import pytest
import torch

from declip_shards import DeclipError
from declip_train.compiling import compile_towers, require_compiler
from declip_train.model_config import get_model_config
from declip_train.module import forward_text_by_length
from declip_train.towers import CLIP


def towers(layers=2):
    config = get_model_config("test")
    config = replace(
        config,
        vision=replace(config.vision, layers=layers),
        text=replace(config.text, layers=layers),
    )
    return CLIP(config, generator=torch.Generator().manual_seed(0))


def captions(rows, length):
    """Start, words, end, zeros; the longest has ``length`` tokens."""
    ids = torch.zeros(rows, length, dtype=torch.int64)
    for row in range(rows):
        end = length - 1 - row % 3
        ids[row, 0], ids[row, end] = 49_406, 49_407
        ids[row, 1:end] = torch.arange(1, end) * (row + 1)
    return ids


def outcome(clip, length):
    """Features and the gradients of both towers."""
    clip.zero_grad()
    size = clip.config.vision.image_size
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    features = clip.forward_image(images).features
    text = forward_text_by_length(clip, captions(4, length), rows_per_group=2).features
    (features.sum() + text.square().sum()).backward()
    return {
        "image": features.detach(),
        "text": text.detach(),
        **{name: p.grad.clone() for name, p in clip.named_parameters() if p.grad is not None},
    }


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointed", "layers"), [(False, 1), (True, 2)])
def test_compiled_towers_are_the_plain_ones(checkpointed, layers):
    """As shallow as shows it, for each block costs many seconds to compile: of checkpointed towers
    the last text block is not compiled by itself, so there are two."""
    plain, compiled = towers(layers), towers(layers)
    compiled.set_grad_checkpointing(checkpointed)
    compile_towers(compiled, checkpointed=checkpointed)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for length in (6, 9):
        expected, found = outcome(plain, length), outcome(compiled, length)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            difference = float((found[name] - value).norm() / (value.norm() + 1e-6))
            assert difference < 1e-5, name


def test_without_a_compiler_it_is_refused_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DeclipError, match=r"needs a C\+\+ compiler, but .* is not on PATH; inst"):
        compile_towers(towers())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(DeclipError, match="'no-such-compiler' is not on PATH"):
        require_compiler()
