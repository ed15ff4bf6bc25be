"""URL lists -> shards: guarded fetching, img2dataset's resizer, modes and layout."""

__version__ = "0.1.0"
