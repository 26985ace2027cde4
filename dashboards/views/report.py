"""The full report of an evaluation."""

from __future__ import annotations

import streamlit as st

from shell import choose_artifact, show_origin

_, artifact = choose_artifact("evaluations", "Evaluation")
report = artifact.path / "report.html"
version = artifact.ref.partition("@")[2]
with st.container(horizontal=True, vertical_alignment="center"):
    st.download_button(
        "Download the report",
        report.read_bytes(),
        f"{artifact.name}-{version}.html",
        "text/html",
    )
    st.page_link(
        "views/errors.py", label="Error analysis →", query_params={artifact.kind: artifact.ref}
    )
show_origin(artifact)
# The style sheet makes it as high as the window; a height of its content would take a script.
st.iframe(report, height=900, alt="Report of the evaluation")
