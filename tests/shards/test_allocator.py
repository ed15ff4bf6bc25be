import resource
import subprocess
import sys

import pytest

FAULTS = """
import resource
from declip_shards.allocator import keep_freed_memory, kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        b"1" * (40 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = faults()
with kept_memory():
    faults()
    within = faults()
after = faults()
keep_freed_memory()
faults()
print(fresh, within, after, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_large_blocks_are_faulted_in_once_while_they_are_kept():
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        capture_output=True,
        text=True,
        check=True,
    )
    fresh, within, after, to_the_end = map(int, done.stdout.split())
    pages = (40 << 20) // resource.getpagesize()
    assert within < pages
    assert to_the_end < pages
    assert min(fresh, after) >= 5 * pages  # outside, each block is new
