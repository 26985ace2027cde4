"""Reading a YAML file with overrides; all mistakes are reported at once."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tuneloop.config.section import Section
from tuneloop.config.whole import TuneloopConfig
from tuneloop.errors import ConfigError, Problem

_TAG = "tag:yaml.org,2002:"
_TRUTH = re.compile(r"^(?:true|false)$")
_WHOLE = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
_NUMBER = re.compile(
    r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """A safe loader that takes no text for something else.

    A key given twice is refused: YAML would silently keep the last. Words without quotes are read
    as in YAML 1.2: PyYAML, which is older, takes `yes`, `no` and `on` for true and false, 010 for
    8, 12:30 for 750, and 1e5 for a text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # as PyYAML has it
        first: [(tag, words) for tag, words in known if tag in (f"{_TAG}null", f"{_TAG}merge")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`, which YAML spreads
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a list or a mapping cannot be a key", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key `{key}` is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes what PyYAML or the loader above would take for no text."""


_Loader.add_implicit_resolver(f"{_TAG}bool", _TRUTH, list("tf"))
_Loader.add_implicit_resolver(f"{_TAG}int", _WHOLE, list("-+0123456789"))
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(f"{_TAG}float", _NUMBER, list("-+.0123456789"))


def to_yaml(value: object, **layout: Any) -> str:
    """Return a value as YAML that `load_config` reads as the same value.

    Args:
        layout: As for `yaml.dump`.
    """
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, **layout))


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> TuneloopConfig:
    """Read a YAML file, apply `dotted.key=value` overrides and validate everything.

    Args:
        path: The YAML file.
        overrides: Each `dotted.key=value`; the value is read as YAML.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: With one problem for each mistake found.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError.of(
            "cannot read the configuration",
            where=str(path),
            got=reason,
            remedy="give the path of a YAML file; `tuneloop init` writes one",
        ) from error
    try:
        raw = yaml.load(text, Loader=_Loader)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError.of(
            "the configuration is not valid YAML",
            where=f"{path}:{mark.line + 1}" if mark else str(path),
            got=str(getattr(error, "problem", None) or error),
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError.of(
            "the configuration is not a mapping",
            where=str(path),
            got="an empty file" if raw is None else type(raw).__name__,
            allowed="keys " + ", ".join(TuneloopConfig.model_fields),
        )
    for override in overrides:
        raw = with_override(raw, override)
    overridden = {override.partition("=")[0] for override in overrides}
    try:
        return TuneloopConfig.model_validate(raw).read_from(str(path), overrides)
    except ValidationError as error:
        raise ConfigError(
            *(_problem(detail, path, root, overridden) for detail in error.errors())
        ) from error


def with_override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    """Return a copy of the raw mapping with one `dotted.key=value` set.

    List items are addressed by number: `data.sources.0.path=faq.jsonl`.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError.of(
            "an override is not of the form dotted.key=value",
            where="command line",
            got=override,
            remedy="for example training.learning_rate=1e-4",
        )
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError.of(
            "an override's value is not valid YAML",
            where=f"command line, {key}",
            got=str(getattr(error, "problem", None) or text),
        ) from error
    return with_value(raw, key, value)


def with_value(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a copy of the raw mapping with a value at a dotted key.

    Raises:
        ConfigError: The key leads through a list item that is not there.
    """
    return dict(_set(raw, key.split("."), value, key))


def _set(node: Any, parts: list[str], value: Any, key: str) -> Any:
    if not parts:
        return value
    head, rest = parts[0], parts[1:]
    if isinstance(node, list):
        if not head.isdecimal() or int(head) >= len(node):
            raise ConfigError.of(
                f"no item `{head}` in the list",
                where=f"command line, {key}",
                allowed=f"0 to {len(node) - 1}",
            )
        return [
            _set(item, rest, value, key) if index == int(head) else item
            for index, item in enumerate(node)
        ]
    mapping = dict(node) if isinstance(node, dict) else {}
    mapping[head] = _set(mapping.get(head), rest, value, key)
    return mapping


# How the sections are written that every configuration has.
_EXAMPLES = {
    "name": "name: faq",
    "task": "task: {type: generation}",
    "model": "model: {base: HuggingFaceTB/SmolLM2-135M-Instruct}",
    "data": "data: {sources: [{path: rows.jsonl, format: question_answer}]}",
}


def _problem(detail: Any, path: Path, root: yaml.Node | None, overridden: set[str]) -> Problem:
    """Turn one pydantic error into a problem with file, line and suggestion."""
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    where = (
        f"command line, {key}"
        if any(key == name or key.startswith(name + ".") for name in overridden)
        else f"{path}:{_line(root, location)}"
    )
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = field_names(location[:-1])
        close = difflib.get_close_matches(location[-1], allowed, n=1)
        return Problem(
            f"unknown key `{key}`",
            where=where,
            allowed=", ".join(allowed),
            remedy=f"did you mean `{close[0]}`?" if close else "remove it",
        )
    if kind == "missing":
        example = f", for example `{_EXAMPLES[key]}`" if key in _EXAMPLES else ""
        return Problem(f"`{key}` is missing", where=where, remedy=f"add it{example}")
    got = "" if isinstance(detail.get("input"), dict) else repr(detail.get("input"))
    if kind == "literal_error":
        allowed_values = str(context.get("expected", ""))
        names = allowed_values.replace("'", "").replace(" or ", ", ").split(", ")
        close = difflib.get_close_matches(str(detail["input"]), names, n=1)
        return Problem(
            f"`{key}` has a value that is not allowed",
            where=where,
            got=got,
            allowed=allowed_values,
            remedy=f"did you mean `{close[0]}`?" if close else "",
        )
    message = str(detail["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return Problem(message, where=where, got=got)
    return Problem(
        f"`{key}` is not valid",
        where=where,
        got=got,
        allowed=message[0].lower() + message[1:],
        remedy="put a text that YAML reads otherwise into quotes" if kind == "string_type" else "",
    )


def _line(root: yaml.Node | None, location: list[str]) -> int:
    """Return the line of the deepest part of a key that the file contains."""
    node, line = root, 1
    for part in location:
        child: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == part:
                    line, child = key_node.start_mark.line + 1, value_node
        elif (
            isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value)
        ):
            child = node.value[int(part)]
            line = child.start_mark.line + 1
        if child is None:
            break
        node = child
    return line


def field_names(location: list[str]) -> list[str]:
    """Return the keys allowed at a location in the YAML."""
    model: Any = TuneloopConfig
    for part in location:
        if isinstance(model, type) and issubclass(model, Section):
            if part not in model.model_fields:
                return []
            model = _section_of(model.model_fields[part].annotation)
        elif typing.get_origin(model) is dict:
            model = typing.get_args(model)[1]
            continue
        if typing.get_origin(model) is list and not part.isdigit():
            continue
        if typing.get_origin(model) is list:
            model = typing.get_args(model)[0]
    if typing.get_origin(model) is list:
        model = typing.get_args(model)[0]
    return (
        list(model.model_fields) if isinstance(model, type) and issubclass(model, Section) else []
    )


def _section_of(annotation: Any) -> Any:
    """Return the section of one that may be left out, such as `sweep`; else what is given."""
    if not isinstance(annotation, types.UnionType):
        return annotation
    kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
    return kinds[0] if len(kinds) == 1 else annotation
