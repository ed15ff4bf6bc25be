"""A whole training step (forward, backward, AdamW), ours and open_clip's in the same run.

    python benchmarks/step.py                                        # ViT-B/32 on the CPU, batch 16
    python benchmarks/step.py --device cuda --batch 1024 --precision amp_bf16 --compile

Both train the same towers from the same weights on the same pixels and captions, at the same batch
and precision, without loader and without DeepSpeed: what the arithmetic costs. open_clip runs its
own model, loss, parameter groups and AdamW as its trainer builds them (captions padded to 77
tokens); ours is the trainer's own module. Captions are as long as web captions are: `--tokens` on
average, start and end token included. Steps alternate between the implementations, so that a busy
machine disturbs all of them; the least time of each counts.

A sample's FLOPs are counted for the captions as they are, three times the forward pass, so that
padding counts as time and not as work. The utilization is against a plain matrix product's speed,
measured in the same run.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from declip_train.compiling import compile_towers
from declip_train.flops import step_flops
from declip_train.loader import Batch
from declip_train.methods import METHODS, method_terms
from declip_train.module import TrainModule
from declip_train.optimizer import parameter_groups
from declip_train.settings import TrainSettings
from declip_train.tokenizer import mask_tokens
from peers import import_open_clip

START, END, CONTEXT = 49406, 49407, 77


def captions(num: int, mean_tokens: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """(num, 77) token ids: start, words, end, zeros. Lengths are geometric-like: most captions are
    short, a few fill the context."""
    lengths = np.clip(np.rint(generator.gamma(4.0, mean_tokens / 4.0, num)), 3, CONTEXT)
    ids = np.zeros((num, CONTEXT), dtype=np.int64)
    for row, length in zip(ids, lengths.astype(int), strict=True):
        row[0], row[length - 1] = START, END
        row[1 : length - 1] = generator.integers(1, 49000, length - 2)
    return ids


def trimmed(ids: NDArray[np.int64]) -> Tensor:
    """As the loader gives them: cut to the batch's longest."""
    return torch.from_numpy(np.ascontiguousarray(ids[:, : int(ids.argmax(axis=1).max()) + 1]))


def make_batch(settings: TrainSettings, ids: NDArray[np.int64], images: Tensor) -> Batch:
    """A batch as the loader gives it.

    Args:
        settings: the method.
        ids: (n, 77) captions; every text view and neighbor is as long.
        images: (n, 3, size, size); every view shows them.
    """
    method, num = settings.method_parts, len(ids)
    rows = torch.arange(num)
    views = images.expand(method.num_views, *images.shape).contiguous()
    shared: dict[str, Any] = {"step": 0, "epoch": 0, "images": views}
    shared |= {"sample_ids": rows, "caption_ids": rows}
    if not method.has("multi_view"):
        return Batch(token_ids=trimmed(ids), **shared)
    generator = np.random.default_rng(1)
    masked = mask_tokens(ids, settings.mask_probability, generator)
    length = trimmed(ids).shape[1]
    shared |= {n: torch.from_numpy(a[:, :length].copy()) for n, a in masked._asdict().items()}
    return Batch(
        second_token_ids=trimmed(ids),
        neighbor_token_ids=trimmed(ids[::-1]),
        has_neighbor=torch.ones(num, dtype=torch.bool),
        neighbor_caption_ids=rows.flip(0),
        **shared,
    )


@dataclass(kw_only=True)
class Candidate:
    """One implementation."""

    name: str
    step: Callable[[], float]
    """Does one step; returns its loss."""
    flops: float
    """Of a step's useful arithmetic."""
    seconds: float = float("inf")
    first_loss: float = float("nan")


def open_clip_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """open_clip's: no decay for what has fewer than two dimensions or is of a norm."""

    def is_exempt(name: str, parameter: Tensor) -> bool:
        return parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit"))

    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if is_exempt(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not is_exempt(n, p)], "weight_decay": 0.2},
    ]


def open_clip_candidate(
    model: torch.nn.Module,
    images: Tensor,
    ids: Tensor,
    *,
    name: str,
    flops: float,
    precision: str,
    fused: bool,
    compiled: bool,
) -> Candidate:
    """open_clip's own step."""
    loss_of = import_open_clip().ClipLoss()
    run: Any = torch.compile(model) if compiled else model
    options = {"fused": True} if fused else {}
    groups = open_clip_groups(model)
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, **options)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "amp_bf16"):
            image_features, text_features, scale = run(images, ids)[:3]
            loss = loss_of(image_features, text_features, scale)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Candidate(name=name, step=step, flops=flops)


def our_candidate(
    settings: TrainSettings,
    ids: NDArray[np.int64],
    images: Tensor,
    weights_of: torch.nn.Module,
) -> Candidate:
    """Our own step."""
    module = TrainModule(settings)
    module.clip.load_state_dict(weights_of.state_dict())
    module.to(images.device)
    if settings.compile:
        compile_towers(module.clip)
    batch = make_batch(settings, ids, images.cpu()).to(images.device)
    weights = dict(method_terms(settings.method, settings.weighting))
    optimizer = torch.optim.AdamW(
        parameter_groups(module, settings.weight_decay), lr=1e-5, fused=True
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        terms, _ = module(batch)
        loss = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    mean_length = float((ids.argmax(axis=1) + 1).mean())
    flops = step_flops(settings, mean_length)
    return Candidate(name=f"ours, {settings.method}", step=step, flops=flops)


def matrix_speed(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of a large matrix product."""
    dtype = torch.bfloat16 if precision == "amp_bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 1536
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        wait(device)
        start = time.perf_counter()
        a @ a
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def wait(device: torch.device) -> None:
    """For what was asked of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(candidates: list[Candidate], device: torch.device, rounds: int) -> None:
    """Least seconds of each, in alternating steps after one (on a GPU three) to warm up."""
    for number in range(rounds + (3 if device.type == "cuda" else 1)):
        for each in candidates:
            wait(device)
            start = time.perf_counter()
            loss = each.step()
            wait(device)
            seconds = time.perf_counter() - start
            if number == 0:
                each.first_loss = loss
            elif number >= (3 if device.type == "cuda" else 1):
                each.seconds = min(each.seconds, seconds)


def build(given: argparse.Namespace) -> list[Candidate]:
    """All candidates on the same weights and data."""
    device, generator = torch.device(given.device), np.random.default_rng(0)
    plain = TrainSettings(
        model=given.model,
        method="clip",
        global_batch_size=given.batch,
        precision=given.precision,
        bank_size=max(65_536, 2 * given.batch),
        compile=given.compile,
    )
    config = plain.model_config
    size = config.vision.image_size
    images = torch.randn(given.batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = captions(given.batch, given.tokens, generator)
    open_clip = import_open_clip()
    torch.manual_seed(0)
    base = open_clip.CLIP(**config.to_open_clip())
    flops = step_flops(plain, float((ids.argmax(axis=1) + 1).mean()))
    candidates = []
    kinds = [("open_clip", False, False), ("open_clip, fused AdamW", True, False)]
    if given.compile:
        kinds.append(("open_clip, compiled, fused AdamW", True, True))
    for name, fused, compiled in kinds:
        model = open_clip.CLIP(**config.to_open_clip())
        model.load_state_dict(base.state_dict())
        candidates.append(
            open_clip_candidate(
                model.to(device),
                images.to(device),
                torch.from_numpy(ids).to(device),
                name=name,
                flops=flops,
                precision=given.precision,
                fused=fused,
                compiled=compiled,
            )
        )
    for method in given.methods:
        values = {**vars(plain), "method": method}
        candidates.append(our_candidate(TrainSettings(**values), ids, images.to(device), base))
    return candidates


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=16, help="samples a step")
    parser.add_argument("--tokens", type=float, default=20.0, help="mean length of a caption")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "amp_bf16"))
    parser.add_argument("--methods", nargs="+", default=["clip", "declip"], choices=list(METHODS))
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each that are timed")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    given = parser.parse_args()
    candidates = build(given)
    device = torch.device(given.device)
    measure(candidates, device, given.rounds)
    peak = matrix_speed(device, given.precision)
    peer, first = candidates[0], next(c for c in candidates if c.name.startswith("ours"))
    rows = []
    print(
        f"{given.model}, batch {given.batch}, {given.precision}, {given.device}, "
        f"{torch.get_num_threads()} threads; matrix product {peak / 1e9:,.0f} GFLOP/s"
    )
    print(f"{'':<34}{'samples/s':>10}{'of open_clip':>14}{'cost/clip':>11}{'FLOP use':>10}")
    for each in candidates:
        row = {
            "name": each.name,
            "samples_per_second": given.batch / each.seconds,
            "over_open_clip": peer.seconds / each.seconds,
            "cost_over_our_clip": each.seconds / first.seconds,
            "flop_utilization": each.flops / each.seconds / peak,
            "first_loss": each.first_loss,
        }
        rows.append(row)
        print(
            f"{each.name:<34}{row['samples_per_second']:>10.2f}{row['over_open_clip']:>14.2f}"
            f"{row['cost_over_our_clip']:>11.2f}{row['flop_utilization']:>10.1%}"
        )
    if first.name == "ours, clip":
        print(f"first loss, ours - open_clip's: {first.first_loss - peer.first_loss:+.1e}")
    if given.json:
        options = {name: str(value) for name, value in vars(given).items()}
        given.json.write_text(json.dumps({"options": options, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
