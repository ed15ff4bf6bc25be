"""Signals, rules, embeddings, FAISS index, neighbor table (the only room that imports faiss)."""

from declip_filter.duplicates import FindDuplicates
from declip_filter.embeddings import EmbedPairs
from declip_filter.encoders import Encoder, EncoderFactory, load_encoder, register_encoder
from declip_filter.index import BuildIndex, FillIndex, TrainIndex
from declip_filter.neighbor_graph import BuildGraph
from declip_filter.neighbors import BuildNeighbors, read_neighbors
from declip_filter.plan import PlanFilter
from declip_filter.reference_clusters import ClusterImages
from declip_filter.rules import FilterPairs
from declip_filter.score_pairs import ScorePairs
from declip_filter.selection import require_selection, selected_keys
from declip_filter.signals import MeasureImages

__version__ = "0.2.0"

__all__ = [
    "BuildGraph",
    "BuildIndex",
    "BuildNeighbors",
    "ClusterImages",
    "EmbedPairs",
    "Encoder",
    "EncoderFactory",
    "FillIndex",
    "FilterPairs",
    "FindDuplicates",
    "MeasureImages",
    "PlanFilter",
    "ScorePairs",
    "TrainIndex",
    "load_encoder",
    "read_neighbors",
    "register_encoder",
    "require_selection",
    "selected_keys",
]
