"""An evaluation's headline with its two tables, as two pages show it."""

from __future__ import annotations

import streamlit as st

from tuneloop.evals.reporting.overview import EvaluationTables

ARM_HELP = (
    "An arm is a model with a way of asking: `base` is the model before finetuning, `few-shot` "
    "shows it examples in the prompt, `finetuned` was trained on the data, `simple` is the "
    "cheapest method that could do the job, and `constrained` answers can only have the form of "
    "the task."
)
_BANNERS = {"good": st.success, "bad": st.error, "mixed": st.warning, "unclear": st.info}


def show_headline(tables: EvaluationTables) -> None:
    """Show the headline, the arms and their paired differences."""
    _BANNERS[tables.headline.tone](f"**{tables.headline.title}**  \n{tables.headline.detail}")
    st.table(tables.arms, border="horizontal", hide_index=True)
    st.caption(
        f"{ARM_HELP} Latency was measured with many requests at once, so one request alone is "
        "answered sooner."
    )
    if tables.pairs:
        st.caption("Paired differences: the same examples answered by both.")
        st.table(tables.pairs, border="horizontal", hide_index=True)
