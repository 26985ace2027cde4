"""Which trials a sweep has, and what is refused before the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Artifact
from tuneloop.config import SweepConfig, TuneloopConfig, load_config
from tuneloop.errors import ConfigError
from tuneloop.sweeps.grid import evaluated_on, expand, num_combinations, with_drawn
from tuneloop.sweeps.plan import refuse_losses


def config(
    parameters: dict[str, Any], split: dict[str, Any] | None = None, **sweep: Any
) -> TuneloopConfig:
    return TuneloopConfig.model_validate(
        {
            "name": "s",
            "task": {"type": "extraction"},
            "model": {"base": "m"},
            "data": {
                "sources": [{"path": "rows.jsonl", "format": "question_answer"}],
                "split": split or {"num_test_examples": 30},
            },
            "sweep": {"parameters": parameters, **sweep},
        }
    )


RATE = "training.learning_rate"


def test_every_trial_is_chosen_on_the_same_validation_split() -> None:
    cells = expand(config({"data.num_train_examples": [100, None], RATE: [1e-4, 1e-3]}))
    assert [cell.values[RATE] for cell in cells] == [1e-4, 1e-3] * 2
    # As large as the test, where none is configured.
    assert {cell.config.data.split.num_validation_examples for cell in cells} == {30}
    assert {cell.config.evaluation.split for cell in cells} == {"validation"}
    assert evaluated_on(cells[0].config, "test").evaluation.split == "test"
    (of_ratio,) = expand(config({RATE: [1e-4]}, split={"test_ratio": 0.2}))
    assert of_ratio.config.data.split.validation_ratio == 0.2
    (own,) = expand(
        config({RATE: [1e-4]}, split={"num_test_examples": 30, "num_validation_examples": 7})
    )
    assert own.config.data.split.num_validation_examples == 7


def test_each_seed_is_a_trial_of_its_own() -> None:
    cells = expand(config({RATE: [1e-4, 1e-3]}, num_seeds=3))
    assert [cell.config.training.seed for cell in cells] == [0, 1, 2] * 2
    assert cells[1].label == f"{RATE}=0.0001, seed=1"


def test_random_trials_are_the_same_every_time_and_within_their_ends() -> None:
    parameters = {
        RATE: {"loguniform": [1e-5, 1e-2]},
        "training.warmup_ratio": {"uniform": [0.0, 0.5]},
        "training.lora.rank": {"randint": [4, 8]},
        "training.lr_scheduler": {"choice": ["cosine", "linear"]},
        "training.num_epochs": [1, 2],
    }
    cells = expand(config(parameters, num_trials=200))
    again = expand(config(parameters, num_trials=200))
    assert [cell.values for cell in cells] == [cell.values for cell in again]
    assert len({repr(cell.values) for cell in cells}) == 200
    other = expand(config(parameters, num_trials=200, seed=1))
    assert cells[0].values != other[0].values
    ranks = {cell.values["training.lora.rank"] for cell in cells}
    assert ranks == {4, 5, 6, 7}, "the end is left out, as in Ray Tune"
    rates = [cell.values[RATE] for cell in cells]
    assert 1e-5 <= min(rates) < 1e-4 < 1e-3 < max(rates) <= 1e-2
    # As many below 3e-4, the middle of three orders of magnitude, as above.
    assert 70 < sum(rate < 3.16e-4 for rate in rates) < 130
    # A grid drawn from has no trial twice, and no more than it has.
    few = expand(config({RATE: [1e-4, 1e-3]}, num_trials=5))
    assert sorted(cell.values[RATE] for cell in few) == [1e-4, 1e-3]


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        expand(
            config(
                {
                    "data.split.num_test_examples": [10, 20],
                    "training.seed": [1, 2],
                    "training.learning_rat": [1, 2],
                    "training.num_epochs": [1, "none"],
                    "training.warmup_ratio": {"uniform": [0.5, 0.1]},
                    RATE: {"loguniform": [0, 0.1]},
                    "training.lora.rank": {"randint": [2, 8], "choice": [3]},
                    "training.lora.alpha": [],
                    "training.weight_decay": [0.1, 0.0, 0.1],
                },
                num_seeds=2,
            )
        )
    told = "\n".join(str(problem) for problem in caught.value.problems)
    for expected in (
        "`data.split.num_test_examples` cannot be swept",
        "seeds are given twice",
        "unknown key `training.learning_rat`",
        "`training.num_epochs` a value that is not allowed",
        "uniform: [0.1, 0.5]",
        "begins above 0",
        "of one kind",
        "`training.lora.alpha` has no value",
        "set sweep.num_trials",
        "`training.weight_decay` has a value twice",
    ):
        assert expected in told, told


def test_mistakes_of_search_metric_and_budget_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        expand(
            config(
                {
                    "data.num_train_examples": {"randint": [10, 20]},
                    RATE: {"loguniform": [1e-4, 5.0]},
                    "training.num_epochs": {"uniform": [1, 3.5]},
                },
                search="optuna",
                scheduler="asha",
                metric="accurracy",
                budget={"price": 3},
            )
        )
    told = "\n".join(str(problem) for problem in caught.value.problems)
    for expected in (
        "nothing says how many combinations optuna draws",
        "give a list: data.num_train_examples: [10, 20]",
        "set resources.price_per_hour",
        "early stopping compares trainings that differ in their settings only",
        "sweep.metric",
        # Both ends are tried.
        "3.5",
    ):
        assert expected in told, told
    for sweep, expected in (
        ({"metric": "validation_loss", "mode": "max"}, "allowed: min"),
        ({"mode": "min"}, "allowed: max"),
        ({"search": "grid", "num_trials": 3}, "a grid takes every combination"),
    ):
        with pytest.raises(ConfigError, match=expected):
            expand(config({RATE: [1e-4, 1e-3]}, **sweep))
    for nothing in ({"trials": 0}, {"hours": 0}, {"price": -1}):
        with pytest.raises(ValueError, match="greater than"):
            config({RATE: [1e-4]}, budget=nothing)


def test_a_metric_takes_the_place_of_the_primary_one() -> None:
    (cell,) = expand(config({RATE: [1e-4]}, metric="fields_f1", mode="max"))
    assert cell.config.evaluation.primary == "fields_f1"
    assert evaluated_on(cell.config, "test").evaluation.primary == "fields_f1"
    (cell,) = expand(config({RATE: [1e-4]}, metric="validation_loss"))
    assert cell.config.evaluation.primary is None


def test_a_drawn_combination_has_the_settings_of_its_listed_values() -> None:
    settings = config(
        {"training.method": ["lora", "full"], RATE: {"loguniform": [1e-4, 1e-2]}},
        search="optuna",
        budget={"trials": 5},
        num_seeds=2,
    )
    cells = expand(settings)
    assert [cell.values["training.method"] for cell in cells] == ["lora", "lora", "full", "full"]
    assert num_combinations(settings.sweep) == 3, "five trainings begin the third combination"
    first, second = with_drawn(cells[2], {"training.method": "full", RATE: 5e-3}, 2)
    assert first.config.training.learning_rate == 5e-3
    assert first.config.training.method == "full"
    assert (first.seed, second.seed) == (0, 1)
    assert second.config.training.seed == 1
    assert second.values == {"training.method": "full", RATE: 5e-3}


def test_what_is_no_list_and_no_distribution_is_refused_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "name: s\ntask: {type: extraction}\nmodel: {base: m}\n"
        "data: {sources: [{path: r.jsonl, format: messages}]}\n"
        "sweep: {parameters: {training.learning_rate: 1e-3, training.seed: {normal: [0, 1]}}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    assert "training.learning_rate is neither" in str(problem)
    assert "training.seed is neither" in str(problem)


def test_losses_of_other_tokens_or_rows_are_not_compared(tmp_path: Path) -> None:
    def dataset(name: str, renderer: str, num_targets: dict[str, int]) -> Artifact:
        (tmp_path / name / "validation").mkdir(parents=True)
        masks = [[0, *[1] * num] for num in num_targets.values()]
        table = pa.table({"row_id": [*num_targets], "loss_mask": masks})
        pq.write_table(table, tmp_path / name / "validation" / "part.parquet")
        return Artifact(
            "datasets", name, 1, tmp_path / name, "", {"config": {"renderer": renderer}}
        )

    small = dataset("small", "a", {"r": 3, "s": 5})
    large = dataset("large", "b", {"r": 3, "s": 5})  # another template, the same tokens
    coarse = dataset("coarse", "c", {"r": 2, "s": 4})

    def refused(datasets: list[Artifact], rows: frozenset[str] | None = None, **sweep: Any) -> str:
        try:
            refuse_losses(SweepConfig(parameters={"model.base": ["m"]}, **sweep), datasets, rows)
        except ConfigError as error:
            return " ".join(f"{p.where}: {p.what.partition('of ')[2]}" for p in error.problems)
        return ""

    by_loss: dict[str, Any] = {"metric": "validation_loss"}
    assert refused([small, coarse, small], **by_loss).endswith("are of other tokens")
    told = refused([small, coarse], scheduler="asha", search="optuna", num_trials=2)
    assert "sweep.scheduler" in told
    assert "sweep.search" in told
    assert refused([small, large], scheduler="asha", **by_loss) == ""
    assert refused([small, coarse], frozenset("r"), metric="exact_match") == ""
    # Of other rows a score is taken on those that all have; a loss cannot be.
    assert refused([small, small], frozenset("r"), **by_loss).endswith("other validation rows")
    assert refused([small, small], frozenset("r"), scheduler="asha") == ""
