"""Memory that the decoder pool shares with one child: pictures go through it both ways.

Copying a picture into it and out of it is a quarter of what a socket asks for the same bytes. Its
size is sealed, for a mapping that shrank under the parent would end the parent; and whoever reads
copies first and looks at the copy, so a child that goes on writing changes nothing that was judged.
"""

import fcntl
import mmap
import os
from collections.abc import Sequence

SLOT_BYTES = 4 << 20
"""Of one slot. Pages are taken as they are first touched, so small pictures take little of it."""


class SharedSlots:
    """Slots of :data:`SLOT_BYTES` in memory that two processes map.

    Args:
        fd: from :func:`create_slots`; it may be closed afterwards.
    """

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, 0)

    def put(self, slot: int, parts: Sequence[bytes]) -> bool:
        """Lay the parts into a slot one after another; False, and nothing done, if they are too
        long for it."""
        place = slot * SLOT_BYTES
        if sum(map(len, parts)) > SLOT_BYTES:
            return False
        for part in parts:
            end = place + len(part)
            self._memory[place:end] = part
            place = end
        return True

    def get(self, slot: int, size: int) -> bytes:
        """A copy of a slot's first bytes.

        Raises:
            ValueError: no slot has as many.
        """
        if size > SLOT_BYTES:
            raise ValueError(f"{size} bytes of a slot of {SLOT_BYTES}")
        return self._memory[slot * SLOT_BYTES : slot * SLOT_BYTES + size]


def create_slots(number: int) -> int:
    """Memory for so many slots, which cannot change its size; a descriptor to map it by.

    Raises:
        OSError: there is no such memory to be had.
    """
    fd = os.memfd_create("declip-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, number * SLOT_BYTES)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(fd)
        raise
    return fd
