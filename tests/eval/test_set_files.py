"""Files of a set here and elsewhere: nothing is taken for absent that only cannot be read."""

import http.server
import threading
from functools import partial

import fsspec
import pytest

from declip_eval.set_files import DatasetError, SetFolder


class Server(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; names with "broken" answer 500, with "private" 401."""

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        if "broken" in self.path:
            self.send_error(500)
            return
        if "private" in self.path:
            self.send_error(401)
            return
        super().do_GET()


@pytest.fixture
def served(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(Server, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_local_files_are_read_in_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_bytes("\ufeffé\n".encode())
    (tmp_path / ".hidden").write_bytes(b"")
    folder = SetFolder(f"{tmp_path}/")
    assert folder.is_local
    assert folder.names() == ([], ["a"])
    assert folder.names("a") == (["b.txt"], [])
    assert folder.names("none") == ([], [])
    assert folder.find("") == {".hidden": (0, None), "a/b.txt": (6, None)}
    assert folder.read_text("a/b.txt") == "é\n"
    assert folder.read("a") is None
    assert folder.read("a/b.txt/c") is None
    assert (folder.size("a/b.txt"), folder.size("a"), folder.size("c")) == (6, None, None)
    assert folder.on_this_machine("a/b.txt") == str(tmp_path / "a" / "b.txt")
    with pytest.raises(DatasetError, match=r"/c is not there: fetch the dataset again"):
        folder.on_this_machine("c")


def test_text_that_is_no_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match=r"a\.txt is not UTF-8 text"):
        SetFolder(str(tmp_path)).read_text("a.txt")


def test_files_of_a_server_are_fetched_once_and_again_when_their_size_changes(served, tmp_path):
    folder, url = served
    (folder / "0.tar").write_bytes(b"first")
    remote = SetFolder(url, str(tmp_path / "cache"))
    assert not remote.is_local
    assert not remote.is_listable
    copy = remote.on_this_machine("0.tar")
    (folder / "0.tar").write_bytes(b"other")
    assert SetFolder(f"{url}/", str(tmp_path / "cache")).on_this_machine("0.tar") == copy
    with open(copy, "rb") as file:
        assert file.read() == b"first"
    (folder / "0.tar").write_bytes(b"longer than before")
    with open(remote.on_this_machine("0.tar"), "rb") as file:
        assert file.read() == b"longer than before"
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_server_that_fails_is_no_missing_file(served, tmp_path):
    folder, url = served
    remote = SetFolder(url, str(tmp_path / "cache"))
    assert remote.read("nothing.txt") is None
    with pytest.raises(DatasetError, match=r"/broken\.txt cannot be read \(ClientResponseError"):
        remote.read("broken.txt", refused_is_absent=True)
    assert remote.read("private.txt", refused_is_absent=True) is None
    with pytest.raises(DatasetError, match=r"/private\.txt cannot be read .*401"):
        remote.read("private.txt")
    (folder / "a.tar").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"a\.tar is on another machine .*: give a cache folder"):
        SetFolder(url).on_this_machine("a.tar")
    found = remote.read_many(["a.tar", "nothing.jpg"])
    assert found[0] == b"x"
    assert "cannot be read" in str(found[1])


def test_a_file_that_arrives_short_is_never_kept(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/set_files/0.tar", b"whole content")
    monkeypatch.setattr("declip_eval.set_files.time.sleep", lambda seconds: None)
    try:
        folder = SetFolder("memory://set_files", str(tmp_path))
        assert folder.names() == (["0.tar"], [])
        info = memory.info("/set_files/0.tar") | {"size": 20}
        monkeypatch.setattr(type(memory), "info", lambda self, path, **_: info)
        with pytest.raises(DatasetError, match=r"in 3 attempts \(13 of 20 bytes arrived\)"):
            folder.on_this_machine("0.tar")
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    finally:
        monkeypatch.undo()
        memory.rm("/set_files", recursive=True)


def test_the_page_of_a_data_hub_stands_for_its_files():
    page = "https://hub.example/datasets/clip-benchmark/wds_cifar10/tree/main"
    files = "https://hub.example/datasets/clip-benchmark/wds_cifar10/resolve/main"
    assert SetFolder(page).full("test/0.tar") == f"{files}/test/0.tar"
    assert SetFolder(page).shown("test/0.tar") == f"{page}/test/0.tar"


def test_remote_names_are_no_patterns():
    memory = fsspec.filesystem("memory")
    memory.pipe("/brackets/a/p [0].png", b"zero")
    memory.pipe("/brackets/a/p*.png", b"star")
    try:
        folder = SetFolder("memory://brackets")
        found = folder.read_many(["a/p*.png", "a/none.png", "a/p [0].png"])
    finally:
        memory.rm("/brackets", recursive=True)
    assert (found[0], found[2]) == (b"star", b"zero")
    assert str(found[1]).startswith("memory://brackets/a/none.png cannot be read (FileNotFound")


def test_an_unknown_protocol_is_refused():
    with pytest.raises(DatasetError, match="The dataset root 'nope://x' cannot be opened"):
        SetFolder("nope://x")
