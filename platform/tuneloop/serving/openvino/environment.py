"""Whether OpenVINO is installed, and whether it suits a model. Loads nothing of it."""

from __future__ import annotations

import importlib.util
import platform

import psutil

from tuneloop.errors import ModelError

# Weights as they are loaded, those of the compiled graph, and as much for keys and values.
_COPIES = 3
# Each adapter is computed for every token, so with these PyTorch may be as fast.
_MAX_ADAPTER_SHARE = 0.5


def suits(num_bytes: int, adapter_bytes: int) -> bool:
    """Return whether `auto` tries OpenVINO: installed, on x86, with memory, and worth it.

    Args:
        num_bytes: Of the base's weights.
        adapter_bytes: Of all its adapters together.
    """
    if importlib.util.find_spec("openvino") is None:
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False  # tried on no other processor
    if adapter_bytes > _MAX_ADAPTER_SHARE * num_bytes:
        return False
    return _COPIES * (num_bytes + adapter_bytes) <= psutil.virtual_memory().available


def require() -> None:
    """Return if OpenVINO is installed.

    Raises:
        ModelError: It is not.
    """
    if importlib.util.find_spec("openvino") is None:
        raise ModelError.of(
            "the engine OpenVINO cannot be used on this machine",
            where="serving.engine",
            got="it is not installed",
            allowed="the package `openvino`, on every machine that serves",
            remedy="pip install 'tuneloop[openvino]'; or set serving.engine=auto",
        )
