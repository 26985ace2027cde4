"""`serving`: how models are served; recorded, never fingerprinted."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from tuneloop.config.section import Name, Section
from tuneloop.records import BASE, FINETUNED

EngineName = Literal["auto", "tuneloop", "openvino", "vllm"]

# The environment variable with the key that our servers ask for.
API_KEY_VARIABLE = "TUNELOOP_API_KEY"


class VllmConfig(Section):
    """How vLLM is run, where it serves."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights. `auto`: float32 on a CPU, on a GPU that of the model's files."""
    gpu_memory_share: float = Field(0.9, gt=0, le=1)
    """Of the GPU's memory, or of the part reserved for the model."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that hold the weights together."""


class ServingConfig(Section):
    """How models are served."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 listens on all interfaces."""
    port: int = Field(8000, ge=0, le=65535)
    """Port of `tuneloop serve`; 0 takes a free port."""
    engine: EngineName = "auto"
    """What writes the answers: our own engine (`tuneloop`), the same with OpenVINO's forward passes
    on a CPU (`openvino`, after `pip install 'tuneloop[openvino]'`), or vLLM, once `tuneloop
    install-engine vllm` has installed it. `auto` takes OpenVINO where it is installed and
    reproduces the model, else `tuneloop`."""
    vllm: VllmConfig = VllmConfig()
    max_batch_size: int = Field(64, ge=1)
    """Sequences decoded together."""
    api_keys_file: str = ""
    """YAML file of those who may ask `tuneloop serve`: a name and `{sha256, models,
    requests_per_minute}` for each."""
    models: dict[Name, str] = Field(default_factory=dict)
    """Models that `tuneloop serve` serves in addition to `base` and `finetuned`, by the name
    requests use: `models/NAME` or `models/NAME@vN` is an artifact's merged weights,
    `models/NAME@vN/adapter` its adapter on the weights of `base`; anything else is read like
    `model.base`."""

    @field_validator("models")
    @classmethod
    def _names_are_free(cls, models: dict[str, str]) -> dict[str, str]:
        taken = sorted({BASE, FINETUNED} & set(models))
        if taken:
            raise ValueError(f"the name `{taken[0]}` is taken; give the model another one")
        return models
