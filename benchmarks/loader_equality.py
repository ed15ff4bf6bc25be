"""Whether our views are drawn as torchvision's and Pillow's are: p-values, and pixels apart.

    python benchmarks/loader_equality.py ROOT --peers PEERS/bin/python

``ROOT`` is a set of benchmarks/loader.py. Each row of the first table is a two-sample
Kolmogorov-Smirnov test of one statistic of independent draws; a control whose brightness varies
by 0.2 in place of 0.4 shows what the tests can tell apart. Then both get the same
boxes, and the views are compared pixel by pixel.

Mean colors (red, green, blue) do differ, whatever the seeds: torchvision uses Pillow's 8-bit blends
for brightness, contrast and saturation; each cuts fractions off, and they lose 1.3 of 255 levels
together; ours computes in floats and loses none. It shows as p-values of 0.0002 to 0.34.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, ks_2samp

from declip_pixels import decode_views
from declip_shards import Store, read_samples
from declip_train.augment import (
    change_colors,
    crop_boxes,
    draw_colors,
    draw_flips,
    view_draws_batch,
)
from declip_train.views import AUGMENTATIONS, ViewParameters

if TYPE_CHECKING:
    from benchmarks.loader_statistics import (
        COLOR_NAMES,
        COLOR_REPEATS,
        CROP_DRAWS,
        CROPS,
        PIXEL_PICTURES,
        color_statistics,
        crop_statistics,
    )
else:
    from loader_statistics import (
        COLOR_NAMES,
        COLOR_REPEATS,
        CROP_DRAWS,
        CROPS,
        PIXEL_PICTURES,
        color_statistics,
        crop_statistics,
    )

HERE = Path(__file__).parent
SIZE = 224
MOCO = AUGMENTATIONS["moco_v2"]


def draws_of(number: int, view: int) -> NDArray[np.float64]:
    """Uniform numbers of as many samples."""
    return view_draws_batch(0, [0] * number, [f"{n:09d}" for n in range(number)], view)


def our_colors(views: NDArray[np.uint8], parameters: ViewParameters) -> NDArray[np.float64]:
    """Statistics of the views, each drawn ``COLOR_REPEATS`` times."""
    repeated = np.repeat(views[:, ::2, ::2], COLOR_REPEATS, 0)
    found = []
    for view, draws in zip(repeated, draws_of(len(repeated), 1), strict=True):
        changed = change_colors(view, draw_colors(draws, parameters, SIZE))
        found.append(color_statistics(np.rint(changed * 255).astype(np.uint8), view))
    return np.array(found)


def p_value(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """Of the hypothesis that both are drawn alike."""
    return float(ks_2samp(ours, theirs).pvalue)


def compare_draws(peer: dict[str, NDArray[Any]]) -> dict[str, float]:
    """p-values by what is compared."""
    values = {}
    for number, (height, width, least) in enumerate(CROPS):
        sizes = np.tile([height, width], (CROP_DRAWS, 1))
        boxes = crop_boxes(draws_of(CROP_DRAWS, number), sizes, least)
        own = crop_statistics(boxes.astype(np.float64), height, width)
        other = crop_statistics(peer[f"crops_{number}"], height, width)
        for name in own:
            where = f"crop {name} of {height}x{width} from {least}"
            values[where] = p_value(own[name], other[name])
    own_colors = our_colors(peer["views"], MOCO)
    for place, name in enumerate(COLOR_NAMES):
        values[f"color {name}"] = p_value(own_colors[:, place], peer["colors"][:, place])
    flips = draw_flips(draws_of(CROP_DRAWS, 0), MOCO)
    values["mirrored"] = float(binomtest(int(flips.sum()), len(flips), 0.5).pvalue)
    return values


def control(peer: dict[str, NDArray[Any]]) -> float:
    """The p-value that another range of brightness gets."""
    place = COLOR_NAMES.index("green")
    own = our_colors(peer["views"], dataclasses.replace(MOCO, brightness=0.2))
    return p_value(own[:, place], peer["colors"][:, place])


def compare_pixels(root: Path, peer: dict[str, NDArray[Any]]) -> dict[str, float]:
    """Steps of 8 bits between views of the same boxes."""
    store, data = Store(str(root)), []
    for shard in sorted(path.stem for path in (root / "shards").glob("*.tar")):
        data += [sample.image for sample in read_samples(store, shard)]
    data = data[:PIXEL_PICTURES]
    out = np.empty((1, len(data), SIZE, SIZE, 3), np.uint8)
    boxes = np.ascontiguousarray(peer["boxes"][None], np.int32)
    wrong = decode_views(data, boxes, np.zeros((1, len(data)), np.bool_), SIZE, out)
    assert not any(wrong), wrong
    apart = np.abs(out[0].astype(np.int64) - peer["views"])
    above = float((apart > 1).mean())
    return {"mean": float(apart.mean()), "most": float(apart.max()), "share_above_1": above}


def equality(root: Path, peers: str) -> dict[str, Any]:
    """All comparisons, printed as well."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "draws.npz")
        command = [peers, str(HERE / "loader_peer_draws.py"), str(root), str(path)]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(command, check=True, env={**clean, "OMP_NUM_THREADS": "1"})
        with np.load(path) as arrays:
            peer = dict(arrays)
    values = compare_draws(peer)
    least = min(values.values())
    found = {
        "p_values": {name: round(value, 4) for name, value in values.items()},
        "least_p_times_tests": round(min(1.0, least * len(values)), 4),
        "control_p": control(peer),
        "pixels_apart": compare_pixels(root, peer),
    }
    for name, value in values.items():
        print(f"{name:36} p = {value:.3f}")
    print(f"least p, times the number of tests: {found['least_p_times_tests']}")
    print(f"control (brightness within 0.2, not 0.4): p = {found['control_p']:.2g}")
    print(f"views of the same boxes, steps of 8 bits apart: {found['pixels_apart']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--peers", required=True, help="Python of the peers' environment")
    given = parser.parse_args()
    print(json.dumps(equality(given.root, given.peers)))


if __name__ == "__main__":
    main()
