"""Make a newer neighbor table beside the one in use, and put it into use by one rename.

A training run may go on meanwhile: everything is written into folders of the new version alone
(``embeddings/NAME.ID/``, ``neighbors/TABLE@ID/``, manifests of their own), and the trainer asks
which table is in use when an epoch begins. ID is a hash of what the version is made from, so a
refresh that was killed finds its own files again.
"""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from declip_filter import BuildNeighbors, EmbedPairs
from declip_filter.embeddings import read_part
from declip_filter.encoders import check_encoder_name, load_encoder
from declip_filter.neighbor_graph import BuildGraph
from declip_filter.table_versions import (
    finish_version,
    finished_versions,
    inputs_digest,
    old_versions,
    remove_version,
    version_id,
)
from declip_filter.vectors import side_kinds
from declip_shards import DeclipError, Store, layout, neighbor_tables
from declip_shards.errors import did_you_mean
from declip_shards.manifest import settings_of
from pipelines import ray_runner
from pipelines.evaluate import FACTORY
from pipelines.lock import LOCK, Hold, task_lock
from pipelines.options import apply_overrides
from pipelines.pipeline import Pipeline, Step
from pipelines.runner import run_step
from pipelines.stopping import stop_on_signals

REFRESH_LOCK = "manifests/refresh.lock"
"""Held by a refresh: one at a time in a dataset."""
TRAIN_LOCK = "train/lock"
"""Held by a training run (declip_train.loop)."""
EXPORTS = "train/exports"
"""Models taken out of checkpoints of runs that go on: RUN/step_NNNNNNNN/."""
CHECKPOINT = "checkpoint:"
FIXED = {
    "--embed.name": "it is made from the version's ID",
    "--embed.encoder": "give --encoder",
    "--embed.selection": "it is that of the table",
    "--embed.texts": "it is that of the table",
    "--embed.images": "it is that of the table",
    "--neighbors.name": "give --table",
    "--neighbors.index": "a refreshed table needs none",
    "--neighbors.embeddings": "they are made anew",
}
"""Settings of the steps that a refresh decides by itself, and why."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A refresh before anything is written."""

    table: str
    folder: str
    """Of the new version, under neighbors/."""
    embeddings: str
    """Name of its vectors."""
    pipeline: Pipeline
    """Its steps, with the names that their manifests get."""
    inputs_sha256: str
    selection: str
    run: str
    """Training run whose checkpoint embeds; empty where none does."""
    step: int | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a refresh came to."""

    folder: str
    record: Mapping[str, Any]
    """Its version.json."""
    is_new: bool
    """Whether the table in use is another one than before."""
    removed: Sequence[str]
    """Old versions that were removed."""


def refresh(
    root: str,
    encoder: str,
    *,
    table: str = "captions",
    keep: int | None = None,
    runner: str = "ray",
    overrides: Sequence[tuple[str, str]] = (),
) -> Outcome:
    """Embed the selected pairs anew, make a table from it, and put it into use.

    Args:
        root: the dataset; a local folder.
        encoder: KIND:MODEL, or ``checkpoint:FOLDER``: an export, a checkpoint, or a folder of
            checkpoints, of which the newest whole one is taken.
        table: name of the neighbor table.
        keep: refreshed tables to keep; None keeps all.
        runner: where tasks run, ``ray`` or ``local``.
        overrides: settings of the steps (``--embed.batch-size``, ``--neighbors.k``).

    Raises:
        DeclipError: there is no such table, the encoder cannot embed what the table is of, a task
            failed, or the dataset was changed meanwhile.
    """
    store = Store(root)
    with stop_on_signals(), refresh_hold(store) as hold, ray_runner.shut_down_after():
        if keep is not None:
            old_versions(store, table, keep)  # a wrong number is told before the work
        plan = make_plan(store, encoder, table, overrides)
        before = neighbor_tables.resolve_table(store, table).folder
        if neighbor_tables.read_version_record(store, plan.folder) is None:
            for step in plan.pipeline.steps:
                report = run_step(plan.pipeline, step, runner=runner, hold=hold)
                if not report.skipped:
                    print(f"{step.name}: {report.num_out:,} rows, {report.seconds:.1f} s")
            _refuse_changed(store, plan)
            finish_version(
                store,
                plan.folder,
                before=before,
                inputs_sha256=plan.inputs_sha256,
                run=plan.run,
                step=plan.step,
            )
        hold.check()
        if before != plan.folder:
            neighbor_tables.point_to(store, table, plan.folder)
        removed = remove_old(store, table, keep) if keep is not None else []
        record = neighbor_tables.read_version_record(store, plan.folder) or {}
    return Outcome(folder=plan.folder, record=record, is_new=before != plan.folder, removed=removed)


# Plan --------------------------------------------------------------------------------------------


def make_plan(store: Store, encoder: str, table: str, overrides: Sequence[tuple[str, str]]) -> Plan:
    """What is to be run, and under which ID; loads the encoder, and writes nothing of the table.

    Raises:
        DeclipError: see :func:`refresh`.
    """
    for flag, _ in overrides:
        if flag.replace("_", "-") in FIXED:
            raise DeclipError(f"{flag} cannot be set for a refresh: {FIXED[flag]}.")
    description = _described(store, table)
    factory = dict(overrides).get("--embed.encoder-factory", "")
    if encoder.startswith(CHECKPOINT):
        factory = factory or FACTORY  # worker processes know this kind by its dotted path alone
    check_encoder_name(encoder, factory)
    encoder, run, step = _checkpoint(store, encoder)
    pipeline = apply_overrides(_pipeline(store, encoder, factory, description), overrides)
    stages: dict[str, Any] = {step.name: step.stage for step in pipeline.steps}
    digest, origin = _load_encoder(store, stages["embed"])
    selection = str(description["selection"])
    inputs = inputs_digest(store, selection)
    new_id = version_id(
        {
            "encoder_digest": digest,
            "inputs": inputs,
            "base": neighbor_tables.description_digest(store, table),
            "settings": {
                name: settings_of(stages[name], hashed_only=True) for name in ("embed", "neighbors")
            },
        }
    )
    folder = neighbor_tables.version_folder(table, new_id)
    vectors = f"{description['embeddings']}.{new_id}"
    return Plan(
        table=table,
        folder=folder,
        embeddings=vectors,
        pipeline=_named(pipeline, table, new_id, folder, vectors),
        inputs_sha256=inputs,
        selection=selection,
        run=run or str(origin.get("run", "")),
        step=step if step is not None else origin.get("steps"),
    )


def _described(store: Store, table: str) -> Mapping[str, Any]:
    description = neighbor_tables.read_description(store, table)
    if description is None:
        known = [f for f in store.list_folders("neighbors") if neighbor_tables.MARK not in f]
        near = did_you_mean(table, known) if table not in known else ""
        raise DeclipError(
            f"{neighbor_tables.description_path(table)!r} is missing, so there is no neighbor "
            f"table {table!r} to refresh; run the pipeline until its step neighbors first.{near}"
        )
    return description


def _pipeline(store: Store, encoder: str, factory: str, description: Mapping[str, Any]) -> Pipeline:
    """The steps with the settings of the table that is refreshed."""
    part = read_part(store, str(description["embeddings"]), layout.list_shards(store)[0])
    wanted = {*part.kinds, *side_kinds(str(description["kind"]))}
    known = {f.name for f in dataclasses.fields(BuildNeighbors)}
    settings = {k: v for k, v in description["settings"].items() if k in known}
    if settings["method"] == "index":
        settings["method"] = "auto"  # of exact and graph: there is no index of the new vectors
    settings |= {"root": store.url, "index": "", "kind": str(description["kind"])}
    settings |= {"embeddings": str(description["embeddings"])}
    steps = [
        Step(
            name="embed",
            stage=EmbedPairs(
                root=store.url,
                name=str(description["embeddings"]),
                encoder=encoder,
                encoder_factory=factory,
                selection=str(description["selection"]),
                texts="text_emb" in wanted,
                images="img_emb" in wanted,
            ),
            on_ray=True,
            summary="embed the selected pairs anew",
        ),
        Step(
            name="graph",
            stage=BuildGraph(**settings),
            on_ray=True,
            summary="compare all vectors at once",
            settings_of="neighbors",
        ),
        Step(
            name="neighbors",
            stage=BuildNeighbors(**settings),
            on_ray=True,
            summary="look up each pair's nearest other captions",
        ),
    ]
    return Pipeline(recipe="refresh", root=store.url, steps=steps).with_followers()


def _named(pipeline: Pipeline, table: str, new_id: str, folder: str, embeddings: str) -> Pipeline:
    """The steps under the names of one version: its folders, and manifests of its own."""
    steps = []
    for step in pipeline.steps:
        stage: Any = step.stage
        names = {"name": folder, "embeddings": embeddings}
        if step.name == "embed":
            names = {"name": embeddings}
        steps.append(
            dataclasses.replace(
                step,
                name=_step_name(table, new_id, step.name),
                stage=dataclasses.replace(stage, **names),
                settings_of="",
            )
        )
    return dataclasses.replace(pipeline, steps=steps)


def _step_name(table: str, new_id: str, step: str) -> str:
    return f"refresh-{table}-{new_id}-{step}"


def _checkpoint(store: Store, encoder: str) -> tuple[str, str, int | None]:
    """The encoder's name, and of which run and step it is where it is a checkpoint.

    A checkpoint of a run that goes on is turned into an export first: an encoder reads those.
    """
    if not encoder.startswith(CHECKPOINT):
        return encoder, "", None
    # Torch is loaded with it.
    from declip_train.checkpoint_export import export_checkpoint, find_checkpoint

    given = encoder.removeprefix(CHECKPOINT)
    folder = Path(given) if Path(given).is_absolute() else store.local_path(given)
    if not folder.is_dir():
        raise DeclipError(
            f"encoder {encoder!r}: there is no folder {str(folder)!r}; name an export, or a folder "
            "of checkpoints (train/checkpoints)."
        )
    place = find_checkpoint(folder)
    if place is None:
        return encoder, "", None
    target = f"{EXPORTS}/{place.run}/{place.folder.name}"
    export_checkpoint(place, _config_of(store, place.folder), store.local_path(target))
    return f"{CHECKPOINT}{target}", place.run, place.step


def _config_of(store: Store, checkpoint: Path) -> Path:
    """The configuration beside a checkpoint (train/checkpoints/RUN/step_N), or the dataset's."""
    beside = checkpoint.resolve().parents[2] / "config.json"
    config = beside if beside.is_file() else store.local_path("train/config.json")
    if not config.is_file():
        raise DeclipError(
            f"{str(checkpoint)!r} needs its run's configuration, and {str(config)!r} is missing; "
            "name the checkpoint of a run that the train step or declip_train started there."
        )
    return config


def _load_encoder(store: Store, embed: EmbedPairs) -> tuple[str, Mapping[str, Any]]:
    """Digest and provenance of an encoder that can do what the table asks of it.

    Raises:
        DeclipError: it cannot be loaded, or embeds no texts or no images.
    """
    loaded = load_encoder(
        embed.encoder, root=store.url, device=embed.device, factory=embed.encoder_factory
    )
    for wanted, supported, what in (
        (embed.texts, loaded.supports_text, "texts"),
        (embed.images, loaded.supports_image, "images"),
    ):
        if wanted and not supported:
            raise DeclipError(
                f"encoder {loaded.name!r} does not embed {what}, which the neighbor table is made "
                "of; choose another encoder."
            )
    origin: Mapping[str, Any] = getattr(loaded, "provenance", {})
    return loaded.digest, origin


def _refuse_changed(store: Store, plan: Plan) -> None:
    """Refuse to put a table into use that is of samples which are no longer those.

    What was made goes at once: an opt-out in between must not leave anything of what it removed.
    """
    if inputs_digest(store, plan.selection) == plan.inputs_sha256:
        return
    _forget(store, plan.table, plan.folder, plan.embeddings)
    raise DeclipError(
        f"shards or selection {plan.selection!r} were changed while the table was refreshed; what "
        "was made is removed and the table in use stays. Run the same command again."
    )


# Old versions ------------------------------------------------------------------------------------


def remove_old(store: Store, table: str, keep: int) -> list[str]:
    """Remove refreshed tables but the ``keep`` newest, the one in use, and the trainer's.

    Returns:
        Their folders.
    """
    from declip_train.tables_in_use import hold_tables

    with hold_tables(store.local_path("train")) as noted:
        reading = {*_read_by_training(store, table)}
        if _is_held(store.local_path(TRAIN_LOCK)):
            reading |= noted.read()
        going = old_versions(store, table, keep, in_use=reading)
        for folder in going:  # without its mark no run decides on it any more
            store.remove(neighbor_tables.version_path(folder))
    for folder in going:
        description = neighbor_tables.read_description(store, folder) or {}
        new_id = folder.partition(neighbor_tables.MARK)[2]
        base = neighbor_tables.read_description(store, table) or {}
        name = str(description.get("embeddings") or f"{base.get('embeddings', '')}.{new_id}")
        _forget(store, table, folder, name)
        _remove_export(store, table, str(description.get("encoder", "")))
    return going


def _forget(store: Store, table: str, folder: str, embeddings: str) -> None:
    """Remove a version's table, vectors and manifests."""
    remove_version(store, folder, embeddings)
    new_id = folder.partition(neighbor_tables.MARK)[2]
    for step in ("embed", "graph", "neighbors"):
        name = _step_name(table, new_id, step)
        store.remove(layout.manifest_path(name))
        store.remove(f"manifests/{name}.run.json")
        store.remove_folder(f"manifests/{name}")


def _remove_export(store: Store, table: str, encoder: str) -> None:
    """Remove a model that was taken out of a checkpoint for a table that is gone."""
    place = encoder.removeprefix(CHECKPOINT)
    if not encoder.startswith(f"{CHECKPOINT}{EXPORTS}/"):
        return
    still = (
        neighbor_tables.read_description(store, folder) or {}
        for folder in neighbor_tables.list_versions(store, table)
    )
    if all(description.get("encoder") != encoder for description in still):
        store.remove_folder(place)


def _read_by_training(store: Store, table: str) -> list[str]:
    """The refreshed table that the training run's last record names."""
    from declip_train.monitor import read_last_record

    last = read_last_record(store.local_path("train")) or {}
    names = {neighbor_tables.version_folder(table, str(last.get("neighbor_table", "")))}
    return sorted(names & {folder for _, folder in finished_versions(store, table)})


# Locks -------------------------------------------------------------------------------------------


class _RefreshHold:
    """The right to refresh; lost where somebody removes the file of the lock."""

    def __init__(self, store: Store, file: TextIO) -> None:
        self.store, self.file = store, file

    def check(self) -> None:
        """The file of the lock must still be the one in place: another refresh would lock that."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.file.name)):
                return
        raise DeclipError(
            f"{REFRESH_LOCK} in {self.store.url!r} was removed or replaced while this refresh held "
            "it, so another one may be writing; nothing more is written. Run it again."
        )


@contextlib.contextmanager
def refresh_hold(store: Store) -> Iterator[Hold]:
    """Hold what a refresh needs: no other refresh, and nobody who changes what it reads.

    A training run keeps the dataset's lock to itself, and a refresh is made for running beside it;
    so that lock is not taken. Instead the refresh counts as a task at work: a run or an opt-out
    that starts later waits for it, and one that is already there is let be if it is training.

    Raises:
        DeclipError: another refresh is going on, or a run that is not training.
    """
    path = store.local_path(REFRESH_LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DeclipError(
                f"another refresh is going on in {store.url!r}; wait for it or stop it."
            ) from None
        with task_lock(store):
            if _is_held(store.local_path(LOCK)) and not _is_held(store.local_path(TRAIN_LOCK)):
                raise DeclipError(
                    f"another run is writing to {store.url!r}, and it is not training; wait for it "
                    "to end or to begin training."
                )
            yield _RefreshHold(store, file)


def _is_held(path: Path) -> bool:
    """Whether some process holds the kernel's lock on a file."""
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
