import pytest

from declip_filter.dictionary import Dictionary, Nouns
from declip_shards import DeclipError

english = Dictionary(["en"])

INDEX = """  1 This software and database is being provided to you
  2 under a license, the words of which begin with blanks
a n 7 1 @ 7 2 13658027
apple n 2 4 @ ~ #m %p 2 1 07739125 12633994
dog n 7 5 @ ~ #m #p %p 7 1 02084071 10114209
fire_engine n 1 2 @ ~ 1 0 03345487
goose n 3 3 @ ~ #m 3 1 01855672
"""


@pytest.fixture
def wordnet(tmp_path):
    (tmp_path / "index.noun").write_text(INDEX)
    return str(tmp_path)


@pytest.mark.parametrize(
    "word", ["apple", "Apples", "RUNNING", "Paris", "don't", "dog's", "well-known", "12-sided"]
)
def test_words_in_any_form_and_case(word):
    assert english(word)


@pytest.mark.parametrize("word", ["asdfgh", "qzx", "xvbn-apple", "dscf", "Bahnhofstraße"])
def test_what_is_no_english_word(word):
    assert not english(word)


def test_share_leaves_numbers_out():
    assert english.share(["two", "dogs", "12", "qzxw"]) == pytest.approx(2 / 3)
    assert english.share(["12", "1999"]) is None
    assert english.share([]) is None


def test_a_word_of_any_of_the_languages_counts():
    both = Dictionary(["en", "fr"])
    assert not english("maisons")
    assert both("maisons")
    assert both("houses")
    assert not Dictionary([])("houses")


def test_unknown_languages_are_refused_with_the_nearest():
    with pytest.raises(DeclipError, match=r"dictionary is 'fra', .*Did you mean 'fr'"):
        Dictionary(["fra"])


def test_nouns_in_any_form_but_not_short_words(wordnet):
    nouns = Nouns(wordnet)
    assert nouns.count(["a", "dog", "Dogs", "geese", "ate", "apples", "in", "dog-"]) == 4
    assert nouns.count([]) == 0


def test_the_license_s_lines_are_no_nouns(wordnet):
    assert Nouns(wordnet).count(["this", "software", "database", "license"]) == 0


def test_the_digest_is_the_database_s(wordnet, tmp_path):
    before = Nouns(wordnet).digest
    assert Nouns(wordnet).digest == before
    (tmp_path / "index.noun").write_text(INDEX + "gander n 1 1 @ 1 0 01855476\n")
    assert Nouns(wordnet).digest != before


def test_folders_without_nouns_are_refused(tmp_path):
    with pytest.raises(DeclipError, match=r"index.noun' cannot be read .*or leave it unset"):
        Nouns(str(tmp_path))
    (tmp_path / "index.noun").write_text("something else\n")
    with pytest.raises(DeclipError, match="lists no noun; give the folder of a WordNet"):
        Nouns(str(tmp_path))
