"""A model loaded with every tensor its files hold, and no other; or a sentence that says why not.

transformers fills a tensor that a file lacks with random numbers and goes on. It reports that in
its loading info, which is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tuneloop.errors import ModelError

_SHOWN = 3


def load_whole(path: Path, **options: Any) -> PreTrainedModel:
    """Return a causal language model, loaded without running code of its directory.

    Args:
        path: Directory in Hugging Face layout.
        options: Those of `from_pretrained`; `device_map="meta"` reads the names and shapes alone.

    Raises:
        ModelError: Tensors are missing, have another shape, or belong to no layer.
    """
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    # Its table of odd tensors; they are told below.
    transformers_logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    refuse_partial_load(path, info)
    return model


def refuse_partial_load(path: Path, info: Mapping[str, Any]) -> None:
    """Raise ModelError for what transformers' loading info says about the tensors of a model."""
    odd = [
        (what, sorted(_name(entry) for entry in info.get(key, ())))
        for what, key in (
            ("missing", "missing_keys"),
            ("of another shape", "mismatched_keys"),
            ("without a layer", "unexpected_keys"),
        )
    ]
    found = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', …' * (len(names) > _SHOWN)}"
        for what, names in odd
        if names
    ]
    if found:
        raise ModelError.of(
            "the model's tensors are not those of its configuration",
            where=str(path),
            got="; ".join(found),
            allowed="every tensor that config.json describes, and no other",
            remedy="fetch the model again; a missing tensor would be filled with random numbers",
        )


def _name(entry: str | tuple[Any, ...]) -> str:
    """Return the tensor's name; a mismatch has both shapes behind it."""
    if isinstance(entry, str):
        return entry
    name, *shapes = entry
    return " against ".join([f"{name} {list(shapes[0])}", *(str(list(s)) for s in shapes[1:])])
