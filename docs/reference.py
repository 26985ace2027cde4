"""Write docs/configuration.md from the configuration's models: `python docs/reference.py`.

A test holds the file against the models, so it cannot go stale.
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tuneloop.config import Section, TuneloopConfig

FILE = Path(__file__).parent / "configuration.md"
_INTRODUCTION = """\
# Configuration

Every key of the YAML. On the command line and in a sweep a key is its dotted path:
`training.learning_rate=5e-4`, `data.sources.0.path=faq.jsonl`. Unknown keys are errors. Keys under
`resources` and `serving` say how something runs; they never change a result. Without quotes `true`
and `false`, and numbers such as `3` and `5e-4`, are what they seem; all else, `no` and `010` too,
is text. Written by `python docs/reference.py`.
"""


def reference() -> str:
    """Return the page as Markdown."""
    parts = [_INTRODUCTION]
    for path, section in _sections("", TuneloopConfig):
        title = f"`{path}`" if path else "Top level"
        rows = [
            f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {_description(field)} |"
            for name, field in section.model_fields.items()
        ]
        parts.append(f"## {title}\n\n{_summary(section)}\n")
        parts.append("| key | value | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _summary(section: type[Section]) -> str:
    return (section.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip()


def _sections(path: str, section: type[Section]) -> typing.Iterator[tuple[str, type[Section]]]:
    yield path, section
    for name, field in section.model_fields.items():
        for inner in _models(field.annotation):
            kind = typing.get_origin(_not_none(field.annotation))
            item = {list: "[*]", dict: ".NAME"}.get(kind, "")
            yield from _sections(f"{path}.{name}".lstrip(".") + item, inner)


def _models(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _not_none(annotation: Any) -> Any:
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return parts[0] if is_union and len(parts) == 1 else annotation


def _type(annotation: Any) -> str:
    annotation = _not_none(annotation)
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin is typing.Annotated:
        return _type(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in parts if part is not type(None))
    if origin is tuple:
        return "[" + ", ".join(map(_type, parts)) + "]"
    if origin is list:
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return f"mapping from {_type(parts[0])} to {_type(parts[1])}"
    if _models(annotation):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "value"}
    return names.get(annotation, str(annotation))


def _default(field: FieldInfo) -> str:
    if _models(field.annotation) and not field.default_factory:
        return "" if field.default is not PydanticUndefined else "required"
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return "empty" if default in ("", [], {}) else f"`{default}`"


def _description(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(item, attribute):g}"
        for item in field.metadata
        for attribute, sign in (("ge", "at least"), ("gt", "more than"), ("le", "at most"),
                                ("lt", "less than"))
        if getattr(item, attribute, None) is not None
    ]  # fmt: skip
    models = _models(field.annotation)
    text = (
        (field.description or (_summary(models[0]) if models else ""))
        .replace("|", "\\|")
        .replace("\n", " ")
    )
    return " ".join(filter(None, [text, f"({', '.join(limits)})" if limits else ""]))


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
