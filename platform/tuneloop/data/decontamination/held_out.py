"""Rows of the evaluation files that train rows are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuneloop.config import (
    FiltersConfig,
    MixedSourceConfig,
    SplitConfig,
    TaskConfig,
    TuneloopConfig,
)
from tuneloop.data.hashing.columns import compared_text
from tuneloop.data.hashing.content import Content
from tuneloop.data.schema import Stage
from tuneloop.data.sources.bad_rows import BadRow, refuse_bad_rows
from tuneloop.data.sources.files import SourceFile
from tuneloop.data.sources.readers import read_source


@dataclass(frozen=True)
class EvaluationRows:
    """Rows of one evaluation file. Lists have one item for each row.

    Args:
        name: Path of the file.
        labels: What a reason calls the row: `path:line`.
        texts: Whole text of the row; prompt and answer of a conversation.
        prompts: The prompt alone; empty for a document.
        compared: The part that deduplication compares, `data.dedup.on`.
    """

    name: str
    labels: list[str]
    texts: list[str]
    prompts: list[str]
    compared: list[str]


def read_evaluations(files: Sequence[SourceFile], config: TuneloopConfig) -> list[EvaluationRows]:
    """Return the rows of the evaluation files, one item for each file.

    Args:
        files: Files of `data.decontamination.sources`.
        config: Its `data.decontamination` and `data.dedup`.

    Raises:
        DataError: A file is empty, or more than `data.max_bad_rows_ratio` of its rows cannot be
            read; said with file and line.
    """
    sources = [
        MixedSourceConfig(**source.model_dump()) for source in config.data.decontamination.sources
    ]
    update = {"sources": sources, "split": SplitConfig(), "filters": mending(config.data.filters)}
    data = config.data.model_copy(update=update)
    evaluations = []
    for position, file in enumerate(files):
        is_text = sources[file.source].format == "text"
        # An evaluation need not be of this task: its labels and fields are its own. Whether its
        # rows bring the instruction makes no difference: it is no part of what is compared.
        instruction = "" if is_text else config.task.instruction
        task = TaskConfig(
            type="language_modeling" if is_text else "generation", instruction=instruction
        )
        content = Content.of(task)
        reading = config.model_copy(update={"task": task, "data": data})
        rows = EvaluationRows(file.name, [], [], [], [])
        bad: list[BadRow] = []
        for row in read_source(file, position, reading):
            # Of a row that is all boilerplate nothing is left, which makes it no bad row.
            if row["rejection"] and row["rejection"].stage is not Stage.FILTER:
                bad.append(BadRow(row["source"], row["rejection"]))
                continue
            messages, text = content.own(row)
            rows.labels.append(row["source"])
            rows.texts.append(compared_text(messages, text, "both"))
            rows.prompts.append("" if is_text else compared_text(messages, text, "prompt"))
            rows.compared.append(compared_text(messages, text, data.dedup.on))
        refuse_bad_rows(bad, len(bad) + len(rows.labels), data)
        evaluations.append(rows)
    return evaluations


def mending(filters: FiltersConfig) -> FiltersConfig:
    """Return the filters that mend texts, as train rows were mended, and none that drops rows."""
    return FiltersConfig(
        repair_text=filters.repair_text,
        template_markers="strip" if filters.template_markers == "strip" else "keep",
        boilerplate="strip" if filters.boilerplate == "strip" else "keep",
        personal_data="mask" if filters.personal_data == "mask" else "keep",
    )
