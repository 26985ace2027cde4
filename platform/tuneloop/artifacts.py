"""Artifacts: directories with a manifest, published once and never changed.

    <workspace>/<kind>/<name>/v<N>/artifact.json     written last: the commit marker
    <workspace>/.work/<kind>-<name>-<fingerprint>/   what an unfinished step has so far

A step asks `find` for its fingerprint (reuse), otherwise builds in a `draft` and publishes it.
A crash leaves only the draft's working directory, from which the same step resumes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuneloop.errors import ArtifactError, Problem, ResourceError

log = logging.getLogger("tuneloop.artifacts")

SCHEMA_VERSION = 1
_REQUIRED = ("fingerprint", "config", "metrics", "created_at", "duration_s", "files")
KINDS = ("datasets", "models", "evaluations", "sweeps")
MANIFEST = "artifact.json"
LOG = "log.txt"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_PACKAGES = ("tuneloop", "ray", "torch", "transformers", "peft", "deepspeed", "pyarrow", "numpy")
_REFERENCE = re.compile(r"^(?P<kind>[a-z]+)/(?P<name>[a-z0-9][a-z0-9_.-]*)(@v(?P<version>\d+))?$")


def fingerprint(step: str, code_version: int, **parts: Any) -> str:
    """Return the identity of a step's result as 64 hexadecimal digits.

    Args:
        step: Name of the step.
        code_version: Raised whenever the step's code changes its result.
        parts: Everything else that changes the result, as JSON-serialisable values.
    """
    canonical = json.dumps(
        {"step": step, "code_version": code_version, **parts}, sort_keys=True, ensure_ascii=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk: a power cut keeps them.

    Without it, a file may come back with its size and zeros for its content.
    """
    with contextlib.suppress(PermissionError):  # a directory that may be written, but not opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True)
class Artifact:
    """A published artifact.

    Args:
        path: Local directory with the artifact's files.
        location: Where the workspace keeps it: equal to `path`, or a URI.
    """

    kind: str
    name: str
    version: int
    path: Path
    location: str
    manifest: dict[str, Any] = field(repr=False)

    @property
    def ref(self) -> str:
        return f"{self.kind}/{self.name}@v{self.version}"

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def train_fingerprint(self) -> str:
        """Of a dataset: on what its models depend. Versions that differ in test rows share it."""
        return str(self.manifest["config"].get("train_fingerprint", self.fingerprint))

    def summary(self, reused: bool) -> dict[str, Any]:
        """Return what `--json` prints about the artifact."""
        return {
            "artifact": self.ref,
            "path": self.location,
            "reused": reused,
            "metrics": self.manifest["metrics"],
        }


@dataclass(frozen=True)
class Published:
    """A step's artifact, and whether it was reused."""

    artifact: Artifact
    reused: bool


@dataclass
class Draft:
    """An artifact under construction.

    Args:
        path: Directory whose files become the artifact.
        scratch: Directory beside it for checkpoints and partial results; it survives a crash
            and is removed when the artifact is published.
    """

    workspace: Workspace
    kind: str
    name: str
    fingerprint: str
    path: Path
    scratch: Path
    started: float
    artifact: Artifact | None = None

    def unpublished(self, config: dict[str, Any]) -> Artifact:
        """Return what is here as an artifact, for what looks at it beside published ones.

        Args:
            config: As for `publish`.
        """
        version = max(self.workspace._versions(self.kind, self.name), default=0) + 1
        manifest = {"fingerprint": self.fingerprint, "config": config, **self._now()}
        return Artifact(self.kind, self.name, version, self.path, str(self.path), manifest)

    def _now(self) -> dict[str, Any]:
        return {
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "duration_s": round(time.time() - self.started, 3),
        }

    def publish(
        self,
        *,
        config: dict[str, Any],
        resources: dict[str, Any],
        inputs: list[str],
        metrics: dict[str, Any],
    ) -> Artifact:
        """Write the manifest, move everything into place and return the artifact.

        Args:
            config: What was fingerprinted, in readable form.
            resources: How it was executed.
            inputs: References of the artifacts, and identities of the models and files, used.
            metrics: Numbers worth showing in a list of artifacts.
        """
        files = [
            {
                "path": file.relative_to(self.path).as_posix(),
                "bytes": file.stat().st_size,
                "sha256": sha256_file(file),
            }
            for file in sorted(self.path.rglob("*"))
            if file.is_file()
        ]
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "name": self.name,
            "version": 0,
            "fingerprint": self.fingerprint,
            "config": config,
            "resources": resources,
            "inputs": inputs,
            "packages": package_versions(),
            "git": git_commit(),
            "metrics": metrics,
            **self._now(),
            "files": files,
        }
        self.artifact = self.workspace._commit(self, manifest)
        return self.artifact


class Workspace:
    """The directory or URI that holds all artifacts.

    Args:
        location: A local path, or a URI that pyarrow's filesystems open (`s3://`, `gs://`).

    Raises:
        ArtifactError: The location cannot be opened.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        self.remote = "://" in self.location and not self.location.startswith("file://")
        if self.remote:
            self.location = self.location.rstrip("/")
            identity = hashlib.sha256(self.location.encode()).hexdigest()[:16]
            cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
            self.root = cache / "tuneloop" / "workspaces" / identity
        else:
            self.root = Path(self.location.removeprefix("file://")).expanduser().absolute()
            self.location = str(self.root)
        try:
            if self.remote:
                from pyarrow import fs

                self._arrow = fs
                self._fs, self._base = fs.FileSystem.from_uri(self.location)
            elif self.root.exists() and not self.root.is_dir():
                raise NotADirectoryError(f"{self.root} is a file")
        except (OSError, ValueError) as error:
            raise ArtifactError.of(
                "cannot open the workspace",
                where="workspace",
                got=f"{location}: {error}",
                allowed="a directory, or a URI such as s3://bucket/prefix",
            ) from error

    def find(self, kind: str, name: str, fingerprint: str) -> Artifact | None:
        """Return the newest artifact with this fingerprint, or None.

        One whose manifest cannot be read is passed over: the step makes the next version.

        Raises:
            ArtifactError: The artifact's files are not those of its manifest.
        """
        for version in reversed(self._versions(kind, name)):
            try:
                artifact = self._load(kind, name, version, fetch=False)
            except ArtifactError as error:
                log.warning("passed over: %s", error.problems[0].what)
                continue
            if artifact is not None and artifact.fingerprint == fingerprint:
                return self._load(kind, name, version)
        return None

    def open(self, reference: str) -> Artifact:
        """Return the artifact a reference names; without a version, the newest.

        Raises:
            ArtifactError: Malformed reference, nothing there, or files missing.
        """
        match = _REFERENCE.match(reference)
        if match is None or match["kind"] not in KINDS:
            raise ArtifactError.of(
                "not a reference to an artifact",
                got=reference,
                allowed="KIND/NAME or KIND/NAME@vN with KIND one of " + ", ".join(KINDS),
                remedy="`tuneloop ls` lists what is there",
            )
        kind, name = match["kind"], match["name"]
        versions = [int(match["version"])] if match["version"] else self._versions(kind, name)[::-1]
        # A version without a manifest is an upload that was cut short.
        loaded = (self._load(kind, name, version) for version in versions)
        artifact = next((one for one in loaded if one is not None), None)
        if artifact is None:
            existing = [item.ref for item in self.published()]
            raise ArtifactError.of(
                f"no artifact `{reference}`",
                where=f"workspace {self.location}",
                allowed=", ".join(existing) if existing else "the workspace is empty",
                remedy="check `workspace`, or run the step that makes it",
            )
        return artifact

    def published(self, kind: str = "", name: str = "") -> list[Artifact]:
        """Return the published artifacts of a kind and name that can be read, oldest first.

        Of a workspace with a URI their files may be there alone: see `with_files`.
        """
        return self.listing(kind, name)[0]

    def with_files(self, artifacts: Iterable[Artifact]) -> list[Artifact]:
        """Return published artifacts with their files on this machine, fetched where need be."""
        return [self.open(artifact.ref) if self.remote else artifact for artifact in artifacts]

    def listing(self, kind: str = "", name: str = "") -> tuple[list[Artifact], list[Problem]]:
        """Return the published artifacts, oldest first, and one problem for each damaged one.

        Args:
            kind: Only these; all if empty.
            name: Likewise.
        """
        artifacts: list[Artifact] = []
        damaged: list[Problem] = []
        for folder in [kind] if kind else KINDS:
            for entry in [name] if name else self._entries(folder):
                for version in self._versions(folder, entry):
                    try:
                        artifact = self._load(folder, entry, version, fetch=False)
                    except ArtifactError as error:
                        damaged += error.problems
                        continue
                    if artifact is not None:
                        artifacts.append(artifact)
        return sorted(artifacts, key=lambda artifact: artifact.manifest["created_at"]), damaged

    def work_folder(self, kind: str, name: str, fingerprint: str) -> Path:
        """Return where the draft and the scratch of an artifact are while it is made."""
        return self.root / ".work" / f"{kind}-{name}-{fingerprint[:16]}"

    @contextlib.contextmanager
    def draft(self, kind: str, name: str, fingerprint: str) -> Iterator[Draft]:
        """Yield a draft that only this process works on; a crash leaves it for the next run.

        `draft.path` starts empty; `draft.scratch` keeps what an earlier, interrupted run of
        the same step left.

        Raises:
            ResourceError: Another process builds the same artifact, or the disk is full.
        """
        work = self.work_folder(kind, name, fingerprint)
        try:
            work.mkdir(parents=True, exist_ok=True)
            with (work / "lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ResourceError.of(
                        f"another process is building {kind}/{name}",
                        where=str(work),
                        remedy="wait for it, or stop it",
                    ) from error
                path = work / "draft"
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
                scratch = work / "scratch"
                scratch.mkdir(exist_ok=True)
                draft = Draft(self, kind, name, fingerprint, path, scratch, time.time())
                try:
                    with _logged_to(path / LOG):
                        yield draft
                finally:
                    # Kept only if there is something to resume from.
                    if draft.artifact is not None or not any(scratch.iterdir()):
                        shutil.rmtree(work, ignore_errors=True)
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            raise ResourceError.of(
                f"cannot write {kind}/{name}",
                where=str(error.filename or work),
                got=error.strerror or str(error),
                remedy="free disk space or fix the permissions, then run the same command",
            ) from error

    def _commit(self, draft: Draft, manifest: dict[str, Any]) -> Artifact:
        with contextlib.ExitStack() as held:
            if self.remote:
                # A store renames no directory as a whole: versions are taken one after the other.
                lock = held.enter_context((self.root / ".work" / "publishing").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            return self._place(draft, manifest)

    def _place(self, draft: Draft, manifest: dict[str, Any]) -> Artifact:
        for _ in range(1000):
            version = max(self._versions(draft.kind, draft.name), default=0) + 1
            manifest["version"] = version
            text = json.dumps(manifest, indent=2, ensure_ascii=False, sort_keys=False)
            target = self.root / draft.kind / draft.name / f"v{version}"
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.remote:
                remote = f"{self._base}/{draft.kind}/{draft.name}/v{version}"
                self._arrow.copy_files(str(draft.path), remote, destination_filesystem=self._fs)
                with self._fs.open_output_stream(f"{remote}/{MANIFEST}") as stream:
                    stream.write(text.encode())
                # A copy of what had this version before it was removed from the store.
                shutil.rmtree(target, ignore_errors=True)
            # Written beside, then renamed: a manifest is never seen half-written. The directory
            # is renamed as a whole, which fails if another process has taken the version.
            temporary = draft.path / f".{MANIFEST}"
            temporary.write_text(text, encoding="utf-8")
            for file in draft.path.rglob("*"):
                sync(file)
            temporary.rename(draft.path / MANIFEST)
            sync(draft.path)
            try:
                draft.path.rename(target)
                sync(target.parent)
            except OSError:
                if not target.exists():
                    raise
                if not self.remote:
                    continue
                # Behind a URI the version is this one's: who asked for it has its copy already.
            artifact = self._load(draft.kind, draft.name, version)
            if artifact is None:
                break
            return artifact
        raise ArtifactError.of("cannot publish the artifact", where=str(draft.path))

    def _entries(self, kind: str) -> list[str]:
        if self.remote:
            selector = self._arrow.FileSelector(f"{self._base}/{kind}", allow_not_found=True)
            return sorted(info.base_name for info in self._fs.get_file_info(selector))
        folder = self.root / kind
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []

    def _versions(self, kind: str, name: str) -> list[int]:
        names = self._entries(f"{kind}/{name}")
        return sorted(int(entry[1:]) for entry in names if re.fullmatch(r"v\d+", entry))

    def _load(self, kind: str, name: str, version: int, fetch: bool = True) -> Artifact | None:
        path = self.root / kind / name / f"v{version}"
        location = str(path)
        if self.remote:
            remote = f"{self._base}/{kind}/{name}/v{version}"
            location = f"{self.location}/{kind}/{name}/v{version}"
            try:
                with self._fs.open_input_stream(f"{remote}/{MANIFEST}") as stream:
                    text = stream.read().decode(errors="replace")
            except FileNotFoundError:
                return None
            if fetch and _text_of(path / MANIFEST) != text:
                # No copy yet, or one of what had this version before it was removed there.
                shutil.rmtree(path, ignore_errors=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
                    self._arrow.copy_files(remote, temporary, source_filesystem=self._fs)
                    with contextlib.suppress(OSError):
                        Path(temporary).rename(path)
                        Path(temporary).mkdir()
        else:
            found = _text_of(path / MANIFEST)
            if found is None:
                return None
            text = found
        manifest = _read_manifest(text, f"{kind}/{name}@v{version}", path / MANIFEST)
        if fetch:
            for entry in manifest["files"]:
                file = path / entry["path"]
                if not file.is_file() or file.stat().st_size != entry["bytes"]:
                    raise ArtifactError.of(
                        f"{kind}/{name}@v{version} is damaged",
                        where=str(file),
                        got=f"{file.stat().st_size} bytes" if file.exists() else "no file",
                        allowed=f"{entry['bytes']} bytes, as its manifest says",
                        remedy=f"remove {path} and run the step again",
                    )
        return Artifact(kind, name, version, path, location, manifest)


def _text_of(file: Path) -> str | None:
    """Return what a manifest says, or None if there is none; what is no text is none either."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_manifest(text: str, reference: str, file: Path) -> dict[str, Any]:
    """Return a manifest; raise ArtifactError if it is none."""
    try:
        manifest = json.loads(text)
        lost = [key for key in _REQUIRED if key not in manifest]
    except (ValueError, TypeError) as error:
        manifest, lost = None, [str(error)]
    if not isinstance(manifest, dict) or lost:
        raise ArtifactError.of(
            f"{reference} is damaged",
            where=str(file),
            got=f"a manifest of {len(text)} characters without {', '.join(lost) or 'keys'}"
            if isinstance(manifest, dict)
            else f"a manifest of {len(text)} characters that cannot be read",
            remedy=f"remove {file.parent} and run the step again",
        )
    return manifest


@contextlib.contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Write what tuneloop logs meanwhile to a file of the artifact as well."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("tuneloop")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide results."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def git_commit() -> str | None:
    """Return the commit of the current directory's checkout, with `-dirty` when it is changed."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
