"""Signals, rules, embeddings, FAISS index, neighbor table (the only room that imports faiss)."""

from declip_filter.embeddings import EmbedPairs
from declip_filter.encoders import Encoder, EncoderFactory, load_encoder, register_encoder
from declip_filter.index import BuildIndex
from declip_filter.neighbors import BuildNeighbors, read_neighbors
from declip_filter.rules import FilterPairs
from declip_filter.selection import require_selection, selected_keys
from declip_filter.signals import MeasureImages

__version__ = "0.1.0"

__all__ = [
    "BuildIndex",
    "BuildNeighbors",
    "EmbedPairs",
    "Encoder",
    "EncoderFactory",
    "FilterPairs",
    "MeasureImages",
    "load_encoder",
    "read_neighbors",
    "register_encoder",
    "require_selection",
    "selected_keys",
]
