"""Which inputs to label next: the ones that a model learns most from, each with its reason.

Source: Wei, Iyer and Bilmes 2015, Submodularity in data subset selection and active learning
(facility location); Settles 2009, Active Learning Literature Survey, section 3.1 (margins).
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import OneTaskConfig, SourceConfig, TuneloopConfig
from tuneloop.data.sources.files import find_files
from tuneloop.data.sources.unlabelled import UnlabelledRow, answer_column, read_unlabelled
from tuneloop.errors import ConfigError, DataError, Problem
from tuneloop.evals.reporting.formatting import format_value
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.questions import Question, read_questions, read_solved
from tuneloop.evals.scoring.simple import MOST_ROWS, classifier, most_alike, vectorizer_of_words
from tuneloop.evals.scoring.slices import LABEL, LENGTH, is_in, weak_parts
from tuneloop.marks import SCORED_SUFFIX
from tuneloop.records import Conversation
from tuneloop.review.fixes import marks_for
from tuneloop.text import counted, folded, shorten
from tuneloop.words import split_words

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# All are compared with all.
_MOST_INPUTS = 4_000
_FLAT = ("question_answer", "prompt_completion", "alpaca", "columns")
_TEXT, _CHOICE = "text", "answer"
_SYSTEM = ("system", "developer")
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Wanted:
    """What there should be more of.

    Args:
        marked: Inputs of rows that people marked with "needs more like this".
        weak: Values of columns, ranges of numbers, or labels, on which the newest evaluation is
            shown to be worse, with the score there in words: by column and value.
        metric: What the scores are of.
    """

    marked: Sequence[str] = ()
    weak: Mapping[tuple[str, str], str] = field(default_factory=dict)
    metric: str = ""


@dataclass(frozen=True)
class Choice:
    """An input to label.

    Args:
        row: The input.
        score: How much doubt it takes away, in inputs; highest first.
        guess: The label that a classifier of the train rows gives it; empty for other tasks.
        reasons: Why it was chosen, in words.
    """

    row: UnlabelledRow
    score: float
    guess: str
    reasons: tuple[str, ...]


class _Doubt(NamedTuple):
    """How little the train rows say about each of N inputs, 0 to 1, its guess, and in words."""

    values: Numbers
    guesses: list[str]
    reasons: list[str]


def choose_next(
    config: TuneloopConfig, workspace: Workspace, path: str, count: int
) -> list[Choice]:
    """Return the inputs of a file to label next, the most useful first.

    Args:
        config: Whose newest dataset, evaluation and marks say what is known and what is weak.
        workspace: Where these are.
        path: A file of inputs, laid out like one of `data.sources` with or without answers, or with
            a column `text`.
        count: How many to choose.

    Raises:
        ConfigError: It is a mixture or plain text.
        DataError: The file holds no input that can be read, or the dataset has all of them.
        ArtifactError: There is no dataset yet.
    """
    if config.task.tasks or config.task.type == "language_modeling":
        raise ConfigError.of(
            "inputs are chosen for a single task with answers",
            where="task.type",
            got=config.task.type,
            allowed="classification, extraction or generation",
        )
    found = read_inputs(config, path)
    dataset = workspace.open(f"datasets/{config.name}")
    train = read_solved(dataset)
    known = {folded(conversation.messages[-2].text) for conversation in train}
    known |= {folded(row.messages[-1].text) for row in _held_out(config, workspace, dataset)}
    rows = list({folded(row.prompt): row for row in reversed(found)}.values())[::-1]
    rows = [row for row in rows if folded(row.prompt) not in known]
    if not rows:
        raise DataError.of(
            "all inputs are rows of the dataset already, or rows that are scored",
            where=path,
            got=counted(len(found), "row"),
        )
    return choose(rows, train, config.task, find_wanted(config, workspace, dataset), count)


def read_inputs(config: TuneloopConfig, path: str) -> list[UnlabelledRow]:
    """Return the inputs of a file, by the first layout of `data.sources` that reads it.

    Raises:
        DataError: None does.
    """
    layouts: list[SourceConfig] = [
        source.model_copy(update={"path": path, "split": None, "subset": None})
        for source in config.data.sources
    ]
    layouts.append(SourceConfig(path=path, format="text"))
    problems: list[Problem] = []
    for layout in layouts:
        try:
            files = find_files([layout])
        except DataError as error:
            told = [replace(problem, where="FILE") for problem in error.problems]
            raise DataError(*told) from error
        found = read_unlabelled(files, [layout], config.task)
        if found.rows and len(found.refused) <= config.data.max_bad_rows_ratio * len(found.rows):
            return found.rows
        for bad in found.refused[:1]:
            many = f" ({counted(len(found.refused), 'row')})"
            problems.append(bad.rejection.problem(bad.place, many))
    raise DataError(*(problems[:1] or [Problem("the file holds no input", where=path)]))


def _held_out(config: TuneloopConfig, workspace: Workspace, dataset: Artifact) -> list[Question]:
    """Return the rows that are tested on: labelled already, and never trained on."""
    scored = workspace.published("datasets", config.name + SCORED_SUFFIX)
    found: list[Question] = []
    for one in (dataset, *(workspace.open(newest.ref) for newest in scored[-1:])):
        for split in ("test", "validation"):
            with contextlib.suppress(DataError):  # there is no such split
                found += [row for row in read_questions(one, split=split) if row.messages]
    return found


def find_wanted(config: TuneloopConfig, workspace: Workspace, dataset: Artifact) -> Wanted:
    """Return what people's marks and the newest evaluation say there should be more of."""
    marks = [*marks_for(config, workspace), *marks_for(config, workspace, scored=True)]
    marked = {mark.content_id for mark in marks if mark.kind == "more_like_this"}
    inputs = []
    if marked:
        rows = {row.row_id: row.messages[-2].text for row in read_solved(dataset)}
        held_out = _held_out(config, workspace, dataset)
        rows |= {row.example_id: row.messages[-1].text for row in held_out}
        inputs = [text for row_id, text in rows.items() if row_id.partition("-")[0] in marked]
    versions = workspace.published("evaluations", config.name)
    newest = workspace.with_files(versions[-1:])
    file = newest[0].path / "slices.json" if newest else None
    if file is None or not file.is_file():
        return Wanted(inputs)
    slices = json.loads(file.read_text(encoding="utf-8"))
    metrics = json.loads((file.parent / "metrics.json").read_text(encoding="utf-8"))
    metric = Metric(**metrics["metrics"][slices["primary"]])
    parts = weak_parts(slices, [*slices["arms"]][-1], metric.better) if slices["arms"] else []
    weak = {
        (part["by"], part["slice"]): format_value(part["value"], metric)
        for part in parts
        # More rows of a group that is held out are held out as well.
        if part["by"] != config.data.split.group_by
    }
    return Wanted(inputs, weak, slices["primary"])


def choose(
    rows: Sequence[UnlabelledRow],
    train: Sequence[Conversation],
    task: OneTaskConfig,
    wanted: Wanted,
    count: int,
) -> list[Choice]:
    """Return the most useful inputs, best first.

    One at a time, the input that most doubt about all inputs is near to and no train row or earlier
    choice is nearer: the sum over all inputs of how much nearer it comes (cosine of TF-IDF), times
    the doubt about each, times up to two where there should be more like it.

    Args:
        rows: At least one input, all different.
        train: Train rows.
        task: Theirs.
        wanted: What there should be more of.
        count: How many to choose.
    """
    prompts = [row.prompt for row in rows]
    asked = [conversation.messages[-2].text for conversation in train][:MOST_ROWS]
    labels = [conversation.messages[-1].text for conversation in train][:MOST_ROWS]
    vectors = vectorizer_of_words().fit_transform([*asked, *prompts, *wanted.marked])
    known, inputs = vectors[: len(asked)], vectors[len(asked) : len(asked) + len(rows)]
    nearest = most_alike(inputs, known)
    is_labels = task.type == "classification" and len(set(labels)) > 1
    doubt = _doubt_by_labels(known, labels, inputs) if is_labels else _doubt_by_distance(nearest)
    near_marked = most_alike(inputs, vectors[len(asked) + len(rows) :])
    weak = [_weak(row, guess, wanted) for row, guess in zip(rows, doubt.guesses, strict=True)]
    weight = doubt.values * (1 + np.maximum(near_marked, [bool(words) for words in weak]))
    chosen = []
    for index, gain in _covering(inputs, weight, nearest, count):
        reasons = [doubt.reasons[index]] if is_labels else []
        reasons.append(f"the train row most like it is {nearest[index]:.0%} alike")
        if weak[index]:
            reasons.append(weak[index])
        if near_marked[index] > nearest[index]:
            reasons.append("people want more rows like it")
        chosen.append(Choice(rows[index], gain, doubt.guesses[index], tuple(reasons)))
    return chosen


def _covering(
    inputs: csr_matrix, weight: Numbers, nearest: Numbers, count: int
) -> Iterator[tuple[int, float]]:
    """Yield the inputs that come nearest to what is far from all, and by how much.

    Of many inputs those with the largest weight are looked at.
    """
    places = np.argsort(-weight, kind="stable")[:_MOST_INPUTS]
    part = inputs[places]
    alike = (part @ part.T).toarray().astype(np.float32)
    weights, covered = weight[places].astype(np.float32), nearest[places].astype(np.float32)
    left = np.ones(len(places), dtype=bool)
    for _ in range(min(count, len(places))):
        gains = np.where(left, weights @ np.maximum(alike - covered[:, None], 0), -1)
        best = int(np.argmax(gains))
        left[best] = False
        covered = np.maximum(covered, alike[best])
        yield int(places[best]), float(gains[best])


def _doubt_by_labels(known: csr_matrix, labels: Sequence[str], inputs: csr_matrix) -> _Doubt:
    """Return how close the two most probable labels are."""
    fitted = classifier().fit(known, labels)
    shares = np.asarray(fitted.predict_proba(inputs), dtype=np.float64)
    if shares.shape[1] != len(fitted.classes_):  # of two labels one probability
        shares = np.column_stack([1 - shares[:, 0], shares[:, 0]])
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)
    order = np.argsort(-shares, axis=1, kind="stable")[:, :2]
    best, second = np.take_along_axis(shares, order, axis=1).T
    names = [[str(fitted.classes_[index]) for index in pair] for pair in order]
    reasons = [
        f"`{first}` ({p:.0%}) or `{other}` ({q:.0%})"
        for (first, other), p, q in zip(names, best, second, strict=True)
    ]
    return _Doubt(1 - (best - second), [first for first, _ in names], reasons)


def _doubt_by_distance(nearest: Numbers) -> _Doubt:
    """Return how unlike the train rows each input is."""
    return _Doubt(1 - nearest, [""] * len(nearest), [""] * len(nearest))


def _weak(row: UnlabelledRow, guess: str, wanted: Wanted) -> str:
    """Return on which weak part of the newest evaluation an input is; empty if on none."""
    for (by, value), score in wanted.weak.items():
        is_guessed = by == LABEL and guess == value
        if is_guessed or (by != LABEL and any(is_in(own, value) for own in _told(row, by))):
            unit = " words" * (by == LENGTH)
            what = f"probably `{value}`" if is_guessed else f"{by} `{shorten(value, 40)}`{unit}"
            return f"{what}, where {wanted.metric} is {score}"
    return ""


def _told(row: UnlabelledRow, by: str) -> list[Any]:
    """Return what an input has in a column; of a text also the number that it says."""
    if by == LENGTH:
        return [len(split_words(row.prompt))]
    told = row.record.get(by)
    if isinstance(told, str):
        with contextlib.suppress(ValueError):
            return [told, float(told)]
    return [told]


class Written(NamedTuple):
    """What was written, and how it is read again.

    Args:
        source: For `data.sources`, once the answers are filled in.
    """

    path: str
    source: dict[str, Any]


def write_choices(choices: Sequence[Choice], config: TuneloopConfig, path: Path) -> Written:
    """Write the inputs to be labelled: CSV, or tasks of Label Studio if the name ends in `.json`.

    Raises:
        ConfigError: It cannot be written there, or is there already.
        DataError: An input is more than a text, which is all that would be labelled.
    """
    first = choices[0].row.record
    layout = next((s for s in config.data.sources if s.format in _FLAT and _reads(s, first)), None)
    # Of other layouts, and in tasks, the last question stands alone.
    is_text = path.suffix == ".json" or layout is None or layout.format == "alpaca"
    lost = [choice.row for choice in choices if is_text and _says_more(choice.row, config.task)]
    if lost:
        raise DataError.of(
            "inputs have earlier turns, a system message or tools, and would be labelled without",
            where=lost[0].source,
            got=f"{len(lost):,} of {len(choices):,} inputs",
            allowed="inputs of one text; of flat rows, such as CSV with a column for the system "
            "message, a table (--out FILE.csv) keeps all columns",
            remedy="leave these inputs out, and label them where they can be read whole",
        )
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            if path.suffix == ".json":
                tasks = [_task(choice, config) for choice in choices]
                json.dump(tasks, file, ensure_ascii=False, indent=1)
                return Written(str(path), {"path": str(path), "format": "label_studio"})
            told = _write_csv(choices, config, layout, file)
            return Written(str(path), {"path": str(path)} | told)
    except OSError as error:
        raise ConfigError.of(
            "the chosen inputs cannot be written",
            where="--out",
            got=f"{path}: {error.strerror or error}",
            remedy="name a file that is not there yet, in a folder that is",
        ) from error


def _says_more(row: UnlabelledRow, task: OneTaskConfig) -> bool:
    """Return whether an input is more than its last turn and the task's instruction."""
    spoken = [m for m in row.messages if m.role not in _SYSTEM]
    told = {m.text.strip() for m in row.messages if m.role in _SYSTEM}
    return len(spoken) > 1 or bool(told - {task.instruction.strip()}) or bool(row.tools)


def _write_csv(
    choices: Sequence[Choice],
    config: TuneloopConfig,
    layout: SourceConfig | None,
    file: IO[str],
) -> dict[str, Any]:
    """Write a table with an empty column for the answers; return its layout."""
    if layout is None or layout.format == "alpaca":
        columns = {"prompt": "prompt", "completion": "answer"}
        records = [{"prompt": choice.row.prompt} for choice in choices]
        result: dict[str, Any] = {"format": "columns", "columns": columns}
        answer = "answer"
    else:
        answer = answer_column(layout)
        records = [
            {k: v for k, v in choice.row.record.items() if k != answer} for choice in choices
        ]
        result = {"format": layout.format} | ({"columns": layout.columns} if layout.columns else {})
    guessed = ["guess"] if config.task.type == "classification" else []
    # The file may be what was left of such a table.
    ours = {*guessed, "why"}
    names = list(dict.fromkeys(name for record in records for name in record if name not in ours))
    writer = csv.writer(file)
    writer.writerow([*names, answer, *guessed, "why"])
    for choice, record in zip(choices, records, strict=True):
        cells = [_cell(record.get(name)) for name in names]
        guess = [choice.guess] if guessed else []
        writer.writerow([*cells, "", *guess, "; ".join(choice.reasons)])
    return result


def _reads(source: SourceConfig, record: Mapping[str, Any]) -> bool:
    """Return whether a row has the column that a layout takes the prompt from."""
    prompts = {"question_answer": "question", "prompt_completion": "prompt"}
    name = source.columns.get("prompt") or prompts.get(source.format, "instruction")
    return name in record


def _cell(value: object) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def _task(choice: Choice, config: TuneloopConfig) -> dict[str, Any]:
    """Return an input as a task of Label Studio, its guess as a pre-annotation."""
    data = {_TEXT: choice.row.prompt, "why": "; ".join(choice.reasons)}
    task: dict[str, Any] = {"data": data}
    if choice.guess:
        result = {
            "from_name": _CHOICE,
            "to_name": _TEXT,
            "type": "choices",
            "value": {"choices": [choice.guess]},
        }
        task["predictions"] = [{"model_version": config.name, "result": [result]}]
    return task
