"""Pages of results: the table with charts and pictures, and the comparison of two models.

Each is one file that fetches nothing and runs nothing; pictures come from the examples that
`declip eval` keeps beside its results, so that no dataset is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from declip_eval import html
from declip_eval.charts import MAX_SERIES, Series, line_chart
from declip_eval.outcomes import Outcomes, outcomes_path, read_outcomes
from declip_eval.radar import MAX_AXES, MIN_AXES, Profile, point_chart, radar_chart
from declip_shards import DeclipError
from pipelines.compare_command import closing_lines, contest_rows, p_text
from pipelines.compare_results import Comparison, Contest
from pipelines.eval_cells import Cell, Row, TaskTable
from pipelines.eval_examples import Example, read_examples
from pipelines.sheets import FOOTER, UNREADABLE
from pipelines.stored_results import StoredResult, overlap_text
from pipelines.table_text import average_text, cell_text, notes_of, row_name

MAX_PICTURES = 24
"""Of each comparison."""
_SHOWN_ANSWERS = 3


def table_page(
    results: Sequence[StoredResult], tables: Sequence[TaskTable], *, num_pictures: int = 16
) -> str:
    """The table of results as a page.

    Args:
        results: all of them.
        tables: as `eval_cells.task_tables` arranges them.
        num_pictures: at most so many examples of each result.
    """
    shown = {
        cell.stored.path: cell.stored
        for table in tables
        for row in table.rows
        for cell in row.cells
        if cell.stored is not None
    }
    sections = [_table_section(table) for table in tables]
    curves = _few_shot_curves(list(shown.values()))
    if curves:
        lead = "Means over the draws; their intervals stand in the tables above."
        sections.append(html.section("Few-shot curves", *curves, lead=lead))
    examples = {path: read_examples(path)[:] for path in shown}
    sheets = [_examples_of(stored, examples[path], num_pictures) for path, stored in shown.items()]
    if any(sheets):
        sections.append(
            html.section(
                "What the models answer",
                *[sheet for sheet in sheets if sheet is not None],
                lead="Samples drawn at random by a seed when the result was made: wrong answers "
                "first, then right ones, and what captions and pictures find.",
            )
        )
    sections.append(_background_section(list(shown.values())))
    return html.page(
        "Evaluation",
        sections,
        subtitle="Models by datasets, with what is missing in its place.",
        summary=[html.stat_tiles(_tiles(results, tables))],
        footer=FOOTER,
    )


def _tiles(
    results: Sequence[StoredResult], tables: Sequence[TaskTable]
) -> list[tuple[str, str, str]]:
    missing = sum(table.num_missing for table in tables)
    cells = sum(len(row.cells) for table in tables for row in table.rows if not row.is_published)
    samples = sum(
        stored.result.provenance.num_samples for stored in results if stored.result.provenance
    )
    return [
        ("Models", f"{len({stored.model for stored in results}):,}", "measured here"),
        ("Datasets", f"{len({stored.dataset for stored in results}):,}", "evaluated"),
        ("Cells", f"{cells - missing:,} of {cells:,}", "the others are missing or failed"),
        ("Answers", f"{samples:,}", "samples, over all results"),
    ]


def _table_section(table: TaskTable) -> html.Section:
    columns = ["model", *(column.title for column in table.columns)]
    if table.has_average:
        columns.append("average")
    rows: list[list[html.Content]] = []
    for row in table.rows:
        line: list[html.Content] = [_model_cell(row), *map(_value_cell, row.cells)]
        if table.has_average:
            line.append(average_text(table, row))
        rows.append(line)
    content: list[html.Content] = [
        html.table(columns, rows, caption=f"{table.task}, percent of 100"),
        " ".join(notes_of(table)),
        *_charts(table),
    ]
    if table.sources:
        content.append(
            html.details(
                "Sources of the published numbers, and their protocols",
                html.table(
                    ["source and protocol", "models", "datasets"],
                    table.sources,
                    text_columns=(0, 1, 2),
                ),
            )
        )
    return html.section(table.task, *content)


def _few_shot_curves(results: Sequence[StoredResult]) -> list[html.Markup]:
    """A chart a dataset that has few-shot probes of several numbers of pictures."""
    points: dict[str, dict[str, dict[int, float]]] = {}
    for stored in results:
        value = stored.value(stored.main_metric) if stored.main_metric else None
        if stored.shots is not None and value is not None:
            of_dataset = points.setdefault(stored.dataset, {})
            of_dataset.setdefault(stored.model, {})[stored.shots] = 100 * value
    charts = []
    for dataset, models in points.items():
        lines = {model: sorted(at.items()) for model, at in models.items() if len(at) > 1}
        shown = list(lines.items())[:MAX_SERIES]
        if not shown:
            continue
        left_out = len(lines) - len(shown)
        more = f", the first {MAX_SERIES} models ({left_out} more)" if left_out else ""
        series = [
            Series(name=model, x=[x for x, _ in line], y=[y for _, y in line])
            for model, line in shown
        ]
        charts.append(
            line_chart(
                series,
                title=f"{dataset} by pictures a class",
                x_label="pictures a class",
                y_label=f"percent{more}",
            )
        )
    return charts


def _model_cell(row: Row) -> html.Content:
    if not row.is_published:
        return row.model
    return html.Markup(f'{html.escape(row.model)} <span class="note">published</span>')


def _value_cell(cell: Cell) -> html.Markup:
    """The number with its interval, or why there is none."""
    if cell.value is None:
        told = html.escape(cell.note)
        shown = html.escape(cell_text(cell))
        return html.Markup(f'<span class="note" title="{told}">{shown}</span>')
    if cell.interval is None:
        return html.escape(cell_text(cell))
    low, high = (100 * end for end in cell.interval)
    return html.Markup(
        f'{html.escape(cell_text(cell))}<span class="note">{low:.1f} to {high:.1f}</span>'
    )


def _charts(table: TaskTable) -> list[html.Markup]:
    """A radar where there are datasets enough, and points with intervals."""
    # A paper's single number of many would fill the chart with gaps: the table has it.
    most = max((row.num_there for row in table.rows), default=0)
    rows = [row for row in table.rows if row.num_there > (most / 2 if row.is_published else 0)]
    # Where not all fit: the measured ones, and the papers' that have most numbers here.
    rows = sorted(rows, key=lambda row: (row.is_published, row.is_published * -row.num_there))
    rows = rows[:MAX_SERIES]
    columns = [
        number
        for number in range(len(table.columns))
        if any(row.cells[number].value is not None for row in rows)
    ]
    if not columns:
        return []
    names = [table.columns[number].title for number in columns]
    profiles = [
        Profile(
            name=row_name(row),
            values=[_percent(row.cells[number].value) for number in columns],
            intervals=[_percents(row.cells[number].interval) for number in columns],
        )
        for row in rows
    ]
    left_out = sum(bool(row.num_there) for row in table.rows) - len(rows)
    unit = "percent" + (f", the first {MAX_SERIES} models ({left_out} more)" if left_out else "")
    charts = []
    if MIN_AXES <= len(names) <= MAX_AXES:
        charts.append(radar_chart(names, profiles, title=f"{table.task} by dataset", unit=unit))
    charts.append(
        point_chart(
            names,
            profiles,
            title=f"{table.task} with 95% intervals",
            unit=f"{unit}; published numbers have no interval"
            if any(row.is_published for row in rows)
            else unit,
        )
    )
    return charts


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _percents(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if interval is None else (100 * interval[0], 100 * interval[1])


def _examples_of(
    stored: StoredResult, examples: Sequence[Example], most: int
) -> html.Markup | None:
    """A result's examples, folded away; None where it has none."""
    if not examples or not most:
        return None
    title = f"{stored.model} on {stored.dataset}, {stored.task}"
    if examples[0].role == "retrieval":
        rows = spread(examples, most)
        return html.details(title, *[_retrieval_row(example) for example in rows])
    wrong = [example for example in examples if example.role == "error"]
    right = [example for example in examples if example.role == "right"]
    num_wrong = min(len(wrong), max(most - most // 2, most - len(right)))
    grids = [
        html.image_grid([answer_card(example) for example in some], caption=caption)
        for some, caption in (
            (wrong[:num_wrong], "Wrong answers"),
            (right[: most - num_wrong], "Right answers"),
        )
        if some
    ]
    return html.details(title, *grids)


def spread(examples: Sequence[Example], most: int) -> list[Example]:
    """At most so many retrieval examples, of both directions alike where there are."""
    texts = [example for example in examples if example.text]
    images = [example for example in examples if not example.text]
    num_texts = min(len(texts), max(most - most // 2, most - len(images)))
    return [*texts[:num_texts], *images[: most - num_texts]]


def picture(data: bytes | None, alt: str) -> html.Markup | None:
    """A picture that was kept; None where there is none, or it is damaged."""
    if data is None:
        return None
    try:
        return html.image(data, alt=alt, max_side=128)
    except ValueError:
        return None


def answer_card(example: Example) -> html.Card:
    """A picture with its class, and what was answered."""
    answers = "; ".join(
        f"{name} ({score:.3g})"
        for name, score in list(zip(example.found, example.scores, strict=False))[:_SHOWN_ANSWERS]
    )
    image = picture(example.image, example.text)
    trouble = f"{example.note or UNREADABLE}; " if image is None else ""
    return html.Card(
        image=image,
        caption=example.text,
        note=f"{trouble}answered: {answers or 'nothing'}",
        tone="good" if example.role == "right" else "bad",
    )


def _retrieval_row(example: Example) -> html.Markup:
    """A caption with the pictures that it found, or a picture with the captions."""
    image = picture(example.image, "the picture that was asked with")
    if example.text:
        query = html.Card(image=None, caption=example.text, note="finds pictures")
    else:
        note = "finds captions" if image is not None else example.note or UNREADABLE
        query = html.Card(image=image, caption=example.key, note=note)
    images = example.found_images or (None,) * len(example.found)
    found = [
        (
            html.Card(
                image=picture(data, name),
                caption=name,
                tone="good" if is_right else "neutral",
            ),
            score,
        )
        for name, data, is_right, score in zip(
            example.found, images, example.found_right, example.scores, strict=False
        )
    ]
    return html.neighbor_row(query, found, score="similarity")


def _background_section(results: Sequence[StoredResult]) -> html.Section:
    """How each number came about."""
    columns = ["model", "dataset", "task", "metric", "value", "95% interval", "chance",
               "samples", "unreadable", "in the training data", "without those", "prompts",
               "data digest"]  # fmt: skip
    rows = [_background_row(stored) for stored in results]
    return html.section(
        "Behind the numbers",
        html.table(columns, rows, text_columns=(0, 1, 2, 3, 11, 12)),
        lead="A dash is what the result does not say. Unreadable pictures count as wrong. Samples "
        "that the training data holds, too, are counted in the value, and the value without them "
        "stands beside it.",
    )


def _background_row(stored: StoredResult) -> list[str]:
    known, metric = stored.result.provenance, stored.main_metric
    value = None if metric is None else stored.value(metric)
    interval = None if metric is None else stored.interval(metric)
    head = [stored.model, stored.dataset, stored.task, metric or "-"]
    number = "-" if value is None else f"{100 * value:.2f}"
    if known is None:
        return [*head, number, *["-"] * 8]
    chance = known.chance.get(metric or "")
    clean = stored.value_without_overlap(metric) if metric else None
    return [
        *head,
        number,
        "-" if interval is None else f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}",
        "-" if chance is None else f"{100 * chance:.2f}",
        f"{known.num_samples:,}"
        + (f" of {known.num_expected:,}" if known.num_expected is not None else ""),
        "-" if known.num_unreadable is None else f"{known.num_unreadable:,}",
        overlap_text(stored),
        "-" if clean is None else f"{100 * clean:.2f}",
        known.templates or "-",
        (stored.data_digest or "-")[:12],
    ]


def compare_page(
    contest: Contest, side_a: Sequence[StoredResult], side_b: Sequence[StoredResult]
) -> str:
    """The comparison of two models as a page.

    Args:
        contest: what `compare_results.compare` found.
        side_a: the first model's results, for pictures.
        side_b: the second's.
    """
    counts = contest.counts()
    columns, rows = contest_rows(contest)
    main = [item for item in contest.comparisons if item.is_main]
    sections = [
        html.section(
            "Differences",
            html.table(columns, rows, text_columns=(0, 1, 2, 11)),
            *[html.paragraph(line) for line in closing_lines(contest)],
            *([_difference_chart(main)] if main else []),
            lead="Percent of 100; above 0 means that B is better. The p-values are of paired "
            "tests, query by query, and corrected for the number of datasets by Holm's method.",
        )
    ]
    sheets = [sheet for item in main if (sheet := _disagreements(item, side_a, side_b)) is not None]
    if sheets:
        sections.append(
            html.section(
                "Where one of them alone is right",
                *sheets,
                lead="Of the samples that were kept with their pictures, drawn by a seed.",
            )
        )
    return html.page(
        "Comparison of two models",
        sections,
        subtitle=f"A: {contest.model_a}. B: {contest.model_b}.",
        summary=[
            html.stat_tiles(
                [
                    ("B better", str(counts["B better"]), "settled"),
                    ("A better", str(counts["A better"]), "settled"),
                    ("Not settled", str(counts["not settled"]), "may be chance"),
                    ("Not tested", str(counts["not tested"]), "see the notes"),
                ]
            )
        ],
        footer=f"{FOOTER} Seed {contest.seed}, {contest.num_resamples:,} resamples.",
    )


def _difference_chart(main: Sequence[Comparison]) -> html.Markup:
    names = [f"{item.dataset}, {item.task}" for item in main]
    return point_chart(
        names,
        [
            Profile(
                name="B - A",
                values=[100 * item.difference for item in main],
                intervals=[_percents(item.interval) for item in main],
            )
        ],
        title="B minus A, with 95% intervals",
        unit="points of percent; without correction for the number of datasets",
        reference=("no difference", 0.0),
    )


def _disagreements(
    item: Comparison, side_a: Sequence[StoredResult], side_b: Sequence[StoredResult]
) -> html.Markup | None:
    """Pictures that one model alone classified right."""
    found = [
        next(s for s in side if (s.task, s.dataset) == (item.task, item.dataset))
        for side in (side_a, side_b)
    ]
    examples = [read_examples(stored.path) for stored in found]
    if item.p_value is None or not any(examples) or _is_retrieval([*examples[0], *examples[1]]):
        return None
    answers = []
    for stored, own in zip(found, examples, strict=True):
        try:
            outcomes = read_outcomes(outcomes_path(stored.path))
        except ValueError as error:
            raise DeclipError(str(error)) from error
        if outcomes.kind != "classification":
            return None
        answers.append(_answers(outcomes, own))
    names = {**answers[1][1], **answers[0][1]}
    cards = []
    for example in {e.key: e for e in [*examples[0], *examples[1]]}.values():
        told = [of_key.get(example.key) for of_key, _ in answers]
        if told[0] is None or told[1] is None or told[0][1] == told[1][1]:
            continue
        words = [
            f"{side} {'✓' if is_right else '✕'} {names.get(label, f'class {label}')}"
            for side, (label, is_right) in zip("AB", (told[0], told[1]), strict=True)
        ]
        image = picture(example.image, example.text)
        cards.append(html.Card(image=image, caption=example.text, note="; ".join(words)))
    if not cards:
        return None
    title = f"{item.dataset}, {item.task}: p {p_text(item.p_value)}"
    return html.details(title, html.image_grid(cards[:MAX_PICTURES]))


def _is_retrieval(examples: Sequence[Example]) -> bool:
    return any(example.role == "retrieval" for example in examples)


def _answers(
    outcomes: Outcomes, examples: Sequence[Example]
) -> tuple[Mapping[str, tuple[int, bool]], Mapping[int, str]]:
    """Key -> (class that was answered, whether that is right), and the names that are known."""
    columns = outcomes.columns
    of_key = {
        key: (int(columns["predicted"][row][0]), int(columns["rank"][row]) == 0)
        for row, key in enumerate(outcomes.keys)
    }
    row_of = {key: row for row, key in enumerate(outcomes.keys)}
    names: dict[int, str] = {}
    for example in examples:
        if example.key in row_of:
            labels = columns["predicted"][row_of[example.key]]
            names |= {int(i): name for i, name in zip(labels, example.found, strict=False)}
    return of_key, names
