"""Rows that repeat others are found and resolved, whatever their order and their blocks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloop.config import DataConfig, DedupConfig
from tuneloop.data.dedup.minhash import (
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
from tuneloop.data.hashing.columns import Texts
from tuneloop.data.hashing.signatures import (
    band_hashes,
    normalised_hashes,
    shingles,
)
from tuneloop.data.split.split import split_rows


def keys_of(texts: list[str], config: DedupConfig, preference: list[int]) -> Keys:
    return Keys(
        normalised_hashes(Texts.of(texts)),
        band_hashes(texts, config.ngram_words, config.threshold),
        np.array(preference),
        np.array([len(text) for text in texts]),
    )


def compare_in_process(
    texts: list[str], config: DedupConfig
) -> Callable[[Sequence[CandidateGroup]], list[ResolvedGroup]]:
    def compare(groups: Sequence[CandidateGroup]) -> list[ResolvedGroup]:
        return [
            resolve_group(
                group.pairs,
                GroupTexts.plain(
                    shingles([texts[row] for row in group.rows], config.ngram_words)
                ),
                np.zeros(len(group.rows), dtype=np.int64),
                config.threshold,
            )
            for group in groups
        ]

    return compare


def no_own_parts(rows: np.ndarray, crowds: np.ndarray) -> OwnBands:
    return OwnBands(rows[:0], np.zeros((0, 1), np.uint64))


def duplicates_of(texts: list[str], config: DedupConfig, preference: list[int]) -> Duplicates:
    keys = keys_of(texts, config, preference)
    return find_duplicates(keys, config, compare_in_process(texts, config), no_own_parts)


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
    compare = compare_in_process(texts, config)
    cluster = find_duplicates(keys, config, compare, no_own_parts).cluster
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
    found = resolve_group(np.array(pairs), GroupTexts.plain(shingles(rows, 2)), np.zeros(40, dtype=np.int64), 0.8)
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
