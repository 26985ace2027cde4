"""One row followed through datasets, models, answers, marks and votes."""

from __future__ import annotations

import streamlit as st

import theme
from shell import open_workspace, refuse
from tuneloop.errors import UserError
from tuneloop.marks import FIX_LABELS, MARK_LABELS
from tuneloop.review.trace import Trace, trace
from tuneloop.review.verdicts import verdict_rows


def show(found: Trace) -> None:
    """Show everything that belongs to a row."""
    st.subheader("In the datasets")
    for place in found.places:
        tone = {"removed": "warn", "train": "good"}.get(place.side, "")
        chips = [theme.chip(place.side, tone), theme.chip(place.row_id), theme.chip(place.source)]
        body = theme.folded(place.answer)
        if place.reason:
            body += theme.labelled("Removed because", theme.text(place.reason))
        if place.kept_row_id:
            body += theme.labelled("It repeats", theme.text(place.kept_row_id))
        if place.repeated_by:
            repeats = ", ".join(place.repeated_by)
            body += theme.labelled("Removed because they repeat it", theme.text(repeats))
        for fix in place.fixes:
            told = (
                f"{FIX_LABELS[fix['action']]} by {', '.join(fix['reviewers'])}; "
                f"the files say: {fix['before']}"
            )
            body += theme.labelled("Changed by marks", theme.text(told))
        st.html(theme.box(place.dataset, chips, body))
    if found.models:
        st.subheader("Models trained on it")
        st.table(found.models, border="horizontal", hide_index=True)
    if found.answers:
        st.subheader("Answers")
        for answer in found.answers:
            score = "no score" if answer.score is None else f"{answer.metric} {answer.score:.3g}"
            chips = [theme.chip(answer.arm), theme.chip(score)]
            st.html(theme.box(answer.evaluation, chips, theme.folded(answer.completion)))
    if found.marks:
        st.subheader("Marks")
        rows = [
            {
                "mark": MARK_LABELS[mark.kind],
                "answer": mark.answer,
                "note": mark.note,
                "by": mark.reviewer,
                "time (UTC)": mark.created_at[:19].replace("T", " "),
                "id": mark.uid,
            }
            for mark in found.marks
        ]
        st.dataframe(rows, hide_index=True)
    if found.votes:
        st.subheader("Votes")
        st.dataframe(verdict_rows(found.votes), hide_index=True)


workspace, _ = open_workspace()
asked = st.text_input(
    "Row",
    key="id",
    bind="query-params",
    placeholder="id of a row or how it begins, path:line, or the id of a mark or vote",
)
if not asked or not asked.strip():
    st.info("Give the id of a row. Other pages lead here with **Follow**.")
    st.stop()
try:
    found = trace(workspace, asked.strip())
except UserError as error:
    refuse("No such row.", error)
show(found)
