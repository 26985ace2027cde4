"""The files that code of the user's own is in: a module, and what it imports of its directory."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path


def own_files(module: str, folder: Path) -> list[Path]:
    """Return the Python files of a module, and of all that it imports, that lie in a directory.

    They are read, not run. None where the module is not there, as one that is installed.

    Args:
        module: Its dotted name.
        folder: Where its first part would lie.
    """
    found: dict[Path, None] = {}
    todo = [module]
    while todo:
        for name in _with_parents(todo.pop()):
            file = _file_of(name, folder)
            if file is not None and file not in found:
                found[file] = None
                package = name if file.name == "__init__.py" else name.rpartition(".")[0]
                todo += _imported(file, package)
    return sorted(found)


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    # A directory may be called as a module of Python, which is the one that is meant.
    if parts[0] in sys.stdlib_module_names:
        return []
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _file_of(name: str, folder: Path) -> Path | None:
    place = folder.joinpath(*name.split("."))
    files = (place / "__init__.py", place.parent / f"{place.name}.py")
    return next((file for file in files if file.is_file()), None)


def _imported(file: Path, package: str) -> Iterator[str]:
    """Yield the names that a file imports; of `from a import b` also `a.b`, which may be one."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # it is told where it is loaded
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            start = ".".join([*above * bool(node.level), *filter(None, [node.module])])
            yield from ([start] if node.module else [])
            yield from (f"{start}.{alias.name}" for alias in node.names if alias.name != "*")
