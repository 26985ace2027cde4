"""Rows as files: CSV, JSON Lines, and tasks of Label Studio."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import streamlit as st

from tuneloop.review.rows import Query, RowFilter, read_page

MOST_ROWS = 10_000
FORMATS = {"CSV": ("csv", "text/csv"), "JSONL": ("jsonl", "application/jsonl"),
           "Label Studio": ("json", "application/json")}  # fmt: skip


def as_file(rows: list[dict[str, Any]], kind: str) -> str:
    """Return rows in one of `FORMATS`."""
    if kind == "JSONL":
        return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    if kind == "Label Studio":
        tasks = [{"data": row} for row in rows]
        return json.dumps(tasks, ensure_ascii=False, indent=1, default=str)
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, names)
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                name: json.dumps(value, ensure_ascii=False, default=str)
                if isinstance(value, list | dict)
                else value
                for name, value in row.items()
            }
        )
    return out.getvalue()


def export_buttons(query: Query, chosen: RowFilter, name: str) -> None:
    """Offer the rows that a filter lets through as files; they are read when one is asked for."""
    with st.popover("Export", type="tertiary"):
        st.caption(f"The rows of all pages, at most {MOST_ROWS:,}.")
        for kind, (suffix, mime) in FORMATS.items():
            st.download_button(
                kind,
                lambda kind=kind: as_file(read_page(query, chosen, 1, MOST_ROWS).rows, kind),
                f"{name}.{suffix}",
                mime,
                on_click="ignore",
                key=f"export {kind}",
            )
