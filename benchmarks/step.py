"""Samples a second of a training step (forward, backward, AdamW), CLIP and DeCLIP, on one device.

    python benchmarks/step.py --model ViT-B-32 --batch 256 --device cuda --precision amp_bf16

The trainer's own module on synthetic pixels and captions of 4 to 20 tokens, without loader and
DeepSpeed: what the arithmetic costs. Prints one JSON line a method and DeCLIP's cost over CLIP's
(the paper's figure is 1.5).
"""

import argparse
import json
import time

import numpy as np
import torch
from numpy.typing import NDArray

from declip_train.engine import TrainModule, parameter_groups
from declip_train.loader import Batch
from declip_train.losses import method_terms
from declip_train.settings import TrainSettings
from declip_train.tokenizer import mask_tokens

START, END, CONTEXT = 49406, 49407, 77


def captions(num: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """(num, 77) token ids: start, words, end, zeros."""
    ids = np.zeros((num, CONTEXT), dtype=np.int64)
    for row, length in zip(ids, generator.integers(4, 21, num), strict=True):
        row[0], row[length] = START, END
        row[1:length] = generator.integers(1, 49000, length - 1)
    return ids


def make_batch(settings: TrainSettings) -> Batch:
    """A batch as the loader gives it, of random content."""
    generator = np.random.default_rng(0)
    size, num = settings.model_config.vision.image_size, settings.global_batch_size
    views = 1 if settings.method == "clip" else 2
    images = torch.randn(views, num, 3, size, size)
    if settings.method == "clip":
        plain = torch.from_numpy(captions(num, generator))
        return Batch(step=0, epoch=0, images=images, token_ids=plain)
    masked = mask_tokens(captions(num, generator), settings.mask_probability, generator)
    return Batch(
        step=0,
        epoch=0,
        images=images,
        token_ids=torch.from_numpy(masked.token_ids),
        replaced=torch.from_numpy(masked.replaced),
        mask_positions=torch.from_numpy(masked.mask_positions),
        targets=torch.from_numpy(masked.targets),
        second_token_ids=torch.from_numpy(captions(num, generator)),
        neighbor_token_ids=torch.from_numpy(captions(num, generator)),
        has_neighbor=torch.ones(num, dtype=torch.bool),
    )


def seconds_a_step(settings: TrainSettings, device: torch.device, num_steps: int) -> float:
    """Median of ``num_steps`` steps after three to warm up."""
    module = TrainModule(settings).to(device)
    batch = make_batch(settings).to(device)
    weights = dict(method_terms(settings.method, settings.weighting))
    optimizer = torch.optim.AdamW(
        parameter_groups(module, settings.weight_decay), lr=1e-5, fused=True
    )
    times = []
    for _ in range(num_steps + 3):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        terms = module(batch)
        loss = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[3:])[num_steps // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="ViT-Ti-8-48")
    parser.add_argument("--batch", type=int, default=128, help="samples a step")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "amp_bf16"))
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    given = parser.parse_args()
    seconds = {}
    for method in ("clip", "declip"):
        settings = TrainSettings(
            model=given.model,
            method=method,
            global_batch_size=given.batch,
            precision=given.precision,
        )
        seconds[method] = seconds_a_step(settings, torch.device(given.device), given.steps)
        rate = round(given.batch / seconds[method], 1)
        print(json.dumps({"method": method, **vars(given), "samples_per_second": rate}))
    print(f"declip / clip, cost of a sample: {seconds['declip'] / seconds['clip']:.2f}")


if __name__ == "__main__":
    main()
