"""CPU time and memory of a process with everything that it starts. Linux; standard library only."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import defaultdict
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def family(root: int) -> dict[int, float]:
    """Return the process and all below it: CPU seconds by id, with those of ended children."""
    children: dict[int, list[int]] = defaultdict(list)
    seconds: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        pid = int(path.parent.name)
        children[int(fields[1])].append(pid)
        seconds[pid] = sum(map(int, fields[11:15])) / _TICKS
    found, waiting = {}, [root]
    while waiting:
        pid = waiting.pop()
        found[pid] = seconds.get(pid, 0.0)
        waiting += children[pid]
    return found


class Stopwatch:
    """Wall and CPU seconds of this process and everything below it, from here on."""

    def __init__(self) -> None:
        self._cpu, self._wall = sum(family(os.getpid()).values()), time.monotonic()

    def read(self) -> dict[str, float]:
        """Return `wall_s` and `cpu_s` since the start."""
        wall = time.monotonic() - self._wall
        return {"wall_s": wall, "cpu_s": sum(family(os.getpid()).values()) - self._cpu}


class Memory:
    """Peak memory of a running process and everything below it, looked at every half second.

    `private_mb` is their own memory, `shared_mb` memory that they share (Ray's object store), and
    `main_mb` the own memory of the first process alone.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.peaks = {"private_mb": 0.0, "shared_mb": 0.0, "main_mb": 0.0}
        self._process = process
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while self._process.poll() is None:
            found = [_memory(pid) for pid in family(self._process.pid)]
            now = {
                "private_mb": sum(private for private, _ in found),
                "shared_mb": sum(shared for _, shared in found),
                "main_mb": _memory(self._process.pid)[0],
            }
            self.peaks = {name: max(value, self.peaks[name]) for name, value in now.items()}
            time.sleep(0.5)


def _memory(pid: int) -> tuple[float, float]:
    """Return megabytes of a process: of its own, and its share of shared memory."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0.0, 0.0
    sizes = {
        name: int(value.split()[0]) / 1e3 for name, _, value in (x.partition(":") for x in lines)
    }
    shared = sizes.get("Pss_Shmem", 0.0)
    return sizes["Pss"] - shared, shared
