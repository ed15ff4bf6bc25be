"""Memory that is used again, and never while anything lies in it."""

import threading

import numpy as np
import pytest
import torch

from declip_train.batch_memory import BatchMemory


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_what_is_held_in_any_way_is_not_handed_out_again(dtype):
    memory = BatchMemory()
    ways = {
        "itself": lambda tensor: tensor,
        "a part": lambda tensor: tensor[1:, 2],
        "another shape": lambda tensor: tensor.view(-1),
        "an array": lambda tensor: tensor.numpy(),
        "a part of an array": lambda tensor: tensor.numpy()[0].T[1:],
        "its bytes": lambda tensor: memoryview(tensor.numpy()),
        "no gradient": lambda tensor: tensor.detach().narrow(0, 1, 1),
    }
    for name, way in ways.items():
        tensor = memory.empty((2, 3, 4), dtype)
        assert tensor.shape == (2, 3, 4)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        place = tensor.data_ptr()
        assert place % 64 == 0
        held = way(tensor)
        del tensor
        assert memory.empty((2, 3, 4), dtype).data_ptr() != place, name
        del held
        places = [memory.empty((2, 3, 4), dtype) for _ in range(2)]
        assert place in {each.data_ptr() for each in places}, name
        del places


def test_many_at_a_time_do_not_overlap():
    memory, rng = BatchMemory(), np.random.default_rng(0)
    held = {}
    for number in range(200):
        shape = (int(rng.integers(1, 3)), 5)
        tensor = memory.empty(shape, torch.float32)
        tensor.fill_(number)
        held[number] = tensor
        if len(held) > 6:
            held.pop(int(rng.choice(list(held))))
        for wanted, found in held.items():
            assert bool((found == wanted).all())
    held.clear()
    assert len(memory._free) <= 7


def test_blocks_of_other_sizes_are_given_back():
    memory = BatchMemory()
    small = [memory.empty((10,), torch.uint8) for _ in range(5)]
    small.clear()
    assert len(memory._free) == 5
    assert len(memory.empty((20,), torch.uint8)) == 20
    assert [len(block) for block in memory._free] == [20]


def test_other_threads_may_drop_what_they_were_given():
    memory = BatchMemory()
    tensors = [memory.empty((1000,), torch.uint8) for _ in range(8)]
    threads = [threading.Thread(target=tensors.pop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(memory._free) == 8


def test_several_threads_may_ask():
    class Contended(list[np.ndarray]):
        """Whoever looks finds something; it is taken by another thread meanwhile."""

        def __bool__(self):
            return True

    memory = BatchMemory()
    memory._free = Contended()
    assert memory.empty((3,), torch.float32).shape == (3,)


def test_memory_outlives_who_handed_it_out():
    tensor = BatchMemory().empty((100,), torch.float32)
    tensor.fill_(3)
    assert float(tensor.sum()) == 300
