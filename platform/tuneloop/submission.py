"""Any command as a Ray job: a clean bundle, live logs, the job's exit code.

The bundle holds the configuration, the local source files it names and this version of the
tuneloop package, nothing else of the current directory: no `.git`, no workspace, no secrets.
"""

from __future__ import annotations

import asyncio
import glob
import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from tuneloop.config import TuneloopConfig, load_config
from tuneloop.errors import ConfigError, Problem, ResourceError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

logger = logging.getLogger("tuneloop.submission")

COMMANDS = ("check", "prepare", "train", "evaluate", "run", "sweep", "serve")
# Ray's own limit for an uploaded working directory.
MAX_BUNDLE_BYTES = 100 * 1024 * 1024
_CONFIG = "config.yaml"


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Args:
        exit_code: Of the job's command; 1 when Ray itself stopped it.
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
        address: The jobs API, `http://HOST:8265`.

    Raises:
        ConfigError: Wrong configuration, or a source that exists only on this machine and is too
            large to send.
        ResourceError: Nothing answers at the address.
    """
    if command not in COMMANDS:
        raise ConfigError(
            Problem("this command cannot be submitted", got=command, allowed=", ".join(COMMANDS))
        )
    config = load_config(config_path, overrides)
    client = _client(address)
    with tempfile.TemporaryDirectory(prefix="tuneloop-bundle-") as folder:
        bundle = Path(folder)
        size = write_bundle(config, bundle)
        logger.info("bundle: %d files, %.1f MiB", *size)
        submission_id = client.submit_job(
            entrypoint=f"python -m tuneloop.cli {command} {_CONFIG}",
            runtime_env={
                "working_dir": str(bundle),
                "py_modules": [str(Path(__file__).parent)],
            },
            metadata={"tuneloop_command": command, "tuneloop_name": config.name},
        )
    logger.info("job %s submitted to %s", submission_id, address)
    asyncio.run(_follow(client, submission_id))
    details = client.get_job_info(submission_id)
    exit_code = details.driver_exit_code
    if str(details.status.value) == "SUCCEEDED":
        exit_code = 0
    elif exit_code in (None, 0):
        logger.error("job %s: %s", submission_id, details.message)
        exit_code = 1
    return JobResult(submission_id, str(details.status.value), int(exit_code))


def write_bundle(config: TuneloopConfig, folder: Path) -> tuple[int, int]:
    """Write the configuration and its local source files into a folder.

    Returns:
        Number of files and bytes.

    Raises:
        ConfigError: Together they are larger than `MAX_BUNDLE_BYTES`; nothing was copied.
    """
    raw = config.model_dump(mode="json", exclude_none=True)
    # The job runs on the cluster it was submitted to, wherever that is seen from here.
    raw["resources"].pop("ray_address", None)
    plan: list[tuple[Path, Path]] = []
    for number, source in enumerate(raw["data"]["sources"]):
        files = [Path(name) for name in sorted(glob.glob(source["path"], recursive=True))]
        if not files or _is_shared(source["path"]):
            continue
        target = Path("data") / str(number)
        plan += [(file, target / file.name) for file in files]
        pattern = Path(source["path"]).name
        source["path"] = str(target / (files[0].name if len(files) == 1 else pattern))
    base = Path(raw["model"]["base"]).expanduser()
    if base.exists():
        plan.append((base, Path("model") / base.name))
        raw["model"]["base"] = str(Path("model") / base.name)
    template = Path(raw["model"]["chat_template"])
    if template.is_file():
        plan.append((template, Path("model") / template.name))
        raw["model"]["chat_template"] = str(Path("model") / template.name)
    sizes = {source: _num_bytes(source) for source, _ in plan}
    if sum(sizes.values()) > MAX_BUNDLE_BYTES:
        largest = max(sizes, key=lambda source: sizes[source])
        raise ConfigError(
            Problem(
                "the job's bundle would be too large",
                where=str(largest),
                got=f"{sum(sizes.values()) / 2**20:,.0f} MiB in {len(sizes)} files",
                allowed=f"{MAX_BUNDLE_BYTES / 2**20:.0f} MiB",
                remedy="put it where the cluster can read it (s3://, gs://, a Hub id) and name "
                "that in the configuration",
            )
        )
    for source, target in plan:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, folder / target)
        else:
            shutil.copyfile(source, folder / target)
    (folder / _CONFIG).write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    files = [file for file in folder.rglob("*") if file.is_file()]
    return len(files), sum(file.stat().st_size for file in files)


def _is_shared(path: str) -> bool:
    return "://" in path or path.startswith("docstrings:")


def _num_bytes(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def _client(address: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            Problem(
                "no Ray jobs API answers",
                where="--address or RAY_API_SERVER_ADDRESS",
                got=f"{address}: {str(error).splitlines()[0]}",
                allowed="http://HOST:8265, the dashboard address of a Ray head",
                remedy="start one with `ray start --head`, or open a tunnel with "
                "`ray dashboard cluster.yaml`",
            )
        ) from error


async def _follow(client: JobSubmissionClient, submission_id: str) -> None:
    async for piece in client.tail_job_logs(submission_id):
        sys.stderr.write(piece)
        sys.stderr.flush()
