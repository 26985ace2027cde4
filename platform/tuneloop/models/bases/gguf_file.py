"""What transformers passes over in a GGUF without a word: it is restored, or refused.

A tensor that the file lacks becomes random numbers, one that has no layer is left out, and of the
rotary embedding only the base is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tuneloop.errors import ModelError
from tuneloop.models.bases.weights import refuse_partial_load

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel

# Divisors of the rotary frequencies, where a model has some.
_DIVISORS = "rope_freqs.weight"
_REMEDY = "use the model in Hugging Face layout"


def complete(
    model: PreTrainedModel, reader: GGUFReader, file: Path, info: Mapping[str, Any]
) -> None:
    """Put right what transformers has not read of a GGUF.

    Args:
        reader: Of the file.
        info: transformers' loading info.

    Raises:
        ModelError: The model is not what the file describes, and cannot be made so.
    """
    refuse_partial_load(file, info)

    def setting(name: str) -> Any:
        field = reader.get_field(name)
        return None if field is None else field.contents()

    config = model.config.get_text_config()
    num_layers = config.num_hidden_layers
    divisors = None
    num_stored = 0
    for tensor in reader.tensors:
        block = re.match(r"blk\.(\d+)\.", tensor.name)
        if tensor.name == _DIVISORS:
            divisors = np.asarray(tensor.data, np.float64)
        # A block behind the last layer predicts further tokens, which nothing here does. Falcon's
        # files have its one embedding twice.
        elif not (block and int(block[1]) >= num_layers) and not (
            tensor.name == "output.weight" and config.tie_word_embeddings
        ):
            num_stored += int(tensor.n_elements)
    num_read = sum({t.data_ptr(): t.numel() for t in model.state_dict().values()}.values())
    if num_stored != num_read:
        raise ModelError.of(
            "the GGUF has other tensors than transformers reads of such a model",
            where=str(file),
            got=f"{num_stored:,} weights in the file, {num_read:,} in the model",
            remedy=_REMEDY,
        )
    kind = setting("general.architecture")
    scaling = setting(f"{kind}.rope.scaling.type")
    if scaling == "none" or setting(f"{kind}.rope.scaling.factor") == 1:
        scaling = None
    if rope := getattr(config, "rope_parameters", None):
        base = setting(f"{kind}.rope.freq_base")
        try:
            config.rope_parameters = rotary(rope, base, scaling, divisors)
        except ValueError as error:
            raise ModelError.of(
                "the GGUF turns positions in a way that transformers does not read from it",
                where=str(file),
                got=str(error),
                remedy=_REMEDY,
            ) from error


def rotary(
    read: Mapping[str, Any],
    base: float | None,
    scaling: str | None,
    divisors: NDArray[np.float64] | None,
) -> dict[str, Any]:
    """Return the settings of the rotary embedding, `rope_parameters` of a configuration.

    Args:
        read: Those that transformers has read; some families have them for each kind of layer.
        base: As the file says; None where it does not.
        scaling: How the file says that positions are scaled; None for not at all.
        divisors: Of the frequencies, shape (half of a head's dimension,).

    Raises:
        ValueError: The file says something else, which cannot be said in these settings here.
    """
    rope = dict(read)
    layers = [kind for kind in rope.values() if isinstance(kind, Mapping)]
    if not layers and base is not None:
        rope["rope_theta"] = float(base)
    kinds = layers or [rope]
    bases = [float(kind.get("rope_theta", 0)) for kind in kinds]
    if base is not None and not any(math.isclose(one, base, rel_tol=1e-6) for one in bases):
        raise ValueError(f"rope.freq_base {base:g}")
    if any(kind.get("rope_type", "default") != "default" for kind in kinds):
        return rope
    if scaling is not None:
        raise ValueError(f"rope.scaling.type {scaling}")
    if divisors is None or np.allclose(divisors, 1):
        return rope
    scaled = None if layers else _as_llama_3(bases[0], divisors)
    if scaled is None:
        raise ValueError(f"{_DIVISORS}, {divisors.min():g} to {divisors.max():g}")
    return rope | scaled


def _as_llama_3(base: float, divisors: NDArray[np.float64]) -> dict[str, Any] | None:
    """Return the scaling of Llama 3.1 and later, if it gives these divisors.

    Source: llama.cpp, `generate_extra_tensors` of Llama in its converter.
    """
    factor, length, high = float(divisors.max()), 8192, 4.0
    # In tokens, of each frequency.
    waves = 2 * math.pi * base ** (np.arange(len(divisors)) / len(divisors))
    share = np.clip((length / waves - 1) / (high - 1), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - share) / factor + share), rtol=1e-3):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
