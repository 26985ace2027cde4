"""Serving starts, fails and ends cleanly. Apart, because a Ray serves one application at a time."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tuneloop.config import ServingConfig
from tuneloop.errors import ModelError


def test_a_model_that_does_not_load_is_told_and_the_next_serve_works(
    ray_cluster: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneloop.serving.app import API_KEY_VARIABLE, ServedModel, serve

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    models = {"base": ServedModel(tiny_model), "broken": ServedModel(tmp_path)}
    with pytest.raises(ModelError, match=str(tmp_path)), serve(models, ServingConfig(port=0)):
        pass

    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    with serve({"base": ServedModel(tiny_model)}, ServingConfig(port=0)) as url:
        assert httpx.get(f"{url}/models").status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{url}/models", headers=key).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models")
