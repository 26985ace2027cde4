"""The exceptions tuneloop raises.

    TuneloopError            our failure; the command line shows a traceback and exits with 1
    └── UserError            something the user can fix; told in a few lines, exit code 2
        ├── ConfigError      the YAML, an override, a flag
        ├── DataError        source files and rows
        ├── ModelError       a base model, adapter, tokenizer or chat template
        ├── ArtifactError    a reference or a workspace
        ├── ResourceError    memory, disk, CPUs, ports, a cluster that does not answer
        └── EndpointError    an HTTP model server that refuses or does not answer

A `UserError` carries one or more `Problem`s, so that everything wrong is reported at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self


class TuneloopError(Exception):
    """A failure of tuneloop itself."""


@dataclass(frozen=True)
class Problem:
    """One thing the user has to fix.

    Args:
        what: What failed, as one sentence without a full stop.
        where: File and line, row, dotted key, step or rank.
        got: What was found.
        allowed: What would have been accepted.
        remedy: What to do next.
    """

    what: str
    where: str = ""
    got: str = ""
    allowed: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        lines = [self.what]
        for label in ("where", "got", "allowed", "remedy"):
            value = getattr(self, label)
            if value:
                lines.append(f"  {label + ':':<9}{value}")
        return "\n".join(lines)


class UserError(TuneloopError):
    """Something the user can fix, reported as one or more problems.

    Args:
        problems: At least one. They are also the pickled arguments, so the error
            keeps its parts when a Ray worker raises it.
    """

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems

    @classmethod
    def of(
        cls, what: str, where: str = "", got: str = "", allowed: str = "", remedy: str = ""
    ) -> Self:
        """Return the error with one problem, of these parts."""
        return cls(Problem(what, where, got, allowed, remedy))

    @classmethod
    def refuse(cls, problems: Iterable[Problem]) -> None:
        """Raise the error with these problems, if there are any."""
        if found := tuple(problems):
            raise cls(*found)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class ConfigError(UserError):
    """The YAML, a dotted override or a command-line flag is wrong."""


class DataError(UserError):
    """A source file or its rows cannot be used."""


class ModelError(UserError):
    """A base model, adapter, tokenizer or chat template cannot be used."""


class ArtifactError(UserError):
    """A reference names nothing, or a workspace cannot be used."""


class ResourceError(UserError):
    """Too little memory, disk or CPU, a port taken, or a cluster that does not answer."""


class EndpointError(UserError):
    """An HTTP model server refuses the request or does not answer."""


def find_user_error(error: BaseException) -> UserError | None:
    """Return the `UserError` inside an exception, however Ray has wrapped it, or None."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, UserError) and current.problems:
            return current
        # RayTaskError keeps the original in `.cause`; Ray Train V2 in `.worker_failures`.
        queue += [getattr(current, "cause", None), current.__cause__, current.__context__]
        failures = getattr(current, "worker_failures", None)
        if isinstance(failures, dict):
            queue += list(failures.values())
    return None
