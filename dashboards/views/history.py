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
    {"version": i.ref.partition("@")[2], "score": i.value, "low": i.low, "high": i.high}
    for i in iterations
]
if len(iterations) > 1:
    chart = alt.Chart(alt.Data(values=points)).encode(alt.X("version:N", sort=None, title=None))
    value = alt.Y("score:Q", title=iterations[-1].metric, scale=alt.Scale(zero=False))
    ends = chart.mark_rule().encode(alt.Y("low:Q"), alt.Y2("high:Q"))
    dots = chart.mark_point(filled=True, size=90).encode(value, tooltip=["version:N", "score:Q"])
    st.altair_chart((ends + dots).properties(height=220))
st.dataframe(
    [
        {
            "version": i.ref,
            i.metric: i.value,
            "low": i.low,
            "high": i.high,
            "fixed": i.num_fixed,
            "introduced": i.num_introduced,
            "what changed": i.changed,
            "shared rows": i.num_shared,
            "model": i.arm,
            "made (UTC)": i.created_at[:16].replace("T", " "),
            "took (s)": round(i.took_s),
        }
        for i in reversed(iterations)
    ],
    hide_index=True,
)
st.caption(
    "Fixed and introduced: rows that the model answers better or worse than in the version "
    "before. `Error analysis` shows them, where that version is chosen beside the newer one."
)
