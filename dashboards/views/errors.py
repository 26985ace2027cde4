"""Error analysis: two arms side by side, what was fixed and what broke."""

from __future__ import annotations

import html
from typing import NamedTuple

import streamlit as st

import theme
from headline import ARM_HELP
from marking import KINDS, MarkedRow, Marking, marking_of
from nearest import show_nearest
from shell import (
    begin_with,
    choose_artifact,
    choose_page,
    identity,
    load_evaluation,
    page_number,
    refuse,
)
from tuneloop.artifacts import Artifact, Workspace
from tuneloop.errors import UserError
from tuneloop.evals.reporting import error_analysis as analysis
from tuneloop.evals.reporting.error_analysis import (
    CHANGE_LABELS,
    TAG_CHANGE_LABELS,
    Against,
    Filter,
    TagCount,
)
from tuneloop.evals.reporting.views import evidence_of, show_slices
from tuneloop.evals.scoring.pairing import CHANGES, Change, PairedExample, Pairs
from tuneloop.evals.scoring.references import changed_references
from tuneloop.evals.scoring.results import Evaluation

PAGE_SIZE = 5
MOST_SLICES = 12
# An error that only the first answer has is no news; one that is new or remains is.
TAG_TONES = {"fixed": "", "introduced": "bad", "both": "warn"}
ALL_TASKS = "all tasks"
AGAINST: dict[Against, str] = {"reference": "from the reference", "other": "between the two"}


class Paired(NamedTuple):
    """The examples of two arms with what is counted of them."""

    examples: Pairs
    counts: dict[Change, int]
    tags: list[TagCount]


# What goes over all answers is done once, and not at every click.
@st.cache_resource(max_entries=2, show_spinner="Comparing the answers")
def pair(
    made: str, _evaluation: Evaluation, before: str, after: str, metric: str, task: str | None
) -> Paired:
    examples = _evaluation.pair(before, after, metric, task)
    counts = {name: int((examples.change == name).sum()) for name in CHANGES}
    counts = {change: count for change, count in counts.items() if count}
    return Paired(examples, counts, analysis.count_tags(examples))


@st.cache_data(max_entries=8)
def changed_between(
    made: tuple[str, str], _first: Artifact, _second: Artifact, _datasets: list[Artifact]
) -> list[str]:
    return sorted(changed_references(_first, _second, _datasets))


@st.cache_data(max_entries=8)
def metrics_of(made: str, _evaluation: Evaluation, task: str | None) -> list[str]:
    return analysis.judged_metrics(_evaluation, task)


def of_both(artifact: Artifact) -> str:
    """Return what the caches know the answers by: both evaluations, if there are two."""
    return f"{identity(artifact)} {st.session_state.get('with')}"


class Comparison(NamedTuple):
    """What the selectors at the top of the page ask for."""

    artifact: Artifact
    evaluation: Evaluation
    before: str
    after: str
    metric: str
    task: str | None
    workspace: Workspace


def with_another(workspace: Workspace, artifact: Artifact, evaluation: Evaluation) -> Evaluation:
    """Return the evaluation with the arms of another one, if one is chosen to compare with."""
    published = workspace.published()
    others = [a.ref for a in reversed(published) if a.kind == "evaluations"]
    others.remove(artifact.ref)
    if not others:
        return evaluation
    begin_with("with", None)
    other = st.selectbox(
        "Together with another evaluation", others, None, key="with", bind="query-params",
        placeholder="none: compare the arms of this one",
    )  # fmt: skip
    if other is None:
        return evaluation
    try:
        opened = workspace.open(other)
        datasets = [a for a in published if a.kind == "datasets"]
        both = (identity(opened), identity(artifact))
        changed = changed_between(both, opened, artifact, datasets)
        if changed:
            told = "rows are not compared between the two evaluations: their right answers differ."
            st.caption(f"{len(changed):,} {told}")
        joined = evaluation.beside(load_evaluation(opened), other, changed)
    except (UserError, OSError) as error:
        refuse("The other evaluation cannot be opened.", error)
        raise
    if not {evaluation.primary, evaluation.row_metric} <= joined.metrics["metrics"].keys():
        label = evaluation.metric(evaluation.primary).label.replace("`", "")
        st.info(f"The other evaluation was not scored by {label}: they cannot be compared.")
        st.stop()
    return joined


def choose() -> Comparison:
    """Return the evaluation, the two arms, the metric and, in a mixture, the task to look at."""
    first, left, middle, right = st.columns([1.4, 1, 1, 1])
    with first:
        workspace, artifact = choose_artifact("evaluations", "Evaluation")
    evaluation = load_evaluation(artifact)
    evaluation = with_another(workspace, artifact, evaluation)
    task = None
    if evaluation.tasks:
        begin_with("task", ALL_TASKS)
        chosen = st.segmented_control(
            "Task",
            [ALL_TASKS, *evaluation.tasks],
            default=ALL_TASKS,
            required=True,
            key="task",
            bind="query-params",
        )
        task = None if chosen == ALL_TASKS else chosen
    names = [arm["name"] for arm in evaluation.arms]
    if len(names) < 2:
        st.info("This evaluation has one arm: there is nothing to compare it with.")
        st.stop()
    # As in the report: first against the arm that is hardest to beat.
    strongest = names.index(evaluation.strongest_other() or names[0])
    begin_with("before", names[strongest])
    begin_with("after", names[-1])
    before = left.selectbox(
        "Before", names, strongest, key="before", bind="query-params", help=ARM_HELP
    )
    after = middle.selectbox(
        "After", names, len(names) - 1, key="after", bind="query-params", help=ARM_HELP
    )
    metrics = metrics_of(of_both(artifact), evaluation, task)
    begin_with("metric", next(iter(metrics), None))
    metric = right.selectbox(
        "Right or wrong by",
        metrics,
        format_func=lambda name: evaluation.metric(name).label.replace("`", ""),
        key="metric",
        bind="query-params",
    )
    if before == after:
        st.info("Choose two different arms.")
        st.stop()
    return Comparison(artifact, evaluation, before, after, metric, task, workspace)


def choose_filter(counts: dict[Change, int], tags: list[str]) -> Filter:
    """Return what the filters above the examples ask for."""
    change = st.segmented_control(
        "Change",
        list(counts),
        format_func=lambda name: f"{CHANGE_LABELS[name]} {counts.get(name, 0):,}",
        key="outcome",
        label_visibility="collapsed",
        bind="query-params",
    )
    left, middle, right = st.columns([1, 1, 2])
    tag = left.selectbox(
        "Error",
        tags,
        None,
        format_func=analysis.tag_label,
        key="tag",
        placeholder="any",
        bind="query-params",
    )
    tag_change = middle.selectbox(
        "What became of the error",
        list(TAG_CHANGE_LABELS),
        None,
        format_func=lambda name: TAG_CHANGE_LABELS[name],
        key="change",
        placeholder="any",
        bind="query-params",
    )
    words = right.text_input(
        "Search",
        key="q",
        placeholder="words in question, reference or answers",
        bind="query-params",
    )
    return Filter(change, tag, tag_change, words or "")


def show_example(
    example: PairedExample, comparison: Comparison, against: Against, marking: Marking, number: int
) -> None:
    """Show one question with both answers."""
    evaluation, metric = comparison.evaluation, comparison.metric
    boxes = []
    marked = analysis.mark_differences(example, against)
    for prediction, parts in zip((example.before, example.after), marked, strict=True):
        score = analysis.describe_score(evaluation, prediction, metric)
        tone = {"right": "good", "wrong": "bad", "not scored": "warn"}.get(score, "")
        chips = [theme.chip(score, tone)]
        evidence = evidence_of(prediction)
        for tag in prediction.error_tags:
            change = example.tag_change(tag) if prediction is example.after else "fixed"
            words = ": ".join(filter(None, (analysis.tag_label(tag), evidence.get(tag))))
            chips.append(theme.chip(words, TAG_TONES[change or "fixed"]))
        body = (
            theme.text(prediction.error) if prediction.status != "scored" else theme.pieces(parts)
        )
        boxes.append(theme.box(prediction.arm, chips, body))
    with st.container(border=True, gap="xsmall"):
        st.html(
            f'<div class="tl-head"><b>{html.escape(example.example_id)}</b>'
            f"{theme.chip(CHANGE_LABELS[example.change], theme.change_tone(example.change))}"
            f"{theme.chip(example.after.task) if example.after.task else ''}"
            f"{''.join(marking.chips(example.example_id))}</div>"
            + theme.labelled("Question", theme.folded(example.question))
            + theme.labelled("Reference", theme.folded(example.reference))
            + '<div class="tl-label"></div>'
            + theme.sides(boxes)
        )
        actions = st.container(horizontal=True, vertical_alignment="center")
        with actions:
            after = example.after
            row = MarkedRow(
                example.example_id, example.reference, KINDS, after.completion, after.task or ""
            )
            marking.button(row, number)
            st.page_link(
                "views/lineage.py", label="Follow", query_params={"id": example.example_id}
            )
        with actions, st.popover("What was sent", type="tertiary"):
            for prediction in (example.before, example.after):
                st.markdown(f"**{prediction.arm}**")
                turns = analysis.prompt_turns(prediction.prompt)
                st.html("".join(theme.labelled(r, theme.text(t, mono=True)) for r, t in turns))
        if after.arm == evaluation.candidate["name"]:
            with actions:
                show_nearest(near[example.example_id], marking.reference)
        marking.form(row)


comparison = choose()
artifact, evaluation, before, after, metric, task, workspace = comparison
if evaluation.metrics["task_type"] == "language_modeling":
    st.info("Plain text is scored by likelihood: there are no answers to compare.")
    st.stop()
examples, counts, tags = pair(of_both(artifact), evaluation, before, after, metric, task)
if not examples:
    st.info("The two have no example in common.")
    st.stop()
st.markdown(f"**From {before} to {after}**, {len(examples):,} examples:")
st.html(theme.change_bar([(name, CHANGE_LABELS[name], count) for name, count in counts.items()]))

st.subheader("Errors")
if tags:
    with st.container(key="tags"):
        st.table(
            analysis.tag_rows(tags, before, after, evaluation.tags),
            border="horizontal",
            hide_index=True,
        )
else:
    st.caption("Neither arm makes an error that has a name: " + ", ".join(evaluation.tags) + ".")

if slices := show_slices(evaluation, after, before):
    st.subheader("Parts of the rows")
    # Whatever is chosen above: the report has the same parts.
    by = evaluation.metric(evaluation.row_metric).label.replace("`", "")
    shown_parts = f" The first {MOST_SLICES} are shown." * (len(slices["rows"]) > MOST_SLICES)
    st.caption(f"By {by}, over all rows. {analysis.describe_slices(slices)}{shown_parts}")
    with st.container(key="slices"):
        st.table(analysis.slice_rows(slices)[:MOST_SLICES], border="horizontal", hide_index=True)

st.subheader("Examples")
chosen = choose_filter(counts, [count.tag for count in tags])
matches = examples if chosen == Filter() else chosen.choose(examples)
page_number(of_both(artifact), before, after, metric, task, chosen)
with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute"):
    against = st.segmented_control(
        "Mark differences",
        list(AGAINST),
        default="reference",
        required=True,
        format_func=lambda name: AGAINST[name],
        key="against",
        bind="query-params",
    )
    page = choose_page(len(matches), PAGE_SIZE)
missing = "<span class='tl-missing'>missing here</span>" if against == "reference" else ""
st.html(
    f"<div class='tl-legend'><span class='tl-quiet'>{len(matches):,} of {len(examples):,} examples"
    f"</span><span class='tl-extra'>only here</span>{missing}</div>"
)
if not matches:
    st.info("No example matches all filters. Clear one of them.")
marking = marking_of(workspace, artifact)
shown = analysis.paginate(matches, page, PAGE_SIZE)[0]
near = evaluation.near([example.example_id for example in shown])
for number, example in enumerate(shown, 1):
    show_example(example, comparison, against or "reference", marking, number)
