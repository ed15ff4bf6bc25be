"""The Triton kernels: interpreted on a CPU they equal the blocked version; compiled, they fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from declip_train import tokenwise_triton
from declip_train.tokenwise import tokenwise_info_nce

SHARED_MEMORY = 227 * 1024
"""What a program may have on compute capability 9.0, in bytes."""


def _run(what: str, folder: Path, interpret: str) -> dict[str, Any]:
    paths = [entry for entry in sys.path if entry]
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_runs.py")), what],
        env={
            **os.environ,
            "TRITON_INTERPRET": interpret,
            "TRITON_CACHE_DIR": str(folder),
            "PYTHONPATH": os.pathsep.join(paths),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_interpreted_kernels_are_the_blocked_version(tmp_path: Path) -> None:
    found = _run("interpret", tmp_path, "1")
    assert len(found["differences"]) == 5
    assert max(found["differences"].values()) < 1e-6, found
    assert found["nan"] == {"image": True, "text": True}
    assert found["half"] < 1e-3


@pytest.mark.slow
def test_kernels_compile_for_an_h200_and_fit_its_shared_memory(tmp_path: Path) -> None:
    shared = _run("compile", tmp_path, "0")["shared"]
    assert len(shared) == 6
    assert min(shared.values()) > 0
    assert max(shared.values()) <= SHARED_MEMORY, shared


def test_a_kernel_that_cannot_run_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tokens = torch.ones(2, 3, 4)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match='runs on CUDA, but the tokens are on cpu: use kernel="bl'):
        tokenwise_info_nce(tokens, tokens, mask, torch.ones(()), kernel="triton")
    with pytest.raises(ValueError, match='kernel "triton" multiplies no float64: use kernel="bloc'):
        tokenwise_triton.refuse_unless_usable(torch.device("cuda"), torch.float64)
    unknown: Any = "cuda"
    with pytest.raises(ValueError, match="kernel 'cuda' is not known; choose \"blocked\" or"):
        tokenwise_info_nce(tokens, tokens, mask, torch.ones(()), kernel=unknown)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match='needs the package triton: install it, or use kernel="'):
        tokenwise_triton.refuse_unless_usable(torch.device("cuda"), torch.float32)
