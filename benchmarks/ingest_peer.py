"""img2dataset's downloader, which writes down what each shard took; a module for its worker."""

import os
from typing import TYPE_CHECKING, Any

from img2dataset.downloader import Downloader

if TYPE_CHECKING:
    from benchmarks.ingest_worker import marked
else:
    from ingest_worker import marked


class MarkedDownloader(Downloader):  # type: ignore[misc]
    """Nothing else is changed."""

    def __call__(self, row: Any) -> Any:
        with marked(os.environ["INGEST_MARKS"]):
            return super().__call__(row)
