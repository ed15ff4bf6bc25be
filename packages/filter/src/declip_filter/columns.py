"""Read of a shard's signals and table what rules need, and nothing else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from declip_filter.evaluation import Column, as_column
from declip_filter.signals import SCHEMA, signal_columns
from declip_shards import DeclipError, Store, layout, sidecars
from declip_shards.errors import did_you_mean

NUM_CONCEPTS = "num_concepts"
"""A signal that is not stored: how many of the user's concepts are in the caption."""
CAPTION = "caption"
KEY = "key"
MAKERS: Mapping[str, tuple[str, str]] = {
    "clip_score": ("ScorePairs", "--score.scorer clip:cosine"),
    "aesthetics_score": ("ScorePairs", "--score.scorer aesthetics:FILE"),
    "nsfw_score": ("ScorePairs", "--score.scorer nsfw:yahoo, or nsfw:FILE"),
    "watermark_score": ("ScorePairs", "--score.scorer watermark:FILE"),
    "duplicate_semantic_": (
        "FindDuplicates",
        "--duplicates.rungs bytes,semantic --duplicates.semantic-embeddings all",
    ),
    "duplicate_bytes_": ("FindDuplicates", "--duplicates.rungs bytes"),
    "duplicate_caption_": ("FindDuplicates", "--duplicates.rungs bytes,caption"),
    "duplicate_perceptual_": ("FindDuplicates", "--duplicates.rungs bytes,perceptual"),
    "contaminated_": ("FindDuplicates", "--duplicates.eval-sets NAME=PATH"),
    "image_cluster": ("ClusterImages", "--cluster.references FILE"),
    "caption_nouns": ("MeasureImages", "--measure.wordnet FOLDER"),
    "caption_dictionary_words": ("MeasureImages", "--measure.dictionary en"),
    "caption_language": ("MeasureImages", "--measure.detect-language true"),
}
"""Beginning of a signal's name -> the stage that makes it, and the setting that asks for it."""


def how_made(column: str) -> str:
    """What makes a signal and what to set, as half a sentence; empty for one of the user's own."""
    for beginning, (stage, setting) in MAKERS.items():
        if column.startswith(beginning):
            return f"{stage} makes it: set {setting}"
    return "MeasureImages makes it: run the stage that measures" if column in SCHEMA.names else ""


@dataclass(frozen=True, kw_only=True)
class ColumnReader:
    """Columns by name out of several signal sets and the shards' own tables.

    Where each column lies is looked up once, in the shard that is read first. A signal goes before
    a column of the shard's table of the same name. Sets that have none of the columns are not read.
    """

    store: Store
    signals: Sequence[str]
    """Names of the sets; the first must be there, the others if a column of theirs is wanted."""
    wanted: Sequence[str]
    """Names of columns, without ``key``."""
    fallback: Mapping[str, str] = field(default_factory=dict)
    """Value for all samples of columns that the shards' tables may lack."""
    split_column: str | None = None
    """The column that the setting of this name names: a fault with it is told so."""
    count_concepts: Callable[[Column], Column] | None = None
    """From captions to :data:`NUM_CONCEPTS`."""
    is_checked: bool = True
    """Whether signals are compared with the shard's table: that they are of the same samples."""
    _places: dict[str, list[str]] = field(default_factory=dict, init=False, repr=False)

    def read(self, shard: str) -> dict[str, Column]:
        """``key`` and the wanted columns: one entry a success, ordered by key.

        Raises:
            DeclipError: a column is nowhere (the nearest name is told), a table is missing or
                damaged, or the tables are of different samples.
        """
        places = self._places or self._find(shard)
        found: dict[str, Column] = {}
        for place, names in places.items():
            if place:
                self._join(found, place, shard, names)
        mine = places[""]
        if mine or self.is_checked:
            found |= self._shard_columns(shard, mine, found[KEY])
        if NUM_CONCEPTS in self.wanted and self.count_concepts:
            found[NUM_CONCEPTS] = self.count_concepts(found[CAPTION])
        return found

    def empty(self, shard: str) -> dict[str, Column]:
        """What :meth:`read` returns, without a row: from the files' footers alone.

        Raises:
            DeclipError: as :meth:`read`, as far as it can be told without rows.
        """
        kinds = self.schema(shard)
        own = self._footer(layout.shard_parquet_path(shard))
        found: dict[str, Column] = {KEY: pa.array([], pa.string())}
        for place, names in self._find(shard).items():
            for name in names:
                kind = kinds[name] if place else pa.string()
                if not place and name in own.names:
                    kind = own.field(name).type
                column = as_column(pa.array([], kind))
                found[name] = column if place else self._as_split(name, column)
        if NUM_CONCEPTS in self.wanted:
            found[NUM_CONCEPTS] = pa.array([], pa.int32())
        return found

    def schema(self, shard: str) -> dict[str, pa.DataType]:
        """Types of all columns of the sets that are there, by name; ``key`` left out.

        Raises:
            DeclipError: the first set is missing, or a table is damaged.
        """
        present = self._present(shard)
        signal_columns(self.store, present, shard)
        kinds: dict[str, pa.DataType] = {}
        for name in present:
            schema = self._footer(layout.signals_path(name, shard))
            kinds |= {column.name: column.type for column in schema if column.name != KEY}
        return kinds

    def _footer(self, path: str) -> pa.Schema:
        try:
            with self.store.open(path) as f:
                return pq.read_schema(f)
        except FileNotFoundError as error:
            raise DeclipError(f"{path!r} is missing; rerun the stage that writes it.") from error
        except (pa.ArrowInvalid, OSError) as error:
            raise DeclipError(
                f"{path!r} is damaged ({error}); delete it and rerun the stage that writes it."
            ) from error

    def _present(self, shard: str) -> list[str]:
        names = list(dict.fromkeys(self.signals))
        there = [n for n in names[1:] if self.store.exists(layout.signals_path(n, shard))]
        return [names[0], *there]

    def _find(self, shard: str) -> dict[str, list[str]]:
        """Set -> the wanted columns that it has; ``""`` stands for the shard's own table."""
        owners = signal_columns(self.store, self._present(shard), shard)
        own = self._footer(layout.shard_parquet_path(shard)).names
        wanted = dict.fromkeys(self.wanted)
        if NUM_CONCEPTS in wanted:
            del wanted[NUM_CONCEPTS]
            wanted[CAPTION] = None
        places: dict[str, list[str]] = {self.signals[0]: [], "": []}
        for column in wanted:
            if column == self.split_column and column not in own:
                path = layout.shard_parquet_path(shard)
                raise DeclipError(
                    f"split_column is {column!r}, which {path!r} does not have."
                    f"{did_you_mean(column, own)}"
                )
            if column != self.split_column and column in owners:
                places.setdefault(owners[column], []).append(column)
            elif column in own or column in self.fallback:
                places[""].append(column)
            else:
                raise self._unknown(column, shard, [*owners, *own])
        self._places.update(places)
        return places

    def _unknown(self, column: str, shard: str, known: Sequence[str]) -> DeclipError:
        present = self._present(shard)
        absent = [name for name in self.signals if name not in present]
        hint = ""
        if absent:
            hint = (
                f" Signals {', '.join(absent)} are named but not there: run the stage that writes "
                "them if the column is theirs."
            )
        made = how_made(column)
        return DeclipError(
            f"no signal {column!r} in {', '.join(present)}, nor a column of the shards."
            f"{f' {made}; name its set in --filter.signals, too.' if made else ''}"
            f"{did_you_mean(column, set(known))}{hint}"
        )

    def _join(self, found: dict[str, Column], name: str, shard: str, columns: list[str]) -> None:
        path = layout.signals_path(name, shard)
        table = sidecars.read_table(self.store, path, [KEY, *columns])
        keys = as_column(table.column(KEY))
        if KEY not in found:
            found[KEY] = keys
        elif not keys.equals(found[KEY]):
            raise DeclipError(
                f"signals {self.signals[0]!r} and {name!r} of shard {shard} are of other samples; "
                "rerun the stages that wrote them."
            )
        for column in columns:
            found[column] = as_column(table.column(column))

    def _shard_columns(self, shard: str, columns: list[str], keys: Column) -> dict[str, Column]:
        """Columns of the shard's own table, of its successes, ordered as the signals are."""
        path = layout.shard_parquet_path(shard)
        there = [column for column in columns if column not in self.fallback]
        own = self._footer(path).names
        there += [column for column in columns if column in self.fallback and column in own]
        rows = sidecars.read_table(self.store, path, [KEY, "status", *there])
        succeeded = pc.equal(rows.column("status"), "success")
        if not pc.all(succeeded).as_py():
            rows = rows.filter(succeeded)
        own_keys = as_column(rows.column(KEY))
        if not own_keys.equals(keys):
            rows = rows.sort_by(KEY)
            own_keys = as_column(rows.column(KEY))
        if not own_keys.equals(keys):
            raise DeclipError(
                f"signals {self.signals[0]!r} of shard {shard} are of other samples than the shard "
                "holds now; rerun the stage that measures."
            )
        found = {column: as_column(rows.column(column)) for column in there}
        for column in columns:
            if column not in found:
                found[column] = pa.repeat(pa.scalar(self.fallback[column]), len(keys))
            found[column] = self._as_split(column, found[column])
        return found

    def _as_split(self, name: str, values: Column) -> Column:
        """The split's values as texts, for it may be a number; any other column as it is."""
        if name != self.split_column and name not in self.fallback:
            return values
        try:
            return values.cast(pa.string())
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
            raise DeclipError(
                f"the split's column {name!r} is {values.type}, which has no text to compare; set "
                "split_column to a column of texts or numbers, or keep_splits to none."
            ) from error
