"""What all sections share: strict keys, values that do not change, names."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]


class Section(BaseModel):
    """A part of the YAML: unknown keys are errors, values do not change after loading."""

    # Defaults are validated as well: a default of 32 and a 32 in the YAML are the same 32.0, so
    # they have the same fingerprint.
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True
    )
