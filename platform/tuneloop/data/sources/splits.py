"""Which split a source's files belong to, and whether it is a data set in the Hub's layout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from tuneloop.config import SourceConfig
from tuneloop.errors import DataError

ALL = "all"
_HUB = "hf://datasets/"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# How the Hub finds the splits of a repository without a description; `datasets.data_files`.
_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_NO_WORD = re.compile(r"[-._ 0-9]+")


def repository_of(source: SourceConfig, file_suffixes: Sequence[str]) -> str | None:
    """Return the folder or Hub id that `datasets` has to load, or None for a source of plain files.

    Args:
        source: Its `path` is looked at.
        file_suffixes: Suffixes of files that are read without `datasets`.
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
    """Return the split that a file's name in a folder implies, or else its directories' names."""
    for part in reversed(PurePosixPath(path).relative_to(folder).parts):
        for word in _NO_WORD.split(part.lower().removeprefix("split=")):
            if word in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word]
    return None


def files_of_split(
    paths: list[str], source: SourceConfig, where: str, document_suffixes: Sequence[str]
) -> list[str]:
    """Return the files of a folder that belong to `source.split`.

    Args:
        paths: Paths of all files in the folder.
        source: Its `path` is the folder.
        where: Key of the source.
        document_suffixes: Suffixes of files that are one document each: `training.md` is a
            chapter, no split, unless a split is asked for.

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
        source: Its `split` is looked at.
        found: Splits that are there.
        where: Key of the source.

    Raises:
        DataError: There are several and none is named, or the one named is not there.
    """
    if source.split == ALL or (source.split is None and len(found) == 1):
        return list(found)
    if source.split is None:
        raise DataError.of(
            "the data set has several splits",
            where=f"{where}.path",
            got=source.path,
            allowed=", ".join(found),
            remedy=f"name one with {where}.split, or take every one with `{ALL}`",
        )
    if source.split in found:
        return [source.split]
    raise DataError.of(
        "the data set has no such split",
        where=f"{where}.split",
        got=source.split,
        allowed=", ".join([*found, ALL]) if found else "no split: leave it out",
    )
