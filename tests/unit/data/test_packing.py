"""Packing keeps every piece once and leaves hardly a gap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneloop.data.write.packing import (
    num_pieces,
    pack,
    piece_lengths,
    place_documents,
    rest_lengths,
)


@given(st.lists(st.integers(0, 64), max_size=200))
def test_rows_hold_every_item_once_and_never_too_much(lengths: list[int]) -> None:
    rows = pack(lengths, 64)
    assert len(rows) == len(lengths)
    used = np.bincount(rows, weights=np.array(lengths, dtype=float)) if len(rows) else np.zeros(0)
    assert used.max(initial=0) <= 64
    # No two rows would fit into one: best fit opens a row only when none has room.
    fullest = np.sort(used)
    assert len(fullest) < 2 or fullest[0] + fullest[1] > 64


def test_hardly_a_position_stays_empty() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.4, 1, 20_000), 1, 512).astype(int)
    rows = pack(lengths, 512)
    assert lengths.sum() / ((rows.max() + 1) * 512) > 0.998


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens"):
        pack([3, 65], 64)


def test_the_last_piece_of_a_document_goes_to_its_leaders_row() -> None:
    # 130 tokens are two full rows and a rest of 30, beside which the 20 of document 2 fit best.
    assert num_pieces([130, 50, 20, 14], 50).tolist() == [3, 1, 1, 1]
    places = place_documents([130, 50, 20, 14], 50)
    assert places.leader.tolist() == [0, 1, 0, 3]
    assert places.position.tolist() == [0, 0, 1, 0]
    assert place_documents([], 50).leader.tolist() == []


@given(st.lists(st.integers(2, 200), max_size=9), st.integers(2, 40))
def test_pieces_keep_every_token_and_none_is_a_lone_token(
    lengths: list[int], max_seq_len: int
) -> None:
    pieces = piece_lengths(lengths, max_seq_len)
    counts = num_pieces(lengths, max_seq_len)
    assert len(pieces) == counts.sum()
    own = np.split(pieces, np.cumsum(counts)[:-1]) if lengths else []
    for length, sizes, rest in zip(lengths, own, rest_lengths(lengths, max_seq_len), strict=True):
        assert sizes.sum() == length
        assert sizes[-1] == rest
        assert all(sizes[:-2] == max_seq_len)
        assert sizes.min() >= 2 or max_seq_len == 2
        assert sizes.max() <= max_seq_len
