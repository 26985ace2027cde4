"""`tuneloop evaluate` on named arms: endpoints, files of answers, rows of the user's own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tuneloop.cli import main
from tuneloop.config import load_config
from tuneloop.errors import ConfigError

pytestmark = pytest.mark.usefixtures("short_waits")

QUESTIONS = ["the lamp is off", "it is cold", "light please", "turn on the heating", "so dark here"]
ANSWERS = ["lights", "heating", "lights", "heating", "lights"]
PRICE = {"input": 2.0, "output": 10.0}


@pytest.fixture
def home(tmp_path: Path, model_server: Any) -> dict[str, Any]:
    """A configuration that scores five rows of the user's own on an endpoint."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": q, "completion": a, "shop": n}) + "\n"
            for n, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
        )
    )
    source = {"path": str(rows), "format": "prompt_completion"}
    return {
        "name": "home",
        "workspace": str(tmp_path / "workspace"),
        "task": {
            "type": "classification",
            "labels": ["lights", "heating"],
            "instruction": "lights or heating?",
        },
        "model": {"base": str(tmp_path / "no-model-is-needed")},
        "data": {"sources": [source]},
        "evaluation": {
            "num_resamples": 200,
            "max_tokens": 8,
            "sources": [source],
            "arms": {"gpt": {"endpoint": model_server.url, "model": "parrot", "price": PRICE}},
        },
    }


def run(config: dict[str, Any], tmp_path: Path, *more: str) -> int:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return main(["evaluate", str(path), "--json", *more])


def right(messages: list[dict[str, str]]) -> tuple[str, str]:
    return ANSWERS[QUESTIONS.index(messages[-1]["content"])], "stop"


def problem(config: dict[str, Any], tmp_path: Path, capfd: Any) -> str:
    assert run(config, tmp_path) == 2
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    assert json.loads(captured.out)["error"]["problems"]
    return captured.out


def test_an_endpoint_and_a_file_are_scored_on_own_rows_without_ray_or_training(
    model_server, home, tmp_path, capfd
):
    model_server.reply = right
    given = tmp_path / "given.jsonl"
    lines = [{"prompt": f" {q} ", "completion": "lights"} for q in QUESTIONS[:4]]
    given.write_text("\n".join(map(json.dumps, lines)))
    home["evaluation"]["arms"] = {"made": {"answers": str(given)}} | home["evaluation"]["arms"]
    assert run(home, tmp_path) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["artifact"], result["reused"]) == ("evaluations/home@v1", False)
    assert result["metrics"]["scores"] == {"made": 0.5, "gpt": 1.0}
    assert result["metrics"]["num_unscored"] == 1
    assert len(model_server.requests) == 5
    rows = pq.read_table(Path(result["path"]) / "predictions.parquet").to_pylist()
    (missing,) = [row for row in rows if row["status"] == "unscored"]
    assert (missing["arm"], missing["error"]) == ("made", "there is no answer to it")
    assert run(home, tmp_path) == 0
    assert json.loads(capfd.readouterr().out)["reused"]
    assert len(model_server.requests) == 5


def test_another_arm_does_not_pay_for_the_first_again(model_server, home, tmp_path, capfd):
    model_server.reply = right
    assert run(home, tmp_path) == 0
    home["evaluation"]["arms"]["again"] = {"endpoint": model_server.url, "model": "parrot"}
    home["evaluation"]["arms"]["other"] = home["evaluation"]["arms"]["again"] | {"model": "owl"}
    home["evaluation"]["arms"]["twin"] = home["evaluation"]["arms"]["other"]
    model_server.models.append("owl")
    assert run(home, tmp_path) == 0
    assert [body["model"] for body in model_server.requests].count("parrot") == 5
    assert [body["model"] for body in model_server.requests].count("owl") == 5


def test_a_run_that_was_cut_short_does_not_pay_twice_even_with_other_arms(
    model_server, home, tmp_path, capfd
):
    model_server.reply, home["evaluation"]["concurrency"] = right, 1
    home["evaluation"]["arms"]["last"] = {"endpoint": model_server.url, "model": "owl"}
    assert "does not serve" in problem(home, tmp_path, capfd)
    assert model_server.requests == [], "every endpoint is checked before one is paid"
    model_server.models.append("owl")

    def break_down(messages):
        if len(model_server.requests) > 3:
            model_server.models.clear()
        return right(messages)

    model_server.reply = break_down
    assert "does not serve" in problem(home, tmp_path, capfd)
    asked = len(model_server.requests)
    model_server.reply, model_server.models = right, ["parrot"]
    del home["evaluation"]["arms"]["last"]
    assert run(home, tmp_path) == 0
    questions = [body["messages"][-1]["content"] for body in model_server.requests]
    assert len(questions[:asked]) == 5, "four answers and one refusal"
    assert sorted(questions[:4] + questions[asked:]) == sorted(QUESTIONS)


def test_what_is_on_its_way_when_a_run_ends_is_not_lost(model_server, home, tmp_path, capfd):
    model_server.delay_s, model_server.failures = 0.3, [402]
    model_server.reply = right
    assert "no money left" in problem(home, tmp_path, capfd)
    assert len(model_server.requests) == 5, "all five were on their way"
    assert run(home, tmp_path) == 0
    assert len(model_server.requests) == 6, "only the refused one is asked again"


@pytest.mark.parametrize("limit", ["tokens", "money"])
def test_the_budget_stops_before_it_is_passed_and_goes_on_when_it_is_raised(
    model_server, home, tmp_path, capfd, limit
):
    model_server.reply = right
    # At the most a question takes 37 bytes and 96 tokens of template, its answer 8 tokens; what
    # they really take is 7 and 1.
    budget = {"tokens": 145, "money": 370e-6}[limit]
    home["evaluation"]["budget"] = {limit: budget}
    told = problem(home, tmp_path, capfd)
    assert f"evaluation.budget.{limit}" in told
    assert "raise it and run again" in told
    asked = len(model_server.requests)
    assert 1 <= asked < 5
    assert not list(Path(home["workspace"]).glob("evaluations/*/v*"))
    # Tried again with the same budget, what was spent counts.
    problem(home, tmp_path, capfd)
    assert len(model_server.requests) == asked
    home["evaluation"]["budget"] = {limit: budget * 10}
    assert run(home, tmp_path) == 0
    assert len(model_server.requests) == 5


def test_answers_without_counted_tokens_are_charged_at_the_most(
    model_server, home, tmp_path, capfd
):
    model_server.reply, model_server.counts_tokens = right, False
    home["evaluation"]["budget"] = {"tokens": 270}
    assert "tokens spent" in problem(home, tmp_path, capfd)
    assert len(model_server.requests) == 2


def test_a_kill_does_not_pass_the_budget_and_two_at_once_do_not_either(
    model_server, home, tmp_path, capfd
):
    """A server that never replies; the two shortest questions take at most 243 tokens."""
    model_server.reply, model_server.delay_s = right, 3600
    home["evaluation"] |= {"budget": {"tokens": 300}, "concurrency": 2}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(home, sort_keys=False))
    command = [sys.executable, "-m", "tuneloop.cli", "evaluate", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(model_server.requests) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "another process" in problem(home, tmp_path, capfd)
    process.kill()
    process.wait()
    texts = [m["content"] for body in model_server.requests for m in body["messages"]]
    held = 2 * (96 + 8) + len("".join(texts))
    told = problem(home, tmp_path, capfd)
    assert f"{held} tokens spent (up to {held} of them held for 2 requests whose reply" in told
    assert len(model_server.requests) == 2, "a third could pass the budget"
    model_server.delay_s = 0
    home["evaluation"]["budget"]["tokens"] = held + 300
    assert run(home, tmp_path) == 0
    result = json.loads(capfd.readouterr().out)
    assert len(model_server.requests) == 2 + len(QUESTIONS)
    manifest = json.loads((Path(result["path"]) / "artifact.json").read_text())
    # 16 words of questions, five times three of instruction, and five answers of a word.
    spent = {"tokens": held + 16 + 15 + 5, "money": manifest["resources"]["spent"]["money"]}
    assert manifest["resources"]["spent"] == spent | {"num_lost_replies": 2}


@pytest.mark.parametrize("how", ["gateway", "timeout", "nonsense"])
def test_each_try_that_may_be_paid_for_counts_also_for_the_next_run(
    model_server, home, tmp_path, capfd, how
):
    """Each try takes at most 141 tokens, so that three fit."""
    model_server.reply = right
    home["evaluation"] |= {"budget": {"tokens": 430}, "concurrency": 1}
    if how == "gateway":
        model_server.failures = [504] * 9
    elif how == "timeout":
        model_server.delay_s = 4
        home["evaluation"]["arms"]["gpt"]["timeout_s"] = 1
    else:
        model_server.answer = lambda _: {"content": "lights", "finish_reason": "banana"}
    told = problem(home, tmp_path, capfd)
    assert len(model_server.requests) == 3
    assert ("held for 3 requests whose reply was lost" in told) == (how != "nonsense")
    problem(home, tmp_path, capfd)
    assert len(model_server.requests) == 3
    model_server.failures, model_server.delay_s, model_server.answer = [], 0, None
    home["evaluation"]["arms"]["gpt"]["timeout_s"] = 60
    home["evaluation"]["budget"]["tokens"] += 300
    assert run(home, tmp_path) == 0
    assert len(model_server.requests) == 3 + len(QUESTIONS)


def test_what_an_incomplete_evaluation_cost_counts_when_it_is_completed(
    model_server, home, tmp_path, capfd
):
    model_server.reply, model_server.failures = right, [504] * 3
    home["evaluation"] |= {"concurrency": 1, "max_unscored_ratio": 0.5}

    def spent() -> tuple[str, int]:
        artifact = json.loads(capfd.readouterr().out)
        manifest = json.loads((Path(artifact["path"]) / "artifact.json").read_text())
        return artifact["artifact"], manifest["resources"]["spent"]["tokens"]

    assert run(home, tmp_path) == 0
    first, tokens = spent()
    assert (first, len(model_server.requests)) == ("evaluations/home@v1", 3 + 4)
    home["evaluation"]["budget"] = {"tokens": tokens + 100}
    problem(home, tmp_path, capfd)
    assert len(model_server.requests) == 3 + 4
    home["evaluation"]["budget"] = {"tokens": tokens + 150}
    assert run(home, tmp_path) == 0
    completed, tokens_in_all = spent()
    assert (completed, len(model_server.requests)) == ("evaluations/home@v2", 3 + 5)
    assert tokens < tokens_in_all < tokens + 20


def test_refusals_are_free_and_unscored_and_shown(model_server, home, tmp_path, capfd):
    def reply(messages):
        if "cold" in messages[-1]["content"]:
            raise ValueError("against our policy")
        return right(messages)

    model_server.reply = reply
    home["evaluation"]["budget"] = {"tokens": 175}
    assert run(home, tmp_path) == 0
    artifact = json.loads(capfd.readouterr().out)
    assert artifact["metrics"]["num_unscored"] == 1
    assert "against our policy" in (Path(artifact["path"]) / "report.html").read_text()


def test_rate_limits_are_waited_out(model_server, home, tmp_path, capfd):
    model_server.reply, model_server.failures = right, [429, 429, 503, 529, 429, 500]
    assert run(home, tmp_path) == 0
    assert json.loads(capfd.readouterr().out)["metrics"]["num_unscored"] == 0


def test_shots_and_the_simple_arm_need_the_train_split_and_endpoints_do_not(home, tmp_path):
    from tuneloop.contest import needs_dataset, needs_ray

    def needs(**arms: Any) -> tuple[bool, bool]:
        home["evaluation"]["arms"] = arms
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(home))
        config = load_config(path)
        return needs_dataset(config), needs_ray(config)

    endpoint = {"endpoint": "http://127.0.0.1:1/v1", "model": "m"}
    assert needs(a=endpoint) == (False, False)
    assert needs(base={}) == (False, True)
    assert needs(a=endpoint | {"shots": 2}) == (True, True)
    assert needs(a=endpoint, simple={}) == (True, True)
    assert needs(mine={"model": "finetuned"}) == (True, True)
    assert needs() == (True, True)
    del home["evaluation"]["sources"]
    assert needs(a=endpoint) == (True, True)


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        ({}, "does not say what answers"),
        ({"model": "base", "answers": "a.jsonl"}, "one kind, not answers and model"),
        ({"endpoint": "http://x/v1"}, "needs `model`"),
        ({"endpoint": "ftp://x", "model": "m"}, "arms.odd.endpoint` is not valid"),
        ({"simple": True, "shots": 2}, "`shots` does not belong to an arm with `simple`"),
        ({"model": "base", "price": PRICE}, "`price` does not belong to an arm with `model`"),
        ({"model": "base", "choose": "neerest"}, "did you mean `nearest`"),
        ({"model": "base", "choose": "nearest", "shots": 0}, "`choose` belongs to"),
        ({"modle": "base"}, "did you mean `model`"),
        ({"shots": 3}, "needs a `model`"),
    ],
)
def test_an_arm_that_cannot_be_is_one_message(home, tmp_path, arm, told):
    home["evaluation"]["arms"] = {"odd": arm}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(home))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert told in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("price", [{"in": 2, "out": 10}, [2, 10], PRICE])
def test_a_price_is_understood_as_people_write_it(home, tmp_path, price):
    home["evaluation"]["arms"]["gpt"]["price"] = price
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(home))
    read = load_config(path).evaluation.arms["gpt"].price
    assert read is not None
    assert (read.input, read.output) == (2, 10)


def test_what_arms_refer_to_is_looked_for_before_anything_is_asked(
    model_server, home, tmp_path, capfd, monkeypatch
):
    monkeypatch.delenv("MY_KEY", raising=False)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "completion": "y"}\n{"prompt": 3}\n')
    home["evaluation"]["arms"] |= {
        "a": {"endpoint": model_server.url, "model": "parrot", "api_key_env": "MY_KEY"},
        "b": {"answers": str(tmp_path / "none.jsonl")},
        "c": {"answers": str(tmp_path / "bad.jsonl")},
        "d": {"model": "models/nobody@v3"},
    }
    told = problem(home, tmp_path, capfd)
    for part in ("MY_KEY is not set", "none.jsonl", "bad.jsonl:2", "models/nobody@v3"):
        assert part in told
    assert model_server.requests == []
    model_server.api_key = "secret"
    monkeypatch.setenv("MY_KEY", "secret")
    model_server.reply = right
    home["evaluation"]["arms"] = {"a": home["evaluation"]["arms"]["a"]}
    assert run(home, tmp_path) == 0
    assert "secret" not in (tmp_path / "config.yaml").read_text()
    published = Path(json.loads(capfd.readouterr().out)["path"])
    assert b"secret" not in b"".join(p.read_bytes() for p in published.iterdir() if p.is_file())


def test_answers_to_other_rows_are_one_message(home, tmp_path, capfd):
    given = tmp_path / "given.jsonl"
    given.write_text(json.dumps({"prompt": "something else", "completion": "lights"}))
    home["evaluation"]["arms"] = {"made": {"answers": str(given)}}
    told = problem(home, tmp_path, capfd)
    assert "no question of `made` was answered" in told
    assert "given.jsonl" in told
