from __future__ import annotations

import ast
import json
import re
import subprocess
import sys

import pytest

from tuneloop.data.sources import docstrings
from tuneloop.data.sources.docstrings import first_sentence, read_docstrings, rows_of_source


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return read_docstrings()


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Return the sum of x and y.", "Return the sum of x and y."),
        ("Return the sum.  More here.", "Return the sum."),
        (
            "Return the sum of the two or more numbers that\nare given.\n\nMore.",
            "Return the sum of the two or more numbers that are given.",
        ),
        ("Return the sum", "Return the sum"),
        ("Add x and y. Then z.", None),
        ("Return it", None),
        ("Return the total sum", "Return the total sum"),
        ("Write to sys.stdout and flush.", "Write to sys.stdout and flush."),
        ("Is this a node? Yes.", "Is this a node?"),
        ("Copy a file, e.g. a small one.", None),
        ("Handle the value 1. foo is next.", None),
        ("Return the following:\n\n- one", None),
        ("open(path) -> file object for path.", None),
        ("Find a library\nReturn its path.", None),
        ("Return the value (of x. And y) now.", None),
        ("Wait for it... and go.", None),
        ("Too short a line\nto be wrapped text.", None),
        ("- a list item here", None),
        ("lower case start of it.", None),
        ("", None),
    ],
)
def test_first_sentence_is_exact_or_nothing(docstring: str, summary: str | None) -> None:
    assert first_sentence(docstring) == summary


def test_source_rows_keep_the_text_and_leave_out_self() -> None:
    source = '''
class A:
    def f(self, a, /, b=1, *args, c: int = 2, **kw) -> str:
        """Do a thing to b.

        More "text" here.
        """
    @classmethod
    def g(cls, x):
        """Make one from x."""
    @staticmethod
    def h(y):
        """Change y in place."""
    def odd(me, y):
        """Use another name for self."""
    def undocumented(self): pass
if True:
    async def later(*, z=None):
        """Wait for z to end."""
'''
    found = {json.loads(row["record"])["function"]: row for row in rows_of_source(source, "m")}
    assert list(found) == ["f", "g", "h", "later"]
    assert found["f"]["document"] == (
        "def f(self, a, /, b=1, *args, c: int=2, **kw) -> str:\n"
        'Do a thing to b.\n\nMore "text" here.'
    )
    assert json.loads(found["f"]["record"]) == {
        "function": "f",
        "parameters": ["a", "b", "args", "c", "kw"],
        "summary": "Do a thing to b.",
    }
    assert json.loads(found["g"]["record"])["parameters"] == ["x"]
    assert json.loads(found["h"]["record"])["parameters"] == ["y"]
    assert found["later"]["document"].startswith("async def later(*, z=None):\n")


def test_library_has_thousands_of_consistent_rows(rows: list[dict[str, str]]) -> None:
    assert len(rows) > 2000
    assert len({row["document"] for row in rows}) == len(rows)
    assert len({row["module"] for row in rows}) > 80
    for row in rows:
        signature, text = row["document"].split("\n", 1)
        record = json.loads(row["record"])
        assert list(record) == ["function", "parameters", "summary"]
        # The labels follow from the document alone, by another road than the one taken.
        try:
            function = ast.parse(f"{signature}\n pass").body[0]
        except SyntaxError:  # a C default that is no Python, such as <unrepresentable>
            names = re.findall(r"\w+", signature)
            assert all(name in names for name in record["parameters"])
        else:
            assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
            args = function.args
            named = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
            names = [arg.arg for arg in named if arg is not None]
            expected = names[1:] if names[:1] in (["self"], ["cls"]) else names
            assert record["parameters"] == expected
            assert record["function"] == function.name
        assert " ".join(text.split()).startswith(" ".join(record["summary"].split()))
        assert " at 0x" not in signature


def test_rows_are_the_same_in_every_process(rows: list[dict[str, str]]) -> None:
    again = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", docstrings.__file__],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
        stdin=subprocess.DEVNULL,
    )
    assert [json.loads(line) for line in again.stdout.splitlines()] == rows


def test_accelerators_count_as_their_module(rows: list[dict[str, str]]) -> None:
    modules = {row["module"] for row in rows}
    assert not any(module.startswith("_") for module in modules)
    assert modules.isdisjoint({"posixpath", "pydecimal", "pyio", "elementtree", "test", "idlelib"})
