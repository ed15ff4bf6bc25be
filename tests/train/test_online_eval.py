"""Zero-shot evaluation during training: the evaluator's numbers, and no trace in the training."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from declip_eval.zeroshot import (
    build_classifier,
    prompt_ensemble_scores,
    zeroshot_classification,
    zeroshot_from_scores,
)
from declip_shards import DeclipError
from declip_train.augment import eval_images
from declip_train.loop import EXPORT, train
from declip_train.module import TrainModule
from declip_train.monitor import VOLATILE, read_log
from declip_train.online_eval import OnlineEvaluation
from declip_train.settings import TrainSettings
from declip_train.supervision import StopSwitch
from declip_train.tokenwise import tokenwise_similarity

if TYPE_CHECKING:
    from tests.train import watching_workers
    from tests.train.several_processes import run_processes
    from tests.train.single_process import one_process
    from tests.train.training_data import write_training_data
else:
    import watching_workers
    from several_processes import run_processes
    from single_process import one_process
    from training_data import write_training_data

CPU = torch.device("cpu")
TEMPLATES = ["a photo of a {}.", "many {}s"]


def write_pictures(root, *, classes=6, per_class=5):
    rng = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"thing_{label}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            pixels[..., label % 3] //= 4
            Image.fromarray(pixels).save(folder / f"{number}.png")
    text = "\n".join(TEMPLATES).replace("{}", "{c}")
    (root / "zeroshot_classification_templates.txt").write_text(text)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root)
    return root


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    with one_process(tmp_path_factory.mktemp("group")):
        yield


def settings_for(pictures, **changed):
    base = TrainSettings(
        model="test", method="clip", global_batch_size=24, warmup_steps=2, token_dim=16,
        projector_dim=32, predictor_hidden_dim=16, max_steps=6, augmentation="light",
        evaluate_every_steps=4, evaluate_data=str(pictures),
    )  # fmt: skip
    return dataclasses.replace(base, **changed)


def evaluation(settings, said=None):
    say = [].append if said is None else said.append
    return OnlineEvaluation.of_run(settings, num_steps=10, device=CPU, num_threads=2, say=say)


def reference(evaluator, module):
    """declip_eval's metrics of the same pictures."""
    data, clip = evaluator.data, module.clip.eval()
    tokenizer = clip.make_tokenizer()
    images = eval_images([p.read() for p in data.pictures], clip.config.vision.image_size)
    labels = np.array([p.label for p in data.pictures])

    def encode(texts):
        return clip.encode_text(torch.from_numpy(tokenizer(texts))).numpy()

    def score(texts):
        ids = torch.from_numpy(tokenizer(texts, trim=True))
        heads = module.heads["tokens"]
        hidden = clip.forward_text(ids, need_hidden=True).hidden
        patches = heads.project_image(clip.forward_image(images, need_tokens=True).tokens)
        mask = clip.caption_mask(ids)[:, : hidden.shape[1]]
        return tokenwise_similarity(patches, heads.project_text(hidden), mask)[0].numpy()

    with torch.no_grad():
        if module.method.has("contrastive"):
            classifier = build_classifier(encode, data.class_names, data.templates)
            features = clip.encode_image(images).numpy()
            return zeroshot_classification(features, classifier, labels).metrics
        scores = prompt_ensemble_scores(score, data.class_names, data.templates)
        return zeroshot_from_scores(scores, labels).metrics


@pytest.mark.parametrize("method", ["clip", "filip", "declip"])
@pytest.mark.usefixtures("group")
def test_accuracies_are_the_evaluators(pictures, method):
    settings = settings_for(pictures, method=method)
    evaluator, module = evaluation(settings), TrainModule(settings)
    found = evaluator.run(module)
    expected = reference(evaluator, module)
    assert found["zeroshot_top1"] == pytest.approx(expected["acc1"])
    assert found["zeroshot_top5"] == pytest.approx(expected["acc5"])
    assert 0 < found["zeroshot_top5"] < 1, "of a model that knows nothing"


@pytest.mark.usefixtures("group")
def test_nothing_of_training_is_touched(pictures):
    settings = settings_for(pictures, method="declip")
    evaluator, module = evaluation(settings), TrainModule(settings).train()
    layer = module.clip.visual.conv1
    layer.eval()

    def draw(*_):
        torch.rand(3)

    module.clip.visual.register_forward_hook(draw)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    torch.manual_seed(11)
    before = torch.get_rng_state()
    evaluator.run(module)
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.usefixtures("group")
def test_pictures_that_cannot_be_decoded_count_as_wrong(tmp_path):
    write_pictures(tmp_path, classes=3)
    settings = settings_for(tmp_path)
    module = TrainModule(settings)
    whole = evaluation(settings).run(module)["zeroshot_top1"]
    assert "zeroshot_top5" not in evaluation(settings).run(module), "of 3 classes all are within"
    for folder in tmp_path.glob("thing_*"):
        (folder / "bad.jpg").write_bytes(b"no picture")
    said: list[str] = []
    evaluator = evaluation(settings, said)
    assert evaluator.run(module)["zeroshot_top1"] == pytest.approx(whole * 15 / 18)
    evaluator.run(module)
    assert said == ["3 of 18 pictures of evaluate_data cannot be decoded and count as wrong"]


@pytest.mark.usefixtures("group")
def test_when_it_is_due(pictures):
    evaluator = evaluation(settings_for(pictures))
    assert [step for step in range(1, 11) if evaluator.is_due(step)] == [4, 8, 10]
    assert evaluation(settings_for(None, evaluate_every_steps=None, evaluate_data=None)) is None
    for name in ("evaluate_every_steps", "evaluate_data"):
        with pytest.raises(DeclipError, match=rf"but {name} is not set; give both, or neither"):
            evaluation(dataclasses.replace(settings_for(pictures), **{name: None}))


@pytest.mark.usefixtures("group")
def test_training_is_the_same_bits_with_and_without_the_watching(pictures, tmp_path):
    exports, logs = [], []
    for name, changed in (
        ("watched", {"log_every_steps": 1}),
        ("not", {"log_every_steps": 1000, "evaluate_every_steps": None, "evaluate_data": None}),
    ):
        write_training_data(tmp_path / name)
        settings = settings_for(
            pictures, method="declip", root=str(tmp_path / name), cache=str(tmp_path / "cache"),
            zero_stage=2, **changed,
        )  # fmt: skip
        assert train(settings, StopSwitch(), show_progress=False)
        exports.append((tmp_path / name / EXPORT / "open_clip_pytorch_model.bin").read_bytes())
        logs.append(read_log(tmp_path / name / "train"))
    assert exports[0] == exports[1]
    watched, plain = logs
    assert [r["step"] for r in watched] == list(range(1, 7))
    assert [r["step"] for r in plain] == [6]
    of_evaluation = {"zeroshot_top1", "zeroshot_top5"}
    kept = [
        {n: v for n, v in r.items() if n not in VOLATILE and n not in of_evaluation}
        for r in (watched[-1], plain[-1])
    ]
    assert kept[0] == kept[1]
    assert [r["step"] for r in watched if "zeroshot_top1" in r] == [4, 6]
    assert {"gradient_norm", "image_feature_spread", "time_shares"} <= set(watched[0])


@pytest.mark.distributed
def test_processes_share_the_work_and_a_bad_batch_is_kept_by_all(pictures, tmp_path):
    """Two processes: the accuracy of one; and the process whose sample was bad is named by both."""
    write_training_data(tmp_path / "data")
    run_processes(watching_workers.check, 2, str(tmp_path), str(tmp_path / "data"), str(pictures))
    assert sorted(p.name for p in (tmp_path / "bad_batches").iterdir()) == [
        "step_00000001_rank_00000.json",
        "step_00000001_rank_00000.safetensors",
        "step_00000001_rank_00001.json",
        "step_00000001_rank_00001.safetensors",
        "step_00000001_weights.safetensors",
    ]
