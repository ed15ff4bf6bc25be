"""``declip doctor train``: say from a run's log what holds it back, and what to set.

Shares of time are of process 0's, weighted over the newest records of the log; the first record is
left out, whose time is that of compiling and of filling caches.
"""

import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from declip_shards import DeclipError, Store
from pipelines.arguments import ArgumentParser

NEWEST = 100
"""Records that are looked at."""
MAX_WAIT = 0.03
"""Share of waiting for data above which the loader holds training back."""
MAX_SAVE = 0.05
MAX_EVAL = 0.10
MAX_COMMUNICATION = 0.15
MAX_STEP = 0.15
LOW_UTILIZATION = {True: 0.35, False: 0.5}
"""FLOP utilization under which arithmetic is not what takes the time, on GPUs and on CPUs."""
SMALL_ON_GPU = 64
"""Samples a process and part, under which a GPU waits for its instructions."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that holds a run back."""

    what: str
    """What it is, with its figure."""
    share: float
    """Of the run's time, as far as it can be told; findings are ranked by it."""
    remedy: str
    """The settings to change."""


@dataclass(frozen=True, kw_only=True)
class TrainDiagnosis:
    """What the log of a run says about its speed."""

    step: int
    num_steps: int
    num_records: int
    """Records that were looked at."""
    samples_per_second: float
    flop_utilization: float | None
    time_shares: Mapping[str, float]
    loader_shares: Mapping[str, float]
    memory_gigabytes: float | None
    gpu_memory_gigabytes: float | None
    findings: Sequence[Finding]
    alarms: Sequence[str]
    """Of the whole log, oldest first."""


def diagnose_training(root: str) -> TrainDiagnosis:
    """Read a run's log and settings.

    Args:
        root: the dataset, or the folder of a run.

    Raises:
        DeclipError: there is no log, none that a run of this version wrote, or too short a one.
    """
    from declip_train.monitor import read_log

    folder = Store(root).local_path("train")
    records = read_log(folder)
    if not records:
        raise DeclipError(
            f"{str(folder)!r} holds no log of a training; give the folder that it trains in, and "
            "wait until it has written a record (log_every_steps)."
        )
    timed = [record for record in records if record.get("time_shares")]
    if len(timed) < 2:
        raise DeclipError(
            f"the log in {str(folder)!r} has {len(timed)} records of where time goes, but needs 2 "
            "(the first is of the start alone); let it train on, or lower log_every_steps."
        )
    counted = timed[-NEWEST - 1 :]
    newest = counted[1:]
    settings = _read_settings(folder)
    shares, loader = _mean(counted, "time_shares"), _mean(counted, "loader_shares")
    utilization = _median(newest, "flop_utilization")
    findings = [
        *_waiting(shares, loader, settings),
        *_saving(shares, settings),
        *_evaluating(shares, settings),
        *_communicating(shares, settings),
        *_updating(shares, settings),
        *_computing(shares, utilization, settings, "gpu_memory_gigabytes" in newest[-1]),
    ]
    last = records[-1]
    return TrainDiagnosis(
        step=last["step"],
        num_steps=last["num_steps"],
        num_records=len(newest),
        samples_per_second=statistics.median(r["samples_per_second"] for r in newest),
        flop_utilization=utilization,
        time_shares=shares,
        loader_shares=loader,
        memory_gigabytes=_median(newest, "memory_gigabytes"),
        gpu_memory_gigabytes=_median(newest, "gpu_memory_gigabytes"),
        findings=sorted(findings, key=lambda found: -found.share),
        alarms=[alarm for record in records for alarm in record.get("alarms", ())],
    )


def _read_settings(folder: Path) -> dict[str, Any]:
    """The run's settings with their defaults; the defaults alone where they cannot be read."""
    from declip_train.settings import TrainSettings

    values: dict[str, Any] = json.loads(TrainSettings().to_json())
    try:
        given = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return values
    return values | (given if isinstance(given, dict) else {})


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """Shares over all records but the first, each weighted by the time that it is of."""
    total: Counter[str] = Counter()
    whole = 0.0
    for before, record in pairwise(records):
        seconds = (record["step"] - before["step"]) / record["samples_per_second"]
        whole += seconds
        for part, share in record.get(name, {}).items():
            total[part] += share * seconds
    return {part: value / whole for part, value in total.items()}


def _median(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return statistics.median(values) if values else None


LOADER_REMEDIES = {
    "fetch": "have the shards on a local disk (cache, cache_gigabytes), or raise loader_threads",
    "decode": "raise loader_threads up to the cores there are, set decoder native, keep decoded "
    "pictures (decoded_cache_megabytes), or store the pictures smaller (256 pixels)",
    "augment": "change colors on the GPU (photometric device), or raise loader_threads",
    "tokens": "let captions be tokenized once (cache on a disk with room), or turn eda off",
    "neighbors": "read the neighbors' captions instead of their stored features "
    "(neighbor_feature caption)",
}
"""What to do when a part of the loader takes longest."""


def _waiting(
    shares: Mapping[str, float], loader: Mapping[str, float], settings: Mapping[str, Any]
) -> Iterator[Finding]:
    wait = shares.get("wait", 0.0)
    if wait <= MAX_WAIT:
        return
    busy = sum(loader.values())
    if not busy:
        yield Finding(
            what=f"{wait:.0%} of the time is waiting for data",
            share=wait,
            remedy="raise loader_threads and prefetch_batches",
        )
        return
    slowest = max(loader, key=lambda part: loader[part])
    most = f"{slowest} takes {loader[slowest] / busy:.0%} of the loader's work"
    remedy = LOADER_REMEDIES[slowest]
    if busy < 0.5:
        # Threads that are idle while training waits: batches come in bursts.
        most = f"the loader's threads are busy {busy:.0%} of the time; {most}"
        remedy = f"raise prefetch_batches ({settings['prefetch_batches']}), and {remedy}"
    yield Finding(
        what=f"{wait:.0%} of the time is waiting for data: {most}", share=wait, remedy=remedy
    )


def _saving(shares: Mapping[str, float], settings: Mapping[str, Any]) -> Iterator[Finding]:
    share = shares.get("save", 0.0)
    if share <= MAX_SAVE:
        return
    rare = (
        f"raise checkpoint_every_steps ({settings['checkpoint_every_steps']})"
        if settings["checkpoint_every_steps"]
        else f"raise checkpoint_every_seconds ({settings['checkpoint_every_seconds']:g})"
    )
    behind = "" if settings["async_save"] else ", or set async_save to write while training goes on"
    yield Finding(
        what=f"{share:.0%} of the time is writing checkpoints", share=share, remedy=rare + behind
    )


def _evaluating(shares: Mapping[str, float], settings: Mapping[str, Any]) -> Iterator[Finding]:
    share = shares.get("eval", 0.0)
    if share > MAX_EVAL:
        yield Finding(
            what=f"{share:.0%} of the time is zero-shot evaluation",
            share=share,
            remedy=f"raise evaluate_every_steps ({settings['evaluate_every_steps']}), or give "
            "evaluate_data fewer pictures",
        )


def _communicating(shares: Mapping[str, float], settings: Mapping[str, Any]) -> Iterator[Finding]:
    share = shares.get("communication", 0.0)
    if share <= MAX_COMMUNICATION or settings["num_ranks"] == 1:
        return
    remedies = [
        f"raise global_batch_size ({settings['global_batch_size']}) or accumulation_steps, so that "
        "gradients travel less often"
    ]
    if settings["zero_stage"]:
        remedies.append(
            f"set zero_stage 0 where memory allows (it is {settings['zero_stage']}, which sends "
            "the weights every step)"
        )
    remedies.append(
        "see that no process is slower than the others, for which they wait there: same cores, "
        "same disk"
    )
    yield Finding(
        what=f"{share:.0%} of the time is communication between {settings['num_ranks']} processes",
        share=share,
        remedy="; ".join(remedies),
    )


def _updating(shares: Mapping[str, float], settings: Mapping[str, Any]) -> Iterator[Finding]:
    share = shares.get("step", 0.0)
    if share <= MAX_STEP:
        return
    yield Finding(
        what=f"{share:.0%} of the time is the optimizer's step: the batch is small for the model",
        share=share,
        remedy=f"raise global_batch_size ({settings['global_batch_size']})"
        + (", or zero_stage to 1 to share the step" if _can_share(settings) else ""),
    )


def _can_share(settings: Mapping[str, Any]) -> bool:
    return bool(settings["num_ranks"] > 1 and settings["zero_stage"] == 0)


def _computing(
    shares: Mapping[str, float],
    utilization: float | None,
    settings: Mapping[str, Any],
    on_gpu: bool,
) -> Iterator[Finding]:
    """Low utilization of the time that is forward and backward."""
    share = shares.get("forward", 0.0) + shares.get("backward", 0.0)
    if utilization is None or share <= 0 or utilization / share >= LOW_UTILIZATION[on_gpu]:
        return
    rows = settings["global_batch_size"] // settings["num_ranks"] // settings["accumulation_steps"]
    remedies = []
    if on_gpu and settings["precision"] == "fp32":
        remedies.append("set precision amp_bf16")
    if on_gpu and rows < SMALL_ON_GPU:
        remedies.append(
            f"give a process more samples at once ({rows} now: raise global_batch_size, lower "
            "accumulation_steps)"
        )
    if settings["accumulation_steps"] > 1:
        remedies.append(
            f"lower accumulation_steps ({settings['accumulation_steps']}): the towers' forward "
            "pass is paid twice"
        )
    if settings["grad_checkpointing"]:
        remedies.append("turn grad_checkpointing off where memory allows")
    if on_gpu and not settings["compile"]:
        remedies.append("set compile")
    if not on_gpu:
        remedies.append(
            f"raise threads_per_rank ({settings['threads_per_rank']}) to the cores there are, "
            "divided by num_ranks"
        )
    yield Finding(
        what=f"forward and backward take {share:.0%} of the time and reach "
        f"{utilization / share:.0%} of what the device can do",
        share=share * (1 - utilization / share),
        remedy="; ".join(remedies) or "use a larger model or batch: this one fills no device",
    )


def diagnosis_text(found: TrainDiagnosis) -> str:
    """A diagnosis in lines: figures, then what holds the run back, the worst first."""
    lines = [
        f"step {found.step:,} of {found.num_steps:,}, {found.samples_per_second:,.0f} samples/s"
        + (
            f", FLOP utilization {found.flop_utilization:.1%}"
            if found.flop_utilization is not None
            else ""
        )
        + f" (of the last {found.num_records} records)",
        "time: " + _shares_text(found.time_shares),
        "loader's threads: " + (_shares_text(found.loader_shares) or "not known"),
    ]
    memory = {"process": found.memory_gigabytes, "GPU, at most": found.gpu_memory_gigabytes}
    told = [f"{name} {value:.2f} GB" for name, value in memory.items() if value is not None]
    if told:
        lines.append("memory: " + ", ".join(told))
    lines.append("")
    if not found.findings:
        lines.append("Nothing stands out: the time goes into the model's arithmetic.")
    for number, finding in enumerate(found.findings, 1):
        lines += [f"{number}. {finding.what}.", f"   To do: {finding.remedy}."]
    if found.alarms:
        lines += ["", f"{len(found.alarms)} alarms; the last:"]
        lines += [f"   {alarm}" for alarm in found.alarms[-5:]]
    return "\n".join(lines)


def _shares_text(shares: Mapping[str, float]) -> str:
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in ranked if share >= 0.005)


def build_parser() -> ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="declip doctor train",
        description="Say from the log of a training run what holds it back, and what to set.",
    )
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder of the dataset")
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 whatever is found: a diagnosis is no failure.

    Raises:
        DeclipError: a wrong option, or no log there.
    """
    given = build_parser().parse_args(argv)
    found = diagnose_training(given.out)
    if given.json:
        print(json.dumps(asdict(found), indent=2, sort_keys=True))
    else:
        print(diagnosis_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
