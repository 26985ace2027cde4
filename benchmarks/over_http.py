"""One model asked over HTTP and in this process, in turn: speed, and how long a client waits.

    python benchmarks/over_http.py PATH_OF_MODEL [--engine auto] [--rounds 3]

The engine is the same in both, in its own replica of Ray Serve for HTTP. Prompts are token ids,
slices of this Python's own sources; answers are greedy. Measured are the tokens per second of 32
prompts at once and of one stream, the time to the first token of one stream beside the time that
its prompt and first token take in the engine, and the time to the first token of a request that
comes while 31 others are written, beside the time of a step. One JSON line for each goes to
standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from serving import WORKLOADS, make_prompts
from transformers import AutoTokenizer

from tuneloop.cluster import connect
from tuneloop.config import ResourcesConfig, ServingConfig
from tuneloop.records import SamplingParams
from tuneloop.serving.app import ServedModel, serve
from tuneloop.serving.loaded import load
from tuneloop.serving.requests import DecodeEngine, DecodeRequest

NUM_STREAMS = 20


def run_engine(
    engine: DecodeEngine, prompts: Sequence[list[int]], max_tokens: int
) -> tuple[float, list[list[int]]]:
    """Return seconds and token ids of all prompts at once, in this process."""
    params = SamplingParams(max_tokens=max_tokens)
    start = time.perf_counter()
    futures = [engine.submit(DecodeRequest(prompt, params)) for prompt in prompts]
    answers = [list(future.result().token_ids) for future in futures]
    return time.perf_counter() - start, answers


async def complete(client: httpx.AsyncClient, prompt: list[int], max_tokens: int) -> list[int]:
    """Return the token ids of one completion."""
    body = {"model": "base", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    response = await client.post("completions", json=body | {"return_token_ids": True})
    ids: list[int] = response.raise_for_status().json()["choices"][0]["token_ids"]
    return ids


async def stream(
    client: httpx.AsyncClient,
    prompt: list[int],
    max_tokens: int,
    is_written: asyncio.Event | None = None,
) -> tuple[float, float]:
    """Return the seconds until the first event of a stream, which is told, and until its end."""
    body = {"model": "base", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    start = time.perf_counter()
    first = 0.0
    async with client.stream("POST", "completions", json=body | {"stream": True}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and not first:
                first = time.perf_counter() - start
                if is_written is not None:
                    is_written.set()
    return first, time.perf_counter() - start


async def run_http(
    client: httpx.AsyncClient, prompts: Sequence[list[int]], max_tokens: int
) -> tuple[float, list[list[int]]]:
    """Return seconds and token ids of all prompts at once, over HTTP."""
    start = time.perf_counter()
    answers = await asyncio.gather(*(complete(client, prompt, max_tokens) for prompt in prompts))
    return time.perf_counter() - start, answers


async def late_request(
    client: httpx.AsyncClient, prompts: Sequence[list[int]], max_tokens: int
) -> tuple[float, float]:
    """Return the seconds to the first token of a late request, and those of a step at that time."""
    first, *others = prompts
    written = [asyncio.Event() for _ in others]
    running = [
        asyncio.create_task(stream(client, prompt, max_tokens, event))
        for prompt, event in zip(others, written, strict=True)
    ]
    for event in written:  # all prompts are read then
        await event.wait()
    late, end = await stream(client, first[:8], 16)
    await asyncio.gather(*running)
    return late, (end - late) / 15


async def measure(url: str, engine: DecodeEngine, ids: list[int], args: argparse.Namespace) -> None:
    """Print one line for each measurement."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url + "/", timeout=None, limits=limits, trust_env=False
    ) as client:
        await run_http(client, make_prompts(ids, 4, 0, (20, 60)), 8)  # both are warm then
        run_engine(engine, make_prompts(ids, 4, 0, (20, 60)), 8)
        for name, (shared, lengths) in {} if args.waits_only else WORKLOADS.items():
            for count in (32, 1) if not shared else (32,):
                speeds: dict[str, list[float]] = {"in process": [], "over HTTP": []}
                num_equal = 0
                for number in range(args.rounds):
                    prompts = make_prompts(ids, count, shared, lengths, number)
                    seconds, ours = run_engine(engine, prompts, args.max_tokens)
                    speeds["in process"].append(sum(map(len, ours)) / seconds)
                    seconds, theirs = await run_http(client, prompts, args.max_tokens)
                    speeds["over HTTP"].append(sum(map(len, theirs)) / seconds)
                    num_equal += sum(a == b for a, b in zip(ours, theirs, strict=True))
                tell(f"{count} × {name}", speeds, equal_ids=f"{num_equal} of {count * args.rounds}")
        waits: dict[str, list[float]] = {"prefill": [], "first token over HTTP": []}
        for prompt in make_prompts(ids, NUM_STREAMS, 0, (120, 120), 1):
            waits["prefill"].append(1000 * run_engine(engine, [prompt], 1)[0])
            waits["first token over HTTP"].append(1000 * (await stream(client, prompt, 2))[0])
        tell("milliseconds of one stream, 120 tokens", waits)
        late: dict[str, list[float]] = {"first token": [], "a step": []}
        for number in range(args.rounds):
            prompts = make_prompts(ids, 32, 0, (20, 220), 2 + number)
            for key, seconds in zip(late, await late_request(client, prompts, 256), strict=True):
                late[key].append(1000 * seconds)
        tell("milliseconds of a request beside 31 others", late)


def tell(what: str, numbers: dict[str, list[float]], **more: Any) -> None:
    """Print the medians of some numbers as JSON, with each of a few."""
    medians = {key: round(statistics.median(values), 1) for key, values in numbers.items()}
    rounds = {key: [round(one, 1) for one in values] for key, values in numbers.items()}
    line = {"what": what, "median": medians, "rounds": rounds} | more
    print(json.dumps(line, ensure_ascii=False), flush=True)


def main() -> None:
    """Load the model twice, here and in a replica, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--engine", default="auto", choices=["auto", "tuneloop", "openvino"])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waits-only", action="store_true", help="no speeds")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = "\n".join(
        Path(os.__file__).with_name(f"{name}.py").read_text() for name in ("argparse", "os")
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    models = {"base": ServedModel(args.model)}
    config = ServingConfig(port=0, engine=args.engine)
    with connect(ResourcesConfig(num_cpus=2)), serve(models, config) as url:
        engine = load(models, config.max_batch_size, args.engine)["base"].engine
        asyncio.run(measure(url, engine, ids, args))
        engine.close()


if __name__ == "__main__":
    main()
