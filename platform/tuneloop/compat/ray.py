"""What Ray Serve tells its own code alone. Tried with Ray 2.60.

`tests/unit/serving/test_keys.py` fails where a newer version moves one of these parts.
"""

from __future__ import annotations

import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE


def serve_host() -> str | None:
    """Return the address that the cluster's Ray Serve listens on; None where it does not run.

    A deployed application is built on the cluster, where only Serve's controller knows it.
    """
    if not ray.is_initialized():
        return None
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None
    host: str | None = ray.get(controller.get_http_config.remote()).host
    return host
