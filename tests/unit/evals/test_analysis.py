"""Two arms example by example: outcomes, tags, filters, and what a sweep shows."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneloop.artifacts import Workspace
from tuneloop.evals.reporting import analysis
from tuneloop.evals.reporting.analysis import Filter
from tuneloop.evals.reporting.findings import Evaluation
from tuneloop.evals.reporting.overview import describe_parity, read_sweep, search_rows
from tuneloop.evals.scoring.comparison import Prediction
from tuneloop.evals.scoring.error_tags import misspelt_words, tag_errors
from tuneloop.sweeps.curve import learning_curves

METRICS = {
    "right": {"label": "right", "better": "higher", "kind": "binary"},
    "loss": {"label": "loss", "better": "lower", "kind": "number"},
    "length": {"label": "length", "better": "neither", "kind": "number"},
}


def answer(
    arm: str, index: int, text: str, scores: tuple[float, float] | None, tags: str = ""
) -> Prediction:
    prompt = json.dumps([{"role": "user", "content": f"question {index}"}])
    scored = {} if scores is None else {"right": scores[0], "loss": scores[1], "length": 1.0}
    return Prediction(
        f"r{index}", arm, prompt, f"truth {index}", text, "stop", 1, 1, 0.1,
        "unscored" if scores is None else "scored", error_tags=tags.split(), scores=scored,
    )  # fmt: skip


@pytest.fixture
def evaluation() -> Evaluation:
    rows = [
        answer("base", 0, "no idea", (0, 9.0), "cut_off"),
        answer("base", 1, "truth 1", (1, 1.0)),
        answer("base", 2, "truth 2", (1, 1.0), "too_long"),
        answer("base", 3, "wrong", (0, 5.0), "too_long cut_off"),
        answer("base", 4, "", None),
        answer("tuned", 0, "truth 0", (1, 1.0)),
        answer("tuned", 1, "broken ÄRGER", (0, 2.0), "misspelt"),
        answer("tuned", 2, " truth  2", (1, 1.0)),
        answer("tuned", 3, "wrong too", (0, 4.0), "too_long"),
        answer("tuned", 4, "truth 4", (1, 1.0), "cut_off"),
    ]
    arms = [{"name": "base"}, {"name": "tuned"}]
    return Evaluation("demo", rows, {"primary": "right", "metrics": METRICS, "arms": arms}, {})


def outcomes(evaluation: Evaluation, metric: str) -> dict[str, str]:
    examples = analysis.pair_examples(evaluation, "base", "tuned", metric)
    return {example.example_id: example.outcome for example in examples}


def test_outcomes_follow_the_metric_and_its_direction(evaluation: Evaluation) -> None:
    assert outcomes(evaluation, "right") == {
        "r0": "fixed", "r1": "introduced", "r2": "both_right", "r3": "both_wrong",
        "r4": "unscored",
    }  # fmt: skip
    assert outcomes(evaluation, "loss") == {
        "r0": "fixed", "r1": "introduced", "r2": "same", "r3": "fixed", "r4": "unscored",
    }  # fmt: skip


def test_largest_changes_come_first_and_unscored_ones_last(evaluation: Evaluation) -> None:
    examples = analysis.pair_examples(evaluation, "base", "tuned", "loss")
    assert [abs(example.gain or 0) for example in examples] == [8, 1, 1, 0, 0]
    assert (examples[0].example_id, examples[-1].example_id) == ("r0", "r4")
    assert examples[-1].gain is None


def test_tags_are_counted_as_fixed_introduced_and_both(evaluation: Evaluation) -> None:
    examples = analysis.pair_examples(evaluation, "base", "tuned", "right")
    counts = {count.tag: count for count in analysis.count_tags(examples)}
    # r4 is not scored in one arm: its error is nobody's.
    changes = {tag: (c.before, c.after, c.fixed, c.introduced, c.both) for tag, c in counts.items()}
    assert changes == {
        "cut_off": (2, 0, 2, 0, 0),
        "too_long": (2, 1, 1, 0, 1),
        "misspelt": (0, 1, 0, 1, 0),
    }


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (Filter(), {"r0", "r1", "r2", "r3", "r4"}),
        (Filter(outcome="introduced"), {"r1"}),
        (Filter(tag="too_long"), {"r2", "r3"}),
        (Filter(tag="too_long", tag_change="fixed"), {"r2"}),
        (Filter(tag_change="introduced"), {"r1", "r4"}),
        (Filter(text="ärger QUESTION"), {"r1"}),
        (Filter(text="  "), {"r0", "r1", "r2", "r3", "r4"}),
        (Filter(outcome="fixed", tag="misspelt"), set()),
    ],
)
def test_filters(evaluation: Evaluation, chosen: Filter, expected: set[str]) -> None:
    examples = analysis.pair_examples(evaluation, "base", "tuned", "right")
    assert {e.example_id for e in examples if chosen.admits(e)} == expected


def test_differences_are_marked_where_they_can_be_read(evaluation: Evaluation) -> None:
    examples = {
        e.example_id: e for e in analysis.pair_examples(evaluation, "base", "tuned", "right")
    }
    before, after = analysis.differences(examples["r0"], "reference")
    assert before == [("extra", "no idea")]
    assert after == [("same", "truth 0")]
    before, after = analysis.differences(examples["r3"], "other")
    assert before == [("same", "wrong")]
    assert after == [("same", "wrong"), ("extra", " too")]


@given(st.lists(st.integers(), max_size=40), st.integers(-3, 20), st.integers(1, 7))
def test_pages_hold_every_item_once(items: list[int], page: int, size: int) -> None:
    shown, num_pages = analysis.paginate(items, page, size)
    everything = [x for n in range(num_pages) for x in analysis.paginate(items, n + 1, size)[0]]
    assert everything == items
    assert shown or not items


def test_only_different_answers_are_judged_in_everybodys_order(evaluation: Evaluation) -> None:
    judged = analysis.examples_to_judge(evaluation, ("base", "tuned"))
    assert {example.example_id for example in judged} == {"r0", "r1", "r3"}
    again = analysis.examples_to_judge(evaluation, ("tuned", "base"))
    assert [e.example_id for e in judged] == [e.example_id for e in again]


def test_what_judges_prefer(evaluation: Evaluation) -> None:
    examples = analysis.pair_examples(evaluation, "base", "tuned", "right")
    assert analysis.metric_preferences(evaluation, examples, "loss") == {
        "r0": "tuned", "r1": "base", "r2": None, "r3": "tuned",
    }  # fmt: skip
    assert analysis.length_preferences(examples)["r3"] == "tuned"
    assert analysis.judged_metrics(evaluation) == ["right", "loss"]


@pytest.mark.parametrize(
    ("text", "prompt", "reference", "expected"),
    [
        ("I recieve teh letter", "", "the letter", ["recieve", "teh"]),
        ("the frobnicator runs", "What does a frobnicator do?", "it runs", []),
        ("the frobnicator runs", "", "a frobnicator runs", []),
        ("colour and color, analyse and analyze", "", "", []),
        ("the filename of a namespace", "", "", []),
        ("call parse_args() in /usr/lib or os.path, don't", "", "", []),
        ("Herr Zweigelt, née Kärntner", "", "", []),
        ("Das ist ein schöner Tag gewesen", "", "Gestern war das Wetter sehr angenehm", []),
        ("use `kwargs` teh\n```python\nelif iter(args)", "", "", ["teh"]),
        ("", "", "", []),
    ],
)
def test_misspelt_words(text: str, prompt: str, reference: str, expected: list[str]) -> None:
    assert misspelt_words(text, prompt, reference) == expected


def test_words_of_a_stored_prompt_are_known_whatever_stands_before_them() -> None:
    prompt = json.dumps([{"role": "user", "content": "Explain:\nzorblax"}])
    assert misspelt_words("a zorblax", prompt, "") == []


def test_one_odd_word_in_a_long_answer_is_no_bad_spelling() -> None:
    from tuneloop.config import TaskConfig
    from tuneloop.evals.scoring.metrics import Scorer

    scorer = Scorer(TaskConfig(type="generation"), {})
    text = "every good answer says something useful about the thing that was asked for " * 2
    reference = text.replace("good", "fine")
    assert tag_errors(scorer, reference, text + "zorblax", "stop") == []
    assert tag_errors(scorer, reference, text + "zorblax teh recieve", "stop") == ["misspelt"]


def test_rows_are_searched_in_every_column() -> None:
    rows: list[dict[str, Any]] = [{"a": "Größe", "b": 1}, {"a": "small", "b": ["deep", "größe"]}]
    assert search_rows(rows, "GRÖSSE") == rows
    assert search_rows(rows, "größe deep") == rows[1:]
    assert search_rows(rows, " ") == rows


def test_parity_in_words() -> None:
    parity = {
        "passed": True, "prompts": 4, "tokens": 1600, "max_abs_logprob_diff": 3e-6,
        "greedy_equal": False, "tolerance": 1e-3,
    }  # fmt: skip
    assert "but for exact ties" in describe_parity(parity)
    assert "1,600 tokens" in describe_parity(parity)
    assert "NOT" in describe_parity(parity | {"passed": False})


def sweep_of(tmp_path: Any, trials: list[dict[str, Any]], best: dict[str, Any] | None) -> Any:
    keys = ["data.num_train_examples", "model.base"]
    workspace = Workspace(tmp_path)
    with workspace.draft("sweeps", "s", "f" * 64) as draft:
        pq.write_table(pa.Table.from_pylist(trials), draft.path / "trials.parquet")
        (draft.path / "curve.json").write_text(
            json.dumps(
                {
                    "metric": "exact_match",
                    "keys": keys,
                    "curves": learning_curves(trials, keys),
                    "best": best,
                }
            )
        )
        draft.publish(config={}, resources={}, inputs=[], metrics={})
    return read_sweep(workspace.open("sweeps/s"))


def trial(size: int, score: float | None, problem: str = "") -> dict[str, Any]:
    return {
        "data.num_train_examples": size, "model.base": "m", "num_train_examples": size,
        "num_parameters": 135_000_000, "model": None if score is None else f"models/s-{size}@v1",
        "score": score, "low": score, "high": score, "loss": score, "wall_s": 61.4,
        "status": "failed" if problem else "done", "problem": problem,
    }  # fmt: skip


def test_a_sweep_has_points_lines_and_problems(tmp_path: Any) -> None:
    trials = [trial(100, 0.2), trial(200, 0.3), trial(400, 0.4), trial(800, None, "out of memory")]
    view = sweep_of(tmp_path, trials, {"trial": 2, "model": "models/s-400@v1"})
    assert [(end["rows"], round(end["score"], 6)) for end in view.lines] == [(100, 0.2), (400, 0.4)]
    assert view.sentences == [
        "model.base=m: +10.0 points for each doubling of the training rows; "
        "the points lie 0.0 points from the line on average."
    ]
    assert [point["best"] for point in view.points] == [False, False, True]
    assert view.best_words.startswith("40.0% with data.num_train_examples=400")
    assert view.problems == [("data.num_train_examples=800, model.base=m", "out of memory")]
    assert view.trials[3]["exact_match"] == "–"
    assert view.percent


def test_a_sweep_without_any_score_is_shown_all_the_same(tmp_path: Any) -> None:
    view = sweep_of(tmp_path, [trial(100, None, "no"), trial(200, None, "no")], None)
    assert (view.points, view.lines, view.best) == ([], [], "")
    assert len(view.problems) == 2
