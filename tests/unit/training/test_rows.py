"""The rows that are trained on, in memory and in mapped files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.training import rows as module
from tuneloop.training.rows import Rows, make_rows, open_rows, store_rows

ARRAYS = ("input_ids", "loss_mask", "offsets", "documents", "num_target_tokens", "lengths")


def test_targets_are_counted_by_hand() -> None:
    # The first token of a row has nothing before it, so it is never a target.
    rows = make_rows(["a", "b", "c"], [[5, 6, 7], [8, 9], [3]], [[1, 0, 1], [1, 1], [1]])
    assert rows.num_target_tokens.tolist() == [1, 1, 0]
    assert rows.lengths.tolist() == [3, 2, 1]
    ids, mask = rows.row(1)
    assert ids.tolist() == [8, 9]
    assert mask.tolist() == [1, 1]
    documents = make_rows(["a"], [[5, 6, 7, 8]], [[1, 1, 1, 1]], [[1, 0, 3]])
    assert documents.num_target_tokens.tolist() == [2]
    assert documents.document_lengths(0) == [1, 3]
    with pytest.raises(ValueError, match="row a"):
        make_rows(["a"], [[1, 2]], [[1]])


def test_rows_are_read_in_the_order_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name, row in (("b", "second"), ("a", "first")):
        table = pa.table({"row_id": [row], "input_ids": [[1, 2]], "loss_mask": [[0, 1]]})
        pq.write_table(table, tmp_path / "train" / f"{name}.parquet")
    stored = open_rows(store_rows(tmp_path, "train", tmp_path / "stored"))
    assert list(stored.row_ids) == ["first", "second"]


def write_split(dataset: Path, documents: bool) -> None:
    """Two files of 20 rows of uneven length, in small row groups."""
    rng = np.random.default_rng(0)
    (dataset / "train").mkdir(parents=True)
    for part in range(2):
        lengths = rng.integers(1, 30, 20).tolist()
        columns = {
            "row_id": [f"row{part}-{number}" for number in range(20)],
            "input_ids": [rng.integers(0, 600, length).tolist() for length in lengths],
            "loss_mask": [rng.integers(0, 2, length).tolist() for length in lengths],
        }
        if documents:
            columns["document_lengths"] = [[1, n - 1] if n > 1 else [1] for n in lengths]
        file = dataset / "train" / f"{part}.parquet"
        pq.write_table(pa.table(columns), file, row_group_size=7)


def in_memory(dataset: Path) -> Rows:
    columns = pq.read_table(dataset / "train").to_pydict()
    names = ("row_id", "input_ids", "loss_mask", "document_lengths")
    return make_rows(*(columns[name] for name in names if name in columns))


def assert_same(mine: Rows, other: Rows) -> None:
    assert list(mine.row_ids) == list(other.row_ids)
    for name in ARRAYS:
        assert getattr(mine, name).tolist() == getattr(other, name).tolist(), name


@pytest.mark.parametrize("documents", [False, True])
def test_stored_rows_are_those_of_the_dataset(
    documents: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_split(tmp_path, documents)
    monkeypatch.setattr(module, "_ROWS_AT_A_TIME", 3)
    stored = open_rows(store_rows(tmp_path, "train", tmp_path / "stored"))
    assert_same(stored, in_memory(tmp_path))
    assert stored.row_ids[21] == "row1-1"
    table = pq.read_table(tmp_path / "train").to_pylist()
    for index, row in enumerate(table):
        ids, mask = stored.row(index)
        assert (ids.tolist(), mask.tolist()) == (row["input_ids"], row["loss_mask"])
        assert stored.document_lengths(index) == row.get("document_lengths", [len(ids)])
    # Nothing of the tokens is in memory before it is asked for.
    assert isinstance(stored.input_ids.base, np.memmap)
    nothing = open_rows(store_rows(tmp_path, "validation", tmp_path / "stored"))
    assert len(nothing) == len(nothing.input_ids) == 0


def test_a_copy_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    write_split(tmp_path, documents=False)
    broken = tmp_path / "broken"
    (broken / "train.unfinished").mkdir(parents=True)
    (broken / "train.unfinished" / "input_ids").write_bytes(b"1234")
    folder = store_rows(tmp_path, "train", broken)
    assert_same(open_rows(folder), in_memory(tmp_path))
    assert [file.name for file in broken.iterdir()] == ["train"]
    # One that is whole is taken as it is.
    written = (folder / "input_ids").stat().st_mtime_ns
    assert store_rows(tmp_path, "train", broken) == folder
    assert (folder / "input_ids").stat().st_mtime_ns == written
