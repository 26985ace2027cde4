"""Settings that have worked, with their evidence, and notices of settings that are far from them.

Every entry is a training of a real model that was measured on held-out rows; docs/training.md shows
the table, docs/log the runs.
"""

from __future__ import annotations

from typing import NamedTuple

from tuneloop.config import TrainingConfig
from tuneloop.errors import Problem
from tuneloop.text import counted
from tuneloop.training.batches import Schedule


class Worked(NamedTuple):
    """A training after which the model was better than before it, and than its few-shot prompt.

    Attributes:
        num_parameters: Weights of the model, in millions.
        num_rows: Train rows.
        result: Its score on held-out rows beside what it is compared with.
    """

    task: str
    method: str
    model: str
    num_parameters: int
    learning_rate: float
    rank: int | None
    num_rows: int
    num_epochs: int
    num_steps: int
    result: str


_SMALL, _LARGER = ("SmolLM2-135M-Instruct", 135), ("Gemma-3-270M", 268)
WORKED = (
    Worked("extraction", "lora", *_SMALL, 1e-3, 16, 200, 1, 25, "54.5%; prompt 9.8%"),
    Worked("extraction", "lora", *_LARGER, 1e-3, 16, 200, 1, 25, "79.5%; smaller model 64.0%"),
    Worked("classification", "lora", *_SMALL, 5e-4, 16, 64, 2, 16, "68.8%; prompt 21.9%"),
    Worked("30 intents", "lora", *_SMALL, 1e-3, 16, 320, 2, 80, "89.2%; prompt 5.0%, simple 89.4%"),
    Worked("30 intents", "full", *_SMALL, 2e-4, None, 160, 2, 40, "78.3%; adapters 73.9%"),
    Worked("function calls", "lora", *_SMALL, 1e-3, 16, 252, 1, 32, "56.2%; prompt 4.2%"),
    Worked("mixture", "lora", *_SMALL, 5e-4, 16, 96, 1, 12, "50.0%; prompt 22.5%"),
)
# Further from all that worked than this factor is far.
_FAR = 5
# Fewer steps cost much: 8 in place of 16 cost the classification above 25 points, 13 in place of 25
# the extraction 18.
_FEW_STEPS = 20
_MANY_EPOCHS = 10
_A_BILLION = 10**9


def usual_learning_rate(method: str, num_parameters: int) -> float:
    """Return the peak learning rate where the configuration has none.

    Small models take larger rates, and adapters larger ones than all weights.

    Args:
        method: `training.method`.
        num_parameters: Of the whole model.

    Source: models below a billion weights: `WORKED`, and the sweeps of docs/log. Larger ones, not
    run here: Dettmers et al. 2023, arXiv:2305.14314, for adapters; Taori et al. 2023, "Stanford
    Alpaca", for all weights.
    """
    small, large = (2e-4, 2e-5) if method == "full" else (1e-3, 2e-4)
    return small if num_parameters < _A_BILLION else large


def far_from_worked(training: TrainingConfig, num_rows: int, num_parameters: int) -> list[Problem]:
    """Return what is far from everything that has worked; nothing is refused for it.

    Args:
        num_rows: Train rows.
        num_parameters: Of the base model.
    """
    problems = []
    # Adapters on a base in 4 bits learn as adapters do.
    method = "lora" if training.method == "qlora" else training.method
    alike = [one for one in WORKED if one.method == method]
    sizes = sorted(one.num_parameters * 10**6 for one in alike)
    rates = sorted({one.learning_rate for one in alike})
    # Larger models take smaller rates: nothing is known of them here.
    rate = training.learning_rate
    is_known = rates and sizes[0] / _FAR <= num_parameters <= sizes[-1] * _FAR
    is_near = is_known and rate and rates[0] / _FAR * 0.99 <= rate <= rates[-1] * _FAR * 1.01
    if is_known and rate and not is_near:
        problems.append(
            Problem(
                "the learning rate is far from those that have worked",
                where="training.learning_rate",
                got=f"{rate:g} with training.method {training.method}",
                allowed=f"{rates[0]:g} to {rates[-1]:g} in {len(alike)} training(s) of models "
                "of this size",
                remedy=f"try {rates[-1]:g}, or let `tuneloop sweep` try several",
            )
        )
    # Who sets the number of steps knows it.
    steps = Schedule.of(training, num_rows).num_steps
    if steps < _FEW_STEPS and training.max_steps is None:
        problems.append(
            Problem(
                "few optimizer steps: twice as many brought 18 and 25 points where it was measured",
                where="training.num_epochs",
                got=f"{counted(steps, 'step')}, for about {counted(num_rows, 'row')} in batches of "
                f"{training.global_batch_size}, {training.num_epochs} time(s)",
                allowed=f"{_FEW_STEPS} or more",
                remedy="set training.num_epochs="
                f"{training.num_epochs * -(-_FEW_STEPS // max(1, steps))}, or add rows",
            )
        )
    watched = training.keep == "best" or training.early_stopping_patience is not None
    if training.num_epochs > _MANY_EPOCHS and not watched:
        most_epochs = max(one.num_epochs for one in WORKED)
        problems.append(
            Problem(
                "many epochs, and nothing that notices when rows are learned by heart",
                where="training.num_epochs",
                got=str(training.num_epochs),
                allowed=f"1 to {most_epochs} have worked",
                remedy="set training.keep: best with data.split.validation_ratio, or take fewer",
            )
        )
    return problems
