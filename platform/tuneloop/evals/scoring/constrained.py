"""Arms whose answers can only have the form that the task asks for.

What is left between two such arms is content: neither can lose by its form. Of a classification the
answer is the most probable label as a whole, of an extraction JSON under the schema of the train
rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tuneloop.artifacts import Artifact
from tuneloop.config import TaskConfig
from tuneloop.errors import DataError
from tuneloop.evals.scoring.questions import read_solved
from tuneloop.models.json_form import why_unusable
from tuneloop.records import Arm

KINDS = ("classification", "extraction")
# Where probabilities are asked for, the labels found have this share of all of it.
_COVERAGE = 0.99
_LABEL = "label"
_MOST_LABELS = 1000
_UNBOUND = "answers cannot be bound to the form of the task"
_SCALARS = {str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}


def constrainable(task: TaskConfig) -> list[str]:
    """Return the tasks whose answers have a form, by name; the empty name is the only task's."""
    return [name for name in task.tasks or ("",) if task.of(name).type in KINDS]


def constrain(
    arm: Arm, task: TaskConfig, dataset: Artifact | None, calibration: bool = False
) -> Arm:
    """Return an arm with its answers in the form of their task.

    Args:
        arm: Of a model of our own, or of an endpoint that knows `response_format`.
        dataset: Whose train rows have the JSON of an extraction; None where no task is one.
        calibration: Labels that a model of our own ranks have probabilities.

    Raises:
        DataError: There are more labels than a request may have, or the answers of the train rows
            have no form that answers can be bound to.
    """
    names = constrainable(task)
    for name in names:
        if len(task.of(name).labels) > _MOST_LABELS:
            got, allowed = f"{len(task.of(name).labels):,} labels", f"at most {_MOST_LABELS:,}"
            raise DataError.of(_UNBOUND, got=got, allowed=allowed)
    if arm.endpoint.url:
        forms = {name: _endpoint_form(name, dataset, task) for name in names}
        labels = any(task.of(name).type == "classification" for name in names)
        return replace(arm, forms=forms, answer_key=_LABEL if labels else "")
    return replace(arm, forms={name: _own_form(name, dataset, task, calibration) for name in names})


def _own_form(
    name: str, dataset: Artifact | None, task: TaskConfig, calibration: bool
) -> dict[str, Any]:
    one = task.of(name)
    if one.type == "classification":
        coverage = _COVERAGE if calibration else 0.0
        return {"ranking": {"answers": list(one.labels), "coverage": coverage}}
    schema, layout = _read_schema(name, dataset, task)
    return _json_form(schema | layout, strict=True)


def _endpoint_form(name: str, dataset: Artifact | None, task: TaskConfig) -> dict[str, Any]:
    one = task.of(name)
    if one.type == "extraction":
        schema, _ = _read_schema(name, dataset, task)
        # What OpenAI calls strict has no property that may be left out.
        is_strict = set(schema.get("properties", ())) == set(schema.get("required", ()))
        return _json_form(schema, strict=is_strict)
    properties = {_LABEL: {"type": "string", "enum": list(one.labels)}}
    return _json_form(_object(properties, [_LABEL]), strict=True)


def _json_form(schema: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    described = {"name": "answer", "schema": schema, "strict": strict}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


def form_schema(form: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the schema of a form; None if it is of another kind."""
    asked = form.get("response_format")
    return asked["json_schema"]["schema"] if asked else None


def is_wrapped(form: Mapping[str, Any], key: str) -> bool:
    """Return whether the answer is a property of the JSON of this form, and one of some labels.

    A record of an extraction may have a property of that name as well.
    """
    return "enum" in _properties(form).get(key, {})


def has_key(form: Mapping[str, Any], key: str) -> bool:
    """Return whether a record of this form may have a property of the name that labels have."""
    return key in _properties(form) and not is_wrapped(form, key)


def _properties(form: Mapping[str, Any]) -> Mapping[str, Any]:
    properties: Mapping[str, Any] = (form_schema(form) or {}).get("properties", {})
    return properties


def unwrap(text: str, key: str) -> str:
    """Return the property of a JSON answer, or the text itself where it has none."""
    try:
        value = json.loads(text)[key]
    except (ValueError, KeyError, TypeError):
        return text
    return value if isinstance(value, str) else text


class _Form(NamedTuple):
    """A schema, and how the answers of the train rows are laid out where they are all alike."""

    schema: dict[str, Any]
    layout: dict[str, Any]


def _read_schema(name: str, dataset: Artifact | None, task: TaskConfig) -> _Form:
    assert dataset is not None, "`needs_dataset` said so"
    rows = read_solved(dataset, list(task.tasks))
    answers = [row.messages[-1].text for row in rows if row.task == name]
    schema = schema_of(answers)
    if reason := why_unusable(schema):
        raise DataError.of(_UNBOUND, where=dataset.ref, got=reason)
    return _Form(schema, layout_of(answers))


def layout_of(answers: Sequence[str]) -> dict[str, Any]:
    """Return how JSON answers are written, for llguidance, if all are on one line in one way.

    Another model would write line breaks and indents, and use up its tokens with them.
    """
    for item, key in ((", ", ": "), (",", ":")):
        written = (
            json.dumps(json.loads(one), ensure_ascii=one.isascii(), separators=(item, key)) == one
            for one in answers
        )
        if all(written):
            separators = {"item_separator": item, "key_separator": key}
            return {"x-guidance": {"whitespace_flexible": False, **separators}}
    return {}


def schema_of(answers: Sequence[str]) -> dict[str, Any]:
    """Return the JSON Schema that answers have in common: their properties, and nothing besides.

    Properties come in the order that most answers have them in; those that every answer has are
    needed. A number may be any number.
    """
    return _schema([json.loads(answer) for answer in answers])


def _schema(values: Sequence[Any]) -> dict[str, Any]:
    """Return the schema of values at one place."""
    parts: list[dict[str, Any]] = []
    if objects := [value for value in values if isinstance(value, dict)]:
        names = _in_order(objects)
        inner = {name: _schema([one[name] for one in objects if name in one]) for name in names}
        parts.append(_object(inner, [n for n in names if all(n in one for one in objects)]))
    if lists := [value for value in values if isinstance(value, list)]:
        items = _schema([item for one in lists for item in one])
        # Where every list is empty nothing is known of what may stand in it.
        parts.append({"type": "array", "items": items} if items else {"type": "array"})
    kinds = {_SCALARS[type(v)] for v in values if not isinstance(v, dict | list)}
    parts += [{"type": kind} for kind in sorted(kinds)]
    return {"anyOf": parts} if len(parts) > 1 else parts[0] if parts else {}


def _object(properties: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def _in_order(objects: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return all names: the commonest order of names, then the others as they first occur."""
    commonest = Counter(tuple(one) for one in objects).most_common(1)[0][0]
    return list(dict.fromkeys([*commonest, *(name for one in objects for name in one)]))
