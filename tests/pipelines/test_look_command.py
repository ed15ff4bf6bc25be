"""``declip look``: the page is written, its path and figures are printed, faults are told."""

import pyarrow as pa
import pytest

from declip_shards import DeclipError, Store, layout, sidecars
from declip_shards.fakes import write_fake_dataset
from pipelines.look_command import MAX_SAMPLES, PAGES, main


@pytest.fixture
def store(tmp_path) -> Store:
    store = write_fake_dataset(str(tmp_path / "data"), num_shards=1, samples_per_shard=6)
    keys = [f"00000{n}" for n in range(6)]
    duplicates = {"key": keys, "duplicate_bytes_of": [None, keys[0], None, None, None, None]}
    sidecars.write_table(store, layout.signals_path("copies", "00000"), pa.table(duplicates))
    table = {"key": keys, "neighbor_keys": [keys[1:3]] * 6, "scores": [[0.5, 0.25]] * 6}
    sidecars.write_table(store, layout.neighbors_path("captions", "00000"), pa.table(table))
    return store


def test_the_page_is_written_and_its_figures_are_printed(store, capsys):
    assert main(["neighbors", "--out", store.url, "--samples", "2"]) == 0
    told = capsys.readouterr().out
    assert "samples" in told
    assert "6 (100.00%)" in told
    assert f"Page: {store.path('report/neighbors.html')}" in told
    assert store.read_bytes("report/neighbors.html").startswith(b"<!DOCTYPE html>")


def test_a_set_is_named(store, capsys):
    assert main(["duplicates", "--out", store.url, "--name", "copies"]) == 0
    assert "1 alone, 1 more than the rungs before" in capsys.readouterr().out
    assert b"stays: 000000" in store.read_bytes("report/duplicates.html")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["neighbours"], "declip look has no command 'neighbours'. Did you mean 'neighbors'?"),
        (["neighbors", "--samples", "0"], "--samples is 0; it must lie between 1 and 200: every"),
        (["neighbors", "--seed", "-1"], "--seed is -1; it must be 0 or more."),
        (["neighbors", "--sampels", "3"], "there is no option --sampels. Did you mean '--samples'"),
        (
            ["neighbors", "--name", "caption"],
            "--name is 'caption', which is not in neighbors/.",
        ),
        (["filter"], "--name is 'default', which is not in selection/. Run the step"),
    ],
)
def test_faults_are_told_in_one_sentence(store, arguments, sentence):
    if arguments[0] in PAGES:
        arguments = [arguments[0], "--out", store.url, *arguments[1:]]
    with pytest.raises(DeclipError) as caught:
        main(arguments)
    assert str(caught.value).startswith(sentence)


def test_a_folder_without_shards_is_told(tmp_path):
    with pytest.raises(DeclipError, match="there is no complete shard under"):
        main(["filter", "--out", str(tmp_path)])


def test_as_many_samples_as_one_file_holds():
    assert MAX_SAMPLES == 200
