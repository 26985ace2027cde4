"""Every page of the dashboard over real artifacts, without a browser."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from page_parts import button, page_html
from tuneloop.artifacts import Workspace
from tuneloop.evals.reporting.overview import newest_comparison
from tuneloop.review.store import ReviewStore

APP = Path(__file__).parents[2] / "dashboards" / "app.py"

pytest.importorskip("streamlit", reason="the dashboard needs `pip install tuneloop[dashboard]`")


def test_the_style_sheet_has_nothing_that_looks_like_a_tag(monkeypatch):
    monkeypatch.syspath_prepend(str(APP.parent))
    from theme import CSS

    # Streamlit drops such a sheet without a word.
    assert re.findall(r"</?\w+>?", CSS) == ["<style>", "</style>"]


PAGES_OF_ARTIFACTS = [
    *("overview", "dataset", "model", "sweep", "report", "errors", "votes"),
    *("answers", "lineage", "marks", "history", "advice"),
]


@pytest.mark.parametrize("page", PAGES_OF_ARTIFACTS)
def test_an_empty_workspace_says_what_to_do(open_page, tmp_path, page):
    app = open_page(tmp_path / "none", page)
    assert app.main.subheader[0].value == "Nothing here yet"
    assert "make demo" in app.code[0].value
    assert not (tmp_path / "none").exists(), "looking changes nothing"


def test_a_workspace_that_cannot_be_opened_is_told(open_page, tmp_path):
    (tmp_path / "file").write_text("x")
    app = open_page(tmp_path / "file")
    assert "cannot be opened" in app.error[0].value
    assert "is a file" in app.code[0].value


@pytest.mark.parametrize(("page", "command"), [("errors", "evaluate"), ("sweep", "sweep")])
def test_a_workspace_without_this_kind_says_how_to_make_one(
    open_page, filled, tmp_path, page, command
):
    shutil.copytree(filled / "datasets", tmp_path / "datasets")
    app = open_page(tmp_path, page)
    assert "yet" in app.info[0].value
    assert app.code[0].value == f"tuneloop {command} CONFIG.yaml"


def test_the_overview_lists_artifacts_and_the_newest_verdict(open_page, filled):
    app = open_page(filled)
    assert "Finetuning helped" in app.success[0].value
    listed = app.dataframe[0].value
    assert set(listed["artifact"]) == {
        "evaluations/demo@v1", "sweeps/demo@v1", "models/demo@v1", "datasets/demo@v1",
    }  # fmt: skip
    numbers = dict(zip(listed["artifact"], listed["metrics"], strict=True))
    assert "finetuned 0.9333" in numbers["evaluations/demo@v1"]


def test_the_overview_prefers_a_comparison_to_a_lone_score(filled):
    (compared,) = [a for a in Workspace(filled).published() if a.kind == "evaluations"]
    lone = replace(compared, name="demo-sweep", manifest={"config": {"arms": [{}]}})
    many = {"config": {"arms": [{}, {}]}}
    compared, baseline = (
        replace(compared, manifest=many),
        replace(compared, name="demo-baseline", manifest=many),
    )
    assert newest_comparison([baseline, compared, lone]) is compared
    later = [replace(compared, name=f"demo-{made_by}") for made_by in ("export", "gate")]
    assert newest_comparison([compared, *later]) is compared
    assert newest_comparison([lone]) is lone
    assert newest_comparison([]) is None


def test_model_page_shows_curve_parity_and_card(open_page, filled):
    app = open_page(filled, "model")
    assert [s.value for s in app.subheader] == [
        "Loss", "Token accuracy", "Answers during training",
        "The export equals the trained model", "Model card",
    ]  # fmt: skip
    assert "of the validation split" in app.caption[1].value + app.caption[0].value
    assert any(caption.value == "Padding: 0.0% of the tokens computed." for caption in app.caption)
    assert "picks the same tokens" in app.success[0].value
    assert len(app.get("vega_lite_chart")) == 6
    assert list(app.selectbox[-1].options) == ["1. 1?", "2. 2?"]
    answers = page_html(app)
    assert all(f"After step {step}<" in answers for step in (10, 20, 30, 40))
    assert "&lt;b&gt;Answer&lt;/b&gt; 1 of step 10" in answers


def test_sweep_page_shows_curve_best_and_failed_trials(open_page, filled):
    app = open_page(filled, "sweep")
    told = "".join(m.value for m in app.markdown)
    assert "models/demo-big-200@v1" in told
    assert "It cannot be told yet what would help" in app.info[0].value
    assert "Whether more rows help is not known.** There is no forecast: 2 data volumes" in told
    assert len(app.get("vega_lite_chart")) == 1
    assert "on the test with data.num_train_examples=200, model.base=big" in told
    assert "would have added +6.0 points (−2.0 to +14.0)" in told
    assert "compared with 400 training rows" in told
    assert "No forecast: 2 data volumes" in told
    assert list(app.table[0].value["to pass"]) == ["base+few-shot (40.0%)"]
    assert list(app.table[-1].value["status"]) == ["done"] * 5 + ["failed"]
    assert "the loss is not finite" in app.warning[0].value


def test_error_page_filters_examples(open_page, filled):
    app = open_page(filled, "errors")
    assert "From base+few-shot to finetuned" in app.markdown[0].value
    app.selectbox(key="before").set_value("base").run()
    assert "From base to finetuned" in app.markdown[0].value
    assert "Fixed <b>23</b>" in page_html(app)
    assert "Introduced <b>1</b>" in page_html(app)
    tags = app.table[0].value
    assert dict(zip(tags["error"], tags["fixed"], strict=True))["misspelt"] == 12
    assert "30 of 30 examples" in page_html(app)
    app.button_group(key="outcome").set_value("introduced").run()
    assert "1 of 30 examples" in page_html(app)
    assert "<b>r29</b>" in page_html(app)
    app.button_group(key="outcome").set_value(None).run()
    app.selectbox(key="tag").set_value("misspelt").run()
    assert "12 of 30 examples" in page_html(app)
    app.selectbox(key="change").set_value("introduced").run()
    assert "0 of 30 examples" in page_html(app)
    assert "Clear one of them" in app.info[0].value
    app.selectbox(key="change").set_value(None)
    app.text_input(key="q").set_value("thing NUMBER 7 definately").run()
    assert "<b>r07</b>" in page_html(app)


def test_what_models_and_users_wrote_is_never_markup(open_page, filled):
    assert "<b>What is it?</b>" not in page_html(open_page(filled, "errors"))
    assert "&lt;b&gt;What is it?&lt;/b&gt;" in page_html(open_page(filled, "errors"))


def test_error_page_compares_any_two_arms_by_any_metric(open_page, filled):
    app = open_page(filled, "errors")
    assert "Fixed <b>13</b>" in page_html(app)
    app.selectbox(key="before").set_value("base").run()
    assert "Fixed <b>23</b>" in page_html(app)
    app.selectbox(key="before").set_value("base+few-shot").run()
    app.selectbox(key="metric").set_value("valid_json").run()
    assert "Fixed" not in page_html(app)
    assert "Right in both <b>30</b>" in page_html(app)
    app.selectbox(key="after").set_value("base+few-shot").run()
    assert "two different arms" in app.info[0].value


def test_arms_of_two_evaluations_and_two_runs_are_compared(open_page, own):
    for kind in ("evaluations", "models"):
        shutil.copytree(own / kind / "demo", own / kind / "later")
        file = own / kind / "later" / "v1" / "artifact.json"
        manifest = json.loads(file.read_text())
        manifest["config"] = {"training": {"num_epochs": 2}}
        file.write_text(json.dumps(manifest))
    app = open_page(own, "errors")
    app.selectbox(key="evaluations").set_value("evaluations/later@v1").run()
    app.selectbox(key="with").set_value("evaluations/demo@v1").run()
    app.selectbox(key="before").set_value("base of evaluations/demo@v1").run()
    assert "From base of evaluations/demo@v1 to finetuned" in app.markdown[0].value
    assert "Fixed <b>23</b>" in page_html(app)
    app.selectbox(key="before").set_value("finetuned of evaluations/demo@v1").run()
    assert "Right in both <b>28</b>" in page_html(app)
    shutil.copytree(own / "evaluations" / "demo" / "v1", own / "evaluations" / "later" / "v2")
    app = open_page(own, "history")
    app.selectbox(key="project").set_value("later").run()
    told = app.dataframe[0].value
    assert list(told["version"]) == ["v2", "v1"]
    assert list(told["exact_match"]) == [pytest.approx(28 / 30)] * 2
    newest = told.iloc[0]
    assert tuple(newest[["shared rows", "fixed", "introduced", "change"]]) == (30, 0, 0, 0)
    app = open_page(own, "advice")
    app.selectbox(key="project").set_value("demo").run()
    assert "**finetuned, exact_match 93.3%" in app.markdown[0].value
    assert "Train for 2 epochs in place of 1" in page_html(app)
    app = open_page(own, "model")
    app.selectbox(key="models").set_value("models/later@v1").run()
    charts = len(app.get("vega_lite_chart"))
    app.multiselect(key="with").set_value(["models/demo@v1"]).run()
    assert len(app.get("vega_lite_chart")) == charts + 3
    settings = next(f.value for f in app.dataframe if "setting" in f.value)
    assert list(settings["setting"]) == ["training.num_epochs"]
    assert list(settings["models/later@v1"]) == ["2"]


def judge_as(app, name):
    """Give a name and begin; the answers have been read by the time of the first vote."""
    app.text_input(key="reviewer").set_value(name)
    button(app, "Start").click().run()


@pytest.fixture
def fast_reader(monkeypatch):
    monkeypatch.setattr("tuneloop.review.verdicts.LEAST_READING_S", 0.0)


def test_a_vote_is_stored_blind_and_the_next_example_comes(open_page, own, fast_reader):
    app = open_page(own, "votes")
    assert "Type your name" in app.info[0].value
    judge_as(app, "ann")
    first = page_html(app)
    boxes = first[first.index('tl-sides"') :]
    assert "base" not in boxes
    assert "finetuned" not in boxes
    next(t for t in app.text_input if t.key.startswith("comment-")).set_value("too long").run()
    button(app, "Left is better").click().run()
    assert page_html(app) != first
    with sqlite3.connect(own / "review" / "verdicts.sqlite") as connection:
        rows = connection.execute(
            "SELECT evaluation, choice, reviewer, comment, arm_left, arm_right FROM verdicts"
        ).fetchall()
    assert rows[0][:4] == ("evaluations/demo@v1", "left", "ann", "too long")
    # As in the report, against the arm that is hardest to beat.
    assert set(rows[0][4:]) == {"base+few-shot", "finetuned"}
    # A new session, as after a reload, goes on where this one was.
    app = open_page(own, "votes")
    judge_as(app, "ann")
    assert app.get("progress")[0].proto.text.startswith("1 of 15 judged")
    assert page_html(app) != first


def test_a_vote_can_be_changed_and_an_example_put_off(open_page, own, fast_reader):
    app = open_page(own, "votes")
    judge_as(app, "ann")
    first = page_html(app)
    button(app, "Skip").click().run()
    second = page_html(app)
    assert second != first
    button(app, "Equally good").click().run()
    button(app, "Change my last vote").click().run()
    assert page_html(app) == second
    button(app, "Both are bad").click().run()
    with sqlite3.connect(own / "review" / "verdicts.sqlite") as connection:
        rows = connection.execute("SELECT example_id, choice FROM verdicts").fetchall()
    assert [choice for _, choice in rows] == ["tie", "both_bad"]
    assert rows[0][0] == rows[1][0]


def test_a_changed_vote_keeps_its_comment_and_another_pair_has_no_last_vote(
    open_page, own, fast_reader
):
    app = open_page(own, "votes")
    judge_as(app, "ann")
    next(t for t in app.text_input if t.key.startswith("comment-")).set_value("too long").run()
    button(app, "Left is better").click().run()
    button(app, "Change my last vote").click().run()
    assert next(t for t in app.text_input if t.key.startswith("comment-")).value == "too long"
    button(app, "Right is better").click().run()
    assert [comment for _, comment in votes_in(own)] == ["too long", "too long"]
    app.selectbox(key="pair").set_value(("base", "finetuned")).run()
    assert "Change my last vote" not in [b.label for b in app.button]


def test_results_show_ratings_agreement_and_the_baseline(open_page, own, fast_reader):
    for reviewer in ("ann", "bob"):
        app = open_page(own, "votes")
        judge_as(app, reviewer)
        for _ in range(3):
            label = "Equally good" if reviewer == "bob" else "Left is better"
            button(app, label).click().run()
    app.button_group(key="view").set_value("Results").run()
    ratings, between, judges = (table.value for table in app.table)
    assert set(ratings["arm"]) == {"base+few-shot", "finetuned"}
    assert list(between["shared examples"]) == [3]
    assert list(judges["judge"])[-1] == "longest wins (baseline)"
    listed = app.dataframe[0].value
    assert set(listed["reviewer"]) == {"ann", "bob"}
    assert len(listed) == 6
    assert next(iter(judges["judge"])) == "all fields right, none invented"


def test_the_worst_answers_of_one_model_come_first(open_page, filled):
    app = open_page(filled, "answers")
    assert "**finetuned**: 93.3%" in app.markdown[0].value
    shown = page_html(app)
    assert shown.index("<b>r28</b>") < shown.index("<b>r29</b>")
    assert shown.count(">wrong</span>") == 2
    assert 'tl-bad">number</span>' in shown
    assert 'tl-good">colour</span>' in shown
    assert "30 of 30 answers" in app.caption[0].value
    app.button_group(key="wrong").set_value("number").run()
    assert "2 of 30 answers" in app.caption[0].value
    app.selectbox(key="arm").set_value("base").run()
    app.button_group(key="wrong").set_value(None).run()
    app.selectbox(key="error").set_value("misspelt").run()
    assert "12 of 30 answers" in app.caption[0].value
    app.text_input(key="find").set_value("thing NUMBER 7 definately").run()
    assert "<b>r07</b>" in page_html(app)
    assert "&lt;b&gt;What is it?&lt;/b&gt;" in page_html(app)


def test_answers_are_right_or_wrong_where_macro_f1_decides(open_page, labelled):
    app = open_page(labelled, "answers")
    shown = page_html(app)
    assert shown.index("<b>l2</b>") < shown.index("<b>l0</b>")
    assert shown.count(">wrong</span>") == 1
    assert shown.count(">right</span>") == 3
    assert "75.0%" in app.markdown[0].value
    assert "mean F1 over the labels: 73.3%" in app.markdown[0].value
    assert "mean F1 over the labels" not in app.selectbox(key="metric").options


def test_a_metric_of_one_task_shows_its_rows(open_page, mixed):
    app = open_page(mixed, "answers")
    assert "4 of 4 answers" in app.caption[0].value
    app.selectbox(key="metric").set_value("title/token_f1").run()
    assert "2 of 4 answers" in app.caption[0].value
    assert "<b>l1</b>" not in page_html(app)


def test_another_evaluation_begins_anew(open_page, own):
    shutil.copytree(own / "evaluations" / "demo", own / "evaluations" / "later")
    app = open_page(own, "answers")
    app.selectbox(key="evaluations").set_value("evaluations/demo@v1").run()
    app.selectbox(key="arm").set_value("base").run()
    # As the browser has it then.
    app.query_params["arm"] = "base"
    assert "**base**" in app.markdown[0].value
    app.selectbox(key="evaluations").set_value("evaluations/later@v1").run()
    assert not app.exception
    assert "**finetuned**: 93.3%" in app.markdown[0].value
    assert app.selectbox(key="arm").value == "finetuned"
    assert "<b>r28</b>" in page_html(app)


def test_rows_are_marked_listed_and_followed(open_page, own, next_version):
    app = open_page(own, "answers")
    next(b for b in app.button if b.key == "mark 2 r29").click().run()
    app.radio[0].set_value("bad_reference").run()
    button(app, "Store the mark").click().run()
    assert "Give your name" in app.error[0].value
    app.text_input(key="marker").set_value("ann").run()
    button(app, "Store the mark").click().run()
    assert "the answer that the data have" in app.error[0].value
    app.text_area[0].set_value('{"colour": "blue", "number": 30}').run()
    # What was written about one row does not stand in the form of another.
    next(b for b in app.button if b.key == "mark 1 r28").click().run()
    assert json.loads(app.text_area[0].value)["number"] == 28
    next(b for b in app.button if b.key == "mark 2 r29").click().run()
    app.text_area[0].set_value('{"colour": "blue", "number": 30}').run()
    button(app, "Store the mark").click().run()
    assert not app.error
    assert "ann: the answer is wrong" in page_html(app)
    (mark,) = ReviewStore(own).marks("demo")
    assert (mark.row_id, mark.reviewer, mark.kind) == ("r29", "ann", "bad_reference")
    assert mark.dataset == "datasets/demo@v1"
    assert mark.evaluation == "evaluations/demo@v1"
    app = open_page(own, "dataset")
    app.button_group(key="view").set_value("Train rows").run()
    next(b for b in app.button if b.key == "mark 1 r000").click().run()
    app.radio[0].set_value("bad_row").run()
    app.text_input(key="marker").set_value("bob").run()
    button(app, "Store the mark").click().run()
    assert "bob: drop the row" in page_html(app)
    app = open_page(own, "marks")
    assert app.markdown[0].value == "**2** waiting"
    listed = app.dataframe[0].value
    assert list(listed["by"]) == ["bob", "ann"]
    assert list(listed["mark"]) == ["drop the row", "the answer is wrong"]
    app = open_page(own, "lineage")
    app.text_input(key="id").set_value(mark.uid).run()
    assert [s.value for s in app.subheader] == ["In the datasets", "Answers", "Marks"]
    assert "evaluations/demo@v1" in page_html(app)
    app.text_input(key="id").set_value("no such row").run()
    assert "No such row" in app.error[0].value
    next_version(own)
    app = open_page(own, "marks")
    assert app.markdown[0].value == "**2** applied"
    app = open_page(own, "dataset", view="Changes")
    app.button_group(key="view").set_value("Changes").run()
    assert "corrected by ann" in page_html(app)
    assert "dropped by bob" in page_html(app)
    app.button_group(key="rows").set_value("gone").run()
    assert "dropped by bob" not in page_html(app)
    assert "<b>r020</b>" in page_html(app)
    assert "a-ha" in page_html(app)
    app = open_page(own, "lineage")
    app.text_input(key="id").set_value("r29").run()
    assert "corrected by ann; the files say: {&quot;colour&quot;" in page_html(app)


def test_long_answers_are_folded_with_their_marks(monkeypatch):
    monkeypatch.syspath_prepend(str(APP.parent))
    import theme

    shown = theme.pieces([("same", "a" * 1000), ("extra", "<" * 1000)])
    before, _, after = shown.partition("<details><summary>500 more characters</summary>")
    assert before.count("&lt;") == after.count("&lt;") == 500
    assert before.count("tl-extra") == after.count("tl-extra") == 1
    assert "<details>" not in theme.folded("a" * 1500)


def votes_in(workspace):
    file = workspace / "review" / "verdicts.sqlite"
    if not file.exists():
        return []
    with sqlite3.connect(file) as connection:
        return connection.execute("SELECT reviewer, comment FROM verdicts").fetchall()


def test_keys_that_are_held_or_pressed_twice_vote_on_nothing(open_page, own):
    app = open_page(own, "votes")
    judge_as(app, "ann")
    button(app, "Left is better").click().run()
    assert "less than a second" in app.warning[0].value
    assert votes_in(own) == []
    # The name is no field while single keys vote, and in no address.
    assert not [field for field in app.text_input if field.label == "Your name"]
    assert "ann" not in str(dict(app.query_params))


def test_a_locked_database_keeps_the_vote_for_another_try(open_page, own, fast_reader, monkeypatch):
    monkeypatch.setattr("tuneloop.review.store._LOCK_TIMEOUT_S", 0.1)
    app = open_page(own, "votes")
    judge_as(app, "ann")
    next(t for t in app.text_input if t.key.startswith("comment-")).set_value("why").run()
    button(app, "Equally good").click().run()
    button(app, "Right is better").click().run()
    assert len(votes_in(own)) == 2
    holder = sqlite3.connect(own / "review" / "verdicts.sqlite")
    holder.execute("BEGIN IMMEDIATE")
    button(app, "Left is better").click().run()
    assert "not stored yet" in app.error[0].value
    assert "wait until the other program has finished" in app.code[0].value
    assert "move it away" not in app.code[0].value
    holder.rollback()
    holder.close()
    button(app, "Store it").click().run()
    assert not app.error
    assert [comment for _, comment in votes_in(own)] == ["why", "", ""]


def test_an_unknown_reference_is_told_and_a_link_keeps_its_artifact(open_page, own):
    app = open_page(own, "errors")
    assert app.query_params["evaluations"] in ("evaluations/demo@v1", ["evaluations/demo@v1"])
    for page, asked in (("errors", "evaluations/demo@v99"), ("report", "models/demo@v1")):
        app = open_page(own, page)
        app.query_params["evaluations"] = asked
        app.run()
        assert "no such evaluation" in app.error[0].value
        assert app.code[0].value == asked
        button(app, "Show the newest").click().run()
        assert not app.error


def test_the_playground_asks_with_the_instruction_of_the_task(open_page, own, parrots):
    file = own / "datasets" / "demo" / "v1" / "artifact.json"
    manifest = json.loads(file.read_text())
    manifest["config"]["task"] = {"type": "extraction", "instruction": "Read and answer.\n"}
    file.write_text(json.dumps(manifest))
    app = open_page(own, "playground")
    app.text_input(key="url").set_value(parrots).run()
    task = app.selectbox(key="task")
    assert task.options == ["demo", "no task"]
    (system,) = app.text_area
    assert system.value == "Read and answer."
    app.chat_input[0].set_value("Hello there").run()
    sent = json.loads(app.json[0].value)["loud"]["messages"]
    assert sent[0] == {"role": "system", "content": "Read and answer."}


def test_a_remote_workspace_takes_no_votes(open_page, filled, monkeypatch):
    from tuneloop.artifacts import Workspace

    # The real thing needs a bucket; what matters here is that its location is a URI.
    opened = Workspace.__init__

    def remote(self, location):
        opened(self, location)
        self.location = "s3://bucket/prefix"

    monkeypatch.setattr(Workspace, "__init__", remote)
    app = open_page(filled, "votes")
    assert "cannot be stored" in app.error[0].value
    assert "remote workspace" in app.code[0].value


def test_playground_without_a_server_says_how_to_start_one(open_page, tmp_path):
    app = open_page(tmp_path, "playground")
    app.text_input(key="url").set_value("http://127.0.0.1:9/v1").run()
    assert "No list of models" in app.error[0].value
    assert "tuneloop serve CONFIG.yaml" in [code.value for code in app.code]


def test_playground_asks_two_models_and_shows_what_was_sent(open_page, tmp_path, parrots):
    app = open_page(tmp_path, "playground")
    app.text_input(key="url").set_value(parrots).run()
    assert app.multiselect(key="models").value == ["loud", "quiet"]
    app.number_input(key="max_tokens").set_value(7)
    app.chat_input[0].set_value("Hello there").run()
    assert not app.exception
    shown = page_html(app)
    assert "HELLO THERE" in shown
    assert "hello there" in shown
    assert '"max_tokens":7' in app.json[0].value.replace(" ", "")
    # Asked to, the second question carries the first exchange, each model's own.
    app.chat_input[0].set_value("alone").run()
    assert "HELLO THERE" not in app.json[0].value
    button(app, "Start over").click().run()
    app.chat_input[0].set_value("Hello there").run()
    app.checkbox(key="turns_along").check()
    app.chat_input[0].set_value("break").run()
    assert "broke off after" in page_html(app)
    assert app.json[0].value.count("HELLO THERE") == 1
    app.chat_input[0].set_value("fail").run()
    assert "this question is refused" in page_html(app)
    button(app, "Start over").click().run()
    assert "HELLO" not in page_html(app)


def test_error_page_of_a_mixture_shows_one_task(open_page, mixed):
    app = open_page(mixed, "errors")
    assert "4 of 4 examples" in page_html(app)
    app.button_group(key="task").set_value("label").run()
    assert "2 of 2 examples" in page_html(app)
    assert "title: words in common" not in str(app.selectbox(key="metric").options)
    assert "<b>l1</b>" in page_html(app)
    assert "<b>t1</b>" not in page_html(app)
    # The metric of one task leaves the rows of the others out.
    app.button_group(key="task").set_value("all tasks").run()
    app.selectbox(key="metric").set_value("title/token_f1").run()
    assert "2 of 2 examples" in page_html(app)
    assert "Not scored" not in page_html(app)


def test_the_error_page_begins_with_the_examples_of_the_report(open_page, filled):
    report = (filled / "evaluations/demo/v1/report.html").read_text()
    in_report = re.findall(r"question <code>(\w+)</code>", report.partition("Got better")[2])[:5]
    app = open_page(filled, "errors")
    app.button_group(key="outcome").set_value("fixed").run()
    assert re.findall(r"<b>(r\d+)</b>", page_html(app)) == in_report
    assert len(in_report) == 5


def test_an_answer_of_the_playground_is_saved_as_a_test_row(open_page, own, parrots):
    # By way of another page that keeps what was asked.
    app = open_page(own, "votes")
    app.text_input(key="reviewer").set_value("ann")
    button(app, "Start").click().run()
    button(app, "Not you?").click().run()
    app.switch_page("views/playground.py").run()
    app.text_input(key="url").set_value(parrots).run()
    app.chat_input[0].set_value("Hello there").run()
    (begun,) = (box for box in app.selectbox if box.label == "Begin with the answer of")
    assert begun.value == "quiet"
    begun.set_value("loud").run()
    (right,) = (area for area in app.text_area if area.label == "Right answer")
    assert right.value.strip() == "HELLO THERE"
    right.set_value("Hello back")
    button(app, "Save").click().run()
    assert "Give your name." in [error.value for error in app.error]
    app.text_input(key="keeper").set_value("ann")
    button(app, "Save").click().run()
    assert "Saved." in [told.value for told in app.success]
    (file,) = (own / "review" / "test-rows").iterdir()
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert (row["question"], row["answer"], row["reviewer"]) == ("Hello there", "Hello back", "ann")
    command = next(code.value for code in app.code if "tuneloop evaluate" in code.value)
    assert str(file) in command


def test_a_read_only_dashboard_takes_nothing(open_page, own, parrots, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--read-only"])
    app = open_page(own, "votes")
    assert "takes no votes" in app.info[0].value
    app = open_page(own, "answers")
    assert "Mark" not in [one.label for one in app.button]
    app = open_page(own, "playground")
    app.text_input(key="url").set_value(parrots).run()
    app.chat_input[0].set_value("Hello there").run()
    assert "Save" not in [one.label for one in app.button]


def test_with_sign_in_nobody_else_sees_the_workspace(own, monkeypatch):
    from streamlit.testing.v1 import AppTest

    monkeypatch.setattr("streamlit.user", {"is_logged_in": False})
    monkeypatch.setenv("TUNELOOP_WORKSPACE", str(own))
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.syspath_prepend(str(APP.parent))
    app = AppTest.from_file(str(APP), default_timeout=60)
    app.secrets["auth"] = {"company": {"client_id": "x"}}
    app.run()
    assert [one.label for one in app.button] == ["Sign in with company"]
    assert not app.selectbox
    app.secrets["auth"] = {"client_id": "x"}
    app.run()
    assert [one.label for one in app.button] == ["Sign in"]


def test_who_has_signed_in_judges_under_that_name(open_page, own, monkeypatch):
    open_page(own)
    import shell

    monkeypatch.setattr(shell.st, "user", {"is_logged_in": True, "email": "ann@example.com"})
    monkeypatch.setattr(shell.st, "session_state", {"judge": "somebody else"})
    assert shell.reviewer_name() == "ann@example.com"
    monkeypatch.setattr(shell.st, "user", {})
    assert shell.reviewer_name() == "somebody else"
