import pickle
import random
import re
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st

from declip_filter.balance import Balance, ConceptMatcher, HashSet, plain_words, read_concepts
from declip_shards import DeclipError

LETTERS = "abÖßé1 -.,'猫\t"


def plain(text):
    """Words of a text, as a plain loop finds them."""
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text or "").lower())
    return re.findall(r"(?:[^\W_]|[\u0300-\u036f])+", text)


def plain_pairs(captions, concepts):
    found = []
    for row, caption in enumerate(captions):
        words = plain(caption)
        runs_of_words = {
            " ".join(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1)
        }
        found += [(row, n) for n, concept in enumerate(concepts) if concept in runs_of_words]
    return found


def write(tmp_path, text):
    path = tmp_path / "concepts.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


@runs(deadline=None)
@given(
    st.lists(st.none() | st.text(alphabet=LETTERS, max_size=12), max_size=8),
    st.lists(st.text(alphabet=LETTERS, max_size=5).filter(plain), min_size=1, max_size=8),
)
def test_pairs_are_those_of_a_plain_loop(captions, concepts):
    texts = sorted({" ".join(plain(concept)) for concept in concepts})
    matcher = ConceptMatcher(texts)
    column = pa.array(["b a", *captions, "a"], pa.string()).slice(1, len(captions))
    row, concept = matcher.find(column)
    assert list(zip(row.tolist(), concept.tolist(), strict=True)) == plain_pairs(captions, texts)
    counts = matcher.count(column).to_pylist()
    assert counts == [row.tolist().count(n) for n in range(len(captions))]
    assert pickle.loads(pickle.dumps(matcher)).find(column)[1].tolist() == concept.tolist()


def test_many_concepts_are_told_apart():
    rng = random.Random(1)
    words = [f"w{n}" for n in range(300)]
    concepts = sorted({" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(5000)})
    captions = [", ".join(rng.choices(words, k=rng.randint(0, 9))) for _ in range(300)]
    row, concept = ConceptMatcher(concepts).find(pa.array(captions))
    known = {concept: n for n, concept in enumerate(concepts)}
    expected = set()
    for n, caption in enumerate(captions):
        said = caption.split(", ") if caption else []
        for a in range(len(said)):
            for b in range(a + 1, min(a + 4, len(said)) + 1):
                expected |= (
                    {(n, known[" ".join(said[a:b])])} if " ".join(said[a:b]) in known else set()
                )
    assert set(zip(row.tolist(), concept.tolist(), strict=True)) == expected


@given(
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), max_size=40),
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), max_size=40),
)
def test_hash_set_finds_its_own_and_no_other(members, others):
    made = HashSet(np.array(members, dtype=np.uint64))
    wanted = [*members, *others]
    found = made.places(np.array(wanted, dtype=np.uint64)).tolist()
    values = sorted(set(members))
    assert found == [values.index(value) if value in values else -1 for value in wanted]


def test_a_list_is_read_as_words_in_one_order(tmp_path):
    path = write(tmp_path, "\ufeffRed Apple\n\n  cat \nred-apple!\nCAFE\u0301\n")
    assert read_concepts(path) == ["caf\u00e9", "cat", "red apple"]
    assert plain_words(pa.array(["A–B", None, "x_Y"])).to_pylist() == ["a b", "", "x_y"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("\n \n", "has no concept; write one a line"),
        ("cat\n?!\n", r"line 2 is '\?!', which has no"),
    ],
)
def test_lists_without_concepts_are_refused(tmp_path, text, sentence):
    with pytest.raises(DeclipError, match=sentence):
        read_concepts(write(tmp_path, text))


def test_unreadable_lists_are_refused(tmp_path):
    with pytest.raises(DeclipError, match=r"^concepts .* is a folder; name a file in it"):
        read_concepts(str(tmp_path))
    with pytest.raises(DeclipError, match="does not exist; correct its path"):
        read_concepts(str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DeclipError, match="is not UTF-8"):
        read_concepts(str(tmp_path / "latin.txt"))


def sampled(cap, seed=0, num=4000):
    """Captions of a very frequent, a frequent and a rare concept, drawn from a fixed seed."""
    rng = np.random.default_rng(4)
    has = rng.random((num, 3)) < [0.9, 0.3, 0.005]
    names = np.array(["dog", "cat", "axolotl"])
    captions = pa.array([" ".join(names[row]) for row in has])
    keys = pa.array([f"{n:06d}" for n in range(num)])
    matcher = ConceptMatcher(["axolotl", "cat", "dog"])
    totals = matcher.totals(captions, np.ones(num, dtype=bool))
    made = Balance(matcher, totals, cap, seed)
    columns = {"key": keys, "caption": captions}
    return has[:, ::-1], totals, made, columns


def test_chance_is_that_of_one_draw_a_concept_and_one_is_enough():
    has, totals, made, columns = sampled(400)
    assert totals.tolist() == has.sum(axis=0).tolist()
    chance = np.minimum(1, 400 / totals)
    expected = [1 - np.prod(1 - chance[mine]) if mine.any() else 1.0 for mine in has]
    np.testing.assert_allclose(made.keep_chance(columns["caption"]), expected, rtol=1e-12)
    kept = ~np.array(made(columns).to_pylist())
    assert kept[has[:, 0]].all()  # a rare concept keeps all of its own
    spread = np.sqrt(sum(p * (1 - p) for p in expected))
    assert abs(kept.sum() - sum(expected)) < 4 * spread
    only_dog = has[:, 2] & ~has[:, 1] & ~has[:, 0]
    assert abs(kept[only_dog].mean() - 400 / totals[2]) < 0.05


def test_a_higher_cap_keeps_what_a_lower_one_kept_and_order_does_not_matter():
    before = np.ones(4000, dtype=bool)
    for cap in (1, 50, 400, 3000, 5000):
        _, _, made, columns = sampled(cap)
        out = np.array(made(columns).to_pylist())
        assert (out <= before).all()
        before = out
        shuffled = np.random.default_rng(1).permutation(len(out))
        mixed = {name: column.take(pa.array(shuffled)) for name, column in columns.items()}
        assert np.array(made(mixed).to_pylist()).tolist() == out[shuffled].tolist()
    assert not before.any()
    _, _, made, columns = sampled(400, seed=1)
    assert made(columns).to_pylist() != sampled(400)[2](columns).to_pylist()


def test_captions_without_a_concept_are_left_to_their_own_rule():
    made = Balance(ConceptMatcher(["cat"]), np.array([9]), 1, 0)
    columns = {"key": pa.array(["a", "b"]), "caption": pa.array(["a dog", None])}
    assert made(columns).to_pylist() == [False, False]
