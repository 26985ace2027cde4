"""What the errors of an evaluation suggest to try next."""

from __future__ import annotations

from dataclasses import dataclass

from tuneloop.evals.reporting.formatting import join_words
from tuneloop.evals.reporting.headline import Direction, describe_arm, direction
from tuneloop.evals.scoring.metrics import FIELD_PREFIX, in_task
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.records import FINETUNED

_NOTABLE_SHARE = 0.05
_NOTABLE_GAP = 0.10
_WIDE_INTERVAL = 0.15
_SATURATED = 0.97


@dataclass(frozen=True)
class NextStep:
    """Something to try, why, and the setting it is about where there is one."""

    title: str
    why: str
    key: str = ""


def next_steps(evaluation: Evaluation) -> list[NextStep]:
    """Return what the errors suggest to try next, most telling first."""
    arm, n = evaluation.candidate, max(1, evaluation.candidate["num_scored"])
    score, metric = arm["scores"][evaluation.primary], evaluation.metric(evaluation.primary)
    share = {tag: count / n for tag, count in arm["error_tags"].items()}
    steps: list[NextStep] = []

    def add(title: str, why: str, key: str = "") -> None:
        steps.append(NextStep(title, why, key))

    if arm["num_unscored"]:
        reason = next(iter(arm["unscored_reasons"]))
        add(f"Find out why {arm['num_unscored']} answers are missing", f"The server said: {reason}")
    if share["cut_off"] >= _NOTABLE_SHARE:
        add(
            "Allow longer answers, or teach the model to stop",
            f"{share['cut_off']:.0%} of the answers were cut off by the token limit. If they are "
            "also repetitive or too long, train more rather than allow more tokens.",
            "evaluation.max_tokens",
        )
    if share["wrong_format"] >= _NOTABLE_SHARE:
        add(
            "Teach the format of the answer",
            f"{share['wrong_format']:.0%} of the answers do not have the format that the task "
            "asks for; one more epoch usually improves the format before the content.",
            "training.num_epochs",
        )
    steps += _better_when_bound(evaluation)
    steps += _lagging_part(evaluation)
    steps += _lagging_tasks(evaluation)
    # Before anything is concluded from what is not clearly better.
    width = (score["high"] or 0) - (score["low"] or 0)
    if metric.kind != "number" and width > _WIDE_INTERVAL:
        needed = round(score["n"] * (width / 0.10) ** 2, -1)
        add(
            "Score more test examples for a sharper result",
            f"The interval of the score is {100 * width:.0f} points wide; about {needed:.0f} "
            "examples would narrow it to 10.",
            "data.split.num_test_examples",
        )
    behind = [
        pair["other"]
        for pair in evaluation.candidate_pairs()
        if direction(evaluation, pair, evaluation.primary) != "better"
    ]
    if behind and arm["name"] == FINETUNED:
        add(
            "Train on more rows or for longer before you rely on it",
            f"It is not clearly better than {join_words([describe_arm(name) for name in behind])}, "
            "which costs no training.",
            "training.num_epochs",
        )
    if metric.kind == "binary" and (score["value"] or 0) >= _SATURATED:
        add(
            "Make the test harder",
            "Almost everything is right: this test can no longer tell models apart.",
        )
    if not steps and arm["name"] == FINETUNED:
        add(
            "See whether more data still helps",
            "Nothing stands out among the errors. The score with half the rows shows whether it "
            "is still rising.",
            "data.num_train_examples",
        )
    if "generation" in evaluation.task_types() and evaluation.primary != "function_call":
        add(
            "Let people judge the answers blind",
            "The score counts the words shared with one reference: it measures wording, not "
            "truth. The dashboard's page `Blind votes` shows pairs of answers without their "
            "names and ranks the arms by the votes.",
        )
    if other := evaluation.strongest_other():
        worse = [e for e in evaluation.pair(other, arm["name"]) if e.change == "introduced"]
        if worse:
            add(
                "Read the examples that got worse",
                f"Start with `{worse[0].example_id}`. Training rows of that kind are the best way "
                "to win back what was lost.",
            )
    return steps


def _better_when_bound(evaluation: Evaluation) -> list[NextStep]:
    """Return a step where the candidate's own model does better with constrained answers."""
    name = evaluation.candidate["name"]
    own = {arm["name"] for arm in evaluation.arms if arm.get("free_arm") == name}
    return [
        NextStep(
            f"Ask it as `{pair['other']}` does",
            "The same model is better when its answers are bound to the form of the task, by "
            "`ranking` for labels and `response_format` for JSON in each request.",
        )
        for pair in evaluation.comparison["pairs"]
        if pair["arm"] == name
        and pair["other"] in own
        and direction(evaluation, pair, evaluation.primary) == "worse"
    ]


def _lagging_tasks(evaluation: Evaluation) -> list[NextStep]:
    """Return a step for each task of a mixture that did not gain like the others."""
    pairs = {pair["other"]: pair for pair in evaluation.candidate_pairs()}
    if not pairs or evaluation.candidate["name"] != FINETUNED:
        return []
    strongest: dict[str, tuple[str, Direction]] = {}
    for name, task in evaluation.tasks.items():
        key = in_task(name, task["primary"])
        # Each task beside what does best in it without training.
        others = [arm for arm in evaluation.arms if arm["name"] in pairs]
        best = max(others, key=lambda arm: arm["scores"][key]["value"] or 0.0)["name"]
        strongest[name] = best, direction(evaluation, pairs[best], key)
    if not any(change == "better" for _, change in strongest.values()):
        return []
    return [
        NextStep(
            f"Give `{name}` a larger share of the mixture, or a model of its own",
            f"It {'got worse' if change == 'worse' else 'did not clearly gain'} against "
            f"{describe_arm(best)}, while other tasks gained.",
            f"task.tasks.{name}.weight",
        )
        for name, (best, change) in strongest.items()
        if change != "better"
    ]


def _lagging_part(evaluation: Evaluation) -> list[NextStep]:
    """Return a step when one field or label is clearly worse than the best one."""
    scores = evaluation.candidate["scores"]
    parts = {
        name.removeprefix(FIELD_PREFIX): value["value"]
        for name, value in scores.items()
        if name.startswith(FIELD_PREFIX) and value["value"] is not None
    } or evaluation.candidate.get("label_f1", {})
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
