"""Small ONNX networks written by hand, for there is no writer of ONNX among the dependencies.

The bytes are those of protocol buffers; the numbers of the fields are onnx.proto's.
"""

from collections.abc import Mapping, Sequence

import numpy as np

FLOAT, INTS = 1, 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _tensor(name: str, values: np.ndarray) -> bytes:
    array = np.ascontiguousarray(values, np.float32)
    dims = b"".join(_number(1, size) for size in array.shape)
    return dims + _number(2, FLOAT) + _bytes(8, name) + _bytes(9, array.tobytes())


def _value(name: str, shape: Sequence[int | str]) -> bytes:
    dims = b"".join(
        _bytes(1, _bytes(2, size) if isinstance(size, str) else _number(1, size)) for size in shape
    )
    tensor_type = _number(1, FLOAT) + _bytes(2, dims)
    return _bytes(1, name) + _bytes(2, _bytes(1, tensor_type))


def _node(kind: str, inputs: Sequence[str], output: str, axes: Sequence[int] = ()) -> bytes:
    body = b"".join(_bytes(1, name) for name in inputs) + _bytes(2, output) + _bytes(4, kind)
    if axes:
        body += _bytes(5, _bytes(1, "axes") + b"".join(_number(8, a) for a in axes)
                       + _number(20, INTS))  # fmt: skip
        body += _bytes(5, _bytes(1, "keepdims") + _number(3, 0) + _number(20, 2))
    return body


def mean_classifier(
    weight: np.ndarray,
    bias: np.ndarray,
    *,
    side: int = 16,
    channels_first: bool = True,
    metadata: Mapping[str, str] | None = None,
    num_inputs_channels: int = 3,
) -> bytes:
    """A network that takes the mean of each channel, times ``weight`` (channels, classes), plus
    ``bias`` (classes,): logits (batch, classes)."""
    channels = num_inputs_channels
    shape = ("n", channels, side, side) if channels_first else ("n", side, side, channels)
    axes = (2, 3) if channels_first else (1, 2)
    graph = (
        _bytes(1, _node("ReduceMean", ["pictures"], "means", axes))
        + _bytes(1, _node("MatMul", ["means", "weight"], "products"))
        + _bytes(1, _node("Add", ["products", "bias"], "logits"))
        + _bytes(2, "mean_classifier")
        + _bytes(5, _tensor("weight", weight))
        + _bytes(5, _tensor("bias", bias))
        + _bytes(11, _value("pictures", shape))
        + _bytes(12, _value("logits", ("n", len(bias))))
    )
    properties = b"".join(
        _bytes(14, _bytes(1, key) + _bytes(2, value)) for key, value in (metadata or {}).items()
    )
    return _number(1, 8) + _bytes(7, graph) + _bytes(8, _number(2, 13)) + properties
