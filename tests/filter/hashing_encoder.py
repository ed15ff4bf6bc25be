"""An encoder without a model: feature hashing of words, mean colors of pictures."""

import hashlib
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from declip_filter.encoders import Features, TokenIds, Tokens


class HashingEncoder:
    """Words share directions, so captions with common words are near."""

    supports_text = True
    supports_image = True

    def __init__(self, dim: int, salt: str = "") -> None:
        self.name = f"hashing:{dim}{salt}"
        self.dim = dim
        self.digest = hashlib.sha256(self.name.encode()).hexdigest()
        self.salt = salt
        self.num_texts = 0

    def encode_text(self, texts: Sequence[str]) -> Features:
        self.num_texts += len(texts)
        rows = [sum(map(self._word, t.lower().split()), np.zeros(self.dim)) for t in texts]
        return self._unit(np.stack(rows))

    def encode_image(self, images: Sequence[bytes]) -> Features:
        side = max(1, int((self.dim / 3) ** 0.5))
        rows = []
        for data in images:
            small = Image.open(io.BytesIO(data)).convert("RGB").resize((side, side))
            flat = np.asarray(small, dtype=np.float64).ravel() + 1
            rows.append(np.pad(flat, (0, self.dim - len(flat))))
        return self._unit(np.stack(rows))

    def _word(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256((self.salt + word).encode()).digest()[:8], "big")
        return np.random.default_rng(seed).normal(size=self.dim)

    @staticmethod
    def _unit(rows: np.ndarray) -> Features:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return np.asarray(unit, dtype=np.float32)


class Prepared(HashingEncoder):
    """Pictures are made small before they are encoded, and words are its tokens, cut at four."""

    reads_tokens = True

    def prepare_image(self, image: bytes) -> np.ndarray:
        side = max(1, int((self.dim / 3) ** 0.5))
        small = Image.open(io.BytesIO(image)).convert("RGB").resize((side, side))
        return np.asarray(small)

    def encode_prepared(self, prepared: np.ndarray) -> Features:
        flat = prepared.reshape(len(prepared), -1).astype(np.float64) + 1
        return self._unit(np.pad(flat, ((0, 0), (0, self.dim - flat.shape[1]))))

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        words = [text.lower().split() for text in texts]
        number = [[int.from_bytes(w.encode()[:7], "big") for w in row[:4]] or [0] for row in words]
        return Tokens(ids=list(number), is_cut=[len(row) > 4 for row in words])

    def encode_tokens(self, ids: Sequence[TokenIds]) -> Features:
        self.num_texts += len(ids)
        return self._unit(np.stack([sum(self._word(str(i)) for i in row) for row in ids]))


class TextOnly(HashingEncoder):
    supports_image = False


class Broken(HashingEncoder):
    """Gives NaN for captions with the word purple, and zeros for those with the word orange."""

    def encode_text(self, texts: Sequence[str]) -> Features:
        features = super().encode_text(texts)
        features[["purple" in text for text in texts]] = np.nan
        features[["orange" in text for text in texts]] = 0
        return features


class AllBroken(HashingEncoder):
    """Gives NaN for every picture."""

    def encode_image(self, images: Sequence[bytes]) -> Features:
        return np.full((len(images), self.dim), np.nan, dtype=np.float32)


def make_encoder(model: str, *, root: str, device: str) -> HashingEncoder:
    assert root
    assert device == "cpu"
    return HashingEncoder(int(model))


def make_salted(model: str, *, root: str, device: str) -> HashingEncoder:
    return HashingEncoder(int(model), salt="other weights")


def make_text_only(model: str, *, root: str, device: str) -> HashingEncoder:
    return TextOnly(int(model))


def make_broken(model: str, *, root: str, device: str) -> HashingEncoder:
    return Broken(int(model))


def make_all_broken(model: str, *, root: str, device: str) -> HashingEncoder:
    return AllBroken(int(model))


def make_prepared(model: str, *, root: str, device: str) -> HashingEncoder:
    return Prepared(int(model))


NOT_A_FUNCTION = 3
