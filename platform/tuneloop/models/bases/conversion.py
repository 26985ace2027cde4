"""A GGUF as a model in Hugging Face layout, in float32."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, logging

from tuneloop.compat.gguf import read_once
from tuneloop.errors import ModelError
from tuneloop.models.bases.gguf_file import complete

# Vocabularies whose merges were learned with every digit apart, by GGUF's name of the splitting.
# transformers reads these names for other splittings only. Source: llama.cpp, `llama-vocab.cpp`.
_DIGITS_APART = frozenset(
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2")
)
# Vocabularies that are split as GPT-2's is, which transformers does with every name it lacks.
_AS_GPT2 = frozenset(
    "default gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum "
    "modern-bert roberta-bpe jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code".split()
)
# Vocabularies in which a word that is a token is that token, whatever the merges make of it.
_WHOLE_WORDS = frozenset(
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken".split()
)
# Of those, vocabularies whose texts open with BOS although most files do not say so.
_OPENED = frozenset(("llama3", "llama-v3", "llama-bpe"))


def save_converted(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF to a folder.

    Raises:
        ModelError: It cannot be read, or not as it is meant.
    """
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=folder.parent) as alone:
        # A tokenizer or adapter in the file's own directory would be taken for its.
        link = Path(alone) / file.name
        link.symlink_to(file.resolve())
        try:
            source: dict[str, Any] = {"gguf_file": file.name}
            with _without_bar(), read_once():
                reader = gguf.GGUFReader(str(link))
                tokenizer = AutoTokenizer.from_pretrained(alone, **source)
                _split_as_learned(tokenizer, reader, file)
                model, info = AutoModelForCausalLM.from_pretrained(
                    alone, dtype="float32", output_loading_info=True, **source
                )
                complete(model, reader, file, info)
        except ModelError:
            raise
        except OSError as error:
            if error.errno is not None:
                raise
            raise _unreadable(file, error) from error
        except Exception as error:
            # The parser has no error of its own: a cut-off file shows as struct.error, KeyError…
            raise _unreadable(file, error) from error
        # The weights are no longer quantized, and `save_pretrained` refuses while these are set.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        _choose_accelerator()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _split_as_learned(
    tokenizer: PreTrainedTokenizerFast, reader: gguf.GGUFReader, file: Path
) -> None:
    """Split texts before anything else as they were when the vocabulary was learned.

    Otherwise the model is asked in tokens that it was not trained on: digits in groups instead of
    apart, two line ends instead of the one token for both, no BOS.

    Raises:
        ModelError: How is not known here.
    """
    field = reader.get_field("tokenizer.ggml.pre")
    name = "default" if field is None else str(field.contents())
    backend = tokenizer.backend_tokenizer
    if name in _DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif name in _WHOLE_WORDS:
        backend.model.ignore_merges = True
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and name not in _AS_GPT2:
        raise ModelError.of(
            "the GGUF splits texts in a way that is not known here",
            where=f"{file}: tokenizer.ggml.pre",
            got=name,
            remedy="use the model in Hugging Face layout, which carries its tokenizer",
        )
    if name in _OPENED and reader.get_field("tokenizer.ggml.add_bos_token") is None:
        tokenizer.add_bos_token = True


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """Keep transformers' bar over the tensors, which has no switch, out of logs and pipes."""
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def _choose_accelerator() -> None:
    """Tell DeepSpeed where it runs: saving a model imports it, and it warns when it guesses."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError.of(
        "the GGUF cannot be read",
        where=str(file),
        got=(str(error).splitlines() or [type(error).__name__])[0],
        remedy="fetch the file again, or use a model in Hugging Face layout",
    )
