"""What vLLM is asked for, and what is said where it cannot be asked; it need not be installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from tuneloop.config import ServingConfig, TuneloopConfig, VllmConfig
from tuneloop.contest import engine_problems
from tuneloop.errors import ModelError
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.json_form import json_grammar, with_layout
from tuneloop.records import SamplingParams
from tuneloop.serving.constraint import Constraints
from tuneloop.serving.requests import AnswerForm, DecodeRequest, Shaping
from tuneloop.serving.vllm.engine import ServedWeights, Written, request_body, server_arguments
from tuneloop.serving.vllm.environment import Installed, environment_folder, require
from tuneloop.serving.vllm.process import VllmProcess


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The record of a vLLM that knows one class of models."""
    monkeypatch.setenv("TUNELOOP_CACHE", str(tmp_path))
    record = environment_folder() / "installed.json"
    record.parent.mkdir(parents=True)
    (record.parent / "bin").mkdir()
    (record.parent / "bin" / "python").touch()
    values = {"folder": str(record.parent), "version": "1", "device": "cpu"}
    record.write_text(json.dumps(values | {"architectures": ["LlamaForCausalLM"]}))
    return record


def config_of(model: Path, engine: str) -> TuneloopConfig:
    return TuneloopConfig.model_validate(
        {
            "name": "x",
            "task": {"type": "generation"},
            "model": {"base": str(model)},
            "data": {"sources": [{"path": "rows.jsonl", "format": "question_answer"}]},
            "serving": {"engine": engine},
        }
    )


def test_an_engine_that_is_not_installed_is_one_problem_with_its_remedy(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELOOP_CACHE", str(tmp_path))
    assert engine_problems(config_of(tiny_model, "auto")) == []
    (problem,) = engine_problems(config_of(tiny_model, "vllm"))
    assert (problem.where, problem.got) == ("serving.engine", "it is not installed")
    assert "tuneloop install-engine vllm" in problem.remedy


def test_a_kind_of_model_that_vllm_does_not_know_is_refused(
    tiny_model: Path, tmp_path: Path, installed: Path
) -> None:
    assert require(tiny_model).version == "1"
    (tmp_path / "config.json").write_text('{"architectures": ["OwnForCausalLM"]}')
    with pytest.raises(ModelError, match="does not take this kind of model") as caught:
        require(tmp_path)
    assert caught.value.problems[0].got == "OwnForCausalLM"
    (installed.parent / "bin" / "python").unlink()
    (problem,) = engine_problems(config_of(tiny_model, "vllm"))
    assert "bin/python is gone" in problem.got
    installed.write_text("{")
    (problem,) = engine_problems(config_of(tiny_model, "vllm"))
    assert "installed.json cannot be read" in problem.got


def test_a_server_is_told_everything_that_it_would_choose(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"dtype": "bfloat16"}}')
    adapters = {}
    for name, settings in {"a": {"r": 4}, "b": {"r": 20}}.items():
        adapters[name] = tmp_path / name
        adapters[name].mkdir()
        (adapters[name] / "adapter_config.json").write_text(
            json.dumps(settings | {"peft_type": "LORA"})
        )
        layer = f"base_model.model.model.layers.0.{name}_proj.lora_A.weight"
        save_file({layer: torch.zeros(1)}, adapters[name] / "adapter_model.safetensors")
    weights = ServedWeights(tmp_path, adapters)

    def told(settings: VllmConfig, device: str) -> str:
        return " ".join(server_arguments(weights, settings, 16, device))  # type: ignore[arg-type]

    on_gpu = told(VllmConfig(gpu_memory_share=0.45, tensor_parallel_size=2), "gpu")
    for part in (
        "--generation-config vllm", "--max-num-seqs 16", "--dtype bfloat16",
        "--gpu-memory-utilization 0.45", "--tensor-parallel-size 2", "--max-lora-rank 32",
        "--max-loras 3", f"--lora-modules a={tmp_path}/a b={tmp_path}/b",
        "--lora-target-modules a_proj b_proj",
    ):  # fmt: skip
        assert part in on_gpu
    save_file(
        {"base_model.model.lm_head.lora_A.weight": torch.zeros(1)},
        adapters["b"] / "adapter_model.safetensors",
    )
    with pytest.raises(ModelError, match="changes the output layer"):
        told(VllmConfig(), "cpu")
    (adapters["a"] / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "rank_pattern": {"x": 8}}'
    )
    with pytest.raises(ModelError, match="rank_pattern"):
        told(VllmConfig(), "cpu")
    weights = ServedWeights(tmp_path)
    assert "--dtype float32" in told(VllmConfig(), "cpu")
    assert "--dtype float16" in told(VllmConfig(dtype="float16"), "gpu")
    assert "lora" not in told(VllmConfig(), "cpu")
    (tmp_path / "config.json").write_text("{}")
    assert "--dtype float32" in told(VllmConfig(), "gpu")


def test_a_request_leaves_nothing_to_defaults(tiny_model: Path) -> None:
    shaping = Shaping(logit_bias={5: 2.0}, repetition_penalty=1.2)
    params = SamplingParams(max_tokens=4, temperature=0.5, seed=3, logprobs=True)
    body = request_body(DecodeRequest([1, 2], params, num_top=2, shaping=shaping), frozenset([9]))
    assert body["prompt"] == [1, 2]
    assert (body["temperature"], body["top_p"], body["seed"], body["logprobs"]) == (0.5, 1, 3, 2)
    assert (body["ignore_eos"], body["stop_token_ids"]) == (True, [9])
    assert (body["logit_bias"], body["repetition_penalty"]) == ({"5": 2.0}, 1.2)
    own_stop = request_body(DecodeRequest([1], params, stop_ids=frozenset([7])), frozenset([9]))
    assert own_stop["stop_token_ids"] == [7]

    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    form = AnswerForm("json", json.dumps(schema), "response_format")
    constraint = Constraints(Renderer.load(tiny_model), 429).compile(form)
    bound = request_body(DecodeRequest([1], params, constraint=constraint), frozenset())
    assert bound["structured_outputs"] == {"json": with_layout(schema)}
    assert not bound["ignore_eos"]
    ours, theirs = (
        json.loads(json_grammar(one))["grammars"][0]["json_schema"]
        for one in (schema, with_layout(schema))
    )
    assert ours == theirs


def choice_of(ids: list[int], finish: str | None, stop: object, text: str = "") -> dict[str, Any]:
    """Return a choice as vLLM 0.32 answers it: the chosen token stands among the likeliest."""
    logprobs = {
        "token_logprobs": [-2.0] * len(ids),
        "top_logprobs": [
            {f"token_id:{i}": -2.0, "token_id:1": -1.0, "token_id:3": -1.5} for i in ids
        ],
    }
    reasons = {"finish_reason": finish, "stop_reason": stop}
    return {"text": text, "token_ids": ids, "logprobs": logprobs, **reasons}


def test_answers_are_read_without_the_token_that_ends_them() -> None:
    # By a stop token, which may be the tokenizer's own (no reason is given); whole or in pieces.
    for stop in (2, None):
        whole, pieces = Written(2), Written(2)
        whole.add(choice_of([7, 8, 2], "stop", stop))
        for piece in (choice_of([7], None, None), choice_of([8, 2], "stop", stop)):
            pieces.add(piece)
        for written in (whole, pieces):
            assert written.token_ids == [7, 8]
            assert [score.top for score in written.scores] == [((1, -1.0), (3, -1.5))] * 2
            assert written.scores[0].logprob == -2.0
            assert written.ended_by_token
    # A stop string's tokens stay, as do those of an answer that is cut off.
    for finish, reason in (("stop", "x"), ("length", None)):
        written = Written(0)
        written.add(choice_of([7, 8, 2], finish, reason, "text"))
        assert written.token_ids == [7, 8, 2]
        assert [score.top for score in written.scores] == [()] * 3
        assert not written.ended_by_token


def test_a_server_that_ends_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELOOP_CACHE", str(tmp_path))
    folder = tmp_path / "environment" / "bin"
    folder.mkdir(parents=True)
    # An interpreter without vLLM: it ends at once, and says so.
    (folder / "python").symlink_to(sys.executable)
    process = VllmProcess(Installed(str(folder.parent), "1", "cpu", []), [], "some/model")
    with pytest.raises(ModelError, match="No module named") as caught:
        process.wait_until_ready()
    assert caught.value.problems[0].where == str(process.log_file)
    process.stop()
    assert not Path(process.socket).parent.exists()
    assert process.has_ended


# In place of vLLM's server: it answers one request, and waits.
_STAND_IN = """
import socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[sys.argv.index("--uds") + 1])
listener.listen()
connection, _ = listener.accept()
connection.recv(4096)
connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
time.sleep(600)
"""
_PARENT = """
import os, sys, time
from tuneloop.serving.vllm.environment import Installed
from tuneloop.serving.vllm.process import VllmProcess
process = VllmProcess(Installed(sys.argv[1], "1", "cpu", []), [], "model")
process.wait_until_ready()
print(os.path.dirname(process.socket), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("killed", ["parent", "parent and keeper"])
def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path, killed: str) -> None:
    venv.create(tmp_path)
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    module = packages / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    module.write_text(_STAND_IN)
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TUNELOOP_CACHE": str(tmp_path / "cache")},
    )
    assert parent.stdout is not None
    folder = parent.stdout.readline().strip()
    (keeper,) = psutil.Process(parent.pid).children()
    (server,) = keeper.children()
    if killed != "parent":
        keeper.kill()  # as Ray does with the children of a worker that ends
    parent.kill()
    parent.wait()
    psutil.wait_procs([keeper, server], timeout=30)
    assert not server.is_running()
    # The next one that is started removes what is left.
    assert Path(folder).exists()
    process = VllmProcess(Installed(str(tmp_path), "1", "cpu", []), [], "model")
    assert not Path(folder).exists()
    process.stop()


def test_a_share_of_memory_is_a_share() -> None:
    with pytest.raises(ValueError, match="gpu_memory_share"):
        ServingConfig.model_validate({"vllm": {"gpu_memory_share": 1.5}})
