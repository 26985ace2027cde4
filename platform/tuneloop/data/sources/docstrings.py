"""A real data set that every machine has: the standard library's own documentation.

Each row is one documented function or method of the running interpreter:

- `document`: its signature line, then its docstring as it stands in the library.
- `record`: JSON with `function`, `parameters` (names in order, without stars, without `self`
  and `cls`) and `summary` (the docstring's first sentence, on one line).
- `module`: the top-level module it belongs to, for a split that keeps modules apart. A C
  accelerator counts as the module it accelerates (`_json` is `json`).

Python modules are parsed, never imported, so nothing runs and nothing opens a window; only the
interpreter's C modules, whose signatures exist nowhere else, are imported, in a process of their
own. Rows and their order depend on the interpreter alone. Where a careful reader could not tell
what the first sentence is, the row is left out (see `first_sentence`).

This file is also the script of that process, so it imports the standard library only.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import re
import subprocess
import sys
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

SKIPPED_MODULES = frozenset({"antigravity", "this", "idlelib", "turtledemo", "test"})
_SKIPPED_PARTS = frozenset({"test", "tests", "idle_test", "__main__", "_bundled", "site-packages"})
# Modules that implement another one, often with the same documentation: one group in the split.
_PART_OF = {
    part: whole
    for whole, parts in {
        "abc": "py_abc",
        "cProfile": "lsprof",
        "collections": "collections_abc",
        "datetime": "pydatetime strptime",
        "decimal": "pydecimal",
        "hashlib": "blake2 md5 sha1 sha2 sha256 sha3 sha512",
        "html": "markupbase",
        "importlib": "frozen_importlib frozen_importlib_external imp",
        "interpreters": "xxsubinterpreters xxinterpchannels",
        "io": "pyio",
        "multiprocessing": "posixshmem",
        "os": "genericpath nt ntpath posix posixpath",
        "pickle": "compat_pickle",
        "pydoc": "pydoc_data",
        "re": "sre sre_compile sre_constants sre_parse",
        "site": "sitebuiltins",
        "subprocess": "bootsubprocess posixsubprocess",
        "sysconfig": "aix_support osx_support",
        "threading": "dummy_thread thread threading_local",
        "weakref": "weakrefset",
        "xml": "elementtree pyexpat",
    }.items()
    for part in parts.split()
}
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'`])(?:[A-Za-z]|e\.g|i\.e|etc|vs|cf|viz|resp|approx|incl|Mr|Dr|St|No|Inc|al)\.$"
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_SHORTEST_WRAPPED_LINE = 40
_IMPLICIT = ("self", "cls")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+|<[^<>]*object[^<>]*>")


def read_docstrings() -> list[dict[str, str]]:
    """Return the rows in a fixed order: by module, then by place in the library.

    Takes a few seconds. Runs in a process of its own, which neither inherits the state of this
    one nor leaves anything in it.

    Raises:
        RuntimeError: The process failed; the message carries its standard error.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", __file__],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"reading the standard library's docstrings failed:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def first_sentence(docstring: str) -> str | None:
    """Return a docstring's first sentence on one line, or None where it is open to argument.

    The sentence is in the first paragraph and ends at the first full stop, exclamation or
    question mark that is followed by white space or the paragraph's end. Without one, a
    paragraph of a single line is the sentence (PEP 257's summary line). None if:

    - the mark ends an ellipsis, or text goes on in lower case or after an abbreviation or a
      single letter, so that it may not end the sentence;
    - it leaves a bracket or quote open;
    - one of its lines ends early, or the next begins with a capital: two phrases without a mark;
    - the paragraph is laid out (indented or bulleted lines, a table, a doctest), is a signature
      or usage line, or ends in a colon or comma;
    - the sentence has fewer than three words or starts in the middle of something.
    """
    lines = inspect.cleandoc(docstring).split("\n\n", 1)[0].splitlines()
    if not lines or any(
        line[:1].isspace() or re.match(r"[-*+|=~>#:@]|\.\.|\d+[.)]", line) for line in lines
    ):
        return None
    paragraph = " ".join(line.strip() for line in lines)
    if re.match(r"[\w.]+ ?\(", paragraph) or "->" in paragraph or ">>>" in paragraph:
        return None
    end = _SENTENCE_END.search(paragraph)
    if end is None:
        if len(lines) > 1 or paragraph[-1] in ":,;-":
            return None
        sentence = paragraph
    else:
        sentence, rest = paragraph[: end.end()], paragraph[end.end() :].lstrip()
        if sentence.endswith("..") or (rest and _ABBREVIATION.search(sentence)):
            return None
        if rest and not (rest[0].isupper() or rest[0] in "`'\"*<([{"):
            return None
    if len(sentence.split()) < 3 or not (sentence[0].isupper() or sentence[0] in "`'\"*"):
        return None
    if any(sentence.count(a) != sentence.count(b) for a, b in ("()", "[]", "{}")):
        return None
    if sentence.count('"') % 2 or sentence.count("`") % 2 or _is_broken(lines, len(sentence)):
        return None
    return sentence


def _is_broken(lines: list[str], length: int) -> bool:
    """Tell whether the line breaks within a sentence look like more than wrapped text."""
    for line, following in itertools.pairwise(lines):
        length -= len(line.strip()) + 1
        if length <= 0:
            return False
        if len(line) < _SHORTEST_WRAPPED_LINE or following[0].isupper():
            return True
    return False


def rows_of_source(text: str, module: str) -> Iterator[dict[str, str]]:
    """Yield a row for each usable function and method that a Python source file defines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    for node, in_class in _definitions(tree.body, in_class=False):
        docstring = ast.get_docstring(node, clean=True)
        if docstring is None:
            continue
        prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature = f"{prefix} {node.name}({ast.unparse(node.args)}){returns}:"
        row = _row(signature, node.name, _names(node.args), docstring, module)
        static = any(
            isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list
        )
        positional = [*node.args.posonlyargs, *node.args.args]
        # A method whose first parameter has another name than `self` or `cls` (`mcls`, `s`):
        # a reader of the signature alone could not know that it is left out.
        odd = in_class and not static and (not positional or positional[0].arg not in _IMPLICIT)
        if row is not None and not odd:
            yield row


def rows_of_c_module(module: ModuleType, group: str) -> Iterator[dict[str, str]]:
    """Yield a row for each usable function and method of an imported C module."""
    owners = [module] + [
        value
        for _, value in sorted(vars(module).items())
        if inspect.isclass(value) and value.__module__ in (module.__name__, group)
    ]
    for owner in owners:
        for name, value in sorted(vars(owner).items()):
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            if not inspect.isroutine(value) or inspect.isfunction(value):
                continue
            try:
                signature = inspect.signature(value)
            except Exception:  # the text of a C signature may name things this build lacks
                continue
            docstring = value.__doc__
            if not docstring or _ADDRESS.search(str(signature)):
                continue
            row = _row(
                f"def {name}{signature}:",
                name,
                list(signature.parameters),
                inspect.cleandoc(docstring),
                group,
            )
            if row is not None:
                yield row


def _row(
    signature: str, name: str, parameters: list[str], docstring: str, module: str
) -> dict[str, str] | None:
    summary = first_sentence(docstring)
    if summary is None or "\n" in signature:
        return None
    if parameters and parameters[0] in _IMPLICIT:
        parameters = parameters[1:]
    record = {"function": name, "parameters": parameters, "summary": summary}
    return {
        "document": f"{signature}\n{docstring.strip()}",
        "record": json.dumps(record, ensure_ascii=False),
        "module": module,
    }


def _definitions(
    body: list[ast.stmt], in_class: bool
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Yield functions of a module and methods of its classes, not functions inside functions."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, in_class
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, in_class=True)
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            for part in ("body", "handlers", "orelse", "finalbody"):
                for item in getattr(node, part, []):
                    inner = item.body if isinstance(item, ast.ExceptHandler) else [item]
                    yield from _definitions(inner, in_class)


def _names(arguments: ast.arguments) -> list[str]:
    """Return parameter names in the order in which the signature shows them."""
    ordered = [*arguments.posonlyargs, *arguments.args]
    ordered += [arguments.vararg] if arguments.vararg else []
    ordered += arguments.kwonlyargs
    ordered += [arguments.kwarg] if arguments.kwarg else []
    return [argument.arg for argument in ordered]


def _group(name: str) -> str:
    """Return the module that a top-level module belongs to in the split."""
    bare = name.strip("_")
    return _PART_OF.get(bare, bare)


def _sources(origin: Path) -> Iterator[Path]:
    """Yield the source files of a top-level module, the package's own first."""
    if origin.name != "__init__.py":
        yield origin
        return
    for path in sorted(origin.parent.rglob("*.py")):
        parts = path.relative_to(origin.parent).with_suffix("").parts
        if not any(part in _SKIPPED_PARTS or part.startswith("test_") for part in parts):
            yield path


def _library() -> Iterator[dict[str, str]]:
    """Yield the rows of every module, without repeated documents."""
    seen: set[str] = set()
    names = sorted(sys.stdlib_module_names - SKIPPED_MODULES - {"__main__"})
    for name in sorted(names, key=lambda name: (_group(name), name.startswith("_"), name)):
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            continue
        if spec is None:
            continue
        # A frozen module has its source file beside the others all the same.
        origin = Path(getattr(spec.loader_state, "filename", None) or spec.origin or "")
        if origin.suffix == ".py" and origin.is_file():
            sources = ((path, path.read_bytes()) for path in _sources(origin))
            rows = [row for _, data in sources for row in _parsed(data, _group(name))]
        elif spec.origin == "frozen":
            rows = []
        else:
            rows = _imported(name)
        for row in rows:
            if row["document"] not in seen:
                seen.add(row["document"])
                yield row


def _parsed(data: bytes, group: str) -> list[dict[str, str]]:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return list(rows_of_source(data.decode(encoding), group))
    except (SyntaxError, UnicodeDecodeError):  # a library file for another Python, left out
        return []


def _imported(name: str) -> list[dict[str, str]]:
    try:
        module = importlib.import_module(name)
    except ImportError:  # built without it
        return []
    return list(rows_of_c_module(module, _group(name)))


if __name__ == "__main__":
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        rows = list(_library())
    out.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    for row in rows:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")
