"""Trained towers in Hugging Face's CLIPModel layout, and back.

    FOLDER/config.json               sizes, and where the weights come from
    FOLDER/model.safetensors         the towers
    FOLDER/preprocessor_config.json  CLIPImageProcessor
    FOLDER/vocab.json, merges.txt, tokenizer.json, tokenizer_config.json, special_tokens_map.json

`CLIPModel.from_pretrained(FOLDER)` and `AutoProcessor.from_pretrained(FOLDER)` of transformers read
it; writing needs neither transformers nor a network. The same weights give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor

from declip_shards import DeclipError
from declip_shards.store import atomic_write
from declip_train.export import (
    PreprocessSettings,
    Scalar,
    plain_state,
    refuse_unhealthy,
    safe_bytes,
)
from declip_train.model_config import ModelConfig, TextConfig, VisionConfig
from declip_train.tokenizer import (
    EOT_ID,
    SOT_ID,
    VOCAB_SIZE,
    _byte_symbols,
    _read_merges,
    find_vocabulary,
)
from declip_train.towers import CLIP, TwoTowers

__all__ = [
    "HF_CONFIG",
    "HF_WEIGHTS",
    "export_hugging_face",
    "from_hugging_face",
    "read_hf_config",
    "to_hugging_face",
    "tokenizer_files",
]

HF_CONFIG = "config.json"
HF_WEIGHTS = "model.safetensors"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_SUFFIX = "</w>"
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers of filters."""
_ACTIVATIONS = {True: "quick_gelu", False: "gelu"}
# Of torch's LayerNorm, which our towers and open_clip's have.
_LAYER_NORM_EPS = 1e-5

# Whole parameters: ours, theirs, and whether the matrix is transposed.
_WHOLE = (
    ("logit_scale", "logit_scale", False),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight", False),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight", False),
    ("ln_final.weight", "text_model.final_layer_norm.weight", False),
    ("ln_final.bias", "text_model.final_layer_norm.bias", False),
    ("text_projection", "text_projection.weight", True),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding", False),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight", False),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight", False),
    # Their spelling.
    ("visual.ln_pre.weight", "vision_model.pre_layrnorm.weight", False),
    ("visual.ln_pre.bias", "vision_model.pre_layrnorm.bias", False),
    ("visual.ln_post.weight", "vision_model.post_layernorm.weight", False),
    ("visual.ln_post.bias", "vision_model.post_layernorm.bias", False),
    ("visual.proj", "visual_projection.weight", True),
)
_BLOCKS = (
    ("transformer.resblocks", "text_model.encoder.layers"),
    ("visual.transformer.resblocks", "vision_model.encoder.layers"),
)
_IN_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
_OWN_BLOCK = re.compile(r"(.*transformer\.resblocks)\.(\d+)\.(.+)\.?(weight|bias)$")
_THEIR_BLOCK = re.compile(r"(.*encoder\.layers)\.(\d+)\.(.+)\.(weight|bias)$")


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The towers' parameters under the names of CLIPModel; the inverse of `from_hugging_face`.

    Packed attention inputs are cut into queries, keys and values; projections are transposed.

    Args:
        state: of `CLIP`, without a bias of the logits.

    Raises:
        ValueError: a parameter that the layout has no place for.
    """
    whole = {own: (theirs, transposed) for own, theirs, transposed in _WHOLE}
    blocks, parts = dict(_BLOCKS), dict(_IN_BLOCK)
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in whole:
            theirs, transposed = whole[name]
            result[theirs] = value.T.contiguous() if transposed else value.contiguous()
            continue
        owner, number, part, kind = _split_own(name)
        base = f"{blocks[owner]}.{number}"
        if part == "attn.in_proj":
            for one, piece in zip(_QUERY_KEY_VALUE, value.chunk(3), strict=True):
                result[f"{base}.self_attn.{one}.{kind}"] = piece.clone()
        elif part in parts:
            result[f"{base}.{parts[part]}.{kind}"] = value.contiguous()
        else:
            raise ValueError(f"CLIPModel has no place for {name!r}")
    return result


def _split_own(name: str) -> tuple[str, str, str, str]:
    """Owner, number, part and kind of a block's parameter."""
    found = _OWN_BLOCK.fullmatch(name.replace("in_proj_", "in_proj."))
    if found is None or found[1] not in dict(_BLOCKS):
        raise ValueError(f"CLIPModel has no place for {name!r}")
    return found[1], found[2], found[3].rstrip("."), found[4]


def from_hugging_face(state: Mapping[str, Tensor], owner: str) -> dict[str, Tensor]:
    """CLIPModel's parameters under the towers' names; the inverse of `to_hugging_face`.

    Args:
        state: of CLIPModel; its numbered positions, which are no weights, are left out.
        owner: what it is read from, for errors.

    Raises:
        DeclipError: a parameter that CLIPModel does not have, or an attention without one of its
            three inputs.
    """
    whole = {theirs: (own, transposed) for own, theirs, transposed in _WHOLE}
    blocks = {theirs: own for own, theirs in _BLOCKS}
    parts = {theirs: own for own, theirs in _IN_BLOCK}
    result: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.endswith("position_ids"):
            continue
        if name in whole:
            own, transposed = whole[name]
            result[own] = value.T.contiguous() if transposed else value
            continue
        found = _THEIR_BLOCK.fullmatch(name)
        base = f"{blocks[found[1]]}.{found[2]}" if found and found[1] in blocks else None
        if found is None or base is None:
            raise DeclipError(f"{owner!r} has {name!r}, which is no parameter of CLIPModel.")
        part, kind = found[3], found[4]
        if part.removeprefix("self_attn.") in _QUERY_KEY_VALUE:
            one = part.removeprefix("self_attn.")
            packed.setdefault(f"{base}.attn.in_proj_{kind}", {})[one] = value
        elif part in parts:
            result[f"{base}.{parts[part]}.{kind}"] = value
        else:
            raise DeclipError(f"{owner!r} has {name!r}, which is no parameter of CLIPModel.")
    for name, pieces in packed.items():
        missing = [one for one in _QUERY_KEY_VALUE if one not in pieces]
        if missing:
            raise DeclipError(f"{owner!r} lacks {missing[0]} of {name!r}: the file is not whole.")
        result[name] = torch.cat([pieces[one] for one in _QUERY_KEY_VALUE])
    return result


def _config_of(config: ModelConfig, vision: VisionConfig) -> dict[str, Any]:
    """transformers' CLIPConfig."""
    shared = {
        "hidden_act": _ACTIVATIONS[config.quick_gelu],
        "layer_norm_eps": _LAYER_NORM_EPS,
        "projection_dim": config.embed_dim,
        "attention_dropout": 0.0,
    }
    text = config.text
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.init_logit_scale,
        "text_config": {
            **shared,
            "model_type": "clip_text_model",
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "bos_token_id": SOT_ID,
            "eos_token_id": EOT_ID,
            "pad_token_id": EOT_ID,
        },
        "vision_config": {
            **shared,
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": 4 * vision.width,
            "num_attention_heads": vision.heads,
            "num_hidden_layers": vision.layers,
            "num_channels": 3,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
    }


def read_hf_config(path: Path) -> ModelConfig:
    """Sizes out of transformers' CLIPConfig (``config.json``).

    Raises:
        DeclipError: it is missing, is of another kind of model, or asks for what our towers do not
            have.
    """
    try:
        given = json.loads(path.read_bytes())
        kind = given.get("model_type")
        text, vision = given.get("text_config", {}), given.get("vision_config", {})
    except (OSError, ValueError, AttributeError) as error:
        raise DeclipError(
            f"{str(path)!r} is no configuration of transformers ({error}); give the folder of a "
            "CLIPModel."
        ) from error
    if kind != "clip":
        raise DeclipError(
            f"{str(path)!r} is of a model of kind {kind!r}, but only 'clip' (CLIPModel) has our "
            "towers; give the folder of one."
        )
    for owner, part in (("text_config", text), ("vision_config", vision)):
        _require_plain(path, owner, part)
    act = {name: flag for flag, name in _ACTIVATIONS.items()}
    width, heads = vision.get("hidden_size", 768), vision.get("num_attention_heads", 12)
    return ModelConfig(
        embed_dim=given.get("projection_dim", 512),
        quick_gelu=act[vision.get("hidden_act", "quick_gelu")],
        vision=VisionConfig(
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 32),
            width=width,
            layers=vision.get("num_hidden_layers", 12),
            head_width=width // heads,
        ),
        text=TextConfig(
            context_length=text.get("max_position_embeddings", 77),
            vocab_size=text.get("vocab_size", VOCAB_SIZE),
            width=text.get("hidden_size", 512),
            heads=text.get("num_attention_heads", 8),
            layers=text.get("num_hidden_layers", 12),
        ),
    )


def _require_plain(path: Path, owner: str, part: Mapping[str, Any]) -> None:
    """Refuse arithmetic that our towers do not have."""
    act, eps = part.get("hidden_act", "quick_gelu"), part.get("layer_norm_eps", _LAYER_NORM_EPS)
    if act not in _ACTIVATIONS.values() or eps != _LAYER_NORM_EPS:
        raise DeclipError(
            f"{str(path)!r} has {owner} with hidden_act {act!r} and layer_norm_eps {eps}, but our "
            f"towers have quick_gelu or gelu and {_LAYER_NORM_EPS}; give another model."
        )


def _refuse_other_towers(model: TwoTowers, provenance: Mapping[str, Scalar]) -> VisionConfig:
    """The image tower's sizes, where CLIPModel can hold the model.

    Raises:
        DeclipError: it cannot.
    """
    vision, remedy = model.config.vision, "choose --format open_clip or safetensors"
    if not isinstance(model, CLIP):
        raise DeclipError(
            "the text tower is a model of transformers, which the layout of CLIPModel has no place "
            f"for; {remedy}."
        )
    if not isinstance(vision, VisionConfig):
        raise DeclipError(
            "the image tower is a ResNet, which the layout of CLIPModel has no place for; "
            f"{remedy}."
        )
    if model.logit_bias is not None:
        raise DeclipError(
            "the model was trained with the sigmoid loss and has a logit_bias, which the layout of "
            f"CLIPModel has no place for; {remedy}."
        )
    if provenance.get("method") == "filip":
        raise DeclipError(
            "method filip trains single tokens' features, which the layout of CLIPModel has no "
            f"place for (its global features are as they were drawn); {remedy}."
        )
    if model.config.text.vocab_size != VOCAB_SIZE:
        raise DeclipError(
            f"the text tower has {model.config.text.vocab_size} tokens, but the tokenizer's files "
            f"are of {VOCAB_SIZE}; {remedy}."
        )
    return vision


def export_hugging_face(
    model: TwoTowers,
    folder: Path | str,
    preprocess: PreprocessSettings,
    provenance: Mapping[str, Scalar],
) -> tuple[Path, ...]:
    """Write towers as transformers' CLIPModel reads them, with tokenizer and image processor.

    Heads that a method trains beside the towers have no place there and are left out.

    Args:
        model: the towers; ViT and the standard text tower.
        folder: created if absent; the configuration is written last.
        preprocess: how images are to be prepared.
        provenance: where the weights come from: entry ``opendeclip`` of ``config.json``.

    Returns:
        The files' paths.

    Raises:
        DeclipError: the layout has no place for the model (ResNet, text model of transformers,
            FILIP, sigmoid loss), or weights are not finite. Nothing is written.
    """
    vision = _refuse_other_towers(model, provenance)
    if preprocess.resize_mode != "shortest":
        raise DeclipError(
            f"preprocess resize_mode is {preprocess.resize_mode!r}, but CLIPImageProcessor crops "
            "the center after the shortest side was resized; choose --format open_clip."
        )
    state = plain_state(model)
    refuse_unhealthy({"state_dict": state})
    config = _config_of(model.config, vision)
    config["opendeclip"] = dict(sorted(provenance.items()))
    files: dict[str, bytes] = {
        HF_WEIGHTS: safe_bytes(to_hugging_face(state)),
        "preprocessor_config.json": _json(_image_processor(preprocess, vision.image_size)),
        **tokenizer_files(model.config.text.context_length),
        HF_CONFIG: _json(config),
    }
    target = Path(folder)
    for name, content in files.items():
        atomic_write(target / name, content)
    return tuple(target / name for name in files)


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _image_processor(preprocess: PreprocessSettings, size: int) -> dict[str, Any]:
    """transformers' CLIPImageProcessor."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _RESAMPLE[preprocess.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def tokenizer_files(context_length: int) -> dict[str, bytes]:
    """Files of transformers' CLIPTokenizer with the standard vocabulary, by name.

    Its ids are those of `CaptionTokenizer` for plain text; it does not repair broken Unicode or
    undo HTML entities, and it pads with the end token, which the tower does not look at.

    Args:
        context_length: where the tokenizer cuts captions, in tokens.

    Raises:
        DeclipError: the vocabulary is not there (see `find_vocabulary`).
    """
    merges = _read_merges(find_vocabulary())
    letters = list(_byte_symbols().values())
    tokens = [*letters, *(letter + _SUFFIX for letter in letters), *map("".join, merges)]
    vocabulary = {token: number for number, token in enumerate([*tokens, _START, _END])}
    special = {
        "bos_token": _START,
        "eos_token": _END,
        "pad_token": _END,
        "unk_token": _END,
    }
    settings = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "do_lower_case": True,
        "errors": "replace",
    }
    return {
        # In the order of their numbers, as everybody writes it.
        "vocab.json": (json.dumps(vocabulary, ensure_ascii=False) + "\n").encode(),
        "merges.txt": "".join(["#version: 0.2\n", *(f"{a} {b}\n" for a, b in merges)]).encode(),
        "tokenizer.json": _fast_tokenizer(vocabulary, merges).to_str(pretty=False).encode(),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(special),
    }


def _fast_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """The standard vocabulary as a pipeline of the tokenizers library."""
    model = BPE(
        vocab=vocabulary,
        merges=merges,
        end_of_word_suffix=_SUFFIX,
        continuing_subword_prefix="",
        unk_token=_END,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (_END, EOT_ID), (_START, SOT_ID), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens([_START, _END])
    return tokenizer
