"""The five methods: lists of loss terms with weights, and what each asks of the loader.

A method is its list and nothing else; everything that differs between two methods stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

__all__ = ["METHODS", "TERMS", "WEIGHTINGS", "Method", "get_method", "method_terms"]

TERMS = (
    "contrastive",
    "multi_view",
    "simsiam",
    "simclr",
    "masked_language_modeling",
    "neighbor",
    "tokenwise",
)
"""Names of the terms, as logs and configurations have them."""
WEIGHTINGS = ("released", "paper")
"""Readings of DeCLIP's weights."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method trains on, beside the weights of its terms."""

    name: str
    """As configurations have it."""
    terms: Mapping[str, tuple[tuple[str, float], ...]]
    """For each weighting, pairs of a name in `TERMS` and its weight."""
    num_views: int
    """Random views of an image that the towers see."""
    augmentation: str
    """The published set of view parameters (settings.AUGMENTATIONS) of the views that the
    contrastive terms read."""
    source: str
    """Paper."""

    @property
    def term_names(self) -> frozenset[str]:
        """Terms that the method has under any weighting."""
        return frozenset(name for terms in self.terms.values() for name, _ in terms)

    def has(self, term: str) -> bool:
        """Whether the term is one of the method's."""
        return term in self.term_names


_DECLIP_RELEASED: tuple[tuple[str, float], ...] = (
    # 0.4 on the mean of the four pairs, of which the plain one is one and `multi_view` the mean of
    # three.
    ("contrastive", 0.1),
    ("multi_view", 0.3),
    ("simsiam", 0.2),
    ("masked_language_modeling", 0.2),
    ("neighbor", 0.2),
)
_DECLIP_PAPER: tuple[tuple[str, float], ...] = (
    ("contrastive", 0.4),
    ("multi_view", 0.2),
    ("simsiam", 0.2),
    ("masked_language_modeling", 0.2),
    ("neighbor", 0.2),
)


def _same(*terms: tuple[str, float]) -> dict[str, tuple[tuple[str, float], ...]]:
    """Weights that both readings share."""
    return dict.fromkeys(WEIGHTINGS, terms)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "clip": Method(
            name="clip",
            terms=_same(("contrastive", 1.0)),
            num_views=1,
            augmentation="light",
            source="CLIP (arXiv 2103.00020)",
        ),
        "slip": Method(
            name="slip",
            terms=_same(("contrastive", 1.0), ("simclr", 1.0)),
            # One for CLIP, two for SimCLR.
            num_views=3,
            augmentation="light",
            source="SLIP (arXiv 2112.12750)",
        ),
        "filip": Method(
            name="filip",
            # Token-wise alignment alone: the global pair plays no part (CLIP-Benchmark, arXiv
            # 2203.05796, figure 1).
            terms=_same(("tokenwise", 1.0)),
            num_views=1,
            augmentation="moco_v2",
            source="FILIP (arXiv 2111.07783)",
        ),
        "declip": Method(
            name="declip",
            terms={"released": _DECLIP_RELEASED, "paper": _DECLIP_PAPER},
            num_views=2,
            augmentation="moco_v2",
            source="DeCLIP (arXiv 2110.05208)",
        ),
        "defilip": Method(
            name="defilip",
            terms={
                "released": (*_DECLIP_RELEASED, ("tokenwise", 0.2)),
                "paper": (*_DECLIP_PAPER, ("tokenwise", 0.2)),
            },
            num_views=2,
            augmentation="moco_v2",
            source="CLIP-Benchmark (arXiv 2203.05796)",
        ),
    }
)
"""Every method by its name."""


def get_method(name: str) -> Method:
    """The method of a name.

    Raises:
        DeclipError: no such method; the nearest name is offered.
    """
    if name not in METHODS:
        raise DeclipError(f"method {name!r} is not known.{did_you_mean(name, METHODS)}")
    return METHODS[name]


def method_terms(method: str, weighting: str = "released") -> tuple[tuple[str, float], ...]:
    """The terms of a method with their weights.

    Args:
        method: a name in `METHODS`.
        weighting: "released" puts 0.4 on the mean of the four view pairs and 0.2 on each other
            term, as the configurations released with DeCLIP do. "paper" follows the total loss of
            DeCLIP (arXiv 2110.05208) with alpha = beta = gamma = 0.2: (1 - alpha - beta - gamma) on
            the plain pair, alpha on each self-supervision, beta on the three other pairs, gamma on
            the neighbors. The paper's text does not settle whether beta stands before their sum or
            their mean; here it is the mean. DeFILIP adds 0.2 of the token-wise term to either.
            Methods without those terms have one reading.

    Returns:
        Pairs of a name in `TERMS` and its weight, in the order of `TERMS`.

    Raises:
        DeclipError: unknown method or weighting; the nearest name is offered.
    """
    found = get_method(method)
    if weighting not in WEIGHTINGS:
        raise DeclipError(
            f"weighting {weighting!r} is not known.{did_you_mean(weighting, WEIGHTINGS)}"
        )
    return found.terms[weighting]
