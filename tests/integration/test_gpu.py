"""What only a GPU can show: bfloat16, NCCL, 4-bit weights, serving on CUDA. Skipped without one.

On a machine with an NVIDIA GPU: `python -m pytest tests/integration/test_gpu.py`; the tests of
`qlora` need bitsandbytes as well.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import ServingConfig, TrainingConfig, TuneloopConfig
from tuneloop.models.attention import IMPLEMENTATION, Documents, Rule, attend_causally
from tuneloop.models.bases.source import BaseModel
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.export.parity import check_served
from tuneloop.records import Endpoint, SamplingParams
from tuneloop.serving.app import ServedModel, serve
from tuneloop.serving.engine import Engine
from tuneloop.serving.requests import DecodeRequest
from tuneloop.training.batches import Schedule
from tuneloop.training.deepspeed_engine import Execution, learning_rate_factor, load_model
from tuneloop.training.launch import train
from tuneloop.training.loop import TrainingJob, Worker, train_rows
from tuneloop.training.loss import loss_sum
from tuneloop.training.packed import pack_rows
from tuneloop.training.rows import Rows, make_rows, open_rows, store_rows

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU and PyTorch for CUDA"
)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)
METHODS = [
    *[(method, stage) for method in ("lora", "full") for stage in (0, 2, 3)],
    *[pytest.param("qlora", stage, marks=needs_bitsandbytes) for stage in (0, 2)],
]

PublishSums = Callable[[Workspace, BaseModel], Artifact]


def make_config(method: str, **resources: Any) -> TuneloopConfig:
    return TuneloopConfig.model_validate(
        {
            "name": f"{method}-{resources.get('zero_stage', 0)}",
            "task": {"type": "extraction"},
            "model": {"base": "tiny"},
            "data": {"sources": [{"path": "x.jsonl", "format": "messages"}]},
            # Without dropout, as a GPU draws other random numbers than a CPU.
            "training": {
                "method": method,
                "num_epochs": 4,
                "learning_rate": 1e-3 if method == "full" else 5e-3,
                "lora": {"dropout": 0.0},
            },
            "resources": {"checkpoint_every_steps": 5, **resources},
        }
    )


class Killed(Exception):
    """Stands for a SIGKILL after a checkpoint that did not arrive."""


def losses(model: Artifact) -> list[float]:
    return pq.read_table(model.path / "trainer_log.parquet")["loss"].to_pylist()


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return BaseModel("tiny", tiny_model, "b" * 64, "Apache-2.0")


def losses_on_the_cpu(base: Path, config: TrainingConfig, rows: Rows) -> list[float]:
    """Return the losses of the same training in float32 on the CPU, as PyTorch alone has them."""
    model = load_model(base, config, Execution(1, 8, 1))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    schedule = Schedule(
        len(rows), config.global_batch_size, config.num_epochs, config.max_steps, config.seed
    )
    found = []
    for step in range(schedule.num_steps):
        factor = learning_rate_factor(step, schedule.num_steps, config)
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        batch = schedule.batch(step)
        loss = loss_sum(model, pack_rows(rows, batch.tolist())) / int(
            rows.num_target_tokens[batch].sum()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A training worker's surroundings, without Ray: starting it takes longer than these tests."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    # The tests' model was saved with DeepSpeed bound to the CPU; a worker's process is fresh.
    set_accelerator(CUDA_Accelerator())
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cuda"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("method", "zero_stage"), METHODS)
def test_training_in_bfloat16_follows_float32_on_the_cpu(
    method: str,
    zero_stage: int,
    process_group: None,
    tmp_path: Path,
    base: BaseModel,
    publish_sums: PublishSums,
) -> None:
    dataset = publish_sums(Workspace(tmp_path), base).path
    rows = open_rows(store_rows(dataset, "train", tmp_path / "rows"))
    config = make_config(method).training
    folders = [tmp_path / name for name in ("model", "checkpoints", "progress")]
    for folder in folders:
        folder.mkdir()
    job = TrainingJob(base.path, "tiny", "auto", config, *folders, 5)

    def report(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if die and metrics["step"] == 10:
            raise Killed
        assert checkpoint is not None
        shutil.copytree(checkpoint, job.checkpoints / f"step{metrics['step']}")

    execution = Execution(1, 8, 1, zero_stage, use_gpu=True)
    worker = Worker(0, execution, torch.device("cuda:0"), 1, report)
    die = True
    with pytest.raises(Killed):
        train_rows(job, rows, worker)
    die = False
    # It goes on from step 5, in bfloat16 from float32 copies.
    result = train_rows(job, rows, worker)
    assert result.parity.passed
    assert set(result.parity.arms) == {"merged"} | ({"adapter"} if method != "full" else set())
    found = [row["loss"] for row in result.log]
    # The tiny model's weights are rounded to four bits by several percent.
    tolerance = 0.1 if method == "qlora" else 0.02
    same = make_config("lora" if method == "qlora" else method).training
    expected = losses_on_the_cpu(base.path, same, rows)
    assert found == pytest.approx(expected, rel=tolerance)
    assert found[-1] < found[0] - 0.1
    assert all(0 < row["grad_norm"] < 100 for row in result.log)
    # Of the GPU: the process alone holds more of the machine's memory.
    assert 1e5 < result.log[-1]["peak_memory_bytes"] < 4e8
    plain = AutoModelForCausalLM.from_pretrained(base.path).num_parameters()
    adapters = 0 if method == "full" else result.num_trainable
    assert result.num_parameters == plain + adapters
    assert AutoModelForCausalLM.from_pretrained(job.output, dtype="auto").dtype == torch.bfloat16


def test_a_killed_worker_is_replaced_and_nothing_differs(
    ray_cluster: None, tmp_path: Path, base: BaseModel, publish_sums: PublishSums
) -> None:
    straight = Workspace(tmp_path / "straight")
    config = make_config("lora", gpus_per_worker=1, zero_stage=2)
    whole = train(config, straight, base, publish_sums(straight, base)).artifact
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not killed:
            for file in tmp_path.glob("cut/.work/*/scratch/progress.jsonl"):
                if len(file.read_text().splitlines()) >= 8:
                    for process in psutil.Process().children(recursive=True):
                        if "RayTrainWorker" in " ".join(process.cmdline()):
                            os.kill(process.pid, signal.SIGKILL)
                            killed.append(process.pid)
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    cut = Workspace(tmp_path / "cut")
    again = train(config, cut, base, publish_sums(cut, base)).artifact
    thread.join()
    assert killed
    assert losses(again) == pytest.approx(losses(whole), rel=1e-3)


@pytest.fixture(scope="module")
def rows() -> Rows:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, 12)
    ids = [(rng.integers(5, 290, length)).tolist() for length in lengths]
    masks = [[0] * (length - length // 2) + [1] * (length // 2) for length in lengths]
    return make_rows([f"row{i}" for i in range(12)], ids, masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_rows_have_the_loss_and_gradient_of_rows_alone(
    dtype: torch.dtype, tiny_model: Path, rows: Rows
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=dtype, attn_implementation=IMPLEMENTATION
    ).to("cuda")
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    packed = loss_sum(model, pack_rows(rows, range(len(rows)), "cuda"))
    packed.backward()
    together = model.model.layers[0].self_attn.q_proj.weight.grad.float()
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    alone = 0.0
    for index in range(len(rows)):
        batch = pack_rows(rows, [index], "cuda")
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[0, batch.predict_at]
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
        loss.backward()
        alone += float(loss)
    assert float(packed) == pytest.approx(alone, rel=tolerance)
    apart = model.model.layers[0].self_attn.q_proj.weight.grad.float()
    assert (together - apart).norm() < 5 * tolerance * apart.norm()


@pytest.mark.parametrize("window", [None, 30])
def test_documents_attend_in_one_call_as_one_by_one(window: int | None) -> None:
    torch.manual_seed(0)
    lengths = (7, 1, 130, 62)
    shapes = [(heads, sum(lengths), 64) for heads in (6, 2, 2)]
    inputs = [torch.randn(s, dtype=torch.bfloat16, device="cuda") for s in shapes]
    bounds = torch.tensor([0, 7, 8, 138, 200], dtype=torch.int32, device="cuda")
    rule = Rule(scaling=0.125, window=window, softcap=None, dropout=0.0)

    def at_once(*parts: torch.Tensor) -> torch.Tensor:
        return Documents(0, lengths, bounds).attend(0, *parts, rule)

    def one_by_one(*parts: torch.Tensor) -> torch.Tensor:
        documents = zip(*(part.split(lengths, dim=1) for part in parts), strict=True)
        return torch.cat([attend_causally(*document, rule, {}) for document in documents])

    results = []
    for attend in (at_once, one_by_one):
        parts = [part.clone().requires_grad_() for part in inputs]
        out = attend(*parts)
        out.square().sum().backward()
        results.append([out, *(part.grad for part in parts)])
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape
        assert (one - other).float().norm() < 1e-2 * other.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batched_answers_are_those_of_one_at_a_time(dtype: torch.dtype, tiny_model: Path) -> None:
    renderer = Renderer.load(tiny_model)

    def engine(batch: int) -> Engine:
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).to("cuda")
        return Engine(model, renderer.decode, renderer.stop_ids, max_batch_size=batch)

    rng = np.random.default_rng(1)
    shared = rng.integers(5, 290, 64).tolist()
    prompts = [shared + rng.integers(5, 290, 3 + n).tolist() for n in range(12)]
    prompts += [rng.integers(5, 290, 9 * n + 1).tolist() for n in range(12)]
    params = SamplingParams(max_tokens=40, logprobs=True)
    requests = [DecodeRequest(prompt, params, num_top=2) for prompt in prompts]
    single, batched = engine(1), engine(32)
    try:
        alone = [single.submit(request).result(120) for request in requests]
        futures = [batched.submit(request) for request in requests]
        together = [future.result(120) for future in futures]
    finally:
        single.close()
        batched.close()
    tie = 1e-3 if dtype == torch.float32 else 0.1
    for one, other in zip(alone, together, strict=True):
        assert one.scores is not None
        assert one.logprobs is not None
        assert other.logprobs is not None
        for index, (mine, theirs) in enumerate(zip(one.token_ids, other.token_ids, strict=False)):
            if mine != theirs:
                best, second = (value for _, value in one.scores[index].top)
                assert best - second < tie
                break  # what follows has another past
            assert one.logprobs[index] == pytest.approx(other.logprobs[index], abs=tie)


@pytest.mark.parametrize("method", ["lora", pytest.param("qlora", marks=needs_bitsandbytes)])
def test_what_was_trained_is_what_is_served(
    method: str, ray_cluster: None, tmp_path: Path, base: BaseModel, publish_sums: PublishSums
) -> None:
    workspace = Workspace(tmp_path)
    config = make_config(method, gpus_per_worker=1)
    model = train(config, workspace, base, publish_sums(workspace, base)).artifact
    models = {"merged": ServedModel(model.path), "base": ServedModel(base.path)}
    with serve(models, ServingConfig(port=0)) as url:
        parity = check_served(Endpoint(url, "merged"), model.path)
    assert parity is not None
    assert parity.passed
