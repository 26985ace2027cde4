"""What transformers keeps in private attributes. Tried with transformers 5.23.

`tests/unit/compat/test_transformers.py` fails when a newer version moves it.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def attention_implementation(model: PreTrainedModel) -> str:
    """Return the name of the attention that a model's text layers use now.

    It can be set from outside by a public method, and read by none.
    """
    return str(model.config.get_text_config()._attn_implementation)


def apply_gate(experts: torch.nn.Module, inner: torch.Tensor) -> torch.Tensor:
    """Return what a mixture's experts make of gate and up projection; families differ in it."""
    return experts._apply_gate(inner)
