"""Removing the train rows that repeat what is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ray.data import Dataset

from tuneloop.config import DataConfig
from tuneloop.data import ray_rows
from tuneloop.data.decontamination.distributed import find_overlaps
from tuneloop.data.decontamination.held_out import EvaluationRows
from tuneloop.data.decontamination.matching import (
    FoundRows,
    HeldOutSet,
    Match,
    MatchKind,
    TrainRows,
    near_duplicates,
    near_pairs,
    same_rows,
)
from tuneloop.data.decontamination.ngrams import quoted
from tuneloop.data.hashing.columns import Indices, as_matrix
from tuneloop.data.hashing.content import Content
from tuneloop.data.ledger import Ledger, Removal
from tuneloop.data.schema import Reason, ReasonCode, Stage

_NUM_EXAMPLES = 5
_CODES = {
    MatchKind.SAME_TEXT: ReasonCode.SAME_TEXT,
    MatchKind.SAME_PROMPT: ReasonCode.SAME_PROMPT,
    MatchKind.NEAR_DUPLICATE: ReasonCode.NEAR_DUPLICATE,
    MatchKind.NGRAMS: ReasonCode.SHARED_NGRAMS,
}


@dataclass(frozen=True)
class Example:
    """A removed train row, as the card shows it."""

    removed: str
    reason: str
    similarity: float


@dataclass(frozen=True)
class SetContamination:
    """What was found for one held-out set, as the card shows it.

    Args:
        name: `test`, `validation`, or the path of an evaluation.
        num_rows: Rows of the set.
        num_contaminated: How many of them a train row repeated.
        contamination_ratio: Their share, 0 to 1.
        num_removed: Train rows removed for it, and not for a set before it.
        ngram_words: Words of an n-gram; None if the set has no words.
        kinds: Removed rows by `MatchKind`, the most frequent first.
        examples: The first few removed rows.
    """

    name: str
    num_rows: int
    num_contaminated: int
    contamination_ratio: float
    num_removed: int
    ngram_words: int | None
    kinds: dict[str, int]
    examples: list[Example]


@dataclass(frozen=True)
class Contamination:
    """The train rows that repeated what is held out.

    Args:
        origins: What was found for each held-out set.
        removed: Indices of the removed rows among all rows.
    """

    origins: list[SetContamination]
    removed: Indices


def decontaminate(
    ledger: Ledger,
    rows: Dataset,
    content: Content,
    data: DataConfig,
    evaluations: Sequence[EvaluationRows],
) -> Contamination:
    """Remove the train rows that repeat what is held out, and return what was found.

    Args:
        ledger: With a split; the removed rows are noted in it.
        rows: Dataset of tokenized rows.
        content: How to read what they say.
        data: Its `decontamination` and `dedup` say what is compared, and what is enough.
        evaluations: Result of `read_evaluations`.
    """
    assert ledger.split is not None
    keys = ledger.table["key"].to_numpy()
    held_out = [
        HeldOutSet(name, np.sort(keys[rows_of_split]))
        for name in ("test", "validation")
        if len(rows_of_split := getattr(ledger.split, name))
    ]
    held_out += [HeldOutSet(item.name, np.arange(len(item.labels)), item) for item in evaluations]
    matches: dict[int, Match] = {}
    # A train row is removed once, for the first that it repeats; all that it repeats were in it.
    repeated: list[set[int]] = [set() for _ in held_out]
    for number, of_set in enumerate(held_out):
        if of_set.evaluation is not None:
            found = _same_or_near(ledger, rows, content, data, of_set.evaluation)
            for row, own in found.matches.items():
                key = int(keys[row])
                matches.setdefault(key, Match(key, number, *own))
            repeated[number] = found.repeated
    train_keys = keys[np.sort(ledger.split.train)]
    overlaps = find_overlaps(train_keys, held_out, rows, content, data.decontamination)
    ngram_words = overlaps.ngram_words
    for match in overlaps.matches:
        matches.setdefault(match.key, match)
    for number, overlapped in enumerate(overlaps.repeated):
        repeated[number] |= set(overlapped.tolist())
    ordered = [match for _, match in sorted(matches.items())]
    removed = np.searchsorted(keys, [match.key for match in ordered])
    for index, match in zip(removed.tolist(), ordered, strict=True):
        of_set, words = held_out[match.set_index], ngram_words[match.set_index]
        _remove(ledger, index, match, of_set, words)
    return Contamination(
        [
            _summary(
                of_set,
                ngram_words[number],
                [match for match in ordered if match.set_index == number],
                len(repeated[number]),
                ledger,
            )
            for number, of_set in enumerate(held_out)
        ],
        removed,
    )


def _same_or_near(
    ledger: Ledger, rows: Dataset, content: Content, data: DataConfig, evaluation: EvaluationRows
) -> FoundRows:
    """Return the train rows with the text or prompt of an evaluation's row, or nearly the same.

    They are named by their indices among all rows.
    """
    assert ledger.split is not None
    columns = ledger.table.select(["key", "exact_key", "prompt_key", "bands"])
    places = np.sort(ledger.split.train)
    table = columns.take(places)
    train = TrainRows(
        table["key"].to_numpy(),
        table["exact_key"].to_numpy(),
        table["prompt_key"].to_numpy(),
        as_matrix(table["bands"]),
    )
    same = same_rows(train, evaluation)
    near = FoundRows({}, set())
    pairs = near_pairs(train, evaluation, data)
    if len(pairs):
        candidates = np.unique(pairs[:, 0])
        by_key = ray_rows.fetch_shingles(
            rows, train.keys[candidates], content, data.dedup.on, data.dedup.ngram_words
        )
        sets = {int(row): by_key[int(train.keys[row])] for row in candidates}
        near = near_duplicates(pairs, sets, evaluation, data)
    matches = {int(places[row]): match for row, match in (near.matches | same.matches).items()}
    return FoundRows(matches, same.repeated | near.repeated)


def _remove(
    ledger: Ledger, index: int, match: Match, of_set: HeldOutSet, ngram_words: int | None
) -> None:
    """Remove a contaminated row, with the held-out row and what they share."""
    evaluation, kept = of_set.evaluation, None
    if evaluation is None:
        other = int(np.searchsorted(ledger.table["key"].to_numpy(), match.held_out))
        kept = ledger.row_ids[other].as_py()
        label, all_rows = f"{of_set.name} row {kept}", f"{of_set.name} rows"
    else:
        label, all_rows = evaluation.labels[match.held_out], of_set.name
    if match.kind is MatchKind.NGRAMS:
        linked = f"{ngram_words}-word n-grams are those of"
        text = f"{match.similarity:.0%} of the {linked} {label}: {match.passage}"
    else:
        assert evaluation is not None
        linked = f"{match.kind} {'of' if match.kind is MatchKind.NEAR_DUPLICATE else 'as'}"
        shared = evaluation.prompts[match.held_out] or evaluation.texts[match.held_out]
        text = f"{linked} {label}: {quoted(shared)}"
    reason = Reason(_CODES[match.kind], text, f"{linked} {all_rows}")
    ledger.remove(index, Removal(Stage.DECONTAMINATION, reason, kept, match.similarity))


def _summary(
    of_set: HeldOutSet,
    ngram_words: int | None,
    matches: Sequence[Match],
    num_contaminated: int,
    ledger: Ledger,
) -> SetContamination:
    shown = matches[:_NUM_EXAMPLES]
    indices = np.searchsorted(ledger.table["key"].to_numpy(), [match.key for match in shown])
    return SetContamination(
        of_set.name,
        len(of_set.keys),
        num_contaminated,
        round(num_contaminated / max(1, len(of_set.keys)), 4),
        len(matches),
        ngram_words,
        {str(kind): count for kind, count in Counter(m.kind for m in matches).most_common()},
        [
            Example(
                ledger.table["source"][index].as_py(),
                ledger.removals[index].reason.text,
                round(match.similarity, 4),
            )
            for index, match in zip(indices.tolist(), shown, strict=True)
        ],
    )
