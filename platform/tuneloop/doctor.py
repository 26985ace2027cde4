"""What this machine has, what is missing, and how to fix it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One fact about the machine.

    Args:
        good: False if something will not work.
        remedy: What to do about it; empty if nothing needs to be done.
    """

    name: str
    found: str
    good: bool = True
    remedy: str = ""


def examine() -> list[Finding]:
    """Return the findings on this machine, without starting Ray."""
    return [_python(), *_packages(), _cpus(), _memory(), _disk(), _gpu(), _ray()]


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    version = f"{platform.python_version()} at {sys.executable}"
    return Finding("python", version, good, "" if good else "install Python 3.11 or newer")


def _packages() -> list[Finding]:
    findings = []
    for package in ("ray", "torch", "transformers", "peft", "deepspeed", "streamlit"):
        try:
            findings.append(Finding(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            extra = "[dashboard]" if package == "streamlit" else ""
            remedy = f"pip install 'tuneloop{extra}'"
            findings.append(Finding(package, "not installed", False, remedy))
    return findings


def _cpus() -> Finding:
    return Finding("cpus", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    good = memory.available > 4 * GIB
    found = f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f} GiB"
    remedy = "" if good else "close other programs: the demo needs about 5 GiB"
    return Finding("memory", found, good, remedy)


def _disk() -> Finding:
    usage = shutil.disk_usage(Path.cwd())
    good = usage.free > 10 * GIB
    found = f"{usage.free / GIB:.1f} GiB free in {Path.cwd()}"
    return Finding(
        "disk", found, good, "" if good else "free some space: the demo needs about 10 GiB"
    )


def _gpu() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("gpu", "unknown without torch", False, "pip install torch")
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        found = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}"
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            remedy = "training needs bfloat16: NVIDIA Ampere or newer"
            return Finding("gpu", f"{found}, without bfloat16", False, remedy)
        return Finding("gpu", f"{found}; resources.gpus_per_worker=1 trains on it")
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        remedy = "install the CUDA build of PyTorch to train on the GPU"
        return Finding("gpu", f"not usable: torch {torch.__version__} is for CPUs", False, remedy)
    return Finding("gpu", "none; training runs on the CPU in float32")


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS", "")
    if address == "auto":
        return Finding("ray cluster", "RAY_ADDRESS is auto: the one that runs on this machine")
    if address in ("", "local"):
        return Finding("ray cluster", "RAY_ADDRESS names none; a local Ray is started when needed")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except (OSError, ValueError) as error:
        return Finding("ray cluster", f"{address}: {error}", False, "correct or unset RAY_ADDRESS")
    return Finding("ray cluster", f"{address} answers")
