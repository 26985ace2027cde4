"""Any command as a Ray job: a clean bundle, live logs, the job's exit code.

The bundle holds the configuration, and what it names of this machine: the files that sources read,
marks, answers, models, a chat template, modules with scorers. Nothing else of the current directory
is in it: no `.git`, no workspace, no keys. This version of the tuneloop package goes with it, so
the cluster runs the code that was submitted.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloop.config import SourceConfig, TuneloopConfig, load_config, to_yaml
from tuneloop.data.sources.files import (
    COMPRESSIONS,
    DOCUMENTS,
    TABLES,
    describes_itself,
    find_source,
)
from tuneloop.data.sources.splits import repository_of
from tuneloop.errors import ConfigError, Problem, ResourceError
from tuneloop.own_code import own_files
from tuneloop.records import BASE, FINETUNED
from tuneloop.text import counted

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

logger = logging.getLogger("tuneloop.submission")

COMMANDS = ("check", "prepare", "generate", "train", "evaluate", "run", "sweep", "serve")
# Ray's own limit for an uploaded working directory.
MAX_BUNDLE_BYTES = 100 * 1024 * 1024
_CONFIG = "config.yaml"
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
_ORIGIN_VARIABLE = "TUNELOOP_ORIGIN"
# Holds a password.
_REVIEW_VARIABLE = "TUNELOOP_REVIEW_URL"
_ANSWER_WITHIN_S = 10.0
_ASK_EVERY_S = 1.0
# In a row, while a job is waited for: a head that is restarted comes back.
_MOST_FAILURES = 60


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Args:
        exit_code: The exit code of the job's command; 1 when Ray itself stopped it.
    """

    submission_id: str
    status: str
    exit_code: int


def submit(command: str, config_path: str, overrides: Sequence[str], address: str) -> JobResult:
    """Run a command on a cluster as a job and follow its log to the end.

    Args:
        command: One of `COMMANDS`.
        config_path: The YAML, read and validated here before anything is sent.
        overrides: `dotted.key=value`.
        address: URL of the jobs API, `http://HOST:8265`.

    Raises:
        ConfigError: The configuration is wrong, the workspace would vanish with the job, or the
            local files are too large to send.
        ResourceError: No jobs API answers at the address, or it refuses the token.
    """
    if command not in COMMANDS:
        raise ConfigError.of(
            "this command cannot be submitted", got=command, allowed=", ".join(COMMANDS)
        )
    config = load_config(config_path, overrides)
    refuse_fleeting_workspace(config)
    with _only_address(address):
        client = _client(address)
    with tempfile.TemporaryDirectory(prefix="tuneloop-bundle-") as folder:
        bundle = Path(folder)
        num_files, num_bytes = write_bundle(config, bundle, command)
        logger.info("bundle: %s, %.1f MiB", counted(num_files, "file"), num_bytes / 2**20)
        submission_id = client.submit_job(
            entrypoint=f"python3 -m tuneloop.cli {command} {_CONFIG}",
            runtime_env={
                "working_dir": str(bundle),
                "py_modules": [str(Path(__file__).parent)],
                # What a report advises is done here, not in the job's directory.
                "env_vars": {_ORIGIN_VARIABLE: json.dumps(config.origin)},
            },
            metadata={"tuneloop_command": command, "tuneloop_name": config.name},
        )
    logger.info("job %s submitted to %s", submission_id, address)
    try:
        return _await_end(client, submission_id)
    except KeyboardInterrupt:
        logger.warning(
            "the job continues; `ray job logs --follow %s` shows it, `ray job stop %s` ends it",
            submission_id,
            submission_id,
        )
        raise


def in_job_directory() -> bool:
    """Return whether this program runs as a job, in the directory that Ray unpacked for it."""
    return "runtime_resources" in Path.cwd().parts


def as_submitted(config: TuneloopConfig) -> TuneloopConfig:
    """Return the configuration of a job, which knows the file that it was submitted from."""
    told = os.environ.get(_ORIGIN_VARIABLE)
    return config.read_from(*json.loads(told)) if told else config


def refuse_fleeting_workspace(config: TuneloopConfig) -> None:
    """Fail if the workspace is relative: Ray removes a job's directory after the job.

    Raises:
        ConfigError: The workspace is a relative path.
    """
    if "://" in config.workspace or Path(config.workspace).expanduser().is_absolute():
        return
    raise ConfigError.of(
        "the results would vanish with the job",
        where="workspace",
        got=f"{config.workspace}, in the job's own directory, which Ray removes",
        allowed="an absolute path that every node of the cluster shares",
        remedy="for example workspace=/shared/tuneloop",
    )


@dataclass
class _Named:
    """A setting that may name files of this machine.

    Args:
        where: Its dotted key.
        holder: What has it, as it is written for the job.
        key: Of the setting in the holder.
        files: What goes with the job, with its place there; directories as a whole.
        place: What the setting names there.
    """

    where: str
    holder: dict[str, Any]
    key: str
    files: list[tuple[Path, Path]] = field(default_factory=list)
    place: Path | None = None

    @property
    def path(self) -> str:
        return str(self.holder[self.key])

    @property
    def num_bytes(self) -> int:
        return sum(_num_bytes(file) for file, _ in self.files)

    def send(self, place: Path) -> None:
        """Let the file or directory go with the job, if there is one."""
        file = Path(self.path).expanduser()
        if file.exists():
            self.files, self.place = [(file, place)], place


def write_bundle(config: TuneloopConfig, folder: Path, command: str = "run") -> tuple[int, int]:
    """Write the configuration, and the local files that a command needs of it, into a folder.

    Where they are larger than `MAX_BUNDLE_BYTES` together, those that are named from the root stay
    here, the largest first: the cluster has to see them there.

    Returns:
        Number of files and bytes.

    Raises:
        ConfigError: A relative path leads nowhere or is not sent, or the files are too large;
            nothing was copied.
        DataError: A source has no file that can be read.
    """
    raw = config.model_dump(mode="json", exclude_none=True)
    # The job runs on the cluster it was submitted to; its address from here means nothing there.
    raw["resources"].pop("ray_address", None)
    if config.data.fixes is True and os.environ.get(_REVIEW_VARIABLE):
        logger.warning(
            "%s is not sent with a job: where the cluster does not set it, people's marks are left "
            "out; `tuneloop fixes CONFIG --output FILE` and data.fixes=FILE send them",
            _REVIEW_VARIABLE,
        )
    models, single = _models(raw, command), _single_files(raw)
    _refuse_missing(config, command, models, single)
    sources = _sources(config, raw)
    for number, named in enumerate(models):
        same = next((other for other in models[:number] if other.path == named.path), None)
        if same is None:
            folder_of = Path(f"model-{number}" if number else "model")
            named.send(folder_of / Path(named.path).name)
        else:  # an arm may name the base model: it has to be the same one there
            named.place = same.place
    for named, place in single:
        named.send(place)
    modules = [(module, module) for module in _own_modules(config)]
    sent = [*sources, *models, *(named for named, _ in single)]
    sent = _without_too_large(sent, sum(_num_bytes(module) for module, _ in modules))
    for named in sent:
        if named.place is not None:
            named.holder[named.key] = str(named.place)
    for source, target in [*modules, *(file for named in sent for file in named.files)]:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, folder / target, ignore=_left_out, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, folder / target)
    (folder / _CONFIG).write_text(to_yaml(raw), encoding="utf-8")
    files = [file for file in folder.rglob("*") if file.is_file()]
    return len(files), sum(file.stat().st_size for file in files)


def _sources_of(config: TuneloopConfig) -> dict[str, Sequence[SourceConfig]]:
    """Return all sources by their key."""
    return {
        "data.sources": config.data.sources,
        "data.decontamination.sources": config.data.decontamination.sources,
        "generation.sources": config.generation.sources if config.generation else [],
        "evaluation.sources": config.evaluation.sources,
    }


def _sources(config: TuneloopConfig, raw: dict[str, Any]) -> list[_Named]:
    """Return the sources on this machine, with the files that they read."""
    found: list[_Named] = []
    number = -1
    for key, sources in _sources_of(config).items():
        for index, source in enumerate(sources):
            number += 1
            path, where = Path(source.path).expanduser(), f"{key}.{index}"
            if _is_shared(source.path) or not _is_here(path):
                continue
            written: Any = raw
            for part in key.split("."):
                written = written[part]
            # What is before the first wildcard or column belongs to this machine; the rest is kept.
            target, fixed = Path("data") / str(number), _fixed_part(path)
            files = [(f, target / f.relative_to(fixed)) for f in _files_of(source, index, where)]
            place = target / path.relative_to(fixed)
            found.append(_Named(f"{where}.path", written[index], "path", files, place))
    return found


def _files_of(source: SourceConfig, index: int, where: str) -> list[Path]:
    """Return the files that a source reads, with those that say how to read the others."""
    if not describes_itself(source):
        return [Path(f.name).expanduser() for f in find_source(source, index, where)]
    folder = Path(source.path).expanduser()
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and file.suffix.lower() in (*TABLES, *DOCUMENTS, *COMPRESSIONS)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def _models(raw: dict[str, Any], command: str) -> list[_Named]:
    """Return the settings that name a base model which a command loads."""
    found = [_Named("model.base", raw["model"], "base")]
    served = raw["serving"]["models"] if command == "serve" else {}
    found += [_Named(f"serving.models.{name}", served, name) for name in served]
    arms = raw["evaluation"]["arms"] if command == "evaluate" else {}
    found += [
        _Named(f"evaluation.arms.{name}.model", arm, "model")
        for name, arm in arms.items()
        if isinstance(arm.get("model"), str) and "endpoint" not in arm
    ]
    ours = (BASE, FINETUNED)
    return found[:1] + [
        one for one in found[1:] if one.path not in ours and not one.path.startswith("models/")
    ]


def _single_files(raw: dict[str, Any]) -> list[tuple[_Named, Path]]:
    """Return the settings that name one file, each with its place in the job."""
    found = [
        (
            _Named(f"evaluation.arms.{name}.answers", arm, "answers"),
            Path("answers") / f"{name}.jsonl",
        )
        for name, arm in raw["evaluation"]["arms"].items()
        if "answers" in arm
    ]
    marks, template = raw["data"]["fixes"], Path(raw["model"]["chat_template"])
    if isinstance(marks, str):
        named = _Named("data.fixes", raw["data"], "fixes")
        found.append((named, Path("marks") / Path(marks).name))
    # The names of those that are built in have no suffix.
    if template.suffix or template.expanduser().is_file():
        named = _Named("model.chat_template", raw["model"], "chat_template")
        found.append((named, Path("model") / template.name))
    return found


def _own_modules(config: TuneloopConfig) -> list[Path]:
    """Return the modules and packages of this directory that scorers and tags need."""
    e = config.evaluation
    dotted = [*(metric.name.rpartition("/")[2] for metric in e.metrics), *e.tags]
    modules = [path.rpartition(".")[0] for path in dotted if "." in path]
    needed = [file.parts[0].removesuffix(".py") for m in modules for file in own_files(m, Path())]
    names = dict.fromkeys([*(module.partition(".")[0] for module in modules), *needed])
    files = [Path(f"{name}.py") if Path(f"{name}.py").is_file() else Path(name) for name in names]
    return [file for file in files if file.exists()]


def _without_too_large(named: list[_Named], others: int) -> list[_Named]:
    """Return what is sent, without what is too large and named from the root.

    Args:
        others: Bytes that are sent beside it.

    Raises:
        ConfigError: The rest is too large.
    """
    # A file that two sections name is sent for each.
    while (total := others + sum(one.num_bytes for one in named)) > MAX_BUNDLE_BYTES:
        largest = max(named, key=lambda one: (Path(one.path).is_absolute(), one.num_bytes))
        if not Path(largest.path).is_absolute() or not largest.num_bytes:
            files = [file for one in named for file, _ in one.files]
            raise ConfigError.of(
                "the job's bundle would be too large",
                where=str(max(files, key=_num_bytes, default="evaluation.metrics")),
                got=f"{total / 2**20:,.0f} MiB",
                allowed=f"{MAX_BUNDLE_BYTES / 2**20:.0f} MiB",
                remedy="put it where every node of the cluster sees it, and name it from the root; "
                "rows also as s3:// or gs://",
            )
        logger.warning("%s is too large to send: every node has to see it there", largest.path)
        named = [one for one in named if one.path != largest.path]
    return named


def _refuse_missing(
    config: TuneloopConfig,
    command: str,
    models: Sequence[_Named],
    single: Sequence[tuple[_Named, Path]],
) -> None:
    """Raise ConfigError for relative paths that lead nowhere in the job.

    They lead nowhere here, or what they name is not sent. One from the root may be on storage that
    only the cluster has.
    """
    here = f"relative paths start from {Path.cwd()}; a path of the cluster's begins with /"
    missing = [
        Problem("no such file to send", f"{key}.{number}.path", source.path, remedy=here)
        for key, sources in _sources_of(config).items()
        for number, source in enumerate(sources)
        if not _is_shared(source.path)
        and not Path(source.path).expanduser().is_absolute()
        and not _is_here(Path(source.path))
        and repository_of(source, (*TABLES, *DOCUMENTS, *COMPRESSIONS)) is None
    ]
    missing += [
        Problem("no such file to send", named.where, named.path, remedy=here)
        for named, _ in single
        if not Path(named.path).expanduser().is_file()
        and (named.key == "answers" or not Path(named.path).is_absolute())
    ]
    missing += [
        Problem("no such model to send", named.where, named.path, remedy=here)
        for named in models
        if named.path.startswith(".") or named.path.endswith(".gguf")
        if not Path(named.path).expanduser().exists() and not Path(named.path).is_absolute()
    ]
    missing += [
        Problem(
            "this file is not sent with a job",
            where=where,
            got=path,
            allowed="a path from the root, which every node of the cluster sees",
            remedy="put it there, with the files that it names",
        )
        for where, path in _staying(config, command)
        if Path(path).exists() and not Path(path).is_absolute()
    ]
    ConfigError.refuse(missing)


def _staying(config: TuneloopConfig, command: str) -> Iterator[tuple[str, str]]:
    """Yield settings of which a command needs the files, and their paths, that are never sent."""
    if command in ("serve", "check") and config.serving.api_keys_file:
        yield "serving.api_keys_file", config.serving.api_keys_file
    forgetting = config.evaluation.forgetting
    if forgetting is not None and command in ("run", "evaluate", "check"):
        for number, task in enumerate(forgetting.tasks):
            if task.endswith((".yaml", ".yml")):
                yield f"evaluation.forgetting.tasks.{number}", task
    if config.sweep is not None and command in ("sweep", "check"):
        for key, values in config.sweep.parameters.items():
            for value in (values if isinstance(values, list) else values.choice) or []:
                if key.endswith((".path", ".base", ".chat_template", ".fixes")):
                    yield f"sweep.parameters.{key}", str(value)


def _is_here(path: Path) -> bool:
    """Return whether a path, or a pattern, leads to something; a name may hold brackets."""
    return path.exists() or bool(glob.glob(str(path), recursive=True))


def _is_shared(path: str) -> bool:
    return "://" in path or path.startswith("docstrings:")


def _fixed_part(path: Path) -> Path:
    """Return the directory that a pattern starts from; a folder `lang=en` is a column of rows."""
    parts = path.parts[:-1]
    for number, part in enumerate(parts):
        if glob.has_magic(part) or "=" in part:
            return Path(*parts[:number])
    return Path(*parts)


def _left_out(folder: str, names: list[str]) -> set[str]:
    """Return the names in a directory that stay here: hidden ones, links to folders or nothing."""
    paths = {name: Path(folder, name) for name in names}
    return {
        name
        for name, path in paths.items()
        if name.startswith(".")
        or name == "__pycache__"
        or not path.exists()
        or (path.is_symlink() and path.is_dir())
    }


def _num_bytes(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    total = 0
    for folder, folders, files in os.walk(path):
        folders[:] = set(folders) - _left_out(folder, folders)
        sent = set(files) - _left_out(folder, files)
        total += sum(Path(folder, name).stat().st_size for name in sent)
    return total


@contextlib.contextmanager
def _only_address(address: str) -> Iterator[None]:
    """Let this address win: Ray prefers the one in the environment."""
    before = os.environ.get(_ADDRESS_VARIABLE)
    os.environ[_ADDRESS_VARIABLE] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ADDRESS_VARIABLE]
        else:
            os.environ[_ADDRESS_VARIABLE] = before


def _client(address: str) -> JobSubmissionClient:
    _refuse_other_server(address)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        client.list_jobs()
        return client
    except AuthenticationError as error:
        raise ResourceError.of(
            "the cluster asks for its token",
            where=address,
            got=str(error).partition(".")[0],
            remedy="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what "
            "`ray get-auth-token` prints on the head",
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_jobs_api(address, str(error)) from error


def _refuse_other_server(address: str) -> None:
    """Fail within seconds unless a Ray dashboard answers; Ray's own client would wait for ever."""
    import httpx

    try:
        # A cluster with a token refuses here already, and Ray's own client tells why.
        answer = httpx.get(f"{address.rstrip('/')}/api/version", timeout=_ANSWER_WITHIN_S)
        if answer.status_code not in (401, 403):
            answer.raise_for_status().json()["ray_version"]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _no_jobs_api(address, reason) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _no_jobs_api(address, "another server answers there") from error


def _no_jobs_api(address: str, reason: str) -> ResourceError:
    return ResourceError.of(
        "no Ray jobs API answers",
        where="--address or RAY_API_SERVER_ADDRESS",
        got=f"{address}: {reason.splitlines()[0] if reason else 'no answer'}",
        allowed="http://HOST:8265, the dashboard address of a Ray head",
        remedy="start one with `ray start --head`, or open a tunnel with "
        "`ray dashboard cluster.yaml`",
    )


def _await_end(client: JobSubmissionClient, submission_id: str) -> JobResult:
    """Follow the job's log and return how it ended.

    Raises:
        ResourceError: The jobs API does not answer any more. The job may go on.
    """
    from aiohttp import ClientError

    try:
        asyncio.run(_follow(client, submission_id))
    except (OSError, RuntimeError, ClientError) as error:
        logger.warning("the log stream broke (%s); waiting for the job to end", error)
    num_failed = 0
    while True:
        try:
            details = client.get_job_info(submission_id)
        except (OSError, RuntimeError) as error:
            num_failed += 1
            if num_failed > _MOST_FAILURES:
                raise ResourceError.of(
                    "the jobs API does not answer any more; the job may go on",
                    where=submission_id,
                    got=(str(error).splitlines() or [type(error).__name__])[0],
                    remedy=f"`ray job status {submission_id}` says how it ended",
                ) from error
        else:
            num_failed = 0
            if details.status.is_terminal():
                break
        time.sleep(_ASK_EVERY_S)
    exit_code = details.driver_exit_code
    if details.status.value == "SUCCEEDED":
        exit_code = 0
    elif exit_code not in (1, 2):
        logger.error("job %s: %s", submission_id, details.message)
        exit_code = 1
    return JobResult(submission_id, str(details.status.value), int(exit_code))


async def _follow(client: JobSubmissionClient, submission_id: str) -> None:
    async for piece in client.tail_job_logs(submission_id):
        sys.stderr.write(piece)
        sys.stderr.flush()
