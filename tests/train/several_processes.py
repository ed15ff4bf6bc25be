"""Processes that work together, forked from one server which has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable

import torch
from torch.multiprocessing.spawn import start_processes

# Once for all tests that one pytest process runs. What is imported is what a process of the trainer
# has imported by the end of its first step; the last is how DeepSpeed's ZeRO comes by the compiler.
PRELOADED = [
    "torch",
    "deepspeed",
    "declip_train.engine",
    "declip_train.loop",
    "declip_train.losses",
    "deepspeed.runtime.zero.muon.original_muon",
]
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def run_processes(worker: Callable[..., None], processes: int, *arguments: str) -> None:
    """Call ``worker(process, processes, *arguments)`` in so many processes, and wait for them.

    The worker must be of a module that another process can import.
    """
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    multiprocessing.set_forkserver_preload(PRELOADED)
    try:
        start_processes(
            _enter,
            args=(worker, processes, *arguments),
            nprocs=processes,
            start_method="forkserver",
        )
    finally:
        os.environ.clear()
        os.environ.update(before)


def _enter(process: int, worker: Callable[..., None], processes: int, *arguments: str) -> None:
    # A forked process has the server's environment, and not that of the test.
    os.environ.update(ENVIRONMENT)
    # DeepSpeed's launcher would say so, and DeepSpeed asks for it.
    os.environ["LOCAL_RANK"] = str(process)
    torch.set_num_threads(1)
    worker(process, processes, *arguments)
