"""The shape of the project that everything else relies on."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tuneloop.config import load_config

ROOT = Path(__file__).parents[2]


def test_platform_stays_the_standard_librarys() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    code = "import platform; print(platform.python_version())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ".".join(map(str, sys.version_info[:3]))


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, tuneloop.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'ray', 'torch', 'deepspeed', 'transformers', 'pandas', 'pyarrow'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout


@pytest.mark.parametrize(
    "path",
    [*(ROOT / "jobs" / "configs").glob("*.yaml"), ROOT / "platform" / "tuneloop" / "starter.yaml"],
    ids=lambda path: path.name,
)
def test_every_committed_configuration_loads(path: Path) -> None:
    config = load_config(path)
    assert config.name
    assert config.data.sources


def test_the_configuration_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.FILE.read_text(encoding="utf-8") == module.reference(), (
        "run `python docs/reference.py`"
    )


def test_jobs_stay_short() -> None:
    for job in (ROOT / "jobs").glob("*.py"):
        assert len(job.read_text().splitlines()) <= 60, job
