"""A child's word is a stranger's: nonsense costs the picture that it was at, and nothing else."""

import asyncio
import io
from collections import deque

import numpy as np
import pytest
from PIL import Image

from declip_ingest.decode import ImageNormalizer
from declip_ingest.decoder_pool import NORMALIZER, DecoderPool
from declip_ingest.decoder_process import DEPTH, Answer, DecoderProcess, DecoderSettings, Job
from declip_ingest.failures import DecodeError
from declip_ingest.image_policy import DecodedImage, ImagePolicy
from declip_ingest.shared_slots import SLOT_BYTES

POLICY = ImagePolicy(image_size=32)


def photo(seed: int, side: int = 60, kind: str = "JPEG", **options) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).save(sink, kind, **options)
    return sink.getvalue()


PHOTOS = [photo(seed) for seed in range(6)]
EXPECTED = [ImageNormalizer(POLICY)(data) for data in PHOTOS]


@pytest.mark.parametrize(
    "nonsense", [b"BABBLE", b"BOAST", b"OVERREACH", b"MUMBLE", b"INVENT", b"GARBLE"]
)
def test_an_answer_that_is_none_costs_its_own_row(nonsense):
    async def outcome(pool: DecoderPool, data: bytes) -> DecodedImage | str:
        try:
            return await pool.decode(data)
        except DecodeError as error:
            return error.message

    async def main() -> None:
        async with DecoderPool(POLICY, normalizer="faulty_normalizer:FaultyNormalizer") as pool:
            todo = [*PHOTOS[:2], nonsense, *PHOTOS[2:]]
            done = await asyncio.gather(*(outcome(pool, data) for data in todo))
        assert done == [*EXPECTED[:2], "decoder_crash", *EXPECTED[2:]]

    asyncio.run(main())


def test_each_picture_gets_its_own_answer_whatever_way_it_goes():
    """Through a slot, over the socket, and one way there and the other back, all mixed."""
    policy = ImagePolicy(resize_mode="no", encode_quality=100)
    large = photo(0, 1300, "PNG", compress_level=0)
    dense = photo(1, 2000, quality=95, subsampling=0)
    grown = photo(2, 2000, quality=70)
    files = [PHOTOS[0], large, PHOTOS[1], dense, grown, PHOTOS[2], large, grown]
    expected = [ImageNormalizer(policy)(data) for data in files]
    ways = {
        (len(data) > SLOT_BYTES, len(made.image) > SLOT_BYTES)
        for data, made in zip(files, expected, strict=True)
    }
    assert ways == {(False, False), (True, False), (True, True), (False, True)}
    settings = DecoderSettings(
        policy=policy, normalizer=NORMALIZER, timeout_seconds=60, memory_bytes=1 << 30
    )

    async def main() -> list[Answer]:
        answers: list[Answer] = []
        waiting = deque(files)
        over = asyncio.Event()

        def answered(child: DecoderProcess, _job: Job, answer: Answer) -> None:
            answers.append(answer)
            if waiting:
                child.submit(job())
            elif len(answers) == len(files):
                over.set()

        def job() -> Job:
            return Job(waiting.popleft(), [], asyncio.get_running_loop().create_future())

        child = DecoderProcess(settings, answered, lambda _child, _jobs: over.set())
        await child.start()
        try:
            for _ in range(DEPTH):
                child.submit(job())
            await over.wait()
        finally:
            await child.stop()
        return answers

    assert asyncio.run(main()) == expected
