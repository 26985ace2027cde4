"""All marks on rows, and what has become of them."""

from __future__ import annotations

import streamlit as st

from exporting import FORMATS, as_file
from shell import open_workspace, refuse
from tuneloop.errors import UserError
from tuneloop.marks import MARK_LABELS
from tuneloop.review.fixes import states_of
from tuneloop.review.store import ReviewStore

workspace, artifacts = open_workspace()
try:
    marks = ReviewStore(workspace.location).marks()
except UserError as error:
    refuse("Marks cannot be read here.", error)
if not marks:
    st.info("No marks yet. They are made with **Mark** on the pages of answers and of datasets.")
    st.stop()
names = list(dict.fromkeys(mark.dataset_name for mark in marks))
name = st.selectbox("Dataset", names, key="dataset", bind="query-params")
versions = [a for a in artifacts if (a.kind, a.name) == ("datasets", name)]
states = states_of([mark for mark in marks if mark.dataset_name == name], versions)
counts = {
    state: sum(s.state == state for s in states)
    for state in ("applied", "waiting", "not applied", "kept")
}
st.markdown(", ".join(f"**{count:,}** {state}" for state, count in counts.items() if count))
if counts["waiting"]:
    st.markdown("This applies those that wait:")
    st.code(f"tuneloop {states[0].mark.applied_by} CONFIG.yaml", language=None)
rows = [state.row() for state in reversed(states)]
event = st.dataframe(
    [
        {
            "state": row["state"],
            "mark": MARK_LABELS[row["kind"]],
            "by": row["reviewer"],
            "note": row["note"],
            "answer": row["answer"],
            "row": row["row_id"],
            "time (UTC)": row["created_at"][:16].replace("T", " "),
            "why": row["why"].replace("`", ""),
        }
        for row in rows
    ],
    hide_index=True,
    on_select="rerun",
    selection_mode="single-cell",
)
if event.selection.cells:
    chosen = rows[event.selection.cells[0][0]]
    st.switch_page("views/lineage.py", query_params={"id": chosen["row_id"]})
st.caption("Newest first; click one to follow its row.")
with st.container(horizontal=True):
    for kind, (suffix, mime) in FORMATS.items():
        file = f"marks-{name}.{suffix}"
        st.download_button(kind, as_file(rows, kind), file, mime, on_click="ignore")
