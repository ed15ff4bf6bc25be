"""``deepspeed --num_gpus N --module declip_train CONFIG``: one training process.

Run as ``python -m declip_train CONFIG`` it starts that command itself, with everything set up. Exit
statuses: :mod:`declip_train.supervision`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from declip_shards import DeclipError
from declip_shards.allocator import keep_freed_memory
from declip_train.dataset_files import output_folder
from declip_train.heart import BOARD_VARIABLE, join_board
from declip_train.launch import Place, launch, prepare_environment
from declip_train.settings import TrainSettings, read_settings
from declip_train.stalls import RankWatch
from declip_train.supervision import INTERRUPTED, STOPPED, StopSwitch

_STATUSES = """exit status:
  0    complete
  1    it cannot go on; the sentence says why
  75   stalled and ended (stall_seconds), or a process or host died: start it again
  130  Ctrl-C: saved; the second one stops at once
  143  SIGTERM or SIGUSR1: saved; start it again"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="declip_train",
        description="Train a model as CONFIG says, from its newest checkpoint, and export it.",
        epilog="Several processes: deepspeed --num_gpus N --module declip_train CONFIG\n\n"
        + _STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="JSON file of settings; names as in TrainSettings")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument(
        "--num-ranks",
        type=int,
        metavar="N",
        help="processes in all, in place of the configuration's num_ranks",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again so often after a stall or a process's death, without hosts that answer "
        "no more; default 0",
    )
    several = parser.add_argument_group(
        "machines that a scheduler has started", "(for ssh, set hostfile in CONFIG instead)"
    )
    several.add_argument("--hosts", type=int, metavar="N", help="machines in all")
    several.add_argument("--host-rank", type=int, metavar="I", help="which one this is, from 0")
    several.add_argument(
        "--master", metavar="ADDRESS:PORT", help="where machine 0 listens, as others reach it"
    )
    return parser


def _train_here(settings: TrainSettings, quiet: bool) -> int:
    """This process is one of several that train together."""
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size != settings.num_ranks:
        raise DeclipError(
            f"{world_size} processes were started, but the configuration says num_ranks "
            f"{settings.num_ranks}; make them equal (deepspeed --num_gpus N)."
        )
    stop = StopSwitch(by_force=True)
    stop.watch_ancestors()
    heart = join_board()
    stop.is_saving = lambda: heart.phase == "save"
    watch = None
    if BOARD_VARIABLE not in os.environ:
        folder = output_folder(settings.root) / "train"
        watch = RankWatch.start(heart, settings, folder)
    use_extension = prepare_environment(settings)
    # DeepSpeed reads the environment when it is imported, and announces itself at length.
    import deepspeed
    import torch

    from declip_train.extension import release_shared_memory, use_prebuilt
    from declip_train.loop import train
    from declip_train.rendezvous import join_processes

    torch.set_num_threads(settings.threads_per_rank)
    if use_extension:
        use_prebuilt()
        keep_freed_memory()
    with contextlib.redirect_stdout(sys.stderr):
        join_processes(settings.stall_seconds)
        deepspeed.init_distributed(verbose=False)
    if use_extension:
        release_shared_memory()
    stop.listen()
    try:
        return 0 if train(settings, stop, heart=heart, show_progress=not quiet) else STOPPED
    finally:
        if watch is not None:
            watch.close()
        heart.close()
        torch.distributed.destroy_process_group()


def _place(given: argparse.Namespace, settings: TrainSettings) -> Place | None:
    """This machine's part of the run, as a scheduler's command line says.

    Raises:
        DeclipError: an incomplete or impossible description.
    """
    said = {"--hosts": given.hosts, "--host-rank": given.host_rank, "--master": given.master}
    missing = [name for name, value in said.items() if value is None]
    if len(missing) == len(said):
        return None
    if missing:
        raise DeclipError(
            f"{missing[0]} is missing; --hosts, --host-rank and --master go together."
        )
    if settings.hostfile:
        raise DeclipError(
            "hostfile is set and --hosts is given; leave out one: the first starts machines over "
            "ssh, the second joins machines that a scheduler has started."
        )
    if not 0 <= given.host_rank < given.hosts:
        raise DeclipError(
            f"--host-rank is {given.host_rank}, but must be from 0 to {given.hosts - 1} (--hosts "
            f"{given.hosts})."
        )
    if settings.num_ranks % given.hosts:
        raise DeclipError(
            f"num_ranks {settings.num_ranks} cannot be shared evenly by {given.hosts} machines; "
            "make it a multiple of --hosts."
        )
    address, colon, port = given.master.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 2**16:
        raise DeclipError(
            f"--master is {given.master!r}, but must be ADDRESS:PORT, with a port that is free on "
            "machine 0, as 10.0.0.1:29500."
        )
    return Place(
        slots=(settings.num_ranks // given.hosts,) * given.hosts,
        index=given.host_rank,
        address=address.strip("[]"),
        port=int(port),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one process, or start all of them; returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        settings = read_settings(given.config)
        if given.num_ranks is not None:
            settings = dataclasses.replace(settings, num_ranks=given.num_ranks)
        if "RANK" in os.environ:
            return _train_here(settings, given.quiet)
        if given.max_restarts < 0:
            raise DeclipError(f"--max-restarts is {given.max_restarts}, but must be at least 0.")
        place = _place(given, settings)
        launch(given.config, settings, place=place, restarts=given.max_restarts)
        return 0
    except DeclipError as error:
        print(f"declip_train: error: {error}", file=sys.stderr)
        return int(getattr(error, "status", 1))
    except KeyboardInterrupt:
        return INTERRUPTED


def _end(status: int) -> NoReturn:
    """End this process without taking the interpreter apart: collecting what torch has built takes
    seconds, of the few that a scheduler gives."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _run() -> int:
    """:func:`main`, and what Python would make of an exception."""
    try:
        return main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    return 1


if __name__ == "__main__":
    _end(_run())
