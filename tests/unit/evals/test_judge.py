"""A judge over HTTP: both orders, votes that correct it, nonsense, and nothing paid twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from tuneloop.cli import main
from tuneloop.config import JudgeConfig
from tuneloop.evals.scoring.clusters import Clusters
from tuneloop.evals.scoring.corrected import correct_rate
from tuneloop.evals.scoring.judging import (
    JudgeQuestions,
    Judging,
    are_on_these,
    pairs_to_judge,
    read_rating,
    read_verdict,
)
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.questions import Question
from tuneloop.records import Arm, Endpoint, Message, Vote
from tuneloop.review.store import ReviewStore
from tuneloop.review.verdicts import Verdict

pytestmark = pytest.mark.usefixtures("short_waits")

NUM_ROWS = 30


@pytest.fixture
def config(tmp_path: Path, model_server: Any) -> dict[str, Any]:
    """Two files of answers, of which the second is better by two words in two of three rows."""
    rows = [{"prompt": f"question {n}", "completion": f"right {n}"} for n in range(NUM_ROWS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("old", "new"):
        answers = [
            {
                "prompt": f"question {n}",
                "completion": f"right {n}, as you see" if (name == "new") == (n % 3 > 0) else "so",
            }
            for n in range(NUM_ROWS)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, answers)))
    source = {"path": str(tmp_path / "rows.jsonl"), "format": "prompt_completion"}
    return {
        "name": "qa",
        "workspace": str(tmp_path / "workspace"),
        "task": {"type": "generation"},
        "model": {"base": str(tmp_path / "no-model-is-needed")},
        "data": {"sources": [source]},
        "evaluation": {
            "num_resamples": 200,
            "sources": [source],
            "arms": {n: {"answers": str(tmp_path / f"{n}.jsonl")} for n in ("old", "new")},
            "judge": {
                "endpoint": model_server.url,
                "model": "parrot",
                "max_tokens": 20,
                "price": {"input": 1.0, "output": 1.0},
            },
        },
    }


def run(config: dict[str, Any], tmp_path: Path, capfd: Any, code: int = 0) -> dict[str, Any]:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["evaluate", str(path), "--json"]) == code
    told = capfd.readouterr()
    assert "Traceback" not in told.err
    result: dict[str, Any] = json.loads(told.out)
    return result


def judge(messages: list[dict[str, str]]) -> tuple[str, str]:
    """Prefer the right answer; in some rows the first one, and in one write prose."""
    shown = messages[-1]["content"]
    number = int(shown.partition("question ")[2].split()[0])
    first = shown.partition("[Answer A]\n")[2].partition("\n")[0]
    if number == 7:
        return "Both have their merits, and A or B is a matter of taste.", "stop"
    if number % 10 == 1:
        return "The first is fine.\n\n**Verdict: A**", "stop"
    return f"One is right. Verdict:\nVerdict: {'A' if 'right' in first else 'B'}", "stop"


def comparison(result: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((Path(result["path"]) / "comparison.json").read_text())
    return told["judge"]


def test_a_judge_is_quoted_with_votes_only_and_never_paid_twice(
    model_server, config, tmp_path, capfd
):
    model_server.reply, model_server.failures = judge, [429, 503]
    first = run(config, tmp_path, capfd)
    assert len(model_server.requests) == 2 * NUM_ROWS + 2
    kept = pq.read_table(Path(first["path"]) / "judgements.parquet").to_pylist()
    assert len(kept) == 2 * NUM_ROWS
    assert {row["first"] for row in kept} == {"old", "new"}
    assert all("[Reference answer]\nright" in row["prompt"].replace("\\n", "\n") for row in kept)
    told = comparison(first)
    (pair,) = told["pairs"]
    assert (told["num_unparseable"], told["num_missing"]) == (2, 0)
    assert (pair["num_pairs"], pair["num_flips"], pair["num_first_wins"]) == (30, 3, 3)
    assert pair["num_unknown"] == 1
    # Of 30 rows one is not known and three are ties: 1, 11 and 21, of which 21 was lost.
    wins = sum(n % 3 > 0 for n in range(NUM_ROWS) if n not in (1, 7, 11, 21))
    assert pair["judge_alone"] == pytest.approx((wins + 1.5) / 29)
    assert pair["corrected"] is None
    report = (Path(first["path"]) / "report.html").read_text()
    assert "nobody has voted on these answers" in report
    assert f"{pair['judge_alone']:.1%}" not in report
    assert run(config, tmp_path, capfd)["reused"]

    store = ReviewStore(config["workspace"])
    examples = sorted(row["example_id"] for row in kept if row["first"] == "new")[:12]
    question = {row["example_id"]: row["prompt"] for row in kept}
    for example in examples:
        number = int(question[example].partition("question ")[2].split("\\n")[0])
        # People see one right answer of the older arm that the judge does not.
        choice = "left" if number % 3 > 0 and example != examples[0] else "right"
        store.add(Verdict(first["artifact"], example, "new", "old", choice, "ada"))
    second = run(config, tmp_path, capfd)
    assert second["artifact"] == "evaluations/qa@v2"
    assert len(model_server.requests) == 2 * NUM_ROWS + 2, "neither answers nor judgements again"
    (pair,) = comparison(second)["pairs"]
    assert (pair["num_voted"], pair["num_reviewers"]) == (12, 1)
    rate = pair["corrected"]
    assert rate["low"] < rate["value"] < rate["high"]
    assert 0 < pair["weight"] <= 1
    assert pair["kappa"]["value"] > 0.5
    report = (Path(second["path"]) / "report.html").read_text()
    assert "<code>new</code> wins" in report
    assert "the longer answer wins</code>:" in report
    # Votes on other answers than these are not counted.
    lines = (tmp_path / "new.jsonl").read_text().replace("so", "well")
    (tmp_path / "new.jsonl").write_text(lines)
    third = run(config, tmp_path, capfd)
    (pair,) = comparison(third)["pairs"]
    assert pair["num_voted"] < 12


def test_the_budget_holds_for_the_judge_and_what_it_said_is_kept(
    model_server, config, tmp_path, capfd
):
    model_server.reply = judge
    model_server.failures = [504]  # the judge may have answered
    config["evaluation"] |= {"budget": {"tokens": 3000}, "concurrency": 1}
    told = json.dumps(run(config, tmp_path, capfd, code=2))
    assert "evaluation.budget.tokens" in told
    assert "held for 1 request whose reply was lost" in told
    asked = len(model_server.requests)
    assert 2 < asked < 2 * NUM_ROWS
    config["evaluation"]["budget"] = {"tokens": 100_000}
    run(config, tmp_path, capfd)
    assert len(model_server.requests) == 2 * NUM_ROWS + 1


def test_ratings_make_a_winner_and_nonsense_is_told(model_server, config, tmp_path, capfd):
    config["evaluation"]["judge"]["kind"] = "rubric"

    def rate(messages: list[dict[str, str]]) -> tuple[str, str]:
        answer = messages[-1]["content"].rpartition("[Answer]\n")[2]
        if "question 4" in messages[-1]["content"]:
            return "banana " * 10, "length"
        return f"Rating: {5 if 'right' in answer else 2}", "stop"

    model_server.reply = rate
    result = run(config, tmp_path, capfd)
    assert len(model_server.requests) == 2 * NUM_ROWS
    told = comparison(result)
    assert (told["num_unparseable"], told["pairs"][0]["num_unknown"]) == (2, 1)
    report = (Path(result["path"]) / "report.html").read_text()
    assert "2 of its 60 answers have no verdict" in report


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
        ({"against": ["newer"]}, "names `newer`; the arms are old, new"),
        ({"model": "owl"}, "does not serve this model"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_told(model_server, config, tmp_path, capfd, change, told):
    config["evaluation"]["judge"] |= change
    assert told in json.dumps(run(config, tmp_path, capfd, code=2))
    assert model_server.requests == []


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Because.\nVerdict: A", "A"),
        ("**Final verdict:** b.", "B"),
        ('{"verdict": "tie"}', "tie"),
        ("A", "A"),
        ("Verdict: A\nNo, wait.\nVerdict: B", "B"),
        ("Verdict: A or B", "unparseable"),
        ("**A:**\nIt is right.\n\n**B:**\nIt is not.\n\nVerdict: A is better.", "unparseable"),
        ("A:\nRight.\nB:\nWrong.\n\n```\nA\n```", "A"),
        ("Verdict: B\n\nA", "B"),
        ("A is better than B.", "unparseable"),
        ("", "unparseable"),
    ],
)
def test_a_verdict_is_a_line_of_its_own(text: str, verdict: str) -> None:
    assert read_verdict(text) == verdict


def test_what_a_model_thought_is_not_judged_and_every_right_answer_is_told() -> None:
    def answer(example: str, arm: str, text: str) -> Prediction:
        return Prediction(example, arm, "", "", text, "stop", None, None, None, "scored")

    rows = [answer("same", "old", "yes"), answer("other", "old", "<think>Hm.</think>\n\nno")]
    rows += [
        answer("same", "new", "<think>Is it? It is.</think> yes"),
        answer("other", "new", "yes"),
    ]
    questions = [
        Question(name, (Message("user", "Is it?"),), "yes", accepted=("of course",))
        for name in ("same", "other")
    ]
    (pair,) = pairs_to_judge(rows, "new", "old")
    assert pair.arm.example_id == "other"
    told = JudgeConfig(endpoint="http://judge/v1", model="large")
    judging = Judging(told, Arm("judge", Endpoint("http://judge/v1", "large")))
    first, second = (
        r.messages[-1].text for r in JudgeQuestions(judging, rows, questions).requests()
    )
    start = "[Task]\nIs it?\n\n[Reference answer]\nyes\n\nor\n\nof course\n\n"
    assert first == f"{start}[Answer A]\nyes\n\n[Answer B]\nno"
    assert second == f"{start}[Answer A]\nno\n\n[Answer B]\nyes"


def test_a_rating_is_a_line_of_its_own() -> None:
    told = ["Fine.\nRating: 4", "**Score:** 5/5", "3", "I give it 3 of 5 stars", "Rating: 9", ""]
    assert [read_rating(text) for text in told] == [4.0, 5.0, 3.0, None, None, None]
    assert read_rating("1.\nIt is short.\n2.\nIt is right.\nI would say four.") is None


def test_a_vote_on_other_answers_takes_back_none_on_these() -> None:
    def answers(new: str) -> list[Prediction]:
        said = {"old": "a", "new": new}
        return [
            Prediction("e", arm, "", "", text, "stop", None, None, None, "scored")
            for arm, text in said.items()
        ]

    seen = {"evaluations/qa@v1": answers("b"), "evaluations/qa@v2": answers("c")}
    seen["evaluations/qa@v3"] = answers("b")
    votes = [
        Vote(f"evaluations/qa@v{version}", "e", "old", "new", score, who)
        for who, version, score in (
            ("ann", 1, 1.0), ("ann", 2, 0.0), ("bob", 1, 0.0), ("bob", 3, 1.0)
        )
    ]  # fmt: skip
    assert are_on_these(votes, answers("b"), seen) == [True, False, False, True]
    assert are_on_these(votes, answers("c"), seen) == [False, True, False, False]


def test_the_corrected_rate_is_the_papers() -> None:
    # Angelopoulos, Duchi and Zrnic 2023, section 6: theta = mean of w f over the N rows without
    # votes + mean of (Y - w f) over the n with, w = cov(Y, f) / ((1 + n / N) var f).
    rng = np.random.default_rng(0)
    votes = rng.integers(0, 3, 40) / 2
    judged = np.clip(votes + rng.integers(-1, 2, 40) / 2, 0, 1)
    # The other rows are judged alike, so that the variance of f is the same among all.
    judged = np.tile(judged, 4)
    known = np.where(np.arange(160) < 40, np.tile(votes, 4), np.nan)
    judged[40:80] = judged[80:120] = 1 - judged[:40]
    n, others = 40, 120
    weight = np.cov(votes, judged[:40])[0, 1] / ((1 + n / others) * judged[:40].var(ddof=1))
    expected = weight * judged[40:].mean() + (votes - weight * judged[:40]).mean()
    rate = correct_rate(known, judged, Clusters.of(np.arange(160)))
    assert rate.estimate.value == pytest.approx(expected, abs=1e-12)
    assert rate.bias == pytest.approx((judged[:40] - votes).mean())


def test_intervals_cover_and_a_good_judge_is_worth_votes() -> None:
    rng = np.random.default_rng(3)
    covered, gains = [], []
    # Its own answers and longer ones win: 20 points too many.
    for _ in range(400):
        clusters = Clusters.of(np.arange(600) // 4)
        quality = 0.3 + 0.5 * rng.normal(size=150)[clusters.index] + rng.normal(size=600)
        votes = (quality + 0.3 * rng.normal(size=600) > 0).astype(float)
        judged = (quality + 0.7 + 0.5 * rng.normal(size=600) > 0).astype(float)
        seen = np.full(600, np.nan)
        chosen = rng.permutation(600)[:100]
        seen[chosen] = votes[chosen]
        rate = correct_rate(seen, judged, clusters)
        truth = 0.6026  # of a normal variable: mean 0.3, variance 0.25 + 1 + 0.09
        covered.append([e.low <= truth <= e.high for e in (rate.estimate, rate.votes_alone)])
        gains.append(rate.gain)
        assert rate.bias > 0
    assert np.mean(covered, axis=0) == pytest.approx([0.95, 0.95], abs=0.03)
    assert np.median(gains) > 1.3


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_votes_that_are_all_alike_leave_an_interval(value: float) -> None:
    votes = np.r_[np.full(20, value), np.full(80, np.nan)]
    judged = np.random.default_rng(0).integers(0, 2, 100).astype(float)
    estimate = correct_rate(votes, judged, Clusters.of(np.arange(100))).estimate
    assert estimate.value == value
    assert estimate.high - estimate.low > 0.1
