"""The dataset card: what went in, what was removed and why, and what the rows look like."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tuneloop.config import TuneloopConfig
from tuneloop.data.card.composition import cluster_sizes, describe_sources, describe_tasks
from tuneloop.data.card.page import readme
from tuneloop.data.hashing.signatures import band_shape
from tuneloop.data.ledger import Ledger
from tuneloop.data.schema import SPLITS, Side, Stage
from tuneloop.data.sources.files import DOCSTRINGS
from tuneloop.data.split.split import is_stratified
from tuneloop.data.tokenize.rendering import percentiles
from tuneloop.data.write.parquet import Written

# So many rows that were cut are listed by their place.
_TRUNCATED_LISTED = 1_000


def write_card(
    config: TuneloopConfig, ledger: Ledger, written: dict[Side, Written], path: Path
) -> None:
    """Write `card.json` and `README.md` into the artifact."""
    card = _card(config, ledger, written)
    text = json.dumps(card, indent=2, ensure_ascii=False)
    (path / "card.json").write_text(text, encoding="utf-8")
    (path / "README.md").write_text(readme(card), encoding="utf-8")


def _card(config: TuneloopConfig, ledger: Ledger, written: dict[Side, Written]) -> dict[str, Any]:
    assert ledger.backend is not None
    assert ledger.wording is not None
    assert ledger.filtered is not None
    splits = {}
    for side in SPLITS:
        if side not in written:
            continue
        lengths, targets = written[side].num_tokens, written[side].num_target_tokens
        splits[side.folder] = {
            "num_rows": written[side].num_rows,
            "num_tokens": sum(lengths),
            "num_target_tokens": sum(targets),
            "target_ratio": round(sum(targets) / max(1, sum(lengths)), 4),
            "length_tokens": percentiles(lengths),
            "target_length_tokens": percentiles(targets),
            "histogram": _histogram(lengths),
        }
    return {
        "name": config.name,
        "task": config.task.model_dump(),
        "base": config.model.base,
        "chat_template": config.model.chat_template,
        "tokenizer_engine": asdict(ledger.backend),
        "sources": [
            {"licence": _licence(source["path"]), **source}
            for source in describe_sources(ledger, config)
        ],
        "tasks": describe_tasks(ledger, config),
        "wording": asdict(ledger.wording),
        "notices": [asdict(notice) for notice in ledger.notices],
        "funnel": _funnel(ledger),
        "reasons": _reasons(ledger),
        "truncated": _truncated(ledger),
        "splits": splits,
        "split": _split_summary(config, ledger),
        "dedup": _dedup_summary(config, ledger),
        "filters": {**config.data.filters.model_dump(), **asdict(ledger.filtered)},
        "fixes": asdict(ledger.fixes) if ledger.fixes else {"applied": [], "refused": {}},
        "conflicts": asdict(ledger.conflicts) if ledger.conflicts else {},
        "decontamination": {
            **config.data.decontamination.model_dump(),
            "origins": [asdict(origin) for origin in ledger.contamination.origins]
            if ledger.contamination
            else [],
        },
        "packing": _packing(config, ledger, written[Side.TRAIN].num_tokens),
        "synthetic_ratio": round(float(np.mean(ledger.table["synthetic"].to_numpy())), 4),
        "synthetic_ratios": _synthetic_ratios(ledger),
        "synthetic_rows": asdict(ledger.synthetic) if ledger.synthetic else None,
        "max_seq_len": config.data.max_seq_len,
        "seed": config.data.seed,
        "samples": {
            side.folder: [_sample(row) for row in written[side].first]
            for side in (Side.TRAIN, Side.TEST)
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("ray", "transformers", "tokenizers", "pyarrow")},
        },
        "duration_s": ledger.seconds,
    }


def _truncated(ledger: Ledger) -> dict[str, Any]:
    """Return which rows that stay were cut to fit, and what of them: the first 1,000."""
    cut = ledger.table["cut"].to_pylist()
    stays = ~ledger.is_on(Side.REMOVED)
    found = [index for index in np.flatnonzero(stays).tolist() if cut[index]]
    rows = [
        {"source": ledger.table["source"][index].as_py(), "cut": cut[index]}
        for index in found[:_TRUNCATED_LISTED]
    ]
    return {"num_rows": len(found), "rows": rows}


def _licence(path: str) -> str:
    if path != DOCSTRINGS:
        return "as stated by whoever published the source; tuneloop does not know it"
    interpreter = f"{platform.python_implementation()} {platform.python_version()}"
    return f"Python Software Foundation License 2.0 (documentation of {interpreter})"


def _funnel(ledger: Ledger) -> list[dict[str, Any]]:
    tokens = ledger.table["num_tokens"].to_numpy()
    rows, num_tokens = len(tokens), int(tokens.sum())
    funnel = [{"stage": "found", "rows": rows, "removed": 0, "tokens": num_tokens}]
    for stage in Stage:
        removed = ledger.removed_by(stage)
        if stage is Stage.MARKS and not len(removed):
            continue
        rows -= len(removed)
        num_tokens -= int(tokens[removed].sum())
        funnel.append(
            {"stage": stage.value, "rows": rows, "removed": len(removed), "tokens": num_tokens}
        )
    return funnel


def _reasons(ledger: Ledger) -> list[dict[str, Any]]:
    """Return how often rows were removed for which reason; of as many, the first row's first."""
    counts = Counter(
        (removal.stage.value, removal.reason.summary)
        for _, removal in sorted(ledger.removals.items())
    )
    return [
        {"stage": stage, "reason": reason, "rows": rows}
        for (stage, reason), rows in counts.most_common()
    ]


def _split_summary(config: TuneloopConfig, ledger: Ledger) -> dict[str, Any]:
    assert ledger.split is not None
    summary: dict[str, Any] = {
        **config.data.split.model_dump(),
        **{f"num_units_{side}": count for side, count in ledger.split.num_groups.items()},
    }
    if config.data.split.group_by is not None:
        groups = np.array(ledger.table["group"].to_pylist(), dtype=object)
        for side in (Side.TRAIN, Side.TEST):
            counts = Counter(groups[ledger.is_on(side)].tolist())
            summary[f"groups_{side.folder}"] = dict(counts.most_common(20))
            summary[f"num_groups_{side.folder}"] = len(counts)
    if is_stratified(config):
        strata = np.array(ledger.table["stratum"].to_pylist(), dtype=object)
        summary["strata"] = {
            side.folder: dict(Counter(strata[ledger.is_on(side)].tolist()).most_common())
            for side in SPLITS
            if ledger.is_on(side).any()
        }
    return summary


def _synthetic_ratios(ledger: Ledger) -> dict[str, float]:
    """Return the share of generated rows in each split; the others are people's."""
    synthetic = ledger.table["synthetic"].to_numpy(zero_copy_only=False)
    return {
        side.folder: round(float(synthetic[ledger.is_on(side)].mean()), 4)
        for side in SPLITS
        if ledger.is_on(side).any()
    }


def _dedup_summary(config: TuneloopConfig, ledger: Ledger) -> dict[str, Any]:
    assert ledger.duplicates is not None
    found = ledger.duplicates
    bands, rows = band_shape(config.data.dedup.threshold)
    removed = found.removed
    sizes = np.bincount(found.cluster) if len(found.cluster) else np.zeros(0, dtype=int)
    near = removed[~found.exact[removed]]
    # The least similar pairs are the ones worth a reader's doubt.
    doubtful = near[np.argsort(found.similarity[near], kind="stable")][:5]
    place = ledger.table["source"]
    return {
        **config.data.dedup.model_dump(),
        "num_exact": int(found.exact[removed].sum()),
        "num_near": len(near),
        "num_clusters": int((sizes > 1).sum()),
        "cluster_sizes": cluster_sizes(found.cluster),
        "largest_cluster": int(sizes.max(initial=0)),
        "bands": bands,
        "rows_per_band": rows,
        "least_similar_removed": [
            {
                "removed": place[int(ledger.usable[index])].as_py(),
                "kept": place[int(ledger.usable[found.kept[index]])].as_py(),
                "similarity": round(float(found.similarity[index]), 4),
            }
            for index in doubtful.tolist()
        ],
    }


def _packing(
    config: TuneloopConfig, ledger: Ledger, num_tokens: Sequence[int]
) -> dict[str, Any] | None:
    """Return how full the rows of a corpus are; None for conversations."""
    if config.task.type != "language_modeling":
        return None
    room = len(num_tokens) * config.data.max_seq_len
    return {
        "num_documents": int(ledger.is_on(Side.TRAIN).sum()),
        "num_rows": len(num_tokens),
        "padding_ratio": round(1 - sum(num_tokens) / max(1, room), 6),
    }


def _histogram(lengths: Sequence[int]) -> list[dict[str, int]]:
    """Return about ten classes of equal, round width."""
    if not lengths:
        return []
    width = max(1, max(lengths) // 10)
    width = -(-width // 8) * 8
    counts = Counter((length - 1) // width for length in lengths)
    return [
        {"from": index * width + 1, "to": (index + 1) * width, "rows": counts[index]}
        for index in range(max(counts) + 1)
    ]


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {name: row[name] for name in ("messages", "text") if name in row}
    return {"row_id": row["row_id"], "source": row["source"], **content}
