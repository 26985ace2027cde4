"""The user's own columns: from the JSON that travels with each row to columns of the dataset.

JSON says nothing of a column's type, and rows and files may disagree. So the shape of all values is
found first, block by block, and merged. A column that no Arrow type of Parquet holds (values of
several types, objects without fields, whole numbers of 70 bits) is kept as JSON text.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.json

from tuneloop.errors import Problem

# More keys are data, not the names of fields; Parquet stores a column for each field.
_MOST_FIELDS = 1000
_MOST_LEVELS = 16
# Larger whole numbers have no float of their own.
_LARGEST_EXACT = 2**53
_AS_JSON = {"encoding": "json"}


class Shape(NamedTuple):
    """What the values of a column have in common.

    Args:
        kind: `null` if there are no values, `mixed` if they have several types.
        has_fraction: Some number is a float.
        lowest: Of the whole numbers; 0 without one.
        highest: Likewise.
        parts: Shapes of the fields of objects, or of a list's items under the name `item`.
    """

    kind: Literal["null", "bool", "number", "string", "list", "object", "mixed"]
    has_fraction: bool = False
    lowest: int = 0
    highest: int = 0
    parts: Mapping[str, Shape] = {}

    @staticmethod
    def of(values: Sequence[Any]) -> Shape:
        """Return the shape of values that JSON can hold."""
        types = set(map(type, values)) - {type(None)}
        if not types:
            return Shape("null")
        if types == {str}:
            return Shape("string")
        if types == {bool}:
            return Shape("bool")
        if types <= {int, float}:
            whole = [value for value in values if type(value) is int]
            return Shape("number", float in types, min(whole, default=0), max(whole, default=0))
        present = [value for value in values if value is not None]
        if types == {list}:
            items = list(itertools.chain.from_iterable(present))
            return Shape("list", parts={"item": Shape.of(items)})
        if types == {dict}:
            fields: dict[str, list[Any]] = {}
            for name, value in itertools.chain.from_iterable(map(dict.items, present)):
                fields.setdefault(name, []).append(value)
            return Shape("object", parts={name: Shape.of(own) for name, own in fields.items()})
        return Shape("mixed")

    @staticmethod
    def from_json(value: Sequence[Any]) -> Shape:
        """Return a shape from what `json` makes of it."""
        kind, has_fraction, lowest, highest, parts = value
        own = {name: Shape.from_json(part) for name, part in parts.items()}
        return Shape(kind, has_fraction, lowest, highest, own)

    def merged(self, other: Shape) -> Shape:
        """Return the shape of the values of both."""
        if "null" in (self.kind, other.kind):
            return other if self.kind == "null" else self
        if self.kind != other.kind:
            return Shape("mixed")
        return Shape(
            self.kind,
            self.has_fraction or other.has_fraction,
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
            merged_shapes([self.parts, other.parts]),
        )

    def arrow_type(self, levels: int = _MOST_LEVELS) -> pa.DataType | None:
        """Return the Arrow type that holds every value; None if there is none.

        Args:
            levels: How deep lists and objects may be nested.
        """
        if self.kind in ("null", "string"):
            return pa.string()
        if self.kind == "bool":
            return pa.bool_()
        if self.kind == "number":
            if self.has_fraction:
                is_exact = self.lowest >= -_LARGEST_EXACT and self.highest <= _LARGEST_EXACT
                return pa.float64() if is_exact else None
            return pa.int64() if self.lowest >= -(2**63) and self.highest < 2**63 else None
        if self.kind == "mixed" or not 0 < len(self.parts) <= _MOST_FIELDS or not levels:
            return None
        types = {name: part.arrow_type(levels - 1) for name, part in self.parts.items()}
        if any(part is None for part in types.values()):
            return None
        return pa.list_(types["item"]) if self.kind == "list" else pa.struct(list(types.items()))


def shapes_of(extras: Iterable[str]) -> dict[str, Shape]:
    """Return the shape of each own column of some rows.

    Args:
        extras: `extra` of the rows: JSON objects.
    """
    values: dict[str, list[Any]] = {}
    for text in extras:
        for name, value in json.loads(text).items():
            values.setdefault(name, []).append(value)
    return {name: Shape.of(items) for name, items in values.items()}


def merged_shapes(found: Iterable[Mapping[str, Shape]]) -> dict[str, Shape]:
    """Return the shapes by name over all blocks of rows, or parts of values."""
    merged: dict[str, Shape] = {}
    for shapes in found:
        for name, shape in shapes.items():
            merged[name] = merged[name].merged(shape) if name in merged else shape
    return merged


def schema_of(shapes: Mapping[str, Shape]) -> pa.Schema:
    """Return the Arrow schema of the own columns; one kept as JSON text says so in its metadata."""
    types = {name: shape.arrow_type() for name, shape in sorted(shapes.items())}
    return pa.schema(
        [
            pa.field(name, pa.string(), metadata=_AS_JSON) if own is None else pa.field(name, own)
            for name, own in types.items()
        ]
    )


def json_text_notice(schema: pa.Schema) -> list[Problem]:
    """Return the notice of the columns that are kept as JSON text; none if there are none."""
    names = [field.name for field in schema if field.metadata]
    if not names:
        return []
    return [
        Problem(
            f"{len(names):,} of your own columns are kept as JSON text",
            where=", ".join(names),
            got="values of several types, objects without fields, or numbers of over 64 bits",
            remedy="nothing has to be done: they are not trained on",
        )
    ]


def own_columns(extra: pa.ChunkedArray, columns: pa.Schema) -> dict[str, pa.Array]:
    """Return the user's own columns of rows from their JSON.

    Args:
        columns: As `schema_of` gives it, over all rows.
    """
    lines = extra.to_pylist()
    found = _parsed(lines, pa.schema([field for field in columns if not field.metadata]))
    left = [field for field in columns if field.name not in found]
    if left:
        rows = [json.loads(line) for line in lines]
        for field in left:
            values = [row.get(field.name) for row in rows]
            if field.metadata:
                values = [
                    None if value is None else json.dumps(value, ensure_ascii=False)
                    for value in values
                ]
            found[field.name] = pa.array(values, field.type)
    return found


def _parsed(lines: Sequence[str], schema: pa.Schema) -> dict[str, pa.Array]:
    """Return columns of JSON by Arrow's own parser; none if it does not know what is in them."""
    if not lines or not len(schema):
        return {}
    data = "\n".join(lines).encode()
    try:
        table = pyarrow.json.read_json(
            io.BytesIO(data),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowException:  # a number that is not finite, for example
        return {}
    return {name: table[name] for name in schema.names}
