"""Requests made from a server's own schema, right and wrong ones."""

from __future__ import annotations

import json
import random
from typing import Any

TEXTS_TO_TRY = [
    "",
    "a",
    "What is it?",
    "é🎉",
    "<|im_end|>",
    "\x00",
    "\n\n",
    "東京 " * 50,
    "\u202e",
    "0",
]


NUMBERS_TO_TRY = [0, 1, -1, 2, 0.5, 1e-40, 1e300, 10**25, -(2**63), 3, 599]


ANYTHING = [None, True, False, [], {}, [[]], {"a": None}, "x", ["x"], [1], *NUMBERS_TO_TRY]


def fuzzed(schema: dict[str, Any], chooser: random.Random) -> tuple[str, str, bytes]:
    """Return a request: mostly as the schema says, then perhaps with something else in it."""
    path = chooser.choice(sorted(schema["paths"]))
    method, operation = chooser.choice(sorted(schema["paths"][path].items()))
    url = path.replace("{name}", chooser.choice(["m", "x", "%00", "a%2Fb"]))
    if "requestBody" not in operation:
        return method.upper(), url, b""
    kind = operation["requestBody"]["content"]["application/json"]["schema"]
    body = example(kind, schema, chooser)
    body["model"] = "m"
    body["max_tokens"] = chooser.randrange(1, 4)
    if "n" in body:
        body["n"] = chooser.randrange(1, 4)
    if chooser.random() < 0.4:
        spoil(body, chooser)
    content = json.dumps(body).encode()
    if chooser.random() < 0.03:
        content = content[: chooser.randrange(len(content))]
    if chooser.random() < 0.03:
        position = chooser.randrange(len(content) + 1)
        content = content[:position] + chooser.randbytes(3) + content[position:]
    return method.upper(), url, content


def example(kind: Any, schema: dict[str, Any], chooser: random.Random) -> Any:
    """Return a value that the schema allows, or nearly."""
    if kind is True:
        return chooser.choice([*ANYTHING, {"name": "f"}, {"name": "f", "parameters": {}}])
    if "$ref" in kind:
        return example(
            schema["components"]["schemas"][kind["$ref"].split("/")[-1]], schema, chooser
        )
    if "anyOf" in kind:
        return example(chooser.choice(kind["anyOf"]), schema, chooser)
    if "enum" in kind:
        return chooser.choice(kind["enum"])
    if "const" in kind:
        return kind["const"]
    match kind.get("type"):
        case "object" if "properties" in kind:
            required = kind.get("required", ())
            return {
                name: example(field, schema, chooser)
                for name, field in kind["properties"].items()
                if name in required or chooser.random() < 0.25
            }
        case "object":
            free = kind["additionalProperties"] is True
            keys = [
                chooser.choice(
                    ["function", "name", "type"] if free else [str(n) for n in range(700)]
                )
                for _ in range(chooser.randrange(3))
            ]
            return {key: example(kind["additionalProperties"], schema, chooser) for key in keys}
        case "array":
            count = kind.get("minItems", 0) + chooser.randrange(4)
            return [example(kind["items"], schema, chooser) for _ in range(count)]
        case "integer":
            low = kind.get("minimum", -3)
            return chooser.randint(low, min(kind.get("maximum", 700), low + 700))
        case "number":
            low, high = kind.get("minimum", 0), kind.get("maximum", 2)
            return chooser.choice([low, high, chooser.uniform(low, high), low + 1e-40])
        case "boolean":
            return chooser.random() < 0.5
        case "null":
            return None
    return chooser.choice(TEXTS_TO_TRY)


def spoil(value: Any, chooser: random.Random) -> None:
    """Put something else somewhere into a body."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = chooser.choice(keys)
        inner = value[key]
        if isinstance(inner, dict | list) and inner and chooser.random() < 0.7:
            value = inner
            continue
        match chooser.randrange(4):
            case 0 if key != "max_tokens":
                del value[key]
            case 1 if isinstance(value, dict):
                value[chooser.choice([*TEXTS_TO_TRY, "tools", "suffix"])] = chooser.choice(ANYTHING)
            case _:
                value[key] = chooser.choice([*ANYTHING, *TEXTS_TO_TRY])
        return
