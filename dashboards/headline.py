"""An evaluation's headline with its two tables, as two pages show it."""

from __future__ import annotations

import streamlit as st

from tuneloop.evals.reporting.overview import EvaluationTables

_BANNERS = {"good": st.success, "bad": st.error, "mixed": st.warning, "unclear": st.info}


def show_headline(tables: EvaluationTables) -> None:
    """Show the headline, the arms and their paired differences."""
    _BANNERS[tables.headline.tone](f"**{tables.headline.title}**  \n{tables.headline.detail}")
    st.table(tables.arms, border="horizontal", hide_index=True)
    if tables.pairs:
        st.caption("Paired differences: the same examples answered by both.")
        st.table(tables.pairs, border="horizontal", hide_index=True)
