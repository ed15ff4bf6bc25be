"""The command: its help, and one sentence for what is wrong."""

import json
import subprocess
import sys
import time

import pytest

from declip_train import __main__ as command
from declip_train.__main__ import main
from declip_train.launch import Place, RunStalledError
from declip_train.supervision import ENDED_EARLY, INTERRUPTED, STOPPED


def test_help_names_the_launcher(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "deepspeed --num_gpus N --module declip_train CONFIG" in told
    for status in (0, 1, ENDED_EARLY, INTERRUPTED, STOPPED):
        assert f"\n  {status} " in told


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


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Runs the command with a launcher that only takes note; (arguments) -> (status, call)."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"root": ".", "model": "test", "num_ranks": 4}))
    monkeypatch.delenv("RANK", raising=False)

    def run(*arguments, error=None):
        calls = []

        def launch(path, settings, **more):
            calls.append((settings, more))
            if error is not None:
                raise error

        monkeypatch.setattr(command, "launch", launch)
        return main([str(config), *arguments]), calls

    return run


def test_a_part_of_a_run_is_told_on_the_command_line(started):
    status, [(settings, more)] = started()
    assert (status, settings.num_ranks) == (0, 4)
    assert more == {"place": None, "restarts": 0}
    part = ("--hosts", "2", "--host-rank", "1", "--master", "node-0:29500", "--max-restarts", "3")
    _, [(settings, more)] = started("--num-ranks", "8", *part)
    assert settings.num_ranks == 8
    place = Place(slots=(4, 4), index=1, address="node-0", port=29500)
    assert more == {"place": place, "restarts": 3}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--hosts 2 --master a:1", "--host-rank is missing"),
        ("--hosts 2 --host-rank 2 --master a:1", "--host-rank is 2, but must be from 0 to 1"),
        ("--hosts 3 --host-rank 0 --master a:1", "num_ranks 4 cannot be shared evenly by 3"),
        ("--hosts 2 --host-rank 0 --master a", "--master is 'a', but must be ADDRESS:PORT"),
        ("--hosts 2 --host-rank 0 --master a:99999", "must be ADDRESS:PORT"),
        ("--max-restarts -1", "--max-restarts is -1"),
        ("--num-ranks 3", "cannot be shared evenly"),
    ],
)
def test_a_wrong_part_is_one_sentence(started, capsys, arguments, sentence):
    status, calls = started(*arguments.split())
    assert (status, calls) == (1, [])
    assert sentence in capsys.readouterr().err


def test_the_status_says_how_it_ended(started, capsys):
    assert started(error=RunStalledError("x stalled"))[0] == ENDED_EARLY
    assert "declip_train: error: x stalled" in capsys.readouterr().err
    assert started(error=KeyboardInterrupt())[0] == INTERRUPTED


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        ("sys.exit(143)", 143, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_process_ends_at_once_and_loses_no_word(outcome, status, said):
    script = f"""
import sys, threading, time
import declip_train.__main__ as command
class Slow:
    def __del__(self):
        time.sleep(20)  # As the teardown of torch may take on a busy machine.
slow = Slow()
threading.Thread(target=time.sleep, args=(20,)).start()
def main():
    print("out")
    {outcome}
command.main = main
command._end(command._run())
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert time.monotonic() - began < 15
    assert (done.returncode, done.stdout) == (status, "out\n")
    assert said in done.stderr
