"""Serving starts, fails and ends cleanly. Apart, because a Ray serves one application at a time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tuneloop.config import API_KEY_VARIABLE, ServingConfig
from tuneloop.errors import EndpointError, ModelError
from tuneloop.models.client.client import Client
from tuneloop.records import Endpoint

KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def url(
    ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A server that asks for a key, started after one that failed."""
    from tuneloop.serving.app import ServedModel, serve

    broken = tmp_path_factory.mktemp("broken")
    (broken / "config.json").write_text('{"model_type": "llama"}')
    models = {"base": ServedModel(tiny_model), "broken": ServedModel(broken)}
    with pytest.raises(ModelError, match=str(broken)), serve(models, ServingConfig(port=0)):
        pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(API_KEY_VARIABLE, "secret")
        with serve({"base": ServedModel(tiny_model)}, ServingConfig(port=0)) as url:
            yield url
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models")


def test_after_a_model_that_does_not_load_the_next_serve_works(url: str) -> None:
    assert httpx.get(f"{url}/models", headers=KEY).status_code == 200


def test_a_wrong_key_is_one_message(url: str) -> None:
    """In OpenAI's shape for their client, and as an error that exits with 2 from ours."""

    async def ask(endpoint: Endpoint) -> None:
        async with Client(endpoint) as client:
            await client.check()

    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(EndpointError, match="refuses the key that was sent"):
        asyncio.run(ask(Endpoint(url, "base", "wrong")))
    asyncio.run(ask(Endpoint(url, "base", "secret")))


def test_a_killed_replica_ends_its_stream_with_an_error_and_comes_back(url: str) -> None:
    import ray

    body = {"model": "base", "prompt": "Return", "max_tokens": 500, "temperature": 0}
    asked = {"url": f"{url}/completions", "headers": KEY, "timeout": 60}
    events = []
    with httpx.stream("POST", json=body | {"stream": True}, **asked) as response:
        for line in response.iter_lines():
            if not line:
                continue
            events.append(line)
            if len(events) == 3:
                actors = ray.util.list_named_actors(all_namespaces=True)
                replica = next(a for a in actors if "model-base" in a["name"])
                ray.kill(ray.get_actor(replica["name"], namespace=replica["namespace"]))
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert error["type"] == "server_error"
    assert "replica did not answer" in error["message"]
    assert 3 < len(events) < 500
    # The next replica answers; a request may come while there is none.
    for _ in range(60):
        again = httpx.post(json=body | {"max_tokens": 4}, **asked)
        if again.status_code == 200:
            break
        assert again.json()["error"]["type"] == "server_error"
        time.sleep(0.5)
    assert again.status_code == 200
