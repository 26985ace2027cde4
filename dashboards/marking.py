"""Marks on rows, as every page offers them: what is marked already, and the form for a new one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import streamlit as st
from pydantic import ValidationError

import theme
from shell import is_read_only, reviewer_name
from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TaskConfig
from tuneloop.data.corrections import refusal
from tuneloop.errors import ArtifactError, UserError
from tuneloop.marks import MARK_LABELS, Fix, Mark, MarkKind
from tuneloop.review.store import ReviewStore, has_store

# On the answer to a test row.
KINDS: tuple[MarkKind, ...] = (
    "bad_reference", "accept", "bad_row", "more_like_this", "fine", "note",
)  # fmt: skip
WITH_ANSWER = ("bad_reference", "accept")
MARK_TONES = {"bad_reference": "bad", "bad_row": "bad", "fine": "good", "more_like_this": "warn"}


class MarkedRow(NamedTuple):
    """A row that can be marked.

    Args:
        answer: What the data say is right.
        said: What a model answered; empty on pages of data.
        kinds: Marks that make sense for it.
        task: Its task in a mixture.
        suggested: The right answer that the form begins with; the data's if empty.
    """

    row_id: str
    answer: str
    kinds: tuple[MarkKind, ...]
    said: str = ""
    task: str = ""
    suggested: str = ""


class Marking:
    """The marks on the rows of one dataset.

    Args:
        workspace: Where they are stored.
        dataset: The dataset whose rows are shown; None if it is not known or gone.
        reference: Its reference.
        evaluation: Reference of the evaluation whose answers are shown; empty on pages of data.
    """

    def __init__(
        self, workspace: Workspace, dataset: Artifact | None, reference: str, evaluation: str = ""
    ) -> None:
        self.dataset, self.reference, self.evaluation = dataset, reference, evaluation
        self.store: ReviewStore | None = None
        self.by_row: dict[str, list[Mark]] = {}
        if not reference or not has_store(workspace.location):
            return
        try:
            self.store = ReviewStore(workspace.location)
            name = reference.partition("/")[2].partition("@")[0]
            for mark in self.store.marks(name):
                self.by_row.setdefault(mark.content_id, []).append(mark)
        except UserError as error:
            self.store = None
            st.warning("Marks cannot be read or stored here.")
            st.code(str(error), language=None, wrap_lines=True)

    @property
    def takes_marks(self) -> bool:
        """Whether new marks can be stored here."""
        return self.store is not None and not is_read_only()

    def chips(self, row_id: str) -> list[str]:
        """Return what people have said of a row, as HTML; of all copies and pieces alike."""
        return [
            theme.chip(f"{mark.reviewer}: {MARK_LABELS[mark.kind]}", MARK_TONES.get(mark.kind, ""))
            for mark in self.by_row.get(re.split(r"[-.]", row_id)[0], [])
        ]

    def button(self, row: MarkedRow, number: int) -> None:
        """Show the button that opens the form; the digit of its place on the page does too."""
        if self.takes_marks:
            st.button(
                "Mark",
                key=f"mark {number} {row.row_id}",
                shortcut=str(number) if number < 10 else None,
                type="tertiary",
                on_click=st.session_state.update,
                kwargs={"marked_row": row.row_id},
            )

    def form(self, row: MarkedRow) -> None:
        """Show the form for a new mark, if it has been opened for this row."""
        if self.takes_marks and st.session_state.get("marked_row") == row.row_id:
            ask(self, row)

    def problem(self, kind: MarkKind, row: MarkedRow, answer: str) -> str:
        """Return why a mark cannot be made; empty if it can."""
        if kind not in WITH_ANSWER:
            return ""
        if not answer.strip():
            return "Give the right answer."
        if kind == "bad_reference" and answer.strip() == row.answer.strip():
            return "This is the answer that the data have."
        task = self._task()
        if task is None:
            return ""
        turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": row.answer}]
        action = "correct" if kind == "bad_reference" else "accept"
        try:
            asked = Fix(action, row.row_id, (answer.strip(),), ())
            return refusal(asked, turns, task.of(row.task))
        except KeyError:
            return ""

    def labels(self, row: MarkedRow) -> Sequence[str]:
        """Return the answers that the row's task allows; none if any text may be right."""
        task = self._task()
        try:
            return task.of(row.task).labels if task else ()
        except KeyError:
            return ()

    def _task(self) -> TaskConfig | None:
        told = self.dataset.manifest["config"].get("task") if self.dataset else None
        try:
            return TaskConfig.model_validate(told) if told else None
        except ValidationError:
            return None


def marking_of(workspace: Workspace, evaluation: Artifact) -> Marking:
    """Return the marks on the rows that an evaluation has scored."""
    inputs = [name for name in evaluation.manifest["inputs"] if name.startswith("datasets/")]
    if not inputs:
        return Marking(workspace, None, "")
    try:
        dataset = workspace.open(inputs[0])
    except ArtifactError:
        dataset = None
    return Marking(workspace, dataset, inputs[0], evaluation.ref)


def ask(marking: Marking, row: MarkedRow) -> None:
    """Ask what is to be said of a row, and store it."""
    # Keys have the row: what was written about one row must not stand in the form of another.
    kind: MarkKind = st.radio(
        "Your mark", row.kinds, format_func=lambda k: MARK_LABELS[k], horizontal=True,
        key=f"kind {row.row_id}",
    )  # fmt: skip
    answer = ""
    if kind in WITH_ANSWER:
        labels = marking.labels(row)
        start = row.said if kind == "accept" else row.suggested or row.answer
        if labels:
            options = list(labels)
            place = options.index(start) if start in options else None
            key = f"label {kind} {row.row_id}"
            answer = st.selectbox("Right answer", options, place, key=key) or ""
        else:
            key = f"answer {kind} {row.row_id}"
            answer = st.text_area("Right answer", start, key=key) or ""
    note = st.text_input(
        "Note", placeholder="optional: why", max_chars=2000, key=f"note {row.row_id}"
    )
    reviewer = reviewer_name()
    if not reviewer:
        reviewer = st.text_input(
            "Your name", placeholder="stored with each mark", max_chars=80, key="marker"
        )
    with st.container(horizontal=True):
        is_stored = st.button("Store the mark", type="primary")
        st.button("Cancel", on_click=st.session_state.update, kwargs={"marked_row": ""})
    if is_stored:
        problem = "Give your name." if not (reviewer or "").strip() else ""
        problem = problem or marking.problem(kind, row, answer)
        if problem:
            st.error(problem)
            return
        said = Mark(
            kind,
            row.row_id,
            marking.reference,
            reviewer.strip(),
            answer.strip() if kind in WITH_ANSWER else "",
            (note or "").strip(),
            marking.evaluation,
        )
        assert marking.store is not None
        try:
            marking.store.add(said)
        except UserError as error:
            st.error("The mark is not stored yet. Try again.")
            st.code(str(error), language=None, wrap_lines=True)
            return
        st.session_state.judge = reviewer.strip()
        st.session_state.marked_row = ""
        st.rerun()
