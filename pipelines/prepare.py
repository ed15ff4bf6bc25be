"""The demo's first stage: real pictures and captions out of packages, and their URL table."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from declip_shards.stage import TaskStats
from declip_shards.store import Store
from pipelines.demo_data import DemoSettings, is_prepared, prepare_demo
from pipelines.demo_packages import default_cache

FOLDER = "source"
"""Where the demo's data lies in the dataset's root; the demo's server serves this folder."""


@dataclass(frozen=True, kw_only=True)
class PrepareDemo:
    """Fetch the demo's packages and write ``source/``: pictures and ``pairs.parquet``.

    The packages' archives are kept in ``$OPENDECLIP_CACHE``, or ``~/.cache/opendeclip``.
    """

    root: str = field(metadata={"fingerprint": False})
    """Folder of the dataset, on a local disk."""
    port: int = DemoSettings.port
    """TCP port of the demo's server in the URLs; the next one must be free too."""
    max_pairs: int = DemoSettings.max_pairs
    """Most good pairs; emoji are left out first, but keep at least half of the places."""
    held_out_vendor: str = DemoSettings.held_out_vendor
    """Name of the emoji vendor that only the test set sees."""
    num_held_out_concepts: int = DemoSettings.num_held_out_concepts
    """Number of emoji concepts that only the test set sees."""
    num_failures: int = DemoSettings.num_failures
    """Number of rows whose URL fails on purpose."""
    num_junk: int = DemoSettings.num_junk
    """Number of rows that a filter should drop."""
    image_size: int = DemoSettings.image_size
    """Side of rendered icons, in pixels."""
    seed: int = DemoSettings.seed
    """Seed of the rows' order."""

    num_cpus: ClassVar[float] = 2
    num_gpus: ClassVar[float] = 0

    def __post_init__(self) -> None:
        # Refuses a wrong setting before anything is fetched.
        self._settings()

    def _settings(self) -> DemoSettings:
        return DemoSettings(
            port=self.port,
            max_pairs=self.max_pairs,
            held_out_vendor=self.held_out_vendor,
            num_held_out_concepts=self.num_held_out_concepts,
            num_failures=self.num_failures,
            num_junk=self.num_junk,
            image_size=self.image_size,
            seed=self.seed,
        )

    def _folder(self) -> Path:
        return Store(self.root).local_path(FOLDER)

    def tasks(self) -> tuple[str, ...]:
        """One task: it is the packages that are many, not the pieces of work."""
        return ("all",)

    def is_done(self, task: str) -> bool:
        """Whether the table and all pictures of these settings are there, by their sizes."""
        return is_prepared(self._folder(), self._settings())

    def worker(self) -> Callable[[str], TaskStats]:
        """A function that prepares everything; its counts are the rows of the table."""
        folder, settings = self._folder(), self._settings()

        def prepare(task: str) -> TaskStats:
            table = prepare_demo(folder, default_cache(), settings=settings)
            reasons = {"over_max_pairs": table.num_over_max_pairs}
            return TaskStats(
                num_in=table.num_rows + table.num_over_max_pairs,
                num_out=table.num_rows,
                reasons={reason: count for reason, count in reasons.items() if count},
                files=(f"{FOLDER}/pairs.parquet", f"{FOLDER}/files.json"),
                extra={
                    "num_rows_by_split": dict(table.num_rows_by_split),
                    "num_rows_by_source": dict(table.num_rows_by_source),
                    "num_concepts": table.num_concepts,
                    "num_shared_concepts": table.num_shared_concepts,
                    "num_held_out_concepts": table.num_held_out_concepts,
                },
            )

        return prepare
