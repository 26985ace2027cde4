"""The YAML: what is refused, and what the user is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuneloop.config import (
    TuneloopConfig,
    grad_accum_steps,
    load_config,
    micro_batch_size,
    to_yaml,
    with_override,
)
from tuneloop.errors import ConfigError
from tuneloop.sweeps.grid import expand

GOOD = """\
name: faq
task:
  type: generation
model: {base: some/model}
data:
  sources:
    - path: faq.jsonl
      format: question_answer
training:
  learning_rate: 1e-3
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "faq.yaml"
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [str(problem) for problem in caught.value.problems]


def test_a_good_file_loads_and_overrides_win(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    config = load_config(
        path, ["training.learning_rate=5e-4", "data.sources.0.path=b.jsonl", "data.seed=3"]
    )
    assert config.training.learning_rate == 5e-4
    assert config.data.sources[0].path == "b.jsonl"
    assert config.data.seed == 3
    assert load_config(path).training.learning_rate == 1e-3


def test_a_floor_is_of_a_column_and_of_a_score_where_higher_is_better(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    floors = load_config(
        path, ["evaluation.floors=[{at_least: 0.5, by: year, value: 2024}]"]
    ).evaluation.floors
    assert (floors[0].by, floors[0].value) == ("year", "2024")
    (found,) = problems(path, "evaluation.floors=[{at_least: 0.5, value: a}]")
    assert "`value` needs `by`" in found
    plain = ["task.type=language_modeling", "data.sources.0.format=text"]
    (found,) = problems(path, *plain, "evaluation.floors=[{at_least: 0.5}]")
    assert "higher is better" in found


def test_a_default_written_out_has_the_same_fingerprint(tmp_path: Path) -> None:
    bare = load_config(write(tmp_path, GOOD))
    written = TuneloopConfig.model_validate(json.loads(bare.model_dump_json()))
    assert json.dumps(written.model_dump()) == json.dumps(bare.model_dump())


def test_a_configuration_that_was_written_out_is_read_again() -> None:
    raw = {
        "name": "all",
        "task": {"type": "generation"},
        "model": {"base": "some/model"},
        "data": {"sources": [{"path": "rows.jsonl", "format": "question_answer"}]},
        "evaluation": {
            "metrics": ["exact_match", {"name": "number", "after": "####"}, "chrf"],
            "primary": "number",
            "arms": {
                "base": {}, "nearest": {"model": "base", "shots": 2, "choose": "nearest"},
                "recipe": {"model": ["models/a@v1", "models/a@v2"]}, "file": {"answers": "a.jsonl"},
                "large": {"endpoint": "http://127.0.0.1:1/v1", "model": "x",
                          "price": {"input": 1.0, "output": 2.0}},
            },
            "judge": {"endpoint": "http://127.0.0.1:1/v1", "model": "x"},
            "floors": [{"at_least": 0.5}, {"at_least": 0.4, "by": "length", "value": "1 to 5"}],
        },
        "sweep": {
            "parameters": {"training.learning_rate": {"loguniform": [1e-4, 1e-3]}},
            "num_trials": 3,
        },
    }  # fmt: skip
    config = TuneloopConfig.model_validate(raw)
    assert TuneloopConfig.model_validate(config.model_dump(mode="json")) == config
    assert len(expand(config)) == 3


def test_all_mistakes_are_told_at_once_with_line_and_suggestion(tmp_path: Path) -> None:
    text = GOOD.replace("learning_rate: 1e-3", "learning_rat: 1e-3").replace(
        "type: generation", "type: generatoin"
    )
    found = problems(write(tmp_path, text))
    assert len(found) == 2
    assert "faq.yaml:3" in found[0]
    assert "did you mean `generation`?" in found[0]
    assert "faq.yaml:10" in found[1]
    assert "did you mean `learning_rate`?" in found[1]


def test_a_mistake_in_an_override_is_placed_on_the_command_line(tmp_path: Path) -> None:
    (found,) = problems(write(tmp_path, GOOD), "training.learning_rate=-1")
    assert "command line, training.learning_rate" in found
    assert "-1" in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "an empty file"),
        ("- 1", "list"),
        ("a: [", "not valid YAML"),
        (GOOD + "name: again\n", "given twice"),
        (GOOD + "? [a, b]\n: 1\n", "a list or a mapping cannot be a key"),
        (GOOD.replace("name: faq\n", ""), "`name` is missing"),
        (GOOD.replace("name: faq", "name: ../faq"), "../faq"),
    ],
)
def test_unusable_files(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in "\n".join(problems(write(tmp_path, text)))


def test_what_a_message_gives_for_missing_sections_is_a_configuration(tmp_path: Path) -> None:
    found = problems(write(tmp_path, "workspace: elsewhere"))
    assert len(found) == 4
    examples = [problem.split("for example `")[1].split("`")[0] for problem in found]
    assert load_config(write(tmp_path, "\n".join(examples))).task.type == "generation"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "nope.yaml" in problems(tmp_path / "nope.yaml")[0]


def test_a_batch_that_does_not_divide_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    overrides = ["training.global_batch_size=8", "resources.num_workers=3"]
    (found,) = problems(path, *overrides)
    assert "global_batch_size 8" in found
    config = load_config(path, ["training.global_batch_size=24", "resources.num_workers=2"])
    assert micro_batch_size(config, 2) * grad_accum_steps(config, 2) * 2 == 24


def test_a_worker_has_one_gpu_or_is_alone_on_a_share_of_one(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    (found,) = problems(path, "resources.gpus_per_worker=2")
    assert "resources.gpus_per_worker" in found
    (found,) = problems(path, "resources.gpus_per_worker=0.5", "resources.num_workers=2")
    assert "NCCL needs a whole GPU for each worker" in found
    assert load_config(path, ["resources.gpus_per_worker=0.5"]).resources.gpus_per_worker == 0.5


def test_a_range_of_workers_divides_the_batch_at_every_number(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    overrides = ["training.global_batch_size=8", "resources.num_workers=[1, 4]"]
    (found,) = problems(path, *overrides)
    assert "resources.num_workers 3 x" in found
    assert "every number from 1 to 4" in found
    config = load_config(path, ["training.global_batch_size=24", *overrides[1:]])
    assert list(config.resources.worker_counts) == [1, 2, 3, 4]
    assert [grad_accum_steps(config, count) for count in range(1, 5)] == [3, 2, 1, 1]
    sweep = ["sweep.parameters={training.seed: [1, 2]}", "resources.num_workers=[1, 2]"]
    with pytest.raises(ConfigError, match="a fixed number of workers"):
        expand(load_config(path, sweep))
    for wrong in ("0", "[2, 1]", "[1, 2, 3]", "two", "true", "[0, 2]", "1.5"):
        (found,) = problems(path, f"resources.num_workers={wrong}")
        assert "at least 1, or [min, max]" in found


def test_columns_format_needs_its_columns(tmp_path: Path) -> None:
    (found,) = problems(write(tmp_path, GOOD), "data.sources.0.format=columns")
    assert "columns.prompt" in found


MIXTURE = """\
name: both
task:
  type: mixture
  tasks:
    label: {type: classification, labels: [a, b], weight: 2}
    title: {type: generation, weight: 1}
model: {base: some/model}
data:
  sources:
    - {path: labels.jsonl, format: question_answer, task: label}
    - {path: titles.jsonl, format: question_answer, task: title}
"""


def test_a_mixture_has_tasks_and_each_source_has_one_of_them(tmp_path: Path) -> None:
    path = write(tmp_path, MIXTURE)
    config = load_config(path, ["task.tasks.title.weight=3"])
    assert config.task.of("title").type == "generation"
    assert [task.weight for task in config.task.tasks.values()] == [2, 3]
    assert config.task.describe() == "mixture of label (classification), title (generation)"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.sources.1.task=titel", "data.sources.1.task is titel; no source has rows for"),
        ("data.sources.1.task=null", "data.sources.1.task is missing"),
        ("task.type=generation", "`tasks` belong to task.type mixture"),
        ("data.train_tasks=[label, topic]", "data.train_tasks names topic"),
        ("data.train_tasks=[label, label]", "data.train_tasks names a task twice"),
        ("task.tasks.title=null", "task.tasks.title"),
        ("task.tasks.title.weight=null", "`weight` is given for 1 of 2 tasks"),
        ("task.tasks.title.type=language_modeling", "is not allowed"),
        ("task.tasks.title.wieght=2", "did you mean `weight`?"),
        ("task.tasks.label.labels=[a]", "`labels` are at least two"),
        ("task.tasks={}", "at least two `tasks`"),
        ("task.instruction=Do it.", "belongs to each of the `tasks`"),
    ],
)
def test_a_wrong_mixture_is_told(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in "\n".join(problems(write(tmp_path, MIXTURE), override))


def test_tasks_and_sources_do_not_both_have_weights(tmp_path: Path) -> None:
    weights = ["data.sources.0.weight=1", "data.sources.1.weight=1"]
    path = write(tmp_path, MIXTURE)
    assert "both sources and tasks have a `weight`" in problems(path, *weights)[0]
    without = ["task.tasks.label.weight=null", "task.tasks.title.weight=null"]
    assert load_config(path, weights + without).data.sources[0].weight == 1


def test_without_a_mixture_a_source_has_no_task(tmp_path: Path) -> None:
    (found,) = problems(write(tmp_path, GOOD), "data.sources.0.task=faq")
    assert "data.sources.0.task is faq (task.type is not mixture)" in found


def test_sections_that_may_be_left_out_have_suggestions(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    for override, meant in (
        ("sweep.nums_seeds=2", "num_seeds"),
        ("evaluation.judge.modle=a", "model"),
        ("evaluation.arms.ours.price.inputs=1", "input"),
    ):
        assert f"did you mean `{meant}`?" in "\n".join(problems(path, override))


def test_a_text_is_not_taken_for_something_else(tmp_path: Path) -> None:
    # As PyYAML has it, these are false, true, 8, 750 and a date; and 1e5 is a text.
    path = write(tmp_path, GOOD.replace("type: generation", "type: classification"))
    config = load_config(
        path,
        [
            "name=010", "workspace=2024-01-01", "task.labels=[no, On, 010, 12:30, 7, true, ~x]",
            "data.dedup={on: prompt}", "training.lora.use_dora=yes", "data.fixes=no",
            "sweep.parameters={training.learning_rate: [1e-4, 2E-4, .5]}",
            "evaluation.num_resamples=1e3", "data.seed=-3", "training.num_epochs=1_0",
            "evaluation.floors=[{at_least: 0.5, by: paid, value: yes}]",
        ],
    )  # fmt: skip
    assert (config.name, config.workspace) == ("010", "2024-01-01")
    assert config.task.labels == ["no", "On", "010", "12:30", "7", "true", "~x"]
    assert config.data.dedup.on == "prompt"
    assert config.training.lora.use_dora is True
    assert config.data.fixes is False
    assert config.sweep is not None
    assert config.sweep.parameters == {"training.learning_rate": [1e-4, 2e-4, 0.5]}
    assert (config.evaluation.num_resamples, config.data.seed) == (1000, -3)
    assert config.training.num_epochs == 10
    assert config.evaluation.floors[0].value == "yes"
    assert load_config(path, ["data.fixes=marks.jsonl"]).data.fixes == "marks.jsonl"
    assert load_config(path, ["data.fixes=true"]).data.fixes is True


def test_what_is_written_out_is_read_as_it_was() -> None:
    value = ["no", "yes", "1e5", "1e-5", "010", "1_0", "12:30", "true", "~", "", "2024-01-01", ".5"]
    value += [1e-5, 1e16, 0.5, 3, True, False, None, "a: b", {"on": "é\u2028😀"}]
    assert with_override({}, f"key={to_yaml(value, default_flow_style=True)}") == {"key": value}


@pytest.mark.parametrize(
    "override",
    [
        "training.lora.rank=true",
        "training.lora.rank=yes",
        "training.learning_rate=true",
        "training.max_steps=false",
        "resources.zero_stage=true",
        "sweep.parameters={training.seed: {randint: [true, 5]}}",
        "evaluation.floors=[{at_least: true}]",
        "training.max_grad_norm=.inf",
        "name=1.0",
        "model.base=true",
    ],
)
def test_what_is_of_another_kind_is_refused(tmp_path: Path, override: str) -> None:
    (found,) = problems(write(tmp_path, GOOD), override)
    assert "command line" in found
    assert "is not valid" in found or "not allowed" in found


def test_merged_keys_are_read(tmp_path: Path) -> None:
    text = GOOD + "serving:\n  <<: {port: 8123}\n  host: h\n"
    serving = load_config(write(tmp_path, text)).serving
    assert (serving.port, serving.host) == (8123, "h")


def test_a_key_given_twice_in_an_override_is_refused(tmp_path: Path) -> None:
    (found,) = problems(write(tmp_path, GOOD), "training={seed: 1, seed: 2}")
    assert "key `seed` is given twice" in found
    assert "command line, training" in found
