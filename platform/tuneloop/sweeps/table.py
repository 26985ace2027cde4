"""A sweep in the terminal."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tuneloop.artifacts import Artifact

if TYPE_CHECKING:
    from rich.console import RenderableType


_ROWS = "data.num_train_examples"


def sweep_table(sweep: Artifact) -> RenderableType:
    """Return the trials, the fitted lines and the best model of a sweep."""
    import pyarrow.parquet as pq
    from rich.console import Group
    from rich.table import Table

    curve = json.loads((sweep.path / "curve.json").read_text(encoding="utf-8"))
    keys = curve["keys"]
    others = [] if _ROWS in keys else [_ROWS]
    table = Table(box=None, pad_edge=False)
    for key in (*keys, *others):
        # The last part of a key is what tells it from the others in most sweeps.
        short = key.rpartition(".")[2]
        unique = [other.rpartition(".")[2] for other in keys].count(short) < 2
        table.add_column("train rows" if key == _ROWS else short if unique else key)
    for column in ("params", "score", "95% interval", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    trials = pq.read_table(sweep.path / "trials.parquet").to_pylist()
    for number, trial in enumerate(trials):
        best = number == curve["best"]["trial"]
        table.add_row(
            *(str(trial[key]) for key in keys),
            *(f"{trial['num_train_examples']:,}" for _ in others),
            f"{trial['num_parameters'] / 1e6:,.0f} M" if trial["num_parameters"] else "–",
            _number(trial["score"]) if trial["status"] == "done" else trial["status"],
            f"{_number(trial['low'])} to {_number(trial['high'])}",
            f"{trial['wall_s']:.0f} s",
            style="bold" if best else None,
        )
    lines = [
        f"{line['series'] or 'all'}: {line['slope']:+.3f} per doubling of the data"
        for line in curve["curves"]
        if line["slope"] is not None
    ]
    return Group(
        f"score: {curve['metric']}", table, "", *lines, f"best: {curve['best']['model']}", ""
    )


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"
