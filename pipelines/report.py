"""The report stage: what is on disk, as one self-contained HTML file with pictures."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any, ClassVar

import numpy as np

from declip_eval import html
from declip_eval.charts import Series, bar_chart, line_chart
from declip_eval.heat_map import heat_map
from declip_eval.results import TASKS, EvalResult, read_result, results_rows
from declip_filter import read_neighbors, selected_keys
from declip_shards import DeclipError, Store, TaskStats, layout, manifest, sidecars
from pipelines.runner import read_run_record
from pipelines.sheets import pictures_of_keys

PATH = "report/report.html"
CARD_PATH = "report/model_card.md"
NEIGHBORS_SHOWN = 4
"""Of each sample: what fits into a row at 1,280 pixels."""


@dataclass(frozen=True, kw_only=True)
class WriteReport:
    """Draw the whole run: counts, pictures, curves, confusion, retrieval."""

    root: str = field(default="", metadata={"fingerprint": False})
    """Dataset folder."""
    title: str = "OpenDeCLIP: the demo's run"
    """Heading of the page."""
    selection: str = "default"
    """Selection whose reasons are shown."""
    neighbors: str = "captions"
    """Neighbor table that is shown."""
    num_examples: int = 7
    """Samples shown a drop reason."""
    num_neighbors: int = 12
    """Samples shown with their nearest neighbors."""
    num_predictions: int = 24
    """Zero-shot answers shown, right and wrong each half."""
    num_queries: int = 10
    """Captions shown with the pictures they retrieve."""
    seed: int = 0
    """Of the samples that are shown."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0
    VOLATILE_RESULTS: ClassVar[Sequence[str]] = (PATH,)
    """Files without a hash that are what the step is for: if one is lost, it runs again."""

    def __post_init__(self) -> None:
        for name in ("num_examples", "num_neighbors", "num_predictions", "num_queries"):
            if not 1 <= getattr(self, name) <= 200:
                raise DeclipError(
                    f"{name} is {getattr(self, name)}; it must lie between 1 and 200: every "
                    "picture is inside the one file."
                )

    def tasks(self) -> Sequence[str]:
        return ["all"]

    def is_done(self, task: str) -> bool:
        store = Store(self.root)
        return store.exists(PATH) and store.exists(CARD_PATH)

    def worker(self) -> Callable[[str], TaskStats]:
        return lambda task: write_report(self)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the sections read, gathered once."""

    store: Store
    rows: Mapping[str, Mapping[str, Any]]
    """Every attempted row by key."""
    reasons: Mapping[str, str]
    """Key of every downloaded sample -> its drop reason, empty when kept."""
    results: Sequence[EvalResult]
    predictions: Sequence[Mapping[str, Any]]
    retrieved: Sequence[Mapping[str, Any]]
    log: Sequence[Mapping[str, Any]]


def write_report(stage: WriteReport) -> TaskStats:
    """Write ``report/report.html`` and ``report/model_card.md``.

    The page holds times, so the manifest names it without a hash; the card leaves them out.
    """
    facts = gather(Store(stage.root), stage.selection)
    plans = [
        kept_and_dropped(stage, facts),
        neighbors(stage, facts),
        zeroshot(stage, facts),
        retrieval(stage, facts),
    ]
    keys = {key for plan in plans for key in plan.keys}
    wanted = {key: found[0] for key, found in pictures_of_keys(facts.store, keys).items()}
    drawn = [plan.draw(wanted) for plan in plans]
    sections = [
        results_section(facts),
        stages_section(facts),
        *drawn[:2],
        training_section(facts),
        *drawn[2:],
        sources_section(facts),
    ]
    page = html.page(
        stage.title,
        sections,
        subtitle="From image URLs and captions to a CLIP-style model, and how good it is.",
        summary=[html.stat_tiles(tiles(facts))],
        footer="Written by opendeclip. Everything is inside this file; nothing is fetched.",
    )
    card = card_of_run(facts.store)
    facts.store.write_bytes(PATH, page.encode())
    facts.store.write_bytes(CARD_PATH, card.encode())
    return TaskStats(
        num_in=len(facts.rows),
        num_out=len(facts.rows),
        files=(CARD_PATH,),
        volatile_files=(PATH,),
    )


def card_of_run(store: Store) -> str:
    """The run's model card, without times: an equal run in another folder has the same bytes."""
    # Here, for a help line needs neither the datasets' table nor the published results.
    from pipelines.card_command import in_order
    from pipelines.card_facts import gather_card_facts
    from pipelines.model_card import model_card
    from pipelines.stored_results import load_results

    results = in_order(load_results([store.local_path(path) for path in result_files(store)]))
    name = results[0].model if results else "model"
    return model_card(name, gather_card_facts(store), results, with_times=False)


def result_files(store: Store) -> list[str]:
    """Results of the last evaluation; others may lie beside them, of other settings.

    Raises:
        DeclipError: there was none.
    """
    done = manifest.read_manifest(store, "eval")
    if done is None:
        raise DeclipError("the report reads eval's results, which are not there; run eval first.")
    return [
        record.path
        for record in done.files
        if record.path.startswith("eval/benchmark_") and record.path.endswith(".json")
    ]


def gather(store: Store, selection: str = "default") -> Facts:
    """Read the tables that the sections need."""
    # Here, for it loads tensorboard, which --help need not wait for.
    from declip_train.monitor import read_log

    paths = result_files(store)
    rows: dict[str, Mapping[str, Any]] = {}
    reasons: dict[str, str] = {}
    for shard in layout.list_shards(store):
        for row in sidecars.read_rows(store, layout.shard_parquet_path(shard)):
            rows[row["key"]] = row
        for row in sidecars.read_rows(store, layout.selection_path(selection, shard)):
            reasons[row["key"]] = row["reason"]
    return Facts(
        store=store,
        rows=rows,
        reasons=reasons,
        results=sorted(
            (read_result(store.local_path(path)) for path in paths),
            key=lambda r: (TASKS.index(r.task), -(r.provenance.num_samples if r.provenance else 0)),
        ),
        predictions=sidecars.read_rows(store, "eval/predictions.parquet"),
        retrieved=sidecars.read_rows(store, "eval/retrieval.parquet"),
        log=read_log(store.local_path("train")),
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A section that needs pictures: which, and how it is drawn once they are read."""

    keys: set[str]
    draw: Callable[[Mapping[str, bytes]], html.Section]


def _choose(items: Sequence[Any], most: int, seed: int) -> list[Any]:
    order = np.random.default_rng(seed).permutation(len(items))[:most]
    return [items[i] for i in order]


def _card(
    facts: Facts, images: Mapping[str, bytes], key: str, note: str = "", tone: html.Tone = "neutral"
) -> html.Card:
    caption = str(facts.rows[key]["caption"])
    picture = html.image(images[key], alt=caption, max_side=96) if key in images else None
    return html.Card(image=picture, caption=caption, note=note, tone=tone)


def _metric(facts: Facts, task: str, metric: str, dataset: str) -> tuple[float, float] | None:
    """(value, chance) of a metric, where it was measured."""
    for result in facts.results:
        if result.task == task and result.dataset.endswith(dataset) and metric in result.metrics:
            chance = result.provenance.chance.get(metric, 0.0) if result.provenance else 0.0
            return result.metrics[metric], chance
    return None


def tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """Headline numbers."""
    trained = manifest.read_manifest(facts.store, "train")
    num_kept = trained.num_out if trained else 0
    found = [
        ("Pairs asked for", f"{len(facts.rows):,}", "rows of the URL table"),
        (
            "Downloaded",
            f"{len(facts.reasons):,}",
            f"{len(facts.rows) - len(facts.reasons):,} failed",
        ),
        ("Trained on", f"{num_kept:,}", "selected pairs"),
    ]
    for label, task, metric, dataset in (
        ("Zero-shot, new vendor", "zeroshot_classification", "acc1", "test_vendor"),
        ("Zero-shot, new concepts", "zeroshot_classification", "acc1", "test_concept"),
        (
            "Retrieval @5, new vendor",
            "zeroshot_retrieval",
            "image_retrieval_recall@5",
            "test_vendor",
        ),
    ):
        pair = _metric(facts, task, metric, dataset)
        if pair is not None:
            times = f"{pair[0] / pair[1]:.0f} times chance" if pair[1] else ""
            found.append((label, f"{pair[0]:.1%}", times))
    return found


def results_section(facts: Facts) -> html.Section:
    columns, rows = results_rows(facts.results)
    bars = [
        (f"{r.dataset.split('/')[-1]}: {metric}", r.metrics[metric] / r.provenance.chance[metric])
        for r in facts.results
        if r.provenance is not None
        for metric in ("acc1", "lp_acc1", "image_retrieval_recall@5")
        if metric in r.metrics and r.provenance.chance.get(metric)
    ]
    return html.section(
        "Results",
        html.table(columns, rows, caption="Held-out results beside chance", text_columns=(0, 7)),
        bar_chart(
            bars,
            title="How many times chance",
            unit="value / chance",
            reference=("chance", 1.0),
            decimals=1,
        ),
        lead="Every number is on samples that no training step saw, next to what guessing gives.",
    )


def stages_section(facts: Facts) -> html.Section:
    rows: dict[str, list[str]] = {}
    reads: dict[str, Iterable[str]] = {}
    for name in facts.store.list("manifests", ".json"):
        step = name.removesuffix(".json")
        done = manifest.read_manifest(facts.store, step) if "." not in step else None
        if done is None:
            continue
        record = read_run_record(facts.store, step)
        reads[step] = done.inputs
        rows[step] = [
            step,
            done.fingerprint[:12],
            f"{done.num_in:,}",
            f"{done.num_out:,}",
            f"{sum(done.reasons.values()):,}",
            f"{record.get('seconds', 0):,.2f}",
        ]
    return html.section(
        "Stages",
        html.table(
            ["stage", "fingerprint", "in", "out", "not through", "seconds"],
            # Not by time: quick stages end within one second.
            [rows[step] for step in TopologicalSorter(reads).static_order() if step in rows],
            caption="What every stage read and wrote",
            text_columns=(0, 1),
        ),
        lead="A stage runs again only when its settings, its code or what it reads has changed: "
        "that is what the fingerprint says.",
    )


def _counts(reasons: Iterable[str]) -> list[tuple[str, float]]:
    counts: dict[str, int] = defaultdict(int)
    for reason in reasons:
        counts[reason] += 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def kept_and_dropped(stage: WriteReport, facts: Facts) -> Plan:
    failed = [r for r in facts.rows.values() if r["status"] != "success"]
    by_reason: dict[str, list[str]] = defaultdict(list)
    for key, reason in facts.reasons.items():
        by_reason[reason].append(key)
    shown = {
        reason: _choose(sorted(keys), stage.num_examples, stage.seed)
        for reason, keys in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    }

    def draw(images: Mapping[str, bytes]) -> html.Section:
        content = []
        if failed:
            names = (str(r["error_message"]).split(":")[0] for r in failed)
            content.append(
                bar_chart(_counts(names), title="Downloads that failed, by reason", unit="rows")
            )
        dropped = _counts(r or "kept" for r in facts.reasons.values())
        content.append(bar_chart(dropped, title="What the filter did", unit="samples"))
        for reason, keys in shown.items():
            title = f"{reason or 'kept'}: {len(by_reason[reason]):,}"
            cards = [_card(facts, images, key, note=key) for key in keys]
            content.append(html.image_grid(cards, caption=title))
        return html.section(
            "Kept and dropped",
            *content,
            lead="Each drop carries the name of the first rule it failed. held_out is the test "
            "set, kept out of training on purpose.",
        )

    return Plan(keys={key for keys in shown.values() for key in keys}, draw=draw)


def neighbors(stage: WriteReport, facts: Facts) -> Plan:
    found: list[Mapping[str, Any]] = []
    for shard in layout.list_shards(facts.store):
        kept = selected_keys(facts.store, stage.selection, shard)
        found += read_neighbors(facts.store, stage.neighbors, shard, kept).to_pylist()
    shown = _choose([r for r in found if r["neighbor_keys"]], stage.num_neighbors, stage.seed)
    keys = {k for row in shown for k in (row["key"], *row["neighbor_keys"][:NEIGHBORS_SHOWN])}
    share = sum(bool(r["neighbor_keys"]) for r in found) / max(len(found), 1)

    def draw(images: Mapping[str, bytes]) -> html.Section:
        content = [
            html.neighbor_row(
                _card(facts, images, row["key"]),
                [
                    (_card(facts, images, key), float(score))
                    for key, score in zip(
                        row["neighbor_keys"][:NEIGHBORS_SHOWN],
                        row["scores"][:NEIGHBORS_SHOWN],
                        strict=True,
                    )
                ],
                score="cosine of caption embeddings",
            )
            for row in shown
        ]
        return html.section(
            "Nearest neighbors",
            *content,
            lead=f"{share:.1%} of the training pairs have a neighbor. The first is the one whose "
            "caption supervises the pair; the pair itself and pairs of the very same caption are "
            "left out, because they would teach nothing new.",
        )

    return Plan(keys=keys, draw=draw)


def training_section(facts: Facts) -> html.Section:
    from declip_train.methods import TERMS

    log = facts.log
    if not log:
        raise DeclipError("train/log.jsonl is missing or empty; run the train stage again.")
    steps = [float(r["step"]) for r in log]
    terms = [name for name in (*TERMS, "total") if name in log[0]]

    def series(name: str) -> Series:
        return Series(name=name, x=steps, y=[float(r[name]) for r in log])

    smooth = max(1, len(log) // 40)
    last = log[-1]
    return html.section(
        "Training",
        line_chart(
            [series(name) for name in terms],
            title="Loss terms",
            x_label="step",
            y_label="loss (nats; SimSiam is minus a cosine)",
            running_mean=smooth,
        ),
        line_chart([series("logit_scale")], title="Logit scale", x_label="step", y_label="exp(t)"),
        line_chart(
            [series("learning_rate")], title="Learning rate", x_label="step", y_label="rate"
        ),
        line_chart(
            [series("samples_per_second")],
            title="Speed",
            x_label="step",
            y_label="samples a second, all processes",
        ),
        line_chart(
            [series("data_wait")],
            title="Share of the time spent waiting for data",
            x_label="step",
            y_label="share",
        ),
        lead=f"{int(last['step']):,} steps, {int(last['samples_seen']):,} samples seen.",
    )


def zeroshot(stage: WriteReport, facts: Facts) -> Plan:
    rows = facts.predictions
    half = stage.num_predictions // 2
    right = [r for r in rows if r["predicted"][0] == r["label"]]
    wrong = [r for r in rows if r["predicted"][0] != r["label"]]
    shown = _choose(right, half, stage.seed) + _choose(wrong, half, stage.seed)

    def draw(images: Mapping[str, bytes]) -> html.Section:
        content = [_confusion(facts, split) for split in sorted({r["split"] for r in rows})]
        cards = []
        for row in shown:
            is_right = row["predicted"][0] == row["label"]
            note = f"{row['split']}; answered: " + "; ".join(row["predicted"][:3])
            picture = html.image(images[row["key"]], alt=row["label"], max_side=96)
            tone: html.Tone = "good" if is_right else "bad"
            cards.append(html.Card(image=picture, caption=row["label"], note=note, tone=tone))
        content.append(
            html.image_grid(cards, caption="Right and wrong answers, drawn at random, half each")
        )
        return html.section(
            "Zero-shot",
            *content,
            lead="Names are classified one by one; the map adds them up by category, so its "
            "diagonal counts answers of the right kind.",
        )

    return Plan(keys={row["key"] for row in shown}, draw=draw)


def _confusion(facts: Facts, split: str) -> html.Markup:
    """Confusion of a split's answers, by category."""
    rows = [r for r in facts.predictions if r["split"] == split]
    category_of = {r["label"]: r["category"] or "other" for r in facts.predictions}
    names = sorted(set(category_of.values()))
    index_of = {name: index for index, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for row in rows:
        answered = category_of.get(row["predicted"][0], "other")
        counts[index_of[category_of[row["label"]]], index_of.get(answered, 0)] += 1
    return heat_map(counts, names, title=f"{split}: {len(rows):,} images by category")


def retrieval(stage: WriteReport, facts: Facts) -> Plan:
    shown = _choose(facts.retrieved, stage.num_queries, stage.seed)
    keys = {key for row in shown for key in row["keys"]}

    def draw(images: Mapping[str, bytes]) -> html.Section:
        content = []
        for row in shown:
            found = [
                (
                    _card(facts, images, key, tone="good" if right else "neutral"),
                    float(score),
                )
                for key, right, score in zip(row["keys"], row["right"], row["scores"], strict=True)
            ]
            query = html.Card(image=None, caption=row["caption"], note=row["split"])
            content.append(html.neighbor_row(query, found, score="cosine of caption and picture"))
        return html.section(
            "Retrieval",
            *content,
            lead="For a caption, the five pictures that the model finds nearest; a tick marks the "
            "right one.",
        )

    return Plan(keys=keys, draw=draw)


def sources_section(facts: Facts) -> html.Section:
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for row in facts.rows.values():
        if row["status"] == "success":
            counts[str(row.get("source") or ""), str(row.get("license") or "")] += 1
    return html.section(
        "Sources and licenses",
        html.table(
            ["source", "license", "pairs"],
            [[source, license_, f"{n:,}"] for (source, license_), n in sorted(counts.items())],
            caption="Where the pictures come from",
            text_columns=(0, 1),
        ),
    )
