import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from declip_filter.score_heads import HeadScorer
from declip_shards import DeclipError


class ImprovedPredictor(torch.nn.Module):
    """The shape of LAION's improved aesthetics predictor, for vectors of length 16."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(16, 12), torch.nn.Dropout(0.2), torch.nn.Linear(12, 8),
            torch.nn.Dropout(0.2), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1),
        )  # fmt: skip


def vectors(rows: int = 20, dim: int = 16) -> np.ndarray:
    found = np.random.default_rng(0).normal(size=(rows, dim)).astype(np.float32)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def scores(path, rows=None):
    scorer = HeadScorer(f"aesthetics:{path}", str(path), "aesthetics_score")
    return scorer.score_vectors({"img_emb": vectors() if rows is None else rows})


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_laion_s_shapes_give_what_torch_gives(tmp_path, suffix, is_wrapped):
    torch.manual_seed(0)
    model = ImprovedPredictor().eval()
    path = tmp_path / f"head.{suffix}"
    if suffix == "safetensors":
        save_file(model.state_dict(), path)
    else:
        state = model.state_dict()
        torch.save({"state_dict": state} if is_wrapped else state, path)
    expected = model.layers(torch.from_numpy(vectors())).detach().numpy()
    assert scores(path) == pytest.approx(expected, abs=1e-5)
    linear = torch.nn.Linear(16, 1)
    torch.save(linear.state_dict(), tmp_path / "linear.pth")
    expected = linear(torch.from_numpy(vectors())).detach().numpy()
    assert scores(tmp_path / "linear.pth") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize("output", ["none", "sigmoid", "softmax"])
def test_metadata_name_activation_and_output(tmp_path, activation, output):
    torch.manual_seed(1)
    first = torch.nn.Linear(16, 6)
    last = torch.nn.Linear(6, 3 if output == "softmax" else 1)
    save_file(
        {"net.2.weight": last.weight, "net.2.bias": last.bias, "net.10.weight": torch.eye(
            last.out_features), "net.0.weight": first.weight, "net.0.bias": first.bias},
        tmp_path / "h.safetensors", {"activation": activation, "output": output},
    )  # fmt: skip
    act = getattr(torch.nn.functional, activation, None) or (lambda x: x)
    logits = act(last(act(first(torch.from_numpy(vectors())))))
    expected = {"none": logits, "sigmoid": logits.sigmoid(), "softmax": logits.softmax(1)}[output]
    found = scores(tmp_path / "h.safetensors")
    assert found == pytest.approx(expected[:, -1:].detach().numpy(), abs=1e-5)


def test_the_digest_is_of_weights_and_use(tmp_path):
    weight = {"weight": torch.ones(1, 16)}
    digests = set()
    for number, (state, metadata) in enumerate(
        [(weight, {}), (weight, {"output": "sigmoid"}), ({"weight": torch.zeros(1, 16)}, {})]
    ):
        path = tmp_path / f"{number}.safetensors"
        save_file(state, path, metadata)
        digests.add(HeadScorer("a:b", str(path), "c").digest)
        assert HeadScorer("a:b", str(path), "c").digest in digests
    assert len(digests) == 3


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    torch.save({"weight": Harmful()}, tmp_path / "h.pth")
    with pytest.raises(DeclipError, match=r"cannot be read without executing it .*state_dict"):
        scores(tmp_path / "h.pth")


@pytest.mark.parametrize(
    ("state", "metadata", "sentence"),
    [
        ({"weight": torch.ones(2, 16)}, {}, "gives 2 numbers a picture where one is due"),
        ({"weight": torch.ones(1, 8)}, {}, "reads vectors of length 8, these are of length 16"),
        ({"weight": torch.ones(1, 16), "bias": torch.ones(2)}, {}, r"'bias' is of shape \(2,\)"),
        ({"0.weight": torch.ones(4, 16), "1.weight": torch.ones(1, 5)}, {}, "layers are no chain"),
        ({"weight": torch.ones(1, 16), "norm.mean": torch.ones(16)}, {}, "holds also 'norm.mean'"),
        ({"conv.weight": torch.ones(1, 3, 3, 3)}, {}, "holds also 'conv.weight'"),
        ({"weight": torch.ones(1, 16)}, {"activation": "rely"}, "Did you mean 'relu'"),
    ],
)
def test_files_that_are_no_head_are_refused(tmp_path, state, metadata, sentence):
    save_file(state, tmp_path / "h.safetensors", metadata)
    with pytest.raises(DeclipError, match=sentence):
        scores(tmp_path / "h.safetensors")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DeclipError, match=r"there is no file .*none.pth'; correct the path"):
        scores(tmp_path / "none.pth")
    for name in ("h.pth", "h.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(DeclipError, match=rf"{name}' cannot be read"):
            scores(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DeclipError, match="holds a list, not a state_dict"):
        scores(tmp_path / "list.pth")
