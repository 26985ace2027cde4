from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tuneloop.data.tokenize.block_cache import kept_blocks, make_or_read


def test_a_block_is_made_once_and_an_unfinished_one_again(tmp_path: Path) -> None:
    folder = tmp_path / "blocks"
    assert kept_blocks(folder) == 0
    made: list[int] = []
    dies = False

    def double(table: Any) -> Any:
        if dies:
            raise KeyboardInterrupt
        made.append(table.num_rows)
        bands = pa.FixedSizeListArray.from_arrays(table["key"].combine_chunks().cast("uint64"), 1)
        return table.append_column("bands", bands)

    table = pa.table({"key": pa.array([7, 8, 1 << 41]), "messages": [["a"], [], ["b", "c"]]})
    schema = pa.schema([("key", pa.int64())])
    first = make_or_read(table, double, schema, folder)
    assert kept_blocks(folder) == 1
    again = make_or_read(table, double, schema, folder)
    assert again.schema == first.schema
    assert again.to_pylist() == first.to_pylist()
    make_or_read(table.slice(0, 2), double, schema, folder)
    make_or_read(table.slice(0, 0), double, schema, folder)
    assert made == [3, 2, 0]
    # What a version with other columns left is not read.
    make_or_read(table, double, schema.append(pa.field("cut", pa.string())), folder)
    assert made == [3, 2, 0, 3]
    dies = True
    with pytest.raises(KeyboardInterrupt):
        make_or_read(table.slice(1), double, schema, folder)
    (folder / "abc.123.part").write_bytes(b"half")
    assert kept_blocks(folder) == 3
    assert not list(folder.glob("*.part"))
