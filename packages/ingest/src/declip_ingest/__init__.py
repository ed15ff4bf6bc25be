"""URL lists -> shards: guarded fetching, img2dataset's modes, arithmetic and layout."""

__version__ = "0.2.0"
