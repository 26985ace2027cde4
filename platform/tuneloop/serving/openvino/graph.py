"""A transformers model as OpenVINO's graph: traced once, its attention put over blocks, compiled.

The model is traced with an attention that leaves a mark for each layer. Each mark then gives way to
OpenVINO's attention over blocks of keys and values, so that one pass reads packed tokens of many
sequences, some in prefill and some in decode.

Shapes: T tokens, H key-value heads, G query heads per key-value head, D head dimension, N adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino.utils import replace_node
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from tuneloop.compat.openvino import paged_attention, read
from tuneloop.models.attention import UNSUPPORTED
from tuneloop.serving.adapters import MaskedAdapters
from tuneloop.serving.model import num_threads

BLOCK = 32  # tokens; the kernel for CPUs knows no other size
_MARK = "tuneloop-openvino"
# Of these, float32 and the precision that was trained, CPUs would choose less.
_OPTIONS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "ENABLE_CPU_PINNING": False,  # other models have the same cores
}


class Run(NamedTuple):
    """Tokens of one sequence.

    Args:
        position: Of the first.
        blocks: Where its keys and values are, those of these tokens included.
        adapter: Name of their adapter; empty: the base weights alone.
    """

    token_ids: Sequence[int]
    position: int
    blocks: Sequence[int]
    adapter: str


class _Layer(NamedTuple):
    """What a mark stands for."""

    num_query_heads: int
    num_heads: int
    key_size: int
    value_size: int
    scaling: float
    window: int | None


def _mark(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    marked: dict[int, _Layer],
    **options: Any,
) -> tuple[Tensor, None]:
    """Return something of the shape of attention, (1, T, H*G, D), and note what it stands for."""
    for name in (*UNSUPPORTED, "softcap"):
        if options.get(name) is not None:
            raise NotImplementedError(f"attention with `{name}`")
    layer, scaling = int(module.layer_idx), options.get("scaling")
    _, num_query_heads, _, size = map(int, query.shape)
    num_heads, groups = int(key.shape[1]), num_query_heads // int(key.shape[1])
    marked[layer] = _Layer(
        num_query_heads,
        num_heads,
        size,
        int(value.shape[3]),
        size**-0.5 if scaling is None else scaling,
        options.get("sliding_window"),
    )
    key, value = (part.repeat(1, groups, 1, 1) for part in (key, value))
    # The scale tells which layer it is.
    out = functional.scaled_dot_product_attention(query, key, value, scale=float(layer + 1))
    return out.transpose(1, 2), None


AttentionInterface.register(_MARK, _mark)


class _Traced(nn.Module):
    """What of a model is traced."""

    def __init__(self, model: PreTrainedModel, adapters: MaskedAdapters) -> None:
        super().__init__()
        self.model, self.adapters = model, adapters
        self.marked: dict[int, _Layer] = {}

    def forward(self, token_ids: Tensor, positions: Tensor, kept: Tensor, masks: Tensor) -> Tensor:
        self.adapters.masks = masks
        out = self.model(
            input_ids=token_ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=kept,
            marked=self.marked,
        )
        return out.logits[0]


class Graph:
    """A compiled model with its keys and values. One thread at a time.

    Args:
        model: In float32, on the CPU; its weights are needed no more afterwards.
        adapters: Those of this model.

    Raises:
        NotImplementedError: The model asks for a kind of attention that is not computed here.

    Attributes:
        bytes_per_token: Of keys and values.
        window: Tokens that those layers see which do not see all before, each its own included;
            None: there is no such layer. Another one may be set where there is.
    """

    def __init__(self, model: PreTrainedModel, adapters: MaskedAdapters) -> None:
        self._adapters = adapters.order
        model.set_attn_implementation(_MARK)
        traced = _Traced(model, adapters)
        ids = torch.tensor([[1, 2, 3]])
        masks = torch.ones(3, len(self._adapters))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes of heads, which are the same for all inputs
            graph = read(traced, [ids, ids, torch.tensor([1, 2]), masks])
        self._layers = dict(sorted(traced.marked.items()))
        windows = {layer.window for layer in self._layers.values() if layer.window is not None}
        if len(windows) > 1:
            raise NotImplementedError(f"layers with different windows: {sorted(windows)}")
        self.window = next(iter(windows), None)
        _attend_in_blocks(graph, self._layers)
        options = _OPTIONS | {"INFERENCE_NUM_THREADS": num_threads()}
        compiled = ov.Core().compile_model(graph, "CPU", options)
        self._names = {port.get_any_name() for port in compiled.inputs}
        self._request = compiled.create_infer_request()
        self._blocks: list[np.ndarray] = []
        sizes = [one.num_heads * (one.key_size + one.value_size) for one in self._layers.values()]
        self.bytes_per_token = 4 * sum(sizes)

    def reserve(self, num_blocks: int) -> None:
        """Set memory aside for keys and values; what was there before is gone.

        The system hands out pages when they are first written, so this costs nothing yet.
        """
        self._blocks = []
        for index, layer in self._layers.items():
            for name, size in (("key", layer.key_size), ("value", layer.value_size)):
                # Zeros: a masked weight of 0 times a stray NaN would still be NaN.
                block = np.zeros((num_blocks, layer.num_heads, BLOCK, size), np.float32)
                self._blocks.append(block)  # the request does not keep it
                self._request.set_tensor(f"{name}s.{index}", ov.Tensor(block, shared_memory=True))

    def forward(self, runs: Sequence[Run], kept: Sequence[int]) -> Tensor:
        """Return the logits behind some of the tokens of all runs, (kept, V).

        Args:
            kept: Which of the packed tokens.
        """
        sizes = [len(run.token_ids) for run in runs]
        ends = [run.position + size for run, size in zip(runs, sizes, strict=True)]
        tables = [run.blocks[: -(-end // BLOCK)] for run, end in zip(runs, ends, strict=True)]
        positions = [np.arange(run.position, end) for run, end in zip(runs, ends, strict=True)]
        owners = np.repeat([run.adapter for run in runs], sizes)
        masks = owners[:, None] == np.array(self._adapters, str)
        inputs = {
            "token_ids": np.concatenate([np.asarray(run.token_ids) for run in runs])[None],
            "positions": np.concatenate(positions)[None],
            "kept": np.asarray(kept or [0]),
            "masks": masks.astype(np.float32),
            "past": np.array([run.position for run in runs], np.int32),
            "begins": np.cumsum([0, *sizes], dtype=np.int32),
            "blocks": np.concatenate([np.asarray(table, np.int32) for table in tables]),
            "blocks_begin": np.cumsum([0, *map(len, tables)], dtype=np.int32),
            "longest": np.int32(max(ends)),
            "window": np.int32(self.window or 0),
        }
        result = self._request.infer({k: v for k, v in inputs.items() if k in self._names})
        return torch.from_numpy(result[0][: len(kept)])


def _attend_in_blocks(graph: ov.Model, layers: dict[int, _Layer]) -> None:
    """Put attention over blocks in place of the marks.

    Raises:
        NotImplementedError: Not every layer has left one mark.
    """
    integers = {"past": [-1], "begins": [-1], "blocks": [-1], "blocks_begin": [-1], "longest": []}
    if any(layer.window is not None for layer in layers.values()):
        integers["window"] = []
    added = {name: _parameter(name, shape, ov.Type.i32) for name, shape in integers.items()}
    where = [added[name] for name in ("past", "begins", "blocks", "blocks_begin")]
    found = [n for n in graph.get_ordered_ops() if n.get_type_name() == "ScaledDotProductAttention"]
    for node in found:
        query, key, value, *_, scale = (port.get_source_output() for port in node.inputs())
        constant = scale.get_node()
        while constant.get_type_name() != "Constant":  # a conversion to the queries' type
            constant = constant.input_value(0).get_node()
        index = int(constant.get_data()) - 1
        layer = layers[index]
        caches = [
            _parameter(f"{name}s.{index}", [-1, layer.num_heads, BLOCK, size], ov.Type.f32)
            for name, size in (("key", layer.key_size), ("value", layer.value_size))
        ]
        added |= {cache.get_friendly_name(): cache for cache in caches}
        tensors = [
            _packed(query, layer.num_query_heads * layer.key_size),
            _packed(_unrepeated(key), layer.num_heads * layer.key_size),
            _packed(_unrepeated(value), layer.num_heads * layer.value_size),
            *(cache.output(0) for cache in caches),
        ]
        window = None if layer.window is None else added["window"]
        out = paged_attention(tensors, where, added["longest"], layer.scaling, window)
        shape = np.array([1, -1, layer.num_query_heads, layer.value_size])
        heads = ops.reshape(out, ops.constant(shape), special_zero=False)
        replace_node(node, ops.transpose(heads, ops.constant(np.array([0, 2, 1, 3]))))
    if len(added) != len(integers) + 2 * len(found) or not found:
        raise NotImplementedError("layers that share their attention")
    graph.add_parameters(list(added.values()))
    graph.validate_nodes_and_infer_types()


def _parameter(name: str, shape: list[int], kind: ov.Type) -> ov.Node:
    parameter = ops.parameter(shape, kind, name=name)
    parameter.output(0).get_tensor().set_names({name})
    return parameter


def _packed(tensor: ov.Output, size: int) -> ov.Output:
    """Return (1, heads, T, D) as (T, heads * D)."""
    rows = ops.transpose(tensor, ops.constant(np.array([0, 2, 1, 3])))
    return ops.reshape(rows, ops.constant(np.array([-1, size])), special_zero=False).output(0)


def _unrepeated(tensor: ov.Output) -> ov.Output:
    """Return keys or values before they were repeated for each group of queries."""
    node = tensor.get_node()
    return node.input_value(0) if node.get_type_name() == "Tile" else tensor
