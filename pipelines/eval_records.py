"""What a result says of how it came about, and whether one that stands may be kept."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from declip_eval.bootstrap import bootstrap_intervals
from declip_eval.labelled_sets import LabelledSet
from declip_eval.outcomes import outcomes_path
from declip_eval.results import EvalResult, Provenance, read_result, result_path
from declip_shards import DeclipError
from pipelines import __version__
from pipelines.eval_features import FORMAT, digest_of
from pipelines.eval_jobs import Job
from pipelines.eval_measures import Measured, Subject, prompts_of
from pipelines.eval_options import EvalOptions


@dataclass(frozen=True, kw_only=True)
class ResultPlan:
    """The result files of one evaluation, before it is made."""

    dataset: str
    model: str
    pretrained: str
    task: str
    """CLIP_benchmark's name."""
    language: str
    shots: tuple[int | None, ...]
    """One result each; None: not few-shot."""
    digest: str
    """Of all that the numbers follow from."""
    hashes: dict[str, str]
    has_outcomes: bool
    """Means over several draws have none of their own."""

    @classmethod
    def make(
        cls,
        subject: Subject,
        job: Job,
        task: str,
        options: EvalOptions,
        overlap_key: list[str | None] | None = None,
    ) -> "ResultPlan":
        """Name the results of a task on a subject, and what they follow from.

        Args:
            subject: dataset and model.
            job: of the dataset.
            task: as `--task` has it.
            options: of the command.
            overlap_key: what the overlap follows from, where one is looked for.
        """
        model = subject.work.model
        hashes = {"weights": model.digest, "data": subject.test.digest()}
        for name, data in (("train", subject.train), ("validation", subject.validation)):
            if data is not None:
                hashes[f"data_{name}"] = data.digest()
        if task == "zeroshot_classification":
            hashes["prompts"] = digest_of(prompts_of(subject))
        settings: dict[str, Any] = {
            "version": __version__,
            "format": FORMAT,
            "task": task,
            "preprocessing": model.preprocessing,
            "scoring": model.scoring,
            "batch_size": options.batch_size,
            "chunk_images": options.chunk_images,
            "device": subject.work.device.partition(":")[0],
            "seed": options.seed,
            "num_resamples": options.num_resamples,
            "num_examples": options.num_examples,
            "unreadable_budget": options.unreadable_budget,
            "templates": options.templates,
            "train_data": overlap_key,
        }
        if task == "zeroshot_retrieval":
            settings["recall_k"] = options.recall_k
        if task == "linear_probe" and subject.validation is None:
            settings["val_proportion"] = subject.val_proportion
        if task == "few_shot":
            settings["fewshot_seeds"] = options.fewshot_seeds
        return cls(
            dataset=job.info.name if job.info is not None else job.dataset,
            model=model.name,
            pretrained=model.pretrained,
            task="linear_probe" if task == "few_shot" else task,
            language=job.language,
            shots=options.fewshot_k if task == "few_shot" else (None,),
            digest=digest_of([settings, hashes]),
            hashes=hashes,
            has_outcomes=task != "few_shot" or options.fewshot_seeds == 1,
        )

    def _named(self, shots: int | None) -> EvalResult:
        """A result of the right names, for its path."""
        metrics = {"fewshot_k": shots} if shots else {"acc1": 0.0}
        return EvalResult(
            dataset=self.dataset,
            model=self.model,
            pretrained=self.pretrained,
            task=self.task,
            language=self.language,
            metrics=metrics,
        )

    def paths(self, options: EvalOptions) -> list[Path]:
        """Of the results, in the order of `shots`."""
        return [result_path(self._named(shots), options.output) for shots in self.shots]

    def refuse_taken(self, options: EvalOptions) -> None:
        """Refuse names that results of something else have, before hours of work.

        Raises:
            DeclipError: with both.
        """
        own = (self.dataset, self.model, self.pretrained, self.task, self.language)
        for path in self.paths(options):
            try:
                found = read_result(path)
            except (ValueError, OSError):
                continue
            there = (found.dataset, found.model, found.pretrained, found.task, found.language)
            if there != own:
                this, that = next(
                    pair for pair in zip(own, there, strict=True) if len(set(pair)) > 1
                )
                raise DeclipError(
                    f"the result would be called {str(path)!r}, which holds the one of {that!r}, "
                    f"and this is of {this!r}; give another --output, or a template with "
                    "{dataset}, {model} and {task}."
                )

    def standing(self, options: EvalOptions) -> list[EvalResult] | None:
        """The results, if all stand and follow from the same; else None."""
        found = []
        for path in self.paths(options):
            try:
                result = read_result(path)
            except (ValueError, OSError):
                return None
            known = result.provenance
            if known is None or known.hashes.get("evaluation") != self.digest:
                return None
            if self.has_outcomes and not outcomes_path(path).exists():
                return None
            found.append(result)
        return found

    def result(
        self,
        subject: Subject,
        measured: Measured,
        options: EvalOptions,
        contamination: dict[str, Any],
    ) -> EvalResult:
        """A result with all that is known of it."""
        test = subject.test
        names = list(measured.metrics)
        intervals, bootstrap = measured.intervals, dict[str, Any]()
        if intervals is None:
            bootstrap = {"seed": options.seed, "num_resamples": options.num_resamples}
            bootstrap["level"] = 0.95
            intervals = bootstrap_intervals(
                measured.outcomes[0],
                names,
                seed=options.seed,
                num_resamples=options.num_resamples,
            )
        metrics = dict(measured.metrics)
        if self.task == "linear_probe":
            metrics["fewshot_k"] = measured.shots or -1
        provenance = Provenance(
            num_samples=measured.num_samples,
            num_classes=measured.num_classes,
            num_trials=_trials(measured),
            chance=measured.chance,
            intervals=intervals,
            templates=_templates_name(options) if self.task == "zeroshot_classification" else None,
            hashes=self.hashes | {"evaluation": self.digest},
            versions=versions(),
            settings={
                "seed": options.seed,
                "batch_size": options.batch_size,
                "device": subject.work.device.partition(":")[0],
                "preprocessing": subject.work.model.preprocessing,
                **measured.settings,
            },
            num_unreadable=len(measured.unreadable),
            num_expected=subject.info.num_test if subject.info is not None else None,
            data=data_record(test, subject),
            bootstrap=bootstrap,
            contamination=contamination,
        )
        return EvalResult(
            dataset=self.dataset,
            model=self.model,
            pretrained=self.pretrained,
            task=self.task,
            language=self.language,
            metrics=metrics,
            provenance=provenance,
        )


def data_record(test: LabelledSet, subject: Subject) -> dict[str, Any]:
    """What was evaluated on, as results keep it."""
    record: dict[str, Any] = {
        "digest": test.digest(),
        "layout": test.layout,
        "split": test.split,
        "num_samples": len(test),
        "num_classes": test.num_classes,
        "class_names": test.names_source,
    }
    for name, data in (("train", subject.train), ("validation", subject.validation)):
        if data is not None:
            record[name] = {
                "digest": data.digest(),
                "split": data.split,
                "num_samples": len(data),
            }
    return record


def versions() -> dict[str, str]:
    """Of the libraries that numbers depend on."""
    import scipy
    import sklearn
    import torch

    return {
        "opendeclip": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "scikit-learn": sklearn.__version__,
    }


def _trials(measured: Measured) -> dict[str, int]:
    """Queries of each metric, where they are not the pictures."""
    if measured.outcomes[0].kind != "retrieval":
        return {}
    directions = measured.outcomes[0].columns["direction"]
    counts = {way: int((directions == way).sum()) for way in ("image", "text")}
    return {name: counts[name.partition("_")[0]] for name in measured.metrics}


def _templates_name(options: EvalOptions) -> str:
    return os.path.basename(options.templates) if options.templates else "of the dataset"
