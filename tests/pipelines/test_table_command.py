"""``declip table``: formats, files, options."""

from pathlib import Path

import pytest
from result_files import write_classification

from declip_shards import DeclipError
from pipelines.table_command import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for dataset, number in (("cifar10", 30), ("pets", 12)):
        write_classification(tmp_path / "r", range(number), dataset=dataset)
    return tmp_path / "r"


def test_each_format_goes_to_the_terminal_or_to_a_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {}
    for form in ("text", "markdown", "csv"):
        assert main([str(folder), "--format", form]) == 0
        texts[form] = capsys.readouterr().out
        out = tmp_path / f"table.{form}"
        assert main([str(folder), "--format", form, "--out", str(out)]) == 0
        assert out.read_text() == texts[form]
        capsys.readouterr()
    assert len(set(texts.values())) == 3
    assert main([str(folder), "--format", "html", "--out", str(tmp_path / "t.html")]) == 0
    assert (tmp_path / "t.html").read_text().startswith("<!DOCTYPE html>")


def test_options_reach_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder), "--suite", "kornblith12", "--metric", "main", "--published"])
    shown = capsys.readouterr().out
    assert "food101" in shown
    assert "published: DeCLIP ViT-B-32" in shown
    main([str(folder), "--published-data", "YFCC15M-V2"])
    shown = capsys.readouterr().out
    assert "published: DeFILIP" in shown
    assert "YFCC15M-V1" not in shown
    main([str(folder), "--metric", "all"])
    assert "cifar10 acc5" in capsys.readouterr().out


def test_faults_are_told(folder: Path, tmp_path: Path) -> None:
    for arguments, sentence in (
        ([str(folder), "--format", "html"], "--format html makes a file; name it with --out"),
        ([str(folder), "--pictures", "999"], "--pictures is 999; it must lie between 0 and 200"),
        ([str(folder), "--out", str(tmp_path)], "is a folder; name a file"),
        ([str(folder), "--out", str(tmp_path / "no" / "x")], "is not there; make it first"),
        ([str(folder), "--format", "htm"], "--format is 'htm'"),
        (
            [str(folder), "--published-data", "CC3"],
            "--published-data is 'CC3'. Did you mean 'CC3M'",
        ),
        ([str(folder), "--suit", "clip27"], "there is no option --suit"),
        ([str(tmp_path / "none")], "is not there; give a folder or file of results"),
    ):
        with pytest.raises(DeclipError, match=sentence):
            main(arguments)
