"""Whether models fit into the memory of this machine, told before one of them is loaded."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open

from tuneloop.errors import ResourceError
from tuneloop.models.export.layout import ADAPTER
from tuneloop.serving.loaded import ServedModel

_BYTES_PER_WEIGHT = 4  # on a CPU weights are float32, whatever the file has
_GIB = 2**30


def refuse_small_memory(models: Sequence[ServedModel], copies: int = 1) -> None:
    """Raise ResourceError if this machine's memory does not hold the weights of all models.

    Args:
        copies: How often the engine has the weights in memory.
    """
    folders = {model.path for model in models}
    folders |= {model.adapter / ADAPTER for model in models if model.adapter is not None}
    sizes = {folder: weight_bytes(folder) for folder in folders}
    needed, available = copies * sum(sizes.values()), psutil.virtual_memory().available
    if needed <= available:
        return
    largest = max(sizes, key=lambda folder: sizes[folder])
    raise ResourceError.of(
        "the models do not fit into memory together",
        where="this machine",
        got=f"{needed / _GIB:.1f} GiB of weights in float32, of which "
        f"{copies * sizes[largest] / _GIB:.1f} GiB are those of {largest}",
        allowed=f"{available / _GIB:.1f} GiB available",
        remedy="serve fewer models, smaller ones, or adapters of one base "
        "(`models/NAME@vN/adapter`); or free memory",
    )


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a directory's weights in float32, by the headers of its files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        # A file that cannot be read is told when it is loaded.
        with contextlib.suppress(SafetensorError, OSError), safe_open(file, "numpy") as weights:
            shapes = (weights.get_slice(name).get_shape() for name in weights.keys())  # noqa: SIM118
            total += sum(math.prod(shape) for shape in shapes)
    return total * _BYTES_PER_WEIGHT
