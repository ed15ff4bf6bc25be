"""Template sets are usable as they are, and wrong ones are refused."""

from __future__ import annotations

import pytest

from declip_eval.templates import (
    OPENAI_7,
    TEMPLATE_SETS,
    check_templates,
    fill,
    get_templates,
)


@pytest.mark.parametrize("name", TEMPLATE_SETS)
def test_named_sets_pass_the_check_and_have_no_repeats(name):
    templates = get_templates(name)
    assert check_templates(templates) == templates
    assert len(set(templates)) == len(templates)


def test_openai_7_has_seven():
    assert len(OPENAI_7) == 7


def test_braces_in_a_class_name_mean_themselves():
    assert fill("a {} emoji", "{0} {x}") == "a {0} {x} emoji"


def test_unknown_set_offers_the_nearest_name():
    with pytest.raises(ValueError, match=r"no template set 'simpel': did you mean 'simple'\?"):
        get_templates("simpel")
    with pytest.raises(ValueError, match="choose from openai_7, simple"):
        get_templates("zzz")


def test_wrong_templates_are_refused():
    with pytest.raises(ValueError, match=r"'a photo' has 0 places .* needs exactly one"):
        check_templates(["a photo"])
    with pytest.raises(ValueError, match="has 2 places"):
        check_templates(["{} and {}"])
    with pytest.raises(ValueError, match="templates is empty"):
        check_templates([])
    with pytest.raises(ValueError, match=r"is the single string 'a \{\}', but a list"):
        check_templates("a {}")
