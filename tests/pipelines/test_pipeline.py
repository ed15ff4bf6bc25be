"""Which pipelines can be, and which steps a command line chooses."""

import dataclasses

import pytest
import toy_stages
from toy_stages import MakeNumbers, SumNumbers

import declip_eval
import declip_shards
from declip_shards import DeclipError
from pipelines.pipeline import Pipeline, Step
from pipelines.report import WriteReport

NAMES = ["one", "two", "three", "four"]


def step(name, *reads):
    return Step(name=name, stage=MakeNumbers(root="x"), reads=reads)


def chain():
    """Four steps, each reading the one before it."""
    steps = [step(name, *NAMES[max(0, n - 1) : n]) for n, name in enumerate(NAMES)]
    return Pipeline(recipe="toy", root="x", steps=steps)


def chosen(**choice):
    return [step.name for step in chain().choose(**choice)]


def test_steps_keep_their_order():
    assert chain().names() == NAMES
    assert [chain().step(name).name for name in NAMES] == NAMES
    assert Pipeline(recipe="toy", root="x").names() == []


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([step("a", "b"), step("b")], "step 'a' reads 'b', which is not before it"),
        ([step("a"), step("b", "a", "c")], "step 'b' reads 'c', which is not before it"),
        ([step("a", "a")], "step 'a' reads 'a', which is not before it"),
        ([step("a"), step("b"), step("a")], "two steps are called 'a'"),
    ],
)
def test_a_step_reads_only_what_is_before_it_and_has_its_own_name(steps, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        Pipeline(recipe="toy", root="x", steps=steps)


def test_settings_are_those_of_a_step_there_is():
    stray = dataclasses.replace(step("a"), settings_of="b")
    with pytest.raises(ValueError, match=r"^step 'a' has the settings of 'b', which is no step$"):
        Pipeline(recipe="toy", root="x", steps=[stray])


def test_both_ends_are_included():
    assert chosen() == NAMES
    for first in range(4):
        assert chosen(first=NAMES[first]) == NAMES[first:]
        assert chosen(until=NAMES[first]) == NAMES[: first + 1]
        assert chosen(only=NAMES[first]) == [NAMES[first]]
        for until in range(first, 4):
            between = chosen(first=NAMES[first], until=NAMES[until])
            assert between == NAMES[first : until + 1]


def test_an_empty_range_is_refused():
    for first in range(1, 4):
        with pytest.raises(DeclipError, match=f"--from {NAMES[first]} comes after --until one; s"):
            chosen(first=NAMES[first], until="one")


@pytest.mark.parametrize("others", [{"first": "one"}, {"until": "four"}])
def test_only_stands_alone(others):
    with pytest.raises(DeclipError, match=r"--only names one stage; leave out --from and --until"):
        chosen(only="two", **others)


@pytest.mark.parametrize("choice", ["only", "first", "until"])
def test_a_misspelt_name_gets_the_nearest_one_whatever_it_is_for(choice):
    with pytest.raises(
        DeclipError, match=r"recipe 'toy' has no stage 'thre'\. Did you mean 'three'\? Known: four"
    ):
        chosen(**{choice: "thre"})


def test_the_code_version_is_of_the_package_that_has_the_stage(monkeypatch):
    one, other = step("a"), Step(name="b", stage=SumNumbers(root="x"))
    before = one.code_version
    assert other.code_version == before
    monkeypatch.setattr(toy_stages, "__version__", "2")
    assert one.code_version != before
    assert one.code_version == other.code_version


def test_the_code_version_is_of_what_the_stage_is_built_on_too(monkeypatch):
    toy, report = step("a"), Step(name="report", stage=WriteReport(root="x"))
    versions = toy.code_version, report.code_version
    monkeypatch.setattr(declip_eval, "__version__", "999", raising=False)
    assert toy.code_version == versions[0]
    assert report.code_version != versions[1]
    monkeypatch.setattr(declip_shards, "__version__", "999", raising=False)
    assert toy.code_version != versions[0]
