"""Small networks over stored vectors: LAION's aesthetics predictors and others of their kind.

A head is a chain of linear layers. Their order is that of the numbers in the names of the
weights, whatever the names are else: ``layers.0.weight`` ... ``layers.7.weight`` of LAION's
improved predictor, plain ``weight`` and ``bias`` of its first one. Files of torch hold nothing
about activations, and LAION's predictors have none; a safetensors file may name one in its
metadata: ``activation`` none, relu, gelu or silu (between the layers), and ``output`` none,
sigmoid or softmax (softmax: the last of several classes).
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from declip_filter.encoders import one_thread
from declip_filter.scorers import Scores, Vectors
from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

if TYPE_CHECKING:
    import torch

ACTIVATIONS = ("none", "relu", "gelu", "silu")
OUTPUTS = ("none", "sigmoid", "softmax")
_NUMBER = re.compile(r"\d+")


class HeadScorer:
    """A head over images' vectors. The result is one number a row."""

    sides = ("img_emb",)

    def __init__(self, name: str, file: str, column: str) -> None:
        """Read the weights; nothing in the file is executed.

        Args:
            name: of the scorer, ``KIND:FILE``.
            file: ``.safetensors`` or a state dict of torch.
            column: the signal it writes.

        Raises:
            DeclipError: the file is missing or damaged, holds anything but linear layers, or they
                do not fit each other.
        """
        self.name = name
        self.columns = (column,)
        state, metadata = _read_weights(name, Path(file))
        self._activation = _choice(name, metadata, "activation", ACTIVATIONS)
        self._output = _choice(name, metadata, "output", OUTPUTS)
        self._layers = _linear_layers(name, state)
        self.dim = int(self._layers[0][0].shape[1])
        num_outputs = int(self._layers[-1][0].shape[0])
        if num_outputs != 1 and not (self._output == "softmax" and num_outputs > 1):
            raise DeclipError(
                f"scorer {name!r} gives {num_outputs} numbers a picture where one is due; name "
                "output=softmax in the file's metadata if they are classes."
            )
        self.digest = _digest(self._layers, self._activation, self._output)

    def score_vectors(self, vectors: Mapping[str, Vectors]) -> Scores:
        """float32 (rows, 1).

        Raises:
            DeclipError: the vectors are not as long as the head's input.
        """
        import torch

        rows = vectors["img_emb"]
        if rows.shape[1] != self.dim:
            raise DeclipError(
                f"scorer {self.name!r} reads vectors of length {self.dim}, these are of length "
                f"{rows.shape[1]}; name embeddings or an encoder of the model it was made for."
            )
        with one_thread(), torch.inference_mode():
            values = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
            for place, (weight, bias) in enumerate(self._layers):
                if place:
                    values = self._activate(values)
                values = torch.nn.functional.linear(values, weight, bias)
            if self._output == "sigmoid":
                values = values.sigmoid()
            elif self._output == "softmax":
                values = values.softmax(dim=1)[:, -1:]
            return np.asarray(values.numpy(), dtype=np.float32)

    def _activate(self, values: "torch.Tensor") -> "torch.Tensor":
        import torch

        if self._activation == "none":
            return values
        found: torch.Tensor = getattr(torch.nn.functional, self._activation)(values)
        return found


def _read_weights(name: str, path: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """State dict and metadata of a file."""
    import torch
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DeclipError(f"scorer {name!r}: there is no file {str(path)!r}; correct the path.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                names: list[str] = list(file.keys())
                return {key: file.get_tensor(key) for key in names}, file.metadata() or {}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise DeclipError(f"{_unreadable(name, path)} ({error}); fetch it again.") from error
    except Exception as error:
        # torch tells of pickled code by an exception of pickle's.
        first = str(error).splitlines()[0]
        raise DeclipError(
            f"{_unreadable(name, path)} without executing it ({first}); save its state_dict."
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise DeclipError(
            f"{_unreadable(name, path)}: it holds a {type(state).__name__}, not a state_dict; save "
            "that."
        )
    return state, {}


def _unreadable(name: str, path: Path) -> str:
    return f"scorer {name!r}: the weights {str(path)!r} cannot be read"


def _choice(name: str, metadata: Mapping[str, str], key: str, known: tuple[str, ...]) -> str:
    value = metadata.get(key, "none")
    if value not in known:
        raise DeclipError(
            f"scorer {name!r}: the file's metadata say {key}={value!r}.{did_you_mean(value, known)}"
        )
    return value


def _linear_layers(
    name: str, state: Mapping[str, Any]
) -> "list[tuple[torch.Tensor, torch.Tensor | None]]":
    """(weight (outputs, inputs), bias (outputs,)) of each layer, in order, float32."""
    weights = {
        key: value
        for key, value in state.items()
        if key.rpartition(".")[2] == "weight" and getattr(value, "ndim", 0) == 2
    }
    others = set(state) - set(weights) - {_bias_name(key) for key in weights}
    if others or not weights:
        what = f"also {sorted(others)[0]!r}" if others else "none"
        raise DeclipError(
            f"scorer {name!r}: a head is linear layers, weights and biases, but the file holds "
            f"{what}; wrap the model in scorer_factory instead."
        )
    layers: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for key in sorted(weights, key=lambda key: [int(n) for n in _NUMBER.findall(key)]):
        weight = weights[key].float().contiguous()
        bias = state.get(_bias_name(key))
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise DeclipError(
                f"scorer {name!r}: {_bias_name(key)!r} is of shape {tuple(bias.shape)} where "
                f"({weight.shape[0]},) is due; the file is damaged: fetch it again."
            )
        if layers and layers[-1][0].shape[0] != weight.shape[1]:
            raise DeclipError(
                f"scorer {name!r}: {key!r} reads {weight.shape[1]} numbers, the layer before gives "
                f"{layers[-1][0].shape[0]}; the layers are no chain: use scorer_factory instead."
            )
        layers.append((weight, None if bias is None else bias.float().contiguous()))
    return layers


def _bias_name(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"


def _digest(
    layers: "list[tuple[torch.Tensor, torch.Tensor | None]]", activation: str, output: str
) -> str:
    digest = hashlib.sha256(f"{activation} {output}\n".encode())
    for layer in layers:
        for tensor in layer:
            if tensor is not None:
                digest.update(f"{tuple(tensor.shape)}\n".encode())
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
