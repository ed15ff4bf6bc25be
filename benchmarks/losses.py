"""Time and peak memory of the contrastive losses, forward and backward, ours against others'.

    python benchmarks/losses.py --threads 2 --json benchmarks/results/losses-cpu.json
    python benchmarks/losses.py --device cuda --dtype bfloat16 --rounds 1 --max-batch 65536

InfoNCE and the sigmoid loss at growing batch against open_clip's, then the token-wise loss
(losses_tokenwise.py). Every measurement has a process of its own, so none finds memory that another
left. On a CPU the peak is the growth of the resident set, on a GPU that of the allocated memory;
gradients count, features do not. Rounds of all implementations take turns, and the fastest time
counts, so that a neighbor on the machine does not decide; `cpu_seconds`, of all threads, says how
much work it was where a neighbor did all the same. Prints one JSON line a measurement and a
table. `speed` is the other's time over ours, `memory` ours over the other's.
"""

import argparse
import importlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from declip_train import losses
from peers import import_open_clip

if TYPE_CHECKING:
    from benchmarks import forked, losses_tokenwise, surroundings
else:
    # The script's folder is on the path, the repository's root is not.
    import forked
    import losses_tokenwise
    import surroundings

OURS = "ours"
OPEN_CLIP = "open_clip"
LOSSES = ("info_nce", "sigmoid")
DIM = 512
WARM_UP_ROWS = 64
LOGIT_SCALE, LOGIT_BIAS = 1 / 0.07, -10.0


def loss_function(loss: str, implementation: str) -> Callable[..., Tensor]:
    """The loss as a function of image features, text features, logit scale and, for the sigmoid
    loss, logit bias."""
    if implementation == OURS:
        return losses.info_nce if loss == "info_nce" else losses.sigmoid_loss
    import_open_clip()
    theirs = importlib.import_module("open_clip.loss")
    module: torch.nn.Module = theirs.ClipLoss() if loss == "info_nce" else theirs.SigLipLoss()
    return module


def resident_megabytes(field: str) -> float:
    """Memory of this process: VmRSS now, VmHWM at its highest since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux.")


def forget_peak() -> None:
    """Linux: let VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_here(given: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in this process."""
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    on_gpu = device.type == "cuda"
    if given.threads:
        torch.set_num_threads(given.threads)
    function = loss_function(given.loss, given.implementation)
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(given.batch, DIM, generator=generator), dim=-1)
        .to(device, dtype)
        .requires_grad_()
        for _ in range(2)
    )
    # Parameters, as in training.
    scalars = [
        torch.tensor(value, device=device, requires_grad=True)
        for value in (LOGIT_SCALE, LOGIT_BIAS)[: 1 if given.loss == "info_nce" else 2]
    ]
    few = [each.detach()[:WARM_UP_ROWS].clone().requires_grad_() for each in (images, texts)]
    function(*few, *scalars).backward()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start_megabytes = torch.cuda.memory_allocated() / 2**20
    else:
        forget_peak()
        start_megabytes = resident_megabytes("VmRSS")
    seconds, cpu_seconds, value = [], [], torch.zeros(())
    for _ in range(given.repeats):
        images.grad = texts.grad = None
        start, cpu_start = time.perf_counter(), time.process_time()
        value = function(images, texts, *scalars)
        value.backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident_megabytes("VmHWM")
    return {
        "loss": given.loss,
        "implementation": given.implementation,
        "batch": given.batch,
        "seconds": round(min(seconds), 5),
        "cpu_seconds": round(min(cpu_seconds), 5),
        "peak_megabytes": round(peak - start_megabytes, 1),
        "value": round(value.item(), 6),
    }


def measure_apart(given: argparse.Namespace, **what: object) -> dict[str, Any]:
    """One measurement in a process of its own."""
    options = {
        "device": given.device,
        "dtype": given.dtype,
        "threads": given.threads,
        "repeats": given.repeats,
        **what,
    }
    if given.device == "cuda":
        return forked.call(measure_here, argparse.Namespace(**options))
    command = [sys.executable, __file__, "--here"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(run.stdout)
    return row


def contrastive_rows(given: argparse.Namespace) -> list[dict[str, Any]]:
    """InfoNCE and the sigmoid loss from 1,024 rows on, twice as many each time."""
    rows: list[dict[str, Any]] = []
    if given.device == "cuda":
        import_open_clip()  # Once, and not in every forked process.
    for loss in given.losses:
        batch = given.min_batch
        while batch <= given.max_batch:
            best: dict[str, dict[str, Any]] = {}
            for _ in range(given.rounds):
                for implementation in (OURS, OPEN_CLIP):
                    row = measure_apart(
                        given, loss=loss, implementation=implementation, batch=batch
                    )
                    earlier = best.setdefault(implementation, row)
                    for name in ("seconds", "cpu_seconds"):
                        earlier[name] = min(earlier[name], row[name])
                    earlier["peak_megabytes"] = max(
                        earlier["peak_megabytes"], row["peak_megabytes"]
                    )
            for row in best.values():
                print(json.dumps(row), flush=True)
            rows += best.values()
            batch *= 2
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows, each other implementation with its ratios to ours at the same batch."""
    ours = {(row["loss"], row["batch"]): row for row in rows if row["implementation"] == OURS}
    lines = [
        f"{'loss':<12} {'batch':>7} {'implementation':<28} {'seconds':>9} {'MB':>9} "
        f"{'speed':>7} {'memory':>7}"
    ]
    for row in rows:
        base = ours.get((row["loss"], row["batch"]))
        ratios = f"{'':>7} {'':>7}"
        if base is not None and base is not row:
            memory = base["peak_megabytes"] / max(row["peak_megabytes"], 0.1)
            ratios = f"{row['seconds'] / base['seconds']:>7.2f} {memory:>7.3f}"
        lines.append(
            f"{row['loss']:<12} {row['batch']:>7} {row['implementation']:<28} "
            f"{row['seconds']:>9.4f} {row['peak_megabytes']:>9.1f} {ratios}"
        )
    return "\n".join(lines)


def environment(given: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        **surroundings.describe(["torch", "triton", "open_clip_torch"]),
        "device": torch.cuda.get_device_name() if given.device == "cuda" else platform.machine(),
        "threads": given.threads or torch.get_num_threads(),
        "dtype": given.dtype,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; 0: torch's default")
    parser.add_argument("--losses", nargs="*", default=LOSSES, choices=LOSSES)
    parser.add_argument("--min-batch", type=int, default=1024)
    parser.add_argument("--max-batch", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3, help="times a process runs the loss")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each measurement")
    parser.add_argument("--no-tokenwise", action="store_true", help="leave out FILIP's loss")
    parser.add_argument("--json", type=Path, help="write environment and rows to this file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--loss", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--implementation", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parse()
    if given.here:
        print(json.dumps(measure_here(given)))
        return
    rows = contrastive_rows(given)
    if not given.no_tokenwise:
        for row in losses_tokenwise.rows(given.device, given.threads):
            print(json.dumps(row), flush=True)
            rows.append(row)
    print(table(rows))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(
            json.dumps({"environment": environment(given), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
