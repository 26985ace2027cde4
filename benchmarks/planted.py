"""A corpus of real text with planted duplicates, and the exact truth about them.

The text is what the machine has, 40 MB of it: the standard library's sources, then /usr/share/doc
where it exists. It is cut into documents of 40 to 4,000 words. When the text is used up it is cut
anew elsewhere, and every fourth word gets the round's mark, so that no five words in a row are
those of another round. A document that shares three tenths of its word 5-grams or more with the
ones before it in its round is left out: nothing that was not planted comes near the threshold.

Planted are clusters of a document with one to three others: copies that differ in case and white
space, variants with words replaced, inserted or left out, or with a passage replaced, to
similarities between 0.8 and 0.98, and decoys to 0.5 to 0.79. The truth is computed for all pairs of
a cluster, over Python sets of the words themselves.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

THRESHOLD, NGRAM = 0.8, 5
SHARES = {"exact": 0.05, "near": 0.08, "decoy": 0.04}  # of the documents become a cluster's first
_WORD = re.compile(r"\w+")
_MARK_EVERY, _SHARED_AT_MOST = 4, 0.3
_SHORTEST, _LONGEST = 40, 4000
_SOURCE_BYTES = 40_000_000


def ngrams(text: str) -> set[tuple[str, ...]]:
    """Return the word 5-grams of a text."""
    words = _WORD.findall(text.lower())
    return {tuple(words[i : i + NGRAM]) for i in range(max(1, len(words) - NGRAM + 1))}


def make_corpus(folder: Path, megabytes: int, file_megabytes: int) -> dict[str, Any]:
    """Write `*.parquet` (`id`, `text`) and `truth.json` into a folder, unless they are there.

    Returns:
        What `truth.json` has: `bytes`, `documents`, `mean_words` and `pairs`, each
        [id, id, similarity, kind].
    """
    truth_file = folder / "truth.json"
    if truth_file.exists():
        return json.loads(truth_file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    chooser = random.Random(megabytes)
    texts: list[str] = []
    clusters: list[tuple[str, list[int]]] = []
    size = 0
    for original in originals(chooser):
        kind = chooser.choices([*SHARES, ""], [*SHARES.values(), 1 - sum(SHARES.values())])[0]
        members = [original, *(variants(original, kind, chooser) if kind else [])]
        if kind:
            clusters.append((kind, list(range(len(texts), len(texts) + len(members)))))
        texts += members
        size += sum(len(member.encode()) for member in members)
        if size >= megabytes * 1_000_000:
            break
    pairs = [
        (a, b, similarity, kind)
        for kind, members in clusters
        for a, b, similarity in _similarities(members, texts)
    ]
    order = list(range(len(texts)))
    chooser.shuffle(order)
    place = {number: position for position, number in enumerate(order)}
    count = max(2, -(-size // (file_megabytes << 20)))
    for number in range(count):
        ids = range(number * len(order) // count, (number + 1) * len(order) // count)
        table = pa.table({"id": list(ids), "text": [texts[order[i]] for i in ids]})
        parquet.write_table(table, folder / f"{number:04}.parquet")
    truth = {
        "bytes": size,
        "documents": len(texts),
        "pairs": [(place[a], place[b], similarity, kind) for a, b, similarity, kind in pairs],
    }
    truth_file.write_text(json.dumps(truth))
    return truth


def originals(chooser: random.Random) -> Iterator[str]:
    """Yield documents that have at most three tenths of their 5-grams in common with others."""
    sources = list(_sources())
    for number in range(1000):
        mark = f"zq{number}" if number else ""
        pieces = [piece for source in sources for piece in source.cut(chooser, bool(mark))]
        hashes = np.concatenate([piece.hashes for piece in pieces])
        owner = np.repeat(np.arange(len(pieces)), [len(piece.hashes) for piece in pieces])
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        seen = np.bincount(owner, weights=owner[first][inverse] < owner, minlength=len(pieces))
        own = np.bincount(owner, minlength=len(pieces))
        accepted = np.flatnonzero(seen < _SHARED_AT_MOST * own).tolist()
        chooser.shuffle(accepted)
        for index in accepted:
            yield pieces[index].text(mark)


@dataclass(frozen=True)
class Piece:
    """A part of a source: words `first` up to `last`, and hashes of its distinct 5-grams."""

    source: Source
    first: int
    last: int
    hashes: Any

    def text(self, mark: str) -> str:
        """Return the text, the mark behind every fourth word."""
        source = self.source
        start = int(source.starts[self.first])
        stop = int(source.stops[self.last - 1])
        if not mark:
            return source.text[start:stop]
        cuts = source.stops[self.first : self.last : _MARK_EVERY].tolist()
        bounds = zip([start, *cuts], [*cuts, stop], strict=True)
        return mark.join(source.text[a:b] for a, b in bounds)


@dataclass(frozen=True)
class Source:
    """A file's text, where its words are, and their numbers. Shape (W,) each, W words."""

    text: str
    starts: Any
    stops: Any
    ids: Any

    def cut(self, chooser: random.Random, marked: bool) -> Iterator[Piece]:
        """Yield pieces one after the other, of random lengths."""
        first = chooser.randrange(_SHORTEST)
        while first + _SHORTEST <= len(self.ids):
            length = int(min(_LONGEST, max(_SHORTEST, chooser.lognormvariate(5.5, 0.9))))
            last = min(first + length, len(self.ids))
            ids = self.ids[first:last] * np.uint64(2)
            if marked:
                ids[::_MARK_EVERY] += np.uint64(1)
            hashes = np.zeros(len(ids) - NGRAM + 1, dtype=np.uint64)
            for position in range(NGRAM):
                part = ids[position : len(ids) - NGRAM + 1 + position]
                hashes = (hashes ^ part) * np.uint64(0x9E3779B97F4A7C15)
                hashes ^= hashes >> np.uint64(29)
            yield Piece(self, first, last, np.unique(hashes))
            first = last


def _sources() -> Iterator[Source]:
    numbers: dict[str, int] = {}
    size = 0
    for path in _files():
        if size > _SOURCE_BYTES:
            return
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        if "\0" in text or "zq" in text:
            continue
        words = list(_WORD.finditer(text))
        if len(words) < 2 * _SHORTEST:
            continue
        size += len(data)
        ids = [numbers.setdefault(word.group().lower(), len(numbers)) for word in words]
        yield Source(
            text,
            np.array([word.start() for word in words]),
            np.array([word.end() for word in words]),
            np.array(ids, dtype=np.uint64),
        )


def _files() -> Iterator[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if "site-packages" not in path.parts:
            yield path
    suffixes = {"", ".gz", ".txt", ".html", ".md", ".rst", ".pod"}
    for path in sorted(Path("/usr/share/doc").rglob("*")):
        if path.suffix in suffixes and path.is_file() and not path.is_symlink():
            yield path


def variants(text: str, kind: str, chooser: random.Random) -> list[str]:
    """Return one to three others for a cluster of some kind."""
    count = chooser.choices([1, 2, 3], [6, 3, 1])[0]
    if kind == "exact":
        changes = (str, str.upper, str.lower, lambda same: same.replace(" ", "  ", 9) + "\n")
        return [chooser.choice(changes)(text) for _ in range(count)]
    if kind == "decoy":
        return [edited(text, chooser.uniform(0.5, 0.79), chooser)]
    return [edited(text, chooser.uniform(0.8, 0.98), chooser) for _ in range(count)]


def edited(text: str, wanted: float, chooser: random.Random) -> str:
    """Return the text with words changed until its similarity is near to the wanted one."""
    own = ngrams(text)
    spans = [word.span() for word in _WORD.finditer(text)]
    in_one_place = chooser.random() < 0.3
    spoilt = (1 - wanted) / (1 + wanted) * len(spans)
    number = spoilt if in_one_place else spoilt / NGRAM
    best, distance = text, 1.0
    for _ in range(6):
        changed = _changed(text, spans, max(1, round(number)), in_one_place, chooser)
        other = ngrams(changed)
        found = len(own & other) / len(own | other)
        if abs(found - wanted) < distance:
            best, distance = changed, abs(found - wanted)
        if distance < 0.01:
            break
        number *= (1 - wanted) * (1 + found) / max(1e-6, (1 - found) * (1 + wanted))
    return best


def _changed(
    text: str, spans: list[tuple[int, int]], number: int, in_one_place: bool, chooser: random.Random
) -> str:
    number = min(number, len(spans) - 1)
    if in_one_place:
        first = chooser.randrange(len(spans) - number + 1)
        places = range(first, first + number)
    else:
        places = sorted(chooser.sample(range(len(spans)), number))
    parts, at = [], 0
    for place in places:
        start, stop = spans[place]
        word = f"zx{chooser.randrange(10**6)}"
        change = chooser.choice(["replace", "replace", "insert", "drop"])
        parts.append(text[at:start])
        parts.append({"replace": word, "insert": f"{word} {text[start:stop]}", "drop": ""}[change])
        at = stop
    return "".join(parts) + text[at:]


def _similarities(members: list[int], texts: list[str]) -> Iterator[tuple[int, int, float]]:
    sets = {member: ngrams(texts[member]) for member in members}
    for a, b in combinations(members, 2):
        yield a, b, len(sets[a] & sets[b]) / len(sets[a] | sets[b])


def score(truth: dict[str, Any], kept: set[int]) -> dict[str, float]:
    """Return how well the kept documents agree with the truth.

    A pair at the threshold or above is found if not both are kept; recall is the share of such
    pairs, `near` of those that are no copies. A removed document is right if there is another
    one as similar to it.
    """
    alike = [(a, b, kind) for a, b, similarity, kind in truth["pairs"] if similarity >= THRESHOLD]
    found = [not (a in kept and b in kept) for a, b, _ in alike]
    near = [hit for hit, (_, _, kind) in zip(found, alike, strict=True) if kind != "exact"]
    repeated = {member for a, b, _ in alike for member in (a, b)}
    removed = set(range(truth["documents"])) - kept
    return {
        "recall": sum(found) / len(found),
        "recall_near": sum(near) / len(near),
        "precision": len(removed & repeated) / max(1, len(removed)),
        "num_removed": len(removed),
    }
