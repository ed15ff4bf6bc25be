"""Memory and parameters of a training run by arithmetic alone; torch is not loaded.

The towers' figures and all FLOPs are `declip_train.flops`'s; heads, optimizer and bank are added
here.
"""

from declip_train import flops
from declip_train.model_config import VisionConfig
from declip_train.settings import TrainSettings


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def head_parameters(settings: TrainSettings) -> dict[str, int]:
    """Parameters of the method's heads, by name."""
    config, method = settings.model_config, settings.method_parts
    heads: dict[str, int] = {}
    if method.has("simsiam"):
        d, h = settings.projector_dim, settings.predictor_hidden_dim
        heads["SimSiam projector"] = _linear(config.embed_dim, d) + 2 * _linear(d, d) + 3 * 2 * d
        heads["SimSiam predictor"] = _linear(d, h) + 2 * h + _linear(h, d)
    if method.has("masked_language_modeling"):
        heads["masked-language head"] = _linear(config.text.width, config.text.vocab_size)
        heads["mask embedding"] = config.text.width
    if method.has("simclr"):
        d = settings.simclr_hidden_dim
        layers = _linear(config.vision.pooled_width, d) + _linear(d, d)
        heads["SimCLR projector"] = layers + 2 * 2 * d + _linear(d, settings.simclr_dim)
    if method.has("tokenwise"):
        widths = config.vision.token_width, config.text.width
        heads["token projections and scale"] = 1 + sum(
            _linear(width, settings.token_dim) for width in widths
        )
    return heads


def num_frozen(settings: TrainSettings) -> int:
    """Parameters of the towers that no gradient reaches.

    A method without a global pair trains neither its projections nor its scale (and bias), nor what
    comes before the image projection; a frozen patch convolution comes on top.
    """
    config = settings.model_config
    vision, frozen = config.vision, 0
    if not settings.method_parts.has("contrastive"):
        frozen += config.text.width * config.embed_dim + 1
        if isinstance(vision, VisionConfig):
            frozen += vision.width * config.embed_dim + 2 * vision.width
        else:
            width = vision.pooled_width
            frozen += (vision.num_patches + 1) * width + 3 * _linear(width, width)
            frozen += _linear(width, config.embed_dim)
    if settings.freeze_patch_embedding and isinstance(vision, VisionConfig):
        frozen += 3 * vision.patch_size**2 * vision.width
    return frozen


def parameters(settings: TrainSettings) -> dict[str, int]:
    """All parameters, by tower and head."""
    towers = flops.parameter_counts(settings.model_config)
    scalars = towers["total"] - towers["image"] - towers["text"]
    return {
        "image tower": towers["image"],
        "text tower": towers["text"],
        "logit scale" if scalars == 1 else "logit scale and bias": scalars,
        **head_parameters(settings),
    }


def recomputed_flops(settings: TrainSettings, text_length: float) -> float:
    """Of one sample: passes of the towers that are done again to save memory.

    Accumulation encodes once without gradient and once with it; checkpointed blocks are computed
    again in the backward pass.
    """
    times = int(settings.accumulation_steps > 1) + int(settings.grad_checkpointing)
    config, method = settings.model_config, settings.method_parts
    tokens = method.has("tokenwise")
    towers = flops.views_flops(settings)
    towers += flops.text_flops(config, text_length, need_hidden=tokens)
    if method.has("multi_view"):
        towers += flops.text_flops(config, text_length)
    return times * towers


def memory_bytes(settings: TrainSettings) -> dict[str, float]:
    """Bytes of a process, by what they are of, for captions of the longest length.

    ZeRO's stages 1 and 2 hold float32 copies of a process's share of the weights in every precision
    (DeepSpeed 0.19.8); stage 0 holds whole ones in bf16 and fp16 only.
    """
    total, frozen = sum(parameters(settings).values()), num_frozen(settings)
    trained, ranks = total - frozen, settings.num_ranks
    is_half = settings.precision in ("bf16", "fp16")
    share = ranks if settings.zero_stage else 1
    copies = 4 if is_half or settings.zero_stage else 0
    moments = 4 * (int(settings.beta1 > 0) if settings.optimizer == "sgd" else 2)
    bank = settings.bank_size * (4 * settings.model_config.embed_dim + 16)
    return {
        "weights": (2 if is_half else 4) * total,
        "gradients": (2 if is_half else 4) * trained / (ranks if settings.zero_stage == 2 else 1),
        "float32 copies of weights": copies * trained / share,
        "optimizer state": moments * trained / share,
        "activations of a part of a step": settings.micro_batch_size
        * flops.activation_bytes(settings),
        "gathered features, gradients": settings.global_batch_size * _feature_bytes(settings),
        "neighbor bank": bank if settings.uses_bank else 0,
    }


def _feature_bytes(settings: TrainSettings) -> float:
    """Of one sample's features on every process, float32, with their gradients where they have."""
    config, method = settings.model_config, settings.method_parts
    values = 0.0
    if method.has("contrastive"):
        values += 2 * config.embed_dim * (4 if method.has("multi_view") else 2)
    if method.has("neighbor"):
        values += config.embed_dim * (2 if settings.uses_bank else 1)
    if method.has("simclr"):
        values += 2 * 2 * settings.simclr_dim
    if method.has("tokenwise"):
        # Text tokens travel, image tokens stay.
        values += 2 * settings.token_dim * config.text.context_length
    return 4.0 * values
