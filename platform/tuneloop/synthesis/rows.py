"""Rows that a larger model writes from train rows, or for inputs that have no answers.

Every request and reply is kept; every row that is not taken is kept with its reason. Only train
rows that people wrote are shown to the model: what is held out is never sent.
Source: Wang et al. 2022, Self-Instruct, arXiv:2212.10560 (new inputs from some that are drawn anew
for each); Xu et al. 2023, WizardLM, arXiv:2304.12244 (harder variants).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pyarrow import parquet

from tuneloop.artifacts import Artifact
from tuneloop.config import GenerationConfig, JudgeConfig, OneTaskConfig
from tuneloop.data.hashing.content import content_id
from tuneloop.data.rouge import ALIKE
from tuneloop.data.schema import ReasonCode
from tuneloop.data.sources.unlabelled import UnlabelledRow
from tuneloop.errors import DataError
from tuneloop.evals.scoring.constrained import KINDS, unwrap
from tuneloop.evals.scoring.judging import read_rating
from tuneloop.evals.scoring.metrics import without_thought
from tuneloop.records import Arm, Message, SamplingParams
from tuneloop.synthesis.filters import Filters, Novelty, Rejected, Solved, agreement, cleaned, lost
from tuneloop.synthesis.more_of import Part
from tuneloop.synthesis.teacher import Asked, Reply, Teacher
from tuneloop.text import folded

# Train rows whose inputs are shown for a new one; of a label, so many of its own.
_NUM_SHOWN, _NUM_OF_LABEL = 6, 3
# Of these, so many that people want more like.
_NUM_WANTED = 3
_SYSTEM = ("system", "developer")
# Why an input is not asked about.
UNASKED = ("the input is known", "the input is held out")
_INSTRUCTIONS = {
    "self_instruct": "Write one new input for the task below. Its topic and wording have to differ "
    "from the examples; in kind, length and style it has to be like them. Reply with the input "
    "alone, without an answer to it.",
    "paraphrases": "Say the input below in other words. Keep its meaning and every name, number "
    "and detail, so that the answer to it stays the same. Reply with the new input alone, "
    "without an answer to it.",
    "harder": "Write a harder variant of the input below: a rarer case, one more condition, or one "
    "more step. It has to be of the same task, as long as the input or a little longer, and "
    "answerable. Reply with the new input alone, without an answer to it.",
}
_RATING = (
    "You rate an answer to a task. {criteria} Its length does not count. Give your reasons in a "
    "few sentences. Then end with one line that is `Rating: N`, where N is 1 (useless), 2, 3, 4 "
    "or 5 (nothing to improve)."
)


@dataclass(frozen=True)
class SeedRow:
    """A train row that people wrote.

    Args:
        messages: Its turns, with the task's instruction; the last is the answer.
    """

    row_id: str
    messages: tuple[Message, ...]

    @property
    def solved(self) -> Solved:
        """Its input and answer alone."""
        return Solved(self.messages[-2].text, self.messages[-1].text, self.row_id)


@dataclass(frozen=True)
class Known:
    """What is known before any row is written.

    Args:
        seeds: Train rows that people wrote, which say what rows look like.
        wanted: Ids of train rows that there should be more like: they come first.
        parts: Where there are some, rows are made from train rows of these parts alone.
        evaluation: Reference of the evaluation that the parts are of; empty for others.
        held_out: Rows that no new input may be like; they are never shown.
    """

    seeds: Sequence[SeedRow]
    wanted: frozenset[str] = frozenset()
    parts: Sequence[Part] = ()
    evaluation: str = ""
    held_out: Sequence[Solved] = ()


@dataclass(frozen=True)
class Candidate:
    """A row on its way.

    Args:
        messages: What is asked, with the task's instruction; the last turn is the user's.
        source: Where its input comes from.
        seed: The row it was made from, if it was made from one.
        expected: The answer that its input was written for; empty if any is right.
        made_for: Name of the part that it was written for; empty without parts.
        answer: Empty before there is one.
        agreement: Share of the answers that say the same; None where none was asked for.
        rating: What a judge gave it; None without one.
    """

    messages: tuple[Message, ...]
    source: str
    seed: SeedRow | None = None
    expected: str = ""
    made_for: str = ""
    answer: str = ""
    agreement: float | None = None
    rating: float | None = None

    @property
    def input(self) -> str:
        """What its last turn says."""
        return self.messages[-1].text

    def without_instruction(self, instruction: str) -> Candidate:
        """Return the row without the task's instruction: whoever reads it puts that of the time."""
        first, *turns = self.messages
        own = first.content.removeprefix(instruction.strip()).strip()
        if first.role not in _SYSTEM or own == first.content:
            return self
        system = [replace(first, content=own)] * bool(own)
        return replace(self, messages=(*system, *turns))

    @property
    def row_id(self) -> str:
        """Hash of what is asked, and of the answer once there is one."""
        turns = [{"role": m.role, "content": m.content} for m in self.messages]
        return content_id(turns + [{"role": "assistant", "content": self.answer}], "")


class InputRequest(NamedTuple):
    """What is asked for a new input, and the row that it is for."""

    asked: Asked
    row: Candidate


class _Turn(NamedTuple):
    """A part's turn.

    Args:
        part: Its name; empty where rows are made from all train rows.
        seeds: What rows of it are made from.
        number: How many turns it had before.
    """

    part: str
    seeds: Sequence[SeedRow]
    number: int


class _Examples(NamedTuple):
    """Train rows to show for a new input, and the label that it has to be of, if any."""

    rows: list[SeedRow]
    label: str


class Removed(NamedTuple):
    """Something that was not taken, with what the model wrote."""

    row_id: str
    source: str
    why: Rejected
    text: str


@dataclass
class Written:
    """What came of the requests.

    Args:
        taken: Rows, in order.
        removed: What was rejected.
        num_unanswered: Inputs, answers and ratings that were not asked for, or got no reply.
    """

    taken: list[Candidate] = field(default_factory=list)
    removed: list[Removed] = field(default_factory=list)
    num_unanswered: int = 0

    def reject(self, row: Candidate, why: Rejected, text: str) -> None:
        """Keep what is not taken."""
        self.removed.append(Removed(row.row_id, row.source, why, text))


def read_seeds(dataset: Artifact) -> list[SeedRow]:
    """Return the train rows that people wrote with one question and one answer, by row id.

    Raises:
        DataError: There is none.
    """
    table = parquet.read_table(dataset.path / "train")
    names = ("row_id", "synthetic", "messages", "tools")
    seeds = []
    for row in table.select([name for name in names if name in table.column_names]).to_pylist():
        messages = tuple(Message.of(turn) for turn in row["messages"] or ())
        spoken = [m.role for m in messages if m.role not in _SYSTEM]
        is_plain = spoken == ["user", "assistant"] and not messages[-1].tool_calls
        if is_plain and not row.get("synthetic") and not row.get("tools"):
            seeds.append(SeedRow(row["row_id"], messages))
    if not seeds:
        raise DataError.of(
            "no train row can be shown to the model",
            where=dataset.ref,
            allowed="rows that people wrote, with one question and one answer, without tools",
        )
    return sorted(seeds, key=lambda seed: seed.row_id)


class RowWriter:
    """Writes rows of one kind.

    Args:
        generation: What is asked.
        task: Whose rows are written.
        known: Train rows, what there should be more of, and what is held out.
        teacher: Who writes them.
    """

    def __init__(
        self,
        generation: GenerationConfig,
        task: OneTaskConfig,
        known: Known,
        teacher: Teacher,
    ) -> None:
        self.generation, self.task, self.teacher = generation, task, teacher
        self.seeds = seeds = known.seeds
        self._held_out = known.held_out
        self._wanted = [seed for seed in seeds if seed.row_id.partition("-")[0] in known.wanted]
        by_id = {seed.row_id: seed for seed in seeds}
        self._parts = {part.name: [by_id[id_] for id_ in part.row_ids] for part in known.parts}
        self.filters = Filters(task, [seed.solved for seed in self.seeds])
        self._form: Mapping[str, Any] = {}
        self._answer_key = ""
        self._shots = self._draw(random.Random(generation.seed), generation.num_shots)

    @property
    def arm(self) -> Arm:
        """The model, as evaluation knows it."""
        return Arm("teacher", self.teacher.endpoint)

    def bind(self, arm: Arm) -> None:
        """Ask for answers in the form that an arm's have."""
        self._form, self._answer_key = arm.forms[""], arm.answer_key

    def write(self, unlabelled: Sequence[UnlabelledRow] = ()) -> Written:
        """Return the rows, and what was rejected.

        Args:
            unlabelled: The inputs of kind `answers`.
        """
        written = Written()
        if self.generation.kind == "answers":
            rows = self._without_copies(unlabelled, written)[: self.generation.num_rows]
        else:
            rows = self._new_inputs(written)
        if self.generation.kind == "paraphrases":
            written.taken = [self._with_own_answer(row) for row in rows]
        else:
            written.taken = self._answered(rows, written)
        return written

    def rate(self, written: Written, judge: Teacher, config: JudgeConfig) -> None:
        """Keep the rows that a judge rates high enough."""
        assert self.generation.min_rating is not None
        system = _RATING.format(criteria=config.criteria)
        params = SamplingParams(max_tokens=config.max_tokens)
        requests = [
            Asked((Message("system", system), Message("user", _shown_to_judge(row))), params)
            for row in written.taken
        ]
        judge.ask(requests)
        rated, written.taken = written.taken, []
        for row, request in zip(rated, requests, strict=True):
            reply = judge.reply(request)
            if reply is None:
                written.num_unanswered += 1
                continue
            rating = read_rating(without_thought(reply.text))
            if rating is None or rating < self.generation.min_rating:
                said = "no rating can be read" if rating is None else f"{rating:g} of 5"
                why = Rejected(ReasonCode.LOW_RATING, f"the judge's rating is too low: {said}")
                written.reject(row, why, f"{row.input}\n{row.answer}\n{reply.text}")
            else:
                written.taken.append(replace(row, rating=rating))

    def _draw(self, rng: random.Random, count: int) -> list[SeedRow]:
        return rng.sample(self.seeds, min(count, len(self.seeds)))

    def _without_copies(
        self, unlabelled: Sequence[UnlabelledRow], written: Written
    ) -> list[Candidate]:
        """Return each input once, without those that train rows have answered."""
        known = {folded(seed.messages[-2].text): seed.row_id for seed in self.seeds}
        held_out = {folded(row.input): row.row_id for row in self._held_out}
        rows = []
        for item in unlabelled:
            row = Candidate(item.messages, item.source)
            if (earlier := known.get(folded(row.input))) is not None:
                why = Rejected(ReasonCode.EXACT_DUPLICATE, UNASKED[0], earlier)
                written.reject(row, why, row.input)
            elif (tested := held_out.get(folded(row.input))) is not None:
                why = Rejected(ReasonCode.SAME_PROMPT, UNASKED[1], tested)
                written.reject(row, why, row.input)
            else:
                known[folded(row.input)] = row.row_id
                rows.append(row)
        return rows

    def _new_inputs(self, written: Written) -> list[Candidate]:
        """Return the new inputs that are taken."""
        asked = self.requests()
        self.teacher.ask([request for request, _ in asked])
        novelty = Novelty(self.generation.max_similarity)
        for seed in self.seeds:
            novelty.add(seed.messages[-2].text, seed.row_id)
        tested = Novelty(min(ALIKE, self.generation.max_similarity), "a held-out row")
        for held in self._held_out:
            tested.add(held.input, held.row_id)
        rows = []
        for request, row in asked:
            reply = self.teacher.reply(request)
            if reply is None:
                written.num_unanswered += 1
                continue
            text = cleaned(without_thought(reply.text))
            row = replace(row, messages=(*row.messages[:-1], Message("user", text)))
            why = (
                _cut_off(reply)
                or self.filters.reject_input(text)
                or self._lost(row, text)
                or tested.reject(text)
                or novelty.reject(text)
            )
            if why is not None:
                written.reject(row, why, reply.text)
                continue
            novelty.add(text, row.row_id)
            rows.append(row)
        return rows

    def requests(self) -> list[InputRequest]:
        """Return what is asked for new inputs, each with the row that it is for."""
        made_of = {seed.row_id for part in self._parts.values() for seed in part}
        count = self.generation.num_rows or len(made_of or self.seeds)
        return [self._ask_for_input(number) for number in range(count)]

    def _ask_for_input(self, number: int) -> InputRequest:
        """Return the request for the new input of this number, and the row it is for."""
        generation = self.generation
        told = generation.instruction or _INSTRUCTIONS[generation.kind]
        turn = _Turn("", self.seeds, number)
        if self._parts:
            # The parts take turns, the worst first.
            index, place = divmod(number, len(self._parts))
            turn = _Turn(*[*self._parts.items()][place], index)
        seed, expected = None, ""
        if generation.kind == "self_instruct":
            rng = random.Random(f"{generation.seed} {number}")
            shown, expected = self._of_part(turn, rng) if self._parts else self._of_all(turn, rng)
            parts = [self._example(place, s) for place, s in enumerate(shown, 1)]
            if expected:
                parts.append(f"The answer to the new input has to be: {expected}")
            asked = "\n\n".join([*parts, "New input:"])
            like = shown[0]
        else:
            seed = like = self._seed(turn)
            asked = f"Input:\n{seed.messages[-2].text}"
        about = f"\n\nThe task: {self.task.instruction.strip()}" if self.task.instruction else ""
        system = Message("system", told + about)
        params = replace(self._params(), seed=generation.seed + number)
        source = f"{generation.kind} {number + 1}" + (f" of {seed.row_id}" if seed else "")
        source += f" for {turn.part}" if turn.part else ""
        row = Candidate(like.messages[:-1], source, seed, expected, turn.part)
        return InputRequest(Asked((system, Message("user", asked)), params), row)

    def _of_all(self, turn: _Turn, rng: random.Random) -> _Examples:
        """Return train rows to show for a new input, and the label it has to be of."""
        more_like = rng.sample(self._wanted, min(_NUM_WANTED, len(self._wanted)))
        drawn = [seed for seed in self._draw(rng, _NUM_SHOWN) if seed not in more_like]
        shown, expected = [*more_like, *drawn][:_NUM_SHOWN], ""
        if self.task.type == "classification":
            # Each label is asked for equally often, whatever the train rows have most of.
            expected = self.task.labels[turn.number % len(self.task.labels)]
            own = [s for s in self.seeds if s.messages[-1].text == expected]
            own = rng.sample(own, min(_NUM_OF_LABEL, len(own)))
            # Those that people want more like come first here too.
            liked = [s for s in more_like if s.messages[-1].text == expected]
            own = [*liked, *(s for s in own if s not in liked)][:_NUM_OF_LABEL]
            others = [s for s in shown if s.messages[-1].text != expected]
            shown = [*others[: _NUM_SHOWN - len(own)], *own]
        return _Examples(shown, expected)

    def _of_part(self, turn: _Turn, rng: random.Random) -> _Examples:
        """Return train rows of a part; of a classification of one of its labels at a time."""
        shown, expected = turn.seeds, ""
        if self.task.type == "classification":
            labels = sorted({seed.messages[-1].text for seed in turn.seeds})
            expected = labels[turn.number % len(labels)]
            shown = [seed for seed in turn.seeds if seed.messages[-1].text == expected]
        return _Examples(rng.sample(shown, min(_NUM_SHOWN, len(shown))), expected)

    def _seed(self, turn: _Turn) -> SeedRow:
        """Return the row to change: all come once before any comes twice."""
        again, place = divmod(turn.number, len(turn.seeds))
        if turn.part:
            return turn.seeds[place]
        # Each time in an order of its own.
        shuffled = random.Random(f"{self.generation.seed} turn {again}")
        order = shuffled.sample(turn.seeds, len(turn.seeds))
        order.sort(key=lambda one: one not in self._wanted)
        return order[place]

    def _example(self, place: int, seed: SeedRow) -> str:
        """Return a train row's input as it is shown, with its label if it has one."""
        label = f"\n(its answer: {seed.messages[-1].text})" * (self.task.type == "classification")
        return f"Input {place}:\n{seed.messages[-2].text}{label}"

    def _lost(self, row: Candidate, text: str) -> Rejected | None:
        if self.generation.kind != "paraphrases" or row.seed is None:
            return None
        detail = lost(row.seed.solved, text, self.task)
        what = "the paraphrase has lost a detail"
        return Rejected(ReasonCode.LOST_DETAIL, f"{what}: {detail}") if detail else None

    def _with_own_answer(self, row: Candidate) -> Candidate:
        assert row.seed is not None
        return replace(row, answer=row.seed.messages[-1].text)

    def _params(self) -> SamplingParams:
        g = self.generation
        return SamplingParams(max_tokens=g.max_tokens, temperature=g.temperature, seed=g.seed)

    def _answered(self, rows: Sequence[Candidate], written: Written) -> list[Candidate]:
        """Return the rows with answers that are taken."""
        by_row = [
            [self._ask_to_answer(row, n) for n in range(self.generation.num_samples)]
            for row in rows
        ]
        self.teacher.ask([request for requests in by_row for request in requests])
        taken = []
        for row, requests in zip(rows, by_row, strict=True):
            replies = [reply for r in requests if (reply := self.teacher.reply(r)) is not None]
            if len(replies) < len(requests):
                written.num_unanswered += 1
                continue
            found = self._settled(row, replies)
            if isinstance(found, Rejected):
                text = "\n".join([row.input, *(reply.text for reply in replies)])
                written.reject(row, found, text)
            else:
                taken.append(found)
        return taken

    def _ask_to_answer(self, row: Candidate, sample: int) -> Asked:
        system = [m for m in row.messages if m.role in _SYSTEM]
        if self.generation.kind == "answers" and self.generation.instruction:
            told = "\n\n".join([*(m.content for m in system), self.generation.instruction])
            system = [Message("system", told)]
        turns = [m for m in row.messages if m.role not in _SYSTEM]
        shots = [s for s in self._shots if row.seed is None or s.row_id != row.seed.row_id]
        solved = [m for shot in shots for m in shot.messages if m.role not in _SYSTEM]
        params = replace(self._params(), seed=self.generation.seed + sample)
        return Asked((*system, *solved, *turns), params, self._form)

    def _settled(self, row: Candidate, replies: Sequence[Reply]) -> Candidate | Rejected:
        """Return the row with the answer that most replies give, or why there is none."""
        usable, refusals = [], []
        for reply in replies:
            answer = self._answer(reply)
            why = _cut_off(reply) or self.filters.reject_answer(Solved(row.input, answer))
            if why is None:
                usable.append(answer)
            else:
                refusals.append(why)
        if not usable:
            return refusals[0]
        settled = agreement(usable, len(replies), self.task)
        if settled.ratio < self.generation.min_agreement:
            code, share = ReasonCode.NO_AGREEMENT, f"{settled.ratio:.0%} say the same"
            return Rejected(code, f"the answers do not agree: {share}")
        if row.expected and settled.answer != row.expected:
            code, said = ReasonCode.NO_AGREEMENT, f"{settled.answer}, asked for {row.expected}"
            return Rejected(code, f"the input is not of the label it was asked for: {said}")
        return replace(row, answer=settled.answer, agreement=round(settled.ratio, 4))

    def _answer(self, reply: Reply) -> str:
        """Return the answer that a reply holds, as the rows of the task have it."""
        text = without_thought(reply.text).strip()
        if self._answer_key:
            text = unwrap(text, self._answer_key)
        if self.task.type not in KINDS:
            return text
        text = cleaned(text)
        if self.task.type == "classification":
            plain = text.strip(" .!`*").casefold()
            return next((label for label in self.task.labels if label.casefold() == plain), text)
        return text


def _cut_off(reply: Reply) -> Rejected | None:
    if reply.finish_reason != "length":
        return None
    return Rejected(ReasonCode.CUT_OFF, "cut off at generation.max_tokens")


def _shown_to_judge(row: Candidate) -> str:
    told = "\n\n".join(m.content for m in row.messages if m.role in _SYSTEM)
    parts = [("Instruction", told), ("Task", row.input), ("Answer", row.answer)]
    return "\n\n".join(f"[{title}]\n{text}" for title, text in parts if text)
