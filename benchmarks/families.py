"""Train, export and serve tiny random models of many families, and hold them against transformers.

    python benchmarks/families.py                      # all families, full and LoRA; a table
    python benchmarks/families.py llama gemma2         # some of them
    python benchmarks/families.py --write              # LoRA; and the table in docs/training.md

Every model is made from its configuration on the spot. It is trained for three steps the way
`tuneloop train` does it, and by a plain loop over transformers and PEFT, one row after the other in
the model's own attention. Losses and gradient norms of all steps are compared, then the greedy ids
of the exported model: from transformers, and from the engine that would serve it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from tuneloop.compat.deepspeed import import_deepspeed
from tuneloop.config import TrainingConfig
from tuneloop.errors import UserError
from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import SamplingParams
from tuneloop.serving.engine import Engine, PlainEngine
from tuneloop.serving.requests import DecodeRequest
from tuneloop.training.deepspeed_engine import Execution, learning_rate_factor
from tuneloop.training.loop import TrainingJob, Worker, train_rows
from tuneloop.training.methods import METHODS
from tuneloop.training.results import TrainingResult
from tuneloop.training.rows import Rows, make_rows

VOCAB = 300
NUM_STEPS = 3
LOSS_LIMIT, GRADIENT_LIMIT, ROUNDING = 1e-4, 1e-3, 2.0**-24
PAGE = Path(__file__).parents[1] / "docs" / "training.md"
HEAD = "| rows in training | served by | families (transformers' `model_type`) |\n|---|---|---|\n"
# Sizes that families know by one name or another.
SIZES = {
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "intermediate_size": 96, "ffn_dim": 96,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "n_positions": 256,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
NO_DROPOUT = (
    "dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "resid_pdrop",
    "embd_pdrop", "attn_pdrop", "resid_dropout", "residual_dropout", "embd_dropout", "layerdrop",
)  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0],
    "original_max_position_embeddings": 64,
}
# What a family's configuration needs beside the sizes. Windows and chunks are shorter than rows.
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8},
    "cohere": {},
    "cohere2": {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    "ernie4_5": {},
    "exaone4": {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    "falcon": {"head_dim": None, "num_key_value_heads": None},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "gemma": {},
    "gemma2": {"sliding_window": 32},
    "gemma3_text": {
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm": {},
    "glm4": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 32},
    "gpt_neox": {},
    "gpt_oss": {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    "gptj": {"rotary_dim": 8},
    "granite": {},
    "granitemoe": {},
    "helium": {},
    "hunyuan_v1_dense": {"head_dim": 16, "rope_parameters": ROPE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama4_text": {"attention_chunk_size": 32, "intermediate_size_mlp": 96},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "ministral": {
        "head_dim": 16,
        "rope_parameters": ROPE,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"sliding_window": 32},
    "mixtral": {},
    "mpt": {},
    "nemotron": {"num_key_value_heads": 2},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": {},
    "opt": {"word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {},
    "phi3": {"sliding_window": 32},
    "phi3 (longrope)": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    "qwen2": {},
    "qwen2_moe": {
        "sliding_window": 32,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3": {},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "qwen3_moe": {},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 32},
    "rwkv": {"attention_hidden_size": 64},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 32},
    "xglm": {},
}
# Layers that get adapters where PEFT cannot have all of them.
TARGETS = {
    "falcon_h1": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "llama4_text": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mamba": ["in_proj", "x_proj"],
    "mamba2": ["in_proj"],
}


@dataclass(frozen=True)
class Outcome:
    """What one family and one method came to.

    Args:
        rows: How its rows were laid out: packed, or padded.
        engine: What serves it: ours, or `generate`.
        loss: Largest difference of a step's loss.
        gradient: Largest relative difference of a gradient's norm.
        greedy: Whether the exported model's greedy ids are those of the plain loop's model.
        served: Whether the engine writes the same.
        fault: Why there is no outcome; empty where there is one.
        loss_noise: How far the plain loop's losses go apart if its weights are changed by the
            rounding of a float; looked at only where losses or gradients differ.
        gradient_noise: Likewise of its gradients' norms.
    """

    rows: str = ""
    engine: str = ""
    loss: float = float("nan")
    gradient: float = float("nan")
    greedy: bool = False
    served: bool = False
    fault: str = ""
    loss_noise: float = 0.0
    gradient_noise: float = 0.0

    @property
    def is_near(self) -> bool:
        """Whether losses and gradients agree, as closely as the plain loop agrees with itself."""
        return self.loss < max(LOSS_LIMIT, self.loss_noise) and self.gradient < max(
            GRADIENT_LIMIT, self.gradient_noise
        )

    @property
    def equal(self) -> bool:
        """Whether everything agrees."""
        return self.is_near and self.greedy and self.served


def make_model(family: str, folder: Path) -> None:
    """Write a random model of a family, with a tokenizer of bytes.

    Weights are drawn with a standard deviation of 1 / sqrt(inputs), so that attention matters as
    it does in a trained model.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tuneloop.models.chat.own_templates import TEMPLATES

    kind = family.partition(" ")[0]
    blank = AutoConfig.for_model(kind)
    alias = getattr(type(blank), "attribute_map", {})
    wanted: dict[str, Any] = {
        name: size
        for name, size in SIZES.items()
        if isinstance(getattr(blank, name, None), int) and alias.get(name) not in SIZES
    }
    wanted |= {name: 0.0 for name in NO_DROPOUT if hasattr(blank, name)}
    wanted |= {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    wanted |= FAMILIES[family]
    config = AutoConfig.for_model(kind, **{k: v for k, v in wanted.items() if v is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Convolutions keep their small weights: what leaks through them is hard to see.
            if parameter.ndim > 1 and "conv" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {
        token: index
        for index, token in enumerate(["<pad>", "<|im_end|>", "<|im_start|>", *letters])
    }
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=TEMPLATES["chatml"],
    ).save_pretrained(folder)


def make_some_rows() -> Rows:
    """Return rows on both sides of windows and chunks, half of them behind one instruction."""
    rng = np.random.default_rng(0)
    instruction = rng.integers(5, 250, 20).tolist()
    lengths = [26, 95, 40, 61, 28, 70, 33, 50]
    ids, masks = [], []
    for index, length in enumerate(lengths):
        head = instruction if index % 2 else rng.integers(5, 250, 20).tolist()
        ids.append([*head, *rng.integers(5, 250, length - 20).tolist()])
        masks.append([0] * 22 + [1] * (length - 22))
    return make_rows([f"row{index}" for index in range(len(lengths))], ids, masks)


def train(base: Path, folder: Path, config: TrainingConfig, rows: Rows) -> TrainingResult:
    """Train as one worker of `tuneloop train` does, and export the model to `folder/model`."""
    folders = [folder / name for name in ("model", "checkpoints", "progress")]
    for path in folders:
        path.mkdir(parents=True)
    job = TrainingJob(base, "tiny", "auto", config, *folders, 100)
    how = Execution(1, 4, config.global_batch_size // 4)
    return train_rows(job, rows, Worker(0, how, torch.device("cpu"), 1, lambda *_: None))


class PlainTraining(NamedTuple):
    """What the plain loop came to: its model, and loss and gradient norm of each step."""

    model: Any
    losses: list[float]
    norms: list[float]


def train_plainly(
    base: Path,
    config: TrainingConfig,
    rows: Rows,
    batches: Sequence[Sequence[int]],
    rounding: float = 0.0,
) -> PlainTraining:
    """Train with transformers and PEFT alone, from weights changed by a share of themselves."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = METHODS[config.method].wrap(model, config).train()
    if rounding:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + rounding * torch.randn_like(parameter))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    losses, norms = [], []
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        num_targets = int(rows.num_target_tokens[list(batch)].sum())
        total = 0.0
        for row in batch:
            ids, mask = (torch.from_numpy(part.astype(np.int64)) for part in rows.row(row))
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            each = functional.cross_entropy(logits, ids[1:], reduction="none")
            loss = (each * mask[1:]).sum() / num_targets
            loss.backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, NUM_STEPS, config)
        optimizer.step()
        losses.append(total)
    return PlainTraining(model.eval(), losses, norms)


def write_greedily(model: Any, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    """Return transformers' greedy ids after each prompt."""
    plain = getattr(model, "get_base_model", lambda: model)()
    plain.generation_config = GenerationConfig()
    plain.config.get_text_config().use_cache = True
    settings = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
    written = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
        written.append(out[0, len(prompt) :].tolist())
    return written


def serve(folder: Path, prompts: Sequence[list[int]], count: int) -> tuple[str, list[list[int]]]:
    """Return the kind of engine that serves a model, and what it writes greedily."""
    engine = Engine.load(folder, decode=Renderer.load(folder).decode, stop_ids=())
    try:
        params = SamplingParams(max_tokens=count)
        futures = [engine.submit(DecodeRequest(prompt, params)) for prompt in prompts]
        written = [future.result(120).token_ids for future in futures]
    finally:
        engine.close()
    return "generate" if isinstance(engine, PlainEngine) else "ours", written


def try_family(family: str, method: str, folder: Path) -> Outcome:
    """Train a family both ways and serve it; a refusal or an error is told in one line."""
    config = TrainingConfig(
        method=method, learning_rate=1e-2, global_batch_size=4, num_epochs=2, max_steps=NUM_STEPS,
        weight_decay=0.0,
        lora={"rank": 4, "dropout": 0.0, "target_modules": TARGETS.get(family, "all-linear")},
    )  # fmt: skip
    rows = make_some_rows()
    base = folder / "base"
    try:
        make_model(family, base)
        result = train(base, folder, config, rows)
        batches = [record["rows"] for record in result.log]
        plain = train_plainly(base, config, rows, batches)
        prompts = [rows.row(index)[0][:22].tolist() for index in (0, 1, 3)]
        with torch.no_grad():
            mine = write_greedily(plain.model, prompts, 12)
            exported = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
            theirs = write_greedily(exported.eval(), prompts, 12)
        engine, served = serve(folder / "model", prompts, 12)
    except Exception as error:
        said = error.problems[0] if isinstance(error, UserError) else None
        lines = f"{said.what}: {said.got}" if said else f"{type(error).__name__}: {error}"
        return Outcome(fault=(lines.splitlines() or [""])[0])
    outcome = Outcome(
        "padded" if result.packing_fault else "packed",
        engine,
        _apart([record["loss"] for record in result.log], plain.losses),
        _apart([r["grad_norm"] / norm for r, norm in zip(result.log, plain.norms, strict=True)]),
        mine == theirs,
        theirs == served,
    )
    if outcome.is_near:
        return outcome
    shaken = train_plainly(base, config, rows, batches, ROUNDING)
    return replace(
        outcome,
        loss_noise=_apart(shaken.losses, plain.losses),
        gradient_noise=_apart([a / b for a, b in zip(shaken.norms, plain.norms, strict=True)]),
    )


def _apart(values: Sequence[float], others: Sequence[float] = ()) -> float:
    """Return the largest difference of values from others, or from 1."""
    return max(abs(a - b) for a, b in zip(values, others or [1.0] * len(values), strict=True))


def table_row(family: str, method: str, outcome: Outcome) -> str:
    """Return one line of the Markdown table."""
    if outcome.fault:
        return f"| {family} | {method} | refused: {outcome.fault} | | | | |"
    greedy, served = ("equal" if same else "DIFFERENT" for same in (outcome.greedy, outcome.served))
    noise = f" (noise {outcome.loss_noise:.0e})" if outcome.loss_noise else ""
    return (
        f"| {family} | {method} | {outcome.rows} | {outcome.loss:.0e}{noise} "
        f"| {outcome.gradient:.0e} "
        f"| {greedy} | {outcome.engine}, {served} |"
    )


def overview(outcomes: Mapping[str, Outcome]) -> str:
    """Return the Markdown table of families by how they are trained and served."""
    served = {"ours": "the decode engine", "generate": "`generate`", "": "–"}
    kinds: dict[tuple[str, str], list[str]] = {}
    for family, outcome in sorted(outcomes.items()):
        kind = ("refused" if outcome.fault else outcome.rows), served[outcome.engine]
        kinds.setdefault(kind, []).append(family)
    ranked = sorted(kinds.items(), key=lambda item: -len(item[1]))
    return HEAD + "".join(f"| {r} | {s} | {', '.join(own)} |\n" for (r, s), own in ranked)


def with_overview(page: str, table: str) -> str:
    """Return a page with its table of families replaced."""
    before, _, after = page.partition(HEAD)
    rest = after.splitlines(keepends=True)
    return before + table + "".join(itertools.dropwhile(lambda line: line.startswith("|"), rest))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a family that was trained differs."""
    parser = argparse.ArgumentParser(description="Hold families against plain transformers.")
    parser.add_argument("families", nargs="*", default=[*FAMILIES], help="default: all")
    parser.add_argument("--method", choices=("full", "lora"), help="default: both")
    parser.add_argument(
        "--write", action="store_true", help=f"with LoRA alone: renew the table of {PAGE.name}"
    )
    parsed = parser.parse_args(arguments)
    if parsed.write:
        parsed.method = "lora"
        if set(parsed.families) < set(FAMILIES):
            parser.error("--write is for all families")
    unknown = [family for family in parsed.families if family not in FAMILIES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(FAMILIES)}")
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    import_deepspeed(use_gpu=False)
    if not dist.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("| family | method | rows | loss | gradient | greedy ids | served |")
    print("|---|---|---|---|---|---|---|", flush=True)
    status = 0
    outcomes: dict[str, Outcome] = {}
    for family in parsed.families:
        for method in [parsed.method] if parsed.method else ["full", "lora"]:
            folder = Path(tempfile.mkdtemp(prefix="families-"))
            try:
                outcome = try_family(family, method, folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            status |= not (outcome.equal or outcome.fault)
            outcomes[family] = outcome
            print(table_row(family, method, outcome), flush=True)
    if parsed.write and not status:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_overview(page, overview(outcomes)), encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
