"""LoRA adapters over one base model: every request is answered with the adapter it names.

A packed step multiplies the base weights once for the tokens of all requests, then adds each
adapter's product to its own run of tokens: y = W x + scaling B (A x) (Hu et al. 2021, section
4.1). Nothing is merged, so any number of adapters share the memory of one base model.

Shapes: T tokens, R rank.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuneloop.errors import ModelError
from tuneloop.serving.kv_cache import CachedSegment

_PREFIX = "base_model.model."
# Settings of PEFT that leave an adapter A and B with one scaling, whatever their value. Any other
# one has to be off: a setting that is unknown here may change what the adapter computes.
_NEUTRAL = frozenset(
    "auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode"
    " layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core peft_type"
    " peft_version qalora_group_size r revision target_modules task_type".split()
)
# Values that are as good as off; other ways to initialize change the base's weights as well.
_OFF = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}


@dataclass(frozen=True, eq=False)
class _LowRank:
    """One adapter's product for one layer: `down` (R, in), `up` (out, R)."""

    down: Tensor
    up: Tensor
    scaling: float


Run = tuple[str, slice]


class Adapters:
    """The adapters of one model. The thread that runs the model owns them.

    Args:
        model: A transformers model; the layers that adapters change are given another `forward`.
        folders: Adapter directories as PEFT saves them, by the name requests use.

    Raises:
        ModelError: An adapter cannot be read, does not fit, or is not plain LoRA.
    """

    def __init__(self, model: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        self.names = frozenset(folders)
        self._runs: list[Run] = []
        by_layer: dict[str, dict[str, _LowRank]] = {}
        for name, folder in folders.items():
            for layer_name, delta in _read(folder, model).items():
                by_layer.setdefault(layer_name, {})[name] = delta
        for layer_name, deltas in by_layer.items():
            layer = model.get_submodule(layer_name)
            layer.forward = self._adapted(layer.forward, deltas)

    def select(self, segments: Sequence[CachedSegment]) -> None:
        """Note which tokens of the next forward pass belong to which adapter."""
        self._runs.clear()
        start = 0
        for segment in segments:
            stop = start + len(segment)
            if segment.adapter:
                self._runs.append((segment.adapter, slice(start, stop)))
            start = stop

    def select_one(self, name: str) -> None:
        """Note that all tokens of the next passes belong to one adapter; empty: to the base."""
        self._runs[:] = [(name, slice(None))] if name else []

    def _adapted(
        self, usual: Callable[[Tensor], Tensor], deltas: Mapping[str, _LowRank]
    ) -> Callable[[Tensor], Tensor]:
        """Return a layer's `forward` with its adapters."""
        return functools.partial(self._forward, usual, deltas)

    def _forward(
        self, usual: Callable[[Tensor], Tensor], deltas: Mapping[str, _LowRank], x: Tensor
    ) -> Tensor:
        """Return the layer's output with every run's adapter added; x (1, T, in) → (1, T, out)."""
        out = usual(x)
        for name, part in self._runs:
            delta = deltas.get(name)
            if delta is not None:
                # In the order and the precision of PEFT's own layer. Experts get (T, in).
                rows = x[..., part, :].to(delta.down.dtype)
                added = (rows @ delta.down.t() @ delta.up.t()) * delta.scaling
                out[..., part, :] = out[..., part, :] + added
        return out


class MaskedAdapters(Adapters):
    """Adapters of a model that is traced, where the adapter of each token is an input.

    Every adapter is multiplied with every token. Those of a layer lie side by side, so that it has
    two products whatever their number; between them all ranks but the token's own become 0.

    Attributes:
        order: Names of the adapters.
        masks: 1 where a token is of an adapter, 0 where not; in that order. Shape (T, N).
    """

    masks: Tensor

    def __init__(self, model: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        self.order = tuple(folders)
        super().__init__(model, folders)

    def _adapted(
        self, usual: Callable[[Tensor], Tensor], deltas: Mapping[str, _LowRank]
    ) -> Callable[[Tensor], Tensor]:
        names = [name for name in self.order if name in deltas]
        down = torch.cat([deltas[name].down for name in names]).t()
        up = torch.cat([deltas[name].up for name in names], dim=1).t()
        ranks = [deltas[name].down.shape[0] for name in names]
        # Which ranks are an adapter's own, and its scaling. Shape (N, sum of R).
        own = torch.zeros(len(self.order), sum(ranks))
        for name, columns in zip(names, torch.arange(sum(ranks)).split(ranks), strict=True):
            own[self.order.index(name), columns] = deltas[name].scaling

        def forward(x: Tensor) -> Tensor:
            return usual(x) + ((x @ down) * (self.masks @ own)) @ up

        return forward


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of an adapter, with `r` and `lora_alpha`.

    Raises:
        ModelError: They cannot be read, or it is not plain LoRA.
    """
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError.of("cannot read the adapter", str(folder), str(error)) from error
    if settings.get("peft_type") != "LORA":
        raise _unfit(folder, f"peft_type {settings.get('peft_type')}")
    for name in sorted(settings.keys() - _NEUTRAL):
        if settings[name] and settings[name] not in _OFF.get(name, ()):
            raise _unfit(folder, f"{name}: {settings[name]}")
    return settings


def _read(folder: Path, model: PreTrainedModel) -> dict[str, _LowRank]:
    """Return an adapter's part of each layer, by the layer's name in the model."""
    settings = read_settings(folder)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError.of("cannot read the adapter", str(folder), str(error)) from error
    scaling = settings["lora_alpha"] / settings["r"]
    layers: dict[str, _LowRank] = {}
    for key in sorted(tensors):
        layer_name, _, kind = key.removeprefix(_PREFIX).rpartition(".lora_")
        if kind not in ("A.weight", "B.weight"):
            raise _unfit(folder, f"tensor {key}")
        if kind == "A.weight":
            down, up = tensors[key], tensors.get(f"{_PREFIX}{layer_name}.lora_B.weight")
            if up is None:
                raise _unfit(folder, f"{key} without its lora_B")
            _refuse_misfit(folder, model, layer_name, down.shape[1], up.shape[0])
            # PEFT keeps adapters in float32 also beside weights of less precision.
            down, up = (tensor.to(model.device, torch.float32) for tensor in (down, up))
            layers[layer_name] = _LowRank(down, up, scaling)
    return layers


def _refuse_misfit(
    folder: Path, model: PreTrainedModel, layer_name: str, num_in: int, num_out: int
) -> None:
    """Raise when the model has no such layer, or one of another size."""
    try:
        layer = model.get_submodule(layer_name)
    except AttributeError as error:
        raise _unfit(folder, f"there is no layer {layer_name}") from error
    if layer is model.get_output_embeddings():
        # It sees only the tokens that are scored, not the packed ones.
        raise _unfit(folder, f"it changes the output layer {layer_name}")
    weight = getattr(layer, "weight", None)
    size = () if weight is None else tuple(weight.shape)
    if isinstance(layer, nn.Linear):
        size = size[::-1]
    if size != (num_in, num_out):
        adapter_size = (num_in, num_out)
        raise _unfit(folder, f"{layer_name} is {size} and the adapter's part of it {adapter_size}")


def _unfit(folder: Path, got: str) -> ModelError:
    return ModelError.of(
        "the adapter cannot be put on this base model",
        where=str(folder),
        got=got,
        allowed="plain LoRA on linear layers of the base it was trained on",
        remedy="serve the merged weights: the reference without `/adapter`",
    )
