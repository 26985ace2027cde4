"""The loop on one worker, in this process: real DeepSpeed, tiny model, no Ray."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPTNeoXConfig,
    Qwen2Config,
    Qwen3Config,
)

from tuneloop.config import TrainingConfig
from tuneloop.errors import ModelError, Problem, ResourceError
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.export.parity import LiveAnswer, compare
from tuneloop.records import SamplingParams
from tuneloop.serving.engine import Engine
from tuneloop.serving.requests import DecodeRequest
from tuneloop.training.checkpoint import newest_complete
from tuneloop.training.deepspeed_engine import Execution, learning_rate_factor
from tuneloop.training.dry_run import dry_run, stage_of
from tuneloop.training.loop import TrainingJob, Worker, train_rows
from tuneloop.training.progress import MAY_STOP_FILE, PROGRESS_FILE, STOP_FILE, TrainingStopped
from tuneloop.training.results import TrainingResult
from tuneloop.training.rows import Rows, make_rows

pytestmark = pytest.mark.usefixtures("process_group")

CONFIG = TrainingConfig(
    global_batch_size=8, num_epochs=4, learning_rate=1e-2, lora={"rank": 8, "dropout": 0.1}
)


class Killed(Exception):
    """Stands for a SIGKILL right after a checkpoint."""


@pytest.fixture(scope="module")
def rows() -> Rows:
    """21 rows of uneven length, counting up: the last batch of an epoch has five."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 40, 21)
    ids = [(np.arange(length) * 3 % 51 + 5).tolist() for length in lengths]
    masks = [[0] * (length - length // 3) + [1] * (length // 3) for length in lengths]
    return make_rows([f"row{i}" for i in range(21)], ids, masks)


def run(
    base: Path,
    rows: Rows,
    folder: Path,
    config: TrainingConfig = CONFIG,
    micro_batch_size: int = 8,
    die_after: int | None = None,
    validation: Rows | None = None,
    **execution: Any,
) -> TrainingResult:
    job = make_job(base, folder, config)

    def report(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        keep(job, metrics, checkpoint)
        if die_after is not None and metrics["step"] >= die_after:
            raise Killed

    how = Execution(1, micro_batch_size, 8 // micro_batch_size, **execution)
    return train_rows(job, rows, Worker(0, how, torch.device("cpu"), 1, report), validation)


def make_job(base: Path, folder: Path, config: TrainingConfig = CONFIG) -> TrainingJob:
    folders = [folder / name for name in ("model", "checkpoints", "progress")]
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
    return TrainingJob(base, "tiny", "auto", config, *folders, 3, config.model_dump_json())


def keep(job: TrainingJob, metrics: dict[str, Any], checkpoint: Path | None) -> None:
    assert checkpoint is not None
    shutil.copytree(checkpoint, job.checkpoints / f"step{metrics['step']}")


def losses(result: TrainingResult) -> list[float]:
    return [row["loss"] for row in result.log]


def test_a_training_that_is_asked_to_stop_ends_at_the_next_step(
    tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    progress = make_job(tiny_model, tmp_path).progress
    # Only one that may be stopped looks: otherwise this is somebody else's file.
    for name in (MAY_STOP_FILE, STOP_FILE):
        (progress / name).touch()
    with pytest.raises(TrainingStopped, match="step 1"):
        run(tiny_model, rows, tmp_path)
    assert pickle.loads(pickle.dumps(TrainingStopped(Problem("asked to stop")))).problems
    assert not list((tmp_path / "checkpoints").iterdir())
    assert len((progress / PROGRESS_FILE).read_text().splitlines()) == 1
    (progress / MAY_STOP_FILE).unlink()
    assert len(run(tiny_model, rows, tmp_path).log) == 12


@pytest.fixture(scope="module")
def straight(
    tiny_model: Path, rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainingResult, Path]:
    """A training without interruption, that others are compared with."""
    folder = tmp_path_factory.mktemp("straight")
    return run(tiny_model, rows, folder), folder


def test_the_loss_falls_and_every_step_is_logged(
    straight: tuple[TrainingResult, Path], rows: Rows
) -> None:
    log = straight[0].log
    assert [row["step"] for row in log] == list(range(1, 13))
    assert [row["epoch"] for row in log] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert log[0]["loss"] == pytest.approx(np.log(600), rel=0.1)
    # The golden curve: what this seed gave when it was written.
    assert [log[step]["loss"] for step in (0, 5, 11)] == pytest.approx(
        [6.1048, 5.7735, 5.1419], abs=2e-3
    )
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert log[0]["learning_rate"] == pytest.approx(1e-2)
    assert log[-1]["learning_rate"] < 1e-3
    for epoch in range(4):
        part = log[3 * epoch : 3 * epoch + 3]
        assert sum(row["num_tokens"] for row in part) == rows.lengths.sum()
        assert sum(row["num_target_tokens"] for row in part) == rows.num_target_tokens.sum()
        # No row is left out and none is seen twice in an epoch.
        assert sorted(index for row in part for index in row["rows"]) == list(range(21))
    assert all(row["grad_norm"] > 0 for row in log)
    assert all(row["padding_ratio"] == 0 for row in log)
    assert all(row["peak_memory_bytes"] > 100e6 for row in log)
    assert log[-1]["token_accuracy"] > log[0]["token_accuracy"]
    assert straight[0].num_trainable < straight[0].num_parameters / 2


def test_a_training_cut_off_twice_equals_one_that_was_not(
    straight: tuple[TrainingResult, Path], tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    for die_after in (3, 9):
        with pytest.raises(Killed):
            run(tiny_model, rows, tmp_path, die_after=die_after)
    # The newest checkpoint was cut off while it was written: the one before is taken.
    newest = newest_complete(tmp_path / "checkpoints")
    assert newest == tmp_path / "checkpoints" / "step9"
    weights = newest / "state-00000.safetensors"
    whole = weights.read_bytes()
    middle = len(whole) // 2
    # Cut off, and of the right size with zeros that the disk never got.
    for damaged in (whole[:-100], bytes(len(whole)), whole[:middle] + bytes(len(whole) - middle)):
        weights.write_bytes(damaged)
        assert newest_complete(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step6"
    shutil.rmtree(newest)
    result = run(tiny_model, rows, tmp_path)
    assert losses(result) == losses(straight[0])
    assert [r["rows"] for r in result.log] == [r["rows"] for r in straight[0].log]
    assert [r["grad_norm"] for r in result.log] == [r["grad_norm"] for r in straight[0].log]


def test_checkpoints_leave_the_base_model_out(
    straight: tuple[TrainingResult, Path],
) -> None:
    folder = straight[1] / "checkpoints" / "step12"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    # Weights, two moments, and the layout; the output layer alone would add 150 KB.
    assert size < 3 * 4 * straight[0].num_trainable + 100_000
    assert not list((straight[1] / "progress").glob("checkpoint-*"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_micro_batches_do_not_change_the_result(
    method: str, tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(
        update={
            "method": method,
            "max_steps": 4,
            "lora": CONFIG.lora.model_copy(update={"dropout": 0.0}),
        }
    )
    whole = run(tiny_model, rows, tmp_path / "8x1", config)
    parts = run(tiny_model, rows, tmp_path / "2x4", config, micro_batch_size=2)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    norms = [[row["grad_norm"] for row in result.log] for result in (parts, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_zero_2_trains_like_zero_0(tiny_model: Path, rows: Rows, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"method": "full", "max_steps": 4})
    one = run(tiny_model, rows, tmp_path / "0", config)
    other = run(tiny_model, rows, tmp_path / "2", config, zero_stage=2)
    assert losses(other) == pytest.approx(losses(one), rel=1e-5)
    assert [r["grad_norm"] for r in other.log] == pytest.approx(
        [r["grad_norm"] for r in one.log], rel=1e-4
    )


def test_the_export_is_what_was_trained(
    straight: tuple[TrainingResult, Path], tiny_model: Path
) -> None:
    from peft import PeftModel

    result, folder = straight
    output = folder / "model"
    assert result.parity.passed
    assert result.parity.greedy_equal
    assert set(result.parity.arms) == {"adapter", "merged"}
    ids = torch.arange(5, 40)[None]
    merged = AutoModelForCausalLM.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = base(ids).logits
    adapter = PeftModel.from_pretrained(base, output / "adapter").eval()
    torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, rtol=1e-4, atol=1e-4)
    assert (merged(ids).logits - before).abs().max() > 0.1
    renderer = Renderer.load(output)
    described = json.loads((output / "tuneloop_render.json").read_text())
    assert described["renderer_hash"] == renderer.hash == Renderer.load(tiny_model).hash
    settings = json.loads((output / "generation_config.json").read_text())
    assert settings["eos_token_id"] == list(renderer.stop_ids)
    assert not settings["do_sample"]
    adapter_config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == "tiny"
    assert "tuneloop" not in (output / "config.json").read_text()


def test_a_full_finetuning_exports_all_weights(
    tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"method": "full", "max_steps": 3})
    result = run(tiny_model, rows, tmp_path, config)
    assert set(result.parity.arms) == {"merged"}
    assert result.parity.passed
    assert result.num_trainable == result.num_parameters
    assert not (tmp_path / "model" / "adapter").exists()
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 0


def test_an_export_that_differs_is_refused(
    straight: tuple[TrainingResult, Path], tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from tuneloop.models.export.exporter import Exporter

    output = tmp_path / "model"
    shutil.copytree(straight[1] / "model", output)
    exporter = Exporter(tiny_model, "tiny", Renderer.load(tiny_model), output, torch.float32)
    live = exporter.answer(exporter._load(output), [[5, 6, 7], [30, 31, 32, 33]])
    assert exporter.check(live).passed
    weights = load_file(output / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="answers differently"):
        exporter.check(live)
    assert not json.loads((output / "parity.json").read_text())["passed"]


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(
    tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"method": "full", "learning_rate": 1e30})
    with pytest.raises(ModelError) as caught:
        run(tiny_model, rows, tmp_path, config)
    problem = caught.value.problems[0]
    assert "not finite" in problem.what
    assert problem.where.startswith("step 2 of 12, rows row")
    assert problem.where.count("row") == 9


def test_validation_is_measured_as_one_by_one(
    straight: tuple[TrainingResult, Path], tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = CONFIG.model_copy(update={"eval_every_steps": 5})
    seen = run(tiny_model, rows, tmp_path, config, validation=unlike(rows))
    measured = [row["step"] for row in seen.log if row["validation_loss"] is not None]
    assert measured == [5, 10, 12]
    # Looking changes nothing in what is learned.
    assert losses(seen) == losses(straight[0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    total = hits = count = 0
    for ids, mask in map(unlike(rows).row, range(12)):
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1]
        wanted = torch.from_numpy(ids[1:].astype(np.int64))
        targets = torch.from_numpy(mask[1:].astype(bool))
        loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        total += float(loss[targets].sum())
        hits += int((logits.argmax(-1) == wanted)[targets].sum())
        count += int(targets.sum())
    assert seen.log[-1]["validation_loss"] == pytest.approx(total / count, rel=1e-4)
    assert seen.log[-1]["validation_accuracy"] == pytest.approx(hits / count)
    samples = seen.log[-1]["samples"]
    assert [sample["row_id"] for sample in samples] == ["other0", "other1", "other2"]
    assert all(sample["prompt"] and sample["reference"] for sample in samples)
    assert all("samples" not in row for row in seen.log if row["step"] not in measured)


def test_training_stops_early_and_keeps_the_best_weights(
    tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    from tuneloop.training.validation import best_step

    # The more it learns of the train rows, the worse it gets on rows that go the other way.
    config = CONFIG.model_copy(
        update={
            "method": "full",
            "eval_every_steps": 1,
            "early_stopping_patience": 3,
            "keep": "best",
            "num_epochs": 40,
        }
    )
    run_it = {"config": config, "validation": unlike(rows)}
    straight = run(tiny_model, rows, tmp_path / "straight", **run_it)
    best = best_step(straight.log)
    assert best is not None
    assert len(straight.log) == best + 3 < 120
    assert straight.parity.passed
    # The exported weights are those of the best step: they give its validation loss again.
    again = run(
        tmp_path / "straight" / "model",
        rows,
        tmp_path / "again",
        config.model_copy(update={"max_steps": 1, "learning_rate": 1e-12, "keep": "last"}),
        validation=unlike(rows),
    )
    expected = straight.log[best - 1]["validation_loss"]
    assert again.log[0]["validation_loss"] == pytest.approx(expected, rel=1e-5)
    # A training that was cut off on its way decides the same.
    with pytest.raises(Killed):
        run(tiny_model, rows, tmp_path / "cut", die_after=3, **run_it)
    cut = run(tiny_model, rows, tmp_path / "cut", **run_it)
    assert [r["validation_loss"] for r in cut.log] == [r["validation_loss"] for r in straight.log]
    weights = [tmp_path / name / "model" / "model.safetensors" for name in ("cut", "straight")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def unlike(rows: Rows) -> Rows:
    """Return twelve rows that count down where the others count up."""
    parts = [rows.row(index) for index in range(12)]
    return make_rows(
        [f"other{index}" for index in range(12)],
        [ids[::-1].tolist() for ids, _ in parts],
        [mask.tolist() for _, mask in parts],
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_changes_nothing(
    method: str, tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"method": method, "max_steps": 4})
    plain = run(tiny_model, rows, tmp_path / "plain", config)
    again = run(tiny_model, rows, tmp_path / "again", config, gradient_checkpointing=True)
    assert losses(again) == pytest.approx(losses(plain), rel=1e-6)


@pytest.mark.parametrize("variant", ["use_rslora", "use_dora"])
def test_variants_of_lora_are_exported_as_they_were_trained(
    variant: str,
    straight: tuple[TrainingResult, Path],
    tiny_model: Path,
    rows: Rows,
    tmp_path: Path,
) -> None:
    config = CONFIG.model_copy(update={"lora": CONFIG.lora.model_copy(update={variant: True})})
    result = run(tiny_model, rows, tmp_path, config, zero_stage=2)
    assert result.parity.passed
    assert set(result.parity.arms) == {"adapter", "merged"}
    assert result.log[-1]["loss"] < result.log[0]["loss"] - 0.3
    assert losses(result)[5:] != pytest.approx(losses(straight[0])[5:], rel=1e-4)
    settings = json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())
    assert settings[variant] is True
    # DoRA has one more number for each output of a layer.
    assert (result.num_trainable > straight[0].num_trainable) == (variant == "use_dora")


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_training_goes_on_with_another_zero_stage(
    zero_stage: int,
    straight: tuple[TrainingResult, Path],
    tiny_model: Path,
    rows: Rows,
    tmp_path: Path,
) -> None:
    shutil.copytree(straight[1] / "checkpoints" / "step3", tmp_path / "checkpoints" / "step3")
    with pytest.raises(Killed):
        run(tiny_model, rows, tmp_path, die_after=6, zero_stage=zero_stage)
    result = run(tiny_model, rows, tmp_path)
    assert losses(result) == pytest.approx(losses(straight[0]), rel=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_half_precision_goes_on_from_its_float32_weights(
    zero_stage: int, tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    # What a GPU does, on this CPU: bf16 weights, and float32 ones in the optimizer.
    # Every layer with an adapter costs ZeRO-3 as much time as a big one.
    lora = CONFIG.lora.model_copy(update={"target_modules": ["q_proj", "down_proj"]})
    config = CONFIG.model_copy(update={"max_steps": 6, "lora": lora})
    how = {"config": config, "zero_stage": zero_stage, "use_gpu": True}
    straight = run(tiny_model, rows, tmp_path / "straight", **how)
    with pytest.raises(Killed):
        run(tiny_model, rows, tmp_path / "cut", die_after=3, **how)
    cut = run(tiny_model, rows, tmp_path / "cut", **how)
    assert losses(cut) == losses(straight)
    assert straight.log[-1]["loss"] < straight.log[0]["loss"]


def test_a_checkpoint_of_other_adapters_is_refused(
    straight: tuple[TrainingResult, Path], tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    shutil.copytree(straight[1] / "checkpoints" / "step3", tmp_path / "checkpoints" / "step3")
    lora = CONFIG.lora.model_copy(update={"rank": 4})
    other = CONFIG.model_copy(update={"lora": lora})
    contents = tmp_path / "checkpoints" / "step3" / "contents.json"
    told = json.loads(contents.read_text())
    contents.write_text(json.dumps(told | {"identity": other.model_dump_json()}))
    with pytest.raises(ModelError, match="of other adapters") as caught:
        run(tiny_model, rows, tmp_path, other)
    assert "[8, 128]" in caught.value.problems[0].got


def test_a_checkpoint_of_another_configuration_is_refused(
    straight: tuple[TrainingResult, Path], tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    shutil.copytree(straight[1] / "checkpoints" / "step3", tmp_path / "checkpoints" / "step3")
    with pytest.raises(ModelError, match="a training with another configuration"):
        run(tiny_model, rows, tmp_path, CONFIG.model_copy(update={"learning_rate": 2e-2}))


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_dry_run_does_everything_once(
    zero_stage: int, tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    job = make_job(tiny_model, tmp_path)
    stages: list[str] = []
    saved: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        stages.append(stage_of(job.progress))
        saved.append(metrics)
        keep(job, metrics, checkpoint)

    worker = Worker(0, Execution(1, 8, 1, zero_stage), torch.device("cpu"), 1, report)
    measured = dry_run(job, rows, worker, unlike(rows))
    assert stages == ["saving a checkpoint"]
    assert stage_of(job.progress) == "exporting the model"
    # The step it began with is the one with the most tokens of the epoch.
    log = json.loads((job.checkpoints / "step1" / "trainer_log.json").read_text())
    schedule = job.schedule(rows)
    tokens = [int(rows.lengths[schedule.batch(step)].sum()) for step in range(3)]
    assert log[0]["num_tokens"] == max(tokens)
    assert measured.tokens_per_s > 0
    assert measured.peak_memory_bytes > 100e6
    assert measured.num_workers == 1
    assert (job.output / "parity.json").exists()


def test_a_dry_run_finds_a_checkpoint_that_does_not_come_back(
    tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    job = make_job(tiny_model, tmp_path, CONFIG.model_copy(update={"learning_rate": 0.5}))

    def lose(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        """Drop it, as storage that is not shared would."""

    worker = Worker(0, Execution(1, 8, 1), torch.device("cpu"), 1, lose)
    with pytest.raises(ModelError, match="does not give back what was saved"):
        dry_run(job, rows, worker)
    assert stage_of(job.progress) == "going on from the checkpoint"


def test_a_full_disk_leaves_the_checkpoint_before(
    straight: tuple[TrainingResult, Path], tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    shutil.copytree(straight[1] / "checkpoints" / "step3", tmp_path / "checkpoints" / "step3")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ResourceError, match="a checkpoint cannot be written"):
            run(tiny_model, rows, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert newest_complete(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step3"
    assert losses(run(tiny_model, rows, tmp_path)) == losses(straight[0])


def test_the_learning_rate_warms_up_and_decays() -> None:
    config = TrainingConfig(warmup_ratio=0.2, lr_scheduler="linear")
    factors = [learning_rate_factor(step, 10, config) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[-1] == pytest.approx(1 / 8)
    cosine = TrainingConfig(warmup_ratio=0.0, lr_scheduler="cosine")
    assert learning_rate_factor(5, 10, cosine) == pytest.approx(0.5)
    constant = TrainingConfig(warmup_ratio=0.0, lr_scheduler="constant")
    assert learning_rate_factor(9, 10, constant) == 1.0


def test_execution_is_not_part_of_the_result() -> None:
    execution = Execution(2, 4, 1)
    assert replace(execution, use_gpu=True).dtype == torch.bfloat16
    assert execution.dtype == torch.float32


FAMILIES = {
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 32}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "gemma3": (
        Gemma3TextConfig,
        {
            "num_key_value_heads": 1,
            "head_dim": 32,
            # Shorter than the rows: a token does not see the beginning of its row.
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_trained_exported_and_served_alike(
    family: str, tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    """The engine answers as the live model did, from the merged weights and from the adapter."""
    kind, options = FAMILIES[family]
    shape = {
        "vocab_size": 600,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": None,
    }
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(kind(**shape, **options)).save_pretrained(base)
    result = run(base, rows, tmp_path, CONFIG.model_copy(update={"max_steps": 4}))
    assert result.parity.passed
    assert losses(result)[-1] < losses(result)[0]

    output = tmp_path / "model"
    recorded = json.loads((output / "parity.json").read_text())["answers"]
    live = [LiveAnswer(**answer) for answer in recorded]
    renderer = Renderer.load(output)
    for path, adapter in ((output, ""), (base, "a")):
        engine = Engine.load(
            path,
            decode=renderer.decode,
            stop_ids=renderer.stop_ids,
            adapters={"a": output / "adapter"} if adapter else {},
        )
        futures = [
            engine.submit(
                DecodeRequest(
                    answer.prompt_ids,
                    SamplingParams(max_tokens=len(answer.ids), logprobs=True),
                    adapter=adapter,
                )
            )
            for answer in live
        ]
        parity = compare(live, [future.result(60) for future in futures], 2e-3)
        engine.close()
        assert parity.passed, (path, parity)
        assert parity.greedy_equal
        assert parity.tokens > len(live)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_that_also_sees_is_trained_and_exported_whole(
    method: Literal["full", "lora"], tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    text = {
        "vocab_size": 429, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 256,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    tokens = {"image_token_index": 428, "boi_token_index": 427, "eoi_token_index": 426}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    torch.manual_seed(0)
    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    short = CONFIG.model_copy(update={"method": method, "max_steps": 2})
    result = run(tmp_path / "base", rows, tmp_path, short)
    assert result.parity.passed
    assert result.packing_fault == ""
    assert (tmp_path / "model" / "adapter").is_dir() == (method == "lora")
