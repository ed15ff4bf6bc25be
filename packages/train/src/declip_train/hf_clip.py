"""Two towers whose text tower is a model of transformers, and which towers a run has.

Parameters carry the names of open_clip's `CustomTextCLIP` (``visual...``, ``text...``).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from declip_train.hf_text import HFCaptionTokenizer, HFTextConfig, HFTextTower, text_sizes
from declip_train.model_config import ModelConfig
from declip_train.settings import TrainSettings
from declip_train.tokenizer import CaptionTokenizer, Tokenizer
from declip_train.towers import CLIP, TextOutput, TwoTowers

__all__ = [
    "HFTextCLIP",
    "build_tokenizer",
    "build_towers",
    "read_open_clip_config",
    "text_model_digest",
    "text_model_files",
]

HERE = "."
"""Name of a text model that lies beside the weights in an export."""
_MODEL_FILE = "config.json"
# Whatever the tokenizers of the known kinds are read from; which of them a model has differs.
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# Where a model was saved to by those who made it.
_PLACES = ("_name_or_path", "name_or_path")


class HFTextCLIP(TwoTowers):
    """An image tower and a text tower of transformers; see `CLIP` for the rest.

    The image tower has the weights that `CLIP` draws from the same generator.

    Args:
        config: embedding size and image tower; its text tower's sizes are replaced.
        text: which text tower.
        generator: source of the weights; None draws from torch's global generator.

    Raises:
        DeclipError: transformers is missing, or the text model cannot be loaded.
    """

    def __init__(
        self, config: ModelConfig, text: HFTextConfig, generator: torch.Generator | None = None
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            super().__init__()
            self._add_image_side(replace(config, text=text_sizes(text)))
        self.visual.initialize(generator)
        self.text = HFTextTower(text, config.embed_dim, generator=generator)

    def forward_text(
        self,
        token_ids: Tensor,
        *,
        need_hidden: bool = False,
        state_positions: Tensor | None = None,
        mask_positions: Tensor | None = None,
        mask_embedding: Tensor | None = None,
        trim: bool = True,
    ) -> TextOutput:
        """Run the text tower; see `HFTextTower.forward_text`."""
        return self.text.forward_text(
            token_ids,
            need_hidden=need_hidden,
            state_positions=state_positions,
            mask_positions=mask_positions,
            mask_embedding=mask_embedding,
            trim=trim,
        )

    def caption_mask(self, token_ids: Tensor) -> Tensor:
        """Which of (batch, length) token ids are no padding; masked ones are none."""
        return self.text.caption_mask(token_ids)

    def make_tokenizer(self) -> HFCaptionTokenizer:
        """The text model's."""
        return HFCaptionTokenizer(self.text.config)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass: less memory, about a third more time."""
        super().set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)

    @property
    def open_clip_reads_it(self) -> bool:
        """Whether open_clip can build this text tower; it knows no DistilBERT."""
        return self.text.kind != "distilbert"

    def to_open_clip(self) -> dict[str, Any]:
        """open_clip's `model_cfg`, with no path of this machine in it.

        A text model that was given as a folder is named ".": an export holds its files, and
        transformers finds them where the export's folder is the working folder.
        """
        text_cfg = self.text.config.to_open_clip()
        for name in ("hf_model_name", "hf_tokenizer_name"):
            if Path(text_cfg[name]).is_dir():
                text_cfg[name] = HERE
        return {**self.config.to_open_clip(), "text_cfg": text_cfg}


def read_open_clip_config(
    model_cfg: dict[str, Any], folder: Path
) -> tuple[ModelConfig, HFTextConfig | None]:
    """Read open_clip's `model_cfg`, with or without a text tower of transformers.

    Args:
        model_cfg: see there.
        folder: which the configuration is from. Where it holds the text model's configuration, that
            is read, and nothing is asked of the network.

    Raises:
        DeclipError: see `ModelConfig.from_open_clip`, `HFTextConfig.from_open_clip`, `text_sizes`.
    """
    text_cfg = model_cfg.get("text_cfg")
    if not isinstance(text_cfg, dict) or "hf_model_name" not in text_cfg:
        return ModelConfig.from_open_clip(model_cfg), None
    text = HFTextConfig.from_open_clip(text_cfg)
    if text.model == HERE or (folder / _MODEL_FILE).is_file():
        text = replace(text, model=str(folder), tokenizer=None)
    sizes = asdict(text_sizes(text))
    return ModelConfig.from_open_clip({**model_cfg, "text_cfg": sizes}), text


def _text_config(settings: TrainSettings) -> HFTextConfig | None:
    name = settings.text_model
    return None if name is None else HFTextConfig(model=name)


def build_towers(settings: TrainSettings, generator: torch.Generator | None) -> TwoTowers:
    """The towers of a run, drawn from ``generator``; a text model keeps its own weights.

    Raises:
        DeclipError: transformers is missing, or the text model cannot be loaded.
    """
    text = _text_config(settings)
    if text is None:
        return CLIP(settings.model_config, generator=generator)
    return HFTextCLIP(settings.model_config, text, generator)


def build_tokenizer(settings: TrainSettings) -> Tokenizer:
    """The tokenizer of a run's text tower.

    Raises:
        DeclipError: see `CaptionTokenizer` and `HFCaptionTokenizer`.
    """
    text = _text_config(settings)
    if text is None:
        return CaptionTokenizer(settings.model_config.text.context_length)
    return HFCaptionTokenizer(text)


def _find(name: str, file: str) -> Path | None:
    """A file of a folder, or of a hub's model that was downloaded before."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def _without_places(content: bytes) -> bytes:
    values = json.loads(content)
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if name not in _PLACES}
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def text_model_files(config: HFTextConfig) -> dict[str, bytes]:
    """Files that tower and tokenizer can be built from, without weights, by name.

    Notes of where the model was once saved to are left out.
    """
    files: dict[str, bytes] = {}
    wanted = [(config.model, _MODEL_FILE), *((config.tokenizer_name, n) for n in _TOKENIZER_FILES)]
    for owner, name in wanted:
        path = _find(owner, name)
        if path is not None:
            content = path.read_bytes()
            small = name in (_MODEL_FILE, "tokenizer_config.json")
            files[name] = _without_places(content) if small else content
    return files


def text_model_digest(settings: TrainSettings) -> str:
    """sha256 of the run's text model: configuration, tokenizer and weights; empty without one."""
    text = _text_config(settings)
    if text is None:
        return ""
    digest = hashlib.sha256()
    for name, content in sorted(text_model_files(text).items()):
        digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    # transformers reads the first of them that is there.
    found = [path for file in _WEIGHT_FILES if (path := _find(text.model, file)) is not None]
    for path in found[:1]:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
