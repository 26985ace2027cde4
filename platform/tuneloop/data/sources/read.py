"""Reading all sources, unless too many of their rows are unusable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow.compute as pc
from ray.data import Dataset

from tuneloop.config import TuneloopConfig
from tuneloop.data import ray_rows
from tuneloop.data.hashing.columns import Indices
from tuneloop.data.schema import Rejection, Stage
from tuneloop.data.sources.bad_rows import BadRow, refuse_bad_rows, refuse_too_many_rows
from tuneloop.data.sources.files import SourceFile


class SourceRows(NamedTuple):
    """All rows of the sources.

    Args:
        rows: By `row_schema`.
        readable: Keys of the rows that could be read. Shape (N,).
        num_unreadable: How many could not.
    """

    rows: Dataset
    readable: Indices
    num_unreadable: int


def read_sources(files: Sequence[SourceFile], config: TuneloopConfig) -> SourceRows:
    """Return the rows of the files, each readable or with the reason why it is not.

    Raises:
        DataError: More than `data.max_bad_rows_ratio` are unreadable, or there is none.
        ResourceError: They are too many for the memory of the driver.
    """
    rows = ray_rows.read_files(files, config)
    refuse_too_many_rows(rows.count())
    refuse_bad_rows([], rows.count(), config.data)
    table = ray_rows.collect(rows, ["source", "rejection"])
    stage = pc.struct_field(table["rejection"], "stage")
    is_bad = pc.equal(stage, Stage.READ.value).fill_null(False).to_numpy()
    columns = (table.filter(is_bad)[name].to_pylist() for name in ("source", "rejection"))
    bad = [BadRow(place, Rejection.of(struct)) for place, struct in zip(*columns, strict=True)]
    refuse_bad_rows(bad, table.num_rows, config.data)
    return SourceRows(rows, table["key"].to_numpy()[~is_bad], len(bad))
