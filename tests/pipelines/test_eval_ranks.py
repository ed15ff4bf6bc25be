"""Processes that evaluate together."""

import pytest

from declip_shards import DeclipError
from pipelines import eval_ranks
from pipelines.eval_ranks import Ranks, ranks_of_launcher


def test_without_a_launcher_there_is_one_process(tmp_path):
    found = ranks_of_launcher({}, tmp_path, asked=False)
    assert (found.rank, found.size, found.folder) == (0, 1, None)
    with found.beating():
        found.begin(1)
    assert not list(tmp_path.iterdir())


def test_torchruns_variables_are_honored_and_slurms_where_asked(tmp_path):
    torchrun = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}
    found = ranks_of_launcher(torchrun, tmp_path, asked=False)
    assert (found.rank, found.size, found.local_rank) == (2, 3, 1)
    slurm = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    assert ranks_of_launcher(slurm, tmp_path, asked=False).size == 1
    assert ranks_of_launcher(slurm, tmp_path, asked=True).size == 4


@pytest.mark.parametrize(
    ("environment", "asked", "sentence"),
    [
        ({}, True, "needs a launcher"),
        ({"RANK": "3", "WORLD_SIZE": "3"}, False, "ranks go from 0 to 2"),
        ({"RANK": "one", "WORLD_SIZE": "3"}, False, "RANK is 'one'"),
    ],
)
def test_wrong_variables_are_refused(environment, asked, sentence, tmp_path):
    with pytest.raises(DeclipError) as error:
        ranks_of_launcher(environment, tmp_path, asked=asked)
    assert sentence in str(error.value)


def test_every_chunk_belongs_to_one_rank():
    ranks = [Ranks(rank=rank, size=3) for rank in range(3)]
    for number in range(10):
        assert sum(each.mine(number) for each in ranks) == 1


def test_a_chunk_comes_until_its_rank_is_past_the_step(tmp_path):
    first, second = (Ranks(rank=rank, size=2, folder=tmp_path) for rank in range(2))
    assert first.comes(1, place=5), "a rank that has not begun is waited for"
    second.begin(4)
    assert first.comes(1, place=5)
    second.begin(5)
    assert first.comes(1, place=5)
    second.begin(6)
    assert not first.comes(1, place=5)
    assert not first.comes(0, place=5), "an own chunk comes from nobody"


def test_a_rank_that_ends_dies_or_is_silent_is_not_waited_for(tmp_path, monkeypatch):
    first, second = (Ranks(rank=rank, size=2, folder=tmp_path) for rank in range(2))
    with second.beating():
        second.begin(1)
        assert first.comes(1, place=1)
    assert not first.comes(1, place=1), "it has ended"
    second.begin(1)
    assert first.comes(1, place=1)
    monkeypatch.setattr(eval_ranks, "STALE_SECONDS", -1.0)
    assert not first.comes(1, place=1), "it has not changed its sign since"
    second.begin(2)
    monkeypatch.undo()
    first.is_alive = lambda rank: False
    assert not first.comes(1, place=9)


def test_jobs_of_one_folder_have_signs_of_their_own(tmp_path):
    base = {"RANK": "0", "WORLD_SIZE": "2"}
    folders = {
        ranks_of_launcher({**base, "SLURM_JOB_ID": job}, tmp_path, asked=False).folder
        for job in ("1", "2", "2")
    }
    assert len(folders) == 2
