"""What an evaluation says, in words: the verdict, the examples worth seeing, what to do next."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tuneloop.artifacts import Artifact
from tuneloop.evals.scoring.comparison import Prediction
from tuneloop.evals.scoring.error_tags import ERROR_TAGS
from tuneloop.evals.scoring.metrics import FIELD_PREFIX, Metric, in_task

Tone = Literal["good", "mixed", "bad", "unclear"]
_ARM_WORDS = {
    "base": "the base model",
    "base+few-shot": "few-shot prompting",
    "finetuned": "the finetuned model",
}
_NOTABLE_SHARE = 0.05
_NOTABLE_GAP = 0.10
_WIDE_INTERVAL = 0.15
_SATURATED = 0.97
_SIGNIFICANT_P = 0.05


@dataclass(frozen=True)
class Verdict:
    """The headline.

    Args:
        title: A few words.
        detail: The differences it rests on, with their intervals.
    """

    tone: Tone
    title: str
    detail: str


@dataclass(frozen=True)
class Example:
    """One question with what two arms made of it."""

    example_id: str
    question: str
    reference: str
    before: Prediction
    after: Prediction


@dataclass(frozen=True)
class NextStep:
    """Something to try, why, and the setting it is about where there is one."""

    title: str
    why: str
    key: str = ""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's results.

    Args:
        predictions: Every example of every arm.
        metrics: Content of `metrics.json`.
        comparison: Content of `comparison.json`.
    """

    name: str
    predictions: list[Prediction]
    metrics: dict[str, Any]
    comparison: dict[str, Any]

    @classmethod
    def load(cls, artifact: Artifact) -> Evaluation:
        """Return the results an artifact holds."""
        import pyarrow.parquet as pq

        metrics = json.loads((artifact.path / "metrics.json").read_text(encoding="utf-8"))
        comparison = json.loads((artifact.path / "comparison.json").read_text(encoding="utf-8"))
        predictions = []
        for row in pq.read_table(artifact.path / "predictions.parquet").to_pylist():
            scores = {name: row.pop(name) for name in metrics["metrics"] if name in row}
            scored = row["status"] == "scored"
            predictions.append(Prediction(**row, scores=scores if scored else {}))
        return cls(artifact.name, predictions, metrics, comparison)

    @property
    def primary(self) -> str:
        return str(self.metrics["primary"])

    @property
    def arms(self) -> list[dict[str, Any]]:
        return list(self.metrics["arms"])

    @property
    def candidate(self) -> dict[str, Any]:
        """The arm the verdict is about: the last one."""
        return self.arms[-1]

    def metric(self, name: str) -> Metric:
        """Return what a metric means."""
        return Metric(**self.metrics["metrics"][name])

    @property
    def tasks(self) -> dict[str, dict[str, str]]:
        """The `type` and `primary` metric of each task of a mixture; empty otherwise."""
        # An evaluation of an earlier version has none.
        return dict(self.metrics.get("tasks", {}))

    def task_types(self) -> set[str]:
        """Return the types of all tasks."""
        return {task["type"] for task in self.tasks.values()} or {self.metrics["task_type"]}

    def secondary(self) -> list[str]:
        """Return the metrics to show beside the primary one: of a mixture each task's own."""
        if self.tasks:
            return [in_task(name, task["primary"]) for name, task in self.tasks.items()]
        return [
            name
            for name in self.metrics["metrics"]
            if name != self.primary and not name.startswith(FIELD_PREFIX)
        ]

    def candidate_pairs(self) -> list[dict[str, Any]]:
        """Return the candidate against every other arm, in the order of the arms."""
        pairs = [p for p in self.comparison["pairs"] if p["arm"] == self.candidate["name"]]
        return list(reversed(pairs))

    def strongest_other(self) -> str | None:
        """Return the name of the best arm that is not the candidate, or None."""
        others = self.arms[:-1]
        if not others:
            return None
        sign = -1 if self.metric(self.primary).better == "lower" else 1
        return str(max(others, key=lambda arm: sign * arm["scores"][self.primary]["value"])["name"])

    def headline_numbers(self) -> dict[str, Any]:
        """Return the numbers worth seeing in a list of artifacts, for the manifest."""
        return {
            "primary": self.primary,
            "scores": {arm["name"]: arm["scores"][self.primary]["value"] for arm in self.arms},
            "differences": {
                pair["other"]: {
                    key: pair["differences"][self.primary][key]
                    for key in ("value", "low", "high", "p_value")
                }
                for pair in self.candidate_pairs()
            },
            "num_examples": self.metrics["num_examples"],
            "num_unscored": sum(arm["num_unscored"] for arm in self.arms),
        }

    def verdict(self) -> Verdict:
        """Return the headline: whether the candidate is better than each arm before it."""
        name = self.candidate["name"]
        subject = "Finetuning" if name == "finetuned" else describe_arm(name, capital=True)
        pairs = self.candidate_pairs()
        metric = self.metric(self.primary)
        if not pairs:
            score = format_estimate(self.candidate["scores"][self.primary], metric)
            return Verdict("unclear", f"{subject}: {score}", "One arm alone: nothing to compare.")
        outcomes = [direction(pair["differences"][self.primary], metric) for pair in pairs]
        detail = "; ".join(self._difference_in_words(pair, metric) for pair in pairs) + "."
        if len(set(outcomes)) == 1:
            tone, words = {
                "better": ("good", "helped"),
                "worse": ("bad", "made it worse"),
                "unclear": ("unclear", "made no clear difference"),
            }[outcomes[0]]
            return Verdict(tone, f"{subject} {words}", detail)  # type: ignore[arg-type]
        clauses = [
            f"{words} {_join([describe_arm(p['other']) for p in chosen])}"
            for outcome, words in (
                ("better", "is better than"),
                ("unclear", "is not clearly different from"),
                ("worse", "is worse than"),
            )
            if (chosen := [p for p, o in zip(pairs, outcomes, strict=True) if o == outcome])
        ]
        tone = "mixed" if "better" in outcomes else "bad"
        return Verdict(tone, f"{subject} {_join(clauses, 'but')}", detail)  # type: ignore[arg-type]

    def _difference_in_words(self, pair: dict[str, Any], metric: Metric) -> str:
        difference = pair["differences"][self.primary]
        words = format_difference(difference["value"], metric)
        if difference["low"] is not None:
            confidence = f"{self.metrics['confidence']:.0%}"
            low, high = (
                format_difference(difference[end], metric, unit=False) for end in ("low", "high")
            )
            words += f" ({confidence} interval {low} to {high})"
        return f"{words} over {describe_arm(pair['other'])}"

    def examples(self, other: str, outcome: str, limit: int) -> list[Example]:
        """Return examples the candidate changed, largest change first.

        Args:
            other: The arm to compare with.
            outcome: `fixed` (better than the other arm), `introduced` (worse) or `both_wrong`
                (no better, and not right).
            limit: At most so many. Among equal changes the order is that of the row ids, which
                are hashes: a random choice, the same every time.
        """
        sign = -1 if self.metric(self.primary).better == "lower" else 1
        by_arm = {
            name: {p.example_id: p for p in self.predictions if p.arm == name and p.scores}
            for name in (other, self.candidate["name"])
        }
        found: list[tuple[float, str]] = []
        for example_id, after in by_arm[self.candidate["name"]].items():
            before = by_arm[other].get(example_id)
            now = after.scores[self.primary]
            then = before.scores[self.primary] if before else None
            if now is None or then is None:
                continue
            gain = sign * (now - then)
            wanted = {
                "fixed": gain > 0,
                "introduced": gain < 0,
                "both_wrong": gain == 0 and now < 1,
            }
            if wanted[outcome]:
                found.append((-abs(gain), example_id))
        return [
            Example(
                example_id,
                last_question(by_arm[other][example_id].prompt),
                by_arm[other][example_id].reference,
                by_arm[other][example_id],
                by_arm[self.candidate["name"]][example_id],
            )
            for _, example_id in sorted(found)[:limit]
        ]

    def next_steps(self) -> list[NextStep]:
        """Return what the errors suggest to try next, most telling first."""
        arm, n = self.candidate, max(1, self.candidate["num_scored"])
        score, metric = arm["scores"][self.primary], self.metric(self.primary)
        share = {tag: count / n for tag, count in arm["error_tags"].items()}
        steps = []
        if arm["num_unscored"]:
            reason = next(iter(arm["unscored_reasons"]))
            steps.append(
                NextStep(
                    f"Find out why {arm['num_unscored']} answers are missing",
                    f"The server's own words: {reason}",
                )
            )
        if share["cut_off"] >= _NOTABLE_SHARE:
            steps.append(
                NextStep(
                    "Allow longer answers, or teach the model to stop",
                    f"{share['cut_off']:.0%} of the answers were cut off by the token limit. If "
                    "they are also repetitive or too long, more training helps, not more tokens.",
                    "evaluation.max_tokens",
                )
            )
        if share["wrong_format"] >= _NOTABLE_SHARE:
            steps.append(
                NextStep(
                    "Teach the form of the answer",
                    f"{share['wrong_format']:.0%} of the answers do not have the form the task "
                    "asks for; one more epoch usually mends form before content.",
                    "training.num_epochs",
                )
            )
        steps += self._lagging_part()
        other = self.strongest_other()
        steps += self._lagging_tasks()
        # Before anything is concluded from what is not clearly better.
        width = (score["high"] or 0) - (score["low"] or 0)
        if metric.kind != "number" and width > _WIDE_INTERVAL:
            needed = round(score["n"] * (width / 0.10) ** 2, -1)
            steps.append(
                NextStep(
                    "Score more test examples for a sharper answer",
                    f"The interval of the score is {100 * width:.0f} points wide; about "
                    f"{needed:.0f} examples would make it 10.",
                    "data.split.num_test_examples",
                )
            )
        behind = [
            pair
            for pair in self.candidate_pairs()
            if direction(pair["differences"][self.primary], metric) != "better"
        ]
        if behind and arm["name"] == "finetuned":
            steps.append(
                NextStep(
                    "Train on more rows or for longer before you rely on it",
                    "It is not clearly better than "
                    f"{_join([describe_arm(pair['other']) for pair in behind])}, which costs no "
                    "training.",
                    "training.num_epochs",
                )
            )
        if metric.kind == "binary" and (score["value"] or 0) >= _SATURATED:
            steps.append(
                NextStep(
                    "Make the test harder",
                    "Almost everything is right: this test can no longer tell models apart.",
                )
            )
        if not steps and arm["name"] == "finetuned":
            steps.append(
                NextStep(
                    "See whether more data still helps",
                    "Nothing stands out among the errors; the score with half the rows tells "
                    "whether it is still rising.",
                    "data.num_train_examples",
                )
            )
        if "generation" in self.task_types():
            steps.append(
                NextStep(
                    "Let people judge the answers blind",
                    "The score counts the words shared with one reference: it sees manner, not "
                    "truth. The dashboard's page `Blind votes` shows pairs of answers without "
                    "their names and ranks the arms by the votes.",
                )
            )
        if other and (worse := self.examples(other, "introduced", 1)):
            steps.append(
                NextStep(
                    "Read the examples that got worse",
                    f"Start with `{worse[0].example_id}`: what got lost is best mended by "
                    "training rows of that kind.",
                )
            )
        return steps

    def _lagging_tasks(self) -> list[NextStep]:
        """Return a step for each task of a mixture that did not gain like the others."""
        pairs = {pair["other"]: pair for pair in self.candidate_pairs()}
        if not pairs or self.candidate["name"] != "finetuned":
            return []
        found = {}
        for name, task in self.tasks.items():
            key = in_task(name, task["primary"])
            # Each task beside what does best in it without training.
            best = max(self.arms[:-1], key=lambda arm: arm["scores"][key]["value"] or 0.0)["name"]
            found[name] = best, direction(pairs[best]["differences"][key], self.metric(key))
        if not any(outcome == "better" for _, outcome in found.values()):
            return []
        said = {"worse": "got worse", "unclear": "did not clearly gain"}
        return [
            NextStep(
                f"Give `{name}` a larger part of the mixture, or a model of its own",
                f"It {said[outcome]} against {describe_arm(best)}, while other tasks gained.",
                f"task.tasks.{name}.weight",
            )
            for name, (best, outcome) in found.items()
            if outcome != "better"
        ]

    def _lagging_part(self) -> list[NextStep]:
        """Return a step when one field or label is clearly worse than the best one."""
        scores = self.candidate["scores"]
        parts = {
            name.removeprefix(FIELD_PREFIX): value["value"]
            for name, value in scores.items()
            if name.startswith(FIELD_PREFIX) and value["value"] is not None
        } or self.candidate.get("label_f1", {})
        if len(parts) < 2:
            return []
        worst, best = min(parts, key=parts.__getitem__), max(parts, key=parts.__getitem__)
        if parts[best] - parts[worst] < _NOTABLE_GAP:
            return []
        return [
            NextStep(
                f"Add training rows for `{worst}`",
                f"It is right {parts[worst]:.0%} of the time, `{best}` {parts[best]:.0%}: most of "
                "what is left to gain is there.",
                "data.num_train_examples",
            )
        ]


def direction(difference: dict[str, Any], metric: Metric) -> Literal["better", "worse", "unclear"]:
    """Return what a difference's interval allows to say."""
    low, high = difference["low"], difference["high"]
    if low is None or low <= 0 <= high:
        return "unclear"
    # Equal differences have an interval without width, which says nothing about so few examples.
    if difference["method"] == "all equal" and difference["p_value"] >= _SIGNIFICANT_P:
        return "unclear"
    return "better" if (low > 0) != (metric.better == "lower") else "worse"


def describe_arm(name: str, capital: bool = False) -> str:
    """Return an arm's name in words."""
    words = _ARM_WORDS.get(name, f"`{name}`")
    return words[0].upper() + words[1:] if capital else words


def format_value(value: float | None, metric: Metric) -> str:
    """Return a score as text: per cent for 0/1 and ratio scores."""
    if value is None:
        return "–"
    return f"{value:.3f}" if metric.kind == "number" else f"{100 * value:.1f}%"


def format_estimate(estimate: dict[str, Any], metric: Metric) -> str:
    """Return a score with its interval as text."""
    if estimate["low"] is None:
        return format_value(estimate["value"], metric)
    ends = " to ".join(
        format_value(estimate[end], metric).removesuffix("%") for end in ("low", "high")
    )
    return f"{format_value(estimate['value'], metric)} ({ends})"


def format_difference(value: float | None, metric: Metric, unit: bool = True) -> str:
    """Return a signed difference as text: in points for 0/1 and ratio scores."""
    if value is None:
        return "–"
    text = f"{value:+.3f}" if metric.kind == "number" else f"{100 * value:+.1f}"
    text = text.replace("-", "−")
    return text + (" points" if unit and metric.kind != "number" else "")


def last_question(prompt: str) -> str:
    """Return the last turn of a stored prompt; a plain text as it is."""
    try:
        return str(json.loads(prompt)[-1]["content"])
    except (ValueError, KeyError, IndexError, TypeError):
        return prompt


def word_diff(reference: str, completion: str) -> list[tuple[str, str]]:
    """Return a completion against its reference as (kind, text) pieces in reading order.

    Kinds: `same`, `extra` (only in the completion) and `missing` (only in the reference).
    """
    import difflib

    expected, answer = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (reference, completion))
    pieces: list[tuple[str, str]] = []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(
        None, expected, answer, autojunk=False
    ).get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(answer[j1:j2])))
            continue
        if i2 > i1:
            pieces.append(("missing", "".join(expected[i1:i2])))
        if j2 > j1:
            pieces.append(("extra", "".join(answer[j1:j2])))
    return pieces


def notable_tags(evaluation: Evaluation) -> list[str]:
    """Return the error tags that any arm has, in their fixed order."""
    # An evaluation of an earlier version lacks tags that are newer.
    return [tag for tag in ERROR_TAGS if any(a["error_tags"].get(tag) for a in evaluation.arms)]


def _join(parts: Sequence[str], word: str = "and") -> str:
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + f" {word} {parts[-1]}"
