"""An evaluation as one self-contained HTML page, and as a summary for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import jinja2
from markupsafe import Markup, escape
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tuneloop.artifacts import Artifact
from tuneloop.config import TuneloopConfig
from tuneloop.evals.reporting.actions import Action
from tuneloop.evals.reporting.forgetting import show_forgetting
from tuneloop.evals.reporting.formatting import format_estimate, format_number
from tuneloop.evals.reporting.headline import describe_rows, write_headline
from tuneloop.evals.reporting.judge import describe_judge, show_judge
from tuneloop.evals.reporting.views import (
    list_facts,
    show_arms,
    show_calibration,
    show_confusion,
    show_examples,
    show_labels,
    show_pair,
    show_parts,
    show_prompts,
    show_slices,
    show_tags,
    show_tasks,
)
from tuneloop.evals.scoring.pairing import Change, PairedExample
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.text import shorten

_SHOWN_EXAMPLES = 2
_SHOWN_CHANGES: tuple[tuple[Change, str, str], ...] = (
    ("fixed", "got better", "green"),
    ("introduced", "got worse", "red"),
)


def render_report(
    evaluation: Evaluation, config: TuneloopConfig, dataset: str, actions: Sequence[Action] = ()
) -> str:
    """Return the report as one HTML page that loads nothing from anywhere.

    Args:
        evaluation: What to show.
        config: What was run; shown as it was.
        dataset: Reference of the dataset whose rows were answered.
        actions: What to do next, the best first.
    """
    template = page_template("tuneloop.evals.reporting")
    metric = evaluation.metric(evaluation.primary)
    secondary = evaluation.secondary()
    return template.render(
        style=Markup(page_style()),
        name=evaluation.name,
        headline=write_headline(evaluation),
        metric=metric,
        confidence=f"{evaluation.metrics['confidence']:.0%}",
        num_examples=evaluation.metrics["num_examples"],
        arms=show_arms(evaluation, secondary),
        secondary=[evaluation.metric(name).label for name in secondary],
        pairs=[show_pair(evaluation, pair) for pair in evaluation.candidate_pairs()],
        other_pairs=[
            show_pair(evaluation, pair)
            for pair in evaluation.comparison["pairs"]
            if pair not in evaluation.candidate_pairs()
        ],
        judge=describe_judge(evaluation.judge) if evaluation.judge else "",
        judged=show_judge(evaluation.judge),
        forgetting=evaluation.forgetting,
        forgotten=show_forgetting(evaluation.forgetting, evaluation.metrics["confidence"]),
        tasks=show_tasks(evaluation),
        parts=show_parts(evaluation),
        labels=show_labels(evaluation),
        confusion=show_confusion(evaluation),
        calibration=show_calibration(evaluation),
        slices=show_slices(evaluation),
        tags=show_tags(evaluation),
        strongest=evaluation.strongest_other(),
        examples=show_examples(evaluation),
        actions=actions,
        prompts=show_prompts(evaluation),
        has_calls="function_call" in evaluation.metrics["metrics"],
        facts=list_facts(evaluation, config, dataset),
    )


def terminal_table(artifact: Artifact) -> RenderableType:
    """Return a summary for the terminal: headline, arms, paired differences, a few examples.

    Args:
        artifact: A published evaluation.
    """
    evaluation = Evaluation.load(artifact)
    metric, headline = evaluation.metric(evaluation.primary), write_headline(evaluation)
    confidence = f"{evaluation.metrics['confidence']:.0%}"
    colour = {"good": "green", "bad": "red", "mixed": "yellow", "unclear": "yellow"}[headline.tone]
    arms = Table(title=f"{evaluation.primary}: {metric.label}", title_justify="left", box=None)
    for heading in ("arm", "score", f"{confidence} interval", "scored", "unscored", "tokens out"):
        arms.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in evaluation.arms:
        score = arm["scores"][evaluation.primary]
        value, _, interval = format_estimate(score, metric).partition(" ")
        arms.add_row(
            arm["name"],
            Text(value, style="bold"),
            interval.strip("()"),
            describe_rows(evaluation, score).replace(" answers", ""),
            str(arm["num_unscored"]),
            format_number(arm["median_completion_tokens"]),
        )
        for model in arm.get("models", []):
            score = model["scores"][evaluation.primary]
            value, _, interval = format_estimate(score, metric).partition(" ")
            arms.add_row(f"  {model['name']}", value, interval.strip("()"), "", "", "")
    parts: list[RenderableType] = [
        Text(headline.title, style=f"bold {colour}"),
        Text(headline.detail),
        Text(),
        arms,
    ]
    if pairs := evaluation.candidate_pairs():
        table = Table(title="paired differences", title_justify="left", box=None)
        for heading in ("compared", "difference", f"{confidence} interval", "p", "fixed", "worse"):
            table.add_column(heading, justify="left" if heading == "compared" else "right")
        for pair in pairs:
            shown = show_pair(evaluation, pair)
            table.add_row(
                f"{pair['arm']} − {pair['other']}",
                Text(shown["difference"], style="bold"),
                shown["interval"],
                shown["p"],
                str(shown["num_fixed"]),
                str(shown["num_worse"]),
            )
        parts += [Text(), table]
    for judged in show_judge(evaluation.judge):
        parts += [Text(), Text(f"judge: {judged.title}", style="italic"), Text(judged.result)]
    for row in show_forgetting(evaluation.forgetting, evaluation.metrics["confidence"]):
        told = f"{row['task']} ({row['metric']}): {row['before']} before, {row['after']} after"
        parts += [Text(), Text(f"general task {told}: {row['says']}")]
    if tasks := show_tasks(evaluation):
        table = Table(title="task by task", title_justify="left", box=None)
        table.add_column("task")
        for arm in evaluation.arms:
            table.add_column(arm["name"], justify="right")
        for task in tasks:
            table.add_row(
                f"{task['name']} ({task['label']})", *(bar["value"] for bar in task["bars"])
            )
        parts += [Text(), table]
    if other := evaluation.strongest_other():
        examples = evaluation.pair(other, evaluation.candidate["name"])
        for change, heading, style in _SHOWN_CHANGES:
            chosen = examples.where(examples.change == change)[:_SHOWN_EXAMPLES]
            if chosen:
                parts += [Text(), Text(f"{heading} than {other}", style=style)]
                parts += [Padding(_terminal_example(e), (0, 0, 1, 2)) for e in chosen]
    return Group(*parts)


def page_template(package: str) -> jinja2.Template:
    """Return the `report.html.jinja` of a package; it escapes texts."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["with_code"] = with_code
    source = resources.files(package).joinpath("report.html.jinja")
    return environment.from_string(source.read_text(encoding="utf-8"))


def page_style() -> str:
    """Return the style sheet that all reports share."""
    source = resources.files("tuneloop.evals.reporting").joinpath("style.css")
    return source.read_text(encoding="utf-8").rstrip()


def with_code(text: str) -> Markup:
    """Return a text with its `quoted` parts as code elements, everything escaped."""
    pieces = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if index % 2 else escape(piece)
        for index, piece in enumerate(pieces)
    )


def _terminal_example(example: PairedExample) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in (
        ("question", example.question),
        ("reference", example.reference),
        (example.before.arm, example.before.completion),
        (example.after.arm, example.after.completion),
    ):
        table.add_row(label, Text(shorten(" ".join(text.split()), 240)))
    return table
