"""Finished blocks of a large corpus, kept beside the draft so that a killed run goes on from them.

A block is identified by the keys of its rows and by the columns it has. The draft's directory
belongs to one fingerprint, so rows with these keys have the same content as before; blocks that are
cut differently, or that a version with other columns left, are made anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

# Fewer rows are done sooner than they are written and read again.
KEPT_FROM_ROWS = 20_000
_UNFINISHED = ".part"


def kept_blocks(folder: Path) -> int:
    """Return how many blocks an earlier run left; what it was writing when it ended is removed."""
    folder.mkdir(exist_ok=True)
    for file in folder.glob(f"*{_UNFINISHED}"):
        file.unlink()
    return sum(1 for _ in folder.glob("*.arrow"))


def make_or_read(
    table: pa.Table, make: Callable[[pa.Table], pa.Table], schema: pa.Schema, folder: Path
) -> pa.Table:
    """Return `make(table)`, read from `folder` if it is there, else made and kept there.

    Args:
        table: Arrow table with a column `key`.
        make: Makes a block from a table, always the same one for the same keys.
        schema: The columns that this version of the program knows a block to have.
        folder: Used by this step alone, on a file system that all nodes share.
    """
    if not table.num_rows:
        return make(table)
    identity = table["key"].to_numpy().tobytes() + str(schema).encode()
    name = hashlib.blake2b(identity, digest_size=16).hexdigest()
    file = folder / f"{name}.arrow"
    if file.exists():
        with pa.OSFile(str(file)) as stream:
            return pa.ipc.open_file(stream).read_all()
    made = make(table)
    part = folder / f"{name}.{os.getpid()}{_UNFINISHED}"
    # Parquet takes five times the time for the same size: more than what is kept took to make.
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    with pa.ipc.new_file(str(part), made.schema, options=options) as writer:
        writer.write_table(made)
    part.rename(file)
    return made
