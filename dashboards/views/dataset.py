"""A dataset's card, its rows, and the rows that were removed."""

from __future__ import annotations

from typing import Any

import streamlit as st

import theme
from shell import choose_artifact, show_origin
from tuneloop.artifacts import Artifact
from tuneloop.data.schema import SPLITS
from tuneloop.evals.reporting.error_analysis import paginate
from tuneloop.evals.reporting.overview import read_card, read_split, search_rows
from tuneloop.records import Message

PAGE_SIZE = 10


@st.cache_resource(max_entries=6, show_spinner="Reading the rows")
def load_rows(location: str, folder: str, _artifact: Artifact) -> list[dict[str, Any]]:
    return read_split(_artifact, folder)


def show_rows(folder: str) -> None:
    """Show a split row by row, with its turns."""
    words = st.text_input("Search", key="q", placeholder="words to find", bind="query-params")
    rows = load_rows(artifact.location, folder, artifact)
    matches = search_rows(rows, words or "")
    st.caption(f"{len(matches):,} of {len(rows):,} rows")
    _, num_pages = paginate(matches, 1, PAGE_SIZE)
    page = st.pagination(num_pages, key=f"page-{folder}") if num_pages > 1 else 1
    for row in paginate(matches, page, PAGE_SIZE)[0]:
        turns = row.get("messages") or [{"role": "text", "content": row.get("text") or ""}]
        body = "".join(
            theme.labelled(turn["role"], theme.text(Message.of(turn).text, mono=True))
            for turn in turns
        )
        chips = [theme.chip(str(row.get("source") or "unknown source"))]
        if row.get("num_tokens") is not None:
            chips.append(theme.chip(f"{row['num_tokens']} tokens"))
        if row.get("synthetic"):
            chips.append(theme.chip("synthetic", "warn"))
        st.html(theme.box(str(row["row_id"]), chips, body))


def show_removed() -> None:
    """Show the rows that preparation dropped, with the reason."""
    words = st.text_input("Search", key="q", placeholder="words to find")
    rows = load_rows(artifact.location, "removed", artifact)
    matches = search_rows(rows, words or "")
    st.caption(f"{len(matches):,} of {len(rows):,} removed rows; each is kept with its reason.")
    st.dataframe(
        matches,
        hide_index=True,
        placeholder="",
        column_config={
            "row_id": st.column_config.TextColumn("Row", width="small"),
            "stage": st.column_config.TextColumn("Stage", width="small"),
            "reason": st.column_config.TextColumn("Reason", width="medium"),
            "kept_row_id": st.column_config.TextColumn("Repeats row", width="small"),
            "similarity": st.column_config.NumberColumn("Similarity", format="%.3f"),
            "text": st.column_config.TextColumn("Text", width="large"),
        },
    )


_, artifact = choose_artifact("datasets", "Dataset")
splits = [side.folder for side in SPLITS if (artifact.path / side.folder).is_dir()]
views = ["Card", *(f"{name.capitalize()} rows" for name in splits)]
if any((artifact.path / "removed").glob("*.parquet")):
    views.append("Removed rows")
view = st.segmented_control(
    "View", views, default="Card", key="view", required=True, label_visibility="collapsed",
    bind="query-params",
)  # fmt: skip
if view == "Removed rows":
    show_removed()
elif view == "Card" or view is None:
    card = read_card(artifact)
    with st.container(border=True):
        st.markdown(card or "This dataset has no card.")
    show_origin(artifact)
else:
    show_rows(splits[views.index(view) - 1])
