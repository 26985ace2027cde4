"""The command line: arguments to configuration to one call.

Standard output carries the result only; logs and progress go to standard error. Exit codes:
0 done, 2 the user's mistake, 1 our failure, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tuneloop import __version__
from tuneloop.errors import Problem, ResourceError, UserError, find_user_error

if TYPE_CHECKING:
    from tuneloop.artifacts import Artifact, Published
    from tuneloop.config import TuneloopConfig

Call = Callable[[argparse.Namespace, IO[str]], int]

_DESCRIPTION = """\
Finetune a small language model on your task, and prove whether it helped.

start
  init        write a starter configuration with comments
  check       check every row, memory and time before anything runs
  doctor      show what this machine has and what is missing
data
  prepare     clean, deduplicate, split and tokenize the data
  generate    let a larger model write training pairs from documents
train
  train       finetune (prepares the data first if needed)
  run         the whole loop: prepare, baseline, train, evaluate
  sweep       train and score a grid of settings, fit a learning curve
judge
  evaluate    score the base, few-shot and finetuned model
  dashboard   browse artifacts and reports on 127.0.0.1
serve
  serve       serve the base and the finetuned model until interrupted
  submit      run a command on a cluster as a Ray job
look around
  ls          list the artifacts of a workspace
  show        show one artifact, for example models/demo
  completion  print a script that completes commands and keys in bash or zsh
"""
_HELP = dict(re.findall(r"^  (\w+) +(.+)$", _DESCRIPTION, re.MULTILINE))
_EPILOG = """\
Any key of the configuration can be overridden on the command line, for example:
  tuneloop run demo.yaml training.learning_rate=5e-4 data.num_train_examples=200
`tuneloop COMMAND --help` shows the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    with _result_stream() as output, _logging_to_stderr(arguments.verbose):
        try:
            return int(arguments.call(arguments, output))
        except KeyboardInterrupt:
            print("interrupted; run the same command again to resume", file=sys.stderr)
            return 130
        except Exception as error:
            user_error = _removed_directory(error) or find_user_error(error)
            if user_error is None:
                raise
            _print_error(user_error, arguments, output)
            return 2


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

    def command(name: str, call: Call) -> argparse.ArgumentParser:
        help = _HELP[name]
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(call=call)
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

    def config_command(name: str, call: Call) -> None:
        sub = command(name, call)
        sub.add_argument("config", metavar="CONFIG.yaml", help="the configuration")
        overrides(sub)

    def workspace_command(name: str, call: Call) -> argparse.ArgumentParser:
        sub = command(name, call)
        if name == "show":
            _complete(
                sub.add_argument("ref", metavar="REF", help="KIND/NAME (newest) or KIND/NAME@vN"),
                _references,
            )
            _complete(
                sub.add_argument("--diff", metavar="REF", help="compare with this older dataset"),
                _references,
            )
        sub.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="use its workspace")
        overrides(sub)
        sub.add_argument(
            "--workspace", metavar="PATH", default="workspace", help="default: %(default)s"
        )
        return sub

    init = command("init", _init)
    init.add_argument("path", nargs="?", default="tuneloop.yaml", help="default: %(default)s")
    config_command("check", _check)
    for step in ("prepare", "generate", "train", "evaluate", "run"):
        config_command(step, _step(step))
    config_command("sweep", _sweep)
    config_command("serve", _serve)
    submit = command("submit", _submit)
    submit.add_argument("job_command", metavar="COMMAND", help="the command to run there")
    submit.add_argument("config", metavar="CONFIG.yaml", help="the configuration")
    overrides(submit)
    submit.add_argument(
        "--address", metavar="URL", help="of the jobs API; default: RAY_API_SERVER_ADDRESS"
    )
    workspace_command("dashboard", _dashboard).add_argument(
        "--port", type=int, default=8501, help="default: %(default)s"
    )
    workspace_command("ls", _ls)
    workspace_command("show", _show)
    command("doctor", _doctor)
    completion = command("completion", _completion)
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
    from tuneloop.artifacts import Workspace

    return [item.ref for item in Workspace(_workspace_location(parsed_args)).published()]


def _step(name: str) -> Call:
    def call(arguments: argparse.Namespace, output: IO[str]) -> int:
        from tuneloop import pipeline
        from tuneloop.artifacts import Workspace

        config = _load(arguments)
        step = {
            "prepare": pipeline.prepare,
            "generate": pipeline.generate,
            "train": pipeline.train,
        }.get(name, pipeline.run)
        published = step(config, Workspace(config.workspace))
        if arguments.json:
            summaries = [item.artifact.summary(item.reused) for item in published]
            result = {"artifacts": summaries} if name == "run" else summaries[-1]
            print(json.dumps(result, ensure_ascii=False), file=output)
        else:
            _print_published(published, config, arguments, output)
        return 0

    return call


def _print_published(
    published: list[Published],
    config: TuneloopConfig,
    arguments: argparse.Namespace,
    output: IO[str],
) -> None:
    from rich.console import Console

    console = Console(file=output)
    last = published[-1].artifact
    if last.kind == "evaluations":
        from tuneloop.evals.reporting.report import terminal_table

        console.print(terminal_table(last))
    for item in published:
        state = "reused" if item.reused else "new"
        line = f"{item.artifact.ref:<28} {state:<7} {item.artifact.location}"
        console.print(line, soft_wrap=True)
    if last.kind == "evaluations":
        console.print(f"\nreport     {Path(last.location) / 'report.html'}", soft_wrap=True)
        console.print(f"dashboard  tuneloop dashboard --workspace {config.workspace}")
        console.print(f"serve it   tuneloop serve {arguments.config}")
        console.print(
            f"try next   tuneloop run {arguments.config} training.num_epochs="
            f"{config.training.num_epochs + 1}"
        )


def _init(arguments: argparse.Namespace, output: IO[str]) -> int:
    from tuneloop.errors import ConfigError, Problem

    starter = (Path(__file__).parent / "starter.yaml").read_text(encoding="utf-8")
    path = Path(arguments.path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter)
    except OSError as error:
        raise ConfigError(
            Problem(
                "cannot write the starter configuration",
                where=str(path),
                got=error.strerror or str(error),
                remedy="give another path: tuneloop init PATH",
            )
        ) from error
    if arguments.json:
        print(json.dumps({"path": str(path)}), file=output)
    else:
        print(f"wrote {path}; edit it, then: tuneloop check {path}", file=output)
    return 0


def _check(arguments: argparse.Namespace, output: IO[str]) -> int:
    from tuneloop.check import check, report

    result = check(_load(arguments))
    if arguments.json:
        print(json.dumps(result.summary(), ensure_ascii=False), file=output)
        return 2 if result.problems else 0
    report(result, output)
    print("nothing stands in the way", file=output)
    return 0


def _sweep(arguments: argparse.Namespace, output: IO[str]) -> int:
    from tuneloop.artifacts import Workspace
    from tuneloop.sweeps.run import sweep

    config = _load(arguments)
    (published,) = sweep(config, Workspace(config.workspace))
    if arguments.json:
        print(json.dumps(published.artifact.summary(published.reused)), file=output)
    else:
        from rich.console import Console

        from tuneloop.sweeps.table import sweep_table

        console = Console(file=output)
        console.print(sweep_table(published.artifact))
        state = "reused" if published.reused else "new"
        console.print(f"{published.artifact.ref}  {state}  {published.artifact.location}")
        console.print(f"look at it  tuneloop dashboard --workspace {config.workspace}")
    return 0


def _submit(arguments: argparse.Namespace, output: IO[str]) -> int:
    from tuneloop.submission import submit

    address = arguments.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    job = submit(
        arguments.job_command,
        arguments.config,
        arguments.overrides,
        address or "http://127.0.0.1:8265",
    )
    if arguments.json:
        print(json.dumps(vars(job)), file=output)
    else:
        print(f"job {job.submission_id} {job.status}, exit code {job.exit_code}", file=output)
    return job.exit_code


def _serve(arguments: argparse.Namespace, output: IO[str]) -> int:
    from tuneloop import pipeline
    from tuneloop.artifacts import Workspace

    config = _load(arguments)
    with pipeline.serve(config, Workspace(config.workspace)) as (url, models):
        if arguments.json:
            print(json.dumps({"url": url, "models": models}), file=output, flush=True)
        else:
            example = json.dumps(
                {"model": models[-1], "messages": [{"role": "user", "content": "Hello"}]}
            )
            print(f"serving {', '.join(models)} at {url}; Ctrl-C stops it\n", file=output)
            print(
                f"curl {url}/chat/completions -H 'Content-Type: application/json' -d '{example}'",
                file=output,
                flush=True,
            )
        signal.pause()
    return 0


def _dashboard(arguments: argparse.Namespace, output: IO[str]) -> int:
    from tuneloop.artifacts import Workspace
    from tuneloop.review.dashboard import run_dashboard

    return run_dashboard(Workspace(_workspace_location(arguments)).location, arguments.port)


def _ls(arguments: argparse.Namespace, output: IO[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from tuneloop.artifacts import Workspace

    workspace = Workspace(_workspace_location(arguments))
    artifacts = workspace.published()
    if arguments.json:
        summaries = [artifact.summary(reused=True) for artifact in artifacts]
        print(json.dumps({"artifacts": summaries}, ensure_ascii=False), file=output)
        return 0
    if not artifacts:
        print(
            f"no artifacts in {workspace.location}; `tuneloop run CONFIG.yaml` makes some",
            file=output,
        )
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("artifact", "created (UTC)", "took", "result"):
        table.add_column(column, no_wrap=column != "result")
    for artifact in artifacts:
        created = artifact.manifest["created_at"][:16].replace("T", " ")
        took = f"{artifact.manifest['duration_s']:,.0f} s"
        table.add_row(artifact.ref, created, took, _headline(artifact))
    Console(file=output).print(table)
    return 0


def _headline(artifact: Artifact) -> str:
    """Return the two or three numbers that tell most about an artifact."""
    metrics = artifact.manifest["metrics"]
    if "num_test_rows" in metrics:
        return f"{metrics['num_train_rows']:,} train, {metrics['num_test_rows']:,} test rows"
    if "final_loss" in metrics:
        return f"loss {metrics['first_loss']:.3f} to {metrics['final_loss']:.3f}"
    if "scores" in metrics:
        arm, score = list(metrics["scores"].items())[-1]
        return f"{arm}: {metrics['primary']} {_short(score)}"
    return ", ".join(f"{key} {_short(value)}" for key, value in metrics.items())


def _show(arguments: argparse.Namespace, output: IO[str]) -> int:
    from tuneloop.artifacts import Workspace

    workspace = Workspace(_workspace_location(arguments))
    artifact = workspace.open(arguments.ref)
    if arguments.diff:
        from tuneloop.data.diff import diff_datasets, diff_text

        diff = diff_datasets(artifact, workspace.open(arguments.diff))
        print(
            json.dumps(diff, ensure_ascii=False) if arguments.json else diff_text(diff), file=output
        )
        return 0
    if arguments.json:
        result = artifact.summary(reused=True) | {"manifest": artifact.manifest}
        print(json.dumps(result, ensure_ascii=False), file=output)
        return 0
    manifest = artifact.manifest
    width = shutil.get_terminal_size().columns

    def line(text: str) -> None:
        # Whole digests help nobody who reads; --json has them.
        text = re.sub(r"(sha256:[0-9a-f]{12})[0-9a-f]+", r"\1…", text)
        print(text if len(text) <= width else text[: width - 1] + "…", file=output)

    line(f"{artifact.ref}  {manifest['created_at']}")
    print(artifact.location, file=output)
    line(f"fingerprint  {manifest['fingerprint']}")
    line("made from")
    for item in manifest["inputs"]:
        line(f"  {item}")
    for section in ("metrics", "config", "resources", "packages"):
        line(section)
        for key, value in manifest[section].items():
            line(f"  {key}: {_short(value)}")
    line("files")
    for file in manifest["files"]:
        line(f"  {file['bytes']:>12,} bytes  {file['path']}")
    readme = artifact.path / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        if output.isatty():
            from rich.console import Console
            from rich.markdown import Markdown

            Console(file=output).print("", Markdown(text))
        else:
            print(f"\n{text}", file=output)
    return 0


def _doctor(arguments: argparse.Namespace, output: IO[str]) -> int:
    from tuneloop.doctor import examine

    lines = examine()
    if arguments.json:
        print(json.dumps({line.name: line.found for line in lines}), file=output)
    else:
        for line in lines:
            mark = "ok " if line.good else "!! "
            print(f"{mark} {line.name:<14} {line.found}", file=output)
            if line.remedy:
                print(f"    {'':<14} {line.remedy}", file=output)
    return 0


def _completion(arguments: argparse.Namespace, output: IO[str]) -> int:
    from argcomplete.shell_integration import shellcode

    script = shellcode(["tuneloop"], shell=arguments.shell)
    if arguments.json:
        print(json.dumps({"script": script}), file=output)
    else:
        print(script, file=output)
    return 0


def _load(arguments: argparse.Namespace) -> TuneloopConfig:
    from tuneloop.config import load_config
    from tuneloop.submission import in_job_directory, refuse_fleeting_workspace

    config = load_config(arguments.config, arguments.overrides)
    if in_job_directory():
        refuse_fleeting_workspace(config)
    return config


def _workspace_location(arguments: argparse.Namespace) -> str:
    return _load(arguments).workspace if arguments.config else str(arguments.workspace)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


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
