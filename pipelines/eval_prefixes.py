"""Texts that begin alike are encoded with their beginning computed once.

Prompts of a template share all tokens in front of the class name. Attention in a causal text tower
looks back only, so what the tower computes there is the same for every class: keys and values of
each such beginning are made once, and only the rest of a text goes through the tower. Results are
those of the whole text, up to rounding.
"""

from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from declip_train.towers import CLIP, TwoTowers
from declip_train.transformer import ResidualAttentionBlock
from pipelines.eval_packed import project_heads

LEAST_SHARING = 4
"""Texts that must share a beginning before it is made for them."""
KeysValues: TypeAlias = list[tuple[Tensor, Tensor]]
"""Of each block: keys and values (num_prefixes, heads, prefix length, head width)."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Texts that are encoded together: beginnings of one length, and rests of one length."""

    rows: npt.NDArray[np.int64]
    """(n,) numbers of the texts."""
    prefix_ids: npt.NDArray[np.int64]
    """(p, prefix length) distinct beginnings; no column where nothing is shared."""
    which: npt.NDArray[np.int64]
    """(n,) the beginning of each text."""
    rest_ids: npt.NDArray[np.int64]
    """(n, rest length), up to and with the end token."""


def shared_prefixes(
    ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], least: int = LEAST_SHARING
) -> npt.NDArray[np.int64]:
    """How many first tokens of each text are computed once for several.

    The longest beginning that at least ``least`` texts share; at least one token is left.

    Args:
        ids: (n, L) token ids, padded behind each text's end.
        lengths: (n,) tokens of each text.
        least: texts that share a beginning.

    Returns:
        (n,) from 0 to length - 1.
    """
    number, columns = ids.shape
    found = np.zeros(number, np.int64)
    if not number:
        return found
    # Texts that begin alike are neighbors when sorted, so a beginning is one run of rows.
    order = np.lexsort(ids.T[::-1])
    sorted_ids, limit = ids[order], lengths[order] - 1
    breaks = np.zeros(number, bool)
    breaks[0] = True
    for column in range(columns):
        breaks[1:] |= sorted_ids[1:, column] != sorted_ids[:-1, column]
        starts = np.flatnonzero(breaks)
        sizes = np.diff(np.append(starts, number))
        is_shared = np.repeat(sizes >= least, sizes) & (limit > column)
        if not is_shared.any():
            break
        found[order[is_shared]] = column + 1
    return found


def make_groups(
    ids: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    most: int,
    least: int = LEAST_SHARING,
) -> list[Group]:
    """Texts in groups whose beginnings and rests have one length each, the longest rests first.

    Args:
        ids: (n, L) token ids.
        lengths: (n,) tokens of each text.
        most: texts of a group.
        least: texts that share a beginning.
    """
    shared = shared_prefixes(ids, lengths, least)
    rest = lengths - shared
    order = np.lexsort((np.arange(len(ids)), -shared, -rest))
    alike = np.stack([rest[order], shared[order]], axis=1)
    edges = np.flatnonzero((np.diff(alike, axis=0) != 0).any(axis=1)) + 1
    groups = []
    for same in np.split(order, edges):
        for start in range(0, len(same), most):
            rows = same[start : start + most]
            cut, end = int(shared[rows[0]]), int(lengths[rows[0]])
            prefixes, which = np.unique(ids[rows, :cut], axis=0, return_inverse=True)
            if not cut:
                prefixes, which = np.empty((1, 0), np.int64), np.zeros(len(rows), np.int64)
            groups.append(
                Group(
                    rows=rows,
                    prefix_ids=prefixes,
                    which=which.reshape(-1),
                    rest_ids=ids[rows, cut:end],
                )
            )
    return groups


def prefix_states(tower: CLIP, prefix_ids: Tensor) -> KeysValues:
    """Keys and values of beginnings (p, length), block by block."""
    x = _embed(tower, prefix_ids, 0)
    found: KeysValues = []
    blocks = _blocks(tower)
    for block in blocks:
        query, key, value = project_heads(block.attn, block.ln_1(x))
        found.append((key, value))
        if block is not blocks[-1]:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = _finish(block, x, mixed)
    return found


def encode_rests(
    tower: CLIP, states: KeysValues, which: Tensor, rest_ids: Tensor, prefix_length: int
) -> Tensor:
    """Features (n, embed_dim), not normalized, of texts whose beginnings are known.

    Args:
        tower: the text tower, in evaluation mode.
        states: of :func:`prefix_states`.
        which: (n,) int64, the beginning of each text.
        rest_ids: (n, length) int64; the end token is the last of each.
        prefix_length: tokens of a beginning.
    """
    x = _embed(tower, rest_ids, prefix_length)
    length = x.shape[1]
    places = torch.arange(prefix_length + length, device=x.device)
    visible = places <= (places[prefix_length:])[:, None]
    blocks = _blocks(tower)
    for block, (prefix_key, prefix_value) in zip(blocks, states, strict=True):
        query, key, value = project_heads(block.attn, block.ln_1(x))
        key = torch.cat([prefix_key[which], key], dim=2)
        value = torch.cat([prefix_value[which], value], dim=2)
        if block is blocks[-1]:
            # The feature is read at the end token, which sees everything.
            mixed = F.scaled_dot_product_attention(query[:, :, -1:], key, value)
            x = _finish(block, x[:, -1:], mixed)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
            x = _finish(block, x, mixed)
    pooled = tower.ln_final(x[:, -1])
    return cast(Tensor, pooled @ tower.text_projection.to(pooled.dtype))


def _blocks(tower: CLIP) -> list[ResidualAttentionBlock]:
    return [cast(ResidualAttentionBlock, block) for block in tower.transformer.resblocks]


def _embed(tower: CLIP, ids: Tensor, first: int) -> Tensor:
    """(n, length, width) of tokens that stand from place ``first`` on."""
    places = tower.positional_embedding[first : first + ids.shape[1]]
    return cast(Tensor, tower.token_embedding(ids) + places)


def _finish(block: ResidualAttentionBlock, x: Tensor, mixed: Tensor) -> Tensor:
    x = x + block.attn.out_proj(mixed.transpose(1, 2).flatten(2))
    return cast(Tensor, x + block.mlp(block.ln_2(x)))


def encode_group(tower: TwoTowers, group: Group, device: str) -> Tensor:
    """Features (n, embed_dim), not normalized, of a group of texts."""
    rest = torch.from_numpy(group.rest_ids).to(device)
    length = group.prefix_ids.shape[1]
    if not length:
        return tower.encode_text(rest)
    assert isinstance(tower, CLIP)
    states = prefix_states(tower, torch.from_numpy(group.prefix_ids).to(device))
    return encode_rests(tower, states, torch.from_numpy(group.which).to(device), rest, length)
