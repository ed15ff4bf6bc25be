"""Towers, heads and losses of a method, cut where a batch can be computed in parts.

`encode` runs the towers, where every row is computed by itself; `terms` runs heads and losses,
where rows meet. A batch that does not fit in memory is encoded in parts and meets as a whole, so
accumulation changes no loss and no gradient (Gao et al., arXiv 2101.06983, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_train import losses
from declip_train.bank import BankNeighbors, NeighborBank, neighbor_metrics
from declip_train.heads import DeCLIPHeads, SimCLRHead, TokenHeads
from declip_train.hf_clip import build_towers
from declip_train.loader import Batch
from declip_train.settings import TrainSettings
from declip_train.tokenwise import tokenwise_info_nce
from declip_train.towers import CLIP, TextOutput, TwoTowers

ROWS_PER_GROUP = 16
"""Captions that share a length on CPUs; see :func:`forward_text_by_length`."""
ROWS_PER_GROUP_ON_GPU = 128
"""A GPU is not filled by less. Of web captions of 20 tokens on average, 1,024 at once cost three
times their own tokens, in groups of 128 a fifth more than those (counted, not timed)."""
# What only the global pair reads; a method without it leaves these as drawn.
_GLOBAL_ONLY = (
    "logit_scale",
    "text_projection",
    "text.proj.",
    "visual.proj",
    "visual.ln_post.",
    "visual.attnpool.",
)


def forward_text_by_length(
    clip: TwoTowers,
    token_ids: Tensor,
    *,
    rows_per_group: int,
    lengths: Tensor | None = None,
    replaced: Tensor | None = None,
    mask_embedding: Tensor | None = None,
    need_hidden: bool = False,
    state_positions: Tensor | None = None,
) -> TextOutput:
    """The text tower in groups of captions of like length, each cut to its own longest.

    A batch is as long as its longest caption, and most are far shorter; grouping saves about half
    of the tower's work at small sizes. The results are those of one pass, up to rounding.

    Args:
        clip: the towers.
        token_ids: (n, L) int64.
        rows_per_group: captions in a group; n or more makes one pass of it.
        lengths: (n,) tokens of each row, on the host; None: asked of the ids, for which a GPU is
            waited for.
        replaced: (n, L) bool, where ``mask_embedding`` (width,) stands in, or the tower's own mask.
        mask_embedding: see there.
        need_hidden: whether to return the states of all tokens, (n, longest, width), zero behind
            each group's own longest caption.
        state_positions: (n, L) bool: whether to return the states of these M tokens, (M, width), in
            the order of rows and places.
    """
    if lengths is None:
        lengths = clip.caption_mask(token_ids).sum(dim=1).cpu()
    order = torch.argsort(lengths, stable=True)
    parts = []
    for on_host in torch.split(order, rows_per_group):
        rows = on_host.to(token_ids.device, non_blocking=True)
        longest = int(lengths[on_host].max())

        def cut(rows_of: Tensor | None, rows: Tensor = rows, to: int = longest) -> Tensor | None:
            return None if rows_of is None else rows_of[rows, :to]

        parts.append(
            clip.forward_text(
                token_ids[rows, :longest],
                need_hidden=need_hidden,
                mask_positions=cut(replaced),
                mask_embedding=mask_embedding,
                state_positions=cut(state_positions),
                trim=False,
            )
        )
    order = order.to(token_ids.device, non_blocking=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    hidden: Tensor | None = None
    if need_hidden:
        found = [part.hidden for part in parts if part.hidden is not None]
        longest = max(state.shape[1] for state in found)
        padded = [F.pad(state, (0, 0, 0, longest - state.shape[1])) for state in found]
        hidden = torch.cat(padded)[back]
    states: Tensor | None = None
    if state_positions is not None:
        in_groups = torch.cat([part.states for part in parts if part.states is not None])
        numbers = (state_positions.flatten().cumsum(0) - 1).view_as(state_positions)
        states = torch.empty_like(in_groups)
        states = states.index_copy(0, numbers[order][state_positions[order]], in_groups)
    features = torch.cat([part.features for part in parts])[back]
    return TextOutput(features=features, hidden=hidden, states=states)


class TrainModule(nn.Module):
    """Towers, heads and, where neighbors come from it, the bank.

    `forward(batch)` gives the loss terms and metrics of a batch.
    """

    def __init__(self, settings: TrainSettings) -> None:
        super().__init__()
        self.settings = settings
        self.method = settings.method_parts
        config = settings.model_config
        synchronized = settings.batch_norm == "synchronized"
        # Every process draws the same weights; nothing needs to be sent.
        generator = torch.Generator().manual_seed(settings.seed)
        self.clip = build_towers(settings, generator)
        if synchronized:
            self.clip.synchronize_batch_norm()
        self.heads = nn.ModuleDict()
        if self.method.has("simsiam"):
            self.heads["declip"] = DeCLIPHeads(
                config,
                projector_dim=settings.projector_dim,
                predictor_hidden_dim=settings.predictor_hidden_dim,
                synchronized=synchronized,
                generator=generator,
            )
            if not self._takes_mask_embedding:
                self._declip.mask_embedding.requires_grad_(False)
        if self.method.has("simclr"):
            self.heads["simclr"] = SimCLRHead(
                config,
                hidden_dim=settings.simclr_hidden_dim,
                output_dim=settings.simclr_dim,
                synchronized=synchronized,
                generator=generator,
            )
        if self.method.has("tokenwise"):
            self.heads["tokens"] = TokenHeads(
                config, token_dim=settings.token_dim, generator=generator
            )
        self.bank: NeighborBank | None = None
        if settings.uses_bank:
            self.bank = NeighborBank(settings.bank_size, config.embed_dim)
        self._to_store: list[tuple[Tensor, Tensor, Tensor]] = []
        if not self.method.has("contrastive"):
            for name, parameter in self.clip.named_parameters():
                parameter.requires_grad_(not name.startswith(_GLOBAL_ONLY))

    @property
    def _takes_mask_embedding(self) -> bool:
        """A text model of transformers has a mask token in its own vocabulary."""
        return isinstance(self.clip, CLIP)

    @property
    def _declip(self) -> DeCLIPHeads:
        return cast(DeCLIPHeads, self.heads["declip"])

    @property
    def _tokens(self) -> TokenHeads:
        return cast(TokenHeads, self.heads["tokens"])

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See :meth:`terms`."""
        return self.terms(self.encode(batch), batch)

    def _autocast(self, batch: Batch) -> torch.autocast:
        on = self.settings.precision == "amp_bf16"
        return torch.autocast(batch.images.device.type, torch.bfloat16, enabled=on)

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """What the towers make of a batch, or of a part of one.

        Returns:
            Tensors whose rows belong to samples (``masked_states``: to masked tokens), so that
            results of parts are joined along their first dimension. Which are there depends on the
            method: ``image_features`` (n, views, D), ``image_pooled`` (n, 2, width),
            ``image_tokens`` (n, patches, d), ``text_features`` (n, texts, D), ``text_tokens``
            (n, L, d), ``masked_states`` (M, width), ``neighbor_features`` (n, D, no gradient).
            Token features have unit length, the others are as the towers give them.
        """
        with self._autocast(batch):
            return {**self._encode_images(batch), **self._encode_texts(batch)}

    def _encode_images(self, batch: Batch) -> dict[str, Tensor]:
        """All views in one pass; patch tokens are read from the first view alone."""
        views, rows = batch.images.shape[:2]
        with_tokens = self.method.has("tokenwise")
        output = self.clip.forward_image(
            batch.images.flatten(0, 1), need_tokens=with_tokens, num_with_tokens=rows
        )
        encoded: dict[str, Tensor] = {}
        features = output.features.view(views, rows, -1).transpose(0, 1)
        if self.method.has("simclr"):
            features = features[:, :1]
            encoded["image_pooled"] = output.pooled.view(views, rows, -1)[1:].transpose(0, 1)
        if self.method.has("contrastive"):
            encoded["image_features"] = features
        if with_tokens:
            assert output.tokens is not None
            encoded["image_tokens"] = self._tokens.project_image(output.tokens)
        return encoded

    def _encode_texts(self, batch: Batch) -> dict[str, Tensor]:
        """The first text view is masked where the method predicts words, and both its feature and
        its states come from that one pass (DeCLIP, arXiv 2110.05208)."""
        on_cpu = batch.images.device.type == "cpu"
        group = ROWS_PER_GROUP if on_cpu else ROWS_PER_GROUP_ON_GPU
        lengths = batch.lengths.get
        predicts = self.method.has("masked_language_modeling")
        takes_mask = predicts and self._takes_mask_embedding
        with_tokens = self.method.has("tokenwise")
        first = forward_text_by_length(
            self.clip,
            batch.token_ids,
            rows_per_group=group,
            lengths=lengths("token_ids"),
            replaced=batch.replaced if predicts else None,
            mask_embedding=self._declip.mask_embedding if takes_mask else None,
            need_hidden=with_tokens,
            state_positions=batch.mask_positions if predicts and not with_tokens else None,
        )
        encoded: dict[str, Tensor] = {}
        texts = [first.features]
        if with_tokens:
            assert first.hidden is not None
            hidden = F.pad(
                first.hidden, (0, 0, 0, batch.token_ids.shape[1] - first.hidden.shape[1])
            )
            encoded["text_tokens"] = self._tokens.project_text(hidden)
            if predicts:
                encoded["masked_states"] = hidden[batch.mask_positions]
        elif predicts:
            assert first.states is not None
            encoded["masked_states"] = first.states
        if self.method.has("multi_view"):
            assert batch.second_token_ids is not None
            second = forward_text_by_length(
                self.clip,
                batch.second_token_ids,
                rows_per_group=group,
                lengths=lengths("second_token_ids"),
            )
            texts.append(second.features)
        if self.method.has("contrastive"):
            encoded["text_features"] = torch.stack(texts, dim=1)
        if batch.neighbor_features is not None:
            encoded["neighbor_features"] = batch.neighbor_features
        elif batch.neighbor_token_ids is not None:
            ids = batch.neighbor_token_ids
            with torch.no_grad():
                near = forward_text_by_length(
                    self.clip, ids, rows_per_group=group, lengths=lengths("neighbor_token_ids")
                )
            encoded["neighbor_features"] = near.features
        return encoded

    def terms(
        self, encoded: Mapping[str, Tensor], batch: Batch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms and metrics of a whole local batch from what :meth:`encode` made of it.

        Returns:
            Terms: scalars by name, this process's share (their mean over processes counts).
            Metrics: scalars by name, to be averaged over processes as well; then
            :func:`finish_metrics` makes them readable.
        """
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        images, texts = self._unit_views(encoded)
        if images:
            terms |= self._pair_terms(images, texts)
        if self.method.has("simsiam"):
            with self._autocast(batch):
                first, second = encoded["image_features"].unbind(1)
                (z1, p1), (z2, p2) = self._declip.project(first), self._declip.project(second)
            terms["simsiam"] = losses.simsiam(p1, z2, p2, z1)
        if self.method.has("simclr"):
            head = cast(SimCLRHead, self.heads["simclr"])
            with self._autocast(batch):
                one, other = (head(view) for view in encoded["image_pooled"].unbind(1))
            terms["simclr"] = losses.nt_xent(one, other, self.settings.simclr_temperature)
        if self.method.has("masked_language_modeling"):
            assert batch.targets is not None
            assert batch.mask_positions is not None
            with self._autocast(batch):
                terms["masked_language_modeling"] = losses.masked_language_modeling(
                    encoded["masked_states"],
                    batch.targets[batch.mask_positions],
                    self._declip.mlm_head,
                )
        if self.method.has("neighbor"):
            terms["neighbor"], metrics = self._neighbor_term(images, texts, encoded, batch)
        if self.method.has("tokenwise"):
            terms["tokenwise"] = tokenwise_info_nce(
                encoded["image_tokens"],
                encoded["text_tokens"],
                self.clip.caption_mask(batch.token_ids),
                _exact(self._tokens.logit_scale).exp(),
                image_fraction=self.settings.image_token_fraction,
                text_fraction=self.settings.text_token_fraction,
                kernel=self.settings.tokenwise_kernel,
            )
        return terms, metrics

    def _unit_views(self, encoded: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Views of images and texts in unit length, at least in float32: a cosine in bfloat16 has
        two digits."""

        def unit(features: Tensor) -> list[Tensor]:
            exact = features if features.dtype == torch.float64 else features.float()
            return [F.normalize(view, dim=-1) for view in exact.unbind(1)]

        if "image_features" not in encoded:
            return [], []
        return unit(encoded["image_features"]), unit(encoded["text_features"])

    def _pair_terms(self, images: list[Tensor], texts: list[Tensor]) -> dict[str, Tensor]:
        scale = _exact(self.clip.logit_scale).exp()
        smoothing = self.settings.label_smoothing
        beta = self.settings.hard_negative_beta
        if self.method.has("multi_view"):
            pairs = losses.multi_view_info_nce(
                images[0],
                images[1],
                texts[0],
                texts[1],
                scale,
                label_smoothing=smoothing,
                hard_negative_beta=beta,
            )
            return {"contrastive": pairs.contrastive, "multi_view": pairs.multi_view}
        if self.clip.logit_bias is not None:
            bias = _exact(self.clip.logit_bias)
            return {"contrastive": losses.sigmoid_loss(images[0], texts[0], scale, bias)}
        value = losses.info_nce(
            images[0], texts[0], scale, label_smoothing=smoothing, hard_negative_beta=beta
        )
        return {"contrastive": value}

    def _neighbor_term(
        self,
        images: list[Tensor],
        texts: list[Tensor],
        encoded: Mapping[str, Tensor],
        batch: Batch,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L_NNS and what the log says of neighbors, for either source."""
        scale = _exact(self.clip.logit_scale).exp()
        if self.bank is None:
            assert batch.has_neighbor is not None
            assert batch.neighbor_caption_ids is not None
            near = F.normalize(_exact(encoded["neighbor_features"]), dim=-1)
            found = BankNeighbors(
                features=near,
                similarity=(texts[0].detach() * near).sum(-1),
                found=batch.has_neighbor,
                caption_ids=batch.neighbor_caption_ids,
            )
            looked_up = [found]
        else:
            # Both texts ask before either is stored (method: DeCLIP's queue).
            looked_up = [self.bank.lookup(text.detach(), batch.sample_ids) for text in texts]
            self._to_store = [
                (text.detach(), batch.sample_ids, batch.caption_ids) for text in reversed(texts)
            ]
        value = losses.neighbor_info_nce(
            images, [near.features for near in looked_up], scale, [near.found for near in looked_up]
        )
        metrics = neighbor_metrics(
            batch.caption_ids.repeat(len(looked_up)),
            torch.cat([near.caption_ids for near in looked_up]),
            torch.cat([near.found for near in looked_up]),
            torch.cat([near.similarity for near in looked_up]),
        )
        return value, metrics

    @torch.no_grad()
    def after_step(self) -> None:
        """Store the step's text features in the bank: once a step, after its loss was found to be
        finite."""
        if self.bank is not None:
            for features, sample_ids, caption_ids in self._to_store:
                self.bank.store(features, sample_ids, caption_ids)
        self._to_store = []


def _exact(value: Tensor) -> Tensor:
    """At least float32."""
    return value if value.dtype == torch.float64 else value.float()


def finish_metrics(means: Mapping[str, float]) -> dict[str, float]:
    """Metrics as the log has them, from their means over processes.

    ``neighbor_found``: share of samples with a neighbor; ``neighbor_differs``: share of those whose
    neighbor has another caption; ``neighbor_similarity``: mean cosine of their own text feature
    with the neighbor's. Where no sample has a neighbor, only the first is there.
    """
    found = means.get("neighbor_found")
    if found is None:
        return dict(means)
    if found == 0:
        return {"neighbor_found": 0.0}
    return {n: v if n == "neighbor_found" else v / found for n, v in means.items()}
