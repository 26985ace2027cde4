"""The pages of datasets over real artifacts, without a browser."""

from __future__ import annotations

import itertools
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq

from page_parts import button, page_html
from tuneloop.artifacts import Workspace
from tuneloop.review.store import ReviewStore


def test_dataset_page_shows_card_rows_and_removed_rows(open_page, filled):
    app = open_page(filled, "dataset")
    assert any("# The card of the rows" in m.value for m in app.markdown)
    app.button_group(key="view").set_value("Train rows").run()
    assert "a-ha" in page_html(app)
    assert "rows.jsonl:3" in page_html(app)
    app.text_input(key="q").set_value("rows.jsonl:24").run()
    assert "1 of 26 rows" in [caption.value for caption in app.caption]
    app.text_input(key="q").set_value("").run()
    app.button_group(key="view").set_value("Removed rows").run()
    assert "near duplicate" in page_html(app)
    assert "1 of 1 removed rows" in [caption.value for caption in app.caption]
    app.button_group(key="view").set_value("Conflicts").run()
    assert "1 prompt has several answers among the train rows." in [c.value for c in app.caption]
    assert "boo" in page_html(app)


def test_datasets_begin_with_one_that_can_be_trained_on(open_page, own):
    workspace = Workspace(own)
    scored = workspace.open("datasets/demo@v1").path / "test"
    with workspace.draft("datasets", "demo-scored", "5" * 64) as draft:
        shutil.copytree(scored, draft.path / "test")
        draft.publish(config={}, resources={}, inputs=[], metrics={})
    app = open_page(own, "dataset", view="Changes")
    assert app.selectbox(key="datasets").value == "datasets/demo@v1"
    app.button_group(key="view").set_value("Changes").run()
    assert "nothing to compare it with" in app.info[0].value


def test_a_doubtful_label_is_corrected_to_what_the_others_say(open_page, own):
    rows = [
        {"row_id": f"{index:02}", "source": f"rows.csv:{index}", "messages": [
            {"role": "user", "content": f"{said} the {room}"},
            {"role": "assistant", "content": label},
        ]}
        for index, (room, (said, label)) in enumerate(
            itertools.product(
                ["kitchen", "garden", "cellar", "attic", "garage", "hall", "office", "porch"],
                [("switch on", "lights"), ("play music in", "music"), ("warm up", "heating")],
            )
        )
    ]  # fmt: skip
    rows[7]["messages"][1]["content"] = "heating"
    task = {"type": "classification", "labels": ["lights", "music", "heating"]}
    with Workspace(own).draft("datasets", "rooms", "6" * 64) as draft:
        (draft.path / "train").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), draft.path / "train" / "part-0.parquet")
        draft.publish(config={"task": task}, resources={}, inputs=[], metrics={})
    app = open_page(own, "dataset")
    app.selectbox(key="datasets").set_value("datasets/rooms@v1").run()
    app.button_group(key="view").set_value("Doubtful labels").run()
    assert re.findall(r"<b>(\d\d)</b>", page_html(app)) == ["07"]
    button(app, "Mark").click().run()
    assert app.selectbox(key="label bad_reference 07").value == "music"
    app.text_input(key="marker").set_value("ann").run()
    button(app, "Store the mark").click().run()
    assert "ann: the answer is wrong" in page_html(app)
    (mark,) = ReviewStore(own).marks("rooms")
    assert (mark.row_id, mark.kind, mark.answer) == ("07", "bad_reference", "music")
