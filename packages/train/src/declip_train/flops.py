"""What the towers and a training step cost, by arithmetic alone; torch is not loaded.

A multiply-add is 2 FLOPs, and only matrix products, convolutions and attention count, as is usual:
norms, activations and softmax are a few percent of a GPU's time and of no multiplier's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING

from declip_train.model_config import ModelConfig, ResNetConfig, TextConfig, VisionConfig
from declip_train.settings import TrainSettings

if TYPE_CHECKING:
    import torch

__all__ = [
    "BYTES_PER_VALUE",
    "activation_bytes",
    "activation_values",
    "contrastive_flops",
    "device_peak",
    "forward_flops",
    "image_flops",
    "known_peak",
    "linear_flops",
    "masked_token_flops",
    "measured_peak",
    "parameter_counts",
    "step_flops",
    "text_flops",
    "tokenwise_flops",
]

TRAIN_FACTOR = 3
"""Forward and backward over forward: each product has two gradients of the same size."""

BYTES_PER_VALUE: Mapping[str, float] = MappingProxyType(
    {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "amp_bf16": 2.25}
)
"""Mean bytes of a kept value, by precision.

With amp_bf16 a transformer's residual stream, 2 of the 16 kept values a token and channel, stays in
float32."""

PEAKS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "H200": (989e12, 67e12),
        "H100 PCIE": (756e12, 51e12),
        "H100 NVL": (835e12, 60e12),
        "H100": (989e12, 67e12),
        "GH200": (989e12, 67e12),
        "B200": (2250e12, 75e12),
        "A100": (312e12, 19.5e12),
        "A800": (312e12, 19.5e12),
        "A40": (149.7e12, 37.4e12),
        "A10": (125e12, 31.2e12),
        "L4": (121e12, 30.3e12),
        "L40S": (362e12, 91.6e12),
        "V100": (125e12, 15.7e12),
        "T4": (65e12, 8.1e12),
        "RTX 4090": (165.2e12, 82.6e12),
        "RTX 3090": (71e12, 35.6e12),
    }
)
"""FLOPs a second of dense products in 16 and in 32 bits, from the makers' data sheets."""
_PRODUCT_SIDE = {False: 512, True: 8192}
_TRIES = 5


def linear_flops(*sizes: int) -> int:
    """Of one row through linear layers from the first size to the last."""
    return 2 * sum(inputs * outputs for inputs, outputs in pairwise(sizes))


def _block(length: float, width: int) -> float:
    """A whole transformer block. Causal attention counts in full, though half of it is skipped."""
    return 24.0 * length * width**2 + 4.0 * length**2 * width


def _last_block_pooled(length: float, width: int, heads: int) -> float:
    """The last block of `length` tokens for one query; see `declip_train.transformer`."""
    return 24 * width**2 + 4 * heads * length * width


def _last_block_asked(length: float, width: int, num_asked: float) -> float:
    """The last block for `num_asked` queries and the pooled one."""
    rows = num_asked + 1
    return 20 * rows * width**2 + 4 * length * width**2 + 4 * rows * length * width


def _resnet_convolutions(config: ResNetConfig) -> list[tuple[int, int, int, int]]:
    """(side of the output map, channels in, channels out, kernel side) of every convolution."""
    side, width = config.image_size // 2, config.width
    found = [
        (side, 3, width // 2, 3),
        (side, width // 2, width // 2, 3),
        (side, width // 2, width, 3),
    ]
    side, channels = side // 2, width
    for stage, blocks in enumerate(config.layers):
        inner = width * 2**stage
        for block in range(blocks):
            # The pooling that stands for a stride comes behind the 3x3 convolution.
            after = side // 2 if stage > 0 and block == 0 else side
            found += [(side, channels, inner, 1), (side, inner, inner, 3)]
            found.append((after, inner, 4 * inner, 1))
            if block == 0:
                found.append((after, channels, 4 * inner, 1))
            side, channels = after, 4 * inner
    return found


def image_flops(config: ModelConfig, *, need_tokens: bool = False, whole: bool = False) -> float:
    """Of one image's forward pass.

    Args:
        config: the model.
        need_tokens: whether the patch tokens are asked for; a ViT's last block then runs on all.
        whole: count what other implementations compute: the last block, or a ResNet's attention
            pooling, for all tokens. 8.82 GF for ViT-B-32, 12.23 GF for RN50.
    """
    vision = config.vision
    if isinstance(vision, ResNetConfig):
        convolutions = sum(2 * s**2 * a * b * k**2 for s, a, b, k in _resnet_convolutions(vision))
        width, places = vision.pooled_width, vision.num_patches + 1
        if whole:
            # Every place asks, though only the first one's answer is read.
            pool = places * linear_flops(width, width, width, width, config.embed_dim)
            return float(convolutions + pool + 4 * places**2 * width)
        pool = linear_flops(width, width, width, width, config.embed_dim)
        return float(convolutions + pool + 4 * vision.heads * places * width)
    length, width = vision.num_patches + 1, vision.width
    total = float(linear_flops(3 * vision.patch_size**2, width) * vision.num_patches)
    total += (vision.layers - 1) * _block(length, width)
    if whole or need_tokens:
        total += _block(length, width)
    else:
        total += _last_block_pooled(length, width, vision.heads)
    return total + linear_flops(width, config.embed_dim)


def views_flops(settings: TrainSettings) -> float:
    """Of all views of one sample; patch tokens are read from the first alone."""
    config, method = settings.model_config, settings.method_parts
    first = image_flops(config, need_tokens=method.has("tokenwise"))
    return first + (method.num_views - 1) * image_flops(config)


def text_flops(
    config: ModelConfig,
    length: float,
    *,
    need_hidden: bool = False,
    num_asked: float = 0.0,
    whole: bool = False,
) -> float:
    """Of one caption's forward pass.

    Args:
        config: the model.
        length: tokens that are computed, start and end token (and padding, if any) included; a mean
            length leaves out a little, as attention grows with the square.
        need_hidden: whether the states of all tokens are asked for.
        num_asked: states asked for one by one, as masked language modeling does.
        whole: count what other implementations compute: the last block for all tokens. 5.96 GF for
            77 tokens through the standard tower.
    """
    text = config.text
    total = (text.layers - 1) * _block(length, text.width)
    if whole or need_hidden:
        total += _block(length, text.width)
    elif num_asked:
        total += _last_block_asked(length, text.width, num_asked)
    else:
        total += _last_block_pooled(length, text.width, text.heads)
    return total + linear_flops(text.width, config.embed_dim)


def forward_flops(
    config: ModelConfig, text_length: float, *, whole: bool = False
) -> dict[str, float]:
    """Of one pair's forward pass through the "image" and "text" towers, and in "total"."""
    image = image_flops(config, whole=whole)
    text = text_flops(config, text_length, whole=whole)
    return {"image": image, "text": text, "total": image + text}


def masked_token_flops(config: ModelConfig) -> int:
    """Of one masked token through the masked-language head, which spans the vocabulary."""
    return linear_flops(config.text.width, config.text.vocab_size)


def contrastive_flops(width: int, num_columns: int) -> int:
    """Of one sample's row in one direction: its feature against those of `num_columns` others."""
    return 2 * width * num_columns


def tokenwise_flops(own_tokens: float, other_tokens: float, width: int, num_columns: int) -> float:
    """Of one sample's row in one direction of token-wise similarity (FILIP, arXiv 2111.07783)."""
    return 2.0 * own_tokens * other_tokens * width * num_columns


def _towers_flops(settings: TrainSettings, length: float, num_masked: float) -> tuple[float, float]:
    """Of one sample: passes with gradient, and passes without."""
    config, method = settings.model_config, settings.method_parts
    tokens = method.has("tokenwise")
    trained = views_flops(settings)
    trained += text_flops(config, length, need_hidden=tokens, num_asked=num_masked)
    plain = text_flops(config, length)
    if method.has("multi_view"):
        trained += plain
    uses_caption = settings.uses_index and settings.neighbor_feature == "caption"
    return trained, plain if uses_caption else 0.0


def _heads_flops(settings: TrainSettings, length: float, num_masked: float) -> float:
    config, method = settings.model_config, settings.method_parts
    total = 0.0
    if method.has("simsiam"):
        d, h = settings.projector_dim, settings.predictor_hidden_dim
        total += 2 * linear_flops(config.embed_dim, d, d, d, h, d)
    if method.has("simclr"):
        d = settings.simclr_hidden_dim
        total += 2 * linear_flops(config.vision.pooled_width, d, d, settings.simclr_dim)
    if method.has("masked_language_modeling"):
        total += num_masked * masked_token_flops(config)
    if method.has("tokenwise"):
        vision, d = config.vision, settings.token_dim
        total += vision.num_patches * linear_flops(vision.token_width, d)
        total += length * linear_flops(config.text.width, d)
    return total


def _losses_flops(settings: TrainSettings, length: float) -> tuple[float, float]:
    """Of one sample: products with gradient (both directions), and look-ups without."""
    config, method, columns = (
        settings.model_config,
        settings.method_parts,
        settings.global_batch_size,
    )
    product = contrastive_flops(config.embed_dim, columns)
    total, lookups = 0.0, 0.0
    if method.has("contrastive"):
        total += 2 * product * (4 if method.has("multi_view") else 1)
    if method.has("neighbor"):
        # Two image views, from images to texts; a bank has a neighbor for both caption views.
        total += 2 * product * (2 if settings.uses_bank else 1)
    if settings.uses_bank:
        lookups += 2 * contrastive_flops(config.embed_dim, settings.bank_size)
    if method.has("simclr"):
        total += 2 * contrastive_flops(settings.simclr_dim, 2 * columns)
    if method.has("tokenwise"):
        one = tokenwise_flops(config.vision.num_patches, length, settings.token_dim, columns)
        # A direction keeps its own tokens, and a share of the others'.
        total += one * (settings.image_token_fraction + settings.text_token_fraction)
    return total, lookups


def step_flops(settings: TrainSettings, text_length: float) -> float:
    """Useful arithmetic of one training step on all processes.

    Passes with gradient count three times; the neighbors' captions and the look-ups in the bank
    once. What is computed again to save memory (activation checkpointing, cached gradients, losses
    in blocks) is no use, and left out, as in the usual model FLOP utilization.

    Args:
        settings: the run.
        text_length: mean tokens of a caption, start and end token included, padding not.
    """
    num_masked = 0.0
    if settings.method_parts.has("masked_language_modeling"):
        num_masked = settings.mask_probability * max(0.0, text_length - 2)
    towers, without = _towers_flops(settings, text_length, num_masked)
    products, lookups = _losses_flops(settings, text_length)
    trained = towers + _heads_flops(settings, text_length, num_masked) + products
    return settings.global_batch_size * (TRAIN_FACTOR * trained + without + lookups)


def _block_parameters(width: int) -> int:
    return 12 * width**2 + 13 * width


def _image_parameters(vision: VisionConfig | ResNetConfig, embed_dim: int) -> int:
    width = vision.pooled_width
    if isinstance(vision, VisionConfig):
        embedding = (3 * vision.patch_size**2 + 1 + vision.num_patches + 1) * width
        blocks = vision.layers * _block_parameters(width)
        return embedding + blocks + 4 * width + width * embed_dim
    # Each convolution is followed by a batch norm's gain and bias.
    total = sum(a * b * k**2 + 2 * b for _, a, b, k in _resnet_convolutions(vision))
    pool = (vision.num_patches + 1) * width + 3 * (width**2 + width)
    return total + pool + width * embed_dim + embed_dim


def _text_parameters(text: TextConfig, embed_dim: int) -> int:
    embedding = (text.vocab_size + text.context_length) * text.width
    blocks = text.layers * _block_parameters(text.width)
    return embedding + blocks + 2 * text.width + text.width * embed_dim


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters of the "image" and "text" towers, and in "total" with the logit scale (and bias).

    ViT-B-32 has 87,849,216 + 63,428,096 + 1.
    """
    image = _image_parameters(config.vision, config.embed_dim)
    text = _text_parameters(config.text, config.embed_dim)
    scalars = 1 if config.init_logit_bias is None else 2
    return {"image": image, "text": text, "total": image + text + scalars}


def _kept_by_transformer(
    length: float, width: int, heads: int, layers: int, whole: bool, grad_checkpointing: bool
) -> float:
    """A block keeps the inputs of its two norms and the norms' results (4 a token and channel),
    queries, keys and values (3), what attention gives (1), and both sides of the activation (8)."""
    block = 16.0 * length * width
    # Inputs and results of the first norm; scores, lifted queries and mixed tokens of each head.
    last = block if whole else (2 * length + 14) * width + heads * (2 * width + length)
    if not grad_checkpointing:
        return (layers - 1) * block + last
    # Every block's input, and while it is recomputed, one block's own.
    return layers * length * width + (block if layers > 1 or whole else last)


def _kept_by_resnet(config: ResNetConfig, grad_checkpointing: bool) -> float:
    """Each convolution keeps its input and each batch norm its own, which are the convolution's
    results before and after norm and ReLU; the last of a block only before, then the block's."""
    side, width = config.image_size // 2, config.width
    # The image; two maps of each of the stem's convolutions; the pooled map.
    stem = 3.0 * config.image_size**2 + 4 * width * side**2 + (side // 2) ** 2 * width
    inputs = 0.0
    blocks: list[float] = []
    side, channels = side // 2, width
    for stage, num in enumerate(config.layers):
        inner = width * 2**stage
        for block in range(num):
            halved = stage > 0 and block == 0
            after = side // 2 if halved else side
            own: float = 2 * inner * side**2 + 2 * inner * side**2 + 2 * 4 * inner * after**2
            if block == 0:
                own += 4 * inner * after**2
            if halved:
                own += (inner + channels) * after**2
            blocks.append(own)
            inputs += 4 * inner * after**2
            side, channels = after, 4 * inner
    pool = (config.num_patches + 1 + 8 + 2 * config.heads) * config.pooled_width
    body = inputs + max(blocks) if grad_checkpointing else sum(blocks)
    return stem + body + pool


def activation_values(
    config: ModelConfig,
    text_length: float,
    *,
    image_views: int = 1,
    text_views: int = 1,
    need_tokens: bool = False,
    grad_checkpointing: bool = False,
) -> float:
    """Numbers that a sample's passes through both towers keep for the backward pass.

    Counted are the tensors that autograd keeps. Not counted are weights and their gradients, heads,
    losses, the optimizer, gradients of activations (alive for a block at a time), what convolution
    algorithms borrow, and what an allocator wastes: a GPU needs some tens of percent more.

    Args:
        config: the model.
        text_length: tokens of a caption as computed, padding included.
        image_views: images of a sample.
        text_views: captions of a sample that are encoded with gradient.
        need_tokens: whether all tokens of both towers are read, so last blocks are whole.
        grad_checkpointing: whether blocks are recomputed.
    """
    vision, text = config.vision, config.text
    if isinstance(vision, ResNetConfig):
        image = _kept_by_resnet(vision, grad_checkpointing)
    else:
        length, width = vision.num_patches + 1, vision.width
        image = 3.0 * vision.image_size**2 + length * width
        image += _kept_by_transformer(
            length, width, vision.heads, vision.layers, need_tokens, grad_checkpointing
        )
    caption = _kept_by_transformer(
        text_length, text.width, text.heads, text.layers, need_tokens, grad_checkpointing
    )
    return image_views * image + text_views * caption


def activation_bytes(settings: TrainSettings, text_length: float | None = None) -> float:
    """Bytes that a sample's passes keep in a run's precision; see `activation_values`.

    Args:
        settings: the run.
        text_length: tokens of a caption as computed; None: the longest there can be.
    """
    config, method = settings.model_config, settings.method_parts
    values = activation_values(
        config,
        config.text.context_length if text_length is None else text_length,
        image_views=method.num_views,
        text_views=2 if method.has("multi_view") else 1,
        need_tokens=method.has("tokenwise"),
        grad_checkpointing=settings.grad_checkpointing,
    )
    return values * BYTES_PER_VALUE[settings.precision]


def known_peak(device_name: str, precision: str) -> float | None:
    """FLOPs a second of dense matrix products that a GPU's maker gives it; None for others.

    With fp32, torch's own default for products is meant: float32 without TensorFloat-32.

    Args:
        device_name: as CUDA tells it, such as "NVIDIA H200".
        precision: fp32, or any other for products in 16 bits.
    """
    words = device_name.upper().replace("-", " ").split()
    for name, (half, single) in PEAKS.items():
        if all(word in words for word in name.split()):
            return single if precision == "fp32" else half
    return None


def measured_peak(device: torch.device, precision: str) -> float:
    """FLOPs a second of a large matrix product on this device, the best of a few tries.

    It takes some tens of milliseconds, and draws no random number.
    """
    import torch

    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
    size = _PRODUCT_SIDE[device.type == "cuda"]
    side = torch.full((size, size), 1 / size, dtype=dtype, device=device)
    result = torch.empty_like(side)
    best = math.inf
    with torch.no_grad():
        for _ in range(_TRIES):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            torch.mm(side, side, out=result)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def device_peak(device: torch.device, precision: str) -> float:
    """FLOPs a second that one process's device could do: its maker's figure, else a measured one.

    On CPUs it is what this process's threads reach at this moment.
    """
    import torch

    if device.type == "cuda":
        known = known_peak(torch.cuda.get_device_name(device), precision)
        if known is not None:
            return known
    return measured_peak(device, precision)
