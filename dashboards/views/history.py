"""One table for each project: what was tried, and what came of it."""

from __future__ import annotations

import altair as alt
import streamlit as st

from shell import choose_project, open_workspace, refuse
from tuneloop.errors import UserError
from tuneloop.evals.reporting.history import history

workspace, artifacts = open_workspace()
name = choose_project(artifacts)
try:
    iterations = history([workspace.open(a.ref) if a.kind == "evaluations" and a.name == name else a
                          for a in artifacts], name)  # fmt: skip
except (UserError, OSError, ValueError, KeyError) as error:
    refuse("The history cannot be read.", error)
points = [
    {
        "version": i.ref.partition("@")[2],
        "model": i.arm,
        "score": i.value,
        "low": i.low,
        "high": i.high,
    }
    for i in iterations
    if i.metric == iterations[-1].metric
]
if len(points) > 1:
    is_one = len({point["model"] for point in points}) == 1
    legend = None if is_one else alt.Legend(orient="top")
    # Coloured by a column, since marks without one are black, in the dark too.
    chart = alt.Chart(alt.Data(values=points)).encode(
        alt.X("version:N", sort=None, title=None, axis=alt.Axis(labelAngle=0)),
        color=alt.Color("model:N", title=None, legend=legend),
    )
    value = alt.Y("score:Q", title=iterations[-1].metric, scale=alt.Scale(zero=False))
    ends = chart.mark_rule(opacity=0.5, strokeWidth=1.5).encode(alt.Y("low:Q"), alt.Y2("high:Q"))
    dots = chart.mark_point(filled=True, size=90).encode(
        value, tooltip=["version:N", "model:N", "score:Q"]
    )
    st.altair_chart((ends + dots).properties(height=220))
st.dataframe(
    [
        {
            "version": i.ref.partition("@")[2],
            "model": i.arm,
            i.metric: i.value,
            "low": i.low,
            "high": i.high,
            "change": i.change and i.change["value"],
            "from": i.change and i.change["low"],
            "to": i.change and i.change["high"],
            "fixed": i.num_fixed,
            "introduced": i.num_introduced,
            "what changed": i.changed,
            "shared rows": i.num_shared,
            "made (UTC)": i.created_at[:16].replace("T", " "),
            "took (s)": round(i.took_s),
        }
        for i in reversed(iterations)
    ],
    hide_index=True,
    placeholder="–",
)
st.caption(
    "Newest first. Low and high are the ends of the interval. Change: beside the version before, "
    "over the rows that both answered, from and to the ends of its paired interval; rows whose "
    "right answers marks have changed are left out. "
    "Fixed and introduced: rows that the model answers better or worse than in the version "
    "before. **Error analysis** shows them, where that version is chosen beside the newer one."
)
