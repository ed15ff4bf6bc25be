"""One step's arithmetic: parts meet as a whole, and every option reaches the loss."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from declip_train.grad_cache import encode_parts
from declip_train.heads import TokenHeads
from declip_train.loader import Batch
from declip_train.methods import METHODS
from declip_train.module import TrainModule, finish_metrics, forward_text_by_length
from declip_train.settings import TrainSettings
from declip_train.tokenizer import CaptionTokenizer, mask_tokens

WORDS = ("a", "red", "apple", "on", "the", "old", "table", "near", "two", "small", "dogs", "tree")
ROWS = 8


def captions(seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(1, 12))) for _ in range(ROWS)]


def settings_of(method: str, **others: Any) -> TrainSettings:
    if others.get("neighbor_source") == "bank":
        others = {"bank_size": 64, **others}
    return TrainSettings(
        model="test",
        method=method,
        global_batch_size=ROWS,
        projector_dim=8,
        predictor_hidden_dim=4,
        simclr_hidden_dim=8,
        simclr_dim=4,
        token_dim=8,
        **others,
    )


def batch_of(settings: TrainSettings, seed: int = 0) -> Batch:
    """Random pixels and real captions, as the loader gives them."""
    method = settings.method_parts
    draw = torch.Generator().manual_seed(seed)
    tokenize = CaptionTokenizer(77)
    rows = torch.arange(ROWS)
    shared: dict[str, Any] = {
        "step": 0,
        "epoch": 0,
        "images": torch.randn(method.num_views, ROWS, 3, 16, 16, generator=draw).double(),
        "sample_ids": rows,
        "caption_ids": rows,
    }
    if not method.has("multi_view"):
        ids = tokenize(captions(seed), trim=True)
        return Batch(token_ids=torch.from_numpy(ids), **shared)
    masked = mask_tokens(tokenize(captions(seed), trim=True), 0.3, np.random.default_rng(seed))
    if settings.uses_index:
        shared |= {
            "neighbor_token_ids": torch.from_numpy(tokenize(captions(seed + 2), trim=True)),
            "has_neighbor": rows != 3,
            "neighbor_caption_ids": torch.where(rows == 1, rows, rows + 100),
        }
    shared |= {name: torch.from_numpy(array) for name, array in masked._asdict().items()}
    second = torch.from_numpy(tokenize(captions(seed + 1), trim=True))
    return Batch(second_token_ids=second, **shared)


def module_of(settings: TrainSettings) -> TrainModule:
    """In float64, away from its initial weights."""
    module = TrainModule(settings).double()
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.add_(0.1 * noise)
    return module


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_computes_its_terms_and_no_others(name):
    settings = settings_of(name)
    terms, _ = module_of(settings)(batch_of(settings))
    assert set(terms) == METHODS[name].term_names
    for value in terms.values():
        assert value.shape == ()
        assert torch.isfinite(value)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_trained_parameter_has_a_gradient(name):
    settings = settings_of(name)
    module = module_of(settings)
    terms, _ = module(batch_of(settings))
    sum(terms.values()).backward()
    for key, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key


def test_filip_trains_nothing_of_the_global_pair():
    module = TrainModule(settings_of("filip"))
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert frozen == {
        *("clip.logit_scale", "clip.text_projection", "clip.visual.proj"),
        *("clip.visual.ln_post.weight", "clip.visual.ln_post.bias"),
    }
    assert all(p.requires_grad for p in TrainModule(settings_of("defilip")).parameters())


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("source", ["index", "bank"])
def test_parts_meet_as_the_whole(name, source):
    settings = settings_of(name, neighbor_source=source)
    module, batch = module_of(settings), batch_of(settings)
    whole, joined = module.encode(batch), encode_parts(module, batch, 4).features
    assert whole.keys() == joined.keys()
    for key, value in whole.items():
        if key == "text_tokens":  # what stands behind a caption is anything
            mask = module.clip.caption_mask(batch.token_ids)
            value, other = value[mask], joined[key][mask]
        else:
            other = joined[key]
        torch.testing.assert_close(other, value, rtol=1e-12, atol=1e-12)


def test_the_bank_answers_with_what_was_stored_and_never_with_the_sample_itself():
    settings = settings_of("declip", neighbor_source="bank")
    module, batch = module_of(settings), batch_of(settings)
    assert module.bank is not None
    terms, metrics = module(batch)
    assert float(terms["neighbor"].detach()) == 0
    assert finish_metrics({n: float(v) for n, v in metrics.items()}) == {"neighbor_found": 0.0}
    module.after_step()
    assert int(module.bank.num_entries()) == 2 * ROWS
    _, metrics = module(batch)
    said = finish_metrics({name: float(value) for name, value in metrics.items()})
    # The same batch again: each row's own features lie in the bank and must not be its neighbor.
    assert said["neighbor_found"] == 1
    assert said["neighbor_differs"] == 1
    assert -1 <= said["neighbor_similarity"] < 1 - 1e-6


def test_nothing_is_stored_before_the_step_is_over():
    settings = settings_of("declip", neighbor_source="bank")
    module, batch = module_of(settings), batch_of(settings)
    assert module.bank is not None
    module(batch)
    module(batch)
    assert int(module.bank.num_entries()) == 0
    module.after_step()
    module.after_step()
    assert int(module.bank.num_entries()) == 2 * ROWS


def test_what_the_log_says_of_the_table():
    settings = settings_of("declip")
    _, metrics = module_of(settings)(batch_of(settings))
    said = finish_metrics({name: float(value) for name, value in metrics.items()})
    assert said["neighbor_found"] == pytest.approx(7 / 8)
    # Row 1's neighbor has its own caption, row 3 has none.
    assert said["neighbor_differs"] == pytest.approx(6 / 7)


@pytest.mark.parametrize(
    ("name", "term", "change"),
    [
        ("clip", "contrastive", {"label_smoothing": 0.2}),
        ("clip", "contrastive", {"hard_negative_beta": 0.5}),
        ("clip", "contrastive", {"contrastive_loss": "sigmoid"}),
        ("declip", "multi_view", {"label_smoothing": 0.2}),
        ("declip", "contrastive", {"hard_negative_beta": 0.5}),
        ("slip", "simclr", {"simclr_temperature": 0.5}),
        ("filip", "tokenwise", {"image_token_fraction": 0.3}),
        ("filip", "tokenwise", {"text_token_fraction": 0.3}),
        ("defilip", "tokenwise", {"text_token_fraction": 0.3}),
        ("clip", "contrastive", {"text_layers": 1}),
    ],
)
def test_every_option_reaches_the_loss(name, term, change):
    settings = settings_of(name)
    changed = dataclasses.replace(settings, **change)
    batch = batch_of(settings)
    plain, _ = TrainModule(settings).double()(batch)
    other, _ = TrainModule(changed).double()(batch)
    assert abs(float((plain[term] - other[term]).detach())) > 1e-4


def test_neighbors_teach_images_alone():
    settings = settings_of("declip")
    module, batch = module_of(settings), batch_of(settings)
    terms, _ = module(batch)
    terms["neighbor"].backward()
    touched = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched
    assert {n for n in touched if not n.startswith("clip.visual.")} == {"clip.logit_scale"}


def test_groups_of_like_length_change_nothing():
    settings = settings_of("declip")
    module, batch = module_of(settings), batch_of(settings)
    assert batch.targets is not None
    mask = module.heads["declip"].mask_embedding
    options: dict[str, Any] = {"replaced": batch.replaced, "mask_embedding": mask}
    results = [
        forward_text_by_length(
            module.clip,
            batch.token_ids,
            rows_per_group=rows,
            state_positions=batch.mask_positions,
            lengths=lengths,
            **options,
        )
        for rows in (1, 3, ROWS)
        for lengths in (None, batch.targets.argmax(dim=1) + 1)
    ]
    hidden = forward_text_by_length(
        module.clip, batch.token_ids, rows_per_group=3, need_hidden=True, **options
    )
    assert hidden.hidden is not None
    for result in results:
        torch.testing.assert_close(result.features, hidden.features)
        torch.testing.assert_close(result.states, hidden.hidden[batch.mask_positions])


def test_caption_mask_ends_with_the_end_token():
    ids = torch.from_numpy(CaptionTokenizer(77)(["a", "two small dogs"]))
    clip = TrainModule(settings_of("clip")).clip
    assert clip.caption_mask(ids).sum(dim=1).tolist() == [3, 5]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_autocast_stays_near_float32(name):
    settings = settings_of(name)
    half = dataclasses.replace(settings, precision="amp_bf16")
    batch = batch_of(settings).with_tensors(
        lambda _, value: value.float() if value.is_floating_point() else value
    )
    exact, _ = TrainModule(settings)(batch)
    coarse, _ = TrainModule(half)(batch)
    for term, value in exact.items():
        assert coarse[term].dtype == torch.float32
        assert float(coarse[term].detach()) == pytest.approx(float(value.detach()), abs=0.15)


def test_token_features_have_unit_length():
    settings = settings_of("filip")
    encoded = module_of(settings).encode(batch_of(settings))
    lengths = encoded["image_tokens"].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    first, second = encoded["text_tokens"][0, :2]
    assert F.cosine_similarity(first, second, dim=0) < 1


def test_defilip_reads_patch_tokens_of_the_first_view_alone():
    settings = settings_of("defilip")
    module, batch = module_of(settings), batch_of(settings)
    encoded = module.encode(batch)
    output = module.clip.forward_image(batch.images.flatten(0, 1), need_tokens=True)
    assert output.tokens is not None
    head = module.heads["tokens"]
    assert isinstance(head, TokenHeads)
    expected = head.project_image(output.tokens[:ROWS])
    torch.testing.assert_close(encoded["image_tokens"], expected)
    features = output.features.view(2, ROWS, -1).transpose(0, 1)
    torch.testing.assert_close(encoded["image_features"], features)
