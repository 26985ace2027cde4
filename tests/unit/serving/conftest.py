"""One tiny model behind the whole protocol, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tuneloop.models.chat.renderer import Renderer
from tuneloop.serving.replica import ModelServer, ServedModel


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[ModelServer]:
    # Tiny products gain nothing from threads, and wait for each other on a busy machine.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuneloop.serving.engine.num_threads", lambda: 1)
        patch.setattr("tuneloop.serving.model.num_threads", lambda: 1)
        # The second has a template that writes tools and their calls.
        models = {"m": ServedModel(tiny_model), "t": ServedModel(tiny_model, "chatml_tools")}
        server = ModelServer(models, max_batch_size=4)
        yield server
        server._loading.result()["m"].engine.close()


@pytest.fixture(scope="module")
def renderer(tiny_model: Path) -> Renderer:
    return Renderer.load(tiny_model)
