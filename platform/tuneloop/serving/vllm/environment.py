"""The environment that vLLM is installed in, beside the one that trains.

vLLM pins other versions of PyTorch and transformers than training needs, so nothing here imports
it. What it knows of models is asked once, when it is installed, and kept in `installed.json`.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tuneloop.errors import ModelError, ResourceError
from tuneloop.models.bases.source import cache_directory

_log = logging.getLogger("tuneloop.serving")

Device = Literal["cpu", "gpu"]
_RECORD = "installed.json"
_REMEDY = "tuneloop install-engine vllm"
_ASK = """
import json
from vllm import __version__
from vllm.model_executor.models import ModelRegistry
print(json.dumps([__version__, sorted(ModelRegistry.get_supported_archs())]))
"""


@dataclass(frozen=True)
class Installed:
    """A vLLM that is installed.

    Args:
        folder: The virtual environment.
        device: What this build runs on.
        architectures: Model classes that it knows, as `architectures` of a `config.json` has them.
    """

    folder: str
    version: str
    device: Device
    architectures: Sequence[str]

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return Path(self.folder) / "bin" / "python"


def environment_folder() -> Path:
    """Return where vLLM is installed."""
    return cache_directory().parent / "engines" / "vllm"


def find() -> Installed:
    """Return the vLLM that is installed on this machine.

    Raises:
        ModelError: There is none.
    """
    record = environment_folder() / _RECORD
    try:
        installed = Installed(**json.loads(record.read_text(encoding="utf-8")))
        if installed.python.exists():
            return installed
        got = f"{installed.python} is gone"
    except FileNotFoundError:
        got = "it is not installed"
    except (OSError, ValueError, TypeError) as error:
        got = f"{record} cannot be read: {error}"
    raise ModelError.of(
        "the engine vLLM cannot be used on this machine",
        where="serving.engine",
        got=got,
        allowed="an environment of its own, on every machine that serves",
        remedy=f"{_REMEDY}; or set serving.engine=auto",
    )


def require(model: Path) -> Installed:
    """Return the vLLM that is installed, which takes this model.

    Args:
        model: Hugging Face directory.

    Raises:
        ModelError: None is installed, or it does not know the model's class.
    """
    installed = find()
    try:
        settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
        names = list(settings.get("architectures") or ())
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError.of("cannot read the model", str(model), str(error)) from error
    if not set(names) & set(installed.architectures):
        raise ModelError.of(
            "vLLM does not take this kind of model",
            where=str(model),
            got=", ".join(names) or "a config.json without `architectures`",
            allowed=f"the {len(installed.architectures)} kinds that vLLM "
            f"{installed.version} lists in {environment_folder() / _RECORD}",
            remedy="set serving.engine=auto",
        )
    return installed


def install(device: Device) -> Installed:
    """Return vLLM, installed in place of what was there.

    Args:
        device: `cpu` takes the packages of `requirements-cpu.txt`, all versions fixed; `gpu` the
            release of `requirements-gpu.txt` with what it needs.

    Raises:
        ResourceError: It cannot be installed; what was there before is gone.
    """
    folder = environment_folder()
    requirements = Path(__file__).with_name(f"requirements-{device}.txt")
    _log.info("installing vLLM for the %s in %s; this takes some minutes", device.upper(), folder)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise _failed(requirements, str(error)) from error
    python = folder / "bin" / "python"
    # The list for CPUs is complete. It leaves out what vLLM declares and text does not need:
    # torchvision and its like, whose builds do not fit the CPU build of PyTorch.
    options = ["--no-deps"] if device == "cpu" else []
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*command, *options, "--requirement", str(requirements)], requirements)
    answer = _run([str(python), "-I", "-c", _ASK], requirements).splitlines()[-1]
    version, architectures = json.loads(answer)
    installed = Installed(str(folder), version, device, architectures)
    # Written last: an installation that was cut short is none.
    (folder / _RECORD).write_text(json.dumps(asdict(installed)), encoding="utf-8")
    return installed


def _run(command: Sequence[str], requirements: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise _failed(requirements, next((x for x in lines if x.startswith("ERROR")), lines[-1]))
    return done.stdout


def _failed(requirements: Path, got: str) -> ResourceError:
    return ResourceError.of(
        "vLLM cannot be installed",
        where=str(requirements),
        got=got[:500],
        allowed="Linux, a package index with these versions, and 4 GB of disk",
        remedy="where PyTorch's CPU build is missing, let PIP_EXTRA_INDEX_URL name PyTorch's "
        "index of CPU builds, and run the command again",
    )
