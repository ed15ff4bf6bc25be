"""What figures of a benchmark depend on beside the code: machine, versions, commit, date."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def describe(packages: Sequence[str]) -> dict[str, Any]:
    """For the head of a file of results; packages that are not installed are left out."""
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno")
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit or None,
        "has_uncommitted_changes": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


def _git(*words: str) -> str | None:
    """What git says of the working tree; None where there is no git, or no repository: a machine
    that only runs a copy of the files has neither."""
    try:
        run = subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return None
    return None if run.returncode else run.stdout.strip()
