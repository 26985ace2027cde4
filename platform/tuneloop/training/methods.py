"""Training methods: what differs between training all weights and training adapters.

To add one, write a class like `Lora` in a module of its own, enter it in `METHODS`, and add its
name to `training.method` in the configuration.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from typing import TYPE_CHECKING, Any

import torch

from tuneloop.config import LoraConfig, TrainingConfig, TuneloopConfig
from tuneloop.errors import ModelError, Problem
from tuneloop.models.export.exporter import four_bits

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Method:
    """One way to change a model's weights; this one changes all of them.

    Attributes:
        has_adapter: The model artifact holds an adapter beside the merged weights.
        four_bit: The base is held in 4 bits.
        num_matmul_passes: Matrix products of a weight of the base in one step, as multiples of the
            forward pass: 2 without its gradient, 3 with it.
    """

    has_adapter = False
    four_bit = False
    num_matmul_passes = 3

    def load_options(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
        """Return what `from_pretrained` is given besides; with `device_map` nothing is moved."""
        return {}

    def wrap(self, model: PreTrainedModel, config: TrainingConfig) -> PreTrainedModel | PeftModel:
        """Return the model with exactly the parameters trainable that are trained.

        What is new in it depends on `config.seed` alone, so every worker starts from the same.

        Raises:
            ModelError: The model has no layers that the configuration names.
        """
        return model

    def exported(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        """Return the parameters that have to be whole while the model is saved."""
        return list(model.parameters())

    def matmul_weight_bytes(self, element: int) -> float:
        """Return the bytes that a weight of a linear layer of the base takes.

        Args:
            element: Bytes of a number in the precision of the training.
        """
        return element

    def problems(self, config: TuneloopConfig) -> list[Problem]:
        """Return what the settings or the installed packages lack."""
        return []

    def refused_by_zero_3(self, config: TrainingConfig) -> list[str]:
        """Return the settings under which a weight is used outside its layer.

        ZeRO-3 holds only a part of it there.
        """
        return []

    def describe(self, config: TrainingConfig) -> str:
        """Return what the model card says."""
        return "all weights"


class Lora(Method):
    """Low-rank adapters are trained, the base stays (Hu et al. 2021, arXiv:2106.09685)."""

    has_adapter = True
    num_matmul_passes = 2

    def wrap(self, model: PreTrainedModel, config: TrainingConfig) -> PeftModel:
        # It takes a second to load, which a training of all weights does not need.
        import peft

        lora = config.lora
        _refuse_unknown_layers(model, lora)
        _refuse_tied_layers(model, lora)
        torch.manual_seed(config.seed)
        settings = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            # It asks transformers by a name that is being replaced; nothing a user can act on.
            warnings.simplefilter("ignore", FutureWarning)
            try:
                return peft.get_peft_model(model, settings)
            except ValueError as error:
                raise ModelError.of(
                    "adapters cannot be put on this model",
                    where="training.lora.target_modules",
                    got=f"{lora.target_modules}: {str(error).splitlines()[0]}",
                    remedy="name other layers, or use training.method full",
                ) from error

    def exported(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def refused_by_zero_3(self, config: TrainingConfig) -> list[str]:
        return ["training.lora.use_dora"] if config.lora.use_dora else []

    def describe(self, config: TrainingConfig) -> str:
        lora = config.lora
        name = f"{'rank-stabilized ' * lora.use_rslora}{'DoRA' if lora.use_dora else 'LoRA'}"
        return (
            f"{name}, rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, "
            f"targets {lora.target_modules}"
        )


class Qlora(Lora):
    """LoRA on a base that is held in 4 bits (Dettmers et al. 2023, arXiv:2305.14314)."""

    four_bit = True

    def load_options(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
        # Weights in 4 bits are made where they stay.
        return {"quantization_config": four_bits(dtype), "device_map": {"": device}}

    def matmul_weight_bytes(self, element: int) -> float:
        # Four bits for the weight, and about half a bit for its scale.
        return 4.5 / 8

    def problems(self, config: TuneloopConfig) -> list[Problem]:
        problems = []
        if not config.resources.gpus_per_worker:
            problems.append(
                Problem(
                    "training.method qlora needs GPUs",
                    where="training.method",
                    got="resources.gpus_per_worker 0",
                    remedy="set resources.gpus_per_worker to 1, or use training.method lora",
                )
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            problems.append(
                Problem(
                    "training.method qlora needs bitsandbytes",
                    where="training.method",
                    got="it is not installed",
                    remedy="pip install bitsandbytes, or use training.method lora",
                )
            )
        return problems

    def refused_by_zero_3(self, config: TrainingConfig) -> list[str]:
        return ["training.method qlora", *super().refused_by_zero_3(config)]

    def describe(self, config: TrainingConfig) -> str:
        return f"{super().describe(config)}, base in 4 bits"


METHODS: dict[str, Method] = {"lora": Lora(), "full": Method(), "qlora": Qlora()}


def _refuse_unknown_layers(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Raise ModelError for a name that no layer has; PEFT trains the others without a word."""
    targets = lora.target_modules
    if targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    asked = targets if isinstance(targets, list) else [targets]
    unknown = [t for t in asked if not any(_names(name, targets, t) for name in names)]
    if unknown or not targets:
        raise ModelError.of(
            "the base model has no layer of this name",
            where="training.lora.target_modules",
            got=", ".join(unknown) or "no name",
            allowed=f"all-linear, or a list of {', '.join(sorted(linear))}",
        )


def _names(layer: str, targets: list[str] | str, target: str) -> bool:
    """Return whether a layer is meant, as PEFT reads it: a pattern, or a list of names' ends."""
    if isinstance(targets, list):
        return f".{layer}".endswith(f".{target}")
    return re.fullmatch(target, layer) is not None


def _refuse_tied_layers(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Raise ModelError for an adapter on a matrix that embeds and predicts.

    Merged into the weights it would change both, where in training it changed one.
    """
    targets = lora.target_modules
    if targets == "all-linear" or not model.config.get_text_config().tie_word_embeddings:
        return
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    asked = targets if isinstance(targets, list) else [targets]
    hit = [name for name in tied if any(_names(name, targets, target) for target in asked)]
    if hit:
        raise ModelError.of(
            "the model embeds and predicts with one matrix, which cannot have an adapter",
            where="training.lora.target_modules",
            got=", ".join(hit),
            allowed="layers between the embedding and the output layer",
            remedy="leave these names out, or use training.method full",
        )
