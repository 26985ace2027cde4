"""Rows of every kind, written by a model behind a real HTTP server."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.check import check
from tuneloop.config import BudgetConfig, MixedSourceConfig, TaskConfig, TuneloopConfig
from tuneloop.data.schema import dataset_schema
from tuneloop.data.sources.files import find_files
from tuneloop.data.sources.unlabelled import read_unlabelled
from tuneloop.errors import DataError
from tuneloop.evals.scoring.predictions import Prediction, write_predictions
from tuneloop.evals.scoring.spending import Cost, Entry
from tuneloop.marks import Mark
from tuneloop.models.bases.source import resolve_base
from tuneloop.records import Endpoint, Message, SamplingParams
from tuneloop.review.store import ReviewStore
from tuneloop.synthesis.filters import Filters, Novelty, Solved, agreement, cleaned, lost
from tuneloop.synthesis.generate import generate_rows, teacher_of
from tuneloop.synthesis.more_of import find_parts, more_of_problems
from tuneloop.synthesis.rows import Candidate, Known, RowWriter, read_seeds
from tuneloop.synthesis.teacher import Asked, Rates, Replies, Reply, Teacher

LABELS = ["billing", "delivery"]
WORDS = "parcel invoice refund courier payment address late wrong broken card box street".split()


def asked(number: int) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=8)) + f" no {number}?"


def label_of(text: str) -> str:
    return LABELS[len(text) % 2]


@pytest.fixture
def dataset(tmp_path: Path) -> Artifact:
    """Thirty train rows of people's, and one that a model wrote."""
    rows = []
    for number in range(31):
        turns = [
            {"role": "system", "content": "Sort the mail."},
            {"role": "user", "content": asked(number)},
            {"role": "assistant", "content": label_of(asked(number))},
        ]
        rows.append({"row_id": f"{number:020x}", "source": "x", "synthetic": number == 30})
        rows[-1] |= {"messages": turns, "input_ids": [1], "loss_mask": [1], "num_tokens": 1}
    with Workspace(tmp_path / "ws").draft("datasets", "mail", "f" * 64) as draft:
        (draft.path / "train").mkdir()
        table = pa.Table.from_pylist(rows, dataset_schema(pa.schema([])))
        pq.write_table(table, draft.path / "train" / "part-0.parquet")
        return draft.publish(config={}, resources={}, inputs=[], metrics={"num_unanswered": 0})


def config_for(tmp_path: Path, model: Path, url: str, **generation: Any) -> TuneloopConfig:
    return TuneloopConfig.model_validate(
        {
            "name": "mail",
            "workspace": str(tmp_path / "ws"),
            "task": {
                "type": "classification",
                "labels": LABELS,
                "instruction": "Sort the mail.",
            },
            "model": {"base": str(model)},
            "data": {"sources": [{"path": "x", "format": "question_answer"}]},
            "evaluation": {"judge": {"endpoint": url, "model": "parrot", "kind": "rubric"}},
            "generation": {"endpoint": url, "model": "parrot", "concurrency": 4, **generation},
        }
    )


def test_inputs_are_answered_filtered_and_paid_for_once(
    tmp_path: Path, tiny_model: Path, model_server, dataset: Artifact
) -> None:
    texts = [*(asked(number) for number in range(100, 124)), asked(3), asked(101)]
    path = tmp_path / "inputs.csv"
    path.write_text("mail,number\n" + "".join(f"{text},{n}\n" for n, text in enumerate(texts)))
    source = {"path": str(path), "format": "columns", "columns": {"prompt": "mail"}}
    config = config_for(
        tmp_path, tiny_model, model_server.url, kind="answers", sources=[source], num_samples=3,
        min_agreement=0.6, price={"input": 1, "output": 2}, budget={"tokens": 100_000},
    )  # fmt: skip

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        text, sample = body["messages"][-1]["content"], body["seed"]
        number = int(text.rsplit(" ", 1)[-1][:-1])
        assert (
            body["response_format"]["json_schema"]["schema"]["properties"]["label"]["enum"]
            == LABELS
        )
        assert [m["role"] for m in body["messages"]] == [
            "system",
            *["user", "assistant"] * 3,
            "user",
        ]
        if number == 105:
            return {"content": "no label at all"}
        if number == 106 and sample == 1:
            return {"content": '{"label": "billing"}', "finish_reason": "length"}
        said = (
            LABELS[(len(text) + (number == 107) * sample) % 2]
            if number != 108
            else LABELS[sample % 2]
        )
        if number == 108 and sample == 2:
            said = "neither"
        return {"content": json.dumps({"label": said})}

    model_server.answer = answer
    model_server.failures = [429, 503]  # tried again
    base, workspace = resolve_base(str(tiny_model)), Workspace(tmp_path / "ws")
    made = generate_rows(config, workspace, base, dataset)
    rows = pq.read_table(made.artifact.path / "train").to_pylist()
    assert {row["messages"][0]["content"] for row in rows} == set(texts[:24]) - {
        asked(105),
        asked(108),
    }
    for row in rows:
        assert row["synthetic"]
        assert row["messages"][1]["content"] == label_of(row["messages"][0]["content"])
        assert sum(row["loss_mask"]) > 0
    by_number = {int(r["messages"][0]["content"].rsplit(" ", 1)[-1][:-1]): r for r in rows}
    assert by_number[100]["agreement"] == 1
    assert (
        by_number[106]["agreement"] == by_number[107]["agreement"] == pytest.approx(2 / 3, abs=1e-3)
    )
    removed = pq.read_table(made.artifact.path / "removed").to_pylist()
    assert Counter(row["reason_code"] for row in removed) == {
        "exact_duplicate": 2, "wrong_answer": 1, "no_agreement": 1,
    }  # fmt: skip
    metrics = made.artifact.manifest["metrics"]
    assert len(model_server.requests) == 24 * 3 + 2
    assert (metrics["num_requests"], metrics["num_unanswered"]) == (72, 0)
    words = sum(len(m["content"].split()) for b in model_server.requests for m in b["messages"])
    card = json.loads((made.artifact.path / "card.json").read_text())
    assert card["removed"]["the input is known"] == 2
    # It was not asked about these two.
    assert metrics["taken_ratio"] == pytest.approx(22 / 24, abs=1e-4)
    assert card["synthetic_rows"]["synthetic"]["num_rows"] == 22
    assert 0 < metrics["spent_tokens"] - words < 72 * 5 + 400  # 2 of the prompts were refused

    # Of known inputs alone nothing is asked, so that no other model would do better.
    (tmp_path / "known.csv").write_text(f"mail,number\n{asked(3)},0\n")
    source = source | {"path": str(tmp_path / "known.csv")}
    known = config_for(tmp_path, tiny_model, model_server.url, kind="answers", sources=[source])
    with pytest.raises(DataError, match="no input is left to ask about"):
        generate_rows(known, workspace, base, dataset)

    # The same again: reused. With more inputs only those are asked for.
    assert generate_rows(config, workspace, base, dataset).reused
    path.write_text(path.read_text() + f"{asked(200)},99\n")
    model_server.requests.clear()
    more = generate_rows(config, workspace, base, dataset)
    assert more.artifact.ref == "datasets/mail-generated@v2"
    assert len(model_server.requests) == more.artifact.manifest["metrics"]["num_requests"] == 3
    assert pq.read_table(more.artifact.path / "train").num_rows == 23


def test_the_budget_ends_the_asking_and_the_next_run_goes_on(
    tmp_path: Path, tiny_model: Path, model_server, dataset: Artifact
) -> None:
    (tmp_path / "in.txt").write_text("")
    lines = "".join(json.dumps({"text": asked(n)}) + "\n" for n in range(300, 320))
    (tmp_path / "in.jsonl").write_text(lines)
    source = {"path": str(tmp_path / "in.jsonl"), "format": "text"}
    model_server.answer = lambda body: {
        "content": json.dumps({"label": label_of(body["messages"][-1]["content"])})
    }
    base, workspace = resolve_base(str(tiny_model)), Workspace(tmp_path / "ws")

    def made(tokens: int) -> Artifact:
        config = config_for(
            tmp_path, tiny_model, model_server.url, kind="answers", sources=[source],
            num_shots=0, max_tokens=16, budget={"tokens": tokens},
        )  # fmt: skip
        return generate_rows(config, workspace, base, dataset).artifact

    with pytest.raises(DataError, match="could pass the budget"):
        made(100)
    assert model_server.requests == []
    some = made(500)
    metrics = some.manifest["metrics"]
    assert metrics["num_requests"] == len(model_server.requests) < 20
    assert metrics["num_unanswered"] == 20 - len(model_server.requests) > 0
    assert metrics["spent_tokens"] <= 500
    rest = made(100_000)
    assert rest.ref == "datasets/mail-generated@v2"
    assert len(model_server.requests) == 20
    assert rest.manifest["metrics"]["num_requests"] == 20
    assert rest.manifest["metrics"]["num_unanswered"] == 0


def test_new_inputs_are_novel_of_their_label_and_made_of_train_rows(
    tmp_path: Path, tiny_model: Path, model_server, dataset: Artifact
) -> None:
    made_of: list[str] = []

    def write(messages: list[dict[str, str]]) -> tuple[str, str]:
        text = messages[-1]["content"]
        if "New input:" in text:
            made_of.append(text)
            wanted = text.rpartition("The answer to the new input has to be: ")[2].split()[0]
            number = len(made_of)
            if number == 1:
                return f'"{asked(7)}"', "stop"  # a train row's again
            if number == 2:
                return "Sure, here is one more.", "stop"
            new = f"{' '.join(random.Random(-number).choices('abcdefghijklmnop', k=9))} {number}?"
            return f"New input: {new}{'' if label_of(new) == wanted else '!'}", "stop"
        return json.dumps({"label": label_of(text)}), "stop"

    model_server.reply = write
    config = config_for(
        tmp_path, tiny_model, model_server.url, kind="self_instruct", num_rows=12, concurrency=1
    )
    made = generate_rows(config, Workspace(tmp_path / "ws"), resolve_base(str(tiny_model)), dataset)
    rows = pq.read_table(made.artifact.path / "train").to_pylist()
    assert Counter(row["messages"][-1]["content"] for row in rows) == {"billing": 5, "delivery": 5}
    # Without the task's instruction, which `prepare` puts as it is then.
    assert {tuple(turn["role"] for turn in row["messages"]) for row in rows} == {
        ("user", "assistant")
    }
    assert len(set(made_of)) == 12  # each is shown other rows
    assert asked(30) not in "".join(made_of)  # what a model wrote is no example
    removed = {
        r["reason_code"]: r for r in pq.read_table(made.artifact.path / "removed").to_pylist()
    }
    assert {*removed} == {"too_similar", "ai_self_reference"}
    assert removed["too_similar"]["kept_row_id"] == f"{7:020x}"


def test_paraphrases_keep_the_answer_and_name_their_row(
    tmp_path: Path, tiny_model: Path, model_server, dataset: Artifact
) -> None:
    def write(messages: list[dict[str, str]]) -> tuple[str, str]:
        text = messages[-1]["content"]
        if "[Answer]" in text:
            return ("Rating: 2" if "no 6?" in text else "It fits.\n\n**Rating: 5**"), "stop"
        text = text.removeprefix("Input:\n")
        *words, number = text.split()
        new = " ".join(word[::-1] for word in words[:-1])
        return (new if number == "4?" else f"{new} no {number}"), "stop"

    model_server.reply = write
    config = config_for(tmp_path, tiny_model, model_server.url, kind="paraphrases", min_rating=4)
    made = generate_rows(config, Workspace(tmp_path / "ws"), resolve_base(str(tiny_model)), dataset)
    rows = pq.read_table(made.artifact.path / "train").to_pylist()
    assert len(rows) == 28
    for row in rows:
        number = int(row["seed_row_id"], 16)
        assert row["messages"][0]["content"].endswith(f" no {number}?")
        assert row["messages"][1]["content"] == label_of(asked(number))
        assert row["rating"] == 5
    removed = pq.read_table(made.artifact.path / "removed").to_pylist()
    assert {row["reason"] for row in removed} == {
        "the paraphrase has lost a detail: 4",
        "the judge's rating is too low: 2 of 5",
    }


def test_a_rows_own_system_message_stays_without_the_tasks_instruction() -> None:
    def left(*system: str) -> list[str]:
        turns = [*(Message("system", text) for text in system), Message("user", "Hi?")]
        row = Candidate(tuple(turns), "x").without_instruction("Sort the mail.\n")
        return [message.content for message in row.messages]

    assert left() == left("Sort the mail.") == ["Hi?"]
    assert left("Sort the mail.\n\nBe brief.") == left("Be brief.") == ["Be brief.", "Hi?"]


def test_rows_that_people_want_more_like_come_first(dataset: Artifact, tmp_path: Path) -> None:
    generation = config_for(tmp_path, tmp_path, "http://x/v1", kind="paraphrases").generation
    assert generation is not None
    replies = Replies(tmp_path / "replies.jsonl")
    task = TaskConfig(type="generation", instruction="Sort the mail.")
    teacher = teacher_of(generation, replies)
    wanted = frozenset({f"{3:020x}", f"{9:020x}"})

    def requests(kind: str, num_rows: int, task: TaskConfig = task) -> list[str]:
        asked_for = generation.model_copy(update={"kind": kind, "num_rows": num_rows})
        writer = RowWriter(asked_for, task, Known(read_seeds(dataset), wanted), teacher)
        return [request.messages[-1].content for request, _ in writer.requests()]

    first = requests("harder", 32)
    assert {text.removeprefix("Input:\n") for text in first[:2]} == {asked(3), asked(9)}
    assert len(set(first)) == 30  # all once before any comes twice
    for text in requests("self_instruct", 5):
        assert asked(3) in text
        assert asked(9) in text
        assert text.count("Input ") == 6
    # Whichever label is asked for, of theirs or another.
    labels = TaskConfig(type="classification", labels=LABELS)
    for text in requests("self_instruct", 8, labels):
        assert asked(3) in text
        assert asked(9) in text


def with_topics(dataset: Artifact) -> Artifact:
    """The dataset with a column: every third row is about cards; ten test rows, five about them."""
    workspace = Workspace(dataset.path.parents[2])
    train = pq.read_table(dataset.path / "train").to_pylist()
    tested = []
    for number in range(500, 510):
        turns = [
            {"role": "user", "content": asked(number)},
            {"role": "assistant", "content": label_of(asked(number))},
        ]
        tested.append({**train[0], "row_id": f"{number:020x}", "messages": turns})
    schema = dataset_schema(pa.schema([("topic", pa.string())]))
    with workspace.draft("datasets", "mail", "e" * 64) as draft:
        for side, rows in (("train", train), ("test", tested)):
            (draft.path / side).mkdir()
            every = 3 if side == "train" else 2
            topics = [{"topic": "other" if n % every else "cards"} for n in range(len(rows))]
            told = [row | topic for row, topic in zip(rows, topics, strict=True)]
            pq.write_table(pa.Table.from_pylist(told, schema), draft.path / side / "part-0.parquet")
        return draft.publish(config={}, resources={}, inputs=[], metrics={"num_unanswered": 0})


def evaluated(dataset: Artifact, p_value: float) -> None:
    """Publish an evaluation that is worse on cards, as surely as the p-value says."""
    part = {"by": "topic", "slice": "cards", "value": 0.2, "rest": 0.9, "n": 5}
    metric = {"label": "accuracy", "better": "higher", "kind": "binary"}
    primary = {"primary": "accuracy", "metrics": {"accuracy": metric}}
    contents = {
        "metrics": primary | {"arms": [{"name": "finetuned"}], "task_type": "classification"},
        "comparison": {"pairs": []},
        "slices": {
            "primary": "accuracy",
            "num_slices": 7,
            "confidence": 0.95,
            "arms": {"finetuned": [part | {"p_adjusted": p_value}]},
        },
    }
    predictions = [
        Prediction(
            f"{number:020x}", "finetuned", json.dumps([{"content": asked(number)}]),
            label_of(asked(number)), "?", "stop", 1, 1, 0.1, "scored", scores={"accuracy": 0.0},
        )
        for number in range(500, 510)
    ]  # fmt: skip
    workspace = Workspace(dataset.path.parents[2])
    with workspace.draft("evaluations", "mail", f"{p_value}".ljust(64, "0")) as draft:
        write_predictions(predictions, ["accuracy"], draft.path)
        for name, content in contents.items():
            (draft.path / f"{name}.json").write_text(json.dumps(content))
        draft.publish(config={}, resources={}, inputs=[dataset.ref], metrics={})


def test_rows_are_made_for_a_weak_slice_and_are_like_no_test_row(
    tmp_path: Path, tiny_model: Path, model_server, dataset: Artifact
) -> None:
    dataset, shown = with_topics(dataset), list[str]()
    evaluated(dataset, 0.01)

    def write(messages: list[dict[str, str]]) -> tuple[str, str]:
        text = messages[-1]["content"]
        if "New input:" not in text:
            return json.dumps({"label": label_of(text)}), "stop"
        shown.append(text)
        if len(shown) == 1:
            return asked(501).replace("no 501", "no 777"), "stop"  # a test row's, all but a word
        wanted = text.rpartition("The answer to the new input has to be: ")[2].split()[0]
        new = f"{' '.join(random.Random(-len(shown)).choices('abcdefghijklm', k=9))} {len(shown)}?"
        return f"{new}{'' if label_of(new) == wanted else '!'}", "stop"

    model_server.reply = write
    asks = {"kind": "self_instruct", "num_rows": 6, "concurrency": 1}
    config = config_for(tmp_path, tiny_model, model_server.url, **asks, more_of="evaluations/mail")
    workspace, base = Workspace(tmp_path / "ws"), resolve_base(str(tiny_model))
    made = generate_rows(config, workspace, base, dataset).artifact
    cards = {asked(number) for number in range(0, 30, 3)}
    for text in shown:
        inputs = [part.splitlines()[1] for part in text.split("\n\n") if part.startswith("Input ")]
        assert inputs
        assert {*inputs} <= cards
    assert not any(asked(number) in text for number in range(500, 510) for text in shown)
    rows = pq.read_table(made.path / "train").to_pylist()
    assert [row["made_for"] for row in rows] == ["topic = cards"] * 5
    (removed,) = pq.read_table(made.path / "removed").to_pylist()
    assert removed["reason"].startswith("too much like a held-out row: ROUGE-L 0.9")
    assert removed["kept_row_id"] == f"{501:020x}"
    assert json.loads((made.path / "card.json").read_text())["made_for"] == {"topic = cards": 5}
    assert made.manifest["inputs"][:2] == [dataset.ref, "evaluations/mail@v1"]
    assert generate_rows(config, workspace, base, dataset).reused
    # What is not sure to be worse asks for nothing.
    evaluated(dataset, 0.2)
    (problem,) = more_of_problems(config, workspace)
    assert problem.got == "7 slices, none of them worse after correction for so many"
    older = config_for(tmp_path, tiny_model, "http://x/v1", **asks, more_of="evaluations/mail@v1")
    assert more_of_problems(older, workspace) == []


def test_a_marked_test_row_is_stood_for_by_train_rows_like_it(
    tmp_path: Path, tiny_model: Path, dataset: Artifact
) -> None:
    dataset, workspace = with_topics(dataset), Workspace(tmp_path / "ws")
    config = config_for(tmp_path, tiny_model, "http://x/v1", kind="harder", more_of="marks")
    (problem,) = more_of_problems(config, workspace)
    assert "no row is marked" in problem.what
    store = ReviewStore(workspace.location)
    for number in (4, 502):
        store.add(Mark("more_like_this", f"{number:020x}", dataset.ref, "ann"))
    assert more_of_problems(config, workspace) == []
    people = [seed.solved for seed in read_seeds(dataset)]
    train, tested = find_parts(config, workspace, dataset, people).parts
    assert (train.name, train.row_ids[0]) == (f"marked row {4:020x}", f"{4:020x}")
    by_id = {row.row_id: row for row in people}
    for part, number in ((train, 4), (tested, 502)):
        assert len(part.row_ids) == 6
        assert {by_id[row_id].answer for row_id in part.row_ids} == {label_of(asked(number))}


def test_rules_that_people_break_are_not_applied() -> None:
    writing = TaskConfig(type="generation")
    people = [
        Solved(f"What is a kite of kind {n}?", f"A kite of kind {n} flies on a line in the wind.")
        for n in range(40)
    ]
    filters = Filters(writing, people)
    assert all(filters.reject_answer(row) is None for row in people)
    question = "What is a kite of kind 99?"
    for answer, code in [
        ("", "unreadable"),
        ("A kite flies. A kite flies in wind. " * 4, "repetition"),
        ("As an AI language model, I know no kite.", "ai_self_reference"),
        ("I'm sorry, kites are beyond me here.", "ai_self_reference"),
        (question, "too_similar"),
        ("Bread needs flour, water, salt and yeast.", "unrelated"),
        ("A kite flies on a line.\nUser: What of a plane?", "template_marker"),
        ("A kite.", "unusual_length"),
    ]:
        found = filters.reject_answer(Solved(question, answer))
        assert found is not None, answer
        assert found.code == code, answer
    assert filters.reject_input("Which kind of kite is best in rain?") is None
    found = filters.reject_input("A kite of this kind flies on a line in the rain.")
    assert found is not None
    assert found.reason.startswith("the input reads like an answer")
    # Where people's answers are such, it is no fault.
    curt = Filters(writing, [Solved(f"Say {n}", f"Sure, {n}") for n in range(40)])
    assert curt.reject_answer(Solved("Say 41", "Sure, 41")) is None
    record = TaskConfig(type="extraction", fields=["city"])
    cities = [Solved(f"From Rome{n} by train", f'{{"city": "Rome{n}"}}') for n in range(30)]
    reading = Filters(record, cities)
    for answer, code in [
        ('{"city": "Paris"}', "unsupported"),
        ('{"city": "Rome1", "more": 1}', "wrong_answer"),
        ("Rome1", "wrong_answer"),
    ]:
        found = reading.reject_answer(Solved("From Rome1 by bus", answer))
        assert found is not None
        assert found.code == code, answer
    assert reading.reject_answer(Solved("To Oslo", '{"city": "Oslo"}')) is None


def test_novelty_agreement_and_lost_details() -> None:
    novelty = Novelty(0.7)
    assert novelty.reject("one two three four") is None
    novelty.add("one two three four", "r1")
    found = novelty.reject("one two three five")
    assert found is not None
    assert (found.code, found.kept_row_id) == ("too_similar", "r1")
    assert novelty.reject("one two nine five") is None
    labels = TaskConfig(type="classification", labels=["a", "b"])
    assert vars(agreement(["a", "b", "b"], 4, labels)) == {"answer": "b", "ratio": 0.5}
    record = TaskConfig(type="extraction")
    pair = agreement(['{"x": 1, "y": 2}', '{"y": 2, "x": 1}'], 2, record)
    assert vars(pair) == {"answer": '{"x": 1, "y": 2}', "ratio": 1}
    # As evaluation compares them.
    pair = agreement(['{"x": 1, "y": "a b"}', '{"x": 1.0, "y": "a  b"}', '{"x": true}'], 3, record)
    assert vars(pair) == {"answer": '{"x": 1, "y": "a b"}', "ratio": pytest.approx(2 / 3)}
    free = TaskConfig(type="generation")
    texts = ["It flies high.", "A kite flies on a line", "A kite flies on the line"]
    assert vars(agreement(texts, 3, free)) == {"answer": texts[1], "ratio": pytest.approx(2 / 3)}
    seed = Solved("Ann paid 30 to Bob", '{"who": "Ann"}')
    assert lost(seed, "30 was paid by Ann", record) == ""
    assert lost(seed, "Bob got 30", record) == "Ann"
    assert lost(seed, "Bob got money of Ann", record) == "30"
    assert cleaned('```\nNew input: "Why?"\n```') == "Why?"
    assert cleaned('He said "yes"') == 'He said "yes"'


def test_a_request_that_a_crash_lost_counts_with_the_most_it_can_cost(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    replies = Replies(path)
    for key in ("a", "b", "c"):
        replies.note(key, Cost(100, 1.0))
    replies.add(Entry("a", Cost(7, 0.5), vars(Reply("said", "stop"))))
    replies.add(Entry("b", Cost(100, 1.0), vars(Reply(error="HTTP 500"))))
    with path.open("a") as file:
        file.write('{"key": "d", "cost": [100')  # the crash
    again = Replies(path)
    assert again.get("a") == Reply("said", "stop")
    assert again.get("b") is None
    assert (again.spent, again.num_requests) == (Cost(207, 2.5), 3)
    assert (again.num_lost, again.lost) == (1, Cost(100, 1.0))
    # Asked again and answered, the lost reply still counts, also for a third run.
    again.note("c", Cost(100, 1.0))
    again.add(Entry("c", Cost(9, 0.1), vars(Reply("at last", "stop"))))
    assert again.spent == Cost(216, 2.6)
    third = Replies(path)
    assert (third.spent, third.num_requests, third.num_lost) == (Cost(216, 2.6), 4, 1)
    other = Replies(tmp_path / "other.jsonl", [path])
    assert other.get("a") == Reply("said", "stop")
    assert (other.spent, other.num_requests) == (Cost(), 0)
    assert Replies(tmp_path / "other.jsonl").get("a") == Reply("said", "stop")


def test_a_failure_of_one_call_is_none_of_the_next(tmp_path: Path) -> None:
    replies = Replies(tmp_path / "replies.jsonl")
    teacher = Teacher(Endpoint("http://x/v1", "m"), None, Rates(1), BudgetConfig(), replies)
    teacher.errors["HTTP 500"] = 1
    teacher.ask([])  # no input was taken: there is nothing to ask


@pytest.mark.parametrize("sent", [b"", b'HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"choi'])
def test_a_reply_that_does_not_arrive_is_counted_each_time(
    tmp_path: Path, tiny_model: Path, sent: bytes
) -> None:
    """The server breaks every connection after it has read the request, or in its reply."""
    num_asked = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_asked
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
        else:
            num_asked += 1
            writer.write(sent)
        writer.close()

    generation = config_for(
        tmp_path, tiny_model, "http://x/v1", kind="harder", budget={"tokens": 300}
    ).generation
    assert generation is not None
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    replies = Replies(tmp_path / "replies.jsonl")
    teacher = teacher_of(generation.model_copy(update={"endpoint": url}), replies)
    # 64 for the message and its marks, 5 for its bytes, 31 for the answer: 100 each time.
    request = Asked((Message("user", "hello"),), SamplingParams(max_tokens=31))
    teacher.ask([request], may_fail=True)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    assert teacher.reply(request) is None
    assert (num_asked, replies.num_requests, replies.spent.tokens) == (3, 3, 300)
    again = Replies(replies.path)
    assert (again.num_lost, again.lost, again.spent) == (3, again.spent, Cost(300))


def test_inputs_that_cannot_be_read_are_told_before_anything_runs(
    tmp_path: Path, tiny_model: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": asked(n), "answer": label_of(asked(n)), "mail": "x"} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path), "format": "question_answer"}
    for inputs, expected in [
        ({**source, "path": str(tmp_path / "none.jsonl")}, "none.jsonl"),
        ({**source, "format": "columns", "columns": {"prompt": "body"}}, "(and 29 more rows)"),
        (source, ""),
    ]:
        config = config_for(
            tmp_path, tiny_model, "http://127.0.0.1:9/v1", kind="answers", sources=[inputs]
        )
        data = config.data.model_copy(update={"sources": [MixedSourceConfig(**source)]})
        found = check(config.model_copy(update={"data": data})).problems
        about = [problem for problem in found if "memory" not in problem.what]
        assert len(about) == bool(expected)
        assert all(expected in f"{problem.what} {problem.where} {problem.got}" for problem in about)


def test_inputs_are_read_in_every_layout(tmp_path: Path) -> None:
    layouts: list[tuple[str, dict[str, Any], str]] = [
        ("question_answer", {"question": "Why?", "n": 1}, "Why?"),
        ("prompt_completion", {"prompt": "Why?", "completion": "old"}, "Why?"),
        ("alpaca", {"instruction": "Add", "input": "1 2"}, "Add\n\n1 2"),
        ("alpaca", {"instruction": "Add", "instances": [{"input": "3", "output": ""}]}, "Add\n\n3"),
        ("messages", {"messages": [{"role": "user", "content": "Why?"}]}, "Why?"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Why?"}]}, "Why?"),
        ("text", {"text": "Why?"}, "Why?"),
    ]
    task = TaskConfig(type="extraction", instruction="Be brief.")
    for number, (layout, row, expected) in enumerate(layouts):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row) + "\nnone\n")
        config = config_for(
            tmp_path,
            tmp_path,
            "http://x/v1",
            kind="answers",
            sources=[{"path": str(path), "format": layout}],
        )
        assert config.generation is not None
        sources = config.generation.sources
        found = read_unlabelled(find_files(sources), sources, task)
        assert [row.prompt for row in found.rows] == [expected], layout
        assert found.rows[0].messages[0].content == "Be brief."
        assert found.rows[0].source.endswith(":1")
        assert [bad.rejection.what for bad in found.refused] == ["the line is not valid JSON"]
