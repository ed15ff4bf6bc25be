"""End a training at random moments, in every way that machines do; each time it must go on.

A tiny model trains in two processes through ``python -m declip_train``, over and over, and each
time it is ended: SIGKILL of one process, of the launcher, of all, of one while a checkpoint is
being written; SIGTERM; a process frozen by SIGSTOP; a bit flipped in the newest checkpoint before
it starts; a disk (a small tmpfs, which takes root) that fills up. After each:

* no process is left;
* the next start says which checkpoint it continues from, and that is the newest whole one;
* a step that is done again has the very loss that it had before.

    python benchmarks/train_kills.py --kills 30 --sigterms 50 --freezes 2 --flips 5 --fills 3

Prints a table and writes benchmarks/results/train-kills-cpu.json. On two cores a round takes about
ten seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from declip_shards import layout, sidecars
from declip_shards.fakes import write_fake_dataset
from declip_train.checkpoint_files import check_checkpoint, tags
from declip_train.settings import TrainSettings

if TYPE_CHECKING:
    from benchmarks import surroundings
else:
    import surroundings

RESULTS = Path(__file__).parent / "results" / "train-kills-cpu.json"
KILLS = ("a process", "the launcher", "all of them", "a process while saving")
TERMINATED, STALLED = 143, 75
END_SECONDS = 60.0
"""For all processes to be gone after a fault; longer is a failure."""
START_SECONDS = 240.0
"""For a start to reach its first step; longer is a failure."""
SETTINGS = TrainSettings(
    model="test",
    method="clip",
    global_batch_size=8,
    max_steps=100_000,
    warmup_steps=10,
    peak_lr=1e-4,
    num_ranks=2,
    zero_stage=1,
    checkpoint_every_steps=4,
    keep_checkpoints=3,
    log_every_steps=1,
    stall_seconds=10.0,
)


class WrongError(Exception):
    """What must hold after a fault does not."""


@dataclass
class Training:
    """One dataset, and the training that is started on it again and again."""

    root: Path
    losses: dict[int, float] = field(default_factory=dict)
    """Of every step that was ever done."""
    repeated: int = 0
    """Steps that were done again."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    def members(self) -> dict[int, list[str]]:
        """Living processes of this training by number, with their command lines."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(self.config) in words and state not in "ZX":
                found[int(entry.name)] = words
        return found

    def ranks(self) -> list[int]:
        """Numbers of the training processes, which the launcher has started."""
        return sorted(
            pid
            for pid, words in self.members().items()
            if any(word.startswith("--local_rank") for word in words)
            and not any("deepspeed.launcher" in word for word in words)
        )

    def records(self) -> list[dict[str, Any]]:
        try:
            lines = (self.root / "train" / "log.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:  # The last line of a process that was killed.
                continue
        return [record for record in found if "total" in record]

    def note_losses(self) -> int:
        """Compare the steps in the log with what they were before; returns the last one."""
        last = 0
        for record in self.records():
            step, loss = record["step"], record["total"]
            if step in self.losses and self.losses[step] != loss:
                raise WrongError(f"step {step} had the loss {self.losses[step]}, and now {loss}")
            self.losses[step] = loss
            last = step
        return last

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of those that are whole, newest first."""
        return [
            (step, path)
            for run in (self.root / "train" / "checkpoints").glob("*")
            for step, path in tags(run)
            if check_checkpoint(path, {}) is None
        ]

    def unfinished(self) -> list[Path]:
        return list((self.root / "train" / "checkpoints").glob("*/step_*.part-save"))

    def said(self) -> str:
        """What the launcher and the training processes have printed since the last start."""
        texts = [self.root / "said.txt", self.root / "train" / "launch.log"]
        return "\n".join(p.read_text(errors="replace") for p in texts if p.exists())

    def start(self) -> int:
        """Start, wait for the first new step; returns the step that it continued from."""
        newest = next((step for step, _ in self.checkpoints()), 0)
        seen = self.note_losses()
        (self.root / "train" / "launch.log").unlink(missing_ok=True)
        with (self.root / "said.txt").open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "declip_train", "--quiet", str(self.config)],
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "DS_ACCELERATOR": "cpu"},
            )
        began = time.time()
        self.wait_for(lambda: any(r["time"] > began for r in self.records()), START_SECONDS)
        told = re.search(r"continuing after step (\d+)", self.said())
        continued = int(told.group(1)) if told else 0
        if continued != newest:
            raise WrongError(f"it continued from {continued}, and {newest} is the newest whole one")
        self.repeated += max(0, seen - continued)
        return continued

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process is not None
            if self.process.poll() is not None and not condition():
                raise WrongError(f"it ended with {self.process.returncode}: {self.said()[-600:]}")
            if time.monotonic() > deadline:
                raise WrongError(f"nothing happened for {seconds:.0f} s: {self.said()[-600:]}")
            time.sleep(0.005)

    def wait_for_end(self, seconds: float = END_SECONDS) -> int:
        """Wait until no process is left; returns the launcher's exit status."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while self.process.poll() is None or self.members():
            if time.monotonic() > deadline:
                left = {pid: " ".join(words)[:120] for pid, words in self.members().items()}
                raise WrongError(f"processes are left after {seconds:.0f} s: {left}")
            time.sleep(0.02)
        return self.process.returncode

    def end(self) -> None:
        """Leave nothing behind when the benchmark itself ends."""
        for pid in self.members():
            send(pid, signal.SIGKILL)


@dataclass
class Row:
    """What happened under one kind of fault."""

    kind: str
    rounds: int = 0
    seconds: list[float] = field(default_factory=list)
    """From the fault until no process was left."""
    lost: list[int] = field(default_factory=list)
    """Steps that had been done and were done again."""
    statuses: Counter[int] = field(default_factory=Counter)
    """The launcher's exit statuses."""
    wrong: list[str] = field(default_factory=list)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "rounds": self.rounds,
            "continued": max(0, self.rounds - len(self.wrong)),
            "seconds_to_end_median": round(statistics.median(self.seconds or [0]), 2),
            "seconds_to_end_most": round(max(self.seconds, default=0), 2),
            "steps_done_again_most": max(self.lost, default=0),
            "exit_statuses": {str(k): n for k, n in sorted(self.statuses.items())},
            "wrong": self.wrong,
            "note": self.note,
        }


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def make(root: Path) -> Training:
    """A small dataset with everything selected, and the configuration."""
    store = write_fake_dataset(str(root), num_shards=2, samples_per_shard=24, image_size=32)
    for shard in layout.list_shards(store):
        keys = [
            r["key"] for r in sidecars.read_rows(store, layout.shard_parquet_path(shard), ["key"])
        ]
        columns = {"key": keys, "keep": [True] * len(keys), "reason": [""] * len(keys)}
        sidecars.write_table(store, layout.selection_path("default", shard), pa.table(columns))
    training = Training(root)
    training.config.write_bytes(replace(SETTINGS, root=str(root)).to_json())
    return training


def wait_some_steps(training: Training, draw: random.Random, continued: int) -> None:
    goal = continued + draw.randint(1, 9)
    training.wait_for(
        lambda: any(r["step"] >= goal for r in training.records()[-1:]), START_SECONDS
    )
    time.sleep(draw.uniform(0, 0.1))


def kill(training: Training, draw: random.Random, kind: str) -> None:
    assert training.process is not None
    if kind == "a process while saving":
        training.wait_for(lambda: bool(training.unfinished()), START_SECONDS)
        time.sleep(draw.uniform(0, 0.02))
    if kind == "the launcher":
        send(training.process.pid, signal.SIGKILL)
    elif kind == "all of them":
        for pid in training.members():
            send(pid, signal.SIGKILL)
    else:
        send(draw.choice(training.ranks()), signal.SIGKILL)


def terminate(training: Training, draw: random.Random, kind: str) -> None:
    assert training.process is not None
    send(training.process.pid, signal.SIGTERM)


def freeze(training: Training, draw: random.Random, kind: str) -> None:
    send(draw.choice(training.ranks()), signal.SIGSTOP)


def one_round(
    training: Training,
    draw: random.Random,
    row: Row,
    fault: Callable[[Training, random.Random, str], None],
    status: int | None = None,
) -> None:
    """Start, let it train, end it, look; ``status`` is what the launcher must end with."""
    row.rounds += 1
    try:
        seen = training.note_losses()
        continued = training.start()
        row.lost.append(max(0, seen - continued))
        wait_some_steps(training, draw, continued)
        began = time.monotonic()
        fault(training, draw, row.kind)
        found = training.wait_for_end()
        row.seconds.append(time.monotonic() - began)
        row.statuses[found] += 1
        training.note_losses()
        if status is not None and found != status:
            raise WrongError(f"it ended with {found}, not {status}: {training.said()[-600:]}")
        if status == STALLED and "process" not in training.said():
            raise WrongError("nobody named the frozen process")
    except WrongError as error:
        row.wrong.append(str(error))
        print(f"WRONG ({row.kind}): {error}", flush=True)
        training.end()
        training.wait_for_end()


def flip_a_bit(training: Training, draw: random.Random) -> str:
    """Change one bit of the newest checkpoint; returns the checkpoint's name."""
    _, folder = training.checkpoints()[0]
    path = draw.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data) * 8)
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    return folder.name


def flips(training: Training, draw: random.Random, count: int) -> Row:
    row = Row("a bit flipped in the newest checkpoint")
    for _ in range(count):
        if len(training.checkpoints()) < 2:
            between = Row(row.kind)
            one_round(training, draw, between, terminate)
            row.wrong += between.wrong
        name = flip_a_bit(training, draw)
        one_round(training, draw, row, terminate, TERMINATED)
        if f"checkpoint {name} is skipped" not in training.said():
            row.wrong.append(f"nobody was told that {name} was skipped")
    return row


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A file system of so many megabytes; False where none can be made."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
    made = (
        shutil.which("mount") is not None
        and not subprocess.run(command, capture_output=True, check=False).returncode
    )
    try:
        yield made
    finally:
        if made:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fills(root: Path, draw: random.Random, count: int) -> Row:
    """A disk that fills up under a training: it ends with a sentence, and goes on when there is
    room."""
    row = Row("a full disk")
    training = make(root)
    with small_disk(root / "train", 128) as made:
        if not made:
            row.note = "not run: mounting a tmpfs takes root"
            return row
        filler = root / "train" / "filler"
        try:
            for _ in range(count):
                one_round(training, draw, row, lambda *_: fill(training, filler), 1)
                needs = re.search(r"needs [^;]* bytes\), but [^;]* are free", training.said())
                if not needs and not row.wrong:
                    row.wrong.append(f"no sentence about the disk: {training.said()[-600:]}")
                if training.unfinished():
                    row.wrong.append("half a checkpoint is left")
                filler.unlink()
            after = Row(row.kind)
            one_round(training, draw, after, terminate, TERMINATED)
            row.wrong += after.wrong
        finally:
            training.end()
    return row


def fill(training: Training, filler: Path) -> None:
    """Leave room for less than a checkpoint."""
    training.wait_for(lambda: bool(training.checkpoints()), START_SECONDS)
    _, folder = training.checkpoints()[0]
    size = sum(path.stat().st_size for path in folder.iterdir())
    block = b"\0" * (64 << 10)
    # The training goes on and takes room, too: look before every block.
    with filler.open("wb", buffering=0) as file:
        while shutil.disk_usage(filler.parent).free > size // 2:
            try:
                file.write(block)
            except OSError:
                break


def run(arguments: argparse.Namespace, folder: Path) -> tuple[list[Row], Training]:
    draw = random.Random(arguments.seed)
    training = make(folder / "data")
    rows = {kind: Row(kind) for kind in KILLS}
    frozen, stopped = Row("a frozen process"), Row("SIGTERM")
    plan: list[tuple[Row, Any, int | None]] = [
        *((rows[KILLS[i % len(KILLS)]], kill, None) for i in range(arguments.kills)),
        *((stopped, terminate, TERMINATED) for _ in range(arguments.sigterms)),
        *((frozen, freeze, STALLED) for _ in range(arguments.freezes)),
    ]
    draw.shuffle(plan)
    try:
        for number, (row, fault, status) in enumerate(plan):
            one_round(training, draw, row, fault, status)
            print(f"{number + 1}/{len(plan)} {row.kind}: {row.to_json()}", flush=True)
        flipped = flips(training, draw, arguments.flips)
        # The last fault, too, must be followed by a good start.
        one_round(training, draw, stopped, terminate, TERMINATED)
    finally:
        training.end()
    full = fills(folder / "disk", draw, arguments.fills)
    return [*rows.values(), stopped, frozen, flipped, full], training


def table_text(rows: list[Row]) -> str:
    lines = [
        "| ended by | rounds | went on | s to the end, median / most | steps done again, most |"
    ]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        r = row.to_json()
        seconds = f"{r['seconds_to_end_median']} / {r['seconds_to_end_most']}"
        cells = [r["kind"], r["rounds"], r["continued"], seconds, r["steps_done_again_most"]]
        lines.append(f"| {' | '.join(map(str, cells))} | {row.note}".rstrip())
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--sigterms", type=int, default=50)
    parser.add_argument("--freezes", type=int, default=2)
    parser.add_argument("--flips", type=int, default=5)
    parser.add_argument("--fills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=None, help="random, and printed, if left out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = secrets.randbelow(1 << 31)
    print(f"seed {arguments.seed}", flush=True)
    # Asked to end, it leaves no training behind either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    folder = Path(tempfile.mkdtemp(prefix="tk"))
    rows, training = run(arguments, folder)
    is_good = not any(row.wrong for row in rows)
    content = {
        "surroundings": surroundings.describe(["torch", "deepspeed"]),
        "seed": arguments.seed,
        "steps": max(training.losses, default=0),
        "steps_done_again_with_equal_losses": training.repeated,
        "rows": [row.to_json() for row in rows],
    }
    print(table_text(rows))
    arguments.out.write_text(json.dumps(content, indent=2) + "\n")
    if is_good:
        shutil.rmtree(folder)
    else:
        print(f"what went wrong is kept in {folder}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
