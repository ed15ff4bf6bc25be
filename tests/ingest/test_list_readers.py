"""A location is read by the reader of its kind; what would be ignored is refused."""

import pytest

from declip_ingest.list_columns import ColumnNames
from declip_ingest.list_files import find_files
from declip_ingest.list_lines import PairLines
from declip_ingest.list_readers import ListOptions, open_list, recognize_all
from declip_ingest.list_tables import TableList
from declip_ingest.yfcc import YfccSubset
from declip_shards import DeclipError


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_each_kind_has_its_reader(tmp_path):
    lines = write(tmp_path / "a.tsv", "a cat\thttp://a/\n")
    table = write(tmp_path / "b.csv", "url,caption\nhttp://a/,x\n")
    subset = write(tmp_path / "c.tsv", "1\t2\tab\n")
    assert isinstance(open_list(lines, ListOptions()), PairLines)
    assert isinstance(open_list(table, ListOptions()), TableList)
    reader = open_list(subset, ListOptions(needs_pairs=False))
    assert isinstance(reader, YfccSubset)
    assert reader.schema.names == ["source_id"]
    assert reader.num_bytes == 7


def test_two_kinds_in_one_place_are_refused(tmp_path):
    write(tmp_path / "a.tsv", "a cat\thttp://a/\n")
    write(tmp_path / "b.tsv", "http://a/\ta cat\n")
    with pytest.raises(DeclipError, match=r"b\.tsv' looks like cc12m \(lines\), but .*cc3m"):
        recognize_all(find_files(str(tmp_path)))


def test_names_of_columns_that_a_list_does_not_have_are_refused(tmp_path):
    lines = write(tmp_path / "a.tsv", "a cat\thttp://a/\n")
    with pytest.raises(DeclipError, match="whose columns have no names"):
        open_list(lines, ListOptions(columns=ColumnNames(license="rights")))
