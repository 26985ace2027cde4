"""Tokenizing rows with the model's own rendering, and computing what they are compared by."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneloop.config import DataConfig, TaskConfig
from tuneloop.data.hashing.columns import ComparedSide, Hashes, Texts, compared_text
from tuneloop.data.hashing.signatures import (
    band_hashes,
    band_shape,
    normalised_hashes,
    shingles,
)
from tuneloop.data.schema import ReasonCode, Rejection, Stage, rendered_schema
from tuneloop.data.sources.readers import without_instruction
from tuneloop.models.chat.renderer import Renderer, RenderError
from tuneloop.models.chat.tokenizer_backends import (
    BackendChoice,
    FastTokenizer,
    TokenLists,
    choose_backend,
)
from tuneloop.records import Message, Sample

logger = logging.getLogger("tuneloop.data")

# Jaccard similarity of their sets of words from which two prompts ask nearly the same.
ALIKE_PROMPTS = 0.9
# On how many of the user's rows an engine is tried, and how much of each.
NUM_PROVED = 200
_PROVED_CHARACTERS = 5_000
# Columns that tell what a row itself says (`Rendering.own_messages`).
SAID_IN = ["task", "messages", "text"]
_LONE_TOKEN = "the document is a single token: nothing can be predicted in it"


@dataclass(frozen=True)
class Rendering:
    """How rows are rendered, small enough to send to every worker.

    Args:
        path: Model directory with the tokenizer.
        chat_template: As in `model.chat_template`.
        engine: Package that encodes, which was proved to give the same ids; empty for the
            tokenizer itself.
    """

    path: str
    chat_template: str
    task: TaskConfig
    data: DataConfig
    engine: str = ""

    def renderer(self) -> Renderer:
        """Return the renderer, loaded once per process."""
        return _load(self.path, self.chat_template, self.engine)

    def proved(self, rows: Iterable[Mapping[str, Any]]) -> tuple[Rendering, BackendChoice]:
        """Return the rendering by the fastest engine that gives the same ids on rows, and which.

        Args:
            rows: Some of those to be rendered, with `messages` and `text`.
        """
        renderer = self.renderer()
        texts = [text[:_PROVED_CHARACTERS] for row in rows for text in _texts_of(row, renderer)]
        _, choice = choose_backend(renderer.tokenizer, texts)
        return replace(self, engine=choice.package), choice

    def own_messages(self, row: Mapping[str, Any]) -> tuple[list[dict[str, str]], str]:
        """Return what a row itself says: messages without the task's instruction, and text."""
        messages, task = row["messages"], self.task.of(row["task"])
        return (without_instruction(messages, task) if messages else []), row["text"]


@lru_cache(maxsize=4)
def _load(path: str, chat_template: str, engine: str) -> Renderer:
    if engine:
        renderer = _load(path, chat_template, "")
        return renderer.with_backend(FastTokenizer(renderer.tokenizer, engine))
    return Renderer.load(path, chat_template)


def tell_engine(choice: BackendChoice) -> None:
    """Log which engine encodes, as a warning if it is none of the fast ones."""
    level = logging.INFO if choice.package else logging.WARNING
    logger.log(level, "tokenizer engine: %s", choice)


def _texts_of(row: Mapping[str, Any], renderer: Renderer) -> list[str]:
    """Return what of a row is encoded; nothing if it cannot be rendered."""
    if not row["messages"]:
        return [row["text"]]
    try:
        return renderer.texts([Message(m["role"], m["content"]) for m in row["messages"]])
    except RenderError:
        return []


def sample_of(row: Mapping[str, Any], renderer: Renderer) -> Sample:
    """Return a row's ids and loss mask.

    Raises:
        RenderError: It cannot be rendered, or nothing or everything in it would be a target.
    """
    if not row["messages"]:
        ids = renderer.batch_ids([row["text"]], closed=True).values.tolist()
        if len(ids) < 2:
            raise RenderError(_LONE_TOKEN)
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


def render_batch(table: Any, rendering: Rendering) -> Any:
    """Return an Arrow table of rows with tokens and keys added, by `rendered_schema`."""
    import pyarrow as pa

    bands, _ = band_shape(rendering.data.dedup.threshold)
    prompt_bands, _ = band_shape(ALIKE_PROMPTS)
    schema = rendered_schema(bands, prompt_bands)
    keys = dedup_keys(table, rendering)
    keys |= _prompt_keys(table, rendering, keys["exact_key"])
    table = tokenize(table, rendering)
    columns = {name: table[name] for name in table.column_names}
    return pa.table(columns | keys, schema=schema)


def tokenize(table: Any, rendering: Rendering) -> Any:
    """Return an Arrow table of rows with their tokens added; `rejection` says why a row has none.

    The new columns are `input_ids`, `loss_mask`, `num_tokens` and `num_target_tokens`.
    """
    import pyarrow as pa

    rejections = table["rejection"].to_pylist()
    usable = [index for index, rejection in enumerate(rejections) if rejection is None]
    of_rows = _documents if rendering.task.type == "language_modeling" else _conversations
    # Taking rows copies their texts.
    is_whole = len(usable) == table.num_rows
    chosen = table if is_whole else table.take(pa.array(usable, pa.int64()))
    ids, mask, targets, found = of_rows(chosen, rendering.renderer())
    for index, problem in zip(usable, found, strict=True):
        if problem:
            rejection = Rejection(Stage.TOKENIZE, ReasonCode.UNRENDERABLE, problem)
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
    }
    return pa.table({name: table[name] for name in table.column_names} | columns)


# Ids of B rows, shape (T,) of which are targets, shape (B,) how many are, and why a row has none.
_Rendered = tuple[TokenLists, NDArray[np.int8], Any, list[str]]


def _documents(table: Any, renderer: Renderer) -> _Rendered:
    """Return the tokens of plain text, all of them targets; no Python object for a token."""
    ids = renderer.batch_ids(table["text"].to_pylist(), closed=True)
    lengths = np.diff(ids.offsets)
    is_lone = lengths < 2
    if is_lone.any():
        values = ids.values[np.repeat(~is_lone, lengths)]
        ids = TokenLists(values, np.concatenate([[0], np.cumsum(np.where(is_lone, 0, lengths))]))
    problems = [_LONE_TOKEN if lone else "" for lone in is_lone.tolist()]
    return ids, np.ones(len(ids.values), np.int8), np.diff(ids.offsets), problems


def _conversations(table: Any, renderer: Renderer) -> _Rendered:
    samples, problems = [], []
    for row in table.select(["messages", "text"]).to_pylist():
        try:
            samples.append(sample_of(row, renderer))
            problems.append("")
        except RenderError as error:
            samples.append(Sample([], []))
            problems.append(str(error))
    mask = np.fromiter(chain.from_iterable(sample.loss_mask for sample in samples), np.int8)
    targets = [sum(sample.loss_mask) for sample in samples]
    return TokenLists.of([sample.input_ids for sample in samples]), mask, targets, problems


def dedup_keys(table: Any, rendering: Rendering) -> dict[str, Any]:
    """Return the columns, as Arrow arrays, that deduplication needs to know of the rows.

    They are `content_id`, `num_characters`, `exact_key` and `bands`, as in `rendered_schema`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    dedup = rendering.data.dedup
    texts = Texts.of_column(compared_column(table, rendering))
    if rendering.task.type == "language_modeling":
        # A document is all of its row: its bytes are there already.
        data = texts.data.data
        ids = [_digits(data[start:stop]) for start, stop in pairwise(texts.offsets.tolist())]
        sizes = pc.utf8_length(table["text"])
    else:
        rows = _said_by(table)
        said = [rendering.own_messages(row) for row in rows]
        ids = [content_id(*own, row["task"]) for own, row in zip(said, rows, strict=True)]
        sizes = pa.array([sum(len(m["content"]) for m in own) or len(text) for own, text in said])
    return {
        "content_id": pa.array(ids, pa.string()),
        "num_characters": sizes.cast(pa.int32()),
        "exact_key": pa.array(normalised_hashes(texts)),
        "bands": _lists(band_hashes(texts, dedup.ngram_words, dedup.threshold)),
    }


def compared_from(rendering: Rendering) -> list[str]:
    """Return the columns that `compared_column` reads."""
    return ["text"] if rendering.task.type == "language_modeling" else SAID_IN


def compared_column(table: Any, rendering: Rendering) -> Any:
    """Return what deduplication compares of each row, as an Arrow column of large strings."""
    return said_column(table, rendering, rendering.data.dedup.on)


def said_column(table: Any, rendering: Rendering, on: ComparedSide) -> Any:
    """Return one side of what each row says, as an Arrow column of large strings.

    Args:
        table: With the columns of `compared_from` at least.
        on: Which side of a pair. A document is all of its row.
    """
    import pyarrow as pa

    if rendering.task.type == "language_modeling":
        return table["text"].cast(pa.large_string())
    texts = [compared_text(*rendering.own_messages(row), on) for row in _said_by(table)]
    return pa.array(texts, pa.large_string())


def _prompt_keys(table: Any, rendering: Rendering, exact: Any) -> dict[str, Any]:
    """Return the columns `prompt_key`, `answer_key` and `prompt_bands`, as Arrow arrays.

    A document has its own text for a prompt, but no bands.

    Args:
        exact: `exact_key` of the rows.
    """
    import pyarrow as pa

    if rendering.task.type == "language_modeling":
        prompts = answers = Texts.of([""] * table.num_rows)
    else:
        said = [rendering.own_messages(row)[0] for row in _said_by(table)]
        prompts = Texts.of([compared_text(own, "", "prompt") for own in said])
        answers = Texts.of([compared_text(own, "", "completion") for own in said])
        has_prompt = np.array([bool(own) for own in said], dtype=bool)
        exact = np.where(has_prompt, normalised_hashes(prompts), exact)
    return {
        "prompt_key": pa.array(exact),
        "answer_key": pa.array(normalised_hashes(answers)),
        "prompt_bands": _lists(band_hashes(prompts, 1, ALIKE_PROMPTS)),
    }


def _said_by(table: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.select(SAID_IN).to_pylist()
    return rows


def _lists(values: Any) -> Any:
    """Return an array of shape (B, width) as an Arrow array of B lists."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def shingles_of_rows(
    table: Any, keys: Any, rendering: Rendering, on: ComparedSide, ngram_words: int
) -> Any:
    """Return `key` and the sorted distinct `shingles` of the rows whose key is wanted.

    Args:
        keys: Sorted array of keys.
        on: Which side of a pair is meant.
    """
    import pyarrow as pa

    chosen = rows_with_keys(table, keys)
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

    chosen = rows_with_keys(table, keys)
    said = [rendering.own_messages(row) for row in chosen.to_pylist()]
    columns = {
        "text": [compared_text(*row, "both") for row in said],
        "prompt": [compared_text(row[0], "", "prompt") for row in said],
        "answer": [compared_text(row[0], "", "completion") for row in said],
    }
    return pa.table(
        {"key": chosen["key"]} | {name: pa.array(c, pa.string()) for name, c in columns.items()}
    )


def rows_with_keys(table: Any, keys: Any) -> Any:
    """Return the rows whose key is wanted."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return table.filter(pc.is_in(table["key"], value_set=pa.array(keys, pa.int64())))


def content_id(messages: list[dict[str, str]], text: str, task: str = "") -> str:
    """Return 20 hexadecimal digits that identify what a row says, wherever it was read.

    Args:
        task: Of a mixture. The same words in two tasks are two rows.
    """
    parts = [part for m in messages for part in (m["role"], m["content"])] or [text]
    parts = [f"task {task}", *parts] if task else parts
    return _digits("\0".join(parts).encode("utf-8", "replace"))


def _digits(content: Any) -> str:
    """Return the beginning of a hash of bytes."""
    return hashlib.sha256(content).hexdigest()[:20]


def percentiles(values: Any, points: tuple[int, ...] = (50, 90, 95, 99, 100)) -> dict[str, int]:
    """Return whole-number percentiles by name, such as `p95`; `max` for 100. Empty for none."""
    if not len(values):
        return {}
    found = np.percentile(np.asarray(values), points, method="higher")
    return {
        "max" if point == 100 else f"p{point}": int(value)
        for point, value in zip(points, found, strict=True)
    }
