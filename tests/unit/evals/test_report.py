"""What an evaluation says: headline, next steps, examples, the page and the terminal."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.advice import advice_for
from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import GenerationConfig, TuneloopConfig
from tuneloop.evals.reporting.actions import Action, Gain
from tuneloop.evals.reporting.advice import Situation, advise
from tuneloop.evals.reporting.error_analysis import Filter
from tuneloop.evals.reporting.formatting import word_diff
from tuneloop.evals.reporting.headline import describe_rows, direction, write_headline
from tuneloop.evals.reporting.history import history
from tuneloop.evals.reporting.overview import describe_metrics, prompt_labels, tabulate, without_end
from tuneloop.evals.reporting.report import render_report
from tuneloop.evals.reporting.situation import (
    Change,
    Step,
    after_what_came,
    fitting_curves,
)
from tuneloop.evals.reporting.views import describe_trainings, show_examples
from tuneloop.evals.scoring.comparison import compare, summarise
from tuneloop.evals.scoring.error_tags import tag_errors
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.metrics import Metric, Scorer
from tuneloop.evals.scoring.nearest import as_nearest
from tuneloop.evals.scoring.pairing import last_question
from tuneloop.evals.scoring.predictions import (
    FILE,
    Prediction,
    StoredPredictions,
    write_predictions,
)
from tuneloop.evals.scoring.references import changed_references
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.marks import Mark
from tuneloop.records import TRAIN_LIMIT
from tuneloop.review.given import GivenAdvice
from tuneloop.review.store import URL_VARIABLE, ReviewStore

TASKS = {
    "extraction": ({"type": "extraction"}, '{"a": 1}', '{"a": 2}'),
    "classification": ({"type": "classification", "labels": ["yes", "no"]}, "yes", "no"),
    "generation": ({"type": "generation"}, "a red fox ran", "a blue whale swam"),
    "language_modeling": ({"type": "language_modeling"}, "", ""),
}


def make_config(task: dict) -> TuneloopConfig:
    return TuneloopConfig.model_validate(
        {
            "name": "demo",
            "task": task,
            "model": {"base": "parrot"},
            "data": {"sources": [{"path": "rows.jsonl", "format": "messages"}]},
        }
    )


def make_evaluation(
    right: dict[str, int],
    n: int = 100,
    task: str = "extraction",
    wrong_answer: str | None = None,
    finish: str = "stop",
) -> Evaluation:
    """Return an evaluation in which each arm has its first `right` examples right."""
    settings, reference, wrong = TASKS[task]
    config = make_config(settings)
    ids = [f"r{index:03d}" for index in range(n)]
    scorer = Scorer(config.task, dict.fromkeys(ids, reference))
    rows = []
    for arm, num_right in right.items():
        for index, example in enumerate(ids):
            good = index < num_right
            text = reference if good else wrong if wrong_answer is None else wrong_answer
            reason = "stop" if good else finish
            plain = task == "language_modeling"
            rows.append(
                Prediction(
                    example, arm, json.dumps([{"role": "user", "content": f"Q {example}"}]),
                    reference, text, reason, 12, 5, 0.2, "scored", "",
                    [] if plain else tag_errors(scorer, reference, text, reason),
                    {"bits_per_byte": 1.0 - good * 0.5 + index / 1000}
                    if plain else scorer.score(reference, text),
                )
            )  # fmt: skip
    resampling = Resampling(num_resamples=300)
    return Evaluation(
        "demo", rows, summarise(rows, scorer, resampling), compare(rows, scorer, resampling)
    )


@pytest.mark.parametrize(
    ("right", "tone", "title"),
    [
        ({"base": 5, "base+few-shot": 30, "finetuned": 90}, "good", "Finetuning helped"),
        ({"base": 60, "finetuned": 20}, "bad", "Finetuning made it worse"),
        (
            {"base": 50, "finetuned": 51},
            "unclear",
            "Finetuning made no difference of 5 points or more",
        ),
        (
            {"base": 5, "base+few-shot": 62, "finetuned": 61},
            "mixed",
            "Finetuning is better than the base model but is within 5 points of few-shot prompting",
        ),
        (
            {"base": 5, "base+few-shot": 90, "finetuned": 60},
            "mixed",
            "Finetuning is better than the base model but is worse than few-shot prompting",
        ),
        ({"base": 5, "base+few-shot": 30}, "good", "Few-shot prompting helped"),
        ({"base": 50}, "unclear", "The base model: 50.0% (40.4 to 59.6)"),
    ],
)
def test_the_headline_says_only_what_the_intervals_allow(right, tone, title):
    headline = write_headline(make_evaluation(right))
    assert (headline.tone, headline.title) == (tone, title)


@pytest.mark.parametrize("n", range(1, 6))
def test_a_handful_of_rows_decides_nothing(n):
    # All of them fixed: McNemar's exact test gives p = 2 / 2**n, above 0.05 up to five rows.
    evaluation = make_evaluation({"base": 0, "finetuned": n}, n)
    headline = write_headline(evaluation)
    assert (headline.tone, headline.title) == (
        "unclear",
        "Finetuning made no clear difference: too few test rows to tell",
    )
    assert evaluation.comparison["pairs"][0]["differences"]["exact_match"]["p_value"] > 0.05
    if n > 1:
        assert f"{n} answers show a difference of" in headline.detail
        assert "in four of five cases" in headline.detail
        # No two scores are more than 100 points apart.
        evaluation.comparison["pairs"][0]["differences"]["exact_match"]["detectable"] = 1.65
        detail = write_headline(evaluation).detail
        assert f"{n} answers are too few for any difference to show in four of five cases" in detail
        assert "165" not in detail
    if n > 3:
        assert f"but p = {2 / 2**n:.3f}" in headline.detail
    certain = write_headline(make_evaluation({"base": 0, "finetuned": 6}, 6))
    assert certain.title == "Finetuning helped"


def test_a_margin_tells_not_worse_apart_from_unclear():
    evaluation = make_evaluation({"base": 80, "finetuned": 80}, wrong_answer='{"a": 3}')
    moved = evaluation.predictions
    # The arms are right in other rows: 10 fixed, 10 introduced.
    swapped = [
        replace(p, scores={**p.scores, "exact_match": float(10 <= int(p.example_id[1:]) < 90)})
        if p.arm == "finetuned"
        else p
        for p in moved
    ]
    scorer = Scorer(make_config(TASKS["extraction"][0]).task, {})
    fast = Resampling(num_resamples=300)

    def title(margin):
        compared = compare(swapped, scorer, fast, margin)
        return write_headline(replace(evaluation, predictions=swapped, comparison=compared)).title

    assert title(None) == "Finetuning made no clear difference: too few test rows to tell"
    assert title(0.02) == "Finetuning made no clear difference: too few test rows to tell"
    assert title(0.2) == "Finetuning made no difference of 20 points or more"


def test_better_must_hold_if_the_missing_answers_are_wrong():
    evaluation = make_evaluation({"base": 40, "finetuned": 60})
    assert write_headline(evaluation).title == "Finetuning helped"
    scorer = Scorer(make_config(TASKS["extraction"][0]).task, {})
    fast = Resampling(num_resamples=300)
    lost = [
        replace(p, status="unscored", finish_reason=None, scores={}, error="HTTP 503: busy")
        if p.arm == "finetuned" and p.example_id < "r025"
        else p
        for p in evaluation.predictions
    ]
    evaluation = replace(
        evaluation,
        predictions=lost,
        metrics=summarise(lost, scorer, fast),
        comparison=compare(lost, scorer, fast),
    )
    headline = write_headline(evaluation)
    assert (
        headline.title
        == "Finetuning made no clear difference: too many answers are missing to tell"
    )
    assert "the finetuned model between 35.0% and 60.0%" in headline.detail


def test_no_difference_must_hold_if_the_missing_answers_are_right():
    evaluation = make_evaluation({"base": 40, "finetuned": 40})
    name = evaluation.primary
    told = {"value": 0.0, "low": -0.01, "high": 0.02, "p_adjusted": 1.0}

    def said(worst_case, margin=None):
        comparison = {**evaluation.comparison, "margin": margin}
        pair = {"differences": {name: told}, "worst_case": worst_case}
        return direction(replace(evaluation, comparison=comparison), pair, name)

    assert said({"low": -0.01, "high": 0.03}) == "equal"
    assert said({"low": -0.01, "high": 0.12}) == "unclear"
    assert said({"low": -0.01, "high": 0.12}, margin=0.05) == "not_worse"
    assert said({"low": -0.12, "high": 0.01}, margin=0.05) == "unclear"


def test_answers_are_counted_in_their_clusters():
    evaluation = make_evaluation({"base": 5, "finetuned": 60})
    scorer = Scorer(make_config(TASKS["extraction"][0]).task, {})
    fast = Resampling(num_resamples=300)

    def clustered(num_clusters, by):
        rows = [
            replace(p, cluster=f"c{int(p.example_id[1:]) % num_clusters}")
            for p in evaluation.predictions
        ]
        metrics, compared = summarise(rows, scorer, fast, by), compare(rows, scorer, fast)
        return replace(evaluation, predictions=rows, metrics=metrics, comparison=compared)

    def counted(num_clusters, by):
        one = clustered(num_clusters, by)
        return describe_rows(one, one.candidate["scores"]["exact_match"])

    assert counted(24, "module") == "100 answers in 24 modules"
    assert counted(24, "query") == "100 answers in 24 queries"
    assert counted(24, "doc_id") == "100 answers in 24 values of `doc_id`"
    assert counted(100, "module") == "100 answers"
    alone = clustered(1, "module")
    assert "no interval: 100 answers in one module" in write_headline(alone).detail
    assert write_headline(alone).tone == "unclear"
    page = render_report(clustered(24, "module"), make_config({"type": "extraction"}), "d")
    assert "100 answers in 24 modules" in page
    assert tabulate(clustered(24, "module")).arms[0]["scored"] == "100 answers in 24 modules"


def test_the_headline_gives_difference_and_interval_against_every_other_arm():
    detail = write_headline(
        make_evaluation({"base": 5, "base+few-shot": 30, "finetuned": 90})
    ).detail
    assert re.fullmatch(
        r"\+85\.0 points \(95% interval \+7\d\.\d to \+\d+\.\d\) over the base model; "
        r"\+60\.0 points \(95% interval \+4\d\.\d to \+6\d\.\d\) over few-shot prompting\.",
        detail,
    )


def test_lower_bits_per_byte_is_an_improvement():
    evaluation = make_evaluation({"base": 0, "finetuned": 80}, task="language_modeling")
    assert write_headline(evaluation).title == "Finetuning helped"
    assert write_headline(evaluation).detail.startswith("−0.400 (95% interval −0.4")
    assert evaluation.strongest_other() == "base"


@pytest.mark.parametrize(("n", "tone"), [(3, "unclear"), (30, "good")])
def test_equal_differences_convince_only_when_there_are_enough(n, tone):
    assert (
        write_headline(make_evaluation({"base": 0, "finetuned": n}, n, "generation")).tone == tone
    )


def test_a_tie_in_everything_is_no_clear_difference():
    evaluation = make_evaluation({"base": 0, "finetuned": 0}, task="generation")
    assert write_headline(evaluation).tone == "unclear"


def steps(evaluation: Evaluation, **more) -> str:
    actions = advise(situation(evaluation, **more))
    return "\n".join(f"{a.title}. {a.why} {a.command}" for a in actions)


def test_actions_follow_the_errors():
    cut = make_evaluation({"base": 0, "finetuned": 80}, wrong_answer='{"a": ', finish="length")
    assert "evaluation.max_tokens" in steps(cut)
    assert "training.num_epochs" in steps(cut)
    assert "training.num_epochs" in steps(make_evaluation({"base": 50, "finetuned": 50}))
    assert "than the base model" in steps(make_evaluation({"base": 50, "finetuned": 50}))
    wide = make_evaluation({"base": 0, "finetuned": 10}, n=20)
    assert "run demo.yaml data.split.num_test_examples=" in steps(wide, num_spare_rows=1_000)
    assert "So many are not to spare" in steps(wide, num_spare_rows=100)
    # Seven answers cannot tell; that comes before any conclusion from what is not clearly better.
    few = steps(make_evaluation({"base": 3, "finetuned": 4}, 7, "generation"))
    assert few.index("Score more test examples") < few.index("Train for 3 epochs")
    assert "harder" in steps(make_evaluation({"base": 0, "finetuned": 100}))
    worse = make_evaluation({"base": 50, "finetuned": 30})
    assert "got worse" in steps(worse)
    # What is measured comes before every bound.
    first = advise(situation(worse))[0]
    assert first.title == "Use the base model until training brings more"
    assert first.basis == "measured"
    assert first.gain is not None
    assert first.gain.value == pytest.approx(0.2)
    assert 0.1 < first.gain.low < 0.2 < first.gain.high < 0.3
    # A handful that is right says nothing yet.
    handful = steps(make_evaluation({"base": 0, "finetuned": 8}, n=8))
    assert "harder" not in handful
    assert "Train for" not in handful
    assert "Score more test examples" in handful
    assert "max_tokens" not in steps(make_evaluation({"base": 0, "finetuned": 80}))
    # Words in common say nothing about the truth; exact answers need no vote.
    writing = make_evaluation({"base": 0, "finetuned": 80}, task="generation")
    assert "judge the answers blind" in steps(writing)
    assert "blind" not in steps(make_evaluation({"base": 0, "finetuned": 80}))


def test_a_lagging_field_is_named():
    settings = {"type": "extraction"}
    reference, wrong = '{"name": "x", "year": 1}', '{"name": "x", "year": 2}'
    scorer = Scorer(make_config(settings).task, {"r": reference})
    rows = [
        Prediction(
            f"r{index}", "finetuned", "[]", reference, text, "stop", 1, 1, 0.1, "scored",
            scores=scorer.score(reference, text),
        )
        for index, text in enumerate([reference] * 6 + [wrong] * 4)
    ]  # fmt: skip
    resampling = Resampling(num_resamples=200)
    evaluation = Evaluation(
        "demo", rows, summarise(rows, scorer, resampling), compare(rows, scorer, resampling)
    )
    (lagging,) = (a for a in advise(situation(evaluation)) if a.title.startswith("Get `"))
    assert "`year`" in lagging.title
    assert lagging.why == "4 of 4 wrong answers are wrong in this field alone."


def test_report_and_dashboard_show_the_same_examples_first():
    evaluation = make_evaluation({"base": 3, "base+few-shot": 5, "finetuned": 18}, n=20)
    shuffled = replace(evaluation, predictions=evaluation.predictions[::-1])
    for group in show_examples(shuffled):
        other = {"the base model": "base", "few-shot prompting": "base+few-shot"}[group["words"]]
        page = evaluation.pair(other, "finetuned")
        for change in group["changes"]:
            name = {"Got better": "fixed", "Still wrong": "both_wrong"}[change["label"]]
            chosen = Filter(change=name).choose(page)
            assert change["count"] == len(chosen)
            assert [e["id"] for e in change["examples"]] == [e.example_id for e in chosen[:5]]
            counts = next(p for p in evaluation.candidate_pairs() if p["other"] == other)
            assert counts["outcomes"][name] == len(chosen)


def test_word_diff_keeps_every_character_of_both_sides():
    reference, completion = "Return  the size\nof it.", "Return the length of it!"
    pieces = word_diff(reference, completion)
    assert "".join(text for kind, text in pieces if kind != "missing") == completion
    assert "".join(text for kind, text in pieces if kind != "extra") == reference
    assert ("extra", "length") in [(kind, text.strip()) for kind, text in pieces]


def test_long_texts_are_compared_by_words_and_endless_repetition_not_at_all():
    words = [f"word{i % 700}" for i in range(2000)]
    pieces = word_diff(" ".join(words), " ".join([*words[:500], "new", *words[501:]]))
    assert [(kind, text) for kind, text in pieces if kind != "same"] == [
        ("missing", "word500 "), ("extra", "new "),
    ]  # fmt: skip
    # Word by word this pair took minutes.
    first, second = "round and about " * 700, "about and round " * 700
    assert word_diff(first, second) == [("missing", first), ("extra", second)]


def test_the_last_question_of_a_stored_prompt_or_the_text_itself():
    assert last_question('[{"role": "user", "content": "hi"}]') == "hi"
    assert last_question("[not json") == "[not json"
    assert last_question("[1, 2]") == "[1, 2]"


class Page(HTMLParser):
    """Collects the tags, what they load, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("right", [{"base": 2, "base+few-shot": 9, "finetuned": 15}, {"base": 3}])
def test_every_task_gets_a_page_that_loads_nothing(task, right):
    evaluation = make_evaluation(right, n=20, task=task)
    actions = advise(situation(evaluation))
    text = render_report(evaluation, make_config(TASKS[task][0]), "datasets/demo@v1", actions)
    assert all(html.escape(a.command) in text for a in actions)
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert not {"script", "link", "img", "iframe"} & page.tags
    assert "http" not in re.sub(r"http-equiv|over HTTP", "", text).replace("HTTP", "")
    assert write_headline(evaluation).title.split(":")[0] in text
    assert "20 held-out examples" in text
    assert "datasets/demo@v1" in text


def test_answers_cannot_break_out_of_the_page():
    attack = "</pre><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7 * 7 }}"
    evaluation = make_evaluation({"base": 2, "finetuned": 15}, n=20, wrong_answer=attack)
    text = render_report(evaluation, make_config(TASKS["extraction"][0]), "datasets/demo@v1")
    assert not {"script", "img"} & Page(text).tags
    # A diff may cut the text; no part of it became markup.
    assert "<script" not in text
    assert "default-src 'none'" in text


def test_tables_for_pages_carry_the_same_numbers():
    tables = tabulate(make_evaluation({"base": 5, "finetuned": 90}))
    assert [row["arm"] for row in tables.arms] == ["base", "finetuned"]
    assert tables.pairs[0]["difference"] == "+85.0 points"
    assert (tables.pairs[0]["better"], tables.pairs[0]["worse"]) == (85, 0)
    assert describe_metrics({"primary": "f1", "scores": {"base": 0.123456}, "none": None}) == (
        "f1: base 0.1235"
    )
    rows = {"num_train_rows": 1200, "num_test_rows": 112, "num_removed": 3}
    assert describe_metrics(rows) == "1,200 train and 112 test rows, 3 removed"


def test_prompts_of_one_task_are_told_apart_by_what_they_do_not_share():
    start = "<|im_start|>system\nAnswer with JSON.<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    prompts = [f"{start}def {name}(self):\nDo it.{end}" for name in ("open", "opened", "close")]
    assert list(prompt_labels(prompts).values()) == [
        "1. open(self):", "2. opened(self):", "3. close(self):",
    ]  # fmt: skip
    assert list(prompt_labels(["<s>one"]).values()) == ["1. <s>one"]
    assert without_end('{"a": 1}<|im_end|>\n') == '{"a": 1}'
    assert without_end("<p>a</p>") == "<p>a</p>"


def situation(evaluation: Evaluation, **more) -> Situation:
    told = {
        "reference": "evaluations/demo@v1", "config_file": "demo.yaml", "took_s": 100.0,
        "num_epochs": 2, "curve": {}, "num_waiting": 0, "trained_s": 60.0, "max_tokens": 80,
    }  # fmt: skip
    return Situation(evaluation, **{**told, **more})


def titles(actions: list[Action]) -> list[str]:
    return [action.title for action in actions]


def test_one_model_in_two_forms_is_one_opinion_of_a_reference() -> None:
    doubt = "Look whether these references are right"
    two = {"base": 5, "finetuned+constrained": 80, "finetuned": 80}
    evaluation = make_evaluation(two)
    (doubtful,) = (a for a in advise(situation(evaluation)) if a.title == doubt)
    assert doubtful.gain is not None
    assert doubtful.gain.value == pytest.approx(0.2)
    del two["base"]
    evaluation = make_evaluation(two)
    bound = next(arm for arm in evaluation.arms if arm["name"] == "finetuned+constrained")
    bound["free_arm"] = "finetuned"
    assert doubt not in titles(advise(situation(evaluation)))


def test_of_many_labels_the_worst_are_shown_and_the_others_folded() -> None:
    evaluation = make_evaluation({"base": 5, "finetuned": 80}, task="classification")
    for arm in evaluation.arms:
        arm["label_f1"] = {f"label {n:02d}": 1 - n / 100 for n in range(25)}
    page = render_report(evaluation, make_config(TASKS["classification"][0]), "datasets/demo@v1")
    shown, _, folded = page.partition("<summary>The other 15 labels</summary>")
    assert [n for n in range(25) if f"<code>label {n:02d}</code>" in shown] == [*range(15, 25)]
    assert shown.index("label 24") < shown.index("label 23")
    assert "<code>label 00</code>" in folded
    assert "Each part of the answer" not in page


def test_only_rows_that_ask_the_same_are_said_to_mislead() -> None:
    evaluation = make_evaluation({"base": 5, "finetuned": 80}, task="classification")
    for similarity, num_rows in ((0.3, []), (0.9, [20])):
        row = {"conflicts": True, "similarity": similarity}
        near = as_nearest([row | {"example_id": p.example_id} for p in evaluation.predictions])
        actions = advise(situation(replace(evaluation, nearest=near)))
        assert [a.num_rows for a in actions if "say otherwise" in a.title] == num_rows


def test_advice_from_the_stored_columns_is_that_from_the_rows(tmp_path: Path) -> None:
    made = make_evaluation({"base": 5, "other": 70, "finetuned": 60}, wrong_answer="{", n=90)
    rows = [
        replace(
            p,
            completion=p.completion if number % 7 else f" {p.completion}\n{number}",
            error_tags=[*p.error_tags, *["cut_off"] * (number % 3 == 0)],
            cluster=str(number % 30) * (number % 2),
        )
        for number, p in enumerate(made.predictions)
    ]
    # One answer is missing.
    rows[-1] = replace(rows[-1], status="unscored", scores={}, completion="", error_tags=[])
    names = list(made.metrics["metrics"])
    write_predictions(rows, names, tmp_path)
    stored = replace(made, predictions=StoredPredictions(tmp_path, names))
    near = as_nearest([{"example_id": "r070", "conflicts": True, "similarity": 0.9}])
    first, second = (
        advise(situation(replace(one, nearest=near)))
        for one in (replace(made, predictions=rows), stored)
    )
    assert first == second
    titles = [action.title for action in first]
    for begin in ("Allow longer", "Teach the form", "Look whether", "Read what got worse"):
        assert any(title.startswith(begin) for title in titles), begin
    assert list(stored.predictions) == rows
    # A file of an earlier version, without some of the columns.
    table = pq.read_table(tmp_path / FILE)
    pq.write_table(table.drop_columns(["cluster", "error_tags"]), tmp_path / FILE)
    old = replace(made, predictions=StoredPredictions(tmp_path, names))
    plain = [replace(p, cluster="", error_tags=[]) for p in rows]
    assert advise(situation(old)) == advise(situation(replace(made, predictions=plain)))


def test_bounds_are_the_share_of_what_is_wrong() -> None:
    evaluation = make_evaluation({"base": 5, "finetuned": 80}, finish="length", wrong_answer="{")
    actions = advise(situation(evaluation))
    assert not any(a.title.startswith("Teach answers to end") for a in actions)
    cut = next(a for a in actions if a.title == "Allow longer answers")
    assert cut.gain is not None
    assert cut.gain.value == pytest.approx(0.2)
    assert 0.1 < cut.gain.low < 0.2 < cut.gain.high < 0.31
    assert (cut.num_rows, cut.basis) == (20, "at most")
    assert "20 of 20 wrong answers" in cut.why
    assert cut.command == "tuneloop evaluate demo.yaml evaluation.max_tokens=160"
    # Both arms say the same, and it is not the reference.
    doubted = next(a for a in actions if a.title.startswith("Look whether"))
    assert doubted.num_rows == 20
    # The only field is wrong wherever the answer is.
    field = next(a for a in actions if a.title.startswith("Get `a` right"))
    assert field.gain == cut.gain
    assert "wrong=a" in field.page
    # By words in common no answer is taken to become all right: those cut off become like the rest.
    words = make_evaluation({"finetuned": 80}, task="generation", finish="length", wrong_answer="a")
    (overlap,) = (a for a in advise(situation(words)) if a.title == "Allow longer answers")
    assert overlap.gain is not None
    assert overlap.gain.value == pytest.approx(0.2)
    rows = [replace(p, scores={**p.scores, "token_f1": 0.4}) if p.example_id < "r080" else p
            for p in words.predictions]  # fmt: skip
    (overlap,) = (
        a for a in advise(situation(replace(words, predictions=rows))) if "longer" in a.title
    )
    assert overlap.gain is not None
    assert overlap.gain.value < 0.2 * 0.4 + 1e-9
    # As long as its reference and still going on: a higher limit is no help.
    evaluation = make_evaluation({"base": 5, "finetuned": 80}, finish="length")
    endless = advise(situation(evaluation))
    assert "Allow longer answers" not in titles(endless)
    taught = next(a for a in endless if a.title.startswith("Teach answers to end: train for 3"))
    assert (taught.num_rows, taught.gain, taught.cost_s) == (20, cut.gain, 130)
    assert taught.command == "tuneloop run demo.yaml training.num_epochs=3"
    assert [a.gain is None for a in actions] == sorted(a.gain is None for a in actions)
    longer = next(a for a in actions if a.title.startswith("Teach the form of the answer"))
    assert longer.cost_s == 130  # half of the training more, the rest as before
    assert longer.command == "tuneloop run demo.yaml training.num_epochs=3"


def test_commands_take_the_rows_that_are_there_and_change_nothing_else() -> None:
    evaluation = make_evaluation({"base": 5, "finetuned": 80})
    more = {"num_train_rows": 300, "num_spare_rows": 200, "kept": ["training.num_epochs=2"]}
    commands = {a.title: a.command for a in advise(situation(evaluation, **more))}
    taken = "tuneloop run demo.yaml data.num_train_examples=500 training.num_epochs=2"
    assert commands["Get `a` right: train on 500 rows in place of 300"] == taken
    assert list(commands.values()).count(taken) == 1
    longer = "tuneloop run demo.yaml training.num_epochs=3"
    assert commands["Train for 3 epochs in place of 2"] == longer
    assert commands["Measure whether more rows would help"] == (
        "tuneloop sweep demo.yaml 'sweep.parameters={data.num_train_examples: [75, 150, 300]}' "
        "training.num_epochs=2"
    )
    named = [a.command for a in advise(situation(evaluation, **more, has_arms=True))]
    assert taken.replace("run", "train") + " && " + taken.replace("run", "evaluate") in named
    # Without spare rows, 100 of the train rows become those that a sweep chooses by.
    more["num_spare_rows"] = 0
    commands = {a.title: a.command for a in advise(situation(evaluation, **more))}
    assert "[50, 100, 200]" in commands["Measure whether more rows would help"]
    assert not any("num_train_examples=" in command for command in commands.values())
    few = advise(situation(evaluation, **{**more, "num_train_rows": 120}))
    assert "Measure whether more rows would help" not in titles(few)


def test_a_field_that_a_row_does_not_have_is_not_wrong_in_it() -> None:
    references = ['{"a": 1, "b": 2}'] * 10 + ['{"a": 1}'] * 10
    # Four rows without `b` are wrong in `a` alone; in six more a `b` is invented.
    said = [*references[:10], *['{"a": 2}'] * 4, *['{"a": 1, "b": 3}'] * 6]
    ids = [f"r{number}" for number in range(20)]
    config = make_config({"type": "extraction"})
    scorer = Scorer(config.task, dict(zip(ids, references, strict=True)))
    rows = [
        Prediction(
            key, "finetuned", "[]", reference, text, "stop", 1, 1, 0.1, "scored",
            scores=scorer.score(reference, text),
        )
        for key, reference, text in zip(ids, references, said, strict=True)
    ]  # fmt: skip
    resampling = Resampling(num_resamples=100)
    told = summarise(rows, scorer, resampling), compare(rows, scorer, resampling)
    actions = advise(situation(Evaluation("demo", rows, *told)))
    found = {a.title.partition(" right")[0]: a.num_rows for a in actions if a.title[:3] == "Get"}
    assert found == {"Get `a`": 4, "Get `b`": 6}


def test_what_a_sweep_forecasts_and_marks_that_wait_are_named() -> None:
    evaluation = make_evaluation({"base": 5, "finetuned": 99})
    step, further = ({"value": v, "low": 0.01, "high": 0.06} for v in (0.04, 0.02))
    curve = {"curves": [{"series": "demo", "forecast": {"forecasts": [
        {"num_examples": 800, "times": 2, "step": step},
        {"num_examples": 1600, "times": 4, "step": further},
    ]}}]}  # fmt: skip
    actions = advise(situation(evaluation, curve=curve, num_waiting=3))
    assert (actions[0].gain, actions[0].basis) == (Gain(**step), "forecast")
    assert actions[0].title.endswith("800 in all")
    # A gain is told from as many rows as the model has, with the command where they are there.
    for now, spare, told in ((400, 500, (step, 800)), (800, 900, (further, 1600))):
        more = {"num_train_rows": now, "num_spare_rows": spare}
        found = advise(situation(evaluation, curve=curve, **more))
        (rows,) = (a for a in found if a.basis == "forecast")
        assert (rows.gain, rows.command) == (
            Gain(**told[0]), f"tuneloop run demo.yaml data.num_train_examples={told[1]}"
        )  # fmt: skip
    (rows,) = (a for a in advise(situation(evaluation, curve=curve, num_train_rows=400))
               if a.basis == "forecast")  # fmt: skip
    assert rows.why.endswith("First 400 rows have to be collected.")
    found = advise(situation(evaluation, curve=curve, num_train_rows=500, num_spare_rows=90))
    assert "forecast" not in {a.basis for a in found}
    (rows,) = (a for a in found if a.title == "Train on 590 rows in place of 500")
    assert rows.gain is None
    assert "Apply the marks that wait: 3" in titles(actions)
    assert "Stop, or make the test harder" in titles(actions)
    assert "Measure whether more rows would help" not in titles(actions)
    # Where nearly all is right, nothing is trained on.
    assert not any(title.startswith("Train for") for title in titles(actions))


def test_a_sweep_forecasts_for_its_own_settings_and_metric() -> None:
    rate, rows = "training.learning_rate", "data.num_train_examples"
    values = [{rate: r, rows: n} for r in (5e-4, 1e-5) for n in (100, 200)]
    curve = {
        "keys": [rate, rows],
        "metric": "exact_match",
        "cells": [{"values": value} for value in values],
        "curves": [
            {"series": f"{rate}={r}", "points": [[100, 0.5], [200, 0.6]]} for r in (5e-4, 1e-5)
        ],
    }
    found = fitting_curves(curve, {rate: 1e-5}, "exact_match")
    assert [one["series"] for one in found["curves"]] == [f"{rate}=1e-05"]
    assert fitting_curves(curve, {rate: 1e-5}, "fields_f1")["curves"] == []
    assert fitting_curves(curve, {rate: 1e-3}, "exact_match")["curves"] == []
    line = {"series": "", "points": [[100, 0.5], [200, 0.6]]}
    alone = {"keys": [rows], "metric": "exact_match", "cells": [], "curves": [line]}
    assert fitting_curves(alone, {}, "exact_match") == alone
    assert fitting_curves(alone, {}, "fields_f1")["curves"] == []
    assert fitting_curves({}, {}, "exact_match")["curves"] == []
    # Seeds or settings at one volume are no learning curve.
    level = {**alone, "curves": [{"series": "", "points": [[100, 0.5], [100, 0.6]]}]}
    assert fitting_curves(level, {}, "exact_match")["curves"] == []


def test_a_sweep_without_volumes_or_of_other_settings_hides_no_learning_curve(
    tmp_path: Path,
) -> None:
    workspace = Workspace(tmp_path)
    steps = [{"num_examples": n, "times": t, "step": {"value": v, "low": 0.01, "high": 0.06}}
             for n, t, v in ((200, 2, 0.04), (400, 4, 0.02))]  # fmt: skip
    line = {"series": "", "points": [[50, 0.5], [100, 0.6]], "forecast": {"forecasts": steps}}
    level = {"series": "", "points": [[100, 0.6]]}

    def publish_sweep(keys: list[str], curve: dict, model: str) -> None:
        with workspace.draft("sweeps", "demo", f"{len(workspace.published())}s" * 8) as draft:
            content = {"keys": keys, "metric": "exact_match", "cells": [], "curves": [curve]}
            (draft.path / "curve.json").write_text(json.dumps(content))
            draft.publish(config={}, resources={}, inputs=[model], metrics={})

    def advised() -> list[str]:
        return titles(advice_for(workspace, "demo").actions)

    more, measure = "to 200 in all", "Measure whether more rows would help"
    publish_version(workspace, make_evaluation({"base": 5, "finetuned": 80}), 100, 1)
    assert measure in advised()
    publish_sweep([], level, "models/demo@v1")
    assert measure in advised()
    publish_sweep(["data.num_train_examples"], line, "models/demo@v1")
    publish_sweep([], level, "models/demo@v1")
    assert measure not in advised()
    assert any(title.endswith(more) for title in advised())
    # Trained for longer, more rows bring something else.
    publish_version(workspace, make_evaluation({"base": 5, "finetuned": 80}), 100, 2)
    assert measure in advised()
    assert not any(title.endswith(more) for title in advised())


def test_parts_that_are_surely_worse_are_named() -> None:
    evaluation = make_evaluation({"base": 5, "finetuned": 80})
    part = {"by": "topic", "slice": "x", "value": 0.2, "low": 0.1, "high": 0.4, "n": 20,
            "rest": 0.95, "p_adjusted": 0.001}  # fmt: skip
    slices = {"arms": {"finetuned": [part, {**part, "slice": "y", "p_adjusted": 0.2}]}}
    actions = advise(situation(replace(evaluation, slices=slices)))
    (named,) = (a for a in actions if "topic" in a.title)
    # Of a group that the split keeps in the test no row can be added.
    grouped = advise(situation(replace(evaluation, slices=slices), group_by="topic"))
    assert not any("topic" in title for title in titles(grouped))
    assert named.gain is not None
    assert tuple(named.gain) == pytest.approx((0.15, 0.11, 0.17))
    assert named.command == "tuneloop label-next INPUTS.csv demo.yaml"
    # Of macro-F1 the scores of parts, which are shares of right answers, are no bound.
    labels = make_evaluation({"base": 5, "finetuned": 80}, task="classification")
    together = advise(situation(replace(by_macro_f1(labels), slices=slices)))
    (named_too,) = (a for a in together if "topic" in a.title)
    assert (named_too.gain, named_too.num_rows) == (None, 20)
    assert named_too.why == "20 test rows are such: 20.0%, the others 95.0%."
    # Rows of one cluster have no interval, and so no bound.
    only = {"arms": {"finetuned": [{**part, "low": None, "high": None}]}}
    (untold,) = (
        a for a in advise(situation(replace(evaluation, slices=only))) if "topic" in a.title
    )
    assert (untold.gain, untold.basis, untold.num_rows) == (None, "unknown", 20)
    answers = {"endpoint": "http://x/v1", "model": "m", "kind": "answers"}
    answers["sources"] = [{"path": "x.csv", "format": "text"}]
    for teacher, command in (
        (answers, "generation.kind=self_instruct 'generation.sources=[]'"),
        ({**answers, "kind": "harder", "sources": []}, ""),
    ):
        more = {"teacher": GenerationConfig.model_validate(teacher), "num_wanted": 2}
        actions = advise(situation(replace(evaluation, slices=slices), **more))
        commands = {a.command for a in actions if "generate" in a.command}
        start = "tuneloop generate demo.yaml generation.more_of="
        assert commands == {
            f"{start}{what} {command}".strip() for what in ("evaluations/demo@v1", "marks")
        }


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("right", [{"base": 40}, {"base": 5, "finetuned": 90}])
def test_every_kind_of_evaluation_gets_advice(task, right) -> None:
    actions = advise(situation(make_evaluation(right, task=task)))
    assert all(json.dumps(action.as_dict()) for action in actions)
    assert actions or "finetuned" not in right


@pytest.mark.parametrize(
    ("value", "high", "is_last"), [(-0.001, 0.016, True), (0.004, 0.04, False), (0.02, 0.05, False)]
)
def test_what_has_just_hardly_helped_is_not_advised_first_again(value, high, is_last) -> None:
    evaluation = make_evaluation({"base": 5, "finetuned": 80}, finish="length")
    actions = advise(situation(evaluation))
    again = "Teach answers to end: train for 3 epochs in place of 2"
    assert again in titles(actions)[:-1]
    change = {"value": value, "low": -0.018, "high": high}
    metric = evaluation.metric(evaluation.primary)
    rows = {"data.num_train_examples": Change(100, 200)}
    other = Step(rows, {"value": 0.0, "low": 0.0, "high": 0.0})
    steps = [Step({"training.num_epochs": Change(1, 2)}, change), other]
    now = {"training.num_epochs": 2, "training.seed": 0}
    found = after_what_came(actions, steps, now, metric)
    assert sorted(titles(found)) == sorted(titles(actions))
    assert (titles(found)[-1] == again) == is_last
    if is_last:
        assert "brought −0.1 points (−1.8 to +1.6)" in found[-1].why
        # Another setting had changed: nothing is known about more epochs.
        assert after_what_came(actions, [other], now, metric) == actions
        # Fewer epochs had brought nothing: that says nothing of more.
        fewer = Step({"training.num_epochs": Change(3, 2)}, change)
        assert after_what_came(actions, [fewer], now, metric) == actions
        better = {"value": 0.1, "low": 0.05, "high": 0.15}
        found = after_what_came(actions, [*steps, Step(steps[0].changed, better)], now, metric)
        assert titles(found)[0] == again
        assert "brought +10.0 points (+5.0 to +15.0)" in found[0].why
        # Beside another change it cannot be told which of them helped.
        both = Step({**steps[0].changed, **rows}, better)
        assert after_what_came(actions, [both], now, metric) == actions


def publish_version(
    workspace: Workspace,
    evaluation: Evaluation,
    num_rows: int,
    num_epochs: int,
    max_tokens: int = 80,
    source: str = "a",
    **training: float,
) -> None:
    """Publish a dataset, a model and an evaluation of it."""
    dataset, model, own = (f"{len(workspace.published())}{kind}" * 8 for kind in "dme")
    origin = {"file": "demo.yaml", "overrides": ["workspace=here"]}
    origin["overrides"] += [f"training.{name}={value:.0e}" for name, value in training.items()]
    told = {
        "resources": {"configuration": origin, "concurrency": 2},
        "inputs": [],
        "metrics": {"num_train_rows": num_rows},
    }
    with workspace.draft("datasets", "demo", dataset) as draft:
        reason = {"stage": "split", "reason": f"{TRAIN_LIMIT} {num_rows} of the train split"}
        card = {"reasons": [{**reason, "rows": 1000 - num_rows}]}
        (draft.path / "card.json").write_text(json.dumps(card))
        split = {"num_test_examples": 20, "test_ratio": None}
        data = {"num_train_examples": num_rows, "split": split}
        draft.publish(config={"data": data}, **{**told, "inputs": [f"x.jsonl sha256:{source}"]})
    with workspace.draft("models", "demo", model) as draft:
        trained = {"num_epochs": num_epochs, **training}
        draft.publish(config={"dataset": dataset, "training": trained}, **told)
    publish_evaluation(workspace, evaluation, own, dataset, model, told, max_tokens)


def publish_evaluation(
    workspace: Workspace,
    evaluation: Evaluation,
    own: str,
    dataset: str,
    model: str,
    told: dict,
    max_tokens: int = 80,
) -> None:
    with workspace.draft("evaluations", "demo", own) as draft:
        # Macro-F1 is of all rows: it has no column.
        names = [name for name in evaluation.metrics["metrics"] if name != "macro_f1"]
        write_predictions(evaluation.predictions, names, draft.path)
        for name in ("metrics", "comparison"):
            text = json.dumps(getattr(evaluation, name))
            (draft.path / f"{name}.json").write_text(text)
        task = make_config(TASKS[evaluation.metrics["task_type"]][0]).task
        asked = {
            "dataset": dataset,
            "task": task.model_dump(mode="json"),
            "arms": [{"name": "finetuned", "model": model}],
            "evaluation": {"max_tokens": max_tokens},
        }
        draft.publish(config=asked, **told)


def by_macro_f1(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation whose answers macro-F1 decides about."""
    return replace(evaluation, metrics={**evaluation.metrics, "primary": "macro_f1"})


def test_versions_by_macro_f1_are_compared_and_by_another_metric_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    workspace = Workspace(tmp_path)
    first = make_evaluation({"base": 5, "finetuned": 80}, task="classification")
    publish_version(workspace, first, 100, 1)
    advice_for(workspace, "demo").keep()
    second = make_evaluation({"base": 5, "finetuned": 90}, task="classification")
    publish_version(workspace, by_macro_f1(second), 200, 1)
    # What was told is in points of accuracy.
    changed = advice_for(workspace, "demo")
    assert changed.outcomes == []
    changed.keep()
    third = make_evaluation({"base": 5, "finetuned": 96}, task="classification")
    publish_version(workspace, by_macro_f1(third), 400, 1)
    found = history(workspace.published(), "demo")
    assert [(i.metric, i.num_fixed, i.num_introduced) for i in found] == [
        ("accuracy", None, None), ("macro_f1", 10, 0), ("macro_f1", 6, 0)
    ]  # fmt: skip
    # All references are `yes`, so the mean over the labels is the F1 of that one.
    change = 2 * 0.96 / 1.96 - 2 * 0.9 / 1.9
    assert found[2].change["value"] == pytest.approx(change)
    assert 0 < found[2].change["low"] < change < found[2].change["high"]
    outcomes = advice_for(workspace, "demo").outcomes
    assert outcomes
    assert all(o.change == pytest.approx(change) for o in outcomes)
    # The next version answers other rows: nothing says what came.
    others = [replace(p, example_id=f"s{p.example_id}") for p in second.predictions]
    publish_version(workspace, by_macro_f1(replace(second, predictions=others)), 800, 1)
    assert advice_for(workspace, "demo").outcomes == outcomes
    assert history(workspace.published(), "demo")[-1].num_shared == 0


def test_a_corrected_reference_is_no_error_that_was_fixed(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    before = make_evaluation({"finetuned": 80})
    publish_version(workspace, before, 100, 1)
    # Six answers got better; five wrong ones are what their references were corrected to.
    now = make_evaluation({"finetuned": 86})
    corrected = [
        replace(p, reference=p.completion, scores=dict.fromkeys(p.scores, 1.0))
        if p.example_id >= "r095"
        else p
        for p in now.predictions
    ]
    publish_version(workspace, replace(now, predictions=corrected), 100, 1)
    last = history(workspace.published(), "demo")[-1]
    assert (last.num_fixed, last.num_introduced, last.num_shared) == (6, 0, 95)
    assert last.change
    assert last.change["value"] == pytest.approx(6 / 95)
    assert last.changed.endswith("; 5 rows not compared: right answers differ")


def test_rows_with_other_right_answers_are_found(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    # Several right answers are no change where they were so before; to accept one more is.
    for name, second, third in (("old", "p", []), ("new", "q", ["z"])):
        rows = [
            {
                "row_id": row,
                "messages": [
                    {"role": "user", "content": row},
                    {"role": "assistant", "content": answer},
                ],
                "accepted_answers": accepted,
            }
            for row, answer, accepted in (("a", "x", ["y"]), ("b", second, []), ("c", "r", third))
        ]
        with workspace.draft("datasets", name, name * 16) as draft:
            (draft.path / "test").mkdir()
            pq.write_table(pa.Table.from_pylist(rows), draft.path / "test" / "0.parquet")
            draft.publish(config={}, resources={}, inputs=[], metrics={})
    datasets = workspace.published("datasets")
    old, new = (
        Artifact("evaluations", "e", 1, tmp_path, "", {"config": {"dataset": name * 16}})
        for name in ("old", "new")
    )
    assert changed_references(old, new, datasets) == {"b", "c"}
    assert changed_references(old, old, datasets) == frozenset()


def test_marks_on_rows_scored_elsewhere_wait_for_the_next_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    workspace = Workspace(tmp_path)
    publish_version(workspace, make_evaluation({"base": 5, "finetuned": 80}), 100, 1)
    for kind, row in (("bad_row", "r1"), ("more_like_this", "r2")):
        ReviewStore(tmp_path).add(Mark(kind, row, "datasets/demo-scored@v1", "ann"))
    config = make_config({"type": "extraction"})
    asked = config.evaluation.model_copy(update={"sources": config.data.sources})
    scored = config.model_copy(update={"evaluation": asked})
    waiting = "Apply the marks that wait on rows of `evaluation.sources`: 1"
    commands = {a.title: a.command for a in advice_for(workspace, "demo", scored).actions}
    assert commands[waiting].startswith("tuneloop evaluate ")
    assert "Add training rows like those that people marked: 1" in commands
    # Nothing reads them where no such rows are scored.
    assert waiting not in titles(advice_for(workspace, "demo", config).actions)


@pytest.mark.parametrize(("source", "is_alone"), [("a", True), ("b", False)])
def test_what_other_rows_brought_is_not_said_of_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, is_alone: bool
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    workspace = Workspace(tmp_path)
    publish_version(workspace, make_evaluation({"base": 5, "finetuned": 60}), 100, 1)
    better = make_evaluation({"base": 5, "finetuned": 90})
    publish_version(workspace, better, 200, 1, source=source)
    (more,) = (a for a in advice_for(workspace, "demo").actions if "400 rows" in a.title)
    assert ("The last step of it brought" in more.why) is is_alone


def test_of_rows_scored_elsewhere_the_forecast_is_from_the_rows_that_were_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    workspace = Workspace(tmp_path)
    evaluation = make_evaluation({"base": 5, "finetuned": 80})
    publish_version(workspace, evaluation, 200, 1)
    told = {"resources": {}, "inputs": [], "metrics": {"num_train_rows": 0}}
    with workspace.draft("datasets", "demo-scored", "s" * 64) as draft:
        draft.publish(config={}, **told)
    (model,) = workspace.published("models")
    publish_evaluation(workspace, evaluation, "e" * 64, "s" * 64, model.fingerprint, told)
    line = {"series": "", "points": [[50, 0.5], [100, 0.6]], "forecast": {"forecasts": [
        {"num_examples": n, "times": t, "step": {"value": v, "low": 0.01, "high": 0.06}}
        for n, t, v in ((200, 2, 0.04), (400, 4, 0.02))
    ]}}  # fmt: skip
    with workspace.draft("sweeps", "demo", "w" * 64) as draft:
        keys = ["data.num_train_examples"]
        content = {"keys": keys, "metric": "exact_match", "cells": [], "curves": [line]}
        (draft.path / "curve.json").write_text(json.dumps(content))
        draft.publish(config={}, **told)
    (rows,) = (a for a in advice_for(workspace, "demo").actions if a.basis == "forecast")
    # Not the step from 100 rows, which is larger; and what is trained is scored on the same rows.
    assert rows.gain is not None
    assert (rows.gain.value, rows.title[-10:]) == (0.02, "400 in all")
    assert " && tuneloop evaluate demo.yaml" in rows.command


@pytest.mark.parametrize(("low", "is_same"), [(0.2, True), (None, False)])
def test_trainings_without_an_interval_are_not_said_to_be_alike(low, is_same) -> None:
    scores = [{"name": f"m@v{n}", "scores": {"accuracy": {"value": n / 4}}} for n in (1, 2)]
    arm = {"models": scores, "scores": {"accuracy": {"low": low}}}
    told = describe_trainings(arm, "accuracy", Metric("right", kind="ratio"))
    assert told.startswith("2 trainings of one recipe, whose mean is the score: m@v1 25.0%, ")
    assert ("on the same rows" in told) is is_same


def test_a_version_with_several_answers_to_a_row_is_compared_by_shares(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    second = make_evaluation({"finetuned": 60})
    halves = [replace(p, scores={**p.scores, "exact_match": 0.5}) for p in second.predictions]
    meanings = second.metrics["metrics"]
    meanings = {**meanings, "exact_match": {**meanings["exact_match"], "kind": "ratio"}}
    first = replace(second, predictions=halves, metrics={**second.metrics, "metrics": meanings})
    publish_version(workspace, first, 100, 1)
    publish_version(workspace, second, 100, 2)
    change = history(workspace.published(), "demo")[-1].change
    assert change is not None
    # 60 rows gained a half and 40 lost one: t with 99 degrees of freedom is 1.984.
    half = 1.984 * (0.24 / 99) ** 0.5
    ends = [change[name] for name in ("value", "low", "high")]
    assert ends == pytest.approx([0.1, 0.1 - half, 0.1 + half], abs=1e-4)


def test_a_setting_that_stays_as_it_was_is_nothing_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    workspace = Workspace(tmp_path)
    publish_version(workspace, make_evaluation({"finetuned": 80}), 100, 1, learning_rate=5e-4)
    first = advice_for(workspace, "demo")
    first.keep()
    assert all(
        "training.learning_rate=5e-04" in a.command for a in first.actions if " run " in a.command
    )
    same = "tuneloop run demo.yaml training.learning_rate=5e-4"
    given = GivenAdvice.of(first.reference, "Apply the marks", "unknown", "null", same)
    ReviewStore(tmp_path).add(given)
    publish_version(workspace, make_evaluation({"finetuned": 90}), 100, 2, learning_rate=5e-4)
    done = {o.title: o.was_done for o in advice_for(workspace, "demo").outcomes}
    assert done["Apply the marks"] is None
    assert done["Train for 2 epochs in place of 1"] is True


def test_advice_is_kept_and_held_against_the_next_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    workspace = Workspace(tmp_path)
    publish = partial(publish_version, workspace)
    publish(make_evaluation({"base": 5, "finetuned": 80}), 100, 1)
    first = advice_for(workspace, "demo")
    assert first.outcomes == []
    first.keep()
    first.keep()
    # Advised later, with the same command: what is forecast is judged, not the bound.
    command = next(a.command for a in first.actions if a.title.startswith("Get"))
    assert command == "tuneloop run demo.yaml data.num_train_examples=200 workspace=here"
    gain = json.dumps([0.2, 0.15, 0.25])
    late = GivenAdvice.of(first.reference, "Forecast", "forecast", gain, command)
    assert len(ReviewStore(tmp_path).advice()) == len(first.actions)
    publish(make_evaluation({"base": 5, "finetuned": 90}), 200, 1)
    second = advice_for(workspace, "demo")
    ReviewStore(tmp_path).add(late)
    both = f"{command.replace('run', 'train')} && {command.replace('run', 'evaluate')}"
    ReviewStore(tmp_path).add(GivenAdvice.of(first.reference, "Two", "unknown", "null", both))
    with_forecast = advice_for(workspace, "demo")
    assert [(o.title, o.came_true) for o in with_forecast.outcomes if o.was_done] == [
        ("Forecast", False), ("Two", None)
    ]  # fmt: skip
    assert with_forecast.calibration == "0 of 1 changes are within what was told"
    assert second.reference == "evaluations/demo@v2"
    assert len(second.outcomes) == len(first.actions)
    # Each of the 100 rows is its own cluster: 10 changed for the better, none for the worse.
    assert all(o.change == pytest.approx(0.1) for o in second.outcomes)
    assert all(0.03 < o.low < 0.06 < 0.14 < o.high < 0.19 for o in second.outcomes)
    done = [o for o in second.outcomes if o.was_done]
    assert [o.title for o in done] == ["Get `a` right: train on 200 rows in place of 100"]
    assert done[0].came_true
    undone = {o.title: o.was_done for o in second.outcomes}
    assert undone["Train for 2 epochs in place of 1"] is False
    # A sweep leaves no setting in the next version.
    assert undone["Measure whether more rows would help"] is None
    assert second.calibration == "1 of 1 changes are within what was told"
    words = done[0].describe(second.metric)
    assert "at most +20.0 points was told, +10.0 points (+" in words
    assert "came with evaluations/demo@v2 (datasets/demo@v2; data.num_train_examples" in words
    longer_command = f"{command} evaluation.max_tokens=80"
    same = GivenAdvice.of(first.reference, "Same", "at most", gain, longer_command)
    ReviewStore(tmp_path).add(same)
    outcomes = advice_for(workspace, "demo").outcomes
    assert [o.was_done for o in outcomes if o.title == "Same"] == [True]
    ReviewStore(tmp_path).add(Mark("bad_row", "r1", "datasets/demo@v1", "ann"))
    waiting = "Apply the marks that wait: 1"
    assert waiting in titles(advice_for(workspace, "demo").actions)
    data = make_config({"type": "extraction"}).data.model_copy(update={"fixes": False})
    unread = make_config({"type": "extraction"}).model_copy(update={"data": data})
    assert waiting not in titles(advice_for(workspace, "demo", unread).actions)
    # The file says other rows and answers: a command of the next advice keeps those of the version.
    config = make_config({"type": "extraction"})
    kept = advice_for(workspace, "demo", config)
    (longer,) = (a for a in kept.actions if "2 epochs" in a.title)
    assert longer.command.endswith(
        "training.num_epochs=2 data.num_train_examples=200 data.split.num_test_examples=20 "
        "data.split.test_ratio=null evaluation.max_tokens=80"
    )
    assert json.loads(json.dumps(second.as_dict()))["evaluation"] == "evaluations/demo@v2"
    # What differs in how answers were asked for is a change as well.
    second.keep()
    publish(make_evaluation({"base": 5, "finetuned": 90}), 200, 1, max_tokens=160)
    outcomes = advice_for(workspace, "demo").outcomes
    newest = {o.changed for o in outcomes if o.next_evaluation == "evaluations/demo@v3"}
    assert newest == {"datasets/demo@v3; models/demo@v3; evaluation.max_tokens: 80 → 160"}
