"""vLLM's own OpenAI server as a child process that ends with the process that started it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil

from tuneloop.errors import ModelError
from tuneloop.models.bases.source import cache_directory
from tuneloop.serving.model import num_threads
from tuneloop.serving.vllm.environment import Installed

_log = logging.getLogger("tuneloop.serving")

_POLL_S = 0.1
_STOP_WITHIN_S = 10.0
_NUM_LOGS = 20
_FOLDER = "tuneloop-vllm-"
# Stands between us and the server. It asks the kernel to be told when we are gone, however we went,
# and then ends the server. Ray kills the children of a worker that ends, this one among them, but
# not their children: the server has asked the same, and ends its workers, which would be left else.
_KEEPER = """
import ctypes, os, signal, subprocess, sys
libc = ctypes.CDLL(None)
follow = lambda: libc.prctl(1, signal.SIGTERM)
follow()
if os.getppid() == int(sys.argv[1]):
    server = subprocess.Popen([sys.executable, *sys.argv[2:]], preexec_fn=follow)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    sys.exit(server.wait())
"""
_SERVER = ("-I", "-m", "vllm.entrypoints.openai.api_server")
# Of our process and not for it: paths of our packages, Ray's one thread for each worker, keys.
_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "OMP_NUM_THREADS", "VLLM_API_KEY", "TUNELOOP_API_KEY")
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_CPU_ENVIRONMENT = {
    # Otherwise the first request with log-probabilities waits half a minute for a C++ compiler.
    "TORCH_COMPILE_DISABLE": "1",
    # Otherwise all models are bound to the same cores, and one core to none.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Threads that wait for each other sleep after a millisecond: other models need the core.
    "KMP_BLOCKTIME": "1",
}


class VllmProcess:
    """A running server, reached through a socket that only this user can open.

    Start it from a thread that lives as long as the server is to live: the kernel takes the end of
    that thread for the end of the parent.

    Args:
        arguments: Of the server, without its address.
        name: Of the log file.

    Attributes:
        log_file: What the server writes. The newest logs are kept.
    """

    def __init__(self, installed: Installed, arguments: Sequence[str], name: str) -> None:
        _remove_abandoned()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))
        self.socket = str(self._folder / "socket")
        self.log_file = _new_log(name)
        environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        environment |= _ENVIRONMENT
        if installed.device == "cpu":
            environment |= _CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(num_threads())}
        command = [str(installed.python), "-I", "-c", _KEEPER, str(os.getpid()), *_SERVER]
        command += ["--uds", self.socket, "--disable-uvicorn-access-log", *arguments]
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def has_ended(self) -> bool:
        """Whether the server runs no more."""
        return self._process.poll() is not None

    def wait_until_ready(self) -> None:
        """Return when the server answers.

        Raises:
            ModelError: It ended instead.
        """
        transport = httpx.HTTPTransport(uds=self.socket)
        with httpx.Client(transport=transport, base_url="http://vllm", timeout=5) as client:
            while not self.has_ended:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").is_success:
                        return
                time.sleep(_POLL_S)
        raise self.failure("vLLM cannot serve the model")

    def failure(self, what: str) -> ModelError:
        """Return the error that tells what the server said last."""
        return ModelError.of(
            what,
            where=str(self.log_file),
            got=_last_error(self.log_file),
            remedy="read the log; or set serving.engine=auto",
        )

    def stop(self) -> None:
        """End the server and what it started."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            _log.warning("vLLM does not end by itself and is killed")
        # Its workers are in its session, which is this child's alone; mostly they are gone.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _remove_abandoned() -> None:
    """Remove the folders of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*-*"):
        owner = folder.name.removeprefix(_FOLDER).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _new_log(name: str) -> Path:
    folder = cache_directory().parent / "engines" / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob("vllm-*.log"), key=lambda file: file.stat().st_mtime)[
        :-_NUM_LOGS
    ]:
        old.unlink(missing_ok=True)
    safe = re.sub(r"[^\w.-]", "-", name)
    return folder / f"vllm-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{safe}.log"


def _last_error(log_file: Path) -> str:
    """Return the exception that a log ends with: the root cause stands above what followed it."""
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [m[0] for line in lines if (m := re.search(r"\b\w*(Error|Exception): .+", line))]
    told = [text for text in found if "root cause" not in text and "EngineDead" not in text]
    return (told or found or lines or ["nothing"])[-1][:500]
