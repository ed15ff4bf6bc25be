"""Towers, losses, loader, engine and loop (the only room that imports deepspeed)."""

__version__ = "0.1.0"
