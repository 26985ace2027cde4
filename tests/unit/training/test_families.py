"""A sample of `benchmarks/families.py`: one family that is packed, one that takes the plain way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_families_are_trained_and_served_as_transformers_does() -> None:
    script = ROOT / "benchmarks" / "families.py"
    done = subprocess.run(
        [sys.executable, str(script), "qwen3_moe", "xglm", "--method", "lora"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    lines = done.stdout.splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(c[0], c[2], c[5], c[6]) for c in cells] == [
        ("qwen3_moe", "packed", "equal", "ours, equal"),
        ("xglm", "padded", "equal", "generate, equal"),
    ]
