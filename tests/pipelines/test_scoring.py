"""Token-wise scoring against plain loops in float64, whatever the groups it is computed in."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from declip_eval.templates import get_templates
from declip_shards import DeclipError, Store, layout, read_samples
from declip_shards.fakes import write_fake_dataset
from declip_train.augment import eval_images
from declip_train.export import PreprocessSettings, export_open_clip
from declip_train.heads import TokenHeads
from declip_train.model_config import get_model_config
from declip_train.tokenizer import CaptionTokenizer
from declip_train.towers import CLIP
from pipelines import scoring
from pipelines.encoders import checkpoint_encoder
from pipelines.scoring import GlobalScoring, TokenwiseScoring, choose_scoring

CLASSES = ["red circle", "a blue square seen in the very distance", "x"]
TEXTS = ["a red circle", "green", "a much longer caption of a blue square, seen at night"]


def export(folder, method, *, model="test", tokens=True, seed=0):
    """Towers, and token projections where asked for, as training exports them."""
    generator = torch.Generator().manual_seed(seed)
    config = get_model_config(model)
    clip = CLIP(config, generator=generator)
    heads = nn.ModuleDict({"tokens": TokenHeads(config, 8, generator)}) if tokens else None
    export_open_clip(clip, heads, folder, PreprocessSettings(), {"method": method})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_fake_dataset(str(root), num_shards=3, samples_per_shard=8)
    export(root / "filip", "filip")
    export(root / "defilip", "defilip")
    export(root / "rn", "filip", model="test-rn")
    export(root / "declip", "declip", tokens=False)
    return root


def samples(root):
    store = Store(str(root))
    return [
        (shard, sample)
        for shard in layout.list_shards(store)
        for sample in read_samples(store, shard)
    ]


def make(root, name, batch_size=7):
    found = samples(root)
    keys, shards = [s.key for _, s in found], [shard for shard, _ in found]
    encoder = checkpoint_encoder(name, root=str(root), device="cpu")
    return TokenwiseScoring(encoder, Store(str(root)), keys, shards, batch_size), encoder


def plain_similarities(encoder, images, texts):
    """s_I and s_T of every pair, by loops over pairs in float64, from the towers' own outputs."""
    tokenizer = CaptionTokenizer()
    state = {n: v.double().numpy() for n, v in encoder.token_heads.state_dict().items()}

    def project(rows, name):
        rows = rows @ state[f"{name}.weight"].T + state[f"{name}.bias"]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    with torch.inference_mode():
        pixels = eval_images(images, encoder.image_size)
        patches = encoder.model.forward_image(pixels, need_tokens=True).tokens.double().numpy()
    image_tokens = [project(rows, "image_projection") for rows in patches]
    text_tokens = []
    for text in texts:  # One at a time: no padding that could leak.
        ids = tokenizer([text])
        real = ids[:, : int(ids.argmax()) + 1]
        with torch.inference_mode():
            output = encoder.model.forward_text(torch.from_numpy(real), need_hidden=True)
        text_tokens.append(project(output.hidden[0].double().numpy(), "text_projection"))
    s_i, s_t = np.empty((2, len(images), len(texts)))
    for i, j in itertools.product(range(len(images)), range(len(texts))):
        cosines = image_tokens[i] @ text_tokens[j].T
        s_i[i, j] = cosines.max(axis=1).mean()
        s_t[i, j] = cosines.max(axis=0).mean()
    return s_i, s_t.T


@pytest.mark.parametrize("name", ["filip", "defilip", "rn"])
def test_similarities_equal_a_plain_loop(dataset, name):
    _, encoder = make(dataset, name)
    images = [sample.image for _, sample in samples(dataset)][:5]
    tokens = encoder.encode_image_tokens(images)
    to_text, to_image = encoder.token_similarity(tokens, TEXTS)
    expected = plain_similarities(encoder, images, TEXTS)
    np.testing.assert_allclose(to_text, expected[0], atol=1e-5)
    np.testing.assert_allclose(to_image, expected[1], atol=1e-5)
    assert (to_text.shape, to_image.shape) == ((5, 3), (3, 5))
    assert np.abs(to_text - to_image.T).max() > 1e-3  # Two different matrices.


def test_classification_averages_the_similarities_of_prompts(dataset):
    found, encoder = make(dataset, "filip")
    rows = [1, 3, 4, 20, 23]
    images = [samples(dataset)[row][1].image for row in rows]
    templates = get_templates("openai_7")
    labels = np.array([0, 1, 2, 0, 1])
    answers = found.classify(rows, labels, CLASSES, templates, top_k=3)
    expected = np.zeros((len(rows), len(CLASSES)))
    prompts = [template.replace("{}", name) for name in CLASSES for template in templates]
    each = plain_similarities(encoder, images, prompts)[0]
    for column in range(len(CLASSES)):
        own = slice(column * len(templates), (column + 1) * len(templates))
        expected[:, column] = each[:, own].mean(axis=1)
    assert answers.metrics["acc1"] == (expected.argmax(axis=1) == labels).mean()
    np.testing.assert_allclose(answers.scores, -np.sort(-expected, axis=1), atol=1e-5)
    assert np.array_equal(answers.best, np.argsort(-expected, axis=1))


def test_retrieval_ranks_each_direction_by_its_own_similarity(dataset):
    found, encoder = make(dataset, "filip")
    rows = list(range(12))
    images = [samples(dataset)[row][1].image for row in rows]
    positives = [[row % 3] for row in rows]
    answers = found.retrieve(rows, TEXTS, positives, recall_k=(1, 3), top_k=2)
    s_i, s_t = plain_similarities(encoder, images, TEXTS)
    of_images = [int(s_i[row].argmax()) == row % 3 for row in rows]
    of_texts = [int(s_t[text].argmax()) % 3 == text for text in range(3)]
    assert answers.metrics["text_retrieval_recall@1"] == pytest.approx(np.mean(of_images))
    assert answers.metrics["image_retrieval_recall@1"] == pytest.approx(np.mean(of_texts))
    assert answers.best[:, 0].tolist() == s_t.argmax(axis=1).tolist()


@pytest.mark.parametrize(("token_bytes", "texts_at_once", "batch_size"), [(1, 1, 1), (3000, 2, 4)])
def test_groups_of_images_and_texts_change_nothing(
    dataset, monkeypatch, token_bytes, texts_at_once, batch_size
):
    rows = [0, 2, 5, 9, 10, 11, 19, 23]
    labels, positives = np.arange(8) % 3, [[row % 3] for row in range(8)]

    def answers(found):
        templates = get_templates("simple")
        return (
            found.classify(rows, labels, CLASSES, templates, 3),
            found.retrieve(rows, TEXTS, positives, (1, 3), 3),
        )

    expected = answers(make(dataset, "filip")[0])
    found, encoder = make(dataset, "filip", batch_size)
    monkeypatch.setattr(scoring, "TOKEN_BYTES", token_bytes)
    monkeypatch.setattr(scoring, "TEXTS_AT_ONCE", texts_at_once)
    held = []
    similarity = encoder.token_similarity

    def watched(tokens, texts):
        held.append((tokens.numel() * tokens.element_size(), len(texts)))
        return similarity(tokens, texts)

    monkeypatch.setattr(encoder, "token_similarity", watched)
    for got, whole in zip(answers(found), expected, strict=True):
        assert got.metrics == whole.metrics
        np.testing.assert_array_equal(got.best, whole.best)
        np.testing.assert_allclose(got.scores, whole.scores, atol=1e-6)
    one_image = 4 * 4 * 8  # patches, bytes, token_dim
    assert max(size for size, _ in held) <= token_bytes + batch_size * one_image
    assert max(num for _, num in held) <= max(texts_at_once, len(get_templates("simple")))


def test_rows_may_come_in_any_order(dataset):
    found, _ = make(dataset, "filip")
    rows = [17, 3, 9, 22]
    labels = np.array([0, 1, 2, 0])
    straight = found.classify(sorted(rows), labels[np.argsort(rows)], CLASSES, ["{}"], 3)
    mixed = found.classify(rows, labels, CLASSES, ["{}"], 3)
    assert mixed.metrics == straight.metrics
    np.testing.assert_array_equal(mixed.best[np.argsort(rows)], straight.best)


def test_which_scoring_a_method_gets(dataset):
    def choose(asked, name):
        return choose_scoring(asked, checkpoint_encoder(name, root=str(dataset), device="cpu"))

    assert choose("auto", "filip") == choose("token-wise", "filip") == TokenwiseScoring.name
    assert choose("auto", "defilip") == choose("auto", "declip") == GlobalScoring.name
    assert choose("token-wise", "defilip") == TokenwiseScoring.name
    with pytest.raises(DeclipError, match=r"'global', but method 'filip' trains no global embedd"):
        choose("global", "filip")
    with pytest.raises(DeclipError, match=r"'token-wise', but method 'declip' has no token proj"):
        choose("token-wise", "declip")
