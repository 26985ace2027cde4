"""What each command does: a configuration to one call, and its result to standard output.

Mistakes in the configuration are reported before anything heavy is loaded.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tuneloop.artifacts import Artifact, Published, Workspace
from tuneloop.config import API_KEY_VARIABLE, TuneloopConfig, load_config
from tuneloop.doctor import examine
from tuneloop.errors import ArtifactError, ConfigError, Problem
from tuneloop.marks import write_marks
from tuneloop.review.dashboard import run_dashboard
from tuneloop.submission import (
    as_submitted,
    in_job_directory,
    refuse_fleeting_workspace,
    submit,
)
from tuneloop.text import shorten

if TYPE_CHECKING:
    from tuneloop.advice import Advice

log = logging.getLogger("tuneloop")
_SHOWN_CHOICES = 10
_MARK_CHARACTERS = 120


def _step(arguments: argparse.Namespace, output: IO[str]) -> None:
    config = _load(arguments)
    from tuneloop import pipeline

    steps = {
        "prepare": pipeline.prepare,
        "generate": pipeline.generate,
        "train": pipeline.train,
        "evaluate": pipeline.evaluate,
        "run": pipeline.run,
    }
    published = steps[arguments.command](config, Workspace(config.workspace))
    if arguments.json:
        summaries = [item.artifact.summary(item.reused) for item in published]
        result = summaries[-1]
        if arguments.command == "run":
            advice = _advice_after(config)
            result = {"artifacts": summaries, "next": advice.as_dict() if advice else None}
        print(json.dumps(result, ensure_ascii=False), file=output)
    else:
        _print_published(published, config, output)


def _print_published(
    published: list[Published],
    config: TuneloopConfig,
    output: IO[str],
) -> None:
    console = Console(file=output)
    # To be copied: in one line each, with the brackets of lists.
    tell = partial(console.print, soft_wrap=True, markup=False)
    last = published[-1].artifact
    if last.kind == "evaluations":
        from tuneloop.evals.reporting.report import terminal_table

        console.print(terminal_table(last))
    for item in published:
        state = "reused" if item.reused else "new"
        line = f"{item.artifact.ref:<28} {state:<7} {item.artifact.location}"
        tell(line)
    if last.kind == "evaluations":
        tell(f"\nreport     {last.location}/report.html")
        tell(f"dashboard  tuneloop dashboard --workspace {shlex.quote(config.workspace)}")
        again = shlex.join([config.origin.file, *config.origin.overrides])
        tell(f"serve it   tuneloop serve {again}")
        if not last.name.endswith("-baseline"):
            advice = _advice_after(config)
            if advice and advice.actions:
                first = advice.actions[0]
                gain = first.describe_gain(advice.metric)
                tell(f"try next   {first.title}; gain: {gain}")
                tell(f"{'':11}{first.command}")
            tell(f"all of it  tuneloop next {again}")


def _advice(config: TuneloopConfig) -> Advice:
    """Return what to do next, kept so that it can be held against what comes of it."""
    from tuneloop.advice import advice_for

    advice = advice_for(Workspace(config.workspace), config.name, config)
    advice.keep()
    return advice


def _advice_after(config: TuneloopConfig) -> Advice | None:
    """Return what to do after a run. It is done, whatever happens here."""
    try:
        return _advice(config)
    except ArtifactError as error:
        log.warning("there is no advice: %s", error.problems[0])
        return None


def _init(arguments: argparse.Namespace, output: IO[str]) -> None:
    path, source = Path(arguments.path), arguments.rows
    flags = ("input", "output", "task", "instruction", "base")
    wanted = {name: getattr(arguments, name, "") or "" for name in flags}
    if source is None and not arguments.json and sys.stdin.isatty() and sys.stderr.isatty():
        from tuneloop.starter import Wishes, interview

        if path.exists():  # told before anything is asked
            raise _unwritable(path, "the file exists")
        source, wishes = interview(_ask, _say, Wishes(**wanted, old_model=arguments.model))
        wanted = {name: getattr(wishes, name) for name in wanted}
    if not source:
        given = [f"--{name}" for name, value in wanted.items() if value]
        given += ["--model"] * bool(arguments.model)
        if given:
            raise ConfigError.of(
                f"`{given[0]}` is about rows, and there are none", remedy="add --from FILE"
            )
        _write_new(path, (Path(__file__).parent / "starter.yaml").read_text(encoding="utf-8"))
        summary: dict[str, Any] = {"path": str(path)}
        lines = [f"wrote {path}; edit it, then: tuneloop check {path}"]
    else:
        from tuneloop.starter import Wishes, starter_for

        if path.exists():  # told before every row is read
            raise _unwritable(path, "the file exists")
        starter = starter_for(source, str(path), Wishes(**wanted, old_model=arguments.model))
        _write_new(path, starter.text)
        summary, lines = starter.summary(), starter.lines()
    print(
        json.dumps(summary, ensure_ascii=False) if arguments.json else "\n".join(lines), file=output
    )


def _ask(question: str, default: str) -> str:
    """Return what is typed, on the terminal; an empty line stands for the default."""
    print(f"{question}{f' [{default}]' if default else ''}: ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:  # the end of the input: Ctrl-D
        raise KeyboardInterrupt
    return line.strip() or default


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error


def _unwritable(path: Path, got: str) -> ConfigError:
    return ConfigError.of(
        "cannot write the configuration",
        where=str(path),
        got=got,
        remedy="name another path as the last argument",
    )


def _check(arguments: argparse.Namespace, output: IO[str]) -> int:
    config = _load(arguments)
    from tuneloop.check import check, check_trials, report

    result = check(config)
    if config.sweep is not None:
        from tuneloop.sweeps.grid import expand
        from tuneloop.sweeps.study import Budget

        try:
            trials = [cell.config for cell in expand(config)]
            result = check_trials(result, trials, Budget.of(config).seconds)
        except ConfigError as error:
            result.problems.extend(p for p in error.problems if p not in result.problems)
    if arguments.json:
        print(json.dumps(result.summary(), ensure_ascii=False), file=output)
        return 2 if result.problems else 0
    report(result, output)
    print("nothing stands in the way", file=output)
    return 0


def _gate(arguments: argparse.Namespace, output: IO[str]) -> int:
    config = _load(arguments)
    files = {"--junit": arguments.junit, "--markdown": arguments.markdown}
    # Before anything is answered: the result must not be lost for want of a folder.
    _refuse_unwritable({option: Path(path) for option, path in files.items() if path})
    from tuneloop import pipeline
    from tuneloop.evals.reporting.gate import decide, headline, to_junit, to_markdown
    from tuneloop.evals.scoring.results import Evaluation

    published = pipeline.gate(
        config, Workspace(config.workspace), arguments.against, arguments.candidate
    )
    artifact = published.artifact
    first, second = artifact.manifest["config"]["arms"]
    evaluation = Evaluation.load(artifact)
    result = decide(
        evaluation, config.evaluation.floors, is_same=first["identity"] == second["identity"]
    )
    report = f"{artifact.location}/report.html"
    if arguments.junit:
        Path(arguments.junit).write_text(to_junit(result), encoding="utf-8")
    if arguments.markdown:
        Path(arguments.markdown).write_text(to_markdown(result, report), encoding="utf-8")
    if arguments.json:
        summary = artifact.summary(published.reused) | {"gate": result.as_dict()}
        print(json.dumps(summary, ensure_ascii=False), file=output)
    else:
        table = Table(box=None, pad_edge=False)
        for column in ("check", "outcome", ""):
            table.add_column(column, overflow="fold")
        for check in result.checks:
            colour = "green" if check.passed else "yellow" if "tell" in check.outcome else "red"
            outcome = f"[{colour}]{check.outcome}[/]"
            table.add_row(escape(check.name), outcome, escape(check.detail))
        console = Console(file=output)
        console.print(table)
        console.print(f"\n{headline(result)}", markup=False, highlight=False)
        console.print(f"report     {report}", soft_wrap=True)
    return 0 if result.passed else 3


def _refuse_unwritable(files: dict[str, Path]) -> None:
    ConfigError.refuse(
        Problem(
            "the result cannot be written there",
            where=option,
            got=str(path),
            allowed="a file in a folder that exists and may be written to",
        )
        for option, path in files.items()
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)
    )


def _sweep(arguments: argparse.Namespace, output: IO[str]) -> None:
    config = _load(arguments)
    from tuneloop.sweeps.advice import advise
    from tuneloop.sweeps.run import sweep
    from tuneloop.sweeps.table import read_files, sweep_table

    (published,) = sweep(config, Workspace(config.workspace))
    if arguments.json:
        print(json.dumps(published.artifact.summary(published.reused)), file=output)
    else:
        console = Console(file=output)
        console.print(sweep_table(published.artifact))
        for one in advise(*read_files(published.artifact))[:1]:
            console.print(f"{one.title}. {one.why}\n", markup=False)
        tell = partial(console.print, soft_wrap=True, markup=False)
        tell(f"report      {published.artifact.location}/report.html")
        state = "reused" if published.reused else "new"
        tell(f"{published.artifact.ref}  {state}  {published.artifact.location}")
        tell(f"look at it  tuneloop dashboard --workspace {shlex.quote(config.workspace)}")


def _submit(arguments: argparse.Namespace, output: IO[str]) -> int:
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


def _serve(arguments: argparse.Namespace, output: IO[str]) -> None:
    config = _load(arguments)
    from tuneloop import pipeline

    titles = {"vllm": "vLLM", "openvino": "our own engine on OpenVINO"}
    engine = titles.get(config.serving.engine, "our own engine")
    with pipeline.serve(config, Workspace(config.workspace)) as (url, models):
        if arguments.json:
            result = {"url": url, "models": models, "engine": config.serving.engine}
            print(json.dumps(result), file=output, flush=True)
        else:
            names = ", ".join(models)
            print(f"serving {names} with {engine} at {url}; Ctrl-C stops it\n", file=output)
            has_file = bool(config.serving.api_keys_file)
            print(_curl_line(url, models[-1], has_file), file=output, flush=True)
        signal.pause()


def _curl_line(url: str, model: str, has_file: bool = False) -> str:
    """Return a shell command that asks a served model, with the key if one is asked for.

    Args:
        has_file: There is a file of keys, which holds their hashes only.
    """
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    variable = API_KEY_VARIABLE if os.environ.get(API_KEY_VARIABLE) else "KEY" * has_file
    key = f'-H "Authorization: Bearer ${variable}" ' if variable else ""
    return f"curl {url}/chat/completions -H 'Content-Type: application/json' {key}-d '{body}'"


def _dashboard(arguments: argparse.Namespace, output: IO[str]) -> int:
    location = open_workspace(arguments).location
    return run_dashboard(location, arguments.port, arguments.read_only)


def _ls(arguments: argparse.Namespace, output: IO[str]) -> None:
    workspace = open_workspace(arguments)
    artifacts, damaged = workspace.listing()
    if arguments.json:
        listed: dict[str, Any] = {"artifacts": [item.summary(reused=True) for item in artifacts]}
        if damaged:
            listed["damaged"] = [asdict(problem) for problem in damaged]
        print(json.dumps(listed, ensure_ascii=False), file=output)
        return
    for problem in damaged:
        print(f"{problem.what}: {problem.where}; {problem.remedy}", file=output)
    if not artifacts:
        print(
            f"no artifacts in {workspace.location}; `tuneloop run CONFIG.yaml` makes some",
            file=output,
        )
        return
    table = Table(box=None, pad_edge=False)
    for column in ("artifact", "created (UTC)", "took", "result"):
        table.add_column(column, no_wrap=column != "result")
    for artifact in artifacts:
        created = artifact.manifest["created_at"][:16].replace("T", " ")
        took = f"{artifact.manifest['duration_s']:,.0f} s"
        table.add_row(artifact.ref, created, took, _headline(artifact))
    Console(file=output).print(table)


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


def _fixes(arguments: argparse.Namespace, output: IO[str]) -> None:
    config = _load(arguments)
    from tuneloop.data.corrections import refusal_by_task
    from tuneloop.review.fixes import mark_states

    states = mark_states(config, Workspace(config.workspace), partial(refusal_by_task, config.task))
    if arguments.output:
        write_marks((state.mark for state in states), Path(arguments.output))
    if arguments.json:
        print(json.dumps({"marks": [s.row() for s in states]}, ensure_ascii=False), file=output)
        return
    if not states:
        print(f"no marks on rows of `{config.name}`; they are made on the dashboard", file=output)
        return
    for found in states:
        mark, state, why = found
        when = mark.created_at[:16].replace("T", " ")
        print(f"{mark.row_id[:8]}  {state}  {mark.reviewer}, {when} UTC", file=output)
        print(f"    {shorten(found.says, _MARK_CHARACTERS)}", file=output)
        if state != "waiting":
            print(f"    {why}", file=output)
    for command in ("prepare", "evaluate"):
        num = sum(s.state == "waiting" and s.mark.applied_by == command for s in states)
        if num:
            words = shlex.join(["tuneloop", command, arguments.config, *arguments.overrides])
            print(f"`{words}` applies what waits: {num:,}", file=output)


def _next(arguments: argparse.Namespace, output: IO[str]) -> None:
    config = _load(arguments)
    advice = _advice(config)
    if arguments.json:
        print(json.dumps(advice.as_dict(), ensure_ascii=False), file=output)
        return
    console = Console(file=output)
    console.print(f"{advice.reference}: {advice.score}", highlight=False, markup=False)
    for number, action in enumerate(advice.actions, 1):
        console.print(f"\n{number}. {action.title}", highlight=False, markup=False)
        told = [action.why, f"gain: {action.describe_gain(advice.metric)}",
                f"cost: {action.describe_cost()}", action.command]  # fmt: skip
        told += [f"evidence: on the dashboard, {action.page}"] * bool(action.page)
        for line in told:
            console.print(f"   {line}", highlight=False, markup=False, soft_wrap=True)
    if advice.outcomes:
        console.print("\nwhat came of earlier advice", highlight=False)
        for outcome in (o for o in advice.outcomes if o.was_done):
            line = f"   {outcome.describe(advice.metric)}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print(f"   {advice.calibration}", highlight=False, markup=False, soft_wrap=True)


def _label_next(arguments: argparse.Namespace, output: IO[str]) -> None:
    config = _load(arguments)
    if arguments.count < 1:
        raise ConfigError.of("nothing is to be chosen", where="-k", allowed="1 or more")
    path = Path(arguments.out)
    _refuse_unwritable({"--out": path})
    from tuneloop.labelling import choose_next, write_choices

    chosen = choose_next(config, Workspace(config.workspace), arguments.rows, arguments.count)
    written = write_choices(chosen, config, path)
    if arguments.json:
        rows = [
            {"source": c.row.source, "score": c.score, "guess": c.guess, "reasons": c.reasons}
            for c in chosen
        ]
        summary = {"path": written.path, "source": written.source, "chosen": rows}
        print(json.dumps(summary, ensure_ascii=False), file=output)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("input", "why"):
        table.add_column(column, overflow="fold")
    for choice in chosen[:_SHOWN_CHOICES]:
        text = shorten(" ".join(choice.row.prompt.split()), 70)
        table.add_row(Text(text), Text("; ".join(choice.reasons)))
    Console(file=output).print(table)
    if len(chosen) > _SHOWN_CHOICES:
        print(f"and {len(chosen) - _SHOWN_CHOICES:,} more", file=output)
    print(f"wrote      {written.path}; fill in its answers", file=output)
    print(f"then       add to data.sources: {json.dumps(written.source)}", file=output)


def _trace(arguments: argparse.Namespace, output: IO[str]) -> None:
    workspace = open_workspace(arguments)
    from tuneloop.review.trace import trace, trace_lines

    found = trace(workspace, arguments.id)
    if arguments.json:
        print(json.dumps(found.as_dict(), ensure_ascii=False), file=output)
        return
    width = shutil.get_terminal_size().columns
    for line in trace_lines(found):
        print(shorten(line, width), file=output)


def _show(arguments: argparse.Namespace, output: IO[str]) -> None:
    workspace = open_workspace(arguments)
    artifact = workspace.open(arguments.ref)
    if arguments.diff:
        from tuneloop.data.diff import diff_datasets, diff_text

        diff = diff_datasets(artifact, workspace.open(arguments.diff))
        print(
            json.dumps(diff, ensure_ascii=False) if arguments.json else diff_text(diff), file=output
        )
        return
    if arguments.json:
        result = artifact.summary(reused=True) | {"manifest": artifact.manifest}
        print(json.dumps(result, ensure_ascii=False), file=output)
        return
    manifest = artifact.manifest
    width = shutil.get_terminal_size().columns

    def line(text: str) -> None:
        # Whole digests help nobody who reads; --json has them.
        text = re.sub(r"(sha256:[0-9a-f]{12})[0-9a-f]+", r"\1…", text)
        print(shorten(text, width), file=output)

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
            Console(file=output).print("", Markdown(text))
        else:
            print(f"\n{text}", file=output)


def _export(arguments: argparse.Namespace, output: IO[str]) -> None:
    if (arguments.to == "hub") != bool(arguments.repo):
        raise ConfigError.of(
            "`--to hub` and `--repo` belong together",
            where="--repo",
            got=f"--to {arguments.to}, --repo {arguments.repo or 'not given'}",
            remedy=f"tuneloop export {arguments.ref} --to hub --repo ORG/NAME",
        )
    from tuneloop.evals.reporting.formatting import format_change, format_estimate
    from tuneloop.evals.scoring.metrics import Metric
    from tuneloop.export import export, push

    config = _load(arguments) if arguments.config else None
    workspace = open_workspace(arguments)
    artifact = workspace.open(arguments.ref)
    default = Path("exports") / f"{artifact.name}-v{artifact.version}-{arguments.to}"
    folder = Path(arguments.output) if arguments.output else default
    result = export(workspace, arguments.ref, arguments.to, folder, config)
    url = push(result, arguments.repo) if arguments.repo else ""
    if arguments.json:
        summary = result.summary() | ({"url": url} if url else {})
        print(json.dumps(summary, ensure_ascii=False), file=output)
        return
    console = Console(file=output)
    table = Table(box=None, pad_edge=False)
    names = {kind: name for name in result.sizes for kind in [name.rsplit("-", 1)[-1][:-5]]}
    columns = ["file", "size"]
    if result.price_tags:
        columns += [result.metric, "beside the model", "tokens/s"]
    for column in columns:
        table.add_column(column, justify="left" if column == "file" else "right", overflow="fold")
    metric = Metric(result.metric, kind=result.metric_kind)
    for tag in result.price_tags:
        size = result.sizes.get(names.get(tag.name, ""))
        table.add_row(
            names.get(tag.name, tag.name),
            f"{size / 1e6:,.0f} MB" if size else "",
            format_estimate(tag.score._asdict(), metric),
            format_change(tag.difference._asdict(), metric) if size else "",
            f"{tag.tokens_per_s:.1f}" if tag.tokens_per_s else "",
        )
    if not result.price_tags:
        for name, size in result.sizes.items():
            table.add_row(name, f"{size / 1e6:,.0f} MB")
    console.print(table)
    for line in (*result.notes, f"{'same as before: ' * result.reused}{result.folder}", url):
        if line:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _doctor(arguments: argparse.Namespace, output: IO[str]) -> None:
    lines = examine()
    if arguments.json:
        print(json.dumps({line.name: line.found for line in lines}), file=output)
    else:
        for line in lines:
            mark = "ok " if line.good else "!! "
            print(f"{mark} {line.name:<14} {line.found}", file=output)
            if line.remedy:
                print(f"    {'':<14} {line.remedy}", file=output)


def _install_engine(arguments: argparse.Namespace, output: IO[str]) -> None:
    from tuneloop.serving.vllm.environment import install

    installed = install(arguments.device or ("gpu" if shutil.which("nvidia-smi") else "cpu"))
    if arguments.json:
        print(json.dumps(asdict(installed)), file=output)
    else:
        print(f"vLLM {installed.version} for the {installed.device.upper()}", file=output)
        print("serve with it: tuneloop serve CONFIG.yaml serving.engine=vllm", file=output)


def _completion(arguments: argparse.Namespace, output: IO[str]) -> None:
    from argcomplete.shell_integration import shellcode

    script = shellcode(["tuneloop"], shell=arguments.shell)
    if arguments.json:
        print(json.dumps({"script": script}), file=output)
    else:
        print(script, file=output)


def _load(arguments: argparse.Namespace) -> TuneloopConfig:
    config = load_config(arguments.config, arguments.overrides)
    if in_job_directory():
        refuse_fleeting_workspace(config)
        return as_submitted(config)
    return config


def open_workspace(arguments: argparse.Namespace) -> Workspace:
    """Return the workspace of `--workspace`, else of the configuration, if one is named."""
    given = getattr(arguments, "workspace", None)  # completion asks for commands without it
    if given is None and arguments.config:
        given = _load(arguments).workspace
    return Workspace(given or "workspace")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


# A command that returns nothing has exit code 0.
COMMANDS: dict[str, Callable[[argparse.Namespace, IO[str]], int | None]] = {
    **dict.fromkeys(("init", "import"), _init),
    "check": _check,
    "doctor": _doctor,
    **dict.fromkeys(("prepare", "generate", "train", "evaluate", "run"), _step),
    "gate": _gate,
    "sweep": _sweep,
    "dashboard": _dashboard,
    "next": _next,
    "label-next": _label_next,
    "fixes": _fixes,
    "trace": _trace,
    "serve": _serve,
    "submit": _submit,
    "ls": _ls,
    "show": _show,
    "export": _export,
    "install-engine": _install_engine,
    "completion": _completion,
}
