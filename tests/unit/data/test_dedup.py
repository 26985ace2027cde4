"""Rows that repeat others are found and resolved, whatever their order and their blocks."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloop.config import DataConfig, DedupConfig, TaskConfig
from tuneloop.data.dedup.conflicts import (
    differing_rows,
    outermost_rows,
    without_shared_words,
)
from tuneloop.data.dedup.deduplicate import exact_keys
from tuneloop.data.dedup.distributed import compared_answers
from tuneloop.data.dedup.minhash import (
    MANY,
    OWN_PART,
    CandidateGroup,
    Duplicates,
    GroupTexts,
    Keys,
    OwnBands,
    ResolvedGroup,
    candidate_pairs,
    find_duplicates,
    group_candidates,
    resolve_group,
)
from tuneloop.data.hashing import kernels
from tuneloop.data.hashing.columns import Texts
from tuneloop.data.hashing.content import Content
from tuneloop.data.hashing.signatures import (
    OwnParts,
    band_hashes,
    bands_of_own_parts,
    normalised_hashes,
    own_parts,
    shingles,
)
from tuneloop.data.schema import messages_type
from tuneloop.data.split.split import split_rows


def keys_of(texts: list[str], config: DedupConfig, preference: list[int]) -> Keys:
    return Keys(
        normalised_hashes(Texts.of(texts)),
        band_hashes(texts, config.ngram_words, config.threshold),
        np.array(preference),
        np.array([len(text) for text in texts]),
    )


class InProcess:
    """Compares rows as tasks do, in this process."""

    def __init__(self, texts: list[str], config: DedupConfig, answers: list[str] | None = None):
        self.texts, self.config, self.answers = texts, config, answers
        self.limits = np.zeros(len(texts), dtype=np.int64)
        self.num_rows: Counter[int] = Counter()

    def own(self, rows: np.ndarray) -> OwnParts:
        found = shingles([self.texts[row] for row in rows], self.config.ngram_words)
        counts = np.array([self.num_rows[value] for value in found.hashes.tolist()], dtype=np.int64)
        return own_parts(found, counts, self.limits[rows], self.config.ngram_words)

    def find_own(self, rows: np.ndarray, crowds: np.ndarray) -> OwnBands:
        self.limits[rows] = np.maximum(MANY, crowds // OWN_PART)
        for of_row in shingles([self.texts[row] for row in rows], self.config.ngram_words).sets():
            self.num_rows.update(of_row.tolist())
        own = self.own(rows)
        return OwnBands(rows[own.has_own], bands_of_own_parts(own.shingles)[own.has_own])

    def compare(self, groups: Sequence[CandidateGroup]) -> Iterator[ResolvedGroup]:
        for group in groups:
            texts = [self.texts[row] for row in group.rows]
            compared = GroupTexts.plain(shingles(texts, self.config.ngram_words))
            own = self.own(group.rows)
            kinds = np.where(own.has_own, kernels.OWN, kernels.NOTHING_OWN).astype(np.int8)
            kinds[self.limits[group.rows] == 0] = kernels.WHOLE
            parts = own.shingles.in_order()
            compared = compared._replace(own=kernels.OwnParts(kinds, parts.hashes, parts.offsets))
            if self.answers:
                answers = compared_answers([self.answers[row] for row in group.rows])
                compared = compared._replace(answers=answers)
            scopes = np.zeros(len(group.rows), dtype=np.int64)
            yield resolve_group(group.pairs, compared, scopes, self.config.threshold)


def duplicates_of(
    texts: list[str],
    config: DedupConfig,
    preference: list[int],
    answers: list[str] | None = None,
) -> Duplicates:
    whole = [f"{t}\n{a}" for t, a in zip(texts, answers, strict=True)] if answers else texts
    keys, here = keys_of(whole, config, preference), InProcess(whole, config, answers)
    return find_duplicates(keys, config, here.compare, here.find_own)


def test_minhash_recall_at_the_threshold_is_as_computed() -> None:
    random.seed(0)
    hits = 0
    num_pairs = 300
    texts = []
    for pair in range(num_pairs):
        # 90 shared words of 100 on each side as single-word shingles: Jaccard 90 / 110 = 0.818.
        shared = [f"w{pair}_{i}" for i in range(90)]
        texts += [" ".join(shared + [f"{side}{pair}_{i}" for i in range(10)]) for side in "ab"]
    bands = band_hashes(texts, 1, 0.8)
    pairs = {tuple(pair) for pair in candidate_pairs(bands, np.arange(len(bands))).tolist()}
    hits = sum((2 * i, 2 * i + 1) in pairs for i in range(num_pairs))
    assert hits / num_pairs >= 0.97
    assert len(pairs) <= hits + 3


def test_exact_and_near_duplicates_name_the_row_that_stays() -> None:
    words = [f"word{i}" for i in range(60)]
    base = " ".join(words)
    texts = [
        base,
        base.upper().replace(" ", "  "),
        " ".join([*words[:59], "changed"]),
        "something else entirely that is not like the others at all",
    ]
    found = duplicates_of(texts, DedupConfig(), [2, 1, 0, 3])
    # Row 2 is preferred: 0 and 1 are near-duplicates of it.
    assert found.kept.tolist() == [2, 2, 2, 3]
    assert found.similarity[0] == pytest.approx(55 / 57)
    assert len(set(found.cluster[:3].tolist())) == 1
    assert found.cluster[3] != found.cluster[0]
    exact_only = duplicates_of(texts, DedupConfig(near=False), [0, 1, 2, 3])
    assert exact_only.kept.tolist() == [0, 0, 2, 3]
    assert exact_only.exact.tolist() == [False, True, False, False]
    # Clusters hold whether or not rows are removed, so that a split keeps them together.
    neither = duplicates_of(texts, DedupConfig(near=False, exact=False), [0, 1, 2, 3])
    assert neither.kept.tolist() == [0, 1, 2, 3]
    assert len(set(neither.cluster[:3].tolist())) == 1


def test_a_chain_removes_only_rows_like_the_kept_one() -> None:
    words = [f"w{i}" for i in range(130)]
    # a ~ b and b ~ c at 0.8 or more, a and c below.
    texts = [" ".join(words[start : start + 100]) for start in (0, 10, 20)]
    found = duplicates_of(texts, DedupConfig(ngram_words=1), [0, 1, 2])
    assert found.kept.tolist() == [0, 0, 2]
    assert len(set(found.cluster.tolist())) == 1
    assert duplicates_of(texts, DedupConfig(ngram_words=1), [1, 0, 2]).kept.tolist() == [1, 1, 1]


def test_a_large_bucket_is_still_one_cluster() -> None:
    words = [f"w{i}" for i in range(100)]
    texts = [" ".join([*words, f"tail{i}"]) for i in range(300)]
    found = duplicates_of(texts, DedupConfig(), list(range(300)))
    assert found.kept.tolist() == [0] * 300


def test_result_does_not_depend_on_row_order() -> None:
    random.seed(1)
    texts = [" ".join(random.choices("abcdefghij", k=30)) for _ in range(60)]
    texts += [text + " z" for text in texts[:30]] + [text.upper() for text in texts[20:40]]
    # As in `prepare`: what rows say decides, and where they stand only between equal rows.
    named = sorted(texts)

    def kept_texts(order: list[int]) -> set[tuple[str, str]]:
        shuffled = [texts[i] for i in order]
        found = duplicates_of(
            shuffled, DedupConfig(ngram_words=3), [named.index(text) for text in shuffled]
        )
        return {(shuffled[i], shuffled[k]) for i, k in enumerate(found.kept.tolist())}

    orders = [random.sample(range(len(texts)), len(texts)) for _ in range(3)]
    results = [kept_texts(order) for order in orders]
    assert len(results[0]) == len(set(texts))
    assert results[0] == results[1] == results[2]


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(90)), st.sets(st.integers(1, 89), max_size=12))
def test_no_duplicate_straddles_the_split_whatever_the_blocks(
    order: list[int], cuts: set[int]
) -> None:
    originals = [" ".join(random.Random(i).choices("abcdefghijklmnop", k=60)) for i in range(60)]
    # A third of the rows have a near-duplicate: one word of 60 spoils 5 of 56 shingles.
    copies = [" ".join(["changed", *text.split()[1:]]) for text in originals[:20]]
    texts = [(originals + copies + [t.upper() for t in originals[:10]])[i] for i in order]
    config = DedupConfig(exact=False, near=False)
    bounds = [0, *sorted(cuts), 90]
    blocks = [texts[a:b] for a, b in pairwise(bounds)]
    whole = keys_of(texts, config, np.argsort(np.argsort(np.array(texts))).tolist())
    bands = [band_hashes(block, config.ngram_words, config.threshold) for block in blocks]
    keys = Keys(whole.exact, np.concatenate(bands), whole.preference, whole.size)
    here = InProcess(texts, config)
    cluster = find_duplicates(keys, config, here.compare, here.find_own).cluster
    of_text = dict(zip(texts, cluster.tolist(), strict=True))
    for original, copy in zip(originals, copies, strict=False):
        assert of_text[original] == of_text[copy]
    assert len(set(cluster.tolist())) == 60

    data = DataConfig.model_validate(
        {
            "sources": [{"path": "x", "format": "text"}],
            "split": {"num_test_examples": 20, "validation_ratio": 0.2},
        }
    )
    split = split_rows(texts, [""] * 90, {"": cluster}, data)
    sides = [set(cluster[s].tolist()) for s in (split.train, split.test, split.validation)]
    assert sum(map(len, sides)) == len(set.union(*sides))
    tested = {texts[i] for i in split.test}
    in_order = sorted(texts)
    reference = split_rows(
        in_order, [""] * 90, {"": np.array([of_text[text] for text in in_order])}, data
    )
    assert tested == {in_order[i] for i in reference.test}


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39))))
def test_groups_divide_the_candidates_and_nothing_else(
    num_rows: int, edges: list[tuple[int, int]]
) -> None:
    chosen = {(min(e), max(e)) for e in edges if e[0] != e[1] and max(e) < num_rows}
    pairs = np.array(sorted(chosen), dtype=np.int64).reshape(-1, 2)
    groups = group_candidates(pairs, np.full(num_rows, 10), most_characters=30)
    found = [tuple(group.rows[pair].tolist()) for group in groups for pair in group.pairs]
    assert sorted(found) == sorted(chosen)
    rows = [row for group in groups for row in group.rows.tolist()]
    assert sorted(rows) == sorted({row for pair in chosen for row in pair})
    for group in groups:
        assert (np.diff(group.rows) > 0).all()


def test_resolving_a_group_equals_plain_python() -> None:
    chooser = random.Random(3)
    base = [chooser.choices("abcdefghijklmnopqrstuvwxyz", k=60) for _ in range(4)]
    rows = []
    for index in range(40):
        row = list(base[index % 4])
        for _ in range(chooser.randrange(5)):
            row[chooser.randrange(60)] = f"new{chooser.randrange(1000)}"
        rows.append(" ".join(row))
    sets = [set(pairwise(row.split())) for row in rows]

    def alike(a: int, b: int) -> float:
        return len(sets[a] & sets[b]) / len(sets[a] | sets[b])

    pairs = [(a, b) for a in range(40) for b in range(a + 1, 40) if chooser.random() < 0.5]
    root = list(range(40))
    for a, b in pairs:
        if alike(a, b) >= 0.8:
            old, new = max(root[a], root[b]), min(root[a], root[b])
            root = [new if r == old else r for r in root]
    keeper, stay = list(range(40)), []
    for row in range(40):
        best = (
            max((alike(o, row), -o) for o in stay if root[o] == root[row])
            if row and any(root[o] == root[row] for o in stay)
            else (0.0, 0)
        )
        if best[0] >= 0.8:
            keeper[row] = -best[1]
        else:
            stay.append(row)
    found = resolve_group(
        np.array(pairs), GroupTexts.plain(shingles(rows, 2)), np.zeros(40, dtype=np.int64), 0.8
    )
    assert found.root.tolist() == root
    assert found.keeper.tolist() == keeper
    assert 4 < len(stay) < 40
    expected = [1.0 if k == r else alike(k, r) for r, k in enumerate(keeper)]
    assert found.similarity.tolist() == pytest.approx(expected)


def test_no_rows_and_no_words() -> None:
    assert duplicates_of(["!!!", "???"], DedupConfig(), [0, 1]).kept.tolist() == [0, 1]


def test_rows_of_another_scope_are_in_the_cluster_and_stay() -> None:
    texts = ["a b c d e f g h", "a b c d e f g h", "a b c d e f g i", "a b c d e f g h"]
    found = GroupTexts.plain(shingles(texts, 1))
    pairs = np.array([[a, b] for a in range(4) for b in range(a + 1, 4)])
    resolved = resolve_group(pairs, found, np.array([0, 1, 1, 0]), 0.7)
    assert resolved.root.tolist() == [0, 0, 0, 0]
    # The second is as similar to the first, but of another scope: it stays, in place of the third.
    assert resolved.keeper.tolist() == [0, 1, 1, 0]


def words(chooser: random.Random, count: int) -> str:
    return " ".join(f"w{chooser.randrange(3000)}" for _ in range(count))


def edited(text: str, chooser: random.Random, changes: int) -> str:
    changed = text.split()
    for place in chooser.sample(range(len(changed)), changes):
        changed[place] = words(chooser, 1)
    return " ".join(changed)


def test_what_many_rows_share_makes_no_duplicates_and_repeated_questions_are_found() -> None:
    chooser = random.Random(2)
    shared = words(chooser, 300)
    questions = [f"{shared} {words(chooser, chooser.randint(5, 20))}" for _ in range(200)]
    answers = [chooser.choice(["yes", "no"]) for _ in questions]
    found = duplicates_of(questions, DedupConfig(), list(range(200)), answers)
    assert not len(found.removed)
    assert len(set(found.cluster.tolist())) == 200
    # The same with words changed anywhere, and the same answer.
    texts = questions + [edited(questions[i], chooser, 3) for i in range(100)]
    order = chooser.sample(range(300), 300)
    answers += answers[:100]
    found = duplicates_of(
        [texts[i] for i in order],
        DedupConfig(),
        [int(i) for i in np.argsort(np.argsort(order))],
        [answers[i] for i in order],
    )
    removed = {order[row]: order[found.kept[row]] for row in found.removed}
    right = {copy for copy, kept in removed.items() if kept == copy - 200}
    assert len(right) >= 97
    assert len(removed) - len(right) <= 1


def test_forms_with_other_answers_stay_and_copies_of_a_form_go() -> None:
    chooser = random.Random(4)
    labels = [words(chooser, 20) for _ in range(8)]

    def form() -> tuple[str, str]:
        fields = [words(chooser, 1) for _ in range(6)] + [str(chooser.randrange(999))] * 2
        text = " ".join(f"{label}: {field}" for label, field in zip(labels, fields, strict=True))
        return text, json.dumps(dict(zip("abcdefgh", fields, strict=True)))

    forms = [form() for _ in range(100)]
    copies = [(edited(text, chooser, 2), answer.upper()) for text, answer in forms[:30]]
    texts, answers = map(list, zip(*(forms + copies), strict=True))
    found = duplicates_of(texts, DedupConfig(), list(range(130)), answers)
    assert found.kept[:100].tolist() == list(range(100))
    assert sum(found.kept[100:] == np.arange(30)) >= 29
    assert len(set(found.cluster[:100].tolist())) == 100


def test_a_page_that_was_copied_often_is_one_page() -> None:
    chooser = random.Random(6)
    page = words(chooser, 300)
    texts = [edited(page, chooser, 2) for _ in range(40)] + [words(chooser, 200) for _ in range(20)]
    found = duplicates_of(texts, DedupConfig(), list(range(60)))
    assert len(found.removed) >= 35
    assert found.removed.max() < 40


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("It is free.", "it  is free", True),
        ('{"a": 1, "b": [2]}', '{"a":1,"b":[2]}', True),
        ('{"a": 1, "b": [2]}', '{"a": 1, "b": [3]}', False),
        ("def f(a, b):\n    return a + b", "def f(a, b):\n    return a - b", False),
        ("It costs 5 dollars.", "It costs 6 dollars.", False),
        ("It is -5 outside", "It is 5 outside", False),
        ("yes", "no", False),
        (" ".join(f"w{i}" for i in range(40)), " ".join(f"w{i}" for i in range(39)) + " x", True),
        (" ".join(f"w{i}" for i in range(40)), " ".join(f"w{i}" for i in range(38)) + " 4", False),
    ],
)
def test_a_near_duplicate_needs_the_same_answer(one: str, other: str, same: bool) -> None:
    question = " ".join(f"q{i}" for i in range(400))
    found = duplicates_of([question, question + " q"], DedupConfig(), [0, 1], [one, other])
    assert found.kept.tolist() == ([0, 0] if same else [0, 1])
    # Either way they are on one side of a split.
    assert found.cluster[0] == found.cluster[1]


def test_conversations_that_differ_in_an_earlier_answer_stay() -> None:
    long = " ".join(f"q{i}" for i in range(400))
    rows = [
        [("user", long), ("assistant", f"{n} parcels"), ("user", "Thanks"), ("assistant", "Bye")]
        for n in (5, 5, 6)
    ]
    rows[1][2] = ("user", "Thank you")
    messages = [[{"role": role, "content": text} for role, text in row] for row in rows]
    table = pa.table(
        {
            "task": [""] * 3,
            "messages": pa.array(messages, messages_type()),
            "tools": [""] * 3,
            "text": [""] * 3,
        }
    )
    content = Content.of(TaskConfig(type="generation"))
    answers = content.answers(table).to_pylist()
    assert answers == ["5 parcels\nBye", "5 parcels\nBye", "6 parcels\nBye"]
    config, whole = DedupConfig(), content.column(table, "both").to_pylist()
    keys, compared = keys_of(whole, config, [0, 1, 2]), InProcess(whole, config, answers)
    found = find_duplicates(keys, config, compared.compare, compared.find_own)
    assert found.kept.tolist() == [0, 0, 2]
    assert len(set(found.cluster)) == 1


def test_one_text_cut_elsewhere_into_prompt_and_answer_is_another_row_that_stays_with_it() -> None:
    prompts = ["def add(a, b):", "def add(a, b): return", "def add(a, b):"]
    answers = ["return a + b", "a + b", "return  a + b"]
    whole = [f"{prompt}\n{answer}" for prompt, answer in zip(prompts, answers, strict=True)]
    config = DedupConfig()
    keys, compared = keys_of(whole, config, [0, 1, 2]), InProcess(whole, config, answers)
    assert len(set(keys.exact)) == 1
    keys = replace(keys, exact=exact_keys(keys.exact, normalised_hashes(Texts.of(answers))))
    found = find_duplicates(keys, config, compared.compare, compared.find_own)
    assert found.kept.tolist() == [0, 1, 0]
    assert found.exact.tolist() == [False, False, True]
    assert len(set(found.cluster)) == 1


def test_prompts_are_nearly_the_same_by_their_own_words() -> None:
    template = np.arange(100, dtype=np.uint64)
    sets = {
        n: np.append(template, np.arange(200 + 10 * n, 210 + 10 * n, dtype=np.uint64))
        for n in range(8)
    }
    pairs = np.array([[a, b] for a in range(8) for b in range(a + 1, 8)])
    own = without_shared_words(sets, pairs)
    assert all(own[n].tolist() == list(range(200 + 10 * n, 210 + 10 * n)) for n in range(8))
    few = without_shared_words({n: sets[n] for n in range(3)}, pairs[(pairs < 3).all(axis=1)])
    assert all(len(few[n]) == 110 for n in range(3))


def test_prompts_with_different_answers_are_found_in_any_order_of_their_rows() -> None:
    # Two prompts, the first with two answers; two with one answer in several rows.
    prompts, answers = np.array([1, 1, 2, 3, 3, 4]), np.array([8, 5, 8, -7, -7, -7])
    pairs = np.array([[0, 1], [2, 3]])
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(6)
        mixed = prompts[order], answers[order]
        rows = differing_rows(*mixed, pairs)
        assert mixed[0][rows].tolist() == [[1, 2], [3, 4]]
        assert mixed[1][rows].tolist() == [[5, 8], [-7, -7]]
        assert mixed[1][outermost_rows(*mixed).highest].tolist() == [8, 8, -7, -7]
