"""Memory and time estimates, and what is refused before the start."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    MambaConfig,
    Qwen3MoeConfig,
)

from tuneloop.artifacts import Artifact
from tuneloop.check import _expected_rows, check, report
from tuneloop.config import DataConfig, TrainingConfig, TuneloopConfig
from tuneloop.errors import DataError, ModelError, ResourceError
from tuneloop.models.bases.source import BaseModel
from tuneloop.models.chat.renderer import Renderer
from tuneloop.training.deepspeed_engine import Execution, load_model
from tuneloop.training.fit.assess import PreparedRows, assess
from tuneloop.training.fit.estimate import (
    ResourceEstimate,
    RowTotals,
    Workload,
    estimate,
    workload_of_rows,
    workload_of_totals,
)
from tuneloop.training.fit.refusals import (
    refuse_other_renderer,
    refuse_small_memory,
    refuse_unreadable_rows,
    refuse_unsupported,
    refuse_untrainable_rows,
)
from tuneloop.training.fit.shape import ModelShape, model_shape
from tuneloop.training.loss import loss_sum
from tuneloop.training.make import wants_dry_run
from tuneloop.training.methods import METHODS
from tuneloop.training.packed import pack_rows
from tuneloop.training.rows import Rows, make_rows


def make_config(**sections: Any) -> TuneloopConfig:
    raw: dict[str, Any] = {
        "name": "t",
        "task": {"type": "generation"},
        "model": {"base": "tiny"},
        "data": {"sources": [{"path": "x.jsonl", "format": "messages"}]},
    }
    return TuneloopConfig.model_validate(raw | sections)


APART = make_rows([], [], [])


def estimate_totals(
    config: TuneloopConfig,
    shape: ModelShape,
    num_rows: int,
    num_tokens: int,
    rows: Rows = APART,
    target_ratio: float = 0.3,
    num_validation_rows: int = 0,
) -> ResourceEstimate:
    totals = RowTotals(num_rows, num_validation_rows, num_tokens, 0, target_ratio, rows)
    return estimate(config, shape, workload_of_totals(config, shape, totals))


@pytest.fixture
def base(tiny_model: Path) -> BaseModel:
    return BaseModel("tiny", tiny_model, "0" * 64)


@pytest.mark.parametrize(
    "training", [{"method": "lora"}, {"method": "full"}, {"lora": {"use_dora": True}}]
)
def test_counted_parameters_are_those_of_the_loaded_model(
    training: dict[str, Any], base: BaseModel
) -> None:
    config = make_config(training=training)
    shape = model_shape(base, config.training)
    model = load_model(base.path, config.training, Execution(1, 8, 1))
    assert shape.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert shape.num_parameters + shape.num_adapter == total
    assert shape.max_positions == 512


@pytest.mark.parametrize("method", ["lora", "full"])
def test_estimated_activations_are_what_autograd_keeps(method: str, base: BaseModel) -> None:
    config = make_config(training={"method": method})
    model = load_model(base.path, config.training, Execution(1, 8, 1)).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = make_rows(["a"], [list(range(5, 405))], [[0] * 399 + [1]])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_sum(model, pack_rows(rows, [0]))
    loss.backward()
    shape = model_shape(base, config.training)
    work = workload_of_rows(config, shape, rows)
    expected = estimate(config, shape, work).activations_bytes
    # The estimate allows for the allocator and for what the backward pass needs besides.
    waste = {"lora": 2.2, "full": 1.6}[method]
    assert sum(kept.values()) < expected < waste * sum(kept.values())


def test_the_estimate_follows_the_configuration(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneloop.training.fit.estimate.matmul_rate", lambda num_threads: 1e9)

    def expect(**sections: Any) -> Any:
        config = make_config(**sections)
        return estimate_totals(config, model_shape(base, config.training), 100, 15_000)

    lora = expect()
    full = expect(training={"method": "full"})
    assert full.optimizer_bytes > 3 * lora.optimizer_bytes
    small = expect(resources={"micro_batch_size": 1})
    assert small.activations_bytes == pytest.approx(lora.activations_bytes / 8, rel=0.05)
    twice = expect(training={"num_epochs": 2})
    assert twice.training_s == pytest.approx(2 * lora.training_s, rel=0.01)
    assert twice.peak_memory_bytes == lora.peak_memory_bytes
    again = expect(resources={"gradient_checkpointing": True})
    assert again.activations_bytes < lora.activations_bytes
    assert lora.training_s < again.training_s < 1.6 * lora.training_s
    sharded = expect(training={"method": "full"}, resources={"num_workers": 2, "zero_stage": 3})
    assert sharded.weights_bytes == full.weights_bytes // 2
    assert sharded.machine_memory_bytes == 2 * sharded.peak_memory_bytes
    assert sharded.cost is None
    # The fewest workers hold the most, the most are the fastest and the most there can be.
    how = {"num_workers": [1, 2], "zero_stage": 3, "price_per_hour": 3.0}
    elastic = expect(training={"method": "full"}, resources=how)
    assert elastic.weights_bytes == full.weights_bytes
    assert elastic.machine_memory_bytes == 2 * elastic.peak_memory_bytes
    assert elastic.training_s == pytest.approx(full.training_s / 2)
    assert elastic.cost == pytest.approx(2 * 3.0 * elastic.training_s / 3600)


def test_passes_over_the_validation_rows_take_time(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneloop.training.fit.estimate.matmul_rate", lambda num_threads: 1e9)

    def ratio(num_validation_rows: int, **training: Any) -> float:
        config = make_config(training=training)
        shape = model_shape(base, config.training)
        some, none = (
            estimate_totals(config, shape, 96, 15_000, num_validation_rows=number).training_s
            for number in (num_validation_rows, 0)
        )
        assert some is not None
        assert none is not None
        return some / none

    # A row costs forward and backward when it is trained on, and forward alone otherwise.
    once = ratio(96)
    assert 1.3 < once < 1.55
    assert ratio(96, method="full") < once
    assert ratio(96, num_epochs=3) == pytest.approx(once)
    assert ratio(48) - 1 == pytest.approx((once - 1) / 2)
    # 12 steps, eight rows each: four passes in place of one.
    assert ratio(96, eval_every_steps=3, global_batch_size=8) - 1 == pytest.approx(4 * (once - 1))
    assert ratio(96, max_steps=6, global_batch_size=8) - 1 == pytest.approx(2 * (once - 1))
    # The same once the rows are there.
    rows = make_rows([str(i) for i in range(96)], [[5] * 20] * 96, [[0] * 19 + [1]] * 96)
    config = make_config(training={"eval_every_steps": 3, "global_batch_size": 8})
    shape = model_shape(base, config.training)
    assert workload_of_rows(config, shape, rows, rows).validated_ratio == 4.0
    assert workload_of_rows(config, shape, rows, APART).validated_ratio == 0.0


def test_what_rows_share_is_estimated_once(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneloop.training.fit.estimate.matmul_rate", lambda num_threads: 1e9)
    rng = np.random.default_rng(0)
    # Two instructions in turn: a micro-batch of eight rows has hardly ever only one of them.
    one, other = (rng.integers(5, 200, 60).tolist() for _ in range(2))
    ids = [[*one, *rng.integers(5, 200, 20 + i % 3).tolist()] for i in range(64)]
    masks = [[0] * 60 + [1] * (len(row) - 60) for row in ids]

    def both(rows: Rows, **sections: Any) -> tuple[Workload, ResourceEstimate, ResourceEstimate]:
        config = make_config(**sections)
        shape = model_shape(base, config.training)
        work = workload_of_rows(config, shape, rows)
        targets = work.num_target_tokens / work.num_tokens
        early = estimate_totals(config, shape, 64, work.num_tokens, rows, targets)
        return work, early, estimate(config, shape, work)

    rows = make_rows([str(i) for i in range(64)], ids, masks)
    work, early, late = both(rows)
    packed = [pack_rows(rows, range(i, i + 8), share_prefix=True) for i in range(0, 64, 8)]
    assert packed[0].documents.num_prefix == 59
    assert work.num_computed == pytest.approx(sum(p.input_ids.numel() for p in packed), rel=1e-3)
    assert early.training_s == pytest.approx(late.training_s, rel=0.05)
    # Before the rows are known, a quarter more is allowed for the fullest micro-batch.
    assert 1.2 < early.logits_bytes / late.logits_bytes < 1.3
    assert 1.0 < early.activations_bytes / late.activations_bytes < 1.8
    for apart in ({"training": {"lora": {"dropout": 0.1}}}, {"resources": {"micro_batch_size": 1}}):
        work, early, _ = both(rows, **apart)
        assert work.num_computed == work.num_tokens
        assert early.training_s > 1.5 * late.training_s
    mixed = [[*(one, other)[i % 2], *row[60:]] for i, row in enumerate(ids)]
    rows = make_rows([str(i) for i in range(64)], mixed, masks)
    work, early, late = both(rows)
    assert work.num_computed > 0.85 * work.num_tokens
    assert early.training_s == pytest.approx(late.training_s, rel=0.15)


def test_a_dry_run_is_for_clusters_and_for_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def wanted(**resources: Any) -> bool:
        return wants_dry_run(make_config(resources=resources).resources)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not wanted()
    alone = make_config().resources
    assert wants_dry_run(alone, training_s=3600.0)
    assert not wants_dry_run(alone, training_s=60.0, num_steps=10_000)
    assert wants_dry_run(alone, training_s=None, num_steps=10_000)
    assert not wants_dry_run(make_config(resources={"preflight": False}).resources, 3600.0)
    assert wanted(preflight=True)
    assert wanted(ray_address="10.0.0.1:6379")
    assert not wanted(ray_address="10.0.0.1:6379", preflight=False)
    assert not wanted(ray_address="local")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert wanted()


def _save(config: Any, tiny_model: Path, folder: Path) -> BaseModel:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return BaseModel("tiny", folder, "0" * 64)


def test_the_chosen_experts_alone_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "vocab_size": 429, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 8,
    }  # fmt: skip
    shapes = [
        model_shape(
            _save(Qwen3MoeConfig(**small, num_experts_per_tok=k), tiny_model, tmp_path / str(k)),
            TrainingConfig(method="full"),
        )
        for k in (1, 3)
    ]
    # Attention and router of two layers, and three matrices for each chosen expert.
    assert [shape.num_active for shape in shapes] == [
        2 * (4 * 32 * 32 + 8 * 32 + k * 3 * 16 * 32) for k in (1, 3)
    ]
    assert shapes[0].num_parameters == shapes[1].num_parameters
    assert shapes[0].kept_bytes < shapes[1].kept_bytes
    assert not shapes[0].unknown


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (90, 0)),
        ({"split": {"num_test_examples": 30}}, (70, 0)),
        ({"split": {"test_ratio": 0.2, "validation_ratio": 0.25}}, (60, 20)),
        ({"num_train_examples": 50, "split": {"num_validation_examples": 5}}, (50, 5)),
        ({"num_train_examples": 95}, (90, 0)),
    ],
)
def test_rows_that_are_held_out_are_not_counted_as_trained_on(
    settings: dict[str, Any], expected: tuple[int, int]
) -> None:
    sources = [{"path": "rows.jsonl", "format": "question_answer"}]
    data = DataConfig.model_validate({"sources": sources, **settings})
    assert _expected_rows(data, 100) == expected


def test_an_estimate_that_cannot_be_made_is_a_sentence(
    tiny_model: Path, tmp_path: Path, base: BaseModel
) -> None:
    odd = _save(GPT2Config(vocab_size=429, n_embd=32, n_layer=2, n_head=4), tiny_model, tmp_path)
    file = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"item {i}", "completion": f"list {i}"} for i in range(20)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = {"sources": [{"path": str(file), "format": "prompt_completion"}]}
    result = check(make_config(model={"base": str(tmp_path)}, data=source))
    shape = model_shape(odd, make_config().training)
    assert result.problems == []
    assert bool(shape.unknown) == (result.estimate is None)
    assert result.no_estimate == shape.unknown
    assert shape.num_trainable > 0
    assert shape.vocab_size == 429
    output = io.StringIO()
    report(replace(result, estimate=None, no_estimate="no such operation"), output)
    assert "memory and time cannot be estimated" in output.getvalue()


def test_only_the_layers_that_get_adapters_count(base: BaseModel) -> None:
    some = make_config(training={"lora": {"target_modules": ["q_proj"]}}).training
    every = make_config().training
    shapes = [model_shape(base, training) for training in (some, every)]
    assert shapes[0].num_adapter == 2 * 16 * (64 + 64)
    assert shapes[0].kept_bytes < shapes[1].kept_bytes


def test_what_cannot_fit_is_refused_with_the_parts(base: BaseModel) -> None:
    config = make_config(
        training={"global_batch_size": 100_000_000},
        resources={"micro_batch_size": 100_000_000},
    )
    shape = model_shape(base, config.training)
    expected = estimate_totals(config, shape, 100_000_000, 15_000_000_000)
    with pytest.raises(ResourceError, match="does not fit into memory") as caught:
        refuse_small_memory(expected)
    assert "activations" in caught.value.problems[0].got
    refuse_small_memory(estimate_totals(make_config(), shape, 100, 15_000))


def _dataset(renderer_hash: str, path: Path) -> Artifact:
    return Artifact("datasets", "t", 1, path, str(path), {"config": {"renderer": renderer_hash}})


def test_a_dataset_of_another_template_is_refused(base: BaseModel, tmp_path: Path) -> None:
    same = Renderer.load(base.path).hash
    other = Renderer.load(base.path, "alpaca").hash
    refuse_other_renderer(make_config(), base, _dataset(same, tmp_path))
    with pytest.raises(ModelError, match="another tokenizer or chat template"):
        refuse_other_renderer(make_config(), base, _dataset(other, tmp_path))


def test_rows_the_model_cannot_learn_are_refused(base: BaseModel, tmp_path: Path) -> None:
    shape = model_shape(base, make_config().training)
    dataset = _dataset("", tmp_path)
    good = make_rows(["a"], [[1, 2]], [[0, 1]])
    refuse_untrainable_rows(good, dataset)
    refuse_unreadable_rows(good, shape, dataset.ref)
    with pytest.raises(DataError, match="empty"):
        refuse_untrainable_rows(make_rows([], [], []), dataset)
    with pytest.raises(DataError, match="empty loss mask"):
        refuse_untrainable_rows(make_rows(["a"], [[1, 2]], [[0, 0]]), dataset)
    wild = make_rows(["a", "b"], [[1] * 513, [1, shape.vocab_size]], [[1] * 513, [0, 1]])
    with pytest.raises(ModelError) as caught:
        refuse_unreadable_rows(wild, shape, dataset.ref)
    assert [problem.got for problem in caught.value.problems] == [
        "513 tokens",
        f"token id {shape.vocab_size}",
    ]


def test_rows_beyond_the_models_positions_are_told_before_anything_is_prepared(
    tiny_model: Path, tmp_path: Path
) -> None:
    pairs = [{"prompt": f"item {n}", "completion": "7 " * n} for n in (*range(1, 30), 700)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = make_config(
        model={"base": str(tiny_model)},
        data={
            "sources": [{"path": str(file), "format": "prompt_completion"}],
            "max_seq_len": 4096,
        },
    )
    problems = check(config).problems
    assert [problem.what for problem in problems] == ["rows are longer than the model's positions"]
    assert problems[0].allowed == "at most 512"


def test_settings_that_do_not_go_together_are_all_told(base: BaseModel, tmp_path: Path) -> None:
    refuse_unsupported(make_config())
    config = make_config(
        training={"method": "qlora", "lora": {"use_dora": True}, "keep": "best"},
        resources={"zero_stage": 3, "trackers": ["wandb"]},
    )
    rows = make_rows(["a"], [[1, 2]], [[0, 1]])
    dataset = _dataset(Renderer.load(base.path).hash, tmp_path)
    fit = assess(config, base, PreparedRows(dataset, rows, make_rows([], [], []), tmp_path))
    assert fit.prediction is None
    told = [problem.what for problem in fit.problems]
    assert told[0] == "training.method qlora needs GPUs"
    assert "ZeRO stage 3 does not go with training.method qlora or training.lora.use_dora" in told
    assert told[-1] == "the dataset has no validation split"
    for library in ("bitsandbytes", "wandb"):
        if importlib.util.find_spec(library) is None:
            assert any(library in f"{p.what} {p.got}" for p in fit.problems)
    with pytest.raises(ResourceError) as caught:
        fit.require()
    assert list(caught.value.problems) == fit.problems


def test_the_configuration_names_every_method() -> None:
    assert set(METHODS) == set(get_args(TrainingConfig.model_fields["method"].annotation))


@pytest.mark.parametrize("rank", [0, -8])
def test_an_adapter_without_rank_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        make_config(training={"lora": {"rank": rank}})


@pytest.mark.parametrize("targets", [["q_proj", "no_such"], "no_such", ".*no_such", []])
def test_layers_that_the_model_lacks_are_named(targets: Any, tiny_model: Path) -> None:
    base = BaseModel("tiny", tiny_model, "b" * 64, "Apache-2.0")
    with pytest.raises(ModelError, match="no layer of this name") as caught:
        model_shape(base, TrainingConfig(lora={"target_modules": targets}))
    problem = caught.value.problems[0]
    assert problem.where == "training.lora.target_modules"
    assert "q_proj" not in problem.got
    assert "q_proj" in problem.allowed


def test_layers_are_named_by_their_ends_or_by_a_pattern(tiny_model: Path) -> None:
    base = BaseModel("tiny", tiny_model, "b" * 64, "Apache-2.0")
    sizes = {
        model_shape(base, TrainingConfig(lora={"target_modules": targets})).num_trainable
        for targets in (["q_proj"], ["self_attn.q_proj"], r".*\.q_proj")
    }
    assert len(sizes) == 1


@pytest.mark.parametrize(
    "targets", [["q_proj", "lm_head"], ["embed_tokens"], r".*(q_proj|lm_head)"]
)
def test_adapters_on_a_matrix_that_embeds_and_predicts_are_refused_at_once(
    targets: Any, base: BaseModel
) -> None:
    # The tiny model ties them, as most small models do.
    with pytest.raises(ModelError, match="embeds and predicts with one matrix"):
        model_shape(base, TrainingConfig(lora={"target_modules": targets}))


def test_adapters_on_an_output_layer_of_its_own_are_trained(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = False
    base = _save(config, tiny_model, tmp_path)
    shape = model_shape(base, TrainingConfig(lora={"target_modules": ["lm_head"], "rank": 4}))
    assert shape.num_trainable == 4 * (64 + 429)


def test_a_model_that_takes_no_adapters_is_refused_with_what_peft_says(
    tiny_model: Path, tmp_path: Path
) -> None:
    mamba = MambaConfig(vocab_size=429, hidden_size=32, num_hidden_layers=2)
    base = _save(mamba, tiny_model, tmp_path)
    with pytest.raises(ModelError, match="incompatible with Mamba"):
        model_shape(base, TrainingConfig())
    assert model_shape(base, TrainingConfig(method="full")).num_trainable > 0
