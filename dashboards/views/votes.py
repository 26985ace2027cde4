"""Blind votes: two answers without names, and what the votes say."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

import theme
from headline import ARM_HELP
from shell import (
    begin_with,
    choose_artifact,
    identity,
    is_read_only,
    load_evaluation,
    refuse,
    reviewer_name,
    signed_in_name,
)  # fmt: skip
from tuneloop.errors import UserError
from tuneloop.evals.reporting import error_analysis as analysis
from tuneloop.evals.reporting.judge import describe_judge, describe_judged_pair
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.judged_pairs import Compared, describe_pair
from tuneloop.evals.scoring.judging import are_on_these, read_judgements
from tuneloop.evals.scoring.metrics import without_thought
from tuneloop.evals.scoring.pairing import PairedExample, Pairs
from tuneloop.evals.scoring.predictions import Prediction, rows_at
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.review import agreement, verdicts
from tuneloop.review.ratings import rate_arms
from tuneloop.review.store import ReviewStore
from tuneloop.review.verdicts import (
    Choice,
    Sides,
    Verdict,
    as_vote,
    blind_order,
    next_example,
    open_examples,
    verdict_rows,
)

BUTTONS: dict[Choice, tuple[str, str]] = {
    "left": ("Left is better", "1"),
    "tie": ("Equally good", "2"),
    "both_bad": ("Both are bad", "3"),
    "right": ("Right is better", "4"),
}


def vote(example_id: str, sides: Sides, reviewer: str, choice: Choice) -> None:
    """Store a verdict; called before the page is drawn again."""
    shown, since = st.session_state.get("shown", ("", 0.0))
    if example_id != shown or time.monotonic() - since < verdicts.LEAST_READING_S:
        # Every such press begins the second anew: a held key never votes.
        st.session_state.shown = (shown, time.monotonic())
        st.session_state.too_fast = True
        return
    # More presses may come before the next answers are drawn: they are no votes on these.
    st.session_state.shown = ("", 0.0)
    comment = st.session_state.get(f"comment-{example_id}", "")
    store_vote(Verdict(artifact.ref, example_id, *sides, choice, reviewer, comment.strip()))


def store_vote(verdict: Verdict) -> None:
    """Store a verdict, or keep it for another try."""
    try:
        store.add(verdict)
    except UserError as error:
        st.session_state.unstored = (verdict, str(error))
        return
    st.session_state.pop("unstored", None)
    st.session_state.last_voted = verdict.example_id
    st.session_state.pop("again", None)


def put_off(example_id: str) -> None:
    """Ask for an example later in this session."""
    st.session_state.setdefault("skipped", []).append(example_id)
    st.session_state.pop("again", None)


def ask_name() -> str:
    """Return who judges, once that is confirmed; empty until then.

    It is no live field, since single keys vote on this page, and in no address, since a link that
    is passed on must not make others vote under this name.
    """
    name = reviewer_name()
    if name:
        with st.container(horizontal=True, vertical_alignment="center"):
            st.html(theme.chip(f"You judge as {name}"), width="content")
            if not signed_in_name() and st.button("Not you?", type="tertiary"):
                del st.session_state.judge
                st.rerun()
        return name
    with st.form("who", border=False):
        typed = st.text_input(
            "Your name", key="reviewer", placeholder="stored with each vote", max_chars=80
        )
        if st.form_submit_button("Start", type="primary") and typed.strip():
            st.session_state.judge = typed.strip()
            st.rerun()
    return ""


def counted_verdicts(evaluation: Evaluation, reviewer: str | None = None) -> list[Verdict]:
    """Return the votes on these very answers, whichever version of the evaluation showed them."""
    references = [
        a.ref for a in workspace.published() if (a.kind, a.name) == ("evaluations", artifact.name)
    ]
    said = store.verdicts(references, reviewer)
    ids = pa.array({verdict.example_id for verdict in said}, pa.string())

    def answers(of: Evaluation) -> list[Prediction]:
        is_voted = pc.is_in(of.column("example_id"), value_set=ids)
        return rows_at(of.predictions, np.flatnonzero(is_voted.to_numpy()))

    voted = {
        reference: answers(load_evaluation(workspace.open(reference)))
        for reference in {verdict.evaluation for verdict in said}
    }
    counts = are_on_these([as_vote(v) for v in said], answers(evaluation), voted)
    return [verdict for verdict, is_on_these in zip(said, counts, strict=True) if is_on_these]


@st.cache_resource(max_entries=2, show_spinner="Comparing the answers")
def different_answers(made: str, _evaluation: Evaluation, arms: Sequence[str]) -> Pairs:
    return analysis.examples_to_judge(_evaluation, arms)


def show_ballot(examples: Pairs, arms: Collection[str]) -> None:
    """Ask for a verdict on the next open example."""
    reviewer = ask_name()
    if not reviewer:
        st.info("Type your name to begin.")
        return
    asked = (artifact.ref, tuple(arms), reviewer)
    if st.session_state.setdefault("asked", asked) != asked:
        # What was voted on last, put off or read belongs to what was asked before.
        for key in ("again", "last_voted", "skipped", "shown"):
            st.session_state.pop(key, None)
        st.session_state.asked = asked
    ids = examples.sides("example_id")[1].to_pylist()
    numbers = {example_id: number for number, example_id in enumerate(ids)}
    mine = counted_verdicts(evaluation, reviewer)
    still_open = open_examples(ids, mine, arms)
    done = len(ids) - len(still_open)
    st.progress(done / len(ids), text=f"{done:,} of {len(ids):,} judged by {reviewer}")
    if unstored := st.session_state.get("unstored"):
        st.error("Your last vote is not stored yet.")
        st.code(unstored[1], language=None, wrap_lines=True)
        st.button("Store it", on_click=store_vote, args=(unstored[0],))
    if st.session_state.pop("too_fast", False):
        st.warning("Not counted: the answers had been shown for less than a second.")
    example_id = st.session_state.get("again")
    if example_id not in numbers:
        example_id = next_example(still_open, st.session_state.get("skipped", []))
    if example_id is None:
        st.success("Every example is judged. Thank you! The ratings are under Results.")
    else:
        sides = blind_order(example_id, reviewer, arms)
        # The newest vote counts, and its comment: one that is changed begins with what it said.
        said = [
            v.comment
            for v in mine
            if v.example_id == example_id and {v.arm_left, v.arm_right} == {*sides}
        ]
        show_pair(examples[numbers[example_id]], sides, reviewer, said[-1] if said else "")
    last = st.session_state.get("last_voted")
    if last in numbers and last != example_id and st.button("Change my last vote", type="tertiary"):
        st.session_state.again = last
        st.rerun()


def show_pair(example: PairedExample, sides: Sides, reviewer: str, comment: str) -> None:
    """Show one question with two nameless answers, the comment so far, and the four buttons."""
    if st.session_state.get("shown", ("",))[0] != example.example_id:
        st.session_state.shown = (example.example_id, time.monotonic())
    sides_shown = (example.before, example.after)
    answers = {p.arm: without_thought(p.completion) for p in sides_shown}
    with st.container(border=True):
        st.html(theme.labelled("Question", theme.folded(example.question)))
        with st.expander("Reference answer"):
            st.html(theme.folded(example.reference))
        st.html(
            theme.sides(
                [
                    theme.box(title, [], theme.folded(answers[arm]))
                    for title, arm in zip(("Left", "Right"), sides, strict=True)
                ]
            )
        )
    st.text_input(
        "Comment", comment, key=f"comment-{example.example_id}", placeholder="optional: why",
        max_chars=2000,
    )  # fmt: skip
    with st.container(horizontal=True, key="ballot"):
        for choice, (label, shortcut) in BUTTONS.items():
            st.button(
                label,
                key=f"vote-{choice}",
                type="primary" if choice in ("left", "right") else "secondary",
                shortcut=shortcut,
                on_click=vote,
                args=(example.example_id, sides, reviewer, choice),
            )
        st.button("Skip", type="tertiary", on_click=put_off, args=(example.example_id,))


def show_results(evaluation: Evaluation, examples: Pairs) -> None:
    """Show ratings, and how far they can be trusted."""
    votes = counted_verdicts(evaluation)
    if not votes:
        st.info("No votes yet. The ratings appear with the first one.")
        return
    people = sorted({verdict.reviewer for verdict in votes})
    counted = "1 vote" if len(votes) == 1 else f"{len(votes):,} votes"
    st.caption(f"{counted} by {', '.join(people)}.")
    st.subheader("Ratings")
    rows = rate_arms(agreement.preferences(votes))
    st.table(rows, border="horizontal", hide_index=True)
    st.caption(
        "Elo from Bradley–Terry over the votes of all pairs of arms: 1000 is the average, 400 "
        "more means ten times the odds to win. Arms whose intervals overlap cannot be told "
        "apart yet."
    )
    st.subheader("Do reviewers agree?")
    between = agreement.reviewer_rows(votes)
    if between:
        st.table(between, border="horizontal", hide_index=True)
    else:
        st.caption("This needs two people who have judged the same examples.")
    st.subheader("Do people agree with the metric?")
    ids = pa.array({verdict.example_id for verdict in votes})
    examples = examples.where(pc.is_in(examples.sides("example_id")[1], value_set=ids).to_numpy())
    judges = {
        evaluation.metric(name).label.replace("`", ""): analysis.metric_preferences(
            evaluation, examples, name
        )
        for name in analysis.judged_metrics(evaluation)
    }
    judges["longest wins (baseline)"] = analysis.length_preferences(examples)
    against = agreement.judge_rows(votes, arms, judges)
    if against:
        st.table(against, border="horizontal", hide_index=True)
        st.caption(
            "How often the metric prefers the answer that people voted for; no preference counts "
            "as half. A metric that does not beat the baseline says no more than the length does."
        )
    else:
        st.caption("No vote on this pair has a winner yet.")
    show_judged(evaluation, votes)
    st.subheader("Votes and comments")
    st.dataframe(verdict_rows(votes), hide_index=True)
    st.caption("The table's own menu searches it and downloads it as CSV.")


def show_judged(evaluation: Evaluation, votes: Sequence[Verdict]) -> None:
    """Show the judge's win rate of these arms, corrected by the votes as they are now."""
    judged = next(
        (p for p in evaluation.judge.get("pairs", []) if {p["arm"], p["other"]} == set(arms)), None
    )
    if judged is None:
        return
    st.subheader("Judged by a model and by people")
    told = describe_pair(
        evaluation.predictions,
        read_judgements(artifact.path),
        [as_vote(verdict) for verdict in votes],
        Compared(judged["arm"], judged["other"]),
        Resampling(evaluation.metrics["confidence"]),
    )
    text = describe_judged_pair(judged | told, evaluation.judge)
    st.markdown(text.result)
    for note in text.notes:
        st.caption(note)
    st.caption(describe_judge(evaluation.judge))


left, right = st.columns(2)
with left:
    workspace, artifact = choose_artifact("evaluations", "Evaluation")
try:
    store = ReviewStore(workspace.location)
except UserError as error:
    refuse("Votes cannot be stored here.", error)
evaluation = load_evaluation(artifact)
names = [arm["name"] for arm in evaluation.arms]
if len(names) < 2:
    st.info("This evaluation has one arm: there is nothing to compare it with.")
    st.stop()
if evaluation.metrics["task_type"] == "language_modeling":
    st.info("Plain text is scored by likelihood: there are no answers to judge.")
    st.stop()
# The candidate's comparisons come first, and of them, as in the report, that with the strongest.
strongest = evaluation.strongest_other()
pairs = sorted(
    combinations(names, 2), key=lambda pair: (pair[1] != names[-1], pair[0] != strongest)
)
begin_with("pair", pairs[0])
arms = right.selectbox(
    "Arms", pairs, format_func=" vs ".join, key="pair", bind="query-params",
    help=f"{ARM_HELP} Which answer is on the left differs by example and reviewer.",
)  # fmt: skip
examples = different_answers(identity(artifact), evaluation, arms)
view = st.segmented_control(
    "View", ["Vote", "Results"], default="Vote", key="view", required=True,
    label_visibility="collapsed", bind="query-params",
)  # fmt: skip
if view == "Results":
    show_results(evaluation, examples)
elif is_read_only():
    st.info("This dashboard is read-only: it takes no votes.")
elif not examples:
    st.info("Both arms gave the same answers: there is nothing to choose between.")
else:
    show_ballot(examples, arms)
