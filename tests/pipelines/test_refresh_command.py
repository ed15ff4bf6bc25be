"""``declip refresh``: what is told, listed and put into use."""

import pyarrow as pa
import pytest

from declip_shards import DeclipError, Store, layout, neighbor_tables, read_samples, sidecars
from declip_shards.fakes import write_fake_dataset
from declip_shards.manifest import canonical_json
from pipelines.refresh import Outcome
from pipelines.refresh_command import listing, main, summary

FIGURES = {
    "num_rows": 1200,
    "fraction_with_neighbor": 0.875,
    "fraction_useful": 0.5,
    "useful_score": 0.5,
}
CHANGE = {"num_rows": 1200, "num_changed": 1100, "num_new_neighbors": 4321}


def write_version(store, folder, number, **record):
    description = {"format_version": 1, "name": folder, "encoder": f"by {folder}"}
    store.write_bytes(neighbor_tables.description_path(folder), canonical_json(description))
    content = {"format_version": 1, "number": number, "figures": FIGURES, "run": "", "step": None}
    store.write_bytes(neighbor_tables.version_path(folder), canonical_json(content | record))


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path))
    description = {"format_version": 1, "name": "captions", "encoder": "sentence:minilm"}
    store.write_bytes(neighbor_tables.description_path("captions"), canonical_json(description))
    write_version(store, "captions@aa", 2, step=1500, run="cafe")
    write_version(store, "captions@bb", 1)
    return store


def test_tables_are_listed_oldest_first_with_a_mark_at_the_one_in_use(store, capsys):
    assert main(["--out", store.url, "--use", "captions@aa"]) == 0
    assert main(["--out", store.url, "--list"]) == 0
    told = capsys.readouterr().out
    assert listing(store, "captions") in told
    rows = [line.split() for line in listing(store, "captions").splitlines()]
    assert rows[1:] == [
        ["captions", "sentence:minilm", "-", "-", "-"],
        ["captions@bb", "by", "captions@bb", "-", "87.5%", "50.0%"],
        ["*", "captions@aa", "by", "captions@aa", "1500", "87.5%", "50.0%"],
    ]


def test_the_list_tells_the_share_with_a_useful_neighbor_of_the_pipelines_table(tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=1, samples_per_shard=4)
    keys = [sample.key for sample in read_samples(store, "00000")]
    scores = [[0.9], [0.4], [], [0.5]]
    columns = {"key": keys, "neighbor_keys": [keys[:1] * len(s) for s in scores], "scores": scores}
    sidecars.write_table(store, layout.neighbors_path("captions", "00000"), pa.table(columns))
    description = {"format_version": 1, "name": "captions", "encoder": "sentence:minilm"}
    store.write_bytes(neighbor_tables.description_path("captions"), canonical_json(description))
    row = listing(store, "captions").splitlines()[1].split()
    assert row == ["*", "captions", "sentence:minilm", "-", "75.0%", "50.0%"]


def test_the_pipelines_table_can_be_put_into_use_again(store):
    main(["--out", store.url, "--use", "captions@aa"])
    main(["--out", store.url, "--use", "captions"])
    assert neighbor_tables.resolve_table(store, "captions").folder == "captions"
    with pytest.raises(DeclipError, match=r"--use is 'captions@ab'. Did you mean 'captions@"):
        main(["--out", store.url, "--use", "captions@ab"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], r"give one of --encoder, --use and --list"),
        (["--list", "--encoder", "sentence:x"], r"give one of --encoder, --use and --list"),
        (["--encoder", "sentence:x", "--runner", "rai"], r"--runner is 'rai'. Did you mean 'ray'"),
        (["--encodr", "sentence:x"], r"there is no option --encodr. Did you mean '--encoder'"),
        (["--encoder", "sentence", "--runner", "local"], r"it must be KIND:MODEL"),
    ],
)
def test_wrong_options_are_refused(store, options, sentence):
    with pytest.raises(DeclipError, match=sentence):
        main(["--out", store.url, *options])


def test_the_summary_says_what_was_made_and_how_it_differs():
    record = {
        "encoder": "checkpoint:train/exports/cafe/step_00001500",
        "figures": FIGURES,
        "change": CHANGE,
        "before": "captions",
    }
    made = Outcome(folder="captions@aa", record=record, is_new=True, removed=["captions@bb"])
    text = summary(made)
    for part in (
        "captions@aa: in use now, by checkpoint:train/exports/cafe/step_00001500",
        "1,200 samples, 87.5% with a neighbor, 50.0% with one of cosine 0.5 or more",
        "1,100 lists are other ones than in captions, with 4,321 new neighbors",
        "removed: captions@bb",
    ):
        assert part in text
    again = Outcome(folder="captions@aa", record=record, is_new=False, removed=[])
    assert "in use already" in summary(again)
