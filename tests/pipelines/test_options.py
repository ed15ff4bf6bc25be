import dataclasses

import pytest
from test_runner import toy

from declip_shards import DeclipError
from declip_shards.manifest import settings_of
from pipelines import recipes
from pipelines.options import (
    apply_overrides,
    options_of,
    parse_value,
    split_overrides,
    take_overrides,
)
from pipelines.pipeline import Pipeline


def test_every_option_has_a_help_line_and_its_value(tmp_path):
    options = {o.flag: o for o in options_of(toy(tmp_path))}
    assert options["--numbers.count"].help == "Numbers a task writes."
    assert options["--numbers.count"].value == 10
    assert "--numbers.root" not in options
    assert all(o.help for o in options.values())


def test_overrides_reach_the_stage(tmp_path):
    pairs = split_overrides(["--numbers.count", "4", "--sum.factor=0.5", "--numbers.style", "even"])
    changed = apply_overrides(toy(tmp_path), pairs)
    numbers = settings_of(changed.step("numbers").stage, hashed_only=True)
    assert (numbers["count"], numbers["style"]) == (4, "even")
    assert settings_of(changed.step("sum").stage, hashed_only=True) == {"factor": 0.5}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--numbers.cuont", "4"], "no option --numbers.cuont. Did you mean '--numbers.count'"),
        (["--onyl", "sum"], "Did you mean '--only'"),
        (["--numbers.count", "many"], "'many', which is not a whole number"),
        (["--numbers.style", "evn"], "Did you mean 'even'"),
        (["--numbers.count"], "--numbers.count needs a value"),
        (["--dry-rnu"], "no option --dry-rnu. Did you mean '--dry-run'"),
        (["--numbers.count", "0"], "count is 0; it must be at least 1"),
        (["stray"], "'stray' is not an option"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(tmp_path, arguments, sentence):
    with pytest.raises(DeclipError) as error:
        apply_overrides(toy(tmp_path), split_overrides(arguments))
    assert sentence in str(error.value)


def test_a_setting_that_nothing_reads_is_refused_for_who_asks_for_it():
    pipeline = recipes.build("demo", "runs")
    asked = [("--train.method", "clip"), ("--train.bank-size", "70000")]
    with pytest.raises(DeclipError, match=r"--train.bank-size would change nothing: it is read by"):
        apply_overrides(pipeline, asked)
    apply_overrides(pipeline, asked, refuse_unread=False)
    # The recipe's own projector stays where it is, unread.
    changed = apply_overrides(pipeline, asked[:1])
    assert settings_of(changed.step("train").stage, hashed_only=True)["projector_dim"] == 256


def test_values_of_every_kind():
    assert parse_value("none", int | None, "--x") is None
    assert parse_value("3", int | None, "--x") == 3
    assert parse_value("a,b", tuple[str, ...], "--x") == ("a", "b")
    assert parse_value("", tuple[str, ...], "--x") == ()
    assert parse_value("off", bool, "--x") is False
    with pytest.raises(DeclipError, match="true or false"):
        parse_value("maybe", bool, "--x")


def test_settings_may_stand_anywhere_among_the_arguments():
    given = ["run", "--numbers.count", "3", "toy", "--only", "sum", "--sum.factor=2"]
    overrides, others = take_overrides(given)
    assert overrides == [("--numbers.count", "3"), ("--sum.factor", "2")]
    assert others == ["run", "toy", "--only", "sum"]
    with pytest.raises(DeclipError, match=r"--sum.factor needs a value"):
        take_overrides(["run", "toy", "--sum.factor"])


def test_none_empties_a_list():
    assert parse_value("none", tuple[str, ...], "--x") == ()


def with_a_follower(tmp_path):
    """The toy pipeline, before whose numbers comes a step with their settings."""
    steps = list(toy(tmp_path).steps)
    numbers = next(step for step in steps if step.name == "numbers")
    first = dataclasses.replace(numbers, name="first", reads=(), settings_of="numbers")
    return Pipeline(recipe="toy", root=str(tmp_path), steps=[first, *steps])


def test_a_step_with_anothers_settings_follows_it_and_has_no_options_of_its_own(tmp_path):
    pipeline = with_a_follower(tmp_path)
    assert not [o for o in options_of(pipeline) if o.step == "first"]
    changed = apply_overrides(pipeline, [("--numbers.count", "4")])
    assert settings_of(changed.step("first").stage, hashed_only=True)["count"] == 4
    with pytest.raises(DeclipError, match=r"has the settings of stage 'numbers': give --numbers"):
        apply_overrides(pipeline, [("--first.count", "4")])
    with pytest.raises(DeclipError, match=r"there is no --numbers\.cuont either"):
        apply_overrides(pipeline, [("--first.cuont", "4")])
