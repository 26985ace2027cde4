"""A base is loaded whole, or refused with the names of what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tuneloop.config import TrainingConfig
from tuneloop.errors import ModelError
from tuneloop.models.bases.source import BaseModel, resolve_base
from tuneloop.models.bases.weights import load_whole
from tuneloop.training.fit.shape import model_shape

INDEX = "model.safetensors.index.json"
LOST = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


def _change(base: Path, change: str) -> None:
    file = base / "model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors[LOST]
    elif change == "of another shape":
        tensors[LOST] = tensors[LOST][:5].clone()
    else:
        tensors["model.layers.1.mlp.spare.weight"] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("change", ["missing", "of another shape", "without a layer"])
def test_a_base_that_is_not_whole_is_refused_before_anything_starts(
    change: str, base: Path
) -> None:
    load_whole(base)
    _change(base, change)
    with pytest.raises(ModelError, match=f"1 {change}: model.layers.1.mlp"):
        load_whole(base)
    with pytest.raises(ModelError, match=f"1 {change}"):
        model_shape(BaseModel("base", base, "0" * 64), TrainingConfig())


def test_an_index_is_held_against_the_files(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, base / file, {"format": "pt"})
    listed = {name: file for file, chosen in parts.items() for name in chosen}

    def index(entries: dict[str, str]) -> None:
        (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": entries}))

    index(listed)
    resolve_base(str(base))
    for wrong, got in (
        (listed | {LOST: "model-3-of-2.safetensors"}, "there is no file model-3"),
        (dict.fromkeys(names, "model-1-of-2.safetensors"), "are not in their file"),
        ({name: file for name, file in listed.items() if name != LOST}, f"not in it: {LOST}"),
    ):
        index(wrong)
        with pytest.raises(ModelError, match=got):
            resolve_base(str(base))


def test_code_that_a_model_brings_is_never_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "brand_new", "auto_map": {"AutoConfig": "code.Config"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError, match="brings code of its own, which is not run"):
        model_shape(BaseModel("base", base, "0" * 64), TrainingConfig())
    assert not (tmp_path / "ran").exists()


def test_a_base_that_is_quantized_already_is_refused(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="kind bitsandbytes"):
        model_shape(BaseModel("base", base, "0" * 64), TrainingConfig())
