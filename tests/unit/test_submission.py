"""What is sent to a cluster, and what is told when nothing can be."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuneloop.cli import main
from tuneloop.config import load_config
from tuneloop.data.sources.files import find_files, identities
from tuneloop.errors import ConfigError
from tuneloop.submission import COMMANDS, MAX_BUNDLE_BYTES, write_bundle


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with two directories of rows, a model, and things that are nobody's."""
    for name in (
        *("rows/one/a.jsonl", "rows/two/a.jsonl", "rows/two/b.txt"),
        *("bench/c.jsonl", "model/.git/config"),
    ):
        file = tmp_path / "here" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{name}\n")
    (tmp_path / "here" / "model" / "config.json").write_text("{}")
    (tmp_path / "here" / ".env").write_text("SECRET=1")
    path = tmp_path / "faq.yaml"
    path.write_text(
        f"""\
name: faq
workspace: {tmp_path}/workspace
task: {{type: extraction}}
model: {{base: {tmp_path}/here/model}}
data:
  sources:
    - {{path: "{tmp_path}/here/rows/*/*.jsonl", format: question_answer}}
    - {{path: "{tmp_path}/here/rows/two/b.txt", format: question_answer}}
    - {{path: "s3://bucket/rows.jsonl", format: question_answer}}
  decontamination:
    sources: [{{path: "{tmp_path}/here/bench/c.jsonl", format: question_answer}}]
"""
    )
    return path


def test_the_bundle_holds_what_the_configuration_names_and_nothing_else(
    config: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    num_files, num_bytes = write_bundle(load_config(config), folder)
    files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
    assert set(files) == {
        "config.yaml",
        "data/0/one/a.jsonl",
        "data/0/two/a.jsonl",
        "data/1/b.txt",
        "data/3/c.jsonl",
        "model/model/config.json",
    }
    assert files["data/0/two/a.jsonl"].read_text() == "rows/two/a.jsonl\n"
    assert (num_files, num_bytes) == (6, sum(f.stat().st_size for f in files.values()))
    sent = load_config(folder / "config.yaml")
    assert [source.path for source in sent.data.sources] == [
        "data/0/*/*.jsonl",
        "data/1/b.txt",
        "s3://bucket/rows.jsonl",
    ]
    assert sent.data.decontamination.sources[0].path == "data/3/c.jsonl"
    assert sent.model.base == "model/model"


def test_folders_that_are_columns_are_sent_with_their_names(config: Path, tmp_path: Path) -> None:
    here = tmp_path / "here" / "lang=en"
    (here / "deep").mkdir(parents=True)
    (here / "deep" / "a.jsonl").write_text("{}\n")
    paths = [str(here / "deep" / "a.jsonl"), f"{here}/*/*.jsonl", str(here / "deep")]
    (tmp_path / "bundle").mkdir()
    rows = [{"path": path, "format": "question_answer"} for path in paths]
    named = load_config(config, [f"data.sources={json.dumps(rows)}"])
    write_bundle(named, tmp_path / "bundle")
    sent = load_config(tmp_path / "bundle" / "config.yaml").data.sources
    assert [source.path for source in sent] == [
        "data/0/lang=en/deep/a.jsonl",
        "data/1/lang=en/*/*.jsonl",
        "data/2/lang=en/deep",
    ]


def test_rows_and_answers_to_score_are_sent_with_the_arms(config: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.jsonl"
    given.write_text('{"prompt": "a", "completion": "b"}')
    arms = {"base": {}, "made": {"answers": str(given)}, "near": {"model": "base", "shots": 2}}
    rows = [{"path": f"{tmp_path}/here/bench/c.jsonl", "format": "question_answer"}]
    overrides = [f"evaluation.arms={json.dumps(arms)}", f"evaluation.sources={json.dumps(rows)}"]
    (tmp_path / "bundle").mkdir()
    named = load_config(config, overrides)
    write_bundle(named, tmp_path / "bundle")
    sent = load_config(tmp_path / "bundle" / "config.yaml").evaluation
    assert (tmp_path / "bundle" / str(sent.arms["made"].answers)).read_text() == given.read_text()
    assert (tmp_path / "bundle" / sent.sources[0].path).is_file()
    assert (sent.arms["base"], sent.arms["near"]) == (
        named.evaluation.arms["base"],
        named.evaluation.arms["near"],
    )
    given.unlink()
    with pytest.raises(ConfigError, match=r"evaluation\.arms\.made\.answers"):
        write_bundle(named, tmp_path / "bundle")


def test_a_bundle_over_the_limit_is_refused_and_names_the_largest_file(
    config: Path, tmp_path: Path
) -> None:
    large = tmp_path / "here" / "rows" / "one" / "large.jsonl"
    with large.open("w") as file:
        file.truncate(MAX_BUNDLE_BYTES)
    folder = tmp_path / "bundle"
    folder.mkdir()
    with pytest.raises(ConfigError, match="too large") as caught:
        write_bundle(load_config(config), folder)
    assert caught.value.problems[0].where == str(large)
    assert list(folder.iterdir()) == []


def test_a_file_that_is_sent_twice_counts_twice(config: Path, tmp_path: Path) -> None:
    rows = tmp_path / "here" / "bench" / "c.jsonl"
    with rows.open("w") as file:
        file.truncate(MAX_BUNDLE_BYTES * 2 // 3)
    (tmp_path / "bundle").mkdir()
    write_bundle(load_config(config), tmp_path / "bundle")
    twice = json.dumps([{"path": str(rows), "format": "question_answer"}])
    with pytest.raises(ConfigError, match="too large"):
        write_bundle(load_config(config, [f"evaluation.sources={twice}"]), tmp_path / "bundle")


def test_links_to_directories_and_to_nothing_are_not_followed(config: Path, tmp_path: Path) -> None:
    model = tmp_path / "here" / "model"
    (model / "again").symlink_to(model)
    (model / "gone").symlink_to(tmp_path / "nowhere")
    (model / "model.safetensors").symlink_to(tmp_path / "here" / "bench" / "c.jsonl")
    (tmp_path / "bundle").mkdir()
    write_bundle(load_config(config), tmp_path / "bundle")
    sent = sorted(file.name for file in (tmp_path / "bundle" / "model" / "model").iterdir())
    assert sent == ["config.json", "model.safetensors"]


def test_a_file_of_marks_is_sent(config: Path, tmp_path: Path) -> None:
    marks = tmp_path / "marks.jsonl"
    marks.write_text("{}")
    (tmp_path / "bundle").mkdir()
    write_bundle(load_config(config, [f"data.fixes={marks}"]), tmp_path / "bundle")
    sent = load_config(tmp_path / "bundle" / "config.yaml").data.fixes
    assert sent == "marks/marks.jsonl"
    assert (tmp_path / "bundle" / str(sent)).read_text() == "{}"


def test_a_relative_path_that_leads_nowhere_is_told_before_anything_is_sent(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "bundle"
    folder.mkdir()
    places = {
        "data.sources.0.path": "rows/gone.jsonl",
        "data.decontamination.sources.0.path": "bench/*.csv",
        "model.base": "./gone",
        "data.fixes": "gone.jsonl",
    }
    with pytest.raises(ConfigError) as caught:
        write_bundle(load_config(config, [f"{k}={v}" for k, v in places.items()]), folder)
    assert {problem.where: problem.got for problem in caught.value.problems} == places
    assert list(folder.iterdir()) == []
    # A Hub id, the cluster's own storage, and this user's home are something else.
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    paths = ["org/questions", "/shared/rows.jsonl", "~/rows/one/a.jsonl"]
    found = load_config(config, [f"data.sources.{n}.path={path}" for n, path in enumerate(paths)])
    write_bundle(found, folder)
    sent = load_config(folder / "config.yaml")
    assert [source.path for source in sent.data.sources] == [*paths[:2], "data/2/a.jsonl"]


def test_what_is_sent_has_the_identity_of_what_is_here(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "here" / "rows" / "o*" / "*.jsonl", tmp_path / "here" / "rows" / "two"]
    places = [f"data.sources.{number}.path={path}" for number, path in enumerate(paths)]
    here = load_config(config, [*places, "data.sources.2.path=docstrings:stdlib"])
    (tmp_path / "job").mkdir()
    write_bundle(here, tmp_path / "job")
    found = find_files(here.data.sources)
    monkeypatch.chdir(tmp_path / "job")
    sent = find_files(load_config("config.yaml").data.sources)
    assert len(sent) == 3
    assert identities(sent) == identities(found)


@pytest.fixture
def other_server() -> Iterator[str]:
    """A web server that is no Ray dashboard: it answers every address with a page."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Submit, and return the only problem as one text."""
    assert main(["submit", *arguments, "--json"]) == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    (problem,) = json.loads(out)["error"]["problems"]
    return " ".join(problem.values())


def test_an_address_where_nothing_listens(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        told = refused(capfd, "run", str(config), "--address", address)
    assert "no Ray jobs API answers" in told
    assert address in told


def test_an_address_that_is_something_else(
    config: Path, capfd: pytest.CaptureFixture[str], other_server: str
) -> None:
    told = refused(capfd, "run", str(config), "--address", other_server)
    assert "another server answers there" in told
    told = refused(capfd, "run", str(config), "--address", "head:8265")
    assert "no Ray jobs API answers" in told


def test_a_command_that_cannot_be_submitted(
    config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = refused(capfd, "dashboard", str(config))
    assert all(command in told for command in COMMANDS)


def test_a_workspace_that_would_vanish_with_the_job(
    config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = refused(capfd, "run", str(config), "workspace=results")
    assert "the results would vanish with the job" in told


def test_a_job_refuses_such_a_workspace_itself(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As `ray job submit --working-dir` unpacks it, without any check of ours before.
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "package"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert main(["run", str(config), "workspace=results"]) == 2
    assert "the results would vanish with the job" in capfd.readouterr().err
    assert list(folder.iterdir()) == []
