"""A batch in parts: the features, the gradients and the random numbers of the whole."""

import dataclasses

import pytest
import torch
from training_data import write_training_data

from declip_train.grad_cache import CONSTANT, encode_parts, term_gradients
from declip_train.loader import BatchLoader
from declip_train.methods import METHODS, method_terms
from declip_train.module import TrainModule
from declip_train.samples import load_samples
from declip_train.settings import TrainSettings

SETTINGS = TrainSettings(
    model="test",
    global_batch_size=12,
    max_steps=4,
    warmup_steps=2,
    projector_dim=32,
    predictor_hidden_dim=16,
    simclr_hidden_dim=32,
    simclr_dim=16,
    token_dim=16,
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_training_data(root)
    return load_samples(str(root), selection="default", neighbors="captions")


def make(samples, method, **changed):
    settings = dataclasses.replace(SETTINGS, method=method, **changed)
    torch.manual_seed(0)
    module = TrainModule(settings).double()
    return module.train(), BatchLoader(samples, settings, 0, 1).make_batch(0)


def total_of(method, terms):
    weights = dict(method_terms(method))
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_parts", [2, 3, 12])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_whole(samples, method, num_parts):
    module, batch = make(samples, method)
    terms, metrics = module(batch)
    total_of(method, terms).backward()
    expected = gradients(module)
    whole = module.encode(batch)
    module, batch = make(samples, method)
    encoded = encode_parts(module, batch, num_parts)
    assert encoded.features.keys() == whole.keys()
    for name, feature in encoded.features.items():
        torch.testing.assert_close(feature.detach(), whole[name].detach())
        assert feature.requires_grad == (name != CONSTANT)
    in_parts, its_metrics = module.terms(encoded.features, batch)
    torch.testing.assert_close(in_parts, terms)
    torch.testing.assert_close(its_metrics, metrics)
    cached = term_gradients(total_of(method, in_parts), encoded, module, loss_scale=1024.0)
    assert not gradients(module), "nothing has been backpropagated yet"
    for surrogate in cached.surrogates(module):
        surrogate.backward()
    found = gradients(module)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-9, msg=name)


def test_no_activation_is_kept(samples):
    """Features alone stand between the two passes: nothing has a graph behind it."""
    module, batch = make(samples, "defilip")
    encoded = encode_parts(module, batch, 3)
    assert all(feature.grad_fn is None for feature in encoded.features.values())
    assert all(feature.is_leaf for feature in encoded.features.values())


def test_both_passes_draw_the_same_random_numbers(samples):
    """With dropout in the towers, the second pass must drop what the first has dropped; what is
    drawn afterwards is what would be drawn without a second pass."""
    module, batch = make(samples, "clip")
    module.clip.visual.ln_pre.register_forward_hook(
        lambda layer, inputs, output: torch.nn.functional.dropout(output, 0.5)
    )
    torch.manual_seed(5)
    encoded = encode_parts(module, batch, 3)
    terms, _ = module.terms(encoded.features, batch)
    after = torch.get_rng_state()
    cached = term_gradients(total_of("clip", terms), encoded, module)
    again = []
    module.clip.visual.register_forward_hook(
        lambda tower, inputs, output: again.append(output.features.detach())
    )
    for surrogate in cached.surrogates(module):
        surrogate.backward()
    assert torch.equal(torch.cat(again), encoded.features["image_features"][:, 0])
    assert torch.equal(torch.get_rng_state(), after)


def test_running_statistics_move_once_a_batch(samples):
    """A ResNet's batch norm counts each part once, though each is encoded twice."""
    module, batch = make(samples, "clip", model="test-rn")
    before = module.clip.visual.bn1.running_mean.clone()
    encoded = encode_parts(module, batch, 3)
    assert int(module.clip.visual.bn1.num_batches_tracked) == 0
    assert torch.equal(module.clip.visual.bn1.running_mean, before)
    terms, _ = module.terms(encoded.features, batch)
    for surrogate in term_gradients(total_of("clip", terms), encoded, module).surrogates(module):
        surrogate.backward()
    assert int(module.clip.visual.bn1.num_batches_tracked) == 3
    assert not torch.equal(module.clip.visual.bn1.running_mean, before)


def test_a_neighbors_caption_is_read_once(samples):
    """It has no gradient, so the second pass leaves it out."""
    module, batch = make(samples, "declip")
    calls = []
    encode = module.encode

    def watched(part):
        calls.append(part.neighbor_token_ids is not None)
        return encode(part)

    module.encode = watched
    encoded = encode_parts(module, batch, 2)
    terms, _ = module.terms(encoded.features, batch)
    list(term_gradients(total_of("declip", terms), encoded, module).surrogates(module))
    assert calls == [True, True, False, False]


def test_gradients_that_overflow_are_not_hidden(samples):
    """An infinite gradient must reach DeepSpeed's check, not become a finite one."""
    module, batch = make(samples, "clip")
    encoded = encode_parts(module, batch, 2)
    terms, _ = module.terms(encoded.features, batch)
    cached = term_gradients(total_of("clip", terms) * float("inf"), encoded, module)
    for surrogate in cached.surrogates(module):
        surrogate.backward()
    assert not all(torch.isfinite(g).all() for g in gradients(module).values())
