"""The model card: what was trained from what, how it went, and how to load it."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence

from tuneloop.artifacts import Artifact
from tuneloop.config import TuneloopConfig
from tuneloop.models.bases.source import BaseModel
from tuneloop.text import counted
from tuneloop.training.methods import METHODS
from tuneloop.training.results import StepRecord, TrainingResult, last_steps, mean_loss
from tuneloop.training.validation import best_step
from tuneloop.training.worked import usual_learning_rate

_CURVE_ROWS = 12


def model_card(
    config: TuneloopConfig, base: BaseModel, dataset: Artifact, result: TrainingResult
) -> str:
    """Return the card as Markdown."""
    training, last = config.training, result.log[-1]
    method = METHODS[training.method]
    tokens = sum(row["num_tokens"] for row in result.log)
    rate = training.learning_rate or usual_learning_rate(training.method, result.num_parameters)
    share = result.num_trainable / result.num_parameters
    facts = [
        ("base model", f"`{base.name}`"),
        ("licence of the base", base.license),
        ("task", config.task.describe()),
        ("data", f"`{dataset.ref}`, fingerprint `{dataset.fingerprint[:16]}`"),
        ("method", method.describe(training)),
        ("trained parameters", f"{result.num_trainable:,} ({share:.2%})"),
        (
            "steps",
            f"{last['step']:,} of {counted(training.global_batch_size, 'row')}, "
            + counted(last["epoch"], "epoch"),
        ),
        ("tokens", f"{tokens:,}"),
        ("learning rate", f"{rate:g}, {training.lr_scheduler}"),
        ("loss", f"{result.log[0]['loss']:.4f} at the first step, {_final_loss(result.log)}"),
        *_validation(config, result),
        *_rows(result),
        (
            "time",
            f"{last['elapsed_s']:,.0f} s, {tokens / max(1e-9, last['elapsed_s']):,.0f} tokens/s",
        ),
        ("seed", str(training.seed)),
        ("date", datetime.datetime.now(datetime.UTC).date().isoformat()),
    ]
    parity = result.parity
    parts = [
        f"# `{config.name}`",
        "Finetuned with tuneloop. The figures of the evaluation are in the evaluation artifact "
        "that names this model.",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts),
        "## Loss\n\nMean over the target tokens of each step's batch.\n\n" + _curve(result.log),
        "## Load it\n\nMerged weights, like any model:\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n```',
    ]
    if method.has_adapter:
        parts.append(
            "The adapter alone, on top of the base:\n\n```python\n"
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            'base = AutoModelForCausalLM.from_pretrained("BASE")\n'
            'model = PeftModel.from_pretrained(base, "PATH/adapter")\n```'
        )
    parts += [
        "## Checked\n\nThe reloaded "
        + " and ".join(parity.arms)
        + f" answered {counted(parity.prompts, 'training prompt')} "
        f"({counted(parity.tokens, 'token')}) like the model "
        "in training: "
        + (
            "the same greedy tokens"
            if parity.greedy_equal
            else f"{parity.num_ties} ties aside, the same greedy tokens"
        )
        + f", log-probabilities within {parity.max_abs_logprob_diff:.1e}. Prompts are rendered "
        "as in `tuneloop_render.json`.",
        "## Licence\n\n"
        f"The weights derive from `{base.name}` (licence: {base.license}); its terms apply.",
    ]
    return "\n\n".join(parts) + "\n"


def _final_loss(log: Sequence[StepRecord]) -> str:
    steps = last_steps(log)
    over = "at the last" if len(steps) == 1 else f"on average over the last {len(steps):,}"
    return f"{mean_loss(steps):.4f} {over}"


def _validation(config: TuneloopConfig, result: TrainingResult) -> list[tuple[str, str]]:
    """Return the validation losses, and the step whose weights were kept."""
    best = best_step(result.log)
    if best is None:
        return []
    last = next(row for row in reversed(result.log) if row["validation_loss"] is not None)
    kept = best if config.training.keep == "best" else result.log[-1]["step"]
    least = result.log[best - 1]["validation_loss"]
    return [
        (
            "validation loss",
            f"{least:.4f} at step {best}, {last['validation_loss']:.4f} at the last measurement",
        ),
        ("weights of step", f"{kept:,}"),
    ]


def _rows(result: TrainingResult) -> list[tuple[str, str]]:
    """Return why rows were not packed, where they were not."""
    if not result.packing_fault:
        return []
    why = result.packing_fault.replace("|", "\\|")
    return [("rows", f"one by one in the model's own attention, as they cannot be packed: {why}")]


def _curve(log: list[StepRecord]) -> str:
    """Return about a dozen points of the curve, the first and the last among them."""
    every = max(1, math.ceil((len(log) - 1) / (_CURVE_ROWS - 1)))
    picked = log[::every] if (len(log) - 1) % every == 0 else [*log[::every], log[-1]]
    lines = ["| step | loss | learning rate | gradient norm |", "|---|---|---|---|"]
    for row in picked:
        lines.append(
            f"| {row['step']} | {row['loss']:.4f} | {row['learning_rate']:.2e} "
            f"| {row['grad_norm']:.3f} |"
        )
    return "\n".join(lines)
