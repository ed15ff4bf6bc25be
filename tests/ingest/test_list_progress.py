"""A long list says how far it is, at most once in a while."""

from declip_ingest import list_progress
from declip_ingest.list_progress import ListProgress


def test_a_plain_line_has_rows_rate_and_share(capsys, monkeypatch):
    monkeypatch.setattr(list_progress, "PLAIN_LINE_SECONDS", 0.0)
    with ListProgress("sources", 1000) as progress:
        progress.add_bytes(250)
        progress.add_rows(5000)
    said = capsys.readouterr().err
    assert "sources: 5,000 rows, " in said
    assert " rows/s, 25% of the bytes, " in said
    assert said.count("\n") == 1


def test_a_short_list_says_nothing(capsys):
    with ListProgress("sources", 0) as progress:
        progress.add_rows(10)
    assert capsys.readouterr().err == ""


def test_without_a_size_there_is_no_share(capsys, monkeypatch):
    monkeypatch.setattr(list_progress, "PLAIN_LINE_SECONDS", 0.0)
    with ListProgress("sources", 0) as progress:
        progress.add_rows(10)
    said = capsys.readouterr().err
    assert "10 rows" in said
    assert "%" not in said
