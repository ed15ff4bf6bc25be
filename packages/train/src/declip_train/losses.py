"""The loss terms of the five methods, as functions of tensors.

Features called `image_features` and `text_features` have unit length; a local batch has B rows, the
batch of all processes N. Contrastive terms compare local rows with the columns of all processes,
gathered with gradient, so that the mean over processes has the gradient of the whole batch (see
`distributed`). The matrix of logits is never whole: it is computed in tiles, where needed again in
the backward pass (see `contrastive_blocks`), so no term's memory grows with B x N. Products are in
the dtype of the features, or in autocast's; probabilities are in float32, or in float64 if the
features have it. Contrastive terms can be differentiated once; create_graph=True is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from declip_train import distributed
from declip_train.blocked_cross_entropy import Comparison, blocked_cross_entropy
from declip_train.blocked_sigmoid import blocked_sigmoid
from declip_train.contrastive_blocks import compute_dtype, full_precision

__all__ = [
    "MultiViewLoss",
    "info_nce",
    "masked_language_modeling",
    "multi_view_info_nce",
    "neighbor_info_nce",
    "nt_xent",
    "sigmoid_loss",
    "simsiam",
]

# Rows whose logits over the vocabulary exist at a time: 100 MB in float32 for 49,409 entries.
_VOCABULARY_ROWS = 512


def _refuse_unlike(**features: Tensor) -> None:
    if len({tuple(matrix.shape) for matrix in features.values()}) > 1 or any(
        matrix.ndim != 2 or matrix.shape[0] == 0 for matrix in features.values()
    ):
        shapes = ", ".join(f"{name} {tuple(matrix.shape)}" for name, matrix in features.items())
        raise ValueError(
            f"Features must be matrices of one shape with at least one row, but were {shapes}."
        )


def _refuse_scalars(label_smoothing: float, hard_negative_beta: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, but must be at least 0 and below 1; 0 is none."
        )
    if not 0 <= hard_negative_beta < math.inf:
        raise ValueError(
            f"hard_negative_beta is {hard_negative_beta}, but must be a number of at least 0; 0 "
            "weighs all negatives alike."
        )


def _to_compare(*features: Tensor) -> list[Tensor]:
    """The features in the one dtype in which they will be multiplied, and travel before that."""
    dtype = reduce(torch.promote_types, (compute_dtype(matrix) for matrix in features))
    return [matrix.to(dtype) for matrix in features]


def _own_column(rows: int) -> int:
    """Column in the gathered batch where the match of the first local row stands."""
    return distributed.rank() * rows


def _pair_losses(
    images: Sequence[Tensor],
    texts: Sequence[Tensor],
    logit_scale: Tensor,
    label_smoothing: float,
    hard_negative_beta: float,
) -> Tensor:
    """Symmetric losses of all view pairs, as (num image views, num text views)."""
    _refuse_scalars(label_smoothing, hard_negative_beta)
    local = _to_compare(*images, *texts)
    num_images = len(images)
    images, texts = local[:num_images], local[num_images:]
    alone = distributed.world_size() == 1

    def compare(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
        comparison = Comparison(
            own_columns=(_own_column(queries[0].shape[0]),) * len(queries),
            both_directions=alone,
            label_smoothing=label_smoothing,
            hard_negative_beta=hard_negative_beta,
        )
        return blocked_cross_entropy(queries, keys, logit_scale, comparison)

    if alone:
        # Both directions are read off one matrix.
        return compare(images, texts)
    everywhere = distributed.gather_features(*local)
    per_image = compare(images, everywhere[num_images:])
    per_text = compare(texts, everywhere[:num_images])
    return (per_image + per_text.T) / 2


def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    label_smoothing: float = 0.0,
    hard_negative_beta: float = 0.0,
) -> Tensor:
    """Symmetric contrastive loss of matching pairs: L_CLIP.

    1/2 of the cross-entropy over texts given the image plus 1/2 of that over images given the text,
    the match being the same row. A batch of one gives 0; features that are all equal give ln N.

    With `hard_negative_beta`, the soft-max's denominator counts negative j of row i
    w[i, j] = (N - 1) exp(beta l[i, j]) / sum over k != i of exp(beta l[i, k]) times, where l are
    the logits (cosine times `logit_scale`): hard negatives weigh more, and the mean weight is 1.

    Args:
        image_features: (B, D), unit length, this process's rows.
        text_features: (B, D), unit length, this process's rows.
        logit_scale: scalar factor on the cosines (already exponentiated).
        label_smoothing: share of the target spread evenly over all N columns, in [0, 1), as
            `torch.nn.functional.cross_entropy` does.
        hard_negative_beta: concentration on negatives with large logits, at least 0.

    Returns:
        Scalar float32, the mean over local rows.

    Raises:
        ValueError: the shapes differ, there is no row, or an option is out of its range.

    Source: CLIP (arXiv 2103.00020), figure 3; ConVIRT (arXiv 2010.00747), equations 2-4. Hard
        negatives: HN-NCE (arXiv 2301.02280) with alpha = 1 and beta for both directions, after
        Robinson et al. (arXiv 2010.04592), who sample negatives with a density proportional to
        exp(beta f(x) f(x-)); without their correction for false negatives (tau+ = 0).
    """
    _refuse_unlike(image_features=image_features, text_features=text_features)
    losses = _pair_losses(
        [image_features], [text_features], logit_scale, label_smoothing, hard_negative_beta
    )
    return losses[0, 0]


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
    *,
    label_smoothing: float = 0.0,
    hard_negative_beta: float = 0.0,
) -> MultiViewLoss:
    """Contrastive losses of two image views with two text views: L_CLIP and L_MVS.

    Args:
        image_features: (B, D), unit length, first image view.
        other_image_features: (B, D), unit length, second image view.
        text_features: (B, D), unit length, first text view.
        other_text_features: (B, D), unit length, second text view.
        logit_scale: scalar factor on the cosines (already exponentiated).
        label_smoothing: see `info_nce`.
        hard_negative_beta: see `info_nce`.

    Returns:
        The plain pair's loss and the mean of the other three, scalars in float32.

    Raises:
        ValueError: the shapes differ, there is no row, or an option is out of its range.

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
        [image_features, other_image_features],
        [text_features, other_text_features],
        logit_scale,
        label_smoothing,
        hard_negative_beta,
    )
    return MultiViewLoss(
        contrastive=pairs[0, 0], multi_view=(pairs[0, 1] + pairs[1, 0] + pairs[1, 1]) / 3
    )


def sigmoid_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """Every image with every text is a question of its own: do the two match?

    -log sigmoid(z (logit_scale cosine + logit_bias)) with z = 1 for a match and -1 for the others,
    summed over all N texts. No soft-max, so one direction says everything.

    Args:
        image_features: (B, D), unit length, this process's rows.
        text_features: (B, D), unit length, this process's rows.
        logit_scale: scalar factor on the cosines (already exponentiated).
        logit_bias: scalar added to the logits.

    Returns:
        Scalar float32, the mean over local rows of the sum over columns.

    Raises:
        ValueError: the shapes differ, or there is no row.

    Source: SigLIP (arXiv 2303.15343), section 3.2 and algorithm 1.
    """
    _refuse_unlike(image_features=image_features, text_features=text_features)
    images, texts = _to_compare(image_features, text_features)
    (all_texts,) = distributed.gather_features(texts)
    return blocked_sigmoid(
        images, all_texts, logit_scale, logit_bias, own_column=_own_column(images.shape[0])
    )


def neighbor_info_nce(
    image_views: Sequence[Tensor],
    neighbor_views: Sequence[Tensor],
    logit_scale: Tensor,
    has_neighbor: Tensor | Sequence[Tensor] | None = None,
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
        has_neighbor: (B,) bool for all neighbor views, or one such mask for each; rows without a
            neighbor neither ask nor answer. None: all have one.

    Returns:
        Scalar float32. With `has_neighbor`, the mean of a pair of views is over the rows of all
        processes that have a neighbor in that view, scaled so that averaging over processes is
        right; a view in which none has one counts as 0.

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
    rows = image_views[0].shape[0]
    masks = None
    if has_neighbor is not None:
        masks = _neighbor_masks(has_neighbor, rows, len(neighbor_views))
    prepared = _to_compare(*image_views, *(view.detach() for view in neighbor_views))
    images, neighbors = prepared[: len(image_views)], prepared[len(image_views) :]
    own_columns = (_own_column(rows),) * len(images)
    if masks is None:
        all_neighbors = distributed.gather_features(*neighbors)
        comparison = Comparison(own_columns=own_columns)
        return blocked_cross_entropy(images, all_neighbors, logit_scale, comparison).mean()
    # What stands in the place of an absent neighbor must not matter, were it NaN.
    neighbors = [
        view.masked_fill(~mask.unsqueeze(1), 0) for view, mask in zip(neighbors, masks, strict=True)
    ]
    # The flags travel as more columns of the features, so there is still one collective.
    flags = masks.T.to(neighbors[0].dtype)
    *everywhere, all_flags = distributed.gather_features(*neighbors, flags)
    present = all_flags.T > 0
    counts = present.sum(dim=1, keepdim=True).clamp(min=1)
    comparison = Comparison(
        own_columns=own_columns,
        absent=~present,
        row_weights=full_precision(flags.T) * distributed.world_size() / counts,
    )
    return blocked_cross_entropy(images, everywhere, logit_scale, comparison).mean()


def _neighbor_masks(has_neighbor: Tensor | Sequence[Tensor], rows: int, num_views: int) -> Tensor:
    """(num_views, rows) bool."""
    masks = [has_neighbor] * num_views if isinstance(has_neighbor, Tensor) else [*has_neighbor]
    if len(masks) != num_views:
        raise ValueError(
            f"Neighbor supervision was given {len(masks)} masks for {num_views} neighbor views: "
            "give one for all of them, or one for each."
        )
    for mask in masks:
        if mask.shape != (rows,):
            raise ValueError(
                f"has_neighbor has shape {tuple(mask.shape)}, but must have ({rows},)."
            )
    return torch.stack(masks).bool()


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    """Normalized temperature-scaled cross-entropy of two views of the same images: L_SimCLR.

    Each of the 2N projections asks; its answer is the other view of the same image, against all
    2N - 2 others. A batch of one has no others, and gives 0.

    Args:
        z1: (B, k) projections of the first view, of any length: they are normalized here.
        z2: (B, k) projections of the second view.
        temperature: by which cosines are divided.

    Returns:
        Scalar float32, the mean over local rows of both views.

    Raises:
        ValueError: the shapes differ, there is no row, or the temperature is not positive.

    Source: SimCLR (arXiv 2002.05709), equation 1 and algorithm 1; SLIP (arXiv 2112.12750) with
        temperature 0.1.
    """
    _refuse_unlike(z1=z1, z2=z2)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, but must be a number above 0.")
    rows = z1.shape[0]
    units = (F.normalize(full_precision(z), dim=-1).to(z.dtype) for z in (z1, z2))
    views = _to_compare(*units)
    gathered = torch.cat(distributed.gather_features(*views))
    first, num = _own_column(rows), rows * distributed.world_size()
    comparison = Comparison(own_columns=(num + first, first), excluded_columns=(first, num + first))
    scale = full_precision(views[0].new_empty(0)).new_tensor(1 / temperature)
    return blocked_cross_entropy(views, [gathered], scale, comparison).mean()


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
    first = F.cosine_similarity(full_precision(p1), full_precision(z2.detach()), dim=-1)
    second = F.cosine_similarity(full_precision(p2), full_precision(z1.detach()), dim=-1)
    return -(first.mean() + second.mean()) / 2


def masked_language_modeling(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """Cross-entropy of the original tokens at the masked positions: L_TSS.

    The vocabulary is large: the head's logits exist for a few hundred positions at a time, and are
    computed again in the backward pass if there are more.

    Args:
        states: (M, width), states of the text tower after its last LayerNorm at the masked
            positions of the local batch.
        targets: (M,) int64, original ids.
        head: maps (m, width) to (m, vocabulary), each row by itself.

    Returns:
        Scalar float32: the sum over local masked positions, divided by the number of masked
        positions of all processes and multiplied by the number of processes, so that the mean over
        processes is the mean over masked positions. Nothing masked gives 0 with gradients of 0, so
        every process still takes part in the reduction of the head's gradients.

    Raises:
        ValueError: the shapes do not fit.

    Source: DeCLIP (arXiv 2110.05208), text self-supervision; BERT (arXiv 1810.04805), section 3.1.
    """
    if states.ndim != 2 or targets.shape != states.shape[:1]:
        raise ValueError(
            f"Masked language modeling was given states {tuple(states.shape)} and targets "
            f"{tuple(targets.shape)}: they must be (M, width) and (M,)."
        )

    def summed(some_states: Tensor, some_targets: Tensor) -> Tensor:
        return F.cross_entropy(full_precision(head(some_states)), some_targets, reduction="sum")

    if states.shape[0] <= _VOCABULARY_ROWS:
        total = summed(states, targets)
    else:
        blocks = [slice(i, i + _VOCABULARY_ROWS) for i in range(0, len(states), _VOCABULARY_ROWS)]
        total = torch.stack(
            [
                checkpoint(summed, states[block], targets[block], use_reentrant=False)
                for block in blocks
            ]
        ).sum()
    world_size = distributed.world_size()
    count = torch.tensor(states.shape[0], device=states.device)
    if world_size > 1:
        dist.all_reduce(count)
    return total * world_size / count.clamp(min=1)
