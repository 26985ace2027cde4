"""Values as files hold them: what Python and JSON make of them."""

from __future__ import annotations

import base64
import json
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa


def python_values(column: pa.Array) -> list[Any]:
    """Return the values of an Arrow column; a time that Python cannot hold as text.

    Numbers of 32 bits are those that were written: 3.8, not 3.799999952316284.
    """
    as_text = _with_floats(column.type, pa.string())
    if as_text != column.type:
        column = column.cast(as_text).cast(_with_floats(column.type, pa.float64()))
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        raise
    except (OverflowError, ValueError, LookupError):
        return [_python_value(scalar) for scalar in column]


def _with_floats(own: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return a type with another one in place of numbers of 32 bits, in lists and objects too."""
    if pa.types.is_float32(own):
        return other
    if pa.types.is_struct(own):
        return pa.struct([field.with_type(_with_floats(field.type, other)) for field in own])
    if pa.types.is_list(own):
        return pa.list_(own.value_field.with_type(_with_floats(own.value_type, other)))
    if pa.types.is_large_list(own):
        return pa.large_list(own.value_field.with_type(_with_floats(own.value_type, other)))
    return own


def _python_value(scalar: pa.Scalar) -> Any:
    """Return a value as Python has it; a time that Python cannot hold as text."""
    try:
        return scalar.as_py()
    except (OverflowError, ValueError, LookupError):
        if isinstance(scalar, pa.StructScalar):
            return {name: _python_value(part) for name, part in scalar.items()}
        if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
            return [_python_value(part) for part in scalar.values]
        if isinstance(scalar, pa.TimestampScalar):
            return str(np.datetime64(scalar.value, scalar.type.unit)).replace("T", " ")
        if isinstance(scalar, pa.DurationScalar):
            return f"{scalar.value} {scalar.type.unit}"
        return str(scalar.cast(pa.string()))


def as_text(value: object) -> str:
    """Return what JSON has no type for as text: a date, a decimal, bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return str(value)


def learned_json(value: object) -> str:
    """Return the JSON of what is learned: a decimal is a number there, a date its text."""
    return json.dumps(value, ensure_ascii=False, default=_number_or_text)


def _number_or_text(value: object) -> float | str:
    if not isinstance(value, Decimal):
        return as_text(value)
    return int(value) if value == int(value) else float(value)
