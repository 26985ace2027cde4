"""The command line: arguments to configuration to one call.

Standard output carries the result only; logs and progress go to standard error. Exit codes:
0 done, 2 the user's mistake, 1 our failure, 3 the gate is not passed, 130 interrupted, 141 nobody
reads the result any more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from tuneloop import __version__
from tuneloop.errors import Problem, ResourceError, UserError, find_user_error

_DESCRIPTION = """\
Finetune a small language model on your task, and prove whether it helped.

start
  init        write a starter configuration with comments
  import      make a configuration from rows, and account for every row
  check       check every row, memory and time before anything runs
  doctor      show what this machine has and what is missing
data
  prepare     clean, deduplicate, split and tokenize the data
  generate    let a larger model write training rows, within a budget
train
  train       finetune (prepares the data first if needed)
  run         the whole loop: prepare, baseline, train, evaluate
  sweep       try settings, choose on validation rows, forecast more data
judge
  evaluate    score the models and endpoints that are named; trains nothing
  gate        let a model pass, or not, beside the one it is to replace
  dashboard   browse artifacts and reports on 127.0.0.1
serve
  serve       serve the base and the finetuned model until interrupted
  submit      run a command on a cluster as a Ray job
  export      write a model as GGUF, for Ollama, vLLM or the Hugging Face Hub
  install-engine  install an engine that serves, in an environment of its own
improve
  next        say what to do next, what it may bring and what it rests on
  label-next  choose the inputs that are most worth labelling, and say why
  fixes       list people's marks on rows, and what became of them
  trace       follow one row through datasets, answers, marks and votes
look around
  ls          list the artifacts of a workspace
  show        show one artifact, for example models/demo
  completion  print a script that completes commands and keys in bash or zsh
"""
_HELP = dict(re.findall(r"^  ([\w-]+) +(.+)$", _DESCRIPTION, re.MULTILINE))
_CONFIG_OF = {
    "export": "use its workspace, and say what each GGUF costs in points on the test rows",
}
_EPILOG = """\
Any key of the configuration can be overridden on the command line, for example:
  tuneloop run demo.yaml training.learning_rate=5e-4 data.num_train_examples=200
`tuneloop COMMAND --help` shows the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _result_stream() as output, _logging_to_stderr(arguments.verbose):
            return _run(arguments, output)
    except BrokenPipeError:
        # As in `tuneloop trace ID | head`: whoever read the result has enough of it.
        if not _has_no_reader(1):
            raise
        return 128 + signal.SIGPIPE


def _run(arguments: argparse.Namespace, output: IO[str]) -> int:
    try:
        from tuneloop.commands import COMMANDS

        return COMMANDS[arguments.command](arguments, output) or 0
    except KeyboardInterrupt:
        # A job goes on without whoever submitted it: the same command would start another.
        is_job = arguments.command == "submit"
        again = "" if is_job else "; run the same command again to resume"
        print(f"interrupted{again}", file=sys.stderr)
        return 130
    except Exception as error:
        user_error = _removed_directory(error) or find_user_error(error)
        if user_error is None:
            raise
        _print_error(user_error, arguments, output)
        return 2


def _has_no_reader(descriptor: int) -> bool:
    """Return whether this is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, accepting overrides anywhere, also after a flag."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [item for item in rest if item.startswith("-") or "=" not in item]
    if unknown or (rest and not hasattr(arguments, "overrides")):
        parser.error("unrecognized arguments: " + " ".join(unknown or rest))
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tuneloop",
        usage="tuneloop [-h] [--version] COMMAND ...",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tuneloop {__version__}")
    # The description lists them, grouped by job.
    commands = parser.add_subparsers(
        prog="tuneloop", dest="command", required=True, help=argparse.SUPPRESS
    )

    def command(name: str) -> argparse.ArgumentParser:
        help = _HELP[name]
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        sub.add_argument("-v", "--verbose", action="store_true", help="log more")
        return sub

    def overrides(sub: argparse.ArgumentParser) -> None:
        _complete(
            sub.add_argument(
                "overrides",
                metavar="key=value",
                nargs="*",
                help="override a key of the configuration, for example training.num_epochs=2",
            ),
            _keys,
        )

    def config_command(name: str) -> argparse.ArgumentParser:
        sub = command(name)
        sub.add_argument("config", metavar="CONFIG.yaml", help="the configuration")
        overrides(sub)
        return sub

    def workspace_of(sub: argparse.ArgumentParser, words: str = "use its workspace") -> None:
        sub.add_argument("config", metavar="CONFIG.yaml", nargs="?", help=words)
        overrides(sub)
        sub.add_argument(
            "--workspace", metavar="PATH", help="default: the configuration's, else workspace"
        )

    def workspace_command(name: str) -> argparse.ArgumentParser:
        sub = command(name)
        if name in ("show", "export"):
            _complete(
                sub.add_argument("ref", metavar="REF", help="KIND/NAME (newest) or KIND/NAME@vN"),
                _references,
            )
        if name == "show":
            _complete(
                sub.add_argument("--diff", metavar="REF", help="compare with this older dataset"),
                _references,
            )
        workspace_of(sub, _CONFIG_OF.get(name, "use its workspace"))
        return sub

    init, importing = command("init"), command("import")
    importing.add_argument(
        "layout", choices=("openai",), help="who the file was made for; other layouts are known too"
    )
    importing.add_argument("rows", metavar="FILE", help="JSONL, JSON, CSV, TSV, Parquet or Arrow")
    init.add_argument("--from", dest="rows", metavar="FILE", help="make it from a file of rows")
    init.add_argument(
        "--task", choices=("extraction", "classification", "generation", "language_modeling"),
        help="default: what the rows look like",
    )  # fmt: skip
    init.add_argument("--input", metavar="COLUMN", help="goes in; default: what looks like it")
    init.add_argument("--output", metavar="COLUMN", help="comes out; default: what looks like it")
    init.add_argument("--instruction", metavar="TEXT", help="what the model has to do")
    init.add_argument("--base", metavar="MODEL", help="the base model")
    for sub in (init, importing):
        sub.add_argument(
            "path", metavar="CONFIG.yaml", nargs="?", default="tuneloop.yaml",
            help="where to write; default: %(default)s",
        )  # fmt: skip
        sub.add_argument(
            "--model", metavar="NAME", default="", help="the model that was made from the rows"
        )
    for name in ("check", "prepare", "generate", "train", "evaluate", "run", "sweep", "serve"):
        config_command(name)
    gate = config_command("gate")
    for name, words in (
        ("--against", "what the candidate is held against: models/NAME[@vN], or an arm's name"),
        ("--candidate", "default: the newest model of this configuration"),
    ):
        option = gate.add_argument(name, metavar="REF", required=name == "--against", help=words)
        _complete(option, _references)
    gate.add_argument("--junit", metavar="FILE", help="write the checks as JUnit XML")
    gate.add_argument("--markdown", metavar="FILE", help="write the checks as Markdown")
    config_command("next")
    labelling = command("label-next")
    labelling.add_argument("rows", metavar="FILE", help="inputs, laid out like data.sources")
    labelling.add_argument("config", metavar="CONFIG.yaml", help="the configuration")
    overrides(labelling)
    labelling.add_argument(
        "-k", dest="count", type=int, default=50, metavar="N", help="how many; default: %(default)s"
    )
    labelling.add_argument(
        "--out", metavar="FILE", default="next.csv",
        help="CSV, or tasks of Label Studio if it ends in .json; default: %(default)s",
    )  # fmt: skip
    config_command("fixes").add_argument(
        "--output", metavar="FILE", help="also write the marks, as JSON Lines for data.fixes"
    )
    trace = command("trace")
    trace.add_argument(
        "id", metavar="ID", help="of a row, or how it begins; path:line; or of a mark or vote"
    )
    workspace_of(trace)
    submit = command("submit")
    submit.add_argument(
        "job_command", metavar="COMMAND",
        help="check, prepare, generate, train, evaluate, run, sweep or serve",
    )  # fmt: skip
    submit.add_argument("config", metavar="CONFIG.yaml", help="the configuration")
    overrides(submit)
    submit.add_argument(
        "--address", metavar="URL", help="of the jobs API; default: RAY_API_SERVER_ADDRESS"
    )
    shown = workspace_command("dashboard")
    shown.add_argument("--port", type=int, default=8501, help="default: %(default)s")
    shown.add_argument(
        "--read-only", action="store_true", help="show votes and marks, and take no new ones"
    )
    workspace_command("ls")
    workspace_command("show")
    exporting = workspace_command("export")
    exporting.add_argument(
        "--to", choices=("gguf", "ollama", "vllm", "hub"), required=True,
        help="gguf: F16, Q8_0 and Q4_K_M for llama.cpp; ollama: those with a Modelfile; "
        "vllm: merged safetensors; hub: those as a private repository",
    )  # fmt: skip
    exporting.add_argument(
        "--output", metavar="DIR", help="default: exports/NAME-vN-FORMAT in this directory"
    )
    exporting.add_argument("--repo", metavar="ORG/NAME", help="for `--to hub`: where to")
    installing = command("install-engine")
    installing.add_argument("engine", choices=("vllm",))
    installing.add_argument(
        "--device", choices=("cpu", "gpu"), help="default: gpu where there is one"
    )
    command("doctor")
    completion = command("completion")
    completion.add_argument("shell", choices=("bash", "zsh"))
    completion.epilog = 'Put this line into ~/.bashrc: eval "$(tuneloop completion bash)"'
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser


def _complete(action: argparse.Action, completer: Callable[..., list[str]]) -> None:
    action.completer = completer  # type: ignore[attr-defined]  # where argcomplete looks for it


def _keys(prefix: str, **context: object) -> list[str]:
    """Return the dotted keys that a prefix begins, one part further, for shell completion."""
    from tuneloop.config import field_names

    path = prefix.split(".")[:-1]
    return [
        ".".join([*path, name]) + ("." if field_names([*path, name]) else "=")
        for name in field_names(path)
    ]


def _references(parsed_args: argparse.Namespace, **context: object) -> list[str]:
    """Return the references of all artifacts, for shell completion."""
    from tuneloop.commands import open_workspace

    return [item.ref for item in open_workspace(parsed_args).published()]


@contextlib.contextmanager
def _result_stream() -> Iterator[IO[str]]:
    """Yield the real standard output and send whatever else is printed to standard error.

    Ray and DeepSpeed print to standard output, also from compiled code and child processes, so
    the file descriptor itself is redirected.
    """
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        # Ray's own threads write to whatever `sys.stdout` is.
        with (
            contextlib.redirect_stdout(sys.stderr),
            os.fdopen(saved, "w", encoding="utf-8", closefd=False) as output,
        ):
            yield output
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


class _StderrHandler(logging.StreamHandler):
    """Writes to what `sys.stderr` is at the time: above the bars, while some are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@contextlib.contextmanager
def _logging_to_stderr(verbose: bool) -> Iterator[None]:
    handler = _StderrHandler()
    if sys.stderr.isatty():
        # A bar shows it; the artifact's log gets the line all the same.
        handler.addFilter(lambda record: not hasattr(record, "progress"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("tuneloop").setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        # A caller from Python may close the stream.
        logging.root.removeHandler(handler)


def _print_error(error: UserError, arguments: argparse.Namespace, output: IO[str]) -> None:
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)
    if arguments.json:
        problems = [vars(problem) for problem in error.problems]
        result = {"error": {"type": type(error).__name__, "problems": problems}}
        print(json.dumps(result, ensure_ascii=False), file=output)


def _removed_directory(error: Exception) -> UserError | None:
    """Return the error that explains any other: the working directory is gone."""
    try:
        Path.cwd()
    except FileNotFoundError:
        cause = find_user_error(error)
        problem = Problem(
            "the directory that this runs in was removed",
            where="the working directory",
            got="" if cause else f"{type(error).__name__}: {error}",
            remedy="run it in a directory that stays; in a job: Ray unpacks a job's files once per "
            "node, so nodes that share a machine each need their own `ray start --temp-dir=…`",
        )
        return ResourceError(problem, *(cause.problems if cause else ()))
    return None


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
