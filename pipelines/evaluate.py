"""The evaluation stage: held-out samples of the shards through `declip_eval`.

torch and scikit-learn are imported where the work begins: the command line builds this stage to
print a help line or to find that nothing has changed, and should not wait seconds for them.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from declip_eval.bootstrap import LEVEL, NUM_RESAMPLES, bootstrap_intervals
from declip_eval.linear_probe import CLIP_L2_STRENGTHS, fit_probe
from declip_eval.outcomes import Outcomes, outcomes_path, write_outcomes
from declip_eval.results import EvalResult, Provenance, format_results_table, write_result
from declip_eval.retrieval import chance_retrieval, group_captions
from declip_eval.score_outcomes import classification_outcomes
from declip_eval.templates import get_templates
from declip_eval.zeroshot import chance_classification
from declip_filter.embeddings import EmbedPairs, read_part, read_vectors
from declip_filter.selection import selected_keys
from declip_shards import DeclipError, Store, TaskStats, layout, manifest, sidecars
from pipelines.progress import Progress
from pipelines.scoring import (
    GlobalScoring,
    Scoring,
    TokenwiseScoring,
    choose_scoring,
    picture_batches,
)

if TYPE_CHECKING:
    from pipelines.encoders import CheckpointEncoder

ROW_COLUMNS = ["key", "status", "caption", "label", "category", "split"]
FACTORY = "pipelines.encoders:checkpoint_encoder"
"""What `EmbedPairs.encoder_factory` is set to for a name ``checkpoint:FOLDER``."""
TOP_K = 5
"""Answers kept a query for the report."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """One row per downloaded sample, in the order of keys, with its features."""

    keys: list[str]
    shards: list[str]
    captions: list[str]
    labels: list[str]
    categories: list[str]
    splits: list[str]
    images: npt.NDArray[np.float32] | None
    """(n, dim), unit length; None for a model without global embeddings."""

    def rows(self, splits: Sequence[str]) -> npt.NDArray[np.int64]:
        """Rows whose split is one of ``splits``."""
        return np.flatnonzero([split in splits for split in self.splits])


@dataclass(frozen=True, kw_only=True)
class EvaluateModel:
    """Zero-shot classification, linear probe and retrieval on the held-out splits."""

    root: str = field(default="", metadata={"fingerprint": False})
    """Dataset folder."""
    export: str = "train/export"
    """Folder of the model's export, relative to the dataset."""
    embeddings: str = "model"
    """Name under which the model's own embeddings of all samples are stored."""
    dataset: str = "demo"
    """Name of the data in the results."""
    model: str = "ViT-Ti-8-48"
    """Name of the model's architecture in the results."""
    pretrained: str = "declip_demo"
    """Name of the weights in the results."""
    zeroshot_splits: tuple[str, ...] = ("test_vendor", "test_concept")
    """Splits whose labels are classified zero-shot."""
    retrieval_splits: tuple[str, ...] = ("test_vendor", "test_concept")
    """Splits for image-text retrieval."""
    probe_train_splits: tuple[str, ...] = ("train",)
    """Splits that the linear probe learns the categories from."""
    probe_test_split: str = "test_vendor"
    """Split that the linear probe is tested on."""
    probe_l2_strengths: tuple[float, ...] = CLIP_L2_STRENGTHS
    """L2 strengths that the probe chooses from on its validation split."""
    scoring: Literal["auto", "global", "token-wise"] = "auto"
    """How images and texts are compared: global (cosine of embeddings), token-wise (FILIP's late
    interaction) or auto, which is token-wise for filip and global for all other methods."""
    templates: str = "simple"
    """Prompt templates: simple, photo, openai_7 or name_only."""
    max_classes: int = 500
    """Most classes of a zero-shot task; more are sampled by the seed."""
    max_retrieval_samples: int = 500
    """Most samples of a retrieval task; more are sampled by the seed."""
    batch_size: int = 256
    """Images that go through the tower at once."""
    seed: int = 0
    """Of the samples of classes and pairs, and of the probe's validation split."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def __post_init__(self) -> None:
        for name in ("max_classes", "max_retrieval_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise DeclipError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.probe_l2_strengths or min(self.probe_l2_strengths) <= 0:
            raise DeclipError(
                f"probe_l2_strengths is {self.probe_l2_strengths}; give at least one, all above 0."
            )
        try:
            get_templates(self.templates)
        except ValueError as error:
            raise DeclipError(str(error)) from error

    def tasks(self) -> Sequence[str]:
        return ["all"]

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists("eval/table.txt")

    def worker(self) -> Callable[[str], TaskStats]:
        return lambda task: evaluate(self)


def evaluate(stage: EvaluateModel) -> TaskStats:
    """Run every task of the stage and write its results under ``eval/``."""
    from pipelines.encoders import checkpoint_encoder

    store = Store(stage.root)
    encoder = checkpoint_encoder(stage.export, root=stage.root, device="cpu")
    by_tokens = choose_scoring(stage.scoring, encoder) == TokenwiseScoring.name
    files = [] if by_tokens else embed_everything(stage)
    data = read_held_out(store, None if by_tokens else stage.embeddings)
    refuse_trained_on(stage, store, data)
    scoring = make_scoring(stage, store, data, encoder)
    found: list[tuple[EvalResult, Outcomes]] = []
    predictions: list[dict[str, Any]] = []
    retrieved: list[dict[str, Any]] = []
    for split in stage.zeroshot_splits:
        result, outcomes, rows = zeroshot_task(stage, data, scoring, split)
        found.append((result, outcomes))
        predictions += rows
    found.append(probe_task(stage, store, data, encoder))
    for split in stage.retrieval_splits:
        result, outcomes, rows = retrieval_task(stage, data, scoring, split)
        found.append((result, outcomes))
        retrieved += rows
    found = [
        (with_identity(stage, result, outcomes, store, encoder), outcomes)
        for result, outcomes in found
    ]
    results = [result for result, _ in found]
    folder = store.local_path("eval")
    folder.mkdir(parents=True, exist_ok=True)
    for result, outcomes in found:
        path = write_result(result, folder)
        files.append(f"eval/{path.name}")
        files.append(f"eval/{write_outcomes(outcomes, outcomes_path(path)).name}")
    for name, rows in (("predictions", predictions), ("retrieval", retrieved)):
        files.append(f"eval/{name}.parquet")
        sidecars.write_table(store, files[-1], pa.Table.from_pylist(rows))
    store.write_bytes("eval/table.txt", (format_results_table(results) + "\n").encode())
    files.append("eval/table.txt")
    num_out = len(data.rows([*stage.zeroshot_splits, *stage.retrieval_splits]))
    not_held_out = len(data.keys) - num_out
    return TaskStats(
        num_in=len(data.keys),
        num_out=num_out,
        reasons={"not_in_an_evaluated_split": not_held_out} if not_held_out else {},
        files=sorted(set(files)),
        extra={f"{r.dataset} {r.task}": dict(r.metrics) for r in results},
    )


def make_scoring(
    stage: EvaluateModel, store: Store, data: HeldOut, encoder: "CheckpointEncoder"
) -> Scoring:
    """By global embeddings where the data has them, else token by token."""
    if data.images is not None:
        return GlobalScoring(encoder, data.images, data.keys)
    return TokenwiseScoring(encoder, store, data.keys, data.shards, stage.batch_size)


def embed_everything(stage: EvaluateModel) -> list[str]:
    """Embed every downloaded sample with the model, in clip-retrieval's layout."""
    embed = EmbedPairs(
        root=stage.root,
        name=stage.embeddings,
        encoder=f"checkpoint:{stage.export}",
        encoder_factory=FACTORY,
        selection="",
        texts=True,
        images=True,
        batch_size=stage.batch_size,
    )
    work = embed.worker()
    files: list[str] = []
    shards = embed.tasks()
    with Progress("eval: embed", len(shards)) as bar:
        for shard in shards:
            stats = work(shard)
            files += stats.files
            bar.advance(stats.num_out)
    return files


def refuse_trained_on(stage: EvaluateModel, store: Store, data: HeldOut) -> None:
    """Refuse to call samples held out that the training run read.

    Raises:
        DeclipError: with the number of them, the first one, and the remedy.
    """
    trained = manifest.read_manifest(store, "train")
    if trained is None:
        return
    selection, splits = str(trained.settings["selection"]), trained.settings["splits"]
    seen = {
        key for shard in layout.list_shards(store) for key in selected_keys(store, selection, shard)
    }
    evaluated = {*stage.zeroshot_splits, *stage.retrieval_splits, stage.probe_test_split}
    both = [
        i
        for i in data.rows(sorted(evaluated))
        if data.keys[i] in seen and (not splits or data.splits[i] in splits)
    ]
    if both:
        first = both[0]
        raise DeclipError(
            f"{len(both)} samples of the test splits were trained on, the first is "
            f"{data.keys[first]!r} of {data.splits[first]!r}: they are not held out; drop them "
            "with --filter.keep-splits, or evaluate on other splits."
        )


def read_held_out(store: Store, embeddings: str | None) -> HeldOut:
    """Rows of all shards joined to their image features by key.

    Args:
        store: the dataset.
        embeddings: name of the model's own embeddings; None: rows alone.

    Raises:
        DeclipError: the shards lack the columns ``label``, ``category`` or ``split``.
    """
    rows: list[Mapping[str, Any]] = []
    shards: list[str] = []
    images = []
    for shard in layout.list_shards(store):
        table = sidecars.read_rows(store, layout.shard_parquet_path(shard), ROW_COLUMNS)
        by_key = {row["key"]: row for row in table if row["status"] == "success"}
        keys = sorted(by_key)
        if embeddings is not None:
            part = read_part(store, embeddings, shard)
            vectors, found = read_vectors(store, embeddings, "img_emb", part)
            if found != keys:
                raise DeclipError(
                    f"embeddings {embeddings!r} of shard {shard} are not of its samples; "
                    "rerun eval after ingest."
                )
            images.append(vectors.astype(np.float32))
        rows += [by_key[key] for key in keys]
        shards += [shard] * len(keys)
    return HeldOut(
        keys=[str(row["key"]) for row in rows],
        shards=shards,
        captions=[str(row["caption"]) for row in rows],
        labels=[str(row["label"] or "") for row in rows],
        categories=[str(row["category"] or "") for row in rows],
        splits=[str(row["split"] or "") for row in rows],
        images=None if embeddings is None else np.concatenate(images),
    )


def _sample(items: Sequence[Any], most: int, seed: int) -> list[Any]:
    """At most ``most`` of ``items``, drawn by ``seed``, in their own order."""
    if len(items) <= most:
        return list(items)
    chosen = np.random.default_rng(seed).permutation(len(items))[:most]
    return [items[i] for i in sorted(chosen)]


def _split_rows(data: HeldOut, split: str) -> npt.NDArray[np.int64]:
    rows = data.rows([split])
    if not len(rows):
        known = sorted({s for s in data.splits if s})
        raise DeclipError(
            f"split {split!r} has no sample; the shards have {', '.join(known) or 'none'}: "
            "set the stage's splits to those."
        )
    return rows


def zeroshot_task(
    stage: EvaluateModel, data: HeldOut, scoring: Scoring, split: str
) -> tuple[EvalResult, Outcomes, list[dict[str, Any]]]:
    """Classify a split's images among the split's own labels."""
    rows = [i for i in _split_rows(data, split) if data.labels[i]]
    classes = _sample(sorted({data.labels[i] for i in rows}), stage.max_classes, stage.seed)
    index_of = {name: index for index, name in enumerate(classes)}
    rows = [i for i in rows if data.labels[i] in index_of]
    labels = np.array([index_of[data.labels[i]] for i in rows])
    metrics, best, scores, outcomes = scoring.classify(
        rows, labels, classes, get_templates(stage.templates), min(TOP_K, len(classes))
    )
    predictions = [
        {
            "split": split,
            "key": data.keys[i],
            "label": data.labels[i],
            "category": data.categories[i],
            "predicted": [classes[j] for j in best[n]],
            "scores": [float(s) for s in scores[n]],
        }
        for n, i in enumerate(rows)
    ]
    chance = {k: v for k, v in chance_classification(len(classes)).items() if k in metrics}
    result = EvalResult(
        dataset=f"{stage.dataset}/{split}",
        model=stage.model,
        pretrained=stage.pretrained,
        task="zeroshot_classification",
        metrics=metrics,
        provenance=Provenance(
            num_samples=len(rows),
            num_classes=len(classes),
            chance=chance,
            templates=stage.templates,
            settings={"seed": stage.seed, "scoring": scoring.name},
        ),
    )
    return result, outcomes, predictions


def retrieval_task(
    stage: EvaluateModel, data: HeldOut, scoring: Scoring, split: str
) -> tuple[EvalResult, Outcomes, list[dict[str, Any]]]:
    """Find a split's images by their captions, and the captions by the images."""
    rows = _sample(list(_split_rows(data, split)), stage.max_retrieval_samples, stage.seed)
    texts, positives = group_captions([data.captions[i] for i in rows])
    recall_k = [k for k in (1, 5, 10) if k <= min(len(texts), len(rows))]
    metrics, best, scores, outcomes = scoring.retrieve(
        rows, texts, positives, recall_k, min(TOP_K, len(rows))
    )
    trials = {name: len(texts) if name.startswith("image") else len(rows) for name in metrics}
    answers = [
        {
            "split": split,
            "caption": text,
            "keys": [data.keys[rows[j]] for j in best[n]],
            "right": [n in positives[j] for j in best[n]],
            "scores": [float(s) for s in scores[n]],
        }
        for n, text in enumerate(texts)
    ]
    result = EvalResult(
        dataset=f"{stage.dataset}/{split}",
        model=stage.model,
        pretrained=stage.pretrained,
        task="zeroshot_retrieval",
        metrics=metrics,
        provenance=Provenance(
            num_samples=len(rows),
            num_trials=trials,
            chance=chance_retrieval(positives, len(texts), recall_k=recall_k),
            settings={
                "seed": stage.seed,
                "num_captions": len(texts),
                "scoring": scoring.name,
            },
        ),
    )
    return result, outcomes, answers


def probe_task(
    stage: EvaluateModel, store: Store, data: HeldOut, encoder: "CheckpointEncoder"
) -> tuple[EvalResult, Outcomes]:
    """Fit categories on frozen features of the training splits, test on another vendor's."""
    train = [i for i in data.rows(stage.probe_train_splits) if data.categories[i]]
    test = [i for i in _split_rows(data, stage.probe_test_split) if data.categories[i]]
    names = sorted({data.categories[i] for i in train} & {data.categories[i] for i in test})
    if len(names) < 2:
        raise DeclipError(
            f"the linear probe needs two categories that both {stage.probe_train_splits} and "
            f"{stage.probe_test_split!r} have; there are {len(names)}."
        )
    index_of = {name: index for index, name in enumerate(names)}
    chosen = [i for i in (*train, *test) if data.categories[i] in index_of]
    features = frozen_features(stage, store, encoder, {data.keys[i] for i in chosen})
    test_rows = set(test)
    of_test = [i for i in chosen if i in test_rows]
    of_train = [i for i in chosen if i not in test_rows]
    labels = {i: index_of[data.categories[i]] for i in chosen}
    test_labels = np.array([labels[i] for i in of_test])
    probe = fit_probe(
        np.stack([features[data.keys[i]] for i in of_train]),
        np.array([labels[i] for i in of_train]),
        np.stack([features[data.keys[i]] for i in of_test]),
        test_labels,
        seed=stage.seed,
        l2_strengths=stage.probe_l2_strengths,
    )
    fitted, num_test = probe.metrics, len(of_test)
    # Scores of a regression have no natural scale, so only exact equality is a tie.
    outcomes = classification_outcomes(
        [data.keys[i] for i in of_test], probe.scores, test_labels, tolerance=0.0
    )
    metrics = {k: v for k, v in fitted.items() if k.startswith("lp_")}
    chance = {"lp_" + k: v for k, v in chance_classification(len(names)).items()}
    result = EvalResult(
        dataset=f"{stage.dataset}/{stage.probe_test_split}",
        model=stage.model,
        pretrained=stage.pretrained,
        task="linear_probe",
        metrics=metrics,
        provenance=Provenance(
            num_samples=num_test,
            num_classes=len(names),
            chance={k: v for k, v in chance.items() if k in metrics},
            settings={k: v for k, v in fitted.items() if not k.startswith("lp_")}
            | {
                "seed": stage.seed,
                "num_train": len(of_train),
                "features": encoder.probe_features,
            },
        ),
    )
    return result, outcomes


def frozen_features(
    stage: EvaluateModel, store: Store, encoder: "CheckpointEncoder", keys: set[str]
) -> dict[str, npt.NDArray[np.float32]]:
    """What the probe reads of the samples in ``keys``."""
    features: dict[str, npt.NDArray[np.float32]] = {}
    shards = layout.list_shards(store)
    with Progress("eval: probe features", len(shards)) as bar:
        for shard in shards:
            before = len(features)
            for found, images in picture_batches(store, shard, keys, stage.batch_size):
                features |= dict(zip(found, encoder.encode_probe(images), strict=True))
            bar.advance(len(features) - before)
    return features


def with_identity(
    stage: EvaluateModel,
    result: EvalResult,
    outcomes: Outcomes,
    store: Store,
    encoder: "CheckpointEncoder",
) -> EvalResult:
    """Add what was read and by which versions, so that a number can be had again, and how far it
    may be from the truth."""
    import dataclasses

    from pipelines.eval_records import versions

    assert result.provenance is not None
    hashes = {"weights": encoder.digest}
    hashes |= {
        step: digest
        for step in ("ingest", "train")
        if (digest := manifest.manifest_digest(store, step)) is not None
    }
    provenance = dataclasses.replace(
        result.provenance,
        hashes=hashes,
        versions=versions(),
        intervals=bootstrap_intervals(outcomes, result.metrics, seed=stage.seed),
        bootstrap={"seed": stage.seed, "num_resamples": NUM_RESAMPLES, "level": LEVEL},
        # Not one: a picture of a shard that cannot be read ends the stage, with its key.
        num_unreadable=0,
        data=data_record(outcomes, result.dataset.rpartition("/")[2]),
    )
    return dataclasses.replace(result, provenance=provenance)


def data_record(outcomes: Outcomes, split: str) -> dict[str, Any]:
    """What was evaluated on: samples by key, and their labels."""
    labels = outcomes.columns.get("label")
    content = [list(outcomes.keys), None if labels is None else labels.tolist()]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {"digest": digest, "layout": "shards", "split": split}
