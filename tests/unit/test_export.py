"""A model leaves the workspace whole, once, and never over something else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tuneloop.artifacts import Workspace
from tuneloop.cli import main
from tuneloop.config import EvaluationConfig
from tuneloop.errors import ArtifactError, ConfigError, ModelError
from tuneloop.evals.reporting.formatting import format_change
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.questions import Question
from tuneloop.export import MARKER, _as_asked, _instruction, _unasked, export
from tuneloop.records import Message


@pytest.fixture
def workspace(tmp_path: Path, tiny_model: Path) -> Workspace:
    workspace = Workspace(tmp_path / "w")
    for kind in ("models", "datasets"):
        with workspace.draft(kind, "faq", f"{kind:0<64}") as draft:
            shutil.copytree(tiny_model, draft.path, dirs_exist_ok=True)
            (draft.path / "README.md").write_text("# faq\n")
            (draft.path / "parity.json").write_text("{}")
            draft.publish(config={"dataset": "gone"}, resources={}, inputs=[], metrics={})
    return workspace


def test_safetensors_load_like_the_model_and_are_written_once(
    workspace: Workspace, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "out"
    first = export(workspace, "models/faq", "vllm", folder)
    assert (first.model, first.reused) == ("models/faq@v1", False)
    original = workspace.open("models/faq").path
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(original).state_dict().items():
        assert tensor.equal(loaded[name])
    assert AutoTokenizer.from_pretrained(folder).chat_template
    names = {file.name for file in folder.iterdir()}
    assert {"README.md", "model.safetensors", MARKER} <= names
    assert not names & {"artifact.json", "parity.json"}

    assert export(workspace, "models/faq", "vllm", folder).reused
    # A file that is not what was written is written again.
    (folder / "model.safetensors").write_bytes(b"cut")
    assert not export(workspace, "models/faq", "vllm", folder).reused
    assert (folder / "model.safetensors").stat().st_size > 1000


def test_nothing_is_written_over_other_things(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="only models are exported"):
        export(workspace, "datasets/faq", "vllm", tmp_path / "a")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"chapter\.txt"):
        export(workspace, "models/faq", "vllm", tmp_path / "thesis")
    export(workspace, "models/faq", "vllm", tmp_path / "b")
    assert not (tmp_path / "b" / ".draft").exists()
    with pytest.raises(ConfigError, match="holds another export"):
        export(workspace, "models/faq", "hub", tmp_path / "b")


def test_an_export_that_was_killed_is_written_again_and_a_refused_one_leaves_nothing(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("tuneloop.export.shutil.copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            export(workspace, "models/faq", "vllm", folder)
    assert not (folder / MARKER).exists()
    assert not export(workspace, "models/faq", "vllm", folder).reused
    assert (folder / MARKER).exists()

    def refuse(*arguments: object) -> None:
        (tmp_path / "g" / "faq-F16.gguf").write_bytes(b"wrong")
        raise ModelError.of("llama.cpp renders the chat template otherwise")

    monkeypatch.setattr("tuneloop.export.convert", refuse)
    with pytest.raises(ModelError, match="renders the chat template otherwise"):
        export(workspace, "models/faq", "gguf", tmp_path / "g")
    assert not (tmp_path / "g").exists()
    # A folder that a killed export left may hold more by now.
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / ".draft").touch()
    (tmp_path / "g" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="renders the chat template otherwise"):
        export(workspace, "models/faq", "gguf", tmp_path / "g")
    assert [file.name for file in (tmp_path / "g").iterdir()] == ["notes.txt"]


def test_the_model_is_scored_as_its_files_are() -> None:
    """They answer each test row once and greedily; a sampled model would differ by the dice."""
    sampled = EvaluationConfig(temperature=0.7, num_samples=4, split="validation", max_tokens=40)
    asked = _as_asked(sampled)
    assert (asked.temperature, asked.num_samples, asked.split) == (0, 1, "test")
    assert asked == _as_asked(EvaluationConfig(max_tokens=40))


def test_files_that_cannot_be_asked_all_rows_have_no_price_tags() -> None:
    plain = Question("a", (Message("user", "What?"),), "That.")
    with_tools = Question("b", (Message("user", "What?"),), "That.", tools="[{}]")
    assert _unasked([plain, plain]) == ""
    assert _unasked([plain, with_tools]).startswith("1 of 2 test rows offer tools")
    assert "plain text" in _unasked([plain, Question("c", text="Once upon a time")])


def test_a_modelfile_has_the_instruction_of_all_rows_or_none() -> None:
    user = Message("user", "What?")
    told = Question("a", (Message("system", "Be kind."), user))
    assert _instruction([told, told]) == "Be kind."
    assert _instruction([told, Question("b", (user,))]) == ""
    assert _instruction([told, Question("c", (Message("system", "Be brief."), user))]) == ""
    assert _instruction([]) == ""


def test_differences_are_read_in_points_or_as_they_are() -> None:
    estimate = {"value": -0.021, "low": -0.05, "high": 0.0}
    assert format_change(estimate, Metric("", kind="binary")) == "−2.1 points (−5.0 to +0.0)"
    alone = {"value": 0.5, "low": None, "high": None}
    assert format_change(alone, Metric("", kind="number")) == "+0.500"


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload asks for."""

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        seen = self.server.seen  # type: ignore[attr-defined]
        if self.headers.get("authorization") != "Bearer secret":
            return self._answer(403, {"error": "no token that may write here"})
        if self.path == "/api/repos/create":
            seen["repo"] = json.loads(body)
            return self._answer(200, {"url": f"{self.server.address}/ann/faq"})  # type: ignore[attr-defined]
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            seen["files"] = {line["value"]["path"] for line in lines if line["key"] == "file"}
            return self._answer(
                200, {"commitOid": "1" * 40, "commitUrl": "https://huggingface.co/ann/faq/commit/1"}
            )
        return self._answer(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self._answer(200, {"id": "ann/faq", "sha": "0" * 40, "siblings": []})

    def _answer(self, status: int, body: dict[str, object]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.seen = {}  # type: ignore[attr-defined]
    server.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("token", ["secret", "wrong"])
def test_a_model_is_sent_to_the_hub_as_a_private_repository(
    token: str, workspace: Workspace, tmp_path: Path, hub: ThreadingHTTPServer
) -> None:
    command = [sys.executable, "-m", "tuneloop.cli", "export", "models/faq", "--to", "hub"]
    command += ["--repo", "ann/faq", "--output", str(tmp_path / "out"), "--json"]
    command += ["--workspace", str(workspace.root)]
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,  # type: ignore[attr-defined]
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seen = hub.seen  # type: ignore[attr-defined]
    if token == "wrong":
        assert done.returncode == 2
        assert "the Hugging Face Hub does not take the model" in done.stderr
        assert "HF_TOKEN" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"] == f"{hub.address}/ann/faq"  # type: ignore[attr-defined]
    assert seen["repo"]["visibility"] == "private"
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= seen["files"]
    assert MARKER not in seen["files"]


def test_a_repository_without_hub_is_a_mistake(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "models/faq", "--to", "vllm", "--repo", "ann/faq"]
    assert main([*arguments, "--workspace", str(workspace.root)]) == 2
    assert "belong together" in capsys.readouterr().err
