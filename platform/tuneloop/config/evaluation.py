"""`evaluation`: arms, metrics, the judge, general tasks, floors."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tuneloop.config.data import MixedSourceConfig
from tuneloop.config.section import Section
from tuneloop.records import ARMS

# Without `evaluation.margin` a difference of less than this much of a score is none of note.
NO_DIFFERENCE = 0.05


class PriceConfig(Section):
    """What an endpoint charges; `in` and `out`, or a list of the two, are understood as well."""

    input: float = Field(ge=0)
    """Price of a million tokens of prompts."""
    output: float = Field(ge=0)
    """Price of a million tokens of answers."""

    @model_validator(mode="before")
    @classmethod
    def _is_written_in_several_ways(cls, value: object) -> Any:
        if isinstance(value, list) and len(value) == 2:
            return {"input": value[0], "output": value[1]}
        if isinstance(value, dict):
            return {{"in": "input", "out": "output"}.get(k, k): v for k, v in value.items()}
        return value


class ArmConfig(Section):
    """What answers: a model with a way of asking, an endpoint, a file, or the simple arm.

    Without any key, the arms `base`, `base+few-shot`, `base+constrained`, `simple`,
    `finetuned+constrained` and `finetuned` are those that `run` compares.
    """

    model: str | list[str] | None = None
    """`base`, `finetuned`, an artifact such as `models/faq@v2`, or what `model.base` takes; with
    `endpoint`, the model's name there. A list of artifacts, trained alike but for `training.seed`,
    is one arm: its score is their mean, and its intervals and tests hold for other seeds as well as
    other rows."""
    shots: int | None = Field(None, ge=0)
    """Solved examples from the train split in the prompt. Default: none, or `evaluation.num_shots`
    where `choose` is given."""
    choose: Literal["fixed", "nearest"] | None = None
    """`fixed`: the same examples in every prompt; `nearest`: those most alike the question.
    Default: `fixed`."""
    constrain: bool = False
    """True: the answer of a `classification` is the most probable label as a whole, that of an
    `extraction` is JSON under the schema of the train rows. An endpoint has to know
    `response_format`."""
    endpoint: str | None = Field(None, pattern=r"^https?://")
    """Base URL of an OpenAI-compatible server, ending in `/v1`."""
    api_key_env: str | None = None
    """The environment variable that holds the endpoint's API key."""
    price: PriceConfig | None = None
    """What the endpoint charges, in any one currency."""
    timeout_s: float = Field(300.0, gt=0)
    """Longest wait for one answer of the endpoint, in seconds."""
    answers: str | None = None
    """A JSONL file with answers made elsewhere: `example_id` or `prompt`, and `completion`."""
    simple: bool = False
    """True: a classifier on TF-IDF for `classification`, else the answer of the nearest train
    row."""

    @property
    def given(self) -> set[str]:
        """The keys that say something; none where the arm's name says it all."""
        return {
            n for n, field in type(self).model_fields.items() if getattr(self, n) != field.default
        }

    @field_validator("model")
    @classmethod
    def _one_is_no_list(cls, model: str | list[str] | None) -> str | list[str] | None:
        if not isinstance(model, list):
            return model
        if not model:
            raise ValueError("an empty list names no model")
        if len(model) == 1:
            return model[0]
        if strange := [one for one in model if not one.startswith("models/")]:
            raise ValueError(
                f"a list is of models that were trained here, such as `models/faq@v1`, not of "
                f"`{strange[0]}`: name that as an arm of its own"
            )
        if twice := [one for number, one in enumerate(model) if one in model[:number]]:
            raise ValueError(f"`{twice[0]}` is named twice")
        return model

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Self:
        given = self.given
        kinds = [kind for kind in ("endpoint", "answers", "simple") if kind in given]
        if len(kinds) > 1 or ("model" in given and kinds and kinds != ["endpoint"]):
            both = [*kinds, *(["model"] if "model" in given else [])]
            raise ValueError(f"an arm is of one kind, not {' and '.join(both)}")
        kind = kinds[0] if kinds else "model"
        allowed = {
            "endpoint": {
                *("endpoint", "model", "shots", "choose", "constrain", "api_key_env", "price"),
                "timeout_s",
            },
            "answers": {"answers"},
            "simple": {"simple"},
            "model": {"model", "shots", "choose", "constrain"},
        }[kind]
        if strange := sorted(given - allowed):
            raise ValueError(f"`{strange[0]}` does not belong to an arm with `{kind}`")
        if kind == "endpoint" and isinstance(self.model, list):
            raise ValueError("an endpoint has one `model`; a list is of models trained here")
        if kind == "endpoint" and not self.model:
            raise ValueError("an endpoint needs `model`, the model's name there")
        if kind == "model" and given and not self.model:
            raise ValueError(f"an arm with `{min(given)}` needs a `model`")
        if self.choose and self.shots == 0:
            raise ValueError("`choose` belongs to an arm with `shots`")
        return self


class BudgetConfig(Section):
    """What the endpoints of an evaluation or a generation may cost, all tries together."""

    money: float | None = Field(None, gt=0)
    """Most money, in the currency of `price`. Default: any."""
    tokens: int | None = Field(None, ge=1)
    """Most tokens of prompts and answers. Default: any number."""


class JudgeConfig(Section):
    """A model that says which of two answers is better; human votes correct it."""

    endpoint: str = Field(pattern=r"^https?://")
    """Base URL of an OpenAI-compatible server, ending in `/v1`."""
    model: str
    """The model's name there."""
    api_key_env: str | None = None
    """The environment variable that holds the endpoint's API key."""
    price: PriceConfig | None = None
    """What the endpoint charges; `evaluation.budget` holds for all together."""
    timeout_s: float = Field(300.0, gt=0)
    """Longest wait for one answer, in seconds."""
    kind: Literal["pairwise", "rubric"] = "pairwise"
    """`pairwise` shows two answers, in both orders; `rubric` rates each answer from 1 to 5, and the
    higher rating wins."""
    criteria: str = Field(
        "A good answer is correct, does what was asked, and adds nothing wrong.", min_length=1
    )
    """What makes an answer good, in the words the judge is told."""
    against: list[str] = Field(default_factory=list)
    """The arms that the last arm is compared with. Default: all others."""
    max_tokens: int = Field(512, ge=1)
    """Longest answer of the judge, in tokens."""


class ForgettingConfig(Section):
    """What a model may have forgotten: general tasks before and after, by lm-evaluation-harness."""

    tasks: list[str] = Field(min_length=1)
    """Tasks of lm-evaluation-harness by name, or YAML files of your own (`dataset_path: json` needs
    no network)."""
    limit: int | None = Field(None, ge=1)
    """Documents of each task. Default: all."""
    num_fewshot: int | None = Field(None, ge=0)
    """Solved documents in the prompt. Default: what the task says."""
    environment: str = ".lm-eval"
    """Directory of the virtual environment with lm-eval, never the one that trains; made, and
    lm-eval installed into it, where it is not there."""


ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,62}$")]

DottedPath = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")]


class MetricConfig(Section):
    """A metric by its name, with its options."""

    name: str = Field(min_length=1)
    """A metric of the task (`docs/evaluation.md` lists them), `exact_match_strict`, `chrf`, `bleu`,
    `number`, `multi_label_f1`, `json_f1`, `function_call`, `regex`, `perplexity`, or the dotted
    path to a function of your own, `my_module.my_scorer(reference, completion)`, that returns a
    number from 0 to 1."""
    tolerance: float = Field(0.0, ge=0)
    """For `number`: the largest error, as a share of the reference's number."""
    after: str = ""
    """For `number`: the mark before the answer, for example `####`."""
    pattern: str = ""
    """For `regex`: what an answer has to match; if it has a group, what the group finds has to be
    what it finds in the reference."""
    separator: str = Field(",", min_length=1)
    """For `multi_label_f1`: what parts labels, unless they are a JSON list."""

    @model_validator(mode="before")
    @classmethod
    def _a_name_alone_is_enough(cls, value: object) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_belong_to_the_metric(self) -> Self:
        belongs = {
            "tolerance": "number", "after": "number",
            "pattern": "regex", "separator": "multi_label_f1",
        }  # fmt: skip
        for option, metric in sorted(belongs.items()):
            # A configuration that was written out, as a sweep's trials are, names defaults as well.
            is_set = getattr(self, option) != type(self).model_fields[option].default
            if is_set and self.name.rpartition("/")[2] != metric:
                raise ValueError(f"`{option}` belongs to the metric `{metric}`")
        return self


class FloorConfig(Section):
    """The least that `tuneloop gate` asks of all rows, or of those of one kind."""

    at_least: float
    """The score in the primary metric that has to be shown, in its unit (0.8 is 80% of a score
    shown in per cent): the lower end of the interval has to reach it. Where `macro_f1` decides, the
    rows of one kind have to reach it in the metric of single answers, `accuracy`."""
    by: str | None = None
    """A column of the rows, or `length`, `reference_length`, `source`, `label`, `task`: see
    `slices.json`. Default: all rows together."""
    value: str | None = None
    """The value whose rows are meant. Default: those of each value."""

    @field_validator("value", mode="before")
    @classmethod
    def _is_a_text(cls, value: object) -> Any:
        return value if value is None or isinstance(value, str) else str(value)

    @model_validator(mode="after")
    def _a_value_is_of_a_column(self) -> Self:
        if self.value is not None and self.by is None:
            raise ValueError("`value` needs `by`, the column whose value it is")
        return self


class EvaluationConfig(Section):
    """How answers are scored."""

    arms: dict[ArmName, ArmConfig] = Field(default_factory=dict)
    """For `tuneloop evaluate`: what answers, by name; the last one is the one that the headline is
    about. Default: the arms that `run` compares, and no `finetuned` before there is one."""
    sources: list[MixedSourceConfig] = Field(default_factory=list)
    """For `tuneloop evaluate`: rows to answer in place of the test split; written like
    `data.sources`."""
    budget: BudgetConfig = BudgetConfig()
    judge: JudgeConfig | None = None
    """Who compares the answers of the last arm with those of others, for `evaluate` and `run`. Its
    win rates are shown once people have voted on some of the pairs."""
    forgetting: ForgettingConfig | None = None
    """General tasks on which the first and the last model served here are compared, for `evaluate`
    and `run`."""

    num_shots: int = Field(3, ge=0)
    """Solved examples from the train split in the prompt of the few-shot arm; 0 leaves the arm
    out."""
    max_tokens: int = Field(128, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    num_samples: int = Field(1, ge=1, le=1000)
    """Answers to each question, with `temperature` above 0. A row's score is their mean, and
    intervals and tests know both sources of noise: the rows and the sampling."""
    concurrency: int = Field(64, ge=1)
    """Requests in flight."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Confidence level of the intervals and comparisons."""
    num_resamples: int = Field(10_000, ge=100)
    """Bootstrap resamples."""
    split: Literal["test", "validation"] = "test"
    """The split that is answered. Choose settings on `validation`, and look at `test` once."""
    metrics: list[MetricConfig] = Field(default_factory=list)
    """What is measured, as names or as names with options. Default: the metrics of the task."""
    primary: str | None = None
    """The metric that decides: headline, comparison and sweeps read it. Default: the task's own, or
    the first of `metrics`."""
    tags: list[DottedPath] = Field(default_factory=list)
    """Error tags of your own, beside those of `docs/evaluation.md`: dotted paths to functions
    `my_module.my_tag(reference, completion)` that return None where nothing is wrong, else True or
    the text that shows it."""
    group_by: str | None = None
    """The column of the rows that belong together: they are right and wrong together, and intervals
    and tests know it. Default: the column of `data.split.group_by`, else rows with the same
    question or nearly the same."""
    margin: float | None = Field(None, gt=0)
    """The loss in the primary metric that does not matter, in its unit (0.02 is 2 points of a score
    shown in per cent). The headline then says `not worse` as well."""
    floors: list[FloorConfig] = Field(default_factory=list)
    """For `tuneloop gate`: scores that the candidate has to reach."""
    calibration: bool = False
    """True: labels that are ranked have probabilities, and the report says how far one can rely on
    them. The search among the labels takes longer then, the more so the less sure the model is."""
    max_unscored_ratio: float = Field(0.2, ge=0, le=1)
    """The largest share of an arm's questions that may stay without an answer. With more nothing is
    published; the next run asks for what is missing."""
    seed: int = 0
    """Seed of the few-shot examples, sampling and bootstrap."""

    @field_validator("arms", mode="before")
    @classmethod
    def _an_empty_arm_is_known_by_its_name(cls, arms: object) -> Any:
        if not isinstance(arms, dict):
            return arms
        arms = {name: {} if spec is None else spec for name, spec in arms.items()}
        empty = [name for name, spec in arms.items() if spec == {} and name not in ARMS]
        if empty:
            raise ValueError(
                f"evaluation.arms.{empty[0]} does not say what answers: give it `model`, "
                f"`endpoint`, `answers` or `simple`; only {', '.join(ARMS)} need nothing"
            )
        return arms

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"evaluation.num_samples is {self.num_samples}, and evaluation.temperature is 0: "
                "all answers to a question would be the same one; set a temperature above 0, or "
                "num_samples: 1"
            )
        return self

    @model_validator(mode="after")
    def _money_needs_prices(self) -> Self:
        unpriced = [n for n, arm in self.arms.items() if arm.endpoint and arm.price is None]
        if self.budget.money is not None and unpriced:
            raise ValueError(f"evaluation.budget.money needs evaluation.arms.{unpriced[0]}.price")
        if self.budget.money is not None and self.judge and self.judge.price is None:
            raise ValueError("evaluation.budget.money needs evaluation.judge.price")
        names = list(self.arms or ARMS)
        strange = [name for name in (self.judge.against if self.judge else []) if name not in names]
        if strange or (self.judge and len(names) < 2):
            raise ValueError(
                f"evaluation.judge.against names `{strange[0]}`; the arms are {', '.join(names)}"
                if strange
                else "evaluation.judge compares arms: name two of them in evaluation.arms"
            )
        if self.judge and names[-1] in self.judge.against:
            raise ValueError(
                f"evaluation.judge.against names `{names[-1]}`, the last arm, which is compared "
                "with others"
            )
        several = [name for name, arm in self.arms.items() if isinstance(arm.model, list)]
        if several and self.forgetting is not None:
            raise ValueError(
                f"evaluation.forgetting asks single models, and evaluation.arms.{several[0]} is "
                "several: name one of them, or leave evaluation.forgetting out"
            )
        if self.sources and self.split != "test":
            raise ValueError("evaluation.sources take the place of evaluation.split test only")
        return self
