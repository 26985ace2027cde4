"""Error analysis: two arms side by side, what was fixed and what broke."""

from __future__ import annotations

import streamlit as st

import theme
from shell import choose_artifact, load_evaluation
from tuneloop.artifacts import Artifact
from tuneloop.evals.reporting import analysis
from tuneloop.evals.reporting.analysis import OUTCOMES, TAG_CHANGES, Filter, PairedExample
from tuneloop.evals.reporting.findings import Evaluation
from tuneloop.evals.scoring.error_tags import ERROR_TAGS

PAGE_SIZE = 5
# An error in the first answer is no news; one that is new or still there in the second is.
TAG_TONES = {"fixed": "", "introduced": "bad", "both": "warn"}
ALL_TASKS = "all tasks"
AGAINST = {"reference": "from the reference", "other": "between the two"}


@st.cache_resource(max_entries=8, show_spinner="Comparing the answers")
def pair(
    location: str, _evaluation: Evaluation, before: str, after: str, metric: str, task: str | None
) -> list[PairedExample]:
    return analysis.pair_examples(_evaluation, before, after, metric, task)


def choose() -> tuple[Artifact, Evaluation, str, str, str, str | None]:
    """Return the evaluation, the two arms, the metric and, of a mixture, the task to look at."""
    place, left, middle, right = st.columns([1.4, 1, 1, 1])
    with place:
        _, artifact = choose_artifact("evaluations", "Evaluation")
    evaluation = load_evaluation(artifact)
    task = None
    if evaluation.tasks:
        chosen = st.segmented_control(
            "Task",
            [ALL_TASKS, *evaluation.tasks],
            default=ALL_TASKS,
            required=True,
            key="task",
            bind="query-params",
        )
        task = None if chosen == ALL_TASKS else chosen
    metrics = analysis.judged_metrics(evaluation, task)
    names = [arm["name"] for arm in evaluation.arms]
    if len(names) < 2:
        st.info("This evaluation has one arm: there is nothing to put beside it.")
        st.stop()
    before = left.selectbox("Before", names, key="before", bind="query-params")
    after = middle.selectbox("After", names, len(names) - 1, key="after", bind="query-params")
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
    return artifact, evaluation, before, after, metric, task


def choose_filter(examples: list[PairedExample], tags: list[str]) -> Filter:
    """Return what the filters above the examples ask for."""
    counts = analysis.count_outcomes(examples)
    outcome = st.segmented_control(
        "Outcome",
        list(counts),
        format_func=lambda o: f"{OUTCOMES[o]} {counts.get(o, 0):,}",
        key="outcome",
        label_visibility="collapsed",
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
    change = middle.selectbox(
        "The error was",
        list(TAG_CHANGES),
        None,
        format_func=lambda name: TAG_CHANGES[name],
        key="change",
        placeholder="anything",
        bind="query-params",
    )
    words = right.text_input(
        "Search",
        key="q",
        placeholder="words in question, reference or answers",
        bind="query-params",
    )
    return Filter(outcome, tag, change, words or "")


def show_example(example: PairedExample, evaluation: Evaluation, metric: str, against: str) -> None:
    """Show one question with both answers."""
    boxes = []
    marked = analysis.differences(example, "other" if against == "other" else "reference")
    for prediction, parts in zip((example.before, example.after), marked, strict=True):
        score = analysis.describe_score(evaluation, prediction, metric)
        tone = {"right": "good", "wrong": "bad", "not scored": "warn"}.get(score, "")
        chips = [theme.chip(score, tone)]
        for tag in prediction.error_tags:
            change = example.tag_change(tag) if prediction is example.after else "fixed"
            chips.append(theme.chip(analysis.tag_label(tag), TAG_TONES[change or "fixed"]))
        body = (
            theme.text(prediction.error) if prediction.status != "scored" else theme.pieces(parts)
        )
        boxes.append(theme.box(prediction.arm, chips, body))
    with st.container(border=True, gap="xsmall"):
        st.html(
            f'<div class="tl-head"><b>{theme.html.escape(example.example_id)}</b>'
            f"{theme.chip(OUTCOMES[example.outcome], theme.outcome_tone(example.outcome))}"
            f"{theme.chip(example.after.task) if example.after.task else ''}</div>"
            + theme.labelled("Question", theme.text(example.question, mono=True))
            + theme.labelled("Reference", theme.text(example.reference, mono=True))
            + '<div class="tl-label"></div>'
            + theme.sides(boxes)
        )
        with st.popover("What was sent", type="tertiary"):
            for prediction in (example.before, example.after):
                st.markdown(f"**{prediction.arm}**")
                turns = analysis.prompt_turns(prediction.prompt)
                st.html("".join(theme.labelled(r, theme.text(t, mono=True)) for r, t in turns))


artifact, evaluation, before, after, metric, task = choose()
if evaluation.metrics["task_type"] == "language_modeling":
    st.info("Plain text is scored by likelihood: there are no answers to compare.")
    st.stop()
examples = pair(artifact.location, evaluation, before, after, metric, task)
counts = analysis.count_outcomes(examples)
st.markdown(f"**From {before} to {after}**, {len(examples):,} examples:")
st.html(theme.outcome_bar([(o, OUTCOMES[o], n) for o, n in counts.items()]))

st.subheader("Errors")
tags = analysis.count_tags(examples)
if tags:
    with st.container(key="tags"):
        st.table(analysis.tag_rows(tags, before, after), border="horizontal", hide_index=True)
else:
    st.caption("Neither arm makes an error that has a name: " + ", ".join(ERROR_TAGS) + ".")

st.subheader("Examples")
chosen = choose_filter(examples, [count.tag for count in tags])
found = [example for example in examples if chosen.admits(example)]
_, num_pages = analysis.paginate(found, 1, PAGE_SIZE)
with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute"):
    against = st.segmented_control(
        "Mark differences",
        list(AGAINST),
        default="reference",
        required=True,
        format_func=lambda name: AGAINST[name],
        key="against",
    )
    page = st.pagination(num_pages, key="page", bind="query-params") if num_pages > 1 else 1
missing = "<span class='tl-missing'>missing here</span>" if against == "reference" else ""
st.html(
    f"<div class='tl-legend'><span class='tl-quiet'>{len(found):,} of {len(examples):,} examples"
    f"</span><span class='tl-extra'>only here</span>{missing}</div>"
)
if not found:
    st.info("No example fits all filters. Clear one of them.")
for example in analysis.paginate(found, page, PAGE_SIZE)[0]:
    show_example(example, evaluation, metric, against or "reference")
