"""The shapes of a model, in open_clip's own JSON form.

A model is named, and its name leads to one frozen `ModelConfig`. The same fields, under the same
names, are what open_clip reads from `open_clip_config.json`, so an export needs no translation
table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, TypeVar

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

__all__ = [
    "MODEL_CONFIGS",
    "ModelConfig",
    "ResNetConfig",
    "TextConfig",
    "VisionConfig",
    "get_model_config",
]

INITIAL_LOGIT_SCALE = math.log(1.0 / 0.07)
"""Logarithm of the logit scale before training (CLIP, arXiv 2103.00020, section 2.5)."""
RESNET_STRIDE = 32
"""Pixels of the image to one place of a ResNet's last map: 4 by the stem, 2 by three stages."""


def _require_size(name: str, value: Any) -> None:
    """Refuse what is no whole number of at least 1; JSON may hold anything."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DeclipError(
            f"{name} is {value!r}, but it must be a whole number of at least 1: correct it in the "
            "model's configuration."
        )


def _require_number(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise DeclipError(f"{name} is {value!r}, but it must be a finite number: correct it.")


def _require_sizes(owner: str, settings: Any) -> None:
    for field in fields(settings):
        _require_size(f"{owner}.{field.name}", getattr(settings, field.name))


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of a vision transformer; the names are open_clip's."""

    image_size: int
    """Side of the square input image, in pixels."""
    patch_size: int
    """Side of a square patch, in pixels; divides `image_size`."""
    width: int
    """Channels of a token."""
    layers: int
    """Number of residual blocks."""
    head_width: int = 64
    """Channels of one attention head; divides `width`."""

    def __post_init__(self) -> None:
        _require_sizes("vision_cfg", self)
        if self.image_size % self.patch_size:
            raise DeclipError(
                f"vision_cfg.patch_size {self.patch_size} does not divide image_size "
                f"{self.image_size}: choose a patch size that does, or patches at the border would "
                "be lost."
            )
        if self.width % self.head_width:
            raise DeclipError(
                f"vision_cfg.head_width {self.head_width} does not divide width {self.width}: "
                "choose a head width that does."
            )

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // self.head_width

    @property
    def num_patches(self) -> int:
        """Number of patch tokens; the class token comes on top."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def pooled_width(self) -> int:
        """Size of `ImageOutput.pooled`."""
        return self.width

    @property
    def token_width(self) -> int:
        """Channels of `ImageOutput.tokens`."""
        return self.width

    def to_open_clip(self) -> dict[str, Any]:
        """open_clip's `vision_cfg`."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Sizes of CLIP's modified ResNet (arXiv 2103.00020, section 2.4); the names are open_clip's.

    open_clip knows such a tower by `layers` being a list.
    """

    image_size: int
    """Side of the square input image, in pixels; a multiple of 32."""
    layers: tuple[int, int, int, int]
    """Number of bottleneck blocks in each of the four stages; (3, 4, 6, 3) is ResNet-50."""
    width: int
    """Channels inside the first stage's blocks, 64 in all published ones; even."""
    head_width: int = 64
    """Channels of one head of the attention pooling; divides 32 `width`."""

    def __post_init__(self) -> None:
        # JSON has lists, and may hold anything.
        layers: Any = self.layers
        if not isinstance(layers, Sequence) or isinstance(layers, str) or len(layers) != 4:
            raise DeclipError(
                f"vision_cfg.layers is {layers!r}, but a ResNet has four stages: give four whole "
                "numbers."
            )
        object.__setattr__(self, "layers", tuple(layers))
        for blocks in self.layers:
            _require_size("each of vision_cfg.layers", blocks)
        for name in ("image_size", "width", "head_width"):
            _require_size(f"vision_cfg.{name}", getattr(self, name))
        if self.image_size % RESNET_STRIDE:
            raise DeclipError(
                f"vision_cfg.image_size is {self.image_size}, but a ResNet halves the image five "
                f"times: choose a multiple of {RESNET_STRIDE}."
            )
        if self.width % 2:
            raise DeclipError(
                f"vision_cfg.width is {self.width}, but a ResNet's stem starts with half of it: "
                "choose an even number."
            )
        if self.pooled_width % self.head_width:
            raise DeclipError(
                f"vision_cfg.head_width {self.head_width} does not divide 32 times width "
                f"{self.width}: choose a head width that does."
            )

    @property
    def heads(self) -> int:
        """Number of heads of the attention pooling."""
        return self.pooled_width // self.head_width

    @property
    def num_patches(self) -> int:
        """Number of places in the last stage's map."""
        return (self.image_size // RESNET_STRIDE) ** 2

    @property
    def pooled_width(self) -> int:
        """Size of `ImageOutput.pooled`: 2048 for width 64."""
        return 32 * self.width

    @property
    def token_width(self) -> int:
        """Channels of `ImageOutput.tokens`, the last stage's map: 2048 for width 64."""
        return 32 * self.width

    def to_open_clip(self) -> dict[str, Any]:
        """open_clip's `vision_cfg`, whose ResNets say `"patch_size": null`."""
        return {**asdict(self), "layers": list(self.layers), "patch_size": None}


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of a text transformer; the names are open_clip's."""

    context_length: int = 77
    """Longest caption, in tokens, with the start and the end token."""
    vocab_size: int = 49_408
    """Number of token ids; 49,408 is the standard CLIP vocabulary."""
    width: int = 512
    """Channels of a token."""
    heads: int = 8
    """Number of attention heads; divides `width`."""
    layers: int = 12
    """Number of residual blocks."""

    def __post_init__(self) -> None:
        _require_sizes("text_cfg", self)
        if self.width % self.heads:
            raise DeclipError(
                f"text_cfg.heads {self.heads} does not divide width {self.width}: choose a number "
                "of heads that does."
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pair of towers and the space they share."""

    embed_dim: int
    """Size of the image and text features."""
    vision: VisionConfig | ResNetConfig
    """The image tower (`vision_cfg` in open_clip's JSON)."""
    text: TextConfig
    """The text tower (`text_cfg` in open_clip's JSON)."""
    quick_gelu: bool = True
    """x * sigmoid(1.702 x), as OpenAI's and DeCLIP's towers have it, instead of the exact GELU.

    A ResNet tower has no GELU: there it concerns the text tower alone."""
    init_logit_scale: float = INITIAL_LOGIT_SCALE
    """Logarithm of the logit scale before training; SigLIP starts from ln(10)."""
    init_logit_bias: float | None = None
    """What is added to the logits before training; None: the model has no such parameter.

    SigLIP (arXiv 2303.15343, section 3.2) starts from -10."""

    def __post_init__(self) -> None:
        _require_size("embed_dim", self.embed_dim)
        if not isinstance(self.quick_gelu, bool):
            raise DeclipError(f"quick_gelu is {self.quick_gelu!r}, but it must be true or false.")
        _require_number("init_logit_scale", self.init_logit_scale)
        if self.init_logit_bias is not None:
            _require_number("init_logit_bias", self.init_logit_bias)

    def to_open_clip(self) -> dict[str, Any]:
        """Return open_clip's `model_cfg`, as plain dictionaries, lists and scalars.

        Initial logit scale and bias are in it where they are not open_clip's own.
        """
        model_cfg: dict[str, Any] = {
            "embed_dim": self.embed_dim,
            "quick_gelu": self.quick_gelu,
            "vision_cfg": self.vision.to_open_clip(),
            "text_cfg": asdict(self.text),
        }
        if self.init_logit_scale != INITIAL_LOGIT_SCALE:
            model_cfg["init_logit_scale"] = self.init_logit_scale
        if self.init_logit_bias is not None:
            model_cfg["init_logit_bias"] = self.init_logit_bias
        return model_cfg

    @classmethod
    def from_open_clip(cls, model_cfg: Mapping[str, Any]) -> ModelConfig:
        """Read open_clip's `model_cfg`; the inverse of `to_open_clip`.

        Absent entries take open_clip's defaults (`quick_gelu` false, heads of 64).

        Raises:
            DeclipError: an entry is missing, wrong, or asks for something that our towers do not
                have (they would otherwise compute other features than open_clip's without a word).
        """
        _refuse_unknown("model_cfg", model_cfg, _MODEL_ENTRIES)
        for name in ("embed_dim", "vision_cfg", "text_cfg"):
            if name not in model_cfg:
                raise DeclipError(f"model_cfg has no {name!r}: give open_clip's own model JSON.")
        return cls(
            embed_dim=model_cfg["embed_dim"],
            quick_gelu=model_cfg.get("quick_gelu", False),
            init_logit_scale=model_cfg.get("init_logit_scale", INITIAL_LOGIT_SCALE),
            init_logit_bias=model_cfg.get("init_logit_bias"),
            vision=_read_vision(model_cfg["vision_cfg"]),
            text=_read_tower(TextConfig, "text_cfg", model_cfg["text_cfg"]),
        )


_MODEL_ENTRIES = {
    "embed_dim",
    "init_logit_bias",
    "init_logit_scale",
    "quick_gelu",
    "text_cfg",
    "vision_cfg",
}


def _refuse_unknown(owner: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise DeclipError(
            f"{owner} asks for {', '.join(map(repr, unknown))}, which these towers do not have "
            f"(they have {', '.join(sorted(known))}): choose a plain ViT or ResNet "
            "configuration."
        )


def _read_vision(given: Any) -> VisionConfig | ResNetConfig:
    """A list of layers means a ResNet, as in open_clip, whose files then say patch_size null."""
    if not isinstance(given, Mapping) or not isinstance(given.get("layers"), list | tuple):
        return _read_tower(VisionConfig, "vision_cfg", given)
    if given.get("patch_size") is not None:
        raise DeclipError(
            f"vision_cfg.patch_size is {given['patch_size']!r}, but layers {given['layers']!r} "
            "mean a ResNet, which has no patches: leave it out, or give one number of layers."
        )
    sizes = {name: value for name, value in given.items() if name != "patch_size"}
    return _read_tower(ResNetConfig, "vision_cfg", sizes)


_Tower = TypeVar("_Tower", VisionConfig, ResNetConfig, TextConfig)


def _read_tower(kind: type[_Tower], owner: str, given: Any) -> _Tower:
    if not isinstance(given, Mapping):
        raise DeclipError(f"{owner} is {given!r}, but it must be a table of sizes.")
    _refuse_unknown(owner, given, {field.name for field in fields(kind)})
    try:
        return kind(**given)
    except TypeError as error:
        raise DeclipError(
            f"{owner} is incomplete ({error}): give open_clip's own model JSON."
        ) from error


def _small(patch_size: int, width: int, layers: int, text_layers: int) -> ModelConfig:
    """A model for one laptop: 48-pixel images, heads of 32 channels in both towers."""
    return ModelConfig(
        embed_dim=width,
        vision=VisionConfig(
            image_size=48, patch_size=patch_size, width=width, layers=layers, head_width=32
        ),
        text=TextConfig(width=width, heads=width // 32, layers=text_layers),
    )


_NAMED: Mapping[str, ModelConfig] = MappingProxyType(
    {
        # The published tower pair: 151,277,313 parameters.
        "ViT-B-32": ModelConfig(
            embed_dim=512,
            vision=VisionConfig(image_size=224, patch_size=32, width=768, layers=12),
            text=TextConfig(),
        ),
        "ViT-B-16": ModelConfig(
            embed_dim=512,
            vision=VisionConfig(image_size=224, patch_size=16, width=768, layers=12),
            text=TextConfig(),
        ),
        "ViT-S-16": ModelConfig(
            embed_dim=384,
            vision=VisionConfig(image_size=224, patch_size=16, width=384, layers=12),
            text=TextConfig(width=384, heads=6),
        ),
        "ViT-L-14": ModelConfig(
            embed_dim=768,
            vision=VisionConfig(image_size=224, patch_size=14, width=1024, layers=24),
            text=TextConfig(width=768, heads=12),
        ),
        "RN50": ModelConfig(
            embed_dim=1024,
            vision=ResNetConfig(image_size=224, layers=(3, 4, 6, 3), width=64),
            text=TextConfig(),
        ),
        "RN101": ModelConfig(
            embed_dim=512,
            vision=ResNetConfig(image_size=224, layers=(3, 4, 23, 3), width=64),
            text=TextConfig(),
        ),
        "ViT-Mi-8-48": _small(patch_size=8, width=192, layers=6, text_layers=4),
        "ViT-Ti-6-48": _small(patch_size=6, width=128, layers=4, text_layers=4),
        "ViT-Ti-8-48": _small(patch_size=8, width=128, layers=4, text_layers=4),
        # As small as it can be and still have every part: for tests.
        "test": ModelConfig(
            embed_dim=16,
            vision=VisionConfig(image_size=16, patch_size=8, width=32, layers=2, head_width=16),
            text=TextConfig(width=32, heads=2, layers=2),
        ),
        "test-rn": ModelConfig(
            embed_dim=16,
            vision=ResNetConfig(image_size=64, layers=(1, 2, 1, 1), width=4, head_width=32),
            text=TextConfig(width=32, heads=2, layers=2),
        ),
    }
)
_WITH_EXACT_GELU = ("ViT-B-32", "ViT-B-16", "ViT-S-16", "ViT-L-14", "RN50", "RN101")

MODEL_CONFIGS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        **_NAMED,
        **{f"{name}-gelu": replace(_NAMED[name], quick_gelu=False) for name in _WITH_EXACT_GELU},
    }
)
"""Every model that has a name.

Where open_clip has the same name, it means the exact GELU: our ``-gelu`` variants. Those without it
equal its -quickgelu ones, as OpenAI's and DeCLIP's do. Another text depth (CLIP-Benchmark, arXiv
2203.05796) is `dataclasses.replace(config, text=dataclasses.replace(config.text, layers=3))`.
"""


def get_model_config(name: str) -> ModelConfig:
    """Return the configuration of a named model.

    Raises:
        DeclipError: no model has this name; the nearest name is offered.
    """
    if name in MODEL_CONFIGS:
        return MODEL_CONFIGS[name]
    raise DeclipError(f"No model is named {name!r}.{did_you_mean(name, MODEL_CONFIGS)}")
