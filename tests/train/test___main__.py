"""The command: its help, and one sentence for what is wrong."""

import json

import pytest

from declip_train.__main__ import main


def test_help_names_the_launcher(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "deepspeed --num_gpus N --module declip_train CONFIG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"modle": "test"}, "no setting is named 'modle'. Did you mean 'model'?"),
        ({"model": "tset"}, "Did you mean 'test'?"),
        ({"root": ".", "model": "test"}, "cannot be shared evenly"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(tmp_path, capsys, content, sentence):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**content, "num_ranks": 3, "global_batch_size": 16}))
    assert main([str(config)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("declip_train: error: ")
    assert sentence in errors
    assert "Traceback" not in errors


def test_the_number_of_processes_must_be_the_configurations(tmp_path, capsys, monkeypatch):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": "test", "num_ranks": 2}))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main([str(config), "--local_rank=0"]) == 1
    assert "4 processes were started, but the configuration says num_ranks 2" in (
        capsys.readouterr().err
    )
