"""Training rows that may explain a wrong answer, as two pages show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

import theme
from tuneloop.evals.reporting.views import show_train_row


def show_nearest(rows: Sequence[dict[str, Any]], dataset: str) -> None:
    """Show them folded away, each with a link to it.

    Args:
        rows: Of `nearest.parquet`.
        dataset: Reference of the dataset that was scored.
    """
    if not rows:
        return
    with st.popover("Training rows that may explain it", type="tertiary"):
        for row in map(show_train_row, rows):
            chip = theme.chip(row["notes"], "bad" if row["tone"] else "")
            body = theme.text(row["question"]) + theme.labelled("Answer", theme.text(row["answer"]))
            st.html(theme.box(row["row_id"], [chip], body))
            if dataset.partition("@")[0].endswith("-scored"):
                continue  # rows of the user's own: what was trained on is in another dataset
            st.page_link(
                "views/dataset.py",
                label="Open and mark the row →",
                query_params={"datasets": dataset, "view": "Train rows", "q": row["row_id"]},
            )
