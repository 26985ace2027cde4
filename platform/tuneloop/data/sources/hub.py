"""Data sets in the layout of the Hugging Face Hub: on the Hub itself, or in a folder.

`datasets` knows which files a subset and its splits have. Those of a folder are read where they
are. What is on the Hub it fetches, converts to Arrow once for each commit and keeps under
`~/.cache/tuneloop/datasets` (`TUNELOOP_CACHE` moves it), from where it is read like other files.
This module loads `datasets`, which takes a second: it is imported only for such a source.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import datasets
import httpx
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import constants

from tuneloop.config import SourceConfig
from tuneloop.data.sources.splits import choose_splits
from tuneloop.errors import DataError, Problem
from tuneloop.models.bases.source import cache_directory

logger = logging.getLogger("tuneloop.data")

_HUB_ANSWERS_WITHIN_S = 5.0


class FetchedFile(NamedTuple):
    """A file of rows, and what people know it by."""

    path: str
    name: str


def fetch_repository(repository: str, source: SourceConfig, where: str) -> list[FetchedFile]:
    """Return the files with the rows of a repository's split.

    Args:
        repository: Result of `repository_of`.
        source: `subset` and `split` are used.
        where: Key of the source.

    Raises:
        DataError: There is none, the Hub does not answer, or `datasets` cannot read it.
    """
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
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, DatasetsError) as error:
        raise DataError(_problem(error, repository, source, where)) from error


@contextmanager
def _offline_while_the_hub_is_silent() -> Iterator[None]:
    """Let `datasets` look into its cache at once where it would try again for half a minute."""
    try:
        httpx.head(constants.ENDPOINT, timeout=_HUB_ANSWERS_WITHIN_S)
    except httpx.HTTPError:
        before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
    else:
        yield


def _own_files(
    config: datasets.BuilderConfig, splits: Sequence[str], where: str
) -> list[FetchedFile]:
    usual = type(config)()
    identity = ("name", "version", "data_dir", "data_files", "description", "features")
    options = {name: value for name, value in vars(config).items() if name not in identity}
    special = [name for name, value in options.items() if value != getattr(usual, name, None)]
    if special:
        raise DataError.of(
            "the folder's README.md has options that are not followed",
            where=f"{where}.path",
            got=", ".join(special),
            allowed="config_name, data_files, data_dir, default",
            remedy="convert its files to Parquet or JSONL, and name them",
        )
    return [
        FetchedFile(str(path), str(path)) for split in splits for path in config.data_files[split]
    ]


def _converted_files(
    builder: datasets.DatasetBuilder, splits: Sequence[str], source: SourceConfig
) -> list[FetchedFile]:
    files = []
    for split in splits:
        name = "/".join(part for part in (source.path, source.subset, split) if part)
        parts = [entry["filename"] for entry in builder.as_dataset(split).cache_files]
        for number, path in enumerate(parts):
            files.append(FetchedFile(path, name if len(parts) == 1 else f"{name}/{number}"))
    return files


def _problem(error: Exception, repository: str, source: SourceConfig, where: str) -> Problem:
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
