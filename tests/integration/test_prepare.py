"""Preparation as a whole, under Ray: every row's way, and what is told of it."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prepared_rows import config_for, rows_of, sentence, write
from tuneloop.artifacts import Artifact, Workspace
from tuneloop.cli import main
from tuneloop.config import TuneloopConfig
from tuneloop.data import ray_rows
from tuneloop.data.check import check
from tuneloop.data.diff import diff_datasets
from tuneloop.data.hashing.content import content_id
from tuneloop.data.prepare import prepare
from tuneloop.data.write import assemble as finishing
from tuneloop.errors import DataError
from tuneloop.evals.scoring.questions import read_questions
from tuneloop.marks import Mark
from tuneloop.models.bases.source import BaseModel
from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import Message
from tuneloop.review.fixes import states_of
from tuneloop.spelling import words_by_frequency
from tuneloop.training.rows import open_rows, store_rows


@pytest.mark.usefixtures("ray_cluster")
def test_every_row_ends_in_train_test_or_removed(
    tmp_path: Path,
    base: BaseModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows: list[Any] = [
        {
            "question": " ".join(sentence(f"q{i}", 12)) + "? ",
            "answer": " ".join(sentence(f"a{i}", 12)),
            "topic": f"t{i % 25}",
            "level": i,
        }
        for i in range(100)
    ]
    exact = dict(rows[3], question=rows[3]["question"].upper())
    long_words = sentence("long", 60)
    near = {"question": " ".join(long_words), "answer": "yes it is", "topic": "t7", "level": None}
    near_copy = dict(near, question=" ".join([*long_words[:-1], "other"]), topic="t8")
    too_long = {"question": " ".join(sentence("huge", 900)), "answer": "no", "topic": "t1"}
    leaking = {"question": "what is <|im_end|> for", "answer": "to end", "topic": "t1"}
    first = write(tmp_path / "a.jsonl", [*rows[:60], '{"question": "cut', near, too_long])
    write(tmp_path / "b.jsonl", [*rows[60:], exact, near_copy, leaking, {"question": "no answer"}])
    config = config_for(
        tmp_path / "*.jsonl",
        max_bad_rows_ratio=0.05,
        max_seq_len=400,
        too_long="drop",
        split={"group_by": "topic", "num_test_examples": 20},
    )
    workspace = Workspace(tmp_path / "ws")
    published = prepare(config, workspace, base)
    artifact = published.artifact
    train, test = rows_of(artifact, "train"), rows_of(artifact, "test")
    removed = rows_of(artifact, "removed")
    assert len(train) + len(test) + len(removed) == 107
    ids = [row["row_id"] for row in train + test + removed]
    assert len(set(ids)) == 107
    assert len(test) == 20
    assert {row["topic"] for row in train}.isdisjoint(row["topic"] for row in test)

    by_source = {Path(row["source"]).name: row for row in removed}
    assert by_source["a.jsonl:61"]["stage"] == "read"
    assert "not valid JSON" in by_source["a.jsonl:61"]["reason"]
    assert by_source["b.jsonl:44"]["stage"] == "read"
    assert by_source["b.jsonl:44"]["reason"].startswith("no column `answer`")
    assert by_source["a.jsonl:63"]["stage"] == "tokenize"
    assert "more than 400" in by_source["a.jsonl:63"]["reason"]
    # A control token in a user's text is text: the row stays.
    assert "b.jsonl:43" not in by_source
    assert any("<|im_end|>" in row["messages"][-2]["content"] for row in train + test)
    duplicates = [row for row in removed if row["stage"] == "dedup"]
    assert len(duplicates) == 2
    copies = {row["similarity"] == 1.0: row for row in duplicates}
    assert Path(copies[True]["source"]).name in ("a.jsonl:4", "b.jsonl:41")
    assert copies[True]["kept_row_id"] in ids
    assert Path(copies[False]["source"]).name in ("a.jsonl:62", "b.jsonl:42")
    # 63 words are 59 shingles, 4 of which the changed word spoils.
    assert copies[False]["similarity"] == pytest.approx(55 / 63)
    assert all(
        row["stage"] == "split"
        for row in removed
        if row
        not in [
            *duplicates,
            *(by_source[n] for n in ("a.jsonl:61", "b.jsonl:44", "a.jsonl:63")),
        ]
    )

    renderer = Renderer.load(base.path)
    for row in train + test:
        messages = [Message(m["role"], m["content"]) for m in row["messages"]]
        assert messages[0] == Message("system", "Answer.")
        sample = renderer.sample(messages)
        assert (row["input_ids"], row["loss_mask"]) == (sample.input_ids, sample.loss_mask)
        assert row["num_tokens"] == len(row["input_ids"])
        answer = [i for i, bit in zip(row["input_ids"], row["loss_mask"], strict=True) if bit]
        assert renderer.decode(answer) == messages[-1].content
        assert answer[-1] in renderer.stop_ids
        assert row["level"] is None or isinstance(row["level"], int)

    card = json.loads((artifact.path / "card.json").read_text())
    assert [step["rows"] for step in card["funnel"]][:5] == [107, 105, 105, 104, 102]
    assert card["funnel"][-1]["rows"] == len(train) + len(test)
    assert card["dedup"]["num_near"] == card["dedup"]["num_exact"] == 1
    readme = (artifact.path / "README.md").read_text()
    assert "a.jsonl:62" in readme or "b.jsonl:42" in readme
    engine = card["tokenizer_engine"]
    assert engine["package"] == "gigatoken"
    # 105 rows could be read.
    assert (
        f"Tokenizer engine: gigatoken {version('gigatoken')}, verified on {engine['num_texts']:,}"
        in (readme)
    )
    metrics = artifact.manifest["metrics"]
    assert metrics["num_train_rows"] == len(train)
    assert metrics["num_removed"] == len(removed)
    assert metrics["num_train_tokens"] == sum(row["num_tokens"] for row in train)
    assert metrics["num_target_tokens"] == sum(sum(row["loss_mask"]) for row in train)

    assert prepare(config, workspace, base).reused
    with first.open("a") as file:
        file.write(json.dumps({"question": "new one", "answer": "yes", "topic": "t1"}) + "\n")
    for module in ("gigatoken", "splintr"):
        monkeypatch.setitem(sys.modules, module, None)
    with caplog.at_level("INFO", "tuneloop.data"):
        again = prepare(config, workspace, base)
    assert "because gigatoken: not installed (pip install 'tuneloop[fast]')" in caplog.text
    slow = json.loads((again.artifact.path / "card.json").read_text())["tokenizer_engine"]
    assert slow["engine"] == f"tokenizers {version('tokenizers')}"
    # Whichever engine encodes, a row has the same ids.
    ids = {row["row_id"]: row["input_ids"] for row in train + test}
    others = rows_of(again.artifact, "train") + rows_of(again.artifact, "test")
    assert {row["row_id"]: row["input_ids"] for row in others if row["row_id"] in ids}.items() <= (
        ids.items()
    )
    assert not again.reused
    assert again.artifact.version == 2
    # A row that stays keeps its id and its side when a row is added to a group of the test.
    moved = {row["row_id"] for row in test} & {
        row["row_id"] for row in rows_of(again.artifact, "train")
    }
    assert not moved


@pytest.mark.usefixtures("ray_cluster")
def test_bad_data_stops_before_anything_is_published(tmp_path: Path, base: BaseModel) -> None:
    workspace = Workspace(tmp_path / "ws")
    good = [{"question": f"q {i}", "answer": f"a {i}"} for i in range(30)]
    bad_line = write(tmp_path / "bad.jsonl", [*good[:16], "{", *good[16:]])
    with pytest.raises(DataError) as caught:
        prepare(config_for(bad_line), workspace, base)
    assert f"{bad_line}:17" in str(caught.value)

    long_row = {"question": " ".join(["word"] * 800), "answer": "x"}
    long_rows = write(tmp_path / "long.jsonl", [*good, long_row])
    with pytest.raises(DataError) as caught:
        prepare(config_for(long_rows, max_seq_len=64), workspace, base)
    assert f"{long_rows}:31 (" in str(caught.value)
    assert "data.too_long=truncate (parts of the prompt go) or drop" in str(caught.value)

    with pytest.raises(DataError, match="the data set is empty"):
        prepare(config_for(write(tmp_path / "none.jsonl", [])), workspace, base)
    with pytest.raises(DataError, match="no such file"):
        prepare(config_for(tmp_path / "absent.jsonl"), workspace, base)
    assert workspace.published() == []


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("characters_per_table", [4 << 20, 3_000])
def test_documents_are_packed_with_every_token_kept_once(
    characters_per_table: int, tmp_path: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finishing, "_CHARACTERS_PER_TABLE", characters_per_table)
    texts = [" ".join(sentence(f"d{i}", 3 + 7 * (i % 9))) for i in range(60)]
    lines = [{"text": text, "order": i, "shelf": "a"} for i, text in enumerate(texts)]
    config = config_for(
        write(tmp_path / "a.jsonl", lines),
        task={"type": "language_modeling"},
        format="text",
        max_seq_len=100,
        split={"num_test_examples": 6},
    )
    artifact = prepare(config, Workspace(tmp_path / "ws"), base).artifact
    train, test = rows_of(artifact, "train"), rows_of(artifact, "test")
    rows = train + test
    assert len({row["row_id"] for row in rows}) == len(rows)
    assert max(row["num_tokens"] for row in rows) <= 100
    assert all(all(row["loss_mask"]) for row in rows)
    assert {row["shelf"] for row in rows} == {"a"}
    assert all(sum(row["document_lengths"]) == row["num_tokens"] for row in rows)
    assert all(len(row["document_ids"]) == 1 for row in test)
    assert len({row["order"] for row in test}) == 6

    renderer = Renderer.load(base.path)
    end = renderer.tokenizer.eos_token_id
    pieces: dict[str, list[tuple[int, list[int]]]] = {}
    for row in rows:
        cuts = np.cumsum([0, *row["document_lengths"]])
        for start, stop, name in zip(cuts[:-1], cuts[1:], row["document_ids"], strict=True):
            document, _, number = name.partition(".")
            ids = row["input_ids"][start:stop]
            pieces.setdefault(document, []).append((int(number or 0), ids))
    found = sorted(list(chain(*(ids for _, ids in sorted(p)))) for p in pieces.values())
    assert found == sorted([*renderer.text_ids(text), end] for text in texts)
    # Some documents are longer than a row, most are shorter; only the last row may stay open.
    assert max(map(len, found)) > 100
    packing = json.loads((artifact.path / "card.json").read_text())["packing"]
    assert packing["num_documents"] == 54
    assert packing["num_rows"] == len(train)
    assert packing["padding_ratio"] < 0.1
    room = 100 * len(train)
    assert packing["padding_ratio"] == pytest.approx(
        1 - sum(row["num_tokens"] for row in train) / room, abs=1e-6
    )
    whole = [row["text"] for row in train if "." not in "".join(row["document_ids"])]
    assert {part for text in whole for part in text.split("\n\n")} <= set(texts)

    # Training takes the documents of a row apart again.
    stored = open_rows(store_rows(artifact.path, "train", tmp_path / "rows"))
    assert list(stored.row_ids) == [row["row_id"] for row in train]
    for index, row in enumerate(train):
        assert stored.document_lengths(index) == row["document_lengths"]
        assert stored.num_target_tokens[index] == row["num_tokens"] - len(row["document_ids"])


@pytest.mark.usefixtures("ray_cluster")
def test_two_versions_are_compared_by_what_their_rows_say(
    tmp_path: Path, base: BaseModel, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"question": " ".join(sentence(f"q{i}", 12)), "answer": " ".join(sentence(f"a{i}", 5))}
        for i in range(60)
    ]
    path = write(tmp_path / "a.jsonl", rows)
    workspace = Workspace(tmp_path / "ws")
    old = prepare(config_for(path), workspace, base).artifact
    # Seven rows go, one changes its answer, three are new, one of them twice.
    changed = dict(rows[20], answer="another answer than before")
    new_rows = [{"question": f"new {i} " + rows[i]["answer"], "answer": "x"} for i in range(3)]
    write(path, [*rows[10:20], changed, *rows[21:57], *rows[:10:10], *rows[1:7], *new_rows])
    with path.open("a") as file:
        file.write(json.dumps(new_rows[0]) + "\n")
    new = prepare(config_for(path, split={"test_ratio": 0.3}), workspace, base).artifact
    diff = diff_datasets(new, old)
    assert diff["num_gone"] == 7
    assert diff["num_added"] == 5
    assert diff["added_to"]["removed (dedup)"] == 1
    assert diff["rows"]["test"] == (
        old.manifest["metrics"]["num_test_rows"],
        new.manifest["metrics"]["num_test_rows"],
    )
    assert diff["funnel"]["found"] == (60, 58)
    assert diff["settings"]["data.split.test_ratio"] == (0.1, 0.3)
    # A larger test takes rows from the train split and gives none back.
    assert set(diff["moves"]) == {"train → test"}
    before = {row["row_id"] for row in rows_of(old, "train")}
    assert diff["moves"]["train → test"] == len(
        before & {row["row_id"] for row in rows_of(new, "test")}
    )
    assert diff_datasets(new, new)["settings"] == {}
    assert diff_datasets(new, new)["num_added"] == 0

    arguments = ["show", "datasets/faq@v2", "--diff", "datasets/faq@v1"]
    command = [*arguments, "--workspace", str(tmp_path / "ws")]
    assert main(command) == 0
    assert "data.split.test_ratio: 0.1 → 0.3" in capfd.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["num_gone"] == 7


@pytest.mark.usefixtures("ray_cluster")
def test_every_answer_of_a_conversation_is_learned(tmp_path: Path, base: BaseModel) -> None:
    def talk(i: int) -> dict[str, Any]:
        said = [" ".join(sentence(f"{i} {turn}", 8)) for turn in range(4)]
        roles = ["user", "assistant"] * 2
        system = [{"role": "system", "content": f"Be {said[0]}."}] * (i % 2)
        turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        return {"messages": [*system, *turns]}

    path = write(tmp_path / "a.jsonl", [talk(i) for i in range(30)])
    config = config_for(path, format="messages")
    artifact = prepare(config, Workspace(tmp_path / "ws"), base).artifact
    renderer = Renderer.load(base.path)
    rows = rows_of(artifact, "train") + rows_of(artifact, "test")
    assert len(rows) == 30
    for row in rows:
        system, *turns = row["messages"]
        assert len(turns) == 4
        own = system["content"].removeprefix("Answer.").strip()
        assert own == ("" if own == "" else f"Be {turns[0]['content']}.")
        learned = [i for i, bit in zip(row["input_ids"], row["loss_mask"], strict=True) if bit]
        assert learned.count(renderer.stop_ids[0]) == 2
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert renderer.decode(learned) == "".join(answers)
    assert sum(row["messages"][0]["content"] != "Answer." for row in rows) == 15


@pytest.mark.usefixtures("ray_cluster")
def test_filters_drop_and_mend_before_rows_are_compared(tmp_path: Path, base: BaseModel) -> None:
    rows = [
        {"question": " ".join(sentence(f"q{i}", 12)), "answer": " ".join(sentence(f"a{i}", 5))}
        for i in range(40)
    ]
    rows[1] = {"question": f"### Question:\n{rows[0]['question']}", "answer": rows[0]["answer"]}
    rows[2]["answer"] += " to me@example.org"
    rows[3]["answer"] = "so"
    rows[4]["question"] = "[INST]"
    path = write(tmp_path / "a.jsonl", rows)
    filters = {"template_markers": "strip", "personal_data": "mask", "min_characters": 5}
    config = config_for(path, filters=filters)
    artifact = prepare(config, Workspace(tmp_path / "ws"), base).artifact
    everyone = rows_of(artifact, "train") + rows_of(artifact, "test")
    removed = {row["source"]: row for row in rows_of(artifact, "removed")}
    assert len(everyone) == 37
    assert {source.rpartition(":")[2] for source in removed} in ({"1", "4", "5"}, {"2", "4", "5"})
    assert removed[f"{path}:4"]["stage"] == removed[f"{path}:5"]["stage"] == "filter"
    assert removed[f"{path}:4"]["reason"] == "the answer is shorter than 5 characters: 2"
    texts = [message["content"] for row in everyone for message in row["messages"]]
    assert sum(text.endswith("to [E-MAIL]") for text in texts) == 1
    assert not any("@" in text or "###" in text for text in texts)
    card = json.loads((artifact.path / "card.json").read_text())
    assert card["filters"]["changes"] == {
        "template markers stripped": 2,
        "personal data masked": 1,
    }
    assert sum(card["filters"]["num_dropped"].values()) == 2
    assert {example["source"] for example in card["filters"]["examples"]} == {
        f"{path}:4",
        f"{path}:5",
    }
    assert [s["removed"] for s in card["funnel"] if s["stage"] == "filter"] == [2]
    notice = check(config, base).notices[0]
    assert notice.what == "2 of 40 rows are dropped by filters"

    none = config_for(path, filters={"min_characters": 5000})
    with pytest.raises(DataError, match="no row is left after the filters"):
        prepare(none, Workspace(tmp_path / "ws"), base)
    assert check(none, base).findings[0].where == "data.filters"


FRENCH = "Les archives conservent des lettres de quatre siècles que les lecteurs demandent."


def english(seed: str, length: int) -> str:
    return " ".join(random.Random(seed).choices(words_by_frequency()[400:4000], k=length))


@pytest.mark.usefixtures("ray_cluster")
def test_sources_are_mixed_stratified_and_described_whatever_the_blocks(
    tmp_path: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(name: str, i: int, **more: Any) -> dict[str, Any]:
        lead = ("List", "Please explain", "Why")[i % 3]
        asked = f"{lead} {english(f'q{name}{i}', 9)}"
        return {"question": asked, "answer": english(f"a{name}{i}", 24), **more}

    people = [row("p", i, topic="ab"[i % 4 == 0]) for i in range(96)]
    # At both sides of what were blocks of 16 rows.
    people[15]["answer"] = FRENCH
    people[16]["answer"] = "As an AI language model, I cannot say. " + people[16]["answer"]
    people[31]["question"] += "\nThis site uses cookies to remember you."
    people[32]["answer"] = people[32]["answer"].replace("e", "qe")
    # The last forty of the made rows say that they were made from rows of people.
    made = [row("m", i, topic="ab"[i % 4 == 0], synthetic=True) for i in range(180)]
    for one, seed in zip(made[-40:], people[40:80], strict=True):
        turns = [("user", seed["question"]), ("assistant", seed["answer"])]
        one["seed_row_id"] = content_id([{"role": r, "content": c} for r, c in turns], "")
    filters = {"languages": ["en", "de"], "boilerplate": "drop", "max_misspelt_ratio": 0.2}

    def prepared(folder: Path, num_files: int, block: int, kept_from: int) -> Artifact:
        monkeypatch.setattr(ray_rows, "_ROWS_PER_BLOCK", block)
        (folder / "people").mkdir(parents=True)
        size = len(people) // num_files
        for part in range(num_files):
            rows = people[part * size : (part + 1) * size]
            write(folder / "people" / f"{part}.jsonl", rows)
        write(folder / "made.jsonl", made)
        sources = [
            {"path": str(folder / "people"), "format": "question_answer", "weight": 2},
            {"path": str(folder / "made.jsonl"), "format": "question_answer", "weight": 1},
        ]
        split = {"stratify_by": "topic", "test_ratio": 0.2}
        config = config_for("", sources=sources, filters=filters, split=split)
        workspace = Workspace(tmp_path / "ws")
        monkeypatch.setattr(ray_rows, "KEPT_FROM_ROWS", kept_from)
        if kept_from < len(people):
            # Ended twice after the rows were tokenized: the second time they need not be again.
            assert ended(config, workspace) == ended(config, workspace) != {}
        return prepare(config, workspace, base).artifact

    def ended(config: TuneloopConfig, workspace: Workspace) -> dict[Path, int]:
        def end(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("tuneloop.data.prepare.find_conflicts", end)
            with pytest.raises(KeyboardInterrupt):
                prepare(config, workspace, base)
        blocks = workspace.root.glob(".work/*/scratch/tokenized/*.arrow")
        return {file: file.stat().st_mtime_ns for file in blocks}

    artifact = prepared(tmp_path / "one", 1, 2000, kept_from=1000)
    other = prepared(tmp_path / "many", 3, 16, kept_from=0)
    assert not (tmp_path / "ws" / ".work").exists() or not [*(tmp_path / "ws/.work").iterdir()]
    sides = {side: rows_of(artifact, side) for side in ("train", "test", "removed")}
    for side in ("train", "test"):
        assert [r["row_id"] for r in rows_of(other, side)] == [r["row_id"] for r in sides[side]]

    dropped = {
        int(r["source"].rpartition(":")[2]): r["reason"]
        for r in sides["removed"]
        if r["stage"] == "filter"
    }
    assert set(dropped) == {16, 17, 32, 33}
    assert dropped[16] == "a text is in another language: fr"
    assert dropped[17] == "the answer speaks of being an AI: As an AI language model"
    assert dropped[32].endswith("This site uses cookies to remember you.")
    assert dropped[33].startswith("the answer is misspelt: ")

    # Of people's 92 rows a fifth is tested, of each topic; then two for one are trained on.
    assert not any(row["synthetic"] for row in sides["test"])
    topics = Counter(row["topic"] for row in sides["test"])
    total = Counter(r["topic"] for i, r in enumerate(people) if i not in (15, 16, 31, 32))
    assert all(abs(topics[topic] - total[topic] / 5) <= 1 for topic in "ab")
    kept = Counter(row["synthetic"] for row in sides["train"])
    assert kept[False] == 92 - len(sides["test"])
    assert abs(kept[True] - kept[False] / 2) <= 1
    beyond = [r for r in sides["removed"] if r["reason"].startswith("beyond its source's part")]
    tested = {row["row_id"] for row in sides["test"]}
    of_tested = [r for r in sides["removed"] if r["reason_code"] == "made_of_held_out"]
    assert len(of_tested) == sum(one["seed_row_id"] in tested for one in made[-40:]) > 0
    assert len(beyond) == 180 - kept[True] - len(of_tested)

    card = json.loads((artifact.path / "card.json").read_text())
    first, second = card["sources"]
    assert (first["weight"], first["num_found"], first["num_train"]) == (2, 96, kept[False])
    assert first["train_row_share"] == pytest.approx(2 / 3, abs=0.01)
    assert (first["synthetic_ratio"], second["synthetic_ratio"]) == (0, 1)
    assert card["synthetic_ratios"]["train"] == pytest.approx(1 / 3, abs=0.01)
    assert card["synthetic_rows"]["synthetic"]["num_rows"] == kept[True]
    assert card["split"]["strata"]["test"] == dict(topics.most_common())
    assert set(card["wording"]["lead_words"]) == {"list", "explain", "why"}
    assert 2.9 < card["wording"]["effective_lead_words"] <= 3
    assert card["wording"]["num_rows"] == len(sides["train"])
    assert card["dedup"]["cluster_sizes"] == {"1": 272}
    readme = (artifact.path / "README.md").read_text()
    assert "Stratified by `topic`" in readme
    assert "Prompts begin with 3 different words" in readme


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_get_the_blocks_in_the_order_of_the_rows() -> None:
    import ray.data

    rows = ray.data.range(100, override_num_blocks=9).map_batches(
        lambda table: table, batch_format="pyarrow"
    )
    rows = rows.materialize()
    blocks = ray.get(rows.to_arrow_refs())
    assert len(blocks) > 1
    ids = [number for block in blocks for number in block["id"].to_pylist()]
    assert ids == [row["id"] for row in rows.iter_rows()]
    assert sorted(ids) == list(range(100))


def test_check_tells_everything_without_ray(tmp_path: Path, base: BaseModel) -> None:
    good = [{"question": f"q {i}", "answer": f"a {i}"} for i in range(30)]
    path = write(tmp_path / "a.jsonl", [*good, "{", {"question": " ".join("word" * 300)}])
    found = check(config_for(path), base)
    assert {problem.what for problem in found.findings} == {
        "the line is not valid JSON",
        "no column `answer`",
    }
    assert (found.num_rows, found.num_usable) == (32, 30)
    assert len(found.samples) == 3
    sample = found.samples[0]
    learned = "".join(text for text, is_target in sample.tokens if is_target)
    assert learned == "a 0<|im_end|>"
    assert "".join(text for text, _ in sample.tokens).startswith("<|im_start|>system\nAnswer.")
    assert found.length_tokens["max"] >= found.length_tokens["p50"] > 0
    assert 0 < found.target_ratio < 1

    fine = check(config_for(write(tmp_path / "b.jsonl", good)), base)
    assert fine.findings == []
    assert fine.notices == []
    short = check(config_for(tmp_path / "b.jsonl", max_seq_len=8), base)
    assert "longer than data.max_seq_len" in short.findings[0].what
    absent = check(config_for(tmp_path / "absent.jsonl"), base)
    assert [problem.what for problem in absent.findings] == ["no such file"]


@pytest.mark.usefixtures("ray_cluster")
def test_marks_change_rows_and_move_none(tmp_path: Path, base: BaseModel) -> None:
    rows = [
        {"question": " ".join(sentence(f"q{i}", 8)), "answer": " ".join(sentence(f"a{i}", 8))}
        for i in range(60)
    ]
    # Two rows that ask the same: corrected, they say the same.
    rows[7]["question"] = rows[6]["question"]
    config = config_for(write(tmp_path / "a.jsonl", rows), split={"num_test_examples": 12})
    workspace = Workspace(tmp_path / "ws")
    old = prepare(config, workspace, base).artifact
    before = {side: {r["row_id"]: r for r in rows_of(old, side)} for side in ("train", "test")}
    (train_a, train_b, *_), (test_a, test_b, test_c, *_) = (list(before[s]) for s in before)
    duplicate = next(r["row_id"] for r in before["train"].values() if r["source"].endswith(":7"))

    def mark(kind: str, row: str, answer: str = "", reviewer: str = "ann") -> Mark:
        return Mark(kind, row, old.ref, reviewer, answer, created_at="2026-11-28")  # type: ignore[arg-type]

    of_test = [
        mark("bad_reference", test_a, "the right one"),
        mark("accept", test_b, "another right one"),
        mark("note", train_a),
    ]
    marks = [
        *of_test,
        mark("bad_reference", train_a, "corrected answer", "bob"),
        mark("bad_row", train_b),
        mark("bad_reference", duplicate, rows[7]["answer"]),
        mark("bad_row", test_c),
        mark("bad_row", "0" * 20),
        mark("accept", train_a, "counts for nothing"),
        mark("bad_reference", list(before["train"])[5], " ".join(sentence("long", 900))),
    ]
    published = prepare(config, workspace, base, marks)
    new = published.artifact
    assert not published.reused
    assert new.ref == "datasets/faq@v2"
    train, test = ({r["row_id"]: r for r in rows_of(new, side)} for side in ("train", "test"))
    assert set(train) == set(before["train"]) - {train_b}
    assert set(test) == set(before["test"]) - {test_c}
    assert train[train_a]["messages"][-1]["content"] == "corrected answer"
    assert train[train_a]["input_ids"] != before["train"][train_a]["input_ids"]
    assert train[duplicate]["messages"][-1]["content"] == rows[7]["answer"]
    assert test[test_a]["messages"][-1]["content"] == "the right one"
    assert test[test_b]["accepted_answers"] == ["another right one"]
    changed = {train_a, duplicate, test_a}
    for side, found in (("train", train), ("test", test)):
        for row_id, row in found.items():
            if row_id not in changed:
                assert row["input_ids"] == before[side][row_id]["input_ids"]
                assert row["messages"] == before[side][row_id]["messages"]
    assert [question.accepted for question in read_questions(new) if question.accepted] == [
        ("another right one",)
    ]
    dropped = [r for r in rows_of(new, "removed") if r["stage"] == "marks"]
    assert {r["row_id"] for r in dropped} == {train_b, test_c}
    assert dropped[0]["reason"] == "marked as a bad row by ann"
    card = json.loads((new.path / "card.json").read_text())
    applied = {(item["row_id"], item["action"]): item for item in card["fixes"]["applied"]}
    assert len(applied) == 6
    told = applied[train_a, "correct"]
    assert (told["reviewers"], told["side"], told["after"]) == (
        ["bob"],
        "train",
        "corrected answer",
    )
    assert told["before"] == before["train"][train_a]["messages"][-1]["content"]
    assert told["marks"] == [marks[3].uid]
    refused = card["fixes"]["refused"]
    assert "no row of the sources has this id" in refused[marks[7].uid]
    assert "the row is trained on" in refused[marks[8].uid]
    assert "more than data.max_seq_len (512)" in refused[marks[9].uid]
    assert card["conflicts"]["num_same_prompt"] == 0
    assert json.loads((old.path / "card.json").read_text())["conflicts"]["num_same_prompt"] == 1
    assert "corrected | " in (new.path / "README.md").read_text()
    assert next(s["removed"] for s in card["funnel"] if s["stage"] == "marks") == 2
    diff = diff_datasets(new, old)
    assert diff["moves"] == {"train → removed (marks)": 1, "test → removed (marks)": 1}

    # The same marks again, and whoever else agrees: the same version.
    again = [*marks, mark("bad_row", train_b, reviewer="eve")]
    assert prepare(config, workspace, base, again).reused
    # What is trained on is the same where only test rows differ.
    third = prepare(config, workspace, base, of_test).artifact
    assert third.fingerprint != old.fingerprint
    assert third.train_fingerprint == old.fingerprint
    assert new.train_fingerprint not in (old.fingerprint, new.fingerprint)
    states = states_of(again, [old, new])
    assert [s.state for s in states].count("applied") == 7
    by_uid = {s.mark.uid: s for s in states}
    assert by_uid[marks[3].uid].why == "since datasets/faq@v2"
    assert by_uid[marks[2].uid].state == "kept"
    assert by_uid[marks[7].uid].state == "not applied"
    assert by_uid[again[-1].uid].state == "applied"
    assert {s.state for s in states_of(of_test[:2], [old])} == {"waiting"}
