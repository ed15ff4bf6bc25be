"""The tokenizer equals open_clip's, string for string; masks keep their promises."""

from __future__ import annotations

import gzip
import importlib.util
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_shards import DeclipError
from declip_train.tokenizer import (
    EOT_ID,
    PAD_ID,
    SOT_ID,
    VOCAB_SIZE,
    CaptionTokenizer,
    MaskRules,
    find_vocabulary,
    mask_tokens,
)

STRANGE = [
    "",
    " \t\n\u3000 ",
    "!",
    "A Photo of a DOG, isn't it?",
    "it's they'll WE'RE i'd you've i'm don't 'S 'ſ",
    "<start_of_text> x <end_of_text>",
    "!<start_of_text><END_OF_TEXT>",
    "<|startoftext|> </w> w</w",
    "&amp;lt;b&amp;gt; &#x110000; &#xD800; &nbsp;&amp;nbsp;",
    "caf\u00e9 cafe\u0301 \u00c3\u00a9 \u00e2\u20ac\u2122",
    "日本語のテキスト 漢字 한국어 ไทย العربية हिन्दी",
    "👩‍👩‍👧 emoji 🏳️‍🌈 ☃︎ ❤️",
    "１２３ ½ Ⅳ ² ٣ 1234567890 3.14",
    "𐍈 𝕳𝖊𝖑𝖑𝖔 İI ı ŉ ﬁ ß ẞ",
    "a\x00b \ufffe \u200b \u00ad \x7f \x85 \u2028",
    "Ħ Ġ ĠĦ Ċ \u0100\u0143",
    "x" * 500,
    "word " * 200,
    "_under_score-and--dash...!!!???",
    "IMG_1234.JPG http://example.com/?q=%20&a=b",
    "\ud800 half a pair",
    "two halves \ud83d\ude00 and \ude00\ud83d the wrong way round",
    "\u202eright to left\u202c \u200fשלום\u200e عَرَبِيّ ۱۲۳",
    "e\u0301\u0327\u0308\u0323 z\u0300\u0301\u0302\u0303\u0304\u0305 \u0301alone",
    "&amp;amp;amp;amp; &lt;br&gt; &notanentity; &#0; &#128; &#xFFFE; &#39;s &Amp; &AMP &eacute",
    "&#60;start_of_text&#62; &lt;end_of_text&gt; <START_OF_TEXT>",
    "\x00\x00 \x01\x02\x1b[31mred\x1b[0m \x7f\x80\x9f",
    "tab\tnew\nreturn\rvertical\x0bform\x0cfile\x1cgroup\x1dunit\x1f",
    "\ufeffbyte order mark\ufeff \u2060 \u180e \u3164 \ufff9",
    "\u1680ogham \u2003em \u202fnarrow \u00a0hard \u205fmath",
    "ＦＵＬＬ　ＷＩＤＴＨ ﾊﾝｶｸ ①②③ ㈱ ™ © ℃ Å",
    "👩🏽‍🚀👨‍👩‍👧‍👦🇩🇪🇯🇵🏴\U000e0067\U000e0062\U000e007f #️⃣ 🫠🪿",
    "ǅ ŉ ΐ ΣΑΣ ς Straße MASSE ﬀ İstanbul ıŞık Ǆ",
    "â€œquotedâ€\x9d donâ€™t Ã¼ber schÃ¶n ÐŸÑ€Ð¸",
    "‘single’ “double” „low“ «angle» … – — ‐ ′ ″",
    "'s'S'ſ''''ve'LL'Re'M'D'T n't 'sss o'clock rock'n'roll",
    "w</w></w> </w>word ĠĊ<w/> <|endoftext|><|mask|>",
    "a" * 5000,
    "é" * 1000 + " " + "漢" * 1000,
    " ".join(str(number) for number in range(300)),
    "\U0010ffff \U000f0000 \ue000 \ufdd0 private and unassigned \u0378 \U0001f9ff",
    "नमस्ते བོད་སྐད ខ្មែរ မြန်မာ አማርኛ ᏣᎳᎩ 𐎀𐎁 𒀀",
    "x̂ = ∑ᵢ √(αᵢ²) ≤ ∞ ∴ ℵ₀ ⟨ψ|φ⟩ ½⅓¼",
    "ı̇ i̇ İ K Å ſ ß \u1e9e \u0345 \u03c2",
]


@cache
def ours(context_length: int = 77) -> CaptionTokenizer:
    return CaptionTokenizer(context_length)


@cache
def theirs() -> Any:
    """open_clip's tokenizer module alone: the package around it needs torchvision, it does not."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer_alone", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


@pytest.mark.parametrize("caption", STRANGE, ids=range(len(STRANGE)))
def test_strange_captions_have_open_clips_ids(caption: str) -> None:
    assert ours()(caption).tolist() == theirs()([caption]).tolist()
    assert list(ours().encode(caption)) == theirs().encode(caption)


any_text = st.one_of(
    st.text(),
    st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "M", "Zs", "Cf"])),
    st.lists(st.sampled_from(STRANGE), max_size=4).map("".join),
    st.text("abcdest'’ ,.-!&;#0123456789\n", max_size=200),
    st.binary(max_size=60).map(lambda data: data.decode("latin-1")),
)


@given(st.lists(any_text, max_size=4), st.sampled_from([2, 3, 8, 77]))
@settings(max_examples=300, deadline=None)
def test_any_captions_have_open_clips_ids(captions: list[str], context_length: int) -> None:
    expected = theirs()(captions, context_length=context_length).numpy()
    np.testing.assert_array_equal(ours(context_length)(captions), expected)


# Characters of one kind, of which strings are drawn that a web page might hold by accident.
ALPHABETS = [
    [chr(i) for i in range(0x100)],
    [chr(i) for i in range(0x100, 0x250)],
    [chr(i) for i in range(0x2B0, 0x370)] + list("aeiou"),
    [chr(i) for i in range(0x590, 0x780)] + ["\u200f", "\u202e", "\u202c"],
    [chr(i) for i in range(0x900, 0x980)] + [chr(i) for i in range(0xE00, 0xE60)],
    [chr(i) for i in range(0x2000, 0x2070)] + list("ab 1"),
    [chr(i) for i in range(0x3000, 0x3100)] + [chr(i) for i in range(0x4E00, 0x4F00)],
    [chr(i) for i in range(0xD7F0, 0xD810)] + [chr(i) for i in range(0xDC00, 0xDC10)] + ["a"],
    [chr(i) for i in range(0xFF00, 0x10000)],
    [chr(i) for i in range(0x1F300, 0x1F700)] + ["\u200d", "\ufe0f", "\u20e3"],
    [chr(i) for i in range(0x1D400, 0x1D500)],
    ["&amp;", "&lt;", "&gt;", "&#", "amp;", ";", "x", "39", "&", "&quot;", "&nbsp;", "65"],
    ["'", "s", "t", "re", "ve", "m", "ll", "d", "’", " ", "S", "LL"],
    ["<", ">", "|", "/", "w", "start_of_text", "end_of_text", "<start_of_text>", "<end_of_text>"],
    ["Ã", "©", "â", "€", "™", "œ", "¢", "Â", "\x80", "\x9d", "ð", "Ÿ", " ", "e"],
    ["photo", "of", "a", "dog", "-", "_", ".", ",", "!", "2", "01", " ", "  ", "\n", "\t", "#"],
]


def test_thousands_of_strange_strings_have_open_clips_ids() -> None:
    rng = np.random.default_rng(0)
    strings = ["".join(map(chr, range(first, first + 16))) for first in range(0, 0x3000, 16)]
    for number in range(5000):
        alphabet = ALPHABETS[number % len(ALPHABETS)]
        if number % 3 == 0:
            alphabet = alphabet + ALPHABETS[int(rng.integers(len(ALPHABETS)))]
        pieces = rng.integers(len(alphabet), size=int(rng.integers(1, 30)))
        strings.append("".join(alphabet[piece] for piece in pieces))
    assert len(set(strings)) > 5000
    found, expected = ours()(strings), theirs()(strings).numpy()
    wrong = [strings[row] for row in np.flatnonzero((found != expected).any(axis=1))]
    assert not wrong
    for string in strings[::50]:
        assert list(ours().encode(string)) == theirs().encode(string)


def test_every_row_has_its_end() -> None:
    strings = [*STRANGE, "<end_of_text>", "<start_of_text>" * 100, "word " * 400]
    for context_length in (2, 5, 77):
        for trim in (False, True):
            rows = ours(context_length)(strings, trim=trim)
            assert ((rows == EOT_ID).any(axis=1)).all()
            assert (rows[:, 0] == SOT_ID).all()


def test_rows_have_their_form() -> None:
    rows = ours()(["a dog", "word " * 200])
    assert rows.shape == (2, 77)
    assert rows.dtype == np.int64
    assert rows[:, 0].tolist() == [SOT_ID, SOT_ID]
    assert rows.argmax(axis=1).tolist() == [3, 76]
    assert rows[0, 4:].tolist() == [PAD_ID] * 73
    assert rows[1, :76].tolist() == [SOT_ID, *ours().encode("word " * 75)]
    assert rows[1, 76] == EOT_ID


def test_trimmed_rows_are_the_full_ones_without_padding() -> None:
    captions = ["a dog", "", "a much longer caption"]
    full, trimmed = ours()(captions), ours()(captions, trim=True)
    assert trimmed.shape == (3, 6)
    np.testing.assert_array_equal(full[:, :6], trimmed)
    assert not full[:, 6:].any()
    assert ours()([]).shape == (0, 77)
    assert ours()([], trim=True).shape == (0, 2)


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789 ", max_size=60))
@settings(max_examples=100, deadline=None)
def test_decoding_inverts_encoding_up_to_spaces(caption: str) -> None:
    decoded = ours().decode(ours()(caption, trim=True)[0])
    assert decoded.replace(" ", "") == caption.replace(" ", "")
    assert ours().encode(decoded) == ours().encode(caption)


def test_decoding_ends_at_the_end_token() -> None:
    assert ours().decode(ours()("a dog, it's 🏳️‍🌈")[0]) == "a dog , it 's 🏳️‍🌈"
    with pytest.raises(DeclipError, match="Token id 49408 is outside 0 to 49407"):
        ours().decode([VOCAB_SIZE])


def test_repeated_captions_are_looked_up_and_not_computed_again() -> None:
    tokenizer = CaptionTokenizer()
    first = tokenizer(["a red apple"] * 3)

    def compute(word: str) -> tuple[int, ...]:
        raise AssertionError(f"{word} was computed again")

    tokenizer._word_ids = compute
    np.testing.assert_array_equal(tokenizer(["a red apple"]), first[:1])
    with pytest.raises(AssertionError, match="a was computed again"):
        tokenizer(["a green apple"])


def test_a_pickled_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    copy = tmp_path / "vocabulary.gz"
    copy.write_bytes(gzip.compress(gzip.decompress(find_vocabulary().read_bytes()), 1))
    tokenizer = CaptionTokenizer(12, copy)
    tokenizer("warm the caches")
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.context_length == 12
    np.testing.assert_array_equal(again(STRANGE), tokenizer(STRANGE))
    np.testing.assert_array_equal(tokenizer(["a dog"]), ours()(["a dog"])[:, :12])


def test_a_missing_or_foreign_vocabulary_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeclipError, match=r"none\.gz does not exist: give the path"):
        CaptionTokenizer(vocabulary=tmp_path / "none.gz")
    whole = find_vocabulary().read_bytes()
    (tmp_path / "half.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DeclipError, match=r"half\.gz cannot be read \(.*\): give the path of bpe_"):
        CaptionTokenizer(vocabulary=tmp_path / "half.gz")
    text = gzip.decompress(whole)
    (tmp_path / "other.gz").write_bytes(gzip.compress(text.replace(b"t h\n", b"h t\n", 1)))
    with pytest.raises(DeclipError, match="so its token ids would not be CLIP's: give the orig"):
        CaptionTokenizer(vocabulary=tmp_path / "other.gz")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeclipError, match="was not found: install open_clip_torch, which ships it"):
        CaptionTokenizer()


def test_what_is_no_caption_is_refused_in_a_sentence() -> None:
    with pytest.raises(DeclipError, match="A caption is nan of type float, but it must be text"):
        ours()(cast(list[str], ["a dog", float("nan")]))
    with pytest.raises(DeclipError, match="context_length is 1, but a caption needs at least 2"):
        CaptionTokenizer(1)


def test_importing_and_using_the_tokenizer_does_not_import_open_clip() -> None:
    code = """
import sys
from declip_train.tokenizer import CaptionTokenizer
CaptionTokenizer()(["a dog"])
print(sorted({"open_clip", "torch", "torchvision"} & set(sys.modules)))
"""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": ""}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True, env=environment
    )
    assert answer.stdout.strip() == "[]"


CAPTIONS = ["a dog that runs", "!☃ a", "", "x", "word " * 100]


@given(st.floats(0, 1), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_masks_touch_words_only_and_targets_restore_them(probability: float, seed: int) -> None:
    token_ids = ours()(CAPTIONS)
    masked = mask_tokens(token_ids, probability, np.random.default_rng(seed))
    np.testing.assert_array_equal(masked.targets, token_ids)
    untouched = ~masked.mask_positions
    np.testing.assert_array_equal(masked.token_ids[untouched], token_ids[untouched])
    assert not (masked.replaced & untouched).any()
    places = np.arange(77)
    ends = token_ids.argmax(axis=1)[:, None]
    assert not (masked.mask_positions & ((places == 0) | (places >= ends))).any()
    # Start and end are where they were, so the text tower pools where it did.
    np.testing.assert_array_equal(masked.token_ids.argmax(axis=1), token_ids.argmax(axis=1))
    inside = masked.token_ids[(places > 0) & (places < ends)]
    assert (inside < SOT_ID).all()


def test_every_word_can_be_masked_an_exclamation_mark_too() -> None:
    token_ids = ours()(CAPTIONS)
    masked = mask_tokens(token_ids, 1.0, np.random.default_rng(0))
    assert PAD_ID in token_ids[1, 1:4]
    assert masked.mask_positions.sum(axis=1).tolist() == [
        len(ours().encode(caption)[:75]) for caption in CAPTIONS
    ]
    assert not mask_tokens(token_ids, 0.0, np.random.default_rng(0)).mask_positions.any()


def test_shares_are_the_published_ones() -> None:
    token_ids = ours()(["word " * 100] * 400)
    masked = mask_tokens(token_ids, 0.15, np.random.default_rng(0))
    num_words, num_chosen = 75 * 400, int(masked.mask_positions.sum())
    assert num_chosen / num_words == pytest.approx(0.15, abs=0.01)
    changed = masked.mask_positions & ~masked.replaced & (masked.token_ids != token_ids)
    kept = masked.mask_positions & (masked.token_ids == token_ids)
    assert masked.replaced.sum() / num_chosen == pytest.approx(0.8, abs=0.03)
    assert changed.sum() / num_chosen == pytest.approx(0.1, abs=0.02)
    assert kept.sum() / num_chosen == pytest.approx(0.1, abs=0.02)
    assert not masked.token_ids[masked.replaced].any(), "the answer is wiped"
    assert len(np.unique(masked.token_ids[changed])) > 0.9 * changed.sum()


def test_a_rows_mask_by_its_own_generator_does_not_depend_on_the_batch() -> None:
    token_ids = ours()(CAPTIONS)

    def masked(rows: list[int]) -> Any:
        generators = [np.random.default_rng(row) for row in rows]
        return mask_tokens(token_ids[rows], 0.4, generators)

    together = masked([0, 1, 2, 3, 4])
    for rows in ([4, 0], [1], []):
        for found, whole in zip(masked(rows), together, strict=True):
            np.testing.assert_array_equal(found, whole[rows])
    with pytest.raises(ValueError, match="There are 2 generators for 1 rows: give one each"):
        mask_tokens(token_ids[:1], 0.4, [np.random.default_rng(0)] * 2)


def test_other_vocabularies_have_their_own_rules() -> None:
    # Padding 0, start 2, end 3, mask 4 of ten ids: no end to find, since padding is special.
    rules = MaskRules(vocab_size=10, special_ids=frozenset({0, 2, 3, 4}), end_id=None, hidden_id=4)
    token_ids = np.array([[2, 5, 6, 7, 1, 3, 0, 0], [2, 3, 0, 0, 0, 0, 0, 0]])
    drawn: set[int] = set()
    for seed in range(300):
        masked = mask_tokens(token_ids, 1.0, np.random.default_rng(seed), rules)
        assert masked.mask_positions.tolist() == [[False] + [True] * 4 + [False] * 3, [False] * 8]
        assert (masked.token_ids[masked.replaced] == 4).all()
        drawn |= set(masked.token_ids[masked.mask_positions & ~masked.replaced].tolist())
    assert drawn == {1, 5, 6, 7, 8, 9}


def test_masks_are_a_function_of_the_generator() -> None:
    token_ids = ours()(CAPTIONS)
    first, second, other = (
        mask_tokens(token_ids, 0.5, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left, right)
    assert (first.mask_positions != other.mask_positions).any()


def test_wrong_mask_settings_are_refused_in_a_sentence() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"probability is 1\.5, but it must be from 0 to 1"):
        mask_tokens(ours()("a"), 1.5, generator)
    with pytest.raises(ValueError, match="has no end token: make them with CaptionTokenizer"):
        mask_tokens(np.zeros((2, 5), dtype=np.int64), 0.1, generator)
