"""The metrics that `evaluation.metrics` may name beside those of a kind of task, and users' own."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import json
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import regex

from tuneloop.config import EvaluationConfig, MetricConfig, OneTaskConfig, TaskConfig
from tuneloop.errors import ConfigError, Problem
from tuneloop.evals.scoring.error_tags import ERROR_TAGS, Evidence
from tuneloop.evals.scoring.metrics import (
    FUNCTION_CALL,
    MACRO_F1,
    OF_ALL_ROWS,
    PERPLEXITY,
    PERPLEXITY_METRICS,
    TASK_METRICS,
    Metric,
    deciding_of,
    parse_json,
    plain_numbers,
    words_and_signs,
)
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.own_code import own_files
from tuneloop.words import is_unspaced, split_words

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

# Scores one answer of a user: reference and completion to a number from 0 to 1, None where it does
# not apply.
OwnScorer = Callable[[str, str], float | None]
_NUMBER = re.compile(
    r"(?<![\w.])-?(?:\d+(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
)
_LONGEST_MATCH_S = 2.0
# Scores are columns beside these, and these scores come from elsewhere.
_TAKEN = frozenset({*Prediction.__dataclass_fields__, OF_ALL_ROWS, *PERPLEXITY_METRICS})


def chosen_metrics(task: OneTaskConfig, evaluation: EvaluationConfig) -> dict[str, Metric] | None:
    """Return the metrics that `evaluation.metrics` names, in its order; None where it names none.

    Args:
        task: One task; of a mixture the metrics are checked, see `metrics_by_task`.
        evaluation: `metrics` and `primary`.

    Raises:
        ConfigError: A metric that does not exist or cannot score this task, an option that is
            missing, a scorer that cannot be loaded, or a primary metric that is not among them.
    """
    if isinstance(task, TaskConfig) and task.tasks:
        metrics_by_task(task, evaluation)
        return None
    problems: list[Problem] = []
    together = {OF_ALL_ROWS: MACRO_F1} if task.type == "classification" else {}
    if not evaluation.metrics:
        _refuse_primary(evaluation.primary, TASK_METRICS[task.type].metrics | together, problems)
        ConfigError.refuse(problems)
        return None
    options = [(f"evaluation.metrics.{n}", one) for n, one in enumerate(evaluation.metrics)]
    chosen = _choose(task, options, problems)
    if not problems:
        if not chosen.keys() - PERPLEXITY_METRICS:
            problems.append(
                Problem(
                    "no metric scores single answers",
                    where="evaluation.metrics",
                    got=", ".join(option.name for option in evaluation.metrics),
                    remedy=f"add `{TASK_METRICS[task.type].primary}`",
                )
            )
        _refuse_primary(evaluation.primary, chosen | together, problems)
    ConfigError.refuse(problems)
    return chosen


def metrics_by_task(task: TaskConfig, evaluation: EvaluationConfig) -> dict[str, dict[str, Metric]]:
    """Return the metrics that `evaluation.metrics` names as `TASK/METRIC`, by task of a mixture.

    Of a task that is not named the metrics stay its own.

    Raises:
        ConfigError: A task or a metric that does not exist, or a primary metric: each task's own
            decides about its rows.
    """
    problems: list[Problem] = []
    if evaluation.primary:
        problems.append(
            Problem(
                "in a mixture each answer goes by the metric of its task",
                where="evaluation.primary",
                got=evaluation.primary,
                remedy="leave the setting out; the first metric named for a task is its own",
            )
        )
    named: dict[str, list[tuple[str, MetricConfig]]] = {}
    for index, option in enumerate(evaluation.metrics):
        where = f"evaluation.metrics.{index}"
        name, _, metric = option.name.partition("/")
        if name not in task.tasks or metric in ("", OF_ALL_ROWS, *PERPLEXITY_METRICS):
            problems.append(
                Problem(
                    "no such metric of a mixture's task",
                    where=where,
                    got=option.name,
                    allowed=f"TASK/METRIC with TASK one of {', '.join(task.tasks)}, and a metric "
                    "of single answers",
                )
            )
            continue
        # Its options were checked with the name as it is given.
        named.setdefault(name, []).append((where, option.model_copy(update={"name": metric})))
    chosen = {name: _choose(task.tasks[name], options, problems) for name, options in named.items()}
    ConfigError.refuse(problems)
    return chosen


def _choose(
    task: OneTaskConfig, options: Sequence[tuple[str, MetricConfig]], problems: list[Problem]
) -> dict[str, Metric]:
    """Return the metrics of one task by their columns; what is wrong goes to `problems`."""
    chosen: dict[str, Metric] = {}
    for where, option in options:
        try:
            name, metric = _resolve(task, option, where)
        except ConfigError as error:
            problems += error.problems
            continue
        if name in chosen:
            problems.append(Problem("a metric is named twice", where=where, got=name))
        if metric is not None:
            chosen[name] = metric
        if name == PERPLEXITY:
            chosen |= PERPLEXITY_METRICS
    return chosen


def try_scorers(task: OneTaskConfig, evaluation: EvaluationConfig, text: str) -> list[Problem]:
    """Return what is wrong with the chosen metrics and with tags of the user's own.

    Args:
        task: One task, or a mixture.
        evaluation: `metrics`, `primary` and `tags`.
        text: A reference, on which they are tried as its own answer; empty: they are not tried.
    """
    problems: list[Problem] = []
    try:
        for metric in (chosen_metrics(task, evaluation) or {}).values():
            if metric.score is not None and text:
                metric.score(text, text, task)
    except ConfigError as error:
        problems += error.problems
    try:
        for tag in own_tags(evaluation):
            if text:
                tag.find(text, text, "the first")
    except ConfigError as error:
        problems += error.problems
    return problems


def code_of_own_scorers(evaluation: EvaluationConfig) -> dict[str, str]:
    """Return a hash of the code of each of the user's own scorers and tags, by dotted path.

    What it imports of this directory is part of it.
    """
    codes = {}
    for path, where in (
        *(
            (m.name.rpartition("/")[2], f"evaluation.metrics.{n}")
            for n, m in enumerate(evaluation.metrics)
        ),
        *((tag, f"evaluation.tags.{n}") for n, tag in enumerate(evaluation.tags)),
    ):
        if "." in path:
            file = inspect.getsourcefile(_load(path, where))
            code = Path(file).read_bytes() if file else path.encode()
            others = own_files(path.rpartition(".")[0], Path.cwd())
            others = [other for other in others if not file or not other.samefile(file)]
            code = b"".join([code, *(other.read_bytes() for other in others)])
            codes[path] = hashlib.sha256(code).hexdigest()
    return codes


class OwnTag:
    """An error tag of the user's own: a function of reference and completion.

    It returns None, False or an empty text where nothing is wrong, else True or what shows it; a
    part of the completion is then marked.

    Args:
        path: Dotted path of the function; its last part names the tag.
        where: Dotted key of the setting.

    Raises:
        ConfigError: The function cannot be loaded, or a tag has that name already.
    """

    def __init__(self, path: str, where: str) -> None:
        self.path, self.where, self.name = path, where, path.rpartition(".")[2]
        self._own = _load(path, where, "tag")
        if self.name in ERROR_TAGS:
            raise ConfigError.of("there is a tag of that name already", where, self.name)
        lines = (inspect.getdoc(self._own) or "").strip().splitlines()
        self.meaning = lines[0].rstrip(".") if lines else f"`{path}`"

    def find(self, reference: str, completion: str, row: str) -> Evidence | None:
        """Return what is wrong with an answer, or None.

        Args:
            row: Id of the row, for the message.

        Raises:
            ConfigError: The function fails, or returns something else.
        """
        try:
            told: object = self._own(reference, completion)
            if told is None or told is False or told == "":
                return None
            if not isinstance(told, str) and told is not True:
                raise TypeError(f"it returned {told!r}")
        except Exception as error:
            # Whatever a user's function raises.
            what = f"{type(error).__name__}: {error}"
            raise _bad_function(
                Problem(f"the tag `{self.path}` failed", self.where, what),
                row,
                "None or False, or True or a text that shows what is wrong",
            ) from error
        detail = told if isinstance(told, str) else ""
        start = completion.find(detail) if detail else -1
        if start < 0:
            return Evidence(self.name, detail)
        return Evidence(self.name, detail, start, start + len(detail))


def own_tags(evaluation: EvaluationConfig) -> list[OwnTag]:
    """Return the user's own tags.

    Raises:
        ConfigError: One cannot be loaded.
    """
    tags: list[OwnTag] = []
    problems: list[Problem] = []
    for index, path in enumerate(evaluation.tags):
        try:
            tags.append(OwnTag(path, f"evaluation.tags.{index}"))
        except ConfigError as error:
            problems += error.problems
    ConfigError.refuse(problems)
    return tags


def primary_of(
    task: OneTaskConfig, evaluation: EvaluationConfig, metrics: Mapping[str, Metric] | None
) -> str:
    """Return the metric that decides: `evaluation.primary`, else the task's, else the first.

    Empty where the rows decide: calls are not scored by words.
    """
    if evaluation.primary or metrics is None:
        return evaluation.primary or ""
    return deciding_of(task, metrics)


def _refuse_primary(
    primary: str | None, metrics: Mapping[str, Metric], problems: list[Problem]
) -> None:
    # Not every arm has a perplexity.
    deciding = [
        name
        for name, metric in metrics.items()
        if metric.better != "neither" and name not in PERPLEXITY_METRICS
    ]
    if primary is not None and primary not in deciding:
        problems.append(
            Problem(
                "this metric cannot decide",
                where="evaluation.primary",
                got=primary,
                allowed=", ".join(deciding),
                remedy="name one of these; evaluation.metrics adds others",
            )
        )


def _resolve(task: OneTaskConfig, option: MetricConfig, where: str) -> tuple[str, Metric | None]:
    """Return a metric by the name of its column; None for one that is always there."""
    name, own_metrics = option.name, TASK_METRICS[task.type].metrics
    if name == OF_ALL_ROWS and task.type == "classification":
        return name, None
    if name in own_metrics:
        return name, own_metrics[name]
    if task.type != "language_modeling":
        if "." in name:
            own = partial(_score_own, _load(name, where), where, name)
            column = name.rpartition(".")[2]
            if column in _TAKEN:
                what = "predictions have a column of that name already"
                raise ConfigError.of(what, where, name, remedy="give the function another name")
            return column, Metric(f"`{name}`", score=own)
        if name in _MORE:
            return name, _with_options(name, option, where)
        if name == PERPLEXITY:
            return name, PERPLEXITY_METRICS[name]
    more = [] if task.type == "language_modeling" else [*_MORE, PERPLEXITY]
    allowed = [*own_metrics, *more]
    elsewhere = [
        kind for kind, definition in TASK_METRICS.items() if name in definition.metrics
    ] + ["classification"] * (name == OF_ALL_ROWS)
    raise ConfigError.of(
        f"this metric does not score {task.type}" if elsewhere else "no such metric",
        where=where,
        got=name,
        allowed=", ".join(allowed) + ", or a dotted path to a function of your own",
        remedy=f"it scores {', '.join(elsewhere)}" if elsewhere else _closest(name, allowed),
    )


def _closest(name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean `{close[0]}`?" if close else ""


def _with_options(name: str, option: MetricConfig, where: str) -> Metric:
    metric = _MORE[name]
    if name == "regex":
        try:
            pattern = regex.compile(option.pattern)
        except regex.error as error:
            raise ConfigError.of(
                "not a regular expression", f"{where}.pattern", option.pattern, str(error)
            ) from error
        if not option.pattern:
            raise ConfigError.of("the metric `regex` needs a pattern", where=f"{where}.pattern")
        return replace(metric, score=partial(_regex_match, pattern))
    if name == "number":
        return replace(metric, score=partial(_same_number, option.tolerance, option.after))
    if name == "multi_label_f1":
        return replace(metric, score=partial(_multi_label_f1, option.separator))
    return metric


def _load(path: str, where: str, kind: str = "scorer") -> OwnScorer:
    """Return the function that a dotted path names; modules of this directory come first."""
    module, _, name = path.rpartition(".")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        own = getattr(importlib.import_module(module), name)
        inspect.signature(own).bind("reference", "completion")
    except Exception as error:
        # Whatever a user's module does when it is imported.
        raise ConfigError.of(
            f"the {kind} cannot be loaded",
            where=where,
            got=f"{path}: {type(error).__name__}: {error}",
            allowed="a function of two texts, reference and completion",
            remedy=f"put the module into {here}, or install it",
        ) from error
    finally:
        sys.path.remove(here)
    return own


def _score_own(
    own: OwnScorer, where: str, path: str, reference: str, completion: str, task: OneTaskConfig
) -> float | None:
    try:
        score = own(reference, completion)
        if score is None:
            return None
        score = float(score)
    except Exception as error:
        # Whatever a user's function raises or returns.
        raise _bad_scorer(
            where, path, f"{type(error).__name__}: {error}", reference, completion
        ) from error
    if not 0 <= score <= 1:
        raise _bad_scorer(where, path, f"{score}", reference, completion)
    return score


def _bad_scorer(where: str, path: str, what: str, reference: str, completion: str) -> ConfigError:
    shown = f"{what}; reference {reference[:100]!r}, completion {completion[:100]!r}"
    return _bad_function(
        Problem(f"the scorer `{path}` failed", where, shown),
        "",
        "a number from 0 to 1, or None where it does not apply",
    )


def _bad_function(problem: Problem, row: str, allowed: str) -> ConfigError:
    return ConfigError(
        replace(
            problem,
            where=f"{problem.where}, row {row}" if row else problem.where,
            allowed=allowed,
            remedy="mend the function; answers that came are kept",
        )
    )


def _exact(reference: str, completion: str, task: OneTaskConfig) -> float:
    return float(reference.strip() == completion.strip())


def _chrf(reference: str, completion: str, task: OneTaskConfig) -> float:
    if reference == completion and completion.strip():
        return 1.0
    return float(_chrf_scorer().sentence_score(completion, [reference]).score) / 100


def _bleu(reference: str, completion: str, task: OneTaskConfig) -> float:
    if reference == completion and completion.strip():
        return 1.0
    # The tokenizer for all scripts: `13a` sees no words in those without spaces.
    scorer = _bleu_scorer("intl" if _is_spaced(reference) else "char")
    # Of texts that are nearly the same it may be above 100 by a rounding error.
    return min(1.0, float(scorer.sentence_score(completion, [reference]).score) / 100)


@cache
def _chrf_scorer() -> CHRF:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@cache
def _bleu_scorer(tokenize: str) -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True, tokenize=tokenize)


def _is_spaced(text: str) -> bool:
    words = split_words(text)
    return 2 * sum(map(is_unspaced, words)) <= len(words)


def _numbers(text: str, after: str) -> list[Decimal]:
    part = text.rpartition(after)[2] if after else text
    plain = plain_numbers(part.replace("−", "-"))
    return [_exactly(number.replace(",", "")) for number in _NUMBER.findall(plain)]


def _exactly(number: str) -> Decimal:
    """Return a number with all its digits, of which a float keeps seventeen."""
    try:
        return Decimal(number)
    except InvalidOperation:  # an exponent beyond all bounds
        return Decimal(float(number))


def _same_number(
    tolerance: float, after: str, reference: str, completion: str, task: OneTaskConfig
) -> float | None:
    """Return whether the last number is right; with a mark, what stands first after its last."""
    if after and after not in completion:
        return 0.0
    expected, answer = _numbers(reference, after), _numbers(completion, after)
    if not expected:
        if not after:
            return None
        ours, theirs = (text.rpartition(after)[2] for text in (reference, completion))
        return float(words_and_signs(ours) == words_and_signs(theirs))
    if not answer:
        return 0.0
    place = 0 if after else -1
    if not tolerance:
        return float(answer[place] == expected[place])
    wanted, given = float(expected[place]), float(answer[place])
    return float(math.isclose(given, wanted, rel_tol=0, abs_tol=tolerance * abs(wanted)))


def _multi_label_f1(separator: str, reference: str, completion: str, task: OneTaskConfig) -> float:
    expected, answer = _labels(reference, separator), _labels(completion, separator)
    if not expected and not answer:
        return 1.0
    return 2 * len(expected & answer) / (len(expected) + len(answer))


def _labels(text: str, separator: str) -> set[str]:
    value = parse_json(text)
    parts = [str(v) for v in value] if isinstance(value, list) else text.split(separator)
    return {label for part in parts if (label := _plain(part).casefold())}


def _json_f1(reference: str, completion: str, task: OneTaskConfig) -> float | None:
    """Return the F1 of the values at the same place; the order in a list does not count."""
    expected = parse_json(reference)
    if not isinstance(expected, (dict, list)):
        return None
    answer = parse_json(completion)
    if not isinstance(answer, (dict, list)):
        return 0.0
    ours, theirs = Counter(_leaves(expected, "")), Counter(_leaves(answer, ""))
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else float(type(expected) is type(answer))


def _leaves(value: object, place: str) -> Iterator[tuple[str, str]]:
    """Yield place and value of everything in a JSON value; null is as good as left out."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{place}.{json.dumps(name)}")
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, f"{place}[]")
    elif value is not None:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        yield place, json.dumps(_plain(value) if isinstance(value, str) else value)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _regex_match(
    pattern: regex.Pattern[str], reference: str, completion: str, task: OneTaskConfig
) -> float | None:
    """Return whether the pattern is found; if it has a group, whether that says the same."""
    try:
        got = pattern.search(completion, timeout=_LONGEST_MATCH_S)
        if not pattern.groups:
            return float(got is not None)
        expected = pattern.search(reference, timeout=_LONGEST_MATCH_S)
    except TimeoutError as error:
        raise ConfigError.of(
            "the regular expression takes too long",
            where="evaluation.metrics",
            got=pattern.pattern,
            allowed=f"{_LONGEST_MATCH_S:.0f} s for an answer",
            remedy="write it without nested repetitions",
        ) from error
    if expected is None:
        return None
    return float(got is not None and _said(got) == _said(expected))


def _said(match: regex.Match[str]) -> str | None:
    """Return the first group that took part: of alternatives one alone does."""
    return next((group for group in match.groups() if group is not None), None)


_MORE = {
    "exact_match_strict": Metric("the very text of the reference", kind="binary", score=_exact),
    "chrf": Metric("chrF: character n-grams in common, of each answer", score=_chrf),
    "bleu": Metric("BLEU of each answer", score=_bleu),
    "number": Metric("right number", kind="binary", score=partial(_same_number, 0.0, "")),
    "multi_label_f1": Metric("F1 of the labels", score=partial(_multi_label_f1, ",")),
    "function_call": FUNCTION_CALL,
    "json_f1": Metric("F1 of the values in JSON", score=_json_f1),
    "regex": Metric("the pattern is found", kind="binary"),
}
