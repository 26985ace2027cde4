"""The dashboard: what a workspace holds, error analysis, blind votes and a playground.

Run it with `tuneloop dashboard`, or
`streamlit run dashboards/app.py -- --workspace DIRECTORY_OR_URI`.
It shows; everything computed comes from functions that tests import.
"""

from __future__ import annotations

import streamlit as st

from shell import arrive, is_read_only, sign_in, signed_in_name, workspace_location
from theme import CSS


def main() -> None:
    """Show the page that the address and the sidebar ask for."""
    # A material icon as page icon would be fetched from the internet.
    st.set_page_config(page_title="tuneloop", layout="wide")
    st.html(CSS)
    sign_in()
    # Not in a folder called `pages`: Streamlit would serve those by itself, without this script.
    page = st.navigation(
        {
            "Artifacts": [
                st.Page("views/overview.py", title="Overview", default=True),
                st.Page("views/advice.py", title="What next", url_path="next"),
                st.Page("views/history.py", title="History", url_path="history"),
                st.Page("views/dataset.py", title="Datasets", url_path="dataset"),
                st.Page("views/model.py", title="Models", url_path="model"),
                st.Page("views/sweep.py", title="Sweeps", url_path="sweep"),
                st.Page("views/report.py", title="Reports", url_path="report"),
            ],
            "See what is wrong": [
                st.Page("views/answers.py", title="Answers", url_path="answers"),
                st.Page("views/errors.py", title="Error analysis", url_path="errors"),
                st.Page("views/lineage.py", title="Follow a row", url_path="lineage"),
            ],
            "Judge": [
                st.Page("views/votes.py", title="Blind votes", url_path="votes"),
                st.Page("views/marks.py", title="Marks", url_path="marks"),
                st.Page("views/playground.py", title="Playground", url_path="playground"),
            ],
        },
        # All of them: what is folded away is not found.
        expanded=True,
    )
    with st.sidebar:
        st.caption(f"Workspace  \n`{workspace_location()}`")
        if is_read_only():
            st.caption("Read-only: votes and marks are shown, and no new ones taken.")
        if st.button("Refresh", help="Read the workspace again"):
            st.rerun()
        if name := signed_in_name():
            st.caption(f"Signed in as `{name}`")
            st.button("Sign out", type="tertiary", on_click=st.logout)
    # A browser with several tabs, and its history, show this.
    st.set_page_config(page_title=f"{page.title} · tuneloop")
    st.title(page.title)
    arrive(page.url_path)
    page.run()


if __name__ == "__main__":
    main()
