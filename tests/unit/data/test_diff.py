"""What changed between two versions of a dataset, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tuneloop.data.diff import changed_rows, diff_datasets
from tuneloop.errors import ArtifactError


def dataset(folder: Path, **files: list[dict[str, Any]]) -> Any:
    for name, rows in files.items():
        (folder / name).mkdir(parents=True)
        parquet.write_table(pa.Table.from_pylist(rows), folder / name / "part-0.parquet")
    (folder / "card.json").write_text(json.dumps({"splits": {}, "funnel": []}))
    return SimpleNamespace(
        kind="datasets", ref=f"datasets/{folder.name}@v1", path=folder, manifest={"config": {}}
    )


def row(name: str, **columns: Any) -> dict[str, Any]:
    return {"row_id": name, "source": f"rows.jsonl:{name[1:]}", **columns}


def test_rows_that_are_new_gone_or_elsewhere_in_the_order_of_the_files(tmp_path):
    old = dataset(
        tmp_path / "old",
        train=[row("r1"), row("r2"), row("r3")],
        test=[row("r4")],
        removed=[row("r5", stage="dedup"), row("r6", stage="filter")],
    )
    new = dataset(
        tmp_path / "new",
        train=[row("r9"), row("r5"), row("r1"), row("r8")],
        removed=[row("r6", stage="filter"), row("r2", stage="marks")],
    )
    assert [tuple(item.values()) for item in changed_rows(new, old).to_pylist()] == [
        ("r9", "added", None, "train", "rows.jsonl:9"),
        ("r5", "moved", "removed (dedup)", "train", "rows.jsonl:5"),
        ("r8", "added", None, "train", "rows.jsonl:8"),
        ("r2", "moved", "train", "removed (marks)", "rows.jsonl:2"),
        ("r3", "gone", "train", None, "rows.jsonl:3"),
        ("r4", "gone", "test", None, "rows.jsonl:4"),
    ]
    diff = diff_datasets(new, old)
    assert (diff["num_added"], diff["num_gone"]) == (2, 2)
    assert diff["added_to"] == {"train": 2}
    assert diff["gone_from"] == {"train": 1, "test": 1}
    assert diff["moves"] == {"removed (dedup) → train": 1, "train → removed (marks)": 1}
    assert diff["examples"]["moved"][0] == "rows.jsonl:5: removed (dedup) → train"
    json.dumps(diff)


def test_documents_that_were_packed_or_cut_are_one_row_each(tmp_path):
    packed = row("p1", document_ids=["d1", "d2.0"]), row("p2", document_ids=["d2.1", "d3"])
    old = dataset(tmp_path / "old", train=list(packed))
    alone = [row(name, document_ids=None) for name in ("d1", "d2", "d4")]
    typed = pa.schema([("row_id", pa.string()), ("source", pa.string())]).append(
        pa.field("document_ids", pa.list_(pa.string()))
    )
    new = dataset(tmp_path / "new", train=alone)
    parquet.write_table(
        pa.Table.from_pylist(alone, schema=typed), tmp_path / "new" / "train" / "part-0.parquet"
    )
    changes = changed_rows(new, old).select(["row_id", "change"]).to_pylist()
    assert [tuple(item.values()) for item in changes] == [("d4", "added"), ("d3", "gone")]


def test_only_prepared_datasets_are_compared(tmp_path):
    prepared = dataset(tmp_path / "prepared", train=[row("r1")])
    scored = dataset(tmp_path / "scored", test=[row("r1")])
    with pytest.raises(ArtifactError, match=r"scored@v1"):
        diff_datasets(prepared, scored)
