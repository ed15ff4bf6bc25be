"""A model card written from a run: Markdown with the front matter that the Hugging Face Hub reads.

Every sentence is read off the run's files. What they do not say is called unknown, and text that
came with the data is escaped: a license called `<script>` is shown as that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipelines import __version__
from pipelines.card_facts import MOST_VALUES, STEPS, CardFacts, Compute, PairCounts
from pipelines.markdown_text import markdown_table, plain
from pipelines.stored_results import StoredResult, overlap_text

UNKNOWN = "unknown"
_MAIN_SETTINGS = (
    "method", "model", "weighting", "contrastive_loss", "neighbor_source", "neighbors",
    "augmentation", "ssl_augmentation", "pretrained", "text_model", "global_batch_size",
    "accumulation_steps", "epochs", "max_steps", "optimizer", "peak_lr", "end_lr", "warmup_steps",
    "weight_decay", "beta1", "beta2", "eps", "precision", "zero_stage", "num_ranks", "seed",
)  # fmt: skip
_LOCAL = ("root", "cache", "hostfile", "wandb", "evaluate_data")
"""Settings that only name places of those who trained: they stay out of a card."""
_HUB_TASKS = {
    "zeroshot_classification": "zero-shot-image-classification",
    "zeroshot_retrieval": "image-text-retrieval",
    "linear_probe": "image-classification",
}


def model_card(
    name: str,
    facts: CardFacts,
    results: Sequence[StoredResult],
    unmatched: Sequence[str] = (),
    *,
    with_times: bool = True,
) -> str:
    """Write a card.

    Args:
        name: of the model.
        facts: what the run's folder says.
        results: of its evaluation; none is said to be none.
        unmatched: datasets of results that may be of other weights.
        with_times: say what only the run's log and records know: seconds, speed, the last loss.
            Without, equal runs have equal cards.
    """
    if not with_times:
        facts = _without_records(facts)
    parts = [
        front_matter(name, facts, results),
        f"# {plain(name)}\n",
        "Written by `declip card` from the files of the run. What they do not say is called "
        "unknown.\n"
        if with_times
        else "Written from the files of the run; `declip card` adds times and speed. What the "
        "files do not say is called unknown.\n",
        *_model_part(facts),
        *_data_part(facts),
        *_filter_part(facts),
        *_license_part(facts),
        *_training_part(facts, with_times),
        *_results_part(results),
        *_limits_part(facts, results, unmatched),
        *_identity_part(facts, with_times),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _without_records(facts: CardFacts) -> CardFacts:
    """Facts of hashed files alone: settings and steps out of training's manifest."""
    trained = facts.manifests.get("train")
    if trained is None:
        return replace(facts, compute=Compute(), seconds={})
    done = trained.extra.get("all") or {}  # Training is one task of that name.
    return replace(
        facts,
        settings=trained.settings,
        compute=Compute(steps=done.get("num_steps"), samples_seen=done.get("samples_seen")),
        seconds={},
    )


def front_matter(name: str, facts: CardFacts, results: Sequence[StoredResult]) -> str:
    """The card's YAML head. Its texts are JSON strings, which are YAML, too, and hold no markup."""
    method = str(facts.settings.get("method") or "")
    tags = ["clip", "opendeclip", *([method] if method not in ("", "clip") else [])]
    lines = [
        "---",
        # Nobody has said which license the weights have; the Hub has a word for that.
        "license: unknown",
        "library_name: open_clip",
        "pipeline_tag: zero-shot-image-classification",
        f"tags: {_yaml(tags)}",
    ]
    entries = list(_index_entries(results))
    if entries:
        lines += ["model-index:", f"- name: {_yaml(name)}", "  results:", *entries]
    return "\n".join([*lines, "---", ""])


def _index_entries(results: Sequence[StoredResult]) -> Iterator[str]:
    for stored in results:
        yield f"  - task: {_yaml({'type': _HUB_TASKS[stored.result.task], 'name': stored.task})}"
        title = stored.info.title if stored.info else stored.dataset
        yield f"    dataset: {_yaml({'type': stored.dataset, 'name': title})}"
        yield "    metrics:"
        for metric in stored.metrics:
            value = stored.value(metric)
            yield f"    - {_yaml({'type': metric, 'value': value, 'name': metric})}"


def _yaml(value: Any) -> str:
    """JSON whose escapes YAML reads alike: JSON writes what lies above U+FFFF as two halves."""
    return re.sub("[^ -~]", _escape, json.dumps(value, ensure_ascii=False))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xD800 <= code <= 0xDFFF:  # Half a character, which no file can hold.
        code = 0xFFFD
    return f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"


def _facts_table(rows: Sequence[tuple[str, object]]) -> str:
    cells = [
        [plain(name), UNKNOWN if value in (None, "") else plain(value)] for name, value in rows
    ]
    return markdown_table(["what", "value"], cells, num_text_columns=2) + "\n"


def _model_part(facts: CardFacts) -> list[str]:
    settings, config = _public(facts.settings), facts.model_config
    shape = config.get("model_cfg") or {}
    vision, text = shape.get("vision_cfg") or {}, shape.get("text_cfg") or {}
    preprocess = config.get("preprocess_cfg") or {}
    files = facts.export.get("files") or {}
    rows: list[tuple[str, object]] = [
        ("method", settings.get("method")),
        ("architecture", settings.get("model")),
        ("image size, pixels", vision.get("image_size") or settings.get("image_size")),
        ("embedding, numbers", shape.get("embed_dim")),
        ("context, tokens", text.get("context_length")),
        ("pixel mean", preprocess.get("mean")),
        ("pixel standard deviation", preprocess.get("std")),
        ("resizing", preprocess.get("interpolation")),
        ("began from", settings.get("pretrained") or "random weights" if settings else None),
        *((f"sha256 of {file}", digest) for file, digest in sorted(files.items())),
    ]
    return [
        "## The model\n",
        "Two towers, one for pictures and one for texts, trained to give a picture and its "
        "caption like embeddings. open_clip loads the folder `train/export` unchanged.\n",
        _facts_table(rows),
    ]


def _data_part(facts: CardFacts) -> list[str]:
    parts = ["## Training data\n"]
    tars = facts.settings.get("train_data") or []
    if tars:
        parts.append(
            "The run read tars made by other programs, whose contents this card cannot vouch for: "
            "where they come from, how they were filtered and under which licenses they are is "
            "unknown.\n"
        )
        parts.append("\n".join(f"- {plain(_end(tar))}" for tar in tars) + "\n")
        return parts
    ingest, trained = facts.manifests.get("ingest"), facts.manifests.get("train")
    prepare = facts.manifests.get("prepare")
    lists = (
        [record for record in prepare.files if record.path.endswith(".parquet")] if prepare else []
    )
    rows: list[tuple[str, object]] = [
        *((f"list of pairs {record.path}, sha256", record.sha256) for record in lists),
        ("pairs asked for", _count(ingest.num_in if ingest else None)),
        ("pairs downloaded", _count(ingest.num_out if ingest else None)),
        ("shards", _count(facts.num_shards or None)),
        ("bytes of the tars", _count(facts.num_bytes or None)),
        ("pairs trained on", _count(trained.num_in if trained else None)),
        ("digest of the samples trained on", facts.export.get("samples")),
        ("pictures stored at, pixels", ingest.settings.get("image_size") if ingest else None),
    ]
    if not lists:
        rows.insert(0, ("list of pairs", None))
    parts.append(_facts_table(rows))
    if ingest and ingest.reasons:
        parts.append("Pairs that could not be downloaded, by reason:\n")
        parts.append(_reasons_table(ingest.reasons, ingest.num_in))
    return parts


def _reasons_table(reasons: Mapping[str, int], total: int) -> str:
    rows = [
        [plain(reason), f"{count:,}", f"{count / max(total, 1):.2%}"]
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    ]
    return markdown_table(["reason", "pairs", "share"], rows) + "\n"


def _filter_part(facts: CardFacts) -> list[str]:
    parts = ["## Filter\n"]
    done = facts.manifests.get("filter")
    if done is None:
        return [*parts, "How the pairs were filtered is unknown: the run has no record of it.\n"]
    parts.append(
        f"{done.num_out:,} of {done.num_in:,} downloaded pairs were kept. Each of the others "
        "carries the name of the first rule that it failed; `held_out` are pairs kept for "
        "evaluation.\n"
        if "held_out" in done.reasons
        else f"{done.num_out:,} of {done.num_in:,} downloaded pairs were kept. Each of the others "
        "carries the name of the first rule that it failed.\n"
    )
    if done.reasons:
        parts.append(_reasons_table(done.reasons, done.num_in))
    parts.append(_folded("Settings of the filter", done.settings))
    return parts


def _license_part(facts: CardFacts) -> list[str]:
    parts = ["## Licenses and sources of the data\n"]
    by_column = {counts.column: counts for counts in facts.counts}
    found = by_column.get("license")
    if found is None:
        parts.append(
            "The licenses of the pictures and captions are unknown: the data has no column "
            "`license`.\n"
        )
    else:
        parts.append(
            "As the data's own column `license` says; nobody has checked whether that is so.\n"
        )
        parts.append(_counts_table("license", found))
    sources = by_column.get("source")
    if sources is not None:
        parts.append(_counts_table("source", sources))
    return parts


def _counts_table(title: str, counts: PairCounts) -> str:
    ordered = sorted(counts.downloaded, key=lambda value: (-counts.downloaded[value], value))
    rows = [
        [
            plain(value) if value else UNKNOWN,
            f"{counts.downloaded[value]:,}",
            f"{counts.trained.get(value, 0):,}",
        ]
        for value in ordered[:MOST_VALUES]
    ]
    rest = ordered[MOST_VALUES:]
    if rest:
        sums = [sum(of.get(v, 0) for v in rest) for of in (counts.downloaded, counts.trained)]
        rows.append([f"{len(rest):,} others", *(f"{number:,}" for number in sums)])
    return markdown_table([title, "pairs downloaded", "pairs trained on"], rows) + "\n"


def _training_part(facts: CardFacts, with_times: bool) -> list[str]:
    settings, compute, export = _public(facts.settings), facts.compute, facts.export
    rows: list[tuple[str, object]] = [
        (name.replace("_", " "), settings[name])
        for name in _MAIN_SETTINGS
        if settings.get(name) not in (None, "", [])
    ]
    hours = None if compute.seconds is None else f"{compute.seconds / 3600:.2f}"
    speed, loss = compute.samples_per_second, compute.last_loss
    logged: list[tuple[str, object]] = [
        ("hours of steps, by the log", hours),
        ("samples a second, median", None if speed is None else f"{speed:,.0f}"),
        ("loss at the end", None if loss is None else f"{loss:.4f}"),
    ]
    took: list[tuple[str, object]] = [
        ("steps", _count(compute.steps or export.get("steps"))),
        ("samples seen", _count(compute.samples_seen)),
        ("processes", export.get("world_size") or settings.get("num_ranks")),
        *(logged if with_times else []),
        ("communication", export.get("backend")),
        ("versions", export.get("versions")),
        ("kind of processors, energy and emissions", None),
    ]
    return [
        "## Training\n",
        _facts_table(rows) if rows else "The settings are unknown.\n",
        _folded("All settings", settings) if settings else "",
        "### Compute\n",
        _facts_table(took),
    ]


def _results_part(results: Sequence[StoredResult]) -> list[str]:
    parts = ["## Results\n"]
    if not results:
        return [*parts, "None: how good the model is is unknown. `declip eval` measures it.\n"]
    parts.append(
        "Percent of 100, with 95% intervals and what guessing gives. In the training data: samples "
        "of the test set that the training data holds, too, where that was checked.\n"
    )
    columns = ["dataset", "task", "prompts", "metric", "value", "95% interval", "chance",
               "samples", "unreadable", "in the training data", "value without those"]  # fmt: skip
    rows = [
        _result_row(stored, metric)
        for stored in results
        for metric in dict.fromkeys(filter(None, [stored.main_metric, *stored.metrics]))
    ]
    parts.append(markdown_table(columns, rows, num_text_columns=4) + "\n")
    return parts


def _result_row(stored: StoredResult, metric: str) -> list[str]:
    known = stored.result.provenance
    value, interval = stored.value(metric), stored.interval(metric)
    chance = known.chance.get(metric) if known else None
    clean = stored.value_without_overlap(metric)
    num_unreadable = known.num_unreadable if known else None
    return [
        plain(stored.dataset),
        plain(stored.task),
        plain(known.templates) if known and known.templates else "-",
        plain(metric),
        "-" if value is None else f"{100 * value:.2f}",
        UNKNOWN if interval is None else f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}",
        UNKNOWN if chance is None else f"{100 * chance:.2f}",
        UNKNOWN if known is None else f"{known.num_samples:,}",
        UNKNOWN if num_unreadable is None else f"{num_unreadable:,}",
        plain(overlap_text(stored)),
        "-" if clean is None else f"{100 * clean:.2f}",
    ]


def _limits_part(
    facts: CardFacts, results: Sequence[StoredResult], unmatched: Sequence[str]
) -> list[str]:
    trained = facts.manifests.get("train")
    limits = []
    if trained is not None:
        limits.append(
            f"It has seen {trained.num_in:,} pairs; what is not among them it can hardly know."
        )
    limits.append(
        "Whom it treats how was not measured: bias, harmful associations and the privacy of people "
        "in the data are unknown. It is for research, not for decisions about people."
    )
    if not any(counts.column == "license" for counts in facts.counts):
        limits.append("Whether the data may be used for a given purpose is unknown.")
    if unmatched:
        limits.append(
            f"Whether these results are of the very weights above is unknown, for they do not say: "
            f"{', '.join(unmatched)}."
        )
    unchecked = sorted({stored.dataset for stored in results if stored.num_overlap is None})
    if unchecked:
        limits.append(
            f"Whether the training data holds samples of these test sets is unknown: "
            f"{', '.join(unchecked)}."
        )
    seen = sorted({s.dataset for s in results if s.num_overlap})
    if seen:
        limits.append(
            f"The training data holds samples of these test sets: {', '.join(seen)}; see the value "
            "without them."
        )
    languages = sorted({stored.result.language for stored in results})
    if languages:
        limits.append(f"Languages it was evaluated in: {', '.join(languages)}; others are unknown.")
    tasks = sorted({stored.task for stored in results})
    limits.append(
        f"Evaluated by {', '.join(tasks)} alone." if tasks else "It was not evaluated at all."
    )
    return ["## Limits\n", "\n".join(f"- {plain(limit, 2_000)}" for limit in limits) + "\n"]


def _identity_part(facts: CardFacts, with_times: bool) -> list[str]:
    rows = [
        [
            plain(step),
            f"{done.num_in:,}",
            f"{done.num_out:,}",
            f"`{done.fingerprint[:16]}`",
            f"`{facts.manifest_hashes[step][:16]}`",
            *([_seconds(facts, step)] if with_times else []),
            plain(done.code_version),
        ]
        for step, done in facts.manifests.items()
    ]
    parts = ["## Where it comes from\n"]
    if rows:
        columns = ["step", "in", "out", "fingerprint", "sha256 of its manifest"]
        columns += ["seconds", "code"] if with_times else ["code"]
        parts.append(markdown_table(columns, rows) + "\n")
    missing = [step for step in STEPS if step not in facts.manifests]
    if missing:
        parts.append(f"Steps without a record here: {', '.join(missing)}.\n")
    parts.append(f"Card by opendeclip {plain(__version__)}.\n")
    return parts


def _seconds(facts: CardFacts, step: str) -> str:
    return f"{facts.seconds[step]:,.0f}" if step in facts.seconds else UNKNOWN


def _public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without folders: of a path, or several in a list, the last part stays."""
    return {
        name: [_end(item) for item in value] if isinstance(value, list) else _end(value)
        for name, value in settings.items()
        if name not in _LOCAL
    }


def _end(value: Any) -> Any:
    return value.rstrip("/").rsplit("/", 1)[-1] if isinstance(value, str) else value


def _folded(title: str, content: Mapping[str, Any]) -> str:
    """An object as JSON in a fence that nothing inside can close, folded away."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=True)
    fence = "`" * max(3, 1 + max((len(run) for run in _runs_of_ticks(text)), default=0))
    body = f"{fence}json\n{text}\n{fence}"
    return f"<details><summary>{plain(title)}</summary>\n\n{body}\n\n</details>\n"


def _runs_of_ticks(text: str) -> list[str]:
    return [run for run in "".join(c if c == "`" else " " for c in text).split(" ") if run]


def _count(number: object) -> str | None:
    return f"{number:,}" if isinstance(number, int) else None
