"""``declip compare``: text, JSON and page, and what it refuses."""

import json
from pathlib import Path

import pytest
from result_files import write_classification

from declip_shards import DeclipError
from pipelines.compare_command import main, p_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for dataset, right_a, right_b in (("cifar10", 20, 50), ("pets", 20, 21)):
        write_classification(tmp_path / "r", range(right_a), dataset=dataset, pretrained="a")
        write_classification(tmp_path / "r", range(right_b), dataset=dataset, pretrained="b")
    return tmp_path / "r"


def test_text_json_and_page_tell_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder), str(folder), "--model-a", "a", "--model-b", "b"]
    assert main([*arguments, "--html", str(tmp_path / "c.html")]) == 0
    text = capsys.readouterr().out
    assert "B is better on 1, A on 0, 1 are not settled (Holm over 2, level 0.05)" in text
    assert main([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    page = (tmp_path / "c.html").read_text()
    for item in content["comparisons"]:
        told = f"{100 * item['difference']:+.2f}"
        assert told in text
        assert told in page
        assert item["verdict"] in text
    assert (content["model_a"], content["model_b"]) == ("ViT-T a", "ViT-T b")


def test_models_of_one_name_are_told_apart_by_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [str(tmp_path / name) for name in ("mon", "tue")]
    for place, num in zip(places, (20, 30), strict=True):
        write_classification(Path(place), range(num))
    assert main([*places, "--without-overlap"]) == 0
    text = capsys.readouterr().out
    for side, place in zip("AB", places, strict=True):
        assert f"{side}: ViT-T first of {place}\n" in text
    # Nothing says what the training data holds, so nothing was tested.
    assert "1 could not be tested" in text
    assert "Tested without" not in text


def test_a_p_value_is_never_told_as_zero() -> None:
    assert p_text(1e-12) == "<0.0001"
    assert p_text(0.0123) == "0.0123"
    assert p_text(None) == "-"


def test_faults_are_told(folder: Path, tmp_path: Path) -> None:
    both = [str(folder), str(folder)]
    for arguments, sentence in (
        (both, r"are of 2 models \(ViT-T a, ViT-T b\); choose one with --model-a"),
        ([*both, "--model-a", "a", "--model-b", "a"], "A and B are the same results, of 'ViT-T a'"),
        ([*both, "--num-resamples", "5"], "--num-resamples is 5; it must lie between 100 and 100"),
        ([*both, "--seed", "-1"], "--seed is -1; it must be 0 or more"),
        ([str(folder), str(tmp_path / "none")], "choose one with --model-a"),
        ([*both, "--forced"], "there is no option --forced"),
    ):
        with pytest.raises(DeclipError, match=sentence):
            main(arguments)
