"""Whether packed rows are to a model what single rows are, tried on the rows of the training.

A model whose layers carry state from one row to the next, or that ignores positions, would be
trained on mixed rows without any other sign of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tuneloop.errors import ModelError
from tuneloop.models.attention import FOREIGN_ERRORS, Documents, Rule, standard_attention
from tuneloop.training.packed import PackedBatch, can_share, pack_rows
from tuneloop.training.padded import PaddedBatch, pad_rows
from tuneloop.training.rows import MIN_SHARED_TOKENS, Rows, make_rows

# Difference of a logit that rounding explains, relative to the largest one of the row. SmolLM2
# differs by 1e-6; the small convolutions that LFM2 starts from by 3e-4.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Targets at each end of a document: what leaks in from the document before shows at its beginning,
# what a window or a chunk hides at its end.
_EDGE_TARGETS = 24
# How long rows that share a prefix are made: the proof is to cost less than a step.
_PREFIXED_TOKENS = 256


def packing_fault(model: torch.nn.Module, rows: Rows, device: torch.device) -> str:
    """Return how packed rows differ from single ones in the model's own attention; empty if equal.

    Compared are the logits at targets of the longest row and the two shortest ones, and of rows
    that share a prefix, which a training on the CPU computes once.

    Args:
        model: Attends with `models.attention.attend`.
    """
    try:
        shares = can_share(model.train())  # remembered; ZeRO takes the layers apart afterwards
        model.eval()
        shares = shares or can_share(model)
        some = _some_rows(rows)
        batches = [(some, pack_rows(some, range(len(some)), device))]
        family = _rows_with_prefix(rows)
        if family is not None and shares:
            batches.append((family, pack_rows(family, range(len(family)), device, True)))
            assert batches[-1][1].documents.num_prefix >= MIN_SHARED_TOKENS
        for chosen, batch in batches:
            watched = _Watched(
                batch.documents.num_prefix, batch.documents.lengths, batch.documents.bounds
            )
            fault = _difference(model, chosen, replace(batch, documents=watched))
            count = model.config.get_text_config().num_hidden_layers
            if len(watched.layers) < count:
                return f"{count - len(watched.layers)} of {count} layers have no attention"
            if fault:
                return fault
    except torch.OutOfMemoryError:
        raise
    except FOREIGN_ERRORS as error:
        if "memory" in str(error):
            raise
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


@dataclass(frozen=True, eq=False)
class _Watched(Documents):
    """Documents that note which layers attend: the others hand state on from row to row."""

    layers: set[int] = field(default_factory=set)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Return attention within each document, as `Documents` does."""
        self.layers.add(layer)
        return super().attend(layer, query, key, value, rule)


def padding_fault(model: torch.nn.Module, rows: Rows, device: torch.device) -> str:
    """Return how padded rows differ from single ones; empty if they are equal.

    Args:
        model: Has its own attention.

    Raises:
        ModelError: The model cannot compute its own rows.
    """
    model.eval()
    some = _some_rows(rows)
    try:
        return _difference(model, some, pad_rows(some, range(len(some)), device))
    except torch.OutOfMemoryError:
        raise
    except FOREIGN_ERRORS as error:
        if "memory" in str(error):
            raise
        raise ModelError.of(
            "the model cannot be run as it is configured",
            where=type(model).__name__,
            got=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            allowed="a causal language model that transformers runs on these rows",
            remedy="see whether transformers alone can run it; if not, the files are wrong",
        ) from error


def _difference(model: torch.nn.Module, rows: Rows, batch: PackedBatch | PaddedBatch) -> str:
    """Return how a batch's logits differ from those of its rows one by one; empty if not."""
    device = batch.input_ids.device
    worst, where = 0.0, ""
    tolerance = _TOLERANCE[model.dtype]
    with torch.no_grad():
        together = batch.logits(model).float().split(rows.num_target_tokens.tolist())
        with standard_attention(model):
            for row, mixed in enumerate(together):
                alone = pad_rows(rows, [row], device)
                # One document alone, without a mask, as anyone would call the model.
                logits = model(input_ids=alone.input_ids, use_cache=False).logits
                logits = logits[0, alone.keep[alone.pick]].float()
                error = float((mixed - logits).abs().max() / logits.abs().max())
                if error > worst or math.isnan(error):
                    worst, where = error, rows.row_ids[row]
    if worst <= tolerance:
        return ""
    return f"logits of {where} differ by {worst:.1e} of the largest, {tolerance:.0e} is allowed"


def _some_rows(rows: Rows) -> Rows:
    """Return one row of each of some documents: the longest, and two of the shortest.

    Documents of less than two tokens have nothing to predict.
    """
    index = np.arange(len(rows.documents) - 1)
    lengths = np.diff(rows.documents)
    order = index[lengths > 1][np.argsort(lengths[lengths > 1], kind="stable")]
    chosen = dict.fromkeys(order[[-1, 0, min(1, len(order) - 1)]].tolist())
    documents = [_document(rows, number) for number in chosen]
    return _rows(
        [f"a row of {len(ids)} tokens" for ids in documents],
        documents,
        lambda place, size: place <= _EDGE_TARGETS or place >= size - _EDGE_TARGETS,
    )


def _rows_with_prefix(rows: Rows) -> Rows | None:
    """Return rows made of the longest document that share its first half; None if all are short."""
    ids = _document(rows, int(np.diff(rows.documents).argmax()))[:_PREFIXED_TOKENS]
    shared = max(MIN_SHARED_TOKENS, len(ids) // 2)
    rest = ids[shared:]
    if len(rest) < 2:
        return None
    turned = rest[::-1]
    parts = [rest, turned, turned[: max(2, len(rest) // 3)]]
    return _rows(
        [f"a row of {shared} shared and {len(part)} own tokens" for part in parts],
        [[*ids[:shared], *part] for part in parts],
        lambda place, size: (
            place > shared and (place <= shared + _EDGE_TARGETS or place >= size - _EDGE_TARGETS)
        ),
    )


def _document(rows: Rows, number: int) -> list[int]:
    ids: list[int] = rows.input_ids[rows.documents[number] : rows.documents[number + 1]].tolist()
    return ids


def _rows(
    names: list[str], documents: Sequence[list[int]], learned: Callable[[int, int], bool]
) -> Rows:
    masks = [
        [int(place > 0 and learned(place, len(ids))) for place in range(len(ids))]
        for ids in documents
    ]
    return make_rows(names, list(documents), masks)
