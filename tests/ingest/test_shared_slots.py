"""Two mappings of one memory; no size that one side could take away from the other."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_ingest.shared_slots import SLOT_BYTES, SharedSlots, create_slots


@pytest.fixture
def fd() -> Iterator[int]:
    made = create_slots(2)
    yield made
    os.close(made)


@given(st.lists(st.tuples(st.integers(0, 1), st.lists(st.binary(max_size=50))), max_size=8))
@settings(max_examples=40, deadline=None)
def test_what_one_side_puts_the_other_gets_and_the_other_slot_keeps_its_own(writes):
    fd = create_slots(2)
    one, other = SharedSlots(fd), SharedSlots(fd)
    os.close(fd)
    expected = {0: b"", 1: b""}
    for slot, parts in writes:
        assert one.put(slot, parts)
        expected[slot] = b"".join(parts)
        for each, data in expected.items():
            assert other.get(each, len(data)) == data
        one, other = other, one


def test_a_slot_holds_its_size_and_no_byte_more(fd):
    slots = SharedSlots(fd)
    whole = b"x" * SLOT_BYTES
    assert slots.put(1, [b"next"])
    assert slots.put(0, [whole])
    assert slots.get(0, SLOT_BYTES) == whole
    assert slots.get(1, 4) == b"next"
    assert not slots.put(0, [b"y", whole])
    assert slots.get(0, SLOT_BYTES) == whole
    with pytest.raises(ValueError, match=f"{SLOT_BYTES + 1} bytes of a slot of {SLOT_BYTES}"):
        slots.get(0, SLOT_BYTES + 1)


def test_what_was_got_is_a_copy(fd):
    one, other = SharedSlots(fd), SharedSlots(fd)
    one.put(0, [b"judged"])
    got = other.get(0, 6)
    one.put(0, [b"change"])
    assert got == b"judged"


@pytest.mark.parametrize("size", [0, SLOT_BYTES, 2 * SLOT_BYTES - 1, 3 * SLOT_BYTES])
def test_nobody_can_change_the_size(fd, size):
    """A child that shrank it would have the parent end by SIGBUS at the next look."""
    with pytest.raises(PermissionError):
        os.ftruncate(fd, size)


def test_pages_are_taken_as_they_are_touched(fd):
    SharedSlots(fd).put(0, [b"small"])
    assert os.fstat(fd).st_blocks * 512 <= 1 << 16
