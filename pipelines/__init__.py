"""Stages wired together: recipes, runners and the command line."""

__version__ = "0.1.0"
