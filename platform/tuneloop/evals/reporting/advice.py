"""What to do next: actions with what each may bring, what it costs and what it rests on.

What an action may bring is measured on the answers that are there. Most of it is a bound: if an
action got all answers right that it is about and changed no other, the score would rise by so much.
Only a sweep's forecast says more. Where nothing says how much, none is told.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from tuneloop.artifacts import Artifact
from tuneloop.config import GenerationConfig
from tuneloop.evals.reporting.formatting import format_difference, format_value
from tuneloop.evals.scoring.clusters import Clusters
from tuneloop.evals.scoring.estimates import describe_mean
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.metrics import FIELD_PREFIX, Metric
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.evals.scoring.slices import weak_parts
from tuneloop.records import FINETUNED
from tuneloop.text import format_duration, shorten

Basis = Literal["at most", "forecast", "unknown"]
_MOST_PARTS, _FEWEST_ROWS, _SHOWN_CHARACTERS = 3, 3, 60
# The smallest of a learning curve's volumes has to be a training still.
_FEWEST_TO_SWEEP = 64
_SATURATED = 0.97


class Gain(NamedTuple):
    """What an action may add to the primary metric, with the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Action:
    """Something to do.

    Args:
        title: What.
        why: The measurement that speaks for it.
        gain: In the unit of the primary metric; None where it is not known.
        basis: Whether the gain is a bound, a forecast, or not known.
        num_rows: Rows that the gain is about; 0 where it is about all.
        cost_s: Seconds of training and evaluation, as they took before; None where no machine has
            to run.
        command: What does it, or shows what has to be done.
        page: Address of the dashboard's page with the evidence; empty where there is none.
    """

    title: str
    why: str
    gain: Gain | None
    basis: Basis
    num_rows: int
    cost_s: float | None
    command: str
    page: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        gain = None if self.gain is None else self.gain._asdict()
        return {**asdict(self), "gain": gain}

    def describe_gain(self, metric: Metric) -> str:
        """Return the gain in words."""
        if self.gain is None:
            return "not known"
        low, high = (format_difference(end, metric, unit=False) for end in self.gain[1:])
        prefix = "at most " * (self.basis == "at most")
        return f"{prefix}{format_difference(self.gain.value, metric)} ({low} to {high})"

    def describe_cost(self) -> str:
        """Return the cost in words."""
        return "reading" if self.cost_s is None else f"about {format_duration(self.cost_s)}"


class Situation(NamedTuple):
    """What advice is given for.

    Args:
        evaluation: The newest one, with its predictions.
        reference: Its reference.
        config_file: Of the configuration, for the commands.
        took_s: Seconds that dataset, model and evaluation took; None where that is not known.
        num_epochs: Of the training.
        curve: Content of the newest sweep's `curve.json`; empty without one.
        num_waiting: Marks that the next preparation applies.
        num_wanted: Rows that people marked with "needs more like this".
        teacher: Who can write rows; None where none is configured.
        num_train_rows: Of the dataset that the model was trained on; 0 where that is not known.
        num_spare_rows: Train rows of it that `data.num_train_examples` left out.
        kept: Settings of the model that the configuration file has otherwise, as overrides: a
            command without them would change them back.
        trained_s: Of `took_s`, those of the training.
        max_tokens: Of the evaluation.
        has_arms: Whether the configuration names arms, which `tuneloop run` does not compare.
        group_by: Column by which the rows were split; empty without one.
    """

    evaluation: Evaluation
    reference: str
    config_file: str
    took_s: float | None
    num_epochs: int
    curve: dict[str, Any]
    num_waiting: int
    num_wanted: int = 0
    teacher: GenerationConfig | None = None
    num_train_rows: int = 0
    num_spare_rows: int = 0
    kept: Sequence[str] = ()
    trained_s: float = 0.0
    max_tokens: int = 0
    has_arms: bool = False
    group_by: str = ""

    def cost_s(self, times: float) -> float | None:
        """Return the seconds that an iteration takes with so many times the training."""
        return None if self.took_s is None else self.took_s + (times - 1) * self.trained_s

    def command(self, name: str, *changes: str) -> str:
        """Return a command on this configuration; what is not changed stays as it was.

        The same arms answer again: what the configuration names takes two commands.
        """
        changed = {change.partition("=")[0] for change in changes}
        kept = [setting for setting in self.kept if setting.partition("=")[0] not in changed]
        names = ["train", "evaluate"] if name == "run" and self.has_arms else [name]
        settings = [self.config_file, *changes, *kept]
        return " && ".join(shlex.join(["tuneloop", name, *settings]) for name in names)

    def with_rows(self) -> str | None:
        """Return the command that trains on twice the rows; None where no more are there."""
        if not self.num_spare_rows:
            return None
        return self.command("run", f"data.num_train_examples={self.num_twice}")

    @property
    def num_twice(self) -> int:
        """Twice the rows that were trained on, or all that are there."""
        return min(2 * self.num_train_rows, self.num_train_rows + self.num_spare_rows)


def advise(now: Situation) -> list[Action]:
    """Return what to do next: what surely brings something, then bounds, then what is not known."""
    evaluation = now.evaluation
    metric = evaluation.metric(evaluation.primary)
    rows = [
        p
        for p in evaluation.predictions
        if p.arm == evaluation.candidate["name"] and p.scores.get(evaluation.primary) is not None
    ]
    found: list[Action] = []
    if metric.kind != "number" and rows:
        loss = {p.example_id: 1.0 - (p.scores[evaluation.primary] or 0.0) for p in rows}
        found += _about_answers(now, rows, loss, metric)
        found += _about_fields(now, rows, loss, metric)
        found += _about_parts(now, rows, loss, metric)
    score = evaluation.candidate["scores"][evaluation.primary]["value"] or 0.0
    is_saturated = metric.kind == "binary" and score >= _SATURATED
    found += _about_rows(now)
    if not is_saturated:
        found += _about_training(now)
    if now.num_waiting:
        found.append(
            Action(
                f"Apply the {now.num_waiting:,} marks that wait",
                "People have corrected rows; stored answers are scored again where only right "
                "answers change.",
                None,
                "unknown",
                now.num_waiting,
                now.took_s,
                now.command("run"),
                "/marks",
            )
        )
    if now.num_wanted:
        found.append(
            Action(
                f"Add training rows like the {now.num_wanted:,} that people marked",
                "People have marked them with `needs more like this`.",
                None,
                "unknown",
                now.num_wanted,
                now.took_s,
                _more_of(now, "marks"),
                "/marks",
            )
        )
    if is_saturated:
        found.append(
            Action(
                "Stop, or make the test harder",
                f"{score:.1%} is right: this test can no longer tell models apart.",
                None, "unknown", 0, None, f"tuneloop serve {now.config_file}",
            )
        )  # fmt: skip
    # What says nothing but a command that is there for a reason already is left out.
    told = {a.command for a in found if a.gain is not None and "=" in a.command}
    found = [a for a in found if a.gain is not None or a.command not in told]
    return sorted(found, key=_rank, reverse=True)


def _rank(action: Action) -> tuple[bool, float]:
    """Return what actions are ordered by: a gain that is forecast comes before any bound."""
    if action.gain is None:
        return False, -1.0
    return action.basis == "forecast" and action.gain.low > 0, action.gain.value


def _more_of(now: Situation, what: str) -> str:
    """Return the command that adds rows of some kind: those that are there, or else written ones.

    Without a teacher it is the one that chooses the inputs to label.
    """
    if what != "marks" and (command := now.with_rows()):
        return command
    if now.evaluation.tasks or "language_modeling" in now.evaluation.task_types():
        return now.command("run")  # both are for a single task with answers
    if now.teacher is None:
        return f"tuneloop label-next INPUTS.csv {now.config_file}"
    changes = [f"generation.more_of={what}"]
    if now.teacher.kind in ("pairs", "answers"):
        changes += ["generation.kind=self_instruct", "generation.sources=[]"]
        changes += ["generation.instruction="] * bool(now.teacher.instruction)
    return shlex.join(["tuneloop", "generate", now.config_file, *changes])


def _bound(
    rows: Sequence[Prediction], loss: dict[str, float], ids: Collection[str], metric: Metric
) -> Gain:
    """Return what the score would gain if the answers to some examples were all right."""
    values = np.array([loss[p.example_id] if p.example_id in ids else 0.0 for p in rows])
    clusters = Clusters.of([p.cluster or p.example_id for p in rows])
    told = describe_mean(values, clusters, metric, Resampling(num_resamples=2_000))
    return Gain(told["value"], max(0.0, told["low"] or 0.0), told["high"] or 0.0)


def _about_answers(
    now: Situation, rows: Sequence[Prediction], loss: dict[str, float], metric: Metric
) -> list[Action]:
    """Return actions for errors with a name, doubtful references and misleading train rows."""
    found: list[Action] = []
    see = f"tuneloop dashboard {now.config_file}"
    longer = now.command("run", f"training.num_epochs={now.num_epochs + 1}")
    wrong = [p for p in rows if loss[p.example_id] > 0]

    def add(title: str, why: str, ids: Collection[str], command: str, page: str) -> None:
        if len(ids) >= _FEWEST_ROWS:
            gain = _bound(rows, loss, ids, metric)
            why = why.format(n=len(ids), wrong=len(wrong))
            cost_s = None if command == see else now.took_s
            if command == longer:
                cost_s = now.cost_s((now.num_epochs + 1) / now.num_epochs)
            found.append(Action(title, why, gain, "at most", len(ids), cost_s, command, page))

    address = f"evaluations={now.reference}"
    cut = [p for p in wrong if "cut_off" in p.error_tags]
    # A limit is too low only where the right answer is longer than what was written.
    short = {p.example_id for p in cut if len(p.reference) > len(p.completion)}
    add(
        "Allow longer answers",
        "{n} of {wrong} wrong answers were cut off, and are shorter than their references.", short,
        now.command("evaluate", f"evaluation.max_tokens={2 * now.max_tokens}"),
        f"/answers?{address}&error=cut_off",
    )  # fmt: skip
    add(
        f"Teach answers to end: train for {now.num_epochs + 1} epochs in place of {now.num_epochs}",
        "{n} of {wrong} wrong answers were still going on where they had become as long as their "
        "references.", {p.example_id for p in cut} - short, longer,
        f"/answers?{address}&error=cut_off",
    )  # fmt: skip
    malformed = {p.example_id for p in wrong if "wrong_format" in p.error_tags}
    add(
        "Teach the form of the answer",
        "{n} of {wrong} wrong answers do not have the form that the task asks for.", malformed,
        longer,
        f"/answers?{address}&error=wrong_format",
    )  # fmt: skip
    add(
        "Look whether these references are right",
        "To {n} of the {wrong} questions that were answered wrong, several models give the same "
        "answer, and it is not the reference.", _agreed_otherwise(now.evaluation, wrong),
        see, f"/answers?{address}",
    )  # fmt: skip
    misled = {
        example
        for example, near in now.evaluation.nearest.items()
        if example in loss and any(row["conflicts"] for row in near)
    }
    add(
        "Correct the training rows that say otherwise",
        "Beside {n} of {wrong} wrong answers there is a training row that asks the same and says "
        "otherwise than the reference.", misled, see, f"/answers?{address}",
    )  # fmt: skip
    return found


def _agreed_otherwise(evaluation: Evaluation, wrong: Sequence[Prediction]) -> set[str]:
    """Return the examples to which at least two arms give one and the same wrong answer.

    An arm with its answers held to their form is the same model again, and no second opinion.
    """
    asked = {arm["name"]: arm.get("free_arm") or arm["name"] for arm in evaluation.arms}

    def said(p: Prediction) -> tuple[str, str]:
        return p.example_id, " ".join(p.completion.split())

    who: dict[tuple[str, str], set[str]] = {}
    for p in evaluation.predictions:
        if p.status == "scored" and not p.scores.get(evaluation.primary):
            who.setdefault(said(p), set()).add(asked[p.arm])
    return {p.example_id for p in wrong if p.completion.strip() and len(who.get(said(p), ())) > 1}


def _about_fields(
    now: Situation, rows: Sequence[Prediction], loss: dict[str, float], metric: Metric
) -> list[Action]:
    """Return an action for each field that alone makes answers wrong."""
    fields = [n for n in now.evaluation.metrics["metrics"] if n.startswith(FIELD_PREFIX)]
    alone: dict[str, set[str]] = {}
    for p in rows:
        failed = [name for name in fields if (p.scores.get(name) or 0.0) < 1]
        if loss[p.example_id] > 0 and len(failed) == 1:
            alone.setdefault(failed[0].removeprefix(FIELD_PREFIX), set()).add(p.example_id)
    num_wrong = sum(value > 0 for value in loss.values())
    more = f"train on {now.num_twice:,} rows in place of {now.num_train_rows:,}"
    if not now.num_spare_rows:
        more = "more training rows in which it is as hard"
    return [
        Action(
            f"Get `{name}` right: {more}",
            f"It is the only field that is wrong in {len(ids)} of {num_wrong} wrong answers.",
            _bound(rows, loss, ids, metric),
            "at most",
            len(ids),
            now.cost_s(now.num_twice / now.num_train_rows if now.num_spare_rows else 1),
            now.with_rows() or f"tuneloop dashboard {now.config_file}",
            f"/answers?evaluations={now.reference}&wrong={name}",
        )
        for name, ids in alone.items()
        if len(ids) >= _FEWEST_ROWS
    ]


def _about_parts(
    now: Situation, rows: Sequence[Prediction], loss: dict[str, float], metric: Metric
) -> list[Action]:
    """Return an action for each part of the rows that is surely worse than the others."""
    arm, better = now.evaluation.candidate["name"], metric.better
    found = []
    parts = weak_parts(now.evaluation.slices, arm, better)
    # No group is on both sides: rows of a test group cannot become training rows.
    for part in [part for part in parts if part["by"] != now.group_by][:_MOST_PARTS]:
        rest, value = part["rest"], part["value"]
        share = part["n"] / len(rows)
        gain = Gain(*(share * max(0.0, rest - part[end]) for end in ("value", "high", "low")))
        name = f"{part['by']} = {shorten(str(part['slice']), _SHOWN_CHARACTERS)}"
        found.append(
            Action(
                f"Add training rows with {name}",
                f"{part['n']} test rows are such: {format_value(value, metric)}, the others "
                f"{format_value(rest, metric)}. The bound is that they become like the others.",
                gain,
                "at most",
                part["n"],
                now.cost_s(now.num_twice / now.num_train_rows if now.num_spare_rows else 1),
                _more_of(now, now.reference),
                f"/answers?evaluations={now.reference}",
            )
        )
    return found


def _about_rows(now: Situation) -> list[Action]:
    """Return what more rows of the same kind bring: as the newest sweep forecasts it, or a try."""
    found = []
    for curve in now.curve.get("curves", []):
        forecasts = (curve.get("forecast") or {}).get("forecasts") or []
        for item in forecasts:
            # The step from as many rows as the model has: from others it would be another gain.
            if "step" not in item or now.num_train_rows not in (0, _step_from(item, forecasts)):
                continue
            num_more = item["num_examples"] - now.num_train_rows
            there = now.command("run", f"data.num_train_examples={item['num_examples']}")
            found.append(
                Action(
                    f"Add training rows of the same kind, to {item['num_examples']:,} in all",
                    f"The learning curve of {curve.get('series') or 'the sweep'} forecasts it.",
                    Gain(*(item["step"][end] for end in ("value", "low", "high"))),
                    "forecast",
                    0,
                    now.cost_s(item["num_examples"] / (now.num_train_rows or item["num_examples"])),
                    there if 0 < num_more <= now.num_spare_rows else now.command("run"),
                    "/sweep",
                )
            )
            break
    more = now.with_rows()
    if not found and more:
        found.append(
            Action(
                f"Train on {now.num_twice:,} rows in place of {now.num_train_rows:,}",
                f"{now.num_spare_rows:,} more train rows are there, which "
                "`data.num_train_examples` leaves out.",
                None, "unknown", 0, now.cost_s(now.num_twice / now.num_train_rows), more, "",
            )
        )  # fmt: skip
    return found


def _step_from(item: dict[str, Any], forecasts: Sequence[dict[str, Any]]) -> int:
    """Return the number of rows from which a forecast's `step` leads to its own."""
    before = forecasts.index(item) - 1
    if before >= 0:
        return int(forecasts[before]["num_examples"])
    return int(item["num_examples"] // item["times"])


def _about_training(now: Situation) -> list[Action]:
    """Return to train for longer, or to measure whether more rows help."""
    if now.evaluation.candidate["name"] != FINETUNED:
        return []
    more = now.num_epochs + 1
    found = [
        Action(
            f"Train for {more} epochs in place of {now.num_epochs}",
            "Only a try tells; look at the validation loss first, if there is one.",
            None, "unknown", 0, now.cost_s(more / now.num_epochs),
            now.command("run", f"training.num_epochs={more}"), "/model",
        )
    ]  # fmt: skip
    largest = now.num_train_rows
    if now.num_spare_rows < now.evaluation.metrics["num_examples"]:
        largest -= now.evaluation.metrics["num_examples"]  # they become the validation rows
    if not now.curve and largest >= _FEWEST_TO_SWEEP:
        volumes = f"{{data.num_train_examples: [{largest // 4}, {largest // 2}, {largest}]}}"
        found.append(
            Action(
                "Measure whether more rows would help",
                "There is no learning curve yet: a sweep over data volumes makes one.",
                None, "unknown", 0, None if now.took_s is None else 3 * now.took_s,
                now.command("sweep", f"sweep.parameters={volumes}"), "/sweep",
            )
        )  # fmt: skip
    return found


def read_curve(sweeps: Sequence[Artifact]) -> dict[str, Any]:
    """Return `curve.json` of the newest of some sweeps; empty where there is none."""
    for sweep in reversed(sweeps):
        file = sweep.path / "curve.json"
        if file.is_file():
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
    return {}
