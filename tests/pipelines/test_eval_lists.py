import pytest

from declip_shards import DeclipError
from pipelines.eval_lists import lines_of, model_specs, one_a_dataset


def test_models_come_as_pairs_products_and_lists(tmp_path):
    assert model_specs(["a", "a", "b"], None, None) == ("a", "b")
    product = model_specs(["A", "B"], ["x", "y"], None)
    assert product == tuple(f"open_clip:{m}/{w}" for m in "AB" for w in "xy")
    path = tmp_path / "models.txt"
    path.write_text("# ours\nA,x\n\nruns/mine\n")
    assert model_specs(None, None, [str(path), "B,y"]) == (
        "open_clip:A/x",
        "runs/mine",
        "open_clip:B/y",
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((None, None, None), "there is no model"),
        ((["a"], None, ["A,x"]), "leave those out"),
        ((None, None, ["A,"]), "write it MODEL,PRETRAINED"),
        ((["open_clip:A/x"], ["y"], None), "has its weights already"),
    ],
)
def test_models_that_cannot_be_told_are_refused(arguments, sentence):
    with pytest.raises(DeclipError) as error:
        model_specs(*arguments)
    assert sentence in str(error.value)


def test_an_empty_list_of_models_is_refused(tmp_path):
    (tmp_path / "models.txt").write_text("# none\n")
    with pytest.raises(DeclipError, match="empty list"):
        model_specs(None, None, [str(tmp_path / "models.txt")])


def test_one_value_is_for_all_datasets_and_as_many_are_for_each():
    assert one_a_dataset((), 2, "--val-split") == [None, None]
    assert one_a_dataset(("a",), 2, "--val-split") == ["a", "a"]
    assert one_a_dataset(("a", "b"), 2, "--val-split") == ["a", "b"]
    with pytest.raises(DeclipError, match="3 values for 2 datasets"):
        one_a_dataset("abc", 2, "--val-split")


def test_a_list_leaves_out_remarks_and_refuses_what_is_no_text(tmp_path):
    path = tmp_path / "sets.txt"
    path.write_text("# all\n\n cifar10 \npets\n")
    assert lines_of(str(path), "--dataset") == ["cifar10", "pets"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DeclipError, match="no text in UTF-8"):
        lines_of(str(path), "--dataset")
