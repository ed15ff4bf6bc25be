"""Files of a checkpoint: their bytes, their hashes, what may be read of them, which are kept."""

import hashlib
import os
import subprocess
import tempfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_train import checkpoint_files as files


def contents():
    """Tensors of many layouts: parts of a larger one, transposed, shared, empty, without
    dimensions."""
    flat = torch.arange(1000.0)
    return {
        "part": flat[100:140].view(4, 10),
        "same part": flat[100:140].view(4, 10),
        "transposed": flat[:20].view(4, 5).T,
        "list": [torch.ones(3, dtype=torch.bfloat16), (torch.tensor(2), None, "text")],
        "empty": torch.zeros(0),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "ordered": OrderedDict(b=torch.zeros(2, dtype=torch.int64), a=1.5),
    }


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("copy", [False, True])
def test_what_is_read_is_what_was_written(tmp_path, copy):
    arranged = files.arrange(contents(), copy=copy)
    record = files.write_state(tmp_path / "x.pt", arranged)
    data = (tmp_path / "x.pt").read_bytes()
    assert record == {
        "path": "x.pt",
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert files.file_digest(tmp_path / "x.pt") == record["sha256"]
    assert equal(files.read_state(tmp_path / "x.pt"), contents())
    # A part is saved without the thousand numbers around it.
    assert len(data) < files.state_bytes(arranged) < len(data) + (64 << 10)


def test_a_copy_has_the_same_bytes_and_does_not_follow(tmp_path):
    original = contents()
    kept, copied = files.arrange(original, copy=False), files.arrange(original, copy=True)
    files.write_state(tmp_path / "kept.pt", kept)
    original["part"].zero_()
    original["list"][0].zero_()
    files.write_state(tmp_path / "copied.pt", copied)
    assert (tmp_path / "kept.pt").read_bytes() == (tmp_path / "copied.pt").read_bytes()


class Scaler:
    pass


def test_only_known_classes_are_read(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    known = {"scaler": LossScaler(4.0), "places": OrderedDict(a=fragment_address(3, 5))}
    files.write_state(tmp_path / "known.pt", known)
    found = files.read_state(tmp_path / "known.pt")
    assert found["scaler"].cur_scale == 4
    assert found["places"]["a"] == fragment_address(3, 5)
    assert files.foreign_content(tmp_path) is None
    torch.save({"scaler": Scaler()}, tmp_path / "unknown.pt")
    with pytest.raises(files.UnreadableError, match=r"^unknown.pt is not a file of states \("):
        files.read_state(tmp_path / "unknown.pt")
    fault = files.foreign_content(tmp_path)
    assert fault is not None
    assert fault.startswith("unknown.pt is not")
    (tmp_path / "unknown.pt").write_bytes(b"no archive")
    assert files.foreign_content(tmp_path) is not None


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]
    if os.getuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs takes root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_an_error_of_the_system(small_disk):
    """torch itself would speak of unexpected positions."""
    assert files.free_bytes(small_disk) <= 1 << 20
    with pytest.raises(OSError, match="No space left on device"):
        files.write_state(small_disk / "x.pt", torch.zeros(1 << 20))
    (small_disk / "x.pt").unlink()
    with pytest.raises(OSError, match="No space left on device"):
        files.write_bytes(small_disk / "x.json", b"0" * (1 << 21))


@settings(max_examples=60, deadline=None)
@given(
    steps=st.sets(st.integers(0, 60), max_size=12),
    keep=st.integers(1, 5),
    every=st.none() | st.integers(1, 7),
)
def test_the_newest_and_every_nth_are_kept(steps, keep, every):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in steps:
            (folder / files.tag_of(step)).mkdir()
        files.prune(folder, keep, every)
        left = [step for step, _ in files.tags(folder)]
    newest = sorted(steps, reverse=True)
    expected = set(newest[:keep]) | {s for s in steps if every and s % every == 0}
    assert left == sorted(expected, reverse=True)


def test_a_commit_replaces_and_names_the_newest(tmp_path):
    for content in (b"one", b"two"):
        unfinished = files.new_folder(tmp_path, 5)
        record = files.write_bytes(unfinished / "x", content)
        assert files.tags(tmp_path) == [] or content == b"two"
        manifest = {"format_version": files.FORMAT_VERSION, "step": 5, "files": [record]}
        files.commit_folder(tmp_path, 5, manifest)
        assert files.check_checkpoint(tmp_path / files.tag_of(5), {}) is None
        assert (tmp_path / files.tag_of(5) / "x").read_bytes() == content
    assert files.read_latest(tmp_path) == files.tag_of(5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", files.tag_of(5)]
    (tmp_path / files.tag_of(5)).rename(tmp_path / files.tag_of(6))
    assert files.check_checkpoint(tmp_path / files.tag_of(6), {}) == "its manifest is of step 5"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1300, "1.3 kB"), (2 * 10**9, "2.0 GB")]
)
def test_sizes_for_people(count, text):
    assert files.readable_size(count) == text
