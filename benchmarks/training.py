"""The training loop against a bare PyTorch loop of the same shapes, and against TRL's SFTTrainer.

    python benchmarks/training.py BASE ROWS.jsonl [--arms loop bare all-logits] [--steps 8]
        [--rounds 2] [--method full] [--join 1] [--peer-python PYTHON]

ROWS.jsonl has `question` and `answer` in each line. Every arm runs in a process of its own, in
turn, so that a drift of the machine's speed meets all of them and each has its own peak memory. The
rows are tokenized once and the same for all. LoRA of rank 16 on all linear layers, batches of 8
rows, one worker. One JSON line per run goes to standard output.

- `loop`: what `tuneloop train` runs in a worker: DeepSpeed, logging, packed rows.
- `bare`: forward, backward, clip and AdamW on the same packed rows, nothing else.
- `all-logits`: `bare`, with logits at every position instead of at targets only.
- `paired`: these three in one process, in turn at each step, on the same rows: what the other two's
  speed is as a share of the bare loop's, the median over the steps, by the CPU time of a step. On
  a machine that others slow down now and then, trust this one.
- `paired-logits`: `paired` without the loop, for models too large to be held three times.
- `trl`, `trl-packed`: TRL's SFTTrainer with batches of 8 padded rows, and with packing into 1,024
  tokens. They need `--peer-python`, an environment that has TRL.

`loop` and `trl` take the same rows in the same steps at a constant learning rate. Only the random
start of their adapters differs; a last line holds their losses against each other, step by step.

`--join 3` makes one row of three, for longer rows. The arm `loop` also tells what
`tuneloop check` would have estimated.

`useful_tokens_per_s` counts tokens of rows, never padding, in all steps but the first.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANK, BATCH, PACKED_TOKENS, LEARNING_RATE = 16, 8, 1024, 2e-4
OURS, PEERS = ("loop", "bare", "all-logits", "paired", "paired-logits"), ("trl", "trl-packed")
IN_TURN = {"paired": ("loop", "bare", "all-logits"), "paired-logits": ("bare", "all-logits")}


def main() -> None:
    """Tokenize the rows, then run each arm in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(OURS[:4]), choices=[*OURS, *PEERS])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--method", default="lora", choices=["lora", "full"])
    parser.add_argument("--join", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run_arm(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        base = tokenize(options, file)
        losses: dict[str, list[float]] = {}
        for round_number in range(options.rounds):
            for arm in options.arms:
                command = [options.peer_python if arm in PEERS else sys.executable, __file__]
                command += [str(base), str(file), "--only", arm]
                command += ["--threads", str(options.threads), "--method", options.method]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                result = json.loads(output.stdout.splitlines()[-1])
                losses[arm] = result.pop("losses", [])
                print(json.dumps({"arm": arm, "round": round_number + 1, **result}), flush=True)

        if losses.get("loop") and losses.get("trl"):
            print(json.dumps(compare_curves(losses["loop"], losses["trl"])))


def compare_curves(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Return by how much two losses differ in each step, and how far both fell."""
    apart = [a / b - 1 for a, b in zip(ours, theirs, strict=True)]
    return {
        "curves": "loop against trl",
        "loop": [round(loss, 4) for loss in ours],
        "trl": [round(loss, 4) for loss in theirs],
        "mean_difference": round(statistics.mean(apart), 5),
        "largest_difference": round(max(map(abs, apart)), 5),
    }


def tokenize(options: argparse.Namespace, file: Path) -> Path:
    """Write ids and masks of the first rows; return the base model's directory."""
    from tuneloop.models.bases.source import resolve_base
    from tuneloop.models.chat.renderer import Renderer
    from tuneloop.records import Message
    from tuneloop.training.batches import Schedule

    path = resolve_base(options.base).path
    renderer = Renderer.load(path)
    count = BATCH * options.steps * options.join
    with options.rows.open(encoding="utf-8") as lines:
        pairs = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    samples = []
    for start in range(0, len(pairs), options.join):
        question, answer = (
            "\n".join(pair[side] for pair in pairs[start : start + options.join])
            for side in ("question", "answer")
        )
        messages = [Message("user", question), Message("assistant", answer)]
        samples.append(renderer.sample(messages))
    ids, masks = ([list(getattr(s, n)) for s in samples] for n in ("input_ids", "loss_mask"))
    # TRL is told the order in which our schedule takes the rows.
    schedule = Schedule(len(samples), BATCH, 1, None, 0)
    order = [i for step in range(schedule.num_steps) for i in schedule.batch(step).tolist()]
    data = {"input_ids": ids, "loss_mask": masks, "order": order}
    file.write_text(json.dumps(data), encoding="utf-8")
    return path


def run_arm(options: argparse.Namespace) -> dict[str, Any]:
    """Run one arm in this process and return what was measured."""
    import torch

    torch.set_num_threads(options.threads)
    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    if options.only in PEERS:
        measured = run_trl(options.base, rows, options.only == "trl-packed")
    else:
        measured = run_ours(Path(options.base), rows, options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**measured, "peak_memory_gb": round(peak / 1e9, 2)}


def run_ours(base: Path, data: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run the loop's own step, the bare one, or all in turn, on the same schedule."""
    from tuneloop.config import LoraConfig, TrainingConfig
    from tuneloop.training.batches import Schedule
    from tuneloop.training.rows import make_rows

    names = [str(i) for i in range(len(data["input_ids"]))]
    rows = make_rows(names, data["input_ids"], data["loss_mask"])
    schedule = Schedule(len(rows), BATCH, 1, None, 0)
    config = TrainingConfig(
        method=options.method,
        lora=LoraConfig(rank=RANK),
        learning_rate=LEARNING_RATE,
        lr_scheduler="constant",
        warmup_ratio=0,
    )
    arms = IN_TURN.get(options.only, (options.only,))
    clock = time.process_time if options.only in IN_TURN else time.perf_counter
    steps = {arm: make_step(arm, base, config, (rows, schedule)) for arm in arms}
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    losses: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(schedule.num_steps):
        # Every arm is the first, the second and the last equally often.
        for arm in (*arms[number % len(arms) :], *arms[: number % len(arms)]):
            began = clock()
            losses[arm].append(steps[arm](number))
            times[arm].append(clock() - began)
    tokens = [int(rows.lengths[schedule.batch(n)].sum()) for n in range(schedule.num_steps)]
    if options.only in IN_TURN:
        shares = {
            f"{arm}_to_bare": round(
                statistics.median(
                    bare / own for bare, own in zip(times["bare"][1:], times[arm][1:], strict=True)
                ),
                3,
            )
            for arm in arms
            if arm != "bare"
        }
        cpu_s = {f"{arm}_cpu_s": round(statistics.median(times[arm][1:]), 2) for arm in arms}
        shares |= cpu_s | {"tokens_per_step": sum(tokens) // len(tokens)}
        return {"num_steps": schedule.num_steps, **shares}
    expected = estimate(base, config, rows) if options.only == "loop" else {}
    measured = summary(times[options.only], tokens, losses[options.only])
    return {"tokens_per_row": sum(tokens) // len(rows), **measured, **expected}


def make_step(arm: str, base: Path, config: Any, work: tuple[Any, Any]) -> Any:
    """Return a function of the step's number that takes the step and returns its loss."""
    import torch
    import torch.distributed as dist

    from tuneloop.training.deepspeed_engine import Execution, load_model, make_engine
    from tuneloop.training.loop import Worker, train_step

    execution = Execution(1, BATCH, 1)
    model = load_model(base, config, execution).train()
    if arm != "loop":
        return bare_step(model, *work, arm == "all-logits")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows, schedule = work
    engine = make_engine(model, config, execution, schedule.num_steps)
    engine.train()
    threads = torch.get_num_threads()
    worker = Worker(0, execution, torch.device("cpu"), threads, lambda *_: None)
    return lambda number: train_step(engine, rows, schedule, number, worker)["loss"]


def estimate(base: Path, training: Any, rows: Any) -> dict[str, float]:
    """Return what is estimated before a training of these rows."""
    from tuneloop.config import TuneloopConfig
    from tuneloop.models.bases.source import BaseModel
    from tuneloop.training.fit import estimate as fit
    from tuneloop.training.fit.shape import model_shape

    config = TuneloopConfig.model_validate(
        {
            "name": "benchmark",
            "task": {"type": "generation"},
            "model": {"base": str(base)},
            "data": {"sources": [{"path": "rows.jsonl", "format": "messages"}]},
            "training": training,
        }
    )
    shape = model_shape(BaseModel(str(base), base, ""), training)
    expected = fit.estimate(config, shape, fit.workload_of_rows(config, shape, rows))
    parts = {
        f"estimated_{part}_gb": round(getattr(expected, f"{part}_bytes") / 1e9, 2)
        for part in ("peak_memory", "activations", "logits")
    }
    return {"estimated_s": round(expected.training_s or 0.0, 1), **parts}


def bare_step(model: Any, rows: Any, schedule: Any, all_logits: bool) -> Any:
    """Return a step of plain PyTorch on packed rows."""
    import torch

    from tuneloop.training.loss import loss_sum
    from tuneloop.training.packed import can_share, pack_rows

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    share = can_share(model)

    def step(number: int) -> float:
        batch = pack_rows(rows, schedule.batch(number).tolist(), share_prefix=share)
        if all_logits:
            logits = model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                segments=[batch.documents],
                use_cache=False,
            ).logits[0]
            labels = torch.full((logits.shape[0],), -100)
            labels[batch.predict_at] = batch.targets
            loss = torch.nn.functional.cross_entropy(logits, labels)
        else:
            loss = loss_sum(model, batch) / len(batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def run_trl(base: str, data: dict[str, Any], packed: bool) -> dict[str, Any]:
    """Run TRL's SFTTrainer on the same rows."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()

    names = {"input_ids": "input_ids", "completion_mask": "loss_mask"}
    rows = Dataset.from_dict(
        {name: [data[ours][i] for i in data["order"]] for name, ours in names.items()}
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=base,
            train_dataset=rows,
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=1 if packed else BATCH,
                packing=packed,
                max_length=PACKED_TOKENS,
                completion_only_loss=True,
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                train_sampling_strategy="sequential",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to=[],
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
                model_init_kwargs={"dtype": "float32"},
            ),
            peft_config=LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        trainer.train()
    # Which rows a step had is not told by the trainer: the mean stands for each of them.
    total = sum(map(len, data["input_ids"]))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return summary(times, [total // len(times)] * len(times), losses)


def summary(times: list[float], tokens: list[int], losses: list[float]) -> dict[str, Any]:
    """Return speed with and without the first step."""
    return {
        "useful_tokens_per_s": round(sum(tokens[1:]) / sum(times[1:]), 1),
        "with_first_step": round(sum(tokens) / sum(times), 1),
        "first_step_s": round(times[0], 2),
        "later_step_s": round(sum(times[1:]) / len(times[1:]), 2),
        "num_steps": len(times),
        "measured_s": round(sum(times), 1),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "losses": losses,
    }


if __name__ == "__main__":
    main()
