"""Shared by all tests."""

import sys
from pathlib import Path

# Modules that tests hand to other processes (stages for Ray, stand-ins) must be importable there.
for folder in ("pipelines", "train"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
