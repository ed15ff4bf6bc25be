"""A step that went wrong computed again, to see where a number first is not finite.

What :mod:`declip_train.batch_record` kept is enough: batch, generators, settings and weights. Each
process's share is encoded by itself, with its own generators, and the losses meet as they did in
training; so one process on a CPU sees what several on GPUs saw, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_train.batch import Batch
from declip_train.batch_record import BatchRecord
from declip_train.grad_cache import encode_parts, term_gradients
from declip_train.methods import method_terms
from declip_train.module import TrainModule
from declip_train.precision import exact_batch_norm
from declip_train.tokenizer import PAD_ID
from declip_train.watching import parameter_not_finite, rows_not_finite

__all__ = ["Replay", "join_batches", "replay_step"]

_CPU = torch.device("cpu")
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TOKENS = ("token_ids", "second_token_ids", "neighbor_token_ids")
_BY_TOKEN = (*_TOKENS, "replaced", "mask_positions", "targets")
"""Fields of a batch with a column a token."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What computing a step again showed; the first of these that is there is where it began."""

    step: int
    terms: Mapping[str, float]
    """The loss terms, and their weighted sum as ``total``."""
    bad_parameter: str | None
    """First weight that was not finite before anything was computed."""
    bad_inputs: Sequence[tuple[int, str]]
    """Samples whose own pixels or stored features are not finite: process and key."""
    first_layer: str | None
    """First layer that made numbers which are not finite out of ones that are."""
    layer_share: int | None
    """Process whose share that was."""
    bad_samples: Sequence[tuple[int, str]]
    """Samples whose features are not finite: process and key."""
    bad_terms: Sequence[str]
    """Terms that are not finite."""
    bad_gradient: str | None
    """First parameter, from the input on, whose gradient is not finite though all terms are."""
    gradient_samples: Sequence[tuple[int, str]]
    """Samples at whose features the loss's gradient is not finite."""

    @property
    def is_finite(self) -> bool:
        """Whether nothing went wrong this time."""
        return not (self.bad_parameter or self.bad_terms or self.bad_gradient)


class _Finder:
    """Notes the first layer whose output is not finite."""

    def __init__(self) -> None:
        self.first: tuple[str, int] | None = None
        self.share = 0

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        """Look at every layer of ``module``; inner layers are through before outer ones."""
        handles = [
            layer.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, layer in module.named_modules()
            if name
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def look(_layer: nn.Module, _inputs: Any, _named: Any, output: Any) -> None:
            if self.first is None and not all(_is_finite(t) for t in _tensors(output)):
                self.first = name, self.share

        return look


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def join_batches(batches: Sequence[Batch], pad_id: int = PAD_ID) -> Batch:
    """The global batch from its shares in the order of processes; the inverse of dealing it out.

    Rows of tokens are filled up to the longest of all.
    """
    first, joined = batches[0], dict[str, Any]()
    for name, value in vars(first).items():
        if not isinstance(value, Tensor):
            continue
        values = [getattr(batch, name) for batch in batches]
        if name in _BY_TOKEN:
            longest = max(v.shape[1] for v in values)
            filler = pad_id if name in (*_TOKENS, "targets") else 0
            values = [F.pad(v, (0, longest - v.shape[1]), value=filler) for v in values]
        joined[name] = torch.cat(values, dim=int(name == "images"))
    lengths = {n: torch.cat([batch.lengths[n] for batch in batches]) for n in first.lengths}
    return replace(first, lengths=lengths, **joined)


def _join_features(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `TrainModule.encode` gives, of all shares; token features are as long as the longest
    share's captions."""
    joined: dict[str, Tensor] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name == "text_tokens":
            longest = max(v.shape[1] for v in values)
            values = [F.pad(v, (0, 0, 0, longest - v.shape[1])) for v in values]
        joined[name] = torch.cat(values)
    return joined


def _build(record: BatchRecord, weights: Mapping[str, Tensor]) -> TrainModule:
    module = TrainModule(record.settings)
    dtype = _HALF.get(record.settings.precision)
    if dtype is not None:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        exact_batch_norm(module)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise DeclipError(
            f"the weights do not fit the batch's settings "
            f"({str(error).splitlines()[-1].strip()}); name a checkpoint of the same run."
        ) from error
    return module.train()


def replay_step(records: Sequence[BatchRecord], weights: Mapping[str, Tensor]) -> Replay:
    """Compute a step again on the CPU, and its gradient where all terms are finite.

    Args:
        records: the shares of all processes, in their order.
        weights: of `TrainModule`, before the step.

    Raises:
        DeclipError: the weights are of another model.
    """
    first = records[0]
    module = _build(first, weights)
    parts = first.settings.accumulation_steps
    pad_id = int(getattr(module.clip.make_tokenizer(), "pad_id", PAD_ID))
    shares = [record.batch.to(_CPU) for record in records]
    finder = _Finder()
    encoded, bad_samples = [], []
    with finder.watch(module):
        for finder.share, (record, share) in enumerate(zip(records, shares, strict=True)):
            record.generators.put_back(_CPU)
            features = encode_parts(module, share, parts).features
            encoded.append(features)
            bad_samples += [
                (record.rank, record.keys[row]) for row in rows_not_finite(features, share)
            ]
        batch = join_batches(shares, pad_id)
        finder.share = -1
        with torch.no_grad():
            terms, _ = module.terms(_join_features(encoded), batch)
    factors = dict(method_terms(first.settings.method, first.settings.weighting))
    total = torch.stack([factors[name] * term.float() for name, term in terms.items()]).sum()
    values = {name: float(term) for name, term in {**terms, "total": total}.items()}
    bad_terms = [name for name, term in terms.items() if not _is_finite(term)]
    bad_gradient, gradient_samples = None, list[tuple[int, str]]()
    if not bad_terms:
        bad_gradient, rows = _gradient(module, batch, factors, len(records) * parts)
        owners = [(record.rank, key) for record in records for key in record.keys]
        gradient_samples = [owners[row] for row in rows]
    layer, layer_share = finder.first or (None, -1)
    return Replay(
        step=first.step,
        terms=values,
        bad_parameter=parameter_not_finite(module),
        bad_inputs=[
            (record.rank, record.keys[row])
            for record, share in zip(records, shares, strict=True)
            for row in _bad_inputs(share)
        ],
        first_layer=layer,
        layer_share=layer_share if layer_share >= 0 else None,
        bad_samples=bad_samples,
        bad_terms=bad_terms,
        bad_gradient=bad_gradient,
        gradient_samples=gradient_samples,
    )


def _bad_inputs(share: Batch) -> list[int]:
    wrong = ~torch.isfinite(share.images).transpose(0, 1).flatten(1).all(1)
    if share.neighbor_features is not None:
        wrong |= ~torch.isfinite(share.neighbor_features).all(1)
    rows: list[int] = wrong.nonzero()[:, 0].tolist()
    return rows


def _gradient(
    module: TrainModule, batch: Batch, factors: Mapping[str, float], parts: int
) -> tuple[str | None, list[int]]:
    """First parameter whose gradient is not finite, and the rows at whose features it is not."""
    encoded = encode_parts(module, batch, parts)
    terms, _ = module.terms(encoded.features, batch)
    total = torch.stack([factors[name] * term for name, term in terms.items()]).sum()
    gradients = term_gradients(total, encoded, module)
    rows = rows_not_finite(gradients.features, batch)
    for surrogate in gradients.surrogates(module):
        surrogate.backward()  # type: ignore[no-untyped-call]
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not _is_finite(parameter.grad):
            return name, rows
    return None, rows
