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
from typing import Any

from tuneloop.config import ResourcesConfig
from tuneloop.errors import Problem, ResourceError, UserError

logger = logging.getLogger("tuneloop.cluster")

WAITING_TOLD_EVERY_S = 15.0
_UNCHANGED_S = 0.01
# What the names of Serve applications begin with; the rest is the Ray job that serves.
_SERVED = "tuneloop-"
# Read by Ray when it starts its processes, some of it when it is imported.
for _key, _value in {
    # Ray's workers are nice by default and starve on a busy small machine.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Threads that wait sleep: spinning ones starve each other where processes share few cores.
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_TRAIN_V2_ENABLED": "1",
    # Ray counts a lost node in for up to 20 s and waits for its workers, by default for a minute;
    # then it counts again. It never gives up, so a node that is slow to come is waited for.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    # Workers that hang on a lost one are not asked to leave politely for half a minute.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    # Tune's newer output prints its tables whatever the verbosity.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Without this Ray hides GPUs from workers that asked for none, and warns about it.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # The controller ends while calls to it are under way, at every end of serving.
    "RAY_DEDUP_LOGS_SKIP_REGEX": r"Task ServeController\.",
}.items():
    os.environ.setdefault(_key, _value)


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
    import ray

    # What workers print goes to Ray's log files: each room tells its progress itself, and failures
    # come back as exceptions. `-v` shows all of it.
    follow = logger.isEnabledFor(logging.DEBUG)
    address = _address(resources)
    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            _refuse_dead_address(address)
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=follow)
            logger.info("joined the Ray cluster at %s", address)
        else:
            # Nobody takes a machine away from a Ray of one's own: no actor need watch for it.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            with _on_loopback(), _nobody_follows(not follow):
                ray.init(
                    address="local",
                    num_cpus=resources.num_cpus,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=follow,
                    _node_ip_address="127.0.0.1",
                )
            logger.info("started a local Ray with %g CPUs", ray.cluster_resources().get("CPU", 0))
    except UserError:
        raise
    # A bare Exception is what comes when a node takes more than 30 s to start.
    except Exception as error:
        remedy = "wait until other programs leave it some CPU and run the same command again"
        if address:
            remedy = "`ray status` shows its state; without RAY_ADDRESS a local Ray is started"
        raise ResourceError(
            Problem(
                "cannot reach Ray" if address else "cannot start Ray",
                where=address or "this machine",
                got=str(error).partition("\n")[0],
                remedy=remedy,
            )
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray replaces the handler by one that aborts the process with a stack trace.
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        _set_up_data()
        _hasten_data()
        if address:
            end_abandoned_serving()
        yield
    finally:
        ray.shutdown()


def joins_cluster(resources: ResourcesConfig) -> bool:
    """Return whether work runs on a cluster that was there already."""
    return _address(resources) is not None


def served_name() -> str:
    """Return what this program's Serve application is called: it tells whose it is."""
    import ray

    return f"{_SERVED}{ray.get_runtime_context().get_job_id()}"


def end_abandoned_serving() -> None:
    """Shut down what a killed program of ours still serves.

    On a cluster Serve outlives the program that started it, and its models keep their CPUs.
    """
    import ray

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    from ray import serve

    running = list(serve.status().applications)
    dead = {job["JobID"] for job in ray._private.state.jobs() if job["IsDead"]}
    if running and {name.removeprefix(_SERVED) for name in running} <= dead:
        logger.warning("shutting down what a killed run still serves")
        serve.shutdown()


def _address(resources: ResourcesConfig) -> str | None:
    """Return the address of the cluster to join; None: a local Ray is started."""
    address = resources.ray_address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray take 127.0.0.1 for this machine's address, as it does on macOS and Windows.

    On Linux it replaces 127.0.0.1 by the address that others reach, and listens on all interfaces.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _nobody_follows(nobody: bool) -> Iterator[None]:
    """Start no process that looks for new lines in all log files, 3% of a core, for nobody."""
    from ray._private.node import Node

    before = Node.start_log_monitor
    if nobody:
        Node.start_log_monitor = lambda self: None
    try:
        yield
    finally:
        Node.start_log_monitor = before


def _set_up_data() -> None:
    """Keep blocks in order, without Ray Data's bars and plan dumps: each stage reports its rows."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Blocks that a killed run left are found again only where rows are cut as before.
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _hasten_data() -> None:
    """Let Ray Data see the cluster's CPUs, and that a task has ended, at once.

    Each run of it asks an actor what there is, takes "nothing" until the answer is looked at, which
    is a second later, and meanwhile runs one task at a time. `prepare` has about ten runs. Then it
    waits until *all* running tasks have something new or 0.1 s are over, twice for each task, while
    the worker that is done stands idle (ray-project/ray, issues 42377 and 45934).
    """
    import types

    import ray
    from ray.data._internal.execution import streaming_executor_state as loop
    from ray.data._internal.execution.resource_manager import ResourceManager

    ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = 0.1

    before: set[Any] = set()

    def wait(refs: list[Any], *, num_returns: int, timeout: float, fetch_local: bool) -> Any:
        ray.wait(refs, num_returns=1, timeout=timeout, fetch_local=fetch_local)
        ready, rest = ray.wait(refs, num_returns=num_returns, timeout=0, fetch_local=fetch_local)
        # What is not taken, as there is no room for it, stays ready: nothing to spin for.
        if ready and before == set(ready):
            time.sleep(_UNCHANGED_S)
        before.clear()
        before.update(ready)
        return ready, rest

    loop.ray = types.SimpleNamespace(**{**vars(ray), "wait": wait})


def await_cpu() -> None:
    """Return as soon as a task can run, and tell meanwhile what it waits for.

    Ray itself waits without a word, for ever where no node has a CPU.

    Raises:
        ResourceError: No node has a CPU for tasks.
    """
    import ray

    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    if max(nodes, default=0) < 1:
        raise ResourceError(
            Problem(
                "no node of the cluster has a CPU for tasks",
                where="the cluster",
                got=f"{len(nodes)} nodes with {sum(nodes):g} CPUs",
                allowed="at least one node with a whole CPU",
                remedy="start a worker node: `ray start --address=HEAD:PORT`",
            )
        )
    # Asked by a task: an idle worker's lease is returned late, so counting free CPUs misleads.
    probe = ray.remote(num_cpus=1)(_exist).remote([])
    while not ray.wait([probe], timeout=WAITING_TOLD_EVERY_S)[0]:
        logger.warning("waiting for a CPU: %s", _occupation())


class WaitingNotice:
    """Tells, while work stands still, what its workers wait for."""

    def __init__(self) -> None:
        self.told, self.progress = time.monotonic(), -1

    def tell(self, progress: int) -> None:
        """Log what is waited for if `progress` is what it was some seconds ago."""
        if time.monotonic() - self.told < WAITING_TOLD_EVERY_S:
            return
        self.told, stood, self.progress = time.monotonic(), progress == self.progress, progress
        if stood and (waiting := unplaced_workers()):
            logger.warning("waiting for room for %s", waiting)


def unplaced_workers() -> str:
    """Return what groups of workers wait for that no node can take now; empty if none waits."""
    from ray.util import placement_group_table

    waiting = [
        bundle
        for group in placement_group_table().values()
        if group["state"] == "PENDING"
        for bundle in group["bundles"].values()
    ]
    if not waiting:
        return ""
    wanted = [
        f"{total:g} {name}s"
        for name in ("CPU", "GPU")
        if (total := sum(bundle.get(name, 0) for bundle in waiting))
    ]
    return f"{len(waiting)} workers with {' and '.join(wanted)}; {_occupation()}"


def _occupation() -> str:
    import ray
    from ray._private.state import available_resources_per_node

    total, free = ray.cluster_resources(), ray.available_resources()
    told = [
        f"{free.get(name, 0):g} of {total[name]:g} {name}s are free"
        for name in ("CPU", "GPU")
        if total.get(name)
    ]
    free_on_nodes = [node.get("CPU", 0) for node in available_resources_per_node().values()]
    if len(free_on_nodes) > 1:
        told.append(f"at most {max(free_on_nodes):g} CPUs on one node")
    return ", ".join(told) + "; other work has the rest"


def refuse_unshared(workspace: Path, base: Path) -> None:
    """Fail unless every node that runs work sees the workspace and the base model.

    Args:
        workspace: Local directory that drafts and checkpoints are written to; made if need be.
        base: Directory of the base model.

    Raises:
        ResourceError: With one problem for each of the two that some node does not see.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
    others = {n["NodeID"]: n["NodeManagerAddress"] for n in nodes if n["NodeID"] != here}
    if not others:
        return
    look = ray.remote(num_cpus=0)(_exist)
    workspace.mkdir(parents=True, exist_ok=True)
    # Another directory of the same name has no such file.
    with tempfile.NamedTemporaryFile(dir=workspace, prefix=".seen-") as marker:
        answers = [
            look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote([marker.name, str(base)])
            for node in others
        ]
        found = list(zip(others.values(), ray.get(answers), strict=True))
    problems = []
    for number, (what, path) in enumerate([("the workspace", workspace), ("the base model", base)]):
        blind = [address for address, seen in found if not seen[number]]
        if blind:
            problems.append(
                Problem(
                    f"not every node of the cluster sees {what}",
                    where=str(path),
                    got=f"{len(blind)} of {len(found)} nodes do not: {', '.join(blind[:3])}",
                    allowed="a directory on a file system that all nodes share",
                    remedy="set `workspace`, and TUNELOOP_CACHE on every node, to such directories",
                )
            )
    if problems:
        raise ResourceError(*problems)


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
        raise ResourceError(
            Problem(
                "no Ray cluster answers",
                where="resources.ray_address or RAY_ADDRESS",
                got=f"{address}: {error}",
                allowed="HOST:PORT of a Ray head, for example 127.0.0.1:6379",
                remedy="start one with `ray start --head`, or unset the address for a local Ray",
            )
        ) from error
