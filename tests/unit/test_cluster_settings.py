from __future__ import annotations

from ray.data._internal.execution.resource_manager import ResourceManager


def test_ray_data_still_looks_again_after_the_interval_that_is_shortened() -> None:
    # `cluster.py` sets it; in a Ray that calls it otherwise the second worker would wait again.
    assert "GLOBAL_LIMITS_UPDATE_INTERVAL_S" in ResourceManager.get_global_limits.__code__.co_names
    assert isinstance(ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S, int | float)
