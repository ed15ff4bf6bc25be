from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stage_runs import HASHING, digests, run_stage

from declip_filter import EmbedPairs, FilterPairs
from declip_filter.embedding_files import read_part, read_vectors
from declip_filter.reference_clusters import ClusterImages
from declip_shards import DeclipError, layout, sidecars


@pytest.fixture
def pictured_root(selected_root):
    """Pictures embedded by their colors; of the third shard no sample is selected."""
    run_stage(EmbedPairs(root=selected_root, name="images", images=True, **HASHING))
    return selected_root


@pytest.fixture
def references(pictured_root, store, tmp_path):
    """A file of reference vectors: one stored picture's, not of unit length."""
    part = read_part(store, "images", "00000")
    vectors, keys = read_vectors(store, "images", "img_emb", part)
    path = tmp_path / "references.npy"
    np.save(path, 3 * vectors[:1].astype(np.float64))
    return str(path), keys[0]


def test_pictures_of_a_referenced_cluster_are_those_near_its_centroid(
    pictured_root, store, references, several_threads
):
    path, key = references
    stage = ClusterImages(root=pictured_root, embeddings="images", references=path, num_clusters=6)
    stats = run_stage(stage)["all"]
    found: dict[str, Any] = {}
    for shard in layout.list_shards(store):
        rows = sidecars.read_rows(store, layout.signals_path("clusters", shard))
        assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
        found |= {row["key"]: row for row in rows}
    assert stats.num_in == len(found)
    near = {row["image_cluster"] for row in found.values() if row["image_cluster_is_referenced"]}
    assert near == {found[key]["image_cluster"]}
    for row in found.values():
        is_embedded = row["image_cluster"] is not None
        expected = row["image_cluster"] in near if is_embedded else None
        assert row["image_cluster_is_referenced"] == expected
    assert stats.extra["clusters"] == 6
    assert stats.extra["clusters_referenced"] == 1
    # Vectors of the third shard were never made.
    assert all(found[k]["image_cluster"] is None for k in found if k.startswith("00002"))
    before = digests(pictured_root, "signals/clusters")
    assert len(before) == 4
    run_stage(stage)
    assert digests(pictured_root, "signals/clusters") == before

    chosen = FilterPairs(
        root=pictured_root,
        name="image_based",
        signals=("basic", "clusters"),
        recipe="datacomp_image",
        keep_splits=(),
    )
    run_stage(chosen)
    reasons = set()
    for shard in layout.list_shards(store):
        for row in sidecars.read_rows(store, layout.selection_path("image_based", shard)):
            reasons.add(row["reason"])
            # What the captions' rules dropped before says nothing of the picture.
            if row["reason"] in ("", "image_off_reference"):
                is_near = bool(found[row["key"]]["image_cluster_is_referenced"])
                assert row["keep"] == is_near
    assert "image_off_reference" in reasons


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_clusters": 0}, "num_clusters is 0; it must be at least 1"),
        ({"references": "no/such.npy"}, "no/such.npy' does not exist"),
        ({"references": "/"}, "references '/' is a folder; name a file in it"),
        ({"name": "a/b"}, "name is 'a/b'"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence):
    with pytest.raises(DeclipError, match=sentence):
        ClusterImages(**settings)


def test_references_of_another_model_are_refused(pictured_root, references, tmp_path):
    path = Path(references[0])
    whole = np.load(path)
    chosen = {"root": pictured_root, "embeddings": "images"}
    with pytest.raises(DeclipError, match=r"references is not set; name a \.npy file"):
        run_stage(ClusterImages(**chosen))
    for made, sentence in (
        (whole[:, 1:], r"is of shape \(1, 63\); it must be \(references, 64\)"),
        (whole * 0, "has a row that is zero or not finite"),
        (whole[:0], r"is of shape \(0, 64\)"),
    ):
        np.save(path, made)
        with pytest.raises(DeclipError, match=sentence):
            run_stage(ClusterImages(**chosen, references=str(path)))
    path.write_bytes(b"no numbers")
    with pytest.raises(DeclipError, match=r"is no \.npy file of numbers"):
        run_stage(ClusterImages(**chosen, references=str(path)))
    for save, made in ((np.savez, whole), (np.save, np.array(["x"]))):
        with path.open("wb") as f:
            save(f, made)
        with pytest.raises(DeclipError, match=r"holds no numbers; save one array"):
            run_stage(ClusterImages(**chosen, references=str(path)))
    np.save(path, whole)
    with pytest.raises(DeclipError, match=r"num_clusters is 999; \d+ vectors of 64 numbers allow"):
        run_stage(ClusterImages(**chosen, references=str(path), num_clusters=999))
