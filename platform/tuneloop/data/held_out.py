"""Gathering what is held out, and removing the train rows that repeat it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
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
from tuneloop.data import stages
from tuneloop.data.decontamination import (
    HeldOut,
    Match,
    NgramIndex,
    TrainRows,
    matched_text,
    near_duplicates,
    near_pairs,
    ngram_index,
    overlapping,
    quoted,
    same_rows,
)
from tuneloop.data.dedup import Indices
from tuneloop.data.files import SourceFile
from tuneloop.data.outcome import Outcome
from tuneloop.data.readers import read_rows
from tuneloop.data.rendering import SAID_IN, Rendering
from tuneloop.data.signatures import as_matrix, compared_text
from tuneloop.data.validation import BadRow, refuse_bad_rows

_NUM_EXAMPLES = 5


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
class _Comparison:
    """What is compared with what: train rows with held-out rows, and where the texts are."""

    held_out: Sequence[HeldOut]
    indices: Sequence[NgramIndex | None]
    rows: Any
    rendering: Rendering


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
    outcome: Outcome, rows: Any, rendering: Rendering, evaluations: Sequence[HeldOut]
) -> Contamination:
    """Remove the train rows that repeat what is held out, and return what was found.

    Args:
        outcome: With a split; the rows that go are noted in it.
        rows: The Ray dataset of tokenized rows.
        rendering: Of those.
        evaluations: Of `read_evaluations`.
    """
    assert outcome.split is not None
    data = rendering.data
    places = np.sort(outcome.split.train)
    table = outcome.table.select(["key", "exact_key", "prompt_key", "bands"]).take(places)
    keys = table["key"].to_numpy()
    train = TrainRows(
        keys,
        table["exact_key"].to_numpy(),
        table["prompt_key"].to_numpy(),
        as_matrix(table["bands"]),
    )
    held_out = [*_splits(outcome, rows, rendering), *evaluations]
    matches: dict[int, Match] = {}
    for origin, item in enumerate(held_out):
        if item.is_split:
            continue
        for row, (other, kind) in same_rows(train, item).items():
            matches.setdefault(row, Match(row, origin, other, kind, 1.0))
        pairs = near_pairs(train, item, data)
        pairs = pairs[~np.isin(pairs[:, 0], list(matches))]
        if len(pairs):
            wanted = np.unique(pairs[:, 0])
            by_key = stages.fetch_shingles(
                rows, keys[wanted], rendering, data.dedup.on, data.dedup.ngram_words
            )
            sets = {int(row): by_key[int(keys[row])] for row in wanted}
            for row, (other, value) in near_duplicates(pairs, sets, item, data).items():
                matches.setdefault(row, Match(row, origin, other, "near-duplicate", value))
    indices = [ngram_index(item, data.decontamination.ngram_words) for item in held_out]
    comparison = _Comparison(held_out, indices, rows, rendering)
    for match in _ngram_matches(train, comparison):
        matches.setdefault(match.row, match)
    _note(outcome, places, [match for _, match in sorted(matches.items())], comparison)
    return Contamination(
        [
            _summary(item, index, [m for m in matches.values() if m.origin == origin])
            | {"examples": _examples(outcome, places, matches, origin)}
            for origin, (item, index) in enumerate(zip(held_out, indices, strict=True))
        ],
        places[sorted(matches)],
    )


def _splits(outcome: Outcome, rows: Any, rendering: Rendering) -> list[HeldOut]:
    assert outcome.split is not None
    found = []
    for name in ("test", "validation"):
        places = getattr(outcome.split, name)
        if not len(places):
            continue
        keys = outcome.table["key"].to_numpy()[places]
        by_key = stages.fetch_texts(rows, keys, rendering)
        texts, prompts, _ = zip(*(by_key[int(key)] for key in keys), strict=True)
        labels = [f"{name} row {row_id}" for row_id in outcome.row_ids.take(places).to_pylist()]
        found.append(HeldOut(name, labels, list(texts), list(prompts), is_split=True))
    return found


def _ngram_matches(train: TrainRows, comparison: _Comparison) -> list[Match]:
    """Return the train rows that share enough n-grams with a held-out row, by origin."""
    import ray

    look_up = functools.partial(
        _common_ngrams,
        keys=train.keys,
        indices=ray.put(list(comparison.indices)),
        rendering=comparison.rendering,
    )
    columns = comparison.rows.select_columns(["key", *SAID_IN])
    found: dict[int, list[tuple[int, Any, int]]] = {}
    for batch in columns.map_batches(look_up, batch_format="pyarrow").iter_batches(
        batch_size=None, batch_format="pyarrow"
    ):
        for item in batch.to_pylist():
            grams = np.array(item["grams"], dtype=np.int64)
            found.setdefault(item["origin"], []).append((item["key"], grams, item["size"]))
    matches = []
    threshold = comparison.rendering.data.decontamination.overlap_threshold
    for origin, entries in sorted(found.items()):
        entries.sort(key=lambda entry: entry[0])
        index = comparison.indices[origin]
        assert index is not None
        places = np.searchsorted(train.keys, [key for key, _, _ in entries])
        shared, sizes = [item for _, item, _ in entries], [size for _, _, size in entries]
        for row, other, overlap in overlapping(index, shared, sizes, threshold):
            matches.append(Match(int(places[row]), origin, other, "n-grams", overlap))
    return matches


def _note(
    outcome: Outcome, places: Indices, matches: Sequence[Match], comparison: _Comparison
) -> None:
    """Remove the rows of the matches, each with the held-out row and the text they share."""
    keys = outcome.table["key"].to_numpy()
    shared = [places[match.row] for match in matches if match.kind == "n-grams"]
    texts = (
        stages.fetch_texts(comparison.rows, keys[shared], comparison.rendering) if shared else {}
    )
    for match in matches:
        item, place = comparison.held_out[match.origin], int(places[match.row])
        label, theirs = item.labels[match.held_out], item.texts[match.held_out]
        if match.kind == "n-grams":
            index = comparison.indices[match.origin]
            assert index is not None
            passage = matched_text(texts[int(keys[place])][0], [theirs], index.ngram_words)
            reason = (
                f"{match.similarity:.0%} of the {index.ngram_words}-word n-grams are those of "
                f"{label}: {passage}"
            )
        else:
            linked = "of" if match.kind == "near-duplicate" else "as"
            said = quoted(item.prompts[match.held_out] or theirs)
            reason = f"{match.kind} {linked} {label}: {said}"
        kept = label.rpartition(" ")[2] if item.is_split else None
        outcome.remove(place, "decontamination", reason, kept, match.similarity)


def _summary(item: HeldOut, index: NgramIndex | None, matches: Sequence[Match]) -> dict[str, Any]:
    return {
        "name": item.name,
        "num_rows": len(item.labels),
        "num_contaminated": len({match.held_out for match in matches}),
        "contamination_ratio": round(
            len({match.held_out for match in matches}) / max(1, len(item.labels)), 4
        ),
        "num_removed": len(matches),
        "ngram_words": None if index is None else index.ngram_words,
        "kinds": dict(Counter(match.kind for match in matches).most_common()),
    }


def _examples(
    outcome: Outcome, places: Indices, matches: dict[int, Match], origin: int
) -> list[dict[str, Any]]:
    source = outcome.table["source"]
    chosen = [row for row in sorted(matches) if matches[row].origin == origin][:_NUM_EXAMPLES]
    return [
        {
            "removed": source[int(places[row])].as_py(),
            "reason": outcome.reason[int(places[row])],
            "similarity": round(matches[row].similarity, 4),
        }
        for row in chosen
    ]


def _common_ngrams(table: Any, keys: Any, indices: Any, rendering: Rendering) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc
    import ray

    chosen = table.filter(pc.is_in(table["key"], value_set=pa.array(keys, pa.int64())))
    texts = [
        compared_text(*rendering.own_messages(row), "both")
        for row in chosen.select(SAID_IN).to_pylist()
    ]
    own_keys = chosen["key"].to_pylist()
    found = [
        {"key": own_keys[row], "origin": origin, "grams": grams, "size": size}
        for origin, index in enumerate(ray.get(indices))
        if index is not None and texts
        for row, (grams, size) in index.common(texts).items()
    ]
    schema = pa.schema(
        [
            ("key", pa.int64()),
            ("origin", pa.int64()),
            ("grams", pa.list_(pa.int64())),
            ("size", pa.int64()),
        ]
    )
    return pa.Table.from_pylist(found, schema=schema)
