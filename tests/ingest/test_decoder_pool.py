"""A picture that kills, stalls or fills a decoder costs its own row; nothing else changes."""

import asyncio
import io
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from declip_ingest.decode import ImageNormalizer
from declip_ingest.decoder_pool import DecoderPool
from declip_ingest.failures import DecodeError
from declip_ingest.image_policy import DecodedImage, ImagePolicy
from declip_shards import DeclipError

FAULTY = "faulty_normalizer:FaultyNormalizer"
POLICY = ImagePolicy(image_size=32)


def photo(seed: int, width: int = 90, height: int = 60, kind: str = "JPEG") -> bytes:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    image.save(sink, kind)
    return sink.getvalue()


PHOTOS = [photo(seed) for seed in range(12)]
EXPECTED = [ImageNormalizer(POLICY)(data) for data in PHOTOS]

Outcome = DecodedImage | str


async def outcome(pool: DecoderPool, data: bytes) -> Outcome:
    try:
        return await pool.decode(data)
    except DecodeError as error:
        return error.message


def run(work: Callable[[DecoderPool], Awaitable[None]], **settings) -> None:
    async def main() -> None:
        async with DecoderPool(POLICY, **settings) as pool:
            await work(pool)

    asyncio.run(main())


def resident(pid: int, field: str) -> int:
    """Kilobytes, of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise AssertionError(field)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_pool_gives_what_the_normalizer_gives_in_any_order(num_processes):
    async def work(pool: DecoderPool) -> None:
        backward = await asyncio.gather(*(pool.decode(data) for data in PHOTOS[::-1]))
        assert backward == EXPECTED[::-1]
        boxes = [(0.1, 0.1, 0.7, 0.7)]
        blurred = await pool.decode(PHOTOS[0], boxes)
        assert blurred == ImageNormalizer(POLICY)(PHOTOS[0], boxes) != EXPECTED[0]
        assert await outcome(pool, b"<html>") == "not_image"
        assert await outcome(pool, b"II*\0" + b"\0" * 99) == "unsupported_format: tiff"
        assert await outcome(pool, PHOTOS[0][:400]) == "truncated_image"
        with pytest.raises(DecodeError, match="bad_boxes"):
            await pool.decode(PHOTOS[0], [(0.5, 0.5, 0.1, 0.1)])
        assert 1 <= len(pool.pids) <= num_processes

    run(work, num_processes=num_processes)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(b"CRASH", "decoder_crash"), (b"STUMBLE", "decoder_crash"), (b"HOG", "decoder_memory")],
)
def test_the_culprit_alone_fails(fault, reason):
    async def work(pool: DecoderPool) -> None:
        todo = [*PHOTOS[:4], fault, *PHOTOS[4:]]
        done = await asyncio.gather(*(outcome(pool, data) for data in todo))
        assert done == [*EXPECTED[:4], reason, *EXPECTED[4:]]

    run(work, normalizer=FAULTY, memory_bytes=256 << 20)


def test_several_culprits_at_once_in_several_processes():
    async def work(pool: DecoderPool) -> None:
        todo = [PHOTOS[0], b"ABORT", PHOTOS[1], b"EXIT", PHOTOS[2], PHOTOS[3]]
        done = await asyncio.gather(*(outcome(pool, data) for data in todo))
        crash = "decoder_crash"
        assert done == [EXPECTED[0], crash, EXPECTED[1], crash, EXPECTED[2], EXPECTED[3]]

    run(work, normalizer=FAULTY, num_processes=2)


@pytest.mark.parametrize("fault", [b"SPIN", b"SLEEP"])
def test_an_endless_picture_is_a_timeout_and_the_next_ones_do_not_pay(fault):
    async def work(pool: DecoderPool) -> None:
        assert await outcome(pool, PHOTOS[0]) == EXPECTED[0]
        start = time.monotonic()
        endless = asyncio.ensure_future(outcome(pool, fault))
        await asyncio.sleep(0)
        others = [asyncio.ensure_future(outcome(pool, data)) for data in PHOTOS]
        assert await endless == "decoder_timeout"
        assert time.monotonic() - start < 30
        assert await asyncio.gather(*others) == EXPECTED

    run(work, normalizer=FAULTY, timeout_seconds=3)


def test_a_child_killed_from_outside_costs_no_row():
    async def work(pool: DecoderPool) -> None:
        await pool.decode(PHOTOS[0])
        todo = [asyncio.ensure_future(outcome(pool, data)) for data in PHOTOS]
        await asyncio.sleep(0.002)
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        assert await asyncio.gather(*todo) == EXPECTED
        # Killed while nothing is to do.
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.2)
        assert await outcome(pool, PHOTOS[3]) == EXPECTED[3]

    run(work)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def gigapixel_png() -> bytes:
    """32,000 by 32,000 white pixels of one bit, whole and valid: 169 KB."""
    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * 4000
    body = b"".join(packer.compress(row) for _ in range(32_000)) + packer.flush()
    head = struct.pack(">IIBBBBB", 32_000, 32_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def huge_jpeg() -> bytes:
    data = bytearray(photo(0))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    return bytes(data)


def huge_gif() -> bytes:
    data = bytearray(photo(0, kind="GIF"))
    data[6:10] = b"\xff\xff\xff\xff"
    return bytes(data)


def long_animation(number: int) -> bytes:
    data = photo(0, kind="GIF")
    first = data.index(b"\x2c\0\0\0\0", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    return data[:first] + data[first:-1] * number + b";"


def test_bombs_fail_within_256_megabytes():
    """Row 18 of the fault catalogue."""
    bombs = {
        "png": gigapixel_png(),
        "jpeg": huge_jpeg(),
        "gif": huge_gif(),
        "animation": long_animation(10_000),
    }
    assert len(bombs["png"]) < 200_000

    async def work(pool: DecoderPool) -> None:
        await pool.decode(PHOTOS[0])
        done = {name: await outcome(pool, data) for name, data in bombs.items()}
        # Of an animation the first frame is taken, and the others are not looked at.
        assert isinstance(done.pop("animation"), DecodedImage)
        assert set(done.values()) == {"too_many_pixels"}
        assert resident(pool.pids[0], "VmHWM") < 256 * 1024

    run(work)


def test_a_child_is_small_and_starts_fast():
    async def work(pool: DecoderPool) -> None:
        await pool.decode(PHOTOS[0])
        pid = pool.pids[0]
        assert resident(pid, "VmRSS") < 160 * 1024
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        # Half a second on a quiet machine; a busy one doubles processor time.
        assert seconds < 1.5

    run(work)


def test_a_child_can_open_nothing_and_knows_no_secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")

    async def work(pool: DecoderPool) -> None:
        tried = await pool.decode(b"TRY")
        assert tried.width == 0, "something could be opened"
        assert tried.height == 0, "something heavy was imported"
        assert tried.original_width == 0, "the environment came along"
        assert tried.original_height == 0, "it may dump core"
        # And with all that it decodes every format.
        for kind in ("JPEG", "PNG", "WEBP", "GIF"):
            assert isinstance(await outcome(pool, photo(1, kind=kind)), DecodedImage)

    run(work, normalizer="faulty_normalizer:Prisoner")


def test_every_known_format_decodes_without_opening_anything():
    policy = ImagePolicy(image_size=32, formats=("jpeg", "png", "webp", "gif", "bmp", "avif"))

    async def main() -> None:
        async with DecoderPool(policy) as pool:
            for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"):
                data = photo(2, kind=kind)
                assert await pool.decode(data) == ImageNormalizer(policy)(data)

    asyncio.run(main())


@pytest.mark.slow
def test_img2datasets_resizer_runs_in_a_child_too():
    policy = ImagePolicy(image_size=32, resizer="img2dataset")

    async def main() -> None:
        async with DecoderPool(policy) as pool:
            assert await pool.decode(PHOTOS[0]) == ImageNormalizer(policy)(PHOTOS[0])
            boxes = [(0.2, 0.2, 0.8, 0.8)]
            assert await pool.decode(PHOTOS[0], boxes) != await pool.decode(PHOTOS[0])

    asyncio.run(main())


def test_no_child_outlives_a_killed_parent(tmp_path):
    script = (
        "import asyncio, sys\n"
        "from declip_ingest.image_policy import ImagePolicy\n"
        "from declip_ingest.decoder_pool import DecoderPool\n"
        "async def main():\n"
        f"    pool = DecoderPool(ImagePolicy(), num_processes=2, normalizer={FAULTY!r})\n"
        "    for data in (b'SLEEP', b'SPIN'): asyncio.ensure_future(pool.decode(data))\n"
        "    while len(pool.pids) < 2: await asyncio.sleep(0.05)\n"
        "    await asyncio.sleep(0.3)\n"
        "    print(*pool.pids, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        parent.kill()
    give_up = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def test_closing_is_quick_and_leaves_nobody(stopwatch):
    pids: list[int] = []

    async def main() -> None:
        pool = DecoderPool(POLICY, num_processes=2, normalizer=FAULTY)
        await pool.decode(PHOTOS[0])
        hanging = [asyncio.ensure_future(pool.decode(b"SLEEP")) for _ in range(6)]
        while len(pool.pids) < 2:
            await asyncio.sleep(0.02)
        pids.extend(pool.pids)
        start = stopwatch()
        await pool.aclose()
        assert stopwatch() - start < 5
        results = await asyncio.gather(*hanging, return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError) for r in results)
        with pytest.raises(RuntimeError, match="closed"):
            await pool.decode(PHOTOS[0])

    asyncio.run(main())
    assert not any(map(is_alive, pids))


def test_a_canceled_call_leaves_the_pool_whole():
    async def work(pool: DecoderPool) -> None:
        await pool.decode(PHOTOS[0])
        todo = [asyncio.ensure_future(outcome(pool, data)) for data in PHOTOS]
        await asyncio.sleep(0)
        for index in (0, 1, 7):
            todo[index].cancel()
        done = await asyncio.gather(*todo, return_exceptions=True)
        for index, result in enumerate(done):
            if index not in (0, 1, 7):
                assert result == EXPECTED[index]
        assert await outcome(pool, PHOTOS[1]) == EXPECTED[1]

    run(work)


def test_a_large_picture_goes_both_ways():
    policy = ImagePolicy(resize_mode="no", encode_quality=100)
    rng = np.random.default_rng(0)
    sink = io.BytesIO()
    noise = rng.integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(sink, "PNG", compress_level=0)

    async def main() -> None:
        async with DecoderPool(policy) as pool:
            big, small = await asyncio.gather(pool.decode(sink.getvalue()), pool.decode(PHOTOS[0]))
        assert len(sink.getvalue()) > 5_000_000
        assert len(big.image) > 1_000_000
        assert big == ImageNormalizer(policy)(sink.getvalue())
        assert small == ImageNormalizer(policy)(PHOTOS[0])

    asyncio.run(main())


def test_a_decoder_that_does_not_start_is_said_so():
    async def work(pool: DecoderPool) -> None:
        with pytest.raises(DeclipError, match="does not start: RuntimeError: no codec here; see"):
            await pool.decode(PHOTOS[0])

    run(work, normalizer="faulty_normalizer:DoesNotStart")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("num_processes", 0), ("timeout_seconds", 0), ("memory_bytes", 1 << 20)],
)
def test_a_wrong_setting_is_refused_by_its_value(setting, value):
    wrong = {"num_processes": 1, "timeout_seconds": 1.0, "memory_bytes": 1 << 30, setting: value}
    with pytest.raises(DeclipError, match=f"decode_.* is {value} but"):
        DecoderPool(POLICY, **wrong)
