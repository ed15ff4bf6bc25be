"""How the processes of a run find one another, heard by no other network than theirs.

Left to itself, torch's store of process 0 listens on every network of the machine, without asking
who calls. Here process 0 opens the port itself, on the one address that the others were told, and
hands it to the store: on a machine alone that is the loopback.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch._C._distributed_c10d import TCPStore

from declip_shards import DeclipError

_START = timedelta(minutes=10)
"""For all processes to come: machines start at different speeds."""
_QUIET_HOURS = 24
"""A collective may wait so long where a watcher tells of stalls; else it is torch's half hour."""


def listen_at(address: str, port: int) -> socket.socket:
    """A listening socket on one address.

    Raises:
        DeclipError: the address is not this machine's, or the port is taken.
    """
    try:
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        # A port whose last connections are still being forgotten is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(2048)
    except OSError as error:
        raise DeclipError(
            f"process 0 cannot listen at {address}:{port} ({error.strerror or error}); give "
            "another port (--master_port of deepspeed), or an address of its own machine."
        ) from error
    return listener


def join_processes(stall_seconds: float) -> None:
    """Meet the other processes, as DeepSpeed's launcher has described them in the environment, and
    take this one's device. What DeepSpeed starts afterwards uses this.

    Args:
        stall_seconds: as of the run; where it watches, no collective gives up by itself before.

    Raises:
        DeclipError: process 0 cannot listen.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    accelerator = get_accelerator()
    device = None
    if accelerator.device_name() == "cuda":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    listener = listen_at(address, port) if rank == 0 else None
    store = TCPStore(
        address,
        port,
        world_size,
        is_master=rank == 0,
        timeout=_START,
        multi_tenant=True,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    patience = timedelta(hours=_QUIET_HOURS) if stall_seconds > 0 else timedelta(minutes=30)
    dist.init_process_group(
        accelerator.communication_backend_name(),
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=patience,
        # Bound early, so that NCCL never guesses; a process alone has nobody to reach.
        device_id=device if world_size > 1 else None,
    )
