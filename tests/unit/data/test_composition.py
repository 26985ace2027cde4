from __future__ import annotations

import numpy as np
import pytest

from tuneloop.data.card.composition import cluster_sizes, effective_number, lead_word, long_words


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Write a poem.", "write"),
        ("Please, can you explain why?", "explain"),
        ("Hi! Could you please list three?", "list"),
        ("  I'd like you to sum 1 and 2", "sum"),
        ("Please", "please"),
        ("Übersetze das.", "übersetze"),
        ("हिन्दी में लिखो।", "हिन्दी"),
        ("1 + 1 =", ""),
        ("def read(path): …", "def"),
    ],
)
def test_the_lead_word_skips_politeness(prompt: str, expected: str) -> None:
    assert lead_word(prompt) == expected


def test_long_words_are_counted_once_in_any_case() -> None:
    found = long_words("The archive keeps letters, and THE Archive is l'été 42.")
    assert found == {"the", "archive", "keeps", "letters", "and", "l'été"}
    assert long_words("कृपया मेरा खाता बंद करें") == {"कृपया", "मेरा", "खाता", "बंद", "करें"}


def test_the_effective_number_tells_spread() -> None:
    assert effective_number([7, 7, 7, 7]) == pytest.approx(4)
    assert effective_number([1000, 1]) == pytest.approx(1, abs=0.01)
    assert effective_number([]) == 0


def test_clusters_are_counted_by_size() -> None:
    cluster = np.repeat([0, 1, 2, 3, 4], [1, 1, 2, 4, 150])
    assert cluster_sizes(cluster) == {"1": 2, "2": 1, "3 to 5": 1, "more than 100": 1}
    assert cluster_sizes(np.zeros(0, dtype=np.int64)) == {}
