"""The model behind the engine: loading, packed forward passes, and the check of its attention."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from tuneloop.errors import ModelError, Problem, UserError
from tuneloop.models.attention import FOREIGN_ERRORS, IMPLEMENTATION, Rule
from tuneloop.models.bases.weights import load_whole
from tuneloop.serving.kv_cache import CachedSegment, DecodeBatch, Prompt


class AttentionMismatch(ModelError):
    """The decode engine does not compute what a model's own attention does."""


def num_threads() -> int:
    """Return the physical cores this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(allowed or 1, psutil.cpu_count(logical=False) or 1))


def load_decoder(path: str | Path, on_cpu: bool = False) -> PreTrainedModel:
    """Return a Hugging Face directory's model, on the GPU if there is one.

    Args:
        on_cpu: On the CPU also where there is a GPU.

    Raises:
        ModelError: The model cannot be loaded.
    """
    torch.set_num_threads(num_threads())  # Ray gives workers OMP_NUM_THREADS=1
    cuda = torch.cuda.is_available() and not on_cpu
    try:
        # bf16 is emulated, and slow, on most CPUs.
        dtype = "auto" if cuda else torch.float32
        model = load_whole(Path(path), dtype=dtype)
    except UserError:
        raise
    except Exception as error:
        raise ModelError.of(
            "cannot load the model",
            where=str(path),
            got=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:500]}",
            allowed="a Hugging Face directory with config.json and safetensors",
        ) from error
    return model.to("cuda") if cuda else model


def forward(model: PreTrainedModel, segments: Sequence[CachedSegment]) -> Tensor:
    """Return the logits behind the kept tokens of all segments, one after the other: (kept, V)."""
    token_ids: list[int] = []
    positions: list[int] = []
    kept: list[int] = []
    for segment in segments:
        kept += [len(token_ids) + index for index in segment.kept]
        token_ids += segment.token_ids
        positions += segment.positions
    out = model(
        input_ids=torch.tensor([token_ids], device=model.device),
        position_ids=torch.tensor([positions], device=model.device),
        use_cache=False,
        logits_to_keep=torch.tensor(kept, dtype=torch.long, device=model.device),
        segments=segments,
    )
    logits: Tensor = out.logits[0]
    return logits


@dataclass(eq=False)
class _Watched(Prompt):
    """A prompt that notes the window of each of its attentions."""

    windows: set[int | None] = field(default_factory=set)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Return attention of the current chunk, as `Prompt` does."""
        self.windows.add(rule.window)
        return super().attend(layer, query, key, value, rule)


def long_rule(text: PretrainedConfig, windows: set[int | None]) -> str:
    """Return what a model does in sequences longer than the tried one and the engine does not."""
    settings = text.to_dict()
    kinds = set(settings.get("layer_types") or ())
    window = settings.get("sliding_window")
    slides = not kinds or "sliding_attention" in kinds
    if settings.get("use_sliding_window") is False:
        window = None
    if window and slides and window not in windows:
        return f"sliding_window {window} is in the mask alone"
    positions = settings.get("max_position_embeddings") or math.inf
    chunk = settings.get("attention_chunk_size")
    if chunk and chunk < positions:
        return f"attention in chunks of {chunk}"
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    scaled = [part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)]
    odd = {"longrope", "dynamic"}.intersection(kind for kind in scaled if kind)
    return f"positions scaled by the longest sequence ({', '.join(sorted(odd))})" if odd else ""


def switch_attention(model: PreTrainedModel) -> int:
    """Give a model the engine's attention, and check that it computes what it did before.

    A prompt goes through the model's own attention in one piece, then through the engine's as
    prefix, chunk and single tokens.

    Returns:
        Bytes of keys and values per token.

    Raises:
        AttentionMismatch: The logits differ, the model does not let its attention be replaced, or
            it has rules for longer sequences that the engine is not told of.
    """
    size = min(24, getattr(model.config.get_text_config(), "max_position_embeddings", 24))
    part = size // 3
    ids = [(37 * index + 11) % model.config.get_text_config().vocab_size for index in range(size)]
    reason = ""
    try:
        expected = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        expected = expected.logits[0].float()
        model.set_attn_implementation(IMPLEMENTATION)
        first = _Watched(None, ids[:part], keep_all=True)
        logits = [forward(model, [first.next_chunk(size)])]
        first.advance()
        prompt: Prompt = Prompt(first.freeze(), ids[part : 2 * part], keep_all=True)
        logits.append(forward(model, [prompt.next_chunk(size)]))
        batch: DecodeBatch[None] = DecodeBatch(prompt.prefix, size)
        batch.add(None, prompt.layers, part, ids[2 * part])
        for index in range(2 * part, size):
            batch.token_ids = [ids[index]]
            logits.append(forward(model, [batch]))
            batch.advance([0])
        error = (torch.cat(logits).float() - expected).abs().max() / expected.abs().max()
        tolerance = 1e-3 if expected.dtype == model.dtype else 5e-2
        reason = long_rule(model.config.get_text_config(), first.windows)
        if not error < tolerance:
            reason = f"logits differ by {error:.1e} of the largest, {tolerance:.0e} is allowed"
    except torch.OutOfMemoryError:
        raise
    except IndexError as error:
        reason = f"layers without attention between others ({error})"
    except FOREIGN_ERRORS as error:
        # What the configuration says is told rather than where the attempt ended.
        text = model.config.get_text_config()
        rule = long_rule(text, {getattr(text, "sliding_window", None)})
        reason = rule or f"{type(error).__name__}: {error}"
    if reason:
        raise AttentionMismatch(
            Problem(
                "the decode engine does not reproduce this model's attention",
                where=type(model).__name__,
                got=reason,
                allowed="causal models whose attention goes through transformers' "
                "AttentionInterface, such as Llama, Qwen, Gemma 3, Mistral, GPT-NeoX",
            )
        )
    tensors = [tensor for pair in prompt.layers for tensor in pair]
    return sum(tensor.nbytes // tensor.shape[1] for tensor in tensors)
