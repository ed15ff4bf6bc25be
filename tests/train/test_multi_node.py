"""Several machines: the file of hosts, what is asked of each, and how they end together."""

import io
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from declip_shards import DeclipError
from declip_train import multi_node
from declip_train.launch import Place, RunEndedError, RunStalledError
from declip_train.multi_node import Host, HostLostError, check_hosts, read_hostfile
from declip_train.settings import TrainSettings
from declip_train.supervision import StopWish

FAKE_SSH = Path(__file__).parent / "fake_ssh.py"


@pytest.fixture(autouse=True)
def _fake_ssh(monkeypatch):
    monkeypatch.setenv(multi_node.SSH_VARIABLE, f"{sys.executable} {FAKE_SSH}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_a_hostfile_is_deepspeeds(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode-1 slots=8\n\n  10.0.0.2   slots=4  # old\n")
    assert read_hostfile(path) == [Host(name="node-1", slots=8), Host(name="10.0.0.2", slots=4)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names no host; add lines"),
        ("a\n", "line 1 is 'a', but must be `NAME slots=N`"),
        ("a slots=1\nb slots=0\n", "line 2 is 'b slots=0'"),
        ("-oProxyCommand=x slots=1\n", "line 1 is"),
        ("a slots=1\na slots=2\n", "line 2: a stands there twice"),
    ],
)
def test_a_wrong_hostfile_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(DeclipError) as raised:
        read_hostfile(path)
    assert sentence in str(raised.value)
    with pytest.raises(DeclipError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


def ask(tmp_path, *names):
    config = tmp_path / "config.json"
    config.write_text("{}")
    hosts = [Host(name=name, slots=1) for name in names]
    return check_hosts(hosts, str(config), tmp_path)


def test_every_host_says_what_it_is_and_nothing_is_left_behind(tmp_path):
    answers = ask(tmp_path, "good", "done")
    assert len(answers) == 2
    for answer in answers:
        assert answer["versions"] == multi_node.versions()
        assert answer["address"] == "127.0.0.1"
        assert answer["accelerator"] == "cpu"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("away", "host away cannot be reached over ssh (ssh: connect to host away port 22: No"),
        ("bare", "host bare cannot run"),
    ],
)
def test_a_host_that_does_not_answer_is_named(tmp_path, name, sentence):
    with pytest.raises(DeclipError) as raised:
        ask(tmp_path, name)
    assert sentence in str(raised.value)
    assert isinstance(raised.value, HostLostError) == (name == "away")


GOOD: dict[str, Any] = {
    "has_config": True,
    "has_folder": True,
    "sees_token": True,
    "accelerator": "cpu",
    "address": "10.0.0.1",
    "port": 7,
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"versions": {"torch": "1.0"}}, "host b has torch 1.0, and this one "),
        ({"versions": {"declip_train": "f00"}}, "host b has declip_train f00, and this one "),
        ({"has_folder": False}, "host b does not see '/data/train'"),
        ({"has_config": False}, "host b does not see '/c.json'"),
        ({"sees_token": False}, "host b has a folder '/data/train', but not this one"),
        ({"accelerator": "cuda"}, "host b with slots=1 would train on cuda, and a on cpu"),
    ],
)
def test_a_host_that_does_not_fit_is_named(change, sentence):
    ours = multi_node.versions()
    good = {**GOOD, "versions": ours}
    other = {**good, **change, "versions": {**ours, **change.get("versions", {})}}
    hosts = [Host(name="a", slots=1), Host(name="b", slots=1)]
    multi_node._check_answers(hosts, [good, good], "/c.json", "/data/train")
    with pytest.raises(DeclipError) as raised:
        multi_node._check_answers(hosts, [good, other], "/c.json", "/data/train")
    assert sentence in str(raised.value)


def test_the_meeting_point_is_one_that_all_reach(monkeypatch):
    hosts = [Host(name="a", slots=1), Host(name="b", slots=1)]
    here = {**GOOD, "address": "127.0.0.1"}
    assert multi_node._meeting_point(hosts, [GOOD, GOOD]) == ("10.0.0.1", 7)
    assert multi_node._meeting_point(hosts, [here, here]) == ("127.0.0.1", 7)
    with pytest.raises(DeclipError, match="which other hosts cannot; name it"):
        multi_node._meeting_point(hosts, [here, GOOD])
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.9")
    monkeypatch.setenv("MASTER_PORT", "99")
    assert multi_node._meeting_point(hosts, [here, GOOD]) == ("10.0.0.9", 99)


@pytest.fixture
def _all_fit(monkeypatch):
    """Hosts answer as they should, without being asked."""
    answer = {**GOOD, "address": "127.0.0.1", "versions": multi_node.versions()}

    def check(hosts, config, folder):
        if "away" in (host.name for host in hosts):
            raise HostLostError("away", "host away cannot be reached over ssh")
        return [answer] * len(hosts)

    monkeypatch.setattr(multi_node, "check_hosts", check)


def start(tmp_path, *names, wish=None, num_ranks=None, restarts=0):
    config = tmp_path / "config.json"
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
    settings = TrainSettings(
        root=str(tmp_path),
        num_ranks=len(names) if num_ranks is None else num_ranks,
        hostfile=str(hostfile),
        global_batch_size=12,
    )
    config.write_bytes(settings.to_json())
    own = wish or StopWish()
    try:
        multi_node.launch_over_ssh(config, settings, own, restarts)
    finally:
        own.close()


@pytest.mark.usefixtures("_all_fit")
@pytest.mark.parametrize(
    ("names", "kind", "sentence"),
    [
        (("good", "faulty"), DeclipError, "host faulty: 0 of 9 samples are left."),
        (("stalled", "good"), RunStalledError, "host stalled: stalled: process 1 hangs"),
        (("died", "good"), RunEndedError, "host died: training ended with status -9"),
        (("good", "lost"), HostLostError, "the connection to host lost ended with status 255"),
    ],
)
def test_when_one_host_ends_the_others_are_told_and_it_is_named(
    tmp_path, capfd, names, kind, sentence
):
    with pytest.raises(kind) as raised:
        start(tmp_path, *names)
    assert sentence in str(raised.value)
    assert "[good] good was told stop" in capfd.readouterr().err


def test_hosts_that_end_well_end_the_run(tmp_path, capfd):
    start(tmp_path, "done")
    assert "[done] done is up" in capfd.readouterr().err
    with pytest.raises(DeclipError, match="num_ranks is 3, but the hosts have 1 slots in all"):
        start(tmp_path, "done", num_ranks=3)


@pytest.mark.usefixtures("_all_fit")
def test_a_host_that_was_asked_to_stop_stops_all(tmp_path, capfd):
    wish = StopWish()
    start(tmp_path, "good", "preempted", wish=wish)
    assert wish.status == 143
    assert "good was told stop" in capfd.readouterr().err


@pytest.mark.usefixtures("_all_fit")
def test_a_wish_is_passed_on_to_every_host_and_the_second_one_too(tmp_path, capfd):
    wish = StopWish()

    def hurry():
        wish.at_once = True

    timers = [threading.Timer(2.0, wish.ask), threading.Timer(3.0, hurry)]
    for timer in timers:
        timer.start()
    start(tmp_path, "good", "slow", wish=wish)
    told = capfd.readouterr().err
    assert "good was told stop" in told
    assert told.index("slow was told stop") < told.index("slow was told now")


@pytest.mark.usefixtures("_all_fit")
def test_a_lost_host_is_left_out_when_the_run_is_started_again(tmp_path, capfd):
    with pytest.raises(HostLostError, match="host away cannot be reached"):
        start(tmp_path, "done", "away")
    start(tmp_path, "done", "away", restarts=1)
    told = capfd.readouterr().err
    assert "Starting again on done; 0 more times after this." in told


@pytest.mark.parametrize(
    ("words", "status", "at_once"), [("", 143, False), ("stop\n", 143, False), ("now\n", 143, True)]
)
def test_an_agent_obeys_its_connection_and_its_end(tmp_path, monkeypatch, words, status, at_once):
    config = tmp_path / "config.json"
    config.write_bytes(TrainSettings(root=".", num_ranks=1, global_batch_size=12).to_json())
    order = {"config": str(config), "num_ranks": 3, "slots": [1, 2], "index": 1}
    order |= {"address": "10.0.0.1", "port": 7, "environment": {"OPENDECLIP_TOLD": "yes"}}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(order) + "\n" + words))
    monkeypatch.setenv("OPENDECLIP_TOLD", "no")
    seen: dict[str, Any] = {}

    def launch(path, settings, *, place, wish, show_progress):
        deadline = time.monotonic() + 10
        while wish.status is None and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.update(settings=settings, place=place, at_once=wish.at_once)
        seen.update(told=os.environ["OPENDECLIP_TOLD"], show=show_progress)

    monkeypatch.setattr(multi_node, "launch", launch)
    assert multi_node._agent() == status
    assert seen["place"] == Place(slots=(1, 2), index=1, address="10.0.0.1", port=7)
    assert (seen["settings"].num_ranks, seen["told"], seen["show"]) == (3, "yes", False)
    assert seen["at_once"] == at_once
