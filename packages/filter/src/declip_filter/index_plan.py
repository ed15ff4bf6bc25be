"""What will be built: the type, the parts that tasks share, and the memory it takes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from declip_filter.embeddings import Part, read_parts
from declip_filter.index_choice import Choice, choose_index
from declip_filter.index_memory import (
    GIB,
    Estimate,
    estimate,
    fit_sample,
    group_rows,
    index_limit,
    require_memory,
)
from declip_filter.signals import shard_tasks
from declip_filter.vectors import StoredVectors
from declip_shards import DeclipError, Store

if TYPE_CHECKING:
    from declip_filter.index import BuildIndex


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that one task encodes."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be built of which vectors."""

    choice: Choice
    parts: Sequence[Part]
    vectors: StoredVectors
    groups: Sequence[Group]
    estimate: Estimate

    @property
    def is_in_parts(self) -> bool:
        """Whether tasks share the work: it can be shared, and there is more than one part."""
        return self.choice.is_in_parts and len(self.groups) > 1


def make_plan(settings: "BuildIndex", store: Store) -> Plan:
    """Type, parts and memory for the embeddings as they are.

    Raises:
        DeclipError: there are none, they are of two encoders, or nothing fits the memory.
    """
    parts = read_parts(store, settings.embeddings, shard_tasks(settings.root))
    vectors = StoredVectors(store, settings.embeddings, settings.kind, parts)
    if not vectors.num_rows:
        raise DeclipError(
            f"embeddings {settings.embeddings!r} hold 0 samples (selection "
            f"{parts[0].selection!r}): nothing to index; loosen the filter and embed again."
        )
    choice = choose_index(
        vectors.num_rows,
        vectors.dim,
        index_type=settings.index_type,
        index_key=settings.index_key,
        nlist=settings.nlist,
        has_nprobe=settings.nprobe is not None,
        ivf_from_rows=settings.ivf_from_rows,
        limit_bytes=index_limit(settings.max_memory_gib, vectors.dim, settings.num_queries),
    )
    if settings.nprobe is not None and settings.nprobe > choice.nlist:
        raise DeclipError(
            f"nprobe is {settings.nprobe}, and the index has {choice.nlist} lists; lower nprobe or "
            "unset it."
        )
    return plan_of(settings, choice, parts, vectors)


def plan_of(
    settings: "BuildIndex", choice: Choice, parts: Sequence[Part], vectors: StoredVectors
) -> Plan:
    """Parts and memory for a type that is chosen."""
    num_rows, limit = vectors.num_rows, settings.max_memory_gib * GIB
    choice = fit_sample(choice, num_rows, vectors.dim, limit)
    size = group_rows(choice, vectors.dim, settings.rows_per_task, limit)
    starts = range(0, num_rows, size) if choice.is_in_parts else range(1)
    step = size if choice.is_in_parts else num_rows
    groups = [
        Group(name=f"{number:05d}", start=start, stop=min(start + step, num_rows))
        for number, start in enumerate(starts)
    ]
    found = estimate(
        choice,
        num_rows,
        vectors.dim,
        rows_per_task=size,
        num_queries=min(settings.num_queries, num_rows),
    )
    return Plan(choice=choice, parts=parts, vectors=vectors, groups=groups, estimate=found)


def announce(settings: "BuildIndex", plan: Plan) -> None:
    """Say what is to come and what it takes; refuse it over the limit.

    Raises:
        DeclipError: the limit and what would fit.
    """
    print(plan.estimate.text(plan.choice), file=sys.stderr)
    require_memory(plan.estimate, plan.choice, settings.max_memory_gib)
