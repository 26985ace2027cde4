"""What becomes of the marks of several people, and of a file of marks that was edited by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.data.prepare import has_train_rows_of
from tuneloop.errors import DataError
from tuneloop.marks import Mark, decide, read_marks, write_marks
from tuneloop.review.fixes import states_of


def mark(kind: str, reviewer: str = "ann", answer: str = "", row: str = "r1") -> Mark:
    return Mark(kind, row, "datasets/demo@v1", reviewer, answer)  # type: ignore[arg-type]


def test_the_newest_mark_of_a_reviewer_counts() -> None:
    marks = [mark("bad_row"), mark("bad_reference", answer=" 42 ")]
    decided = decide(marks)
    assert decided.fixes == [("correct", "r1", ("42",), (marks[1],))]
    assert decided.unused == {marks[0].uid: "ann has marked the row again"}
    taken_back = decide([*marks, mark("fine")])
    assert taken_back.fixes == []
    assert len(taken_back.unused) == 3


def test_a_name_in_another_spelling_is_the_same_reviewer() -> None:
    # As files of marks from two systems have it: é as one sign, and as two.
    marks = [mark("bad_row", "Jos\u00e9"), mark("bad_reference", "jose\u0301 ", "42")]
    assert decide(marks).fixes == [("correct", "r1", ("42",), (marks[1],))]
    accepted = [mark("accept", "Jos\u00e9", "43"), mark("fine", "Jose\u0301")]
    assert decide(accepted).fixes == []


def test_reviewers_who_agree_are_all_named_and_those_who_do_not_change_nothing() -> None:
    agreed = [mark("bad_reference", name, "42") for name in ("ann", "bob")]
    (fix,) = decide(agreed).fixes
    assert fix.reviewers == "ann, bob"
    marks = [*agreed, mark("bad_reference", "eve", "43"), mark("bad_row", row="r2")]
    decided = decide(marks)
    assert [(f.action, f.content_id) for f in decided.fixes] == [("drop", "r2")]
    assert set(decided.unused) == {m.uid for m in marks[:3]}
    assert "contradicted by eve: the answer is wrong" in decided.unused[agreed[0].uid]
    assert "ann: the answer is wrong; bob:" in decided.unused[marks[2].uid]
    assert [f.action for f in decide([*marks, mark("fine", "eve")]).fixes] == ["drop"]
    assert len(decide([*marks, mark("bad_reference", "eve", "42")]).fixes) == 2


def test_copies_of_a_row_are_marked_with_it() -> None:
    assert decide([mark("bad_row", row="r1-2")]).fixes[0].content_id == "r1"


def test_several_answers_are_accepted_once_each() -> None:
    marks = [
        mark("accept", answer="a"), mark("accept", "bob", "a"), mark("accept", answer="b"),
        mark("accept"), mark("note"), mark("more_like_this"),
    ]  # fmt: skip
    decided = decide(marks)
    assert decided.fixes == [("accept", "r1", ("a", "b"), (marks[0], marks[2]))]
    assert decided.unused[marks[1].uid] == "ann has accepted the same answer"
    assert decided.unused[marks[3].uid].startswith("without an answer")
    (fix,) = decide([*marks, mark("fine")]).fixes
    assert fix.answers == ("a",)
    assert fix.reviewers == "bob"
    (fix,) = decide([*marks, mark("bad_row", "eve")]).fixes
    assert fix.action == "drop"


def test_a_correction_without_an_answer_asks_for_it() -> None:
    lacking = mark("bad_reference")
    assert decide([lacking]).fixes == []
    assert "the right answer is missing" in decide([lacking]).unused[lacking.uid]


def test_a_mark_that_asks_for_what_was_done_or_refused_does_not_wait(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first = mark("bad_reference", answer="42")
    accepted, long = mark("accept", answer="x", row="r2"), mark("accept", answer="y", row="r3")
    with workspace.draft("datasets", "demo", "f" * 16) as draft:
        changes = [("r1", "correct", "42", first), ("r2-2", "accept", "x", accepted)]
        applied = [
            {"row_id": row, "action": action, "after": after, "marks": [of.uid]}
            for row, action, after, of in changes
        ]
        fixes = {"applied": applied, "refused": {long.uid: "the row is trained on"}}
        (draft.path / "card.json").write_text(json.dumps({"fixes": fixes}))
        artifact = draft.publish(config={}, resources={}, inputs=[], metrics={})
    marks = [
        first, accepted, long,
        mark("bad_reference", answer=" 42"), mark("bad_reference", "bob", "42"),
        mark("accept", "bob", "z", "r2"), mark("accept", "bob", "x", "r2"),
        mark("fine", row="r3"), mark("accept", "bob", "y", "r3"),
    ]  # fmt: skip
    states = [(s.state, s.why) for s in states_of(marks, [artifact])]
    # The same correction is still asked for: nothing takes it back.
    assert states[0] == ("not applied", "ann has marked the row again")
    assert states[1] == ("applied", "since datasets/demo@v1")
    assert states[3] == states[4] == ("applied", "as it was marked before")
    assert [state for state, _ in states[5:7]] == ["waiting", "not applied"]
    assert states[8] == ("not applied", "the row is trained on")
    undone = states_of([first, mark("fine")], [artifact])[0]
    assert undone.why == "ann has marked the row again; the next `tuneloop prepare` takes it back"


def test_versions_with_other_train_rows_share_no_models(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)

    def publish(name: str, ids: list[str], of: str = "") -> Artifact:
        identity = f"{name}{len(workspace.published())}" * 8
        with workspace.draft("datasets", name, identity) as draft:
            (draft.path / "train").mkdir()
            pq.write_table(pa.table({"row_id": ids}), draft.path / "train" / "part-00000.parquet")
            config = {"train_fingerprint": of} if of else {}
            return draft.publish(config=config, resources={}, inputs=[], metrics={})

    first = publish("demo", ["a", "b"])
    fixed = publish("demo", ["b", "a"], first.fingerprint)
    # A row is back that had quoted a test row.
    other = publish("other", ["a", "b", "c"])
    assert has_train_rows_of(workspace, "demo", first.fingerprint, fixed.path)
    assert not has_train_rows_of(workspace, "demo", first.fingerprint, other.path)
    assert has_train_rows_of(workspace, "demo", "of none", other.path)


def test_marks_come_back_from_their_file(tmp_path: Path) -> None:
    marks = [mark("bad_reference", answer="line\nend  "), mark("note", "bo\u2028b")]
    write_marks(marks, tmp_path / "marks.jsonl")
    assert read_marks(tmp_path / "marks.jsonl") == marks


def test_a_file_edited_by_hand_is_told_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "marks.jsonl"
    good = '{"kind": "bad_row", "row_id": "r1", "dataset": "datasets/demo@v1", "reviewer": "ann"}'
    lines = [good, "", good[:-1], good.replace("bad_row", "bad"), good.replace("row_id", "row")]
    file.write_text("\n".join([*lines, "[]", good.replace('"r1"', "1")]))
    with pytest.raises(DataError) as raised:
        read_marks(file)
    assert [p.where.rpartition(":")[2] for p in raised.value.problems] == ["3", "4", "5", "6", "7"]
    assert "kind bad; allowed: bad_reference" in str(raised.value)
    file.write_text(good)
    assert read_marks(file) == read_marks(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_marks(tmp_path / "none.jsonl")
