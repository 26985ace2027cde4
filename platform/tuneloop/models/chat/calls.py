"""Tool calls in the text of an answer, as a model's own chat template writes them.

How a template writes calls is found by rendering some: what the model was trained on is what is
read, and what an answer that has to be a call is bound to.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.chat.template import RenderError
from tuneloop.records import Message

# Reading every place where JSON may begin costs time; no call is longer.
_MOST_CHARACTERS = 20_000
_NAME = re.compile(r"[\w.\-]+")
_TAGS = "(?:think|thinking|thought|reasoning)"
_THOUGHT = re.compile(f"^.*?</{_TAGS}>\\s*", re.DOTALL)
_OPENED_THOUGHT = re.compile(f"\\s*<{_TAGS}>")
_OPEN_AT_END = re.compile(f"<{_TAGS}>\\s*$")
# Tags with nothing in them, the last maybe not whole.
_EMPTY = re.compile(r"(?:\s|</?\w+>)*(?:</?\w*)?")
# What models were taught to write before a call whose templates do not write calls themselves.
_KNOWN_TAGS = re.compile(
    r"<tool_call>|<\|tool_call\|>|<function_call>|<\|tool_calls?_start\|>|<\|python_tag\|>"
    r"|\[TOOL_CALLS\]|<TOOLCALL>"
)
_LONG_ID = "call_Zq7000000000Zq7Zq7Zq7"
_SHORT_ID = "Zq7Zq7Zq7"
_NAMES = ("probe_one", "probe_two")
_MOST_REFERENCES = 8  # from one definition to the next
_ARGUMENTS = ({"key_a": "value_a", "key_b": "value_b"}, {"key_c": "value_c"})


class Call(NamedTuple):
    """A function's name and arguments."""

    name: str
    arguments: Mapping[str, Any]


def find_calls(text: str) -> list[Call]:
    """Return the calls in a text: JSON objects with a name and arguments, alone or in a list."""
    text = text[:_MOST_CHARACTERS]
    found: list[Call] = []
    place = 0
    while (place := _next_json(text, place)) >= 0:
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        items = value if isinstance(value, list) else [value]
        found += [call for item in items if (call := _call(item)) is not None]
    return found


def _next_json(text: str, place: int) -> int:
    places = [found for mark in "{[" if (found := text.find(mark, place)) >= 0]
    return min(places, default=-1)


def _call(value: object) -> Call | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json_or_text(arguments)
    return Call(value["name"], arguments) if isinstance(arguments, dict) else None


@dataclass(frozen=True)
class _Parameters:
    """Arguments one by one, each between texts of its own, as in Qwen3-Coder and GLM.

    Args:
        head: Between the function's name and the first argument.
        opening: Before an argument's name.
        middle: Between its name and its value.
        closing: Behind its value.
    """

    head: str
    opening: str
    middle: str
    closing: str


@dataclass(frozen=True)
class CallSyntax:
    """How a chat template writes the calls of one answer.

    Args:
        opening: Before the first call; empty: an answer that begins with a call is calls.
        before_name: Of each call, from its first character to its name.
        behind_name: From the name to the arguments.
        behind_arguments: From the arguments to the call's end.
        between: Between two calls; None: there is one call in an answer.
        closing: Behind the last call.
        has_object: A call is one JSON object; otherwise the name stands before the arguments.
        parameters: Where the arguments are not JSON.
        has_short_ids: Calls have ids of 9 letters and digits, as Mistral's.
        is_compact: No space stands in the JSON of the arguments.
    """

    opening: str
    before_name: str = '{"name": "'
    behind_name: str = '", "arguments": '
    behind_arguments: str = "}"
    between: str | None = None
    closing: str = ""
    has_object: bool = True
    parameters: _Parameters | None = None
    has_short_ids: bool = False
    is_compact: bool = False

    @staticmethod
    def of(renderer: Renderer) -> CallSyntax:
        """Return how a model's template writes calls."""
        for call_id in (_LONG_ID, _SHORT_ID):
            one = _rendered(renderer, 1, call_id)
            if one is None:
                continue
            two = _rendered(renderer, 2, call_id)
            found = _derived(one, two, call_id)
            wanted = [Call(*pair) for pair in zip(_NAMES, _ARGUMENTS, strict=True)]
            tools = _probe_tools()
            if found is not None and found.read(one, tools) == wanted[:1]:
                return found
        tag = _KNOWN_TAGS.search(renderer.template)
        return CallSyntax(tag[0] + "\n" if tag else "", between="\n")

    @property
    def _layout(self) -> dict[str, Any]:
        """How llguidance lays out the arguments: as the template does."""
        space = "" if self.is_compact else " "
        separators = {"item_separator": f",{space}", "key_separator": f":{space}"}
        return separators | {"whitespace_flexible": False}

    def new_id(self) -> str:
        """Return an id for a call, of the kind that the template takes back."""
        return secrets.token_hex(5)[:9] if self.has_short_ids else f"call_{secrets.token_hex(12)}"

    def special_ids(self, renderer: Renderer) -> frozenset[int]:
        """Return the special tokens that calls are written with, which a text has to keep."""
        parts = (self.opening, self.behind_name, self.behind_arguments, self.between, self.closing)
        written = "".join(part or "" for part in parts)
        added = renderer.tokenizer.added_tokens_decoder
        return frozenset(i for i, t in added.items() if t.special and t.content in written)

    @cached_property
    def marker(self) -> str:
        """What an answer cannot have before a call but as its beginning; empty for none."""
        return self.opening.rstrip(" \n[")

    def start(self, text: str) -> int | None:
        """Return where calls begin in a text, if they do; what it thinks of calls is none."""
        begin = _thought_end(text)
        if begin is None:
            return None
        if self.marker:
            place = text.find(self.marker, begin)
            return place if place >= 0 else None
        place = len(text) - len(text[begin:].lstrip(" \n["))
        return place if text[place : place + 1] == "{" else None

    def safe_end(self, text: str) -> int:
        """Return up to where a text without calls is certainly no beginning of one."""
        end = len(text.rstrip())
        if not self.marker:
            begin = _thought_end(text)
            is_other = begin is None or text[begin:].strip(" \n[")
            return end if is_other else len(text[:begin].rstrip())
        for size in range(min(len(self.marker) - 1, len(text)), 0, -1):
            if text.endswith(self.marker[:size]):
                return len(text[:-size].rstrip())
        return end

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> list[Call]:
        """Return the whole calls of a text; those of its beginnings are the first of them.

        Args:
            tools: In OpenAI's layout.
        """
        place = self.start(text)
        if place is None:
            return []
        place += len(self.marker)
        if self.has_object:
            return self._read_objects(text, place, tools)
        return self._read_named(text, place, tools)

    def _read_objects(
        self, text: str, place: int, tools: Sequence[Mapping[str, Any]]
    ) -> list[Call]:
        known = {_function(tool).get("name") for tool in tools}
        calls: list[Call] = []
        while (found := text.find("{", place)) >= 0:
            value, place = _json_at(text, found)
            call = _call(value)
            # Without a tag an answer in JSON is a call only if it names a tool.
            if call is None or (not self.marker and call.name not in known):
                break
            calls.append(call)
        return calls

    def _read_named(self, text: str, place: int, tools: Sequence[Mapping[str, Any]]) -> list[Call]:
        before = self.before_name.lstrip()
        calls: list[Call] = []
        while True:
            place += len(text[place:]) - len(text[place:].lstrip())
            place += len(before) if text.startswith(before, place) else 0
            name = _NAME.match(text, place)
            if name is None:
                return calls
            if self.parameters is None:
                found = text.find("{", name.end())
                if found < 0 or text[name.end() : found].strip() != self.behind_name.strip():
                    return calls
                value, place = _json_at(text, found)
            else:
                value, place = self._read_parameters(text, name, tools)
            if not isinstance(value, dict):
                return calls
            calls.append(Call(name[0], value))
            between = (self.between or "").strip()
            following = text.find(between, place) if between else -1
            if following < 0:
                return calls
            place = following + len(between)

    def _read_parameters(
        self, text: str, name: re.Match[str], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any] | None, int]:
        assert self.parameters is not None
        head, opening, middle, closing = (
            getattr(self.parameters, part).strip()
            for part in ("head", "opening", "middle", "closing")
        )
        place = name.end()
        if not text.startswith(head, place):
            return None, place
        place += len(head)
        schema = _parameters_of(name[0], tools)
        values: dict[str, Any] = {}
        while (rest := text[place:].lstrip()).startswith(opening):
            place = len(text) - len(rest) + len(opening)
            ends = text.find(middle, place), text.find(closing, place)
            if min(ends) < 0 or ends[1] < ends[0]:
                return None, place
            key = text[place : ends[0]].strip()
            value = text[ends[0] + len(middle) : ends[1]]
            value = value.removeprefix(_spaces_behind(self.parameters.middle))
            value = value.removesuffix(_spaces_before(self.parameters.closing))
            kinds = _kinds(_properties(schema).get(key), schema)
            is_text = "string" in kinds and kinds <= {"string", "null"}
            is_text = is_text and (value != "null" or "null" not in kinds)
            values[key] = value if is_text else _json_or_text(value)
            place = ends[1] + len(closing)
        end = (self.behind_arguments or self.closing).strip()
        rest = text[place:].lstrip()
        # Another argument may follow until the call is closed.
        return (values if rest.startswith(end) else None), place

    def grammar(
        self, tools: Sequence[Mapping[str, Any]], is_parallel: bool, renderer: Renderer
    ) -> str:
        """Return the grammar of an answer that calls some of the tools, in llguidance's Lark."""
        rules = []
        for index, tool in enumerate(tools):
            function = _function(tool)
            name = str(function["name"])
            shown = json.dumps(name, ensure_ascii=False)[1:-1] if self.has_object else name
            schema = function.get("parameters") or {"type": "object", "properties": {}}
            if isinstance(schema, Mapping):
                schema = {"x-guidance": self._layout, **schema}
            before = _literal(f"{self.before_name}{shown}", renderer)
            if self.parameters is None:
                arguments = f"args_{index}"
                rules.append(f"{arguments}: %json {json.dumps(schema)}")
                between = _literal(self.behind_name, renderer)
            else:
                arguments = _parameters_rule(self.parameters, schema, renderer)
                between = _literal(self.parameters.head, renderer)
            behind = _literal(self.behind_arguments, renderer)
            rules.append(f"call_{index}: {before} {between} {arguments} {behind}")
        rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
        more = ""
        if is_parallel and self.between is not None:
            more = f"({_literal(self.between, renderer)} call)*"
        opening, closing = (_literal(text, renderer) for text in (self.opening, self.closing))
        return "\n".join([f"start: {opening} call {more} {closing}", *rules])


class Written(NamedTuple):
    """What of an answer can be told after some more of its text."""

    content: str
    calls: Sequence[Call]


class CallReader:
    """Tells the content of an answer from its calls while the answer is being written.

    Calls are told when they are whole. A text that begins as a call and is none is content. What a
    model writes behind its calls is left out.

    Args:
        tools: In OpenAI's layout.
        most: Calls beyond this number are left out; None: no bound.
        prompt: Its end: where it opens a thought, the answer goes on with that.
    """

    def __init__(
        self,
        syntax: CallSyntax,
        tools: Sequence[Mapping[str, Any]],
        most: int | None = None,
        prompt: str = "",
    ) -> None:
        self._syntax, self._tools, self._most = syntax, tools, most
        opened = _OPEN_AT_END.search(prompt)
        self._text = opened[0] if opened else ""
        self._num_sent = len(self._text)
        self._start: int | None = None
        self.num_calls = 0

    def push(self, piece: str) -> Written:
        """Return what can be told after some more text."""
        self._text += piece
        if self._start is None:
            self._start = self._syntax.start(self._text)
            if self._start is None:
                end = self._syntax.safe_end(self._text)
                if _EMPTY.fullmatch(self._text, 0, end):
                    end = 0  # a thought that is none is left out if a call follows
                return Written(self._content(end), ())
        # A call ends with a bracket.
        calls = self._new_calls() if re.search(r"[]}>]", piece) else ()
        return Written(self._content(self._content_end()) if self.num_calls else "", calls)

    def finish(self, rest: str) -> Written:
        """Return what is left to tell at the end of the answer.

        Args:
            rest: The last of its text.
        """
        self._text += rest
        self._start = self._syntax.start(self._text)
        calls = self._new_calls()
        return Written(self._content(self._content_end()), calls)

    def _content_end(self) -> int:
        """Return where the content ends: before the calls; a thought that is none is no content."""
        if not self.num_calls:
            return len(self._text)
        before = self._text[: self._start].rstrip()
        is_thought = not _THOUGHT.sub("", before) and _EMPTY.fullmatch(before)
        return 0 if is_thought else len(before)

    def _content(self, end: int) -> str:
        new = self._text[self._num_sent : max(end, self._num_sent)]
        self._num_sent += len(new)
        return new

    def _new_calls(self) -> Sequence[Call]:
        new = self._syntax.read(self._text, self._tools)[self.num_calls : self._most]
        self.num_calls += len(new)
        return new


def _probe_tools() -> list[dict[str, Any]]:
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": "A function.",
                "parameters": {
                    "type": "object",
                    "properties": {key: {"type": "string"} for key in arguments},
                },
            },
        }
        for name, arguments in zip(_NAMES, _ARGUMENTS, strict=True)
    ]


def _rendered(renderer: Renderer, number: int, call_id: str) -> str | None:
    """Return an answer of some calls without the tokens that end it; None if it is refused."""
    calls = [
        {
            "id": call_id,
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for name, arguments in zip(_NAMES, _ARGUMENTS, strict=True)
    ]
    answer = Message("assistant", "", tool_calls=json.dumps(calls[:number]))
    try:
        text = renderer.texts([Message("user", "a"), answer], _probe_tools())[-1]
    except RenderError:
        return None
    for stop in renderer.stop_ids:
        text = text.partition(str(renderer.tokenizer.convert_ids_to_tokens(stop)))[0]
    return _THOUGHT.sub("", text).strip()


def _derived(one: str, two: str | None, call_id: str) -> CallSyntax | None:
    """Return the syntax of which an answer of one call, and one of two, are examples."""
    name = one.find(_NAMES[0])
    if name < 0:
        return None
    behind = name + len(_NAMES[0])
    parameters = None
    start = next(
        (i for i in range(name) if one[i] == "{" and _call(_json_at(one, i)[0]) is not None), None
    )
    arguments = next(
        (i for i in range(behind, len(one)) if one[i] == "{" and _is_arguments(one, i)), None
    )
    if arguments is not None:
        end = _json_at(one, arguments)[1]
        behind_name = one[behind:arguments]
    elif start is not None:
        return None  # arguments as a text within JSON
    else:
        found = _derived_parameters(one, behind)
        if found is None:
            return None
        parameters, end = found
        behind_name = parameters.head
    has_object = start is not None
    call_end = _json_at(one, start)[1] if start is not None else end
    opening = one[: start if start is not None else name]
    closing = one[call_end:]
    between = None
    if two is not None and (second := two.find(_NAMES[1])) >= 0:
        # Back from the second name to where its call begins.
        second -= name - len(opening)
        between = two[call_end:second] if two[:call_end] == one[:call_end] else None
    if not has_object and parameters is not None:
        # What closes a call is told from what closes the answer by the text between two calls.
        shared = _shared(closing, between or "")
        behind_arguments, closing = shared, closing[len(shared) :]
        between = None if between is None else between[len(shared) :]
    else:
        behind_arguments = one[end:call_end]
    if call_id in behind_arguments:
        behind_arguments = behind_arguments.replace(call_id, _SHORT_ID)
    return CallSyntax(
        opening,
        one[start:name] if start is not None else "",
        behind_name,
        behind_arguments,
        between,
        closing,
        has_object,
        parameters,
        has_short_ids=call_id == _SHORT_ID,
        is_compact='"key_a":"' in one,
    )


def _derived_parameters(one: str, behind: int) -> tuple[_Parameters, int] | None:
    places = [one.find(text, behind) for text in ("key_a", "value_a", "key_b", "value_b")]
    if min(places) < 0 or places != sorted(places):
        return None
    first, value, second, last = places
    head = one[behind:first]
    middle = one[first + len("key_a") : value]
    step = one[value + len("value_a") : second]
    opening = _shared(head[::-1], step[::-1])[::-1]
    # What closes one tag may end with the same sign as what stands before the next.
    tag = re.search(r"\s*[<\[(]", opening)
    opening = opening[tag.start() :] if tag else opening
    closing = step.removesuffix(opening)
    end = last + len("value_b")
    if not opening.strip() or not middle.strip() or not closing.strip():
        return None
    if not one.startswith(closing, end):
        return None
    found = _Parameters(head.removesuffix(opening), opening, middle, closing)
    return found, end + len(closing)


def _shared(text: str, other: str) -> str:
    """Return what two texts begin with."""
    pairs = zip(text, other, strict=False)
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _thought_end(text: str) -> int | None:
    """Return where an answer begins behind what the model thinks; None: it is still thinking."""
    if not _OPENED_THOUGHT.match(text):
        return 0  # what closes a thought further on is part of a text, or of an argument
    closed = _THOUGHT.match(text)
    return closed.end() if closed else None


def _is_arguments(text: str, place: int) -> bool:
    return bool(_json_at(text, place)[0] == _ARGUMENTS[0])


def _finite(text: str) -> float:
    """Return a number; what JSON cannot write, such as NaN and 1e999, is none."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not JSON")
    return value


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _json_at(text: str, place: int) -> tuple[Any, int]:
    """Return the JSON value that begins at a place, and where it ends; None if none does."""
    try:
        return _DECODER.raw_decode(text, place)
    except (ValueError, RecursionError):
        return None, len(text)


def _json_or_text(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = tool.get("function", tool)
    return inner if isinstance(inner, Mapping) else {}


def _properties(schema: object) -> Mapping[str, Any]:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def _parameters_of(name: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the schema of a function's arguments."""
    function = next((f for tool in tools if (f := _function(tool)).get("name") == name), {})
    parameters = function.get("parameters")
    return parameters if isinstance(parameters, Mapping) else {}


def _resolved(part: object, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a part of a schema; where it says no more than a reference, what that names."""
    for _ in range(_MOST_REFERENCES):
        part = part if isinstance(part, Mapping) else {}
        every, reference = part.get("allOf"), part.get("$ref")
        if isinstance(every, list) and len(every) == 1:
            part = every[0]
        elif isinstance(reference, str):
            part = schema
            for key in reference.removeprefix("#/").split("/"):
                part = part.get(key) if isinstance(part, Mapping) else None
        else:
            return part
    return {}


def _kinds(part: object, schema: Mapping[str, Any]) -> set[str]:
    """Return the JSON types that a value may have; none: it is not said."""
    part = _resolved(part, schema)
    some = part.get("anyOf") or part.get("oneOf")
    parts = [_resolved(one, schema) for one in some] if isinstance(some, list) else [part]
    types = [one.get("type") for one in parts]
    lists = [kinds if isinstance(kinds, list) else [kinds] for kinds in types]
    return {kind for kinds in lists for kind in kinds if isinstance(kind, str)}


def _spaces_behind(text: str) -> str:
    return text[len(text.rstrip()) :]


def _spaces_before(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _literal(text: str, renderer: Renderer) -> str:
    """Return a text in Lark: special tokens by their ids, the id of a call as any id."""
    special = {
        token.content: index
        for index, token in renderer.tokenizer.added_tokens_decoder.items()
        if token.special and token.content in text
    }
    names = sorted([*special, _SHORT_ID], key=len, reverse=True)
    parts = []
    for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
        if part in special:
            parts.append(f"<[{special[part]}]>")
        elif part == _SHORT_ID:
            parts.append("/[a-zA-Z0-9]{9}/")
        elif part:
            parts.append(json.dumps(part, ensure_ascii=False))
    return " ".join(parts) or '""'


def _parameters_rule(parameters: _Parameters, schema: object, renderer: Renderer) -> str:
    """Return the grammar of arguments that are written one by one."""
    required = schema.get("required") if isinstance(schema, Mapping) else None
    rule = []
    whole = schema if isinstance(schema, Mapping) else {}
    definitions = {name: whole[name] for name in ("$defs", "definitions") if name in whole}
    for key, said in _properties(schema).items():
        closing = parameters.closing
        one, kinds = _resolved(said, whole), _kinds(said, whole)
        values = one.get("enum")
        if isinstance(values, list) and all(isinstance(value, str) for value in values):
            value = "(" + " | ".join(json.dumps(v, ensure_ascii=False) for v in values) + ")"
        elif "string" in kinds or not (kinds or {"enum", "const", "properties"} & one.keys()):
            # A text goes on until the next tag, and takes the space before it.
            value, closing = "/[^<]*/", closing.lstrip()
        else:
            refers = '"$ref"' in json.dumps(one)
            value = f"%json {json.dumps({**definitions, **one} if refers else one)}"
        before = _literal(f"{parameters.opening}{key}{parameters.middle}", renderer)
        part = f"({before} {value} {_literal(closing, renderer)})"
        rule.append(part if key in (required or ()) else part + "?")
    return " ".join(rule) or '""'
