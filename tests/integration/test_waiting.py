"""The local Ray: a step that finds no room says so, and nobody else can reach it."""

from __future__ import annotations

import logging
import threading
import time

import psutil
import pytest

from tuneloop import cluster
from tuneloop.cluster import WaitingNotice, await_cpu, unplaced_workers
from tuneloop.errors import ResourceError


@pytest.mark.usefixtures("ray_cluster")
def test_waiting_for_a_cpu_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray
    from ray.util import placement_group, remove_placement_group

    await_cpu()
    assert caplog.messages == []
    assert unplaced_workers() == ""

    @ray.remote(num_cpus=2)
    class Holder:
        def ready(self) -> None: ...

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    monkeypatch.setattr(cluster, "WAITING_LOG_EVERY_S", 0.2)
    waiting = threading.Thread(target=await_cpu)
    workers = placement_group([{"CPU": 1}, {"CPU": 1}])
    with caplog.at_level(logging.WARNING):
        waiting.start()
        deadline = time.monotonic() + 60
        while not caplog.messages:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert caplog.messages[0] == (
        "waiting for a CPU: 0 of 2 CPUs are free; other work has the rest"
    )
    assert unplaced_workers().startswith("2 workers with 2 CPUs; 0 of 2 CPUs are free")
    notice = WaitingNotice()
    for progress in (0, 7, 7):  # what goes on is not waiting
        told = len(caplog.messages)
        time.sleep(0.25)
        notice.tell(progress)
    assert any("waiting for room for 2 workers" in text for text in caplog.messages[told:])
    assert sum("waiting for room" in text for text in caplog.messages) == 1
    remove_placement_group(workers)
    ray.kill(holder)
    waiting.join(60)
    assert not waiting.is_alive()


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_without_cpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    head = {"Alive": True, "Resources": {"memory": 1e9}}
    lost = {"Alive": False, "Resources": {"CPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [head, lost])
    with pytest.raises(ResourceError, match="no node of the cluster has a CPU"):
        await_cpu()


@pytest.mark.usefixtures("ray_cluster")
def test_a_local_ray_listens_on_loopback_only() -> None:
    own = psutil.Process()
    listening = [
        (process.name(), connection.laddr.ip.removeprefix("::ffff:"))
        for process in (own, *own.children(recursive=True))
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {"raylet", "gcs_server"} <= {name for name, _ in listening}
    assert {address for _, address in listening} <= {"127.0.0.1", "::1"}, listening
