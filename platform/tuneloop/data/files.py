"""Where rows come from: finding, opening and hashing the files behind `data.sources`."""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tuneloop.config import DataConfig, GenerationConfig, SourceConfig
from tuneloop.data.docstrings import read_docstrings
from tuneloop.errors import DataError, Problem

DOCSTRINGS = "docstrings:stdlib"
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
DOCUMENTS = (".txt", ".md", ".rst")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".lz4")


@dataclass(frozen=True)
class SourceFile:
    """One file of rows.

    Args:
        path: Local path, URI, or the name of a built-in source.
        source: Index in `data.sources`.
        content: The bytes themselves, where there is no file.
    """

    path: str
    source: int
    content: bytes | None = None

    @property
    def suffix(self) -> str:
        """The suffix that tells the layout, without that of a compression."""
        name = PurePosixPath(self.path)
        if name.suffix in COMPRESSIONS:
            name = name.with_suffix("")
        return ".jsonl" if self.content is not None else name.suffix.lower()

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Open for reading bytes, decompressed. Raises OSError."""
        import pyarrow as pa

        if self.content is not None:
            yield pa.BufferReader(self.content)
            return
        filesystem, path = _filesystem(self.path)
        with filesystem.open_input_stream(path, compression="detect") as stream:
            yield stream

    def sha256(self) -> str:
        """Return the digest of the bytes as they are stored, in hexadecimal. Raises OSError."""
        if self.content is not None:
            return hashlib.sha256(self.content).hexdigest()
        filesystem, path = _filesystem(self.path)
        digest = hashlib.sha256()
        with filesystem.open_input_stream(path, compression=None) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()


def find_files(data: DataConfig) -> list[SourceFile]:
    """Return the files of all sources in a fixed order: by source, then by path.

    Raises:
        DataError: With one problem for each source that leads nowhere.
    """
    return _find_all(data.sources, "data.sources")


def find_evaluation_files(data: DataConfig) -> list[SourceFile]:
    """Return the files of `data.decontamination.sources`, likewise."""
    return _find_all(data.decontamination.sources, "data.decontamination.sources")


def find_generation_files(generation: GenerationConfig) -> list[SourceFile]:
    """Return the files of `generation.sources`, likewise."""
    return _find_all(generation.sources, "generation.sources")


def _find_all(sources: Sequence[SourceConfig], key: str) -> list[SourceFile]:
    """Return the files of some sources in a fixed order.

    Raises:
        DataError: With one problem for each source that leads nowhere.
    """
    files: list[SourceFile] = []
    problems: list[Problem] = []
    for index, source in enumerate(sources):
        try:
            files += _find(source, index, f"{key}.{index}.path")
        except DataError as error:
            problems += error.problems
    seen: dict[str, int] = {}
    for file in files:
        if file.path in seen:
            problems.append(
                Problem(
                    "a file is read twice",
                    where=f"{key}.{seen[file.path]} and {key}.{file.source}",
                    got=file.path,
                    remedy="name it in one source",
                )
            )
        seen[file.path] = file.source
    if problems:
        raise DataError(*problems)
    return files


def _find(source: SourceConfig, index: int, where: str) -> list[SourceFile]:
    if source.path.startswith("docstrings:"):
        if source.path != DOCSTRINGS:
            raise DataError(
                Problem("no such source", where=where, got=source.path, allowed=DOCSTRINGS)
            )
        lines = (json.dumps(row, ensure_ascii=False) for row in read_docstrings())
        return [SourceFile(DOCSTRINGS, index, "".join(f"{line}\n" for line in lines).encode())]
    try:
        paths = _remote_paths(source.path) if "://" in source.path else _local_paths(source.path)
    except OSError as error:
        raise DataError(
            Problem("cannot open a data source", where=where, got=f"{source.path}: {error}")
        ) from error
    if not paths:
        raise DataError(_nothing_found(source.path, where))
    usable = TABLES + (DOCUMENTS if source.format == "text" else ())
    files = [SourceFile(path, index) for path in paths]
    # In a directory other files (a README, a manifest) are passed over; a file that is named
    # has to be readable.
    if len(files) > 1 or files[0].path != source.path:
        files = [file for file in files if file.suffix in usable] or files
    unusable = next((file for file in files if file.suffix not in usable), None)
    if unusable is not None:
        raise DataError(
            Problem(
                "a file's layout is not known",
                where=where,
                got=unusable.path,
                allowed=", ".join(usable) + ", each also with " + ", ".join(COMPRESSIONS),
                remedy="plain text documents need format: text"
                if unusable.suffix in DOCUMENTS
                else "",
            )
        )
    return files


def _local_paths(path: str) -> list[str]:
    expanded = Path(path).expanduser()
    if expanded.is_file():
        return [path]
    if expanded.is_dir():
        if (expanded / "dataset_dict.json").is_file():
            splits = sorted(entry.name for entry in expanded.iterdir() if entry.is_dir())
            raise DataError(
                Problem(
                    "the directory holds several splits",
                    where=path,
                    allowed=", ".join(f"{path.rstrip('/')}/{split}" for split in splits),
                    remedy="name one of them, or one source for each",
                )
            )
        if (expanded / "state.json").is_file() and any(expanded.glob("*.arrow")):
            # Written by `Dataset.save_to_disk`: the JSON files beside the rows describe them.
            return sorted(str(entry) for entry in expanded.glob("*.arrow"))
        found = (entry for entry in expanded.rglob("*") if entry.is_file())
        return sorted(str(entry) for entry in found if not entry.name.startswith((".", "_")))
    return sorted(
        entry for entry in glob.glob(str(expanded), recursive=True) if Path(entry).is_file()
    )


def _remote_paths(uri: str) -> list[str]:
    """Return the URIs that a remote path, directory or glob stands for."""
    from fnmatch import fnmatchcase

    from pyarrow import fs

    scheme = uri.split("://", 1)[0]
    fixed = uri.split("*", 1)[0]
    filesystem, root = _filesystem(uri if fixed == uri else fixed.rpartition("/")[0])
    info = filesystem.get_file_info(root)
    if info.type == fs.FileType.File:
        return [uri]
    if info.type != fs.FileType.Directory:
        return []
    entries = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    paths = [f"{scheme}://{entry.path.lstrip('/')}" for entry in entries if entry.is_file]
    if scheme == "file":
        paths = [f"file:///{path.removeprefix('file://')}" for path in paths]
    return sorted(path for path in paths if fixed == uri or fnmatchcase(path, uri))


def _filesystem(path: str) -> tuple[Any, str]:
    from pyarrow import fs

    if "://" in path:
        try:
            return fs.FileSystem.from_uri(path)
        except ValueError as error:  # a scheme pyarrow does not know
            raise OSError(str(error)) from error
    return fs.LocalFileSystem(), str(Path(path).expanduser().absolute())


def _nothing_found(path: str, where: str) -> Problem:
    if any(character in path for character in "*?["):
        return Problem(
            "a glob matches no file",
            where=where,
            got=path,
            remedy=f"relative paths start from {Path.cwd()}" if "://" not in path else "",
        )
    folder = Path(path).expanduser().absolute().parent
    siblings = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(Path(path).name, siblings, n=1)
    remedy = f"relative paths start from {Path.cwd()}"
    if close:
        remedy = f"did you mean `{Path(path).with_name(close[0])}`?"
    elif "://" not in path and not folder.is_dir():
        remedy = f"there is no directory {folder} either; {remedy}"
    return Problem("no such file", where=where, got=path, remedy=remedy)
