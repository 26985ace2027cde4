"""One tiny model behind the whole protocol, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tuneloop.models.chat.renderer import Renderer
from tuneloop.serving.loaded import ServedModel
from tuneloop.serving.replica import ModelServer

# Its settings are read as those of Qwen 3, SmolLM 3 and Llama 3 are.
THINKING = """\
{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}\
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}\
<|im_start|>system
Today: {{ date_string }}<|im_end|>
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% if loop.last and not enable_thinking %}<think>

</think>

{% endif %}{% generation %}{{ message.content }}<|im_end|>
{% endgeneration %}{% else %}{{ message.content }}<|im_end|>
{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant
{% if not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    # Tiny products gain nothing from threads, and wait for each other on a busy machine.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuneloop.serving.engine.num_threads", lambda: 1)
        patch.setattr("tuneloop.serving.model.num_threads", lambda: 1)
        # The second has a template that writes tools and their calls, the third one with settings.
        thinking = tmp_path_factory.mktemp("template") / "thinking.jinja"
        thinking.write_text(THINKING)
        models = {
            "m": ServedModel(tiny_model),
            "t": ServedModel(tiny_model, "chatml_tools"),
            "thinking": ServedModel(tiny_model, str(thinking)),
        }
        server = ModelServer(models, max_batch_size=4, waits=True)
        yield server
        server._loading.result()["m"].engine.close()


@pytest.fixture(scope="module")
def renderer(tiny_model: Path) -> Renderer:
    return Renderer.load(tiny_model)
