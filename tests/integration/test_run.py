"""The whole loop with a tiny model: real Ray, training, server and command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tuneloop import pipeline
from tuneloop.artifacts import Workspace
from tuneloop.cli import main
from tuneloop.config import load_config
from tuneloop.errors import ModelError
from tuneloop.models.export.parity import check_served
from tuneloop.records import ARMS, Endpoint
from tuneloop.sweeps.table import read_sweep

COLOURS = ["red", "green", "blue", "black", "white", "brown", "yellow", "violet"]
THINGS = ["door", "car", "tree", "house", "boat", "chair", "stone", "lamp", "coat", "cup"]


def write_config(folder: Path, model: Path) -> Path:
    """Write 160 rows of a reading task and a configuration that learns it in a few steps."""
    rows = []
    for number in range(160):
        colour = COLOURS[(number * 7 + number // 10) % len(COLOURS)]
        thing = f"{THINGS[number % len(THINGS)]} number {number}"
        answer = json.dumps({"thing": thing, "colour": colour})
        rows.append({"question": f"The {thing} is {colour} today.", "answer": answer})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "tiny.yaml"
    path.write_text(
        f"""\
name: tiny
workspace: {folder}/workspace
task: {{type: extraction, instruction: Answer with JSON., fields: [thing, colour]}}
model: {{base: {model}}}
data:
  sources: [{{path: {folder}/rows.jsonl, format: question_answer}}]
  max_seq_len: 256
  dedup: {{near: false}}
  split: {{num_test_examples: 16}}
training: {{learning_rate: 1.0e-2, global_batch_size: 8}}
serving: {{port: 0}}
evaluation: {{num_shots: 1, max_tokens: 16, num_resamples: 200}}
resources: {{num_cpus: 2, checkpoint_every_steps: 4}}
"""
    )
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("run"), tiny_model)


def call(*arguments: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main(arguments)
    out, err = capfd.readouterr()
    return code, out, err


# Another model of the same name.
OTHERWISE = ["training.method=full", "training.max_steps=2"]


def test_the_whole_loop_then_everything_is_reused(
    ray_cluster: None, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Something else, a `tuneloop serve` for example, has the port that is configured.
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = f"serving.port={holder.getsockname()[1]}"
        code, out, err = call("run", str(config), "--json", taken, capfd=capfd)
    assert code == 0, err
    first = json.loads(out)["artifacts"]
    assert [item["artifact"] for item in first] == [
        "datasets/tiny@v1",
        "evaluations/tiny-baseline@v1",
        "models/tiny@v1",
        "evaluations/tiny@v1",
    ]
    assert not any(item["reused"] for item in first)
    assert list(first[-1]["metrics"]["scores"]) == list(ARMS)
    assert first[-1]["metrics"]["num_unscored"] == 0
    assert first[2]["metrics"]["final_loss"] < first[2]["metrics"]["first_loss"]

    code, out, _ = call("run", str(config), "--json", capfd=capfd)
    again = json.loads(out)["artifacts"]
    assert all(item["reused"] for item in again)
    assert [item["artifact"] for item in again] == [item["artifact"] for item in first]

    # How it runs is not part of the result; what is trained is.
    code, out, _ = call("train", str(config), "--json", "serving.max_batch_size=4", capfd=capfd)
    assert json.loads(out)["reused"] is True
    # Tried out in small first, as on a cluster: what was measured goes into time and cost.
    tried = ["resources.preflight=true", "resources.price_per_hour=36"]
    code, out, _ = call("train", str(config), "--json", *OTHERWISE, *tried, capfd=capfd)
    made = json.loads(out)
    assert made["artifact"] == "models/tiny@v2"
    assert made["metrics"]["num_steps"] == 2
    workspace = Workspace(config.parent / "workspace")
    recorded = workspace.open("models/tiny@v2").manifest["resources"]
    assert recorded["measured"]["num_workers"] == 1
    assert recorded["estimate"]["cost"] == pytest.approx(recorded["estimate"]["training_s"] / 100)


def test_evaluate_scores_what_is_named_and_trains_nothing(
    ray_cluster: None, config: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    workspace = Workspace(config.parent / "workspace")
    models = [a.ref for a in workspace.published() if a.kind == "models"]
    code, out, err = call("evaluate", str(config), "--json", capfd=capfd)
    assert code == 0, err
    assert (json.loads(out)["artifact"], json.loads(out)["reused"]) == ("evaluations/tiny@v1", True)
    # Without a model of this configuration what is there is scored, and told.
    code, out, err = call("evaluate", str(config), "--json", "training.max_steps=9", capfd=capfd)
    assert code == 0, err
    assert json.loads(out)["artifact"] == "evaluations/tiny-baseline@v1"
    assert "no model was trained with this configuration" in err
    arms = {
        "nearest": {"model": "base", "shots": 1, "choose": "nearest"},
        "simple": {},
        "second": {"model": "models/tiny@v2"},
        "first": {"model": "models/tiny@v1/adapter", "constrain": True},
    }
    rows = (config.parent / "rows.jsonl").read_text().splitlines()
    (tmp_path / "own.jsonl").write_text("\n".join(rows[:6]))
    sources = [{"path": str(tmp_path / "own.jsonl"), "format": "question_answer"}]
    named = [f"evaluation.arms={json.dumps(arms)}", f"evaluation.sources={json.dumps(sources)}"]
    code, out, err = call("evaluate", str(config), "--json", *named, capfd=capfd)
    assert code == 0, err
    made = json.loads(out)
    assert list(made["metrics"]["scores"]) == list(arms)
    assert (made["metrics"]["num_examples"], made["metrics"]["num_unscored"]) == (6, 0)
    predictions = pq.read_table(Path(made["path"]) / "predictions.parquet").to_pylist()
    sent = [json.loads(row["prompt"]) for row in predictions if row["arm"] == "nearest"]
    assert all(len(messages) == 4 for messages in sent), "system, a solved example, the question"
    bound = [row for row in predictions if row["arm"] == "first"]
    for row in bound:
        assert row["finish_reason"] == "length" or set(json.loads(row["completion"])) == {
            *("thing", "colour"),
        }
    # A gate finds all answers there: nothing is served.
    code, out, err = call("gate", str(config), "--against", "base", "--json", capfd=capfd)
    assert code in (0, 3), err
    made = json.loads(out)
    assert made["artifact"] == "evaluations/tiny-gate@v1"
    assert (made["gate"]["against"], made["gate"]["candidate"]) == ("base", "tiny@v1")
    assert code == 0 if made["gate"]["passed"] else 3
    assert "answers exist already" in err
    missing = "evaluation.arms={mine: {model: finetuned}}"
    code, out, err = call("evaluate", str(config), missing, "training.max_steps=9", capfd=capfd)
    assert code == 2
    assert "tuneloop train" in err
    assert models == [a.ref for a in workspace.published() if a.kind == "models"]


def test_what_was_trained_is_what_is_published(ray_cluster: None, config: Path) -> None:
    workspace = Workspace(config.parent / "workspace")
    model = workspace.open("models/tiny@v1")
    parity = json.loads((model.path / "parity.json").read_text())
    assert parity["passed"] is True
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "README.md"):
        assert (model.path / name).is_file(), name
    assert (model.path / "adapter" / "adapter_config.json").is_file()
    assert (model.path / "trainer_log.parquet").is_file()
    evaluation = workspace.open("evaluations/tiny@v1")
    for name in ("predictions.parquet", "metrics.json", "comparison.json", "report.html"):
        assert (evaluation.path / name).is_file(), name
    assert "models/tiny" in json.dumps(evaluation.manifest["inputs"]) or model.fingerprint in str(
        evaluation.manifest
    )


def test_full_finetuning_leaves_merged_weights_only(ray_cluster: None, config: Path) -> None:
    model = Workspace(config.parent / "workspace").open("models/tiny@v2")
    metrics = model.manifest["metrics"]
    assert metrics["num_trainable"] == metrics["num_parameters"]
    assert json.loads((model.path / "parity.json").read_text())["arms"].keys() == {"merged"}
    assert not (model.path / "adapter").exists()


def test_what_is_served_is_the_model_of_the_configuration(ray_cluster: None, config: Path) -> None:
    # The newest model of the name was trained otherwise, by overrides.
    workspace = Workspace(config.parent / "workspace")
    for overrides, expected in (
        ([], "models/tiny@v1"),
        (OTHERWISE, "models/tiny@v2"),
    ):
        loaded = load_config(config, overrides)
        models = pipeline.served_models(loaded, workspace)
        assert models["finetuned"].path == workspace.open(expected).path


def test_table_list_and_show(
    ray_cluster: None, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call("run", str(config), capfd=capfd)
    assert code == 0
    for expected in ("base+few-shot", "finetuned", "report.html", "models/tiny@v1"):
        assert expected in out
    code, out, _ = call("ls", str(config), capfd=capfd)
    assert "models/tiny@v1" in out
    code, out, _ = call("show", "models/tiny@v1", str(config), capfd=capfd)
    assert "fingerprint" in out
    assert code == 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.sources.0.path=/nope.jsonl"], "/nope.jsonl"),
        (["data.sources.0.format=alpaca"], "instruction"),
        (["data.max_seq_len=16"], "max_seq_len"),
        (["model.base=/nope"], "/nope"),
        (["data.num_train_examples=100000"], "data.num_train_examples"),
    ],
)
def test_bad_input_is_told_once_and_publishes_nothing(
    ray_cluster: None,
    config: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    overrides: list[str],
    expected: str,
) -> None:
    code, out, err = call(
        "run", str(config), "--json", f"workspace={tmp_path}/w", *overrides, capfd=capfd
    )
    assert code == 2
    assert expected in err
    assert "Traceback" not in err
    assert json.loads(out)["error"]["problems"]
    assert Workspace(tmp_path / "w").published() == []


def test_a_sweep_trains_scores_and_compares_every_cell(
    ray_cluster: None, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Cells of 32 and of all rows that neither test nor validate, and of a rate that breaks them.
    # The same command again only looks things up.
    rates = "training.learning_rate: [1.0e-2, 1.0e+30]"
    values = f"{{data.num_train_examples: [32, null], {rates}}}"
    command = ["sweep", str(config), "--json", f"sweep.parameters={values}"]
    code, out, err = call(*command, capfd=capfd)
    assert code == 0, err
    assert "sweep of 4 trials, 4 of them to train" in err
    assert "4 of 4 trainings ended" in err
    result = json.loads(out)
    assert result["artifact"] == "sweeps/tiny@v1"
    assert result["metrics"]["num_trials"] == 4
    assert result["metrics"]["num_failed"] == 2
    workspace = Workspace(config.parent / "workspace")
    sweep = workspace.open("sweeps/tiny")
    trials = pq.read_table(sweep.path / "trials.parquet").to_pylist()
    assert [trial["status"] for trial in trials] == ["done", "failed"] * 2
    assert [trial["num_train_examples"] for trial in trials] == [32, 32, 128, 128]
    assert all("not finite" in trial["problem"] for trial in trials if trial["status"] == "failed")
    for trial in trials[::2]:
        assert workspace.open(trial["model"]).manifest["metrics"]["num_steps"] == (
            trial["num_train_examples"] // 8
        )
        validation = workspace.open(trial["evaluation"])
        assert validation.manifest["config"]["evaluation"]["split"] == "validation"
        scores = validation.manifest["metrics"]["scores"]
        assert trial["exact_match"] == trial["validation_score"] == scores["finetuned"]
    # The test split is answered once, by the winner.
    tested = [one for one in workspace.published() if one.name == "tiny-sweep"]
    (winner,) = [trial for trial in trials if trial["test_score"] is not None]
    assert [one.ref for one in tested] == [winner["test_evaluation"]]
    assert winner["test_score"] == tested[0].manifest["metrics"]["scores"]["finetuned"]
    assert winner["validation_score"] == max(trial["validation_score"] for trial in trials[::2])
    assert result["metrics"]["best_model"] == winner["model"]
    assert result["metrics"]["best_score"] == winner["test_score"]
    # Subsets are nested: the rows of the smaller one are among those of the larger one. What
    # validates and tests is the same, and nobody's train rows.
    datasets = [one for one in workspace.published() if one.kind == "datasets"][-2:]
    small, large = (
        {
            side: set(pq.read_table(dataset.path / side)["row_id"].to_pylist())
            for side in ("train", "validation", "test")
        }
        for dataset in datasets
    )
    assert small["train"] < large["train"]
    assert small["validation"] == large["validation"]
    assert small["test"] == large["test"]
    assert not (small["validation"] | small["test"]) & large["train"]
    curve = json.loads((sweep.path / "curve.json").read_text())
    assert [len(line["points"]) for line in curve["curves"]] == [2]
    # Two sizes bear no forecast. What prompting alone reaches is measured on the same rows.
    assert curve["curves"][0]["forecast"]["refused"].startswith("2 data volumes")
    untrained = workspace.open("evaluations/tiny-sweep-baseline").manifest
    assert list(untrained["metrics"]["scores"]) == ["base+few-shot", "simple"]
    assert untrained["config"]["evaluation"]["split"] == "validation"
    # The report and the dashboard's page are drawn from the same files.
    assert "Whether more rows help is not known" in (sweep.path / "report.html").read_text()
    view = read_sweep(sweep)
    assert len(view.points) == 2
    assert len(view.problems) == 2

    code, out, err = call(*command, capfd=capfd)
    assert code == 0, err
    assert json.loads(out)["reused"] is True
    assert "to train" not in err


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("{training.learning_rat: [1, 2]}", "`training.learning_rat`"),
        ("{training.num_epochs: [1, none]}", "`training.num_epochs`"),
        ("{model.base: [/nope, /neither]}", "/neither"),
        ("{training.lora.target_modules: [all-linear, no_such]}", "no layer of this name"),
    ],
)
def test_a_wrong_sweep_is_told_before_anything_is_trained(
    ray_cluster: None,
    config: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    values: str,
    expected: str,
) -> None:
    overrides = [f"workspace={tmp_path}/w", f"sweep.parameters={values}"]
    code, _, err = call("sweep", str(config), *overrides, capfd=capfd)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err
    # Whether a model fits is known when its rows are.
    assert {artifact.kind for artifact in Workspace(tmp_path / "w").published()} <= {"datasets"}


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_one_of(process: psutil.Process, names: tuple[str, ...]) -> bool:
    try:
        return any(name in " ".join(process.cmdline()) for name in names)
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(processes: list[psutil.Process], seconds: float = 180) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return alive


# What a run is stopped by, in which order, and what then changes in the workspace: it is in the
# middle of that stage.
STOPS = [
    (signal.SIGINT, "datasets-tiny-*/draft/train"),
    (signal.SIGTERM, "evaluations-tiny-baseline-*/scratch/answers.jsonl"),
    (signal.SIGKILL, "models-tiny-*/scratch/checkpoints/*/checkpoint_*"),
    (signal.SIGKILL, "evaluations-tiny-*/scratch/answers.jsonl"),
]
# How many artifacts there are at each stop.
NUM_PUBLISHED = [0, 1, 2, 3]


def test_stopped_and_killed_in_every_stage_then_ends_like_an_uninterrupted_run(
    ray_cluster: None, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call("run", str(config), "--json", capfd=capfd)
    assert code == 0, err
    expected = json.loads(out)["artifacts"]

    workspace = tmp_path / "w"
    command = [sys.executable, "-m", "tuneloop.cli", "run", str(config), "--json"]
    command += [f"workspace={workspace}", "resources.checkpoint_every_steps=2"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    killed: list[psutil.Process] = []
    for (stop, pattern), num_published in zip(STOPS, NUM_PUBLISHED, strict=True):
        began, deadline = time.time(), time.monotonic() + 240
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell in the background ignores SIGINT, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while not any(changed_since(path, began) for path in (workspace / ".work").glob(pattern)):
            assert process.poll() is None, (pattern, process.stderr.read())
            assert time.monotonic() < deadline, pattern
            time.sleep(0.03)
        started = descendants(process.pid)
        process.send_signal(stop)
        process.communicate(timeout=60)
        # The stage may have published between the look and the signal.
        assert len(Workspace(workspace).published()) - num_published in (0, 1), pattern
        if stop == signal.SIGKILL:
            killed += started
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130
            assert wait_until_gone(started) == []

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["artifacts"]
    assert [item["artifact"] for item in found] == [item["artifact"] for item in expected]
    assert found[-1]["metrics"]["scores"] == expected[-1]["metrics"]["scores"]
    log, straight = (
        pq.read_table(Path(items[2]["path"]) / "trainer_log.parquet").to_pydict()
        for items in (found, expected)
    )
    for column in ("step", "epoch", "loss", "learning_rate", "num_tokens", "rows"):
        assert log[column] == straight[column]
    # No row is seen twice or left out.
    assert sorted(row for rows in log["rows"] for row in rows) == list(range(144))
    assert not list((workspace / ".work").glob("*/draft"))
    # Ray's agents look for their killed cluster for a minute; the rest ends at once.
    agents = ("DashboardAgent", "RuntimeEnvAgent")
    others = [process for process in killed if not is_one_of(process, agents)]
    assert wait_until_gone(others) == []


def changed_since(path: Path, moment: float) -> bool:
    try:
        return path.stat().st_mtime > moment
    except FileNotFoundError:
        return False


def test_models_and_adapters_are_served_under_their_names(
    ray_cluster: None, config: Path, tiny_model: Path
) -> None:
    """Base, newest model, an older version and an adapter; the last three on recorded answers."""
    import httpx

    from tuneloop import pipeline
    from tuneloop.config import load_config

    workspace = Workspace(config.parent / "workspace")
    models = {"old": "models/tiny@v1", "small": "models/tiny@v1/adapter", "raw": str(tiny_model)}
    settings = load_config(config, [f"serving.models={json.dumps(models)}"])
    asked = {
        "prompt": "The door number 1 is red today.", "max_tokens": 12, "temperature": 0,
        "logprobs": 1, "return_token_ids": True,
    }  # fmt: skip
    with pipeline.serve(settings, workspace) as (url, names):
        assert names == ["base", "finetuned", "old", "small", "raw"]
        listed = httpx.get(f"{url}/models").json()["data"]
        assert [model["id"] for model in listed] == names
        choices = {
            name: httpx.post(
                f"{url}/completions", json={**asked, "model": name}, timeout=60
            ).json()["choices"][0]
            for name in names
        }
        # Another model under the name of the one that was trained is refused.
        other = workspace.open("models/tiny@v2").path
        with pytest.raises(ModelError, match="`old` answers differently from the trained one"):
            check_served(Endpoint(url, "old"), other)
    ids = {name: choice["token_ids"] for name, choice in choices.items()}
    assert ids["old"] == ids["small"]
    assert ids["base"] == ids["raw"] != ids["small"]
    logprobs = [choices[name]["logprobs"]["token_logprobs"] for name in ("old", "small")]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)

    evaluated = json.loads((workspace.open("evaluations/tiny@v1").path / "parity.json").read_text())
    assert evaluated["finetuned"]["passed"]
    assert evaluated["finetuned"]["arms"].keys() == {"served"}
    assert evaluated["finetuned"]["tokens"] > 4


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["serving.models.x=models/tiny@v9"], "no artifact `models/tiny@v9`"),
        (["serving.models.x=models/tiny@v1/adapter", "model.base=OTHER"], "another base model"),
        (["serving.models.x=models/tiny@v2/adapter"], "the model has no adapter"),
        (["serving.models.x=/nowhere"], "/nowhere"),
        (["serving.models.base=models/tiny"], "`base` is taken"),
    ],
)
def test_what_cannot_be_served_is_told(
    config: Path,
    tiny_model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    overrides: list[str],
    expected: str,
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    overrides = [item.replace("OTHER", str(other)) for item in overrides]
    code, _, err = call("serve", str(config), *overrides, capfd=capfd)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err


def test_a_taken_port_is_told_before_anything_starts(config: Path) -> None:
    """In a process of its own, without Ray: one message, exit code 2, no child left."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        command = [sys.executable, "-m", "tuneloop.cli", "serve", str(config)]
        done = subprocess.run(
            [*command, f"serving.port={port}"], capture_output=True, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.count("cannot listen") == 1
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr
    assert "Ray" not in done.stderr
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(config) in (p.info["cmdline"] or [])
    ]
