"""The shape of the project that everything else relies on."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
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


# What a named tuple offers everybody, whatever its names look like.
_PUBLIC = {"_asdict", "_fields", "_make", "_replace"}


def private_parts(source: str) -> list[str]:
    """Return what a module uses of others that their names call private, with its line."""

    def is_private(name: object) -> bool:
        return (
            isinstance(name, str) and name[:1] == "_" and name[:2] != "__" and name not in _PUBLIC
        )

    nodes = list(ast.walk(ast.parse(source)))
    defined = {node.name for node in nodes if hasattr(node, "name")}
    defined |= {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
    }
    found = []
    for node in nodes:
        match node:
            case ast.Import(names=names):
                used = [part for name in names for part in name.name.split(".")]
            case ast.ImportFrom(module=module, names=names):
                used = [*(module or "").split("."), *(name.name for name in names)]
            case ast.Attribute(value=value, attr=name) if ast.unparse(value) not in ("self", "cls"):
                used = [] if name in defined else [name]
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"),
                args=[_, ast.Constant(value=name), *_],
            ):
                used = [name]
            case ast.keyword(arg=name):
                used = [name]
            case _:
                continue
        found += [f"{getattr(node, 'lineno', 0)}: {name}" for name in used if is_private(name)]
    return found


def test_private_parts_are_found() -> None:
    assert private_parts("import ray._private.state as s") == ["1: _private"]
    assert private_parts("from ray.data import _internal") == ["1: _internal"]
    assert private_parts("import ray\nray.init(_node_ip_address='')") == ["2: _node_ip_address"]
    assert private_parts("x = engine.optimizer._hp_states") == ["1: _hp_states"]
    assert private_parts("getattr(model, '_supports_sdpa')") == ["1: _supports_sdpa"]
    assert private_parts("class A:\n def _f(self): self._g = other._f(), other._g") == []
    assert private_parts("row._replace(key=1)\nimport __main__") == []


def test_private_parts_of_other_libraries_are_used_in_compat_only() -> None:
    package = ROOT / "platform" / "tuneloop"
    files = [
        file
        for folder in (package, ROOT / "dashboards", ROOT / "jobs", ROOT / "benchmarks")
        for file in folder.rglob("*.py")
        if package / "compat" not in file.parents
    ]
    found = [
        f"{file.relative_to(ROOT)}:{part}"
        for file in files
        for part in private_parts(file.read_text())
    ]
    assert len(files) > 100
    assert found == []


def test_every_module_of_compat_names_its_guard() -> None:
    for file in (ROOT / "platform" / "tuneloop" / "compat").glob("[!_]*.py"):
        guard = re.search(r"tests/unit/\S+\.py", file.read_text())
        assert guard is not None, file
        assert (ROOT / guard[0]).exists(), guard[0]


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
    assert "| `A good answer is correct" in module.reference()  # text keeps its case


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
