"""The full report of an evaluation."""

from __future__ import annotations

import streamlit as st

from shell import choose_artifact, show_origin

REPORT_HEIGHT_PX = 1400

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
st.iframe(report, height=REPORT_HEIGHT_PX)
show_origin(artifact)
