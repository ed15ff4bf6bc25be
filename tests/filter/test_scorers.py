import numpy as np
import pytest

from declip_filter.scorers import (
    CosineScorer,
    PictureScorer,
    VectorScorer,
    check_scorer_names,
    load_scorer,
)
from declip_shards import DeclipError


def unit(rows: int, dim: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def test_clip_score_is_the_cosine():
    image, text = unit(50, 32, 0), unit(50, 32, 1)
    scores = CosineScorer().score_vectors({"img_emb": image, "text_emb": text})
    assert scores.shape == (50, 1)
    assert scores.dtype == np.float32
    assert scores[:, 0] == pytest.approx(np.diag(image @ text.T), abs=1e-6)
    same = CosineScorer().score_vectors({"img_emb": image, "text_emb": image})
    assert same[:, 0] == pytest.approx(np.ones(50), abs=1e-6)


def test_a_scorer_is_of_one_kind():
    cosine = load_scorer("clip:cosine")
    assert isinstance(cosine, VectorScorer)
    assert not isinstance(cosine, PictureScorer)
    assert cosine.name == "clip:cosine"


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["clip"], r"scorer is 'clip'; it must be KIND:MODEL"),
        ([":x"], r"must be KIND:MODEL"),
        (["aesthetic:x.pth"], r"unknown kind 'aesthetic'. Did you mean 'aesthetics'"),
        (["clip:ViT-B-32"], r"only one of its kind is 'clip:cosine'"),
        (["aesthetics:head.onnx"], r"names no file of weights; .*\.safetensors"),
        (["watermark:head.h5"], r"ends in .*\.onnx"),
        (["nsfw:yahoo", "nsfw:a.onnx"], r"'nsfw:yahoo' and 'nsfw:a.onnx' both write 'nsfw_score'"),
    ],
)
def test_names_that_nothing_serves_are_refused(names, sentence):
    with pytest.raises(DeclipError, match=sentence):
        check_scorer_names(names)


def test_other_kinds_need_a_factory_that_can_be_imported():
    check_scorer_names(["faces:x"], "package.module:make")
    with pytest.raises(DeclipError, match=r"scorer_factory is 'package.module'; it must be MODULE"):
        check_scorer_names(["faces:x"], "package.module")
    with pytest.raises(DeclipError, match=r"'no_such_module:make' cannot be imported"):
        load_scorer("faces:x", "no_such_module:make")
    with pytest.raises(DeclipError, match=r"made a str of 'faces:x', which has neither"):
        load_scorer("faces:x", "builtins:str")
