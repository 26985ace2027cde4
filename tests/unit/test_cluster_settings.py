from __future__ import annotations

import pytest
import ray

from tuneloop.cluster import connect
from tuneloop.config import ResourcesConfig
from tuneloop.errors import ResourceError


def test_a_ray_that_does_not_start_in_time_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a machine that is so busy that Ray gives up after 30 s, which a test cannot wait for.
    def give_up(**settings: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", give_up)
    with (
        pytest.raises(ResourceError, match="cannot start Ray") as caught,
        connect(ResourcesConfig()),
    ):
        pass
    (problem,) = caught.value.problems
    assert "timed out during startup" in problem.got
    assert "run the same command again" in problem.remedy
