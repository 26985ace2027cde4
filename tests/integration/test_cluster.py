"""The loop on a cluster of several nodes: as submitted jobs, over two nodes, and deployed."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from tuneloop.artifacts import Workspace
from tuneloop.config import load_config

ROOT = Path(__file__).parents[2]
NUM_STEPS = 20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """160 rows to train on, 20 steps, in a workspace that all nodes see."""
    folder = tmp_path_factory.mktemp("cluster")
    rows = [
        {
            "question": f"Item {number} costs {number * 7 % 90} today.",
            "answer": json.dumps({"item": number, "price": number * 7 % 90}),
        }
        for number in range(168)
    ]
    (folder / "rows").mkdir()
    for name, part in (("a", rows[:80]), ("b", rows[80:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / "rows" / f"{name}.jsonl").write_text(text)
    (folder / ".env").write_text("SECRET=1")
    path = folder / "prices.yaml"
    path.write_text(
        f"""\
name: prices
workspace: {folder}/workspace
task: {{type: extraction, instruction: Answer with JSON., fields: [item, price]}}
model: {{base: {tiny_model}}}
data:
  # From where the command is started; no worker is started there.
  sources: [{{path: "rows/*.jsonl", format: question_answer}}]
  max_seq_len: 256
  dedup: {{near: false}}
  split: {{num_test_examples: 8}}
training:
  learning_rate: 1.0e-2
  global_batch_size: 8
  # Every layer with an adapter costs ZeRO-3 as much time as a big one.
  lora: {{target_modules: [q_proj, down_proj]}}
serving: {{port: 0}}
evaluation: {{num_shots: 1, max_tokens: 16, num_resamples: 200}}
resources: {{checkpoint_every_steps: 4, preflight: false}}
"""
    )
    return path


@pytest.fixture(scope="module")
def killed_server(nodes: Any, config: Path) -> str:
    """What became of a job that served, and whose program was killed: its models are still there.

    On a cluster Serve outlives the program that started it.
    """
    with submitted_job(nodes, "serve", config, until="serving base") as (process, _):
        (driver,) = nodes.processes_of("tuneloop.cli", "serve")
        driver.kill()
    assert process.returncode == 1
    return str(json.loads(process.stdout.read())["status"])


@pytest.fixture(scope="module")
def submitted(
    nodes: Any, config: Path, killed_server: str
) -> tuple[subprocess.CompletedProcess[str], Workspace]:
    """The whole loop as a job, and the workspace it wrote to."""
    # The address that was given counts, whatever Ray finds in the environment.
    environment = nodes.environment | {"RAY_ADDRESS": "127.0.0.1:1"}
    done = submit(nodes, "run", str(config), env=environment)
    assert done.returncode == 0, done.stderr
    return done, Workspace(config.parent / "workspace")


def submit(nodes: Any, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = ["-m", "tuneloop.cli", "submit", *arguments, "--address", nodes.url, "--json"]
    return nodes.run(*command, **{"cwd": Path(arguments[1]).parent} | options)


def test_a_killed_server_is_in_nobodys_way(
    killed_server: str, submitted: tuple[subprocess.CompletedProcess[str], Workspace]
) -> None:
    assert killed_server == "FAILED"
    assert "shutting down what a killed run still serves" in submitted[0].stderr


def test_a_submitted_loop_publishes_everything(
    submitted: tuple[subprocess.CompletedProcess[str], Workspace],
) -> None:
    done, workspace = submitted
    job = json.loads(done.stdout)
    assert (job["status"], job["exit_code"]) == ("SUCCEEDED", 0)
    published = [artifact.ref for artifact in workspace.published()]
    assert sorted(published) == [
        "datasets/prices@v1",
        "evaluations/prices-baseline@v1",
        "evaluations/prices@v1",
        "models/prices@v1",
    ]
    assert "bundle: " in done.stderr
    assert " MiB" in done.stderr
    # The job's own log came through.
    assert "published models/prices@v1" in done.stderr
    log = pq.read_table(workspace.open("models/prices").path / "trainer_log.parquet")
    assert log["step"].to_pylist() == list(range(1, NUM_STEPS + 1))
    evaluation = workspace.open("evaluations/prices")
    assert evaluation.manifest["metrics"]["num_unscored"] == 0


@pytest.fixture(scope="module")
def by_ray(nodes: Any, config: Path) -> Workspace:
    """The same dataset by Ray's own command, in a workspace of its own."""
    folder = config.parent
    overrides = f"workspace={folder}/by-ray", f"data.sources.0.path={folder}/rows/*.jsonl"
    done = ray_job_submit(nodes, "prepare.py", config, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "published datasets/prices@v1" in done.stdout
    return Workspace(config.parent / "by-ray")


def ray_job_submit(
    nodes: Any, job: str, config: Path, *overrides: str
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "jobs", Path(folder) / "jobs")
        shutil.copyfile(config, Path(folder) / "prices.yaml")
        command = ["-m", "ray.scripts.scripts", "job", "submit", "--address", nodes.url]
        command += ["--working-dir", folder, "--", "python", f"jobs/{job}", "prices.yaml"]
        return nodes.run(*command, *overrides)


def test_the_entry_point_under_ray_job_submit_gives_the_same(
    submitted: tuple[subprocess.CompletedProcess[str], Workspace], by_ray: Workspace
) -> None:
    for split in ("train", "test"):
        mine, theirs = (
            # The bundle has its files elsewhere, which is said of every row.
            pq.read_table(workspace.open("datasets/prices").path / split).drop("source")
            for workspace in (by_ray, submitted[1])
        )
        assert mine == theirs
    # Files count by what is in them, wherever the command that reads them runs.
    made = [w.open("datasets/prices").manifest["fingerprint"] for w in (by_ray, submitted[1])]
    assert made[0] == made[1]


def test_a_driver_reuses_what_a_job_made(
    nodes: Any, config: Path, submitted: tuple[subprocess.CompletedProcess[str], Workspace]
) -> None:
    environment = nodes.environment | {"RAY_ADDRESS": f"127.0.0.1:{nodes.port}"}
    command = ["-m", "tuneloop.cli", "prepare", str(config), "--json"]
    for overrides, is_reused in (([], True), (["data.seed=1", "name=elsewhere"], False)):
        # Workers on the nodes find the driver's relative files.
        done = nodes.run(*command, *overrides, env=environment, cwd=config.parent)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["reused"] == is_reused


def test_a_workspace_that_ray_would_remove_is_refused_in_a_job(nodes: Any, config: Path) -> None:
    done = ray_job_submit(nodes, "pipeline.py", config, "workspace=workspace")
    assert done.returncode == 1
    assert "the results would vanish with the job" in done.stdout


def test_a_jobs_exit_code_is_passed_on(nodes: Any, config: Path) -> None:
    done = submit(nodes, "prepare", str(config), "data.sources.0.path=/nowhere.jsonl")
    assert done.returncode == 2
    assert "/nowhere.jsonl" in done.stderr
    assert json.loads(done.stdout)["exit_code"] == 2
    assert "Traceback" not in done.stderr


def test_a_stopped_job_is_told(nodes: Any, config: Path) -> None:
    folder = f"workspace={config.parent}/stopped"
    with submitted_job(nodes, "prepare", config, folder, until="joined") as job:
        process, identity = job
        nodes.run("-m", "ray.scripts.scripts", "job", "stop", identity, "--address", nodes.url)
    assert process.returncode == 1
    assert json.loads(process.stdout.read())["status"] == "STOPPED"


@contextlib.contextmanager
def submitted_job(
    nodes: Any, command: str, config: Path, *overrides: str, until: str
) -> Iterator[tuple[subprocess.Popen, str]]:
    """Submit a job, yield it and its name when its log says something, and see it end."""
    arguments = ["submit", command, str(config), *overrides, "--address", nodes.url, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tuneloop.cli", *arguments],
        env=nodes.environment,
        cwd=config.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = []
    # The log is live: a server's job never ends by itself.
    for line in process.stderr:
        lines.append(line)
        named = [line.split()[3] for line in lines if "submitted to" in line]
        if named and until in line:
            break
    else:
        raise AssertionError("".join(lines))
    yield process, named[0]
    process.stderr.read()
    process.wait(timeout=120)


# Looks for more room every few seconds, so that a test need not wait a minute for it.
IMPATIENT = """
import sys
import tuneloop.training.workers as workers
from tuneloop.cli import main
workers._RESIZE_EVERY_S = 5.0
sys.exit(main())
"""


def test_two_nodes_train_like_one_worker_whatever_becomes_of_them(
    nodes: Any, by_ray: Workspace, config: Path, tiny_model: Path, train_here: Callable[..., Any]
) -> None:
    """With ZeRO-3, from a driver that is no job; one of the nodes is lost, and a new one comes."""
    num_epochs, places, lost, replaced = 9, set(), False, False
    folder = Path(tempfile.mkdtemp(prefix="on-two-", dir=config.parent))
    shutil.copytree(by_ray.root / "datasets", folder / "datasets")
    command = [sys.executable, "-c", IMPATIENT, "train", str(config), f"workspace={folder}"]
    # Checkpoints pace it: a node that joins is noticed within half a minute.
    settings = ["num_workers=[1,2]", "zero_stage=3", "checkpoint_every_steps=4"]
    command += [f"training.num_epochs={num_epochs}", *(f"resources.{item}" for item in settings)]
    environment = nodes.environment | {"RAY_ADDRESS": f"127.0.0.1:{nodes.port}"}
    environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "5"
    with (folder / "log").open("w") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=config.parent, stdout=file, stderr=file
        )
    joining = threading.Thread(target=nodes.start_worker)
    while process.poll() is None:
        time.sleep(0.2)
        told = progress(folder)
        if replaced and told and told[-1]["num_workers"] == 1:
            # A fast machine would end the training before the new node is noticed.
            slow_down(train_workers(nodes))
        if len(places) < 2:
            places.update(row["node_id"] for row in train_workers(nodes))
        elif not lost and len(told) >= 30:
            nodes.kill(nodes.started[-1])
            lost = True
        elif lost and not replaced and told[-1]["num_workers"] == 1:
            # Beside this loop, which slows the training down until the node is there.
            joining.start()
            replaced = True
    assert process.returncode == 0, (folder / "log").read_text()
    assert replaced
    joining.join()
    assert len(places) == 2
    model = Workspace(folder).open("models/prices")
    log = pq.read_table(model.path / "trainer_log.parquet").to_pydict()
    counts = log["num_workers"]
    assert [b for a, b in zip([0, *counts], counts, strict=False) if a != b] == [2, 1, 2]
    # Whoever trained it, every row came once an epoch.
    assert len(log["rows"]) == num_epochs * NUM_STEPS
    for epoch in range(num_epochs):
        steps = log["rows"][epoch * NUM_STEPS : (epoch + 1) * NUM_STEPS]
        assert sorted(row for rows in steps for row in rows) == list(range(160))
    training = load_config(config, [f"training.num_epochs={num_epochs}"]).training
    expected = [row["loss"] for row in train_here(tiny_model, by_ray, "prices", training)]
    assert log["loss"][:NUM_STEPS] == pytest.approx(expected[:NUM_STEPS], rel=1e-4)
    assert log["loss"] == pytest.approx(expected, rel=1e-2)
    assert expected[-1] < expected[0]
    nodes.await_alive()


def train_workers(nodes: Any) -> list[dict[str, Any]]:
    rows = [row for row in nodes.rows("actors") if "TrainWorker" in row["class_name"]]
    return [row for row in rows if row["state"] == "ALIVE"]


def slow_down(workers: list[dict[str, Any]]) -> None:
    """Let the workers' processes stand still for half a second."""
    for act in (psutil.Process.suspend, psutil.Process.resume):
        for row in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                act(psutil.Process(row["pid"]))
        if act is psutil.Process.suspend:
            time.sleep(0.5)


def progress(folder: Path) -> list[dict[str, Any]]:
    """Return what a training has told of its steps so far."""
    for file in folder.glob(".work/*/scratch/progress.jsonl"):
        text = file.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return []


def test_what_cannot_run_there_is_told_before_it_starts(
    nodes: Any, config: Path, tmp_path: Path
) -> None:
    # The same path is another directory for each process: as on nodes without a shared disk.
    environment = nodes.environment | {"RAY_ADDRESS": f"127.0.0.1:{nodes.port}"}
    command = ["-m", "tuneloop.cli", "train", str(config), "workspace=/proc/self/cwd/w"]
    command.append(f"data.sources.0.path={config.parent}/rows/*.jsonl")
    done = nodes.run(*command, env=environment, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "not every node of the cluster sees the workspace" in done.stderr
    assert "2 of 2 nodes" in done.stderr or "1 of 1 nodes" in done.stderr

    stranger = nodes.environment | {"RAY_AUTH_TOKEN": "f" * 32}
    done = submit(nodes, "prepare", str(config), env=stranger)
    assert done.returncode == 2, done.stderr
    assert "the cluster asks for its token" in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_deploy(
    nodes: Any, submitted: tuple[subprocess.CompletedProcess[str], Workspace], tmp_path: Path
) -> None:
    settings = yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text())
    port = settings["http_options"]["port"] = nodes.free_port()
    (application,) = settings["applications"]
    finetuned = submitted[1].open("models/prices")
    application["args"]["models"] = {"finetuned": {"path": str(finetuned.path)}}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(settings))
    serve = ["-c", "from ray.serve.scripts import cli; cli()"]
    nodes.run(*serve, "shutdown", "--yes", "--address", nodes.url)
    done = nodes.run(*serve, "deploy", str(file), "--address", nodes.url)
    assert done.returncode == 0, done.stdout + done.stderr
    body = {
        "model": "finetuned",
        "messages": [{"role": "user", "content": "Item 3 costs 21 today."}],
        "max_tokens": 4,
    }
    url = f"http://127.0.0.1:{port}/v1"
    answer = await_answer(lambda: httpx.post(f"{url}/chat/completions", json=body, timeout=60))
    assert answer.json()["usage"]["completion_tokens"] in range(1, 5)
    done = nodes.run(*serve, "shutdown", "--yes", "--address", nodes.url)
    assert done.returncode == 0, done.stdout + done.stderr


def await_answer(ask: Callable[[], httpx.Response]) -> httpx.Response:
    deadline = time.monotonic() + 180
    while True:
        try:
            answer = ask()
            if answer.status_code == 200:
                return answer
        except httpx.TransportError as error:
            answer = error
        assert time.monotonic() < deadline, answer
        time.sleep(0.5)
