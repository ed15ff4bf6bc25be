"""Memory of batches, used again once nobody holds the batch that was in it.

A block of more than 64 MB that a thread beside the main one asks for is given back to the system as
soon as it is free, whatever glibc is told to keep, and a fresh one costs a page fault for every
4 kB: that was a third of the processor time of a loader of float32 views.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["BatchMemory"]


class BatchMemory:
    """Hands out tensors on the host; any thread may ask for them, and drop them.

    Blocks that wait to be used again are as many as tensors were held at one time, at most.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of any contents, whose memory no other tensor or array uses."""
        block = self._block(math.prod(shape) * dtype.itemsize)
        # Tensors and arrays on this memory keep this array alive, by their storage or their base.
        held = block[:]
        weakref.finalize(held, self._free.append, block).atexit = False
        return torch.from_numpy(held).view(dtype).view(*shape)

    def _block(self, length: int) -> NDArray[np.uint8]:
        # Another thread may take the last one between a look and the taking.
        with contextlib.suppress(IndexError):
            while True:
                block = self._free.pop()
                if len(block) == length:
                    return block
        # Torch's own memory: aligned as its kernels like it.
        fresh: NDArray[np.uint8] = torch.empty(length, dtype=torch.uint8).numpy()
        return fresh
