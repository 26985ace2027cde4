"""Models that do not fit into memory are refused by what their files say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from tuneloop.errors import ResourceError
from tuneloop.serving.loaded import ServedModel
from tuneloop.serving.room import refuse_small_memory, weight_bytes


def test_weights_that_are_larger_than_memory(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    needed = 4 * sum(weight.numel() for weight in model.parameters())
    assert weight_bytes(tiny_model) == needed
    # The same weights are in memory once, whatever names they have.
    models = [ServedModel(tiny_model), ServedModel(tiny_model, "chatml_tools")]
    memory = SimpleNamespace(available=needed)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    refuse_small_memory(models)
    memory.available -= 1
    with pytest.raises(ResourceError, match=str(tiny_model)):
        refuse_small_memory(models)
    memory.available = 2 * needed
    refuse_small_memory(models, copies=2)
    memory.available -= 1
    with pytest.raises(ResourceError, match=str(tiny_model)):
        refuse_small_memory(models, copies=2)
