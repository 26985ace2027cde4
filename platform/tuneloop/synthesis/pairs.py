"""Pairs written by a larger model from the user's documents, marked as synthetic.

Real pairs are worth more; these fill the gap until there are enough of them. Each pair keeps the
passage it was written from, so that a reader can check it. What is published is an ordinary
dataset whose `train/` can be read again as a source of `prepare` (format `messages`).
Source: Wang et al. 2022, Self-Instruct, arXiv:2212.10560; Alberti et al. 2019, arXiv:1906.05416.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from tuneloop.artifacts import Artifact, Published, Workspace, fingerprint
from tuneloop.config import (
    DataConfig,
    GenerationConfig,
    MixedSourceConfig,
    TaskConfig,
    TuneloopConfig,
)
from tuneloop.data.hashing.content import content_id
from tuneloop.data.schema import ReasonCode, Stage
from tuneloop.data.sources.files import find_files
from tuneloop.data.sources.readers import read_source
from tuneloop.errors import DataError
from tuneloop.evals.scoring.spending import Cost, Entry
from tuneloop.languages import refuse_unknown_languages
from tuneloop.models.bases.source import BaseModel
from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import Message, SamplingParams
from tuneloop.synthesis.filters import Rejected
from tuneloop.synthesis.generate import (
    REPLIES,
    GeneratedRows,
    describe_requests,
    reasons,
    rendered,
    teacher_of,
)
from tuneloop.synthesis.rows import Candidate, Removed
from tuneloop.synthesis.teacher import Asked, Replies, Reply, Teacher
from tuneloop.text import counted

logger = logging.getLogger("tuneloop.data")

CODE_VERSION = 1
_KEYS = {
    *("endpoint", "model", "num_pairs_per_passage", "max_characters", "max_tokens"),
    *("temperature", "seed"),
}
_INSTRUCTION = (
    "Write {num_pairs} questions that the following text answers, each with its answer. Use only "
    "what the text says. A question has to be understood without the text."
)
_FORMAT = 'Answer with a JSON list only: [{"question": "...", "answer": "..."}, ...]'
_WORD = re.compile(r"\w{4,}")


@dataclass(frozen=True)
class Passage:
    """A piece of a document that pairs are written from.

    Args:
        passage_id: Hash of the text, 20 hexadecimal digits.
        source: Where the document was read, `path:line`.
    """

    passage_id: str
    source: str
    text: str


class Pair(NamedTuple):
    """A question about a passage, and its answer."""

    question: str
    answer: str


class ParsedReply(NamedTuple):
    """The pairs of a reply, and why some of it cannot be used; `problem` is empty if all can."""

    pairs: list[Pair]
    problem: str = ""
    code: ReasonCode = ReasonCode.UNREADABLE


def generate(config: TuneloopConfig, workspace: Workspace, base: BaseModel) -> Published:
    """Return `datasets/<config.name>-generated`, made or reused. Starts no Ray: it only asks.

    Replies are kept as they come; the same call asks for the missing ones only, after a crash and
    where a published dataset lacks some.

    Args:
        config: `generation` says what is asked, whom and about which documents.
        workspace: Where the artifact goes.
        base: Whose tokenizer and chat template the pairs are rendered with.

    Raises:
        DataError: No document can be read, or no reply holds a pair.
        EndpointError: The endpoint is unusable, or replied to no request.
    """
    generation = config.generation
    assert generation is not None, "the caller looked"
    passages = list(_passages(config, generation))
    if not passages:
        raise DataError.of("the sources hold no text", where="generation.sources")
    renderer = Renderer.load(base.path, config.model.chat_template)
    parts = {
        # The keys that this kind had from the start: what is published stays as it is.
        "generation": generation.model_dump(mode="json", include=_KEYS)
        | {"instruction": generation.instruction or _INSTRUCTION},
        "filters": config.data.filters.model_dump(mode="json"),
        "passages": content_id([], " ".join(passage.passage_id for passage in passages)),
        "renderer": renderer.hash,
    }
    name = f"{config.name}-generated"
    identity = fingerprint("generate", CODE_VERSION, **parts)
    existing = workspace.find("datasets", name, identity)
    if existing is not None and not existing.manifest["metrics"]["num_unanswered"]:
        return Published(existing, reused=True)
    known = {} if existing is None else _published_replies(existing)
    with workspace.draft("datasets", name, identity) as draft:
        paid = Replies(draft.scratch / REPLIES)
        if existing is not None:
            _count_published(paid, existing)
        teacher = teacher_of(generation, paid)
        replies = _replies(passages, generation, teacher, known)
        num_missing = sum(bool(reply.error) for reply in replies.values())
        if existing is not None and num_missing >= existing.manifest["metrics"]["num_unanswered"]:
            logger.warning("%d replies are still missing from %s", num_missing, existing.ref)
            return Published(existing, reused=True)
        rows = _rows(passages, replies, renderer)
        if not rows.train:
            removed = reasons(rows.removed)
            raise DataError.of(
                "no reply holds a pair that can be used",
                where=f"{generation.model} at {generation.endpoint}",
                got=", ".join(
                    f"{reason} ({counted(n, 'time')})" for reason, n in removed.most_common(3)
                ),
                allowed="a JSON list of objects with `question` and `answer`",
                remedy="take a larger model, raise generation.max_tokens, or say it more "
                "clearly in generation.instruction",
            )
        metrics = _metrics(passages, replies, rows) | describe_requests(teacher)
        _write(draft.path, name, rows, metrics, generation)
        artifact = draft.publish(
            config=parts,
            resources={"concurrency": generation.concurrency},
            inputs=sorted({passage.source for passage in passages})
            + [f"{generation.model} at {generation.endpoint}"],
            metrics=metrics,
        )
    return Published(artifact, reused=False)


def _passages(config: TuneloopConfig, generation: GenerationConfig) -> Iterator[Passage]:
    """Yield the passages of all documents, each text once."""
    refuse_unknown_languages(config.data.filters.languages)
    files = find_files(generation.sources, "generation.sources")
    # Documents are read as those of a corpus are, with the same filters.
    documents = config.model_copy(
        update={
            "task": TaskConfig(type="language_modeling"),
            "data": DataConfig(
                sources=[MixedSourceConfig(**vars(source)) for source in generation.sources],
                filters=config.data.filters,
            ),
        }
    )
    seen: set[str] = set()
    for position, file in enumerate(files):
        for row in read_source(file, position, documents):
            if (rejection := row["rejection"]) is not None:
                if rejection.stage is Stage.FILTER:
                    continue
                raise DataError(rejection.problem(row["source"]))
            for text in cut(row["text"], generation.max_characters):
                identity = content_id([], text)
                if identity not in seen:
                    seen.add(identity)
                    yield Passage(identity, row["source"], text)


def cut(text: str, max_characters: int) -> list[str]:
    """Return a document as passages of at most `max_characters`.

    Cut where a paragraph ends if there is such a place, else where a line, a sentence or a word
    does, so that nothing is lost but white space.
    """
    passages = []
    rest = text.strip()
    while len(rest) > max_characters:
        head = rest[: max_characters + 1]
        ends = (head.rfind(mark, 1) for mark in ("\n\n", "\n", ". ", " "))
        end = next((end for end in ends if end > 0), max_characters)
        end += head.startswith(". ", end)  # the full stop stays with its sentence
        end = min(end, max_characters)
        passages.append(rest[:end].strip())
        rest = rest[end:].strip()
    return [passage for passage in [*passages, rest] if passage]


def _published_replies(dataset: Artifact) -> dict[str, Reply]:
    """Return the replies that a published dataset was made of, by passage, as far as it tells."""
    pairs: dict[str, list[dict[str, str]]] = {}
    for row in parquet.read_table(
        dataset.path / "train", columns=["messages", "passage"]
    ).to_pylist():
        question, answer = (turn["content"] for turn in row["messages"])
        items = pairs.setdefault(content_id([], row["passage"]), [])
        items.append({"question": question, "answer": answer})
    replies = {name: Reply(json.dumps(items), "stop") for name, items in pairs.items()}
    columns = ["row_id", "reason_code", "text"]
    for row in parquet.read_table(dataset.path / "removed", columns=columns).to_pylist():
        # What a reply holds beside its pairs is kept with all of its text.
        if row["reason_code"] in (ReasonCode.UNREADABLE, ReasonCode.WRONG_LAYOUT):
            replies[row["row_id"]] = Reply(row["text"], "stop")
        elif row["reason_code"] == ReasonCode.CUT_OFF:
            replies[row["row_id"]] = Reply(row["text"], "length")
    return replies


def _count_published(replies: Replies, existing: Artifact) -> None:
    """Count what a published dataset cost whose missing replies are now asked for."""
    told = existing.manifest["metrics"]
    if not replies.spent.tokens:
        cost = Cost(told.get("spent_tokens", 0), told.get("spent_money") or 0.0)
        replies.add(Entry(existing.ref, cost, {"error": "of an earlier run"}, is_earlier=True))
    replies.num_requests += told.get("num_requests", 0)


def _replies(
    passages: list[Passage],
    generation: GenerationConfig,
    teacher: Teacher,
    known: Mapping[str, Reply],
) -> dict[str, Reply]:
    """Return the reply to each passage, asking for those that neither the file nor `known` has."""
    params = SamplingParams(
        max_tokens=generation.max_tokens, temperature=generation.temperature, seed=generation.seed
    )
    asked = {p.passage_id: Asked(tuple(prompt(p, generation)), params) for p in passages}
    todo = [request for name, request in asked.items() if name not in known]
    teacher.ask(todo, may_fail=bool(known))
    missing = Reply(error=teacher.stopped.what if teacher.stopped else "the request failed")
    return {
        name: known.get(name) or teacher.reply(request) or missing
        for name, request in asked.items()
    }


def prompt(passage: Passage, generation: GenerationConfig) -> list[Message]:
    """Return what the model is asked about a passage."""
    asked = (generation.instruction or _INSTRUCTION).format(
        num_pairs=generation.num_pairs_per_passage
    )
    return [Message("system", f"{asked}\n{_FORMAT}"), Message("user", passage.text)]


def parse_pairs(reply: Reply) -> ParsedReply:
    """Return the pairs of a reply; the list may stand between other words, such as a code fence."""
    if reply.error:
        return ParsedReply([], f"no reply: {reply.error}", ReasonCode.NO_REPLY)
    try:
        start = reply.text.index("[")
        items, _ = json.JSONDecoder().raw_decode(reply.text, start)
    except ValueError:
        if reply.finish_reason == "length":
            return ParsedReply([], "cut off at generation.max_tokens", ReasonCode.CUT_OFF)
        return ParsedReply([], "no JSON list")
    pairs = []
    for item in items:
        sides = (item.get("question"), item.get("answer")) if isinstance(item, dict) else ()
        stripped = [side.strip() for side in sides if isinstance(side, str) and side.strip()]
        if len(stripped) == 2:
            pairs.append(Pair(*stripped))
    problem = "" if len(pairs) == len(items) else "an item without question or answer"
    return ParsedReply(pairs, problem, ReasonCode.WRONG_LAYOUT)


def support_ratio(answer: str, passage: str) -> float | None:
    """Return the share of the answer's words (4 letters and more) that the passage has.

    A low value is worth a look: the answer says what its source does not. None: no such word.
    """
    words = set(_WORD.findall(answer.casefold()))
    if not words:
        return None
    return len(words & set(_WORD.findall(passage.casefold()))) / len(words)


def _rows(passages: list[Passage], replies: dict[str, Reply], renderer: Renderer) -> GeneratedRows:
    texts: dict[str, str] = {}

    def written() -> Iterator[Candidate | Removed]:
        for passage in passages:
            reply = replies[passage.passage_id]
            pairs, problem, code = parse_pairs(reply)
            if problem:
                why = Rejected(code, problem)
                yield Removed(passage.passage_id, passage.source, why, reply.text)
            for question, answer in pairs:
                row = Candidate((Message("user", question),), passage.source, answer=answer)
                texts.setdefault(row.row_id, passage.text)
                yield row

    rows = rendered(written(), renderer)
    for row in rows.train:
        answer, text = row["messages"][-1]["content"], texts[row["row_id"]]
        row |= {"passage": text, "support_ratio": support_ratio(answer, text)}
    return rows


def _metrics(
    passages: list[Passage], replies: dict[str, Reply], rows: GeneratedRows
) -> dict[str, Any]:
    support = [row["support_ratio"] for row in rows.train if row["support_ratio"] is not None]
    return {
        "num_passages": len(passages),
        "num_unanswered": sum(bool(reply.error) for reply in replies.values()),
        "num_train_rows": len(rows.train),
        "num_test_rows": 0,
        "num_removed": len(rows.removed),
        "num_train_tokens": sum(row["num_tokens"] for row in rows.train),
        "mean_support_ratio": round(sum(support) / len(support), 4) if support else None,
    }


def _write(
    path: Path,
    name: str,
    rows: GeneratedRows,
    metrics: dict[str, Any],
    generation: GenerationConfig,
) -> None:
    columns = pa.schema([("passage", pa.string()), ("support_ratio", pa.float64())])
    rows.write(path, columns)
    removed = reasons(rows.removed)
    card = {"name": name, "synthetic_ratio": 1.0, **metrics, "removed": dict(removed)}
    (path / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False))
    doubtful = sorted(
        (row for row in rows.train if row["support_ratio"] is not None),
        key=lambda row: (row["support_ratio"], row["row_id"]),
    )
    lines = [
        f"# {name}",
        "",
        f"{len(rows.train):,} pairs written by `{generation.model}` from "
        f"{metrics['num_passages']:,} passages. All of them are synthetic: read some before "
        "you train on them, and test on rows that people wrote.",
        "",
        f"- no answer to {counted(metrics['num_unanswered'], 'request')}",
        *(f"- {counted(count, 'time')}: {reason}" for reason, count in removed.most_common()),
        "",
        "Use them as a source of `prepare`: `{path: WORKSPACE/datasets/"
        f"{name}/vN/train, format: messages}}`.",
        "",
        "## The answers whose words are least found in their passage",
        "",
        *_shown(doubtful[:5]),
        "## Some of the others",
        "",
        *_shown(doubtful[5:][:: max(1, len(doubtful[5:]) // 5)][:5]),
    ]
    (path / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _shown(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        question, answer = (turn["content"] for turn in row["messages"])
        yield f"- **{' '.join(question.split())[:300]}**"
        yield f"  {' '.join(answer.split())[:300]} ({row['support_ratio']:.0%} of its words)"
        yield ""
