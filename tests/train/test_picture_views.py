"""Views of batches: whichever thread makes them, whatever is being made beside them."""

import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from declip_shards import DeclipError
from declip_train.augment import ColorChoices, change_colors_into
from declip_train.batch_order import BatchShare
from declip_train.failed_samples import FailedSamples
from declip_train.loader_clock import PhaseClock
from declip_train.picture_views import ViewMaker
from declip_train.samples import TrainingSamples
from declip_train.settings import TrainSettings

COUNT = 40


class Pictures:
    """Samples whose pictures are in memory: of many sizes and kinds, as the web has them."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.data: list[bytes | str] = []
        for number in range(COUNT):
            height, width = (int(side) for side in rng.integers(1, 90, 2))
            picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
            kind = ("jpeg", "png", "webp")[number % 3]
            sink = io.BytesIO()
            (picture.convert("L") if number % 5 == 0 else picture).save(sink, kind)
            self.data.append(sink.getvalue())

    def samples(self, monkeypatch):
        def read(_, indices):
            return [self.data[int(index)] for index in indices]

        monkeypatch.setattr(TrainingSamples, "read_images", read)
        keys = [f"k{number:02d}" for number in range(COUNT)]
        return TrainingSamples.in_memory(keys=keys, captions=[""] * COUNT)


def maker(samples, *, threads=1, budget=0.5, **changes):
    settings = TrainSettings(
        model="test", global_batch_size=20, warmup_steps=0, decoded_cache_megabytes=0
    )
    settings = TrainSettings(**{**vars(settings), **changes})
    return ViewMaker(
        samples,
        settings,
        num_threads=threads,
        failures=FailedSamples(COUNT, budget),
        clock=PhaseClock(),
        on_device=settings.photometric == "device",
    )


def share(indices, epoch=0):
    indices = np.array(indices, np.int64)
    return BatchShare(indices, np.full(len(indices), epoch))


@pytest.mark.parametrize("method", ["clip", "slip"])
@pytest.mark.parametrize("photometric", ["cpu", "device"])
def test_batches_in_the_making_do_not_disturb_each_other(monkeypatch, method, photometric):
    samples = Pictures().samples(monkeypatch)
    alone = maker(samples, method=method, photometric=photometric)
    several = maker(samples, threads=4, method=method, photometric=photometric)
    shares = [share(range(20)), share(range(39, 4, -1), epoch=1), share([3]), share([7, 7, 7])]
    waiting = [several.start(each) for each in shares]
    for each, finish in zip(shares, waiting, strict=True):
        expected, found = alone.start(each)(), finish()
        assert torch.equal(found.images, expected.images)
        assert found.indices.tolist() == each.indices.tolist()
        if photometric == "device":
            assert found.colors is not None
            assert expected.colors is not None
            assert len(found.colors) == len(alone.views) * len(each.indices)
            assert torch.equal(found.colors.factors, expected.colors.factors)
    several.close()
    several.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("views")]
    # Closed, it can be used again.
    assert torch.equal(several.start(shares[0])().images, alone.start(shares[0])().images)
    several.close()


@pytest.mark.parametrize("decoder", ["native", "python"])
@pytest.mark.parametrize("method", ["clip", "declip"])
def test_views_on_the_cpu_are_those_for_a_device_with_their_colors_changed(
    monkeypatch, method, decoder
):
    samples = Pictures().samples(monkeypatch)
    both = {"method": method, "decoder": decoder}
    there = maker(samples, photometric="device", **both).start(share(range(COUNT)))()
    here = maker(samples, photometric="cpu", **both).start(share(range(COUNT)))()
    assert there.colors is not None
    planes = np.empty((3, *there.images.shape[2:4]), np.float32)
    pairs = zip(there.images.flatten(0, 1).numpy(), here.images.flatten(0, 1), strict=True)
    changed = 0
    for number, (view, found) in enumerate(pairs):
        order, factors, jitter, gray, sigma = (
            value[number].numpy() for value in vars(there.colors).values()
        )
        choices = ColorChoices(order, factors, bool(jitter), bool(gray), float(sigma))
        changed += choices.jitter
        change_colors_into(view, choices, planes)
        assert torch.equal(found, torch.from_numpy(planes))
    assert (changed > 0) == (method == "declip")


def test_memory_of_batches_is_used_again_but_not_while_they_are_held(monkeypatch):
    samples = Pictures().samples(monkeypatch)
    views = maker(samples, method="clip", photometric="cpu")
    shares = [share(range(20)), share(range(20, 40))]
    first, second = (views.start(each)().images for each in shares)
    expected = first.clone()
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    row = second[0, 3]
    kept = row.clone()
    del second
    # A row of it is still held.
    assert views.start(shares[0])().images.data_ptr() not in places
    assert torch.equal(row, kept)
    del row
    again = views.start(shares[0])().images
    assert again.data_ptr() in places
    assert torch.equal(again, expected)
    assert torch.equal(first, expected)


def test_a_views_pixels_depend_on_its_sample_and_epoch_alone(monkeypatch):
    samples = Pictures().samples(monkeypatch)
    views = maker(samples, method="declip")
    whole = views.start(share(range(COUNT)))().images
    mixed = BatchShare(np.array([5, 9, 5]), np.array([0, 0, 1]))
    found = views.start(mixed)().images
    assert torch.equal(found[:, 0], whole[:, 5])
    assert torch.equal(found[:, 1], whole[:, 9])
    assert not torch.equal(found[:, 2], whole[:, 5])


def test_room_for_decoded_pictures_is_kept_to(monkeypatch):
    samples = Pictures().samples(monkeypatch)
    views = maker(samples, method="clip")
    expected = views.start(share(range(COUNT)))().images
    keeping = maker(samples, method="clip", decoded_cache_megabytes=1)
    keeping._cache_room = 30_000
    for _ in range(3):
        assert torch.equal(keeping.start(share(range(COUNT)))().images, expected)
        assert 0 < sum(picture.nbytes for picture in keeping._cache.values()) <= 30_000


@pytest.mark.parametrize("photometric", ["cpu", "device"])
def test_every_kind_of_failure_is_told_by_key_and_replaced(monkeypatch, photometric):
    pictures = Pictures()
    whole = pictures.data[3]
    assert isinstance(whole, bytes)
    spoilt: dict[int, bytes | str] = {
        0: "its tar is gone",
        4: b"",
        8: b"no picture",
        13: whole[: len(whole) // 2],
    }
    for index, data in spoilt.items():
        pictures.data[index] = data
    samples = pictures.samples(monkeypatch)
    found = []
    for threads in (1, 3):
        views = maker(samples, threads=threads, method="slip", photometric=photometric)
        result = views.start(share(range(20)))()
        views.close()
        failed = {failure.key: failure for failure in views.failures.take()}
        assert {f"k{index:02d}" for index in spoilt} <= set(failed)
        assert failed["k00"].reason == "its tar is gone"
        assert failed["k13"].reason == "its file is cut off"
        for row, index in enumerate(result.indices.tolist()):
            assert (index == row) is (row not in spoilt)
            assert index not in spoilt
            key = f"k{row:02d}"
            while key in failed:
                key = failed[key].replaced_by
            assert key == f"k{index:02d}"
        found.append(result.images)
        alone = views.start(share(result.indices))().images
        assert torch.equal(alone, result.images), "a stand-in looks as it does in its own place"
    assert torch.equal(*found)


def test_too_many_failures_are_refused_whatever_the_threads(monkeypatch):
    pictures = Pictures()
    pictures.data[2:] = [b"no picture"] * (COUNT - 2)
    samples = pictures.samples(monkeypatch)
    for threads in (1, 3):
        views = maker(samples, threads=threads, budget=0.1)
        with pytest.raises(DeclipError, match=r"\d+ of the 40 .* error_budget 0\.1 allows 4"):
            views.start(share(range(20)))()
        views.close()
