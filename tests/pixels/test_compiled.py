"""The compiled part is used with a library that it fits, and with no other."""

import ctypes
import ctypes.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import declip_pixels
from declip_pixels import compiled
from declip_pixels.compiled import CompiledPart, compiled_part, pillow_libjpeg
from declip_pixels.compiler import NoCompiledPartError, ensure_built

SOURCES = Path(declip_pixels.__file__).parent


def test_uses_the_libjpeg_of_pillow() -> None:
    assert "libjpeg" in pillow_libjpeg().name
    assert isinstance(compiled_part(), CompiledPart)


def test_refuses_other_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A copy of the file is a library of its own: the tests' process keeps the one it uses.
    copy = shutil.copy(ensure_built(), tmp_path / "copy.so")
    library = ctypes.CDLL(str(copy))
    assert library.declip_open(b"/no/such/library") == 1
    assert library.declip_open(str(ctypes.util.find_library("m")).encode()) == 2
    # Without a library nothing is decoded, and nothing falls over.
    done = np.ones(1, np.bool_)
    library.declip_views(
        None,
        None,
        ctypes.c_int64(1),
        1,
        None,
        None,
        1,
        None,
        1,
        0,
        ctypes.c_void_p(done.ctypes.data),
    )
    monkeypatch.setattr(compiled, "pillow_libjpeg", lambda: Path("/no/such/libjpeg.so"))
    with pytest.raises(NoCompiledPartError, match=r"Pillow's libjpeg.so: it cannot be opened"):
        CompiledPart()


def test_a_library_of_another_layout_is_refused(tmp_path: Path) -> None:
    for name in ("pixels.cpp", "jpeg_file.h", "resample.h"):
        shutil.copy(SOURCES / name, tmp_path)
    layout = (SOURCES / "jpeg_abi.h").read_text()
    assert "*modules[11]" in layout
    (tmp_path / "jpeg_abi.h").write_text(layout.replace("*modules[11]", "*modules[12]"))
    target = str(tmp_path / "other.so")
    command = ["g++", "-std=c++17", "-O0", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, str(tmp_path / "pixels.cpp"), "-o", target, "-ldl"], check=True)
    assert ctypes.CDLL(target).declip_open(str(pillow_libjpeg()).encode()) == 3


def test_other_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "decode_picture", lambda data: np.zeros((50, 70, 3), np.uint8))
    with pytest.raises(NoCompiledPartError, match="not the Python way's on this machine"):
        CompiledPart()
