"""The only place that starts or joins Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ray
import ray.data
from ray.util import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_jobs
from ray.util.state.exception import RayStateApiException

from tuneloop.config import ResourcesConfig
from tuneloop.errors import Problem, ResourceError, UserError
from tuneloop.text import counted

logger = logging.getLogger("tuneloop.cluster")

WAITING_LOG_EVERY_S = 15.0
# Prefix of the names of our Serve applications; the rest is the Ray job that serves.
_SERVED = "tuneloop-"
_LOOPBACK = "127.0.0.1"
# The most that Ray's state API returns.
_MOST_JOBS = 10_000


@contextlib.contextmanager
def connect(resources: ResourcesConfig) -> Iterator[None]:
    """Join the cluster at `resources.ray_address` or RAY_ADDRESS, else run a local Ray meanwhile.

    A local Ray listens on 127.0.0.1 only, and its processes end with this context, also when the
    process is killed. A cluster that was joined is left running.

    Raises:
        ResourceError: Nothing answers at the address, or Ray cannot start.
    """
    # Notices about defaults; failures come as exceptions.
    logging.getLogger("ray").setLevel(logging.ERROR)
    # What workers print goes to Ray's log files: each room logs its own progress, and failures
    # come back as exceptions. `-v` shows all of it.
    log_to_driver = logger.isEnabledFor(logging.DEBUG)
    address = resources.cluster_address
    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            _refuse_dead_address(address)
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=log_to_driver)
            logger.info("joined the Ray cluster at %s", address)
        else:
            # A local Ray loses no node to preemption: it needs no actor that watches for it.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            ray.init(
                address="local",
                num_cpus=resources.num_cpus,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=log_to_driver,
            )
            _refuse_open_ports()
            logger.info("started a local Ray with %g CPUs", ray.cluster_resources().get("CPU", 0))
    except UserError:
        raise
    # A bare Exception is what comes when a node takes more than 30 s to start.
    except Exception as error:
        remedy = "wait until other programs leave it some CPU and run the same command again"
        if address:
            remedy = "`ray status` shows its state; without RAY_ADDRESS a local Ray is started"
        raise ResourceError.of(
            "cannot reach Ray" if address else "cannot start Ray",
            where=address or "this machine",
            got=str(error).partition("\n")[0],
            remedy=remedy,
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray replaces the handler by one that aborts the process with a stack trace.
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        _set_up_data()
        if address:
            end_abandoned_serving()
        yield
    finally:
        ray.shutdown()


def served_name() -> str:
    """Return the name of this program's Serve application, which carries its Ray job."""
    return f"{_SERVED}{ray.get_runtime_context().get_job_id()}"


def end_abandoned_serving() -> None:
    """Shut down what a killed tuneloop program still serves.

    On a cluster Serve outlives the program that started it, and its models keep their CPUs.
    """
    from ray import serve

    running = {name.removeprefix(_SERVED) for name in serve.status().applications}
    if not running:
        return
    # Of the cluster joined here: without an address Ray looks for any on this machine.
    address = ray.get_runtime_context().gcs_address
    try:
        jobs = list_jobs(address, limit=_MOST_JOBS)
        dead = {job.job_id for job in jobs if job.status.is_terminal()}
    except RayStateApiException as error:
        # Only the cluster's dashboard knows whose program has ended.
        logger.debug("cannot list the jobs of the cluster: %s", error)
        return
    if running <= dead:
        logger.warning("shutting down what a killed run still serves")
        serve.shutdown()


def _refuse_open_ports() -> None:
    """Fail if the local Ray has another address than 127.0.0.1: it listens on all interfaces then.

    `tuneloop/__init__.py` sets what keeps it there; Ray reads that when it is imported.
    """
    (node,) = ray.nodes()
    if node["NodeManagerAddress"] != _LOOPBACK:
        ray.shutdown()
        raise ResourceError.of(
            "the local Ray would listen on all network interfaces",
            where="this machine",
            got=f"address {node['NodeManagerAddress']}",
            allowed=_LOOPBACK,
            remedy="import tuneloop before ray, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0; "
            "to use a cluster of several machines, start it with `ray start` and set "
            "RAY_ADDRESS",
        )


def _set_up_data() -> None:
    """Keep blocks in order, without Ray Data's own progress bars and plan dumps."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A resumed run finds the blocks of a killed one only if rows are cut as before.
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def await_cpu() -> None:
    """Return as soon as a task can run, and log meanwhile what it waits for.

    Ray itself waits silently, and for ever if no node has a CPU.

    Raises:
        ResourceError: No node has a CPU for tasks.
    """
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    if max(nodes, default=0) < 1:
        raise ResourceError.of(
            "no node of the cluster has a CPU for tasks",
            where="the cluster",
            got=f"{counted(len(nodes), 'node')} with {sum(nodes):g} CPUs",
            allowed="at least one node with a whole CPU",
            remedy="start a worker node: `ray start --address=HEAD:PORT`",
        )
    # A task asks: an idle worker's lease is returned late, so counting free CPUs misleads.
    probe = ray.remote(num_cpus=1)(_exist).remote([])
    while not ray.wait([probe], timeout=WAITING_LOG_EVERY_S)[0]:
        logger.warning("waiting for a CPU: %s", _occupation())


class WaitingNotice:
    """Logs, while work makes no progress, what its workers wait for."""

    def __init__(self) -> None:
        self.logged, self.progress = time.monotonic(), -1

    def tell(self, progress: int) -> None:
        """Log what is waited for if `progress` has not changed for some seconds."""
        if time.monotonic() - self.logged < WAITING_LOG_EVERY_S:
            return
        self.logged, stalled, self.progress = time.monotonic(), progress == self.progress, progress
        if stalled and (waiting := unplaced_workers()):
            logger.warning("waiting for room for %s", waiting)


def unplaced_workers() -> str:
    """Return what worker groups wait for that no node can take now; empty if none waits."""
    waiting = [
        bundle
        for group in placement_group_table().values()
        if group["state"] == "PENDING"
        for bundle in group["bundles"].values()
    ]
    if not waiting:
        return ""
    requested = [
        f"{total:g} {name}{'s' * (total != 1)}"
        for name in ("CPU", "GPU")
        if (total := sum(bundle.get(name, 0) for bundle in waiting))
    ]
    return f"{counted(len(waiting), 'worker')} with {' and '.join(requested)}; {_occupation()}"


def _occupation() -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    states = [
        f"{free.get(name, 0):g} of {total[name]:g} {name}s are free"
        for name in ("CPU", "GPU")
        if total.get(name)
    ]
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    if num_nodes > 1:
        states.append(f"on {num_nodes} nodes together, and a worker needs all of its own on one")
    return ", ".join(states) + "; other work has the rest"


def refuse_unshared(workspace: Path, base: Path) -> None:
    """Fail unless every node that runs work sees the workspace and the base model.

    Args:
        workspace: Local directory that drafts and checkpoints are written to; made if need be.
        base: Directory of the base model.

    Raises:
        ResourceError: With one problem for each of the two that some node does not see.
    """
    driver_node = ray.get_runtime_context().get_node_id()
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
    others = {n["NodeID"]: n["NodeManagerAddress"] for n in nodes if n["NodeID"] != driver_node}
    if not others:
        return
    exist = ray.remote(num_cpus=0)(_exist)
    workspace.mkdir(parents=True, exist_ok=True)
    # Another directory of the same name has no such file.
    with tempfile.NamedTemporaryFile(dir=workspace, prefix=".seen-") as marker:
        answers = [
            exist.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote([marker.name, str(base)])
            for node in others
        ]
        seen_by_node = list(zip(others.values(), ray.get(answers), strict=True))
    problems = []
    for number, (what, path) in enumerate([("the workspace", workspace), ("the base model", base)]):
        blind = [address for address, seen in seen_by_node if not seen[number]]
        if blind:
            problems.append(
                Problem(
                    f"not every node of the cluster sees {what}",
                    where=str(path),
                    got=f"{len(blind)} of {len(seen_by_node)} nodes do not: {', '.join(blind[:3])}",
                    allowed="a directory on a file system that all nodes share",
                    remedy="set `workspace`, and TUNELOOP_CACHE on every node, to such directories",
                )
            )
    ResourceError.refuse(problems)


def _exist(paths: list[str]) -> list[bool]:
    return [Path(path).exists() for path in paths]


def _refuse_dead_address(address: str) -> None:
    """Fail within seconds where Ray would retry for a minute."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ResourceError.of(
            "no Ray cluster answers",
            where="resources.ray_address or RAY_ADDRESS",
            got=f"{address}: {error}",
            allowed="HOST:PORT of a Ray head, for example 127.0.0.1:6379",
            remedy="start one with `ray start --head`, or unset the address for a local Ray",
        ) from error
