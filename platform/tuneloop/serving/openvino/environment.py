"""Whether OpenVINO is installed. Loads nothing of it."""

from __future__ import annotations

import importlib.util

from tuneloop.errors import ModelError, Problem


def require() -> None:
    """Return if OpenVINO is installed.

    Raises:
        ModelError: It is not.
    """
    if importlib.util.find_spec("openvino") is None:
        raise ModelError(
            Problem(
                "the engine OpenVINO cannot be used on this machine",
                where="serving.engine",
                got="it is not installed",
                allowed="the package `openvino`, on every machine that serves",
                remedy="pip install 'tuneloop[openvino]'; or set serving.engine=auto",
            )
        )
