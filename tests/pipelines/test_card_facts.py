"""A card's facts agree with the files that they are read off."""

from collections import Counter
from pathlib import Path

import pytest
from run_folder import REASONS, write_run

from declip_shards import DeclipError, Store, layout, sidecars
from pipelines.card_facts import gather_card_facts


def test_pairs_are_counted_by_license_as_downloaded_and_as_trained_on(tmp_path: Path) -> None:
    store = write_run(tmp_path / "run")
    downloaded, trained = Counter[str](), Counter[str]()
    for shard in layout.list_shards(store):
        rows = sidecars.read_rows(store, layout.shard_parquet_path(shard))
        kept = sidecars.read_rows(store, layout.selection_path("default", shard))
        keep = {row["key"] for row in kept if row["keep"]}
        for row in rows:
            if row["status"] == "success":
                downloaded[row["license"] or ""] += 1
                trained[row["license"] or ""] += row["key"] in keep
    counts = {item.column: item for item in gather_card_facts(store).counts}
    assert dict(counts["license"].downloaded) == dict(downloaded)
    assert dict(counts["license"].trained) == dict(trained)
    assert sum(counts["source"].downloaded.values()) == sum(downloaded.values())


def test_splits_of_the_training_are_heeded(tmp_path: Path) -> None:
    everything = gather_card_facts(write_run(tmp_path / "all")).counts[0]
    some = gather_card_facts(write_run(tmp_path / "some", splits=["train"])).counts[0]
    # The fake dataset's last shard is its test split.
    assert sum(some.trained.values()) * 2 == sum(everything.trained.values())
    assert some.downloaded == everything.downloaded


def test_compute_is_read_off_the_log(tmp_path: Path) -> None:
    compute = gather_card_facts(write_run(tmp_path / "run")).compute
    assert (compute.steps, compute.samples_seen) == (15, 300)
    assert compute.seconds == pytest.approx(300 / 50)
    assert (compute.samples_per_second, compute.last_loss) == (50.0, 1.0)


def test_manifests_shards_and_bytes_are_told(tmp_path: Path) -> None:
    store = write_run(tmp_path / "run")
    facts = gather_card_facts(store)
    assert list(facts.manifests) == ["ingest", "filter", "train"]
    assert facts.manifests["filter"].reasons == REASONS
    assert facts.manifest_hashes["filter"] == store.sha256("manifests/filter.json")
    assert (facts.num_shards, facts.num_bytes) == (2, 2000)
    assert facts.seconds == {}


def test_a_run_on_other_peoples_tars_counts_nothing(tmp_path: Path) -> None:
    facts = gather_card_facts(write_run(tmp_path / "run", train_data=["/data/{0..9}.tar"]))
    assert facts.counts == []


def test_faults_are_told(tmp_path: Path) -> None:
    with pytest.raises(DeclipError, match=r"holds no trained model \(train/config.json\)"):
        gather_card_facts(Store(str(tmp_path)))
    store = write_run(tmp_path / "run")
    store.write_bytes("train/config.json", b"{")
    with pytest.raises(DeclipError, match=r"config.json' is not JSON"):
        gather_card_facts(store)
