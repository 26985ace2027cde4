"""The documentation against the code: links, commands, names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tuneloop

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return what a page's headings can be linked by, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    texts = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.parent.name != "log"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    roots = ROOT, ROOT / "platform" / "tuneloop", ROOT / "docs"
    for name in re.findall(r"`([\w/.-]+/[\w.-]+\.(?:py|ya?ml))`", page.read_text(encoding="utf-8")):
        assert any((root / name).exists() for root in roots), name


def test_every_command_in_the_documentation_exists() -> None:
    usage = subprocess.run(
        [sys.executable, "-m", "tuneloop.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    commands = set(re.findall(r"^  ([a-z]+) ", usage, re.MULTILINE))
    blocks = [
        block
        for page in PAGES
        if page.parent.name != "log"
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    named = {name for b in blocks for name in re.findall(r"(?:^|\s|/bin/)tuneloop ([a-z]+)\s", b)}
    assert {"init", "check", "run", "serve"} <= named
    assert named <= commands


def test_the_python_api_is_documented_name_by_name() -> None:
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    assert all(re.search(rf"\b{name}\b", page) for name in tuneloop.__all__)
    script = (ROOT / "docs" / "first_steps.py").read_text(encoding="utf-8")
    used = set(re.findall(r"\btuneloop\.(\w+)", page + script))
    assert used <= set(tuneloop.__all__)


def test_the_readme_stays_a_page_and_the_recipes_a_handful() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 100
    assert len(list((ROOT / "jobs" / "configs").glob("*.yaml"))) <= 8


def test_the_architecture_names_what_each_room_imports() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1:4] for row in page.splitlines() if row.startswith("| `")]
    *rooms, shared = [[set(re.findall(r"`(\w+)`", cell)) for cell in row] for row in rows]
    told = {room: imports for (room,), _, imports in rooms}
    imported: dict[str, set[str]] = {room: set() for room in told}
    source = ROOT / "platform" / "tuneloop"
    for file in source.rglob("*.py"):
        room = file.relative_to(source).with_suffix("").parts[0]
        text = file.read_text(encoding="utf-8")
        found = set(re.findall(r"^\s*(?:from|import) tuneloop\.(\w+)", text, re.MULTILINE))
        for names in re.findall(r"^\s*from tuneloop import ([\w, ]+)", text, re.MULTILINE):
            found |= set(names.split(", ")) - {"__version__"}
        if room not in shared[0] | {"__init__"}:
            imported[room] |= found - shared[0] - {room}
    assert told == imported


def test_every_column_code_metric_and_format_is_documented() -> None:
    import dataclasses
    import typing

    import pyarrow as pa

    from tuneloop.config import SourceFormat
    from tuneloop.data.schema import ReasonCode, dataset_schema, removed_schema
    from tuneloop.evals.scoring.error_tags import ERROR_TAGS
    from tuneloop.evals.scoring.metrics import TASK_METRICS
    from tuneloop.evals.scoring.predictions import Prediction

    own = pa.schema([])
    schemas = dataset_schema(own), dataset_schema(own, is_text=True), removed_schema()
    columns = {name for schema in schemas for name in schema.names}
    columns |= {field.name for field in dataclasses.fields(Prediction)} - {"scores"}
    names = {
        "artifacts.md": columns | {code.value for code in ReasonCode},
        "evaluation.md": {name for task in TASK_METRICS.values() for name in task.metrics}
        | set(ERROR_TAGS),
        "data.md": set(typing.get_args(SourceFormat)),
    }
    for page, expected in names.items():
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert not {name for name in expected if f"`{name}`" not in text}, page
