"""A model's training curves, answers during training, export parity and card."""

from __future__ import annotations

from typing import Any

import altair as alt
import streamlit as st

import theme
from shell import begin_with, choose_artifact, refuse, show_origin
from tuneloop.errors import UserError
from tuneloop.evals.reporting.overview import (
    compare_settings,
    describe_parity,
    prompt_labels,
    read_card,
    read_json,
    read_samples,
    read_training_log,
    without_end,
)

MOST_DOTS = 60
SMALL_CHARTS = (
    ("learning_rate", "Learning rate", ""),
    ("grad_norm", "Gradient norm", "Before clipping."),
    ("tokens_per_s", "Tokens per second", "All workers together; padding is not counted."),
    (
        "peak_memory_gib",
        "Peak memory, GiB",
        "So far, on the worker that uses the most.",
    ),
)


def draw_curves(rows: list[dict[str, Any]], train: str, validation: str, label: str) -> None:
    """Draw a curve over the train rows and, where it was measured, over the validation rows."""
    points = [
        {"step": row["step"], "rows": name, "value": row[column]}
        for name, column in (("train", train), ("validation", validation))
        for row in rows
        if row.get(column) is not None
    ]
    draw_lines(points, label, "rows")


def draw_lines(points: list[dict[str, Any]], title: str, by: str) -> None:
    """Draw values over the optimizer steps, one line for each value of the column `by`."""
    is_one = len({point[by] for point in points}) == 1
    # A line of one measurement cannot be seen without its point.
    chart = alt.Chart(alt.Data(values=points)).mark_line(point=len(points) <= MOST_DOTS)
    legend = None if is_one else alt.Legend(orient="top", labelLimit=400)
    drawing = chart.encode(
        alt.X("step:Q", title="optimizer step"),
        alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
        alt.Color(f"{by}:N", title=None, legend=legend),
        tooltip=[f"{by}:N", "step:Q", alt.Tooltip("value:Q", format=".4g")],
    )
    st.altair_chart(drawing.properties(height=260))


def compare_runs() -> None:
    """Draw the curves of several models over one another, and show how their settings differ."""
    others = [a.ref for a in reversed(workspace.published()) if a.kind == "models"]
    others.remove(artifact.ref)
    begin_with("with", [])
    chosen = others and st.multiselect(
        "Compare with", others, key="with", bind="query-params", placeholder="other models"
    )
    if not chosen:
        return
    models = [artifact, *(workspace.open(reference) for reference in chosen)]
    for column, title in (
        ("loss", "Loss"), ("validation_loss", "Loss on the validation rows"),
        ("learning_rate", "Learning rate"),
    ):  # fmt: skip
        points = [
            {"step": row["step"], "model": model.ref, "value": row[column]}
            for model in models
            for row in read_training_log(model)
            if row.get(column) is not None
        ]
        if points:
            draw_lines(points, title, "model")
    differing = compare_settings(models)
    if differing:
        st.markdown("**Settings in which they differ**")
        st.dataframe(differing, hide_index=True)
    st.divider()


workspace, artifact = choose_artifact("models", "Model")
try:
    compare_runs()
except UserError as error:
    refuse("One of these models cannot be opened.", error)
log = read_training_log(artifact)
if log:
    measured = [row for row in log if row.get("validation_loss") is not None]
    st.subheader("Loss")
    st.caption(
        "Mean cross-entropy of the learned tokens in nats, lower is better: of each step's batch"
        + (" before the step, and of the validation split after it." if measured else ".")
    )
    draw_curves(log, "loss", "validation_loss", "loss")
    if "token_accuracy" in log[0]:
        st.subheader("Token accuracy")
        st.caption("Share of the learned tokens that the model holds most likely.")
        draw_curves(log, "token_accuracy", "validation_accuracy", "accuracy")
    charts = [
        row | {"peak_memory_gib": row["peak_memory_bytes"] / 2**30}
        if "peak_memory_bytes" in row
        else row
        for row in log
    ]
    shown = [chart for chart in SMALL_CHARTS if chart[0] in charts[0]]
    for column, (name, label, note) in zip(st.columns(len(shown) or 1), shown, strict=False):
        column.markdown(f"**{label}**", help=note or None)
        column.line_chart(charts, x="step", y=name, x_label="step", y_label="", height=170)
    padding = max(row.get("padding_ratio", 0.0) for row in log)
    st.caption(f"Padding: {padding:.1%} of the tokens computed.")
    with st.expander("All logged values"):
        st.dataframe(log, hide_index=True)
else:
    st.info("This model has no training log.")
samples = read_samples(artifact)
if samples:
    st.subheader("Answers during training")
    st.caption("The first validation prompts, answered greedily at each measurement.")
    labels = prompt_labels(list(dict.fromkeys(row["prompt"] for row in samples)))
    prompt = st.selectbox("Prompt", list(labels), format_func=lambda text: labels[text])
    answers = [row for row in samples if row["prompt"] == prompt]
    with st.expander("The whole prompt, as the model reads it"):
        st.html(theme.text(prompt, mono=True))
    st.html(
        theme.labelled("Reference", theme.text(without_end(answers[0]["reference"]), mono=True))
        + "".join(
            theme.labelled(
                f"After step {row['step']:,}", theme.folded(without_end(row["completion"]))
            )
            for row in answers
        )
    )
parity = read_json(artifact, "parity.json")
if parity is not None:
    st.subheader("The export equals the trained model")
    (st.success if parity.get("passed", True) else st.error)(describe_parity(parity))
    with st.expander("All numbers"):
        st.json(parity, expanded=1)
card = read_card(artifact)
if card:
    st.subheader("Model card")
    with st.container(border=True):
        st.markdown(card)
show_origin(artifact)
