"""The training stage: what pipelines run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from declip_shards import Store, TaskStats
from declip_train.dataset_files import output_folder
from declip_train.failed_samples import PATH as FAILED_SAMPLES
from declip_train.settings import TrainSettings

FOLDER = "train"
CONFIG = f"{FOLDER}/config.json"
MARK = f"{FOLDER}/export.json"
EXPORT_FILES = (
    f"{FOLDER}/export/open_clip_config.json",
    f"{FOLDER}/export/open_clip_pytorch_model.bin",
)


def _export_files(mark: Mapping[str, Any]) -> list[str]:
    """All files of the export that ``mark`` is of; a text model brings more than two."""
    more = {f"{FOLDER}/export/{name}" for name in mark.get("files", {})} - {*EXPORT_FILES}
    return [*EXPORT_FILES, *sorted(more)]


@dataclass(frozen=True, kw_only=True)
class TrainModel(TrainSettings):
    """Train under DeepSpeed's launcher and export the model for open_clip.

    One task. Killed anywhere and run again, it goes on from its newest whole checkpoint and ends
    with the same bytes.
    """

    num_cpus: ClassVar[float] = 2
    num_gpus: ClassVar[float] = 0

    def check_output(self) -> None:
        """Refuse a folder that training cannot write into, before anything is started.

        Raises:
            DeclipError: it is not on this machine.
        """
        output_folder(self.root)

    def tasks(self) -> Sequence[str]:
        """One task, for the whole dataset."""
        return ("all",)

    def is_done(self, task: str) -> bool:
        """Whether the export of these settings stands."""
        store = Store(self.root)
        try:
            mark = json.loads(store.read_bytes(MARK))
        except (FileNotFoundError, ValueError):
            return False
        same = mark.get("settings") == self.elastic_digest()
        return same and all(map(store.exists, _export_files(mark)))

    def worker(self) -> Callable[[str], TaskStats]:
        """Trains when called."""
        return self._run

    def _run(self, task: str) -> TaskStats:
        from declip_train.launch import launch
        from declip_train.samples import training_samples

        store = Store(str(output_folder(self.root)))
        store.check_writable()
        # Faults of the data are told here, before any process is started.
        samples = training_samples(self)
        num_steps = self.num_steps(samples.epoch_length)
        plain = TrainSettings(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(TrainSettings)}
        )
        data_root = self.data_root
        if data_root is not None and "://" not in data_root:
            data_root = os.path.abspath(data_root)
        there = dataclasses.replace(plain, root="..", data_root=data_root)
        store.write_bytes(CONFIG, there.to_json())
        launch(store.local_path(CONFIG), self)
        dropped = samples.num_selected - len(samples)
        return TaskStats(
            num_in=samples.num_selected,
            num_out=len(samples),
            reasons={"other_split": dropped} if dropped else {},
            files=[*_export_files(json.loads(store.read_bytes(MARK))), MARK],
            volatile_files=self._volatile_files(store),
            extra={
                "num_steps": num_steps,
                "samples_seen": num_steps * self.global_batch_size,
                "dropped_foreign": sum(samples.dropped.values()),
                "num_without_neighbor": samples.num_without_neighbor if self.uses_index else 0,
            },
        )

    def _volatile_files(self, store: Store) -> list[str]:
        """Records, and the last checkpoint of this run."""
        folder = store.local_path(FOLDER)
        root = store.local_path(".")
        names = [CONFIG, f"{FOLDER}/log.jsonl"]
        names += [f"{FOLDER}/{path.name}" for path in sorted(folder.glob("launch*.log"))]
        if store.exists(FAILED_SAMPLES):
            names.append(FAILED_SAMPLES)
        for part in ("tensorboard", "checkpoints", "stalls", "bad_batches", "wandb"):
            names += [
                str(path.relative_to(root))
                for path in sorted((folder / part).rglob("*"))
                if path.is_file()
            ]
        return names
