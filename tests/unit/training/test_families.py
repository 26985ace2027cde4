"""A sample of `benchmarks/families.py`: one family that is packed, one that takes the plain way."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.usefixtures("process_group")
def test_families_are_trained_and_served_as_transformers_does(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("families", ROOT / "benchmarks" / "families.py")
    assert spec is not None
    assert spec.loader is not None
    families = importlib.util.module_from_spec(spec)
    # Its dataclasses look for their module there.
    monkeypatch.setitem(sys.modules, "families", families)
    spec.loader.exec_module(families)
    code = families.main(["qwen3_moe", "xglm", "--method", "lora"])
    out, err = capfd.readouterr()
    assert code == 0, out + err
    rows = [line for line in out.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(c[0], c[2], c[5], c[6]) for c in cells] == [
        ("qwen3_moe", "packed", "equal", "ours, equal"),
        ("xglm", "padded", "equal", "generate, equal"),
    ]
