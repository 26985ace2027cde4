"""Which inputs are chosen to be labelled, why, and how the labelled ones come back."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Workspace
from tuneloop.cli import main
from tuneloop.config import TaskConfig, TuneloopConfig, load_config
from tuneloop.data.first_look import look
from tuneloop.data.schema import dataset_schema
from tuneloop.data.sources.files import find_files
from tuneloop.data.sources.readers import read_source
from tuneloop.data.sources.unlabelled import UnlabelledRow
from tuneloop.errors import DataError
from tuneloop.labelling import (
    Choice,
    Wanted,
    choose,
    choose_next,
    find_wanted,
    write_choices,
)
from tuneloop.marks import Mark
from tuneloop.records import Conversation, Message
from tuneloop.review.store import URL_VARIABLE, ReviewStore

KNOWN = {
    "where is my parcel today": "delivery",
    "has the parcel been sent": "delivery",
    "the invoice is too high": "billing",
    "please send the invoice again": "billing",
}
TESTED = "when will the postman ring"
INPUTS = [
    "where is the parcel today",  # as good as known
    "is the parcel on the invoice too",  # between both labels
    "the parcel and the invoice is wrong",  # likewise, and like the one before
    "can the courier ring twice at the door",  # unlike all of them
    "zyx wvu",  # an outlier
]


def solved(asked: str, answer: str) -> Conversation:
    return Conversation((Message("user", asked), Message("assistant", answer)))


def row(text: str, **record: Any) -> UnlabelledRow:
    return UnlabelledRow((Message("user", text),), "x:1", {"text": text, **record})


def weak(by: str, part: str) -> Wanted:
    return Wanted(weak={(by, part): "25.0%"}, metric="accuracy")


TRAIN = [solved(*item) for item in KNOWN.items()]


def test_what_covers_most_doubt_and_is_wanted_comes_first() -> None:
    task = TaskConfig(type="classification", labels=["billing", "delivery"])
    about_both = [f"is the parcel on the invoice of {day}" for day in ("may", "june", "july")]
    texts = [*INPUTS, *about_both]
    chosen = choose([row(text) for text in texts], TRAIN, task, Wanted(), len(texts))
    order = [choice.row.prompt for choice in chosen]
    assert {*order} == {*texts}
    # Four inputs are much alike and between two labels: one of them stands for all.
    assert order[0] in [INPUTS[1], *about_both]
    assert order[1] not in [INPUTS[1], *about_both]
    assert order.index(INPUTS[0]) > order.index(INPUTS[3])
    assert {choice.guess for choice in chosen} <= {"billing", "delivery"}
    doubt, alike = chosen[0].reasons
    assert doubt.startswith("`")
    assert "or `" in doubt
    assert alike.endswith("% alike")
    assert [choice.score for choice in chosen] == sorted((c.score for c in chosen), reverse=True)
    # What is wanted by people, or is of a weak part, comes first.
    for wanted, told in (
        (Wanted(["zyx wvu tsr", "zyx wvu"]), "people want more rows like it"),
        (weak("shop", "north"), "shop `north`, where accuracy is 25.0%"),
        # Of numbers a part is a range; a table has them as texts.
        (weak("price", "5 to below 10"), "price `5 to below 10`, where"),
        (weak("size", "5 to 9"), "size `5 to 9`, where"),
        (weak("length", "1 to 3"), "length `1 to 3` words, where"),
    ):
        own: dict[str, Any] = {"shop": "north", "price": "7.5", "size": 7}
        marked = [row(t, **(own if t == "zyx wvu" else dict.fromkeys(own, "30"))) for t in texts]
        again = choose(marked, TRAIN, task, wanted, len(texts))
        place = [choice.row.prompt for choice in again].index("zyx wvu")
        assert again[place].score > chosen[order.index("zyx wvu")].score
        assert any(reason.startswith(told) for reason in again[place].reasons)
    # Of other tasks distance decides.
    two = [row(INPUTS[0]), row(INPUTS[3])]
    (first,) = choose(two, TRAIN, TaskConfig(type="generation"), Wanted(), 1)
    assert (first.row.prompt, first.guess) == (INPUTS[3], "")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rows = [
        {"row_id": f"{n:020x}", "source": "x", "synthetic": False, "input_ids": [1],
         "loss_mask": [1], "num_tokens": 1,
         "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for n, (q, a) in enumerate(KNOWN.items())
    ]  # fmt: skip
    with Workspace(tmp_path / "ws").draft("datasets", "mail", "f" * 64) as draft:
        (draft.path / "train").mkdir()
        table = pa.Table.from_pylist(rows, dataset_schema(pa.schema([])))
        pq.write_table(table, draft.path / "train" / "part-0.parquet")
        tested = [
            {"role": "user", "content": TESTED},
            {"role": "assistant", "content": "delivery"},
        ]
        (draft.path / "test").mkdir()
        table = pa.Table.from_pylist([rows[0] | {"row_id": "f" * 20, "messages": tested}])
        pq.write_table(table, draft.path / "test" / "part-0.parquet")
        draft.publish(config={}, resources={}, inputs=[], metrics={})
    path = tmp_path / "mail.yaml"
    path.write_text(
        f"name: mail\nworkspace: {tmp_path}/ws\n"
        "task: {type: classification, labels: [billing, delivery]}\nmodel: {base: none}\n"
        "data: {sources: [{path: x.csv, format: columns, "
        "columns: {prompt: mail, completion: topic}}]}\n"
    )
    return path


def test_marks_on_rows_scored_elsewhere_count(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    workspace = Workspace(tmp_path / "ws")
    asked = [{"role": "user", "content": INPUTS[0]}, {"role": "assistant", "content": "delivery"}]
    with workspace.draft("datasets", "mail-scored", "e" * 64) as draft:
        (draft.path / "test").mkdir()
        table = pa.Table.from_pylist([{"row_id": "e" * 20, "messages": asked}])
        pq.write_table(table, draft.path / "test" / "part-0.parquet")
        draft.publish(config={}, resources={}, inputs=[], metrics={})
    ReviewStore(workspace.location).add(
        Mark("more_like_this", "e" * 20, "datasets/mail-scored@v1", "ann")
    )
    wanted = find_wanted(load_config(config, []), workspace, workspace.open("datasets/mail"))
    assert wanted.marked == [INPUTS[0]]
    # It is labelled already.
    (tmp_path / "all.csv").write_text("mail\n" + "\n".join(INPUTS))
    chosen = choose_next(load_config(config, []), workspace, str(tmp_path / "all.csv"), 9)
    assert {choice.row.prompt for choice in chosen} == {*INPUTS[1:]}


def test_weak_parts_count_but_not_groups_that_the_split_holds_out(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    workspace = Workspace(tmp_path / "ws")
    told = {"value": 0.25, "rest": 0.8, "p_adjusted": 0.01}
    parts = [told | {"by": by, "slice": "5 to 9"} for by in ("price", "shop")]
    right = {"label": "right label", "better": "higher", "kind": "binary"}
    with workspace.draft("evaluations", "mail", "a" * 64) as draft:
        slices = {"primary": "accuracy", "confidence": 0.95, "arms": {"finetuned": parts}}
        (draft.path / "slices.json").write_text(json.dumps(slices))
        (draft.path / "metrics.json").write_text(json.dumps({"metrics": {"accuracy": right}}))
        draft.publish(config={}, resources={}, inputs=[], metrics={})
    loaded = load_config(config, ["data.split.group_by=shop"])
    wanted = find_wanted(loaded, workspace, workspace.open("datasets/mail"))
    assert wanted.weak == {("price", "5 to 9"): "25.0%"}


def test_a_table_comes_back_as_a_source(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    known = next(iter(KNOWN))
    texts = [*INPUTS, known.upper(), TESTED.title(), INPUTS[1]]
    (tmp_path / "all.csv").write_text(
        "id,mail\n" + "".join(f"{i},{t}\n" for i, t in enumerate(texts))
    )
    out = tmp_path / "next.csv"
    arguments = ["label-next", str(tmp_path / "all.csv"), str(config), "-k", "9", "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert len(result["chosen"]) == 5  # without the rows of the dataset and the copy
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "mail", "topic", "guess", "why"]
    assert {row["topic"] for row in rows} == {""}
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"topic": row["guess"]} for row in rows)
    loaded = load_config(config, [f"data.sources={json.dumps([result['source']])}"])
    (file,) = find_files(loaded.data.sources)
    back = list(read_source(file, 0, loaded))
    assert [row["rejection"] for row in back] == [None] * 5
    assert {row["messages"][0]["content"] for row in back} == {*INPUTS}

    # What was written is not written over; the mistake is told without a traceback.
    assert main(arguments) == 2
    assert "File exists" in capfd.readouterr().err
    (tmp_path / "known.csv").write_text(f"mail\n{known}\n")
    assert main(["label-next", str(tmp_path / "known.csv"), str(config), "--out", "n.csv"]) == 2
    assert "all inputs are rows of the dataset already" in capfd.readouterr().err
    assert main(["label-next", str(tmp_path / "none.csv"), str(config), "--out", "n.csv"]) == 2
    assert "no such file\n  where:   FILE" in capfd.readouterr().err
    (tmp_path / "other.csv").write_text("body\nx\n")
    assert main(["label-next", str(tmp_path / "other.csv"), str(config), "--out", "n.csv"]) == 2
    assert "`mail`" in capfd.readouterr().err


def test_tasks_of_label_studio_come_back_as_a_source(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in INPUTS)
    (tmp_path / "all.jsonl").write_text(lines)
    out = tmp_path / "next.json"
    assert main(["label-next", str(tmp_path / "all.jsonl"), str(config), "--out", str(out)]) == 0
    assert "label_studio" in capfd.readouterr().out
    tasks = json.loads(out.read_text())
    assert {task["data"]["text"] for task in tasks} == {*INPUTS}
    result = tasks[0]["predictions"][0]["result"][0]
    assert result["value"]["choices"][0] in ("billing", "delivery")

    # As Label Studio exports them: annotated, cancelled, contradicting, not labelled, and written.
    def annotated(*said: str) -> list[dict[str, Any]]:
        return [{"result": [{"type": "choices", "value": {"choices": [one]}}]} for one in said]

    free = [{"result": [{"type": "textarea", "value": {"text": ["delivery"]}}]}]
    cancelled = [{"was_cancelled": True, "result": []}, *annotated("billing")]
    given = [annotated("billing", "billing"), cancelled, free, annotated("billing", "delivery"), []]
    export = [
        t | {"id": n, "annotations": a} for n, (t, a) in enumerate(zip(tasks, given, strict=True))
    ]
    (tmp_path / "export.json").write_text(json.dumps(export))
    source = {"path": str(tmp_path / "export.json"), "format": "label_studio"}
    loaded = load_config(config, [f"data.sources={json.dumps([source])}"])
    (file,) = find_files(loaded.data.sources)
    rows = list(read_source(file, 0, loaded))
    answers = [row["messages"][-1]["content"] for row in rows if row["messages"]]
    assert answers == ["billing", "billing", "delivery"]
    assert [row["rejection"].what for row in rows if row["rejection"]] == [
        "people gave the task different answers",
        "the task is not labelled yet",
    ]
    found = look(str(tmp_path / "export.json"))
    assert (found.layout.format, found.num_rows) == ("label_studio", 5)


def test_inputs_that_are_more_than_a_text_are_not_labelled_without_the_rest(tmp_path: Path) -> None:
    source = {"path": "rows.jsonl", "format": "messages"}
    config = TuneloopConfig.model_validate(
        {
            "name": "faq",
            "task": {"type": "generation", "instruction": "Help."},
            "model": {"base": "x"},
            "data": {"sources": [source]},
        }
    )
    told, asked = Message("system", "Help."), Message("user", "And now?")
    plain = UnlabelledRow((told, asked), "x:1", {"why": "left of a table"})
    turns = (told, Message("user", "Hi"), Message("assistant", "Hello"), asked)
    for messages, tools in ((turns, ""), ((Message("system", "Help.\n\nBe X."), asked), ""),
                            ((told, asked), "[]")):  # fmt: skip
        rows = [plain, UnlabelledRow(messages, "x:2", {}, tools)]
        for name in ("next.csv", "next.json"):
            with pytest.raises(DataError, match="1 of 2 inputs"):
                write_choices([Choice(row, 1.0, "", ()) for row in rows], config, tmp_path / name)
            assert not (tmp_path / name).exists()
    write_choices([Choice(plain, 1.0, "", ("new",))], config, tmp_path / "next.csv")
    assert (tmp_path / "next.csv").read_text().split() == ["prompt,answer,why", "And", "now?,,new"]
