"""What changed between two dataset artifacts, row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from tuneloop.artifacts import Artifact
from tuneloop.data.schema import SPLITS, Side
from tuneloop.errors import ArtifactError

CHANGES = ("added", "gone", "moved")
_NUM_EXAMPLES = 5
_MEMORY_LIMIT = "512MB"
T = TypeVar("T")


def diff_datasets(new: Artifact, old: Artifact, changed: pa.Table | None = None) -> dict[str, Any]:
    """Return how two datasets differ; rows are the same where they say the same.

    Args:
        new: A dataset artifact.
        old: The one it is held against, of any name.
        changed: What `changed_rows` says of them, if it is known.

    Returns:
        `rows` and `funnel`, each with old and new numbers; `settings`, the dotted keys that differ;
        `num_added`, `num_gone` and `moves` (from where to where, and how many) of what was found
        in the sources; `examples` of each, by place in the source.

    Raises:
        ArtifactError: One of them is no dataset.
    """
    changed = changed_rows(new, old) if changed is None else changed
    new_card, old_card = (
        json.loads((a.path / "card.json").read_text(encoding="utf-8")) for a in (new, old)
    )
    kinds = {kind: changed.filter(pc.equal(changed["change"], kind)) for kind in CHANGES}
    added, gone, moved = kinds.values()
    move = pc.binary_join_element_wise(moved["before"], moved["after"], " → ")
    examples = {kind: rows["source"].slice(0, _NUM_EXAMPLES) for kind, rows in kinds.items()}
    examples["moved"] = pc.binary_join_element_wise(
        examples["moved"], move.slice(0, _NUM_EXAMPLES), ": "
    )
    return {
        "new": new.ref,
        "old": old.ref,
        "rows": _both(_rows_by_split(new_card), _rows_by_split(old_card), 0),
        "funnel": _both(_funnel(new_card), _funnel(old_card), 0),
        "settings": _changed_settings(new.manifest["config"], old.manifest["config"]),
        "num_added": added.num_rows,
        "num_gone": gone.num_rows,
        "added_to": _counts(added["after"]),
        "gone_from": _counts(gone["before"]),
        "moves": _counts(move),
        "examples": {kind: found.to_pylist() for kind, found in examples.items()},
    }


def changed_rows(new: Artifact, old: Artifact) -> pa.Table:
    """Return the rows that only one of two datasets has, or that are elsewhere in the other.

    Args:
        new: A dataset artifact.
        old: The one it is held against, of any name.

    Returns:
        One row each: `row_id`; `change`, one of `CHANGES`; `before` and `after`, the split or
        `removed (STAGE)`, null where a dataset lacks the row; `source`, its place in the sources.
        In the order of the new dataset; what is gone comes last, in the order of the old one.

    Raises:
        ArtifactError: One of them is no dataset.
    """
    for artifact in (new, old):
        # Datasets of rows that were only scored hold a test split and nothing else.
        if artifact.kind != "datasets" or not (artifact.path / Side.TRAIN.folder).is_dir():
            raise ArtifactError.of(
                "only datasets that `tuneloop prepare` made can be compared row by row",
                where=artifact.ref,
                allowed="two references such as datasets/faq@v2 and datasets/faq@v1",
            )
    with duckdb.connect(config={"memory_limit": _MEMORY_LIMIT}) as connection:
        found: pa.Table = connection.execute(
            f"WITH new AS ({_places(new)}), old AS ({_places(old)}) "
            "SELECT row_id, "
            "CASE WHEN old.place IS NULL THEN 'added' WHEN new.place IS NULL THEN 'gone' "
            "ELSE 'moved' END AS change, "
            "old.place AS before, new.place AS after, coalesce(new.source, old.source) AS source "
            "FROM new FULL JOIN old USING (row_id) WHERE new.place IS DISTINCT FROM old.place "
            "ORDER BY new.number NULLS LAST, old.number, row_id"
        ).to_arrow_table()
    return found


def diff_text(diff: Mapping[str, Any]) -> str:
    """Return the differences as plain lines."""
    lines = [f"{diff['new']} against {diff['old']}", ""]
    for name in ("rows", "funnel"):
        lines.append(f"{name:<22} {'old':>10} {'new':>10} {'change':>10}")
        for key, (old, new) in diff[name].items():
            lines.append(f"  {key:<20} {old:>10,} {new:>10,} {new - old:>+10,}")
        lines.append("")
    if diff["settings"]:
        lines.append("settings")
        for key, (old, new) in diff["settings"].items():
            lines.append(f"  {key}: {json.dumps(old)} → {json.dumps(new)}")
        lines.append("")
    for name, places in (("added", "added_to"), ("gone", "gone_from")):
        counts = ", ".join(f"{place} {count:,}" for place, count in diff[places].items())
        lines.append(f"{name:<8} {diff[f'num_{name}']:>8,}   {counts}")
    counts = ", ".join(f"{move} {count:,}" for move, count in diff["moves"].items())
    lines.append(f"{'moved':<8} {sum(diff['moves'].values()):>8,}   {counts}")
    for name, examples in diff["examples"].items():
        lines += [f"  {name}: {example}" for example in examples]
    return "\n".join(lines)


def _places(artifact: Artifact) -> str:
    """Return, as SQL, where each row is, in the dataset and in the sources."""
    found = list[str]()
    for side in (*SPLITS, Side.REMOVED):
        for file in sorted((artifact.path / side.folder).glob("*.parquet")):
            ids, place = "row_id", f"'{side.folder}'"
            if "document_ids" in parquet.read_schema(file).names:
                ids = "unnest(CASE WHEN len(document_ids) > 0 THEN document_ids ELSE [row_id] END)"
            if side is Side.REMOVED:
                place = "'removed (' || stage || ')'"
            path = str(file).replace("'", "''")
            found.append(
                f"SELECT {ids} AS row_id, source, {place} AS place, "
                f"{len(found) << 40} + file_row_number AS number "
                f"FROM read_parquet('{path}', file_row_number=true)"
            )
    # A document is one row: its pieces are called by its id, a dot and their number.
    return (
        "SELECT split_part(row_id, '.', 1) AS row_id, arg_max(source, number) AS source, "
        "arg_max(place, number) AS place, min(number) AS number "
        f"FROM ({' UNION ALL '.join(found)}) GROUP BY 1"
    )


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    """Return how often each value occurs, the most frequent first."""
    counts = ((item["values"], item["counts"]) for item in pc.value_counts(values).to_pylist())
    return dict(sorted(counts, key=lambda item: -item[1]))


def _rows_by_split(card: Mapping[str, Any]) -> dict[str, int]:
    removed = sum(step["removed"] for step in card["funnel"])
    return {name: split["num_rows"] for name, split in card["splits"].items()} | {
        "removed": removed
    }


def _funnel(card: Mapping[str, Any]) -> dict[str, int]:
    return {step["stage"]: step["rows"] for step in card["funnel"]}


def _both(new: Mapping[str, T], old: Mapping[str, T], absent: T) -> dict[str, tuple[T, T]]:
    """Return (old, new) for each key of either."""
    return {
        key: (old.get(key, absent), new.get(key, absent)) for key in dict.fromkeys([*new, *old])
    }


def _changed_settings(new: object, old: object) -> dict[str, tuple[Any, Any]]:
    values = _both(dict(_flat(new)), dict(_flat(old)), None)
    return {key: pair for key, pair in sorted(values.items()) if pair[0] != pair[1]}


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in items:
        path = f"{key}.{name}" if key else str(name)
        if isinstance(item, dict | list) and item:
            yield from _flat(item, path)
        else:
            yield path, item
