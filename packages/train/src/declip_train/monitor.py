"""What a run says about itself: JSON lines, TensorBoard files, and one line on the screen.

    train/log.jsonl                                 one record every ``log_every_steps``
    train/tensorboard/events.out.tfevents.declip    the same numbers as scalars

A run that continues cuts both back to the step it continues from, so a step stands in them once.
Weights & Biases gets the same records where ``wandb`` names a project.
"""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from declip_shards import DeclipError
from declip_shards.store import atomic_write
from declip_train.alarms import Alarms
from declip_train.flops import device_peak, step_flops
from declip_train.loader_clock import PhaseClock
from declip_train.settings import TrainSettings

if TYPE_CHECKING:
    # Who reads a log need not load torch.
    import torch

    from declip_train.phases import PhaseTimes

LOG = "log.jsonl"
EVENTS = "tensorboard/events.out.tfevents.declip"
SECONDS_BETWEEN_LINES = 10.0
"""Of progress where there is no terminal."""


VOLATILE = (
    "time",
    "samples_per_second",
    "data_wait",
    "time_shares",
    "loader_shares",
    "flop_utilization",
    "memory_gigabytes",
    "gpu_memory_gigabytes",
    "alarms",
)
"""What of a record tells of the machine or of this attempt: equal runs may differ in it, and in
nothing else."""


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Records of a run's log in order; a torn last line counts as absent."""
    records: list[dict[str, Any]] = []
    try:
        lines = (folder / LOG).read_bytes().splitlines()
    except FileNotFoundError:
        return records
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def read_last_record(folder: Path) -> dict[str, Any] | None:
    """The newest whole record of a run's log; cheap however long the log is."""
    try:
        with (folder / LOG).open("rb") as f:
            f.seek(0, 2)
            f.seek(max(0, f.tell() - 65_536))
            lines = f.read().split(b"\n")
    except FileNotFoundError:
        return None
    for line in reversed(lines[:-1]):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        return record if isinstance(record, dict) else None
    return None


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of a record but the step's own; those of a group as ``group/name``."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            for part, number in _scalars(value):
                yield f"{name}/{part}", number
        elif name not in ("step", "num_steps", "time") and isinstance(value, int | float):
            yield name, value


def _events(record: Mapping[str, Any]) -> bytes:
    """A log record as TensorBoard's event."""
    values = [
        Summary.Value(tag=f"train/{name}", simple_value=value) for name, value in _scalars(record)
    ]
    event = Event(wall_time=record["time"], step=record["step"], summary=Summary(value=values))
    serialized: bytes = event.SerializeToString()
    return serialized


class _Project(Protocol):
    """What of a run of Weights & Biases is used here."""

    def log(self, data: dict[str, Any], step: int) -> None: ...

    def finish(self) -> None: ...


def require_wandb(settings: TrainSettings) -> None:
    """Say before training that what ``wandb`` asks for is not installed.

    Raises:
        DeclipError: it is not.
    """
    if settings.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise DeclipError(
            f"wandb is {settings.wandb!r}, but the package wandb is not installed; install the "
            "extra `wandb`, or leave the setting out: train/log.jsonl and TensorBoard's files "
            "hold the same numbers."
        )


def _open_project(settings: TrainSettings, folder: Path, run: str) -> _Project | None:
    """The run of this name in the project; it goes on where an earlier attempt ended."""
    if settings.wandb is None:
        return None
    require_wandb(settings)
    wandb: Any = importlib.import_module("wandb")
    config = json.loads(settings.to_json())
    project: _Project = wandb.init(
        project=settings.wandb, id=run or None, resume="allow", dir=str(folder), config=config
    )
    return project


@dataclass(frozen=True, kw_only=True)
class Meters:
    """What a record is told by beside the step's own numbers; all of one process."""

    phases: PhaseTimes | None = None
    clock: PhaseClock | None = None
    loader_threads: int = 1
    alarms: Alarms | None = None
    flops: Callable[[float], float] | None = None
    """FLOPs of a step, by the mean tokens of a caption."""
    peak: float = 0.0
    """FLOPs a second that all processes' devices could do; 0: not known."""
    device: torch.device | None = None

    @classmethod
    def of_run(
        cls,
        settings: TrainSettings,
        *,
        num_steps: int,
        device: torch.device,
        phases: PhaseTimes,
        clock: PhaseClock,
        loader_threads: int,
    ) -> Meters:
        """All of them; measures what the device can do, where that is not known."""
        return cls(
            phases=phases,
            clock=clock,
            loader_threads=loader_threads,
            alarms=Alarms(settings, num_steps),
            flops=lambda length: step_flops(settings, length),
            peak=settings.num_ranks * device_peak(device, settings.precision),
            device=device,
        )


class Monitor:
    """Records of one run; only process 0 makes one.

    Args:
        folder: the run's folder.
        num_steps: steps of the whole run.
        start_step: steps done before; later records of an earlier attempt are cut off.
        every: steps between records.
        show: whether to show progress on standard error.
        meters: what else the records say.
        settings: of the run, where ``wandb`` may name a project; None: it gets nothing.
        run: name of the run there.

    Raises:
        DeclipError: the package wandb is asked for and missing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_steps: int,
        start_step: int,
        every: int,
        show: bool,
        meters: Meters | None = None,
        settings: TrainSettings | None = None,
        run: str = "",
    ) -> None:
        self.num_steps, self.every, self.show = num_steps, every, show
        self.meters = meters or Meters()
        self._project = _open_project(settings, folder, run) if settings else None
        earlier = [r for r in read_log(folder) if r["step"] <= start_step]
        lines = b"".join(json.dumps(r).encode() + b"\n" for r in earlier)
        atomic_write(folder / LOG, lines)
        (folder / EVENTS).parent.mkdir(parents=True, exist_ok=True)
        self._log = (folder / LOG).open("ab")
        self._sink = (folder / EVENTS).open("wb")
        self._events = RecordWriter(self._sink)
        first = Event(wall_time=time.time(), file_version="brain.Event:2")
        self._events.write(first.SerializeToString())
        for record in earlier:
            self._events.write(_events(record))
        self._began = self._last_line = time.monotonic()
        self._mark = (start_step, self._began, 0.0)
        if self.meters.phases is not None:
            self.meters.phases.take()  # what came before is no part of the first record
        self._lengths: list[float] = []
        self._alarms: list[str] = []
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_steps,
            initial=start_step,
            unit="step",
            desc="train",
            disable=not (show and terminal),
            dynamic_ncols=True,
        )

    def step(
        self,
        step: int,
        numbers: Mapping[str, float | str],
        wait_seconds: float,
        batch: int,
        *,
        text_length: float | None = None,
        always: bool = False,
    ) -> None:
        """Take note of one step.

        Args:
            step: steps done, this one included.
            numbers: loss terms, logit scale, learning rate, epoch; texts (which neighbor table)
                are for the log alone.
            wait_seconds: total time that the trainer waited for data so far.
            batch: samples a step.
            text_length: mean tokens of the step's captions.
            always: write a record whatever the step, as for one that was evaluated.
        """
        self._bar.update(1)
        if text_length is not None:
            self._lengths.append(text_length)
        self._sound(step, numbers)
        if step % self.every and step != self.num_steps and not always:
            return
        now = time.monotonic()
        marked_step, marked_time, marked_wait = self._mark
        seconds = max(now - marked_time, 1e-9)
        steps = step - marked_step
        record = {
            "step": step,
            "num_steps": self.num_steps,
            "time": time.time(),
            "samples_seen": step * batch,
            **{name: _plain(value) for name, value in numbers.items()},
            "samples_per_second": steps * batch / seconds,
            "data_wait": min(1.0, (wait_seconds - marked_wait) / seconds),
            **self._measured(steps, seconds),
        }
        if self._alarms:
            record["alarms"] = self._alarms
        self._mark, self._lengths, self._alarms = (step, now, wait_seconds), [], []
        self._write(record)
        if self.show and self._bar.disable and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(f"train {step}/{self.num_steps} {summary_line(record)}", file=sys.stderr)

    def _sound(self, step: int, numbers: Mapping[str, float | str]) -> None:
        if self.meters.alarms is None:
            return
        for sentence in self.meters.alarms.check(step, numbers):
            self._alarms.append(sentence)
            if self.show:
                with tqdm.external_write_mode(file=sys.stderr):
                    print(f"train: alarm at {sentence}", file=sys.stderr, flush=True)

    def _measured(self, steps: int, seconds: float) -> dict[str, Any]:
        """What the meters say of the time since the last record."""
        meters, found = self.meters, dict[str, Any]()
        if meters.phases is not None:
            by_phase = meters.phases.take()
            # On a GPU the line of time ends where the device is, not where the host is.
            whole = sum(by_phase.values()) or 1.0
            found["time_shares"] = {name: value / whole for name, value in by_phase.items()}
        if meters.clock is not None:
            # Of all the time that the loader's threads had.
            room = seconds * meters.loader_threads
            busy = meters.clock.take()
            found["loader_shares"] = {name: value / room for name, value in busy.items()}
        if meters.flops is not None and meters.peak > 0 and self._lengths:
            length = sum(self._lengths) / len(self._lengths)
            found["flop_utilization"] = steps * meters.flops(length) / seconds / meters.peak
        if meters.device is not None:
            found["memory_gigabytes"] = resident_gigabytes()
            if meters.device.type == "cuda":
                import torch

                peak = torch.cuda.max_memory_allocated(meters.device)
                found["gpu_memory_gigabytes"] = peak / 1e9
                torch.cuda.reset_peak_memory_stats(meters.device)
        return found

    def _write(self, record: dict[str, Any]) -> None:
        self._log.write(json.dumps(record).encode() + b"\n")
        self._log.flush()
        self._events.write(_events(record))
        self._sink.flush()
        if self._project is not None:
            self._project.log(dict(_scalars(record)), step=record["step"])
        self._bar.set_postfix_str(summary_line(record))

    def close(self) -> None:
        """Finish the files."""
        self._bar.close()
        self._log.close()
        self._events.close()
        if self._project is not None:
            self._project.finish()


def _plain(value: float | str) -> float | str | None:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def resident_gigabytes() -> float:
    """Memory that this process holds, GB (10^9 bytes); its most so far where there is no
    ``/proc``."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e9
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / 1e9 if sys.platform == "darwin" else most * 1024 / 1e9


def summary_line(record: Mapping[str, Any]) -> str:
    """A record in half a line: loss, logit scale, rate, wait."""
    return (
        f"loss {record['total']:.3f}, scale {record['logit_scale']:.1f}, "
        f"{record['samples_per_second']:.0f} samples/s, {record['data_wait']:.0%} waiting for data"
    )
