"""Text towers and tokenizers of Hugging Face's transformers: BERT, RoBERTa, DistilBERT.

Behind the extra ``hf``: transformers is imported when a tower or a tokenizer is built, not before.
Parameters carry open_clip's names (``text.transformer...``, ``text.proj...``), so checkpoints can
be exchanged with its models of the same ``hf_model_name``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean
from declip_train.model_config import TextConfig
from declip_train.tokenizer import CONTEXT_LENGTH, MaskRules, repair_caption, require_text
from declip_train.towers import TextOutput, require_text_shapes

__all__ = ["HFCaptionTokenizer", "HFTextConfig", "HFTextTower", "text_sizes"]

POOLERS = ("cls_last_hidden_state_pooler", "mean_pooler")
PROJECTIONS = ("linear", "mlp")
# For each kind: whether it is built with an option for a pooling layer, and whether positions count
# from behind the padding id.
_KINDS: Mapping[str, tuple[bool, bool]] = MappingProxyType(
    {
        "bert": (True, False),
        "roberta": (True, True),
        "xlm-roberta": (True, True),
        "distilbert": (False, False),
    }
)
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


@dataclass(frozen=True, kw_only=True)
class HFTextConfig:
    """Which text tower, and what is put on it; names and meanings of values are open_clip's."""

    model: str
    """Folder of a model (config.json, model.safetensors), or its name on the hub."""
    tokenizer: str | None = None
    """Folder or name of the tokenizer; None: the model's."""
    pooler: Literal["cls_last_hidden_state_pooler", "mean_pooler"] = "mean_pooler"
    """What the feature is read from: the state of the first token, or the mean over all."""
    projection: Literal["linear", "mlp"] = "linear"
    """Without bias; mlp has a hidden layer of the mean of both widths, and GELU."""
    pretrained: bool = True
    """Whether to start from the model's weights; else they are drawn."""
    context_length: int = CONTEXT_LENGTH
    """Longest caption in tokens, with its first and last."""

    def __post_init__(self) -> None:
        if not self.model:
            raise DeclipError(
                "The text model's name is empty: give a folder, a name such as bert-base-uncased, "
                "or leave the text model out."
            )
        for name, known in (("pooler", POOLERS), ("projection", PROJECTIONS)):
            value = getattr(self, name)
            if value not in known:
                raise DeclipError(
                    f"The text model's {name} {value!r} is not known.{did_you_mean(value, known)}"
                )
        if self.context_length < 2:
            raise DeclipError(
                f"context_length is {self.context_length}, but a caption needs at least 2 tokens, "
                f"its first and its last: raise it (CLIP has {CONTEXT_LENGTH})."
            )

    @property
    def tokenizer_name(self) -> str:
        """Folder or name of the tokenizer."""
        return self.tokenizer or self.model

    def to_open_clip(self) -> dict[str, Any]:
        """open_clip's ``text_cfg``; the weights come with the model's, not from the hub."""
        return {
            "hf_model_name": self.model,
            "hf_tokenizer_name": self.tokenizer_name,
            "hf_proj_type": self.projection,
            "hf_pooler_type": self.pooler,
            "hf_model_pretrained": False,
            "context_length": self.context_length,
        }

    @classmethod
    def from_open_clip(cls, text_cfg: Mapping[str, Any]) -> HFTextConfig:
        """Read open_clip's ``text_cfg``; the inverse of `to_open_clip`, whatever its order.

        Raises:
            DeclipError: an entry is wrong, or asks for something that this tower does not have.
        """
        unknown = sorted(set(text_cfg) - _OPEN_CLIP_ENTRIES)
        if unknown:
            raise DeclipError(
                f"text_cfg asks for {', '.join(map(repr, unknown))}, which text towers of "
                f"transformers do not have here (they have {', '.join(sorted(_OPEN_CLIP_ENTRIES))}"
                "): choose another configuration."
            )
        return cls(
            model=text_cfg["hf_model_name"],
            tokenizer=text_cfg.get("hf_tokenizer_name"),
            pooler=text_cfg.get("hf_pooler_type", "mean_pooler"),
            projection=text_cfg.get("hf_proj_type", "mlp"),
            pretrained=False,
            context_length=text_cfg.get("context_length", CONTEXT_LENGTH),
        )


_OPEN_CLIP_ENTRIES = {
    "context_length",
    "hf_model_name",
    "hf_model_pretrained",
    "hf_pooler_type",
    "hf_proj_type",
    "hf_tokenizer_name",
}


def _transformers(what: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise DeclipError(
            f"The text model {what!r} needs transformers, which is not installed ({error}): "
            "install opendeclip[hf], or leave the text model out."
        ) from error


def _load(kind: str, name: str, **options: Any) -> Any:
    """What transformers' class ``kind`` makes of a folder or name."""
    loader = getattr(_transformers(name), kind)
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise DeclipError(
            f"The text model {name!r} cannot be loaded ({reason[0] if reason else error!r}): give "
            "the folder of a model and tokenizer of transformers, or a name that can be downloaded."
        ) from error


def _architecture(config: HFTextConfig) -> Any:
    """The model's own configuration, checked to be one that a caption can go through.

    Dropout is switched off. CLIP's towers have none, and a batch that is computed in parts runs
    through the tower twice, which must give the same features.
    """
    found = _load("AutoConfig", config.model)
    if found.model_type not in _KINDS:
        raise DeclipError(
            f"The text model {config.model!r} is of kind {found.model_type!r}; known are "
            f"{', '.join(sorted(_KINDS))}: choose a model of one of those."
        )
    offset = found.pad_token_id + 1 if _KINDS[found.model_type][1] else 0
    most = found.max_position_embeddings - offset
    if config.context_length > most:
        raise DeclipError(
            f"context_length is {config.context_length}, but the text model {config.model!r} has "
            f"positions for {most} tokens: lower it."
        )
    for name in _DROPOUTS:
        if hasattr(found, name):
            setattr(found, name, 0.0)
    return found


def text_sizes(config: HFTextConfig) -> TextConfig:
    """Sizes of a text model, from its configuration alone.

    Raises:
        DeclipError: transformers is missing, or the model cannot be loaded or is of another kind.
    """
    found = _architecture(config)
    return TextConfig(
        context_length=config.context_length,
        vocab_size=int(found.vocab_size),
        width=int(found.hidden_size),
        heads=int(found.num_attention_heads),
        layers=int(found.num_hidden_layers),
    )


class HFCaptionTokenizer:
    """Turns captions into token ids of a Hugging Face tokenizer, by `CaptionTokenizer`'s interface.

    Captions are repaired as open_clip does before: broken Unicode, HTML entities, white space.

    Args:
        config: of the text tower.

    Raises:
        DeclipError: transformers is missing, or the tokenizer cannot be loaded or has no padding
            or mask token.
    """

    def __init__(self, config: HFTextConfig) -> None:
        self.config = config
        self.context_length = config.context_length
        self._tokenizer = _load("AutoTokenizer", config.tokenizer_name)
        for name in ("pad", "mask"):
            if getattr(self._tokenizer, f"{name}_token_id") is None:
                raise DeclipError(
                    f"The tokenizer of {config.tokenizer_name!r} has no {name} token, which "
                    "training needs: choose another text model."
                )
        self._tokenizer.padding_side = self._tokenizer.truncation_side = "right"
        self.pad_id = int(self._tokenizer.pad_token_id)
        self.mask_id = int(self._tokenizer.mask_token_id)
        self.mask_rules = MaskRules(
            vocab_size=len(self._tokenizer),
            special_ids=frozenset(map(int, self._tokenizer.all_special_ids)),
            end_id=None,
            hidden_id=self.mask_id,
        )

    def __reduce__(self) -> tuple[type[HFCaptionTokenizer], tuple[HFTextConfig]]:
        return type(self), (self.config,)

    def __call__(self, captions: str | Sequence[str], trim: bool = False) -> NDArray[np.int64]:
        """Tokenize captions; one that is too long is cut between its first and last token.

        Args:
            captions: one caption or several.
            trim: cut the rows to the longest caption; False gives `context_length` columns.

        Returns:
            int64 ids (number of captions, columns): first, tokens, last, then the padding id.

        Raises:
            DeclipError: a caption is not text.
        """
        several = [captions] if isinstance(captions, str) else list(captions)
        for caption in several:
            require_text(caption)
        texts = [repair_caption(caption) for caption in several]
        rows: list[list[int]] = []
        if texts:
            rows = self._tokenizer(
                texts, truncation=True, max_length=self.context_length, padding=False
            )["input_ids"]
        columns = max(map(len, rows), default=2) if trim else self.context_length
        token_ids = np.full((len(rows), columns), self.pad_id, dtype=np.int64)
        for row, numbers in zip(token_ids, rows, strict=True):
            row[: len(numbers)] = numbers
        return token_ids

    def lengths(self, token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each row of (batch, length) ids, without padding: (batch,)."""
        lengths: NDArray[np.int64] = (token_ids != self.pad_id).sum(axis=1)
        return lengths

    def decode(self, token_ids: Sequence[int] | NDArray[np.int64]) -> str:
        """Text of token ids, without special tokens."""
        ids = [int(number) for number in token_ids]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class HFTextTower(nn.Module):
    """A bidirectional text tower of transformers under a projection, by `TextTransformer`'s
    interface; `transformer` and `proj` are open_clip's names.

    Args:
        config: which model.
        embed_dim: size of the features.
        mask_id: of the tokenizer's mask token; None reads the tokenizer for it.
        generator: source of what is drawn: the projection (standard deviation width^-0.5) and,
            without `pretrained`, the rest; None draws from torch's global generator.

    Raises:
        DeclipError: transformers is missing, or the model cannot be loaded or is of another kind.

    Sources: BERT (arXiv 1810.04805), DistilBERT (arXiv 1910.01108), RoBERTa (arXiv 1907.11692).
    """

    def __init__(
        self,
        config: HFTextConfig,
        embed_dim: int,
        *,
        mask_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        architecture = _architecture(config)
        self.kind = str(architecture.model_type)
        self.context_length = config.context_length
        self.vocab_size = int(architecture.vocab_size)
        self.width = int(architecture.hidden_size)
        self.layers = int(architecture.num_hidden_layers)
        self.pad_id = int(architecture.pad_token_id)
        self.mask_id = HFCaptionTokenizer(config).mask_id if mask_id is None else mask_id
        # Its layers are drawn from the global generator, which is put back afterwards.
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.transformer = _build_transformer(config, architecture)
            hidden = (self.width + embed_dim) // 2
            self.proj: nn.Module = nn.Linear(self.width, embed_dim, bias=False)
            if config.projection == "mlp":
                self.proj = nn.Sequential(
                    nn.Linear(self.width, hidden, bias=False),
                    nn.GELU(),
                    nn.Linear(hidden, embed_dim, bias=False),
                )
            for module in self.proj.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.in_features))

    def caption_mask(self, token_ids: Tensor) -> Tensor:
        """Which of (batch, length) token ids are caption, first and last token included."""
        return token_ids != self.pad_id

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
        """Run the text tower.

        Padding is hidden from attention and from the mean, so cutting the batch to its longest
        caption changes nothing but rounding.

        Args:
            token_ids: (batch, length) int64, length at most `context_length`.
            need_hidden: also return the last states of all positions.
            state_positions: (batch, length) bool; also return the last states at these positions.
            mask_positions: (batch, length) bool, where the tokenizer's mask token stands in.
            mask_embedding: must be None: the mask token has an embedding of its own.
            trim: cut the batch to its longest caption.

        Raises:
            ValueError: captions longer than `context_length`, a row of padding alone (only told
                where `trim` is on), or arguments that do not fit each other.
        """
        require_text_shapes(self.context_length, token_ids, state_positions, mask_positions)
        if mask_embedding is not None:
            raise ValueError(
                "This tower's tokenizer has a mask token with an embedding of its own: leave "
                "mask_embedding out."
            )
        if mask_positions is not None:
            token_ids = token_ids.masked_fill(mask_positions, self.mask_id)
        real = self.caption_mask(token_ids)
        if trim and len(token_ids):
            lengths = real.sum(dim=1)
            least, most = torch.stack([lengths.amin(), lengths.amax()]).tolist()
            if least == 0:
                raise ValueError(
                    "A caption is padding alone, so there is nothing to read its feature from: "
                    "leave such samples out, or tokenize them again."
                )
            token_ids, real = token_ids[:, :most], real[:, :most]
        output = self.transformer(input_ids=token_ids, attention_mask=real.long())
        hidden = cast(Tensor, output.last_hidden_state)
        if self.config.pooler == "mean_pooler":
            weights = real.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        else:
            pooled = hidden[:, 0]
        states: Tensor | None = None
        if state_positions is not None:
            states = hidden[state_positions[:, : hidden.shape[1]]]
        return TextOutput(
            features=self.proj(pooled), hidden=hidden if need_hidden else None, states=states
        )

    def encode_text(self, token_ids: Tensor, normalize: bool = False) -> Tensor:
        """Features (batch, embed_dim) of (batch, length) ids, of unit length if `normalize`."""
        features = self.forward_text(token_ids).features
        return F.normalize(features, dim=-1) if normalize else features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass: less memory, about a third more time."""
        if enable:
            # Reentrant checkpoints would lose gradients where the input needs none.
            self.transformer.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.transformer.gradient_checkpointing_disable()

    def to_open_clip(self) -> dict[str, Any]:
        """open_clip's ``text_cfg`` of this tower; its weights come from the export, not the hub.

        Raises:
            DeclipError: open_clip has no towers of this kind.
        """
        if self.kind == "distilbert":
            raise DeclipError(
                f"The text model {self.config.model!r} is a DistilBERT, which open_clip cannot "
                "build: export a model with a BERT or RoBERTa, or keep the checkpoint."
            )
        return self.config.to_open_clip()


def _build_transformer(config: HFTextConfig, architecture: Any) -> Any:
    """The model without a pooling layer, whose weights no loss of ours would train."""
    has_pooling, _ = _KINDS[architecture.model_type]
    options: dict[str, Any] = {"add_pooling_layer": False} if has_pooling else {}
    if config.pretrained:
        return _load("AutoModel", config.model, config=architecture, dtype=torch.float32, **options)
    build = _transformers(config.model).AutoModel.from_config
    return build(architecture, dtype=torch.float32, **options)
