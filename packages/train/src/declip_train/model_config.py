"""The shapes of a model, in open_clip's own JSON form.

A model is named, and its name leads to one frozen `ModelConfig`. The same fields, under the same
names, are what open_clip reads from `open_clip_config.json`, so an export needs no translation
table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, TypeVar

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

__all__ = ["MODEL_CONFIGS", "ModelConfig", "TextConfig", "VisionConfig", "get_model_config"]


def _require_size(name: str, value: Any) -> None:
    """Refuse what is no whole number of at least 1; JSON may hold anything."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DeclipError(
            f"{name} is {value!r}, but it must be a whole number of at least 1: correct it in the "
            "model's configuration."
        )


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
    vision: VisionConfig
    """The image tower (`vision_cfg` in open_clip's JSON)."""
    text: TextConfig
    """The text tower (`text_cfg` in open_clip's JSON)."""
    quick_gelu: bool = True
    """x * sigmoid(1.702 x), as OpenAI's and DeCLIP's towers have it, instead of the exact GELU."""

    def __post_init__(self) -> None:
        _require_size("embed_dim", self.embed_dim)
        if not isinstance(self.quick_gelu, bool):
            raise DeclipError(f"quick_gelu is {self.quick_gelu!r}, but it must be true or false.")

    def to_open_clip(self) -> dict[str, Any]:
        """Return open_clip's `model_cfg`, as plain dictionaries and scalars."""
        return {
            "embed_dim": self.embed_dim,
            "quick_gelu": self.quick_gelu,
            "vision_cfg": asdict(self.vision),
            "text_cfg": asdict(self.text),
        }

    @classmethod
    def from_open_clip(cls, model_cfg: Mapping[str, Any]) -> ModelConfig:
        """Read open_clip's `model_cfg`; the inverse of `to_open_clip`.

        Absent entries take open_clip's defaults (`quick_gelu` false, heads of 64).

        Raises:
            DeclipError: an entry is missing, wrong, or asks for something that our towers do not
                have (they would otherwise compute other features than open_clip's without a word).
        """
        _refuse_unknown(
            "model_cfg", model_cfg, {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
        )
        for name in ("embed_dim", "vision_cfg", "text_cfg"):
            if name not in model_cfg:
                raise DeclipError(f"model_cfg has no {name!r}: give open_clip's own model JSON.")
        return cls(
            embed_dim=model_cfg["embed_dim"],
            quick_gelu=model_cfg.get("quick_gelu", False),
            vision=_read_tower(VisionConfig, "vision_cfg", model_cfg["vision_cfg"]),
            text=_read_tower(TextConfig, "text_cfg", model_cfg["text_cfg"]),
        )


def _refuse_unknown(owner: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise DeclipError(
            f"{owner} asks for {', '.join(map(repr, unknown))}, which these towers do not have "
            f"(they have {', '.join(sorted(known))}): choose a plain ViT configuration."
        )


_Tower = TypeVar("_Tower", VisionConfig, TextConfig)


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


MODEL_CONFIGS: Mapping[str, ModelConfig] = MappingProxyType(
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
        "ViT-Mi-8-48": _small(patch_size=8, width=192, layers=6, text_layers=4),
        "ViT-Ti-6-48": _small(patch_size=6, width=128, layers=4, text_layers=4),
        "ViT-Ti-8-48": _small(patch_size=8, width=128, layers=4, text_layers=4),
        # As small as it can be and still have every part: for tests.
        "test": ModelConfig(
            embed_dim=16,
            vision=VisionConfig(image_size=16, patch_size=8, width=32, layers=2, head_width=16),
            text=TextConfig(width=32, heads=2, layers=2),
        ),
    }
)
"""Every model that has a name.

open_clip's own ViT-B-32 and ViT-B-16 have the exact GELU; ours equal its -quickgelu variants.
"""


def get_model_config(name: str) -> ModelConfig:
    """Return the configuration of a named model.

    Raises:
        DeclipError: no model has this name; the nearest name is offered.
    """
    if name in MODEL_CONFIGS:
        return MODEL_CONFIGS[name]
    raise DeclipError(f"No model is named {name!r}.{did_you_mean(name, MODEL_CONFIGS)}")
