"""The error budget, and what stands in for a failed sample."""

import itertools
import json
import threading

import pytest

from declip_shards import DeclipError
from declip_train.failed_samples import FailedSample, FailedSamples, failure_lines, stand_ins


def failure(key, epoch=0):
    return FailedSample(epoch=epoch, key=key, reason=f"{key} is cut", replaced_by="other")


def first(number, seed=1, epoch=2, key="a"):
    return list(itertools.islice(stand_ins(1000, seed=seed, epoch=epoch, key=key), number))


def test_stand_ins_follow_from_seed_epoch_and_key_alone():
    assert first(20) == first(20)
    assert first(20)[:5] == first(5)
    assert all(0 <= index < 1000 for index in first(500))
    others = [first(5, seed=2), first(5, epoch=3), first(5, key="b")]
    assert first(5) not in others
    assert set(itertools.islice(stand_ins(3, seed=0, epoch=0, key="x"), 60)) == {0, 1, 2}


@pytest.mark.parametrize(("budget", "allowed"), [(0.0, 0), (0.05, 5), (0.059, 5), (1.0, 100)])
def test_the_budget_is_of_each_epoch(budget, allowed):
    failures = FailedSamples(100, budget)
    for epoch in range(4):
        for number in range(allowed):
            failures.add(failure(f"{number}", epoch))
    with pytest.raises(
        DeclipError,
        match=f"{allowed + 1} of the 100 samples of epoch 3 .* error_budget {budget:g} allows "
        f"{allowed}; the last is sample 'last': last is cut",
    ):
        failures.add(failure("last", 3))


def test_a_sample_counts_once_an_epoch():
    failures = FailedSamples(100, 0.01)
    for _ in range(5):
        failures.add(failure("same"))
    assert failures.counts == {0: 1}
    failures.add(failure("same", 1))
    assert [(f.epoch, f.key) for f in failures.take()] == [(0, "same"), (1, "same")]
    assert failures.take() == []


def test_failures_of_all_processes_add_up():
    ranks = [FailedSamples(100, 0.03) for _ in range(4)]
    for number, rank in enumerate(ranks):
        rank.add(failure(str(number)))
    gathered = [failure for rank in ranks for failure in rank.take()]
    for rank in ranks:
        with pytest.raises(DeclipError, match="4 of the 100 samples"):
            rank.count_all(gathered)
    watching = FailedSamples(100, 0.04)
    watching.count_all(gathered[:3])
    # Met again, they count once.
    watching.count_all(gathered)


def test_old_epochs_and_long_lists_are_forgotten():
    failures = FailedSamples(10_000, 0.5)
    for epoch in range(5):
        for number in range(600):
            failures.add(failure(f"{number}", epoch))
    assert set(failures.counts) == {3, 4}
    assert len(failures.take()) == 1000


def test_threads_lose_no_failure():
    failures = FailedSamples(10_000, 1.0)

    def work(thread):
        for number in range(200):
            failures.add(failure(f"{thread}-{number}"))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures.counts == {0: 800}
    assert len({f.key for f in failures.take()}) == 800


def test_lines_are_json():
    lines = failure_lines([failure("a"), failure('"\n漢', 3)])
    rows = [json.loads(line) for line in lines.decode().splitlines()]
    assert [row["key"] for row in rows] == ["a", '"\n漢']
    assert rows[1] == {
        "epoch": 3,
        "key": '"\n漢',
        "reason": '"\n漢 is cut',
        "replaced_by": "other",
    }
