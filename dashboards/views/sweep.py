"""A sweep's learning curve, its best trial and all trials."""

from __future__ import annotations

from typing import Any

import streamlit as st

from shell import choose_artifact, show_origin
from tuneloop.sweeps.advice import advise
from tuneloop.sweeps.report import show_break_even, show_candidates, show_effects, show_tasks
from tuneloop.sweeps.table import SweepView, read_files, task_sentences, trial_table, view_of


def chart(sweep: SweepView) -> dict[str, Any]:
    """Return the Vega-Lite drawing: points with intervals, and the fitted lines."""
    sizes = sorted({point["rows"] for point in sweep.points} | set(sweep.forecast_rows))
    x = {
        "field": "rows", "type": "quantitative", "title": "training rows (each step doubles)",
        "scale": {"type": "log", "base": 2, "padding": 24, "nice": False},
        "axis": {"values": sizes, "format": ",d", "grid": False},
    }  # fmt: skip
    y = {
        "field": "score", "type": "quantitative", "title": sweep.metric,
        "scale": {"zero": False, "padding": 8},
        "axis": {"format": ".0%" if sweep.percent else ".3~f"},
    }  # fmt: skip
    color = {
        "field": "series", "type": "nominal", "title": None,
        "legend": {
            "orient": "top", "labelLimit": 460, "symbolOpacity": 1, "symbolType": "circle",
        },
    }  # fmt: skip
    tooltip = [
        {"field": "trial", "title": "trial"},
        {"field": "score", "title": sweep.metric, "format": ".3f"},
        {"field": "low", "format": ".3f"},
        {"field": "high", "format": ".3f"},
    ]
    return {
        "height": 380,
        "layer": [
            {
                "data": {"values": sweep.lines},
                "mark": {"type": "area", "opacity": 0.12},
                "encoding": {
                    "x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": color,
                },
            },
            {
                "data": {"values": sweep.lines},
                "mark": {"type": "line", "strokeDash": [6, 4], "strokeWidth": 2},
                "encoding": {"x": x, "y": y, "color": color},
            },
            {
                "data": {"values": sweep.points},
                "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.5},
                "encoding": {
                    "x": x | {"field": "x"}, "y": y | {"field": "low"},
                    "y2": {"field": "high"}, "color": color,
                },
            },
            {
                "data": {"values": sweep.points},
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {
                    "x": x | {"field": "x"}, "y": y, "color": color, "tooltip": tooltip,
                },
            },
        ],
    }  # fmt: skip


_, artifact = choose_artifact("sweeps", "Sweep")
curve, trials = read_files(artifact)
sweep = view_of(curve, trials)
advice = advise(curve, trials)
if advice:
    box = st.success if advice[0].kind == "stop" else st.info
    box(f"**{advice[0].title}**  \n{advice[0].why}")
    st.markdown("\n".join(f"- **{one.title}.** {one.why}" for one in advice[1:]))
if sweep.best:
    st.markdown(f"**Best: {sweep.best_words}**  \nReady to serve as `{sweep.best}`.")
    st.markdown("\n".join(f"- {sentence}" for sentence in sweep.choice))
if sweep.points:
    st.subheader("Learning curve")
    st.vega_lite_chart(chart(sweep))
    st.caption(
        f"Points are trials on the validation rows with their {sweep.confidence} intervals. Where "
        "there are enough "
        "data volumes the dashed lines are the median of all curves that fit, and the bands hold "
        "90% of these; else they are straight lines, which promise nothing beyond the points."
    )
    st.markdown("\n".join(f"- {sentence}" for sentence in sweep.sentences))
    if break_even := show_break_even(curve, trials):
        st.subheader("Rows until finetuning passes what needs no training")
        st.table(break_even, border="horizontal", hide_index=True)
    if tasks := show_tasks(curve, trials):
        st.subheader("Task by task")
        st.caption("Each task's own score on its own validation rows.")
        st.table(tasks, border="horizontal", hide_index=True)
        st.markdown("\n".join(f"- {sentence}" for sentence in task_sentences(curve)))
        if effects := show_effects(curve):
            st.caption("The same rows of a task, trained on alone and with those of the others.")
            st.table(effects, border="horizontal", hide_index=True)
    if candidates := show_candidates(curve, trials):
        st.subheader("Score, cost and latency")
        st.caption("A star marks what nothing else beats in all three. Means over seeds.")
        st.table(candidates, border="horizontal", hide_index=True)
else:
    st.warning("No trial of this sweep has a score.")
st.subheader("Trials")
table = trial_table(sweep)
if table.same:
    st.caption(f"All of them: {table.same}.")
with st.container(key="trials"):
    st.table(table.rows, border="horizontal", hide_index=True)
for name, problem in sweep.problems:
    st.warning(f"**{name}** has no score.  \n{problem}")
show_origin(artifact)
