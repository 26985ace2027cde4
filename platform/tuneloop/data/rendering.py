"""Tokenizing rows with the model's own rendering, and computing what they are compared by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from tuneloop.config import DataConfig, TaskConfig
from tuneloop.data.readers import row_schema, without_instruction
from tuneloop.data.signatures import (
    ComparedSide,
    Hashes,
    band_hashes,
    compared_text,
    normalised_hash,
    shingles,
)
from tuneloop.models.chat import Renderer, RenderError
from tuneloop.records import Message, Sample

# Jaccard similarity of their sets of words from which two prompts ask nearly the same.
ALIKE_PROMPTS = 0.9


@dataclass(frozen=True)
class Rendering:
    """How rows are rendered, small enough to send to every worker.

    Args:
        path: Model directory with the tokenizer.
        chat_template: As in `model.chat_template`.
    """

    path: str
    chat_template: str
    task: TaskConfig
    data: DataConfig

    def renderer(self) -> Renderer:
        """Return the renderer, loaded once per process."""
        return _load(self.path, self.chat_template)

    def own_messages(self, row: Mapping[str, Any]) -> tuple[list[dict[str, str]], str]:
        """Return what a row itself says: messages without the task's instruction, and text."""
        messages = row["messages"]
        return (without_instruction(messages, self.task) if messages else []), row["text"]


@lru_cache(maxsize=2)
def _load(path: str, chat_template: str) -> Renderer:
    return Renderer.load(path, chat_template)


def sample_of(row: Mapping[str, Any], renderer: Renderer) -> Sample:
    """Return a row's ids and loss mask.

    Raises:
        RenderError: It cannot be rendered, or nothing or everything in it would be a target.
    """
    if not row["messages"]:
        ids = renderer.text_ids(row["text"])
        end = renderer.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        if len(ids) < 2:
            raise RenderError("the document is a single token: nothing can be predicted in it")
        return Sample(ids, [1] * len(ids))
    sample = renderer.sample([Message(m["role"], m["content"]) for m in row["messages"]])
    targets = sum(sample.loss_mask)
    if not targets:
        raise RenderError("no token of the row is a target (loss mask 0%)")
    if targets == len(sample.loss_mask):
        raise RenderError("every token of the row is a target (loss mask 100%)")
    if not sample.loss_mask[-1] or sample.input_ids[-1] not in renderer.stop_ids:
        raise RenderError("the answer's stop token is outside the loss mask")
    return sample


def rendered_schema(data: DataConfig) -> Any:
    """Return the Arrow schema of tokenized rows.

    To the columns of `row_schema` come `content_id` (hash of what the row itself says), the
    tokens, and the keys by which rows are compared.
    """
    import pyarrow as pa

    from tuneloop.data.signatures import band_shape

    bands, _ = band_shape(data.dedup.threshold)
    prompt_bands, _ = band_shape(ALIKE_PROMPTS)
    schema = row_schema()
    for name, kind in [
        ("content_id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.int8())),
        ("num_tokens", pa.int32()),
        ("num_target_tokens", pa.int32()),
        ("num_characters", pa.int32()),
        ("exact_key", pa.int64()),
        ("prompt_key", pa.int64()),
        ("answer_key", pa.int64()),
        ("bands", pa.list_(pa.uint64(), bands)),
        ("prompt_bands", pa.list_(pa.uint64(), prompt_bands)),
    ]:
        schema = schema.append(pa.field(name, kind))
    return schema


def render_batch(table: Any, rendering: Rendering) -> Any:
    """Return an Arrow table of rows with tokens and keys added, by `rendered_schema`."""
    import pyarrow as pa

    renderer, data = rendering.renderer(), rendering.data
    rows = table.to_pylist()
    texts: list[str] = []
    prompts: list[str] = []
    for row in rows:
        own, _ = rendering.own_messages(row)
        text = compared_text(own, row["text"], data.dedup.on)
        row["content_id"] = content_id(own, row["text"])
        row["exact_key"] = normalised_hash(text)
        prompts.append(compared_text(own, "", "prompt"))
        row["prompt_key"] = normalised_hash(prompts[-1]) if own else row["exact_key"]
        row["answer_key"] = normalised_hash(compared_text(own, "", "completion"))
        row["num_characters"] = sum(len(message["content"]) for message in own) or len(row["text"])
        texts.append(text)
        sample = Sample([], [])
        if not row["problem"] and not row["dropped"]:
            try:
                sample = sample_of(row, renderer)
            except RenderError as error:
                row["problem"] = str(error)
        row["input_ids"], row["loss_mask"] = sample.input_ids, sample.loss_mask
        row["num_tokens"], row["num_target_tokens"] = (
            len(sample.input_ids),
            sum(sample.loss_mask),
        )
    bands = band_hashes(shingles(texts, data.dedup.ngram_words), data.dedup.threshold)
    prompt_bands = band_hashes(shingles(prompts, 1), ALIKE_PROMPTS)
    for row, values, of_prompt in zip(rows, bands, prompt_bands, strict=True):
        row["bands"], row["prompt_bands"] = values, of_prompt
    return pa.Table.from_pylist(rows, schema=rendered_schema(data))


def shingles_of_rows(
    table: Any, keys: Any, rendering: Rendering, on: ComparedSide, ngram_words: int
) -> Any:
    """Return `key` and the sorted distinct `shingles` of the rows whose key is wanted.

    Args:
        keys: Sorted array of keys.
        on: Which side of a pair is meant.
    """
    import pyarrow as pa

    chosen = _with_keys(table, keys)
    texts = [compared_text(*rendering.own_messages(row), on) for row in chosen.to_pylist()]
    sets: list[Hashes] = shingles(texts, ngram_words).sets() if texts else []
    return pa.table(
        {
            "key": chosen["key"],
            "shingles": pa.array(sets, pa.list_(pa.uint64())),
        }
    )


def texts_of_rows(table: Any, keys: Any, rendering: Rendering) -> Any:
    """Return `key`, `text`, `prompt` and `answer` of the rows whose key is wanted."""
    import pyarrow as pa

    chosen = _with_keys(table, keys)
    said = [rendering.own_messages(row) for row in chosen.to_pylist()]
    columns = {
        "text": [compared_text(*row, "both") for row in said],
        "prompt": [compared_text(row[0], "", "prompt") for row in said],
        "answer": [compared_text(row[0], "", "completion") for row in said],
    }
    return pa.table(
        {"key": chosen["key"]} | {name: pa.array(c, pa.string()) for name, c in columns.items()}
    )


def _with_keys(table: Any, keys: Any) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    return table.filter(pc.is_in(table["key"], value_set=pa.array(keys, pa.int64())))


def content_id(messages: list[dict[str, str]], text: str) -> str:
    """Return 20 hexadecimal digits that identify what a row says, wherever it was read."""
    parts = [part for m in messages for part in (m["role"], m["content"])] or [text]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:20]


def chunks(ids: list[int], max_seq_len: int) -> list[list[int]]:
    """Return a document's ids cut into pieces of at most `max_seq_len` tokens.

    All are full but the last, whose length is that of `packing.rest_lengths`.
    """
    cuts = list(range(0, len(ids), max_seq_len))
    if len(cuts) > 1 and len(ids) - cuts[-1] == 1:
        cuts[-1] -= 1  # A lone token has nothing to be predicted from.
    return [ids[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(ids)], strict=True)]


def percentiles(values: Any, points: tuple[int, ...] = (50, 90, 95, 99, 100)) -> dict[str, int]:
    """Return whole-number percentiles by name, such as `p95`; `max` for 100. Empty for none."""
    if not len(values):
        return {}
    found = np.percentile(np.asarray(values), points, method="higher")
    return {
        "max" if point == 100 else f"p{point}": int(value)
        for point, value in zip(points, found, strict=True)
    }
