"""One model's answers, the worst first."""

from __future__ import annotations

import html
import json
import math
from typing import Any

import altair as alt
import streamlit as st

import theme
from exporting import export_buttons
from marking import KINDS, MarkedRow, Marking, marking_of
from nearest import show_nearest
from shell import begin_with, choose_artifact, choose_page, identity, page_number, refuse
from tuneloop.artifacts import Artifact
from tuneloop.errors import UserError
from tuneloop.evals.reporting.error_analysis import prompt_turns, tag_label
from tuneloop.evals.reporting.formatting import format_estimate, word_diff
from tuneloop.evals.scoring.metrics import FIELD_PREFIX, OF_ALL_ROWS, Metric
from tuneloop.evals.scoring.pairing import last_question
from tuneloop.review.rows import Query, RowFilter, ids_where, open_rows, read_page, value_counts

PAGE_SIZE = 5
SORTS = {
    "worst": "worst first",
    "best": "best first",
    "long": "longest answers first",
    "slow": "slowest first",
    "any": "any order",
}
# With less in common, marked words cannot be read; longer texts take too long to compare.
READABLE_RATIO, MOST_COMPARED = 0.3, 4_000


@st.cache_resource(max_entries=4)
def open_predictions(made: str, _artifact: Artifact) -> Query:
    return Query([_artifact.path / "predictions.parquet"])


@st.cache_data(max_entries=8)
def read_metrics(made: str, _artifact: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((_artifact.path / "metrics.json").read_text("utf-8"))
    return found


@st.cache_resource(max_entries=4)
def open_test_rows(made: str, split: str, _dataset: Artifact) -> Query | None:
    return open_rows(_dataset, split)


@st.cache_data(max_entries=8)
def load_values(made: str, split: str, _query: Query) -> dict[str, dict[str, int]]:
    return value_counts(_query)


def load_nearest(evaluation: Artifact, ids: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the training rows that may explain answers of the last arm, by example."""
    file = evaluation.path / "nearest.parquet"
    found: dict[str, list[dict[str, Any]]] = {}
    if file.is_file() and ids:
        wanted = "SELECT * FROM rows WHERE example_id IN (SELECT unnest(?))"
        for row in Query([file]).ask(wanted, ids):
            found.setdefault(row["example_id"], []).append(row)
    return found


def choose_part(dataset: Artifact | None, split: str) -> list[str] | None:
    """Return the rows that have a value in a column of the test rows; None for all rows."""
    query = open_test_rows(identity(dataset), split, dataset) if dataset else None
    values = load_values(identity(dataset), split, query) if dataset and query else {}
    if query is None or not values:
        return None
    left, right = st.columns(2)
    column = left.selectbox(
        "Only rows where", list(values), None, key="by", placeholder="any column",
        bind="query-params",
    )  # fmt: skip
    if not column:
        return None
    counts = values[column]
    value = right.selectbox(
        "is", list(counts), format_func=lambda v: f"{v} ({counts[v]:,})", key="part",
        bind="query-params",
    )  # fmt: skip
    return ids_where(query, column, value) if value is not None else None


def label_of(metric: str) -> str:
    """Return what a metric is called, without marks for code."""
    return str(about["metrics"][metric]["label"]).replace("`", "")


def show_parts(arm: str) -> None:
    """Show the parts of the rows on which an arm does worst, folded away."""
    file = artifact.path / "slices.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"arms": {}}
    found = told["arms"].get(arm, [])
    if found:
        # Whatever is chosen above: the report has the same parts.
        by = label_of(about.get("row_metric", about["primary"]))
        with st.expander(f"{len(found):,} parts of the rows by {by}, the worst first"):
            rows = [
                {
                    "part": f"{item['by']} = {item['slice']}",
                    "rows": item["n"],
                    "score": item["value"],
                    "low": item["low"],
                    "high": item["high"],
                    "the other rows": item["rest"],
                    "p, adjusted": item["p_adjusted"],
                }
                for item in found
            ]
            st.dataframe(rows, hide_index=True, placeholder="–")


def choose_rows(
    about: dict[str, Any], arm: dict[str, Any], metric: str, part: list[str] | None
) -> RowFilter:
    """Return what the filters above the answers ask for."""
    lower = about["metrics"][metric]["better"] == "lower"
    left, middle, right = st.columns([1, 1, 2])
    sort = left.selectbox(
        "Order", list(SORTS), format_func=SORTS.get, key="sort", bind="query-params"
    )
    tags = [tag for tag, count in arm["error_tags"].items() if count]
    tag = middle.selectbox(
        "Error", tags, None, format_func=tag_label, key="error", placeholder="any",
        bind="query-params",
    )  # fmt: skip
    words = right.text_input(
        "Search", key="find", placeholder="words in question, reference or answer",
        bind="query-params",
    )  # fmt: skip
    fields = [name for name in about["metrics"] if name.startswith(FIELD_PREFIX)]
    wrong = None
    if fields:
        wrong = st.segmented_control(
            "Field that is wrong",
            [name.removeprefix(FIELD_PREFIX) for name in fields],
            key="wrong",
            bind="query-params",
        )
    unscored = arm["num_unscored"] and st.toggle(
        f"Only the {arm['num_unscored']:,} without an answer", key="unscored", bind="query-params"
    )
    # In a mixture a metric may be that of one task alone.
    task = {"task": metric.rpartition("/")[0]} if about.get("tasks") and "/" in metric else {}
    order = {"worst": metric, "best": metric, "long": "completion_tokens", "slow": "latency_s"}
    return RowFilter(
        words or "",
        {"arm": arm["name"], **task, **({"status": "unscored"} if unscored else {})},
        {FIELD_PREFIX + wrong: 1.0} if wrong else {},
        listed={"error_tags": tag} if tag else {},
        example_ids=part,
        order_by=order.get(sort or "", "example_id"),
        descending=sort in ("long", "slow", "worst" if lower else "best"),
    )


def show_summary(about: dict[str, Any], arm: dict[str, Any], metric: str) -> None:
    """Show an arm's score, the shares of its errors, and how each part does."""
    score = arm["scores"][metric]
    told = format_estimate(score, Metric(**about["metrics"][metric]))
    told += f", {score['n']:,} answers scored"
    if about["primary"] == OF_ALL_ROWS:
        decides = Metric(**about["metrics"][OF_ALL_ROWS])
        told += f"; {decides.label}: {format_estimate(arm['scores'][OF_ALL_ROWS], decides)}"
    st.markdown(f"**{arm['name']}**: {told}")
    n = max(1, arm["num_scored"])
    tags = {tag_label(tag): count for tag, count in arm["error_tags"].items() if count}
    fields = {
        name.removeprefix(FIELD_PREFIX): value["value"]
        for name, value in arm["scores"].items()
        if name.startswith(FIELD_PREFIX) and value["value"] is not None
    }
    labels = {name: value for name, value in arm.get("label_f1", {}).items() if value is not None}
    charts = [
        chart
        for chart in (
            ("Right in each field", fields, "share of the answers"),
            ("F1 of each label", labels, "F1: precision and recall in one number"),
            ("Errors with a name", {t: c / n for t, c in tags.items()}, "share of the answers"),
        )
        if chart[1]
    ]
    for column, (title, values, axis) in zip(st.columns(max(2, len(charts))), charts, strict=False):
        with column:
            rows = [{"part": name, "share": value} for name, value in values.items()]
            chart = alt.Chart(alt.Data(values=rows)).encode(
                alt.Y("part:N", sort="-x", title=None, axis=alt.Axis(labelLimit=140)),
                alt.X("share:Q", title=axis, axis=alt.Axis(format="%"), scale={"domain": [0, 1]}),
                tooltip=["part:N", alt.Tooltip("share:Q", format=".1%")],
            )
            bars = chart.mark_bar(height=12)
            st.markdown(f"**{title}**")
            st.altair_chart(bars.properties(height=80 + 26 * len(rows)))


def show_answer(
    row: dict[str, Any], about: dict[str, Any], metric: str, marking: Marking, number: int
) -> None:
    """Show one question with what the model answered."""
    chips = [score_chip(row, about, metric)]
    for name in about["metrics"]:
        if name.startswith(FIELD_PREFIX) and row.get(name) is not None:
            field = name.removeprefix(FIELD_PREFIX)
            chips.append(theme.chip(field, "good" if row[name] >= 1 else "bad"))
    chips += [theme.chip(tag_label(tag), "warn") for tag in row["error_tags"] or ()]
    if row.get("contaminated"):
        chips.append(theme.chip("trained on this row", "warn"))
    chips += marking.chips(row["example_id"])
    reference, said = row["reference"] or "", row["completion"] or ""
    scored = row["status"] == "scored"
    with st.container(border=True, gap="xsmall"):
        st.html(
            f'<div class="tl-head"><b>{html.escape(row["example_id"])}</b>{"".join(chips)}</div>'
            + theme.labelled("Question", theme.folded(last_question(row["prompt"])))
            + theme.labelled("Reference", theme.folded(reference))
            + theme.labelled("Answer", answer_body(reference, said) if scored else "")
            + ("" if scored else theme.text(row["error"] or "no answer"))
        )
        with st.container(horizontal=True, vertical_alignment="center"):
            marked = MarkedRow(row["example_id"], reference, KINDS, said, row.get("task") or "")
            marking.button(marked, number)
            st.page_link("views/lineage.py", label="Follow", query_params={"id": row["example_id"]})
            st.page_link(
                "views/errors.py", label="Side by side",
                query_params={"evaluations": artifact.ref, "q": row["example_id"]}
                | ({} if is_candidate else {"before": name}),
            )  # fmt: skip
            with st.popover("What was sent", type="tertiary"):
                turns = prompt_turns(row["prompt"])
                st.html("".join(theme.labelled(r, theme.text(t, mono=True)) for r, t in turns))
            if row.get("samples") is not None and len(row["samples"]) > 1:
                with st.popover(f"All {len(row['samples'])} answers", type="tertiary"):
                    st.html("".join(map(sampled_answer, row["samples"])))
            if row["example_id"] in nearest:
                show_nearest(nearest[row["example_id"]], marking.reference)
        marking.form(marked)


def sampled_answer(sample: dict[str, Any]) -> str:
    """Return one of several answers to a question, with its score."""
    score = "not scored" if sample["score"] is None else f"{sample['score']:.2g}"
    if sample.get("model"):
        score = f"{sample['model']}: {score}"
    return theme.labelled(score, theme.text(sample["error"] or sample["completion"]))


def score_chip(row: dict[str, Any], about: dict[str, Any], metric: str) -> str:
    value, kind = row.get(metric), about["metrics"][metric]["kind"]
    if row["status"] != "scored":
        return theme.chip("not scored")
    if value is None or math.isnan(value):
        return theme.chip("this measure does not apply")
    if kind == "binary":
        return theme.chip("right" if value else "wrong", "good" if value else "bad")
    return theme.chip(f"{value:.0%}" if kind == "ratio" else f"{value:.3g}")


def answer_body(reference: str, said: str) -> str:
    """Return an answer with its differences from the reference marked, where they can be read."""
    longest = max(len(reference), len(said))
    if longest > MOST_COMPARED:
        return theme.folded(said)
    pieces = word_diff(reference, said)
    same = sum(len(part) for kind, part in pieces if kind == "same")
    return theme.pieces(pieces) if same >= READABLE_RATIO * longest else theme.folded(said)


first, second, third = st.columns([1.6, 1, 1])
with first:
    workspace, artifact = choose_artifact("evaluations", "Evaluation")
try:
    about = read_metrics(identity(artifact), artifact)
    query = open_predictions(identity(artifact), artifact)
except (UserError, OSError, ValueError) as error:
    refuse("This evaluation cannot be read.", error)
if about["task_type"] == "language_modeling":
    st.info("Plain text is scored by likelihood: there are no answers to read.")
    st.stop()
arms = {arm["name"]: arm for arm in about["arms"]}
begin_with("arm", list(arms)[-1])
name = second.selectbox("Model", list(arms), len(arms) - 1, key="arm", bind="query-params")
# One of all answers together says of none whether it is right.
by_row = [m for m in about["metrics"] if m != OF_ALL_ROWS]
judged = [m for m in by_row if about["metrics"][m]["better"] != "neither"]
judged.sort(key=lambda m: m != about.get("row_metric", about["primary"]))
judged = judged or by_row
begin_with("metric", judged[0])
metric = third.selectbox(
    "Right or wrong by", judged,
    format_func=label_of,
    key="metric", bind="query-params",
)  # fmt: skip
show_summary(about, arms[name], metric)
is_candidate = name == about["arms"][-1]["name"]
show_parts(name)
st.subheader("Answers")
marking = marking_of(workspace, artifact)
split = artifact.manifest["config"].get("evaluation", {}).get("split", "test")
try:
    part = choose_part(marking.dataset, split)
except UserError as error:
    refuse("The test rows cannot be read.", error)
chosen = choose_rows(about, arms[name], metric, part)
page = page_number(artifact.ref, chosen)
try:
    shown = read_page(query, chosen, page, PAGE_SIZE)
except UserError as error:
    refuse("The answers cannot be read.", error)
with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute"):
    total = arms[name]["num_scored"] + arms[name]["num_unscored"]
    digits = " Digits mark the rows of this page." if marking.takes_marks else ""
    st.caption(f"{shown.num_matching:,} of {total:,} answers.{digits}")
    if (now := choose_page(shown.num_matching, PAGE_SIZE)) != page:
        shown = read_page(query, chosen, now, PAGE_SIZE)
    export_buttons(query, chosen, f"{artifact.name}-{name}")
if not shown.rows:
    st.info("No answer matches all filters. Clear one of them.")
nearest = load_nearest(artifact, [r["example_id"] for r in shown.rows]) if is_candidate else {}
for number, row in enumerate(shown.rows, 1):
    show_answer(row, about, metric, marking, number)
