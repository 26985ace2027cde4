"""What the command line shows without running anything, and the Python API beside it."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tuneloop
from tuneloop import cli, commands
from tuneloop.artifacts import Artifact, Published, Workspace
from tuneloop.commands import open_workspace
from tuneloop.config import TuneloopConfig
from tuneloop.evals.reporting import report
from tuneloop.marks import Mark
from tuneloop.progress import Progress
from tuneloop.review.store import URL_VARIABLE, ReviewStore
from tuneloop.text import counted


def publish(workspace: Workspace, kind: str, name: str, metrics: dict[str, Any]) -> Artifact:
    with workspace.draft(kind, name, "f" * 64) as draft:
        (draft.path / "README.md").write_text("# A long title " + "word " * 40)
        digest = f"faq.jsonl sha256:{'0123456789' * 6}0123"
        return draft.publish(
            config={"data": "x" * 300}, resources={}, inputs=[digest], metrics=metrics
        )


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path)
    rows = {"num_train_rows": 103_283, "num_test_rows": 14_479, "contamination": {"test": 0.01}}
    publish(workspace, "datasets", "customer-questions", rows)
    publish(
        workspace, "models", "faq", {"num_steps": 25, "first_loss": 0.8111, "final_loss": 0.048}
    )
    scores = {"base": 0.0, "base+few-shot": 0.1696, "finetuned": 0.5804}
    publish(workspace, "evaluations", "faq", {"primary": "exact_match", "scores": scores})
    publish(workspace, "sweeps", "faq", {"num_trials": 4})
    return workspace


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tuneloop.cli", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )


def test_artifacts_are_listed_in_80_columns(workspace: Workspace) -> None:
    shown = run("ls", "--workspace", workspace.location, COLUMNS="80").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert "datasets/customer-questions@v1" in shown
    for words in ("103,283 train", "0.811 to 0.048", "exact_match", "0.5804", "num_trials 4"):
        assert words in " ".join(shown.split())


def test_an_artifact_is_shown_in_80_columns(workspace: Workspace) -> None:
    shown = run("show", "datasets/customer-questions", "--workspace", workspace.location)
    facts, _, readme = shown.stdout.partition("# A long title")
    facts = facts.replace(workspace.location, "")
    assert max(map(len, facts.splitlines())) <= 80
    assert "sha256:012345678901…" in facts
    assert readme.count("word") == 40


def test_a_reader_that_has_enough_is_no_failure_of_ours(workspace: Workspace) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "tuneloop.cli", "ls", "--workspace", workspace.location]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


def test_every_command_is_listed_by_the_help_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    parser = cli._parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name in commands.choices:
        assert [line.split()[0] for line in shown.splitlines() if line[:2] == "  "].count(name) == 1
    assert max(map(len, shown.splitlines())) <= 80


def test_marks_are_listed_written_and_read_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    config = tmp_path / "faq.yaml"
    lines = (
        "name: faq", f"workspace: {tmp_path / 'ws'}", "task: {type: generation}",
        "model: {base: x}", "data: {sources: [{path: x.jsonl, format: messages}]}",
    )  # fmt: skip
    config.write_text("\n".join(lines))
    assert cli.main(["fixes", str(config)]) == 0
    assert "no marks on rows of `faq`" in capfd.readouterr().out
    store = ReviewStore(tmp_path / "ws")
    store.add(Mark("bad_reference", "a" * 20, "datasets/faq@v1", "ann", "[red]42", "sum"))
    store.add(Mark("bad_row", "b" * 20, "datasets/other@v1", "ann"))
    written = str(tmp_path / "marks.jsonl")
    assert cli.main(["fixes", str(config), "--output", written]) == 0
    shown = capfd.readouterr().out.splitlines()
    assert shown[0].startswith("aaaaaaaa  waiting  ann, ")
    assert shown[1:] == [
        "    the answer is wrong: [red]42: sum",
        f"`tuneloop prepare {config}` applies what waits: 1",
    ]
    assert cli.main(["fixes", str(config), "--json", f"data.fixes={written}"]) == 0
    (told,) = json.loads(capfd.readouterr().out)["marks"]
    assert (told["reviewer"], told["answer"], told["state"]) == ("ann", "[red]42", "waiting")
    labels = "task={type: classification, labels: [red, blue]}"
    assert cli.main(["fixes", str(config), "--json", labels]) == 0
    (told,) = json.loads(capfd.readouterr().out)["marks"]
    assert told["state"] == "not applied"
    assert "the given answer breaks the task: the answer is not one of task.labels" in told["why"]
    assert cli.main(["fixes", str(config), "--json", "data.fixes=false"]) == 0
    assert json.loads(capfd.readouterr().out)["marks"][0]["why"] == "data.fixes is false"
    # Rows of `evaluation.sources` are read by another command; both keep what was overridden.
    store.add(Mark("bad_row", "c" * 20, "datasets/faq-scored@v1", "bob"))
    assert cli.main(["fixes", str(config), "data.num_train_examples=9"]) == 0
    assert capfd.readouterr().out.splitlines()[-2:] == [
        f"`tuneloop {command} {config} data.num_train_examples=9` applies what waits: 1"
        for command in ("prepare", "evaluate")
    ]
    Path(written).write_text("{}")
    for asked, what in ((f"data.fixes={written}", "a line is no mark"),
                        ("data.fixes=none.jsonl", "cannot be read")):  # fmt: skip
        assert cli.main(["fixes", str(config), asked]) == 2
        assert what in capfd.readouterr().err
    for command in (["trace", "b" * 20], ["next"]):
        assert cli.main([*command, str(config)]) == 2
        assert "Traceback" not in capfd.readouterr().err
    assert cli.main(["next", str(config), "data.num_train_examples=9"]) == 2
    assert f"tuneloop run {config} data.num_train_examples=9" in capfd.readouterr().err


def complete(line: str) -> list[str]:
    """Return what the shell would be offered at the end of a command line."""
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
    }
    environment |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    code = "import os; os.dup2(1, 8); from tuneloop.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.stdout.split("\n")


def test_commands_keys_and_references_are_completed(workspace: Workspace) -> None:
    assert complete("tuneloop tra") == ["train", "trace"]
    assert complete("tuneloop train x.yaml data.spl") == ["data.split."]
    assert "data.split.test_ratio=" in complete("tuneloop train x.yaml data.split.")
    assert "data.sources.0.format=" in complete("tuneloop train x.yaml data.sources.0.f")
    assert "evaluation.judge.model=" in complete("tuneloop train x.yaml evaluation.judge.m")
    assert "sweep.num_seeds=" in complete("tuneloop sweep x.yaml sweep.")
    asked = f"tuneloop show --workspace {workspace.location} models/"
    assert complete(asked) == ["models/faq@v1"]


def test_the_completion_script_is_for_the_shell() -> None:
    assert "complete " in run("completion", "bash").stdout
    assert "compdef" in run("completion", "zsh").stdout
    assert set(json.loads(run("completion", "bash", "--json").stdout)) == {"script"}


def test_the_python_api_is_what_it_declares_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, tuneloop\n"
        "heavy = {'ray', 'torch', 'deepspeed', 'transformers', 'pyarrow', 'pydantic'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for name in tuneloop.__all__:
        assert callable(getattr(tuneloop, name)), name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = tuneloop.trian


def test_progress_is_a_line_now_and_then_where_nobody_watches(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("tuneloop.test")
    with caplog.at_level(logging.INFO), Progress("training", 3, "steps") as progress:
        progress.log(log, "step %d", 1)
        progress.log(log, "step %d", 3, now=True)
        monkeypatch.setattr("tuneloop.progress.LOG_EVERY_S", 0.0)
        progress.log(log, "step %d", 4)
    assert caplog.messages == ["step 3", "step 4"]


def test_progress_is_a_bar_for_a_person_at_a_terminal() -> None:
    import pty

    code = (
        "import logging, time\n"
        "from tuneloop.cli import _logging_to_stderr\n"
        "from tuneloop.progress import Progress\n"
        "log = logging.getLogger('tuneloop.test')\n"
        "with _logging_to_stderr(False):\n"
        "    with Progress('training', 3, 'steps') as progress:\n"
        "        progress.update(2, note='loss 0.5')\n"
        "        progress.log(log, 'a line of progress', now=True)\n"
        "        log.info('another line')\n"
        "        time.sleep(0.3)\n"
    )
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=slave, stdout=slave, env=environment
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert process.wait() == 0
    text = shown.decode()
    assert "2/3 steps" in text
    assert "loss 0.5" in text
    assert "another line" in text
    assert "a line of progress" not in text


def test_the_curl_line_sends_the_key_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run by a shell against a server that wants the key."""
    import http.server
    import threading

    from tuneloop.commands import _curl_line

    got: list[tuple[str | None, dict[str, Any]]] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers["content-length"])
            got.append((self.headers["authorization"], json.loads(self.rfile.read(size))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        for key in ("", "it's $ecret"):
            monkeypatch.setenv("TUNELOOP_API_KEY", key)
            subprocess.run(["bash", "-c", _curl_line(url, "m")], check=True, capture_output=True)
        server.shutdown()
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
    assert got == [(None, body), ("Bearer it's $ecret", body)]


def test_the_workspace_of_the_command_line_wins(tmp_path: Path) -> None:
    config = tmp_path / "faq.yaml"
    config.write_text(
        "name: faq\nworkspace: /of/config\ntask: {type: generation}\nmodel: {base: b}\n"
        "data: {sources: [{path: a, format: text}]}\n"
    )
    for given, named, expected in (
        (None, None, str(Path("workspace").absolute())),
        (None, str(config), "/of/config"),
        ("/given", str(config), "/given"),
    ):
        arguments = argparse.Namespace(workspace=given, config=named, overrides=[])
        assert open_workspace(arguments).location == expected


def test_commands_that_are_told_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "terminal_table", lambda artifact: "")
    sources = [{"path": "a", "format": "text"}]
    raw = {"name": "faq", "task": {"type": "generation"}, "model": {"base": "b"},
           "data": {"sources": sources}}  # fmt: skip
    config = TuneloopConfig.model_validate(raw).read_from("faq.yaml", ["task.labels=[a, b]"])
    artifact = Artifact("evaluations", "faq-baseline", 1, Path(), "/x/[b]/" + "y" * 90, {})
    output = io.StringIO()
    commands._print_published([Published(artifact, reused=False)], config, output)
    told = output.getvalue().splitlines()
    assert told[-1] == "serve it   tuneloop serve faq.yaml 'task.labels=[a, b]'"
    assert f"report     /x/[b]/{'y' * 90}/report.html" in told


def test_one_is_told_in_the_singular() -> None:
    told = [counted(number, "new row") for number in (0, 1, 2, 1234)]
    assert told == ["0 new rows", "1 new row", "2 new rows", "1,234 new rows"]
