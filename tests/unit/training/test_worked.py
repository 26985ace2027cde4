"""What is far from everything that has worked is told, and nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from tuneloop.config import TrainingConfig
from tuneloop.training.deepspeed_engine import num_weights, peak_learning_rate
from tuneloop.training.worked import WORKED, far_from_worked, usual_learning_rate

SMALL, LARGE = 135_000_000, 7_000_000_000
ROOT = Path(__file__).parents[3]


def told(num_rows: int = 400, num_parameters: int = SMALL, **training: Any) -> list[str]:
    config = TrainingConfig.model_validate(training)
    return [problem.where for problem in far_from_worked(config, num_rows, num_parameters)]


def test_all_that_has_worked_is_told_nothing_but_too_few_steps() -> None:
    for one in WORKED:
        where = told(
            one.num_rows, one.num_parameters * 10**6, method=one.method,
            learning_rate=one.learning_rate, num_epochs=one.num_epochs,
        )  # fmt: skip
        assert where == ["training.num_epochs"] * (one.num_steps < 20), one


@pytest.mark.parametrize(
    ("training", "where"),
    [
        ({}, []),
        ({"learning_rate": 1e-5}, ["training.learning_rate"]),
        ({"learning_rate": 2e-2, "method": "qlora"}, ["training.learning_rate"]),
        ({"learning_rate": 2e-2, "num_parameters": LARGE}, []),
        ({"learning_rate": 1e-2, "num_parameters": 100_000}, []),
        ({"num_rows": 100}, ["training.num_epochs"]),
        ({"num_rows": 100, "num_epochs": 2}, []),
        ({"num_rows": 100, "max_steps": 4}, []),
        ({"num_epochs": 12}, ["training.num_epochs"]),
        ({"num_epochs": 12, "keep": "best"}, []),
        ({"num_epochs": 12, "early_stopping_patience": 2}, []),
        ({"num_rows": 8, "learning_rate": 1.0}, ["training.learning_rate", "training.num_epochs"]),
    ],
)
def test_a_setting_is_told_where_it_is_far(training: dict[str, Any], where: list[str]) -> None:
    assert told(**training) == where


def test_the_remedy_of_few_steps_is_enough() -> None:
    (problem,) = far_from_worked(TrainingConfig(), 50, SMALL)
    assert problem.got.startswith("7 steps")
    assert problem.remedy.startswith("set training.num_epochs=3,")
    assert far_from_worked(TrainingConfig(num_epochs=3), 50, SMALL) == []


def test_the_table_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for one in WORKED:
        rank = "–" if one.rank is None else one.rank
        row = (
            f"| {one.task} | {one.model} | `{one.method}` | {rank} | {one.learning_rate:g} | "
            f"{one.num_rows} | {one.num_epochs} | {one.num_steps} | {one.result} |"
        )
        assert row in page


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "configs").glob("*.yaml")), ids=str)
def test_no_recipe_is_far(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    num_rows = config["data"].get("num_train_examples", 100)
    assert told(num_rows, **{"num_epochs": 2} | config["training"]) == []


def test_the_usual_rate_depends_on_method_and_size_and_is_near_what_has_worked() -> None:
    assert usual_learning_rate("lora", SMALL) == usual_learning_rate("qlora", SMALL) == 1e-3
    assert usual_learning_rate("full", SMALL) == 2e-4
    assert usual_learning_rate("lora", 7 * 10**9) == 2e-4
    assert usual_learning_rate("full", 7 * 10**9) == 2e-5
    for one in WORKED:
        rate = usual_learning_rate(one.method, one.num_parameters * 10**6)
        assert rate / 2 <= one.learning_rate <= rate * 2


def test_a_base_in_4_bits_counts_all_its_weights_for_the_usual_rate() -> None:
    packed = torch.nn.Linear(8, 8, bias=False)
    packed.weight.quant_state = SimpleNamespace(shape=torch.Size((30_000, 40_000)))
    assert num_weights(packed.weight) == 1_200_000_000
    qlora = TrainingConfig(method="qlora")
    assert peak_learning_rate(packed, qlora) == usual_learning_rate("qlora", 1_200_000_000) == 2e-4
    assert peak_learning_rate(torch.nn.Linear(8, 8), qlora) == 1e-3
    assert peak_learning_rate(packed, TrainingConfig(learning_rate=3e-5)) == 3e-5
