"""The real application: Ray Serve, HTTP, two models, OpenAI's own client."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch

from tuneloop.config import ServingConfig
from tuneloop.errors import ResourceError
from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import Message

QUESTION = [Message("system", "Answer."), Message("user", "What is the capital of France?")]
BODY = {
    "messages": [{"role": m.role, "content": m.content} for m in QUESTION],
    "max_tokens": 12,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path_factory.mktemp("other") / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def url(ray_cluster: None, tiny_model: Path, other_model: Path) -> Iterator[str]:
    from tuneloop.serving.app import ServedModel, serve

    models = {"base": ServedModel(tiny_model), "finetuned": ServedModel(other_model)}
    with serve(models, ServingConfig(port=0)) as address:
        yield address


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def local_greedy(path: Path, ids: list[int], count: int) -> tuple[str, list[int]]:
    """Return what transformers writes, up to the stop token."""
    from transformers import AutoModelForCausalLM

    renderer = Renderer.load(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False
    )
    answer: list[int] = out[0, len(ids) :].tolist()
    stop = next((i for i, token in enumerate(answer) if token in renderer.stop_ids), count)
    return renderer.decode(answer[:stop]), answer[:stop]


def test_served_text_equals_local_text_for_both_models(
    http: httpx.Client, tiny_model: Path, other_model: Path
) -> None:
    texts = []
    for name, path in (("base", tiny_model), ("finetuned", other_model)):
        ids = Renderer.load(path).prompt_ids(QUESTION)
        text, answer = local_greedy(path, ids, 12)
        response = http.post(
            "/chat/completions", json={**BODY, "model": name, "return_token_ids": True}
        )
        assert response.status_code == 200, response.text
        got = response.json()
        assert got["prompt_token_ids"] == ids
        assert got["choices"][0]["token_ids"] == answer
        assert got["choices"][0]["message"]["content"] == text
        assert got["usage"]["prompt_tokens"] == len(ids)
        texts.append(answer)
    assert texts[0] != texts[1]


def test_openai_client(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["base", "finetuned"]
    assert client.models.retrieve("finetuned").id == "finetuned"
    asked = {"model": "base", **BODY}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    content = whole.choices[0].logprobs.content
    assert all(item.logprob == item.top_logprobs[0].logprob for item in content)
    streamed = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert streamed[-1].usage.completion_tokens == whole.usage.completion_tokens
    pieces = [chunk.choices[0].delta.content or "" for chunk in streamed[:-1]]
    assert "".join(pieces) == whole.choices[0].message.content
    assert streamed[-2].choices[0].finish_reason == whole.choices[0].finish_reason

    plain = client.completions.create(model="base", prompt=["Open the", "yes"], temperature=0)
    assert [choice.index for choice in plain.choices] == [0, 1]
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(
            model="base", prompt="Open the", temperature=0, stream=True
        )
    )
    assert text == plain.choices[0].text
    with pytest.raises(openai.NotFoundError, match="served: base, finetuned"):
        client.chat.completions.create(**{**asked, "model": "missing"})
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked, tool_choice="required")
    assert caught.value.body == {
        "message": "`tool_choice` is required, which is none of `tools` (given: none)",
        "type": "invalid_request_error",
        "param": "tool_choice",
        "code": None,
    }
    form = {"name": "it", "schema": {"enum": ["yes", "no"]}}
    bound = client.chat.completions.create(
        **asked, response_format={"type": "json_schema", "json_schema": form}
    )
    assert json.loads(bound.choices[0].message.content) in ("yes", "no")
    ranked = client.chat.completions.create(
        **asked, extra_body={"ranking": {"answers": ["yes", "no"], "coverage": 1}}
    )
    best, other = ranked.choices[0].ranking["answers"]
    assert best["logprob"] > other["logprob"]
    assert ranked.choices[0].message.content == best["text"]
    # An answer is taken back as the client holds it.
    history = [*BODY["messages"], whole.choices[0].message, {"role": "user", "content": "And?"}]
    several = client.chat.completions.create(
        model="base", messages=history, max_tokens=4, n=2, extra_body={"top_k": 5}
    )
    assert [choice.index for choice in several.choices] == [0, 1]


def test_what_an_operator_asks(http: httpx.Client, url: str) -> None:
    root = url.removesuffix("/v1")
    assert http.get(f"{root}/ready").json() == {"status": "ready"}
    assert "/v1/chat/completions" in http.get(f"{root}/openapi.json").json()["paths"]
    assert http.get(f"{root}/docs").status_code == 200
    ids = http.post(f"{root}/tokenize", json={"model": "base", "prompt": "Open the"}).json()[
        "tokens"
    ]
    text = http.post(f"{root}/detokenize", json={"model": "base", "tokens": ids}).json()["prompt"]
    assert text == "Open the"
    metrics = http.get(f"{root}/metrics").text
    assert 'tuneloop_requests_total{model="base",route="tokenize",status="200"}' in metrics
    assert 'tuneloop_engine_waiting{engine="finetuned"} 0.0' in metrics
    response = http.get("/models", headers={"X-Request-Id": "abc-7"})
    assert response.headers.get_list("x-request-id") == ["abc-7"]


def test_a_client_that_hangs_up_frees_its_slot(http: httpx.Client, url: str) -> None:
    body = {"model": "base", "prompt": "Return", "max_tokens": 500, "temperature": 1.5}
    body |= {"stream": True, "logit_bias": {"1": -100, "2": -100}}
    with http.stream("POST", "/completions", json=body) as response:
        next(response.iter_lines())
    root, busy = url.removesuffix("/v1"), 'tuneloop_engine_running{engine="base"} 0.0'
    for _ in range(100):
        if busy in (metrics := http.get(f"{root}/metrics").text):
            break
    assert busy in metrics


def test_echoed_logprobs_as_harnesses_read_them(http: httpx.Client, tiny_model: Path) -> None:
    renderer = Renderer.load(tiny_model)
    ids = renderer.text_ids("Open the file and return its text")
    body = {
        "model": "base",
        "prompt": [ids, ids[:4]],
        "max_tokens": 1,
        "temperature": 0,
        "echo": True,
        "logprobs": 1,
    }
    choices = http.post("/completions", json=body).json()["choices"]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    chosen = expected[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
    report = choices[0]["logprobs"]
    assert report["token_logprobs"][0] is None
    assert report["top_logprobs"][0] is None
    assert report["token_logprobs"][1:-1] == pytest.approx(chosen, abs=1e-4)
    assert max(report["top_logprobs"][-1].values()) == report["token_logprobs"][-1]
    assert len(choices[1]["logprobs"]["tokens"]) == 5
    assert choices[0]["text"].startswith("Open the file and return its text")
    at = report["text_offset"]
    pieces = [choices[0]["text"][a:b] for a, b in itertools.pairwise(at)]
    assert pieces[: len(ids)] == report["tokens"][: len(ids)]


def test_concurrent_requests_do_not_mix(http: httpx.Client, tiny_model: Path) -> None:
    prompts = [f"read {number} items in the list" for number in range(64)]

    def ask(prompt: str) -> str:
        body = {"model": "base", "prompt": prompt, "max_tokens": 8, "temperature": 0}
        return str(http.post("/completions", json=body).json()["choices"][0]["text"])

    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(ask, prompts))
    for index in (0, 31, 63):
        ids = Renderer.load(tiny_model).text_ids(prompts[index])
        assert texts[index] == local_greedy(tiny_model, ids, 8)[0]


def test_a_refusal_comes_the_whole_way(http: httpx.Client) -> None:
    response = http.post("/chat/completions", json={**BODY, "model": "base", "max_tokens": 600})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert "512 positions" in error["message"]
    assert error["type"] == "invalid_request_error"


def test_second_serve_is_refused(url: str, tiny_model: Path) -> None:
    from tuneloop.serving.app import ServedModel, serve

    with (
        pytest.raises(ResourceError, match="runs already"),
        serve({"base": ServedModel(tiny_model)}, ServingConfig(port=0)),
    ):
        pass
    assert httpx.get(f"{url}/models").status_code == 200
