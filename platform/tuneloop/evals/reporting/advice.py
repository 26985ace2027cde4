"""What to do next: actions with what each may bring, what it costs and what it rests on.

What an action may bring is measured on the answers that are there. Most of it is a bound: if an
action got all answers right that it is about and changed no other, the score would rise by so much;
by a score of overlap, if it made them like the others. Another arm's lead is measured, and a sweep
forecasts. Where nothing says how much, none is told.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray

from tuneloop.config import GenerationConfig
from tuneloop.evals.reporting.actions import NOTHING_KNOWN, STOP, Action, Brings, Gain, comes_first
from tuneloop.evals.reporting.formatting import format_value, join_words
from tuneloop.evals.reporting.headline import Direction, describe_arm, direction
from tuneloop.evals.scoring.clusters import Clusters
from tuneloop.evals.scoring.estimates import describe_mean
from tuneloop.evals.scoring.intervals import Floats, Resampling
from tuneloop.evals.scoring.metrics import FIELD_PREFIX, PRECISION_PREFIX, Metric, in_task
from tuneloop.evals.scoring.nearest import SAME_QUESTION
from tuneloop.evals.scoring.predictions import has_tag
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.evals.scoring.slices import LENGTH, REFERENCE_LENGTH, weak_parts
from tuneloop.records import BASE, BASE_CONSTRAINED, FEW_SHOT, FINETUNED, SIMPLE
from tuneloop.text import shorten

Bools = NDArray[np.bool_]
_MOST_PARTS, _FEWEST_ROWS, _SHOWN_CHARACTERS = 3, 3, 60
# The smallest of a learning curve's volumes has to be a training still.
_FEWEST_TO_SWEEP = 64
_NUM_VOLUMES = 3
_MANY_ROWS = 20_000
_SATURATED = 0.97
# From an interval as wide as this little follows; more test rows would make it as narrow as that.
_WIDE_INTERVAL, _NARROW_INTERVAL = 0.15, 0.10
_UNTRAINED = (BASE, FEW_SHOT, BASE_CONSTRAINED, SIMPLE)


class _Try(NamedTuple):
    """Another training, in words and as a command."""

    words: str
    command: str


class Situation(NamedTuple):
    """What advice is given for.

    Args:
        evaluation: The newest one, with its predictions.
        reference: Its reference.
        config_file: Of the configuration, for the commands.
        took_s: Seconds that dataset, model and evaluation took; None where that is not known.
        num_epochs: Of the training.
        curve: `curve.json` of the newest sweep over volumes with these settings; empty without.
        num_waiting: Marks that the next preparation applies.
        num_wanted: Rows that people marked with "needs more like this".
        num_to_score: Marks that the next evaluation applies.
        teacher: Who can write rows; None where none is configured.
        num_train_rows: Of the dataset that the model was trained on; 0 where that is not known.
        num_spare_rows: Train rows of it that `data.num_train_examples` left out.
        kept: Settings that the configuration file has otherwise, as overrides: a command without
            them would change them back.
        trained_s: Of `took_s`, those of the training.
        evaluated_s: Of `took_s`, those of the evaluation.
        max_tokens: Of the evaluation.
        has_arms: Whether arms, or rows of `evaluation.sources`, were scored, as `run` does not.
        group_by: Column by which the rows were split; empty without one.
    """

    evaluation: Evaluation
    reference: str
    config_file: str
    took_s: float | None
    num_epochs: int
    curve: dict[str, Any]
    num_waiting: int = 0
    num_wanted: int = 0
    num_to_score: int = 0
    teacher: GenerationConfig | None = None
    num_train_rows: int = 0
    num_spare_rows: int = 0
    kept: Sequence[str] = ()
    trained_s: float = 0.0
    evaluated_s: float | None = None
    max_tokens: int = 0
    has_arms: bool = False
    group_by: str = ""

    @property
    def metric(self) -> Metric:
        """The primary one."""
        return self.evaluation.metric(self.evaluation.primary)

    @property
    def score(self) -> dict[str, Any]:
        """The candidate's estimate in it."""
        found: dict[str, Any] = self.evaluation.candidate["scores"][self.evaluation.primary]
        return found

    @property
    def width(self) -> float:
        """Of its interval; 0 where it has none."""
        return float((self.score["high"] or 0.0) - (self.score["low"] or 0.0))

    @property
    def sign(self) -> int:
        """1 where a higher score is better, else -1."""
        return -1 if self.metric.better == "lower" else 1

    @property
    def is_trained(self) -> bool:
        """Whether the candidate is a model that the configuration trains."""
        return self.evaluation.candidate["name"] == FINETUNED or self.trained_s > 0

    def cost_of(self, command: str) -> float | None:
        """Return the seconds that a command takes, as the last iteration took; None for reading."""
        name = shlex.split(command)[1]
        if name in ("dashboard", "serve") or self.took_s is None:
            return None
        if name == "evaluate":
            return self.evaluated_s
        if name == "sweep":
            return _NUM_VOLUMES * self.took_s
        times = 1.0
        if found := re.search(r"training\.num_epochs=(\d+)", command):
            times *= int(found[1]) / self.num_epochs
        if self.num_train_rows and (found := re.search(r"num_train_examples=(\d+)", command)):
            there = self.num_train_rows + self.num_spare_rows
            times *= min(int(found[1]), there) / self.num_train_rows
        return self.took_s + (times - 1) * self.trained_s

    def command(self, name: str, *changes: str) -> str:
        """Return a command on this configuration; what is not changed stays as it was.

        The same arms answer again: what the configuration names takes two commands.
        """
        changed = {change.partition("=")[0] for change in changes}
        kept = [setting for setting in self.kept if setting.partition("=")[0] not in changed]
        names = ["train", "evaluate"] if name == "run" and self.has_arms else [name]
        settings = [self.config_file, *changes, *kept]
        return " && ".join(shlex.join(["tuneloop", name, *settings]) for name in names)

    def look(self, *words: str) -> str:
        """Return a command that needs of the configuration no more than where its workspace is."""
        kept = [setting for setting in self.kept if setting.startswith("workspace=")]
        return shlex.join(["tuneloop", *words, self.config_file, *kept])

    def page(self, name: str) -> str:
        """Return the address of a page of the dashboard, as in `answers&wrong=year`."""
        page, _, query = name.partition("&")
        return f"/{page}?evaluations={self.reference}{'&' * bool(query)}{query}"

    @property
    def longer(self) -> _Try:
        """To train for one more epoch, or at all."""
        if not self.is_trained:
            return _Try("train", self.command("run"))
        more = f"training.num_epochs={self.num_epochs + 1}"
        words = f"train for {self.num_epochs + 1} epochs in place of {self.num_epochs}"
        return _Try(words, self.command("run", more))

    @property
    def more(self) -> _Try | None:
        """To train on twice the rows, or on all that are there; None where no more are."""
        if not self.num_spare_rows:
            return None
        num = self.num_train_rows + min(self.num_train_rows, self.num_spare_rows)
        words = f"train on {num:,} rows in place of {self.num_train_rows:,}"
        return _Try(words, self.command("run", f"data.num_train_examples={num}"))


def advise(now: Situation) -> list[Action]:
    """Return what to do next: what surely brings something, then bounds, then what is not known."""
    adviser = _Adviser.of(now)
    score = now.score["value"] or 0.0
    rules = [*_RULES]
    if now.metric.kind == "binary" and score >= _SATURATED:
        rules.remove(_Adviser.epochs)
        if now.width <= _WIDE_INTERVAL:
            why = f"{score:.1%} is right: this test can no longer tell models apart."
            adviser.add(STOP, why, now.command("serve"))
    for rule in rules:
        rule(adviser)

    def rank(action: Action) -> tuple[bool, float]:
        value = -1.0 if action.gain is None else now.sign * action.gain.value
        return comes_first(action, now.metric), value

    return sorted(adviser.found, key=rank, reverse=True)


@dataclass(frozen=True)
class _Adviser:
    """The rules: each method adds actions where its measurement speaks for them.

    Which answers a rule is about is told by an array over the candidate's answers that have a
    score, shape (n,). Only the columns that a rule needs are read.

    Args:
        is_own: Whether each prediction of the evaluation is one of these answers.
        scores: Theirs, shape (n,).
        loss: What each lacks of being right, shape (n,); 1 for all where a score does not tell.
    """

    now: Situation
    is_own: pa.ChunkedArray
    scores: Floats
    loss: Floats
    found: list[Action] = field(default_factory=list)

    @classmethod
    def of(cls, now: Situation) -> _Adviser:
        evaluation, name = now.evaluation, now.evaluation.row_metric
        of_all = evaluation.column(name)
        is_candidate = pc.equal(evaluation.column("arm"), evaluation.candidate["name"])
        is_own = pc.and_(is_candidate, pc.is_valid(of_all))
        scores = of_all.filter(is_own).to_numpy()
        is_number = evaluation.metric(name).kind == "number"
        return cls(now, is_own, scores, np.ones(len(scores)) if is_number else 1.0 - scores)

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of the answers."""
        return self.now.evaluation.column(name).filter(self.is_own)

    @cached_property
    def wrong(self) -> Bools:
        """Answers that lack something."""
        return self.loss > 0

    @cached_property
    def clusters(self) -> Clusters:
        """Of the answers."""
        names, ids = pc.fill_null(self.column("cluster"), ""), self.column("example_id")
        return Clusters.of(pc.if_else(pc.equal(names, ""), ids, names).to_pylist())

    def among(self, ids: pa.ChunkedArray | pa.Array) -> Bools:
        """Return the answers to some examples."""
        return _as_bools(pc.is_in(self.column("example_id"), value_set=ids))

    def tagged(self, tag: str) -> Bools:
        """Return the answers with an error."""
        return has_tag(self.column("error_tags"), tag)

    def add(
        self, title: str, why: str, command: str, page: str = "", brings: Brings = NOTHING_KNOWN
    ) -> None:
        """Add an action; its cost is that of its command."""
        self.found.append(Action(title, why, *brings, self.now.cost_of(command), command, page))

    def about(
        self, title: str, why: str, meant: Bools, command: str, page: str = "answers"
    ) -> None:
        """Add an action about at least a few wrong answers, with the bound of what it brings."""
        chosen = self.wrong & meant
        if (num := int(chosen.sum())) >= _FEWEST_ROWS:
            is_share = self.now.evaluation.metric(self.now.evaluation.row_metric).kind != "number"
            why = f"{num:,} of {self.wrong.sum():,} {'wrong ' * is_share}answers {why}"
            self.add(title, why, command, self.now.page(page), self._bound(chosen))

    def untold(self, tried: _Try, why: str, page: str = "") -> None:
        """Add a training of which nothing is known, unless there is a reason for it already."""
        if all(action.command != tried.command for action in self.found):
            self.add(tried.words.capitalize(), why + self._not_better(), tried.command, page)

    def _bound(self, chosen: Bools) -> Brings:
        """Return what the score would gain if some answers were all right.

        Hardly any answer is all right by a score of overlap: there, if they were like the others.
        """
        evaluation, metric, num_rows = self.now.evaluation, self.now.metric, int(chosen.sum())
        # Of others the score of all is not the mean of how right each row is.
        if metric.kind == "number" or evaluation.primary != evaluation.row_metric:
            return Brings(num_rows=num_rows)
        others = self.loss[~chosen]
        rest = float(others.mean()) if metric.kind == "ratio" and len(others) else 0.0
        lacking = np.where(chosen, np.maximum(0.0, self.loss - rest), 0.0)
        if not lacking.any():  # the others are no better
            return Brings(num_rows=num_rows)
        # Of so many rows resampling takes long, and says the same to a twentieth of the width.
        resampling = Resampling(num_resamples=2_000 if len(lacking) < _MANY_ROWS else 0)
        told = describe_mean(lacking, self.clusters, metric, resampling)
        gain = Gain(told["value"], max(0.0, told["low"] or 0.0), told["high"] or 0.0)
        return Brings(gain, "at most", num_rows)

    def errors(self) -> None:
        """Errors with a name, doubtful references and misleading train rows."""
        now, see, cut = self.now, self.now.look("dashboard"), self.tagged("cut_off")
        # A limit is too low only where the right answer is longer than what was written.
        right, said = (pc.utf8_length(self.column(name)) for name in ("reference", "completion"))
        short = cut & _as_bools(pc.greater(right, said))
        longer, cut_off = now.longer, "answers&error=cut_off"
        self.about(
            "Allow longer answers", "were cut off, and are shorter than their references.", short,
            now.command("evaluate", f"evaluation.max_tokens={2 * now.max_tokens}"), cut_off,
        )  # fmt: skip
        self.about(
            f"Teach answers to end: {longer.words}",
            "were still going on where they had become as long as their references.",
            cut & ~short, longer.command, cut_off,
        )  # fmt: skip
        malformed = self.tagged("wrong_format")
        self.about(
            f"Teach the form of the answer: {longer.words}",
            "do not have the form that the task asks for.", malformed, longer.command,
            "answers&error=wrong_format",
        )  # fmt: skip
        self.about(
            "Look whether these references are right",
            "are what several models answer alike, and not the reference.",
            self._agreed_otherwise(), see,
        )  # fmt: skip
        # Any other label is a conflict, also of a question that is only a little alike.
        asks_the_same = ds.field("similarity") >= SAME_QUESTION
        misled = now.evaluation.nearest.to_table(
            columns=["example_id"], filter=ds.field("conflicts") & asks_the_same
        )
        self.about(
            "Correct the training rows that say otherwise",
            "stand beside a training row that asks the same and says otherwise than the reference.",
            self.among(misled.column(0)), see,
        )  # fmt: skip

    def _agreed_otherwise(self) -> Bools:
        """Return the wrong answers that at least two arms give, each to one and the same example.

        An arm with its answers held to their form is the same model again, and no second opinion.
        """
        evaluation, name = self.now.evaluation, self.now.evaluation.row_metric
        agreed = np.zeros(len(self.wrong), bool)
        if evaluation.metric(name).kind == "number":
            return agreed
        asked = {arm["name"]: arm.get("free_arm") or arm["name"] for arm in evaluation.arms}
        columns = [self.column(column) for column in ("example_id", "completion")]
        ids, said = (column.filter(pa.array(self.wrong)) for column in columns)
        of_all = {k: evaluation.column(k) for k in ("example_id", "arm", "completion", "status")}
        none_right = pc.fill_null(pc.equal(evaluation.column(name), 0.0), True)
        is_meant = pc.and_(pc.equal(of_all.pop("status"), "scored"), none_right)
        is_meant = pc.and_(is_meant, pc.is_in(of_all["example_id"], value_set=ids))
        who: dict[tuple[str, str], set[str]] = {}
        answers = (column.filter(is_meant).to_pylist() for column in of_all.values())
        for example, arm, text in zip(*answers, strict=True):
            who.setdefault((example, " ".join(text.split())), set()).add(asked[arm])
        agreed[self.wrong] = [
            bool(text) and len(who.get((example, text), ())) > 1
            for example, completion in zip(ids.to_pylist(), said.to_pylist(), strict=True)
            for text in [" ".join(completion.split())]
        ]
        return agreed

    def fields(self) -> None:
        """Each field that alone makes answers wrong."""
        now, sides = self.now, (FIELD_PREFIX, PRECISION_PREFIX)
        names = [n for n in now.evaluation.metrics["metrics"] if n.startswith(FIELD_PREFIX)]
        names = [name.removeprefix(FIELD_PREFIX) for name in names]
        # A field that neither reference nor answer has is not wrong.
        scores = [[pc.fill_null(self.column(s + n), 1.0).to_numpy() for s in sides] for n in names]
        failed = [np.min(of_field, axis=0) < 1 for of_field in scores]
        is_one = self.wrong & (np.sum(failed, axis=0) == 1)
        more = now.more or _Try("add training rows in which it is hard", now.look("dashboard"))
        for name, wrong in zip(names, failed, strict=True):
            why, page = "are wrong in this field alone.", f"answers&wrong={name}"
            self.about(f"Get `{name}` right: {more.words}", why, is_one & wrong, more.command, page)

    def losses(self) -> None:
        """What the strongest other arm answers better."""
        now, evaluation = self.now, self.now.evaluation
        if other := evaluation.strongest_other():
            is_other = pc.equal(evaluation.column("arm"), other)
            ids, scores = (
                evaluation.column(name).filter(is_other)
                for name in ("example_id", evaluation.row_metric)
            )
            before = scores.take(pc.index_in(self.column("example_id"), value_set=ids)).to_numpy()
            is_lower = evaluation.metric(evaluation.row_metric).better == "lower"
            worse = self.scores > before if is_lower else self.scores < before
            self.about(
                f"Read what got worse than with {describe_arm(other)}; add training rows like it",
                "were better there.", worse,
                now.look("dashboard"), "errors",
            )  # fmt: skip

    def tasks(self) -> None:
        """Each task of a mixture that did not gain while others did."""
        now, evaluation = self.now, self.now.evaluation
        pairs = {pair["other"]: pair for pair in evaluation.candidate_pairs()}
        if not pairs or not now.is_trained:
            return
        strongest: dict[str, tuple[str, Direction]] = {}
        for name, task in evaluation.tasks.items():
            key = in_task(name, task["primary"])
            # Each task beside what does best in it without training.
            others = [arm for arm in evaluation.arms if arm["name"] in pairs]
            best = max(others, key=lambda arm: arm["scores"][key]["value"] or 0.0)["name"]
            strongest[name] = best, direction(evaluation, pairs[best], key)
        lagging = {n: told for n, told in strongest.items() if told[1] != "better"}
        for name, (best, change) in lagging.items() if len(lagging) < len(strongest) else ():
            worse = "got worse" if change == "worse" else "did not clearly gain"
            self.about(
                f"Give `{name}` a model of its own, or a larger share of the mixture",
                f"are of this task; it {worse} against {describe_arm(best)}, while others gained.",
                _as_bools(pc.equal(self.column("task"), name)),
                now.command("run", f"data.train_tasks=[{name}]"),
            )

    def missing(self) -> None:
        """Answers that are missing."""
        now, arm = self.now, self.now.evaluation.candidate
        num, ends = arm["num_unscored"], arm.get("worst_case")
        if num:
            brings, score = Brings(num_rows=num), now.score["value"]
            if ends and score is not None:
                end = ends["high"] - score
                brings = Brings(Gain(end, 0.0, end), "at most", num)
            self.add(
                f"Find out why {num:,} answers are missing, and ask again",
                f"The server said: {next(iter(arm['unscored_reasons']))}",
                now.command("evaluate"), now.page("answers&unscored=true"), brings,
            )  # fmt: skip

    def arms(self) -> None:
        """The arm that is surely better than the candidate, of several the best."""
        now, evaluation, primary = self.now, self.now.evaluation, self.now.evaluation.primary
        name = evaluation.candidate["name"]
        better = [
            pair
            for pair in evaluation.comparison["pairs"]
            if pair["arm"] == name and direction(evaluation, pair, primary) == "worse"
        ]
        if not better:
            return
        best = min(better, key=lambda pair: now.sign * pair["differences"][primary]["value"])
        other, told = best["other"], best["differences"][primary]
        own = {arm["name"] for arm in evaluation.arms if arm.get("free_arm") == name}
        title = f"Use {describe_arm(other)} until training brings more"
        why = f"It is surely better over the same {told['n']:,} examples"
        why += f"{', without any training' * (other in _UNTRAINED)}."
        if other in own:
            title = f"Ask it as `{other}` does"
            why = (
                "The same model is better when its answers are bound to the form of the task, by "
                "`ranking` for labels and `response_format` for JSON in each request."
            )
        is_served = other in own or (other in _UNTRAINED and other != SIMPLE)
        brings = Brings(Gain(-told["value"], -told["high"], -told["low"]), "measured", told["n"])
        command = now.command("serve") if is_served else now.look("dashboard")
        self.add(title, why, command, now.page(f"errors&before={quote(other)}"), brings)

    def parts(self) -> None:
        """Each part of the rows that is surely worse than the others."""
        now, evaluation, name = self.now, self.now.evaluation, self.now.evaluation.row_metric
        # Parts are scored row by row: of macro-F1 that bounds nothing. One cluster has no interval.
        metric, is_mean, sign = evaluation.metric(name), evaluation.primary == name, now.sign
        found = weak_parts(evaluation.slices, evaluation.candidate["name"], metric.better)
        # No group is on both sides: rows of a test group cannot become training rows.
        for part in [part for part in found if part["by"] != now.group_by][:_MOST_PARTS]:
            is_bound, share = is_mean and part["low"] is not None, part["n"] / len(self.loss)
            value, *ends = (
                sign * max(0.0, sign * (part["rest"] - (part[end] or 0.0))) * share
                for end in ("value", "low", "high")
            )
            unit = " words" * (part["by"] in (LENGTH, REFERENCE_LENGTH))
            is_such = shorten(str(part["slice"]), _SHOWN_CHARACTERS) + unit
            self.add(
                f"Add training rows with {part['by'].replace('_', ' ')} = {is_such}",
                f"{part['n']:,} test rows are such: {format_value(part['value'], metric)}, the "
                f"others {format_value(part['rest'], metric)}."
                + " The bound is that they become like the others." * is_bound,
                self._more_of(now.reference), now.page("answers"),
                Brings(Gain(value, *sorted(ends)), "at most", part["n"])
                if is_bound else Brings(num_rows=part["n"]),
            )  # fmt: skip

    def _more_of(self, what: str) -> str:
        """Return the command that adds rows of some kind: those that are there, or written ones.

        Without a teacher it is the one that chooses the inputs to label.
        """
        now = self.now
        if what != "marks" and now.more:
            return now.more.command
        if now.evaluation.tasks or "language_modeling" in now.evaluation.task_types():
            return now.command("run")  # both are for a single task with answers
        if now.teacher is None:
            return now.look("label-next", "INPUTS.csv")
        changes = [f"generation.more_of={what}"]
        if now.teacher.kind in ("pairs", "answers"):
            changes += ["generation.kind=self_instruct", "generation.sources=[]"]
            changes += ["generation.instruction="] * bool(now.teacher.instruction)
        return now.command("generate", *changes)

    def marks(self) -> None:
        """What people have asked for with marks."""
        now = self.now
        for command, num in (("run", now.num_waiting), ("evaluate", now.num_to_score)):
            if num:
                where = " on rows of `evaluation.sources`" * (command == "evaluate")
                self.add(
                    f"Apply the marks that wait{where}: {num:,}",
                    "People have corrected rows; stored answers are scored again where only right "
                    "answers change.", now.command(command), "/marks", Brings(num_rows=num),
                )  # fmt: skip
        if now.num_wanted:
            self.add(
                f"Add training rows like those that people marked: {now.num_wanted:,}",
                "People have marked them with `needs more like this`.", self._more_of("marks"),
                "/marks", Brings(num_rows=now.num_wanted),
            )  # fmt: skip

    def width(self) -> None:
        """More test rows, where the score is too uncertain to conclude from."""
        now, num = self.now, self.now.score["n"]
        if now.metric.kind == "number" or now.width <= _WIDE_INTERVAL:
            return
        if now.score.get("seed_share", 0.0) > 0.5:
            return  # the trainings differ: more rows would narrow it little
        needed = int(round(num * (now.width / _NARROW_INTERVAL) ** 2, -1))
        why = (
            f"The interval of the score is {100 * now.width:.0f} points wide; about {needed:,} "
            "examples would narrow it to 10."
        )
        changes = [f"data.split.num_test_examples={needed}"]
        if needed - num > now.num_spare_rows:
            changes, why = [], f"{why} So many are not to spare: collect more rows."
        title = "Score more test examples for a sharper result"
        self.add(title, why, now.command("run", *changes))

    def training(self) -> None:
        """More rows of the same kind, as the newest sweep forecasts it or as a try; more epochs."""
        now = self.now
        for curve in now.curve.get("curves", []):
            forecasts = (curve.get("forecast") or {}).get("forecasts") or []
            for item in forecasts:
                # The step from as many rows as the model has: from others it is another gain.
                if "step" in item and now.num_train_rows in (0, _step_from(item, forecasts)):
                    num = item["num_examples"]
                    missing = num - now.num_train_rows - now.num_spare_rows
                    why = f"The curve of {curve.get('series') or 'the sweep'} forecasts it."
                    if now.num_train_rows and missing > 0:
                        why += f" First {missing:,} rows have to be collected."
                    gain = Gain(*(item["step"][end] for end in ("value", "low", "high")))
                    self.add(
                        f"Add training rows of the same kind, to {num:,} in all", why,
                        now.command("run", f"data.num_train_examples={num}"), "/sweep",
                        Brings(gain, "forecast"),
                    )  # fmt: skip
                    break
        if now.more and not any(action.basis == "forecast" for action in self.found):
            why = "more train rows are there, which `data.num_train_examples` leaves out."
            self.untold(now.more, f"{now.num_spare_rows:,} {why}")

    def epochs(self) -> None:
        """To train for longer, and to measure whether more rows help."""
        now = self.now
        if not now.is_trained:
            return
        why = "Only a try tells; look at the validation loss first, if there is one."
        self.untold(now.longer, why, "/model")
        largest = now.num_train_rows
        if now.num_spare_rows < now.evaluation.metrics["num_examples"]:
            largest -= now.evaluation.metrics["num_examples"]  # they become the validation rows
        if not now.curve.get("curves") and largest >= _FEWEST_TO_SWEEP:
            volumes = f"{{data.num_train_examples: [{largest // 4}, {largest // 2}, {largest}]}}"
            self.add(
                "Measure whether more rows would help",
                "There is no learning curve of these settings: a sweep over volumes makes one.",
                now.command("sweep", f"sweep.parameters={volumes}"), "/sweep",
            )  # fmt: skip

    def _not_better(self) -> str:
        """Return what the trained model is not clearly better than, as a sentence; else nothing."""
        evaluation = self.now.evaluation
        behind = [
            describe_arm(pair["other"])
            for pair in evaluation.candidate_pairs()
            if pair["other"] in _UNTRAINED
            and direction(evaluation, pair, evaluation.primary) != "better"
        ]
        if not behind or not self.now.is_trained:
            return ""
        return f" It is not clearly better yet than {join_words(behind, 'or')}."

    def truth(self) -> None:
        """People's votes, where the score measures wording."""
        now, evaluation = self.now, self.now.evaluation
        is_wording = "generation" in evaluation.task_types() and now.metric.kind == "ratio"
        if is_wording and not evaluation.judge and evaluation.candidate_pairs():
            self.add(
                "Let people judge the answers blind",
                "The score counts the words shared with one reference: it measures wording, not "
                "truth. Votes rank the arms without their names.",
                now.look("dashboard"), now.page("votes"),
            )  # fmt: skip


# Of what brings nothing that is known, the first comes first.
_RULES = (
    *(_Adviser.missing, _Adviser.arms, _Adviser.errors, _Adviser.fields, _Adviser.losses),
    *(_Adviser.tasks, _Adviser.parts, _Adviser.marks, _Adviser.width, _Adviser.training),
    *(_Adviser.epochs, _Adviser.truth),
)


def _as_bools(values: pa.ChunkedArray) -> Bools:
    """Return truths as an array; what is null is false."""
    found: Bools = pc.fill_null(values, False).to_numpy()
    return found


def _step_from(item: dict[str, Any], forecasts: Sequence[dict[str, Any]]) -> int:
    """Return the number of rows from which a forecast's `step` leads to its own."""
    before = forecasts.index(item) - 1
    if before >= 0:
        return int(forecasts[before]["num_examples"])
    return int(item["num_examples"] // item["times"])
