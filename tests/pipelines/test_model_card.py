"""The model card says what the run says, calls the rest unknown, and obeys no text from outside."""

import json
import re
from pathlib import Path

import pytest
from result_files import write_classification
from run_folder import REASONS, write_run

from declip_shards import Store
from pipelines.card_facts import CardFacts, Compute, gather_card_facts
from pipelines.model_card import UNKNOWN, _yaml, model_card
from pipelines.stored_results import load_results


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made: Store = write_run(tmp_path / "run")
    return made


def rows_of(card: str, first: str) -> dict[str, list[str]]:
    """Cells of the table whose head begins with `first`, by its first column."""
    lines = card.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(rf"\| {first} ", line))
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        found[cells[0]] = cells[1:]
    return found


def test_counts_are_those_of_the_manifests(store: Store) -> None:
    card = model_card("m", gather_card_facts(store), [])
    assert "| pairs downloaded" in card
    assert rows_of(card, "step")["filter"][:2] == ["40", "36"]
    for reason, count in REASONS.items():
        assert re.search(rf"\| {reason} +\| +{count} \|", card)
    assert re.search(r"\| http_404 +\| +8 \| 16\.67% \|", card)
    assert rows_of(card, "license")["MIT"][0] == "12"
    assert rows_of(card, "license")[UNKNOWN][0] == "8"
    assert rows_of(card, "source")["site 0"]


def test_results_stand_with_intervals_and_overlap(store: Store, tmp_path: Path) -> None:
    contamination = {"num_overlap": 6, "metrics_without_overlap": {"acc1": 0.45}}
    write_classification(tmp_path / "r", range(30), dataset="cifar10", contamination=contamination)
    write_classification(tmp_path / "r", range(12), dataset="pets")
    card = model_card("m", gather_card_facts(store), load_results([tmp_path / "r"]))
    (line,) = [ln for ln in card.splitlines() if ln.startswith("| cifar10") and " acc1 " in ln]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[4] == "50.00"
    assert re.fullmatch(r"\d+\.\d\d to \d+\.\d\d", cells[5])
    assert cells[6:] == ["20.00", "60", "0", "6 (10.00%)", "45.00"]
    assert "The training data holds samples of these test sets: cifar10" in card
    assert "Whether the training data holds samples of these test sets is unknown: pets." in card


def test_the_front_matter_is_yaml_with_the_results(store: Store, tmp_path: Path) -> None:
    write_classification(tmp_path, range(30), dataset='x"\n- evil: 1')
    card = model_card('na"me\n---', gather_card_facts(store), load_results([tmp_path]))
    _, head, body = card.split("---\n", 2)
    assert body.startswith('\n# na"me ---\n')
    entries = {}
    for line in head.splitlines():
        match = re.fullmatch(r"([a-z_-]+): (.+)", line.strip().removeprefix("- "))
        if match and match[2][0] in '["{':
            entries[match[1]] = json.loads(match[2])
    assert entries["name"] == 'na"me\n---'
    assert entries["dataset"]["type"] == 'x"\n- evil: 1'
    assert entries["tags"] == ["clip", "opendeclip", "declip"]
    assert "license: unknown" in head


def test_text_of_the_data_is_shown_and_not_obeyed(store: Store) -> None:
    card = model_card("<img src=x>", gather_card_facts(store), [])
    assert "<script>" not in card
    assert "<img" not in card
    assert "&lt;script&gt;x&lt;/script&gt;\\|evil" in card
    # The settings hold a fence of their own, which must not close theirs.
    assert "````json" in card


def test_places_of_the_machine_stay_out(store: Store) -> None:
    assert "/home/somebody" not in model_card("m", gather_card_facts(store), [])


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    nothing = CardFacts(
        manifests={}, manifest_hashes={}, settings={}, export={}, model_config={}, seconds={},
        num_shards=0, num_bytes=0, counts=[], compute=Compute(),
    )  # fmt: skip
    card = model_card("m", nothing, [], ["cifar10"])
    for sentence in (
        "How the pairs were filtered is unknown",
        "The licenses of the pictures and captions are unknown",
        "The settings are unknown",
        "None: how good the model is is unknown",
        "It was not evaluated at all",
        "Whether these results are of the very weights above is unknown, for they do not say: cif",
        "Steps without a record here: prepare, ingest, measure, filter, embed, index, neighbors, t",
    ):
        assert sentence in card
    for row in ("method", "pairs downloaded", "samples seen", "list of pairs"):
        assert re.search(rf"\| {row} +\| {UNKNOWN} +\|", card)


def test_other_peoples_tars_are_said_to_be_that(tmp_path: Path) -> None:
    store = write_run(tmp_path / "run", train_data=["/private/place/cc3m-{0..9}.tar"])
    card = model_card("m", gather_card_facts(store), [])
    assert "The run read tars made by other programs" in card
    assert "/private/place" not in card


def test_equal_facts_give_equal_cards(store: Store) -> None:
    first, second = (model_card("m", gather_card_facts(store), []) for _ in range(2))
    assert first == second


def test_characters_beyond_16_bits_are_one_escape_of_yaml() -> None:
    """JSON writes them as two halves, which YAML reads as two characters that no file can hold."""
    assert _yaml("\U0001f600 \ud83d \x7f é") == '"\\U0001f600 \\ufffd \\u007f \\u00e9"'
    assert _yaml("\\ud83d") == '"\\\\ud83d"'
    assert json.loads(_yaml('a"\n\té')) == 'a"\n\té'
