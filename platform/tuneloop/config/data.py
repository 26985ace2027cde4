"""`data`: sources, splits, filters, duplicates, decontamination."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tuneloop.config.section import Section
from tuneloop.config.task import TaskName, refuse_weights_for_some

SourceFormat = Literal[
    "alpaca",
    "prompt_completion",
    "question_answer",
    "messages",
    "sharegpt",
    "text",
    "columns",
    "label_studio",
]


class SourceConfig(Section):
    """Where rows come from."""

    path: str
    """A file, glob, directory, URI or Hub id; or `docstrings:stdlib` for the docstrings of the
    standard library of the running Python."""
    format: SourceFormat
    """The layout of a row."""
    needed_columns: ClassVar[frozenset[str]] = frozenset({"prompt", "completion"})
    columns: dict[Literal["prompt", "completion", "system"], str] = Field(default_factory=dict)
    """For `columns`: the column of the file that holds the prompt, the completion, and optionally
    the system message."""
    mend: list[Literal["json_within_json", "preferences"]] = Field(default_factory=list)
    """Rows that are refused unless named here. `json_within_json`: JSON text of JSON text, in tools
    or in the arguments of calls, is decoded once more. `preferences`: of rows with a preferred and
    a rejected answer the preferred one is learned, and nothing of the other."""
    split: str | None = None
    """The split to read from a data set that has several, for example `train`; `all` reads every
    split."""
    subset: str | None = None
    """The configuration to read from a Hub data set that has several."""

    @model_validator(mode="after")
    def _columns_name_both_sides(self) -> SourceConfig:
        if self.format == "columns" and not self.needed_columns <= set(self.columns):
            needed = " and ".join(f"columns.{name}" for name in sorted(self.needed_columns)[::-1])
            raise ValueError(f"format `columns` needs {needed}")
        if self.columns and self.format != "columns":
            raise ValueError("`columns` belong to format `columns`")
        if self.mend and self.format not in ("messages", "sharegpt", "alpaca"):
            raise ValueError("`mend` belongs to the formats `messages`, `sharegpt` and `alpaca`")
        return self


class InputSourceConfig(SourceConfig):
    """Where inputs without answers come from."""

    needed_columns: ClassVar[frozenset[str]] = frozenset({"prompt"})


class MixedSourceConfig(SourceConfig):
    """Where rows come from, and their share in a mixture."""

    task: TaskName | None = None
    """For `task.type: mixture`: the task of `task.tasks` the rows belong to."""
    weight: float | None = Field(None, gt=0)
    """The source's share of the train rows (for plain text: of the train tokens), relative to the
    weights of the other sources. As many rows are taken as keep these shares, none twice. Default:
    all rows of all sources."""


class SplitConfig(Section):
    """Which rows are held out for validation and test."""

    num_test_examples: int | None = Field(None, ge=1)
    """Rows in the test split; overrides `test_ratio`."""
    test_ratio: float = Field(0.1, gt=0, lt=1)
    """Share of rows in the test split, met as closely as rows that stay together allow."""
    num_validation_examples: int | None = Field(None, ge=1)
    """Rows in the validation split. Default: no validation split."""
    validation_ratio: float | None = Field(None, gt=0, lt=1)
    """Share of the rows outside the test split that form the validation split. Default: no
    validation split."""
    group_by: str | None = None
    """A column of the rows; rows with the same value are never split between train and test."""
    stratify_by: str | None = None
    """A column of the rows, for example the label; each value keeps its share of rows in the test
    and validation splits."""

    @property
    def validates(self) -> bool:
        """Whether there is a validation split."""
        return self.num_validation_examples is not None or self.validation_ratio is not None

    @model_validator(mode="after")
    def _one_size_of_validation(self) -> SplitConfig:
        if self.num_validation_examples is not None and self.validation_ratio is not None:
            raise ValueError("give num_validation_examples or validation_ratio, not both")
        if self.stratify_by is not None and self.stratify_by == self.group_by:
            raise ValueError("group_by and stratify_by are the same column: a group is on one side")
        return self


class DedupConfig(Section):
    """Which duplicate rows are removed. Removed rows are kept in `removed/`."""

    exact: bool = True
    """Remove rows that differ only in case and white space."""
    near: bool = True
    """Remove near-duplicates (MinHash-LSH, verified)."""
    threshold: float = Field(0.8, gt=0, le=1)
    """Jaccard similarity at or above which two rows are near-duplicates."""
    ngram_words: int = Field(5, ge=1, le=20)
    """Words per shingle."""
    on: Literal["both", "prompt", "completion"] = "both"
    """Which side of a pair is compared. With `both`, rows with different answers are not duplicates
    of each other."""


class FiltersConfig(Section):
    """Which rows are repaired or dropped for their quality. All filters are off by default."""

    repair_text: bool = False
    """Repair mojibake (UTF-8 read as another encoding), remove invisible characters, and normalise
    Unicode to NFC."""
    min_characters: int | None = Field(None, ge=1)
    """Shortest answer or document kept, in characters."""
    max_characters: int | None = Field(None, ge=1)
    """Longest answer or document kept, in characters."""
    repetition: bool = False
    """Drop answers and documents that repeat their own phrases."""
    template_markers: Literal["keep", "strip", "drop"] = "keep"
    """What happens to chat template markers in the text, such as `### Response:` or `[INST]`."""
    personal_data: Literal["keep", "mask", "drop"] = "keep"
    """What happens to e-mail addresses, phone and card numbers, public IP addresses and secret
    keys."""
    truncated_answers: bool = False
    """Drop answers that seem cut off in mid-sentence."""
    languages: list[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]] = Field(default_factory=list)
    """ISO 639-1 codes of the languages to keep; rows clearly in another language are dropped.
    Default: keep all languages."""
    boilerplate: Literal["keep", "strip", "drop"] = "keep"
    """What happens to web page lines without content (cookie notices, copyright lines, sharing
    buttons). `drop` also drops answers in which a model calls itself an AI."""
    max_misspelt_ratio: float | None = Field(None, ge=0, lt=1)
    """Largest share of words of an English answer or document that may be missing from the
    dictionary; rows above it are dropped."""


class DecontaminationConfig(Section):
    """Which train rows are removed because they repeat evaluation data.

    Train rows are compared with the test and validation splits, and with these files.
    """

    sources: list[SourceConfig] = Field(default_factory=list)
    """Evaluation files whose rows must not be trained on; written like `data.sources`."""
    ngram_words: int = Field(13, ge=8, le=50)
    """Words per n-gram; fewer, but at least 8, where the evaluation rows are shorter."""
    overlap_threshold: float = Field(0.5, gt=0, le=1)
    """Share of the shorter row's n-grams that both rows contain, at or above which the train row is
    contaminated."""


class DataConfig(Section):
    """From raw rows to a dataset artifact."""

    sources: list[MixedSourceConfig] = Field(min_length=1)
    num_train_examples: int | None = Field(None, ge=1)
    """Train on the first N rows of the shuffled train split, so smaller subsets are contained in
    larger ones. Default: all rows."""
    train_tasks: list[TaskName] | None = Field(None, min_length=1)
    """For `task.type: mixture`: train only on the rows of these tasks that a training on all of
    them would have; all tasks are evaluated. Default: all tasks."""
    max_synthetic_ratio: float = Field(0.8, ge=0, le=1)
    """Largest share of rows with `synthetic: true` among the train rows; more are left out. They
    are never tested on. 1 takes them all."""
    max_seq_len: int = Field(512, ge=8)
    """Longest row allowed, in tokens."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What happens to rows longer than `max_seq_len`. `truncate` leaves out the oldest turns, then
    the middle of the prompt; never an answer that stays or the system prompt. A row that still does
    not fit is dropped."""
    max_bad_rows_ratio: float = Field(0.0, ge=0, le=1)
    """Largest share of unreadable rows tolerated; above it preparation stops."""
    filters: FiltersConfig = FiltersConfig()
    dedup: DedupConfig = DedupConfig()
    split: SplitConfig = SplitConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    # In this order, or `no` were the name of a file.
    fixes: bool | str = Field(True, union_mode="left_to_right")
    """Whether people's marks on rows are applied: answers corrected, rows dropped, more answers
    accepted. A path names a file that `tuneloop fixes CONFIG --output FILE` wrote, in place of the
    marks of the workspace."""
    seed: int = 0
    """Seed of the shuffle, the split and the sampling of shares."""

    @model_validator(mode="after")
    def _all_sources_are_weighted_or_none(self) -> DataConfig:
        refuse_weights_for_some("sources", [source.weight for source in self.sources])
        return self
