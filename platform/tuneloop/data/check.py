"""Checking the data without preparing it: every row, its length, and what would be learned."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tuneloop.config import DataConfig, TuneloopConfig
from tuneloop.data.decontamination.held_out import read_evaluations
from tuneloop.data.filters.quality import has_template_marker
from tuneloop.data.hashing.columns import compared_text
from tuneloop.data.hashing.content import Content
from tuneloop.data.schema import ReasonCode, Rejection, SourceRow, Stage
from tuneloop.data.sources.bad_rows import (
    BadRow,
    ChangedRow,
    LongRow,
    bad_row_problems,
    changed_problems,
    dropped_problem,
    nothing_left_problem,
    refuse_bad_rows,
    refuse_mismatched_formats,
    too_long_problem,
    truncated_problem,
)
from tuneloop.data.sources.dialect import file_notices
from tuneloop.data.sources.files import find_files
from tuneloop.data.sources.readers import read_source
from tuneloop.data.split.shared_texts import Pair, template_notice, undrawn_texts
from tuneloop.data.split.synthetic import no_people_problem
from tuneloop.data.tokenize.rendering import (
    NUM_VERIFIED,
    Rendering,
    conversation_of,
    percentiles,
    sample_of,
    unrenderable,
)
from tuneloop.data.tokenize.truncation import fit
from tuneloop.data.write.own_columns import (
    Shape,
    json_text_notice,
    merged_shapes,
    schema_of,
    shapes_of,
)
from tuneloop.errors import DataError, Problem
from tuneloop.languages import refuse_unknown_languages
from tuneloop.models.bases.source import BaseModel
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.chat.template import RenderError
from tuneloop.records import Sample
from tuneloop.text import counted

# Usable rows that stand for all where they are compared with one another.
_SPREAD = 64
_SHOWN_SAMPLES = 3
_ROWS_AT_ONCE = 1000
# Rows whose prompts are held against each other.
_MOST_PAIRS = 5000
# For both sides of the split.
_FEWEST_UNITS = 2
_MOST_TOKENS_OF_A_CHARACTER = 4
_CUT = "cut to data.max_seq_len"
_MARKED = (
    "marks of a chat template in the text, learned as text; "
    "data.filters.template_markers: strip takes them out"
)
_PARTS_OF_PROMPTS = frozenset(
    {
        *("context", "contexts", "passage", "system", "system_prompt", "instruction", "input"),
        *("history", "tools", "functions"),
    }
)
T = TypeVar("T")


@dataclass(frozen=True)
class TokenSample:
    """One row as the model sees it.

    Args:
        source: Where the row came from, `path:line`.
        tokens: Text of each token, and whether it is a target.
    """

    source: str
    tokens: list[tuple[str, bool]]


@dataclass(frozen=True)
class DataCheck:
    """What is known of the rows before anything is prepared.

    Args:
        findings: Everything that would stop `prepare`; empty if nothing does.
        notices: Rows that would be dropped, as the configuration allows.
        num_usable: Rows that would go on to deduplication and split.
        length_tokens: Percentiles `p50` to `p99` and `max` of the rows' lengths.
        target_length_tokens: Likewise of their targets.
        target_ratio: Share of all tokens that are targets.
        samples: Rows to show.
        spread: Up to 64 rows, spread evenly over the data; none of plain text.
        refused: Rows that cannot be used, with those that are too long.
        changed: Rows that are used otherwise than they were written; one may stand here twice.
    """

    findings: list[Problem] = field(default_factory=list)
    notices: list[Problem] = field(default_factory=list)
    num_rows: int = 0
    num_usable: int = 0
    num_tokens: int = 0
    length_tokens: dict[str, int] = field(default_factory=dict)
    target_length_tokens: dict[str, int] = field(default_factory=dict)
    target_ratio: float = 0.0
    samples: list[TokenSample] = field(default_factory=list)
    spread: list[Sample] = field(default_factory=list)
    refused: list[BadRow] = field(default_factory=list)
    changed: list[ChangedRow] = field(default_factory=list)


def check(config: TuneloopConfig, base: BaseModel) -> DataCheck:
    """Return what is wrong with the data and what it looks like; reads every row, without Ray.

    Args:
        config: Configuration of the run.
        base: Whose tokenizer and chat template render the rows.
    """
    try:
        refuse_mismatched_formats(config)
        refuse_unknown_languages(config.data.filters.languages)
        files = find_files(config.data.sources)
        held_out = config.data.decontamination.sources
        evaluation_files = find_files(held_out, "data.decontamination.sources")
        read_evaluations(evaluation_files, config)
    except DataError as error:
        return DataCheck(findings=list(error.problems))
    rendering = Rendering(str(base.path), config.model.chat_template)
    limit = config.data.max_seq_len if config.task.type != "language_modeling" else None
    bad: list[BadRow] = []
    too_long: list[LongRow] = []
    truncated: list[LongRow] = []
    changed: list[ChangedRow] = []
    marked: list[ChangedRow] = []
    pairs: list[Pair] = []
    places: list[str] = []
    content = Content.of(config.task)
    dropped: list[str] = []
    lengths: list[int] = []
    targets: list[int] = []
    num_synthetic = 0
    prompts: set[str] = set()
    groups: set[str] = set()
    columns: dict[str, Shape] = {}
    extras: list[str] = []
    shown: _EvenlySpread[tuple[str, Sample]] = _EvenlySpread(_SHOWN_SAMPLES)
    spread: _EvenlySpread[Sample] = _EvenlySpread(_SPREAD)
    total = 0
    rows = (row for place, file in enumerate(files) for row in read_source(file, place, config))
    first = list(itertools.islice(rows, NUM_VERIFIED))
    if len(first) == NUM_VERIFIED:
        # Fewer are encoded sooner than a backend is loaded.
        rendering, _ = rendering.verified(row for row in first if row["rejection"] is None)
    renderer = rendering.renderer()
    for row in itertools.chain(first, rows):
        total += 1
        if (rejection := row["rejection"]) is not None:
            if rejection.stage is Stage.FILTER:
                dropped.append(rejection.reason.summary)
            else:
                bad.append(BadRow(row["source"], rejection))
            continue
        extras.append(row["extra"])
        if len(extras) == _ROWS_AT_ONCE:
            columns = merged_shapes([columns, shapes_of(extras)])
            extras.clear()
        try:
            sample = sample_of(row, renderer)
        except RenderError as error:
            bad.append(BadRow(row["source"], unrenderable(error)))
            continue
        if limit is not None and len(sample.input_ids) > limit:
            long = LongRow(row["source"], len(sample.input_ids))
            may_cut = config.data.too_long == "truncate"
            fitted = fit(*conversation_of(row), renderer, limit) if may_cut else None
            if fitted is None:
                too_long.append(long)
                continue
            truncated.append(long)
            sample = fitted.sample
        changed += [ChangedRow(row["source"], what) for what in row["changes"].split(", ") if what]
        if config.data.filters.template_markers == "keep" and _has_marker(row):
            marked.append(ChangedRow(row["source"], _MARKED))
        num_synthetic += row["synthetic"]
        if not row["synthetic"] and len(prompts) < _FEWEST_UNITS:
            prompts.add(_plain_prompt(row))
        if not row["synthetic"] and len(groups) < _FEWEST_UNITS:
            groups.add(row["group"])
        lengths.append(len(sample.input_ids))
        targets.append(sum(sample.loss_mask))
        if limit is not None and len(pairs) < _MOST_PAIRS and not row["synthetic"]:
            pairs.append(_pair(row, content))
            places.append(row["source"])
        shown.offer((row["source"], sample))
        if limit is not None:
            spread.offer(sample)
    findings, notices = _findings(config, bad, too_long, total)
    if truncated:
        notices.append(truncated_problem(truncated, total, config.data))
    named = [*config.data.sources, *held_out, *config.evaluation.sources]
    notices += file_notices([*files, *evaluation_files], named)
    columns = merged_shapes([columns, shapes_of(extras)])
    notices += json_text_notice(schema_of(columns))
    notices += _unseen_context(config, columns)
    if config.data.split.group_by is None and (found := undrawn_texts(pairs)):
        where = f"{places[found.first]}, {places[found.second]}"
        notices.append(template_notice(found.num_rows, found.num_texts, where))
    findings += _cluster_findings(config, columns)
    if dropped and len(dropped) + len(bad) + len(too_long) == total:
        findings.append(nothing_left_problem(dropped))
    elif not findings:
        is_grouped = config.data.split.group_by is not None
        num_units = min(len(prompts), len(groups)) if is_grouped else len(prompts)
        if num_synthetic and num_synthetic == len(lengths):
            findings.append(no_people_problem(num_synthetic))
        else:
            num_people = len(lengths) - num_synthetic
            findings += _split_findings(num_people, num_synthetic, num_units, config.data)
    if dropped and len(dropped) + len(bad) + len(too_long) < total:
        notices.append(dropped_problem(dropped, total))
    notices += changed_problems([*changed, *marked], total)
    return DataCheck(
        findings,
        notices,
        num_rows=total,
        num_usable=len(lengths),
        num_tokens=sum(lengths),
        length_tokens=percentiles(lengths),
        target_length_tokens=percentiles(targets),
        target_ratio=round(sum(targets) / max(1, sum(lengths)), 4),
        samples=[_token_sample(source, sample, renderer) for source, sample in shown.chosen()],
        spread=spread.chosen(),
        refused=[*bad, *(BadRow(row.place, _too_long(row, limit)) for row in too_long)],
        changed=[*changed, *(ChangedRow(row.place, _CUT) for row in truncated)],
    )


def _too_long(row: LongRow, limit: int | None) -> Rejection:
    what = f"longer than {limit:,} tokens"
    return Rejection(Stage.TOKENIZE, ReasonCode.TOO_LONG, what, f"{row.num_tokens:,} tokens")


def _findings(
    config: TuneloopConfig, bad: list[BadRow], too_long: list[LongRow], total: int
) -> tuple[list[Problem], list[Problem]]:
    """Return what stops a preparation, and what it would drop."""
    findings: list[Problem] = []
    notices: list[Problem] = []
    try:
        refuse_bad_rows(bad, total, config.data)
        notices += bad_row_problems(bad, total, config.data)
    except DataError as error:
        findings += error.problems
    if too_long:
        problem = too_long_problem(too_long, total, config.data)
        allowed = config.data.too_long != "error" and len(bad) + len(too_long) < total
        (notices if allowed else findings).append(problem)
    return findings, notices


def _pair(row: SourceRow, content: Content) -> Pair:
    own = content.own(row).messages
    return Pair(compared_text(own, "", "prompt"), compared_text(own, "", "completion"))


def _has_marker(row: SourceRow) -> bool:
    texts = [message["content"] for message in row["messages"]] or [row["text"]]
    return any(map(has_template_marker, texts))


def _plain_prompt(row: SourceRow) -> str:
    """Return what keeps rows on one side of the split: the prompt, or all of a document."""
    texts = [message["content"] for message in row["messages"][:-1]] or [row["text"]]
    return " ".join(" ".join(texts).lower().split())


def _split_findings(
    num_rows: int, num_synthetic: int, num_units: int, data: DataConfig
) -> list[Problem]:
    """Return why rows cannot be split even if none is removed as a duplicate.

    Args:
        num_rows: Usable ones that people wrote.
        num_synthetic: Usable ones that a model wrote: they are only trained on.
        num_units: Prompts, or groups of `split.group_by`, that differ; more than two need not be
            counted.
    """
    split, limit = data.split, data.num_train_examples
    tested = split.num_test_examples or 1
    held_out = tested + (split.num_validation_examples or int(split.validates))
    if num_units < _FEWEST_UNITS:
        return [
            Problem(
                "the rows cannot be split",
                where="data.split.group_by" if num_rows > 1 and split.group_by else "data.split",
                got=f"{counted(num_rows, 'row')} that stay together",
                allowed="at least two prompts that differ, and two groups with split.group_by",
                remedy="add rows, or group by another column",
            )
        ]
    in_all = num_rows + num_synthetic
    if held_out >= num_rows or (limit is not None and limit + held_out > in_all):
        return [
            Problem(
                "not enough rows for the splits",
                where="data.split, data.num_train_examples",
                got=counted(num_rows, "usable row")
                + f" that people wrote and {num_synthetic:,} synthetic ones" * bool(num_synthetic),
                allowed=f"at least {held_out + (limit or 1):,}: {tested:,} to test, "
                f"{held_out - tested:,} to validate, {limit or 1:,} to train on",
                remedy="lower the numbers, or add data",
            )
        ]
    return []


class _EvenlySpread(Generic[T]):
    """A few items spread evenly over a stream of unknown length."""

    def __init__(self, count: int) -> None:
        self.count, self.step, self.seen = count, 1, 0
        self.items: list[T] = []

    def offer(self, item: T) -> None:
        if self.seen % self.step == 0:
            self.items.append(item)
            if len(self.items) >= 2 * max(1, self.count):
                self.items, self.step = self.items[::2], self.step * 2
        self.seen += 1

    def chosen(self) -> list[T]:
        if not self.items or not self.count:
            return []
        stride = max(1, len(self.items) // self.count)
        return self.items[::stride][: self.count]


def _cluster_findings(config: TuneloopConfig, columns: Mapping[str, Shape]) -> list[Problem]:
    """Return that the rows lack the column of `evaluation.group_by`, if they do."""
    name = config.evaluation.group_by
    # Rows of `evaluation.sources` have columns of their own.
    if (
        name is None
        or config.evaluation.sources
        or not {name, f"original_{name}"}.isdisjoint(columns)
    ):
        return []
    return [
        Problem(
            "the rows have no such column to group them by",
            where="evaluation.group_by",
            got=name,
            allowed=", ".join(columns) or "no column is carried along",
            remedy="name a column of the rows, or leave the setting out",
        )
    ]


def _unseen_context(config: TuneloopConfig, columns: Mapping[str, Shape]) -> list[Problem]:
    """Return the notice of columns beside pairs whose names say that the prompt needs them."""
    formats = {source.format for source in config.data.sources}
    unseen = [
        name for name in columns if name.lower().removeprefix("original_") in _PARTS_OF_PROMPTS
    ]
    if not unseen or not formats & {"question_answer", "prompt_completion", "columns"}:
        return []
    return [
        Problem(
            "a column has the name of a part of the prompt, and the model does not see it",
            where="data.sources",
            got=", ".join(unseen),
            remedy="if the answer depends on it, write it into the column of the prompt, or take "
            "format: alpaca with `instruction`, `input` and `output`",
        )
    ]


def _token_sample(source: str, sample: Sample, renderer: Renderer) -> TokenSample:
    tokens: list[tuple[str, bool]] = []
    waiting: list[int] = []
    for token, bit in zip(sample.input_ids, sample.loss_mask, strict=True):
        waiting.append(token)
        text = renderer.tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
        # A character may take up to four tokens; it is shown with the last of them.
        if not text.endswith("\ufffd") or len(waiting) == _MOST_TOKENS_OF_A_CHARACTER:
            tokens.append((text, bool(bit)))
            waiting = []
    if waiting:
        text = renderer.tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
        tokens.append((text, bool(sample.loss_mask[-1])))
    return TokenSample(source, tokens)
