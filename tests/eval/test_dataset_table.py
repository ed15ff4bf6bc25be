"""The table of datasets agrees with itself, with Table 9 of CLIP and with open_clip's lists."""

from __future__ import annotations

import csv
import importlib.util
import runpy
import shutil
from pathlib import Path

import pytest

from declip_eval import dataset_table
from declip_eval.dataset_table import (
    TABLES,
    DatasetInfo,
    expand_names,
    find_dataset,
    get_suite,
    list_datasets,
    list_suites,
    metric_value,
)
from declip_eval.templates import OPENAI_7, check_templates

TABLE_9 = """
food101 75750 25250 acc1
cifar10 50000 10000 acc1
cifar100 50000 10000 acc1
birdsnap 42283 2149 acc1
sun397 19850 19850 acc1
cars 8144 8041 acc1
fgvc_aircraft 6667 3333 mean_per_class_recall
voc2007_multilabel 5011 4952 mean_average_precision_11
dtd 3760 1880 acc1
pets 3680 3669 mean_per_class_recall
caltech101 3060 6085 mean_per_class_recall
flowers 2040 6149 mean_per_class_recall
mnist 60000 10000 acc1
fer2013 32140 3574 acc1
stl10 1000 8000 acc1
eurosat 10000 5000 acc1
resisc45 3150 25200 acc1
gtsrb 26640 12630 acc1
kitti_closest_vehicle_distance 6770 711 acc1
country211 43200 21100 acc1
pcam 294912 32768 acc1
ucf101 9537 1794 acc1
kinetics700 494801 31669 mean_acc1_acc5
clevr_count_all 2000 500 acc1
hateful_memes 8500 500 roc_auc
renderedsst2 7792 1821 acc1
imagenet1k 1281167 50000 acc1
"""
"""CLIP (arXiv 2103.00020), Table 9: name, training and test images, metric."""


def _counts(text: str) -> dict[str, int]:
    words = text.split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


# Table 9 prints 102 classes for Food-101 and 8 for FER2013: the lists have 101 and 7.
NUM_CLASSES = _counts("""
food101 101 cifar10 10 cifar100 100 birdsnap 500 sun397 397 cars 196 fgvc_aircraft 100
voc2007_multilabel 20 dtd 47 pets 37 caltech101 102 flowers 102 mnist 10 fer2013 7 stl10 10
eurosat 10 resisc45 45 gtsrb 43 kitti_closest_vehicle_distance 4 country211 211 pcam 2 ucf101 101
kinetics700 700 clevr_count_all 8 hateful_memes 2 renderedsst2 2 imagenet1k 1000 imagenetv2 1000
imagenet_sketch 1000 objectnet 113 imagenet-r 200 imagenet-a 200 cub 200
""")

NUM_TEMPLATES = _counts("""
food101 1 cifar10 18 cifar100 18 birdsnap 1 sun397 2 cars 8 fgvc_aircraft 2 voc2007_multilabel 1
dtd 8 pets 1 caltech101 34 flowers 1 mnist 1 fer2013 6 stl10 2 eurosat 3 resisc45 18 gtsrb 3
kitti_closest_vehicle_distance 1 country211 5 pcam 1 ucf101 48 kinetics700 28 clevr_count_all 1
hateful_memes 1 renderedsst2 1 imagenet1k 80
""")

WITH_TWINS = {"imagenet1k", "imagenetv2", "imagenet_sketch"}
"""missile and sunglasses name two classes each in OpenAI's list."""


def _info(name: str) -> DatasetInfo:
    info = find_dataset(name)
    assert info is not None
    return info


@pytest.mark.parametrize("name", list_datasets())
def test_every_row_and_its_lists_fit_together(name):
    info = _info(name)
    assert info.name == name
    assert info.title
    assert info.how_to_get.endswith(".")
    assert info.license
    assert info.num_test > 0
    assert (info.num_val or 0) < (info.num_train or 1)
    if info.kind == "retrieval":
        assert info.num_classes is None
        assert not info.class_names
        assert not info.templates
        return
    assert check_templates(info.templates) == info.templates
    assert len(set(info.templates)) == len(info.templates)
    rows = len(info.class_names) if info.candidates is None else len(info.candidates)
    assert rows == info.num_classes
    assert len(info.label_names) in (0, info.num_classes)
    first = [names[0] for names in info.class_names]
    assert len(first) - len(set(first)) == (2 if name in WITH_TWINS else 0)
    every = [text for names in (*info.class_names, *info.label_names) for text in names]
    assert all(text and text == text.strip() and "|" not in text for text in every)
    labels = [names[0] for names in info.label_names]
    assert len(set(labels)) == len(labels)


def test_sizes_and_metrics_are_those_of_table_9():
    rows = [line.split() for line in TABLE_9.split("\n") if line]
    assert tuple(row[0] for row in rows) == get_suite("clip27")
    for name, train, test, metric in rows:
        info = _info(name)
        assert (info.num_train, info.num_test, info.metric) == (int(train), int(test), metric), name


@pytest.mark.parametrize("name", NUM_CLASSES)
def test_counts_of_classes(name):
    assert _info(name).num_classes == NUM_CLASSES[name]


@pytest.mark.parametrize("name", NUM_TEMPLATES)
def test_counts_of_templates(name):
    assert len(_info(name).templates) == NUM_TEMPLATES[name]


def test_every_file_is_some_dataset_s_and_is_read():
    with (TABLES / "datasets.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for folder, column in (
        ("class_names", "class_names"),
        ("label_names", "label_names"),
        ("prompts", "prompts"),
        ("imagenet_subsets", "imagenet_subset"),
    ):
        named = {row[column] for row in rows} - {""}
        written = {path.stem for path in (TABLES / folder).iterdir()}
        assert written == {name for name in named if not name[0].isdigit()}, folder


def test_imagenet_s_names_and_templates_are_open_clip_s():
    # Read by its path: importing the package needs torchvision, which is not needed here.
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    lists = runpy.run_path(str(Path(package.origin).with_name("zero_shot_metadata.py")))
    info = _info("imagenet1k")
    assert [names for (names,) in info.class_names] == list(lists["IMAGENET_CLASSNAMES"])
    assert [template.format("x") for template in info.templates] == [
        template("x") for template in lists["OPENAI_IMAGENET_TEMPLATES"]
    ]
    assert set(OPENAI_7) <= set(info.templates)


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_a_part_of_imagenet_has_its_rows(name):
    whole, part = _info("imagenet1k"), _info(name)
    assert part.imagenet_rows is not None
    assert list(part.imagenet_rows) == sorted(set(part.imagenet_rows))
    for row, names, labels in zip(
        part.imagenet_rows, part.class_names, part.label_names, strict=True
    ):
        assert names == whole.class_names[row]
        assert labels == whole.label_names[row]


def test_wordnet_ids_are_in_order():
    labels = [names for (names,) in _info("imagenet_sketch").label_names]
    assert labels == sorted(set(labels))
    assert all(len(label) == 9 and label[0] == "n" and label[1:].isdigit() for label in labels)


def test_objectnet_maps_each_class_to_imagenet_s():
    whole, info = _info("imagenet1k"), _info("objectnet")
    assert info.imagenet_rows is not None
    assert info.candidates is not None
    assert [whole.class_names[row] for row in info.imagenet_rows] == list(info.class_names)
    used = [row for rows in info.candidates for row in rows]
    assert sorted(used) == list(range(len(info.class_names)))  # each row counts, once
    by_folder = {
        labels[0]: {info.class_names[row][0] for row in rows}
        for labels, rows in zip(info.label_names, info.candidates, strict=True)
    }
    assert list(by_folder) == sorted(by_folder)
    assert by_folder["banana"] == {"banana"}
    assert by_folder["chair"] == {"barber chair", "folding chair", "rocking chair"}
    assert by_folder["bicycle"] == {"mountain bike", "tandem bicycle"}
    own = _info("objectnet_own_names")
    assert own.label_names == info.label_names
    assert own.candidates is None


def test_numbers_stand_for_themselves_as_label_names():
    assert _info("imagenetv2").label_names[10] == ("10",)
    assert _info("gtsrb").label_names[7] == ("00007",)


def test_fer2013_has_several_names_a_class():
    names = dict(zip(_info("fer2013").label_names, _info("fer2013").class_names))
    assert names[("surprise",)] == ("surprised", "shocked", "spooked")
    assert names[("angry",)] == ("angry",)


def test_country_codes_are_in_order():
    codes = [names[0] for names in _info("country211").label_names]
    assert codes == sorted(set(codes))
    assert all(len(code) == 2 and code.isupper() for code in codes)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("wds/imagenet1k", "imagenet1k"),
        ("ImageNet", "imagenet1k"),
        ("wds/vtab/pets", "pets"),
        ("vtab/eurosat", "eurosat"),
        ("clip-benchmark/wds_vtab-flowers", "flowers"),
        ("CIFAR-10", "cifar10"),
        ("imagenet_a", "imagenet-a"),
        ("StanfordCars", "cars"),
        ("FGVC Aircraft", "fgvc_aircraft"),
        ("mscoco", "mscoco_captions"),
    ],
)
def test_other_spellings_are_understood(spelling, name):
    assert _info(spelling).name == name
    assert expand_names([spelling]) == [name]


@pytest.mark.parametrize("spelling", ["", "wds/", "mine", "voc2007"])
def test_what_the_table_does_not_know_is_none(spelling):
    assert find_dataset(spelling) is None


def test_suites():
    sizes = {name: len(get_suite(name)) for name in list_suites()}
    assert sizes == {
        "kornblith12": 12,
        "declip11": 11,
        "clip27": 27,
        "slip26": 26,
        "imagenet_robustness5": 5,
        "retrieval2": 2,
        "all": len(list_datasets()),
    }
    for name in list_suites():
        assert set(get_suite(name)) <= set(list_datasets())
        assert len(set(get_suite(name))) == len(get_suite(name))
    clip27, slip26 = set(get_suite("clip27")), set(get_suite("slip26"))
    assert set(get_suite("kornblith12")) < clip27
    assert set(get_suite("declip11")) < clip27
    assert clip27 - slip26 == {"birdsnap", "voc2007_multilabel"}
    assert slip26 - clip27 == {"cub"}


def test_expansion_keeps_order_and_drops_repeats():
    assert expand_names(["wds/cifar10, retrieval2", "CIFAR-10", "mnist"]) == [
        "cifar10",
        "mscoco_captions",
        "flickr30k",
        "mnist",
    ]
    assert expand_names("retrieval2") == list(get_suite("retrieval2"))
    assert expand_names(["all"]) == list(list_datasets())
    assert expand_names(expand_names(["clip27"])) == expand_names(["clip27"])


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["cifr10"], "There is no dataset or suite 'cifr10': did you mean 'cifar10'?"),
        (["wds/imagnet"], "There is no dataset or suite 'wds/imagnet': did you mean 'imagenet1k'?"),
        (["clip72"], "There is no dataset or suite 'clip72': did you mean 'clip27'?"),
        (["qqq"], "There is no dataset or suite 'qqq': known are food101, "),
        ([], "No dataset is named: give names such as cifar10, or a suite such as kornblith12"),
        ([" , "], "No dataset is named"),
    ],
)
def test_misspelled_names_are_refused(names, sentence):
    with pytest.raises(ValueError) as caught:
        expand_names(names)
    assert str(caught.value).startswith(sentence)


def test_a_misspelled_suite_is_refused():
    with pytest.raises(ValueError, match=r"There is no suite 'kornblith': did you mean 'kornbl"):
        get_suite("kornblith")


def test_known_sizes_of_splits():
    voc = _info("voc2007_multilabel")
    assert voc.known_sizes("train") == (5011, 2501)
    assert voc.known_sizes("trainval") == (5011,)
    assert voc.known_sizes("validation") == voc.known_sizes("val") == (2510,)
    assert _info("eurosat").known_sizes("test") == (5000, 5400)
    assert _info("hateful_memes").known_sizes("dev") == (500,)
    assert _info("imagenetv2").known_sizes("train") == ()
    assert _info("cifar10").known_sizes("extra") == ()
    imagenet = _info("imagenet1k")
    assert {imagenet.known_sizes(split) for split in ("test", "val", "validation")} == {(50000,)}
    assert imagenet.is_tested("valid")
    assert not _info("eurosat").is_tested("val")


@pytest.mark.parametrize(
    ("name", "metrics", "value"),
    [
        ("cifar10", {"acc1": 0.5, "mean_per_class_recall": 0.4}, 0.5),
        ("pets", {"acc1": 0.5, "mean_per_class_recall": 0.4}, 0.4),
        ("pets", {"lp_acc1": 0.5, "lp_mean_per_class_recall": 0.4}, 0.4),
        ("pets", {"acc1": 0.5}, None),
        ("kinetics700", {"acc1": 0.25, "acc5": 0.75}, 0.5),
        ("kinetics700", {"lp_acc1": 0.25, "lp_acc5": 0.75}, 0.5),
        ("kinetics700", {"acc1": 0.25, "acc5": 0.75, "mean_acc1_acc5": 0.5}, 0.5),
        ("kinetics700", {"acc1": 0.25, "lp_acc5": 0.75}, None),
        ("voc2007_multilabel", {"mean_average_precision": 0.9}, None),
        ("flickr30k", {"image_retrieval_recall@1": 0.0}, 0.0),
    ],
)
def test_the_published_metric(name, metrics, value):
    assert metric_value(_info(name), metrics) == value


def _forget() -> None:
    for cached in ("_rows", "_suites", "_alias_index", "_load"):
        getattr(dataset_table, cached).cache_clear()


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A copy of the data files that may be spoiled."""
    folder = tmp_path / "tables"
    shutil.copytree(TABLES, folder)
    monkeypatch.setattr(dataset_table, "TABLES", folder)
    _forget()
    yield folder
    _forget()


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        (
            "class_names/cifar10.txt",
            "frog\n",
            "",
            "datasets.csv, cifar10: num_classes is 10, but its list has 9 names of classes",
        ),
        (
            "prompts/cifar10.txt",
            "a photo of a {}.",
            "a photo.",
            "prompts of cifar10: 'a photo.' needs exactly one {}",
        ),
        (
            "datasets.csv",
            "cifar10,CIFAR-10,classification",
            "cifar10,CIFAR-10,classes",
            "datasets.csv, cifar10: kind is 'classes', but must be one of classification, multi",
        ),
        (
            "datasets.csv",
            "cifar100,CIFAR-100",
            "cifar-10,CIFAR-100",
            "datasets.csv gives the name 'cifar-10' to both cifar10 and cifar-10",
        ),
    ],
)
def test_a_spoiled_table_is_refused(tables, file, old, new, sentence):
    _replace(tables / file, old, new)
    with pytest.raises(ValueError) as caught:
        find_dataset("cifar10")
    assert str(caught.value).startswith(sentence)
