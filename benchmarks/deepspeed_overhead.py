"""One training step under plain DDP and under DeepSpeed's ZeRO stages 0, 1 and 2, in one run.

    python benchmarks/deepspeed_overhead.py --model ViT-Ti-8-48 --batch 64 --ranks 2
    python benchmarks/deepspeed_overhead.py --device cuda --ranks 1 --model ViT-B-32 --batch 1024

The same module, weights, batch and fused AdamW; ways take turns round by round, so what else the
machine does falls on all of them. Prints a JSON line for each way: samples/s (median round), ratio
to DDP (median of the rounds' ratios), and process 0's memory: on a GPU the peak of a step, on a CPU
the tensors that are alive between two steps (weights, kept gradients, optimizer state, buckets).
`--buckets` repeats ZeRO's stages at several bucket sizes; `--profile` shows the host's functions.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from declip_train.methods import METHODS, method_terms
from declip_train.settings import TrainSettings

START, END, CONTEXT = 49_406, 49_407, 77


def make_batch(settings: TrainSettings, rank: int) -> Any:
    """A batch as the loader gives it, of random content; captions of 4 to 20 tokens."""
    from declip_train.loader import Batch

    generator = torch.Generator().manual_seed(rank)
    rows, size = settings.local_batch_size, settings.model_config.vision.image_size

    def captions() -> torch.Tensor:
        ids = torch.randint(1, 49_000, (rows, CONTEXT), generator=generator)
        ends = torch.randint(4, 21, (rows, 1), generator=generator)
        places = torch.arange(CONTEXT)
        ids = torch.where(places < ends, ids, torch.zeros_like(ids))
        ids[:, 0] = START
        return ids.scatter_(1, ends, END)

    method = settings.method_parts
    first = captions()
    inner = (torch.arange(CONTEXT) > 0) & (torch.arange(CONTEXT) < first.argmax(1, keepdim=True))
    chosen = inner & (torch.rand(first.shape, generator=generator) < 0.15)
    ids = torch.arange(rows) + rank * rows
    masked: dict[str, Any] = {"replaced": chosen, "mask_positions": chosen, "targets": first}
    return Batch(
        step=0,
        epoch=0,
        images=torch.randn(method.num_views, rows, 3, size, size, generator=generator),
        token_ids=first,
        sample_ids=ids,
        caption_ids=ids,
        second_token_ids=captions() if method.has("multi_view") else None,
        neighbor_token_ids=captions() if method.has("neighbor") else None,
        has_neighbor=torch.ones(rows, dtype=torch.bool) if method.has("neighbor") else None,
        neighbor_caption_ids=ids + 1 if method.has("neighbor") else None,
        **(masked if method.has("masked_language_modeling") else {}),
    )


def ddp_step(settings: TrainSettings, device: torch.device) -> Callable[[Any], None]:
    """A step as one would write it with torch alone."""
    from declip_train.module import TrainModule
    from declip_train.optimizer import build_optimizer

    module = TrainModule(settings).to(device).train()
    optimizer = build_optimizer(module, settings)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    ids = [device.index] if device.type == "cuda" else None
    parallel = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
    weights = dict(method_terms(settings.method, settings.weighting))

    def step(batch: Any) -> None:
        terms, _ = parallel(batch)
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        # The trainer reads its losses every step; so must this one.
        total.item()

    return step


def engine_step(
    settings: TrainSettings, device: torch.device, bucket: int
) -> Callable[[Any], None]:
    """The trainer's own step."""
    from declip_train import engine

    plain = engine.deepspeed_config

    def with_buckets(settings: TrainSettings, world_size: int) -> dict[str, Any]:
        config = plain(settings, world_size)
        config["zero_optimization"]["reduce_bucket_size"] = bucket
        config["zero_optimization"]["allgather_bucket_size"] = bucket
        return config

    setattr(engine, "deepspeed_config", with_buckets)  # noqa: B010
    made = engine.TrainEngine(settings, 10_000)
    setattr(engine, "deepspeed_config", plain)  # noqa: B010
    return lambda batch: (made.train_step(batch), None)[1]


def held_bytes() -> int:
    """Bytes of all tensors that are alive in this process: weights, gradients that are kept,
    optimizer state and buckets; each storage once."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def measure(rank: int, given: argparse.Namespace, port: int) -> None:
    """One process's part of everything."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(given.ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(given.threads)
    import deepspeed

    from declip_train import extension

    cuda = given.device == "cuda"
    with contextlib.redirect_stdout(io.StringIO()):
        if not cuda:
            extension.use_prebuilt()
        deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
        if not cuda:
            extension.release_shared_memory()
    device = torch.device(given.device, rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    settings = TrainSettings(
        model=given.model,
        method=given.method,
        global_batch_size=given.batch,
        num_ranks=given.ranks,
        precision=given.precision,
        max_steps=10_000,
    )
    batch = make_batch(settings, rank).to(device)
    ways: dict[str, Callable[[Any], None]] = {}
    memory: dict[str, int] = {}
    for name, stage, bucket in given.ways:
        gc.collect()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        before = int(torch.cuda.memory_allocated(device)) if cuda else held_bytes()
        staged = dataclasses.replace(settings, zero_stage=max(stage, 0))
        with contextlib.redirect_stdout(io.StringIO()):
            ways[name] = (
                ddp_step(staged, device) if stage < 0 else engine_step(staged, device, bucket)
            )
        for _ in range(3):
            ways[name](batch)
        after = int(torch.cuda.max_memory_allocated(device)) if cuda else held_bytes()
        memory[name] = after - before
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, step in ways.items():
            dist.barrier()
            if cuda:
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            for _ in range(given.steps):
                step(batch)
            if cuda:
                torch.cuda.synchronize(device)
            times[name].append((time.perf_counter() - began) / given.steps)
    if rank == 0:
        report(given, times, memory)
        if given.profile:
            profile(ways, batch)
    dist.barrier()
    dist.destroy_process_group()


def report(
    given: argparse.Namespace, times: dict[str, list[float]], memory: dict[str, int]
) -> None:
    """One JSON line for each way."""
    medians = {name: statistics.median(found) for name, found in times.items()}
    shared = {
        name: getattr(given, name)
        for name in ("model", "method", "batch", "ranks", "device", "precision", "threads")
    }
    for (name, stage, bucket), seconds in zip(given.ways, medians.values(), strict=True):
        ratios = [one / other for one, other in zip(times["ddp"], times[name], strict=True)]
        line = {
            "way": name,
            **({} if stage < 0 else {"bucket_elements": bucket}),
            **shared,
            "samples_per_second": round(given.batch / seconds, 1),
            "ratio_to_ddp": round(statistics.median(ratios), 3),
            "megabytes": round(memory[name] / 1e6),
        }
        print(json.dumps(line), flush=True)


def profile(ways: dict[str, Callable[[Any], None]], batch: Any) -> None:
    """Where the host's time goes; one process only, since the others must take the same steps."""
    import cProfile
    import pstats

    for name, step in ways.items():
        found = cProfile.Profile()
        found.enable()
        for _ in range(10):
            step(batch)
        found.disable()
        print(f"--- {name}", file=sys.stderr)
        pstats.Stats(found, stream=sys.stderr).sort_stats("tottime").print_stats(15)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="ViT-Ti-8-48")
    parser.add_argument("--method", default="clip", choices=tuple(METHODS))
    parser.add_argument("--batch", type=int, default=64, help="samples a step, over all processes")
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "amp_bf16"))
    parser.add_argument("--steps", type=int, default=5, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bucket", type=int, default=50_000_000, help="elements of a bucket")
    parser.add_argument("--buckets", action="store_true", help="measure other bucket sizes, too")
    parser.add_argument("--profile", action="store_true", help="host profile (--ranks 1)")
    given = parser.parse_args()
    if given.profile and given.ranks != 1:
        parser.error("--profile needs --ranks 1")
    given.ways = [("ddp", -1, 0), *((f"zero{n}", n, given.bucket) for n in (0, 1, 2))]
    if given.buckets:
        sizes = (1_000_000, 5_000_000, 500_000_000)
        given.ways += [(f"zero{n}-{size}", n, size) for n in (1, 2) for size in sizes]
    return given


def main() -> None:
    given = parse()
    os.environ["DS_ACCELERATOR"] = given.device
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    start_processes(measure, args=(given, port), nprocs=given.ranks, start_method="spawn")


if __name__ == "__main__":
    main()
