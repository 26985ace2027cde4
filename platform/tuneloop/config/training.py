"""`training`: the method, its steps and its rates."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tuneloop.config.section import Section


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(16, ge=1)
    """Rank of the adapter matrices."""
    alpha: float = Field(32, gt=0)
    """The adapter is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapter."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules that get an adapter, or `all-linear` for every linear layer but the
    output layer."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023,
    arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the magnitude of each weight column separately from its direction (Liu et al. 2024,
    arXiv:2402.09353)."""


class TrainingConfig(Section):
    """How the model is finetuned."""

    method: Literal["lora", "full", "qlora"] = "lora"
    """`lora` trains adapters, `full` all weights; `qlora` trains adapters on a base held in 4 bits
    (Dettmers et al. 2023, arXiv:2305.14314) and needs GPUs and bitsandbytes."""
    lora: LoraConfig = LoraConfig()
    num_epochs: int = Field(1, ge=1)
    """Passes over the train rows."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after N optimizer steps, even in mid-epoch. Default: never."""
    global_batch_size: int = Field(8, ge=1)
    """Sequences per optimizer step."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate. Default: by method and size of the model (docs/training.md)."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    eval_every_steps: int | None = Field(None, ge=1)
    """Optimizer steps between evaluations on the validation split. Default: one after each
    epoch."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after N evaluations without a lower validation loss. Default: never."""
    keep: Literal["last", "best"] = "last"
    """Which weights become the model: those of the last step, or those with the lowest validation
    loss."""
    seed: int = 0
    """Seed of the row order, the adapters and dropout."""
