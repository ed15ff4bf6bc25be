"""A sentence for every wrong value."""

import pytest

from declip_shards import DeclipError
from declip_train.settings import TrainSettings
from declip_train.settings_checks import unread_settings


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"method": "delcip"}, "Did you mean 'declip'"),
        ({"neighbor_source": "banc"}, "Did you mean 'bank'"),
        ({"model": "ViT-B-31"}, "Did you mean 'ViT-B-32'"),
        ({"model": "test", "image_size": 48}, "is not the 16 pixels of model 'test'"),
        ({"augmentation": "moco"}, "Did you mean 'moco_v2'"),
        ({"precision": "fp8"}, "Known: amp_bf16, bf16, fp16, fp32"),
        ({"zero_stage": 3}, "must be 0, 1 or 2"),
        ({"warmup_steps": 10, "max_steps": 10}, "takes the whole run of max_steps 10"),
        ({"global_batch_size": 9, "num_ranks": 2}, "choose a multiple"),
        ({"global_batch_size": 2, "num_ranks": 2}, "method declip.s heads, which needs 2"),
        ({"mask_probability": 1.5}, "must be from 0 to 1"),
        ({"peak_lr": 0.0}, "must be above 0"),
        ({"peak_lr": float("nan")}, "must be of type float"),
        ({"start_lr": 1.0}, "is above peak_lr"),
        ({"logit_scale_min": 5.0}, "is above logit_scale_max"),
        ({"seed": True}, "must be of type int"),
        ({"splits": "train"}, "must be of type tuple"),
        ({"checkpoint_every_seconds": 0}, "set one of them"),
        ({"neighbors": ""}, "name one, set neighbor_source to bank"),
        ({"optimizer": "lamb", "zero_stage": 1}, "set zero_stage to 0"),
        ({"optimizer": "adam"}, "Did you mean 'adamw'"),
        ({"global_batch_size": 24, "accumulation_steps": 5}, "24 samples of a process"),
        ({"bank_size": 8191, "neighbor_source": "bank"}, "cannot hold the 8192 features"),
        ({"label_smoothing": 0.1, "method": "filip"}, "no contrastive term"),
        ({"hard_negative_beta": 0.5, "method": "filip"}, "no contrastive term"),
        ({"contrastive_loss": "sigmoid"}, "is for methods clip and slip, not declip"),
        (
            {"contrastive_loss": "sigmoid", "method": "clip", "label_smoothing": 0.1},
            "has neither label_smoothing nor",
        ),
        ({"model": "RN50", "freeze_patch_embedding": True}, "has no patches"),
        ({"logit_scale_max": 800.0}, "must be from -10 to 10"),
        ({"loader_threads": 0}, "must be from 1"),
        ({"image_token_fraction": 0.0}, "must be from"),
        ({"text_layers": 0}, "must be from 1"),
        ({"text_layers": 3, "text_model": "bert-base-uncased"}, "has a depth of its own"),
        ({"text_model": ""}, "must be the folder or name"),
        ({"text_model": 3}, "must be of type str"),
        ({"neighbor_rank": 0}, "must be at least 1"),
        ({"ssl_augmentation": "slip"}, "Did you mean 'slip_ssl'"),
    ],
)
def test_wrong_values_are_refused(wrong, sentence):
    with pytest.raises(DeclipError, match=sentence.replace("(", r"\(")) as caught:
        TrainSettings(**wrong)
    assert str(next(iter(wrong.values()))) in str(caught.value) or wrong.get("seed")


@pytest.mark.parametrize("method", ["slip", "declip", "defilip"])
def test_synchronized_batch_norm_needs_two_samples_in_all(method):
    with pytest.raises(DeclipError, match="batch norm"):
        TrainSettings(method=method, global_batch_size=2, num_ranks=2)
    TrainSettings(method=method, global_batch_size=2, num_ranks=2, batch_norm="synchronized")


@pytest.mark.parametrize("method", ["clip", "filip"])
def test_methods_without_batch_norm_take_one_sample_a_process(method):
    TrainSettings(method=method, global_batch_size=2, num_ranks=2)


@pytest.mark.parametrize(
    ("given", "unread", "read"),
    [
        ({"method": "clip"}, {"weighting", "bank_size", "token_dim", "hue", "batch_norm"}, {"eps"}),
        ({"method": "clip", "model": "RN50"}, {"simclr_dim"}, {"batch_norm"}),
        ({"method": "slip"}, {"projector_dim", "eda"}, {"simclr_dim", "batch_norm"}),
        ({"method": "filip"}, {"label_smoothing", "neighbors"}, {"token_dim", "hue"}),
        ({}, {"bank_size", "neighbor_top_k", "simclr_dim"}, {"neighbor_rank", "weighting"}),
        ({"neighbor_source": "bank"}, {"neighbors", "neighbor_rank"}, {"bank_size"}),
        ({"optimizer": "sgd"}, {"beta2", "eps"}, {"beta1"}),
        ({"eda": False}, {"wordnet"}, {"eda"}),
        ({"max_steps": 9000}, {"epochs"}, {"max_steps"}),
        ({"train_data": ("a.tar",)}, {"splits", "selection"}, {"start_lr", "stall_ends_run"}),
        ({"warmup_steps": 0, "stall_seconds": 0}, {"start_lr", "stall_ends_run"}, {"selection"}),
        ({"evaluate_data": "x"}, {"evaluate_data"}, {"splits"}),
        ({"evaluate_data": "x", "evaluate_every_steps": 2}, set(), {"evaluate_data"}),
    ],
)
def test_what_nothing_reads(given, unread, read):
    found = set(unread_settings(TrainSettings(**given)))
    assert unread <= found
    assert not read & found


def test_names_of_what_nothing_reads_are_settings():
    for method in ("clip", "slip", "filip", "declip", "defilip"):
        for name in unread_settings(TrainSettings(method=method)):
            assert hasattr(TrainSettings(), name)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"data_weights": ("2",)}, "train_data is unset"),
        ({"evaluate_every_steps": 5}, "evaluate_data is not"),
        ({"keep_every_steps": 5}, "keep_every_steps is 5, but checkpoint_every_steps is unset"),
        ({"keep_every_steps": 5, "checkpoint_every_steps": 2}, "checkpoint_every_steps is 2"),
    ],
)
def test_settings_that_need_one_another(values, sentence):
    with pytest.raises(DeclipError, match=sentence):
        TrainSettings(**values)
