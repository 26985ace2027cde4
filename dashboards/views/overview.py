"""The newest headline and all artifacts."""

from __future__ import annotations

import streamlit as st

from headline import show_headline
from shell import open_workspace, refuse
from tuneloop.errors import UserError
from tuneloop.evals.reporting.overview import list_artifacts, newest_comparison, tabulate
from tuneloop.evals.scoring.results import Evaluation

PAGES = {
    "datasets": "views/dataset.py",
    "models": "views/model.py",
    "sweeps": "views/sweep.py",
    "evaluations": "views/report.py",
}

workspace, artifacts = open_workspace()
newest = newest_comparison(artifacts)
if newest is not None:
    try:
        tables = tabulate(Evaluation.load(workspace.open(newest.ref)))
    except (UserError, OSError, ValueError) as error:
        refuse("The newest evaluation cannot be opened.", error)
    st.caption(f"The newest comparison, {newest.ref}:")
    show_headline(tables)
    with st.container(horizontal=True):
        query = {newest.kind: newest.ref}
        st.page_link(
            "views/errors.py", label="See what was fixed and what broke →", query_params=query
        )
        st.page_link("views/votes.py", label="Judge answers blind →", query_params=query)
else:
    st.info("No evaluation yet: `tuneloop run CONFIG.yaml` makes one and its result is shown here.")

st.subheader("Artifacts")
st.caption("Newest first. Click a row to open it.")
rows = list_artifacts(artifacts)
event = st.dataframe(
    rows,
    hide_index=True,
    on_select="rerun",
    selection_mode="single-cell",
    column_order=["artifact", "created", "took_s", "size_mb", "metrics"],
    column_config={
        "artifact": st.column_config.TextColumn("Artifact", width="medium"),
        "created": st.column_config.DatetimeColumn("Created (UTC)", format="YYYY-MM-DD HH:mm"),
        "took_s": st.column_config.NumberColumn("Took (s)", format="%.1f"),
        "size_mb": st.column_config.NumberColumn("Size (MB)", format="%.1f"),
        "metrics": st.column_config.TextColumn("Numbers", width="large"),
    },
)
if event.selection.cells:
    chosen = rows[event.selection.cells[0][0]]
    st.switch_page(PAGES[chosen["kind"]], query_params={chosen["kind"]: chosen["artifact"]})
