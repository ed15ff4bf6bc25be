"""A digest is of what lies at a path, not of the path."""

import os

from declip_filter.path_digests import full_path, path_digest, path_state


def test_the_content_counts_and_the_place_does_not(tmp_path):
    one, two = tmp_path / "one.bin", tmp_path / "two.bin"
    one.write_bytes(b"weights")
    two.write_bytes(b"weights")
    assert path_digest(str(one)) == path_digest(str(two)) != ""
    two.write_bytes(b"Weights")
    assert path_digest(str(one)) != path_digest(str(two))


def test_a_folder_is_its_files_by_name_and_content(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder / "in").mkdir(parents=True)
        (tmp_path / folder / "in" / "x").write_bytes(b"1")
        (tmp_path / folder / "y").write_bytes(b"2")
    same = path_digest(str(tmp_path / "a"))
    assert same == path_digest(str(tmp_path / "b"))
    (tmp_path / "b" / "y").rename(tmp_path / "b" / "z")
    assert same != path_digest(str(tmp_path / "b"))


def test_nothing_there_has_no_digest(tmp_path):
    assert path_digest(str(tmp_path / "none")) == path_digest("") == path_digest("s3://b/x") == ""


def test_a_place_stays_the_same_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert full_path("x.npy") == os.path.join(str(tmp_path), "x.npy")
    assert full_path("s3://b/x.npy") == "s3://b/x.npy"
    assert full_path("") == ""


def test_the_state_of_a_folder_changes_with_its_files_and_not_by_itself(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    assert path_state(str(folder)) == path_state(str(tmp_path / "none")) == ""
    (folder / "a.jpg").write_bytes(b"1")
    first = path_state(str(folder))
    assert first == path_state(str(folder)) != ""
    (folder / "a.jpg").write_bytes(b"22")
    second = path_state(str(folder))
    (folder / "b.jpg").write_bytes(b"3")
    assert len({first, second, path_state(str(folder)), path_state(str(folder / "a.jpg"))}) == 4
