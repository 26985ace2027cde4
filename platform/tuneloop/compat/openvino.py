"""OpenVINO's attention over blocks, which its Python keeps private. Tried with openvino 2026.4.

`tests/unit/serving/test_openvino.py` fails when the operation takes other inputs.
Models are read by the front end itself: `openvino.convert_model` reports its use to Intel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from openvino import Model, Node, Output, op
from openvino import opset13 as ops
from openvino.frontend import (
    FrontEndManager,
    GeneralFailure,
    NotImplementedFailure,
    OpConversionFailure,
    OpValidationFailure,
)
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

# Not of one kind, and of none of Python's own.
_FAILURES = (GeneralFailure, NotImplementedFailure, OpConversionFailure, OpValidationFailure)


def read(module: torch.nn.Module, example: Sequence[torch.Tensor]) -> Model:
    """Return what a module computes, as OpenVINO's graph; sizes of the example are not kept.

    Raises:
        NotImplementedError: It computes something that OpenVINO does not know.
    """
    decoder = TorchScriptPythonDecoder(
        module, example_input=tuple(example), trace_kwargs={"check_trace": False}
    )
    front_end = FrontEndManager().load_by_framework("pytorch")
    try:
        return front_end.convert(front_end.load(decoder))
    except _FAILURES as error:
        reasons = [line for line in str(error).splitlines() if line.startswith("-- ")]
        raise NotImplementedError(" ".join(reasons) or str(error)) from error


def paged_attention(
    tensors: Sequence[Output],
    blocks: Sequence[Node],
    longest: Node,
    scale: float,
    window: Node | None,
) -> Output:
    """Return causal attention of packed tokens to keys and values in blocks.

    Args:
        tensors: Queries, keys and values of shape (tokens, heads * dimension), then blocks of keys
            and of values of shape (blocks, heads, tokens of a block, dimension).
        blocks: Tokens before those of each sequence, where its tokens begin, the blocks of all
            sequences, and where those of each begin.
        longest: Tokens of the longest sequence.
        scale: Factor of the products of queries and keys.
        window: A token sees itself and so many tokens before it, less one; None: all before it.
    """

    def none(kind: Any, *shape: int) -> Output:
        return ops.constant(np.zeros(shape, kind)).output(0)

    arguments = [
        *tensors,
        *(node.output(0) for node in blocks),
        ops.constant(np.float32(scale)).output(0),
        none(np.int32) if window is None else window.output(0),
        none(np.float32, 0),  # slopes
        longest.output(0),
        none(np.int32, 0),  # scores to add up
        *(none(np.int32, 0), none(np.int32, 0), none(np.float32, 0)),  # rotation
        *(none(np.float32, 0), none(np.int32), none(np.int32)),  # sparse attention
        none(np.float32, 0, 0, 0, 0),  # sinks
        *(none(np.int32), *(none(np.int32, 0) for _ in range(3))),  # eviction
        none(np.int32, 0),  # kinds of tokens
        *(none(np.uint8, 0), none(np.int32, 0)),  # bias between queries
    ]
    node = op._PagedAttentionExtension(arguments)
    for name, tensor in (("k", tensors[3]), ("v", tensors[4])):
        _, heads, _, size = tensor.get_partial_shape()
        node.get_rt_info()[f"num_{name}_heads"] = heads.get_length()
        node.get_rt_info()[f"{name}_head_size"] = size.get_length()
    return node.output(0)
