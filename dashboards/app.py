"""The dashboard: what a workspace holds, with cards, training curves and reports.

Run it with `tuneloop dashboard`, or
`streamlit run dashboards/app.py -- --workspace DIRECTORY_OR_URI`.
It shows; everything computed comes from functions that tests import.
"""

from __future__ import annotations

import argparse
import os
import sys

import streamlit as st
from tuneloop.artifacts import Artifact, Workspace
from tuneloop.errors import UserError
from tuneloop.evals.findings import Evaluation
from tuneloop.evals.overview import (
    list_artifacts,
    read_card,
    read_json,
    read_training_log,
    sample_rows,
    tabulate,
)

OVERVIEW = "Overview"
REPORT_HEIGHT_PX = 1400
_BANNERS = {"good": st.success, "bad": st.error, "mixed": st.warning, "unclear": st.info}


def workspace_location() -> str:
    """Return the workspace from `--workspace`, else TUNELOOP_WORKSPACE, else `workspace`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workspace", default=os.environ.get("TUNELOOP_WORKSPACE", "workspace"))
    return str(parser.parse_known_args(sys.argv[1:])[0].workspace)


def main() -> None:
    """Show the page that the address and the sidebar ask for."""
    # A material icon here would be fetched from the internet.
    st.set_page_config(page_title="tuneloop", layout="wide")
    location = workspace_location()
    try:
        workspace = Workspace(location)
        artifacts = workspace.published()
    except UserError as error:
        st.error("This workspace cannot be opened.")
        st.code(str(error), language=None)
        return
    st.sidebar.title("tuneloop")
    st.sidebar.caption(f"Workspace `{workspace.location}`")
    if st.sidebar.button("Look again", help="Read the workspace anew"):
        st.rerun()
    if not artifacts:
        show_empty(workspace)
        return
    references = [artifact.ref for artifact in reversed(artifacts)]
    options = [OVERVIEW, *references]
    # The address decides the first page only; then the sidebar does, and the address follows.
    if "shown" not in st.session_state:
        st.session_state.shown = st.query_params.get("artifact", OVERVIEW)
    if st.session_state.shown not in options:
        st.session_state.shown = OVERVIEW
    chosen = st.sidebar.radio("Show", options, key="shown")
    # The address can be kept as a bookmark or sent to somebody.
    if chosen == OVERVIEW:
        st.query_params.pop("artifact", None)
        show_overview(workspace, artifacts)
        return
    st.query_params["artifact"] = chosen
    try:
        show_artifact(workspace.open(chosen))
    except UserError as error:
        st.error("This artifact cannot be opened.")
        st.code(str(error), language=None)


def show_empty(workspace: Workspace) -> None:
    """Say what to do when nothing has been made yet."""
    st.title("Nothing here yet")
    st.write(f"No artifact has been published in `{workspace.location}`.")
    st.write("Make the first ones with one command, then come back:")
    st.code("make demo\n# or, with your own data\ntuneloop init my.yaml\ntuneloop run my.yaml")
    st.write("If you expected to see something, start the dashboard with another workspace:")
    st.code("tuneloop dashboard --workspace DIRECTORY_OR_URI")


def show_overview(workspace: Workspace, artifacts: list[Artifact]) -> None:
    """Show the newest verdict and all artifacts."""
    st.title("Overview")
    evaluations = [artifact for artifact in artifacts if artifact.kind == "evaluations"]
    if evaluations:
        newest = workspace.open(evaluations[-1].ref)
        st.caption(f"Newest evaluation: `{newest.ref}`")
        show_verdict(Evaluation.load(newest))
    st.subheader("Artifacts")
    st.dataframe(
        list_artifacts(artifacts),
        hide_index=True,
        column_config={
            "artifact": st.column_config.TextColumn("Artifact", width="medium"),
            "kind": "Kind",
            "created": st.column_config.DatetimeColumn("Created", format="YYYY-MM-DD HH:mm"),
            "took_s": st.column_config.NumberColumn("Took (s)"),
            "size_mb": st.column_config.NumberColumn("Size (MB)"),
            "metrics": st.column_config.TextColumn("Metrics", width="large"),
        },
    )


def show_artifact(artifact: Artifact) -> None:
    """Show one artifact by its kind, then where it comes from."""
    st.title(artifact.ref)
    st.caption(f"Made {artifact.manifest['created_at']} · `{artifact.location}`")
    if artifact.kind == "datasets":
        show_dataset(artifact)
    elif artifact.kind == "models":
        show_model(artifact)
    elif artifact.kind == "evaluations":
        show_evaluation(artifact)
    else:
        st.json(artifact.manifest["metrics"])
    with st.expander("Where it comes from"):
        st.write("Made from: " + (", ".join(f"`{i}`" for i in artifact.manifest["inputs"]) or "–"))
        st.json(
            {
                key: artifact.manifest[key]
                for key in ("fingerprint", "git", "duration_s", "packages", "config", "resources")
            },
            expanded=1,
        )


def show_dataset(artifact: Artifact) -> None:
    """Show a dataset's card and some of its rows."""
    card = read_card(artifact)
    if card:
        st.markdown(card)
    else:
        st.json(read_json(artifact, "card.json") or artifact.manifest["metrics"])
    st.subheader("First rows")
    split = st.segmented_control("Split", ["train", "test"], default="train")
    for row in sample_rows(artifact, split or "train", limit=5):
        with st.expander(f"`{row['row_id']}` from {row.get('source') or 'unknown'}"):
            if row.get("text") is not None:
                st.code(row["text"], language=None, wrap_lines=True)
            for turn in row.get("messages") or ():
                st.caption(turn["role"])
                st.code(turn["content"], language=None, wrap_lines=True)


def show_model(artifact: Artifact) -> None:
    """Show a model's card, its training curve and the parity of its export."""
    log = read_training_log(artifact)
    if log:
        st.subheader("Training loss")
        st.line_chart(log, x="step", y="loss", x_label="optimizer step", y_label="loss, nats")
        with st.expander("All logged values"):
            st.dataframe(log, hide_index=True)
    parity = read_json(artifact, "parity.json")
    if parity is not None:
        st.subheader("Export equals training")
        st.json(parity, expanded=1)
    card = read_card(artifact)
    if card:
        st.subheader("Model card")
        st.markdown(card)


def show_evaluation(artifact: Artifact) -> None:
    """Show an evaluation's verdict, tables and full report."""
    show_verdict(Evaluation.load(artifact))
    report = artifact.path / "report.html"
    st.subheader("Report")
    st.download_button(
        "Download the report", report.read_bytes(), f"{artifact.name}.html", "text/html"
    )
    st.iframe(report, height=REPORT_HEIGHT_PX)


def show_verdict(evaluation: Evaluation) -> None:
    """Show the headline with the arms and their paired differences."""
    tables = tabulate(evaluation)
    _BANNERS[tables.verdict.tone](f"**{tables.verdict.title}**  \n{tables.verdict.detail}")
    st.dataframe(tables.arms, hide_index=True)
    if tables.pairs:
        st.dataframe(tables.pairs, hide_index=True)


if __name__ == "__main__":
    main()
