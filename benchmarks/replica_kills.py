"""Mixed load over HTTP while the model's replica is killed again and again.

    python benchmarks/replica_kills.py PATH_OF_MODEL [--minutes 10] [--every 30] [--clients 32]

Chats whole and streamed, two choices with log-probabilities, tool calls, answers under a schema,
and clients that hang up. Each request has to end with the answer that it had before anything was
killed, or with an error in OpenAI's shape. Replicas are killed by SIGKILL, as the system does when
memory runs out. The chat template is `chatml_tools`, whatever the model's own. One JSON object goes
to standard output; the exit code is 1 if anything else happened, or if nothing was killed.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tuneloop.cluster import connect
from tuneloop.config import ResourcesConfig, ServingConfig
from tuneloop.serving.app import ServedModel, serve

TIMEOUT_S = 120  # longer is a hang
SETTLE_S = 30  # after the last kill
QUESTIONS = [f"Return item {i} of the list" for i in range(8)]
SCHEMA = {
    "type": "object",
    "required": ["kind", "is_open"],
    "additionalProperties": False,
    "properties": {"kind": {"enum": ["card", "cash"]}, "is_open": {"type": "boolean"}},
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
KINDS: dict[str, dict[str, Any]] = {
    "chat": {"max_tokens": 24},
    "stream": {"max_tokens": 48, "stream": True},
    "choices": {"max_tokens": 8, "n": 2, "logprobs": True, "top_logprobs": 3},
    "tools": {"max_tokens": 200, "tools": [TOOL], "tool_choice": "required"},
    "schema": {
        "max_tokens": 200,
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "payment", "schema": SCHEMA},
        },
    },
}  # fmt: skip
HANG_UP = "hang up"


@dataclass
class Outcomes:
    """What came of the requests.

    Args:
        counts: By kind, then by outcome.
        wrong: Some of those that ended otherwise than they may.
    """

    counts: dict[str, collections.Counter[str]] = field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    num_wrong: int = 0

    def add(self, kind: str, outcome: str, seconds: float) -> None:
        """Count one request."""
        self.counts[kind][outcome] += 1
        self.slowest_s = max(self.slowest_s, seconds)
        if outcome != "right" and not outcome.startswith("error "):
            self.num_wrong += 1
            self.wrong = [*self.wrong, f"{kind}: {outcome}"][:20]


class Answer(Exception):
    """How a request ended that has no answer."""


def body_of(kind: str, question: str) -> dict[str, Any]:
    """Return a request, greedy so that it has one right answer."""
    messages = [{"role": "user", "content": question}]
    return {"model": "base", "messages": messages, "temperature": 0, **KINDS[kind]}


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """Return what was answered, without what differs from one request to the next.

    Raises:
        Answer: There is none.
    """
    if not body.get("stream"):
        response = await client.post("chat/completions", json=body)
        if response.status_code != 200:
            raise Answer(error_of(response.text, response.status_code))
        choices = response.json()["choices"]
        return without_ids(
            [[one["message"], one["finish_reason"], tokens(one["logprobs"])] for one in choices]
        )
    text, reason = "", ""
    async with client.stream("POST", "chat/completions", json=body) as response:
        if response.status_code != 200:
            raise Answer(error_of((await response.aread()).decode(), response.status_code))
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return without_ids([text, reason])
            if not data:
                continue
            if "error" in json.loads(data):
                raise Answer(error_of(data, 200))
            choice = json.loads(data)["choices"][0]
            text += choice["delta"].get("content", "")
            reason = choice["finish_reason"] or reason
    raise Answer("the stream ends without an error")


def tokens(logprobs: dict[str, Any] | None) -> list[str]:
    """Return the tokens of log-probabilities, whose last digits depend on the batch."""
    return [one["token"] for one in logprobs["content"]] if logprobs else []


def without_ids(answer: object) -> str:
    """Return an answer as text, without the random names of its calls."""
    return re.sub(r'"id": "\w+"', '"id": ""', json.dumps(answer))


def error_of(text: str, status: int) -> str:
    """Return `error STATUS` for an error in OpenAI's shape, otherwise what stands there."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, TypeError, KeyError):
        return f"status {status}, no OpenAI error: {text[:200]!r}"
    has_shape = error.keys() == {"message", "type", "param", "code"} and error["message"]
    return f"error {status}" if has_shape else f"status {status}, wrong shape: {text[:200]!r}"


async def hang_up(client: httpx.AsyncClient, chance: random.Random) -> None:
    """Ask for a long answer and go: within a stream, or while a whole answer is written."""
    body = body_of("chat", chance.choice(QUESTIONS)) | {"max_tokens": 1000}
    if chance.random() < 0.5:
        async with asyncio.timeout(0.5):
            await client.post("chat/completions", json=body)
        return
    async with client.stream("POST", "chat/completions", json=body | {"stream": True}) as response:
        num_lines = 0
        async for _ in response.aiter_lines():
            num_lines += 1
            if num_lines == 6:
                return


async def one_request(
    client: httpx.AsyncClient, chance: random.Random, right: dict[tuple[str, str], str]
) -> tuple[str, str]:
    """Ask once; return the kind of request and what came of it."""
    kind = chance.choice([*KINDS, HANG_UP])
    question = chance.choice(QUESTIONS)
    try:
        if kind == HANG_UP:
            await hang_up(client, chance)
            return kind, "right"
        answer = await ask(client, body_of(kind, question))
    except TimeoutError:
        return kind, "right"  # this client hung up
    except Answer as ended:
        return kind, str(ended)
    except httpx.HTTPError as error:
        return kind, f"{type(error).__name__} {error}"
    return kind, "right" if answer == right[kind, question] else f"another answer: {answer[:300]}"


def replicas(deployment: str) -> list[psutil.Process]:
    """Return the processes of a deployment, of those that this one started."""
    title = re.compile(rf"ray::ServeReplica:[^:]*:{re.escape(deployment)}\b")
    family = psutil.Process().children(recursive=True)
    return [one for one in family if title.match(command_line(one))]


def command_line(process: psutil.Process) -> str:
    """Return how a process is called; Ray gives its workers a title. Empty when it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def megabytes() -> dict[str, int]:
    """Return the memory of what is not killed: the HTTP side, Serve's controller and proxy."""
    title = re.compile(r"ray::(ServeReplica:[^:]*:ingress|ServeController|ProxyActor)")
    sizes: dict[str, int] = {}
    for one in psutil.Process().children(recursive=True):
        if found := title.match(command_line(one)):
            name = "ingress" if "ingress" in found[1] else found[1]
            sizes[name] = one.memory_full_info().uss // 2**20
    return sizes


async def kill_replicas(every_s: float, until: float) -> int:
    """Kill the model's replica again and again; return how often."""
    num_killed = 0
    while time.monotonic() + every_s < until:
        await asyncio.sleep(every_s)
        victims = replicas("model-base")
        for one in victims:
            one.kill()
        _, alive = psutil.wait_procs(victims, timeout=5)
        num_killed += len(victims) - len(alive)
        print(f"killed {[one.pid for one in victims]}; MiB {megabytes()}", file=sys.stderr)
    return num_killed


async def engine_state(client: httpx.AsyncClient) -> dict[str, float]:
    """Return what runs and waits in the engine."""
    text = (await client.get(str(client.base_url).removesuffix("v1/") + "metrics")).text
    found = re.findall(r"^tuneloop_engine_(running|waiting)\S* (\S+)$", text, re.MULTILINE)
    return {name: float(number) for name, number in found}


async def measure(url: str, args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Return what happened, and whether it is what should."""
    outcomes = Outcomes()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False
    ) as client:
        right = {
            (kind, question): await ask(client, body_of(kind, question))
            for kind in KINDS
            for question in QUESTIONS
        }
        before = megabytes()
        until = time.monotonic() + 60 * args.minutes

        async def load(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < until:
                start = time.monotonic()
                kind, outcome = await one_request(client, chance, right)
                outcomes.add(kind, outcome, time.monotonic() - start)
                await asyncio.sleep(0.2 if outcome.startswith("error") else 0)

        killing = asyncio.create_task(kill_replicas(args.every, until - SETTLE_S))
        await asyncio.gather(*(load(number) for number in range(args.clients)))
        num_killed = await killing
        state: dict[str, float] = {}
        for _ in range(20):
            state = await engine_state(client)
            if state and not any(state.values()):
                break
            await asyncio.sleep(0.5)
    told = {
        "minutes": args.minutes,
        "kills": num_killed,
        "requests": {kind: dict(counts) for kind, counts in sorted(outcomes.counts.items())},
        "slowest_s": round(outcomes.slowest_s, 1),
        "wrong": outcomes.wrong,
        "engine_afterwards": state,
        "mib_before": before,
        "mib_after": megabytes(),
    }
    is_free = bool(state) and not any(state.values())
    return told, bool(num_killed) and not outcomes.num_wrong and is_free


def main() -> None:
    """Serve, ask, kill, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=30, help="seconds from kill to kill")
    parser.add_argument("--clients", type=int, default=32)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    models = {"base": ServedModel(args.model, "chatml_tools")}
    with connect(ResourcesConfig(num_cpus=2)), serve(models, ServingConfig(port=0)) as url:
        told, is_well = asyncio.run(measure(url + "/", args))
    print(json.dumps(told))
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
