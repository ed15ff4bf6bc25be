import pytest

from pipelines.eval_summary import (
    SUMMARY,
    Entry,
    exit_status,
    output_folder,
    read_summary,
    samples_text,
    write_summary,
)


def entry(status="done", dataset="pets", task="linear_probe", **more):
    return Entry(model="m", dataset=dataset, task=task, language="en", status=status, **more)


def test_the_reader_inverts_the_writer_and_newer_lines_take_the_place_of_older(tmp_path):
    write_summary(tmp_path, [entry("failed", note="why"), entry(dataset="cars")])
    write_summary(tmp_path, [entry(results=("a.json",), num_samples=3)])
    found = [(e["dataset"], e["status"], e["note"]) for e in read_summary(tmp_path / SUMMARY)]
    assert found == [("cars", "done", ""), ("pets", "done", "")]


def test_a_damaged_line_is_passed_over_and_no_file_is_no_entry(tmp_path):
    assert read_summary(tmp_path / SUMMARY) == []
    write_summary(tmp_path, [entry()])
    with (tmp_path / SUMMARY).open("a") as file:
        file.write("{broken\n[1]\n")
    assert [e["dataset"] for e in read_summary(tmp_path / SUMMARY)] == ["pets"]


@pytest.mark.parametrize(
    ("statuses", "strict", "lenient"),
    [(["done", "kept"], 0, 0), (["done", "missing"], 1, 0), (["done", "failed"], 1, 1)],
)
def test_the_status_is_that_of_the_worst(statuses, strict, lenient):
    entries = [entry(status) for status in statuses]
    assert exit_status(entries, allow_missing=False) == strict
    assert exit_status(entries, allow_missing=True) == lenient


def test_a_templates_folder_is_the_part_without_braces():
    assert str(output_folder("a/b/{dataset}/{task}.json")) == "a/b"
    assert str(output_folder("a")) == "a"


def test_pictures_are_counted_where_the_set_was_opened():
    assert samples_text(entry(num_samples=1200)) == ", 1,200 pictures"
    assert samples_text(entry()) == ""
