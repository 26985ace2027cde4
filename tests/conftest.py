"""What the tests share: a tiny model made on the spot, and one Ray for the whole session."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import tuneloop  # noqa: F401  before any test imports Ray, which reads what this sets

# How long an example takes says how busy the machine is; the same examples in every run.
hypothesis.settings.register_profile("untimed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("untimed")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Two test processes share the cores: threads that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Imports and collecting leave no garbage, and looking for it takes a sixth of their time.
gc.disable()


def pytest_collection_finish() -> None:
    """Look for garbage from here on, and only among what the tests make."""
    gc.freeze()
    gc.enable()


CORPUS = [
    "Return the number of items in the list. " * 3,
    "def read(path, mode='r'): Open the file and return its text as a string.",
    '{"function": "read", "parameters": ["path", "mode"], "summary": "Open the file."}',
    "system user assistant question answer what is the capital of France Paris",
    "0 1 2 3 4 5 6 7 8 9 10 yes no true false none positive negative neutral",
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share Ray within a process, and never run more than two clusters at once.

    The tests on several nodes stop the shared local Ray, so another process has them, and then
    those that train without Ray. The browser's and the unit tests go to whichever has nothing left.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0])
            without_shared_ray = {"test_cluster.py", "test_training_workers.py"}
            alone = "unit" in file.parts or file.name in without_shared_ray
            return str(file if alone else file.parent)

    return ByFolder(config, log)


def make_tokenizer(vocab_size: int = 600):  # type: ignore[no-untyped-def]
    """Return a byte-level BPE tokenizer with ChatML markers and pad == eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    from tuneloop.models.chat.own_templates import TEMPLATES

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=TEMPLATES["chatml"],
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in Hugging Face layout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    path = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray with two CPUs, shared by all tests that need one."""
    from tuneloop.cluster import connect
    from tuneloop.config import ResourcesConfig

    with connect(ResourcesConfig(num_cpus=2)):
        yield
