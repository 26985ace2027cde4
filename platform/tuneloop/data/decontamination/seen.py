"""Which rows that are scored the train rows of a dataset hold: a score on them is no test.

Unlike `decontaminate`, which cleans a dataset against what it holds out itself, this compares any
rows with any dataset, without Ray: train rows are read block by block, and memory grows with the
rows that are scored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import DecontaminationConfig, FiltersConfig, TaskConfig
from tuneloop.data.decontamination.held_out import mending
from tuneloop.data.decontamination.ngrams import (
    SharedNgrams,
    count_common,
    count_ngrams,
    joined_counts,
    ngram_index,
    ngram_length,
    overlapping,
)
from tuneloop.data.filters.quality import apply_filters
from tuneloop.data.hashing.columns import Texts, compared_text
from tuneloop.data.hashing.content import Content
from tuneloop.data.hashing.signatures import normalised_hashes, word_counts

_BATCH_ROWS = 4096
_COLUMNS = ("row_id", "messages", "text", "tools", "task")


def find_seen(dataset: Artifact, rows: Sequence[Mapping[str, Any]], task: TaskConfig) -> set[str]:
    """Return the ids of the rows that a dataset's train split holds.

    A row is held if a train row has its id (which is made of its content), asks the same in any
    case and white space, or shares half of the n-grams of the shorter of the two, where n-grams
    that many rows have do not count (`ngrams`).

    Args:
        dataset: Its train split is read.
        rows: `row_id`, and `messages` that end with the answer, or `text`; `tools` and `task`
            where they have them.
        task: Whose instruction stands before these rows. Each side's own does not count.
    """
    config = dataset.manifest["config"]
    told = config.get("task")
    of_train = _Reading(TaskConfig.model_validate(told) if told else None)
    ids = {str(row["row_id"]) for row in rows}
    # Rows to score are not mended, and train rows were.
    filters = FiltersConfig.model_validate(config.get("data", {}).get("filters", {}))
    asked = _Reading(task, mending(filters)).sides(rows)
    by_prompt: dict[int, set[str]] = {}
    for row, prompt, key in zip(rows, asked.prompts, asked.prompt_keys(), strict=True):
        if prompt.strip():
            by_prompt.setdefault(key, set()).add(str(row["row_id"]))
    seen: set[str] = set()
    # Of a row that occurs several times the later ones have a number after their id.
    plain = {row_id.partition("-")[0]: row_id for row_id in ids}
    settings = DecontaminationConfig()
    texts = Texts.of(asked.texts)
    words = ngram_length(word_counts(texts), settings.ngram_words)
    prompts = Texts.of(asked.only_prompts)
    index = words and ngram_index(np.arange(len(rows)), texts, prompts, words)
    shared: list[SharedNgrams] = []
    start = 0
    for batch in _train_rows(dataset):
        for row in batch:
            row_id = str(row["row_id"])
            seen |= {row_id} & ids
            seen |= {plain[row_id]} if row_id in plain else set()
        sides = of_train.sides(batch)
        for key in set(sides.prompt_keys()) & by_prompt.keys():
            seen |= by_prompt[key]
        if index:
            of_batch = index.shared_with(Texts.of(sides.texts))
            shared.append(replace(of_batch, rows=of_batch.rows + start))
        start += len(batch)
    if index and shared:
        counts = joined_counts([count_ngrams(index, shared)])
        for of_batch in shared:
            common = count_common([(index, of_batch)], counts.common)
            threshold = settings.overlap_threshold
            pairs = overlapping(index, of_batch, counts, common, threshold)
            seen |= {str(rows[place]["row_id"]) for place in pairs.held_out.tolist()}
    return seen


def datasets_of(workspace: Workspace, model: Path) -> list[Artifact] | None:
    """Return the datasets a model artifact was trained on, and those of its base before it.

    Args:
        workspace: Where the datasets are looked up.
        model: Directory of the model.

    Returns:
        None where that is not known: the directory is no artifact, or a dataset is gone. A base
        that is no artifact was trained by others, on what nobody here knows: it does not count.
    """
    found: list[Artifact] = []
    datasets = workspace.published("datasets")
    # Versions whose train rows are the same share what a model is trained on.
    published = {a.train_fingerprint: a for a in reversed(datasets)}
    published |= {a.fingerprint: a for a in datasets}
    while (manifest := model / "artifact.json").is_file():
        config = json.loads(manifest.read_text(encoding="utf-8"))["config"]
        if config.get("dataset") not in published:
            return None
        found.append(workspace.open(published[config["dataset"]].ref))
        model = Path(str(config.get("base", "")))
    return found or None


class _Sides:
    """What rows say, as texts."""

    def __init__(self, texts: list[str], prompts: list[str], only_prompts: list[str]) -> None:
        self.texts = texts
        # Of a document, all of it.
        self.prompts = prompts
        # Of a document, nothing.
        self.only_prompts = only_prompts

    def prompt_keys(self) -> list[int]:
        keys: list[int] = normalised_hashes(Texts.of(self.prompts)).tolist()
        return keys


class _Reading:
    """Reads what rows say themselves, without the instruction of their task."""

    def __init__(self, task: TaskConfig | None, filters: FiltersConfig | None = None) -> None:
        self._filters = filters
        instructions = Content.of(task).instructions if task else {}
        self._content = Content(False, {"": "", **instructions})

    def sides(self, rows: Sequence[Mapping[str, Any]]) -> _Sides:
        texts, prompts, only_prompts = [], [], []
        for row in rows:
            name = row.get("task") or ""
            own = self._content.own(
                {
                    "messages": row.get("messages") or [],
                    "tools": row.get("tools") or "",
                    "text": row.get("text") or "",
                    "task": name if name in self._content.instructions else "",
                }
            )
            messages, text = own
            if self._filters is not None and messages:
                said = apply_filters([turn["content"] for turn in messages], True, self._filters)
                pairs = zip(messages, said.texts, strict=True)
                messages = [turn | {"content": mended} for turn, mended in pairs]
            elif self._filters is not None:
                (text,) = apply_filters([text], False, self._filters).texts
            prompt = compared_text(messages, "", "prompt")
            texts.append(compared_text(messages, text, "both"))
            only_prompts.append(prompt)
            prompts.append(prompt if messages else text)
        return _Sides(texts, prompts, only_prompts)


def _train_rows(dataset: Artifact) -> Iterator[list[dict[str, Any]]]:
    for file in sorted((dataset.path / "train").glob("*.parquet")):
        source = pq.ParquetFile(file)
        names = [name for name in _COLUMNS if name in source.schema_arrow.names]
        for batch in source.iter_batches(_BATCH_ROWS, columns=names):
            yield batch.to_pylist()
