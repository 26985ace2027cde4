"""Which differences between a trained and a served model are told, and which are rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuneloop.errors import EndpointError
from tuneloop.models.export.parity import LiveAnswer, check_served, compare, write_parity
from tuneloop.records import Completion, Endpoint

LIVE = LiveAnswer([1, 2], [5, 6, 9], [-0.1, -0.2, -0.3], [2.0, 1e-4, 2.0], stopped=True)


def served(ids: list[int], logprobs: list[float], reason: str = "stop") -> Completion:
    return Completion("", reason, 2, len(ids), token_ids=ids, logprobs=logprobs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("completion", "passed", "greedy_equal", "worst"),
    [
        (served([5, 6], [-0.1, -0.2]), True, True, 0.0),
        (served([5, 6], [-0.1, -0.201]), True, True, 0.001),
        (served([5, 6], [-0.1, -0.25]), False, True, 0.05),
        (served([5, 6], [float("nan"), -0.2]), False, True, float("nan")),
        # Another token than the live model's, where its two best were as good as equal.
        (served([5, 7, 8], [-0.1, -0.2, -9.0], "length"), True, False, 0.0),
        (served([4, 6], [-0.1, -0.2]), False, False, 0.0),
        # It goes on where the live model stopped, or stops where that went on.
        (served([5, 6, 7], [-0.1, -0.2, -0.3], "length"), False, False, 0.0),
        (served([], []), False, False, 0.0),
        (served([5], [-0.1], "length"), True, False, 0.0),
    ],
)
def test_compare(completion: Completion, passed: bool, greedy_equal: bool, worst: float) -> None:
    parity = compare([LIVE], [completion], 2e-3)
    assert (parity.passed, parity.greedy_equal) == (passed, greedy_equal)
    assert parity.arms["served"] == pytest.approx(worst, nan_ok=True)


def test_an_answer_cut_off_by_length_has_to_go_on() -> None:
    cut = LiveAnswer([1], [5, 6], [-0.1, -0.2], [2.0, 2.0])
    assert compare([cut], [served([5, 6], [-0.1, -0.2], "length")], 2e-3).passed
    assert not compare([cut], [served([5], [-0.1])], 2e-3).passed


def test_without_recorded_answers_nothing_is_asked(model_server: Any, tmp_path: Path) -> None:
    (tmp_path / "parity.json").write_text(json.dumps({"passed": True}))
    assert check_served(Endpoint(model_server.url, "parrot"), tmp_path) is None
    assert check_served(Endpoint(model_server.url, "parrot"), tmp_path / "none") is None
    assert not model_server.requests


def test_a_server_that_cannot_be_compared_is_told(model_server: Any, tmp_path: Path) -> None:
    """It answers with text alone, without token ids; or it refuses the prompt."""
    write_parity(tmp_path, compare([LIVE], [served([5, 6], [-0.1, -0.2])], 2e-3), [LIVE])
    endpoint = Endpoint(model_server.url, "parrot")
    with pytest.raises(EndpointError, match="not a completion with token ids"):
        check_served(endpoint, tmp_path)
    assert model_server.requests[0]["prompt"] == LIVE.prompt_ids
    assert model_server.requests[0]["max_tokens"] == len(LIVE.ids)
    model_server.failures = [400]
    with pytest.raises(EndpointError, match="room for 5 tokens"):
        check_served(endpoint, tmp_path)
