"""What is sent to a cluster, and what is told when nothing can be."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from ray.job_submission import JobStatus

from tuneloop import submission
from tuneloop.cli import main
from tuneloop.config import load_config
from tuneloop.data.sources.files import find_files, identities
from tuneloop.errors import ConfigError, ResourceError
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
    - {{path: "{tmp_path}/here/rows/two/b.txt", format: text}}
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
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    large = tmp_path / "here" / "rows" / "one" / "large.jsonl"
    with large.open("w") as file:
        file.truncate(MAX_BUNDLE_BYTES)
    folder = tmp_path / "bundle"
    folder.mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match="too large") as caught:
        write_bundle(load_config(config, ["data.sources.0.path=rows/*/*.jsonl"]), folder)
    assert caught.value.problems[0].where == "rows/one/large.jsonl"
    assert list(folder.iterdir()) == []
    # The cluster may see under the same path what is named from the root.
    write_bundle(load_config(config), folder)
    sent = load_config(folder / "config.yaml")
    assert sent.data.sources[0].path == f"{tmp_path}/here/rows/*/*.jsonl"
    assert sent.data.sources[1].path == "data/1/b.txt"
    assert "every node has to see it there" in caplog.text


def test_a_file_that_is_sent_twice_counts_twice(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "here")
    rows = tmp_path / "here" / "bench" / "c.jsonl"
    with rows.open("w") as file:
        file.truncate(MAX_BUNDLE_BYTES * 2 // 3)
    (tmp_path / "bundle").mkdir()
    write_bundle(load_config(config), tmp_path / "bundle")
    twice = [
        f"{key}=[{{path: bench/c.jsonl, format: question_answer}}]"
        for key in ("data.decontamination.sources", "evaluation.sources")
    ]
    with pytest.raises(ConfigError, match="too large"):
        write_bundle(load_config(config, twice), tmp_path / "bundle")


def test_of_a_folder_only_what_is_read_is_sent(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "here")
    for name in ("key.pem", "notes.md", "weights.bin", "_logs/a.jsonl", "deep/d.jsonl"):
        file = tmp_path / "here" / "rows" / "two" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    (tmp_path / "here" / "c[1].jsonl").write_text("x")
    (tmp_path / "here" / "hub").mkdir()
    card = "---\nconfigs:\n- {config_name: default, data_files: a.parquet}\n---\n"
    (tmp_path / "here" / "hub" / "README.md").write_text(card)
    (tmp_path / "here" / "hub" / "a.parquet").write_text("x")
    (tmp_path / "here" / "hub" / "model.safetensors").write_text("x")
    (tmp_path / "bundle").mkdir()
    places = ["data.sources.0.path=rows/two", "data.sources.2.path=hub"]
    places.append("data.decontamination.sources.0.path=c[1].jsonl")
    write_bundle(load_config(config, places), tmp_path / "bundle")
    data = tmp_path / "bundle" / "data"
    sent = sorted(str(f.relative_to(data)) for f in data.rglob("*") if f.is_file())
    assert sent == [
        "0/two/a.jsonl",
        "0/two/deep/d.jsonl",
        "1/b.txt",
        "2/hub/README.md",
        "2/hub/a.parquet",
        "3/c[1].jsonl",
    ]


def test_models_are_sent_to_the_commands_that_load_them(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "other").mkdir()
    (tmp_path / "here" / "other" / "config.json").write_text("{}")
    (tmp_path / "here" / "old.gguf").write_text("x")
    given = {"other": "./other", "old": "old.gguf", "ours": "models/faq@v1", "far": "org/name"}
    arms = {name: {"model": model} for name, model in (given | {"same": "model"}).items()}
    named = load_config(
        config,
        ["model.base=model", f"serving.models={json.dumps(given)}",
         f"evaluation.arms={json.dumps(arms)}"],
    )  # fmt: skip
    sent = {}
    for command in ("run", "serve", "evaluate"):
        folder = tmp_path / command
        folder.mkdir()
        write_bundle(named, folder, command)
        sent[command] = load_config(folder / "config.yaml")
        files = {str(f.relative_to(folder)) for f in folder.rglob("*.gguf")}
        assert files == ({"model-2/old.gguf"} if command != "run" else set())
        assert (folder / "model-1/other/config.json").is_file() == (command != "run")
    assert sent["run"].serving.models == given
    there = {"other": "model-1/other", "old": "model-2/old.gguf"}
    assert sent["serve"].serving.models == given | there
    models = {name: arm.model for name, arm in sent["evaluate"].evaluation.arms.items()}
    # An arm that is the base model is that there, too.
    assert models == given | there | {"same": "model/model"}
    assert sent["evaluate"].model.base == "model/model"
    (tmp_path / "here" / "old.gguf").unlink()
    with pytest.raises(ConfigError, match=r"serving\.models\.old"):
        write_bundle(named, tmp_path / "serve", "serve")


def test_modules_with_scorers_are_sent(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "here")
    code = (
        "import json\nfrom words.few import split\ndef score(reference, completion): return 1.0\n"
    )
    (tmp_path / "here" / "mine.py").write_text(code)
    for folder in ("words", "json"):
        (tmp_path / "here" / folder).mkdir()
    (tmp_path / "here" / "words" / "few.py").write_text("import signs\n")
    (tmp_path / "here" / "signs.py").write_text("import mine\n")
    (tmp_path / "here" / "other.py").write_text("")
    (tmp_path / "here" / "tags").mkdir()
    (tmp_path / "here" / "tags" / "rude.py").write_text("def rude(reference, completion): ...\n")
    named = ["evaluation.metrics=[mine.score, chrf]", "evaluation.tags=[tags.rude.rude]"]
    (tmp_path / "bundle").mkdir()
    write_bundle(load_config(config, named), tmp_path / "bundle")
    assert (tmp_path / "bundle" / "mine.py").is_file()
    assert (tmp_path / "bundle" / "tags" / "rude.py").is_file()
    # What they import of this directory goes with them, and nothing else.
    assert {file.name for file in (tmp_path / "bundle").glob("*.py")} == {"mine.py", "signs.py"}
    assert (tmp_path / "bundle" / "words" / "few.py").is_file()
    assert not (tmp_path / "bundle" / "json").exists()


def test_files_that_are_never_sent_are_refused_where_a_command_needs_them(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "here")
    for name in ("keys.yaml", "task.yaml"):
        (tmp_path / "here" / name).write_text("{}")
    named = load_config(
        config,
        ["serving.api_keys_file=keys.yaml", "evaluation.forgetting={tasks: [arc_easy, task.yaml]}",
         "sweep.parameters={data.sources.0.path: [rows/one/a.jsonl], model.base: [org/a, model]}"],
    )  # fmt: skip
    (tmp_path / "bundle").mkdir()
    write_bundle(named, tmp_path / "bundle", "prepare")
    for command, expected in (
        ("serve", {"serving.api_keys_file": "keys.yaml"}),
        ("run", {"evaluation.forgetting.tasks.1": "task.yaml"}),
        ("sweep", {"sweep.parameters.data.sources.0.path": "rows/one/a.jsonl",
                   "sweep.parameters.model.base": "model"}),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            write_bundle(named, tmp_path / "bundle", command)
        assert {problem.where: problem.got for problem in caught.value.problems} == expected


def test_what_yaml_would_take_for_something_else_is_sent_as_it_is(
    config: Path, tmp_path: Path
) -> None:
    labels = ["no", "1e5", "010", "12:30", "true", "2024-01-01"]
    named = load_config(config, ["task.type=classification", f"task.labels={json.dumps(labels)}"])
    (tmp_path / "bundle").mkdir()
    write_bundle(named, tmp_path / "bundle")
    assert load_config(tmp_path / "bundle" / "config.yaml").task.labels == labels


def test_links_to_directories_and_to_nothing_are_not_followed(config: Path, tmp_path: Path) -> None:
    model = tmp_path / "here" / "model"
    (model / "again").symlink_to(model)
    (model / "gone").symlink_to(tmp_path / "nowhere")
    (model / "model.safetensors").symlink_to(tmp_path / "here" / "bench" / "c.jsonl")
    (tmp_path / "bundle").mkdir()
    write_bundle(load_config(config), tmp_path / "bundle")
    sent = sorted(file.name for file in (tmp_path / "bundle" / "model" / "model").iterdir())
    assert sent == ["config.json", "model.safetensors"]


def test_a_file_of_marks_is_sent(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TUNELOOP_REVIEW_URL", "postgresql://ann:password@host/faq")
    marks = tmp_path / "marks.jsonl"
    marks.write_text("{}")
    (tmp_path / "bundle").mkdir()
    write_bundle(load_config(config, [f"data.fixes={marks}"]), tmp_path / "bundle")
    sent = load_config(tmp_path / "bundle" / "config.yaml").data.fixes
    assert sent == "marks/marks.jsonl"
    assert "marks are left out" not in caplog.text
    write_bundle(load_config(config), tmp_path / "bundle")
    assert "marks are left out" in caplog.text.replace("\n", " ")
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
    assert len(sent) == 4
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


def test_a_file_that_is_not_here_is_told_here_and_no_job_is_started(
    config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A client that cannot submit anything.
    monkeypatch.setattr("tuneloop.submission._client", lambda address: None)
    told = refused(capfd, "prepare", str(config), "data.sources.0.path=nowhere.jsonl")
    assert "nowhere.jsonl" in told


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


def test_a_job_advises_by_the_file_that_it_was_submitted_from(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load_config(config, ["training.seed=3"])
    told = json.dumps(here.origin)
    monkeypatch.setenv("TUNELOOP_ORIGIN", told)
    there = submission.as_submitted(load_config(config))
    assert there.origin == here.origin == (str(config), ("training.seed=3",))


def test_a_jobs_api_that_is_away_for_a_while_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Client:
        """Loses the log, then does not answer so many times, then tells that the job is done."""

        def __init__(self, num_failures: int) -> None:
            self.left = num_failures

        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            yield ""
            raise aiohttp.ServerDisconnectedError

        def get_job_info(self, job: str) -> Any:
            self.left -= 1
            if self.left >= 0:
                raise ConnectionError("refused")
            return SimpleNamespace(status=JobStatus.SUCCEEDED, driver_exit_code=0, message="")

    monkeypatch.setattr(submission, "_ASK_EVERY_S", 0)
    assert submission._await_end(Client(3), "j").exit_code == 0  # type: ignore[arg-type]
    with pytest.raises(ResourceError, match="the job may go on"):
        submission._await_end(Client(1000), "j")  # type: ignore[arg-type]
