"""The table of methods against the papers' and the released configurations' figures."""

import pytest

from declip_shards import DeclipError
from declip_train.methods import METHODS, TERMS, WEIGHTINGS, get_method, method_terms

# CLIP-Benchmark (arXiv 2203.05796), figure 1.
LOSSES = {
    "clip": {"contrastive"},
    "slip": {"contrastive", "simclr"},
    "filip": {"tokenwise"},
    "declip": {"contrastive", "multi_view", "simsiam", "masked_language_modeling", "neighbor"},
    "defilip": set(TERMS) - {"simclr"},
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_has_the_terms_of_the_figure_under_every_weighting(name):
    for weighting in WEIGHTINGS:
        assert {term for term, _ in method_terms(name, weighting)} == LOSSES[name]
        assert get_method(name).term_names == LOSSES[name]
        assert all(get_method(name).has(term) == (term in LOSSES[name]) for term in TERMS)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_terms_come_in_one_order(name, weighting):
    places = [TERMS.index(term) for term, _ in method_terms(name, weighting)]
    assert places == sorted(places)


def test_the_two_readings_of_the_weights():
    released, paper = (dict(method_terms("declip", weighting)) for weighting in WEIGHTINGS)
    # The released code: 0.1 for each of the four pairs.
    assert [released["contrastive"], released["multi_view"] / 3] == pytest.approx([0.1, 0.1])
    assert (paper["contrastive"], paper["multi_view"]) == (0.4, 0.2)
    for term in ("simsiam", "masked_language_modeling", "neighbor"):
        assert released[term] == paper[term] == 0.2
    for weights in (released, paper):
        assert sum(weights.values()) == pytest.approx(1.2 if weights is paper else 1.0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_defilip_is_declip_and_a_fifth_of_alignment(weighting):
    whole = dict(method_terms("defilip", weighting))
    assert whole.pop("tokenwise") == 0.2
    assert whole == dict(method_terms("declip", weighting))


def test_typos_are_answered_with_the_nearest_name():
    with pytest.raises(DeclipError, match="Did you mean 'defilip'"):
        get_method("defilp")
    with pytest.raises(DeclipError, match="Did you mean 'paper'"):
        method_terms("declip", "papre")
