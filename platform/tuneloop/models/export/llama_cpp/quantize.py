"""Rewrite a GGUF of 16-bit weights in a smaller type: `quantize.py SOURCE TARGET Q8_0|Q4_K_M`.

Runs beside llama.cpp's packages (`requirements.txt`), which hold the arithmetic. Which tensor gets
which type is llama.cpp's own rule for these file types.

Source: llama.cpp, `src/llama-quant.cpp`, `llama_tensor_get_type`.
"""

from __future__ import annotations

import re
import sys

import gguf
import numpy as np

FILE_TYPES = {"Q8_0": 7, "Q4_K_M": 15}
BLOCK = {"Q4_K": 256, "Q5_K": 256, "Q6_K": 256, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32}
# For rows that blocks of 256 do not divide.
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# Small tensors whose precision matters, by llama.cpp's rule.
KEPT = re.compile(r"_norm\.weight$|ffn_gate_inp|ssm_conv1d|time_mix|shortconv|position_embd|rel_b")


def tensor_type(name: str, shape: list[int], kind: str, num_layers: int, is_tied: bool) -> str:
    """Return a tensor's type in a file of a kind; "" where it stays as it is.

    Args:
        shape: As GGUF has it, the length of a row first.
        is_tied: The output layer is the embedding.
    """
    if len(shape) < 2 or not name.endswith("weight") or KEPT.search(name):
        return ""
    chosen = kind
    if kind == "Q4_K_M":
        chosen = "Q4_K"
        if name == "output.weight" or (is_tied and name == "token_embd.weight"):
            chosen = "Q6_K"
        elif "attn_qkv" in name:
            chosen = "Q5_K"
        elif "attn_v." in name or "ffn_down" in name:
            found = re.match(r"blk\.(\d+)\.", name)
            layer = int(found[1]) if found else 0
            eighth = num_layers // 8
            if layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2:
                chosen = "Q6_K"
    if shape[0] % BLOCK[chosen]:
        chosen = FALLBACK.get(chosen, "")
    return chosen if chosen and shape[0] % BLOCK[chosen] == 0 else ""


def main(source: str, target: str, kind: str) -> None:
    """Write `target`, with all that the source's header says."""
    import libgguf  # nothing else here needs it, and only its own directory has it

    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    num_layers = int(reader.get_field(f"{architecture}.block_count").contents())
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value, kinds = field.contents(), field.types
        if field.name == "general.file_type":
            value = FILE_TYPES[kind]
        writer.add_key_value(field.name, value, kinds[0], kinds[-1] if len(kinds) > 1 else None)
    is_tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    for tensor in reader.tensors:
        shape = [int(size) for size in tensor.shape]
        chosen = tensor_type(tensor.name, shape, kind, num_layers, is_tied)
        if not chosen:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        rows = np.ascontiguousarray(data, dtype=np.float32).reshape(-1, shape[0])
        number = gguf.GGMLQuantizationType[chosen]
        encoded = np.asarray(
            libgguf.quantize_rows(rows, libgguf.GGMLQuantizationType(int(number)))
        ).view(np.uint8)
        encoded = encoded.reshape(*data.shape[:-1], -1)
        writer.add_tensor(tensor.name, encoded, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
