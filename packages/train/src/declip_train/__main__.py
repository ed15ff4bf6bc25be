"""``deepspeed --num_gpus N --module declip_train CONFIG``: one training process.

Run as ``python -m declip_train CONFIG`` it starts that command itself, with everything set up.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import sys
from collections.abc import Sequence
from datetime import timedelta

from declip_shards import DeclipError
from declip_train.launch import launch, prepare_environment
from declip_train.settings import TrainSettings, read_settings
from declip_train.supervision import StopSwitch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
STOPPED = 143
"""Exit status of a run that was asked to stop: as of a process that SIGTERM ended."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="declip_train",
        description="Train a model as CONFIG says, from its newest checkpoint, and export it.",
        epilog="Several processes: deepspeed --num_gpus N --module declip_train CONFIG",
    )
    parser.add_argument("config", help="JSON file of settings; names as in TrainSettings")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def keep_freed_memory() -> None:
    """Let the C library keep what it frees: a step takes and gives back the same large blocks, and
    fresh ones cost a page fault for every 4 kB (7 % of a small model's step on CPUs).

    Only glibc has these settings; elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(_M_TOP_PAD, 64 << 20)


def _train_here(settings: TrainSettings, quiet: bool) -> int:
    """This process is one of several that train together."""
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size != settings.num_ranks:
        raise DeclipError(
            f"{world_size} processes were started, but the configuration says num_ranks "
            f"{settings.num_ranks}; make them equal (deepspeed --num_gpus N)."
        )
    stop = StopSwitch()
    stop.watch_ancestors()
    use_extension = prepare_environment(settings)
    # DeepSpeed reads the environment when it is imported, and announces itself at length.
    import deepspeed
    import torch

    from declip_train.extension import release_shared_memory, use_prebuilt
    from declip_train.loop import train

    torch.set_num_threads(settings.threads_per_rank)
    if use_extension:
        use_prebuilt()
        keep_freed_memory()
    with contextlib.redirect_stdout(sys.stderr):
        deepspeed.init_distributed(timeout=timedelta(minutes=10), verbose=False)
    if use_extension:
        release_shared_memory()
    stop.listen()
    try:
        return 0 if train(settings, stop, show_progress=not quiet) else STOPPED
    finally:
        torch.distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one process, or start all of them; returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        settings = read_settings(given.config)
        if "RANK" in os.environ:
            return _train_here(settings, given.quiet)
        launch(given.config, settings)
        return 0
    except DeclipError as error:
        print(f"declip_train: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
