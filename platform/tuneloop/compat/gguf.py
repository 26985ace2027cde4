"""What transformers reads of a GGUF again and again. Tried with gguf 0.19, transformers 5.23.

`tests/unit/models/test_source.py` fails when transformers takes the reader from elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import gguf


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Cache what transformers reads anew: a GGUF for tokenizer, configuration and weights, and the
    table of tensor names for every module. Both together are half of a conversion's time.
    """
    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, read in before.items():
        setattr(gguf, name, functools.cache(read))
    try:
        yield
    finally:
        for name, read in before.items():
            setattr(gguf, name, read)
