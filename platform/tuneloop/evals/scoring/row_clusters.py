"""Which rows of a held-out split belong together: they are right and wrong together."""

from __future__ import annotations

import hashlib
import json
import re
from typing import NamedTuple

import pyarrow.parquet as pq

from tuneloop.artifacts import Artifact
from tuneloop.errors import ConfigError

# What clusters are called where no column says which rows belong together.
BY_QUESTION = "question"
# The column of a dataset that tells rows with one prompt, and near-duplicates, to be one unit.
_UNIT = "split_unit"
# What programs write where there is no value; and a whole number where another row has none.
_MISSING = frozenset({"nan", "<na>"})
_WHOLE = re.compile(r"\A(-?\d+)\.0\Z")


class RowClusters(NamedTuple):
    """The cluster of every row that is answered.

    Args:
        by: The column that names them; `question` for rows that ask the same or nearly the same.
        names: Name of the cluster by row id.
    """

    by: str
    names: dict[str, str]


def read_clusters(
    dataset: Artifact, group_by: str | None = None, split: str = "test"
) -> RowClusters:
    """Return the clusters of a held-out split.

    Args:
        dataset: Artifact with this split.
        group_by: The column that names the clusters. Default: the one by which the dataset was
            split; without one, or if the dataset does not carry it, near-duplicates and rows with
            the same question are a cluster.
        split: `test` or `validation`.

    Raises:
        ConfigError: The dataset has no column `group_by`.
    """
    config = dataset.manifest.get("config") or {}
    sides = (config.get("data") or {}).get("split") or {}
    wanted = group_by or sides.get("group_by")
    clusters: dict[str, str] = {}
    found = ""
    for file in sorted((dataset.path / split).glob("*.parquet")):
        stored = pq.read_schema(file).names
        # A column of the user's whose name the dataset needs for itself is carried under this one.
        choices = [name for name in (f"original_{wanted}", wanted) if wanted and name in stored]
        if group_by and not choices:
            raise ConfigError.of(
                "the dataset has no such column to group its rows by",
                where="evaluation.group_by",
                got=group_by,
                allowed=", ".join(name for name in stored if name != "row_id"),
                remedy="name a column of the rows, or leave the setting out",
            )
        found = found or ("" if not choices else str(wanted))
        if not choices and _UNIT in stored:
            choices = [_UNIT]
        column = choices[0] if choices else "messages" if "messages" in stored else ""
        table = pq.read_table(file, columns=["row_id", *([column] if column else [])])
        for row in table.to_pylist():
            value = row.get(column)
            row_id = str(row["row_id"])
            clusters[row_id] = _name(value, is_question=not choices) or row_id
    return RowClusters(found or BY_QUESTION, clusters)


def _name(value: object, is_question: bool) -> str:
    """Return a cluster's name; empty where the row has none."""
    if value is None:
        return ""
    if not is_question:
        text = (value if isinstance(value, str) else json.dumps(value, default=str)).strip()
        return "" if text.casefold() in _MISSING else _WHOLE.sub(r"\1", text)
    asked = json.dumps(value[:-1] if isinstance(value, list) else value, sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()[:16]
