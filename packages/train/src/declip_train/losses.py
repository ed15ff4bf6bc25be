"""The loss terms of CLIP and DeCLIP, as functions of tensors, and the lists that make a method of
them.

Features called `image_features` and `text_features` have unit length; a local batch has B rows, the
batch of all processes N. Contrastive terms compare local rows with the columns of all processes,
gathered with gradient, so that the mean over processes has the gradient of the whole batch (see
`distributed`). Similarities are turned into probabilities in float32, or in float64 if
the features have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean
from declip_train import distributed

__all__ = [
    "METHODS",
    "TERMS",
    "WEIGHTINGS",
    "MultiViewLoss",
    "info_nce",
    "masked_language_modeling",
    "method_terms",
    "multi_view_info_nce",
    "neighbor_info_nce",
    "simsiam",
]

TERMS = ("contrastive", "multi_view", "simsiam", "masked_language_modeling", "neighbor")
"""Names of the terms, as logs and configurations have them."""
METHODS = ("clip", "declip")
WEIGHTINGS = ("released", "paper")
_LATER_METHODS = ("slip", "filip", "defilip")

_METHOD_TERMS: dict[tuple[str, str], tuple[tuple[str, float], ...]] = {
    ("clip", "released"): (("contrastive", 1.0),),
    ("clip", "paper"): (("contrastive", 1.0),),
    ("declip", "released"): (
        # 0.4 on the mean of the four pairs, of which the plain one is one and `multi_view` the mean
        # of three.
        ("contrastive", 0.1),
        ("multi_view", 0.3),
        ("simsiam", 0.2),
        ("masked_language_modeling", 0.2),
        ("neighbor", 0.2),
    ),
    ("declip", "paper"): (
        ("contrastive", 0.4),
        ("multi_view", 0.2),
        ("simsiam", 0.2),
        ("masked_language_modeling", 0.2),
        ("neighbor", 0.2),
    ),
}


def method_terms(method: str, weighting: str = "released") -> tuple[tuple[str, float], ...]:
    """Return the terms of a method with their weights; a method is this list and nothing else.

    Args:
        method: "clip" or "declip".
        weighting: "released" puts 0.4 on the mean of the four view pairs and 0.2 on each other
            term, as the configurations released with DeCLIP do. "paper" follows the total loss of
            DeCLIP (arXiv 2110.05208) with alpha = beta = gamma = 0.2: (1 - alpha - beta - gamma) on
            the plain pair, alpha on each self-supervision, beta on the three other pairs, gamma on
            the neighbors. The paper's text does not settle whether beta stands before their sum or
            their mean; here it is the mean. "clip" has one term, and no weighting changes it.

    Returns:
        Pairs of a name in `TERMS` and its weight, in the order of `TERMS`.

    Raises:
        DeclipError: unknown method or weighting; the nearest name is offered.
    """
    if method in _LATER_METHODS:
        raise DeclipError(
            f"method {method!r} arrives with issue 3; choose {' or '.join(METHODS)} until then."
        )
    for kind, value, known in (("method", method, METHODS), ("weighting", weighting, WEIGHTINGS)):
        if value not in known:
            raise DeclipError(f"{kind} {value!r} is not known.{did_you_mean(value, known)}")
    return _METHOD_TERMS[method, weighting]


def _full_precision(logits: Tensor) -> Tensor:
    """Half precision is too coarse for a softmax over a large batch; float64 stays what it is."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _own_columns(rows: int, device: torch.device) -> Tensor:
    """Columns (rows,) in the gathered batch where the matches of the local rows stand."""
    return torch.arange(rows, device=device) + distributed.rank() * rows


def _cross_entropy(queries: Tensor, keys: Tensor, logit_scale: Tensor) -> Tensor:
    """Cross-entropies of V query views (V, B, D) against W key views (W, N, D), as (V, W, B).

    One matrix product serves all V x W pairs of views; the loss of a pair is as if it had been
    computed alone.
    """
    num_queries, rows, dim = queries.shape
    num_keys, columns, _ = keys.shape
    similarity = queries.reshape(-1, dim) @ keys.reshape(-1, dim).T
    logits = _full_precision(logit_scale * similarity).view(num_queries, rows, num_keys, columns)
    labels = _own_columns(rows, queries.device).view(1, rows, 1).expand(num_queries, rows, num_keys)
    losses = F.cross_entropy(logits.reshape(-1, columns), labels.reshape(-1), reduction="none")
    return losses.view(num_queries, rows, num_keys).transpose(1, 2)


def _refuse_unlike(**features: Tensor) -> None:
    if len({tuple(matrix.shape) for matrix in features.values()}) > 1 or any(
        matrix.ndim != 2 or matrix.shape[0] == 0 for matrix in features.values()
    ):
        shapes = ", ".join(f"{name} {tuple(matrix.shape)}" for name, matrix in features.items())
        raise ValueError(
            f"Features must be matrices of one shape with at least one row, but were {shapes}."
        )


def _pair_losses(images: Sequence[Tensor], texts: Sequence[Tensor], logit_scale: Tensor) -> Tensor:
    """Symmetric losses of all view pairs, as (num image views, num text views)."""
    gathered = distributed.gather_features(*images, *texts)
    all_images = torch.stack(gathered[: len(images)])
    all_texts = torch.stack(gathered[len(images) :])
    per_image = _cross_entropy(torch.stack(tuple(images)), all_texts, logit_scale)
    per_text = _cross_entropy(torch.stack(tuple(texts)), all_images, logit_scale)
    return (per_image.mean(dim=-1) + per_text.mean(dim=-1).T) / 2


def info_nce(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric contrastive loss of matching pairs: L_CLIP.

    1/2 of the cross-entropy over texts given the image plus 1/2 of that over images given the text,
    the match being the same row. A batch of one gives 0; features that are all equal give ln N.

    Args:
        image_features: (B, D), unit length, this process's rows.
        text_features: (B, D), unit length, this process's rows.
        logit_scale: scalar factor on the cosines (already exponentiated).

    Returns:
        Scalar float32, the mean over local rows.

    Raises:
        ValueError: the shapes differ, or there is no row.

    Source: CLIP (arXiv 2103.00020), figure 3; ConVIRT (arXiv 2010.00747), equations 2-4.
    """
    _refuse_unlike(image_features=image_features, text_features=text_features)
    return _pair_losses([image_features], [text_features], logit_scale)[0, 0]


class MultiViewLoss(NamedTuple):
    """The four pairs of two image views and two text views."""

    contrastive: Tensor
    """Scalar: the pair of the first views, which is L_CLIP."""
    multi_view: Tensor
    """Scalar: the mean of the other three pairs, which is L_MVS."""

    @property
    def mean(self) -> Tensor:
        """Scalar: the mean of all four pairs."""
        return (self.contrastive + 3 * self.multi_view) / 4


def multi_view_info_nce(
    image_features: Tensor,
    other_image_features: Tensor,
    text_features: Tensor,
    other_text_features: Tensor,
    logit_scale: Tensor,
) -> MultiViewLoss:
    """Contrastive losses of two image views with two text views: L_CLIP and L_MVS.

    Args:
        image_features: (B, D), unit length, first image view.
        other_image_features: (B, D), unit length, second image view.
        text_features: (B, D), unit length, first text view.
        other_text_features: (B, D), unit length, second text view.
        logit_scale: scalar factor on the cosines (already exponentiated).

    Returns:
        The plain pair's loss and the mean of the other three, scalars in float32.

    Raises:
        ValueError: the shapes differ, or there is no row.

    Source: DeCLIP (arXiv 2110.05208), multi-view supervision; L_MVS in figure 1 of CLIP-Benchmark
        (arXiv 2203.05796).
    """
    _refuse_unlike(
        image_features=image_features,
        other_image_features=other_image_features,
        text_features=text_features,
        other_text_features=other_text_features,
    )
    pairs = _pair_losses(
        [image_features, other_image_features], [text_features, other_text_features], logit_scale
    )
    return MultiViewLoss(
        contrastive=pairs[0, 0], multi_view=(pairs[0, 1] + pairs[1, 0] + pairs[1, 1]) / 3
    )


def neighbor_info_nce(
    image_views: Sequence[Tensor],
    neighbor_views: Sequence[Tensor],
    logit_scale: Tensor,
    has_neighbor: Tensor | None = None,
) -> Tensor:
    """Contrastive loss of images with the nearest neighbors of their texts: L_NNS.

    Only images ask and neighbors answer: the cross-entropy over all neighbors given the image,
    averaged over every image view with every neighbor view. Neighbors are constants: no gradient
    flows into them.

    Args:
        image_views: one or more (B, D), unit length.
        neighbor_views: one or more (B, D), unit length; row i belongs to the pair of row i of the
            images.
        logit_scale: scalar factor on the cosines (already exponentiated).
        has_neighbor: (B,) bool; rows without a neighbor neither ask nor answer. None: all have one.

    Returns:
        Scalar float32. With `has_neighbor`, the mean is over the rows of all processes that have
        one, scaled so that averaging over processes is right; 0 if none has.

    Raises:
        ValueError: no view, shapes that differ, or no row.

    Source: DeCLIP (arXiv 2110.05208), nearest-neighbor supervision; L_NNS in figure 1 of
        CLIP-Benchmark (arXiv 2203.05796).
    """
    if not image_views or not neighbor_views:
        raise ValueError(
            f"Neighbor supervision was given {len(image_views)} image views and "
            f"{len(neighbor_views)} neighbor views: give at least one of each."
        )
    named = {f"image_views[{i}]": view for i, view in enumerate(image_views)}
    named |= {f"neighbor_views[{i}]": view for i, view in enumerate(neighbor_views)}
    _refuse_unlike(**named)
    images = torch.stack(tuple(image_views))
    constants = [view.detach() for view in neighbor_views]
    if has_neighbor is None:
        neighbors = torch.stack(distributed.gather_features(*constants))
        return _cross_entropy(images, neighbors, logit_scale).mean()
    rows = images.shape[1]
    if has_neighbor.shape != (rows,):
        raise ValueError(
            f"has_neighbor has shape {tuple(has_neighbor.shape)}, but must have ({rows},)."
        )
    # The flag travels as one more column of the features, so there is still one collective.
    flags = has_neighbor.to(images.dtype).unsqueeze(1)
    *all_neighbors, all_flags = distributed.gather_features(*constants, flags)
    present = all_flags[:, 0] > 0
    losses = _cross_entropy_with_gaps(images, torch.stack(all_neighbors), logit_scale, present)
    total: Tensor = (losses.mean(dim=(0, 1)) * has_neighbor).sum()
    return total * distributed.world_size() / present.sum().clamp(min=1)


def _cross_entropy_with_gaps(
    queries: Tensor, keys: Tensor, logit_scale: Tensor, present: Tensor
) -> Tensor:
    """As `_cross_entropy`, where the keys that are not `present` (N,) are no possible answer.

    A row's own key stays in even if absent, so that the row's loss, which the caller leaves out, is
    a number all the same.
    """
    rows = queries.shape[1]
    labels = _own_columns(rows, queries.device)
    allowed = present.expand(rows, -1).clone()
    allowed[torch.arange(rows, device=queries.device), labels] = True
    logits = _full_precision(logit_scale * torch.einsum("vbd,wnd->vwbn", queries, keys))
    log_probabilities = logits.masked_fill(~allowed, -torch.inf).log_softmax(dim=-1)
    index = labels.view(1, 1, rows, 1).expand(*logits.shape[:-1], 1)
    return -log_probabilities.gather(-1, index)[..., 0]


def simsiam(p1: Tensor, z2: Tensor, p2: Tensor, z1: Tensor) -> Tensor:
    """Negative cosine similarity of each view's prediction with the other's projection: L_ISS.

    -1/2 [cos(p1, sg(z2)) + cos(p2, sg(z1))], between -1 (views agree) and 1; sg stops the gradient.

    Args:
        p1: (B, D) prediction of the first view.
        z2: (B, D) projection of the second view.
        p2: (B, D) prediction of the second view.
        z1: (B, D) projection of the first view.

    Returns:
        Scalar float32, the mean over local rows.

    Raises:
        ValueError: the shapes differ, or there is no row.

    Source: SimSiam (arXiv 2011.10566), equations 1-4; DeCLIP (arXiv 2110.05208), image
        self-supervision.
    """
    _refuse_unlike(p1=p1, z2=z2, p2=p2, z1=z1)
    first = F.cosine_similarity(_full_precision(p1), _full_precision(z2.detach()), dim=-1)
    second = F.cosine_similarity(_full_precision(p2), _full_precision(z1.detach()), dim=-1)
    return -(first.mean() + second.mean()) / 2


def masked_language_modeling(
    hidden: Tensor, mask_positions: Tensor, targets: Tensor, head: nn.Module
) -> Tensor:
    """Cross-entropy of the original tokens at the masked positions of the local batch: L_TSS.

    The vocabulary is large and masks are few, so the head runs on the masked positions alone.

    Args:
        hidden: (B, T, width), states of the text tower after its last LayerNorm.
        mask_positions: (B, L) bool with L >= T, where the token is to be predicted; columns from T
            on lie behind the longest caption and hold no mask.
        targets: (B, L) int64, original ids; read at the masked positions only.
        head: maps (M, width) to (M, vocabulary).

    Returns:
        Scalar float32, the mean over masked positions. Nothing masked gives 0 with gradients of 0,
        so every process still takes part in the reduction of the head's gradients.

    Raises:
        ValueError: the shapes do not fit.

    Source: DeCLIP (arXiv 2110.05208), text self-supervision; BERT (arXiv 1810.04805), section 3.1.
    """
    length = hidden.shape[1] if hidden.ndim == 3 else -1
    fits = mask_positions.ndim == 2 and mask_positions.shape[0] == hidden.shape[0]
    if (
        not fits
        or not 0 <= length <= mask_positions.shape[1]
        or mask_positions.shape != targets.shape
    ):
        raise ValueError(
            f"Masked language modeling was given hidden states {tuple(hidden.shape)}, mask "
            f"positions {tuple(mask_positions.shape)} and targets {tuple(targets.shape)}: they "
            "must be (B, T, width), (B, L) and (B, L) with L at least T."
        )
    chosen = mask_positions[:, :length]
    logits = _full_precision(head(hidden[chosen]))
    total: Tensor = F.cross_entropy(logits, targets[:, :length][chosen], reduction="sum")
    mean: Tensor = total / max(1, logits.shape[0])
    return mean
