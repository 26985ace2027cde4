"""A sweep in the terminal."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tuneloop.artifacts import Artifact

if TYPE_CHECKING:
    from rich.console import RenderableType


def sweep_table(sweep: Artifact) -> RenderableType:
    """Return the trials, the fitted lines and the best model of a sweep."""
    import pyarrow.parquet as pq
    from rich.console import Group
    from rich.table import Table

    curve = json.loads((sweep.path / "curve.json").read_text(encoding="utf-8"))
    table = Table(box=None, pad_edge=False)
    for column in (*curve["keys"], "rows", "parameters", curve["metric"], "interval", "time"):
        table.add_column(column, justify="left" if column in curve["keys"] else "right")
    trials = pq.read_table(sweep.path / "trials.parquet").to_pylist()
    for number, trial in enumerate(trials):
        best = number == curve["best"]["trial"]
        table.add_row(
            *(str(trial[key]) for key in curve["keys"]),
            f"{trial['num_train_examples']:,}",
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
    return Group(table, "", *lines, f"best: {curve['best']['model']}", "")


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"
