"""The child's side: frames in and out, the limits it takes upon itself, what it imports."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading

import cv2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_ingest import decoder_child
from declip_ingest.decode import ImageNormalizer
from declip_ingest.failures import DecodeError
from declip_ingest.image_policy import DecodedImage, ImagePolicy
from declip_ingest.shared_slots import SLOT_BYTES, SharedSlots, create_slots


def echo(data: bytes, boxes) -> DecodedImage:
    """The bytes come back as the picture, their number as its width."""
    if data == b"refuse":
        raise DecodeError("unsupported_format", "tiff")
    if data == b"full":
        raise MemoryError
    if data == b"bug":
        raise KeyError("a fault of ours")
    return DecodedImage(
        image=data,
        width=len(data),
        height=len(boxes),
        original_width=3,
        original_height=4,
        sha256="ab" * 32,
    )


def ask(requests: list[tuple[bytes, list[tuple[float, float, float, float]]]], through_slots=True):
    """Kind and body of each answer, a stored file behind its numbers wherever it came."""
    ours, theirs = socket.socketpair()
    fd = create_slots(1)
    slots, their_slots = SharedSlots(fd), SharedSlots(fd)
    os.close(fd)
    child = threading.Thread(
        target=decoder_child.serve, args=(theirs, their_slots, echo), daemon=True
    )
    child.start()
    answers = []
    with ours, ours.makefile("rb") as replies:
        for data, boxes in requests:
            is_shared = through_slots and slots.put(0, [data])
            head = decoder_child.REQUEST.pack(0, is_shared, len(data), len(boxes))
            ours.sendall(head if is_shared else head + data)
            ours.sendall(b"".join(decoder_child.BOX.pack(*box) for box in boxes))
            kind, size = decoder_child.REPLY.unpack(replies.read(decoder_child.REPLY.size))
            body = replies.read(size)
            if kind == decoder_child.STORED:
                body += slots.get(0, decoder_child.PICTURE.unpack(body)[0])
                kind = decoder_child.DONE
            answers.append((kind, body))
    child.join(10)
    assert not child.is_alive(), "it goes on after the other end has closed"
    theirs.close()
    return answers


@given(
    st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 3)), min_size=1, max_size=5),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_what_is_sent_comes_back_in_order(requests, through_slots):
    asked = [(b"." + data, [(0.0, 0.25, 0.5, 1.0)] * number) for data, number in requests]
    for (data, boxes), (kind, body) in zip(asked, ask(asked, through_slots), strict=True):
        assert kind == decoder_child.DONE
        head = decoder_child.PICTURE.size
        numbers = decoder_child.PICTURE.unpack(body[:head])
        assert numbers == (len(data), len(data), len(boxes), 3, 4, b"\xab" * 32)
        assert body[head:] == data


@pytest.mark.parametrize("size", [SLOT_BYTES - 1, SLOT_BYTES, SLOT_BYTES + 1])
def test_large_pictures_come_back_whole(size):
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    (kind, body), *_ = ask([(data, [])])
    assert kind == decoder_child.DONE
    assert body.endswith(data)


def test_failures_are_words_and_faults_of_ours_are_tracebacks():
    refused, full, bug, after = ask([(b"refuse", []), (b"full", []), (b"bug", []), (b"ok", [])])
    assert refused == (decoder_child.FAILED, b"unsupported_format\0tiff")
    assert full == (decoder_child.FAILED, b"decoder_memory\0")
    assert bug[0] == decoder_child.BROKEN
    assert b"a fault of ours" in bug[1]
    assert after[0] == decoder_child.DONE


LIMITED = """
import json, os, resource, sys, ctypes
from declip_ingest import decoder_child
name, policy = json.loads(sys.argv[1])
made = decoder_child.load_normalizer(name, policy)
decoder_child.limit_process(128 << 20, os.getppid())
found = {"modules": sorted(m for m in sys.modules if "." not in m)}
try:
    hoard = [bytearray(1 << 24) for _ in range(64)]
    found["memory"] = "all"
except MemoryError:
    found["memory"] = "limited"
try:
    # The socket's place is free here; a second one is not.
    os.dup(0), os.dup(0)
    found["descriptors"] = "more"
except OSError:
    found["descriptors"] = "none"
found["limits"] = [resource.getrlimit(k) for k in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE)]
value = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(value), 0, 0, 0)
found["death_signal"] = value.value
print(json.dumps(found), flush=True)
"""


def limited(normalizer: str) -> subprocess.CompletedProcess[str]:
    options = json.dumps([normalizer, dataclasses.asdict(ImagePolicy())])
    return subprocess.run(
        [sys.executable, "-c", LIMITED, options],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_the_limits_hold_and_nothing_heavy_is_imported():
    done = limited("declip_ingest.decode:ImageNormalizer")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["memory"], found["descriptors"]) == ("limited", "none")
    assert found["limits"] == [[0, 0], [0, 0]]
    assert found["death_signal"] == 9
    heavy = {"torch", "ray", "pandas", "img2dataset", "albumentations", "scipy", "aiohttp"}
    assert not heavy & set(found["modules"])


@pytest.mark.parametrize("resizer", ["scaled", "exact", "img2dataset"])
def test_a_large_image_size_does_not_make_the_start_slow(resizer, monkeypatch):
    """A sample blown up to 16384 pixels would take many minutes to blur."""
    largest = []
    blur = cv2.GaussianBlur

    def count(image, *others, **settings):
        largest.append(max(image.shape))
        return blur(image, *others, **settings)

    monkeypatch.setattr(cv2, "GaussianBlur", count)
    policy = ImagePolicy(image_size=16384, min_image_size=100, resizer=resizer)
    made = decoder_child.load_normalizer(
        "declip_ingest.decode:ImageNormalizer", dataclasses.asdict(policy)
    )
    assert isinstance(made, ImageNormalizer)
    assert made.policy == policy
    assert largest
    assert max(largest) <= decoder_child.SAMPLE_SIZE


def test_an_orphan_does_not_go_on():
    script = "from declip_ingest import decoder_child as c; c.limit_process(1 << 28, 1 << 30)"
    done = subprocess.run([sys.executable, "-c", script + "; print('on')"], capture_output=True)
    assert done.returncode == 1
    assert done.stdout == b""


@pytest.mark.parametrize("place", ["declip_ingest.decode:Missing", "declip_ingest.missing:Any"])
def test_a_normalizer_that_is_not_there_is_an_error(place):
    with pytest.raises((AttributeError, ImportError)):
        decoder_child.load_normalizer(place, dataclasses.asdict(ImagePolicy()))
