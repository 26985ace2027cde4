from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloop.config import DataConfig, DedupConfig
from tuneloop.data.dedup import Duplicates, Keys, candidate_pairs, find_duplicates
from tuneloop.data.signatures import (
    band_hashes,
    band_shape,
    jaccard,
    normalised_hash,
    shingles,
)
from tuneloop.data.split import split_rows


def duplicates_of(texts: list[str], config: DedupConfig, preference: list[int]) -> Duplicates:
    found = shingles(texts, config.ngram_words)
    sets = found.sets()
    keys = Keys(
        np.array([normalised_hash(text) for text in texts]),
        band_hashes(found, config.threshold),
        np.array(preference),
    )
    return find_duplicates(keys, config, lambda rows: {int(i): sets[i] for i in rows})


def python_shingles(text: str, n: int) -> set[tuple[str, ...]]:
    import re

    words = re.findall(r"[a-z0-9_]+", text.lower())
    if len(words) < n:
        return {tuple(words)} if words else set()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet="abAB1_ ,.\n", max_size=60), min_size=1, max_size=6),
    st.integers(1, 6),
)
def test_vectorised_shingles_equal_plain_python(texts: list[str], n: int) -> None:
    sets = shingles(texts, n).sets()
    plain = [python_shingles(text, n) for text in texts]
    assert [len(s) for s in sets] == [len(s) for s in plain]
    for i in range(len(texts)):
        for j in range(len(texts)):
            union = plain[i] | plain[j]
            expected = len(plain[i] & plain[j]) / len(union) if union else 0.0
            assert jaccard(sets[i], sets[j]) == pytest.approx(expected)


def test_shingles_do_not_depend_on_the_batch() -> None:
    texts = [
        "the quick brown fox jumps over it",
        "",
        "one two",
        "...",
        "Ünïcode wörter sind es auch",
    ]
    together = shingles(texts, 5).sets()
    for text, expected in zip(texts, together, strict=True):
        assert np.array_equal(shingles([text], 5).sets()[0], expected)
    bands = band_hashes(shingles(texts, 5), 0.8)
    assert not bands[1].any()
    assert bands[4].all()
    assert np.array_equal(band_hashes(shingles(texts[4:], 5), 0.8)[0], bands[4])


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_band_shape_reaches_its_recall(threshold: float) -> None:
    bands, rows = band_shape(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.98


def test_minhash_recall_at_the_threshold_is_as_computed() -> None:
    random.seed(0)
    hits = 0
    num_pairs = 300
    texts = []
    for pair in range(num_pairs):
        # 90 shared words of 100 on each side as single-word shingles: Jaccard 90 / 110 = 0.818.
        shared = [f"w{pair}_{i}" for i in range(90)]
        texts += [" ".join(shared + [f"{side}{pair}_{i}" for i in range(10)]) for side in "ab"]
    bands = band_hashes(shingles(texts, 1), 0.8)
    pairs = {tuple(pair) for pair in candidate_pairs(bands).tolist()}
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
    found = [shingles(block, config.ngram_words) for block in blocks]
    sets = [values for item in found for values in item.sets()]
    keys = Keys(
        np.array([normalised_hash(text) for text in texts]),
        np.concatenate([band_hashes(item, config.threshold) for item in found]),
        np.argsort(np.argsort(np.array(texts))),
    )
    cluster = find_duplicates(keys, config, lambda rows: {int(i): sets[i] for i in rows}).cluster
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
    split = split_rows(texts, [""] * 90, [cluster], data)
    sides = [set(cluster[s].tolist()) for s in (split.train, split.test, split.validation)]
    assert sum(map(len, sides)) == len(set.union(*sides))
    tested = {texts[i] for i in split.test}
    in_order = sorted(texts)
    reference = split_rows(
        in_order, [""] * 90, [np.array([of_text[text] for text in in_order])], data
    )
    assert tested == {in_order[i] for i in reference.test}


def test_no_rows_and_no_words() -> None:
    assert duplicates_of(["!!!", "???"], DedupConfig(), [0, 1]).kept.tolist() == [0, 1]
