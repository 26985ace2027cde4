"""Rows are found and filtered where they lie, and one row is followed through a workspace."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.errors import ArtifactError, DataError
from tuneloop.marks import Mark
from tuneloop.review.rows import (
    Query,
    RowFilter,
    conflicts,
    open_rows,
    read_page,
    read_row,
    value_counts,
)
from tuneloop.review.store import URL_VARIABLE, ReviewStore
from tuneloop.review.trace import trace, trace_lines
from tuneloop.review.verdicts import Verdict


def row(number: int, topic: str = "a", question: str = "What is it?") -> dict[str, Any]:
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"It's {number}"},
    ]
    return {
        "row_id": f"{number:020d}",
        "source": f"data/faq.jsonl:{number}",
        "synthetic": number % 2 == 0,
        "messages": turns,
        "input_ids": [1, 2],
        "loss_mask": [0, 1],
        "num_tokens": 2,
        'the "topic"?': topic,
    }


def publish(workspace: Workspace, kind: str, name: str, config: dict, **tables: Any) -> Artifact:
    identity = f"{kind}{len(workspace.published())}"
    with workspace.draft(kind, name, identity) as draft:
        for place, content in tables.items():
            file = draft.path / place.replace("__", "/").replace("_parquet", ".parquet")
            file.parent.mkdir(exist_ok=True)
            if isinstance(content, dict):
                draft.path.joinpath("card.json").write_text(json.dumps(content))
            else:
                pq.write_table(pa.Table.from_pylist(content), file)
        metrics = {"primary": "exact_match"} if kind == "evaluations" else {}
        return draft.publish(config=config, resources={}, inputs=[], metrics=metrics)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    return Workspace(tmp_path)


def test_rows_are_filtered_over_all_files_and_read_page_by_page(workspace: Workspace) -> None:
    hostile = "100% 'quoted' \"and\" ÄPFEL; DROP TABLE rows -- Straße"
    first = [row(i, "ab"[i % 2]) for i in range(30)]
    second = [row(i, "c", hostile) for i in range(30, 35)]
    made = publish(
        workspace, "datasets", "faq", {}, train__part0_parquet=first, train__part1_parquet=second
    )
    query = open_rows(made, "train")
    assert query is not None
    assert open_rows(made, "validation") is None
    page = read_page(query, RowFilter(), 3, 10)
    assert (page.num_matching, page.num_rows) == (35, 35)
    assert [r["row_id"] for r in page.rows] == [f"{i:020d}" for i in range(20, 30)]
    assert "input_ids" not in page.rows[0]
    chosen = RowFilter(equal={'the "topic"?': "b", "synthetic": "false", "no such": "x"})
    assert read_page(query, chosen, 1, 10).num_matching == 15
    for words, count in (
        ("äpfel drop", 5), ("it's 7", 3), ("100% 'QUOTED'", 5), ("none", 0),
        ("STRASSE", 5), ("straße", 5),
    ):  # fmt: skip
        assert read_page(query, RowFilter(words), 1, 10).num_matching == count
    # Several people at once.
    with ThreadPoolExecutor(8) as pool:
        words = [f"it's {i}" for i in range(10, 30)] * 4
        found = list(pool.map(lambda w: read_page(query, RowFilter(w), 1, 10), words))
    assert [f"It's {p.rows[0]['messages'][-1]['content'][5:]}".lower() for p in found] == words
    counts = value_counts(query)
    assert counts['the "topic"?'] == {"a": 15, "b": 15, "c": 5}
    assert set(counts) == {'the "topic"?', "synthetic"}
    whole = read_row(query, f"{3:020d}")
    assert whole is not None
    assert whole["loss_mask"] == [0, 1]
    assert read_row(query, "none") is None
    (made.path / "train" / "part1.parquet").write_bytes(b"\0" * 100)
    with pytest.raises(ArtifactError, match="the rows cannot be read"):
        open_rows(made, "train")


def test_conflicts_come_with_a_row_of_each_answer_whatever_columns_are_called(
    workspace: Workspace,
) -> None:
    rows = []
    # Question 0 has nine rows and three answers, question 1 four and two; the last has one answer.
    for number, (asked, said) in enumerate([(0, i % 3) for i in range(9)] + [(1, 1), (1, 2)] * 2):
        rows.append(row(number) | {"prompt": "x", "value": "ab"[number % 2], "n": number % 3})
        rows[-1]["messages"] = [
            {"role": "user", "content": f" Ask {asked}" if number % 2 else f"ask {asked} "},
            {"role": "assistant", "content": f"say {said}"},
        ]
    rows += [row(20), row(20)]
    made = publish(workspace, "datasets", "faq", {}, train__part0_parquet=rows)
    query = open_rows(made, "train")
    assert query is not None
    (first, second), count = conflicts(query, 1, 5)
    assert count == 2
    assert [r["messages"][-1]["content"] for r in first] == ["say 0", "say 1", "say 2"] * 2
    assert [int(r["row_id"]) for r in second] == [9, 10, 11, 12]
    assert conflicts(query, 2, 1) == ([second], 2)
    assert conflicts(query, 9, 5) == ([], 2)
    # In a mixture two tasks may answer one prompt differently.
    tasks = [r | {"task": r["messages"][-1]["content"]} for r in rows]
    made = publish(workspace, "datasets", "mixed", {}, train__part0_parquet=tasks)
    query = open_rows(made, "train")
    assert query is not None
    assert conflicts(query, 1, 5, by_task=True) == ([], 0)
    assert conflicts(query, 1, 5)[1] == 2
    assert value_counts(query)["value"] == {"a": 7, "b": 6}
    assert value_counts(query)["synthetic"] == {"true": 9, "false": 6}


def test_answers_are_found_by_their_question_and_not_by_all_that_was_sent(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": 'Say "hi"'}]
    prompts = [json.dumps(turns), 'plain "hi"']
    rows = [
        {"example_id": str(number), "arm": "base", "prompt": prompt, "completion": "Hello"}
        for number, prompt in enumerate(prompts)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "it's.parquet")
    query = Query([tmp_path / "it's.parquet"])
    for words, count in (('"HI"', 2), ("say hello", 1), ("content", 0), ("kind", 0)):
        assert read_page(query, RowFilter(words), 1, 10).num_matching == count


def test_an_answer_has_its_own_score_where_macro_f1_decides(workspace: Workspace) -> None:
    publish(workspace, "datasets", "faq", {}, test__0_parquet=[row(5)])
    with workspace.draft("evaluations", "faq", "e" * 64) as draft:
        said = {"example_id": f"{5:020d}", "arm": "base", "completion": "b", "accuracy": 0.0}
        pq.write_table(pa.Table.from_pylist([said]), draft.path / "predictions.parquet")
        (draft.path / "metrics.json").write_text('{"row_metric": "accuracy"}')
        draft.publish(config={}, resources={}, inputs=[], metrics={"primary": "macro_f1"})
    (answer,) = trace(workspace, f"{5:020d}").answers
    assert (answer.metric, answer.score) == ("accuracy", 0.0)


def test_a_row_is_followed_through_everything(workspace: Workspace) -> None:
    removed = {
        "row_id": f"{9:020d}",
        "source": "data/faq.jsonl:9",
        "stage": "dedup",
        "similarity": 1.0,
        "reason": "same as another",
        "kept_row_id": f"{3:020d}",
        "text": "x",
        "reason_code": "exact_duplicate",
    }
    first = publish(
        workspace,
        "datasets",
        "faq",
        {},
        train__0_parquet=[row(3), row(4)],
        test__0_parquet=[row(5)],
        removed__0_parquet=[removed],
    )
    fix = {"row_id": f"{3:020d}", "action": "correct", "reviewers": ["ann"], "marks": ["u1"]}
    publish(
        workspace,
        "datasets",
        "faq",
        {"train_fingerprint": first.fingerprint},
        train__0_parquet=[row(3)],
        test__0_parquet=[row(5)],
        card={"fixes": {"applied": [fix]}},
    )
    publish(workspace, "models", "faq", {"dataset": first.fingerprint})
    publish(workspace, "models", "other", {"dataset": "unknown"})
    said = [
        {"example_id": f"{5:020d}", "arm": arm, "completion": "It's 5", "exact_match": score}
        for arm, score in (("base", 0.0), ("finetuned", None))
    ]
    publish(workspace, "evaluations", "faq", {}, predictions_parquet=said)
    store = ReviewStore(workspace.location)
    mark = Mark("bad_reference", f"{3:020d}-2", "datasets/faq@v1", "ann", "It's three")
    vote = Verdict("evaluations/faq@v1", f"{5:020d}-2", "base", "finetuned", "left", "bob", "short")
    store.add(mark)
    store.add(vote)

    found = trace(workspace, f"{3:020d}")
    assert [(p.dataset, p.side) for p in found.places] == [
        ("datasets/faq@v1", "train"),
        ("datasets/faq@v2", "train"),
    ]
    assert found.places[0].repeated_by == [f"{9:020d}"]
    assert found.places[1].fixes == [fix]
    assert {(m["model"], m["dataset"]) for m in found.models} == {
        ("models/faq@v1", "datasets/faq@v1")
    }
    assert [m.uid for m in found.marks] == [mark.uid]
    for name in (f"{3:020d}"[:20], "faq.jsonl:3", "data/faq.jsonl:3", mark.uid):
        assert trace(workspace, name).row_id == f"{3:020d}"
    tested = trace(workspace, vote.uid)
    assert tested.row_id == f"{5:020d}"
    assert tested.models == []
    assert [(a.arm, a.score) for a in tested.answers] == [("base", 0.0), ("finetuned", None)]
    assert [v.reviewer for v in tested.votes] == ["bob"]
    gone = trace(workspace, "faq.jsonl:9")
    assert (gone.places[0].side, gone.places[0].kept_row_id) == ("removed", f"{3:020d}")
    text = "\n".join(trace_lines(found) + trace_lines(tested) + trace_lines(gone))
    for words in (
        "answer corrected, as ann marked it (u1)",
        "models/faq@v1  on datasets/faq@v1",
        "the answer is wrong: It's three",
        "exact_match 0",
        "no score",
        "bob  base  short",
        "because of row 00000000000000000003",
    ):
        assert words in text
    assert json.loads(json.dumps(found.as_dict()))["row_id"] == f"{3:020d}"
    for name, what in (("f" * 20, "no row"), ("0000000", "several rows"), ("abc", "too short")):
        with pytest.raises(DataError, match=what):
            trace(workspace, name)
