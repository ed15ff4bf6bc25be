"""What an opt-out will take out, worked out before anything is changed."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from declip_filter import optout as filter_optout
from declip_filter.embeddings import part_path, read_part
from declip_filter.index_files import rows_path
from declip_shards import DeclipError, Store, layout, read_samples, sidecars
from declip_shards.manifest import canonical_json
from declip_shards.needles import NeedleSearch
from declip_shards.neighbor_tables import MARK
from declip_shards.optout import (
    KINDS,
    PENDING,
    REASON,
    Kind,
    OptOut,
    key_digest,
    load_optout,
    make_optout,
    stored_digests,
    url_digest,
)
from pipelines.optout_proof import Removed, is_telling, picture_slice

FORMAT_VERSION = 1
"""Of the plan and of the report; a reader refuses a higher one."""

REPEATED = "repeated_image"
"""Reason of rows whose picture came from too many URLs of their shard."""

Counts = Mapping[str, Mapping[str, int]]
"""Artefact -> what is counted -> how many."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What a training of this dataset had seen."""

    step: str
    is_finished: bool
    keys: tuple[str, ...]
    """Removed samples that it was trained on."""
    neighbor_keys: tuple[str, ...]
    """Removed samples whose caption it read as another sample's neighbor."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that the opt-out needs to know of the dataset as it was."""

    given: OptOut
    """The user's list."""
    added: OptOut
    """URLs and contents that its keys and stored hashes stand for."""
    matched: tuple[tuple[Kind, str], ...]
    """Entries of the list that a row of the dataset, removed now or before, answers to."""
    removed: tuple[Removed, ...]
    touched: tuple[str, ...]
    """Shards with a file that changes."""
    quarantined: tuple[str, ...]
    """Quarantined files of listed content whose rows stay as the failures they are."""
    shared: tuple[str, ...]
    """Texts and digests of removed samples that others, which stay, have too."""
    before: Counts
    trainings: tuple[TrainingRun, ...]

    @property
    def keys(self) -> frozenset[str]:
        """Of the removed samples."""
        return frozenset(sample.key for sample in self.removed)

    def pack(self) -> bytes:
        """As JSON."""
        value = dataclasses.asdict(self) | {
            "format_version": FORMAT_VERSION,
            "given": self.given.pairs(),
            "added": self.added.pairs(),
        }
        return canonical_json(value)


def read_plan(store: Store) -> Plan | None:
    """The plan of an opt-out that was cut short; None where there is none.

    Raises:
        DeclipError: it is damaged or of a newer version.
    """
    if not store.exists(PENDING):
        return None
    try:
        value = json.loads(store.read_bytes(PENDING))
        if value.pop("format_version") > FORMAT_VERSION:
            raise DeclipError(f"{PENDING!r} is of a newer version; upgrade opendeclip.")
        return Plan(
            given=_optout(value["given"]),
            added=_optout(value["added"]),
            matched=tuple((kind, digest) for kind, digest in value["matched"]),
            removed=tuple(
                Removed(**(row | {"digests": tuple(row["digests"])})) for row in value["removed"]
            ),
            touched=tuple(value["touched"]),
            quarantined=tuple(value["quarantined"]),
            shared=tuple(value["shared"]),
            before=value["before"],
            trainings=tuple(
                TrainingRun(**row | {name: tuple(row[name]) for name in ("keys", "neighbor_keys")})
                for row in value["trainings"]
            ),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DeclipError(
            f"{PENDING!r} is damaged ({error}); delete it and give the list again."
        ) from error


def _optout(pairs: Sequence[Sequence[str]]) -> OptOut:
    return OptOut(digests={kind: frozenset(d for k, d in pairs if k == kind) for kind in KINDS})


def make_plan(store: Store, given: OptOut) -> Plan:
    """Find the samples that the list, and every list before it, names.

    Raises:
        DeclipError: there is no complete shard, or one is damaged.
    """
    shards = layout.list_shards(store)
    if not shards:
        raise DeclipError(
            f"there is no complete shard under {store.path('shards')!r}; give the folder of a "
            "dataset with --out."
        )
    rows = _Rows(store, given, given | load_optout(store))
    added = OptOut()
    for shard in shards:
        added |= rows.resolve(shard)
    rows.listed |= added
    removed: list[Removed] = []
    answered: set[tuple[Kind, str]] = set()
    for shard in shards:
        for row, reasons in rows.matches(shard):
            answered |= reasons
            if row["error_message"] != REASON:
                removed.append(rows.describe(shard, row))
    keys = {sample.key for sample in removed}
    stays = _Remaining(removed)
    for shard in shards if removed else ():
        stays.look_at(store, shard, keys)
    touched = {sample.shard for sample in removed}
    touched |= {s for s in shards if keys and _is_named_anywhere(store, s, keys)}
    return Plan(
        given=given,
        added=added,
        matched=tuple(sorted(answered & set(_pairs(given)))),
        removed=tuple(rows.with_pictures(removed)),
        touched=tuple(sorted(touched)),
        quarantined=_quarantined(store, rows.listed, keys),
        shared=tuple(sorted(stays.shared)),
        before=count_rows(store),
        trainings=tuple(find_trainings(store, removed)),
    )


def _pairs(optout: OptOut) -> Iterator[tuple[Kind, str]]:
    for kind in KINDS:
        for digest in optout.of(kind):
            yield kind, digest


class _Rows:
    """A dataset's rows, held against a list."""

    def __init__(self, store: Store, given: OptOut, listed: OptOut) -> None:
        self.store = store
        self.listed = listed
        # A new hash may be of the picture as it was stored, which only the tar knows.
        self._reads_tars = bool(given.of("sha256") or given.of("md5"))
        self._stored: dict[str, dict[str, tuple[str, str]]] = {}

    def resolve(self, shard: str) -> OptOut:
        """URLs and contents of rows that are named by their key, or by a hash that ingest does
        not see (the stored picture's, the md5)."""
        entries: list[tuple[Kind, str]] = []
        is_needed = self._reads_tars or bool(self.listed.of("key"))
        for row, reasons in self.matches(shard) if is_needed else ():
            if row["error_message"] == REASON:
                continue
            stored = self._stored_of(shard).get(row["key"], ("", ""))
            indirect = {("key", key_digest(row["key"])), *self._hashes(row, stored)}
            if reasons & indirect - {("sha256", str(row["sha256"]).lower())}:
                entries += [("url", row["url"])] if row["url"] else []
                entries += [("sha256", row["sha256"])] if row["sha256"] else []
        return make_optout(entries)

    def matches(self, shard: str) -> Iterator[tuple[dict[str, Any], set[tuple[Kind, str]]]]:
        """(row, the entries that name it) of the listed rows of a shard."""
        path = layout.shard_parquet_path(shard)
        table = sidecars.read_table(self.store, path)
        wanted = ("key", "status", "error_message", "url", "caption", "sha256", "md5")
        names = [n for n in (*wanted, "expected_hash") if n in table.column_names]
        if "url" not in names or "key" not in names:
            raise DeclipError(f"{path!r} has no columns url and key; it is no shard of ours.")
        stored = self._stored_of(shard)
        for row in table.select(names).to_pylist():
            row = {name: row.get(name) for name in (*wanted, "expected_hash")}
            named: set[tuple[Kind, str]] = set()
            if self.listed.of("key"):
                named.add(("key", key_digest(row["key"])))
            if self.listed.of("url") and row["url"] is not None:
                named.add(("url", url_digest(row["url"])))
            if self.listed.of("sha256") or self.listed.of("md5"):
                named |= self._hashes(row, stored.get(row["key"], ("", "")))
            reasons = {(kind, digest) for kind, digest in named if digest in self.listed.of(kind)}
            if reasons:
                yield row, reasons

    def _hashes(self, row: Mapping[str, Any], stored: tuple[str, str]) -> set[tuple[Kind, str]]:
        """What a row's file hashes to, as far as anybody knows."""
        found: set[tuple[Kind, str]] = {("sha256", stored[0]), ("md5", stored[1])}
        found.add(("sha256", str(row["sha256"]).lower()))
        found.add(("md5", str(row["md5"]).lower()))
        algorithm, _, digest = str(row["expected_hash"]).lower().partition(":")
        if row["status"] == "success" and algorithm in ("sha256", "md5"):
            found.add(("sha256" if algorithm == "sha256" else "md5", digest))
        # A picture that came from too many URLs is not stored, but its digest is the detail.
        reason, _, detail = str(row["error_message"]).partition(": ")
        if reason == REPEATED:
            found.add(("sha256", detail))
        return found

    def _stored_of(self, shard: str) -> dict[str, tuple[str, str]]:
        if not self._reads_tars:
            return {}
        if shard not in self._stored:
            self._stored[shard] = {
                key: (sha256, md5)
                for key, (sha256, md5) in stored_digests(self.store, shard).items()
                if sha256 in self.listed.of("sha256") or md5 in self.listed.of("md5")
            }
        return self._stored[shard]

    def describe(self, shard: str, row: Mapping[str, Any]) -> Removed:
        return Removed(
            key=row["key"],
            shard=shard,
            was_stored=row["status"] == "success",
            url=row["url"],
            caption=row["caption"],
            digests=(row["sha256"],) if row["sha256"] else (),
        )

    def with_pictures(self, removed: Sequence[Removed]) -> Iterator[Removed]:
        """The same, with what tells their stored pictures."""
        for shard in sorted({sample.shard for sample in removed}):
            own = [sample for sample in removed if sample.shard == shard]
            wanted = {sample.key for sample in own if sample.was_stored}
            stored = stored_digests(self.store, shard) if wanted else {}
            samples = read_samples(self.store, shard) if wanted else ()
            pictures = {s.key: picture_slice(s.image) for s in samples if s.key in wanted}
            for sample in own:
                digests = {*sample.digests, *stored.get(sample.key, ("",))[:1]} - {""}
                yield dataclasses.replace(
                    sample,
                    digests=tuple(sorted(digests)),
                    picture=pictures.get(sample.key, ""),
                )


class _Remaining:
    """Which texts and digests of removed samples the remaining ones have too."""

    def __init__(self, removed: Sequence[Removed]) -> None:
        self.shared: set[str] = set()
        self._digests = {digest for sample in removed for digest in sample.digests}
        texts = {
            text
            for sample in removed
            for what, text in (("url", sample.url), ("caption", sample.caption))
            if text is not None and is_telling(what, text)
        }
        self._search = NeedleSearch({t.encode("utf-8", "surrogatepass"): t for t in texts})

    def look_at(self, store: Store, shard: str, keys: Collection[str]) -> None:
        """Take the rows of a shard into account that are not in ``keys``."""
        path = layout.shard_parquet_path(shard)
        table = sidecars.read_table(store, path, ["key", "url", "caption", "sha256"])
        gone = pc.is_in(table.column("key"), value_set=pa.array(sorted(keys), pa.string()))
        rest = table.filter(pc.invert(gone))
        for name in ("url", "caption"):
            texts = (text for text in rest.column(name).to_pylist() if text is not None)
            data = "\n".join(texts).encode("utf-8", "surrogatepass")
            self.shared |= {text for text, _, _ in self._search.find(data)}
        self.shared |= self._digests & set(rest.column("sha256").to_pylist())


def _is_named_anywhere(store: Store, shard: str, keys: Collection[str]) -> bool:
    """Whether a row of the shard has one of the samples for a neighbor, or is its duplicate."""
    return any(
        filter_optout.names_a_neighbor(store, name, shard, keys)
        for name in store.list_folders("neighbors")
    ) or any(
        filter_optout.names_a_duplicate(store, name, shard, keys)
        for name in store.list_folders("signals")
    )


def _quarantined(store: Store, listed: OptOut, keys: Collection[str]) -> tuple[str, ...]:
    """Quarantined bytes that are listed, beside those of removed rows."""
    found = []
    for name in store.list("quarantine", ".bin") if listed else ():
        path = f"quarantine/{name}"
        if name.removesuffix(".bin") not in keys and listed.blocks_bytes(store.read_bytes(path)):
            found.append(path)
    return tuple(found)


def find_trainings(store: Store, removed: Sequence[Removed]) -> Iterator[TrainingRun]:
    """The trainings of this dataset, finished or not, and which samples they had read."""
    # Torch is loaded with it, and most opt-outs are of datasets that were trained on.
    from declip_train.settings import TrainSettings
    from pipelines.rechain import read_manifests

    runs = {
        step: (dict(done.settings), True)
        for step, done in read_manifests(store).items()
        if done.stage == "TrainModel"
    }
    if not runs and store.exists("train/config.json"):
        try:
            runs["train"] = (json.loads(store.read_bytes("train/config.json")), False)
        except ValueError:
            runs["train"] = ({}, False)
    fields = {f.name for f in dataclasses.fields(TrainSettings)}
    for step, (settings, is_finished) in sorted(runs.items()):
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()
            if name in fields and name != "root"
        }
        train = TrainSettings(**values)
        read = {
            shard: _trained_keys(store, shard, train.selection, train.splits)
            for shard in {sample.shard for sample in removed if sample.was_stored}
        }
        seen = [s.key for s in removed if s.was_stored and s.key in read[s.shard]]
        near = _neighbors_of(store, train.neighbors, removed) if train.uses_index else ()
        yield TrainingRun(
            step=step,
            is_finished=is_finished,
            keys=tuple(sorted(seen)),
            neighbor_keys=tuple(sorted(near)),
        )


def _trained_keys(
    store: Store, shard: str, selection: str, splits: Collection[str]
) -> frozenset[str]:
    """Keys of a shard that a training of this selection and these splits reads."""
    path = layout.shard_parquet_path(shard)
    table = sidecars.read_table(store, path)
    rows = table.select([n for n in ("key", "status", "split") if n in table.column_names])
    keys = {
        row["key"]
        for row in rows.to_pylist()
        if row["status"] == "success" and (not splits or row.get("split") in splits)
    }
    chosen = layout.selection_path(selection, shard)
    if selection and store.exists(chosen):
        kept = sidecars.read_rows(store, chosen, ["key", "keep"])
        keys &= {row["key"] for row in kept if row["keep"]}
    return frozenset(keys)


def _neighbors_of(store: Store, name: str, removed: Sequence[Removed]) -> set[str]:
    """Which of the samples are in some other row's list, of the table or of a refreshed one."""
    wanted = pa.array(sorted(sample.key for sample in removed), pa.string())
    found: set[str] = set()
    folders = [f for f in store.list_folders("neighbors") if f.partition(MARK)[0] == name]
    for folder in folders:
        for shard in layout.list_shards(store):
            path = layout.neighbors_path(folder, shard)
            if store.exists(path):
                table = sidecars.read_table(store, path, ["neighbor_keys"])
                flat = table.column(0).combine_chunks().flatten()
                found |= set(flat.filter(pc.is_in(flat, value_set=wanted)).to_pylist())
    return found


def count_rows(store: Store) -> dict[str, dict[str, int]]:
    """Rows of every artefact, for the report's before and after."""
    shards = layout.list_shards(store)
    counts: dict[str, dict[str, int]] = {"shards": {"rows": 0, "samples": 0}}

    def add(artefact: str, **more: int) -> None:
        own = counts.setdefault(artefact, {})
        for name, number in more.items():
            own[name] = own.get(name, 0) + number

    for shard in shards:
        path = layout.shard_parquet_path(shard)
        statuses = sidecars.read_table(store, path, ["status"]).column(0).to_pylist()
        add("shards", rows=len(statuses), samples=statuses.count("success"))
        if store.exists(layout.ledger_path(shard)):
            urls = sidecars.read_table(store, layout.ledger_path(shard), ["url"]).column(0)
            add("ledger", rows=len(urls), urls=len(urls) - urls.null_count)
        for folder in ("signals", "selection", "neighbors"):
            for name in store.list_folders(folder):
                path = f"{folder}/{name}/{shard}.parquet"
                if store.exists(path):
                    add(f"{folder}/{name}", **_counted(store, folder, path))
        for name in store.list_folders("embeddings"):
            if store.exists(part_path(name, shard)):
                add(f"embeddings/{name}", rows=read_part(store, name, shard).num_rows)
    for name in store.list_folders("index"):
        if store.exists(rows_path(name)):
            add(f"index/{name}", rows=sidecars.num_rows(store, rows_path(name)))
    add("quarantine", files=len(store.list("quarantine", ".bin")))
    return counts


def _counted(store: Store, folder: str, path: str) -> dict[str, int]:
    if folder == "selection":
        keep = sidecars.read_table(store, path, ["keep"]).column(0).to_pylist()
        return {"rows": len(keep), "kept": sum(keep)}
    if folder == "neighbors":
        lists = sidecars.read_table(store, path, ["neighbor_keys"]).column(0).combine_chunks()
        return {"rows": len(lists), "neighbors": len(lists.flatten())}
    return {"rows": sidecars.num_rows(store, path)}
