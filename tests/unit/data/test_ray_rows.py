"""What is held at once of rows: neither too many nor too much."""

from __future__ import annotations

from itertools import chain

import pyarrow as pa
import pytest

from tuneloop.config import DedupConfig, TaskConfig
from tuneloop.data import ray_rows
from tuneloop.data.hashing.content import Content, content_id, dedup_keys


@pytest.mark.parametrize(("characters", "most"), [(10, 2000), (1 << 20, 16), (40 << 20, 1)])
def test_blocks_have_fewer_rows_where_they_are_long(characters: int, most: int) -> None:
    text = "x" * characters
    rows = [{"text": text, "extra": "{}", "messages": [], "key": n} for n in range(2 * most + 1)]
    turns = [{"content": text}]
    for row in (rows, [row | {"text": "", "messages": turns} for row in rows]):
        found = list(ray_rows._chunked(iter(row)))
        assert [len(chunk) for chunk in found] == [most, most, 1]
        assert [item["key"] for item in chain(*found)] == list(range(2 * most + 1))


def test_a_document_is_known_by_what_it_says() -> None:
    """The same in any block, and as if it were hashed by itself."""
    content, dedup = Content.of(TaskConfig(type="language_modeling")), DedupConfig()
    texts = ["plain", "Grüße, 世界", "", "plain", "\0 and 🙂"]
    wanted = [content_id([], text) for text in texts]
    table = pa.table({"text": pa.array(texts, pa.string())})
    for start, stop in ((0, 5), (1, 4), (2, 3)):
        found = dedup_keys(table.slice(start, stop - start), content, dedup)["content_id"]
        assert found.to_pylist() == wanted[start:stop]
    chunked = pa.concat_tables([table.slice(0, 2), table.slice(2)])
    assert dedup_keys(chunked, content, dedup)["content_id"].to_pylist() == wanted
