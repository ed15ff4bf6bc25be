"""Which FAISS index: chosen from the number of rows, the memory and what the user fixes.

A choice is a FAISS factory string, the name by which autofaiss and FAISS's wiki know an index.
Types: inverted lists (Jegou et al. 2011, "Product quantization for nearest neighbor search"), fast
scan (Andre et al. 2017, "Accelerated nearest neighbor search with Quick ADC"), OPQ (Ge et al. 2013,
"Optimized product quantization"), HNSW (Malkov and Yashunin 2018, arXiv 1603.09320).
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from declip_filter.index_files import load_faiss
from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

IndexType = Literal["auto", "Flat", "IVF", "IVFPQ", "HNSW"]
INDEX_TYPES: tuple[IndexType, ...] = ("auto", "Flat", "IVF", "IVFPQ", "HNSW")

MIN_ROWS_PER_LIST = 39
"""Fewest rows per inverted list for which FAISS trains centroids without a warning."""
MAX_ROWS_PER_LIST = 256
"""Rows per inverted list beyond which training samples: FAISS's own default."""
MAX_FLAT_CENTROIDS = 65_536
"""More centroids are searched by a graph of their own: comparing with each costs too much."""
HNSW_LINKS = 32
"""Links of a graph's node on the upper levels; twice as many on the lowest."""
_FAST_SCAN = re.compile(r"PQ(\d+)x4fs(r?)")
_LISTS = re.compile(r"(?:^|,)IVF(\d+)(?:_[^,]+)?(?=,)")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A type of index for given rows."""

    index_key: str
    """FAISS factory string."""
    nlist: int
    """Inverted lists; 0 for a type without."""
    reason: str
    """Why this one, in words."""
    rows_per_list: int = MAX_ROWS_PER_LIST
    """Rows that training draws for each list, where there are so many."""

    @property
    def is_fast_scan(self) -> bool:
        """Whether codes of 4 bits lie interleaved: filled plainly, converted at the end."""
        return self.is_in_parts and _FAST_SCAN.search(self.index_key) is not None

    @property
    def is_in_parts(self) -> bool:
        """Whether it can be filled part by part and merged: what has inverted lists."""
        return bool(self.nlist)

    @property
    def is_graph(self) -> bool:
        return self.index_key.startswith("HNSW")

    @property
    def build_key(self) -> str:
        """The key that is trained and filled: without the interleaving of fast scan."""
        return _FAST_SCAN.sub(r"PQ\1x4", self.index_key) if self.is_fast_scan else self.index_key


def choose_nlist(num_rows: int) -> int:
    """Inverted lists for ``num_rows``: 4 sqrt(rows), or fewer where a list would have few rows."""
    return max(1, min(round(4 * math.sqrt(num_rows)), num_rows // MIN_ROWS_PER_LIST))


def divisor_near(dim: int, wanted: int) -> int:
    """Largest divisor of ``dim`` that is at most ``wanted``, at least 1."""
    return next(n for n in range(max(1, min(wanted, dim)), 0, -1) if dim % n == 0)


def codecs(dim: int) -> list[str]:
    """What a list can hold of a vector of ``dim`` numbers, from the smallest code to the largest.

    Product quantizers of 4 bits (fast scan, of the residual) over 4, 2 and 1 numbers, then a byte
    a number, float16 (which is what the embeddings are) and float32. Only over 4 numbers does the
    rotation of OPQ pay for its training.
    """
    few, half = divisor_near(dim, dim // 4), divisor_near(dim, dim // 2)
    found = [f"OPQ{few}_{dim},PQ{few}x4fsr", f"PQ{half}x4fsr", f"PQ{dim}x4fsr"]
    return [*dict.fromkeys(found), "SQ8", "SQfp16", "Flat"]


def key_of(codec: str, nlist: int) -> str:
    """The factory string of inverted lists that hold ``codec``."""
    lists = f"IVF{nlist}" + ("_HNSW32" if nlist > MAX_FLAT_CENTROIDS else "")
    before, _, after = codec.rpartition(",")
    return f"{before},{lists},{after}" if before else f"{lists},{after}"


def code_bytes(index_key: str, dim: int) -> int:
    """Bytes that one vector takes in an index, its row number and links included.

    Raises:
        DeclipError: FAISS does not know the key, or not for inner products.
    """
    if index_key == "Flat":
        return 4 * dim
    graph = re.fullmatch(r"HNSW(\d+)(?:,(.+))?", index_key)
    if graph:
        # Twice the links below, and of one in M nodes the links above; offsets and level.
        links = int(graph[1] or HNSW_LINKS) * 4 * 2.1 + 12
        return round(links) + code_bytes(graph[2] or "Flat", dim)
    faiss = load_faiss()

    index = make_empty_key(index_key, dim)
    inner = index  # which owns what is inside it and must outlive it
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    number = 8 if isinstance(inner, faiss.IndexIVF) else 0
    return int(inner.code_size) + number


_TRANSFORM = r"(?:OPQ\d+(?:_\d+)?|PCA[RW]{0,2}\d+|RR\d+|ITQ\d+|L2norm|Pad\d+)"
_CODE = r"(?:Flat|SQ(?:4|6|8|fp16|bf16)|PQ\d+(?:x\d+)?(?:np)?)"
_TAKEN = re.compile(
    rf"(?:{_TRANSFORM},)*(?:{_CODE}|IVF\d+(?:_HNSW\d*)?,(?:{_CODE}|PQ\d+x4fsr?))"
    rf"|HNSW\d+(?:,{_CODE})?"
)
"""Keys whose index can be sized, filled and searched mapped: flat codes and inverted lists, both
behind transforms, and graphs."""


def make_empty_key(index_key: str, dim: int) -> Any:
    """An untrained FAISS index for inner products.

    Raises:
        DeclipError: FAISS does not know the key, or not for this dimension or inner products.
    """
    faiss = load_faiss()

    try:
        return faiss.index_factory(dim, index_key, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2].strip().strip("'")
        raise DeclipError(
            f"index_key is {index_key!r}, which FAISS does not make for inner products of "
            f"dimension {dim} ({reason}); give another factory string, such as IVF1024,Flat or "
            "OPQ64_256,IVF1024,PQ64x4fs, or leave it empty and set index_type."
        ) from error


def check_index_key(index_key: str) -> int:
    """Refuse what is no type of ours; give its number of lists (0: none).

    Raises:
        DeclipError: a family or a wrapper that is not taken, or no form of a key.
    """
    if not _TAKEN.fullmatch(index_key):
        raise DeclipError(
            f"index_key is {index_key!r}, which is not taken; it must be a code (Flat, SQ8, SQfp16 "
            "or PQ64), lists of codes (IVF1024,Flat or, with fast scan but without a block size, "
            "IVF1024,PQ64x4fsr), either of them behind transforms (OPQ64_256, PCA256, L2norm), or "
            "a graph (HNSW32); give one of these, or leave it empty to let the stage choose."
        )
    lists = _LISTS.search(index_key)
    return int(lists[1]) if lists else 0


def choose_index(
    num_rows: int,
    dim: int,
    *,
    index_type: IndexType,
    index_key: str = "",
    nlist: int | None = None,
    has_nprobe: bool = False,
    ivf_from_rows: int = 2000,
    limit_bytes: float = math.inf,
) -> Choice:
    """The index for so many rows of so many numbers.

    Args:
        num_rows: vectors.
        dim: their length.
        index_type: the family, or auto: exact below ``ivf_from_rows``, else inverted lists with
            the largest code that fits ``limit_bytes``.
        index_key: FAISS factory string; decides alone where it is given.
        nlist: inverted lists, where they are fixed.
        has_nprobe: whether the user fixed how many lists are searched, so wants lists.
        ivf_from_rows: with auto, fewest rows for lists.
        limit_bytes: most bytes that the index may take in memory, with auto.

    Raises:
        DeclipError: a wrong key, more lists than rows, or nothing that fits.
    """
    if index_type not in INDEX_TYPES:
        raise DeclipError(f"index_type is {index_type!r}.{did_you_mean(index_type, INDEX_TYPES)}")
    if index_key:
        lists = check_index_key(index_key)
        _check_lists(lists, num_rows)
        code_bytes(index_key, dim)
        return Choice(index_key=index_key, nlist=lists, reason="index_key says so")
    if index_type == "HNSW":
        return Choice(index_key=f"HNSW{HNSW_LINKS},Flat", nlist=0, reason="index_type says so")
    wants_lists = nlist is not None or has_nprobe or num_rows >= ivf_from_rows
    if index_type == "Flat" or (index_type == "auto" and not wants_lists):
        reason = "index_type says so" if index_type == "Flat" else f"{num_rows} rows are few"
        return Choice(index_key="Flat", nlist=0, reason=reason)
    lists = nlist or choose_nlist(num_rows)
    _check_lists(lists, num_rows)
    known = codecs(dim)
    if index_type == "IVF":
        return Choice(index_key=key_of("Flat", lists), nlist=lists, reason="index_type says so")
    if index_type == "IVFPQ":
        codec = known[1]
        return Choice(index_key=key_of(codec, lists), nlist=lists, reason="index_type says so")
    return _largest_that_fits(num_rows, dim, lists, known, limit_bytes)


def _largest_that_fits(
    num_rows: int, dim: int, nlist: int, known: list[str], limit_bytes: float
) -> Choice:
    for codec in reversed(known):
        key = key_of(codec, nlist)
        size = index_bytes(key, nlist, num_rows, dim)
        if size <= limit_bytes:
            why = "exact vectors" if codec in ("Flat", "SQfp16") else "the largest code"
            gib = f"{size / 2**30:.3g} GiB"
            return Choice(index_key=key, nlist=nlist, reason=f"{why} that fit memory: {gib}")
    smallest = index_bytes(key_of(known[0], nlist), nlist, num_rows, dim)
    raise DeclipError(
        f"an index of {num_rows} rows takes at least {smallest / 2**30:.3g} GiB, and "
        f"{limit_bytes / 2**30:.3g} GiB of max_memory_gib are for it; raise max_memory_gib, or "
        "index fewer rows."
    )


def _check_lists(nlist: int, num_rows: int) -> None:
    if nlist > num_rows:
        raise DeclipError(
            f"nlist is {nlist}, and there are {num_rows} vectors: a list needs at least one; "
            "lower nlist or unset it."
        )


def index_bytes(index_key: str, nlist: int, num_rows: int, dim: int) -> int:
    """Bytes of an index in memory, which is about its file's size."""
    return num_rows * code_bytes(index_key, dim) + nlist * (4 * dim + 16)


def next_larger(choice: Choice, num_rows: int, dim: int, *, limit_bytes: float) -> Choice | None:
    """The same lists with the next larger code, where there is one that fits; else None."""
    known = codecs(dim)
    keys = [key_of(codec, choice.nlist) for codec in known]
    if choice.index_key not in keys:
        return None
    above = keys.index(choice.index_key) + 1
    # float16 holds the vectors as they are: float32 would find nothing more.
    if above >= len(keys) or keys[above] == key_of("Flat", choice.nlist):
        return None
    if index_bytes(keys[above], choice.nlist, num_rows, dim) > limit_bytes:
        return None
    return Choice(
        index_key=keys[above],
        nlist=choice.nlist,
        reason=f"recall was below the target with {choice.index_key}",
    )
