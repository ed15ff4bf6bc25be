"""The losses once more, as plain loops in float64: written from the papers' sentences, one sample
at a time, and sharing no line with what they check."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _log_sum_exp(values: Sequence[Tensor]) -> Tensor:
    top = max(float(value.detach()) for value in values)
    total = torch.zeros((), dtype=torch.float64)
    for value in values:
        total = total + torch.exp(value - top)
    return torch.log(total) + top


def one_sided(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """Mean cross-entropy of each query's own key among all keys (CLIP, figure 3)."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(queries)):
        logits = [scale * torch.dot(queries[row], key) for key in keys]
        total = total + _log_sum_exp(logits) - logits[row]
    return total / len(queries)


def info_nce(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP (arXiv 2103.00020), figure 3."""
    return (one_sided(images, texts, scale) + one_sided(texts, images, scale)) / 2


def multi_view(
    images: Tensor, images_2: Tensor, texts: Tensor, texts_2: Tensor, scale: Tensor
) -> Tensor:
    """Mean over the four pairs of views (DeCLIP, arXiv 2110.05208)."""
    total = torch.zeros((), dtype=torch.float64)
    for image_view in (images, images_2):
        for text_view in (texts, texts_2):
            total = total + info_nce(image_view, text_view, scale)
    return total / 4


def neighbor(images: Tensor, neighbors: Tensor, has_neighbor: Tensor, scale: Tensor) -> Tensor:
    """Images ask for their texts' neighbors among those that exist (DeCLIP, section 3.2)."""
    rows = [row for row in range(len(images)) if bool(has_neighbor[row])]
    return one_sided(images[rows], neighbors[rows].detach(), scale)


def sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP (arXiv 2303.15343), equation 1."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(images)):
        for j in range(len(texts)):
            label = 1.0 if i == j else -1.0
            logit = scale * torch.dot(images[i], texts[j]) + bias
            total = total + torch.log1p(torch.exp(-label * logit))
    return total / len(images)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a, b) / (torch.sqrt(torch.dot(a, a)) * torch.sqrt(torch.dot(b, b)))


def simsiam(p1: Tensor, z2: Tensor, p2: Tensor, z1: Tensor) -> Tensor:
    """SimSiam (arXiv 2011.10566), equations 1 to 4."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(p1)):
        total = total - _cosine(p1[row], z2[row].detach()) / 2
        total = total - _cosine(p2[row], z1[row].detach()) / 2
    return total / len(p1)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """SimCLR (arXiv 2002.05709), equation 1."""
    rows = [*z1, *z2]
    half, total = len(z1), torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(rows):
        partner = (i + half) % (2 * half)
        logits = {j: _cosine(row, other) / temperature for j, other in enumerate(rows) if j != i}
        total = total + _log_sum_exp(list(logits.values())) - logits[partner]
    return total / len(rows)


def masked_language_modeling(
    states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """BERT (arXiv 1810.04805), section 3.1: cross-entropy at the hidden places."""
    total = torch.zeros((), dtype=torch.float64)
    for state, target in zip(states, targets.tolist(), strict=True):
        logits = [torch.dot(weight[word], state) + bias[word] for word in range(len(weight))]
        total = total + _log_sum_exp(logits) - logits[target]
    return total / len(states)


def tokenwise(
    image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor, scale: Tensor
) -> Tensor:
    """FILIP (arXiv 2111.07783), equations 4 to 6, padding left out."""
    size = len(image_tokens)
    captions = [text_tokens[j][text_mask[j]] for j in range(size)]
    by_image = [[torch.zeros(())] * size for _ in range(size)]
    by_text = [[torch.zeros(())] * size for _ in range(size)]
    for i in range(size):
        for j in range(size):
            patches, words = image_tokens[i], captions[j]
            best = [
                max((torch.dot(p, w) for w in words), key=lambda x: float(x.detach()))
                for p in patches
            ]
            by_image[i][j] = torch.stack(best).mean()
            best = [
                max((torch.dot(p, w) for p in patches), key=lambda x: float(x.detach()))
                for w in words
            ]
            by_text[j][i] = torch.stack(best).mean()
    total = torch.zeros((), dtype=torch.float64)
    for k in range(size):
        for table in (by_image, by_text):
            logits = [scale * value for value in table[k]]
            total = total + (_log_sum_exp(logits) - logits[k]) / 2
    return total / size
