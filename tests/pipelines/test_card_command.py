"""``declip card``: where the card goes, and which results are the run's."""

import json
from pathlib import Path

import pytest
from result_files import write_classification
from run_folder import write_run

from declip_shards import DeclipError, manifest
from pipelines.card_command import main
from pipelines.eval_summary import SUMMARY


def test_the_card_stands_beside_the_weights_with_the_runs_own_results(tmp_path: Path) -> None:
    store = write_run(tmp_path / "run")
    digest = manifest.manifest_digest(store, "train")
    write_classification(tmp_path / "run/eval", range(30), hashes={"train": digest})
    assert main([str(tmp_path / "run")]) == 0
    card = (tmp_path / "run/train/export/README.md").read_text()
    assert "# ViT-T run" in card
    assert "| demo/birds | Zero-shot classification | simple" in card
    assert "of the very weights" not in card


def test_a_run_whose_evaluations_all_failed_has_a_card_without_results(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run/eval").mkdir()
    (tmp_path / "run/eval" / SUMMARY).write_text('{"evaluations": []}')
    assert main([str(tmp_path / "run")]) == 0
    assert "It was not evaluated" in (tmp_path / "run/train/export/README.md").read_text()


def test_results_name_and_place_can_be_given(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    for name in ("a", "b"):
        write_classification(tmp_path / name, range(30), dataset=name, pretrained="first")
        write_classification(tmp_path / name, range(30), dataset=name, pretrained="second")
    out = tmp_path / "card.md"
    arguments = [str(tmp_path / "run"), "--out", str(out), "--name", "My model"]
    given = ["--results", str(tmp_path / "a"), "--results", str(tmp_path / "b")]
    assert main([*arguments, *given, "--model", "second"]) == 0
    card = out.read_text()
    assert "# My model" in card
    assert card.count("| acc1 ") == 2
    assert "of the very weights above is unknown, for they do not say: a, b" in card
    with pytest.raises(DeclipError, match=r"are of 2 models .*; choose one with --model"):
        main([*arguments, *given])


def test_results_of_other_weights_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    write_classification(tmp_path / "run/eval", range(30), hashes={"train": "0" * 64})
    with pytest.raises(DeclipError, match="is of other weights than those of"):
        main([str(tmp_path / "run")])


def test_weights_of_an_export_are_held_against_the_results(tmp_path: Path) -> None:
    import torch

    from declip_train.export import PreprocessSettings, export_open_clip
    from declip_train.model_config import get_model_config
    from declip_train.towers import CLIP
    from pipelines.eval_models import load_eval_model

    write_run(tmp_path / "run")
    folder = tmp_path / "run/train/export"
    towers = CLIP(get_model_config("test"), torch.Generator().manual_seed(0))
    export_open_clip(towers, None, folder, PreprocessSettings(), {})
    digest = load_eval_model(str(folder)).digest
    for name, weights in (("own", digest), ("others", "0" * 64)):
        write_classification(tmp_path / name, range(30), hashes={"weights": weights})
    assert main([str(tmp_path / "run"), "--results", str(tmp_path / "own")]) == 0
    assert json.loads((folder / "open_clip_config.json").read_text())
    with pytest.raises(DeclipError, match="is of other weights than those of"):
        main([str(tmp_path / "run"), "--results", str(tmp_path / "others")])


def test_faults_are_told(tmp_path: Path) -> None:
    with pytest.raises(DeclipError, match="holds no trained model"):
        main([str(tmp_path)])
    write_run(tmp_path / "run")
    (tmp_path / "run/train/export").rmdir()
    with pytest.raises(DeclipError, match="the training has not finished; say with --out where"):
        main([str(tmp_path / "run")])
