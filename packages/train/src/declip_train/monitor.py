"""What a run says about itself: JSON lines, TensorBoard files, and one line on the screen.

    train/log.jsonl                                 one record every ``log_every_steps``
    train/tensorboard/events.out.tfevents.declip    the same numbers as scalars

A run that continues cuts both back to the step it continues from, so a step stands in them once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from declip_shards.store import atomic_write

LOG = "log.jsonl"
EVENTS = "tensorboard/events.out.tfevents.declip"
SECONDS_BETWEEN_LINES = 10.0
"""Of progress where there is no terminal."""


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
            f.seek(max(0, f.tell() - 8192))
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


def _events(record: Mapping[str, Any]) -> bytes:
    """A log record as TensorBoard's event: every number but the step's own."""
    values = [
        Summary.Value(tag=f"train/{name}", simple_value=value)
        for name, value in record.items()
        if name not in ("step", "num_steps", "time") and isinstance(value, int | float)
    ]
    event = Event(wall_time=record["time"], step=record["step"], summary=Summary(value=values))
    serialized: bytes = event.SerializeToString()
    return serialized


class Monitor:
    """Records of one run; only process 0 makes one.

    Args:
        folder: the run's folder.
        num_steps: steps of the whole run.
        start_step: steps done before; later records of an earlier attempt are cut off.
        every: steps between records.
        show: whether to show progress on standard error.
    """

    def __init__(
        self, folder: Path, *, num_steps: int, start_step: int, every: int, show: bool
    ) -> None:
        self.num_steps, self.every, self.show = num_steps, every, show
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
        self, step: int, numbers: Mapping[str, float | str], wait_seconds: float, batch: int
    ) -> None:
        """Take note of one step.

        Args:
            step: steps done, this one included.
            numbers: loss terms, logit scale, learning rate, epoch; texts (which neighbor table)
                are for the log alone.
            wait_seconds: total time that the trainer waited for data so far.
            batch: samples a step.
        """
        self._bar.update(1)
        if step % self.every and step != self.num_steps:
            return
        now = time.monotonic()
        marked_step, marked_time, marked_wait = self._mark
        seconds = max(now - marked_time, 1e-9)
        record = {
            "step": step,
            "num_steps": self.num_steps,
            "time": time.time(),
            "samples_seen": step * batch,
            **numbers,
            "samples_per_second": (step - marked_step) * batch / seconds,
            "data_wait": min(1.0, (wait_seconds - marked_wait) / seconds),
        }
        self._mark = (step, now, wait_seconds)
        self._log.write(json.dumps(record).encode() + b"\n")
        self._log.flush()
        self._events.write(_events(record))
        self._sink.flush()
        self._bar.set_postfix_str(summary_line(record))
        if self.show and self._bar.disable and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(f"train {step}/{self.num_steps} {summary_line(record)}", file=sys.stderr)

    def close(self) -> None:
        """Finish the files."""
        self._bar.close()
        self._log.close()
        self._events.close()


def summary_line(record: Mapping[str, Any]) -> str:
    """A record in half a line: loss, logit scale, rate, wait."""
    return (
        f"loss {record['total']:.3f}, scale {record['logit_scale']:.1f}, "
        f"{record['samples_per_second']:.0f} samples/s, {record['data_wait']:.0%} waiting for data"
    )
