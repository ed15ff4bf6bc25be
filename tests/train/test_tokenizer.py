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
