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
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tuneloop import __version__
from tuneloop.errors import Problem, ResourceError, UserError, find_user_error

if TYPE_CHECKING:
    from tuneloop.artifacts import Published
    from tuneloop.config import TuneloopConfig

_EPILOG = """\
every COMMAND takes `dotted.key=value` overrides, for example:
  tuneloop run demo.yaml training.learning_rate=5e-4 data.num_train_examples=200
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    with _result_stream() as output, _logging_to_stderr(arguments.verbose):
        try:
            return int(arguments.call(arguments, output))
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return 130
        except Exception as error:
            user_error = _removed_directory(error) or find_user_error(error)
            if user_error is None:
                raise
            _print_error(user_error, arguments, output)
            return 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, taking overrides wherever they stand, also behind a flag."""
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
        description="Finetune a small language model on your task, and prove whether it helped.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tuneloop {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, call: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(call=call)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        sub.add_argument("-v", "--verbose", action="store_true", help="log more")
        return sub

    def config_command(name: str, call: Any, help: str) -> None:
        sub = command(name, call, help)
        sub.add_argument("config", metavar="CONFIG.yaml")
        sub.add_argument("overrides", metavar="key=value", nargs="*")

    def workspace_command(name: str, call: Any, help: str) -> argparse.ArgumentParser:
        sub = command(name, call, help)
        if name == "show":
            sub.add_argument("ref", metavar="REF")
            sub.add_argument("--diff", metavar="REF", help="a dataset to hold REF against")
        sub.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="whose workspace to open")
        sub.add_argument("overrides", metavar="key=value", nargs="*")
        sub.add_argument("--workspace", default="workspace", help="default: %(default)s")
        return sub

    init = command("init", _init, "write a commented starter configuration")
    init.add_argument("path", nargs="?", default="tuneloop.yaml")
    config_command("check", _check, "validate every row, estimate memory and time; runs nothing")
    config_command("prepare", _step("prepare"), "clean, deduplicate, split and tokenize the data")
    config_command("generate", _step("generate"), "let a larger model write pairs from documents")
    config_command("train", _step("train"), "finetune (prepares first when needed)")
    config_command("evaluate", _step("evaluate"), "score base, few-shot and finetuned model")
    config_command("run", _step("run"), "the whole loop: prepare, baseline, train, evaluate")
    config_command("sweep", _sweep, "train and score a grid of settings, fit a learning curve")
    config_command("serve", _serve, "serve the base and the finetuned model until interrupted")
    submit = command("submit", _submit, "run a command on a cluster as a Ray job")
    submit.add_argument("job_command", metavar="COMMAND")
    submit.add_argument("config", metavar="CONFIG.yaml")
    submit.add_argument("overrides", metavar="key=value", nargs="*")
    submit.add_argument("--address", help="of the jobs API; default: RAY_API_SERVER_ADDRESS")
    workspace_command(
        "dashboard", _dashboard, "artifacts and reports in a browser, on 127.0.0.1"
    ).add_argument("--port", type=int, default=8501, help="default: %(default)s")
    workspace_command("ls", _ls, "list the artifacts of a workspace")
    workspace_command("show", _show, "show one artifact, for example models/demo")
    command("doctor", _doctor, "say what this machine has and what is missing")
    return parser


def _step(name: str) -> Any:
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

    preflight = check(_load(arguments))
    if arguments.json:
        print(json.dumps(preflight.summary(), ensure_ascii=False), file=output)
        return 2 if preflight.problems else 0
    report(preflight, output)
    print("nothing is in the way", file=output)
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
    for column in ("artifact", "created", "took", "metrics"):
        table.add_column(column)
    for artifact in artifacts:
        manifest = artifact.manifest
        metrics = ", ".join(f"{key} {_short(value)}" for key, value in manifest["metrics"].items())
        took = f"{manifest['duration_s']:.0f} s"
        table.add_row(artifact.ref, manifest["created_at"], took, metrics)
    Console(file=output).print(table)
    return 0


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
    print(f"{artifact.ref}  {manifest['created_at']}  {artifact.location}", file=output)
    print(f"fingerprint  {manifest['fingerprint']}", file=output)
    print("made from", file=output)
    for item in manifest["inputs"]:
        print(f"  {item}", file=output)
    for section in ("metrics", "config", "resources", "packages"):
        print(section, file=output)
        for key, value in manifest[section].items():
            print(f"  {key}: {_short(value)}", file=output)
    print("files", file=output)
    for file in manifest["files"]:
        print(f"  {file['bytes']:>12,} bytes  {file['path']}", file=output)
    readme = artifact.path / "README.md"
    if readme.is_file():
        print(f"\n{readme.read_text(encoding='utf-8')}", file=output)
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
    text = f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "..."


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


@contextlib.contextmanager
def _logging_to_stderr(verbose: bool) -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("tuneloop").setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        # Who calls this from Python may close the stream.
        logging.root.removeHandler(handler)


def _print_error(error: UserError, arguments: argparse.Namespace, output: IO[str]) -> None:
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)
    if arguments.json:
        problems = [vars(problem) for problem in error.problems]
        result = {"error": {"type": type(error).__name__, "problems": problems}}
        print(json.dumps(result, ensure_ascii=False), file=output)


def _removed_directory(error: Exception) -> UserError | None:
    """Return what explains the error, whatever it says: the working directory is not there."""
    try:
        Path.cwd()
    except FileNotFoundError:
        known = find_user_error(error)
        problem = Problem(
            "the directory that this runs in was removed",
            where="the working directory",
            got="" if known else f"{type(error).__name__}: {error}",
            remedy="run it in one that stays; as a job: Ray unpacks a job's files once for each "
            "node, so nodes that share a machine need a `ray start --temp-dir=…` of their own",
        )
        return ResourceError(problem, *(known.problems if known else ()))
    return None


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
