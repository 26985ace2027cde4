"""What a page that `AppTest` has run shows."""

from __future__ import annotations

from typing import Any


def page_html(app: Any) -> str:
    return "\n".join(element.proto.body for element in app.get("html"))


def button(app: Any, label: str) -> Any:
    return next(b for b in app.button if b.label == label)
