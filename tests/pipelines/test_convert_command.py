"""``declip convert`` at the terminal. What it writes: tests/shards/test_export_files.py."""

from pathlib import Path

import pytest

from declip_shards import DeclipError
from declip_shards.fakes import write_fake_dataset
from pipelines.convert_command import main


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(write_fake_dataset(str(tmp_path / "data"), samples_per_shard=6).url)


@pytest.mark.parametrize("form", ["files", "parquet", "energon"])
def test_it_says_what_was_written(root, tmp_path, capsys, form):
    command = [root, "--to", form, "--target", str(tmp_path / "target")]
    assert main(command) == 0
    assert capsys.readouterr().out == (
        f"{form}: 12 samples in 2 shards; 2 written, 0 as they were, 0 taken away.\n"
    )
    assert main(command) == 0
    assert "0 written, 2 as they were" in capsys.readouterr().out


def test_wrong_forms_and_settings_are_refused(root, tmp_path):
    target = str(tmp_path / "target")
    with pytest.raises(DeclipError, match=r"--to is 'file'\. Did you mean 'files'"):
        main([root, "--to", "file", "--target", target])
    with pytest.raises(DeclipError, match="--selection is for energon"):
        main([root, "--to", "files", "--target", target, "--selection", "default"])
    with pytest.raises(DeclipError, match="no complete shard"):
        main([str(tmp_path / "nothing"), "--to", "files", "--target", target])
    with pytest.raises(DeclipError, match=r"selection/none/00000\.parquet' is missing"):
        main([root, "--to", "energon", "--target", target, "--selection", "none"])
