"""``declip sources`` says what a list is and how two overlap, as text and as JSON."""

import json

import pytest

from declip_shards import DeclipError
from pipelines.sources_command import main

ROWS = [
    ("a red apple", "http://a.example/1.jpg"),
    ("", "http://a.example/2.jpg"),
    ("c", "http://b/"),
]


def cc3m(path, rows=ROWS) -> str:
    path.write_text("".join(f"{caption}\t{url}\n" for caption, url in rows))
    return str(path)


def run(capsys, *arguments: str) -> str:
    assert main(arguments) == 0
    return str(capsys.readouterr().out)


def test_show_names_kind_rows_faults_and_published_count(tmp_path, capsys):
    path = cc3m(tmp_path / "l.tsv")
    said = run(capsys, "show", path)
    assert "taken for  cc3m" in said
    assert "rows       3, of which 2 are good" in said
    assert "CC3M validation has 15,840" in said
    assert "dropped    1 missing_caption" in said
    assert "'a red apple'" in said
    found = json.loads(run(capsys, "show", path, "--json", "--rows", "1"))
    assert (found["kind"], found["num_rows"], found["faults"]) == (
        "cc3m",
        3,
        {"missing_caption": 1},
    )
    assert found["first_rows"] == [{"url": ROWS[0][1], "caption": ROWS[0][0]}]
    assert found["columns"] == {"url": "string", "caption": "string"}
    said = run(capsys, "show", path, "--max-rows", "2")
    assert "rows read  2" in said
    assert "published" not in said


def test_diff_counts_both_ways(tmp_path, capsys):
    a, b = cc3m(tmp_path / "a.tsv"), cc3m(tmp_path / "b.tsv", [*ROWS[1:], ("d", "http://d/")])
    found = json.loads(run(capsys, "diff", a, b, "--json"))
    (overlap,) = found["overlaps"]
    counts = {name: overlap[name] for name in overlap if name.startswith("num_")}
    assert counts == {"num_a": 3, "num_b": 3, "num_both": 2, "num_only_a": 1, "num_only_b": 1}
    assert overlap["examples"]["only_b"] == ["d"]
    assert found["a"]["num_rows"] == 3
    said = run(capsys, "diff", a, b)
    assert "url                   3            3            2            1            1" in said
    assert "66.67%" in said
    assert "url only a: a.example/1.jpg" in said


def test_options_reach_the_reader(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("link,words\nhttp://a.example/1.jpg,x\n")
    with pytest.raises(DeclipError, match="name the one that is with url_column"):
        main(["show", str(path)])
    said = run(capsys, "show", str(path), "--url-column", "link", "--caption-column", "words")
    assert "taken for  table" in said
    with pytest.raises(DeclipError, match="was said to be cc12m"):
        main(["show", cc3m(tmp_path / "l.tsv"), "--kind", "cc12m"])


@pytest.mark.parametrize("arguments", [["--rows", "-1"], ["--max-rows", "0"]])
def test_counts_below_one_are_refused(tmp_path, arguments):
    with pytest.raises(DeclipError, match="must be at least"):
        main(["show", cc3m(tmp_path / "l.tsv"), *arguments])


@pytest.mark.parametrize(
    "arguments", [[], ["shw", "x"], ["diff", "x"], ["show", "x", "--kin", "cc3m"]]
)
def test_wrong_usage_is_refused(arguments):
    with pytest.raises(DeclipError, match=r"COMMAND; see|'show'|B; see|'--kind'"):
        main(arguments)


def test_two_columns_of_one_name_are_told_and_not_a_key_error(tmp_path):
    path = tmp_path / "dup.csv"
    path.write_text("url,caption,url\nhttp://a.b/1.jpg,x,y\n")
    with pytest.raises(DeclipError, match=r"2 columns named 'url'.*rename all but one"):
        main(["show", str(path)])
