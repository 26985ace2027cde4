"""`generation`: rows that a larger model writes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tuneloop.config.data import InputSourceConfig
from tuneloop.config.evaluation import BudgetConfig, PriceConfig
from tuneloop.config.section import Section


class GenerationConfig(Section):
    """Rows that a larger model writes: `tuneloop generate`."""

    kind: Literal["pairs", "answers", "self_instruct", "paraphrases", "harder"] = "pairs"
    """`pairs`: questions and answers about documents. `answers`: to inputs that have none.
    `self_instruct`: new inputs like some train rows, and their answers. `paraphrases`: train rows
    with their input in other words. `harder`: harder variants of train inputs, and their
    answers."""
    endpoint: str = Field(pattern=r"^https?://")
    """Base URL of an OpenAI-compatible server, ending in `/v1`. An API key is read from
    TUNELOOP_GENERATION_API_KEY."""
    model: str
    """Name of the model on that server."""
    sources: list[InputSourceConfig] = Field(default_factory=list)
    """For `pairs`: the documents, format `text`. For `answers`: the inputs, laid out like
    `data.sources` without answers. The others are made from the train rows."""
    more_of: str | None = Field(None, pattern=r"^(marks|evaluations/[^/\s]+)$")
    """What the new rows are for: `marks` (train rows that people marked with *needs more like
    this*, and those most like a held-out row that they marked), or an evaluation,
    `evaluations/NAME` or `evaluations/NAME@vN`: train rows of the slices on which its last arm is
    shown to be worse. Default: all train rows. Not for `pairs` and `answers`."""
    instruction: str = ""
    """What the model is told to write. Default: a text for each kind. For `pairs`, `{num_pairs}`
    stands for the number of pairs and a request for a JSON list is appended. For `answers` it is
    added to `task.instruction`, which answers are asked for with."""
    num_rows: int | None = Field(None, ge=1)
    """Inputs to ask for or to answer; not for `pairs`. Default: one for each train row, or all of
    `sources`."""
    num_shots: int = Field(3, ge=0)
    """Solved train rows before each input that is answered."""
    num_samples: int = Field(1, ge=1)
    """Answers to ask for to each input; the most frequent one is taken."""
    min_agreement: float = Field(0.5, gt=0, le=1)
    """Smallest share of the answers to an input that have to say the same. Of free text, the same
    is ROUGE-L of 0.7 or more."""
    max_similarity: float = Field(0.7, gt=0, le=1)
    """A new input with ROUGE-L of so much or more with a train row's, or with one that was written
    before, is rejected."""
    min_rating: float | None = Field(None, ge=1, le=5)
    """Smallest rating, 1 to 5, that the model of `evaluation.judge` has to give a row. Default: no
    row is rated."""
    num_pairs_per_passage: int = Field(3, ge=1)
    """Pairs to ask for per passage."""
    max_characters: int = Field(4000, ge=200)
    """Longest passage; longer documents are cut into several."""
    max_tokens: int = Field(1024, ge=16)
    """Longest reply, in tokens."""
    temperature: float = Field(0.7, ge=0)
    """Sampling temperature."""
    concurrency: int = Field(8, ge=1)
    """Requests in flight."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Most requests begun in a minute. Default: as many as are answered."""
    price: PriceConfig | None = None
    """What the server charges, for `budget.money` and the card."""
    budget: BudgetConfig = BudgetConfig()
    seed: int = 0
    """Seed of the sampling and of the train rows that are shown."""

    @model_validator(mode="after")
    def _can_be_asked(self) -> GenerationConfig:
        takes_sources = self.kind in ("pairs", "answers")
        if takes_sources and not self.sources:
            raise ValueError(f"generation.kind `{self.kind}` needs generation.sources")
        if self.sources and not takes_sources:
            raise ValueError(
                f"generation.kind `{self.kind}` is made from the train rows: leave out "
                "generation.sources"
            )
        if self.more_of and takes_sources:
            raise ValueError(
                f"generation.more_of: kind `{self.kind}` is not made from train rows; set "
                "generation.kind to self_instruct, paraphrases or harder"
            )
        if self.kind == "pairs" and any(source.format != "text" for source in self.sources):
            raise ValueError("generation.sources take documents for `pairs`: format `text`")
        if self.kind == "pairs":
            try:
                self.instruction.format(num_pairs=self.num_pairs_per_passage)
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(
                    f"generation.instruction: only {{num_pairs}} may stand in braces ({error!r})"
                ) from error
        if self.budget.money is not None and self.price is None:
            raise ValueError("generation.budget.money needs generation.price")
        return self
