"""A cluster of several nodes on this machine, for the tests that need one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TrainingConfig
from tuneloop.models.bases.source import BaseModel
from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import Message

# Ray takes 127.0.0.1 for this machine's address where it is told that clusters are not wanted (as
# on macOS), and refuses worker nodes there; so only the command itself is told that they are.
RAY = """
from ray._private import ray_constants, services
ray_constants.ENABLE_RAY_CLUSTER = True
services.get_node_ip_address = lambda address=None: "127.0.0.1"
from ray.scripts.scripts import main
main()
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start what takes longest first: at the end both processes share out the unit tests."""
    items.sort(key=lambda item: Path(__file__).parent not in item.path.parents)


@dataclass
class Nodes:
    """A head that takes no work and worker nodes of one CPU each, all on 127.0.0.1.

    Every node is a `ray start --block` of its own, with its own raylet; a token is asked for.
    """

    folder: Path
    token: str = "0123456789abcdef0123456789abcdef"
    port: int = 0
    url: str = ""
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What the nodes and every client of theirs run with."""
        own = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            # A lost node is noticed after two seconds instead of fifteen.
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "4",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        # As in an activated environment: a job's program is found as `python3`.
        own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return kept | own

    def start_head(self) -> None:
        """Start the head, and return when it answers."""

        def arguments() -> list[str]:
            self.port, dashboard, client = (self.free_port() for _ in range(3))
            self.url = f"http://127.0.0.1:{dashboard}"
            return [
                "--head",
                f"--port={self.port}",
                "--num-cpus=0",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={client}",
                f"--temp-dir={self.folder}",
            ]

        self._start(arguments)

    def start_worker(self) -> None:
        """Start a worker node, and return when the head knows it."""

        def arguments() -> list[str]:
            # A directory of its own, as on a machine of its own: Ray unpacks a job's bundle once
            # for each node, over what is there, which may be what another node's process is in.
            own = f"--temp-dir={tempfile.mkdtemp(prefix='node-', dir=self.folder)}"
            return [f"--address=127.0.0.1:{self.port}", "--num-cpus=1", own]

        self._start(arguments)

    def await_alive(self) -> None:
        """Return when all nodes that were started are alive, and no other one."""
        deadline = time.monotonic() + 120
        while len(self._alive()) != len(self.started):
            assert time.monotonic() < deadline, (
                f"{len(self._alive())} nodes of {len(self.started)}: {self.log}"
            )
            assert all(node.poll() is None for node in self.started), self.log
            time.sleep(0.2)

    @property
    def log(self) -> str:
        """What the nodes printed."""
        return (self.folder / "nodes.log").read_text()

    def rows(self, what: str) -> list[dict[str, Any]]:
        """Return what the state API knows: `nodes`, `actors`, …"""
        answer = httpx.get(
            f"{self.url}/api/v0/{what}",
            params={"detail": "true"},
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=60,
        )
        return answer.raise_for_status().json()["data"]["result"]["result"]

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `python COMMAND…` as a client of the cluster."""
        settings: dict[str, Any] = {"env": self.environment, "capture_output": True, "text": True}
        return subprocess.run(
            [sys.executable, *command], **settings | options, check=False, timeout=400
        )

    def processes(self) -> list[psutil.Process]:
        """Return all that runs on the nodes."""
        return [process for node in self.started for process in family(node.pid)]

    def processes_of(self, *words: str) -> list[psutil.Process]:
        """Return what runs on the nodes with all these words in its command line."""
        found = []
        for process in self.processes():
            # Some end while they are looked at.
            with contextlib.suppress(psutil.NoSuchProcess):
                if set(words) <= set(process.cmdline()):
                    found.append(process)
        return found

    def kill(self, node: subprocess.Popen) -> None:
        """End a node as a power cut would."""
        self.started.remove(node)
        for process in [psutil.Process(node.pid), *family(node.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        node.wait()

    def stop(self) -> None:
        """End all nodes; what has not ended after a few seconds is killed, as Ray's agents are."""
        everything = self.processes()
        for node in reversed(self.started):
            node.terminate()
        deadline = time.monotonic() + 10
        for node in self.started:
            try:
                node.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()
        _, agents = psutil.wait_procs(everything, timeout=2)
        for process in agents:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    @staticmethod
    def free_port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def _alive(self) -> list[dict[str, Any]]:
        try:
            return [node for node in self.rows("nodes") if node["state"] == "ALIVE"]
        except (httpx.HTTPError, KeyError, TypeError):
            return []

    def _start(self, arguments: Callable[[], list[str]]) -> None:
        """Start a node and wait for it, again with other ports where it ends at once.

        A port that was free when it was looked for may be taken by another process since.
        """
        for attempts_left in (2, 1, 0):
            command = [sys.executable, "-c", RAY, "start", "--block", "--node-ip-address=127.0.0.1"]
            command += [f"--dashboard-agent-listen-port={self.free_port()}", *arguments()]
            with (self.folder / "nodes.log").open("a") as log:
                node = subprocess.Popen(
                    [*command, "--object-store-memory=200000000", "--disable-usage-stats"],
                    env=self.environment,
                    cwd=self.folder,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            self.started.append(node)
            try:
                return self.await_alive()
            except AssertionError:
                if node.poll() is None or not attempts_left:
                    raise
                self.started.remove(node)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head without work and two worker nodes of one CPU."""
    import ray

    # One Ray at a time in a process; the nodes end with the module that uses them.
    ray.shutdown()
    # Sockets lie in there, and their paths have to be short.
    folder = Path(tempfile.mkdtemp(prefix="nodes-"))
    cluster = Nodes(folder)
    try:
        cluster.start_head()
        # One after the other: started together they can take the same names for their sockets.
        cluster.start_worker()
        cluster.start_worker()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def family(pid: int) -> list[psutil.Process]:
    """Return the processes that descend from one."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="session")
def base(tiny_model: Path) -> BaseModel:
    """The tiny model as a base."""
    return BaseModel("tiny", tiny_model, "0" * 64, "none")


@pytest.fixture(scope="session")
def publish_sums() -> Callable[[Workspace, BaseModel], Artifact]:
    """Publish 37 rows for training and 5 for validation, as `prepare` would."""

    def publish(workspace: Workspace, base: BaseModel) -> Artifact:
        renderer = Renderer.load(base.path)
        rows = []
        for number in range(42):
            question = Message("user", f"What comes after {number}? " * (1 + number % 3))
            sample = renderer.sample([question, Message("assistant", f"It is {number + 1}.")])
            rows.append(
                {
                    "row_id": f"row{number}",
                    "input_ids": sample.input_ids,
                    "loss_mask": sample.loss_mask,
                }
            )
        with workspace.draft("datasets", "sums", "d" * 64) as draft:
            for split, part in (("train", rows[:37]), ("validation", rows[37:])):
                (draft.path / split).mkdir()
                pq.write_table(pa.Table.from_pylist(part), draft.path / split / "0.parquet")
            return draft.publish(
                config={"renderer": renderer.hash}, resources={}, inputs=[], metrics={}
            )

    return publish


@pytest.fixture
def train_here(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Train in this process, without Ray, as one worker that nobody stops; return the log."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from tuneloop.training.deepspeed_engine import Execution
    from tuneloop.training.loop import TrainingJob, Worker, train_rows
    from tuneloop.training.rows import open_rows, store_rows

    def call(
        model: Path, workspace: Workspace, dataset: str, training: TrainingConfig
    ) -> list[dict[str, Any]]:
        folders = [tmp_path / name for name in ("model", "checkpoints", "progress")]
        for folder in folders:
            folder.mkdir()
        job = TrainingJob(model, "tiny", "auto", training, *folders, 1000)
        execution = Execution(1, training.global_batch_size, 1)
        worker = Worker(0, execution, torch.device("cpu"), 2, lambda metrics, folder: None)
        path = workspace.open(f"datasets/{dataset}").path
        rows, validation = (
            open_rows(store_rows(path, split, tmp_path / "rows"))
            for split in ("train", "validation")
        )
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
                patch.setenv(name, value)
            result = train_rows(job, rows, worker, validation if len(validation) else None)
        # DeepSpeed's own, which also forgets the groups it keeps: the next training makes new ones.
        deepspeed.comm.destroy_process_group()
        return result.log

    return call
