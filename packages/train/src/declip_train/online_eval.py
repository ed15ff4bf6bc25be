"""Zero-shot classification while training goes on, shared by all processes.

The classes' prompts and the pictures are dealt out: each process encodes its own, and two small
reductions bring them together. Nothing that training reads is touched: weights take no gradient,
batch norms keep their statistics, and torch's generators are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_train.augment import IMAGE_MEAN, IMAGE_STD, eval_view
from declip_train.batch_record import GeneratorStates
from declip_train.evaluation_set import Picture, read_evaluation_set
from declip_train.heads import TokenHeads
from declip_train.module import TrainModule, forward_text_by_length
from declip_train.settings import TrainSettings
from declip_train.tokenwise import tokenwise_similarity

__all__ = ["OnlineEvaluation"]

_PROMPTS_AT_ONCE = 512
_ROWS_PER_GROUP = 64
_TIE = 1e-6
"""Scores closer than this are ties, and a tie counts as wrong, as in `declip_eval`."""


def _check(settings: TrainSettings) -> None:
    if (settings.evaluate_every_steps is None) != (settings.evaluate_data is None):
        given, missing = "evaluate_every_steps", "evaluate_data"
        if settings.evaluate_every_steps is None:
            given, missing = missing, given
        raise DeclipError(
            f"{given} is {getattr(settings, given)!r}, but {missing} is not set; give both, or "
            "neither."
        )


class OnlineEvaluation:
    """Zero-shot accuracy of the model as it is, on the pictures of ``evaluate_data``.

    Args:
        settings: of the run.
        num_steps: of the whole run; the last is evaluated, too.
        device: where the model is.
        num_threads: threads of this process that decode pictures.
        say: takes one line for the person who watches.

    Raises:
        DeclipError: see :func:`read_evaluation_set`.
    """

    def __init__(
        self,
        settings: TrainSettings,
        *,
        num_steps: int,
        device: torch.device,
        num_threads: int,
        say: Callable[[str], None],
    ) -> None:
        _check(settings)
        self.settings, self.num_steps, self.device = settings, num_steps, device
        self.num_threads, self.say = num_threads, say
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data = read_evaluation_set(settings.evaluate_data or "")
        self.num_unreadable = 0
        """Pictures of this process's share that could not be decoded at the last evaluation."""
        # Features alone are kept, so a batch of training fits all the more.
        self.batch_size = max(1, min(256, settings.local_batch_size))

    @classmethod
    def of_run(
        cls,
        settings: TrainSettings,
        *,
        num_steps: int,
        device: torch.device,
        num_threads: int,
        say: Callable[[str], None],
    ) -> OnlineEvaluation | None:
        """None where the run asks for no evaluation.

        Raises:
            DeclipError: see :func:`read_evaluation_set`; or half of the settings are given.
        """
        _check(settings)
        if settings.evaluate_every_steps is None:
            return None
        return cls(settings, num_steps=num_steps, device=device, num_threads=num_threads, say=say)

    def is_due(self, step: int) -> bool:
        """Whether the model after ``step`` steps is evaluated."""
        every = self.settings.evaluate_every_steps
        return every is not None and (step % every == 0 or step == self.num_steps)

    def run(self, module: TrainModule) -> dict[str, float]:
        """Evaluate; a collective operation, with the same result on every process.

        Returns:
            ``zeroshot_top1`` and, from 5 classes on, ``zeroshot_top5``: shares of all pictures. One
            that cannot be decoded counts as wrong.
        """
        states = GeneratorStates.take(self.device)
        try:
            with torch.no_grad(), _evaluating(module):
                hits = self._hits(module)
        finally:
            states.put_back(self.device)
        dist.all_reduce(hits)
        top1, top5, unreadable = hits.tolist()
        number = len(self.data.pictures)
        if unreadable and self.rank == 0 and not self.num_unreadable:
            self.say(
                f"{unreadable:.0f} of {number} pictures of evaluate_data cannot be decoded and "
                "count as wrong"
            )
        self.num_unreadable = int(unreadable)
        found = {"zeroshot_top1": top1 / number}
        if len(self.data.class_names) >= 5:
            found["zeroshot_top5"] = top5 / number
        return found

    def _hits(self, module: TrainModule) -> Tensor:
        """(3,) float64: this process's pictures right at rank 1, within 5, and not readable."""
        compare = (
            self._by_features(module)
            if module.method.has("contrastive")
            else self._by_tokens(module)
        )
        hits = torch.zeros(3, dtype=torch.float64, device=self.device)
        own = self.data.pictures[self.rank :: self.world_size]
        with ThreadPoolExecutor(self.num_threads, "evaluate") as threads:
            for start in range(0, len(own), self.batch_size):
                some = own[start : start + self.batch_size]
                views = list(threads.map(self._view, some))
                good = [row for row, view in enumerate(views) if view is not None]
                hits[2] += len(some) - len(good)
                if not good:
                    continue
                pixels = torch.from_numpy(np.stack([view for view in views if view is not None]))
                labels = torch.tensor([some[row].label for row in good], device=self.device)
                ranks = _ranks(compare(_normalized(pixels.to(self.device))).double(), labels)
                hits[0] += (ranks < 1).sum()
                hits[1] += (ranks < 5).sum()
        return hits

    def _view(self, picture: Picture) -> NDArray[np.uint8] | None:
        """A picture as evaluation sees it; None where it cannot be read or decoded."""
        try:
            return eval_view(picture.read(), self.settings.model_config.vision.image_size)
        except (DeclipError, OSError):
            return None

    def _autocast(self) -> torch.autocast:
        on = self.settings.precision == "amp_bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def _tokens(self, module: TrainModule, labels: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
        """Token ids of the classes' prompts, as many at a time as are encoded at once, and of how
        many classes they are."""
        tokenizer = module.clip.make_tokenizer()
        classes = max(1, _PROMPTS_AT_ONCE // len(self.data.templates))
        for start in range(0, len(labels), classes):
            some = labels[start : start + classes]
            prompts = [prompt for label in some for prompt in self.data.prompts(label)]
            ids = torch.from_numpy(tokenizer(prompts, trim=True))
            yield ids.to(self.device), len(some)

    def _by_features(self, module: TrainModule) -> Callable[[Tensor], Tensor]:
        """Cosines of images with the classes' mean prompts (Radford et al. 2021, section 3.1.4)."""
        number = len(self.data.class_names)
        own = range(self.rank, number, self.world_size)
        weights = torch.zeros(number, module.clip.config.embed_dim, device=self.device)
        found = []
        for ids, classes in self._tokens(module, own):
            with self._autocast():
                texts = forward_text_by_length(module.clip, ids, rows_per_group=_ROWS_PER_GROUP)
            unit = F.normalize(texts.features.float(), dim=-1)
            found.append(F.normalize(unit.view(classes, -1, unit.shape[1]).mean(1), dim=-1))
        if found:
            weights[torch.tensor(own, device=self.device)] = torch.cat(found)
        dist.all_reduce(weights)

        def compare(images: Tensor) -> Tensor:
            with self._autocast():
                features = module.clip.encode_image(images)
            return F.normalize(features.float(), dim=-1) @ weights.T

        return compare

    def _by_tokens(self, module: TrainModule) -> Callable[[Tensor], Tensor]:
        """FILIP's similarities: token by token, and averaged over a class's prompts (arXiv
        2111.07783). Every process needs the tokens of all prompts, and encodes them itself."""
        heads = module.heads["tokens"]
        assert isinstance(heads, TokenHeads)
        parts = []
        for ids, classes in self._tokens(module, range(len(self.data.class_names))):
            with self._autocast():
                hidden = module.clip.forward_text(ids, need_hidden=True).hidden
                assert hidden is not None
                tokens = heads.project_text(hidden)
            mask = module.clip.caption_mask(ids)[:, : hidden.shape[1]]
            parts.append((tokens.float(), mask, classes))

        def compare(images: Tensor) -> Tensor:
            with self._autocast():
                patches = module.clip.forward_image(images, need_tokens=True).tokens
                assert patches is not None
                projected = heads.project_image(patches).float()
            columns = [
                tokenwise_similarity(projected, tokens, mask)[0]
                .view(len(images), classes, -1)
                .mean(2)
                for tokens, mask, classes in parts
            ]
            return torch.cat(columns, dim=1)

        return compare


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Every layer in evaluation mode, and as it was afterwards."""
    before = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, training in before:
            layer.training = training


def _normalized(pixels: Tensor) -> Tensor:
    """(n, size, size, 3) uint8 -> float32 (n, 3, size, size), ready for the image tower."""
    planes = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(value, device=pixels.device) for value in (IMAGE_MEAN, IMAGE_STD))
    return planes.div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])


def _ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many other classes are at least as near as the right one; (n, classes) -> (n,)."""
    own = scores.gather(1, labels[:, None])
    return (scores >= own - _TIE).sum(1) - 1
