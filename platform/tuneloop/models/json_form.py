"""The form of a JSON answer: the grammar of a schema, and whether a text has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLTokenizer

# A schema, expression or grammar; larger ones take a while to compile.
MAX_FORM_BYTES = 2**16
# Bounded, so that no answer is white space until its tokens are used up.
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"


def json_grammar(schema: Mapping[str, Any]) -> str:
    """Return the grammar of a JSON Schema, in llguidance's own format.

    The schema may say how values are laid out, in `x-guidance` as llguidance has it.

    Raises:
        ValueError: It is no schema.
    """
    if "x-guidance" in schema:
        return LLMatcher.grammar_from_json_schema(dict(schema))
    return LLMatcher.grammar_from_json_schema(
        dict(schema), overrides={"whitespace_pattern": _WHITE_SPACE}
    )


def with_layout(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema such that any program on llguidance makes `json_grammar` of it."""
    return {"x-guidance": {"whitespace_pattern": _WHITE_SPACE}} | dict(schema)


def why_unusable(schema: Mapping[str, Any]) -> str:
    """Return why no answer can be bound to a schema; empty where one can."""
    size = len(json.dumps(schema).encode())
    if size > MAX_FORM_BYTES:
        return f"the schema has {size:,} bytes; {MAX_FORM_BYTES:,} are allowed"
    try:
        matcher = _matcher(json.dumps(schema))
    except ValueError as error:
        return str(error)
    return str(matcher.get_error()) if matcher.is_error() else ""


def has_form(text: str, schema: Mapping[str, Any]) -> bool:
    """Return whether a server that constrains answers to a schema could have given this one."""
    matcher = _matcher(json.dumps(schema)).deep_copy()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and bool(matcher.is_accepting())


@lru_cache(16)
def _matcher(schema: str) -> LLMatcher:
    # Its tokens are bytes.
    return LLMatcher(LLTokenizer("byte"), json_grammar(json.loads(schema)), log_level=0)
