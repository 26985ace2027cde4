"""The marks that count for a configuration, and what has become of each of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.marks import MARK_LABELS, SCORED_SUFFIX, Fix, Mark, decide, read_marks
from tuneloop.review.store import ReviewStore, has_store

# What a mark of a kind asks to be done with its row.
_ACTIONS = {"bad_reference": "correct", "bad_row": "drop", "accept": "accept"}


class MarkState(NamedTuple):
    """A mark, and what has become of it.

    Args:
        state: `applied`, `waiting` for the next preparation (of rows of `evaluation.sources`, for
            the next evaluation), `not applied`, or `kept` to be read.
        why: In words.
    """

    mark: Mark
    state: str
    why: str

    def row(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return vars(self.mark) | {"state": self.state, "why": self.why}

    @property
    def says(self) -> str:
        """What the reviewer says, in words."""
        parts = [MARK_LABELS[self.mark.kind], self.mark.answer, self.mark.note]
        return ": ".join(" ".join(part.split()) for part in parts if part)


def marks_for(config: TuneloopConfig, workspace: Workspace, scored: bool = False) -> list[Mark]:
    """Return the marks that `data.fixes` lets count for the rows of a configuration, oldest first.

    Args:
        scored: Those on the rows of `evaluation.sources`, in place of those of `data.sources`.

    Raises:
        DataError: `data.fixes` names a file that is none of marks.
        ArtifactError: The workspace's marks cannot be read.
    """
    if config.data.fixes is False:
        return []
    if isinstance(config.data.fixes, str):
        marks = read_marks(Path(config.data.fixes))
        return [m for m in marks if m.dataset_name.endswith(SCORED_SUFFIX) == scored]
    if not has_store(workspace.location):
        return []
    name = config.name + (SCORED_SUFFIX if scored else "")
    return ReviewStore(workspace.location).marks(name)


def mark_states(
    config: TuneloopConfig, workspace: Workspace, refusal: Callable[[Fix], str]
) -> list[MarkState]:
    """Return every mark on the rows of a configuration with what has become of it, oldest first.

    Args:
        refusal: Why the task does not allow what a mark asks for; empty if it does.

    Raises:
        DataError: `data.fixes` names a file that is none of marks.
        ArtifactError: The workspace's marks cannot be read.
    """
    is_off = config.data.fixes is False
    if is_off:
        config = config.model_copy(update={"data": config.data.model_copy(update={"fixes": True})})
    states: list[MarkState] = []
    for is_scored in (False, True):
        marks = marks_for(config, workspace, is_scored)
        name = config.name + (SCORED_SUFFIX if is_scored else "")
        versions = workspace.published("datasets", name) if marks else []
        found = states_of(marks, workspace.with_files(versions), refusal)
        states += [
            s._replace(state="not applied", why="data.fixes is false")
            if is_off and s.state == "waiting"
            else s
            for s in found
        ]
    return states


def states_of(
    marks: Sequence[Mark],
    versions: Sequence[Artifact],
    refusal: Callable[[Fix], str] = lambda fix: "",
) -> list[MarkState]:
    """Return what has become of marks in the versions of their dataset, oldest version first.

    Args:
        refusal: Why the task does not allow what a mark asks for; empty if it does.
    """
    asked = decide(marks)
    fixes = [(artifact.ref, fixes_of(artifact)) for artifact in versions]
    first_in: dict[str, str] = {}
    for reference, own in fixes:
        for item in own["applied"]:
            for uid in item["marks"]:
                first_in.setdefault(uid, reference)
    newest = fixes[-1][1] if fixes else {"applied": [], "refused": {}}
    in_newest = {uid for item in newest["applied"] for uid in item["marks"]}
    # Whoever asks for what was done, or refused, makes no new version: it is so for them too.
    done = {
        (item["row_id"].partition("-")[0], item["action"]): item["after"]
        for item in newest["applied"]
    }
    # What a later preparation refused holds for the answers that it was given.
    refused = {_asks(m): newest["refused"][m.uid] for m in marks if m.uid in newest["refused"]}
    wanted = {mark.uid: fix for fix in asked.fixes for mark in fix.marks}
    still = {_asks(mark) for mark in marks if mark.uid in wanted}
    states = []
    for mark in marks:
        ask = _asks(mark)
        if mark.kind in ("note", "more_like_this"):
            state, why = "kept", asked.unused[mark.uid]
        elif mark.uid in asked.unused:
            state, why = "not applied", asked.unused[mark.uid]
            if mark.uid in in_newest and ask not in still:
                why += f"; the next `tuneloop {mark.applied_by}` takes it back"
        elif _is_done(ask, done.get((ask.row, ask.action))):
            since = first_in.get(mark.uid)
            state, why = "applied", f"since {since}" if since else "as it was marked before"
        elif told := refused.get(ask) or refusal(wanted[mark.uid]):
            state, why = "not applied", told
        else:
            state, why = "waiting", f"the next `tuneloop {mark.applied_by}` applies it"
        states.append(MarkState(mark, state, why))
    return states


class _Ask(NamedTuple):
    """What a mark asks for, whoever makes it."""

    row: str
    action: str
    answer: str


def _asks(mark: Mark) -> _Ask:
    has_answer = mark.kind in ("bad_reference", "accept")
    answer = mark.answer.strip() if has_answer else ""
    return _Ask(mark.content_id, _ACTIONS.get(mark.kind, ""), answer)


def _is_done(ask: _Ask, after: str | None) -> bool:
    """Return whether what a change has made of a row, None for no change, is what a mark asks."""
    if after is None or ask.action != "accept":
        return after == ask.answer
    # Several accepted answers are one change, each on lines of its own.
    return f"\n{ask.answer}\n" in f"\n{after}\n"


def fixes_of(dataset: Artifact) -> dict[str, Any]:
    """Return what marks have changed in a dataset: `applied` and `refused`."""
    file = dataset.path / "card.json"
    card = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found: dict[str, Any] = card.get("fixes") or {"applied": [], "refused": {}}
    return found
