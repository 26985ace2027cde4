"""Rows that are alike: duplicates, conflicts, and train rows that quote what is evaluated on."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from prepared_rows import WORDS, config_for, rows_of, sentence, write
from tuneloop.artifacts import Workspace
from tuneloop.data import ray_rows
from tuneloop.data.check import check
from tuneloop.data.decontamination import distributed as overlaps
from tuneloop.data.dedup import distributed as comparing
from tuneloop.data.dedup import minhash as dedup
from tuneloop.data.prepare import prepare
from tuneloop.data.write import assemble as finishing
from tuneloop.errors import DataError
from tuneloop.models.bases.source import BaseModel


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_evaluated_on_is_not_trained_on(tmp_path: Path, base: BaseModel) -> None:
    rows = [
        {"question": " ".join(sentence(f"q{i}", 30)), "answer": " ".join(sentence(f"a{i}", 30))}
        for i in range(120)
    ]
    bench = [
        {"question": " ".join(sentence(f"bench{i}", 40)), "answer": " ".join(sentence(f"b{i}", 9))}
        for i in range(20)
    ]
    words = bench[2]["question"].split()
    rows[0] = {"question": bench[0]["question"].upper(), "answer": "another answer"}
    rows[1] = {"question": " ".join([*words[:-1], "new"]), "answer": bench[2]["answer"]}
    rows[2]["answer"] += " " + " ".join(bench[4]["question"].split()[3:35]) + " and so on"
    plain = tmp_path / "essay.txt"
    plain.write_text("Before it. " + rows[3]["answer"] + ". After it.")
    path = write(tmp_path / "a.jsonl", rows)
    evaluation = write(tmp_path / "bench.jsonl", bench)
    again = write(tmp_path / "again.jsonl", bench[:6])
    config = config_for(
        path,
        num_train_examples=60,
        split={"num_test_examples": 10, "num_validation_examples": 12},
        decontamination={
            "sources": [
                {"path": str(evaluation), "format": "question_answer"},
                {"path": str(plain), "format": "text"},
                {"path": str(again), "format": "question_answer"},
            ]
        },
    )
    workspace = Workspace(tmp_path / "ws")
    artifact = prepare(config, workspace, base).artifact
    sides = {side: rows_of(artifact, side) for side in ("train", "test", "validation")}
    assert {side: len(found) for side, found in sides.items()} == {
        "train": 60,
        "test": 10,
        "validation": 12,
    }
    gone = {
        int(row["source"].rpartition(":")[2]): row
        for row in rows_of(artifact, "removed")
        if row["stage"] == "decontamination"
    }
    # A row that is itself held out may repeat an evaluation: it is not trained on.
    kept_out = {
        int(row["source"].rpartition(":")[2]) for row in sides["test"] + sides["validation"]
    }
    expected = {
        1: ("same prompt", "bench.jsonl:1:"),
        2: ("near-duplicate of", "bench.jsonl:3:"),
        3: ("13-word n-grams are those of", "bench.jsonl:5:"),
        4: ("13-word n-grams are those of", "essay.txt:1:"),
    }
    assert set(gone) == set(expected) - kept_out
    assert len(gone) >= 3
    for line, row in gone.items():
        assert all(part in row["reason"] for part in expected[line])
        assert 0.5 <= row["similarity"] <= 1
    if 3 in gone:
        assert " ".join(bench[4]["question"].split()[3:20]) in gone[3]["reason"]
    card = json.loads((artifact.path / "card.json").read_text())
    origins = {Path(o["name"]).name: o for o in card["decontamination"]["origins"]}
    assert set(origins) == {"test", "validation", "bench.jsonl", "essay.txt", "again.jsonl"}
    # A train row goes once, and was a row of both files.
    assert origins["again.jsonl"]["num_removed"] == 0
    assert origins["again.jsonl"]["num_contaminated"] == origins["bench.jsonl"]["num_contaminated"]
    assert sum(origin["num_removed"] for origin in origins.values()) == len(gone)
    assert origins["bench.jsonl"]["num_rows"] == 20
    assert origins["test"]["num_removed"] == 0
    metrics = artifact.manifest["metrics"]
    assert metrics["num_contaminated_rows"] == len(gone)
    ratio = origins["bench.jsonl"]["num_contaminated"] / 20
    assert metrics["contamination"][str(evaluation)] == ratio
    assert metrics["num_validation_rows"] == 12
    assert "Contamination" in (artifact.path / "README.md").read_text()

    assert prepare(config, workspace, base).reused
    write(evaluation, bench[5:])
    assert not prepare(config, workspace, base).reused
    evaluation.write_text("{\n")
    with pytest.raises(DataError, match="not valid JSON"):
        prepare(config, workspace, base)
    assert check(config, base).findings[0].where == f"{evaluation}:1"


@pytest.mark.usefixtures("ray_cluster")
def test_questions_about_one_passage_are_on_one_side(tmp_path: Path, base: BaseModel) -> None:
    rows = []
    for number in range(20):
        # Words that no other passage has.
        passage = [f"{word}{number}" for word in sentence(f"passage {number}", 40)]
        for asked in range(5):
            question = " ".join(sentence(f"question {number} {asked}", 8))
            answer = " ".join(passage[7 * asked : 7 * asked + 4])
            row = {"question": f"{' '.join(passage)}\n\n{question}", "answer": answer}
            rows.append({**row, "passage": number})
    config = config_for(write(tmp_path / "a.jsonl", rows), split={"test_ratio": 0.2})
    made = prepare(config, Workspace(tmp_path / "ws"), base).artifact
    sides = {side: rows_of(made, side) for side in ("train", "test")}
    assert [len(sides[side]) for side in sides] == [80, 20]
    passages = {side: {row["passage"] for row in sides[side]} for side in sides}
    assert [len(passages[side]) for side in passages] == [16, 4]
    assert not passages["train"] & passages["test"]
    # A passage is a cluster of the intervals, too.
    assert len({row["split_unit"] for row in sides["test"]}) == 4
    told = "100 rows quote 20 texts of 25 words or more, from which their answers are taken"
    card = json.loads((made.path / "card.json").read_text())
    assert told in [notice["what"] for notice in card["notices"]]


@pytest.mark.usefixtures("ray_cluster")
def test_rows_that_ask_the_same_and_answer_differently_are_listed(
    tmp_path: Path, base: BaseModel
) -> None:
    rows = [
        {"question": " ".join(sentence(f"q{i}", 20)), "answer": f"answer {i}"} for i in range(40)
    ]
    words = sentence("near", 30)
    rows += [
        {"question": "How much is it?", "answer": "It is free."},
        {"question": "how much  is it?", "answer": "Ten dollars a month."},
        {"question": "How much is it?", "answer": "It is Free."},
        {"question": " ".join(words), "answer": "yes"},
        {"question": " ".join(words[::-1]), "answer": "no"},
        # The same answer, and another question: no conflict.
        {"question": " ".join(sentence("alike", 30)), "answer": "maybe"},
        {"question": " ".join(sentence("alike", 30)[::-1]), "answer": "maybe"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    artifact = prepare(config_for(path), Workspace(tmp_path / "ws"), base).artifact
    found = json.loads((artifact.path / "card.json").read_text())["conflicts"]
    assert (found["num_same_prompt"], found["num_rows_same_prompt"]) == (1, 2)
    assert found["num_near_prompt"] == 1
    metrics = artifact.manifest["metrics"]
    assert (metrics["num_conflicts"], metrics["num_near_conflicts"]) == (1, 1)
    same, near = found["examples"]
    assert same["kind"] == "same prompt"
    everyone = rows_of(artifact, "train") + rows_of(artifact, "test")
    units = {row["source"]: row["split_unit"] for row in everyone}
    together = {units[row["source"]] for row in same["rows"]}
    assert len(together) == 1
    assert sum(unit in together for unit in units.values()) == len(same["rows"])
    assert {row["split_unit"] for row in everyone} <= {row["row_id"] for row in everyone}
    assert {row["answer"].lower() for row in same["rows"]} == {
        "it is free.",
        "ten dollars a month.",
    }
    assert [row["answer"] for row in near["rows"]] == ["yes", "no"]
    assert near["rows"][0]["source"] == f"{path}:44"
    assert "Ten dollars a month." in (artifact.path / "README.md").read_text()


def planted(num_documents: int) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """Return shuffled documents and, by kind, the pairs planted among them.

    Of similarity over word 5-grams `near` pairs have at least 0.85 and `decoy` pairs at most 0.75.
    """
    chooser = random.Random(7)
    vocabulary = [f"{a}{b}" for a in WORDS for b in WORDS[:20]]
    count = num_documents // 10
    texts = [
        " ".join(chooser.choices(vocabulary, k=chooser.randrange(80, 200)))
        for _ in range(num_documents - 2 * count - count // 2)
    ]
    sources = iter(chooser.sample(texts, 2 * count + count // 2))

    def changed(text: str, least: float, most: float) -> str:
        grams = five_grams(text)
        while True:
            words = text.split()
            for _ in range(chooser.randint(1, 12)):
                words[chooser.randrange(len(words))] = chooser.choice(vocabulary)
            other = five_grams(" ".join(words))
            if least <= len(grams & other) / len(grams | other) <= most:
                return " ".join(words)

    pairs = {
        "exact": [(text, text.upper().replace(" ", "  ", 3)) for text in islice(sources, count)],
        "near": [(text, changed(text, 0.85, 0.99)) for text in islice(sources, count)],
        "decoy": [(text, changed(text, 0.4, 0.75)) for text in sources],
    }
    texts += [copy for items in pairs.values() for _, copy in items]
    chooser.shuffle(texts)
    return texts, pairs


def five_grams(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


@pytest.mark.usefixtures("ray_cluster")
def test_train_rows_that_quote_the_test_split_are_found_however_rows_are_cut(
    tmp_path: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    quoted = [" ".join(sentence(f"d{i}", 40)) for i in range(60)]
    longer = [f"{' '.join(sentence(f'before{i}', 80))} {text}" for i, text in enumerate(quoted)]
    mate_of = dict(zip([*quoted, *longer], [*longer, *quoted], strict=True))
    lines = [{"text": text} for text in sorted(mate_of)]
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(3):
        write(folder / f"{part}.jsonl", lines[part::3])
    config = config_for(
        folder,
        task={"type": "language_modeling"},
        format="text",
        max_seq_len=1024,
        split={"num_test_examples": 30, "num_validation_examples": 10},
    )
    found = []
    for workspace, words in (("ws", 8_000_000), ("other", 500)):
        monkeypatch.setattr(overlaps, "_WORDS_PER_SLICE", words)
        artifact = prepare(config, Workspace(tmp_path / workspace), base).artifact
        found.append(rows_of(artifact, "removed"))
    assert found[0] == found[1]
    side_of = {
        row["text"]: (side, row["row_id"])
        for side in ("test", "validation")
        for row in rows_of(artifact, side)
    }
    gone = {row["text"]: row for row in found[0]}
    assert {row["stage"] for row in found[0]} == {"decontamination"}
    assert set(gone) == {mate_of[text] for text in side_of} - set(side_of)
    assert len(gone) >= 20
    for text, row in gone.items():
        side, mate = side_of[mate_of[text]]
        assert row["kept_row_id"] == mate
        passage = text if text in quoted else mate_of[text]
        told = f"100% of the 13-word n-grams are those of {side} row {mate}: “{passage[:60]}"
        assert row["reason"].startswith(told)
        assert row["similarity"] == 1


@pytest.mark.usefixtures("ray_cluster")
def test_planted_duplicates_are_found_across_blocks(
    tmp_path: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, pairs = planted(2400)
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(6):
        write(folder / f"{part}.jsonl", [{"text": text} for text in texts[part::6]])
    config = config_for(folder, task={"type": "language_modeling"}, format="text")
    artifact = prepare(config, Workspace(tmp_path / "ws"), base).artifact
    removed = [row for row in rows_of(artifact, "removed") if row["stage"] == "dedup"]
    gone = {row["text"] for row in removed}
    assert len(gone) == len(removed)
    for kind in ("exact", "near"):
        # Of each planted pair exactly one goes.
        found = sum((one in gone) != (copy in gone) for one, copy in pairs[kind])
        assert found / len(pairs[kind]) >= 0.95
    mates = {t: other for a, b in pairs["exact"] + pairs["near"] for t, other in ((a, b), (b, a))}
    assert sum(mates.get(text, text) not in gone for text in gone) / len(gone) >= 0.97
    assert gone.isdisjoint(text for pair in pairs["decoy"] for text in pair)
    assert min(row["similarity"] for row in removed) >= 0.8

    # One file, another order, other blocks, many small groups to compare and tables to write: the
    # same rows go to the same places.
    single = tmp_path / "single"
    single.mkdir()
    write(single / "all.jsonl", [{"text": text} for text in sorted(texts)])
    monkeypatch.setattr(ray_rows, "_ROWS_PER_BLOCK", 500)
    monkeypatch.setattr(finishing, "_CHARACTERS_PER_TABLE", 50_000)
    monkeypatch.setattr(finishing, "_MOST_PARTS", 50)
    monkeypatch.setattr(dedup, "_GROUP_CHARACTERS", 20_000)
    monkeypatch.setattr(comparing, "_BLOCKS_PER_TASK", 1)
    config = config_for(single, task={"type": "language_modeling"}, format="text")
    other = prepare(config, Workspace(tmp_path / "ws2"), base).artifact
    for side in ("train", "test"):
        assert [row["row_id"] for row in rows_of(artifact, side)] == [
            row["row_id"] for row in rows_of(other, side)
        ]
        assert [row["input_ids"] for row in rows_of(artifact, side)] == [
            row["input_ids"] for row in rows_of(other, side)
        ]
    assert {(row["row_id"], row["kept_row_id"]) for row in removed} == {
        (row["row_id"], row["kept_row_id"])
        for row in rows_of(other, "removed")
        if row["stage"] == "dedup"
    }
