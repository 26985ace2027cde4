"""What is held at once of rows: neither too many nor too much."""

from __future__ import annotations

from itertools import chain

import pytest

from tuneloop.data import stages


@pytest.mark.parametrize(("characters", "most"), [(10, 2000), (1 << 20, 16), (40 << 20, 1)])
def test_blocks_have_fewer_rows_where_they_are_long(characters: int, most: int) -> None:
    text = "x" * characters
    rows = [{"text": text, "extra": "{}", "messages": [], "key": n} for n in range(2 * most + 1)]
    turns = [{"content": text}]
    for row in (rows, [row | {"text": "", "messages": turns} for row in rows]):
        found = list(stages._chunked(iter(row)))
        assert [len(chunk) for chunk in found] == [most, most, 1]
        assert [item["key"] for item in chain(*found)] == list(range(2 * most + 1))
