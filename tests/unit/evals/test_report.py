"""What an evaluation says: headline, next steps, examples, the page and the terminal."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from evaluations import (
    TASKS,
    make_config,
    make_evaluation,
    situation,
)
from tuneloop.evals.reporting.advice import advise
from tuneloop.evals.reporting.error_analysis import Filter
from tuneloop.evals.reporting.formatting import word_diff
from tuneloop.evals.reporting.headline import describe_rows, direction, write_headline
from tuneloop.evals.reporting.overview import describe_metrics, prompt_labels, tabulate, without_end
from tuneloop.evals.reporting.report import render_report
from tuneloop.evals.reporting.views import describe_trainings, show_examples
from tuneloop.evals.scoring.comparison import compare, summarise
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.metrics import Metric, Scorer
from tuneloop.evals.scoring.pairing import last_question


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


@pytest.mark.parametrize(("low", "is_same"), [(0.2, True), (None, False)])
def test_trainings_without_an_interval_are_not_said_to_be_alike(low, is_same) -> None:
    scores = [{"name": f"m@v{n}", "scores": {"accuracy": {"value": n / 4}}} for n in (1, 2)]
    arm = {"models": scores, "scores": {"accuracy": {"low": low}}}
    told = describe_trainings(arm, "accuracy", Metric("right", kind="ratio"))
    assert told.startswith("2 trainings of one recipe, whose mean is the score: m@v1 25.0%, ")
    assert ("on the same rows" in told) is is_same
