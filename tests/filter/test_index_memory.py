"""Memory is told before it is taken, and no more is taken than was told."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_rows import unit_rows, write_embeddings
from stage_runs import run_stage

from declip_filter import BuildIndex
from declip_filter.index_choice import Choice, check_index_key, choose_index
from declip_filter.index_memory import (
    GIB,
    PROCESS_BYTES,
    estimate,
    group_rows,
    index_limit,
    require_memory,
)
from declip_filter.index_training import ROWS_AT_ONCE
from declip_shards import DeclipError, Store

CHILD = """
import json, sys, threading, time
from pathlib import Path
from declip_filter import BuildIndex, index_building, index_memory, index_plan, index_training
from declip_filter import index_recall
from declip_filter.index_files import load_faiss
from declip_shards import Store

# Blocks as much smaller as the data are.
for module in (index_building, index_memory, index_training):
    module.ROWS_AT_ONCE = 4096
for module in (index_recall, index_memory):
    module.BLOCK_ROWS = 4096
load_faiss()

def held():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024

peak, is_done = 0, False

def watch():
    global peak
    while not is_done:
        peak = max(peak, held())
        time.sleep(0.002)

before, told = held(), []
thread = threading.Thread(target=watch)
thread.start()
for key in ("Flat", "IVF32,Flat"):
    stage = BuildIndex(root=sys.argv[1], index_key=key, num_queries=20, recall_target=0,
                       rows_per_task=4096)
    told.append(stage.plan(Store(stage.root)).estimate)
    stage.worker()("all")
is_done = True
thread.join()
print(json.dumps({"grown": peak - before, "peak": peak, "told": min(t.peak for t in told),
                  "index": told[-1].index}))
"""


def choice_of(key: str) -> Choice:
    return Choice(index_key=key, nlist=check_index_key(key), reason="")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_held_stays_under_what_was_told_and_far_under_the_index(tmp_path):
    root = str(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(5):
        vectors = rng.standard_normal((20_000, 256), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        write_embeddings(root, {f"{number:05d}": vectors.astype(np.float16)})
    run = subprocess.run(
        [sys.executable, "-c", CHILD, root],
        capture_output=True,
        text=True,
        check=False,
        # Arrow's own allocator takes 64 MiB at its first use, which is counted as the process's.
        env=os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"},
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert Store(root).size("index/captions/index.faiss") == pytest.approx(told["index"], rel=0.02)
    assert told["peak"] <= told["told"]
    # The vectors alone, read at once, take half of the index, and a build in memory twice that.
    assert told["grown"] < 0.7 * told["index"]


@settings(max_examples=40, deadline=None)
@given(
    key=st.sampled_from(["Flat", "IVF1000,Flat", "IVF1000,PQ64x4fsr", "IVF1000,SQ8", "HNSW32"]),
    num_rows=st.integers(1000, 10**8),
)
def test_more_rows_take_no_less(key, num_rows):
    more, less = (
        estimate(choice_of(key), n, 128, rows_per_task=ROWS_AT_ONCE, num_queries=10)
        for n in (num_rows * 2, num_rows)
    )
    assert more.peak >= less.peak
    assert more.index > less.index


def test_parts_shrink_to_what_fits():
    choice = choice_of("IVF1000,Flat")
    assert group_rows(choice, 512, 1, 10 * GIB) == ROWS_AT_ONCE
    assert group_rows(choice, 512, 500_000, 100 * GIB) == 8 * ROWS_AT_ONCE
    small = group_rows(choice, 512, 500_000, 2 * GIB)
    assert ROWS_AT_ONCE <= small < 8 * ROWS_AT_ONCE
    found = estimate(choice, 10**6, 512, rows_per_task=small, num_queries=10)
    assert PROCESS_BYTES + found.fill <= 2 * GIB


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (
            "HNSW32",
            r"takes up to .* GiB .*max_memory_gib is 2; raise it to .* or choose index_type",
        ),
        ("IVF20000,Flat", r"\(train most of it\).*set nlist to at most \d+, or index fewer rows"),
    ],
)
def test_over_the_limit_is_refused_with_what_would_fit(key, sentence):
    found = estimate(choice_of(key), 10**7, 512, rows_per_task=ROWS_AT_ONCE, num_queries=10)
    with pytest.raises(DeclipError, match=sentence) as error:
        require_memory(found, choice_of(key), 2)
    raised = float(str(error.value).split("raise it to ")[1].split(",")[0])
    require_memory(found, choice_of(key), raised)


def test_what_would_fit_does_fit():
    found = estimate(
        choice_of("IVF20000,Flat"), 10**7, 512, rows_per_task=ROWS_AT_ONCE, num_queries=10
    )
    with pytest.raises(DeclipError) as error:
        require_memory(found, choice_of("IVF20000,Flat"), 2)
    fits = int(str(error.value).split("nlist to at most ")[1].split(",")[0])
    choice = choice_of(f"IVF{fits},Flat")
    less = estimate(choice, 10**7, 512, rows_per_task=ROWS_AT_ONCE, num_queries=10)
    require_memory(less, choice, 2)


def test_auto_leaves_room_for_the_search():
    limit = index_limit(2.5, 512, 500)
    choice = choose_index(3_000_000, 512, index_type="auto", limit_bytes=limit)
    assert choice.index_key.endswith("SQ8")
    assert 0 < limit < 2.5 * GIB


def test_the_stage_says_it_first(tmp_path, capsys):
    write_embeddings(str(tmp_path), {"00000": unit_rows(300, 16)})
    run_stage(BuildIndex(root=str(tmp_path)))
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("index: Flat of 300 x 16 (300 rows are few): ")
    assert "peak memory" in first
