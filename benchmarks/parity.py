"""How far our losses and towers are from independent implementations, values and gradients.

    python benchmarks/parity.py [--fast] [--device cuda]

Towers and the losses that open_clip has are compared with open_clip, the other losses with loops in
float64 (references.py), at equal weights and inputs, ours in float32. A difference is the largest
of a tensor, divided by the largest number of the reference's tensor (by a thousandth of the largest
of all tensors where that is more); gradients are of every input and parameter. Towers have random
weights, gains and biases, none of them zero: a layer that gives zero would hide its fault. `--fast`
leaves out the full-size towers. The status is 1 if any
exceeds 1e-5.

A ResNet's gradients in float32 are no measure of anybody's parity: batch norm over few samples
enlarges rounding, and of a large one's millions of ReLUs some lie within rounding of their kink.
open_clip's RN50 in float32 differs from itself in float64 by about 1e-3. So ResNets are compared in
float64 as well; in float32 the limit is 0.1, or twice open_clip's own difference.
"""

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import references
from declip_train import losses
from declip_train.model_config import ModelConfig, ResNetConfig, get_model_config
from declip_train.tokenizer import CaptionTokenizer
from declip_train.tokenwise import tokenwise_info_nce
from declip_train.towers import CLIP
from peers import import_open_clip

BAR = 1e-5
FLOOR = 1e-3
KINKED_BAR = 0.1
"""For a ResNet's gradients in float32, which say little."""
FAST_TOWERS = ("test", "test-rn", "ViT-Ti-8-48")
TOWERS = (*FAST_TOWERS, "ViT-B-32", "RN50")
CAPTIONS = (
    "a red apple",
    "a",
    "two small dogs run along a beach in the evening sun, with ten more behind them",
    "tree",
    "an old man with a hat reads the newspaper on a bench in the park",
    "blue car",
    "the map of a city",
    "three red balloons over a lake, seen from the shore",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    name: str
    reference: str
    value: float
    """Largest difference of the results."""
    gradient: float
    """Largest difference of the gradients."""
    gradient_limit: float = BAR
    """What the gradients' difference may be."""

    @property
    def is_good(self) -> bool:
        return self.value <= BAR and self.gradient <= self.gradient_limit


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest difference of two lists of tensors; see the module's text."""
    largest = max(float(other.detach().abs().max()) for other in theirs)
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        reference = other.detach().double()
        gap = float((mine.detach().double() - reference).abs().max())
        # A tensor of nothing but rounding has no size of its own to compare with.
        worst = max(worst, gap / max(float(reference.abs().max()), FLOOR * largest))
    return worst


def compare(
    name: str,
    reference: str,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    reference_dtype: torch.dtype = torch.float64,
) -> Row:
    """Run both on copies of the same inputs; floating-point inputs get gradients."""

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        copies = {
            key: value.to(dtype, copy=True).requires_grad_() if value.is_floating_point() else value
            for key, value in inputs.items()
        }
        result = function(*copies.values())
        leaves = [value for value in copies.values() if value.is_floating_point()]
        gradients = torch.autograd.grad(result, leaves, allow_unused=True)
        found = cast(Sequence[Tensor | None], gradients)
        pairs = zip(found, leaves, strict=True)
        return result, [torch.zeros_like(leaf) if g is None else g for g, leaf in pairs]

    mine, my_gradients = run(ours, torch.float32)
    other, other_gradients = run(theirs, reference_dtype)
    return Row(
        name=name,
        reference=reference,
        value=difference([mine], [other]),
        gradient=difference(my_gradients, other_gradients),
    )


def _unit(generator: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


class _Head(nn.Module):
    """A linear layer whose weights are given."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight, self.bias)


def _inputs(device: str) -> dict[str, dict[str, Tensor]]:
    """Inputs of the losses, in float32."""
    draw = torch.Generator().manual_seed(0)
    rows, dim, words = 12, 16, 40
    scale, bias = torch.tensor(14.3), torch.tensor(-10.0)
    views = [_unit(draw, rows, dim) for _ in range(4)]
    raw = [torch.randn(rows, dim, generator=draw) for _ in range(4)]
    lengths = torch.randint(1, 8, (rows,), generator=draw)
    pair = {"images": views[0], "texts": views[2], "scale": scale}
    given = {
        "pair": pair,
        "pair and bias": {**pair, "bias": bias},
        "four": {**dict(zip(("i1", "i2", "t1", "t2"), views, strict=True)), "scale": scale},
        "near": {"images": views[0], "near": views[1], "has": lengths > 2, "scale": scale},
        "simsiam": dict(zip(("p1", "z2", "p2", "z1"), raw, strict=True)),
        "simclr": {"z1": raw[0], "z2": raw[1]},
        "masked": {
            "states": torch.randn(9, dim, generator=draw),
            "targets": torch.randint(words, (9,), generator=draw),
            "weight": torch.randn(words, dim, generator=draw),
            "bias": torch.randn(words, generator=draw),
        },
        "tokens": {
            "images": _unit(draw, rows, 9, dim),
            "texts": _unit(draw, rows, 7, dim),
            "mask": torch.arange(7) < lengths[:, None],
            "scale": scale,
        },
    }
    return {
        case: {name: value.to(device) for name, value in inputs.items()}
        for case, inputs in given.items()
    }


def _our_masked(states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Its backward pass must reach the head's weights: they are parameters there.
    return losses.masked_language_modeling(states, targets, _Head(weight, bias))


def loss_rows(device: str = "cpu") -> list[Row]:
    """Every loss."""
    open_clip = import_open_clip()
    clip_loss, siglip_loss = open_clip.ClipLoss(), open_clip.loss.SigLipLoss()
    given = _inputs(device)
    single = torch.float32

    def open_clip_pair(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        return cast(Tensor, clip_loss(images, texts, scale))

    def open_clip_sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return cast(Tensor, siglip_loss(images, texts, scale, bias))

    def ours_sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return losses.sigmoid_loss(images, texts, scale, bias)

    def ours_pair(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        return losses.info_nce(images, texts, scale)

    def ours_four(i1: Tensor, i2: Tensor, t1: Tensor, t2: Tensor, scale: Tensor) -> Tensor:
        return losses.multi_view_info_nce(i1, i2, t1, t2, scale).mean

    def ours_near(images: Tensor, near: Tensor, has: Tensor, scale: Tensor) -> Tensor:
        return losses.neighbor_info_nce([images], [near], scale, has)

    def ours_tokens(images: Tensor, texts: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        return tokenwise_info_nce(images, texts, mask, scale)

    def simclr(z1: Tensor, z2: Tensor) -> Tensor:
        return losses.nt_xent(z1, z2, 0.1)

    def simclr_loop(z1: Tensor, z2: Tensor) -> Tensor:
        return cast(Tensor, references.nt_xent(z1, z2, 0.1))

    masked_loop = references.masked_language_modeling
    both = given["pair and bias"]
    return [
        compare("contrastive", "open_clip", ours_pair, open_clip_pair, given["pair"], single),
        compare("contrastive", "loop", ours_pair, references.info_nce, given["pair"]),
        compare("sigmoid", "open_clip", ours_sigmoid, open_clip_sigmoid, both, single),
        compare("sigmoid", "loop", ours_sigmoid, references.sigmoid, both),
        compare("four pairs", "loop", ours_four, references.multi_view, given["four"]),
        compare("neighbor", "loop", ours_near, references.neighbor, given["near"]),
        compare("simsiam", "loop", losses.simsiam, references.simsiam, given["simsiam"]),
        compare("simclr", "loop", simclr, simclr_loop, given["simclr"]),
        compare("masked language", "loop", _our_masked, masked_loop, given["masked"]),
        compare("token-wise", "loop", ours_tokens, references.tokenwise, given["tokens"]),
    ]


_Result = tuple[list[Tensor], dict[str, Tensor]]


def _run_towers(model: Any, config: ModelConfig, device: str, dtype: torch.dtype) -> _Result:
    """Features, and gradients of every parameter by name, of one fixed loss."""
    model = copy.deepcopy(model).to(device, dtype)
    size, rows = config.vision.image_size, len(CAPTIONS)
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(rows, 3, size, size, generator=draw).to(device, dtype)
    ids = torch.from_numpy(CaptionTokenizer(config.text.context_length)(CAPTIONS)).to(device)
    weights = torch.randn(2, rows, config.embed_dim, generator=draw).to(device, dtype)
    features = [model.encode_image(images, True), model.encode_text(ids, True)]
    sum((f * w).sum() for f, w in zip(features, weights, strict=True)).backward()
    return features, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _gradient_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Of parameters of the same names; the logit scale plays no part in features."""
    assert ours.keys() == theirs.keys()
    names = sorted(ours)
    return difference([ours[name] for name in names], [theirs[name] for name in names])


def tower_rows(name: str, device: str = "cpu") -> list[Row]:
    """Both towers of a model against open_clip's."""
    open_clip = import_open_clip()
    config = get_model_config(name)
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**config.to_open_clip()).train()
    with torch.no_grad():
        for parameter in theirs.parameters():
            spread = 0.1 if parameter.ndim < 2 else 0.1 * float(parameter.std())
            parameter.add_(spread * torch.randn(parameter.shape))
    ours = CLIP(config).train()
    ours.load_state_dict(theirs.state_dict())
    is_kinked = isinstance(config.vision, ResNetConfig)
    reference = _run_towers(theirs, config, device, torch.float32)
    mine = _run_towers(ours, config, device, torch.float32)
    row = Row(
        name=f"towers of {name}",
        reference="open_clip",
        value=difference(mine[0], reference[0]),
        gradient=_gradient_difference(mine[1], reference[1]),
    )
    if not is_kinked:
        return [row]
    exact = _run_towers(theirs, config, device, torch.float64)
    mine = _run_towers(ours, config, device, torch.float64)
    # Two float32 results may each be that far from the truth, in opposite directions. Where a
    # rounding falls on the other side of a ReLU (that depends on the number of threads), one of
    # them is, and by chance the other is not: float64 is the judge.
    limit = 2 * _gradient_difference(reference[1], exact[1])
    return [
        dataclasses.replace(row, gradient_limit=max(KINKED_BAR, limit)),
        Row(
            name=f"towers of {name}, float64",
            reference="open_clip",
            value=difference(mine[0], exact[0]),
            gradient=_gradient_difference(mine[1], exact[1]),
        ),
    ]


def all_rows(towers: Sequence[str], device: str) -> list[Row]:
    """The whole table, in float32 proper: on a GPU no product may be cut to fewer digits."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return loss_rows(device) + [row for name in towers for row in tower_rows(name, device)]


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="leave out the full-size towers")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    given = parser.parse_args()
    rows = all_rows(FAST_TOWERS if given.fast else TOWERS, given.device)
    print(f"{'':<26}{'reference':<12}{'values':>10}{'gradients':>12}{'limit':>10}")
    for row in rows:
        mark = "" if row.is_good else "  too far"
        print(
            f"{row.name:<26}{row.reference:<12}{row.value:>10.1e}{row.gradient:>12.1e}"
            f"{row.gradient_limit:>10.0e}{mark}"
        )
    if given.json:
        given.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    return 0 if all(row.is_good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
