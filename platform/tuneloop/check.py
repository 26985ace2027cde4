"""Everything that can be checked before anything runs, reported at once, without starting Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any, NamedTuple

from rich.console import Console
from rich.text import Text

from tuneloop.artifacts import Workspace
from tuneloop.config import DataConfig, TuneloopConfig
from tuneloop.contest import arm_problems, served_model_problems
from tuneloop.data.check import DataCheck
from tuneloop.data.check import check as check_data
from tuneloop.data.labels import resolve_labels
from tuneloop.data.sources.files import find_files
from tuneloop.data.sources.unlabelled import input_files, read_all_unlabelled
from tuneloop.errors import ArtifactError, ConfigError, DataError, ModelError, Problem
from tuneloop.evals.scoring.choosable import try_scorers
from tuneloop.models.bases.source import BaseModel, resolve_base
from tuneloop.models.chat.renderer import Renderer
from tuneloop.review.fixes import marks_for
from tuneloop.serving.keys import serving_problems
from tuneloop.synthesis.more_of import more_of_problems
from tuneloop.text import counted, format_duration
from tuneloop.training.fit.assess import Fit, assess
from tuneloop.training.fit.estimate import ResourceEstimate, RowTotals, gib
from tuneloop.training.fit.refusals import refuse_small_budget
from tuneloop.training.rows import make_rows
from tuneloop.training.worked import far_from_worked

_SHOWN_TOKENS = 400


class SweepEstimate(NamedTuple):
    """What the trainings of a sweep need in all.

    Attributes:
        num_trials: Trainings, without those that an earlier sweep may have made.
        training_s: Seconds of all trainings, one after the other; None where one is not known.
    """

    num_trials: int
    training_s: float | None


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Args:
        data: The rows, their lengths, and some samples.
        estimate: Memory and time of the training; None when the data cannot be used, or when the
            model allows no estimate.
        problems: Everything that would stop the run; empty when it can start.
        no_estimate: Why the model allows none; empty otherwise.
        sweep: What the trainings of a sweep need.
        notices: Settings of the training that are far from those that have worked.
    """

    data: DataCheck
    estimate: ResourceEstimate | None
    problems: list[Problem] = field(default_factory=list)
    no_estimate: str = ""
    sweep: SweepEstimate | None = None
    notices: list[Problem] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        data = asdict(self.data)
        for name in ("samples", "spread", "findings", "refused", "changed"):
            data.pop(name)
        return {
            "ok": not self.problems,
            "problems": [asdict(problem) for problem in self.problems],
            "notices": [asdict(notice) for notice in self.notices],
            "data": data,
            "estimate": None if self.estimate is None else asdict(self.estimate),
            "no_estimate": self.no_estimate,
            "sweep": None if self.sweep is None else self.sweep._asdict(),
        }


def check(config: TuneloopConfig) -> CheckResult:
    """Return the findings on model, data, and resources.

    Raises:
        ModelError: The base model cannot be used, so nothing else can be checked.
    """
    base = resolve_base(config.model.base)
    try:
        labelled = resolve_labels(config)
    except DataError as error:
        return CheckResult(DataCheck(findings=list(error.problems)), None, list(error.problems))
    config = labelled.config
    data = check_data(config, base)
    data = replace(data, notices=[*labelled.notices, *data.notices])
    fit = assess(config, base, _row_totals(config, data))
    expected = None if fit.prediction is None else fit.prediction.estimate
    unknown = "" if fit.prediction is None else fit.prediction.unknown
    problems = [*data.findings, *fit.problems, *_evaluation_problems(config)]
    problems += _mark_problems(config) + _generation_problems(config)
    problems += serving_problems(config.serving)
    problems += served_model_problems(config, Workspace(config.workspace))
    problems += _metric_problems(config, base, data)
    return CheckResult(data, expected, problems, unknown, notices=_far(config, fit, data))


def _far(config: TuneloopConfig, fit: Fit, data: DataCheck) -> list[Problem]:
    """Return which settings are far from those that have worked; a sweep's own keys are not."""
    if fit.prediction is None:
        return []
    num_rows: float = _expected_rows(config.data, data.num_usable)[0]
    if config.task.type == "language_modeling":
        num_rows *= data.num_tokens / data.num_usable / config.data.max_seq_len  # packed
    far = far_from_worked(config.training, max(1, round(num_rows)), fit.prediction.num_parameters)
    swept = config.sweep.parameters if config.sweep else {}
    return [notice for notice in far if notice.where not in swept]


def _expected_rows(data: DataConfig, num_usable: int) -> tuple[int, int]:
    """Return how many rows there will be to train on and to validate on, if none is removed."""
    split = data.split
    left = num_usable - (split.num_test_examples or split.test_ratio * num_usable)
    validated = split.num_validation_examples or (split.validation_ratio or 0.0) * left
    trained = max(1, round(left - validated))
    return min(trained, data.num_train_examples or trained), round(validated)


def _row_totals(config: TuneloopConfig, data: DataCheck) -> RowTotals | None:
    """Return what is known of the train rows before they are prepared; None of no rows."""
    if not data.num_usable:
        return None
    num_rows, num_validated = _expected_rows(config.data, data.num_usable)
    mean = data.num_tokens / data.num_usable
    num_tokens, longest = round(mean * num_rows), data.length_tokens["max"]
    if config.task.type == "language_modeling":
        num_rows = math.ceil(num_tokens / config.data.max_seq_len)  # packed
        num_validated = math.ceil(num_validated * mean / config.data.max_seq_len)
        longest = min(num_tokens, config.data.max_seq_len)
    sample = make_rows(
        [str(index) for index in range(len(data.spread))],
        [row.input_ids for row in data.spread],
        [row.loss_mask for row in data.spread],
    )
    return RowTotals(num_rows, num_validated, num_tokens, longest, data.target_ratio, sample)


def check_trials(
    result: CheckResult, trials: Sequence[TuneloopConfig], most_s: float
) -> CheckResult:
    """Return the findings with those on every training of a sweep.

    Rows are read once for each dataset, whatever the number of rows that are trained on.

    Args:
        trials: Their configurations.
        most_s: Seconds of training that the sweep may take; infinite where nothing says so.
    """
    problems = list(result.problems)
    by_data: dict[str, list[TuneloopConfig]] = {}
    for trial in trials:
        smaller = trial.data.model_copy(update={"num_train_examples": None, "train_tasks": None})
        rows = trial.model_copy(update={"data": smaller})
        key = rows.model_dump_json(include={"data", "task", "model"})
        by_data.setdefault(key, []).append(trial)
    seconds: list[float | None] = []
    for same in by_data.values():
        hungriest = max(same, key=lambda trial: trial.data.num_train_examples or 0)
        found: list[Problem] = []
        try:
            base = resolve_base(hungriest.model.base)
            data = check_data(resolve_labels(hungriest).config, base)
        except (DataError, ModelError) as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        found += data.findings
        for trial in {trial.model_dump_json(): trial for trial in same}.values():
            try:
                fit = assess(trial, base, _row_totals(trial, data))
            except ModelError as error:
                found += error.problems
                continue
            found += fit.problems
            expected = fit.prediction and fit.prediction.estimate
            seconds.append(expected.whole_s if expected else None)
        problems += [
            problem
            for number, problem in enumerate(found)
            if problem not in problems and problem not in found[:number]
        ]
    try:
        refuse_small_budget(seconds, most_s)
    except ConfigError as error:
        problems += error.problems
    known = [one for one in seconds if one is not None]
    total = sum(known) if known and len(known) == len(seconds) else None
    return replace(result, problems=problems, sweep=SweepEstimate(len(trials), total))


def _evaluation_problems(config: TuneloopConfig) -> list[Problem]:
    """Return what `tuneloop evaluate` would stop at: its arms, and rows of the user's own."""
    problems = arm_problems(config, Workspace(config.workspace))
    try:
        if config.evaluation.sources:
            find_files(config.evaluation.sources, "evaluation.sources")
    except DataError as error:
        problems += error.problems
    return problems


def _generation_problems(config: TuneloopConfig) -> list[Problem]:
    """Return what `tuneloop generate` would stop at before anything is asked."""
    if config.generation is None:
        return []
    try:
        files = input_files(config.generation)
        if config.generation.kind == "answers":
            read_all_unlabelled(files, config.generation, config.task)
    except DataError as error:
        return list(error.problems)
    return more_of_problems(config, Workspace(config.workspace))


def _mark_problems(config: TuneloopConfig) -> list[Problem]:
    """Return why people's marks on rows cannot be read."""
    try:
        marks_for(config, Workspace(config.workspace))
    except (ArtifactError, DataError) as error:
        return list(error.problems)
    return []


def _metric_problems(config: TuneloopConfig, base: BaseModel, data: DataCheck) -> list[Problem]:
    """Return what is wrong with the chosen metrics, tried on the first row's answer."""
    e = config.evaluation
    if not (e.metrics or e.primary or e.tags):
        return []
    answer = ""
    for row in data.spread[:1]:
        ids = [token for token, bit in zip(row.input_ids, row.loss_mask, strict=True) if bit]
        answer = Renderer.load(base.path, config.model.chat_template).decode(ids).strip()
    return try_scorers(config.task, config.evaluation, answer)


def report(result: CheckResult, output: IO[str]) -> None:
    """Print the findings; samples show context dimmed and targets in green.

    Raises:
        DataError: With all problems, when there are any.
    """
    console = Console(file=output, highlight=False)
    data = result.data
    if data.num_usable:
        lengths = ", ".join(f"{name} {value}" for name, value in data.length_tokens.items())
        targets = ", ".join(f"{name} {value}" for name, value in data.target_length_tokens.items())
        console.print(f"rows       {data.num_usable:,} of {data.num_rows:,} can be used")
        console.print(f"tokens     {data.num_tokens:,}; in a row: {lengths}")
        console.print(f"targets    {data.target_ratio:.0%} of the tokens; in a row: {targets}")
    if result.estimate is not None:
        expected = result.estimate
        memory = f"about {gib(expected.peak_memory_bytes)} at the peak on each worker"
        time = "" if expected.training_s is None else f", {expected.training_s / 60:.1f} minutes"
        cost = "" if expected.cost is None else f", cost {expected.cost:.2f}"
        console.print(f"training   {memory}{time}{cost}")
    if result.sweep is not None:
        total = result.sweep.training_s
        time = "" if total is None else f", about {format_duration(total)} one after the other"
        console.print(f"sweep      {counted(result.sweep.num_trials, 'training')}{time}")
    if result.no_estimate:
        why = f"memory and time cannot be estimated for this model: {result.no_estimate}"
        console.print(f"training   {why}", markup=False)
    for notice in (*data.notices, *result.notices):
        console.print(f"notice     {notice}", markup=False)
    for sample in data.samples:
        console.print(f"\n{sample.source}", style="bold", markup=False)
        text = Text()
        for token, is_target in sample.tokens[:_SHOWN_TOKENS]:
            text.append(token, style="bold green" if is_target else "dim")
        console.print(text)
    if data.samples:
        legend = Text("\nlearned", style="bold green")
        legend.append(" and ", style="default").append("context", style="dim")
        console.print(legend)
    if result.problems:
        raise DataError(*result.problems)
