"""What all sections share: strict keys, values that do not change, names."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]


class Section(BaseModel):
    """A part of the YAML: unknown keys are errors, values do not change after loading."""

    # Defaults are validated as well: a default of 32 and a 32 in the YAML are the same 32.0, so
    # they have the same fingerprint.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true and false where a number is wanted: they would be read as 1 and 0."""
        given = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(one, bool) for one in given):
            wanted = _types_in(cls.model_fields[str(info.field_name)].annotation)
            if wanted & {int, float} and not wanted & {bool, Any}:
                raise PydanticCustomError("number_type", "Input should be a number")
        return value


def _types_in(annotation: Any) -> set[Any]:
    """Return the types of the values that an annotation allows, in lists too."""
    kind, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is typing.Literal:
        return {type(part) for part in parts}
    if kind is Annotated:
        return _types_in(parts[0])
    if kind in (typing.Union, types.UnionType, list, tuple):
        return set[Any]().union(*(_types_in(part) for part in parts))
    return {annotation}
