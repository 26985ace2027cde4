"""Asking a judge, an endpoint like any other, which of two answers is better, or how good one is.

Every prompt and every raw answer is kept in `judgements.parquet`. Two answers are shown in both
orders; where the order decides, it is a tie. What a judge says is never the result by itself:
`judged_pairs` corrects it by human votes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tuneloop.artifacts import Artifact
from tuneloop.config import JudgeConfig
from tuneloop.evals.scoring.asking import (
    EvaluationRequest,
    ModelAnswer,
    PartialAnswers,
    arm_identity,
)
from tuneloop.evals.scoring.metrics import without_thought
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.questions import Question
from tuneloop.records import Arm, Message, SamplingParams, Vote

FILE = "judgements.parquet"
TIE, UNPARSEABLE = "tie", "unparseable"
_COLUMNS = [
    *((name, pa.string()) for name in ("example_id", "arm", "other", "first", "prompt", "answer")),
    ("verdict", pa.string()),
    ("rating", pa.float64()),
    ("prompt_tokens", pa.int32()),
    ("completion_tokens", pa.int32()),
    ("latency_s", pa.float64()),
    ("error", pa.string()),
]
# A line that is the verdict and nothing else: `Verdict: A`, `**Verdict:** tie`, `{"verdict": "B"}`,
# and `A` as the last one. What is read out of prose is a guess.
_VERDICT = re.compile(r"^\W*((?:final\s+)?verdict\W+)?(A|B|tie)\W*$", re.IGNORECASE | re.MULTILINE)
_RATING = re.compile(
    r"^\W*((?:final\s+)?(?:rating|score)\W+)?([1-5])(?:\s*(?:/|out of)\s*5)?\W*$",
    re.IGNORECASE | re.MULTILINE,
)
_PAIR = (
    "You compare two answers to the same task. {criteria} A reference answer is given: a good "
    "answer may say the same in other words. Neither the order nor the length of the answers "
    "counts. Give your reasons in a few sentences. Then end with one line that is `Verdict: A`, "
    "`Verdict: B` or `Verdict: tie`."
)
_ONE = (
    "You rate an answer to a task. {criteria} A reference answer is given: a good answer may say "
    "the same in other words. Its length does not count. Give your reasons in a few sentences. "
    "Then end with one line that is `Rating: N`, where N is 1 (useless), 2, 3, 4 or 5 (nothing to "
    "improve)."
)


@dataclass(frozen=True)
class Judging:
    """Who judges the answers, and what people have said about them.

    Args:
        config: How the judge is asked.
        arm: The judge, as an arm: endpoint, price, longest wait.
        votes: Human votes on evaluations of this name.
        is_arm: The arm that is the same model at the same address; None if there is none.
    """

    config: JudgeConfig
    arm: Arm
    votes: tuple[Vote, ...] = ()
    is_arm: str | None = None

    @property
    def params(self) -> SamplingParams:
        """How the judge's answers are sampled."""
        return SamplingParams(max_tokens=self.config.max_tokens, temperature=0.0, seed=0)

    @property
    def identity(self) -> str:
        """What its answers depend on besides the prompt."""
        return arm_identity(self.arm, self.params)

    def parts(self) -> dict[str, Any]:
        """Return all that changes the result, as the manifest keeps it."""
        votes = sorted(vote[1:] for vote in self.votes)
        return {
            "kind": self.config.kind,
            "criteria": self.config.criteria,
            "against": self.config.against,
            "model": self.config.model,
            "identity": self.identity,
            "votes": hashlib.sha256(json.dumps(votes).encode()).hexdigest(),
            "num_votes": len(votes),
        }


class JudgedPair(NamedTuple):
    """Two answers that are compared: the candidate's, and that of another arm."""

    arm: Prediction
    other: Prediction


@dataclass(frozen=True)
class Judgement:
    """What a judge said: a row of `judgements.parquet`.

    Args:
        other: The arm it was compared with; empty for a rating.
        first: The arm whose answer was shown first.
        answer: As it came; empty where there is none.
        verdict: Name of the better arm, `tie`, `unparseable`; empty for a rating that could be
            read, and where there is no answer.
        rating: 1 to 5; None without one.
        error: Why there is no answer.
    """

    example_id: str
    arm: str
    other: str
    first: str
    prompt: str
    answer: str
    verdict: str
    rating: float | None
    prompt_tokens: int | None
    completion_tokens: int | None
    latency_s: float | None
    error: str = ""


class _Asked(NamedTuple):
    """A request to the judge, and what it is about."""

    request: EvaluationRequest
    arm: str
    other: str
    first: str
    example_id: str


def pairs_to_judge(predictions: Sequence[Prediction], arm: str, other: str) -> list[JudgedPair]:
    """Return the examples that both arms answered, and differently; equal answers are ties."""
    others = {p.example_id: p for p in predictions if p.arm == other and p.status == "scored"}
    return [
        JudgedPair(p, others[p.example_id])
        for p in predictions
        if p.arm == arm
        and p.status == "scored"
        and p.example_id in others
        and _said(p).split() != _said(others[p.example_id]).split()
    ]


def against_of(config: JudgeConfig, arms: Sequence[str]) -> list[str]:
    """Return the arms that the last one is compared with."""
    return [name for name in arms[:-1] if not config.against or name in config.against]


class JudgeQuestions:
    """What a judge is asked about some answers, and what it said.

    Args:
        judging: Who is asked.
        predictions: All answers of all arms.
        questions: What was answered.
    """

    def __init__(
        self, judging: Judging, predictions: Sequence[Prediction], questions: Sequence[Question]
    ) -> None:
        self._judging = judging
        self._questions = {question.example_id: question for question in questions}
        arms = list(dict.fromkeys(p.arm for p in predictions))
        self._asked: list[_Asked] = []
        for other in against_of(judging.config, arms):
            for pair in pairs_to_judge(predictions, arms[-1], other):
                self._asked += self._ask(pair)
        if judging.config.kind == "rubric":
            # The candidate's answer is rated once, however many it is compared with.
            self._asked = list({(a.example_id, a.arm): a for a in self._asked}.values())

    def requests(self) -> list[EvaluationRequest]:
        """Return what to ask, nothing twice."""
        return list({asked.request.key: asked.request for asked in self._asked}.values())

    def judgements(self, answers: Sequence[ModelAnswer]) -> list[Judgement]:
        """Return what was said.

        Args:
            answers: To `requests`, in any order.
        """
        by_key = {answer.example_id: answer for answer in answers}
        return [
            self._judgement(asked, by_key[asked.request.question.example_id])
            for asked in self._asked
        ]

    def _ask(self, pair: JudgedPair) -> list[_Asked]:
        question = self._questions[pair.arm.example_id]
        criteria = self._judging.config.criteria
        if self._judging.config.kind == "rubric":
            system = _ONE.format(criteria=criteria)
            return [
                self._request(system, _shown(question, [("Answer", _said(p))]), p, None, p.arm)
                for p in pair
            ]
        system = _PAIR.format(criteria=criteria)
        return [
            self._request(
                system,
                _shown(question, [("Answer A", _said(first)), ("Answer B", _said(second))]),
                pair.arm,
                pair.other,
                first.arm,
            )
            for first, second in (pair, reversed(pair))
        ]

    def _request(
        self, system: str, shown: str, arm: Prediction, other: Prediction | None, first: str
    ) -> _Asked:
        messages = Message("system", system), Message("user", shown)
        question = Question(_key(system, shown), messages)
        request = EvaluationRequest(
            self._judging.arm, self._judging.identity, question, self._judging.params
        )
        return _Asked(request, arm.arm, other.arm if other else "", first, arm.example_id)

    def _judgement(self, asked: _Asked, answer: ModelAnswer) -> Judgement:
        text = without_thought(answer.text)
        verdict, rating = "", None
        if not answer.error and self._judging.config.kind == "rubric":
            rating = read_rating(text)
            verdict = UNPARSEABLE if rating is None else ""
        elif not answer.error:
            second = asked.other if asked.first == asked.arm else asked.arm
            verdict = {"A": asked.first, "B": second}.get(said := read_verdict(text), said)
        return Judgement(
            asked.example_id,
            asked.arm,
            asked.other,
            asked.first,
            answer.prompt,
            answer.text,
            verdict,
            rating,
            answer.prompt_tokens,
            answer.completion_tokens,
            answer.latency_s,
            answer.error,
        )


def read_verdict(text: str) -> str:
    """Return `A`, `B`, `tie` or `unparseable`: what the last line that is a verdict says."""
    said = _last_said(_VERDICT, text)
    if said is None:
        return UNPARSEABLE
    return TIE if said.casefold() == TIE else said.upper()


def read_rating(text: str) -> float | None:
    """Return the rating of the last line that is one, or None."""
    said = _last_said(_RATING, text)
    return None if said is None else float(said)


def _last_said(pattern: re.Pattern[str], text: str) -> str | None:
    """Return what the last line that names itself says, else the last line of all.

    A bare `A:` further up heads what is said about an answer.
    """
    found = list(pattern.finditer(text))
    named = [match for match in found if match[1]]
    bare = [match for match in found if not re.search(r"\w", text[match.end() :])]
    return next((str(match[2]) for match in reversed(named or bare)), None)


def keep_judgements(answered: PartialAnswers, earlier: Artifact) -> None:
    """Add what a judge said in an earlier evaluation: it is not asked again."""
    identity = (earlier.manifest["config"].get("judge") or {}).get("identity")
    if identity is None or not (earlier.path / FILE).is_file():
        return
    for judgement in read_judgements(earlier.path):
        if not judgement.error:
            system, shown = (turn["content"] for turn in json.loads(judgement.prompt))
            answered.put(
                identity,
                ModelAnswer(
                    _key(system, shown),
                    judgement.prompt,
                    text=judgement.answer,
                    finish_reason="stop",
                    prompt_tokens=judgement.prompt_tokens,
                    completion_tokens=judgement.completion_tokens,
                    latency_s=judgement.latency_s,
                ),
            )


def write_judgements(judgements: Sequence[Judgement], folder: Path) -> None:
    """Write `judgements.parquet`."""
    rows = [dataclasses.asdict(judgement) for judgement in judgements]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(_COLUMNS)), folder / FILE)


def read_judgements(folder: Path) -> list[Judgement]:
    """Return the rows of `judgements.parquet`; none where there is no such file."""
    if not (folder / FILE).is_file():
        return []
    return [Judgement(**row) for row in pq.read_table(folder / FILE).to_pylist()]


def are_on_these(
    votes: Sequence[Vote],
    predictions: Sequence[Prediction],
    voted: Mapping[str, Sequence[Prediction]],
) -> list[bool]:
    """Return of each vote whether it counts: the reviewer's newest on exactly these answers.

    Args:
        votes: On any version of the evaluation, oldest first.
        predictions: The answers.
        voted: By reference, the answers of the versions that people saw.
    """
    texts = {(p.example_id, p.arm): p.completion for p in predictions}
    seen = {
        reference: {(p.example_id, p.arm): p.completion for p in rows}
        for reference, rows in voted.items()
    }

    def is_on_these(vote: Vote) -> bool:
        shown = seen.get(vote.evaluation, {})
        keys = [(vote.example_id, arm) for arm in (vote.arm, vote.other)]
        return all(key in texts and shown.get(key) == texts[key] for key in keys)

    # Versions may have the same answers: of several votes on them the last one stays.
    newest = {
        (vote.reviewer, vote.example_id, frozenset((vote.arm, vote.other))): number
        for number, vote in enumerate(votes)
        if is_on_these(vote)
    }
    counting = set(newest.values())
    return [number in counting for number in range(len(votes))]


def _key(system: str, shown: str) -> str:
    """Return what a question to a judge is known by: the same words are the same question."""
    return "judge-" + hashlib.sha256(f"{system}\0{shown}".encode()).hexdigest()[:24]


def _said(prediction: Prediction) -> str:
    """Return what is judged of an answer: what a model thought before it is not scored either."""
    return without_thought(prediction.completion)


def _shown(question: Question, answers: Sequence[tuple[str, str]]) -> str:
    """Return the task, the reference and the answers as the judge sees them."""
    turns = [message for message in question.messages if message.role != "system"]
    instructions = [message.content for message in question.messages if message.role == "system"]
    asked = (
        turns[0].content
        if len(turns) == 1
        else "\n\n".join(f"{turn.role}: {turn.text}" for turn in turns)
    )
    parts = [("Instruction", "\n\n".join(instructions)), ("Task", asked)]
    right = "\n\nor\n\n".join((question.reference, *question.accepted))
    parts += [("Reference answer", right), *answers]
    return "\n\n".join(
        f"[{title}]\n{text or '(nothing)'}" for title, text in parts if text or title[0] == "A"
    )
