"""``python -m pipelines`` is ``declip``: what a Ray job runs where the command is not installed."""

from pipelines.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
