"""Decode engine against transformers' own `generate` with static batches, side by side.

    python benchmarks/serving.py PATH [--prompts 32] [--max-tokens 64] [--openvino] [--vllm]
    python benchmarks/serving.py PATH --adapters 8 [--openvino]

With `--openvino`, our engine with OpenVINO's forward passes takes part; with `--vllm`, vLLM behind
our protocol, and the same server asked directly; `tuneloop install-engine vllm` installs it. With
`--adapters`, the prompts are dealt out to so many adapters of rank 16, in turn with one of them.

Prompts are slices of this Python's own sources. Each workload runs on both, one after the other,
with greedy decoding and without stop tokens, so that both write the same number of tokens; the
ids are compared. One JSON line per workload goes to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuneloop.config import VllmConfig
from tuneloop.records import SamplingParams
from tuneloop.serving.engine import Engine
from tuneloop.serving.model import num_threads
from tuneloop.serving.requests import DecodeRequest
from tuneloop.serving.vllm.engine import ServedWeights, VllmEngine

WORKLOADS = {
    "120 tokens each": (0, (120, 120)),
    "20 to 220 tokens": (0, (20, 220)),
    "450 shared, then 20 to 60": (450, (20, 60)),
}


def make_prompts(
    ids: list[int], count: int, shared: int, lengths: tuple[int, int], seed: int = 0
) -> list[list[int]]:
    """Return `count` prompts that begin with the same `shared` tokens."""
    chooser = random.Random(seed)

    def cut(size: int) -> list[int]:
        start = chooser.randrange(len(ids) - size)
        return ids[start : start + size]

    beginning = cut(shared)
    return [beginning + cut(chooser.randint(*lengths)) for _ in range(count)]


def run_engine(
    path: Path,
    prompts: list[list[int]],
    max_tokens: int,
    kind: type[Engine] = Engine,
    adapters: Mapping[str, Path] = MappingProxyType({}),
) -> tuple[float, Any]:
    """Return seconds and generated ids, the prompts dealt out to the adapters."""
    engine = kind.load(
        path, decode=lambda ids: "", stop_ids=(), max_batch_size=len(prompts), adapters=adapters
    )
    params = SamplingParams(max_tokens=max_tokens)
    start = time.perf_counter()
    names = itertools.cycle(adapters or [""])
    futures = [
        engine.submit(DecodeRequest(prompt, params, adapter=name))
        for prompt, name in zip(prompts, names, strict=False)
    ]
    answers = [future.result().token_ids for future in futures]
    seconds = time.perf_counter() - start
    engine.close()
    return seconds, answers


def run_vllm(engine: VllmEngine, prompts: list[list[int]], max_tokens: int) -> tuple[float, Any]:
    """Return seconds and generated ids of vLLM as our engine."""
    params = SamplingParams(max_tokens=max_tokens)
    start = time.perf_counter()
    futures = [engine.submit(DecodeRequest(prompt, params)) for prompt in prompts]
    answers = [future.result().token_ids for future in futures]
    return time.perf_counter() - start, answers


def run_bare_vllm(
    engine: VllmEngine, prompts: list[list[int]], max_tokens: int
) -> tuple[float, Any]:
    """Return seconds and generated ids of vLLM's server, asked by nothing but an HTTP client."""

    async def ask() -> list[list[int]]:
        transport = httpx.AsyncHTTPTransport(uds=engine.socket)
        client = httpx.AsyncClient(transport=transport, base_url="http://vllm/v1", timeout=None)
        body = {"model": "base", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body["return_token_ids"] = True
        async with client:
            replies = await asyncio.gather(
                *(client.post("/completions", json=body | {"prompt": one}) for one in prompts)
            )
        return [reply.json()["choices"][0]["token_ids"] for reply in replies]

    start = time.perf_counter()
    answers = asyncio.run(ask())
    return time.perf_counter() - start, answers


@torch.inference_mode()
def run_generate(path: Path, prompts: list[list[int]], max_tokens: int) -> tuple[float, Any]:
    """Return seconds and generated ids of one left-padded static batch."""
    torch.set_num_threads(num_threads())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
    return time.perf_counter() - start, out[:, longest:].tolist()


def make_adapters(path: Path, count: int, folder: Path) -> dict[str, Path]:
    """Return adapters of rank 16 on all linear layers, with random weights."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapters = {}
    for index in range(count):
        torch.manual_seed(index)
        lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, lora)
        name = f"adapter-{index}"
        adapted.save_pretrained(folder / name)
        model = adapted.unload()
        adapters[name] = folder / name
    return adapters


def measure_adapters(args: argparse.Namespace, prompts: list[list[int]], folder: Path) -> None:
    """Print one line for each kind of engine: one adapter and all of them, in turn."""
    adapters = make_adapters(args.model, args.adapters, folder)
    counts = {"one adapter": 1, f"{args.adapters} adapters": args.adapters}
    kinds = {"engine": Engine}
    if args.openvino:
        from tuneloop.serving.openvino.engine import OpenVinoEngine

        kinds["openvino"] = OpenVinoEngine
    tokens = args.prompts * args.max_tokens
    for engine, kind in kinds.items():
        speeds: dict[str, list[float]] = {name: [] for name in counts}
        for _ in range(args.rounds):
            for name, count in counts.items():
                loaded = dict(itertools.islice(adapters.items(), count))
                seconds, _ = run_engine(args.model, prompts, args.max_tokens, kind, loaded)
                speeds[name].append(tokens / seconds)
        medians = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
        one, several = medians.values()
        report = {"engine": engine, "tokens_per_s": medians, "ratio": round(several / one, 2)}
        print(json.dumps(report), flush=True)


def main() -> None:
    """Run all workloads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--adapters", type=int, default=0)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = "\n".join(
        Path(os.__file__).with_name(name).read_text() for name in ("argparse.py", "os.py")
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    if options.adapters:
        prompts = make_prompts(ids, options.prompts, *WORKLOADS["20 to 220 tokens"])
        with tempfile.TemporaryDirectory() as folder:
            measure_adapters(options, prompts, Path(folder))
        return
    vllm = None
    if options.vllm:
        weights = ServedWeights(options.model)
        vllm = VllmEngine(weights, VllmConfig(), lambda ids: "", (), options.prompts)
    for name, (shared, lengths) in WORKLOADS.items():
        prompts = make_prompts(ids, options.prompts, shared, lengths)
        tokens = options.prompts * options.max_tokens
        speeds: dict[str, list[float]] = {"engine": [], "generate": []}
        if options.openvino:
            speeds["openvino"] = []
        if vllm is not None:
            speeds |= {"vllm": [], "bare vllm": []}
        equal = equal_openvino = equal_vllm = 0
        for _ in range(options.rounds):
            seconds, ours = run_engine(options.model, prompts, options.max_tokens)
            speeds["engine"].append(tokens / seconds)
            seconds, theirs = run_generate(options.model, prompts, options.max_tokens)
            speeds["generate"].append(tokens / seconds)
            equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
            gc.collect()
            if options.openvino:
                from tuneloop.serving.openvino.engine import OpenVinoEngine

                seconds, theirs = run_engine(
                    options.model, prompts, options.max_tokens, OpenVinoEngine
                )
                speeds["openvino"].append(tokens / seconds)
                equal_openvino = sum(a == b for a, b in zip(ours, theirs, strict=True))
            if vllm is not None:
                # The second to be asked would find the first one's prompts in vLLM's cache.
                run_bare_vllm(vllm, prompts, 1)
                seconds, theirs = run_vllm(vllm, prompts, options.max_tokens)
                speeds["vllm"].append(tokens / seconds)
                equal_vllm = sum(a == b for a, b in zip(ours, theirs, strict=True))
                seconds, _ = run_bare_vllm(vllm, prompts, options.max_tokens)
                speeds["bare vllm"].append(tokens / seconds)
        medians = {key: round(statistics.median(values), 1) for key, values in speeds.items()}
        report = {
            "workload": name,
            "prompts": options.prompts,
            "max_tokens": options.max_tokens,
            "tokens_per_s": medians,
            "ratio": round(medians["engine"] / medians["generate"], 2),
            "equal_ids": f"{equal} of {options.prompts}",
            "threads": num_threads(),
        }
        if options.openvino:
            report["equal_ids_openvino"] = f"{equal_openvino} of {options.prompts}"
        if vllm is not None:
            report["equal_ids_vllm"] = f"{equal_vllm} of {options.prompts}"
        print(json.dumps(report), flush=True)
    if vllm is not None:
        vllm.close()


if __name__ == "__main__":
    main()
