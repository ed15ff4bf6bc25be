"""Processes of `test_resume.py`: the trainer's own loop, ended by SIGKILL where the test says."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.utils import groups

from declip_train import extension, loop
from declip_train.engine import TrainEngine
from declip_train.settings import read_settings
from declip_train.supervision import StopSwitch


def train(process: int, processes: int, config: str, kill_step: str, kill_process: str) -> None:
    """Train as the configuration says; ``kill_process`` dies when it is given batch ``kill_step``.

    Every process lists the samples of its batches, and process 0 what it was told.
    """
    settings = read_settings(config)
    root = Path(settings.root)
    own = TrainEngine.train_step

    def train_step(self: TrainEngine, batch: Any, **wishes: bool) -> Any:
        if (str(batch.step), str(process)) == (kill_step, kill_process):
            os.kill(os.getpid(), signal.SIGKILL)
        with (root / f"keys_{process}.jsonl").open("a") as file:
            file.write(json.dumps([batch.step, batch.sample_ids.tolist()]) + "\n")
        return own(self, batch, **wishes)

    setattr(TrainEngine, "train_step", train_step)  # noqa: B010
    extension.use_prebuilt()
    os.environ.update(LOCAL_RANK=str(process), RANK=str(process), WORLD_SIZE=str(processes))
    meeting = root / f"meeting_{os.getppid()}_{kill_step}_{processes}"
    with (root / f"said_{process}.txt").open("a") as said, contextlib.redirect_stderr(said):
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=process, world_size=processes
        )
        with contextlib.redirect_stdout(said):
            deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
            extension.release_shared_memory()
            assert loop.train(settings, StopSwitch(), show_progress=False)
    dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    groups._WORLD_GROUP = None
