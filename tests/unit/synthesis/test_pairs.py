"""Pairs written by a model behind a real HTTP server, then read again as a source."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Workspace
from tuneloop.cli import main
from tuneloop.config import DataConfig, load_config
from tuneloop.data.schema import ReasonCode
from tuneloop.data.sources.files import find_files
from tuneloop.data.sources.readers import read_source
from tuneloop.synthesis.pairs import ParsedReply, cut, parse_pairs, support_ratio
from tuneloop.synthesis.teacher import Reply

FACTS = {
    "parrots.txt": "Parrots live in warm forests and can imitate speech.",
    "whales.txt": "Whales are mammals that breathe air at the surface.",
    "rocks.txt": "Nothing is said of rocks.",
}


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, model_server) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for name, text in FACTS.items():
        (folder / name).write_text(text)
    path = tmp_path / "faq.yaml"
    path.write_text(
        f"""\
name: faq
workspace: {tmp_path}/workspace
task: {{type: generation}}
model: {{base: {tiny_model}}}
data: {{sources: [{{path: {tmp_path}/faq.jsonl, format: question_answer}}]}}
generation:
  endpoint: {model_server.url}
  model: parrot
  sources: [{{path: "{folder}/*.txt", format: text}}]
"""
    )
    return path


def teacher(messages: list[dict[str, str]]) -> tuple[str, str]:
    """Write a good pair and one the passage does not support; nothing about rocks."""
    passage = messages[-1]["content"]
    if "rocks" in passage:
        return "I cannot help with that.", "stop"
    subject = passage.split()[0].lower()
    pairs = [
        {"question": f"What of {subject}?", "answer": passage},
        {"question": f"Who studies {subject}?", "answer": "Zoologists elsewhere"},
        {"question": "Is this a pair?"},
        {"question": "Same for all?", "answer": "Yes."},
    ]
    return f"Here they are:\n```json\n{json.dumps(pairs)}\n```", "stop"


def test_pairs_are_written_checked_and_read_again(
    config: Path, model_server, capfd: pytest.CaptureFixture[str]
) -> None:
    model_server.reply = teacher
    assert main(["generate", str(config), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["artifact"] == "datasets/faq-generated@v1"
    assert result["metrics"]["num_passages"] == 3
    assert result["metrics"]["num_train_rows"] == 5
    path = Path(result["path"])
    rows = pq.read_table(path / "train").to_pylist()
    assert all(row["synthetic"] for row in rows)
    for row in rows:
        assert sum(row["loss_mask"]) > 0
        assert row["num_tokens"] == len(row["input_ids"]) == len(row["loss_mask"])
        assert row["passage"] in FACTS.values()
        assert Path(row["source"].rpartition(":")[0]).read_text() == row["passage"]
    support = {row["messages"][0]["content"]: row["support_ratio"] for row in rows}
    assert support["What of whales?"] == 1.0
    assert support["Who studies whales?"] == 0.0
    assert support["Same for all?"] is None
    removed = pq.read_table(path / "removed").to_pylist()
    reasons = sorted(row["reason"] for row in removed)
    missing = "an item without question or answer"
    assert reasons == [missing, missing, "no JSON list", "written twice"]
    codes = sorted(row["reason_code"] for row in removed)
    assert codes == ["exact_duplicate", "unreadable", "wrong_layout", "wrong_layout"]
    assert pq.read_table(path / "test").num_rows == 0
    assert "Zoologists" in (path / "README.md").read_text().partition("Some of the others")[0]
    asked = model_server.requests[0]
    assert "Write 3 questions" in asked["messages"][0]["content"]
    assert asked["temperature"] == 0.7

    # Reused without a request; another number of pairs is another data set.
    num_requests = len(model_server.requests)
    assert main(["generate", str(config), "--json", "generation.concurrency=1"]) == 0
    assert json.loads(capfd.readouterr().out)["reused"] is True
    assert len(model_server.requests) == num_requests

    # `train/` is a source of `prepare`; ids of this preparation are not carried along.
    data = DataConfig.model_validate(
        {"sources": [{"path": str(path / "train"), "format": "messages"}]}
    )
    prepared = load_config(config).model_copy(update={"data": data})
    (file,) = find_files(data.sources)
    again = list(read_source(file, 0, prepared))
    assert [row["messages"] for row in again] == [row["messages"] for row in rows]
    assert all(row["synthetic"] for row in again)
    assert set(json.loads(again[0]["extra"])) == {"passage", "support_ratio"}


def test_what_was_answered_is_not_asked_again(
    config: Path,
    model_server,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model_server.reply = teacher
    model_server.failures = [400]
    one = ["generate", str(config), "--json", "generation.concurrency=1"]
    assert main(one) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["metrics"]["num_unanswered"] == 1
    assert "made to fail" in captured.err

    # The published data lacks a reply: only that one is asked for, and nothing else is lost.
    model_server.failures = [400]
    assert main(one) == 0
    again = json.loads(capfd.readouterr().out)
    assert (again["artifact"], again["reused"]) == ("datasets/faq-generated@v1", True)
    model_server.requests.clear()
    assert main(one) == 0
    whole = json.loads(capfd.readouterr().out)
    assert whole["artifact"] == "datasets/faq-generated@v2"
    assert len(model_server.requests) == 1
    assert (whole["metrics"]["num_unanswered"], whole["metrics"]["num_train_rows"]) == (0, 5)
    assert main(one) == 0
    assert json.loads(capfd.readouterr().out)["reused"] is True
    assert len(model_server.requests) == 1

    # The server's key changes after two replies: nothing is published and they are not lost.
    replies = iter([teacher])

    def change_the_key(messages: list[dict[str, str]]) -> tuple[str, str]:
        if next(replies, None) is None:
            model_server.api_key = "changed"
        return teacher(messages)

    model_server.reply = change_the_key
    other = [*one, "generation.seed=1"]
    assert main(other) == 2
    told = json.loads(capfd.readouterr().out)["error"]["problems"][0]
    assert "refuses a request without key" in told["what"]
    assert len(Workspace(config.parent / "workspace").published()) == 2

    model_server.requests.clear()
    monkeypatch.setenv("TUNELOOP_GENERATION_API_KEY", "changed")
    assert main(other) == 0
    assert json.loads(capfd.readouterr().out)["metrics"]["num_unanswered"] == 0
    assert len(model_server.requests) == 1


def test_the_budget_is_one_for_all_runs(
    config: Path, model_server, capfd: pytest.CaptureFixture[str]
) -> None:
    model_server.reply = teacher
    settings = ["generation.concurrency=1", "generation.max_tokens=200"]
    command = ["generate", str(config), "--json", *settings]
    assert main([*command, "generation.budget.tokens=650"]) == 0
    first = json.loads(capfd.readouterr().out)
    assert first["metrics"]["num_unanswered"] == 1
    assert (first["metrics"]["num_requests"], len(model_server.requests)) == (2, 2)
    # What was published was paid from the same budget.
    assert main([*command, "generation.budget.tokens=650"]) == 0
    assert json.loads(capfd.readouterr().out)["artifact"] == "datasets/faq-generated@v1"
    assert len(model_server.requests) == 2
    assert main([*command, "generation.budget.tokens=5000"]) == 0
    whole = json.loads(capfd.readouterr().out)["metrics"]
    assert (whole["num_unanswered"], whole["num_requests"]) == (0, 3)
    assert whole["spent_tokens"] > first["metrics"]["spent_tokens"] > 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["generation.model=owl"], "the endpoint does not serve this model"),
        (["generation.sources.0.format=question_answer"], "format `text`"),
        (["generation.instruction=Write {many}"], "only {num_pairs}"),
        (["generation.sources.0.path=/nope.txt"], "/nope.txt"),
        (["generation=null"], "nothing says what to generate"),
    ],
)
def test_what_cannot_be_generated_is_told(
    config: Path, capfd: pytest.CaptureFixture[str], overrides: list[str], expected: str
) -> None:
    assert main(["generate", str(config), *overrides]) == 2
    err = capfd.readouterr().err
    assert expected in err
    assert "Traceback" not in err
    assert Workspace(config.parent / "workspace").published() == []


def test_a_model_that_writes_no_pair_publishes_nothing(
    config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(config)]) == 2  # the parrot says the passage in capitals
    assert "no reply holds a pair" in capfd.readouterr().err
    assert Workspace(config.parent / "workspace").published() == []


@pytest.mark.parametrize(
    ("text", "passages"),
    [
        ("", []),
        ("one two", ["one two"]),
        ("first part\n\nsecond part", ["first part", "second part"]),
        ("A sentence. Another one here", ["A sentence.", "Another one here"]),
        ("words without any mark", ["words without any", "mark"]),
        ("x" * 45, ["x" * 20, "x" * 20, "x" * 5]),
    ],
)
def test_documents_are_cut_where_a_part_of_them_ends(text: str, passages: list[str]) -> None:
    assert cut(text, 20) == passages


def test_replies_that_are_no_list_of_pairs() -> None:
    assert parse_pairs(Reply('[{"question": "a", "answer"', "length")).problem == (
        "cut off at generation.max_tokens"
    )
    assert parse_pairs(Reply('{"question": "a"}', "stop")).problem == "no JSON list"
    assert parse_pairs(Reply('[1, {"question": " ", "answer": "b"}]', "stop")).pairs == []
    unanswered = ParsedReply([], "no reply: timeout", ReasonCode.NO_REPLY)
    assert parse_pairs(Reply(error="timeout")) == unanswered
    assert support_ratio("Whales breathe water", "whales breathe air") == pytest.approx(2 / 3)
