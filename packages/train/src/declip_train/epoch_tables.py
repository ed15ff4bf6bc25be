"""Which neighbor table each epoch reads, when one may be refreshed while training goes on.

Process 0 looks which table is in use; all processes hear of it and take the same. That is a
collective operation and belongs to the main thread. The loader's thread works ahead, so the
question is put that many steps before an epoch begins, and the table is read in that thread while
the last steps of the epoch before are trained on. Batches of one epoch are of one table, whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from declip_shards import DeclipError, layout, neighbor_tables
from declip_shards.neighbor_tables import TableVersion
from declip_train.dataset_files import open_dataset, output_folder
from declip_train.distributed import rank, world_size
from declip_train.samples import (
    TrainingSamples,
    embeddings_with,
    num_changed,
    uses_stored,
    with_table,
)
from declip_train.settings import TrainSettings
from declip_train.tables_in_use import hold_tables

FOLDER = "train"
"""Of the run's folder: where it writes."""
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True, kw_only=True)
class TableUse:
    """The table of an epoch."""

    epoch: int
    version: TableVersion
    num_changed: int
    """Samples whose neighbors' captions are not those of the table before; of a run's first table:
    not those of the pipeline's own."""
    num_without_neighbor: int
    """Samples without a neighbor."""


class EpochTables:
    """The tables of one run, epoch by epoch.

    Args:
        settings: the run.
        samples: of ``training_samples``: with the pipeline's own table.
        run: name of the run, by which its own checkpoints are known.
        say: takes one line for the person who watches; every process says the same.
    """

    def __init__(
        self,
        settings: TrainSettings,
        samples: TrainingSamples,
        *,
        run: str,
        say: Callable[[str], None],
    ) -> None:
        if samples.table is None:
            raise ValueError("the samples were listed without a neighbor table")
        self.settings, self.run, self._say = settings, run, say
        self._own = samples.table
        self._store = open_dataset(settings.dataset)
        self._notes = output_folder(settings.root) / FOLDER
        self._changed = threading.Condition()
        self._decided: dict[int, TableVersion] = {}
        self._known_changes: dict[int, int] = {}
        self._samples = {-1: samples}
        self._uses: dict[int, TableUse] = {}
        self._history: list[tuple[int, str]] = []
        self._refused = ""
        self._last = self._own
        self._begun = -1

    # Main thread ---------------------------------------------------------------------------------

    def start(self, epoch: int, state: Mapping[str, Any] | None = None) -> None:
        """Decide about the epoch that training starts in; a collective operation.

        Args:
            epoch: from 0.
            state: what :meth:`state` gave when the checkpoint was written from which training goes
                on; inside of an epoch its table is taken again, if it is still there.
        """
        state = state or {}
        self._history = [(int(e), str(name)) for e, name in state.get("history", ())]
        if state.get("epoch") == epoch:
            version = self._agree(lambda: self._same_again(state))
            if version is not None:
                self._known_changes[epoch] = int(state["num_changed"])
                self._settle(epoch, version)
                return
        self.decide(epoch)
        if all(state.get(name) == getattr(self._last, name) for name in ("folder", "sha256")):
            self._known_changes[epoch] = 0

    def decide(self, epoch: int) -> None:
        """Settle which table an epoch reads; a collective operation, epoch by epoch."""
        version = self._agree(self._choose)
        assert version is not None
        self._settle(epoch, version)

    def _settle(self, epoch: int, version: TableVersion) -> None:
        with self._changed:
            self._last = self._decided[epoch] = version
            self._changed.notify_all()

    @property
    def last_decided(self) -> int:
        """The last epoch whose table is settled; -1 before :meth:`start`."""
        return max(self._decided, default=-1)

    def _agree(self, choose: Callable[[], TableVersion | None]) -> TableVersion | None:
        """What process 0 chooses, on every process."""
        chosen: list[TableVersion | None] = [self._noted(choose) if rank() == 0 else None]
        if world_size() > 1:
            dist.broadcast_object_list(chosen, src=0)
        return chosen[0]

    def _noted(self, choose: Callable[[], TableVersion | None]) -> TableVersion | None:
        """What is chosen, noted before anybody hears of it: a refresh may not remove it then."""
        with hold_tables(self._notes) as tables:
            version = choose()
            reading = [v for epoch, v in self._decided.items() if epoch >= self._begun]
            wanted = [self._own, self._last, *reading, *([version] if version else [])]
            tables.write({each.folder for each in wanted})
        return version

    def _same_again(self, state: Mapping[str, Any]) -> TableVersion | None:
        """The table of a checkpoint; None where it is gone."""
        try:
            version = neighbor_tables.read_version(self._store, str(state["folder"]))
            reason = self._unfit(version)
        except DeclipError as error:
            reason = str(error)
        else:
            if version.sha256 == state["sha256"] and not reason:
                return version
        reason = reason or "it was made anew"
        self._say(f"neighbor table {state['folder']} of the checkpoint is not read again: {reason}")
        return None

    def _choose(self) -> TableVersion:
        """The table in use now, if it fits this run; else the one in use so far."""
        try:
            version = neighbor_tables.resolve_table(self._store, self.settings.neighbors)
            reason = "" if version.is_same(self._last) else self._unfit(version)
            if version.superseded:
                reason = (
                    f"{version.superseded} was made before the pipeline built its table anew; run "
                    "declip refresh again"
                )
        except DeclipError as error:
            version, reason = self._last, str(error)
        if reason and reason != self._refused:
            self._say(f"a refreshed neighbor table is not taken: {reason}")
        self._refused = reason
        return self._last if reason and not version.superseded else version

    def _unfit(self, version: TableVersion) -> str:
        """Why a table cannot be read by this run, going by its small files; empty where it can."""
        missing = neighbor_tables.missing_shards(
            self._store, version, layout.list_shards(self._store)
        )
        if missing:
            path = layout.neighbors_path(version.folder, missing[0])
            return f"{path!r} is missing, so the table is of other shards; run declip refresh again"
        if not uses_stored(self.settings):
            return ""
        name = embeddings_with(self.settings, self._own, version)
        size = self.settings.model_config.embed_dim
        if name == version.embeddings and version.dim not in (0, size):
            return (
                f"neighbor_feature is stored, and its vectors {name!r} have {version.dim} numbers, "
                f"the model's features {size}; refresh with an encoder of that size, or set "
                "neighbor_feature to caption"
            )
        folder = f"embeddings/{name}/text_emb"
        if not self._store.list(folder, ".npy"):
            return (
                f"neighbor_feature is stored, and {folder!r} holds no vectors of captions; refresh "
                "with texts, or set neighbor_feature to caption"
            )
        return ""

    # Loader's thread -----------------------------------------------------------------------------

    def wait(self, epoch: int, stop: threading.Event) -> bool:
        """Wait until an epoch's table is settled; False where ``stop`` comes first."""
        with self._changed:
            while epoch not in self._decided and not stop.is_set():
                self._changed.wait(_SECONDS_BETWEEN_LOOKS)
        return epoch in self._decided

    def samples_of(self, epoch: int) -> TrainingSamples:
        """The samples with the neighbors that an epoch reads; epochs come in order.

        Raises:
            DeclipError: the table cannot be read (see ``with_table``).
            KeyError: the epoch's table is not settled.
        """
        if epoch not in self._samples:
            with self._changed:
                version = self._decided[epoch]
            before = self._samples[max(self._samples)]
            assert before.table is not None
            samples = before
            if not version.is_same(before.table):
                samples = with_table(before, self.settings, self._own, version)
            self._note(epoch, before, samples)
            self._samples = {epoch: samples}
        return self._samples[epoch]

    def _note(self, epoch: int, before: TrainingSamples, samples: TrainingSamples) -> None:
        assert samples.table is not None
        changes = 0 if samples is before else num_changed(before, samples)
        use = TableUse(
            epoch=epoch,
            version=samples.table,
            num_changed=self._known_changes.get(epoch, changes),
            num_without_neighbor=samples.num_without_neighbor,
        )
        with self._changed:
            self._uses[epoch] = use
            # Of short epochs the loader has prepared several before the first is trained on.
            oldest = epoch - self.settings.prefetch_batches - 3
            self._uses = {e: use for e, use in self._uses.items() if e >= oldest}

    # What is told --------------------------------------------------------------------------------

    def begin(self, epoch: int, step: int) -> None:
        """Take note that an epoch's first batch is trained on now, and say which table it reads."""
        use, self._begun = self.use_of(epoch), epoch
        if self._history and self._history[-1][1] == use.version.id:
            return
        self._history.append((epoch, use.version.id))
        age = self.age(epoch, step)
        old = "" if age is None else f", {age} steps old"
        self._say(
            f"epoch {epoch} reads neighbor table {use.version.id} of "
            f"{use.version.encoder or 'an unknown encoder'}{old}; {use.num_changed} samples have "
            f"other neighbors than before, {use.num_without_neighbor} have none"
        )

    def use_of(self, epoch: int) -> TableUse:
        """The table that an epoch's batches were made of."""
        with self._changed:
            return self._uses[epoch]

    def age(self, epoch: int, step: int) -> int | None:
        """Steps between the checkpoint that embedded an epoch's table and ``step``.

        None where the encoder was no checkpoint of this run.
        """
        version = self.use_of(epoch).version
        return step - version.step if version.run == self.run and version.step is not None else None

    def record(self, epoch: int, step: int) -> dict[str, float | str]:
        """What a step's record says of its table."""
        use = self.use_of(epoch)
        numbers: dict[str, float | str] = {
            "neighbor_table": use.version.id,
            "neighbor_encoder": use.version.encoder,
            "neighbor_lists_changed": use.num_changed,
        }
        age = self.age(epoch, step)
        return numbers if age is None else numbers | {"neighbor_age_steps": age}

    def state(self, epoch: int) -> dict[str, Any]:
        """What a checkpoint keeps: the table of the epoch, and those before it."""
        use = self.use_of(epoch)
        return {
            **{k: v for k, v in asdict(use.version).items() if k in ("folder", "sha256")},
            "epoch": epoch,
            "num_changed": use.num_changed,
            "history": [list(entry) for entry in self._history],
        }

    @property
    def history(self) -> str:
        """``EPOCH:TABLE`` for each change, comma-separated: what an export says of its training."""
        return ",".join(f"{epoch}:{name}" for epoch, name in self._history)
