"""Prompts of classes: which distinct ones there are, in which batches they are encoded, and how
their features become one weight vector a class.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from declip_eval.ranking import normalize_rows
from declip_eval.templates import check_templates, fill
from declip_shards import DeclipError

ClassNames = Sequence[Sequence[str]]
"""One entry a class, in label order: its name, or several names for the same thing."""


@dataclass(frozen=True, kw_only=True)
class PromptTable:
    """The prompts of all classes, each distinct one once."""

    texts: tuple[str, ...]
    """Distinct prompts, in the order in which they first occur."""
    rows: npt.NDArray[np.int64]
    """Numbers in ``texts`` of all prompts, class after class."""
    starts: npt.NDArray[np.int64]
    """(num_classes + 1,): where a class's prompts begin in ``rows``, and where the last ones end.
    """

    @classmethod
    def make(cls, class_names: ClassNames, templates: Sequence[str]) -> "PromptTable":
        """Fill every template with every name of every class.

        Args:
            class_names: a class with several names has the prompts of them all.
            templates: each with one {} for the name.

        Raises:
            DeclipError: there is no class, one without a name, or a template without {}.
        """
        try:
            checked = check_templates(templates)
        except ValueError as error:
            raise DeclipError(str(error)) from error
        _check_names(class_names)
        number_of: dict[str, int] = {}
        rows: list[int] = []
        starts = [0]
        for names in class_names:
            for name in names:
                for template in checked:
                    prompt = fill(template, name)
                    rows.append(number_of.setdefault(prompt, len(number_of)))
            starts.append(len(rows))
        return cls(texts=tuple(number_of), rows=np.array(rows), starts=np.array(starts))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.starts) - 1

    @cached_property
    def _counts(self) -> npt.NDArray[np.int64]:
        return np.diff(self.starts)

    def class_weights(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """One weight vector a class: the mean of its prompts' unit features, of unit length.

        Args:
            features: (number of texts, dim), of unit length.

        Returns:
            (dim, num_classes) float32. Source: Radford et al. 2021 (arXiv 2103.00020), 3.1.4.
        """
        means = np.empty((self.num_classes, features.shape[1]), np.float64)
        for number in range(self.num_classes):
            own = self.rows[self.starts[number] : self.starts[number + 1]]
            means[number] = features[own].mean(axis=0, dtype=np.float64)
        return np.ascontiguousarray(normalize_rows(means).T, dtype=np.float32)

    def class_means(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Mean of the scores of each class's prompts, for models that compare token by token.

        Args:
            scores: (n, number of texts).

        Returns:
            (n, num_classes) float32. Source: FILIP (arXiv 2111.07783), on prompt ensembles.
        """
        means = np.empty((len(scores), self.num_classes), np.float32)
        for number in range(self.num_classes):
            own = self.rows[self.starts[number] : self.starts[number + 1]]
            means[:, number] = scores[:, own].mean(axis=1, dtype=np.float64)
        return means


def _check_names(class_names: ClassNames) -> None:
    if isinstance(class_names, str) or not len(class_names):
        raise DeclipError("there are no class names; give at least one class.")
    for number, names in enumerate(class_names):
        if isinstance(names, str) or not names or not all(name.strip() for name in names):
            raise DeclipError(
                f"class {number} has the names {names!r}, but needs a tuple of at least one name "
                "that is not empty; correct the list of class names."
            )


def length_groups(lengths: npt.NDArray[np.int64], most: int) -> Iterator[npt.NDArray[np.int64]]:
    """Row numbers in groups of one length, the longest first, so that no row is padded.

    Args:
        lengths: (n,) tokens of each row.
        most: rows of a group.

    Yields:
        (1 to most,) int64; every row once.
    """
    if most < 1:
        raise ValueError(f"most is {most}, but a group has at least 1 row.")
    order = np.argsort(-lengths, kind="stable")
    edges = np.flatnonzero(np.diff(lengths[order])) + 1
    for same in np.split(order, edges):
        for start in range(0, len(same), most):
            yield same[start : start + most]


def encode_distinct(
    encode: Callable[[Sequence[str]], npt.NDArray[np.float32]], texts: Sequence[str]
) -> npt.NDArray[np.float32]:
    """Features (len(texts), dim) with each distinct text encoded once."""
    number_of = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    features = encode(list(number_of))
    return features[[number_of[text] for text in texts]]
