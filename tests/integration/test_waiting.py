"""A step that finds no room says so: Ray itself waits without a word."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

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
    monkeypatch.setattr(cluster, "WAITING_TOLD_EVERY_S", 0.2)
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
def test_ray_data_goes_on_as_soon_as_one_task_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    import ray.data

    asked: list[tuple[int, float]] = []
    wait = ray.wait

    def seen(refs: list, **how: Any) -> Any:
        if how.keys() == {"num_returns", "timeout", "fetch_local"} and not how["fetch_local"]:
            asked.append((how["num_returns"], how["timeout"]))
        return wait(refs, **how)

    def slow(batch: Any) -> Any:
        time.sleep(0.3)  # so that two tasks run at once
        return batch

    monkeypatch.setattr(ray, "wait", seen)
    deadline = time.monotonic() + 60  # the first tasks run one by one, until Ray knows its CPUs
    while not any(number > 1 for number, _ in asked):
        assert time.monotonic() < deadline
        blocks = ray.data.from_items([1, 2, 3, 4], override_num_blocks=4)
        assert sorted(blocks.map_batches(slow).to_pandas()["item"]) == [1, 2, 3, 4]
    # All that are ready are taken at once, but only one is waited for.
    assert all(number == 1 or timeout == 0 for number, timeout in asked)
