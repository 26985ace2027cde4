"""Finding, opening and hashing the files behind `data.sources`."""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
from pyarrow import fs

from tuneloop.config import SourceConfig
from tuneloop.data.sources.docstrings import read_docstrings
from tuneloop.data.sources.formats import used_columns
from tuneloop.data.sources.partitions import PartitionValue, partitions_of
from tuneloop.data.sources.splits import choose_splits, files_of_split, repository_of
from tuneloop.errors import DataError, Problem

DOCSTRINGS = "docstrings:stdlib"
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
DOCUMENTS = (".txt", ".md", ".rst")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".lz4")
# What may hold rows and is not read. In a folder it is passed over, as a README is, but told.
_NOT_READ = (
    *(".xlsx", ".xls", ".ods", ".zip", ".tar", ".tgz", ".7z", ".xz", ".feather", ".orc", ".avro"),
    *(".pkl", ".pickle", ".sqlite", ".db", *COMPRESSIONS),
)
_LONGEST_DESCRIPTION = 1 << 20
_DOWNLOAD = (
    "download the file and name it; a data set of the Hub is named by its id, its files by "
    "hf://datasets/OWNER/NAME/PATH"
)


@dataclass(frozen=True)
class SourceFile:
    """One file of rows.

    Args:
        path: Local path, URI, or the name of a built-in source. A local path is kept from the
            root: workers run in other directories.
        source: Index in `data.sources`.
        content: The bytes themselves, where there is no file.
        name: What people know it by: its path as it was given, unless that is in a cache or holds
            a secret.
        columns: Names and values of columns that its folders name, such as `lang=en`.
    """

    path: str
    source: int
    content: bytes | None = None
    name: str = ""
    columns: Mapping[str, PartitionValue] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.path)
        if self.content is None and "://" not in self.path:
            object.__setattr__(self, "path", str(Path(self.path).expanduser().absolute()))

    @property
    def suffix(self) -> str:
        """The suffix that says which format it is in, without that of a compression."""
        name = PurePosixPath(_without_query(self.path))
        if name.suffix in COMPRESSIONS:
            name = name.with_suffix("")
        return ".jsonl" if self.content is not None else name.suffix.lower()

    @contextmanager
    def open(self) -> Iterator[pa.NativeFile]:
        """Open for reading bytes, decompressed. Raises OSError."""
        if self.content is not None:
            yield pa.BufferReader(self.content)
            return
        filesystem, path = _filesystem(self.path)
        if "://" not in self.path and not Path(path).exists() and Path(self.name).exists():
            # The worker of a job on another node has the job's files in a directory of its own.
            path = str(Path(self.name).absolute())
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


def identities(files: Sequence[SourceFile]) -> list[tuple[int, str, str]]:
    """Return what identifies some files wherever they lie: source, last part of the name, digest.

    The name has folders before it where they are columns.

    Raises:
        OSError: One cannot be read.
    """
    return [(file.source, _identifying_name(file), file.sha256()) for file in files]


def _identifying_name(file: SourceFile) -> str:
    folders = (f"{name}={value!r}" for name, value in file.columns.items())
    return "/".join([*folders, PurePosixPath(file.name).name])


def find_files(sources: Sequence[SourceConfig], key: str = "data.sources") -> list[SourceFile]:
    """Return the files of some sources in a fixed order: by source, then by path.

    Args:
        sources: Where rows come from.
        key: Their key in the YAML, which problems name.

    Raises:
        DataError: With one problem for each source that leads nowhere.
    """
    files: list[SourceFile] = []
    problems: list[Problem] = []
    for index, source in enumerate(sources):
        try:
            files += find_source(source, index, f"{key}.{index}")
        except DataError as error:
            problems += error.problems
    seen: dict[str, int] = {}
    for file in files:
        if file.path in seen:
            problems.append(
                Problem(
                    "a file is read twice",
                    where=f"{key}.{seen[file.path]} and {key}.{file.source}",
                    got=file.name,
                    remedy="name it in one source",
                )
            )
        seen[file.path] = file.source
    DataError.refuse(problems)
    columns = partitions_of([file.name for file in files])
    return [replace(file, columns=own) for file, own in zip(files, columns, strict=True)]


def describes_itself(source: SourceConfig) -> bool:
    """Return whether a local folder is read by what files in it say, as a copy of the Hub's is."""
    folder = Path(source.path).expanduser()
    return folder.is_dir() and (
        repository_of(source, ()) is not None
        or (folder / "dataset_dict.json").is_file()
        or bool(_saved_files(folder))
    )


def find_source(source: SourceConfig, index: int, where: str) -> list[SourceFile]:
    """Return the files of one source, by path.

    Args:
        index: Its number among all.
        where: Its key in the YAML.

    Raises:
        DataError: It leads nowhere.
    """
    if not source.path.strip():
        raise DataError.of("the path of a source is empty", where=f"{where}.path")
    if source.path.startswith("docstrings:"):
        return [_documentation(source, index, where)]
    repository = repository_of(source, (*TABLES, *DOCUMENTS, *COMPRESSIONS))
    if repository is not None:
        from tuneloop.data.sources.hub import fetch_repository

        fetched = fetch_repository(repository, source, where)
        files = [SourceFile(file.path, index, name=file.name) for file in fetched]
        return _usable(files, source, f"{where}.path")
    is_remote = "://" in source.path
    try:
        paths = _listed(source.path).kept if is_remote else _local_paths(source, where)
    except OSError as error:
        raise DataError.of(
            "cannot open a data source",
            where=f"{where}.path",
            got=f"{source.path}: {error}",
            remedy=_DOWNLOAD if source.path.startswith(("http://", "https://")) else "",
        ) from error
    if not paths:
        raise DataError(_nothing_found(source.path, f"{where}.path"))
    _refuse_needless_keys(source, where)
    files = [SourceFile(path, index, name=_public_name(path)) for path in paths]
    return _usable(files, source, f"{where}.path")


def _documentation(source: SourceConfig, index: int, where: str) -> SourceFile:
    if source.path != DOCSTRINGS:
        raise DataError.of(
            "no such source", where=f"{where}.path", got=source.path, allowed=DOCSTRINGS
        )
    lines = (json.dumps(row, ensure_ascii=False) for row in read_docstrings())
    return SourceFile(DOCSTRINGS, index, "".join(f"{line}\n" for line in lines).encode())


def _usable(files: list[SourceFile], source: SourceConfig, where: str) -> list[SourceFile]:
    """Return the files of known formats; raise DataError for one that was named and is not."""
    usable = TABLES + (DOCUMENTS if source.format == "text" else ())
    # In a directory other files (a README, a manifest) are passed over; a file that is named
    # has to be readable.
    if len(files) > 1 or files[0].name != _public_name(source.path):
        files = [file for file in files if file.suffix in usable] or files
    unusable = next((file for file in files if file.suffix not in usable), None)
    if unusable is not None:
        raise DataError.of(
            "unknown file format",
            where=where,
            got=unusable.name,
            allowed=", ".join(usable) + ", each also with " + ", ".join(COMPRESSIONS),
            remedy="plain text documents need format: text" if unusable.suffix in DOCUMENTS else "",
        )
    return files


def _refuse_needless_keys(source: SourceConfig, where: str) -> None:
    """Raise DataError for `split` or `subset` of what has none, such as a file or a glob."""
    if source.split is not None and not Path(source.path).expanduser().is_dir():
        raise DataError.of(
            "files have no splits",
            where=f"{where}.split",
            got=f"{source.split} of {source.path}",
            allowed="a directory or a Hub id",
            remedy="leave it out, and name the files of one split",
        )
    if source.subset is not None:
        raise DataError.of(
            "only a data set in the layout of the Hub has subsets",
            where=f"{where}.subset",
            got=f"{source.subset} of {source.path}",
            remedy="leave it out",
        )


def _local_paths(source: SourceConfig, where: str) -> list[str]:
    expanded = Path(source.path).expanduser()
    if expanded.is_file():
        return [source.path]
    if not expanded.is_dir():
        return _matches(expanded).kept
    if (expanded / "dataset_dict.json").is_file():
        # Written by `DatasetDict.save_to_disk`: one directory for each split.
        splits = sorted(entry.name for entry in expanded.iterdir() if entry.is_dir())
        chosen = choose_splits(source, splits, where)
        return [path for split in chosen for path in _saved_files(expanded / split)]
    if saved := _saved_files(expanded):
        if source.split is not None:
            choose_splits(source, [], where)
        return saved
    return files_of_split(_of_folder(expanded, source).kept, source, where, DOCUMENTS)


class _Found(NamedTuple):
    """Paths of the files in a folder or of a glob, sorted, and of those that are passed over."""

    kept: list[str]
    passed_over: list[str]


def _of_folder(folder: Path, source: SourceConfig) -> _Found:
    found = _Found([], [])
    for entry in sorted(folder.rglob("*"), key=str):
        if entry.is_file():
            is_data = not _is_hidden(entry.relative_to(folder)) and not _describes(entry, source)
            (found.kept if is_data else found.passed_over).append(str(entry))
        elif entry.is_symlink() and entry.is_dir():
            # Not followed: it may lead back, or to what is read already, as `latest` does.
            behind = sorted(inner for inner in entry.rglob("*") if inner.is_file())
            found.passed_over.extend(map(str, behind))
    return found


def _matches(pattern: Path) -> _Found:
    """Return the local files that a glob matches."""
    found = _Found([], [])
    for path in sorted(glob.glob(str(pattern), recursive=True, include_hidden=True)):
        if Path(path).is_file():
            is_hidden = _is_hidden(Path(path), pattern.parts)
            (found.passed_over if is_hidden else found.kept).append(path)
    return found


def passed_over(sources: Sequence[SourceConfig]) -> list[str]:
    """Return the files in the sources' folders and globs that could hold rows and are not read."""
    listed = [_in_folder(source) for source in sources]
    return [
        _public_name(path)
        for found in listed
        for paths, suffixes in ((found.passed_over, TABLES), (found.kept, _NOT_READ))
        for path in paths
        if SourceFile(path, 0).suffix in suffixes
    ]


def _in_folder(source: SourceConfig) -> _Found:
    """Return what is in the folder or glob of a source; nothing of one that is a file."""
    nothing = _Found([], [])
    if repository_of(source, TABLES) is not None:
        return nothing
    if "://" in source.path:
        try:
            return _listed(source.path)
        except OSError:
            return nothing
    path = Path(source.path).expanduser()
    if path.is_dir():
        is_saved = bool(_saved_files(path)) or (path / "dataset_dict.json").is_file()
        return nothing if is_saved else _of_folder(path, source)
    return nothing if path.is_file() else _matches(path)


def _is_hidden(path: PurePath, pattern: Sequence[str] = ()) -> bool:
    """Return whether programs keep such a file for themselves, as `.ipynb_checkpoints` or `_logs`.

    Args:
        path: From the folder that is read, or as a glob found it.
        pattern: Parts of the glob. What one of them names, `_logs` or `_*`, is not hidden; a part
            that begins with a wildcard names nothing.
    """
    hidden = [part for part in path.parts if part.startswith((".", "_")) and not _is_column(part)]
    naming = [part for part in pattern if not part.startswith(("*", "?"))]
    return any(not any(fnmatchcase(part, name) for name in naming) for part in hidden)


def _is_column(folder: str) -> bool:
    """Return whether a folder is `_name=value`, as Spark and Hive write columns."""
    return folder.startswith("_") and "=" in folder


def _describes(entry: Path, source: SourceConfig) -> bool:
    """Return whether a file describes the data beside it: JSON of one object that is no row."""
    if entry.suffix.lower() != ".json" or entry.stat().st_size > _LONGEST_DESCRIPTION:
        return False
    try:
        content = json.loads(entry.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and not set(used_columns(source)) & content.keys()


def _saved_files(folder: Path) -> list[str]:
    """Return the rows that `Dataset.save_to_disk` wrote; the JSON files beside describe them."""
    if not (folder / "state.json").is_file():
        return []
    return sorted(str(entry) for entry in folder.glob("*.arrow"))


def _listed(uri: str) -> _Found:
    """Return the URIs that a remote path, directory or glob stands for.

    What follows a `?` says how to reach the place, for example an endpoint; it is kept.
    """
    scheme = uri.split("://", 1)[0]
    uri = _without_query(whole := uri)
    query = whole.removeprefix(uri)
    fixed = uri.split("*", 1)[0]
    filesystem, root = _filesystem((uri if fixed == uri else fixed.rpartition("/")[0]) + query)
    info = filesystem.get_file_info(root)
    found = _Found([], [])
    if info.type == fs.FileType.File:
        return _Found([whole], [])
    if info.type != fs.FileType.Directory:
        return found
    pattern = PurePosixPath(uri).parts if fixed != uri else ()
    for entry in filesystem.get_file_info(fs.FileSelector(root, recursive=True)):
        path = f"{scheme}://{entry.path.lstrip('/')}"
        if scheme == "file":
            path = f"file:///{entry.path.lstrip('/')}"
        if entry.is_file and (not pattern or _fits(PurePosixPath(path).parts, pattern)):
            inner = PurePosixPath(entry.path.removeprefix(root).lstrip("/"))
            is_hidden = _is_hidden(inner, pattern)
            (found.passed_over if is_hidden else found.kept).append(path + query)
    return _Found(sorted(found.kept), sorted(found.passed_over))


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether the parts of a path are those of a glob, in which `**` is any number."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[number:], pattern[1:]) for number in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _public_name(path: str) -> str:
    """Return a path, or a URI without what says how to reach it: an endpoint, a key."""
    return re.sub(r"://[^/@]*@", "://", _without_query(path)) if "://" in path else path


def _without_query(uri: str) -> str:
    return uri.partition("?")[0] if "://" in uri else uri


def _filesystem(path: str) -> tuple[fs.FileSystem, str]:
    if "://" in path:
        try:
            return fs.FileSystem.from_uri(path)
        except ValueError as error:  # a scheme pyarrow does not know
            raise OSError(str(error)) from error
    return fs.LocalFileSystem(), str(Path(path).expanduser().absolute())


def _nothing_found(path: str, where: str) -> Problem:
    if any(character in _without_query(path) for character in "*?["):
        return Problem(
            "a glob matches no file",
            where=where,
            got=path,
            remedy="files and folders whose names begin with `.` or `_` are passed over unless the "
            "glob names them"
            + ("; `[[]` stands for a bracket in a name" if "[" in path else "")
            + (f"; relative paths start from {Path.cwd()}" if "://" not in path else ""),
        )
    if "://" in path:
        return Problem("no such file", where=where, got=path)
    if Path(path).expanduser().exists():
        is_folder = Path(path).expanduser().is_dir()
        return Problem(
            "the directory has no file with rows" if is_folder else "no file with rows",
            where=where,
            got=path,
            allowed=", ".join((*TABLES, *DOCUMENTS)),
            remedy="hidden files, and JSON that only describes data, are passed over",
        )
    folder = Path(path).expanduser().absolute().parent
    siblings = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(Path(path).name, siblings, n=1)
    remedy = f"relative paths start from {Path.cwd()}"
    if "\\" in path:
        remedy = f"folders are separated by `/` here, and no drive has a letter; {remedy}"
    elif close:
        remedy = f"did you mean `{Path(path).with_name(close[0])}`?"
    elif not folder.is_dir():
        remedy = f"there is no directory {folder} either; {remedy}"
    return Problem("no such file", where=where, got=path, remedy=remedy)
