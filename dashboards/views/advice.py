"""What to do next, and what came of earlier advice."""

from __future__ import annotations

import html
from urllib.parse import parse_qsl

import streamlit as st

import theme
from shell import choose_project, open_workspace, refuse
from tuneloop.advice import advice_for
from tuneloop.errors import UserError

# Evaluations that a project makes beside its own, of which there is no advice.
PARTS = ("baseline", "gate", "export", "sweep", "sweep-validation", "sweep-baseline")

workspace, artifacts = open_workspace()
names = {a.name for a in artifacts}
parts = {f"{name}-{part}" for name in names for part in PARTS}
name = choose_project([a for a in artifacts if a.name not in parts])
try:
    advice = advice_for(workspace, name)
except (UserError, OSError, ValueError, KeyError) as error:
    refuse("There is no advice.", error)
st.markdown(f"After `{advice.reference}`: **{advice.score}**")
for number, action in enumerate(advice.actions, 1):
    tone = "" if action.gain is None else "good"
    chips = [theme.chip(f"gain: {action.describe_gain(advice.metric)}", tone)]
    chips.append(theme.chip(f"cost: {action.describe_cost()}"))
    with st.container(border=True, gap="xsmall"):
        title = html.escape(f"{number}. {action.title}".replace("`", ""))
        st.html(
            f'<div class="tl-head"><b>{title}</b>{"".join(chips)}</div>{theme.text(action.why)}'
        )
        if not action.command.startswith("tuneloop dashboard"):
            st.code(action.command, language=None, wrap_lines=True)
        if action.page:
            page, _, query = action.page.partition("?")
            st.page_link(
                f"views/{page.strip('/')}.py", label="See the evidence →",
                query_params=dict(parse_qsl(query)),
            )  # fmt: skip
st.caption(
    "*At most*: if all answers that it is about became right, or by a score of overlap like the "
    "others, and no other changed. Forecasts come from a sweep. `tuneloop next CONFIG.yaml` says "
    "the same and keeps it."
)
if advice.outcomes:
    st.subheader("What came of earlier advice")
    st.markdown(advice.calibration + ".")
    st.dataframe(
        [
            {
                "advice": o.title,
                "about": o.evaluation,
                "told": None if o.gain is None else o.gain.value,
                "basis": o.basis,
                "came": o.change,
                "low": o.low,
                "high": o.high,
                "done": {True: "yes", False: "no", None: None}[o.was_done],
                "with": o.next_evaluation,
                "what changed": o.changed,
            }
            for o in reversed(advice.outcomes)
        ],
        hide_index=True,
        placeholder="–",
    )
