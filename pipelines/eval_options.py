"""The options of ``declip eval``: CLIP_benchmark's names, ours beside them, and what is refused."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from declip_eval.dataset_table import list_suites
from declip_eval.results import EvalResult, result_path
from declip_shards import DeclipError
from declip_shards.errors import did_you_mean
from pipelines.arguments import ArgumentParser
from pipelines.eval_examples import MAX_EXAMPLES
from pipelines.eval_lists import model_specs

TASKS = (
    "auto",
    "zeroshot_classification",
    "zeroshot_retrieval",
    "linear_probe",
    "few_shot",
)
"""What ``--task`` takes; auto is the zero-shot task that fits the dataset."""
PROBES = ("linear_probe", "few_shot")
"""Tasks that learn from a training split."""
NOT_MEASURED = ("captioning", "image_caption_selection")
"""CLIP_benchmark's tasks that are not measured here."""
REFUSED = {
    "--annotation-file": "captions are read from the dataset itself",
    "--dump-classnames": "class names stand in the dataset's table and in the outcomes",
    "--dump-templates": "results name their templates",
    "--fewshot-epochs": "probes are fitted by L-BFGS to convergence, as CLIP's were",
    "--fewshot-lr": "probes are fitted by L-BFGS, which has no learning rate",
    "--load-clfs": "classifiers are made of the model's own prompts",
    "--model-cache-dir": "models are read from this machine; give a file with --pretrained",
    "--normalize": "probes read features as they come, as CLIP's did",
    "--save-clf": "classifiers are made anew in seconds",
    "--skip-load": "features that are in --feature-root are used without being asked for",
}
"""CLIP_benchmark's options that mean nothing here, and why."""
MAX_SEED = 2**31 - 1
"""What every generator takes, with some draws more than it."""
_ANY_RESULT = EvalResult(
    dataset="d",
    model="m",
    pretrained="p",
    task="zeroshot_classification",
    language="en",
    metrics={"acc1": 0.0},
)
"""To try a template with."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What an evaluation was asked for, checked."""

    models: tuple[str, ...]
    """Specifications for `pipelines.eval_models.load_eval_model`."""
    datasets: tuple[str, ...]
    """Names, suites and files as given; `pipelines.eval_tasks` expands them."""
    dataset_root: str
    tasks: tuple[str, ...]
    output: str
    """Folder, or a template of a path that ends in .json."""
    batch_size: int
    chunk_images: int
    recall_k: tuple[int, ...]
    fewshot_k: tuple[int, ...]
    fewshot_seeds: int
    test_split: str | None
    """None: the table's, else ``test``."""
    train_split: tuple[str, ...]
    val_split: tuple[str, ...]
    val_proportion: tuple[float, ...]
    feature_root: str
    data_cache: str
    overwrite: bool
    num_ranks: int
    distributed: bool
    device: str
    language: tuple[str, ...]
    templates: str | None
    classnames: str | None
    train_data: str | None
    train_selection: str | None
    train_embeddings: str | None
    unreadable_budget: float
    allow_missing: bool
    num_workers: int | None
    feature_cache_gb: float
    view_cache_gb: float
    num_resamples: int
    num_examples: int
    seed: int
    quiet: bool

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_together()

    def _check_numbers(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("chunk_images", 1),
            ("fewshot_seeds", 1),
            ("num_ranks", 1),
            ("num_resamples", 100),
            ("num_examples", 0),
            ("seed", 0),
        ):
            _check_least(name, getattr(self, name), least)
        for name, most in (("num_examples", MAX_EXAMPLES), ("seed", MAX_SEED)):
            if getattr(self, name) > most:
                raise DeclipError(
                    f"{flag(name)} is {getattr(self, name)}; it must be at most {most}."
                )
        if self.num_workers is not None:
            _check_least("num_workers", self.num_workers, 1)
        for name in ("recall_k", "fewshot_k"):
            values: tuple[int, ...] = getattr(self, name)
            if len(set(values)) != len(values):
                raise DeclipError(f"{flag(name)} {_words(values)} names one number twice.")
            for value in values:
                _check_least(name, value, 1)
        for name in ("feature_cache_gb", "view_cache_gb"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise DeclipError(
                    f"{flag(name)} is {getattr(self, name)}; give 0 (keep none) or more."
                )
        if not 0 <= self.unreadable_budget < 1:
            raise DeclipError(
                f"--unreadable-budget is {self.unreadable_budget}; it is a share of the pictures, "
                "from 0 to below 1, such as 0.001."
            )
        for share in self.val_proportion:
            if not 0 < share < 1:
                raise DeclipError(
                    f"--val-proportion is {share}; it is a share of the training split, between 0 "
                    "and 1, such as 0.2."
                )

    def _check_together(self) -> None:
        try:
            result_path(_ANY_RESULT, self.output)
        except ValueError as error:
            raise DeclipError(f"--output: {error}") from error
        if self.val_split and not set(self.tasks) & set(PROBES):
            raise DeclipError(
                f"--val-split {_words(self.val_split)} is of probes; add linear_probe or few_shot "
                "to --task."
            )
        if self.val_proportion and "linear_probe" not in self.tasks:
            raise DeclipError(
                f"--val-proportion {_words(self.val_proportion)} is of linear probes; add "
                "linear_probe to --task (few_shot has one strength, or a --val-split)."
            )
        if self.val_split and self.val_proportion:
            raise DeclipError(
                f"--val-split {_words(self.val_split)} and --val-proportion "
                f"{_words(self.val_proportion)} are two ways to say one thing; give one of them."
            )
        if self.num_ranks > 1 and self.distributed:
            raise DeclipError(
                f"--num-ranks {self.num_ranks} starts processes on this machine, and --distributed "
                "says that a launcher has started them; give one of them."
            )
        if self.train_data is None:
            for name in ("train_selection", "train_embeddings"):
                if getattr(self, name) is not None:
                    raise DeclipError(f"{flag(name)} is of the dataset --train-data; name that.")


def flag(name: str) -> str:
    """``val_split -> --val-split``."""
    return "--" + name.replace("_", "-")


def _words(values: Sequence[object]) -> str:
    return " ".join(map(str, values))


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise DeclipError(f"{flag(name)} is {value}; it must be at least {least}.")


def build_parser() -> ArgumentParser:
    """The command's options; underscores in their names mean hyphens."""
    parser = ArgumentParser(
        prog="declip eval",
        description="Evaluate models on labeled sets: zero-shot classification, linear and "
        "few-shot probes, retrieval. Writes CLIP_benchmark's JSON, the outcome of every query "
        "beside it, and eval_summary.jsonl. The same command again goes on where it was stopped; "
        "what stands and fits is kept.",
        epilog="Options may be written with underscores, as CLIP_benchmark's. Datasets are read "
        "as CLIP_benchmark's webdatasets, folders of classes or Hugging Face parquet.",
    )
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        metavar="MODEL",
        help="an export's folder, a run or dataset folder, open_clip:MODEL/PRETRAINED, or "
        "open_clip's name with --pretrained",
    )
    add("--pretrained", nargs="+", metavar="NAME|FILE", help="open_clip's weights of --model")
    add(
        "--pretrained-model",
        nargs="+",
        metavar="MODEL,PRETRAINED|FILE",
        help="pairs, or a file with one a line, in place of --model and --pretrained",
    )
    add(
        "--dataset",
        nargs="+",
        required=True,
        metavar="NAME|SUITE|FILE",
        help=f"datasets, suites ({', '.join(list_suites())}), or a file with one a line",
    )
    add(
        "--dataset-root",
        default="root",
        metavar="FOLDER",
        help="a dataset's folder, one of many datasets, or a pattern with {dataset} or "
        "{dataset_cleaned}; any fsspec URL (root)",
    )
    add("--data-cache", "--wds-cache-dir", metavar="FOLDER", help="where remote sets are kept")
    add(
        "--task",
        nargs="+",
        default=["auto"],
        metavar="TASK",
        help=f"{', '.join(TASKS)}; auto: the zero-shot task that fits the dataset",
    )
    add("--language", nargs="+", default=["en"], metavar="CODE", help="of names and prompts (en)")
    add(
        "--templates",
        "--custom-template-file",
        metavar="SET|FILE",
        help="prompt templates: a set's name, a file with one a line, or CLIP_benchmark's JSON "
        "(else: the dataset's own)",
    )
    add(
        "--classnames",
        "--custom-classname-file",
        metavar="FILE",
        help="class names, one a line in the order of labels, or CLIP_benchmark's JSON",
    )
    _add_split_options(parser)
    _add_measure_options(parser)
    _add_run_options(parser)
    for name in REFUSED:
        add(name, nargs="*", help=argparse.SUPPRESS)
    return parser


def _add_split_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--test-split", "--split", metavar="SPLIT", help="evaluated split (else: the table's)")
    add("--train-split", nargs="+", default=["train"], metavar="SPLIT", help="of probes (train)")
    add("--val-split", nargs="+", default=[], metavar="SPLIT", help="that probes are chosen on")
    add(
        "--val-proportion",
        nargs="+",
        type=float,
        default=[],
        metavar="SHARE",
        help="of the training split, in place of --val-split (0.2)",
    )


def _add_measure_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--recall-k", nargs="+", type=int, default=[1, 5, 10], metavar="K", help="(1 5 10)")
    add(
        "--fewshot-k",
        nargs="+",
        type=int,
        default=None,
        metavar="K",
        help="training samples a class for few_shot (1 2 4 8 16); with linear_probe: one of them, "
        "as CLIP_benchmark has it, -1 for all",
    )
    add("--fewshot-seeds", type=int, default=3, metavar="N", help="draws of them (3)")
    add("--seed", type=int, default=0, help="of draws, splits and intervals (0)")
    add("--num-resamples", type=int, default=2000, metavar="N", help="of the bootstrap (2000)")
    add("--num-examples", type=int, default=48, metavar="N", help="pictures kept for pages (48)")
    add(
        "--unreadable-budget",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of pictures that may be unreadable; they count as wrong (0)",
    )
    add("--train-data", metavar="FOLDER", help="what the model was trained on: tells the overlap")
    add("--train-selection", metavar="NAME", help="its selection that was trained on")
    add("--train-embeddings", metavar="NAME", help="its embeddings to search, too")


def _add_run_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--output",
        default="results",
        metavar="FOLDER|TEMPLATE",
        help="folder, or a path with {dataset}, {pretrained}, {model}, {language}, {task} that "
        "ends in .json (results)",
    )
    add("--feature-root", default="features", metavar="FOLDER", help="features kept (features)")
    add("--skip-existing", action="store_true", help="the default: what stands and fits is kept")
    add("--overwrite", action="store_true", help="compute results anew, also those that stand")
    add("--allow-missing", action="store_true", help="status 0 though a dataset is missing")
    add("--batch-size", type=int, default=256, metavar="N", help="pictures at once (256)")
    add(
        "--chunk-images",
        type=int,
        default=1024,
        metavar="N",
        help="pictures of a file of features, the unit that ranks share out (1024)",
    )
    add(
        "--feature-cache-gb",
        type=float,
        default=32.0,
        metavar="GB",
        help="features kept, in 10^9 bytes; those that were used longest ago make room (32)",
    )
    add(
        "--view-cache-gb",
        type=float,
        default=8.0,
        metavar="GB",
        help="decoded pictures kept for other models of the same input, in 10^9 bytes (8)",
    )
    add("--num-workers", type=int, metavar="N", help="threads that decode (else: the cores)")
    add("--num-ranks", type=int, default=1, metavar="N", help="processes on this machine (1)")
    add(
        "--distributed",
        action="store_true",
        help="a launcher started several of this (RANK and WORLD_SIZE, SLURM, Open MPI)",
    )
    add("--device", default="auto", metavar="auto|cpu|cuda", help="(auto: a GPU if there is one)")
    add("--model-type", default="open_clip", help="open_clip is all there is")
    add("--no-amp", action="store_true", help="always so: features are computed in float32")
    add("--quiet", action="store_true", help="no closing table")


def hyphenated(argv: Sequence[str]) -> list[str]:
    """Options with hyphens in place of underscores; values stay as they are."""
    result = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("_", "-")
        result.append(name + equals + value)
    return result


def parse_options(argv: Sequence[str]) -> EvalOptions:
    """Read the command's arguments.

    Raises:
        DeclipError: an unknown or refused option, or a value out of range.
    """
    arguments = build_parser().parse_args(hyphenated(argv))
    for name, reason in REFUSED.items():
        if getattr(arguments, name[2:].replace("-", "_")) is not None:
            raise DeclipError(f"{name} is CLIP_benchmark's and has no use here: {reason}.")
    if arguments.model_type != "open_clip":
        raise DeclipError(
            f"--model-type is {arguments.model_type!r}, but only open_clip's models and our own "
            "exports are read; leave it out."
        )
    if arguments.device not in ("auto", "cpu", "cuda"):
        near = did_you_mean(arguments.device, ("auto", "cpu", "cuda"))
        raise DeclipError(f"--device is {arguments.device!r}.{near}")
    if arguments.skip_existing and arguments.overwrite:
        raise DeclipError("--skip-existing and --overwrite contradict each other; give one.")
    tasks, fewshot_k = _tasks(arguments.task, arguments.fewshot_k)
    return EvalOptions(
        models=model_specs(arguments.model, arguments.pretrained, arguments.pretrained_model),
        datasets=tuple(arguments.dataset),
        dataset_root=arguments.dataset_root,
        tasks=tasks,
        output=arguments.output,
        batch_size=arguments.batch_size,
        chunk_images=arguments.chunk_images,
        recall_k=tuple(sorted(arguments.recall_k)),
        fewshot_k=fewshot_k,
        fewshot_seeds=arguments.fewshot_seeds,
        test_split=arguments.test_split,
        train_split=tuple(arguments.train_split),
        val_split=tuple(arguments.val_split),
        val_proportion=tuple(arguments.val_proportion),
        feature_root=arguments.feature_root,
        data_cache=arguments.data_cache or os.path.join(arguments.feature_root, "data"),
        overwrite=arguments.overwrite,
        num_ranks=arguments.num_ranks,
        distributed=arguments.distributed,
        device=arguments.device,
        language=tuple(arguments.language),
        templates=arguments.templates,
        classnames=arguments.classnames,
        train_data=arguments.train_data,
        train_selection=arguments.train_selection,
        train_embeddings=arguments.train_embeddings,
        unreadable_budget=arguments.unreadable_budget,
        allow_missing=arguments.allow_missing,
        num_workers=arguments.num_workers,
        feature_cache_gb=arguments.feature_cache_gb,
        view_cache_gb=arguments.view_cache_gb,
        num_resamples=arguments.num_resamples,
        num_examples=arguments.num_examples,
        seed=arguments.seed,
        quiet=arguments.quiet,
    )


def _tasks(
    asked: Sequence[str], fewshot_k: Sequence[int] | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The tasks, each once, and the numbers of shots."""
    for task in asked:
        if task in NOT_MEASURED:
            raise DeclipError(
                f"--task {task} is CLIP_benchmark's and is not measured here; choose from "
                f"{', '.join(TASKS)}."
            )
        if task not in TASKS:
            raise DeclipError(f"--task is {task!r}.{did_you_mean(task, TASKS)}")
    shots = tuple(fewshot_k) if fewshot_k is not None else (1, 2, 4, 8, 16)
    tasks = list(dict.fromkeys(asked))
    if fewshot_k is not None and "few_shot" not in tasks:
        if "linear_probe" not in tasks:
            raise DeclipError(
                f"--fewshot-k {_words(shots)} is of probes; add few_shot or linear_probe to --task."
            )
        if shots == (-1,):
            return tuple(tasks), ()
        tasks[tasks.index("linear_probe")] = "few_shot"
    return tuple(tasks), tuple(sorted(shots)) if "few_shot" in tasks else ()
