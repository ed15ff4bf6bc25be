"""DeepSpeed in the test's own process: a process group of one, and put back what it changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def one_process(folder: Path) -> Iterator[ModuleType]:
    """The trainer's engine in a process group of one; DeepSpeed's operator is built if it never
    was."""
    import torch.distributed as dist

    before = dict(os.environ)
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    import deepspeed
    from deepspeed.utils import groups

    from declip_train import engine, extension

    extension.use_prebuilt()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
    extension.release_shared_memory()
    try:
        yield engine
    finally:
        dist.destroy_process_group()
        # DeepSpeed remembers the group, and the next file brings another.
        deepspeed.comm.comm.cdb = None
        groups._WORLD_GROUP = None
        os.environ.clear()
        os.environ.update(before)
