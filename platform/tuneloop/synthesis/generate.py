"""`tuneloop generate`: rows that a larger model writes, as a dataset that `prepare` reads again."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from tuneloop.artifacts import Artifact, Published, Workspace, fingerprint
from tuneloop.config import GenerationConfig, JudgeConfig, TuneloopConfig
from tuneloop.data.hashing.content import content_id
from tuneloop.data.schema import ReasonCode, dataset_schema, removed_schema
from tuneloop.data.sources.files import identities
from tuneloop.data.sources.unlabelled import input_files, read_all_unlabelled
from tuneloop.data.synthetic_rows import RowText, compare, synthetic_lines
from tuneloop.errors import DataError
from tuneloop.evals.scoring.budget import price_of
from tuneloop.evals.scoring.constrained import KINDS, constrain
from tuneloop.models.bases.source import BaseModel
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.chat.template import RenderError
from tuneloop.models.client.client import api_key_of
from tuneloop.records import Endpoint, Message
from tuneloop.review.fixes import marks_for
from tuneloop.synthesis.filters import Rejected
from tuneloop.synthesis.more_of import find_parts, held_out_rows
from tuneloop.synthesis.rows import (
    UNASKED,
    Candidate,
    Known,
    Removed,
    RowWriter,
    SeedRow,
    Written,
    read_seeds,
)
from tuneloop.synthesis.teacher import Rates, Replies, Teacher
from tuneloop.text import counted, shorten

logger = logging.getLogger("tuneloop.data")

API_KEY_VARIABLE = "TUNELOOP_GENERATION_API_KEY"
CODE_VERSION = 6
REPLIES = "replies.jsonl"
# What is paid and how fast does not change what is written.
# The parts that `more_of` comes to count.
_HOW = {"concurrency", "requests_per_minute", "price", "budget", "sources", "more_of"}
_SHOWN, _CHARACTERS = 10, 300


class GeneratedRows(NamedTuple):
    """The rows of `train/` and of `removed/`."""

    train: list[dict[str, Any]]
    removed: list[dict[str, Any]]

    def write(self, path: Path, columns: pa.Schema) -> None:
        """Write them into a dataset; `columns` are what train rows have beside the usual ones."""
        for side, content, schema in (
            ("train", self.train, dataset_schema(columns)),
            # Models are tested on people's rows only.
            ("test", [], dataset_schema(columns)),
            ("removed", self.removed, removed_schema()),
        ):
            (path / side).mkdir()
            table = pa.Table.from_pylist(content, schema)
            parquet.write_table(table, path / side / "part-00000.parquet", compression="zstd")


def generate_rows(
    config: TuneloopConfig, workspace: Workspace, base: BaseModel, dataset: Artifact
) -> Published:
    """Return `datasets/<config.name>-generated`, made or reused.

    Replies are kept as they come; the same call asks for the missing ones only, after a crash and
    where a published dataset lacks some.

    Args:
        config: `generation` says what is asked and whom; labels are known.
        workspace: Where the artifact goes.
        base: Whose tokenizer and chat template the rows are rendered with.
        dataset: Whose train rows are shown to the model.

    Raises:
        ConfigError: The judge's key is missing, or `generation.more_of` names nothing.
        ArtifactError: The workspace's marks cannot be read.
        DataError: No train row can be shown, no input can be read, or no row was taken.
        EndpointError: The endpoint is unusable, or answered no request.
    """
    generation = config.generation
    assert generation is not None, "the caller looked"
    files = input_files(generation)
    renderer = Renderer.load(base.path, config.model.chat_template)
    judge = config.evaluation.judge if generation.min_rating is not None else None
    judge_key = api_key_of(judge.api_key_env, "evaluation.judge") if judge else ""
    known = _known(config, workspace, dataset)
    parts = {
        "generation": generation.model_dump(mode="json", exclude=_HOW),
        "layouts": [s.model_dump(mode="json", exclude={"path"}) for s in generation.sources],
        "files": identities(files),
        "task": config.task.model_dump(mode="json"),
        # Not the dataset as a whole: generated rows that are added to it change no request.
        "seeds": _seeds_identity(known.seeds),
        "held_out": content_id([], json.dumps([row.input for row in known.held_out])),
        "renderer": renderer.hash,
        "wanted": sorted(known.wanted),
        "more_of": [[part.name, *part.row_ids] for part in known.parts],
        "judge": judge and judge.model_dump(mode="json", include={"endpoint", "model", "criteria"}),
    }
    name = f"{config.name}-generated"
    identity = fingerprint("generate_rows", CODE_VERSION, **parts)
    existing = workspace.find("datasets", name, identity)
    if existing is not None and not existing.manifest["metrics"]["num_unanswered"]:
        return Published(existing, reused=True)
    unlabelled = read_all_unlabelled(files, generation, config.task) if files else []
    with workspace.draft("datasets", name, identity) as draft:
        path = draft.scratch / REPLIES
        if existing is not None and not path.exists():
            # Renamed into place: of half a copy the other half would be paid for again.
            whole = shutil.copyfile(existing.path / REPLIES, path.with_suffix(".new"))
            whole.rename(path)
        replies = Replies(path, _earlier_files(workspace, name, identity))
        teacher = teacher_of(generation, replies)
        writer = RowWriter(generation, config.task, known, teacher)
        if config.task.type in KINDS:
            writer.bind(constrain(writer.arm, config.task, dataset))
        written = writer.write(unlabelled)
        if judge is not None:
            writer.rate(written, _judge(judge, judge_key, generation, replies), judge)
        if existing is not None and (
            written.num_unanswered >= existing.manifest["metrics"]["num_unanswered"]
        ):
            return Published(existing, reused=True)
        taken = [row.without_instruction(config.task.instruction) for row in written.taken]
        rows = rendered([*written.removed, *taken], renderer)
        if not rows.train:
            raise _nothing_taken(rows, written, teacher, generation)
        metrics = _metrics(rows, written, teacher)
        _write(draft.path, rows, metrics, writer.seeds, config)
        shutil.copyfile(path, draft.path / REPLIES)
        artifact = draft.publish(
            config=parts,
            resources={"concurrency": generation.concurrency},
            inputs=[
                dataset.ref,
                *([known.evaluation] if known.evaluation else []),
                *(file.name for file in files),
                f"{generation.model} at {generation.endpoint}",
            ],
            metrics=metrics,
        )
    return Published(artifact, reused=False)


def _known(config: TuneloopConfig, workspace: Workspace, dataset: Artifact) -> Known:
    """Return the train rows to make rows from, what is wanted of them, and what is held out."""
    seeds, held_out = read_seeds(dataset), held_out_rows(dataset)
    assert config.generation is not None
    if config.generation.more_of is not None:
        people = [seed.solved for seed in seeds]
        found = find_parts(config, workspace, dataset, people)
        logger.info("more of: %s", ", ".join(part.name for part in found.parts))
        return Known(seeds, frozenset(), found.parts, found.evaluation, held_out)
    marks = marks_for(config, workspace) if config.generation.kind != "answers" else []
    wanted = frozenset(mark.content_id for mark in marks if mark.kind == "more_like_this")
    return Known(seeds, wanted, held_out=held_out)


def _seeds_identity(seeds: Sequence[SeedRow]) -> str:
    turns = ([turn.as_dict() for turn in seed.messages] for seed in seeds)
    return content_id([], json.dumps([*turns], ensure_ascii=False))


def _earlier_files(workspace: Workspace, name: str, identity: str) -> list[Path]:
    """Return the replies of other versions: what they hold is not asked for again."""
    versions = workspace.with_files(
        a for a in workspace.published("datasets", name) if a.fingerprint != identity
    )
    files = (version.path / REPLIES for version in versions)
    return [file for file in files if file.is_file()]


def teacher_of(generation: GenerationConfig, replies: Replies) -> Teacher:
    """Return the model that `generation` names, with what it has said so far."""
    replies.warn_of_lost(logger)
    key = os.environ.get(API_KEY_VARIABLE, "")
    return Teacher(
        Endpoint(generation.endpoint, generation.model, key),
        price_of(generation.price),
        Rates(generation.concurrency, generation.requests_per_minute),
        generation.budget,
        replies,
    )


def _judge(judge: JudgeConfig, key: str, generation: GenerationConfig, replies: Replies) -> Teacher:
    endpoint, rates = Endpoint(judge.endpoint, judge.model, key), Rates(generation.concurrency)
    return Teacher(endpoint, price_of(judge.price), rates, generation.budget, replies)


def rendered(written: Iterable[Candidate | Removed], renderer: Renderer) -> GeneratedRows:
    """Return the rows with their tokens, each once."""
    rows: dict[str, dict[str, Any]] = {}
    removed = []
    for row in written:
        if isinstance(row, Removed):
            removed.append(_removed_row(row))
            continue
        text = f"{row.input}\n{row.answer}"
        if row.row_id in rows:
            why = Rejected(ReasonCode.EXACT_DUPLICATE, "written twice", row.row_id)
            removed.append(_removed_row(Removed(row.row_id, row.source, why, text)))
            continue
        try:
            sample = renderer.sample([*row.messages, Message("assistant", row.answer)])
        except RenderError as error:
            why = Rejected(ReasonCode.UNRENDERABLE, f"cannot be rendered: {error}")
            removed.append(_removed_row(Removed(row.row_id, row.source, why, text)))
            continue
        rows[row.row_id] = _train_row(row) | {
            "input_ids": sample.input_ids,
            "loss_mask": sample.loss_mask,
            "num_tokens": len(sample.input_ids),
        }
    return GeneratedRows(list(rows.values()), removed)


def _train_row(row: Candidate) -> dict[str, Any]:
    turns = [*row.messages, Message("assistant", row.answer)]
    return {
        "row_id": row.row_id,
        "source": row.source,
        "synthetic": True,
        "messages": [{"role": turn.role, "content": turn.content} for turn in turns],
        "split_unit": row.row_id,
        "seed_row_id": row.seed.row_id if row.seed else None,
        "agreement": row.agreement,
        "rating": row.rating,
        "made_for": row.made_for or None,
    }


def _removed_row(gone: Removed) -> dict[str, Any]:
    return {
        "row_id": gone.row_id,
        "stage": "generate",
        "reason": gone.why.reason,
        "kept_row_id": gone.why.kept_row_id,
        "text": gone.text,
        "source": gone.source,
        "reason_code": gone.why.code,
    }


def reasons(removed: Sequence[dict[str, Any]]) -> Counter[str]:
    """Return how often rows were removed for which reason, without its details."""
    return Counter(row["reason"].partition(":")[0] for row in removed)


def _nothing_taken(
    rows: GeneratedRows, written: Written, teacher: Teacher, generation: GenerationConfig
) -> DataError:
    told = ", ".join(
        f"{why} ({counted(n, 'time')})" for why, n in reasons(rows.removed).most_common(3)
    )
    has_written = any(row["reason"] not in UNASKED for row in rows.removed)
    if teacher.stopped is not None and not has_written:
        return DataError(teacher.stopped)
    if not has_written and not written.num_unanswered:
        return DataError.of(
            "no input is left to ask about",
            where="generation.sources",
            got=told,
            remedy="name inputs that the dataset does not have",
        )
    return DataError.of(
        "no row that the model wrote can be used",
        where=f"{generation.model} at {generation.endpoint}",
        got=told or f"{written.num_unanswered:,} requests without a reply",
        remedy="take a larger model, or say it more clearly in generation.instruction",
    )


def _metrics(rows: GeneratedRows, written: Written, teacher: Teacher) -> dict[str, Any]:
    num_train, num_removed = len(rows.train), len(rows.removed)
    # Inputs that are known or held out were not asked about: nothing was written.
    num_written = num_train + sum(row["reason"] not in UNASKED for row in rows.removed)
    return {
        "num_train_rows": num_train,
        "num_test_rows": 0,
        "num_removed": num_removed,
        "num_unanswered": written.num_unanswered,
        "num_train_tokens": sum(row["num_tokens"] for row in rows.train),
        "taken_ratio": round(num_train / max(1, num_written), 4),
        **describe_requests(teacher),
    }


def describe_requests(teacher: Teacher) -> dict[str, Any]:
    """Return what a model was asked and what that cost, as the manifest keeps it."""
    replies = teacher.replies
    return {
        "num_requests": replies.num_requests,
        "num_lost_replies": replies.num_lost,
        "spent_tokens": replies.spent.tokens,
        # The judge may have a price as well.
        "spent_money": round(replies.spent.money, 6)
        if teacher.price or replies.spent.money
        else None,
    }


def _write(
    path: Path,
    rows: GeneratedRows,
    metrics: dict[str, Any],
    seeds: Sequence[SeedRow],
    config: TuneloopConfig,
) -> None:
    columns = pa.schema(
        [(name, pa.string()) for name in ("seed_row_id", "made_for")]
        + [(name, pa.float64()) for name in ("agreement", "rating")]
    )
    rows.write(path, columns)
    removed = reasons(rows.removed)
    made = [RowText(*(turn["content"] for turn in row["messages"][-2:])) for row in rows.train]
    people = [RowText(seed.messages[-2].text, seed.messages[-1].text) for seed in seeds]
    found = asdict(compare(people, made)) if len(people) > 1 else None
    generation = config.generation
    assert generation is not None, "rows were generated"
    card = {
        "name": f"{config.name}-generated",
        "kind": generation.kind,
        "model": generation.model,
        "synthetic_ratio": 1.0,
        **metrics,
        "removed": dict(removed),
        "made_for": dict(Counter(row["made_for"] for row in rows.train if row["made_for"])),
        "synthetic_rows": found,
    }
    (path / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False))
    page = _page(card, rows, generation)
    (path / "README.md").write_text("\n".join(page) + "\n", encoding="utf-8")


def _page(card: dict[str, Any], rows: GeneratedRows, generation: GenerationConfig) -> list[str]:
    """Return the card as a page of Markdown, by its lines."""
    money = f", {card['spent_money']:g} in money" if card["spent_money"] is not None else ""
    unanswered = f"- {card['num_unanswered']:,} without a reply: the next run asks for them"
    lost = (
        f"- {card['num_lost_replies']:,} replies were lost when a run was killed, or on their way: "
        "these requests may have been paid for twice, and count with the most they can have cost"
    )
    step = max(1, len(rows.train) // _SHOWN)
    return [
        f"# {card['name']}",
        "",
        f"{card['num_train_rows']:,} rows written by `{generation.model}` ({generation.kind}), "
        f"{card['taken_ratio']:.0%} of what it wrote. All of them are synthetic: read some before "
        "you train on them. They are never tested on.",
        "",
        f"{card['num_requests']:,} requests, {card['spent_tokens']:,} tokens{money}.",
        "",
        *([unanswered] if card["num_unanswered"] else []),
        *([lost] if card["num_lost_replies"] else []),
        *(f"- {count:,} rejected: {reason}" for reason, count in card["removed"].items()),
        "",
        *(f"- {count:,} rows for {part}" for part, count in card["made_for"].items()),
        *([""] if card["made_for"] else []),
        "Use them as a source of `prepare`: `{path: WORKSPACE/datasets/"
        f"{card['name']}/vN/train, format: messages}}`.",
        "",
        "## Beside the rows of people",
        "",
        *(synthetic_lines(card["synthetic_rows"]) if card["synthetic_rows"] else []),
        "",
        "## Some of them",
        "",
        *(line for row in rows.train[::step][:_SHOWN] for line in _shown(row)),
    ]


def _shown(row: dict[str, Any]) -> list[str]:
    asked, said = (shorten(turn["content"], _CHARACTERS) for turn in row["messages"][-2:])
    return ["```text", asked.replace("```", "'''"), f"→ {said}".replace("```", "'''"), "```", ""]
