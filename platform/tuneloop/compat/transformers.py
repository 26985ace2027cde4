"""What transformers offers no public function for. Tried with transformers 5.23.0.

`tests/unit/compat/test_transformers.py` fails where a newer version moves one of these parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def standard_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model use the attention that it has for anyone who loads it.

    `set_attn_implementation` is public, but which one is set, and whether a model knows PyTorch's,
    only private attributes tell.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
