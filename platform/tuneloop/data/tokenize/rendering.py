"""Rows to token ids, by the one renderer that training, serving and evaluation use as well."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tuneloop.data.hashing.columns import Indices
from tuneloop.data.schema import ReasonCode, Rejection, Stage
from tuneloop.models.chat.own_templates import template_from_root
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.chat.template import RenderError
from tuneloop.models.chat.tokenizer_backends import BackendChoice, FastTokenizer, choose_backend
from tuneloop.records import Message, Sample

logger = logging.getLogger("tuneloop.data")

# On how many of the user's rows a tokenizer backend is tried, and how much of each.
NUM_VERIFIED = 200
_VERIFIED_CHARACTERS = 5_000
LONE_TOKEN = "the document is a single token: nothing can be predicted in it"


@dataclass(frozen=True)
class Rendering:
    """How rows are rendered, small enough to send to every worker.

    Args:
        path: Model directory with the tokenizer.
        chat_template: As in `model.chat_template`.
        backend: Package that encodes, verified to give the same ids; empty for the tokenizer
            itself.
    """

    path: str
    chat_template: str
    backend: str = ""

    def __post_init__(self) -> None:
        # Workers run in other directories.
        object.__setattr__(self, "path", self.path and str(Path(self.path).absolute()))
        object.__setattr__(self, "chat_template", template_from_root(self.chat_template))

    def renderer(self) -> Renderer:
        """Return the renderer, loaded once per process."""
        return _load(self.path, self.chat_template, self.backend)

    def verified(self, rows: Iterable[Mapping[str, Any]]) -> tuple[Rendering, BackendChoice]:
        """Return the rendering by the fastest backend that gives the same ids on rows, and which.

        Args:
            rows: Some of those to be rendered, with `messages` and `text`.
        """
        renderer = self.renderer()
        texts = [text[:_VERIFIED_CHARACTERS] for row in rows for text in _texts_of(row, renderer)]
        _, choice = choose_backend(renderer.tokenizer, texts)
        level = logging.INFO if choice.package else logging.WARNING
        logger.log(level, "tokenizer engine: %s", choice)
        return replace(self, backend=choice.package), choice


@lru_cache(maxsize=4)
def _load(path: str, chat_template: str, backend: str) -> Renderer:
    if backend:
        renderer = _load(path, chat_template, "")
        return renderer.with_backend(FastTokenizer(renderer.tokenizer, backend))
    return Renderer.load(path, chat_template)


def _texts_of(row: Mapping[str, Any], renderer: Renderer) -> list[str]:
    """Return the texts of a row that are encoded; none if it cannot be rendered."""
    if not row["messages"]:
        return [row["text"]]
    try:
        return renderer.texts(*conversation_of(row))
    except RenderError:
        return []


def conversation_of(row: Mapping[str, Any]) -> tuple[list[Message], list[dict[str, Any]]]:
    """Return a row's messages and tools."""
    tools = row.get("tools")
    return [Message.of(turn) for turn in row["messages"]], json.loads(tools) if tools else []


def unrenderable(error: RenderError) -> Rejection:
    """Return why a row that cannot be rendered is removed."""
    return Rejection(Stage.TOKENIZE, ReasonCode.UNRENDERABLE, str(error), remedy=error.remedy)


def sample_of(row: Mapping[str, Any], renderer: Renderer) -> Sample:
    """Return a row's ids and loss mask.

    Raises:
        RenderError: It cannot be rendered, or nothing or everything in it would be a target.
    """
    if not row["messages"]:
        ids = renderer.batch_ids([row["text"]], closed=True).values.tolist()
        if len(ids) < 2:
            raise RenderError(LONE_TOKEN)
        return Sample(ids, [1] * len(ids))
    sample = renderer.sample(*conversation_of(row))
    targets = sum(sample.loss_mask)
    if not targets:
        raise RenderError("no token of the row is a target (loss mask 0%)")
    if targets == len(sample.loss_mask):
        raise RenderError("every token of the row is a target (loss mask 100%)")
    if not sample.loss_mask[-1] or sample.input_ids[-1] not in renderer.stop_ids:
        raise RenderError("the answer's stop token is outside the loss mask")
    return sample


def percentiles(values: Sequence[int] | Indices) -> dict[str, int]:
    """Return whole-number percentiles by name, such as `p95`; `max` for 100. Empty for none."""
    if not len(values):
        return {}
    points = (50, 90, 95, 99, 100)
    values_at = np.percentile(np.asarray(values), points, method="higher")
    return {
        "max" if point == 100 else f"p{point}": int(value)
        for point, value in zip(points, values_at, strict=True)
    }
