"""Data sets in the layout of the Hugging Face Hub: on the Hub itself, or in a folder.

`datasets` knows which files a subset and its splits have. Those of a folder are read where they
are. What is on the Hub it fetches, converts to Arrow once for each commit and keeps under
`~/.cache/tuneloop/datasets` (`TUNELOOP_CACHE` moves it), from where it is read like other files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from tuneloop.config import SourceConfig
from tuneloop.errors import DataError, Problem
from tuneloop.models.bases.source import cache_directory

logger = logging.getLogger("tuneloop.data")

ALL = "all"
_HUB_ANSWERS_WITHIN_S = 5.0
_HUB = "hf://datasets/"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# As the Hub tells the splits of a repository without a description; `datasets.data_files`.
_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_NO_WORD = re.compile(r"[-._ 0-9]+")


def repository_of(source: SourceConfig, file_suffixes: Sequence[str]) -> str | None:
    """Return the folder or Hub id that `datasets` has to load, or None for a source of plain files.

    Args:
        source: Whose `path` is looked at.
        file_suffixes: Of files that are read without it.
    """
    if source.path.startswith(_HUB):
        name = source.path.removeprefix(_HUB).rstrip("/")
        return name if name.count("/") <= 1 else None
    folder = Path(source.path).expanduser()
    if folder.is_dir():
        is_repository = source.subset is not None or bool(described_subsets(folder))
        return str(folder) if is_repository else None
    if folder.exists() or not _HUB_ID.fullmatch(source.path):
        return None
    is_local = folder.parent.is_dir() or PurePosixPath(source.path).suffix.lower() in file_suffixes
    return None if is_local else source.path


def described_subsets(folder: Path) -> list[Any]:
    """Return what the front matter of a folder's README.md says of subsets; empty if nothing."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        _, matter, _ = text.split("---\n", 2)
        described = yaml.safe_load(matter) if text.startswith("---\n") else None
    except (OSError, ValueError, yaml.YAMLError):
        return []
    if not isinstance(described, dict):
        return []
    return [described[name] for name in ("configs", "dataset_info") if described.get(name)]


def split_of_file(path: str, folder: str) -> str | None:
    """Return the split that a file's name in a folder tells, else that its directories tell."""
    for part in reversed(PurePosixPath(path).relative_to(folder).parts):
        for word in _NO_WORD.split(part.lower()):
            if word in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word]
    return None


def files_of_split(
    paths: list[str], source: SourceConfig, where: str, document_suffixes: Sequence[str]
) -> list[str]:
    """Return the files of a folder that belong to `source.split`.

    Args:
        paths: Of all files in the folder.
        source: Whose `path` is the folder.
        where: Key of the source.
        document_suffixes: Of files that are one document each: `training.md` is a chapter, no
            split, unless a split is asked for.

    Raises:
        DataError: The names tell several splits and none is named, or the one named is not there.
    """
    if source.split == ALL:
        return paths
    folder = Path(source.path).expanduser().as_posix()
    splits = {
        path: split_of_file(path, folder)
        for path in paths
        if source.split is not None
        or not set(PurePosixPath(path).suffixes[-2:]) & set(document_suffixes)
    }
    found = sorted({split for split in splits.values() if split is not None})
    if source.split is None and len(found) < 2:
        return paths
    chosen = choose_splits(source, found, where)
    return [path for path in paths if splits.get(path) in chosen]


def choose_splits(source: SourceConfig, found: Sequence[str], where: str) -> list[str]:
    """Return the splits to read.

    Args:
        source: Whose `split` is looked at.
        found: Splits that are there.
        where: Key of the source.

    Raises:
        DataError: There are several and none is named, or the one named is not there.
    """
    if source.split == ALL or (source.split is None and len(found) == 1):
        return list(found)
    if source.split is None:
        raise DataError(
            Problem(
                "the data set has several splits",
                where=f"{where}.path",
                got=source.path,
                allowed=", ".join(found),
                remedy=f"name one with {where}.split, or take every one with `{ALL}`",
            )
        )
    if source.split in found:
        return [source.split]
    raise DataError(
        Problem(
            "the data set has no such split",
            where=f"{where}.split",
            got=source.split,
            allowed=", ".join([*found, ALL]) if found else "no split: leave it out",
        )
    )


def fetch_repository(repository: str, source: SourceConfig, where: str) -> list[tuple[str, str]]:
    """Return (path, name for people) of the files with the rows of a repository's split.

    Args:
        repository: Of `repository_of`.
        source: `subset` and `split` are used.
        where: Key of the source.

    Raises:
        DataError: There is none, the Hub does not answer, or `datasets` cannot read it.
    """
    import datasets
    import httpx

    datasets.disable_progress_bars()
    is_folder = Path(repository).is_dir()
    cache = str(cache_directory().parent / "datasets")
    try:
        with nullcontext() if is_folder else _offline_while_the_hub_is_silent():
            builder = datasets.load_dataset_builder(repository, source.subset, cache_dir=cache)
            found = list(builder.config.data_files or builder.info.splits or ())
            splits = choose_splits(source, [str(split) for split in found], where)
            if is_folder:
                # Not converted: `datasets` takes an old conversion for that of changed files.
                return _own_files(builder.config, splits, where)
            logger.info("loading %s of %s", ", ".join(splits), source.path)
            builder.download_and_prepare()
            return _converted_files(builder, splits, source)
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        raise DataError(_problem(error, repository, source, where)) from error
    except datasets.exceptions.DatasetsError as error:
        raise DataError(_problem(error, repository, source, where)) from error


@contextmanager
def _offline_while_the_hub_is_silent() -> Iterator[None]:
    """Let `datasets` look into its cache at once where it would try again for half a minute."""
    import httpx
    from datasets import config
    from huggingface_hub import constants

    try:
        httpx.head(constants.ENDPOINT, timeout=_HUB_ANSWERS_WITHIN_S)
    except httpx.HTTPError:
        before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before
    else:
        yield


def _own_files(config: Any, splits: Sequence[str], where: str) -> list[tuple[str, str]]:
    usual = type(config)()
    identity = ("name", "version", "data_dir", "data_files", "description", "features")
    options = {name: value for name, value in vars(config).items() if name not in identity}
    special = [name for name, value in options.items() if value != getattr(usual, name, None)]
    if special:
        raise DataError(
            Problem(
                "the folder's README.md has options that are not followed",
                where=f"{where}.path",
                got=", ".join(special),
                allowed="config_name, data_files, data_dir, default",
                remedy="convert its files to Parquet or JSONL, and name them",
            )
        )
    return [(str(path), str(path)) for split in splits for path in config.data_files[split]]


def _converted_files(
    builder: Any, splits: Sequence[str], source: SourceConfig
) -> list[tuple[str, str]]:
    files = []
    for split in splits:
        name = "/".join(part for part in (source.path, source.subset, split) if part)
        parts = [entry["filename"] for entry in builder.as_dataset(split).cache_files]
        for number, path in enumerate(parts):
            files.append((path, name if len(parts) == 1 else f"{name}/{number}"))
    return files


def _problem(error: Exception, repository: str, source: SourceConfig, where: str) -> Problem:
    import httpx
    from datasets.exceptions import DatasetNotFoundError

    is_folder = Path(repository).is_dir()
    got = f"{source.path}: {_reason(error)}"
    from_here = f"relative paths start from {Path.cwd()}"
    is_silent = isinstance(error, ConnectionError | httpx.TransportError)
    # What a proxy answers in the Hub's place shows in no other way.
    if (is_silent or "LocalEntryNotFoundError" in str(error)) and not is_folder:
        return Problem(
            "the Hub does not answer and the data set is not in the local cache",
            where=f"{where}.path",
            got=source.path,
            remedy=f"check the network, or name a directory or file; {from_here}",
        )
    if isinstance(error, DatasetNotFoundError) and not is_folder:
        return Problem(
            "no such data set on the Hub, nor such a file or directory",
            where=f"{where}.path",
            got=got,
            remedy=f"a private or gated one needs `hf auth login`; {from_here}",
        )
    if isinstance(error, ValueError) and "config" in str(error).lower():
        return Problem("the data set's subset is not clear", f"{where}.subset", got)
    return Problem(
        "`datasets` cannot load the data set",
        where=f"{where}.path",
        got=got,
        remedy="name its files themselves, for example a glob of *.parquet",
    )


def _reason(error: BaseException) -> str:
    """Return the first line of what went wrong at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
