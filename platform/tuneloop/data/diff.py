"""What changed between two dataset artifacts, row by row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from tuneloop.artifacts import Artifact
from tuneloop.errors import ArtifactError, Problem

_SPLITS = ("train", "validation", "test")
_NUM_EXAMPLES = 5


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
            raise ArtifactError(
                Problem(
                    "only datasets can be compared row by row",
                    where=artifact.ref,
                    allowed="two references such as datasets/faq@v2 and datasets/faq@v1",
                )
            )
    cards = [json.loads((a.path / "card.json").read_text(encoding="utf-8")) for a in (new, old)]
    here, there = (dict(_places(artifact)) for artifact in (new, old))
    added = [row for row in here if row not in there]
    gone = [row for row in there if row not in here]
    moved = [row for row in here if row in there and here[row][0] != there[row][0]]
    moves = Counter(f"{there[row][0]} → {here[row][0]}" for row in moved)
    return {
        "new": new.ref,
        "old": old.ref,
        "rows": _both(*(_rows_by_split(card) for card in cards)),
        "funnel": _both(*(_funnel(card) for card in cards)),
        "settings": _changed_settings(new.manifest["config"], old.manifest["config"]),
        "num_added": len(added),
        "num_gone": len(gone),
        "added_to": dict(Counter(here[row][0] for row in added).most_common()),
        "gone_from": dict(Counter(there[row][0] for row in gone).most_common()),
        "moves": dict(moves.most_common()),
        "examples": {
            "added": [here[row][1] for row in added[:_NUM_EXAMPLES]],
            "gone": [there[row][1] for row in gone[:_NUM_EXAMPLES]],
            "moved": [
                f"{here[row][1]}: {there[row][0]} → {here[row][0]}" for row in moved[:_NUM_EXAMPLES]
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
        told = ", ".join(f"{place} {count:,}" for place, count in diff[places].items())
        lines.append(f"{name:<8} {diff[f'num_{name}']:>8,}   {told}")
    told = ", ".join(f"{move} {count:,}" for move, count in diff["moves"].items())
    lines.append(f"{'moved':<8} {sum(diff['moves'].values()):>8,}   {told}")
    for name, examples in diff["examples"].items():
        lines += [f"  {name}: {example}" for example in examples]
    return "\n".join(lines)


def _places(artifact: Artifact) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield (row id, (where it went, its place in the source)); a document's pieces are one."""
    from pyarrow import parquet

    for split in (*_SPLITS, "removed"):
        for file in sorted((artifact.path / split).glob("*.parquet")):
            names = parquet.read_schema(file).names
            wanted = ["row_id", "source", "stage", "document_ids"]
            table = parquet.read_table(file, columns=[name for name in wanted if name in names])
            for row in table.to_pylist():
                place = f"removed ({row['stage']})" if split == "removed" else split
                for row_id in row.get("document_ids") or [row["row_id"]]:
                    yield row_id.partition(".")[0], (place, row["source"])


def _rows_by_split(card: Mapping[str, Any]) -> dict[str, int]:
    removed = sum(step["removed"] for step in card["funnel"])
    return {name: split["num_rows"] for name, split in card["splits"].items()} | {
        "removed": removed
    }


def _funnel(card: Mapping[str, Any]) -> dict[str, int]:
    return {step["stage"]: step["rows"] for step in card["funnel"]}


def _both(new: Mapping[str, int], old: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return (old, new) for each key of either."""
    return {key: (old.get(key, 0), new.get(key, 0)) for key in dict.fromkeys([*new, *old])}


def _changed_settings(new: Any, old: Any) -> dict[str, tuple[Any, Any]]:
    here, there = dict(_flat(new)), dict(_flat(old))
    keys = sorted({*here, *there})
    return {key: (there.get(key), here.get(key)) for key in keys if here.get(key) != there.get(key)}


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in items:
        path = f"{key}.{name}" if key else str(name)
        if isinstance(item, dict | list) and item:
            yield from _flat(item, path)
        else:
            yield path, item
