"""Which samples are duplicates of which, and which occur in evaluation sets.

    signals/NAME/NNNNN.parquet          key, duplicate_RUNG_of ... of every sample
    signals/NAME/eval_overlaps.parquet  entries of evaluation sets that occur in the dataset
    signals/NAME/report.json            counts per rung, alone and as a ladder; comes last

The columns are described in docs/duplicates.md. Nothing is dropped here: the filter does, by these
columns (``drop_duplicates``, ``drop_contaminated``), and may do otherwise tomorrow.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from declip_filter.captions import caption_sha
from declip_filter.contamination import (
    EVAL_RUNGS,
    Contamination,
    match_digests,
    match_looks,
)
from declip_filter.duplicate_rungs import (
    Likeness,
    Looks,
    exact_leaders,
    hash_distances,
    perceptual_leaders,
)
from declip_filter.embeddings import read_metadata, read_parts
from declip_filter.eval_sets import load_eval_set, parse_eval_set
from declip_filter.limits import require_between, require_folder_name
from declip_filter.near_hashes import MAX_DISTANCE
from declip_filter.path_digests import full_path, path_state
from declip_filter.sample_columns import (
    DIGEST_DIGITS,
    Bytes,
    Mask,
    Rows,
    SampleColumns,
    parse_hex,
    preference,
)
from declip_filter.semantic import semantic_leaders
from declip_filter.signals import shard_tasks
from declip_filter.vectors import SIDES, StoredVectors
from declip_shards import DeclipError, Store, TaskStats, layout, sidecars
from declip_shards.errors import did_you_mean
from declip_shards.manifest import canonical_json

RUNGS = ("bytes", "caption", "perceptual", "semantic")
"""The ladder, from the surest rung to the least sure."""
DISTANCES = {"image_phash": 4, "image_dhash": 1}
"""Hash -> most different bits where the setting is unset: docs/duplicates.md has the evidence."""
NUM_LARGEST = 20
"""Groups whose sizes the report lists."""
FORMAT_VERSION = 1
"""Of report.json."""

Found = dict[str, Rows]
"""Rung -> the row of the kept sample for each row, or -1."""


@dataclass(frozen=True, kw_only=True)
class FindDuplicates:
    """Name for each sample the one it duplicates, rung by rung; drop nothing.

    Of duplicates the largest original picture stays, of those as large the smallest key, at every
    rung alike. A duplicate is within the limits of the very sample that stays.
    """

    root: str = field(default="", metadata={"fingerprint": False})
    """Dataset folder, any fsspec URL."""
    signals: str = "basic"
    """Name of the signals to read, from signals/NAME/."""
    name: str = "duplicates"
    """Name of the signals to write: they go to signals/NAME/."""
    rungs: tuple[str, ...] = ("bytes", "caption", "perceptual")
    """Rungs of the ladder to run: bytes, caption, perceptual, semantic."""
    picture_hash: Literal["auto", "image_phash", "image_dhash"] = "auto"
    """Hash of the perceptual rung; auto: image_phash where it was measured, else image_dhash."""
    max_hash_distance: int | None = None
    """Most different bits of two hashes, 0 to 16; unset: 4 of image_phash, 1 of image_dhash."""
    min_hash_bits: int = 8
    """Least bits that are set, and that are unset, in a hash that is compared, 0 to 32."""
    max_brightness_difference: int = 11
    """Most gray levels, 0 to 255, between two pictures in any of 4 x 4 fields (image_layout)."""
    max_aspect_change: float = 0.1
    """Most relative difference of two pictures' width over height, 0 or more."""
    semantic_embeddings: str = ""
    """Name of the embeddings of the semantic rung, from embeddings/NAME/."""
    semantic_kind: str = "img_emb"
    """Which of them: img_emb, text_emb or both."""
    min_cosine: float = 0.95
    """Semantic rung: least cosine of two vectors that count as one (SemDeDup's 1 - eps), 0 to 1."""
    num_clusters: int | None = None
    """Semantic rung: clusters within which vectors are compared; unset: one per 2,000 rows."""
    seed: int = 0
    """Seed of the semantic rung's clusters."""
    eval_sets: tuple[str, ...] = field(default=(), metadata={"fingerprint": False})
    """Evaluation sets to look for, NAME=PATH each: folder of pictures, webdataset tar, parquet."""
    eval_rungs: tuple[str, ...] = ("bytes", "perceptual")
    """Rungs by which a sample counts as contaminated: bytes, perceptual, caption."""
    num_threads: int = field(default=1, metadata={"fingerprint": False})
    """Threads of the semantic rung and of the evaluation sets; they change no result."""
    max_pairs: int = field(default=1 << 24, metadata={"fingerprint": False})
    """Near pairs held in memory at once, 100 bytes each; more are worked off in parts."""

    eval_sets_state: tuple[str, ...] = field(init=False, default=())
    """The evaluation sets' names, with digests of their files' names, sizes and times."""

    num_gpus: ClassVar[float] = 0

    @property
    def num_cpus(self) -> float:
        return self.num_threads

    def __post_init__(self) -> None:
        require_folder_name("signals", self.signals)
        require_folder_name("name", self.name)
        if self.name == self.signals:
            raise DeclipError(
                f"name is {self.name!r}, the signals that are read; choose another name."
            )
        _require_known("rungs", self.rungs, RUNGS)
        _require_known("eval_rungs", self.eval_rungs, EVAL_RUNGS)
        _require_known("picture_hash", (self.picture_hash,), ("auto", *DISTANCES))
        _require_known("semantic_kind", (self.semantic_kind,), SIDES)
        if not self.rungs and not self.eval_sets:
            raise DeclipError("rungs and eval_sets are both empty: name a rung or a set.")
        require_between("max_hash_distance", self.max_hash_distance, 0, MAX_DISTANCE)
        require_between("min_hash_bits", self.min_hash_bits, 0, 32)
        require_between("max_brightness_difference", self.max_brightness_difference, 0, 255)
        require_between("max_aspect_change", self.max_aspect_change, 0)
        require_between("min_cosine", self.min_cosine, 0, 1)
        require_between("num_clusters", self.num_clusters, 1)
        require_between("seed", self.seed, 0, 2**31 - 2)
        require_between("num_threads", self.num_threads, 1)
        require_between("max_pairs", self.max_pairs, 1)
        if ("semantic" in self.rungs) != bool(self.semantic_embeddings):
            raise DeclipError(
                f"rungs are {', '.join(self.rungs) or '(none)'} and semantic_embeddings is "
                f"{self.semantic_embeddings!r}; the rung 'semantic' and the name of embeddings go "
                "together: give both or neither."
            )
        if self.eval_sets and not self.eval_rungs:
            raise DeclipError("eval_sets are named and eval_rungs is empty; name a rung.")
        places = [parse_eval_set(setting) for setting in self.eval_sets]
        full = tuple(f"{name}={full_path(str(place))}" for name, place in places)
        states = tuple(sorted(f"{name}:{path_state(str(place))}" for name, place in places))
        object.__setattr__(self, "eval_sets", full)
        object.__setattr__(self, "eval_sets_state", states)

    def tasks(self) -> Sequence[str]:
        return ("all",)

    def is_done(self, task: str) -> bool:
        store = Store(self.root)
        paths = [layout.signals_path(self.name, shard) for shard in layout.list_shards(store)]
        if self.eval_sets:
            paths.append(overlaps_path(self.name))
        return all(store.exists(path) for path in (report_path(self.name), *paths))

    def worker(self) -> Callable[[str], TaskStats]:
        return lambda task: find_duplicates(self, Store(self.root))


def report_path(name: str) -> str:
    return f"signals/{name}/report.json"


def overlaps_path(name: str) -> str:
    return f"signals/{name}/eval_overlaps.parquet"


def _require_known(setting: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            raise DeclipError(f"{setting} has {value!r}.{did_you_mean(value, known)}")
    if len(set(values)) < len(values):
        raise DeclipError(f"{setting} names {', '.join(values)}; name each only once.")


def find_duplicates(settings: FindDuplicates, store: Store) -> TaskStats:
    """Run the rungs, write a table a shard and the report, which comes last."""
    shards = shard_tasks(settings.root)
    samples = SampleColumns(store, settings.signals, shards)
    sets = [parse_eval_set(setting) for setting in settings.eval_sets]
    if len({name for name, _ in sets}) < len(sets):
        raise DeclipError("eval_sets has two sets of one name; give them as NAME=PATH.")
    finder = _Finder(settings, samples)
    found, marks = finder.run()
    contamination = finder.contamination(sorted(sets)) if sets else None
    files = [
        _write_shard(settings, samples, number, found, marks, contamination)
        for number in range(len(shards))
    ]
    report = _report(settings, samples, found, marks, finder.looked_at)
    if contamination is not None:
        sidecars.write_table(store, overlaps_path(settings.name), contamination.overlaps())
        files.append(overlaps_path(settings.name))
        report["eval_sets"] = contamination.report()
        report["num_contaminated"] = contamination.num_contaminated
    store.write_bytes(report_path(settings.name), canonical_json(report))
    shown: dict[str, Any] = {rung: report["rungs"][rung]["alone"] for rung in found}
    if contamination is not None:
        shown["contaminated"] = contamination.num_contaminated
    return TaskStats(
        num_in=samples.num_rows,
        num_out=samples.num_rows,
        files=[*files, report_path(settings.name)],
        extra=shown,
    )


class _Finder:
    """Runs the rungs one by one; what one has read is let go before the next."""

    def __init__(self, settings: FindDuplicates, samples: SampleColumns) -> None:
        self.settings = settings
        self.samples = samples
        self.rank = preference(samples)
        self.same_bytes: Rows | None = None
        self.looked_at: dict[str, Any] = {}
        """Facts for the report: rung -> what it went by, and what it left out."""

    def run(self) -> tuple[Found, dict[str, npt.NDArray[Any]]]:
        """Leaders of each rung, and the distances and cosines that go with them."""
        found: Found = {}
        marks: dict[str, npt.NDArray[Any]] = {}
        wanted = self.settings.rungs
        if "bytes" in wanted or ("perceptual" in wanted and "image_sha256" in self.samples.names):
            self.same_bytes = exact_leaders(*self._image_digests(), self.rank)
        if "bytes" in wanted and self.same_bytes is not None:
            found["bytes"] = self.same_bytes
        if "caption" in wanted:
            digests, known = self._caption_digests()
            found["caption"] = exact_leaders(digests, known, self.rank)
            self.looked_at["caption"] = {"without_caption": int((~known).sum())}
        if "perceptual" in wanted:
            found["perceptual"], marks["perceptual"] = self._perceptual()
        if "semantic" in wanted:
            found["semantic"], marks["semantic"] = self._semantic()
        return found, marks

    @property
    def picture_hash(self) -> str:
        """The column of the perceptual rung."""
        if self.settings.picture_hash != "auto":
            return self.settings.picture_hash
        return "image_phash" if "image_phash" in self.samples.names else "image_dhash"

    @property
    def likeness(self) -> Likeness:
        s = self.settings
        unset = s.max_hash_distance is None
        return Likeness(
            max_distance=DISTANCES[self.picture_hash] if unset else s.max_hash_distance or 0,
            min_bits=s.min_hash_bits,
            max_brightness_difference=s.max_brightness_difference,
            max_aspect_change=s.max_aspect_change,
        )

    def _image_digests(self) -> tuple[Bytes, Mask]:
        return self.samples.hex_bytes("image_sha256", DIGEST_DIGITS)

    def _caption_digests(self) -> tuple[Bytes, Mask]:
        """Digests of the normalized captions; an empty caption is nobody's duplicate."""
        digests, known = self.samples.hex_bytes("caption_sha", DIGEST_DIGITS)
        nothing = parse_hex([caption_sha("")], DIGEST_DIGITS)
        return digests, known & (digests != nothing).any(axis=1)

    def _looks(self) -> tuple[Looks, Mask]:
        hashes, known = self.samples.hex_bytes(self.picture_hash, 16)
        layouts: Bytes | None = None
        if "image_layout" in self.samples.names:
            layouts, has_layout = self.samples.hex_bytes("image_layout", 32)
            known &= has_layout
        width, height = self.samples.numbers("width"), self.samples.numbers("height")
        known &= (width > 0) & (height > 0)
        aspects = (np.maximum(width, 1) / np.maximum(height, 1)).astype(np.float32)
        numbers = hashes.view(">u8")[:, 0].astype(np.uint64)
        return Looks(hashes=numbers, layouts=layouts, aspects=aspects), known

    def _perceptual(self) -> tuple[Rows, npt.NDArray[Any]]:
        looks, known = self._looks()
        likeness = self.likeness
        self.looked_at["perceptual"] = {
            "picture_hash": self.picture_hash,
            "max_hash_distance": likeness.max_distance,
            "brightness_compared": looks.layouts is not None,
            "says_too_little": int((known & ~likeness.says_enough(looks.hashes)).sum()),
            "without_hash": int((~known).sum()),
        }
        leader = perceptual_leaders(
            looks,
            known,
            self.rank,
            likeness,
            same_bytes=self.same_bytes,
            max_pairs=self.settings.max_pairs,
        )
        return leader, hash_distances(looks.hashes, leader)

    def _semantic(self) -> tuple[Rows, npt.NDArray[Any]]:
        """Leaders among the samples that have a vector; the others are nobody's duplicate."""
        s, samples = self.settings, self.samples
        parts = read_parts(samples.store, s.semantic_embeddings, samples.shards)
        vectors = StoredVectors(samples.store, s.semantic_embeddings, s.semantic_kind, parts)
        rows: list[Rows] = []
        for number, part in enumerate(parts):
            vectors.check_part(number)
            keys = [
                str(r["key"]) for r in read_metadata(samples.store, s.semantic_embeddings, part)
            ]
            start, stop = int(samples.starts[number]), int(samples.starts[number + 1])
            place = pa.compute.index_in(
                pa.array(keys, pa.large_string()), samples.keys.slice(start, stop - start)
            )
            if place.null_count:
                raise DeclipError(
                    f"embeddings {s.semantic_embeddings!r} of shard {part.shard} have samples that "
                    f"signals {s.signals!r} lack; rerun the stage that embeds."
                )
            rows.append(place.to_numpy().astype(np.int64) + start)
        owner = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        local, cosine = semantic_leaders(
            vectors,
            self.rank[owner],
            min_cosine=s.min_cosine,
            num_clusters=s.num_clusters,
            seed=s.seed,
            num_threads=s.num_threads,
        )
        leader = np.full(samples.num_rows, -1, dtype=np.int64)
        near = np.full(samples.num_rows, np.nan, dtype=np.float32)
        leader[owner] = np.where(local < 0, -1, owner[local])
        near[owner[local >= 0]] = cosine[local >= 0]
        self.looked_at["semantic"] = {
            "encoder": parts[0].encoder,
            "encoder_digest": parts[0].encoder_digest,
            "without_vector": samples.num_rows - len(owner),
        }
        return leader, near

    def contamination(self, sets: Sequence[tuple[str, Any]]) -> Contamination:
        """Overlaps with the evaluation sets, which are compared in the order of their names."""
        is_dhash = self.picture_hash == "image_dhash"
        loaded = [
            load_eval_set(n, p, is_dhash=is_dhash, num_threads=self.settings.num_threads)
            for n, p in sets
        ]
        flags = frozenset(self.settings.eval_rungs)
        found = Contamination(sets=loaded, flags=flags, num_rows=self.samples.num_rows)
        if any(len(entries.image_digests) for entries in loaded):
            stored, came = self._image_digests(), self.samples.downloaded_digests()
            for number, entries in enumerate(loaded):
                wanted, owner = entries.image_digests, entries.image_owner
                both = (match_digests(*each, wanted, owner) for each in (stored, came))
                found.add(number, "bytes", itertools.chain.from_iterable(both))
            del stored, came
            looks, known = self._looks()
            for number, entries in enumerate(loaded):
                matches = match_looks(looks, known, entries, self.likeness)
                found.add(number, "perceptual", matches)
            del looks
        if any(len(entries.caption_digests) for entries in loaded):
            digests, known = self._caption_digests()
            for number, entries in enumerate(loaded):
                wanted, owner = entries.caption_digests, entries.caption_owner
                found.add(number, "caption", match_digests(digests, known, wanted, owner))
        return found


def _write_shard(
    settings: FindDuplicates,
    samples: SampleColumns,
    number: int,
    found: Found,
    marks: Mapping[str, npt.NDArray[Any]],
    contamination: Contamination | None,
) -> str:
    """The table of one shard, one row a success, ordered by key."""
    start, stop = int(samples.starts[number]), int(samples.starts[number + 1])
    columns: dict[str, Any] = {"key": samples.keys.slice(start, stop - start).cast(pa.string())}
    for rung, leader in found.items():
        part = leader[start:stop]
        names = samples.keys.take(pa.array(part, pa.int64(), mask=part < 0))
        columns[f"duplicate_{rung}_of"] = names.cast(pa.string())
        if rung == "perceptual":
            near = pa.array(marks[rung][start:stop], pa.int32(), mask=part < 0)
            columns["duplicate_perceptual_distance"] = near
        if rung == "semantic":
            near = pa.array(marks[rung][start:stop], pa.float32(), mask=part < 0)
            columns["duplicate_semantic_cosine"] = near
    if contamination is not None:
        columns |= contamination.columns(start, stop)
    path = layout.signals_path(settings.name, samples.shards[number])
    sidecars.write_table(samples.store, path, pa.table(columns))
    return path


def _report(
    settings: FindDuplicates,
    samples: SampleColumns,
    found: Found,
    marks: Mapping[str, npt.NDArray[Any]],
    looked_at: Mapping[str, Any],
) -> dict[str, Any]:
    """Counts per rung alone and as a ladder; no key of a sample, no path, no time."""
    gone = np.zeros(samples.num_rows, dtype=np.bool_)
    rungs: dict[str, Any] = {}
    for rung in (rung for rung in RUNGS if rung in found):
        leader = found[rung]
        duplicates = leader >= 0
        new = duplicates & ~gone
        gone |= duplicates
        sizes = np.bincount(leader[duplicates])
        sizes = np.sort(sizes[sizes > 0] + 1)[::-1]
        rungs[rung] = {
            "alone": int(duplicates.sum()),
            "ladder": int(new.sum()),
            "left": int(samples.num_rows - gone.sum()),
            "groups": len(sizes),
            "group_sizes": {str(k): v for k, v in sorted(Counter(sizes.tolist()).items())},
            "largest_groups": sizes[:NUM_LARGEST].tolist(),
            **looked_at.get(rung, {}),
        }
    if "perceptual" in marks:
        counts = np.bincount(marks["perceptual"][found["perceptual"] >= 0])
        rungs["perceptual"]["distances"] = counts.tolist()
    shown = asdict(settings)
    for machine in ("root", "num_threads", "max_pairs", "eval_sets_state"):
        del shown[machine]
    # Paths are of this machine; the sets are named, and told by their content, further down.
    shown["eval_sets"] = sorted(parse_eval_set(setting)[0] for setting in settings.eval_sets)
    return {
        "format_version": FORMAT_VERSION,
        "name": settings.name,
        "num_samples": samples.num_rows,
        "kept": int(samples.num_rows - gone.sum()),
        "settings": shown,
        "rungs": rungs,
    }
