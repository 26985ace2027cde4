"""Gathering what is held out, and removing the train rows that repeat it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuneloop.config import (
    FiltersConfig,
    MixedSourceConfig,
    SplitConfig,
    TaskConfig,
    TuneloopConfig,
)
from tuneloop.data import ray_rows
from tuneloop.data.decontamination.distributed import Origin, find_overlaps
from tuneloop.data.decontamination.matching import (
    HeldOut,
    TrainRows,
    near_duplicates,
    near_pairs,
    same_rows,
)
from tuneloop.data.decontamination.ngrams import quoted
from tuneloop.data.dedup.minhash import Indices
from tuneloop.data.hashing.signatures import as_matrix, compared_text
from tuneloop.data.ledger import Ledger, Removal
from tuneloop.data.schema import Reason, ReasonCode, Stage
from tuneloop.data.sources.bad_rows import BadRow, refuse_bad_rows
from tuneloop.data.sources.files import SourceFile
from tuneloop.data.sources.readers import read_rows
from tuneloop.data.tokenize.rendering import Rendering

_NUM_EXAMPLES = 5
_CODES = {
    "same text": ReasonCode.SAME_TEXT,
    "same prompt": ReasonCode.SAME_PROMPT,
    "near-duplicate": ReasonCode.NEAR_DUPLICATE,
    "n-grams": ReasonCode.SHARED_NGRAMS,
}


@dataclass(frozen=True)
class Contamination:
    """What was found for each held-out origin, as the card tells it.

    Args:
        origins: For each: `name`, `num_rows`, `num_contaminated` (of those rows), `ngram_words`,
            `num_removed` (train rows), `kinds` and `examples`.
        removed: Indices of the removed rows among all rows.
    """

    origins: list[dict[str, Any]]
    removed: Indices


@dataclass(frozen=True)
class _Match:
    """A contaminated train row.

    Args:
        key: Of the train row.
        origin: Number of the origin of the held-out row.
        held_out: What the held-out row is known by there.
        kind: `same text`, `same prompt`, `near-duplicate` or `n-grams`.
        similarity: Jaccard similarity, or the share of n-grams.
        passage: Of n-grams: the text that both rows have.
    """

    key: int
    origin: int
    held_out: int
    kind: str
    similarity: float
    passage: str = ""


def read_evaluations(files: Sequence[SourceFile], config: TuneloopConfig) -> list[HeldOut]:
    """Return the rows of the evaluation files, one origin for each file.

    Raises:
        DataError: A file is empty, or more than `data.max_bad_rows_ratio` of its rows cannot be
            read; told with file and line.
    """
    sources = [
        MixedSourceConfig(**source.model_dump()) for source in config.data.decontamination.sources
    ]
    found = []
    for position, file in enumerate(files):
        is_text = sources[file.source].format == "text"
        # An evaluation need not be of this task: its labels and fields are its own.
        task = TaskConfig(type="language_modeling" if is_text else "generation")
        data = config.data.model_copy(
            update={"sources": sources, "split": SplitConfig(), "filters": FiltersConfig()}
        )
        reading = config.model_copy(update={"task": task, "data": data})
        labels: list[str] = []
        texts: list[str] = []
        prompts: list[str] = []
        compared: list[str] = []
        bad: list[BadRow] = []
        for row in read_rows(file, position, reading):
            if row["problem"]:
                bad.append((row["source"], row["problem"]))
                continue
            said = row["messages"], row["text"]
            labels.append(row["source"])
            texts.append(compared_text(*said, "both"))
            prompts.append("" if is_text else compared_text(*said, "prompt"))
            compared.append(compared_text(*said, data.dedup.on))
        refuse_bad_rows(bad, len(bad) + len(labels), data)
        found.append(HeldOut(file.name, labels, texts, prompts, compared))
    return found


def decontaminate(
    ledger: Ledger, rows: Any, rendering: Rendering, evaluations: Sequence[HeldOut]
) -> Contamination:
    """Remove the train rows that repeat what is held out, and return what was found.

    Args:
        ledger: With a split; the rows that go are noted in it.
        rows: The Ray dataset of tokenized rows.
        rendering: Of those.
        evaluations: Of `read_evaluations`.
    """
    assert ledger.split is not None
    places = np.sort(ledger.split.train)
    keys = ledger.table["key"].to_numpy()
    origins = [
        Origin(name, np.sort(keys[split]))
        for name in ("test", "validation")
        if len(split := getattr(ledger.split, name))
    ]
    origins += [Origin(item.name, np.arange(len(item.labels)), item) for item in evaluations]
    matches: dict[int, _Match] = {}
    for match in _repeated(ledger, rows, rendering, origins):
        matches.setdefault(match.key, match)
    words, overlaps = find_overlaps(keys[places], origins, rows, rendering)
    for found in overlaps:
        match = _Match(
            found.key, found.origin, found.held_out, "n-grams", found.share, found.passage
        )
        matches.setdefault(match.key, match)
    ordered = [match for _, match in sorted(matches.items())]
    removed = np.searchsorted(keys, [match.key for match in ordered])
    for place, match in zip(removed.tolist(), ordered, strict=True):
        _note(ledger, place, match, origins[match.origin], words[match.origin])
    return Contamination(
        [
            _summary(item, words[number], [m for m in ordered if m.origin == number])
            | {"examples": _examples(ledger, removed, ordered, number)}
            for number, item in enumerate(origins)
        ],
        removed,
    )


def _repeated(
    ledger: Ledger, rows: Any, rendering: Rendering, origins: Sequence[Origin]
) -> Iterator[_Match]:
    """Yield the train rows that say or ask what a row of an evaluation does, or nearly the same."""
    assert ledger.split is not None
    if all(origin.evaluation is None for origin in origins):
        return
    data = rendering.data
    columns = ledger.table.select(["key", "exact_key", "prompt_key", "bands"])
    table = columns.take(np.sort(ledger.split.train))
    train = TrainRows(
        table["key"].to_numpy(),
        table["exact_key"].to_numpy(),
        table["prompt_key"].to_numpy(),
        as_matrix(table["bands"]),
    )
    known: set[int] = set()
    for number, origin in enumerate(origins):
        if (item := origin.evaluation) is None:
            continue
        for row, (other, kind) in same_rows(train, item).items():
            known.add(row)
            yield _Match(int(train.keys[row]), number, other, kind, 1.0)
        pairs = near_pairs(train, item, data)
        pairs = pairs[~np.isin(pairs[:, 0], list(known))]
        if not len(pairs):
            continue
        wanted = np.unique(pairs[:, 0])
        by_key = ray_rows.fetch_shingles(
            rows, train.keys[wanted], rendering, data.dedup.on, data.dedup.ngram_words
        )
        sets = {int(row): by_key[int(train.keys[row])] for row in wanted}
        for row, (other, value) in near_duplicates(pairs, sets, item, data).items():
            known.add(row)
            yield _Match(int(train.keys[row]), number, other, "near-duplicate", value)


def _note(
    ledger: Ledger, place: int, match: _Match, origin: Origin, ngram_words: int | None
) -> None:
    """Remove the row of a match, with the held-out row and what they share."""
    item, kept = origin.evaluation, None
    if item is None:
        other = int(np.searchsorted(ledger.table["key"].to_numpy(), match.held_out))
        kept = ledger.row_ids[other].as_py()
        label, everyone = f"{origin.name} row {kept}", f"{origin.name} rows"
    else:
        label, everyone = item.labels[match.held_out], origin.name
    if match.kind == "n-grams":
        linked = f"{ngram_words}-word n-grams are those of"
        text = f"{match.similarity:.0%} of the {linked} {label}: {match.passage}"
    else:
        assert item is not None
        linked = f"{match.kind} {'of' if match.kind == 'near-duplicate' else 'as'}"
        said = quoted(item.prompts[match.held_out] or item.texts[match.held_out])
        text = f"{linked} {label}: {said}"
    reason = Reason(_CODES[match.kind], text, f"{linked} {everyone}")
    ledger.remove(place, Removal(Stage.DECONTAMINATION, reason, kept, match.similarity))


def _summary(origin: Origin, ngram_words: int | None, matches: Sequence[_Match]) -> dict[str, Any]:
    num_contaminated = len({match.held_out for match in matches})
    return {
        "name": origin.name,
        "num_rows": len(origin.keys),
        "num_contaminated": num_contaminated,
        "contamination_ratio": round(num_contaminated / max(1, len(origin.keys)), 4),
        "num_removed": len(matches),
        "ngram_words": ngram_words,
        "kinds": dict(Counter(match.kind for match in matches).most_common()),
    }


def _examples(
    ledger: Ledger, removed: Indices, matches: Sequence[_Match], origin: int
) -> list[dict[str, Any]]:
    chosen = [number for number, match in enumerate(matches) if match.origin == origin]
    return [
        {
            "removed": ledger.table["source"][int(removed[number])].as_py(),
            "reason": ledger.removals[int(removed[number])].reason.text,
            "similarity": round(matches[number].similarity, 4),
        }
        for number in chosen[:_NUM_EXAMPLES]
    ]
