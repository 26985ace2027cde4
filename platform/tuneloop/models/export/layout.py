"""Where things are in a model artifact's directory. Loads no library: whoever serves reads it."""

from __future__ import annotations

import json
from pathlib import Path

ADAPTER = "adapter"
RENDER_FILE = "tuneloop_render.json"


def recorded_renderer(folder: Path) -> str | None:
    """Return the renderer's hash an export was trained with; None for other directories."""
    file = folder / RENDER_FILE
    if not file.is_file():
        return None
    return str(json.loads(file.read_text(encoding="utf-8"))["renderer_hash"])
