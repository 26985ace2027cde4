"""Batches of rows with their tokens, and the keys by which the rows are compared."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tuneloop.config import DedupConfig
from tuneloop.data.hashing.columns import Indices, one_array
from tuneloop.data.hashing.content import (
    ALIKE_PROMPTS,
    PASSAGE_HASHES,
    Content,
    dedup_keys,
    prompt_keys,
)
from tuneloop.data.hashing.signatures import band_shape
from tuneloop.data.schema import messages_type, rendered_schema
from tuneloop.data.tokenize.rendering import (
    LONE_TOKEN,
    Rendering,
    conversation_of,
    sample_of,
    unrenderable,
)
from tuneloop.data.tokenize.truncation import Fitted, fit
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.chat.template import RenderError
from tuneloop.models.chat.tokenizer_backends import TokenLists
from tuneloop.records import Sample


def render_batch(
    table: pa.Table,
    rendering: Rendering,
    content: Content,
    dedup: DedupConfig,
    max_tokens: int | None,
) -> pa.Table:
    """Return rows with tokens and keys added, by `rendered_schema`.

    Args:
        max_tokens: What longer conversations are cut to; None: they stay as they are.
    """
    bands, _ = band_shape(dedup.threshold)
    prompt_bands, _ = band_shape(ALIKE_PROMPTS)
    # First, as rows are compared by what is left of them.
    table = tokenize(table, rendering.renderer(), content.is_text, max_tokens)
    keys = dedup_keys(table, content, dedup)
    keys |= prompt_keys(table, content, keys["exact_key"])
    columns = {name: table[name] for name in table.column_names}
    columns["is_plain"] = _is_plain(table)
    return pa.table(columns | keys, schema=rendered_schema(bands, prompt_bands, PASSAGE_HASHES))


def tokenize(
    table: pa.Table, renderer: Renderer, is_text: bool, max_tokens: int | None = None
) -> pa.Table:
    """Return an Arrow table of rows with their tokens added; `rejection` says why a row has none.

    The new columns are `input_ids`, `loss_mask`, `num_tokens`, `num_target_tokens` and `cut`.

    Args:
        is_text: The rows are documents; otherwise they are conversations.
        max_tokens: What longer conversations are cut to, where that is possible.
    """
    rejections = table["rejection"].to_pylist()
    usable = [index for index, rejection in enumerate(rejections) if rejection is None]
    # Taking rows copies their texts.
    is_whole = len(usable) == table.num_rows
    chosen = table if is_whole else table.take(pa.array(usable, pa.int64()))
    cuts: dict[int, Fitted] = {}
    if is_text:
        ids, mask, targets, problems = _documents(chosen, renderer)
    else:
        ids, mask, targets, problems = _conversations(chosen, renderer, max_tokens, cuts)
    for index, problem in zip(usable, problems, strict=True):
        if problem:
            rejection = unrenderable(problem)
            rejections[index] = rejection._asdict()
    lengths, num_targets = np.zeros(table.num_rows, np.int64), np.zeros(table.num_rows, np.int64)
    lengths[usable], num_targets[usable] = np.diff(ids.offsets), targets
    places = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    columns = {
        "rejection": pa.array(rejections, table["rejection"].type),
        "input_ids": pa.ListArray.from_arrays(places, pa.array(ids.values)),
        "loss_mask": pa.ListArray.from_arrays(places, pa.array(mask)),
        "num_tokens": pa.array(lengths, pa.int32()),
        "num_target_tokens": pa.array(num_targets, pa.int32()),
        "cut": pa.array([""] * table.num_rows, pa.string()),
    }
    if cuts:
        messages, told = table["messages"].to_pylist(), [""] * table.num_rows
        for position, fitted in cuts.items():
            messages[usable[position]] = [message.as_dict() for message in fitted.messages]
            told[usable[position]] = fitted.cut
        columns |= {"messages": pa.array(messages, messages_type()), "cut": pa.array(told)}
    return pa.table({name: table[name] for name in table.column_names} | columns)


def _is_plain(table: pa.Table) -> pa.Array:
    """Return which rows have no tools, and no turn with more than role and content."""
    messages = one_array(table["messages"])
    turns = messages.values
    is_plain = pc.equal(one_array(table["tools"]), "")
    more = [f.name for f in turns.type if f.name not in ("role", "content")]
    if all(turns.field(name).null_count == len(turns) for name in more):
        return is_plain
    has_more = [
        any(turn[name] is not None for turn in row for name in more) for row in messages.to_pylist()
    ]
    return pc.and_(is_plain, pc.invert(pa.array(has_more, pa.bool_())))


class _Rendered(NamedTuple):
    """B rendered rows of T tokens.

    Args:
        ids: Their ids.
        mask: Which tokens are targets. Shape (T,).
        num_targets: How many are. Shape (B,).
        problems: Why a row has no ids; None for the others. Shape (B,).
    """

    ids: TokenLists
    mask: NDArray[np.int8]
    num_targets: Indices
    problems: list[RenderError | None]


def _documents(table: pa.Table, renderer: Renderer) -> _Rendered:
    """Return the tokens of plain text, all of them targets; no Python object for a token."""
    ids = renderer.batch_ids(table["text"].to_pylist(), closed=True)
    lengths = np.diff(ids.offsets)
    is_lone = lengths < 2
    if is_lone.any():
        values = ids.values[np.repeat(~is_lone, lengths)]
        ids = TokenLists(values, np.concatenate([[0], np.cumsum(np.where(is_lone, 0, lengths))]))
    problems = [RenderError(LONE_TOKEN) if lone else None for lone in is_lone.tolist()]
    return _Rendered(ids, np.ones(len(ids.values), np.int8), np.diff(ids.offsets), problems)


def _conversations(
    table: pa.Table, renderer: Renderer, max_tokens: int | None, cuts: dict[int, Fitted]
) -> _Rendered:
    """Return the tokens of conversations, and put what had to be cut into `cuts`, by position."""
    samples: list[Sample] = []
    problems: list[RenderError | None] = []
    for position, row in enumerate(table.select(["messages", "tools", "text"]).to_pylist()):
        try:
            sample = sample_of(row, renderer)
            if max_tokens is not None and len(sample.input_ids) > max_tokens:
                fitted = fit(*conversation_of(row), renderer, max_tokens)
                if fitted is not None:
                    cuts[position], sample = fitted, fitted.sample
            samples.append(sample)
            problems.append(None)
        except RenderError as error:
            samples.append(Sample([], []))
            problems.append(error)
    mask = np.fromiter(chain.from_iterable(sample.loss_mask for sample in samples), np.int8)
    num_targets = np.array([sum(sample.loss_mask) for sample in samples], np.int64)
    ids = TokenLists.of([sample.input_ids for sample in samples])
    return _Rendered(ids, mask, num_targets, problems)
