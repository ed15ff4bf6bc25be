import os

import pytest

from declip_filter.user_files import read_user_file
from declip_shards import DeclipError


def test_a_file_is_read_as_far_as_is_asked_and_a_byte_more(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"0123456789")
    assert read_user_file("concepts", str(path)) == b"0123456789"
    assert read_user_file("concepts", f"file://{path}", 4) == b"01234"


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("no/such.txt", "^concepts 'no/such.txt' does not exist; correct its path.$"),
        ("/", "^concepts '/' is a folder; name a file in it.$"),
        ("nosuch://x", r"^concepts 'nosuch://x' is of a kind that fsspec cannot open here \("),
    ],
)
def test_what_cannot_be_read_is_told_in_a_sentence(path, sentence):
    with pytest.raises(DeclipError, match=sentence):
        read_user_file("concepts", path)


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    path = tmp_path / "list.txt"
    path.write_bytes(b"cat")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read all

        def refuse(*args: object, **more: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("fsspec.open", refuse)
    with pytest.raises(
        DeclipError, match=r"cannot be read \(Permission denied\); correct its path"
    ):
        read_user_file("concepts", str(path))
