"""What a data set is made of: its sources, and how varied its wording is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import regex
from ray.data import Dataset

from tuneloop.config import TuneloopConfig
from tuneloop.data import ray_rows
from tuneloop.data.hashing.columns import Indices
from tuneloop.data.hashing.content import Content, texts_of_rows
from tuneloop.data.ledger import Ledger
from tuneloop.data.schema import Side, Stage
from tuneloop.data.synthetic_rows import MOST_ROWS, RowText, SyntheticRows, compare
from tuneloop.spelling import words_by_frequency

# Rows whose wording is looked at: the first of the shuffled train split.
_MOST_ROWS = 5_000
# Of dropped rows, for each reason.
_NUM_EXAMPLES, _CHARACTERS_SHOWN = 3, 500
_SHOWN = 20
_NUM_STOP_WORDS = 300
# Marks are parts of letters: the vowels of Hindi and Thai are such.
_WORD = regex.compile(r"[\p{L}\p{M}]+(?:['’-][\p{L}\p{M}]+)*")
# "Please write …" and "Can you explain …" lead with `write` and `explain`.
_POLITE = re.compile(
    r"^(?:(?:please|kindly|now|then|next|first|ok|okay|hi|hello|hey)\b[,!]?\s*|"
    r"(?:can|could|would|will) you (?:please )?|i(?: want| need| would like|['’]d like) you to |"
    r"(?:your task is|you have|i want|i need) to )+",
    re.IGNORECASE,
)


def describe_sources(ledger: Ledger, config: TuneloopConfig) -> list[dict[str, Any]]:
    """Return for each source how many rows were found, removed and put on which side.

    Shares are of the train rows, and of their tokens; `synthetic_ratio` is that of its train rows.
    """
    sources = config.data.sources
    descriptions = [
        {"path": source.path, "task": source.task, "weight": source.weight} for source in sources
    ]
    return _describe_parts(ledger, ledger.source, descriptions)


def describe_tasks(ledger: Ledger, config: TuneloopConfig) -> list[dict[str, Any]]:
    """Return the same for each task of a mixture; nothing where there is none."""
    tasks = config.task.tasks.items()
    descriptions = [
        {"name": name, "type": task.type, "weight": task.weight} for name, task in tasks
    ]
    return _describe_parts(ledger, ledger.task_ids, descriptions)


def _describe_parts(
    ledger: Ledger, part: Indices, descriptions: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the description of each part of the rows, and how many of its rows went where.

    Args:
        part: Number of each row's part. Shape (N,).
    """
    tokens = ledger.table["num_tokens"].to_numpy()
    synthetic = ledger.table["synthetic"].to_numpy(zero_copy_only=False)
    is_train = ledger.is_on(Side.TRAIN)
    unreadable = ledger.removed_by(Stage.READ)
    described = []
    for number, first in enumerate(descriptions):
        own = part == number
        train = own & is_train
        described.append(
            {
                **first,
                "num_found": int(own.sum()),
                "num_unreadable": int(own[unreadable].sum()),
                "num_removed": int((own & ledger.is_on(Side.REMOVED)).sum()),
                "num_train": int(train.sum()),
                "num_validation": int((own & ledger.is_on(Side.VALIDATION)).sum()),
                "num_test": int((own & ledger.is_on(Side.TEST)).sum()),
                "train_row_share": _share(train.sum(), is_train.sum()),
                "train_token_share": _share(tokens[train].sum(), tokens[is_train].sum()),
                "synthetic_ratio": _share(synthetic[train].sum(), train.sum()),
            }
        )
    return described


@dataclass(frozen=True)
class FilterEffects:
    """What the filters did.

    Args:
        changes: What was mended, and in how many rows.
        num_dropped: Rows dropped for each reason.
        examples: `source`, `reason` and `text` of the first few for each.
    """

    changes: dict[str, int]
    num_dropped: dict[str, int]
    examples: list[dict[str, str]]


@dataclass(frozen=True)
class Wording:
    """How varied train rows are.

    Args:
        num_rows: Rows that were looked at.
        lead_words: The most frequent first words of prompts, and in how many rows.
        num_lead_words: How many different ones there are.
        effective_lead_words: How many equally frequent ones would be as spread.
        terms: Words that are not among the 300 most frequent of English, the most frequent ones,
            and in which share of the rows each is.
        num_terms: How many different ones there are.
    """

    num_rows: int
    lead_words: dict[str, int]
    num_lead_words: int
    effective_lead_words: float
    terms: dict[str, float]
    num_terms: int


def describe_filters(ledger: Ledger, rows: Dataset, content: Content) -> FilterEffects:
    """Return what filters changed, and the first few rows that they dropped for each reason."""
    changed = ledger.table["changes"].filter(pc.not_equal(ledger.table["changes"], ""))
    changes = Counter(name for names in changed.to_pylist() for name in names.split(", "))
    by_reason: dict[str, list[int]] = {}
    for index in ledger.removed_by(Stage.FILTER).tolist():
        by_reason.setdefault(ledger.removals[index].reason.summary, []).append(index)
    chosen = [index for indices in by_reason.values() for index in indices[:_NUM_EXAMPLES]]
    keys = ledger.table["key"].to_numpy()
    texts = ray_rows.fetch_texts(rows, keys[chosen], content) if chosen else {}
    return FilterEffects(
        changes=dict(changes.most_common()),
        num_dropped={reason: len(indices) for reason, indices in by_reason.items()},
        examples=[
            {
                "source": ledger.table["source"][index].as_py(),
                "reason": ledger.removals[index].reason.text,
                "text": texts[int(keys[index])].text[:_CHARACTERS_SHOWN],
            }
            for index in chosen
        ],
    )


def describe_wording(ledger: Ledger, rows: Dataset, content: Content) -> Wording:
    """Return how varied the train rows are, judged by the first 5,000 of the shuffled split.

    Args:
        ledger: With the final sides.
        rows: The Ray dataset of tokenized rows.
        content: How to read what they say.
    """
    train = np.flatnonzero(ledger.is_on(Side.TRAIN))
    train = train[np.argsort(ledger.rank[train], kind="stable")][:_MOST_ROWS]
    keys = np.sort(ledger.table["key"].to_numpy()[train])
    leads: Counter[str] = Counter()
    terms: Counter[str] = Counter()
    # The texts stay where they are: 5,000 long ones are more than the driver should hold.
    for batch in ray_rows.map_contents(rows, partial(_wording, keys=keys, content=content)):
        leads.update(filter(None, batch["lead"].to_pylist()))
        for words in batch["words"].to_pylist():
            terms.update(words)
    for word in _stop_words():
        del terms[word]
    return Wording(
        num_rows=len(keys),
        lead_words=_most_common(leads),
        num_lead_words=len(leads),
        effective_lead_words=round(effective_number(list(leads.values())), 1),
        terms={term: _share(n, len(keys)) for term, n in _most_common(terms).items()},
        num_terms=len(terms),
    )


def _wording(table: pa.Table, keys: Indices, content: Content) -> pa.Table:
    """Return the `lead` word and the distinct `words` of the rows whose key is wanted."""
    texts = texts_of_rows(table, keys, content)
    words = [sorted(long_words(text)) for text in texts["text"].to_pylist()]
    leads = [lead_word(prompt) for prompt in texts["prompt"].to_pylist()]
    return pa.table({"lead": leads, "words": pa.array(words, pa.list_(pa.string()))})


def describe_synthetic(ledger: Ledger, rows: Dataset, content: Content) -> SyntheticRows | None:
    """Return how the synthetic train rows differ from people's; None without rows of both kinds."""
    is_synthetic = ledger.table["synthetic"].to_numpy(zero_copy_only=False)
    train = np.flatnonzero(ledger.is_on(Side.TRAIN))
    train = train[np.argsort(ledger.rank[train], kind="stable")]
    kinds = [train[is_synthetic[train] == kind][:MOST_ROWS] for kind in (False, True)]
    if min(map(len, kinds)) < 2:
        return None
    keys = ledger.table["key"].to_numpy()
    wanted = [keys[kind] for kind in kinds]
    texts = ray_rows.fetch_texts(rows, np.sort(np.concatenate(wanted)), content)
    found = [[texts[int(key)] for key in kind] for kind in wanted]
    people, synthetic = ([RowText(t.prompt, t.answer or t.text) for t in kind] for kind in found)
    return compare(people, synthetic)


def cluster_sizes(cluster: Indices) -> dict[str, int]:
    """Return how many clusters there are of each size, in classes: `1`, `2`, `3 to 5`, …

    Args:
        cluster: Number of each row's cluster. Shape (N,).
    """
    classes = ((1, 1), (2, 2), (3, 5), (6, 10), (11, 100), (101, None))
    sizes = np.bincount(cluster) if len(cluster) else np.zeros(0, dtype=np.int64)
    counts = {}
    for low, high in classes:
        count = int(((sizes >= low) & (sizes <= (high or sizes.max(initial=0)))).sum())
        name = f"{low}" if low == high else f"{low} to {high}" if high else f"more than {low - 1}"
        if count:
            counts[name] = count
    return counts


def lead_word(prompt: str) -> str:
    """Return the first word of a prompt in lower case, polite openings left out; empty if none."""
    text = prompt.lstrip()
    found = _WORD.search(_POLITE.sub("", text)) or _WORD.search(text)
    return str(found.group()).lower() if found else ""


def long_words(text: str) -> set[str]:
    """Return the distinct words of three or more letters, in lower case."""
    return {str(word).lower() for word in _WORD.findall(text) if len(word) > 2}


def effective_number(counts: Sequence[int]) -> float:
    """Return how many equally frequent kinds would be as spread: the exponential of the entropy.

    Source: Hill 1973, Diversity and evenness, doi:10.2307/1934352 (the number of order 1).
    """
    if not counts:
        return 0.0
    share = np.array(counts) / np.sum(counts)
    return float(np.exp(-np.sum(share * np.log(share))))


@cache
def _stop_words() -> frozenset[str]:
    return frozenset(words_by_frequency()[:_NUM_STOP_WORDS])


def _most_common(counts: Counter[str]) -> dict[str, int]:
    """Return the most frequent ones, ties by name."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return dict(ranked[:_SHOWN])


def _share(part: float, whole: float) -> float:
    return round(float(part) / max(1, float(whole)), 4)
