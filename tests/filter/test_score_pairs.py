from typing import Any

import numpy as np
import pytest
import torch
from onnx_files import mean_classifier
from stage_runs import HASHING, digests, run_stage

from declip_filter import EmbedPairs
from declip_filter.embeddings import read_part, read_vectors
from declip_filter.image_signals import decode_rgb
from declip_filter.score_pairs import ScorePairs
from declip_filter.signals import read_signal_columns
from declip_shards import DeclipError, layout, read_samples, sidecars

OWN: dict[str, Any] = {"scorer_factory": "own_scorers:make"}
ENCODER: dict[str, Any] = {
    "encoder": HASHING["encoder"],
    "encoder_factory": HASHING["encoder_factory"],
}


@pytest.fixture
def pair_root(selected_root):
    """Pictures and captions embedded; the third shard is held out."""
    run_stage(EmbedPairs(root=selected_root, images=True, **HASHING))
    return selected_root


def column(store, name, shard="00000", signals="scores"):
    table = read_signal_columns(store, [signals], shard, [name])
    return dict(zip(*(table.column(c).to_pylist() for c in ("key", name)), strict=True))


def test_clip_scores_are_cosines_of_the_stored_vectors_and_empty_without_one(pair_root, store):
    run_stage(ScorePairs(root=pair_root, scorer=("clip:cosine",)))
    keys = [sample.key for sample in read_samples(store, "00000")]
    found = column(store, "clip_score")
    assert list(found) == sorted(keys)
    part = read_part(store, "text", "00000")
    image, text = (read_vectors(store, "text", kind, part) for kind in ("img_emb", "text_emb"))
    expected = (image[0].astype(np.float64) * text[0].astype(np.float64)).sum(axis=1)
    assert [found[key] for key in image[1]] == pytest.approx(expected.tolist(), abs=1e-5)
    # The third shard is held out, so nothing of it was embedded.
    assert set(column(store, "clip_score", "00002").values()) == {None}


def test_vectors_made_here_give_the_scores_of_stored_ones(fake_root, store):
    run_stage(EmbedPairs(root=fake_root, selection="", images=True, **HASHING))
    run_stage(ScorePairs(root=fake_root, scorer=("clip:cosine",)))
    run_stage(ScorePairs(root=fake_root, scorer=("clip:cosine",), name="here", **ENCODER))
    stored, here = (column(store, "clip_score", signals=name) for name in ("scores", "here"))
    # The stored ones are rounded to float16.
    assert list(stored.values()) == pytest.approx(list(here.values()), abs=2e-3)
    assert None not in here.values()


def test_heads_classifiers_and_own_scorers_in_one_pass(fake_root, store, tmp_path):
    pytest.importorskip("onnxruntime")
    run_stage(EmbedPairs(root=fake_root, selection="", images=True, **HASHING))
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 1)
    torch.save(head.state_dict(), tmp_path / "head.pth")
    network = mean_classifier(np.array([[1.0], [0], [0]]), np.zeros(1),
                              metadata={"mean": "0,0,0", "std": "1,1,1"})  # fmt: skip
    (tmp_path / "red.onnx").write_bytes(network)
    names = (f"aesthetics:{tmp_path}/head.pth", f"watermark:{tmp_path}/red.onnx", "own:redness")
    stats = run_stage(ScorePairs(root=fake_root, scorer=names, **OWN))
    part = read_part(store, "text", "00000")
    vectors, keys = read_vectors(store, "text", "img_emb", part)
    expected = head(torch.from_numpy(vectors.astype(np.float32)))[:, 0].detach().tolist()
    assert [column(store, "aesthetics_score")[key] for key in keys] == pytest.approx(
        expected, abs=1e-5
    )
    samples = read_samples(store, "00000")
    means = {s.key: decode_rgb(s.image).reshape(-1, 3).mean(axis=0) for s in samples}
    redness, red = column(store, "redness"), column(store, "watermark_score")
    for key, (r, _, b) in means.items():
        assert redness[key] == (pytest.approx(r - b, abs=1e-3) if r > b else None)
        # The network sees the middle alone, of these pictures all but a rim.
        assert red[key] == pytest.approx(r / 255, abs=0.2)
    empty = stats["00000"].extra["num_without_score"]
    assert empty["redness"] == sum(value is None for value in redness.values()) > 0
    assert empty["brightness"] == 0
    assert set(stats["00000"].extra["digests"]) == set(names)


def test_order_of_shards_changes_nothing_and_the_bytes_are_the_same_again(pair_root, store):
    stage = ScorePairs(root=pair_root, scorer=("clip:cosine", "own:redness"), **OWN)
    run_stage(stage)
    before = digests(pair_root, "signals")
    for shard in stage.tasks():
        store.remove(layout.signals_path("scores", shard))
    run_stage(stage, list(reversed(stage.tasks())))
    assert digests(pair_root, "signals") == before


def test_without_a_scorer_there_is_nothing_to_do(fake_root):
    assert ScorePairs(root=fake_root).tasks() == ()


def test_rows_that_an_encoder_fails_on_have_no_score(fake_root, store):
    broken = ENCODER | {"encoder_factory": "hashing_encoder:make_broken"}
    run_stage(ScorePairs(root=fake_root, scorer=("clip:cosine",), **broken))
    captions = {sample.key: sample.caption for sample in read_samples(store, "00000")}
    for key, score in column(store, "clip_score").items():
        assert (score is None) == ("purple" in captions[key])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"scorer": ("own:nothing",), **OWN}, r"gave no finite nothing for any of \d+ pairs"),
        ({"scorer": ("own:wrong",), **OWN}, r"gave an array of shape \(1, 2\) where \(\d+, 1\) is"),
        ({"scorer": ("own:redness", "own:redness"), **OWN}, r"both write 'redness'"),
        ({"scorer": ("clip:cosine",), "embeddings": "none"}, r"'none' lack shard 00000"),
    ],
)
def test_broken_scorers_and_missing_vectors_are_refused(pair_root, settings, sentence):
    with pytest.raises(DeclipError, match=sentence):
        run_stage(ScorePairs(root=pair_root, **settings))


def test_embeddings_of_text_alone_are_refused_with_the_remedy(selected_root):
    run_stage(EmbedPairs(root=selected_root, images=False, **HASHING))
    with pytest.raises(DeclipError, match=r"'clip:cosine' reads img_emb, but .*name an encoder"):
        run_stage(ScorePairs(root=selected_root, scorer=("clip:cosine",)))


def test_vectors_of_samples_that_are_gone_are_refused(pair_root, store):
    path = layout.shard_parquet_path("00000")
    table = sidecars.read_table(store, path)
    sidecars.write_table(store, path, table.slice(1))
    with pytest.raises(DeclipError, match=r"sample '0000000' is no success of the shard; rerun"):
        run_stage(ScorePairs(root=pair_root, scorer=("clip:cosine",)))


def test_wrong_settings_are_refused_before_anything_is_read():
    with pytest.raises(DeclipError, match=r"batch_size is 0; it must be at least 1"):
        ScorePairs(batch_size=0)
    with pytest.raises(DeclipError, match=r"unknown kind 'clap'. Did you mean 'clip'"):
        ScorePairs(scorer=("clap:cosine",))
    with pytest.raises(DeclipError, match=r"encoder is 'x'; it must be KIND:MODEL"):
        ScorePairs(scorer=("clip:cosine",), encoder="x")
