"""Which pictures of an evaluation the training data holds, by the rungs of the duplicates' ladder.

Only samples that were trained on are compared: those of the selection and of the splits. What
could not be compared is told, with why; nothing is called clean for lack of a look.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from declip_filter.contamination import match_digests, match_looks
from declip_filter.duplicate_rungs import Likeness
from declip_filter.duplicates import DISTANCES, FindDuplicates
from declip_filter.embeddings import Part, read_metadata, read_parts
from declip_filter.limits import require_between
from declip_filter.vectors import StoredVectors
from declip_shards import DeclipError
from pipelines.picture_marks import Marks, picture_marks, training_encoder
from pipelines.trained_rows import TrainedRows, trained_rows

__all__ = [
    "RUNGS",
    "Marks",
    "Overlap",
    "find_overlap",
    "picture_marks",
    "trained_rows",
    "training_encoder",
]

RUNGS = ("exact", "perceptual", "embedding")
"""From the surest to the least sure."""
COSINE = 0.95
"""Least cosine of two pictures' vectors that count as one, as of the duplicates' ladder."""
MARGIN = 2e-3
"""Products from this much below the limit are computed again, in float64 and with the lengths of
the vectors, which in float16 are 1 to three digits only."""
TRAINED_AT_ONCE, ASKED_AT_ONCE = 16_384, 2048
"""Rows of a block of products: 128 MB of float32."""
UNRELATED_SAMPLED, LEAST_SAMPLED = 512, 64
"""Training pictures whose vectors are compared with each other, and how many that takes."""
MOST_UNRELATED = 1e-3
"""Share of pairs of training pictures above the limit from which an encoder is no witness: one
that is hardly trained gives near vectors to all pictures, and so does any network to flat ones."""
NUM_PAIRS = 20
"""Pairs that a record shows."""

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Overlap:
    """What of an evaluation's pictures was found in the training data."""

    mask: Mask
    """(n,) by any rung."""
    by_rung: Mapping[str, Mask]
    """Rung -> (n,); the rungs that were checked."""
    first: Mapping[str, Rows]
    """Rung -> (n,) the first row of the training data that is the picture's copy, or -1."""
    checked: Mapping[str, Mapping[str, Any]]
    """Rung -> what it went by, as JSON values."""
    unchecked: Mapping[str, str]
    """Rung -> why it could not be checked."""
    training: TrainedRows

    def pairs(self, keys: Sequence[str] | None = None) -> list[tuple[str, str, str]]:
        """(key of the picture, key of the training sample, rung) by the surest rung of each.

        Args:
            keys: of the pictures; None names them by row.
        """
        found = []
        for row in np.flatnonzero(self.mask).tolist():
            rung = next(name for name in RUNGS if name in self.by_rung and self.by_rung[name][row])
            key = str(row) if keys is None else keys[row]
            found.append((key, self.training.key(int(self.first[rung][row])), rung))
        return found

    def record(self, keys: Sequence[str] | None = None) -> dict[str, Any]:
        """What a result keeps, as JSON values; the metrics without the overlap are the caller's.

        Args:
            keys: of the pictures; None names them by row.
        """
        pairs = self.pairs(keys)[:NUM_PAIRS]
        return {
            "num_overlap": int(self.mask.sum()),
            "by_rung": {rung: int(found.sum()) for rung, found in self.by_rung.items()},
            "checked": {rung: dict(facts) for rung, facts in self.checked.items()},
            "unchecked": dict(self.unchecked),
            "train": {
                "digest": self.training.digest,
                "num_samples": len(self.training),
                "selection": self.training.selection,
                "splits": list(self.training.splits),
            },
            "first_pairs": [
                {"key": key, "train_key": other, "rung": rung} for key, other, rung in pairs
            ],
        }


def find_overlap(
    marks: Marks,
    features: npt.NDArray[np.float32] | None = None,
    *,
    train_root: str,
    selection: str | None = None,
    embeddings: str | None = None,
    cosine: float = COSINE,
    features_digest: str = "",
    training: TrainedRows | None = None,
    device: str = "cpu",
) -> Overlap:
    """Look for pictures in what a model was trained on.

    Args:
        marks: of n pictures.
        features: (n, dim) unit vectors in place of the marks' own; zeros where there is none.
        train_root: the training dataset's folder, any fsspec URL.
        selection: see `pipelines.trained_rows.trained_rows`.
        embeddings: name of the training data's embeddings of pictures; None leaves the last rung
            unchecked.
        cosine: least cosine of two pictures that count as one, 0 to 1.
        features_digest: of the encoder that made ``features``; they must be of the one that made
            the embeddings.
        training: `trained_rows` of the same, where several sets are looked for.
        device: where vectors are compared.

    Raises:
        DeclipError: no training data, a setting out of its range, features of another number than
            the marks, or a damaged file.
    """
    require_between("cosine", cosine, 0, 1)
    if features is not None and len(features) != len(marks):
        raise DeclipError(
            f"there are {len(features)} vectors for the marks of {len(marks)} pictures; take both "
            "of the same pictures."
        )
    rows = trained_rows(train_root, selection) if training is None else training
    search = _Search(marks, rows)
    search.exact()
    search.perceptual()
    own = bool(marks.vectors.shape[1]) and features is None
    vectors = marks.vectors if features is None else features
    search.embedding(vectors, embeddings, cosine, None if own else features_digest, device)
    masks = {rung: first >= 0 for rung, first in search.first.items()}
    mask = np.zeros(len(marks), dtype=np.bool_)
    for found in masks.values():
        mask |= found
    return Overlap(mask, masks, search.first, search.checked, search.unchecked, rows)


class _Search:
    """Runs the rungs one by one; what one has read is let go before the next."""

    def __init__(self, marks: Marks, training: TrainedRows) -> None:
        self.marks = marks
        self.training = training
        self.first: dict[str, Rows] = {}
        self.checked: dict[str, dict[str, Any]] = {}
        self.unchecked: dict[str, str] = {}

    def exact(self) -> None:
        """Equal files: as they came, and as they are stored."""
        asked = self.marks.as_eval_set("evaluation", is_dhash=False)
        columns = {
            "downloaded files": self.training.downloaded_digests,
            "stored files": self.training.stored_digests(),
        }
        columns = {name: column for name, column in columns.items() if column[1].any()}
        if not columns:
            self.unchecked["exact"] = (
                "the training data has no digests of its files: neither a column sha256 in its "
                "shards nor signals with image_sha256. Run the stage that measures."
            )
            return
        first = self._first()
        known = np.zeros(len(self.training), dtype=np.bool_)
        for digests, is_known in columns.values():
            known |= is_known
            for found, owner, _ in match_digests(
                digests, is_known, asked.image_digests, asked.image_owner
            ):
                _keep_least(first, owner, found)
        self._close("exact", first, {"by": list(columns), "without_digest": int((~known).sum())})

    def perceptual(self) -> None:
        """Pictures that look the same: recompressed, resized, cropped a little."""
        name = self.training.picture_hash
        if name is None:
            self.unchecked["perceptual"] = (
                "the training data has no signals with hashes of its pictures for all shards; run "
                "the stage that measures."
            )
            return
        asked = self.marks.as_eval_set("evaluation", is_dhash=name == "image_dhash")
        looks, known = self.training.looks()
        ladder = FindDuplicates()
        likeness = Likeness(
            max_distance=DISTANCES[name],
            min_bits=ladder.min_hash_bits,
            max_brightness_difference=ladder.max_brightness_difference,
            max_aspect_change=ladder.max_aspect_change,
        )
        first = self._first()
        for found, owner, _ in match_looks(looks, known, asked, likeness):
            _keep_least(first, owner, found)
        too_little = ~likeness.says_enough(asked.looks.hashes)
        flat = np.ones(len(self.marks), dtype=np.bool_)
        flat[asked.look_owner[~too_little]] = False
        facts = {
            "picture_hash": name,
            "max_hash_distance": likeness.max_distance,
            "without_hash": int((~known).sum()),
            "says_too_little": int((flat & (self.marks.aspects[:, 0] > 0)).sum()),
        }
        self._close("perceptual", first, facts)

    def embedding(
        self,
        vectors: npt.NDArray[np.float32],
        embeddings: str | None,
        cosine: float,
        digest: str | None,
        device: str,
    ) -> None:
        """Pictures whose vectors are near, all with all.

        Args:
            vectors: (n, dim).
            embeddings: name of the training data's.
            cosine: the limit.
            digest: of the encoder of ``vectors``; None where they are by the embeddings' own.
            device: where vectors are compared.
        """
        if embeddings is None:
            self.unchecked["embedding"] = "no embeddings of the training data were named."
            return
        training = self.training
        parts = read_parts(training.store, embeddings, training.shards)
        part = parts[0]
        stored = StoredVectors(training.store, embeddings, "img_emb", parts)
        share: float | None = None
        why = _why_unlike(part, vectors, digest)
        if not why:
            share = _share_near(stored, cosine)
            if share is not None and share > MOST_UNRELATED:
                why = (
                    f"at a cosine of {cosine:g} they take {share:.1%} of the pairs of training "
                    "pictures for one picture, so their encoder does not tell pictures apart. Name "
                    "embeddings by another encoder."
                )
        if why:
            self.unchecked["embedding"] = f"embeddings {embeddings!r} by {part.encoder!r}: {why}"
            return
        first, num_known = self._scan(stored, vectors, cosine, device)
        facts = {
            "embeddings": embeddings,
            "encoder": part.encoder,
            "encoder_digest": part.encoder_digest,
            "cosine": cosine,
            "share_of_training_pairs": share,
            "without_vector": len(training) - num_known,
        }
        self._close("embedding", first, facts)

    def _scan(
        self, stored: StoredVectors, vectors: npt.NDArray[np.float32], cosine: float, device: str
    ) -> tuple[Rows, int]:
        """The first near row of each picture, and how many rows have a vector."""
        first, num_known = self._first(), 0
        for number, part in enumerate(stored.parts):
            stored.check_part(number)
            keys = [str(row["key"]) for row in read_metadata(stored.store, stored.name, part)]
            rows = self.training.rows_of(number, pa.array(keys, pa.string()))
            wanted = np.flatnonzero(rows >= 0)
            num_known += len(wanted)
            at = int(stored.starts[number])
            for start in range(0, len(wanted), TRAINED_AT_ONCE):
                some = wanted[start : start + TRAINED_AT_ONCE]
                for asked, found in _near(vectors, stored.take(at + some), cosine, device):
                    _keep_least(first, asked, rows[some[found]])
        return first, num_known

    def _first(self) -> Rows:
        return np.full(len(self.marks), len(self.training), dtype=np.int64)

    def _close(self, rung: str, first: Rows, facts: dict[str, Any]) -> None:
        self.first[rung] = np.where(first == len(self.training), -1, first)
        self.checked[rung] = facts


def _keep_least(first: Rows, owner: Rows, found: Rows) -> None:
    """The least row of the training data for each picture, whatever the order of pairs."""
    np.minimum.at(first, owner, found)


def _why_unlike(part: Part, vectors: npt.NDArray[np.float32], digest: str | None) -> str:
    """Why vectors do not compare with stored ones; empty where they do."""
    if "img_emb" not in part.kinds:
        return f"they are {', '.join(part.kinds)}, and none is of pictures."
    if not vectors.shape[1]:
        return "no vectors of the evaluated pictures were taken."
    if vectors.shape[1] != part.dim or digest not in (None, part.encoder_digest):
        return "the evaluated pictures' vectors are by another encoder."
    return ""


def _share_near(stored: StoredVectors, cosine: float) -> float | None:
    """Share of pairs of training pictures that count as one, on a sample; None of too few.

    The sample is evenly spaced, so that it is the same each time.
    """
    rows = np.unique(np.linspace(0, stored.num_rows - 1, UNRELATED_SAMPLED).astype(np.int64))
    if stored.num_rows < LEAST_SAMPLED:
        return None
    vectors = stored.take(rows).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    upper = np.triu_indices(len(rows), 1)
    return float((vectors @ vectors.T >= cosine)[upper].mean())


def _near(
    asked: npt.NDArray[np.float32], trained: npt.NDArray[np.float16], cosine: float, device: str
) -> Iterator[tuple[Rows, Rows]]:
    """Pairs (row of ``asked``, row of ``trained``) whose cosine is at least the limit."""
    base = trained.astype(np.float32)
    for start in range(0, len(asked), ASKED_AT_ONCE):
        some = asked[start : start + ASKED_AT_ONCE]
        one, other = np.nonzero(_products(some, base, device) >= cosine - MARGIN)
        a, b = some[one].astype(np.float64), base[other].astype(np.float64)
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        # A vector's cosine with itself comes out this near 1.
        near = (a * b).sum(axis=1) >= (cosine - 1e-9) * lengths
        near &= lengths > 0
        yield one[near] + start, other[near]


def _products(
    left: npt.NDArray[np.float32], right: npt.NDArray[np.float32], device: str
) -> npt.NDArray[np.float32]:
    if device == "cpu":
        return left @ right.T
    import torch

    there = [torch.from_numpy(rows).to(device) for rows in (left, right)]
    return np.asarray((there[0] @ there[1].T).cpu().numpy(), dtype=np.float32)
