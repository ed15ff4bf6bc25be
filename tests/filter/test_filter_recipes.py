import math

import pyarrow as pa
import pytest

from declip_filter import filter_recipes
from declip_filter.captions import measure_caption
from declip_filter.evaluation import as_column, evaluate
from declip_filter.expressions import WholeFigure
from declip_filter.filter_recipes import RECIPES, Rule, named_rules, read_recipe, recipe_name
from declip_filter.rules import parse_rule
from declip_shards import DeclipError

DEFAULT = [Rule("caption_empty", "caption_chars == 0")]
GOOD = {
    "original_width": 800,
    "original_height": 600,
    "aspect": 4 / 3,
    "caption_language": "en",
    "caption_dictionary_words": 0.9,
    "caption_nouns": 2,
    "clip_score": 0.33,
    "num_concepts": 1,
    "image_cluster_is_referenced": True,
}
FIGURES = {
    WholeFigure("count", "caption_sha"): lambda column: pa.array([10] * len(column)),
    WholeFigure("top_fraction", "clip_score", 0.3): 0.33,
    WholeFigure("top_fraction", "clip_score", 0.2): 0.34,
    WholeFigure("balanced_out", "", 20_000): lambda c: pa.array([False] * len(c["caption"])),
}


def reasons(recipe, **change):
    """All reasons for which a recipe would drop a good sample with these changes."""
    caption = change.pop("caption", "A red apple lies on the table")
    row = {"caption": caption, **measure_caption(caption), **GOOD, **change}
    columns = {name: as_column(pa.array([value])) for name, value in row.items()}
    found = named_rules(recipe, lambda: DEFAULT)
    return [r.reason for r in found if evaluate(r.parsed, columns, FIGURES)[0].as_py()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_good_sample_passes_every_recipe(recipe):
    assert reasons(recipe) == []


@pytest.mark.parametrize(
    ("recipe", "change", "reason"),
    [
        ("cc3m", {"original_height": 401}, []),
        ("cc3m", {"original_height": 400}, ["image_too_small"]),
        ("cc3m", {"aspect": 2.0}, []),
        ("cc3m", {"aspect": 2.01}, ["image_extreme_aspect"]),
        ("cc3m", {"caption": "Red apples lie on tables"}, ["caption_no_determiner"]),
        ("cc3m", {"caption": "The red apple"}, ["caption_no_preposition"]),
        ("cc3m", {"caption": "a red apple on the table"}, ["caption_not_capitalized"]),
        ("cc3m", {"caption": "The the the cat on the mat"}, ["caption_repetitive"]),
        ("cc3m", {"caption_nouns": 0}, ["caption_no_noun"]),
        ("cc3m", {"caption": "Stock photo of an apple"}, ["caption_boilerplate"]),
        ("cc3m", {"caption_language": "de"}, ["caption_not_english"]),
        ("cc3m", {"caption_language": None}, ["caption_not_english"]),
        ("cc3m", {"caption_dictionary_words": None}, []),
        ("cc3m", {"caption_dictionary_words": 0.4}, ["caption_unknown_words"]),
        ("cc12m", {"aspect": 2.5}, []),
        ("cc12m", {"aspect": 2.6}, ["image_extreme_aspect"]),
        ("cc12m", {"caption": "the red apple"}, []),
        ("cc12m", {"caption": "the apple"}, ["caption_too_short"]),
        ("filip", {"original_width": 199}, ["image_too_small"]),
        ("filip", {"original_width": 200}, []),
        ("filip", {"aspect": 3.1}, ["image_extreme_aspect"]),
        ("filip", {"caption": "IMG_1234.jpg"}, ["caption_is_file_name"]),
        ("yfcc15m_v1", {"caption": "20160716_113957.JPG"}, ["caption_is_file_name"]),
        ("yfcc15m_v1", {"caption": "2016 07 16"}, ["caption_is_digits"]),
        ("yfcc15m_v1", {"caption": "Canon, f/2.8, 1/250 s, ISO 400"}, ["caption_is_exposure"]),
        ("yfcc15m_v1", {"caption": "Fifty half-pints of ale"}, []),
        ("datacomp_basic", {"caption": "two words"}, ["caption_too_short"]),
        ("datacomp_basic", {"caption": "a b c"}, ["caption_too_short"]),
        ("datacomp_basic", {"caption": "a bc d"}, []),
        ("datacomp_basic", {"original_height": 200}, ["image_too_small"]),
        ("datacomp_basic", {"original_height": 201}, []),
        ("datacomp_basic", {"aspect": 3.0}, ["image_extreme_aspect"]),
        ("datacomp_text", {"num_concepts": 0}, ["no_concept"]),
        ("datacomp_image", {"image_cluster_is_referenced": False}, ["image_off_reference"]),
        ("datacomp_image", {"image_cluster_is_referenced": None}, ["image_off_reference"]),
        ("datacomp_clip_threshold", {"clip_score": 0.28}, ["clip_score_low"]),
        ("datacomp_clip_threshold:0.35", {}, ["clip_score_low"]),
        ("datacomp_clip_threshold", {"clip_score": math.nan}, ["clip_score_missing"]),
        ("datacomp_clip_fraction", {"clip_score": 0.32}, ["clip_score_low"]),
        ("datacomp_clip_fraction:0.2", {}, ["clip_score_low"]),
        ("laion2b", {"clip_score": 0.2, "caption_language": "fr"},
         ["caption_not_english", "clip_score_low"]),
        ("metaclip", {"num_concepts": 0}, ["no_concept"]),
        ("default+datacomp_text + datacomp_clip_fraction", {"clip_score": 0.1, "num_concepts": 0},
         ["no_concept", "clip_score_low"]),
    ],
)  # fmt: skip
def test_recipes_drop_what_their_sources_say(recipe, change, reason):
    assert reasons(recipe, **change) == reason


def test_filip_drops_texts_of_more_than_ten():
    figure = WholeFigure("count", "caption_sha")
    rule = next(r for r in filter_recipes.filip() if r.reason == "caption_repeated")
    counts = pa.array([10, 11])
    found = evaluate(rule.parsed, {"caption_sha": counts}, {figure: lambda column: counts})
    assert found.to_pylist() == [False, True]


def test_joined_recipes_have_each_rule_once():
    joined = named_rules("datacomp_basic+datacomp_text+datacomp_basic", lambda: DEFAULT)
    assert len(joined) == len(set(joined)) == 5
    for name, made in RECIPES.items():
        assert made.__doc__, name
        assert "Taken" in made.__doc__
        assert "Differs" in made.__doc__ or "datacomp_clip" in name


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("cc4m", r"recipe is 'cc4m'\. Did you mean 'cc3m'\?.*Or name a file of yours"),
        ("cc3m:3", r"recipe 'cc3m' takes no figure, but '3' is given"),
        ("metaclip:many", r"wants a whole number, not 'many'; write for example metaclip:20000"),
        ("datacomp_clip_fraction:30", "rule 'clip_score_low': a fraction must be .*below 1"),
        ("datacomp_clip_threshold:inf", "wants a number, not 'inf'; write for example"),
        ("none.toml", r"recipe 'none.toml' does not exist"),
        ("cc3m+", r"recipe is ''"),
    ],
)
def test_wrong_names_and_figures_are_refused(recipe, sentence):
    with pytest.raises(DeclipError, match=f"(?s){sentence}"):
        named_rules(recipe, lambda: DEFAULT)


def test_a_file_adds_rules_to_those_it_includes(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        "description = 'mine'\ninclude = ['datacomp_text', 'default']\n"
        "[[rules]]\nreason = 'dull'\ndrop = '''matches(caption, r\"^\\d+$\") or entropy < 3'''\n"
    )
    found = named_rules(f"{path}+datacomp_clip_threshold", lambda: DEFAULT)
    assert [rule.reason for rule in found] == [
        "caption_not_english", "no_concept", "caption_empty", "dull",
        "clip_score_missing", "clip_score_low",
    ]  # fmt: skip
    assert found[3].expression == 'matches(caption, r"^\\d+$") or entropy < 3'


def test_a_rule_over_several_lines_is_the_same_rule(tmp_path):
    path = tmp_path / "mine.toml"
    drop = "\n  matches(caption, '#tag')\n\n    or entropy < 3\n"
    path.write_text(f'[[rules]]\nreason = "dull"\ndrop = """{drop}"""\n')
    (rule,) = read_recipe(str(path), lambda: DEFAULT)
    assert rule == Rule("dull", "matches(caption, '#tag') or entropy < 3")
    assert parse_rule(rule.text) == rule


def test_no_name_of_a_file_is_told():
    assert recipe_name("default + ../mine.toml+metaclip:5") == "default+(file)+metaclip:5"


def test_a_folder_is_no_file_of_rules(tmp_path):
    (tmp_path / "mine.toml").mkdir()
    with pytest.raises(DeclipError, match=r"^recipe .*mine.toml' is a folder; name a file in it"):
        read_recipe(str(tmp_path / "mine.toml"), lambda: DEFAULT)
    with pytest.raises(DeclipError, match=r"^recipe 'nosuch://x.toml' is of a kind that fsspec"):
        read_recipe("nosuch://x.toml", lambda: DEFAULT)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rules = 3", "'include' is a list of names and each rule begins with"),
        ("[rules\n", "is no TOML"),
        ("rule = 1", r"has a key 'rule'\. Did you mean 'rules'"),
        ("", "has no rules"),
        ("[[rules]]\nreason = 'x'\ndorp = 'a'", r"has a key 'dorp'\. Did you mean 'drop'"),
        ("[[rules]]\nreason = 'x'", "needs a text for 'reason' and for 'drop'"),
        ("[[rules]]\nreason = 'A b'\ndrop = 'a < 3'", "a rule's reason is 'A b'; it must be small"),
        ("[[rules]]\nreason = 'x'\ndrop = 'a <'", "rule 'x': not an expression"),
        ("include = ['b.toml']", "only named recipes may be included"),
        ("rules = ['x']", r"each rule begins with \[\[rules\]\]"),
    ],
)
def test_faulty_files_are_refused(tmp_path, text, sentence):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(DeclipError, match=sentence):
        read_recipe(str(path), lambda: DEFAULT)
