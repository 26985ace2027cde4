"""What `tuneloop check` tells of a sweep before anything runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tuneloop.check import CheckResult, check, check_trials
from tuneloop.config import TuneloopConfig
from tuneloop.sweeps.grid import expand
from tuneloop.sweeps.study import Budget
from tuneloop.training.fit import refusals


@pytest.fixture
def raw(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    rows = [{"question": f"What is {n} and {n}?", "answer": str(2 * n)} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "s",
        "task": {"type": "generation"},
        "model": {"base": str(tiny_model)},
        "data": {
            "sources": [{"path": str(tmp_path / "rows.jsonl"), "format": "question_answer"}],
            "split": {"num_test_examples": 10},
        },
    }


def checked(raw: dict[str, Any], **sweep: Any) -> CheckResult:
    config = TuneloopConfig.model_validate(raw | {"sweep": sweep})
    trials = [cell.config for cell in expand(config)]
    return check_trials(check(config), trials, Budget.of(config).seconds)


def test_all_that_stands_in_a_sweeps_way_is_told_at_once(raw: dict[str, Any]) -> None:
    told = checked(
        raw,
        parameters={
            "data.num_train_examples": [20, 41],
            "model.base": [raw["model"]["base"], "/no/such/model"],
            "training.lora.target_modules": ["all-linear", ["no_such"]],
        },
    )
    what = [f"{problem.what} {problem.got}" for problem in told.problems]
    assert len(what) == 3, what
    # 41 to train on, 10 to validate, 10 to test: of 60.
    assert "not enough rows for the splits 60 usable rows" in what
    assert any("/no/such/model" in one for one in what)
    assert any("no layer of this name" in one for one in what)


def test_a_sweep_that_can_run_tells_how_long_it_takes(raw: dict[str, Any]) -> None:
    result = checked(raw, parameters={"training.num_epochs": [1, 3]}, num_seeds=2)
    assert result.problems == []
    assert result.sweep is not None
    assert result.sweep.num_trials == 4
    single = [checked(raw, parameters={"training.num_epochs": [n]}).sweep for n in (1, 3)]
    assert result.sweep.training_s == pytest.approx(
        2 * sum(one.training_s for one in single if one is not None and one.training_s),
        rel=0.5,  # how fast this machine is is measured
    )
    assert result.summary()["sweep"] == result.sweep._asdict()


def test_a_budget_in_which_nothing_fits_is_refused(raw: dict[str, Any]) -> None:
    parameters = {"training.num_epochs": [10, 30]}
    assert checked(raw, parameters=parameters, budget={"hours": 1}).problems == []
    (problem,) = checked(raw, parameters=parameters, budget={"hours": 1e-9}).problems
    assert problem.what == "no training fits into the budget"


def test_a_model_that_does_not_fit_is_refused(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 1

    monkeypatch.setattr(refusals.psutil, "virtual_memory", Memory)
    config = TuneloopConfig.model_validate(raw)
    trials = [config]
    result = check_trials(CheckResult(check(config).data, None), trials, math.inf)
    (problem,) = result.problems
    assert problem.what == "the training does not fit into memory"
