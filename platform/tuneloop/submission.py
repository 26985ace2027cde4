"""Any command as a Ray job: a clean bundle, live logs, the job's exit code.

The bundle holds the configuration, and the local source files, marks and model it names, nothing
else of the current directory: no `.git`, no workspace, no secrets. This version of the tuneloop
package goes with it, so the cluster runs the code that was submitted.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tuneloop.config import TuneloopConfig, load_config
from tuneloop.data.sources.files import COMPRESSIONS, DOCUMENTS, TABLES
from tuneloop.data.sources.splits import repository_of
from tuneloop.errors import ConfigError, Problem, ResourceError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

logger = logging.getLogger("tuneloop.submission")

COMMANDS = ("check", "prepare", "generate", "train", "evaluate", "run", "sweep", "serve")
# Ray's own limit for an uploaded working directory.
MAX_BUNDLE_BYTES = 100 * 1024 * 1024
_CONFIG = "config.yaml"
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
_ANSWER_WITHIN_S = 10.0
_ASK_EVERY_S = 1.0


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
        num_files, num_bytes = write_bundle(config, bundle)
        logger.info(
            "bundle: %d file%s, %.1f MiB", num_files, "s" * (num_files > 1), num_bytes / 2**20
        )
        submission_id = client.submit_job(
            entrypoint=f"python3 -m tuneloop.cli {command} {_CONFIG}",
            runtime_env={
                "working_dir": str(bundle),
                "py_modules": [str(Path(__file__).parent)],
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


def write_bundle(config: TuneloopConfig, folder: Path) -> tuple[int, int]:
    """Write the configuration and its local source files into a folder.

    Returns:
        Number of files and bytes.

    Raises:
        ConfigError: A relative path leads nowhere, or together the files are larger than
            `MAX_BUNDLE_BYTES`; nothing was copied.
    """
    raw = config.model_dump(mode="json", exclude_none=True)
    # The job runs on the cluster it was submitted to; its address from here means nothing there.
    raw["resources"].pop("ray_address", None)
    plan: list[tuple[Path, Path]] = []
    evaluations = raw["data"]["decontamination"]["sources"]
    documents = raw.get("generation", {}).get("sources", [])
    scored = raw["evaluation"]["sources"]
    sources = [*raw["data"]["sources"], *evaluations, *documents, *scored]
    _refuse_missing(config)
    for number, source in enumerate(sources):
        source["path"] = _expanded(source["path"])
        files = [Path(name) for name in sorted(glob.glob(source["path"], recursive=True))]
        if not files or _is_shared(source["path"]):
            continue
        # What is before the first wildcard or column belongs to this machine; the rest is kept.
        fixed = _fixed_part(Path(source["path"]))
        target = Path("data") / str(number)
        plan += [(file, target / file.relative_to(fixed)) for file in files if not file.is_dir()]
        plan += [
            (file, target / file.relative_to(fixed))
            for file in files
            if file.is_dir() and file == Path(source["path"])
        ]
        source["path"] = str(target / Path(source["path"]).relative_to(fixed))
    for name, arm in raw["evaluation"]["arms"].items():
        if "answers" in arm:
            target = Path("answers") / f"{name}.jsonl"
            plan.append((Path(arm["answers"]).expanduser(), target))
            arm["answers"] = str(target)
    if isinstance(config.data.fixes, str) and Path(config.data.fixes).is_file():
        target = Path("marks") / Path(config.data.fixes).name
        plan.append((Path(config.data.fixes), target))
        raw["data"]["fixes"] = str(target)
    base = Path(raw["model"]["base"]).expanduser()
    if base.exists():
        plan.append((base, Path("model") / base.name))
        raw["model"]["base"] = str(Path("model") / base.name)
    template = Path(raw["model"]["chat_template"]).expanduser()
    if template.is_file():
        plan.append((template, Path("model") / template.name))
        raw["model"]["chat_template"] = str(Path("model") / template.name)
    # A file that two sections name is sent for each.
    sizes = [_num_bytes(source) for source, _ in plan]
    if sum(sizes) > MAX_BUNDLE_BYTES:
        largest, _ = plan[sizes.index(max(sizes))]
        raise ConfigError.of(
            "the job's bundle would be too large",
            where=str(largest),
            got=f"{sum(sizes) / 2**20:,.0f} MiB",
            allowed=f"{MAX_BUNDLE_BYTES / 2**20:.0f} MiB",
            remedy="put it where the cluster can read it (s3://, gs://, a Hub id) and name "
            "that in the configuration",
        )
    for source, target in plan:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, folder / target, ignore=_left_out)
        else:
            shutil.copyfile(source, folder / target)
    (folder / _CONFIG).write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    files = [file for file in folder.rglob("*") if file.is_file()]
    return len(files), sum(file.stat().st_size for file in files)


def _refuse_missing(config: TuneloopConfig) -> None:
    """Raise ConfigError for relative paths that lead nowhere here: they will not there either.

    One from the root may be on storage that only the cluster has.
    """
    keys: dict[str, list[Any]] = {
        "data.sources": list(config.data.sources),
        "data.decontamination.sources": config.data.decontamination.sources,
        "generation.sources": config.generation.sources if config.generation else [],
        "evaluation.sources": list(config.evaluation.sources),
    }
    here = f"relative paths start from {Path.cwd()}; a path of the cluster's begins with /"
    missing = [
        Problem("no such file to send", f"{key}.{number}.path", source.path, remedy=here)
        for key, sources in keys.items()
        for number, source in enumerate(sources)
        if not _is_shared(source.path)
        and not Path(source.path).expanduser().is_absolute()
        and not glob.glob(source.path, recursive=True)
        and repository_of(source, (*TABLES, *DOCUMENTS, *COMPRESSIONS)) is None
    ]
    missing += [
        Problem("no such file to send", f"evaluation.arms.{name}.answers", arm.answers, remedy=here)
        for name, arm in config.evaluation.arms.items()
        if arm.answers and not Path(arm.answers).expanduser().is_file()
    ]
    fixes = config.data.fixes
    if isinstance(fixes, str) and not Path(fixes).is_absolute() and not Path(fixes).is_file():
        missing.append(Problem("no such file to send", "data.fixes", fixes, remedy=here))
    base = config.model.base
    if base.startswith(".") and not Path(base).exists():
        missing.append(Problem("no such model to send", "model.base", base, remedy=here))
    ConfigError.refuse(missing)


def _expanded(path: str) -> str:
    return path if _is_shared(path) else str(Path(path).expanduser())


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
        if name.startswith(".") or not path.exists() or (path.is_symlink() and path.is_dir())
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
    """Follow the job's log and return how it ended."""
    try:
        asyncio.run(_follow(client, submission_id))
    except (OSError, RuntimeError) as error:
        logger.warning("the log stream broke (%s); waiting for the job to end", error)
    details = client.get_job_info(submission_id)
    while not details.status.is_terminal():
        time.sleep(_ASK_EVERY_S)
        details = client.get_job_info(submission_id)
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
