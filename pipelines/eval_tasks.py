"""One evaluation after the other: every model on every dataset, in every language, by every task.

A dataset that is missing or wrong is told and left out, and the others go on; no number is ever
made of a part of one. A result that stands and was made of the same weights, data, prompts and
settings is kept.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from declip_eval.class_order import match_rows, table_names
from declip_eval.dataset_table import DatasetInfo
from declip_eval.labelled_sets import (
    DatasetError,
    LabelledSet,
    MissingDatasetError,
    check_against,
    open_labelled_set,
)
from declip_eval.outcomes import outcomes_path, write_outcomes
from declip_eval.results import EvalResult, result_path, write_result
from declip_eval.templates import TEMPLATE_SETS, get_templates
from declip_shards import DeclipError
from pipelines.eval_cache_room import drop_features, sweep_leftovers
from pipelines.eval_contents import ContentHashes
from pipelines.eval_examples import examples_path, save_examples
from pipelines.eval_features import FeatureWork, PictureSet
from pipelines.eval_jobs import Job
from pipelines.eval_measures import (
    STEPS,
    Measured,
    Subject,
    few_shot_probes,
    linear_probe,
    prompts_of,
    zeroshot_classification,
    zeroshot_retrieval,
)
from pipelines.eval_options import PROBES, EvalOptions
from pipelines.eval_overlap import OverlapSearch, with_overlap
from pipelines.eval_ranks import Ranks
from pipelines.eval_records import ResultPlan
from pipelines.eval_summary import (
    DONE,
    FAILED,
    KEPT,
    MISSING,
    OTHER_KIND,
    Entry,
    locked,
    output_folder,
    samples_text,
    write_summary,
)

if TYPE_CHECKING:
    from pipelines.eval_models import EvalModel
    from pipelines.eval_views import Views

log = logging.getLogger(__name__)

ROOM_SECONDS = 60.0
"""Between two looks at how much the feature cache holds."""


@dataclass(frozen=True)
class Report:
    """All that an evaluation comes to."""

    entries: list[Entry]
    results: list[EvalResult]
    """Those computed now and those kept, in the order of the entries."""


class Evaluation:
    """Runs what the options ask for.

    Args:
        options: of the command.
        jobs: the datasets.
        ranks: this process and the others.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        load: makes a model of a specification.
    """

    def __init__(
        self,
        options: EvalOptions,
        jobs: Sequence[Job],
        ranks: Ranks,
        device: str,
        load: "Callable[[str], EvalModel]",
    ) -> None:
        self.options, self.ranks, self.device, self.load = options, ranks, device, load
        self.jobs = jobs
        self.features = Path(options.feature_root)
        self.folder = output_folder(options.output)
        self._opened: tuple[Job | None, dict[str, LabelledSet]] = (None, {})
        self._last_room = float("-inf")
        num_threads = options.num_workers or num_cores(ranks)
        self.contents = ContentHashes(self.features, ranks, num_threads)
        self.overlaps: OverlapSearch | None = None
        if options.train_data is not None:
            self.overlaps = OverlapSearch(
                train_root=options.train_data,
                selection=options.train_selection,
                embeddings=options.train_embeddings,
                root=self.features,
                chunk_images=options.chunk_images,
                ranks=ranks,
                device=device,
                num_threads=num_threads,
            )

    def run(self) -> Report:
        """Evaluate everything; rank 0 writes results and the summary.

        Raises:
            DeclipError: a model cannot be loaded, and it is the only one; or there is no such
                training data.
        """
        report = Report([], [])
        self._make_room()
        if self.overlaps is not None:
            self.overlaps.key()  # Training data that is not there is told before hours of work.
        for number, spec in enumerate(self.options.models):
            try:
                model = self.load(spec)
            except (DeclipError, ValueError) as error:
                if len(self.options.models) == 1:
                    raise DeclipError(str(error)) from error
                self._note_model(report, spec, str(error))
                continue
            for job_number, job in enumerate(self.jobs):
                for task_number, task in enumerate(self.options.tasks):
                    place = (number * len(self.jobs) + job_number) * len(self.options.tasks)
                    place = (place + task_number) * STEPS + 1
                    self._run_one(report, spec, model, job, task, place)
        self._tell_summary(report.entries)
        self._make_room(is_last=True)
        return report

    def _make_room(self, *, is_last: bool = False) -> None:
        """Keep the feature cache clean and within its limit, now and then."""
        now = time.monotonic()
        if self.ranks.rank == 0 and (is_last or now - self._last_room >= ROOM_SECONDS):
            self._last_room = now
            if is_last:  # it looks at every file: once a run
                sweep_leftovers(self.features)
            drop_features(self.features, int(self.options.feature_cache_gb * 10**9))

    def _note_model(self, report: Report, spec: str, note: str) -> None:
        for job in self.jobs:
            for task in self.options.tasks:
                entry = Entry(
                    model=spec,
                    dataset=job.dataset,
                    task=task,
                    language=job.language,
                    status=FAILED,
                    note=note,
                )
                report.entries.append(entry)
        self._tell(f"{spec}: {note}")

    def _run_one(
        self, report: Report, spec: str, model: "EvalModel", job: Job, task: str, place: int
    ) -> None:
        """One entry more, whatever becomes of it."""
        if task == "auto" and job.info is not None:
            task = auto_task(job.info.kind)
        entry = Entry(
            model=spec, dataset=job.dataset, task=task, language=job.language, status=FAILED
        )
        try:
            test = self._open(job, self.options.test_split or "test")
            task = auto_task(test.kind) if task == "auto" else task
            entry = dataclasses.replace(entry, task=task, num_samples=len(test))
            entry, results = self._evaluate(entry, model, job, test, place)
            report.results.extend(results)
        except MissingDatasetError as error:
            entry = dataclasses.replace(entry, status=MISSING, note=str(error))
        except (DeclipError, ValueError, OSError) as error:
            entry = dataclasses.replace(entry, note=str(error))
        except (RuntimeError, MemoryError) as error:
            # Of torch, as a GPU without room: the others go on, but where it came from is told.
            log.exception("%s %s", job.dataset, task)
            entry = dataclasses.replace(entry, note=f"{type(error).__name__}: {error}")
        report.entries.append(entry)
        self._tell_summary(report.entries)
        self._make_room()
        told = entry.note or f"{entry.status}{samples_text(entry)}"
        self._tell(f"{job.dataset} {entry.task}: {told}")

    def _tell(self, line: str) -> None:
        if self.ranks.rank == 0:
            log.info("%s", line)

    def _evaluate(
        self, entry: Entry, model: "EvalModel", job: Job, test: LabelledSet, place: int
    ) -> tuple[Entry, list[EvalResult]]:
        """Check, measure, write.

        Raises:
            DeclipError, ValueError, OSError: the dataset, or the model on it, is wrong.
        """
        task = entry.task
        wrong = wrong_kind(task, test)
        if wrong:
            return dataclasses.replace(entry, status=OTHER_KIND, note=wrong), []
        subject = self._subject(model, job, task, test, place)
        overlap_key = self.overlaps.key() if self.overlaps is not None else None
        plan = ResultPlan.make(subject, job, task, self.options, overlap_key)
        plan.refuse_taken(self.options)
        kept = None if self.options.overwrite else plan.standing(self.options)
        if kept is not None:
            names = tuple(self._shown(path) for path in plan.paths(self.options))
            return dataclasses.replace(entry, status=KEPT, results=names), kept
        measured = measure(subject, task)
        overlap = None
        if self.overlaps is not None:
            overlap = self.overlaps.find(test, place + STEPS - 1)
        if self.ranks.rank != 0:
            return dataclasses.replace(entry, status=DONE), []
        results, paths = [], []
        for one in measured:
            record: dict[str, Any] = {}
            if overlap is not None:
                one, record = with_overlap(
                    one,
                    overlap,
                    test,
                    seed=self.options.seed,
                    num_resamples=self.options.num_resamples,
                )
            result = plan.result(subject, one, self.options, record)
            path = self._write(result, one, subject)
            results.append(result)
            paths.append(self._shown(path))
        return dataclasses.replace(entry, status=DONE, results=tuple(paths)), results

    def _open(self, job: Job, split: str) -> LabelledSet:
        """A split, checked against the table; opened once for all tasks of a job."""
        if self._opened[0] is not job:
            self._opened = job, {}
        opened = self._opened[1]
        if split not in opened:
            opened[split] = self._open_anew(job, split)
        return opened[split]

    def _open_anew(self, job: Job, split: str) -> LabelledSet:
        options = self.options
        is_set = options.templates in TEMPLATE_SETS
        data = open_labelled_set(
            options.dataset_root,
            job.dataset,
            split,
            info=job.info,
            class_names_file=options.classnames,
            templates_file=None if is_set else options.templates,
            language=job.language,
            cache=options.data_cache,
        )
        if is_set and options.templates is not None and data.kind != "retrieval":
            data = dataclasses.replace(data, templates=get_templates(options.templates))
        check_against(job.info, data)
        if options.classnames is not None:
            _refuse_permuted(options.classnames, data, job.info)
        self.contents.digest(data)
        return data

    def _subject(
        self, model: "EvalModel", job: Job, task: str, test: LabelledSet, place: int
    ) -> Subject:
        options = self.options
        is_probe = task in PROBES
        work = FeatureWork(
            model=model,
            root=self.features,
            batch_size=options.batch_size,
            chunk_images=options.chunk_images,
            device=self.device,
            ranks=self.ranks,
            read_views=self._read_views(model),
        )
        train = self._open(job, job.train_split) if is_probe else None
        validation = self._open(job, job.val_split) if is_probe and job.val_split else None
        for flag, data in (("--train-split", train), ("--val-split", validation)):
            if data is not None and data.digest() == test.digest():
                raise DeclipError(
                    f"{flag} {data.split} of {job.dataset} holds the very pictures of the test "
                    "split: a probe would be chosen by its own test; name another split."
                )
        return Subject(
            work=work,
            options=options,
            info=job.info,
            test=test,
            train=train,
            validation=validation,
            val_proportion=job.val_proportion,
            place=place,
        )

    def _read_views(
        self, model: "EvalModel"
    ) -> "Callable[[PictureSet, int, int], tuple[Views, list[str | None]]] | None":
        """Views through their cache; None where none are kept."""
        limit = int(self.options.view_cache_gb * 10**9)
        if not limit:
            return None
        from pipelines.eval_views import ViewCache

        # By the set itself, whose digest takes long; it is kept, so that no other gets its number.
        caches: dict[int, tuple[PictureSet, ViewCache]] = {}
        num_threads = self.options.num_workers or num_cores(self.ranks)

        def read(data: PictureSet, start: int, stop: int) -> "tuple[Views, list[str | None]]":
            if id(data) not in caches:
                folder = self.features / "views"
                cache = ViewCache(folder, data.digest(), model.preparation, limit)
                caches[id(data)] = data, cache
            return caches[id(data)][1].get(
                start, stop, lambda: data.read_images(range(start, stop)), num_threads
            )

        return read

    def _write(self, result: EvalResult, measured: Measured, subject: Subject) -> Path:
        """The outcomes and examples, and then the result, which is the mark that they are there."""
        path = result_path(result, self.options.output)
        with locked(path.parent):
            for old in (path, outcomes_path(path), examples_path(path)):
                old.unlink(missing_ok=True)
            if len(measured.outcomes) == 1:
                write_outcomes(measured.outcomes[0], outcomes_path(path))
            if self.options.num_examples:
                save_examples(
                    path,
                    subject.test,
                    measured.outcomes[0],
                    shown_names(subject, measured),
                    most=self.options.num_examples,
                    seed=self.options.seed,
                    candidates=_candidates(subject, measured),
                )
            return write_result(result, self.options.output)

    def _shown(self, path: Path) -> str:
        try:
            return path.relative_to(self.folder).as_posix()
        except ValueError:
            return path.as_posix()

    def _tell_summary(self, entries: Sequence[Entry]) -> None:
        if self.ranks.rank == 0:
            write_summary(self.folder, entries)


def measure(subject: Subject, task: str) -> list[Measured]:
    """Do a task; nothing on ranks other than 0."""
    if task == "few_shot":
        return few_shot_probes(subject) or []
    do = {
        "zeroshot_classification": zeroshot_classification,
        "zeroshot_retrieval": zeroshot_retrieval,
        "linear_probe": linear_probe,
    }[task]
    measured = do(subject)
    return [] if measured is None else [measured]


def auto_task(kind: str) -> str:
    """The zero-shot task of a kind of dataset."""
    return "zeroshot_retrieval" if kind == "retrieval" else "zeroshot_classification"


def wrong_kind(task: str, data: LabelledSet) -> str:
    """Why a task cannot be done on a dataset; empty where it can."""
    if task == "zeroshot_retrieval" and data.kind != "retrieval":
        return f"{data.name} has classes and no captions to retrieve by."
    if task != "zeroshot_retrieval" and data.kind == "retrieval":
        return f"{data.name} has captions and no classes for {task}."
    if task == "few_shot" and data.kind == "multilabel":
        return f"{data.name} has several classes a picture, and few_shot draws samples by class."
    return ""


def num_cores(ranks: Ranks) -> int:
    """Cores of this machine for each of its ranks."""
    local = ranks.size if ranks.folder is not None else 1
    return max(1, len(os.sched_getaffinity(0)) // local)


def _refuse_permuted(path: str, data: LabelledSet, info: DatasetInfo | None) -> None:
    """Refuse class names of a user's file that are the set's own in another order.

    Raises:
        DatasetError: with the first that is elsewhere.
    """
    known = data.label_names or (table_names(info) if info is not None else ())
    names = [name for name, *_ in data.class_names or ()]
    if info is not None and info.candidates is not None:
        return
    rows = match_rows(names, known)
    if sorted(row for row in rows if row is not None) != list(range(len(names))):
        return  # Other words, such as translated ones.
    for number, row in enumerate(rows):
        if row != number:
            raise DatasetError(
                f"--classnames {path!r} has the classes of {data.name} in another order: its line "
                f"{number + 1} is {names[number]!r}, but label {number} is {known[number][0]!r}; "
                "write them in the order of the labels."
            )


def _candidates(subject: Subject, measured: Measured) -> Sequence[Sequence[int]] | None:
    """For each class of the set the rows that prompts were made for; None where they are its own.

    A probe learns the set's own classes, whatever it is asked with.
    """
    if measured.task != "zeroshot_classification" or subject.info is None:
        return None
    return subject.info.candidates


def shown_names(subject: Subject, measured: Measured) -> Sequence[Sequence[str]] | None:
    """Names of the classes that answers are told in, for pages."""
    test, info = subject.test, subject.info
    if test.kind == "retrieval":
        return None
    if _candidates(subject, measured) is not None:
        return prompts_of(subject)[0]
    names = test.class_names
    if info is not None and info.candidates is not None:
        names = test.label_names or table_names(info)
    numbers = range(len(names or ()), test.num_classes or 0)
    return [*(names or ()), *((f"class {number}",) for number in numbers)]
