"""What changed between two dataset artifacts, row by row."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from pyarrow import parquet

from tuneloop.artifacts import Artifact
from tuneloop.data.schema import SPLITS, Side
from tuneloop.errors import ArtifactError

_NUM_EXAMPLES = 5
T = TypeVar("T")


class _Place(NamedTuple):
    """Where a row is in the dataset, and where it was in the sources."""

    side: str
    source: str


def diff_datasets(new: Artifact, old: Artifact) -> dict[str, Any]:
    """Return how two datasets differ; rows are the same where they say the same.

    Args:
        new: A dataset artifact.
        old: The one it is held against, of any name.

    Returns:
        `rows` and `funnel`, each with old and new numbers; `settings`, the dotted keys that differ;
        `num_added`, `num_gone` and `moves` (from where to where, and how many) of what was found
        in the sources; `examples` of each, by place in the source.

    Raises:
        ArtifactError: One of them is no dataset.
    """
    for artifact in (new, old):
        if artifact.kind != "datasets":
            raise ArtifactError.of(
                "only datasets can be compared row by row",
                where=artifact.ref,
                allowed="two references such as datasets/faq@v2 and datasets/faq@v1",
            )
    new_card, old_card = (
        json.loads((a.path / "card.json").read_text(encoding="utf-8")) for a in (new, old)
    )
    new_rows, old_rows = (dict(_places(artifact)) for artifact in (new, old))
    added = [row for row in new_rows if row not in old_rows]
    gone = [row for row in old_rows if row not in new_rows]
    moved = {
        row: f"{old_rows[row].side} → {place.side}"
        for row, place in new_rows.items()
        if row in old_rows and old_rows[row].side != place.side
    }
    return {
        "new": new.ref,
        "old": old.ref,
        "rows": _both(_rows_by_split(new_card), _rows_by_split(old_card), 0),
        "funnel": _both(_funnel(new_card), _funnel(old_card), 0),
        "settings": _changed_settings(new.manifest["config"], old.manifest["config"]),
        "num_added": len(added),
        "num_gone": len(gone),
        "added_to": dict(Counter(new_rows[row].side for row in added).most_common()),
        "gone_from": dict(Counter(old_rows[row].side for row in gone).most_common()),
        "moves": dict(Counter(moved.values()).most_common()),
        "examples": {
            "added": [new_rows[row].source for row in added[:_NUM_EXAMPLES]],
            "gone": [old_rows[row].source for row in gone[:_NUM_EXAMPLES]],
            "moved": [
                f"{new_rows[row].source}: {move}"
                for row, move in itertools.islice(moved.items(), _NUM_EXAMPLES)
            ],
        },
    }


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


def _places(artifact: Artifact) -> Iterator[tuple[str, _Place]]:
    """Yield each row's id and its place; the pieces of a document are one row."""
    for side in (*SPLITS, Side.REMOVED):
        for file in sorted((artifact.path / side.folder).glob("*.parquet")):
            names = parquet.read_schema(file).names
            columns = ["row_id", "source", "stage", "document_ids"]
            table = parquet.read_table(file, columns=[name for name in columns if name in names])
            for row in table.to_pylist():
                where = f"removed ({row['stage']})" if side is Side.REMOVED else side.folder
                for row_id in row.get("document_ids") or [row["row_id"]]:
                    yield row_id.partition(".")[0], _Place(where, row["source"])


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
