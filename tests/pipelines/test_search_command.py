"""``declip search`` finds what brute force finds, and says what it cannot read."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "filter"))

from hashing_encoder import HashingEncoder
from stage_runs import HASHING, run_stage

from declip_filter import BuildIndex, EmbedPairs
from declip_filter.index_files import info_path
from declip_shards import DeclipError, Store, layout, read_samples
from declip_shards.fakes import write_fake_dataset
from pipelines.search_command import PAGE, find, main, open_index, query_vector

FACTORY = ["--encoder-factory", HASHING["encoder_factory"]]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    """Two shards, embedded on both sides, with an index of each and one of both."""
    root = str(tmp_path_factory.mktemp("search"))
    write_fake_dataset(root, num_shards=2, samples_per_shard=30)
    run_stage(EmbedPairs(root=root, selection="", images=True, **HASHING))
    for name, kind in (("captions", "text_emb"), ("pictures", "img_emb"), ("pairs", "both")):
        run_stage(BuildIndex(root=root, name=name, kind=kind))
    return root


def captions_of(root: str) -> dict[str, str]:
    store = Store(root)
    return {s.key: s.caption for n in layout.list_shards(store) for s in read_samples(store, n)}


def test_a_text_finds_the_captions_nearest_to_it(root, capsys):
    captions = captions_of(root)
    ((text, count),) = Counter(captions.values()).most_common(1)
    assert main(["captions", text, "--out", root, "-k", str(count), *FACTORY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == count + 2
    for number, line in enumerate(lines[1:-1], 1):
        place, score, key = line.split()[:3]
        assert place == f"{number}."
        assert float(score) == pytest.approx(1, abs=1e-3)
        assert captions[key] == text
        assert "http" in line
    page = Store(root).read_bytes(PAGE).decode()
    assert lines[-1].endswith(PAGE)
    assert page.count("data:image") == count
    assert f"Search: {text}" in page


@pytest.mark.parametrize("index", ["captions", "pictures", "pairs"])
def test_hits_and_scores_are_those_of_brute_force(root, index):
    store = Store(root)
    loaded = open_index(store, index)
    encoder = HashingEncoder(64)
    rows = {
        kind: np.concatenate(
            [np.load(file) for file in sorted(Path(root, "embeddings/text", kind).iterdir())]
        )
        for kind in ("text_emb", "img_emb")
    }
    vector = query_vector(encoder, loaded, text="a red cross", picture=None)
    query = encoder.encode_text(["a red cross"])[0]
    sides = {"captions": ("text_emb",), "pictures": ("img_emb",), "pairs": ("text_emb", "img_emb")}
    cosines = [rows[kind].astype(np.float32) @ query for kind in sides[index]]
    wanted = np.mean(cosines, axis=0)
    hits = find(store, loaded, vector, 1000)
    assert len(hits) == len(wanted) == 60
    assert [hit.score for hit in hits] == pytest.approx(sorted(wanted)[::-1], abs=2e-3)
    by_key = dict(zip(loaded.keys.tolist(), wanted, strict=True))
    assert all(hit.score == pytest.approx(by_key[hit.key], abs=2e-3) for hit in hits)
    assert {hit.key: hit.caption for hit in hits} == captions_of(root)


def test_a_picture_finds_itself_and_is_on_the_page(root, tmp_path, capsys):
    sample = next(iter(read_samples(Store(root), "00001")))
    file = tmp_path / "query.jpg"
    file.write_bytes(sample.image)
    assert main(["pictures", "--image", str(file), "--out", root, "-k", "3", *FACTORY]) == 0
    first = capsys.readouterr().out.splitlines()[1].split()
    assert first[2] == sample.key
    assert float(first[1]) == pytest.approx(1, abs=1e-3)
    page = Store(root).read_bytes(PAGE).decode()
    assert page.count("data:image") == 4
    assert "Looked for" in page


def test_an_index_that_was_handed_on_without_its_shards_is_searched(root, tmp_path, capsys):
    copy = tmp_path / "served"
    shutil.copytree(Path(root, "index"), copy / "index")
    assert main(["captions", "a red cross", "--out", str(copy), "-k", "2", *FACTORY]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_without_a_page_nothing_is_written(root, capsys):
    store = Store(root)
    store.remove(PAGE)
    main(["captions", "blue", "--out", root, "--no-page", *FACTORY])
    assert not store.exists(PAGE)
    assert "Page" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["caption", "x"], r"has no index 'caption'. Did you mean 'captions'"),
        (["captions"], r"give either a TEXT or --image FILE"),
        (["captions", "x", "--image", "y"], r"give either a TEXT or --image FILE"),
        (["captions", "  "], r"TEXT is empty"),
        (["captions", "x", "-k", "0"], r"-k is 0; it must be at least 1"),
        (["captions", "--image", "/nowhere.jpg"], r"--image is '/nowhere.jpg'"),
        (["captions", "x", "--imag", "y"], r"there is no option --imag"),
    ],
)
def test_wrong_questions_are_refused(root, arguments, sentence):
    with pytest.raises(DeclipError, match=sentence):
        main([*arguments, "--out", root, *FACTORY])


def test_an_encoder_that_cannot_read_the_query_or_has_changed_is_told(root, tmp_path):
    text_only = ["--encoder-factory", "hashing_encoder:make_text_only"]
    file = tmp_path / "query.jpg"
    file.write_bytes(b"no picture")
    with pytest.raises(DeclipError, match=r"which does not read pictures; search for a TEXT inst"):
        main(["captions", "--image", str(file), "--out", root, *text_only])
    with pytest.raises(DeclipError, match=r"--image cannot be read as a picture"):
        main(["captions", "--image", str(file), "--out", root, *FACTORY])
    salted = ["--encoder-factory", "hashing_encoder:make_salted"]
    with pytest.raises(DeclipError, match=r"(other weights now|of encoder)"):
        main(["captions", "x", "--out", root, *salted])


def test_a_picture_that_an_encoder_refuses_in_its_own_words_is_told_as_the_option(root):
    def refuse(images):
        raise DeclipError("an image cannot be decoded: cut off.")

    encoder = HashingEncoder(64)
    encoder.encode_image = refuse
    loaded = open_index(Store(root), "pictures")
    with pytest.raises(
        DeclipError, match=r"^--image cannot .*\(an image .*: cut off\); name a pict"
    ):
        query_vector(encoder, loaded, text=None, picture=b"cut")


def test_an_empty_folder_has_no_index(tmp_path):
    with pytest.raises(DeclipError, match=r"There is none; run the index stage first"):
        main(["captions", "x", "--out", str(tmp_path)])


def test_scores_of_codes_are_called_so(root, capsys):
    store = Store(root)
    run_stage(BuildIndex(root=root, name="codes", index_key="SQ8", recall_target=0))
    assert json.loads(store.read_bytes(info_path("codes")))["index_key"] == "SQ8"
    main(["codes", "a red cross", "--out", root, "--no-page", *FACTORY])
    assert "Scores are of the codes" in capsys.readouterr().out
    main(["captions", "a red cross", "--out", root, "--no-page", *FACTORY])
    assert "Scores are of the codes" not in capsys.readouterr().out
