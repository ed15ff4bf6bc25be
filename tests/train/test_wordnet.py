"""The WordNet reader, on a small database written here in Princeton's format."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from declip_shards import DeclipError
from declip_train.text_views import TextView
from declip_train.wordnet import WordNet

LICENSE = "".join(f"  {number} This line is part of the license.\n" for number in range(1, 30))
SYNSETS = {
    "noun": [["apple"], ["apple", "orchard_apple_tree", "Malus_pumila"], ["dog", "cad"], ["zoo"]],
    "verb": [["chase", "dog", "trail"], ["run"]],
    "adj": [["red", "crimson", "blood-red"], ["big", "galore(ip)", "O'Neill's"]],
    "adv": [["fast", "tight"]],
}


def write_wordnet(folder: Path, synsets: dict[str, list[list[str]]] | None = None) -> Path:
    """Write data.POS and, sorted by lemma, index.POS; meanings get their true offsets."""
    folder.mkdir(exist_ok=True)
    for part, meanings in (synsets or SYNSETS).items():
        data = LICENSE
        places: dict[str, list[int]] = {}
        for words in meanings:
            offset = len(data.encode())
            listed = " ".join(f"{word} 0" for word in words)
            data += (
                f"{offset:08d} 03 {part[0]} {len(words):02x} {listed} 000 | a gloss; of 2 parts\n"
            )
            for word in words:
                places.setdefault(word.split("(")[0].lower(), []).append(offset)
        (folder / f"data.{part}").write_text(data)
        index = LICENSE + "".join(
            f"{lemma} {part[0]} {len(at)} 2 @ ~ {len(at)} 0 {' '.join(f'{o:08d}' for o in at)}  \n"
            for lemma, at in sorted(places.items())
        )
        (folder / f"index.{part}").write_text(index)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_wordnet(tmp_path / "dict")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("apple", ("malus pumila", "orchard apple tree")),
        ("orchard apple tree", ("apple", "malus pumila")),
        ("dog", ("cad", "chase", "trail")),
        ("Red", ("blood red", "crimson")),
        ("big", ("galore", "oneills")),
        ("galore", ("big", "oneills")),
        ("fast", ("tight",)),
        ("zoo", ()),
        ("run", ()),
        ("unknown", ()),
        ("zzz", ()),
        ("", ()),
        (" ", ()),
        ("1", ()),
        ("license", ()),
    ],
)
def test_synonyms_share_a_meaning(folder: Path, word: str, expected: tuple[str, ...]) -> None:
    assert WordNet(folder)(word) == expected


def test_sharing_a_meaning_is_mutual_and_every_entry_is_found(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefgh"))
    vocabulary = sorted({"".join(generator.choice(letters, 1 + n % 6)) for n in range(400)})
    meanings = [list(generator.choice(vocabulary, 3, replace=False)) for _ in range(200)]
    wordnet = WordNet(
        write_wordnet(
            tmp_path / "d", {part: meanings if part == "noun" else [["x"]] for part in SYNSETS}
        )
    )
    for words in meanings:
        for word in words:
            assert set(words) - {word} <= set(wordnet(word))
    for word in vocabulary:
        expected = {other for words in meanings if word in words for other in words} - {word}
        assert wordnet(word) == tuple(sorted(expected))


def test_it_serves_caption_views_and_travels_to_other_processes(folder: Path) -> None:
    wordnet = WordNet(folder)
    again = pickle.loads(pickle.dumps(wordnet))
    assert again("dog") == wordnet("dog")
    assert again.digest() == wordnet.digest()
    views = {TextView(wordnet)("a red apple", np.random.default_rng(seed)) for seed in range(60)}
    assert {"a crimson apple", "a red orchard apple tree", "apple red a"} <= views


def test_the_digest_is_the_database(folder: Path, tmp_path: Path) -> None:
    same = write_wordnet(tmp_path / "same")
    other = write_wordnet(tmp_path / "other", {**SYNSETS, "adv": [["fast", "firm"]]})
    assert WordNet(folder).digest() == WordNet(same).digest() != WordNet(other).digest()


def test_a_missing_or_mixed_database_is_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DeclipError, match=r"index\.noun cannot be read .* give the folder of a Word"
    ):
        WordNet(tmp_path / "nowhere")
    (folder / "data.noun").write_text("x" + (folder / "data.noun").read_text())
    with pytest.raises(DeclipError, match=r"data\.noun does not belong to its index; give"):
        WordNet(folder)("apple")
    (folder / "index.adv").write_text("")
    with pytest.raises(DeclipError, match=r"index\.adv cannot be read"):
        WordNet(folder)
