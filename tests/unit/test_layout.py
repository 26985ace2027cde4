"""The shape of the project that everything else relies on."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

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


def test_who_starts_a_server_or_passes_requests_on_loads_no_pytorch() -> None:
    code = (
        "import sys, tuneloop.serving.app, tuneloop.serving.deploy\n"
        "print('HEAVY', sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout


def test_a_removed_working_directory_is_told_first() -> None:
    code = (
        "import os, sys, tempfile\n"
        "folder = tempfile.mkdtemp(); os.chdir(folder); os.rmdir(folder)\n"
        "from tuneloop.cli import main\n"
        "sys.exit(main(['check', 'x.yaml']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the directory that this runs in was removed\n")
    assert "x.yaml" in done.stderr


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
    assert "| `Write {num_pairs} questions" in module.reference()  # text keeps its case


def test_jobs_stay_short() -> None:
    for job in (ROOT / "jobs").glob("*.py"):
        assert len(job.read_text().splitlines()) <= 60, job


def test_the_cluster_file_is_valid_by_rays_own_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    raw = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    config = prepare_config(raw)
    # What `ray up` itself adds.
    config["cluster_synced_files"] = []
    validate_config(config)
    # Whoever reaches the head's ports must not get in without the token, and every node needs it.
    starts = raw["head_start_ray_commands"] + raw["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert any(target.endswith(".ray/auth_token") for target in raw["file_mounts"])
    assert raw["available_node_types"][raw["head_node_type"]]["resources"]["CPU"] == 0


def test_the_serve_file_names_an_application_that_can_be_built() -> None:
    from ray.serve import Application
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
    from ray.serve.schema import ServeDeploySchema

    raw = yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(raw).applications
    module, _, name = application.import_path.partition(":")
    builder = getattr(importlib.import_module(module), name)
    assert isinstance(build(builder, application.args), Application)
    with pytest.raises(ValidationError, match="modles"):
        build(builder, {"modles": application.args["models"]})
