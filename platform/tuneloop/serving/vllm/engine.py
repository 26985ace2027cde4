"""Requests as vLLM's server takes them, and its answers as ours.

Prompts and answers cross as token ids. Nothing is left to the server's defaults: what a request
does not say is said here, and a model's `generation_config` is not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from safetensors import SafetensorError, safe_open

from tuneloop.config import VllmConfig
from tuneloop.errors import ModelError, TuneloopError
from tuneloop.models.client.streaming import event_lines
from tuneloop.models.json_form import with_layout
from tuneloop.serving.adapters import read_settings
from tuneloop.serving.ranking import RankedAnswer
from tuneloop.serving.requests import (
    Activity,
    AnswerForm,
    DecodeRequest,
    DecodeResult,
    InvalidRequest,
    Limits,
    QueueFull,
    Ranking,
    TokenScore,
)
from tuneloop.serving.vllm.environment import Device, require
from tuneloop.serving.vllm.process import VllmProcess

BASE = "base"  # what the server calls the weights without an adapter
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM sets room aside for
_MEMORY_SHARE = 0.25  # of the memory that is free, for keys and values on a CPU
_TOKEN = "token_id:"


@dataclass(frozen=True)
class ServedWeights:
    """What one server loads.

    Args:
        path: Hugging Face directory.
        adapters: Directories of LoRA adapters, by the name requests use.
    """

    path: Path
    adapters: Mapping[str, Path] = field(default_factory=dict)

    def setting(self, name: str) -> Any:
        """Return a value of `config.json`, of the language model where there are several."""
        settings = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return settings.get("text_config", {}).get(name, settings.get(name))


def server_arguments(
    weights: ServedWeights, settings: VllmConfig, max_batch_size: int, device: Device
) -> list[str]:
    """Return the command line of vLLM's server, without its address.

    Raises:
        ModelError: An adapter cannot be read, or is none that vLLM serves.
    """
    arguments = ["--model", str(weights.path), "--served-model-name", BASE]
    arguments += ["--generation-config", "vllm", "--max-model-len", "auto"]
    arguments += ["--max-num-seqs", str(max_batch_size)]
    # As in our engine, so that a form has the same answers.
    arguments += ["--structured-outputs-config", '{"backend": "guidance"}']
    if device == "cpu":
        # bf16 is emulated, and slow, on most CPUs; compiling takes minutes and gains nothing.
        dtype = "float32"
        room = int(_MEMORY_SHARE * psutil.virtual_memory().available)
        arguments += ["--kv-cache-memory-bytes", str(room), "--enforce-eager"]
    else:
        # vLLM would take float32 weights as float16; what was trained is served.
        dtype = weights.setting("dtype") or weights.setting("torch_dtype") or "float32"
        arguments += ["--gpu-memory-utilization", f"{settings.gpu_memory_share:g}"]
        arguments += ["--tensor-parallel-size", str(settings.tensor_parallel_size)]
    arguments += ["--dtype", dtype if settings.dtype == "auto" else settings.dtype]
    if weights.adapters:
        rank = max(read_settings(folder)["r"] for folder in weights.adapters.values())
        room_for = next((size for size in _RANKS if size >= rank), rank)
        arguments += ["--enable-lora", "--max-lora-rank", str(room_for)]
        # One more than there are: on CPUs vLLM 0.32 takes the last place, which stays zero, for
        # requests without an adapter that are in a batch with others.
        arguments += ["--max-loras", str(len(weights.adapters) + 1), "--lora-modules"]
        arguments += [f"{name}={folder}" for name, folder in weights.adapters.items()]
        # All others would be made ready for adapters too, and vLLM 0.32 ends when it scores a
        # prompt through an output layer that is.
        changed = set().union(*map(_changed_layers, weights.adapters.values()))
        arguments += ["--lora-target-modules", *sorted(changed)]
    return arguments


def _changed_layers(folder: Path) -> set[str]:
    """Return the last part of the names of the layers that an adapter changes.

    Raises:
        ModelError: It cannot be read, or changes the output layer.
    """
    file = folder / "adapter_model.safetensors"
    try:
        with safe_open(file, "numpy") as tensors:
            keys = tensors.keys()
        names = {key.rpartition(".lora_")[0].rpartition(".")[2] for key in keys}
    except (OSError, SafetensorError) as error:
        raise ModelError.of("cannot read the adapter", str(file), str(error)) from error
    if names & {"lm_head", ""}:
        raise ModelError.of(
            "vLLM does not serve this adapter",
            where=str(folder),
            got="it changes the output layer, or is not plain LoRA",
            remedy="serve the merged weights: the reference without `/adapter`",
        )
    return names


class VllmEngine:
    """A `DecodeEngine` whose answers vLLM writes.

    Args:
        decode: Ids to text without special tokens.
        stop_ids: Tokens that end a generation whose request names none.
        max_batch_size: Sequences that run together.
        max_waiting: Requests that may wait.

    Raises:
        ModelError: vLLM is not installed, does not know the model, or ends while it loads.

    Attributes:
        socket: Where its server is reached.
    """

    notice = ""
    socket = ""

    def __init__(
        self,
        weights: ServedWeights,
        settings: VllmConfig,
        decode: Callable[[Sequence[int]], str],
        stop_ids: Sequence[int],
        max_batch_size: int,
        max_waiting: int = 1024,
    ) -> None:
        installed = require(weights.path)
        arguments = server_arguments(weights, settings, max_batch_size, installed.device)
        self.max_batch_size = max_batch_size
        self.vocab_size: int = weights.setting("vocab_size")
        self._decode, self._stop_ids = decode, frozenset(stop_ids)
        self._most_open = max_batch_size + max_waiting
        self._num_open = self._num_prompt_tokens = self._num_generated_tokens = 0
        self._lock = threading.Lock()
        self._closed = False
        self._process: VllmProcess | None = None
        self._loop = asyncio.new_event_loop()
        # Lives as long as the engine, so the server is started there.
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="tuneloop-vllm", daemon=True
        )
        self._thread.start()

        async def start() -> int:
            self._process = VllmProcess(installed, arguments, weights.path.name)
            self._process.wait_until_ready()
            self.socket = self._process.socket
            transport = httpx.AsyncHTTPTransport(
                uds=self._process.socket, limits=httpx.Limits(max_connections=None)
            )
            self._client = httpx.AsyncClient(
                transport=transport, base_url="http://vllm/v1", timeout=None
            )
            models = (await self._client.get("/models")).json()["data"]
            # A model that loads may still fail at its first token.
            body = {"model": BASE, "prompt": [0], "max_tokens": 1, "logprobs": 0}
            answer = await self._client.post("/completions", json=body)
            if not answer.is_success:
                raise self._process.failure("vLLM cannot run the model")
            return int(models[0]["max_model_len"])

        try:
            length = asyncio.run_coroutine_threadsafe(start(), self._loop).result()
        except BaseException:
            self.close()
            raise
        positions = weights.setting("max_position_embeddings") or length
        self._limits = Limits(
            self.vocab_size, length, frozenset(weights.adapters), is_memory_bound=length < positions
        )

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self._limits.max_length

    def check(self, request: DecodeRequest) -> None:
        """Return if the request can be answered.

        Raises:
            InvalidRequest: It can never be.
        """
        self._limits.check(request)
        is_scored = request.ranking is not None or not request.params.max_tokens
        if is_scored and len(request.prompt_ids) + request.params.max_tokens == self.max_length:
            raise InvalidRequest(
                f"vLLM needs one position more than the {self.max_length} that are to be scored",
                "context_length_exceeded",
            )

    def submit(self, request: DecodeRequest) -> Future[DecodeResult]:
        """Send a request and return its future; cancelling the future drops the request.

        Raises:
            InvalidRequest: The request can never be answered.
            QueueFull: Too many requests wait already.
        """
        self.check(request)
        self.refuse_dead()
        with self._lock:
            if self._num_open >= self._most_open:
                raise QueueFull(f"{self._most_open} requests are open already")
            self._num_open += 1
        future = asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)
        future.add_done_callback(self._note_end)
        return future

    def _note_end(self, _: Future[DecodeResult]) -> None:
        with self._lock:
            self._num_open -= 1

    def activity(self) -> Activity:
        """Return how much there is to do, and how much has been done."""
        running = min(self._num_open, self.max_batch_size)
        waiting = self._num_open - running
        return Activity(running, waiting, self._num_prompt_tokens, self._num_generated_tokens)

    def refuse_dead(self) -> None:
        """Return if requests can still be answered.

        Raises:
            TuneloopError: vLLM has ended.
        """
        if self._closed:
            raise TuneloopError("the engine is closed")
        if self._process is None or self._process.has_ended:
            raise TuneloopError("vLLM has ended")

    def close(self) -> None:
        """End vLLM; requests that have not ended fail."""
        if self._closed:
            return
        self._closed = True
        if self._process is not None:
            self._process.stop()

        async def finish() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # In the engine's thread.

    async def _answer(self, request: DecodeRequest) -> DecodeResult:
        started = time.monotonic()
        self._num_prompt_tokens += len(request.prompt_ids)
        if request.ranking is not None:
            written = await self._rank(request, request.ranking)
        elif request.on_token is not None and not request.score_prompt:
            written = await self._stream(request, request.on_token)
        else:
            written = await self._whole(request)
        self._num_generated_tokens += len(written.token_ids)
        return self._result(request, written, time.monotonic() - started)

    async def _whole(self, request: DecodeRequest) -> Written:
        answer = await self._post(request_body(request, self._stop_ids))
        written = Written(request.num_top)
        choice = answer["choices"][0]
        if request.params.max_tokens:
            written.add(choice)
            if request.on_token is not None:
                _hand_on(request.on_token, written, 0)
        if request.score_prompt:
            pairs = zip(request.prompt_ids[1:], choice["prompt_logprobs"][1:], strict=True)
            written.prompt_scores = [_prompt_score(t, s, request.num_top) for t, s in pairs]
        return written

    async def _stream(
        self, request: DecodeRequest, on_token: Callable[[int, TokenScore | None], None]
    ) -> Written:
        written, count = Written(request.num_top), 0
        body = request_body(request, self._stop_ids) | {"stream": True}
        async with contextlib.aclosing(self._events(body)) as choices:
            async for choice in choices:
                written.add(choice)
                _hand_on(on_token, written, count)
                count = len(written.token_ids)
        return written

    async def _rank(self, request: DecodeRequest, ranking: Ranking) -> Written:
        """Score every answer behind the prompt; the server knows no search."""
        prompt, answers = list(request.prompt_ids), ranking.tree.answers
        bodies = [
            {"model": request.adapter or BASE, "prompt": [*prompt, *answer], "max_tokens": 1,
             "temperature": 0, "prompt_logprobs": 0}
            for answer in answers
        ]  # fmt: skip
        written = Written(finish_reason="stop")
        tasks = [asyncio.create_task(self._post(body)) for body in bodies]
        try:
            replies = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        for place, (answer, reply) in enumerate(zip(answers, replies, strict=True)):
            scores = reply["choices"][0]["prompt_logprobs"][len(prompt) :]
            total = sum(s[str(t)]["logprob"] for t, s in zip(answer, scores, strict=True))
            written.ranked.append(RankedAnswer(place, total))
        written.ranked.sort(key=lambda one: -one.logprob)
        written.token_ids = list(answers[written.ranked[0].place][:-1])
        return written

    async def _post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            response = await self._client.post("/completions", json=body)
        except httpx.TransportError as error:
            raise self._lost(error) from error
        if not response.is_success:
            raise self._refusal(response.status_code, response.text)
        return response.json()

    async def _events(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        try:
            async with self._client.stream("POST", "/completions", json=body) as response:
                if not response.is_success:
                    text = (await response.aread()).decode(errors="replace")
                    raise self._refusal(response.status_code, text)
                async for line in event_lines(response.aiter_bytes()):
                    data = line.removeprefix("data: ")
                    if data == line or data == "[DONE]":
                        continue
                    item = json.loads(data)
                    if "error" in item:
                        raise self._refusal(500, data)
                    for choice in item["choices"]:
                        yield choice
        except httpx.TransportError as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> TuneloopError:
        if self._closed:
            return TuneloopError("the engine was closed")
        return TuneloopError(f"vLLM does not answer: {type(error).__name__}: {error}")

    def _refusal(self, status: int, text: str) -> Exception:
        message = text
        with contextlib.suppress(ValueError, KeyError, TypeError):
            message = json.loads(text)["error"]["message"]
        if self._closed:
            return TuneloopError("the engine was closed")
        if 400 <= status < 500:
            return InvalidRequest(f"vLLM refuses the request: {message[:500]}")
        return TuneloopError(f"vLLM failed: {message[:500]}")

    def _result(self, request: DecodeRequest, written: Written, seconds: float) -> DecodeResult:
        params, ids = request.params, written.token_ids
        text, count = (request.decode or self._decode)(ids), len(ids)
        if params.stop and request.ranking is None:
            ends = [text.find(stop) for stop in params.stop if stop in text]
            if ends or isinstance(written.stop_reason, str):
                text = text[: min(ends)] if ends else written.text
        scores = written.scores if params.logprobs and request.ranking is None else None
        kept = _covering(written.ranked, request.ranking) if request.ranking else []
        return DecodeResult(
            text=text,
            finish_reason="stop" if written.finish_reason == "stop" else "length",
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=count + written.ended_by_token,
            latency_s=seconds,
            token_ids=ids,
            logprobs=None if scores is None else [score.logprob for score in scores],
            scores=scores,
            prompt_scores=written.prompt_scores if request.score_prompt else None,
            ranked=kept,
            coverage=_share(kept, written.ranked) if request.ranking else None,
        )


@dataclass
class Written:
    """What has come of one answer, without the token that ended it.

    Args:
        num_top: How many of the likeliest tokens each score lists.
        stop_reason: The stop string or token; None also where it is the tokenizer's end token.
    """

    num_top: int = 0
    finish_reason: str = "length"
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.scores: list[TokenScore] = []
        self.prompt_scores: list[TokenScore] = []
        self.ranked: list[RankedAnswer] = []

    @property
    def ended_by_token(self) -> bool:
        """Whether a token ended it that is no part of it; those of a stop string are."""
        return self.finish_reason == "stop" and not isinstance(self.stop_reason, str)

    def add(self, choice: Mapping[str, Any]) -> None:
        """Take over a whole answer, or a piece of one that is streamed."""
        ids = list(choice["token_ids"] or ())
        scores = _scores(choice["logprobs"], self.num_top)
        self.text += choice["text"]
        self.finish_reason = choice["finish_reason"] or "length"
        self.stop_reason = choice["stop_reason"]
        if self.ended_by_token:
            ids, scores = ids[:-1], scores[:-1]
        self.token_ids += ids
        self.scores += scores


def _hand_on(
    on_token: Callable[[int, TokenScore | None], None], written: Written, start: int
) -> None:
    """Tell of the tokens from the given one on."""
    for index in range(start, len(written.token_ids)):
        on_token(written.token_ids[index], written.scores[index] if written.scores else None)


def request_body(request: DecodeRequest, stop_ids: frozenset[int]) -> dict[str, Any]:
    """Return what vLLM's `/v1/completions` is asked.

    Args:
        stop_ids: Tokens that end a generation whose request names none.
    """
    params, shaping = request.params, request.shaping
    stops = stop_ids if request.stop_ids is None else request.stop_ids
    body: dict[str, Any] = {
        "model": request.adapter or BASE,
        "prompt": list(request.prompt_ids),
        "max_tokens": max(1, params.max_tokens),
        "temperature": params.temperature,
        "top_p": params.top_p or 1e-9,  # 0 is the likeliest token, and not taken there
        "top_k": shaping.top_k,
        "min_p": shaping.min_p,
        "presence_penalty": shaping.presence_penalty,
        "frequency_penalty": shaping.frequency_penalty,
        "repetition_penalty": shaping.repetition_penalty,
        "stop": list(params.stop),
        "stop_token_ids": sorted(stops),
        # The token that ends a form is the tokenizer's own, whatever ends other answers.
        "ignore_eos": request.constraint is None,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if params.temperature > 0:
        body["seed"] = params.seed
    if shaping.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in shaping.logit_bias.items()}
    if params.logprobs:
        body["logprobs"] = request.num_top
    if request.score_prompt:
        body["prompt_logprobs"] = request.num_top
    if request.constraint is not None:
        body["structured_outputs"] = _structured(request.constraint.form)
    return body


def _structured(form: AnswerForm) -> dict[str, Any]:
    if form.kind == "json":
        return {"json": with_layout(json.loads(form.text))}
    if form.kind == "choice":
        return {"choice": json.loads(form.text)}
    return {"regex" if form.kind == "regex" else "grammar": form.text}


def _scores(logprobs: Mapping[str, Any] | None, num_top: int) -> list[TokenScore]:
    if logprobs is None:
        return []
    scores = []
    for logprob, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        pairs = [(int(name.removeprefix(_TOKEN)), value) for name, value in (top or {}).items()]
        scores.append(TokenScore(logprob, _likeliest(pairs, num_top)))
    return scores


def _prompt_score(token: int, scores: Mapping[str, Any], num_top: int) -> TokenScore:
    pairs = [(int(name), score["logprob"]) for name, score in scores.items()]
    return TokenScore(scores[str(token)]["logprob"], _likeliest(pairs, num_top))


def _likeliest(pairs: Sequence[tuple[int, float]], num_top: int) -> tuple[tuple[int, float], ...]:
    """Return the likeliest tokens: vLLM lists the chosen one beside them, whatever its rank."""
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:num_top])


def _share(kept: Sequence[RankedAnswer], ranked: Sequence[RankedAnswer]) -> float:
    """Return the share of the probability of all answers that some of them have."""
    best = ranked[0].logprob
    parts = [math.fsum(math.exp(o.logprob - best) for o in some) for some in (kept, ranked)]
    return parts[0] / parts[1]


def _covering(ranked: Sequence[RankedAnswer], ranking: Ranking) -> list[RankedAnswer]:
    """Return the most probable answers that together have the coverage asked for."""
    if ranking.coverage >= 1:
        return list(ranked)
    count = 1
    while _share(ranked[:count], ranked) < ranking.coverage:
        count += 1
    return list(ranked[:count])
