import pytest
from stage_runs import run_stage

from declip_filter import FilterPairs, MeasureImages, require_selection, selected_keys
from declip_shards import DeclipError, layout, read_samples


def test_every_selected_key_is_in_the_tar(selected_root, store):
    for shard in layout.list_shards(store):
        in_tar = [sample.key for sample in read_samples(store, shard)]
        keys = selected_keys(store, "default", shard)
        assert keys == [key for key in in_tar if key in set(keys)]
        assert selected_keys(store, "", shard) == in_tar
    assert selected_keys(store, "default", "00002") == []


def test_one_kept_sample_anywhere_is_enough(selected_root, store):
    require_selection(store, "default", layout.list_shards(store))
    require_selection(store, "", layout.list_shards(store))


def test_empty_selection_is_refused_with_its_reasons(fake_root, store):
    run_stage(MeasureImages(root=fake_root))
    run_stage(FilterPairs(root=fake_root, name="strict", min_words=50))
    total = sum(len(list(read_samples(store, s))) for s in layout.list_shards(store))
    told = rf"0 samples kept of {total} \(dropped: caption_too_short {total}\); loosen"
    with pytest.raises(DeclipError, match=rf"selection 'strict' has {told}"):
        require_selection(store, "strict", layout.list_shards(store))


def test_missing_selection_is_named(selected_root, store):
    with pytest.raises(DeclipError, match=r"selection/defualt/00000.parquet' is missing; rerun"):
        require_selection(store, "defualt", layout.list_shards(store))
