"""Rows that a model wrote: never tested on, capped, and compared with people's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tuneloop.config import DataConfig, TuneloopConfig, load_config
from tuneloop.data.check import check
from tuneloop.data.dedup.minhash import Duplicates
from tuneloop.data.ledger import Ledger, Removal
from tuneloop.data.rouge import rouge_l
from tuneloop.data.schema import Reason, ReasonCode, Stage
from tuneloop.data.split.assign import split_ledger
from tuneloop.data.split.split import (
    NEAR_DUPLICATES,
    SAME_PROMPT,
    limit_train,
    rank_rows,
    split_rows,
)
from tuneloop.data.split.synthetic import add_synthetic, cap_synthetic, refuse_without_people
from tuneloop.data.synthetic_rows import RowText, compare, synthetic_lines
from tuneloop.errors import DataError
from tuneloop.models.bases.source import resolve_base

NONE = np.array([], dtype=np.int64)
DATA = DataConfig.model_validate({"sources": [{"path": "x", "format": "question_answer"}]})


def test_generated_rows_are_trained_on_and_move_none_of_peoples() -> None:
    people = [f"p{i}" for i in range(100)]
    alone = split_rows(people, [""] * 100, {"": np.arange(100)}, DATA)
    # Each person's row has a generated one with the same prompt; 50 more stand alone.
    ids = [*people, *(f"m{i}" for i in range(150))]
    is_synthetic = np.array([False] * 100 + [True] * 150)
    prompts = np.array([*range(100), *range(100), *range(100, 150)])
    ranks = rank_rows(0, ids)
    found = add_synthetic(alone, is_synthetic, {SAME_PROMPT: prompts}, ranks)
    assert found.test.tolist() == alone.test.tolist()
    assert len(found.test) == 10
    assert not is_synthetic[found.test].any()
    left_out = {prompts[index] for index in found.surplus}
    assert left_out == set(alone.test.tolist())
    assert {reason.code for reason in found.surplus.values()} == {"made_of_held_out"}
    assert sorted([*found.train, *found.test, *found.surplus]) == list(range(250))
    assert len(found.unit) == 250
    order = [ids[index] for index in found.train if not is_synthetic[index]]
    assert order == [people[index] for index in alone.train]
    assert found.num_groups["train"] == alone.num_groups["train"] + 140
    # What is in no split because its unit gave its part of the test keeps generated rows out too.
    clusters = np.array([0] * 60 + [*range(60, 100)])
    data = DATA.model_copy(
        update={"split": DATA.split.model_copy(update={"num_test_examples": 60})}
    )
    some = split_rows(people, [""] * 100, {NEAR_DUPLICATES: clusters}, data)
    assert some.surplus
    again = add_synthetic(some, is_synthetic, {SAME_PROMPT: prompts}, ranks)
    assert {*some.surplus} <= {*again.surplus}
    assert all(
        prompts[index] not in prompts[again.train[again.train < 100]] for index in again.surplus
    )


def test_rows_made_of_a_duplicate_of_a_held_out_row_are_left_out() -> None:
    # Twenty rows, a duplicate of each that has gone, and what was made of the duplicates.
    ids = [f"{kind}{i}" for kind in ("kept", "gone", "made") for i in range(20)]
    kept = np.array([*range(20), *range(20), *range(40, 60)])
    columns = {
        "synthetic": [False] * 40 + [True] * 20,
        "group": [""] * 60,
        "stratum": [""] * 60,
        "prompt_key": range(60),
        "source": [f"a:{i}" for i in range(60)],
        "seed_row_id": [""] * 40 + ids[20:40],
    }
    reason = Reason(ReasonCode.NEAR_DUPLICATE, "", "")
    zeros = np.zeros(60, dtype=np.int64)
    ledger = Ledger(
        pa.table({name: list(values) for name, values in columns.items()}),
        *(zeros, zeros, pa.array(ids), zeros, np.arange(60)),
        removals={20 + i: Removal(Stage.DEDUP, reason, f"kept{i}", 0.9) for i in range(20)},
        usable=np.arange(60),
        duplicates=Duplicates(kept, kept, np.ones(60), np.zeros(60, dtype=bool)),
    )
    config = TuneloopConfig.model_validate(
        {"name": "t", "task": {"type": "generation"}, "model": {"base": "x"}, "data": DATA}
    )
    found = split_ledger(ledger, config)
    assert len(found.test) == 2
    assert set(found.surplus) == {40 + index for index in found.test.tolist()}
    assert sorted([*found.train, *found.test, *found.surplus]) == [*range(20), *range(40, 60)]


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.8])
def test_no_prefix_of_the_train_rows_has_too_many_generated_ones(ratio: float) -> None:
    is_synthetic = np.array([True] * 40 + [False] * 10 + [True] * 450)
    train = np.random.default_rng(0).permutation(500)
    kept = cap_synthetic(train, is_synthetic, ratio)
    shares = np.cumsum(is_synthetic[kept]) / np.arange(1, len(kept) + 1)
    assert shares.max() <= ratio + 1e-9
    assert (~is_synthetic[kept]).sum() == 10
    assert is_synthetic[kept].sum() == {0.0: 0, 0.25: 3, 0.8: 40}[ratio]
    assert cap_synthetic(train, is_synthetic, 1.0).tolist() == train.tolist()
    assert [i for i in kept if not is_synthetic[i]] == [i for i in train if not is_synthetic[i]]


def test_the_cap_leaves_rows_out_with_a_reason() -> None:
    ids = [f"p{i}" for i in range(40)]
    split = split_rows(ids, [""] * 40, {"": np.arange(40)}, DATA)
    is_synthetic = np.array([False] * 40 + [True] * 360)
    split = add_synthetic(split, is_synthetic, {}, rank_rows(0, [str(i) for i in range(400)]))
    limited = limit_train(split, NONE, DATA, is_synthetic=is_synthetic)
    assert is_synthetic[limited.train].sum() == 144  # four for each of 36
    assert {reason.code for reason in limited.surplus.values()} == {"synthetic_surplus"}
    assert len(limited.surplus) == 360 - 144
    few = DATA.model_copy(update={"num_train_examples": 200})
    with pytest.raises(DataError, match=r"396 without data\.max_synthetic_ratio"):
        limit_train(split, NONE, few, is_synthetic=is_synthetic)


def test_rows_of_a_model_alone_are_refused_before_anything_runs(
    tmp_path: Path, tiny_model: Path
) -> None:
    with pytest.raises(DataError, match="no row was written by people"):
        refuse_without_people(np.array([True, True]))
    rows = "\n".join(f'{{"question": "q{i}", "answer": "a", "synthetic": true}}' for i in range(9))
    (tmp_path / "rows.jsonl").write_text(rows)
    config = tmp_path / "one.yaml"
    config.write_text(
        f"name: one\ntask: {{type: generation}}\nmodel: {{base: {tiny_model}}}\n"
        f"data: {{sources: [{{path: {tmp_path}/rows.jsonl, format: question_answer}}]}}\n"
    )
    found = check(load_config(config), resolve_base(str(tiny_model)))
    assert [problem.what for problem in found.findings] == [
        "no row was written by people: there is nothing to test on"
    ]


def test_rouge_l_is_the_longest_common_sequence_of_words() -> None:
    # Lin 2004, section 3.1: 3 of 4 words in order; 2 of 4.
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)
    assert rouge_l("police killed the gunman", "the gunman kill police") == pytest.approx(0.5)
    assert rouge_l("A b, c", "a B c") == pytest.approx(2 / 3)  # words stand between white space
    assert rouge_l("one", "two three") == 0
    assert rouge_l("猫が好き", "猫が好き") == 1


def test_what_generated_rows_have_in_common_is_told() -> None:
    people = [RowText(f"word{i} asks of thing{i}", f"answer{i} is long indeed") for i in range(40)]
    made = [RowText(f"How can I find {i}", "Sure, here it is") for i in range(40)]
    found = compare(people, made)
    assert (found.people.num_rows, found.synthetic.num_rows) == (40, 40)
    assert (found.people.prompt_words, found.synthetic.prompt_words) == (4, 5)
    assert found.synthetic.openings == {"how can": 1.0}
    assert (found.people.openings_ratio, found.synthetic.openings_ratio) == (0.075, 1)
    # Of people's eight words "asks of is long indeed" are other people's; of the other nine "is".
    assert found.people.known_words_ratio == pytest.approx(5 / 8)
    assert found.synthetic.known_words_ratio == pytest.approx(1 / 9, abs=1e-4)
    assert (found.people.near_duplicate_ratio, found.synthetic.near_duplicate_ratio) == (0, 1)
    text = "\n".join(synthetic_lines(asdict(found)))
    assert "| words in a prompt | 4 | 5 |" in text
    assert "`how can` 100%" in text
