"""Answers in a form, and the most probable of many labels: are they valid, and what do they cost?

    python benchmarks/structured.py PATH_OF_MODEL overhead|valid|ranking [--rounds 3]

`overhead`: greedy answers with a form over those without, in CPU time for each token, decoded alone
and 16 together. `valid`: random schemas and prompts; every answer that is not cut off is held
against its schema. `ranking`: the most probable of 150 labels beside a free answer of the same
length. One JSON line each goes to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import jsonschema

from tuneloop.serving.loaded import ServedModel
from tuneloop.serving.replica import ModelServer

SUBJECTS = ["a cat", "the sea", "a train to Rome", "números", "東京の天気", "an unpaid invoice"]
ROOMS = ["account", "card", "travel", "weather", "music", "home", "food", "work", "health", "order"]
ACTIONS = [
    *("balance", "freeze", "report lost", "report stolen", "change limit", "activate", "cancel"),
    *("book", "change date", "status", "refund", "upgrade", "share", "new", "help"),
]


def random_schema(chooser: random.Random, depth: int = 0) -> dict[str, Any]:
    """Return a schema: nested objects, arrays, enums, bounds, references, optional fields."""
    kinds = ["object", "array", "any of"] if depth < 3 else []
    kind = chooser.choice([*kinds, "string", "number", "integer", "enum", "const", "type list"])
    inner = [random_schema(chooser, depth + 1) for _ in range(3)] if kind in kinds else []
    if kind == "object":
        names = chooser.sample(["name", "größe", "東京", "with space", 'quo"te', "a.b", "id"], 3)
        return {
            "type": "object",
            "properties": dict(zip(names, inner, strict=True)),
            "required": chooser.sample(names, chooser.randint(0, 3)),
            "additionalProperties": chooser.choice([False, False, {"type": "integer"}]),
        }
    if kind == "array":
        return {"type": "array", "items": inner[0], "minItems": 1, "maxItems": 3}
    if kind == "string":
        forms = [{"format": "date"}, {"pattern": "^[A-Z]{2}-[0-9]+$"}, {"format": "uuid"}]
        return {"type": "string"} | chooser.choice([*forms, {"maxLength": 20}, {"minLength": 3}])
    return {
        "any of": {"anyOf": inner[:2]},
        "number": {"type": "number", "minimum": -1.5, "maximum": 99},
        "integer": {"type": "integer", "exclusiveMinimum": 3},
        "enum": {"enum": chooser.sample(["one", "zwei", "三", 4, None, True, {"a": [1]}], 3)},
        "const": {"const": chooser.choice(["x", 3, None, "naïve"])},
        "type list": {"type": ["string", "null"], "maxLength": 8},
    }[kind]


def chat(text: str, **more: Any) -> dict[str, Any]:
    """Return the body of a request."""
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


async def ask(server: ModelServer, bodies: list[dict[str, Any]]) -> list[Any]:
    """Return the choices of all answers; a refusal ends the run."""
    results = await asyncio.gather(*(server.answer("chat", body) for body in bodies))
    refused = [got for status, got in results if status != 200]
    assert not refused, refused[0]
    return [choice for _, got in results for choice in got["choices"]]


def timed(server: ModelServer, bodies: list[dict[str, Any]]) -> float:
    """Return the seconds that all answers took together."""
    start = time.perf_counter()
    asyncio.run(ask(server, bodies))
    return time.perf_counter() - start


def overhead(server: ModelServer, rounds: int) -> None:
    """Print what a form costs for each token of answers that have it anyway."""
    schema = {"type": "object", "properties": {"summary": {"type": "string"}}}
    forms: dict[str, dict[str, Any]] = {
        "any text": {"structured_outputs": {"regex": r"[\s\S]*"}},
        "JSON": {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
    }
    for width in (1, 16):
        texts = [f"Write about {SUBJECTS[i % 6]}, number {i}." for i in range(width)]
        for name, form in forms.items():
            same = {"temperature": 0, "max_tokens": 64, "return_token_ids": True}
            ratios = []
            for _ in range(rounds):
                free = [chat(text, **same) for text in texts]
                bound = [chat(text, **same, **form) for text in texts]
                seconds = []
                for bodies in (free, bound):
                    start = time.process_time()
                    choices = asyncio.run(
                        ask(server, [b | {"return_token_ids": True} for b in bodies])
                    )
                    tokens = sum(len(choice["token_ids"]) for choice in choices)
                    seconds.append((time.process_time() - start) / tokens)
                ratios.append(seconds[1] / seconds[0])
            measured = {"form": name, "together": width}
            measured["time_per_token"] = round(statistics.median(ratios), 3)
            print(json.dumps(measured), flush=True)


def valid(server: ModelServer, rounds: int) -> None:
    """Print how many answers have their schema."""
    chooser = random.Random(0)
    counts = {"valid": 0, "invalid": 0, "cut_off": 0}
    for batch in range(rounds):
        schemas = [random_schema(chooser) for _ in range(64)]
        bodies = [
            chat(
                f"Tell me about {chooser.choice(SUBJECTS)} as JSON.",
                max_tokens=160,
                temperature=chooser.choice([0, 0.7, 1.5]),
                seed=batch * 64 + i,
                response_format={"type": "json_schema", "json_schema": {"schema": schema}},
            )
            for i, schema in enumerate(schemas)
        ]
        for choice, schema in zip(asyncio.run(ask(server, bodies)), schemas, strict=True):
            if choice["finish_reason"] == "length":
                counts["cut_off"] += 1
                continue
            try:
                jsonschema.validate(json.loads(choice["message"]["content"]), schema)
                counts["valid"] += 1
            except (ValueError, jsonschema.ValidationError):
                counts["invalid"] += 1
                print(json.dumps([schema, choice["message"]["content"]]), flush=True)
    print(json.dumps(counts), flush=True)


def ranking(server: ModelServer, rounds: int) -> None:
    """Print the seconds of ranked answers beside those of free answers as long as a label.

    Of a model that is sure, here by solved examples of a task that is to repeat a label, and of one
    that is not.
    """
    labels = [f"{room} {action}" for room in ROOMS for action in ACTIONS]
    instruction = "Answer with one of these labels only: " + ", ".join(labels)
    system = {"role": "system", "content": instruction}
    asked = [labels[(37 * i) % len(labels)] for i in range(32)]
    solved = [
        turn
        for label in labels[5::40]
        for turn in (
            {"role": "user", "content": f"The label is: {label}"},
            {"role": "assistant", "content": label},
        )
    ]
    kinds: dict[str, list[list[dict[str, str]]]] = {
        "sure": [
            [system, *solved, {"role": "user", "content": f"The label is: {label}"}]
            for label in asked
        ],
        "unsure": [
            [system, {"role": "user", "content": f"I have a question about {one}, please."}]
            for one in (SUBJECTS * 6)[:32]
        ],
    }
    ways: dict[str, dict[str, Any]] = {
        "free, 5 tokens": {"max_tokens": 5},
        "the most probable": {"ranking": {"answers": labels}},
        "99% of the probability": {"ranking": {"answers": labels, "coverage": 0.99}},
        "all": {"ranking": {"answers": labels, "coverage": 1.0}},
    }
    for kind, questions in kinds.items():
        bodies = [{"model": "m", "temperature": 0, "messages": one} for one in questions]
        timed(server, [body | {"max_tokens": 1} for body in bodies])
        for name, more in ways.items():
            taken = [timed(server, [body | more for body in bodies]) for _ in range(rounds)]
            measured = {"model": kind, "way": name, "seconds": round(statistics.median(taken), 2)}
            print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("what", choices=["overhead", "valid", "ranking"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    served = ModelServer({"m": ServedModel(args.model)}, max_batch_size=64)
    asyncio.run(served.ready())
    {"overhead": overhead, "valid": valid, "ranking": ranking}[args.what](served, args.rounds)
