"""What processes of the tests do when they meet; see test_rendezvous.py and test_two_hosts.py."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from declip_train.__main__ import main
from declip_train.rendezvous import join_processes


def listening_addresses() -> list[str]:
    """Addresses, as /proc/net has them, at which this process listens."""
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    sockets = set()
    for link in links:
        try:
            sockets.add(os.readlink(link))
        except FileNotFoundError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return sorted(found)


def describe(process: int, processes: int, port: str) -> None:
    """Say in the environment what DeepSpeed's launcher would say there."""
    os.environ.update(RANK=str(process), LOCAL_RANK=str(process))
    os.environ.update(WORLD_SIZE=str(processes), LOCAL_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def train_here(process: int, processes: int, port: str, config: str) -> None:
    """A training process on one host."""
    describe(process, processes, port)
    assert main(["--quiet", config]) == 0


def meet(process: int, processes: int, port: str, folder: str) -> None:
    """Join, compute a sum together, write down the sum and where this process listens."""
    describe(process, processes, port)
    join_processes(60.0)
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    told = f"{total.item()} {listening_addresses()}"
    Path(folder, f"told_{process}").write_text(told)
    dist.destroy_process_group()
