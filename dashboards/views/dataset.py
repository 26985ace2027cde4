"""A dataset's card and rows, removed rows, conflicts, doubtful labels, and what changed."""

from __future__ import annotations

import html
from collections import Counter
from typing import Any

import pyarrow.compute as pc
import streamlit as st
from pydantic import ValidationError

import theme
from exporting import export_buttons
from marking import MarkedRow, Marking
from shell import (
    begin_with,
    choose_artifact,
    choose_page,
    identity,
    is_prepared,
    open_workspace,
    page_number,
    refuse,
    show_origin,
)
from tuneloop.artifacts import Artifact
from tuneloop.config import TaskConfig
from tuneloop.data.diff import changed_rows, diff_datasets
from tuneloop.data.schema import SPLITS
from tuneloop.errors import UserError
from tuneloop.evals.reporting.overview import read_card, read_json
from tuneloop.evals.scoring.doubtful import (
    DoubtfulLabel,
    classification_tasks,
    find_doubtful_labels,
)
from tuneloop.evals.scoring.simple import MOST_ROWS
from tuneloop.marks import FIX_LABELS, MarkKind
from tuneloop.models.bases.source import resolve_base
from tuneloop.records import Message
from tuneloop.review.rows import (
    Query,
    RowFilter,
    conflicts,
    open_rows,
    read_page,
    read_row,
    read_rows,
    value_counts,
)

PAGE_SIZE = 10
# Plain text has no answer that could be wrong.
WITHOUT_ANSWER: tuple[MarkKind, ...] = ("bad_row", "more_like_this", "fine", "note")
MARKED = "marked"
CHANGE_NAMES = {MARKED: "Changed by marks", "added": "New", "gone": "Gone", "moved": "Moved"}
CARD, REMOVED, CONFLICTS, CHANGES = "Card", "Removed rows", "Conflicts", "Changes"
DOUBTFUL = "Doubtful labels"


@st.cache_resource(max_entries=8)
def load_query(made: str, folder: str, _artifact: Artifact) -> Query | None:
    return open_rows(_artifact, folder)


@st.cache_data(max_entries=16, show_spinner="Looking through the columns")
def load_values(made: str, folder: str, _query: Query) -> dict[str, dict[str, int]]:
    return value_counts(_query)


@st.cache_resource(max_entries=2, show_spinner="Comparing the versions")
def load_diff(new: str, old: str, _new: Artifact, _old: Artifact) -> tuple[dict[str, Any], Any]:
    changed = changed_rows(_new, _old)
    return diff_datasets(_new, _old, changed), changed


@st.cache_data(max_entries=4, show_spinner="Looking for conflicts")
def load_conflicts(
    made: str, page: int, _query: Query, by_task: bool
) -> tuple[list[list[dict[str, Any]]], int]:
    return conflicts(_query, page, PAGE_SIZE, by_task)


@st.cache_resource(max_entries=2, show_spinner="Asking the other rows about each label")
def load_doubtful(made: str, _artifact: Artifact, _task: TaskConfig) -> list[DoubtfulLabel]:
    return find_doubtful_labels(_artifact, _task)


def query_of(folder: str) -> Query | None:
    try:
        return load_query(identity(artifact), folder, artifact)
    except UserError as error:
        refuse("These rows cannot be read.", error)
        raise


def choose_rows(query: Query, folder: str) -> RowFilter:
    """Return what the filters above the rows ask for."""
    left, middle, right = st.columns([2, 1, 1])
    words = left.text_input(
        "Search", key="q", placeholder="words to find in all rows", bind="query-params"
    )
    values = load_values(identity(artifact), folder, query)
    column = middle.selectbox(
        "Only rows where", list(values), None, key="column", placeholder="any column",
        bind="query-params",
    )  # fmt: skip
    equal = {}
    if column:
        counts = values[column]
        value = right.selectbox(
            "is", list(counts), format_func=lambda v: f"{v} ({counts[v]:,})", key="value",
            bind="query-params",
        )  # fmt: skip
        equal = {column: value} if value is not None else {}
    return RowFilter(words or "", equal)


def show_rows(folder: str) -> None:
    """Show a split row by row, with its turns, or the removed rows with their reasons."""
    query = query_of(folder)
    if query is None:
        st.info("There are no such rows.")
        return
    chosen = choose_rows(query, folder)
    page = page_number(artifact.ref, folder, chosen)
    found = read_page(query, chosen, page, PAGE_SIZE)
    with st.container(
        horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute"
    ):
        what = "removed rows" if folder == "removed" else "rows"
        st.caption(f"{found.num_matching:,} of {found.num_rows:,} {what}")
        if (now := choose_page(found.num_matching, PAGE_SIZE)) != page:
            found = read_page(query, chosen, now, PAGE_SIZE)
        export_buttons(query, chosen, f"{artifact.name}-{folder}")
    if not found.rows:
        st.info("No row matches. Clear the search or the filter.")
    for number, row in enumerate(found.rows, 1):
        show_row(row, folder, number, query)


def show_row(row: dict[str, Any], folder: str, number: int, query: Query) -> None:
    """Show one row with what can be done with it."""
    row_id = str(row["row_id"])
    chips = [theme.chip(str(row.get("source") or "unknown source"))]
    if row.get("num_tokens") is not None:
        chips.append(theme.chip(f"{row['num_tokens']:,} tokens"))
    if row.get("synthetic"):
        chips.append(theme.chip("synthetic", "warn"))
    for document in row.get("document_ids") or [row_id]:
        chips += marking.chips(document)
    body = turns_of(row)
    if folder == "removed":
        chips.append(theme.chip(str(row["stage"]), "warn"))
        body = theme.labelled("Removed because", theme.text(str(row["reason"]))) + body
    with st.container(border=True, gap="xsmall"):
        st.html(f'<div class="tl-head"><b>{html.escape(row_id)}</b>{"".join(chips)}</div>{body}')
        with st.container(horizontal=True, vertical_alignment="center"):
            # Documents are marked, and a packed row holds several.
            documents = row.get("document_ids") or [row_id]
            kinds = WITHOUT_ANSWER if "document_ids" in query.types else kinds_of(folder)
            marked = MarkedRow(documents[0].partition(".")[0], answer_of(row), kinds)
            if len(documents) == 1:
                marking.button(marked, number)
            st.page_link("views/lineage.py", label="Follow", query_params={"id": row_id})
            if "input_ids" in query.types:
                with st.popover("Tokens", type="tertiary"):
                    show_tokens(query, row_id)
        marking.form(marked)


def kinds_of(folder: str) -> tuple[MarkKind, ...]:
    """Return the marks that make sense for the rows of a split."""
    if folder == "removed":
        return ("note", "more_like_this", "fine")
    both: tuple[MarkKind, ...] = ("bad_reference", *WITHOUT_ANSWER)
    return both if folder == "train" else ("accept", *both)


def answer_of(row: dict[str, Any]) -> str:
    turns = row.get("messages")
    return Message.of(turns[-1]).text if turns else str(row.get("text") or "")


def turns_of(row: dict[str, Any]) -> str:
    turns = row.get("messages") or [{"role": "text", "content": row.get("text") or ""}]
    return "".join(
        theme.labelled(
            turn["role"],
            theme.folded(Message.of(turn).text if row.get("messages") else turn["content"]),
        )
        for turn in turns
    )


def show_tokens(query: Query, row_id: str) -> None:
    """Show the tokens of a row, those that are learned in colour."""
    base = (read_json(artifact, "card.json") or {}).get("base")
    if not base:
        st.caption("The card does not say which tokenizer made them.")
        return
    if not st.button("Show them", key=f"tokens {row_id}"):
        return
    row = read_row(query, row_id)
    if row is None:
        return
    try:
        tokenizer = load_tokenizer(base)
    except (UserError, OSError, ValueError) as error:
        st.code(str(error), language=None, wrap_lines=True)
        return
    parts = [
        (tokenizer.decode([token]), bool(bit))
        for token, bit in zip(row["input_ids"], row["loss_mask"], strict=True)
    ]
    st.html(theme.tokens(parts))
    learned = sum(row["loss_mask"])
    st.caption(f"{learned:,} of {len(parts):,} tokens are learned, in colour.")


@st.cache_resource(max_entries=2, show_spinner="Loading the tokenizer")
def load_tokenizer(base: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_base(base).path)


def show_conflicts() -> None:
    """Show rows that ask the same and answer differently, side by side."""
    query = query_of("train")
    found, count, page = [], 0, page_number(artifact.ref, CONFLICTS)
    is_mixture = bool(artifact.manifest["config"].get("task", {}).get("tasks"))
    if query is not None:
        found, count = load_conflicts(identity(artifact), page, query, is_mixture)
    what = "prompt has" if count == 1 else "prompts have"
    st.caption(f"{count:,} {what} several answers among the train rows.")
    if query is not None and (now := choose_page(count, PAGE_SIZE)) != page:
        found, _ = load_conflicts(identity(artifact), now, query, is_mixture)
    number = 0
    for rows in found:
        with st.container(border=True, gap="xsmall"):
            st.html(turns_of({"messages": rows[0]["messages"][:-1]}))
            columns = st.columns(min(3, len(rows)))
            for place, row in enumerate(rows):
                number += 1
                with columns[place % len(columns)]:
                    chips = [theme.chip(row["source"]), *marking.chips(row["row_id"])]
                    st.html(theme.box(row["row_id"], chips, theme.folded(answer_of(row))))
                    marked = MarkedRow(row["row_id"], answer_of(row), kinds_of("train"))
                    marking.button(marked, number)
                    marking.form(marked)
    card = read_json(artifact, "card.json") or {}
    near = [e for e in card.get("conflicts", {}).get("examples", []) if e["kind"] == "near prompt"]
    if near:
        st.subheader("Nearly the same prompt")
        total = card["conflicts"]["num_near_prompt"]
        st.caption(f"{total:,} pairs; the {len(near):,} most alike are shown.")
        for pair in near:
            boxes = [
                theme.box(
                    r["source"],
                    [],
                    theme.labelled("prompt", theme.folded(r["prompt"]))
                    + theme.labelled("answer", theme.folded(r["answer"])),
                )
                for r in pair["rows"]
            ]
            st.html(theme.sides(boxes))


def show_changes() -> None:
    """Show what differs from another version, and which rows marks have changed."""
    fixes = (read_json(artifact, "card.json") or {}).get("fixes") or {"applied": []}
    _, artifacts = open_workspace()
    prepared = [a for a in artifacts if a.kind == "datasets" and is_prepared(a)]
    others = [a.ref for a in reversed(prepared) if a.ref != artifact.ref]
    old, changed, counts = None, None, Counter[str]()
    if fixes["applied"]:
        counts[MARKED] = len(fixes["applied"])
    if others and is_prepared(artifact):
        old, changed = show_comparison(others)
        counts.update(changed["change"].to_pylist())
        if not changed.num_rows:
            st.info("Both have the same rows, each in the same split.")
    else:
        st.info("There is no other dataset that was prepared: nothing to compare it with.")
    kinds = [kind for kind in CHANGE_NAMES if counts[kind]]
    if not kinds:
        return
    st.subheader("Rows")
    if st.session_state.get("rows", kinds[0]) not in kinds:
        st.session_state.rows = kinds[0]
    kind = st.segmented_control(
        "Rows", kinds, default=kinds[0], required=True, key="rows", label_visibility="collapsed",
        format_func=lambda kind: f"{CHANGE_NAMES[kind]} {counts[kind]:,}", bind="query-params",
    )  # fmt: skip
    page_number(artifact.ref, CHANGES, old and old.ref, kind)
    start = (choose_page(counts[kind], PAGE_SIZE) - 1) * PAGE_SIZE
    if kind == MARKED or old is None or changed is None:
        for item in fixes["applied"][start : start + PAGE_SIZE]:
            show_fix(item)
        return
    found = changed.filter(pc.equal(changed["change"], kind)).slice(start, PAGE_SIZE)
    show_changed_rows(
        found.to_pylist(), *((old, "before") if kind == "gone" else (artifact, "after"))
    )


def show_comparison(others: list[str]) -> tuple[Artifact, Any]:
    """Show the numbers of this version beside those of another, which is returned with the rows.

    Args:
        others: The references to choose from.
    """
    same = [ref for ref in others if ref.startswith(f"datasets/{artifact.name}@")]
    first = others.index(same[0]) if same else 0
    begin_with("other", others[first])
    other = st.selectbox("Compared with", others, first, key="other", bind="query-params")
    try:
        old = workspace.open(other)
        diff, changed = load_diff(identity(artifact), identity(old), artifact, old)
    except (UserError, OSError) as error:
        refuse("These versions cannot be compared.", error)
        raise
    rows = [
        {
            "rows": name,
            old.ref: f"{before:,}",
            artifact.ref: f"{after:,}",
            "change": f"{after - before:+,}" if after != before else "none",
        }
        for name, (before, after) in diff["rows"].items()
    ]
    st.table(rows, border="horizontal", hide_index=True)
    st.markdown(f"New rows: {diff['num_added']:,}. Gone: {diff['num_gone']:,}.")
    if diff["moves"]:
        moved = [{"move": move, "rows": f"{count:,}"} for move, count in diff["moves"].items()]
        st.table(moved, border="horizontal", hide_index=True)
    if diff["settings"]:
        settings = [
            {"setting": key, old.ref: str(before), artifact.ref: str(after)}
            for key, (before, after) in diff["settings"].items()
        ]
        what = "setting differs" if len(settings) == 1 else "settings differ"
        with st.expander(f"{len(settings)} {what}"):
            st.dataframe(settings, hide_index=True)
    return old, changed


def show_doubtful(task: TaskConfig) -> None:
    """Show the train rows whose labels the other rows deny, the most doubtful first."""
    found = load_doubtful(identity(artifact), artifact, task)
    marked = sum(bool(marking.chips(doubt.row.row_id)) for doubt in found)
    num_rows = artifact.manifest["metrics"].get("num_train_rows", 0)
    of_all = f" of the first {MOST_ROWS:,}" if num_rows > MOST_ROWS else ""
    st.caption(
        f"{len(found):,} train rows{of_all} have a label that a classifier of the other rows does "
        f"not give them; {marked:,} of them are marked. The surest come first: read from the top, "
        "and stop where the labels are right."
    )
    page_number(artifact.ref, DOUBTFUL)
    start = (choose_page(len(found), PAGE_SIZE) - 1) * PAGE_SIZE
    for number, doubt in enumerate(found[start : start + PAGE_SIZE], 1):
        row = doubt.row
        chips = [theme.chip(row.source), *marking.chips(row.row_id)]
        asked = (turn for turn in row.messages[:-1] if turn.role != "system")
        body = "".join(theme.labelled(turn.role, theme.folded(turn.text)) for turn in asked)
        surer = f"{doubt.other_probability:.0%} against {doubt.given_probability:.0%}"
        body += theme.sides(
            [
                theme.box("The row's label", [], theme.text(doubt.given)),
                theme.box("The other rows say", [theme.chip(surer)], theme.text(doubt.other)),
            ]
        )
        with st.container(border=True, gap="xsmall"):
            st.html(
                f'<div class="tl-head"><b>{html.escape(row.row_id)}</b>{"".join(chips)}</div>{body}'
            )
            item = MarkedRow(
                row.row_id, doubt.given, kinds_of("train"), task=row.task, suggested=doubt.other
            )
            with st.container(horizontal=True, vertical_alignment="center"):
                marking.button(item, number)
                st.page_link("views/lineage.py", label="Follow", query_params={"id": row.row_id})
            marking.form(item)


def show_fix(item: dict[str, Any]) -> None:
    """Show a row that marks have changed: what the files say, what it says now, and by whom."""
    chips = [theme.chip(item["source"]), theme.chip(item["side"])]
    told = f"{FIX_LABELS[item['action']]} by {', '.join(item['reviewers'])}"
    chips.append(theme.chip(told, "warn" if item["action"] == "drop" else "good"))
    chips.append(theme.chip(item["created_at"][:10]))
    boxes = [theme.box("The files say", [], theme.folded(item["before"]))]
    if item["after"]:
        title = "Right too" if item["action"] == "accept" else "Now"
        boxes.append(theme.box(title, [], theme.folded(item["after"])))
    with st.container(border=True, gap="xsmall"):
        st.html(
            f'<div class="tl-head"><b>{html.escape(item["row_id"])}</b>{"".join(chips)}</div>'
            + theme.sides(boxes)
        )
        st.page_link("views/lineage.py", label="Follow", query_params={"id": item["row_id"]})


def show_changed_rows(rows: list[dict[str, Any]], version: Artifact, place: str) -> None:
    """Show rows that only one of two versions has or that are elsewhere in the other.

    Args:
        rows: Of `changed_rows`.
        version: Where they are.
        place: The column that says in which split: `before` or `after`.
    """
    said: dict[str, dict[str, Any]] = {}
    for folder in {row[place].split()[0] for row in rows}:
        query = load_query(identity(version), folder, version)
        said |= read_rows(query, [row["row_id"] for row in rows]) if query else {}
    for row in rows:
        move = " → ".join(name for name in (row["before"], row["after"]) if name)
        chips = [theme.chip(row["source"]), theme.chip(move)]
        # Of documents that were packed or cut there is no row of this id.
        body = turns_of(said[row["row_id"]]) if row["row_id"] in said else ""
        with st.container(border=True, gap="xsmall"):
            st.html(
                f'<div class="tl-head"><b>{html.escape(row["row_id"])}</b>{"".join(chips)}</div>'
                f"{body}"
            )
            st.page_link("views/lineage.py", label="Follow", query_params={"id": row["row_id"]})


workspace, artifact = choose_artifact("datasets", "Dataset")
splits = [side.folder for side in SPLITS if (artifact.path / side.folder).is_dir()]
folders = {f"{name.capitalize()} rows": name for name in splits}
if any((artifact.path / "removed").glob("*.parquet")):
    folders[REMOVED] = "removed"
try:
    labelled = TaskConfig.model_validate(artifact.manifest["config"].get("task"))
except ValidationError:  # of another version
    labelled = None
if labelled and not (is_prepared(artifact) and classification_tasks(labelled)):
    labelled = None
views = [CARD, *folders, CONFLICTS, *[DOUBTFUL] * bool(labelled), CHANGES]
view = st.segmented_control(
    "View", views, default=CARD, key="view", required=True, label_visibility="collapsed",
    bind="query-params",
)  # fmt: skip
marking = Marking(workspace, artifact, artifact.ref)
try:
    if view in folders:
        show_rows(folders[view])
    elif view == CONFLICTS:
        show_conflicts()
    elif view == CHANGES:
        show_changes()
    elif view == DOUBTFUL and labelled:
        show_doubtful(labelled)
    else:
        card = read_card(artifact)
        with st.container(border=True):
            st.markdown(card or "This dataset has no card.")
        show_origin(artifact)
except UserError as error:
    refuse("These rows cannot be read.", error)
