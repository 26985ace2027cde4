"""General abilities before and after training: lm-evaluation-harness over our own address.

It runs in a virtual environment of its own, asks the same served models as the evaluation, by token
ids, and its scores of single documents are kept in `forgetting.parquet`, so that before and after
are compared on the same documents.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tuneloop.artifacts import Artifact, sha256_file
from tuneloop.config import ForgettingConfig
from tuneloop.errors import ConfigError, EndpointError, Problem
from tuneloop.evals.scoring.metrics import Better
from tuneloop.records import Arm

FILE = "forgetting.parquet"
# What is installed into a new environment. The harness pins nothing of what tuneloop needs, but is
# kept apart all the same: it may move other versions than those the training was tested with.
REQUIREMENTS = ("lm-eval[api]>=0.4.11,<0.5", "transformers>=5,<6")
# Raised where the same samples are read as other scores.
_READ_VERSION = 2
# Under this name a sample has what the metric is computed from.
_OF_A_DOCUMENT = {"perplexity": "log_likelihood"}
_CONCURRENCY = 8
_LAST_LINES = 12
_log = logging.getLogger("tuneloop.evals")
_COLUMNS = [
    *((name, pa.string()) for name in ("identity", "arm", "model", "task", "doc", "metric")),
    ("value", pa.float64()),
    ("better", pa.string()),
]


class Models(NamedTuple):
    """The arms that are compared: the model before training, and the one after it."""

    before: Arm
    after: Arm


@dataclass(frozen=True)
class DocumentScore:
    """A metric of one document of a task: a row of `forgetting.parquet`.

    Args:
        identity: Of the model, the tasks and the harness.
        model: Fingerprint of the model that was asked: weights, tokenizer and template.
        doc: Number of the document in its task, and the filter if there are several.
        better: Whether a higher or a lower value is better.
    """

    identity: str
    arm: str
    model: str
    task: str
    doc: str
    metric: str
    value: float
    better: Better = "higher"


def models_to_compare(arms: Sequence[Arm]) -> Models | None:
    """Return the first and the last model that are served here; None unless they differ."""
    plain = [
        arm
        for arm in arms
        if arm.model_fingerprint
        and arm.answer is None
        and not (arm.shots or arm.choose or arm.forms)
    ]
    if not plain or plain[0].model_fingerprint == plain[-1].model_fingerprint:
        return None
    return Models(plain[0], plain[-1])


def parts_of(config: ForgettingConfig) -> dict[str, Any]:
    """Return what the scores depend on besides the model, as the manifest keeps it."""
    version = installed_version(config)
    return {
        "tasks": {task: _digest(task) for task in config.tasks},
        "limit": config.limit,
        "num_fewshot": config.num_fewshot,
        "lm_eval": version or REQUIREMENTS[0],
        "read_version": _READ_VERSION,
    }


def identity_of(config: ForgettingConfig, arm: Arm) -> str:
    """Return what an arm's scores are known by."""
    parts = {"model": arm.model_fingerprint, **parts_of(config)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def installed_version(config: ForgettingConfig) -> str:
    """Return the version of the harness in its environment; empty where it is not there."""
    found = sorted(Path(config.environment).expanduser().glob("lib/*/site-packages/lm_eval-*"))
    return found[-1].name.removeprefix("lm_eval-").removesuffix(".dist-info") if found else ""


def forgetting_problems(config: ForgettingConfig) -> list[Problem]:
    """Return what is wrong with the settings that can be known before anything runs."""
    where = "evaluation.forgetting"
    problems = []
    folder = Path(config.environment).expanduser()
    if folder.resolve() == Path(sys.prefix).resolve():
        problems.append(
            Problem(
                "the harness needs an environment of its own",
                where=f"{where}.environment",
                got=f"{folder}, where tuneloop runs",
                remedy="name another directory; it is made where it is not there",
            )
        )
    elif folder.exists() and not installed_version(config):
        problems.append(
            Problem(
                "lm-eval is not installed there",
                where=f"{where}.environment",
                got=str(folder),
                remedy=f"{folder / 'bin' / 'pip'} install {_quoted()}; or name a directory that "
                "does not exist",
            )
        )
    for index, task in enumerate(config.tasks):
        if _is_file(task):
            problems += _file_problems(Path(task).expanduser(), f"{where}.tasks.{index}")
    return problems


def _file_problems(path: Path, where: str) -> list[Problem]:
    try:
        name = _task_name(path)
    except OSError as error:
        return [Problem("a task cannot be read", where=where, got=f"{path}: {error.strerror}")]
    except yaml.YAMLError as error:
        return [Problem("a task is not valid YAML", where=where, got=f"{path}: {error}")]
    if not name:
        allowed = "a YAML of lm-evaluation-harness, with `task: NAME`"
        return [Problem("a task has no name", where=where, got=str(path), allowed=allowed)]
    missing = [file for file in _data_files(path) if "://" not in file and not Path(file).exists()]
    return [
        Problem(
            "a task's data are not there",
            where=where,
            got=f"{path}: {file}",
            remedy="give a path that holds from the directory you start in",
        )
        for file in missing
    ]


def make_environment(config: ForgettingConfig) -> None:
    """Make the harness's environment if it is not there; its version is part of what is scored.

    Raises:
        ConfigError: It cannot be made.
    """
    folder = Path(config.environment).expanduser().absolute()
    if folder.exists():
        return
    _log.info("installing lm-eval into %s, once", folder)
    try:
        venv.create(folder, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise _unusable(folder, str(error)) from error
    _run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *REQUIREMENTS], folder)


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _unusable(folder, _tail(done.stderr or done.stdout))


def _unusable(folder: Path, got: str) -> ConfigError:
    return ConfigError.of(
        "the harness cannot be used",
        where="evaluation.forgetting.environment",
        got=f"{folder}: {got}",
        remedy=f"make it by hand: python -m venv {folder} && {folder}/bin/pip install {_quoted()}",
    )


def run_harness(config: ForgettingConfig, arm: Arm, folder: Path) -> list[DocumentScore]:
    """Return the score of every document of every task, asked over the arm's address.

    Args:
        config: Which tasks, and how many documents of each.
        arm: A model that is served here.
        folder: Where the harness writes; it may be there from a run that was cut short.

    Raises:
        ConfigError: The harness cannot be used, or does not know a task.
        EndpointError: It ended without scores.
    """
    environment_folder = Path(config.environment).expanduser().absolute()
    python = environment_folder / "bin" / "python"
    _run([str(python), "-c", "import lm_eval"], environment_folder)
    output = folder / "harness"
    arguments = {
        "model": arm.endpoint.model,
        "base_url": f"{arm.endpoint.url.rstrip('/')}/completions",
        "tokenizer": str(arm.tokenizer),
        "tokenizer_backend": "huggingface",
        "num_concurrent": _CONCURRENCY,
        "max_length": _max_length(arm),
        "max_retries": 3,
    }
    tasks = [
        str(Path(t).expanduser()) if t.endswith((".yaml", ".yml")) else t for t in config.tasks
    ]
    command = [
        *(str(python), "-m", "lm_eval", "run", "--model", "local-completions"),
        *("--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())),
        *("--tasks", *tasks, "--output_path", str(output), "--log_samples", "--batch_size", "1"),
    ]
    if config.limit is not None:
        command += ["--limit", str(config.limit)]
    if config.num_fewshot is not None:
        command += ["--num_fewshot", str(config.num_fewshot)]
    _log.info("lm-evaluation-harness asks %s: %s", arm.name, ", ".join(config.tasks))
    # Nothing of ours may be imported there.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment["OPENAI_API_KEY"] = arm.endpoint.api_key or "none"
    with (folder / "harness.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        )
    scores = read_samples(output, identity_of(config, arm), arm) if output.exists() else []
    if done.returncode or not scores:
        told = (folder / "harness.log").read_text(encoding="utf-8", errors="replace")
        raise EndpointError.of(
            f"lm-evaluation-harness ended without scores of `{arm.name}`",
            where="evaluation.forgetting.tasks",
            got=_tail(told),
            remedy="correct the tasks; the answers of the evaluation are kept",
        )
    return scores


def read_samples(output: Path, identity: str, arm: Arm) -> list[DocumentScore]:
    """Return the numbers of each document in the harness's files of samples."""
    newest: dict[str, Path] = {}
    for file in sorted(output.rglob("samples_*.jsonl"), key=lambda file: file.name):
        # `samples_TASK_TIME.jsonl`; of a task that ran twice the last one counts.
        newest[file.name.removeprefix("samples_").rpartition("_")[0]] = file
    scores: list[DocumentScore] = []
    for task, file in newest.items():
        results = file.with_name(f"results_{file.stem.rpartition('_')[2]}.json")
        told = json.loads(results.read_bytes()) if results.is_file() else {}
        is_better = told.get("higher_is_better", {}).get(task, {})
        # As bytes: a line of text also ends at U+2028, which stands in documents.
        for line in file.read_bytes().splitlines():
            sample = json.loads(line)
            doc = f"{sample['doc_id']}/{sample.get('filter', 'none')}"
            for metric in sample.get("metrics", []):
                value = sample.get(metric)
                if not isinstance(value, int | float):
                    continue
                name = _OF_A_DOCUMENT.get(metric)
                is_lower = name is None and is_better.get(metric) is False
                better: Better = "lower" if is_lower else "higher"
                known = identity, arm.name, arm.model_fingerprint, task, doc
                scores.append(DocumentScore(*known, name or metric, float(value), better))
    return scores


def write_scores(scores: Sequence[DocumentScore], file: Path) -> None:
    """Write scores of documents."""
    pq.write_table(pa.Table.from_pylist([asdict(s) for s in scores], pa.schema(_COLUMNS)), file)


def read_scores(file: Path) -> list[DocumentScore]:
    """Return scores of documents; none where there is no such file."""
    if not file.is_file():
        return []
    return [DocumentScore(**row) for row in pq.read_table(file).to_pylist()]


def stored_scores(artifacts: Sequence[Artifact], identity: str) -> list[DocumentScore]:
    """Return the scores that a published evaluation has of exactly this model and these tasks."""
    for artifact in reversed(artifacts):
        if found := [s for s in read_scores(artifact.path / FILE) if s.identity == identity]:
            return found
    return []


def _max_length(arm: Arm) -> int:
    """Return the longest text the server takes; what is longer loses its beginning."""
    root = arm.endpoint.url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {arm.endpoint.api_key}"} if arm.endpoint.api_key else {}
    body = {"model": arm.endpoint.model, "prompt": "a"}
    try:
        answer = httpx.post(f"{root}/tokenize", json=body, headers=headers, timeout=60)
        return int(answer.raise_for_status().json()["max_model_len"])
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise EndpointError.of(
            "the model server does not tell its longest text", where=root, got=str(error)
        ) from error


def _digest(task: str) -> str:
    """Return what a task of the user's own says, and its data; of others the name is enough."""
    path = Path(task).expanduser()
    if not _is_file(task) or not path.is_file():
        return ""
    files = [path, *(Path(file) for file in _data_files(path) if Path(file).is_file())]
    return hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()[:16]


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _read_task(path: Path) -> Mapping[str, Any]:
    class Loader(yaml.SafeLoader):
        """Reads what the harness's own tags stand before as plain values."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))
    told = yaml.load(path.read_text(encoding="utf-8"), Loader)
    return told if isinstance(told, dict) else {}


def _task_name(path: Path) -> str:
    name = _read_task(path).get("task")
    return name if isinstance(name, str) else ""


def _data_files(path: Path) -> list[str]:
    files = (_read_task(path).get("dataset_kwargs") or {}).get("data_files") or []
    values = list(files.values()) if isinstance(files, dict) else files
    values = [values] if isinstance(values, str) else values
    return [one for value in values for one in ([value] if isinstance(value, str) else value)]


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_LAST_LINES:])


def _quoted() -> str:
    return " ".join(f"'{requirement}'" for requirement in REQUIREMENTS)
