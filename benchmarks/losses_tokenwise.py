"""Time and peak memory of FILIP's token-wise loss, forward and backward, ours against others'.

    python benchmarks/losses_tokenwise.py --threads 1
    python benchmarks/losses_tokenwise.py --device cuda --json benchmarks/results/tokenwise.json

49 image tokens against 77 text tokens of 256 entries: once with all 77 real, the worst case for us
("filip 77"), once with captions of 6 to 21 tokens padded to 77 ("filip short"). Others: the plain
computation in torch, which holds the product of all tokens; x-clip's; on a GPU also flash-maxsim
and late-interaction-kernels, called once for each direction; each where it can be imported. The
plain one and x-clip's are left out where their product would not fit. x-clip normalizes tokens
again, and its softmax of image-to-text similarities runs over images: another value, equal work.

Float32 on a CPU, bfloat16 tokens on a GPU. Every measurement has a process of its own, so none
finds memory that another left. On a CPU the peak is the growth of the resident set, on a GPU that
of the allocated memory; gradients count, tokens do not. The fastest of the runs counts.
"""

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_train.tokenwise import Kernel, tokenwise_info_nce

if TYPE_CHECKING:
    from benchmarks import forked
else:
    # The script's folder is on the path, the repository's root is not.
    import forked

PATCHES, LENGTH, DIM = 49, 77, 256
SHORT = (6, 21)
BATCHES = {"cpu": (64, 128, 256), "cuda": (64, 128, 256, 1024, 4096)}
LARGEST_OF_OTHERS = {"plain": 1024, "x-clip": 1024}
"""Batches from which their product of all tokens, held several times, would be too large."""
LOSSES = ("filip 77", "filip short")
LOGIT_SCALE = 1 / 0.07


class Case(NamedTuple):
    """What a loss is given."""

    images: Tensor
    texts: Tensor
    mask: Tensor
    scale: Tensor


def make_case(loss: str, batch: int, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    images, texts = (
        F.normalize(torch.randn(batch, size, DIM, generator=generator), dim=-1)
        .to(device, dtype)
        .requires_grad_()
        for size in (PATCHES, LENGTH)
    )
    lengths = torch.full((batch,), LENGTH)
    if loss == "filip short":
        lengths = torch.randint(SHORT[0], SHORT[1] + 1, (batch,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).to(device)
    scale = torch.tensor(LOGIT_SCALE, device=device, requires_grad=True)
    return Case(images, texts, mask, scale)


def symmetric(to_text: Tensor, to_image: Tensor, scale: Tensor) -> Tensor:
    """The loss from image-to-text (B, B) and text-to-image (B, B) similarities."""
    matches = torch.arange(to_text.shape[0], device=to_text.device)
    per_image = F.cross_entropy(scale * to_text, matches)
    return (per_image + F.cross_entropy(scale * to_image, matches)) / 2


def plain(case: Case) -> Tensor:
    """As lean as plain torch gets: one product for both directions, masked in place, and maxima
    that keep their indices and not the product."""
    product = torch.einsum("ipd,jld->ijpl", case.images, case.texts)
    lowest = torch.finfo(product.dtype).min
    product = product.masked_fill_(~case.mask[None, :, None, :], lowest)
    to_text = product.max(dim=3).values.float().mean(dim=2)
    best = product.max(dim=2).values.float().masked_fill(~case.mask, 0)
    to_image = best.sum(dim=2) / case.mask.sum(dim=1)
    return symmetric(to_text, to_image.T, case.scale)


def ours(kernel: Kernel) -> Callable[[Case], Tensor]:
    def loss(case: Case) -> Tensor:
        return tokenwise_info_nce(case.images, case.texts, case.mask, case.scale, kernel=kernel)

    return loss


def import_x_clip() -> Any:
    """x-clip itself; its import needs torchvision, for which the tests' stand-in serves."""
    if importlib.util.find_spec("torchvision") is None:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "train"))
        import torchvision_stand_in

        torchvision_stand_in.install()
    return importlib.import_module("x_clip")


class Given(nn.Module):
    """An encoder that returns the tokens it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.zeros(())

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.tokens


def x_clip_loss() -> Callable[[Case], Tensor]:
    """x-clip's own module around tokens that are already there, its projections the identity."""
    image_encoder, text_encoder = Given(), Given()
    model = import_x_clip().CLIP(
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        dim_image=DIM,
        dim_text=DIM,
        dim_latent=DIM,
        use_all_token_embeds=True,
        visual_has_cls_token=False,
        text_has_cls_token=False,
    )
    model.to_text_latent = model.to_visual_latent = nn.Identity()

    def loss(case: Case) -> Tensor:
        model.to(case.images.device)
        model.temperature = nn.Parameter(case.scale.detach().log())
        image_encoder.tokens, text_encoder.tokens = case.images, case.texts
        # Its mask is where the ids are not padding, which is 0.
        value: Tensor = model(case.mask.long(), case.images[:, :1, :1], return_loss=True)
        return value

    return loss


def flash_maxsim_loss() -> Callable[[Case], Tensor]:
    score = importlib.import_module("flash_maxsim").flash_maxsim_batched_train

    def loss(case: Case) -> Tensor:
        lengths = case.mask.sum(dim=1).int()
        to_text = score(case.images, case.texts, doc_lengths=lengths)
        to_image = score(case.texts, case.images, query_lengths=lengths)
        return symmetric(to_text / PATCHES, to_image / lengths[:, None], case.scale)

    return loss


def late_interaction_loss() -> Callable[[Case], Tensor]:
    maxsim = importlib.import_module("late_interaction_kernels").maxsim

    def loss(case: Case) -> Tensor:
        to_text = maxsim(case.images, case.texts, d_mask=case.mask, backward="unified")
        to_image = maxsim(case.texts, case.images, q_mask=case.mask, backward="unified")
        lengths = case.mask.sum(dim=1, keepdim=True)
        return symmetric(to_text / PATCHES, to_image / lengths, case.scale)

    return loss


IMPLEMENTATIONS: dict[str, Callable[[], Callable[[Case], Tensor]]] = {
    "ours": lambda: ours("blocked"),
    "ours (triton)": lambda: ours("triton"),
    "plain": lambda: plain,
    "x-clip": x_clip_loss,
    "flash-maxsim": flash_maxsim_loss,
    "late-interaction-kernels": late_interaction_loss,
}
PACKAGES = {
    "ours (triton)": "triton",
    "x-clip": "x_clip",
    "flash-maxsim": "flash_maxsim",
    "late-interaction-kernels": "late_interaction_kernels",
}
FOR_CUDA = ("ours (triton)", "flash-maxsim", "late-interaction-kernels")


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
    on_gpu = given.device == "cuda"
    if given.threads:
        torch.set_num_threads(given.threads)
    function = IMPLEMENTATIONS[given.implementation]()
    function(make_case(given.loss, 8, given.device)).backward()
    case = make_case(given.loss, given.batch, given.device)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start_megabytes = torch.cuda.memory_allocated() / 2**20
    else:
        forget_peak()
        start_megabytes = resident_megabytes("VmRSS")
    seconds, value = [], torch.zeros(())
    for _ in range(given.repeats):
        case.images.grad = case.texts.grad = None
        start = time.perf_counter()
        value = function(case)
        value.backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident_megabytes("VmHWM")
    return {
        "loss": given.loss,
        "implementation": given.implementation,
        "batch": given.batch,
        "seconds": round(min(seconds), 5),
        "peak_megabytes": round(peak - start_megabytes, 1),
        "value": round(value.item(), 6),
    }


def candidates(device: str, batch: int) -> list[str]:
    """Implementations that can be imported, run on the device and fit."""
    return [
        name
        for name in IMPLEMENTATIONS
        if (device == "cuda" or name not in FOR_CUDA)
        and (name not in PACKAGES or importlib.util.find_spec(PACKAGES[name]) is not None)
        and batch <= LARGEST_OF_OTHERS.get(name, batch)
    ]


def rows(
    device: str, threads: int, repeats: int = 3, batches: tuple[int, ...] | None = None
) -> list[dict[str, Any]]:
    """All measurements, each in a process of its own; one that fails is a line on stderr.

    Args:
        device: "cpu" or "cuda".
        threads: of a CPU; 0: torch's default.
        repeats: times each runs.
        batches: rows of the batch; None: `BATCHES`.
    """
    found = []
    for loss in LOSSES:
        for batch in batches or BATCHES[device]:
            for name in candidates(device, batch):
                options = {"device": device, "loss": loss, "implementation": name}
                options |= {"batch": str(batch), "threads": str(threads), "repeats": str(repeats)}
                row = _measure_apart(options)
                if row is None:
                    print(f"{name}, {loss}, batch {batch}: failed", file=sys.stderr)
                else:
                    found.append(row)
    return found


def _measure_apart(options: dict[str, str]) -> dict[str, Any] | None:
    """One measurement in a process of its own; None where it fails."""
    words = ["--here"]
    for option, value in options.items():
        words += [f"--{option}", value]
    if options["device"] == "cuda":
        try:
            return forked.call(measure_here, build_parser().parse_args(words))
        except RuntimeError:
            return None
    run = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        return None
    row: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return row


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; 0: torch's default")
    parser.add_argument("--repeats", type=int, default=3, help="times a process runs the loss")
    parser.add_argument("--batches", type=int, nargs="*", help="default: by the device")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--loss", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    given = build_parser().parse_args()
    if given.here:
        print(json.dumps(measure_here(given)))
        return
    found = rows(given.device, given.threads, given.repeats, tuple(given.batches or ()) or None)
    for row in found:
        print(json.dumps(row))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
