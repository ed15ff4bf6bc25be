"""Token ids that were made once are those that the tokenizer gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_shards import DeclipError
from declip_train import token_cache
from declip_train.token_cache import QuickTokenizer, caption_tokens, tokenizer_digest
from declip_train.tokenizer import CaptionTokenizer

TOKENIZER = CaptionTokenizer()
SHORT = CaptionTokenizer(8)
CAPTIONS = [
    "a photo of a cat",
    "",
    " \t\n",
    "!",
    "! ! !",
    "one two three four five six seven eight nine ten",
    "caf&eacute; &amp;amp; Ünïcödé 漢字 \U0001f600",
    "ends with <end_of_text>",
    "<start_of_text> and <end_of_text> inside",
    "word " * 200,
]


def table_of(captions, tokenizer, cache, **options):
    def some(numbers):
        return [captions[number] for number in numbers.tolist()]

    return caption_tokens(
        some, len(captions), tokenizer, fingerprint="these", cache=cache, **options
    )


@pytest.mark.parametrize("tokenizer", [TOKENIZER, SHORT], ids=["77", "8"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_are_the_tokenizers(tokenizer, on_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "_IN_MEMORY", 0 if on_disk else 100)
    monkeypatch.setattr(token_cache, "_CHUNK", 3)
    table = table_of(CAPTIONS, tokenizer, tmp_path)
    assert len(table) == len(CAPTIONS)
    assert table.ids.dtype == np.uint16
    wanted = np.array([9, 0, 0, 7, 1, 3, 2, 8, 4, 6, 5])
    texts = [CAPTIONS[number] for number in wanted]
    np.testing.assert_array_equal(table.rows(wanted), tokenizer(texts))
    for some in (wanted, wanted[1:5], wanted[4:5], wanted[:0]):
        expected = tokenizer([CAPTIONS[number] for number in some], trim=True)
        found = table.rows(some, trim=True)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, expected)


PLAIN = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)
PIECES = st.lists(
    st.sampled_from(
        ["don't", "'S", "x'll", "&amp;", "&", "<", "<start_of_text>", "<END_of_text>", "A1b2",
         "...", "  ", " ", "\t", "\x1b[0m", "é", "Ã©", "\u201cq\u201d", "½", "İ", "ﬁ", "12", "-",
         "a" * 30]
    ),
    max_size=12,
).map("".join)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(PLAIN | PIECES | st.text(max_size=30), min_size=1, max_size=6))
def test_the_quick_way_gives_the_tokenizers_ids(captions):
    captions = [text.encode("utf-8", "ignore").decode() for text in captions]
    for tokenizer in (TOKENIZER, SHORT):
        found = QuickTokenizer(tokenizer)(captions)
        np.testing.assert_array_equal(found, tokenizer(captions, trim=True))
        assert found.dtype == np.int64


def test_the_quick_way_refuses_what_is_no_caption():
    with pytest.raises(DeclipError, match="but it must be text"):
        QuickTokenizer(TOKENIZER)(["fine", 3])  # type: ignore[list-item]


@given(st.lists(st.text(max_size=40), min_size=1, max_size=6))
def test_any_text_comes_back_as_it_was_tokenized(captions):
    captions = [text.encode("utf-8", "ignore").decode() for text in captions]
    table = table_of(captions, SHORT, None)
    everyone = np.arange(len(captions))
    np.testing.assert_array_equal(table.rows(everyone), SHORT(captions))


def test_captions_are_tokenized_once_for_all_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "_IN_MEMORY", 0)
    first = table_of(CAPTIONS, TOKENIZER, tmp_path)

    def refuse(*_, **__):
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_pieces", refuse)
        again = table_of(CAPTIONS, CaptionTokenizer(), tmp_path)
    np.testing.assert_array_equal(first.ids, again.ids)
    assert len(list((tmp_path / "tokens").glob("*.safetensors"))) == 1
    # Another length cuts captions elsewhere, so its ids are others.
    other = table_of(CAPTIONS, SHORT, tmp_path)
    assert len(other.ids) < len(first.ids)
    assert len(list((tmp_path / "tokens").glob("*.safetensors"))) == 2


def test_a_damaged_file_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "_IN_MEMORY", 0)
    before = table_of(CAPTIONS, TOKENIZER, tmp_path).rows(np.arange(len(CAPTIONS)))
    (path,) = (tmp_path / "tokens").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    after = table_of(CAPTIONS, TOKENIZER, tmp_path).rows(np.arange(len(CAPTIONS)))
    np.testing.assert_array_equal(before, after)


@pytest.mark.slow
def test_several_processes_make_the_same_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "_CHUNK", 2)
    one = table_of(CAPTIONS, TOKENIZER, tmp_path)
    two = table_of(CAPTIONS, TOKENIZER, tmp_path, num_processes=2)
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_array_equal(one.offsets, two.offsets)


def test_what_is_no_caption_is_refused(tmp_path):
    with pytest.raises(DeclipError, match="but it must be text"):
        table_of(["fine", None], TOKENIZER, tmp_path)


def test_ids_that_cannot_be_named_are_not_kept(tmp_path):
    class Other(CaptionTokenizer):
        pass

    assert tokenizer_digest(Other()) is None
    assert table_of(CAPTIONS, Other(), tmp_path) is None
    assert tokenizer_digest(TOKENIZER) != tokenizer_digest(SHORT)
    assert tokenizer_digest(TOKENIZER) == tokenizer_digest(CaptionTokenizer())
