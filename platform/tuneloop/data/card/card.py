"""The dataset card: what went in, what was removed and why, and what the rows look like."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tuneloop.config import TuneloopConfig
from tuneloop.data import ray_rows
from tuneloop.data.card.composition import cluster_sizes, describe_sources, describe_tasks
from tuneloop.data.card.page import STAGES, readme
from tuneloop.data.hashing.signatures import band_shape
from tuneloop.data.ledger import Outcome
from tuneloop.data.sources.files import DOCSTRINGS
from tuneloop.data.split.split import is_stratified
from tuneloop.data.tokenize.rendering import percentiles
from tuneloop.data.write.parquet import Written


def write_card(
    config: TuneloopConfig, outcome: Outcome, written: dict[str, Written], path: Path
) -> None:
    """Write `card.json` and `README.md` into the artifact."""
    card = _card(config, outcome, written)
    text = json.dumps(card, indent=2, ensure_ascii=False)
    (path / "card.json").write_text(text, encoding="utf-8")
    (path / "README.md").write_text(readme(card), encoding="utf-8")


def _card(config: TuneloopConfig, outcome: Outcome, written: dict[str, Written]) -> dict[str, Any]:
    assert outcome.engine is not None
    splits = {}
    for name in ("train", "validation", "test"):
        if name not in written:
            continue
        lengths, targets = written[name].num_tokens, written[name].num_target_tokens
        splits[name] = {
            "num_rows": written[name].num_rows,
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
        "tokenizer_engine": asdict(outcome.engine),
        "sources": [
            {"licence": _licence(source["path"]), **source}
            for source in describe_sources(outcome, config)
        ],
        "tasks": describe_tasks(outcome, config),
        "wording": outcome.wording,
        "funnel": _funnel(outcome),
        "reasons": _reasons(outcome),
        "splits": splits,
        "split": _split_summary(config, outcome),
        "dedup": _dedup_summary(config, outcome),
        "filters": {**config.data.filters.model_dump(), **outcome.filtered},
        "conflicts": outcome.conflicts,
        "decontamination": {
            **config.data.decontamination.model_dump(),
            "origins": outcome.contamination.origins if outcome.contamination else [],
        },
        "packing": _packing(config, outcome, written["train"].num_tokens),
        "synthetic_ratio": round(float(np.mean(outcome.table["synthetic"].to_numpy())), 4),
        "synthetic_ratios": _synthetic_ratios(outcome),
        "max_seq_len": config.data.max_seq_len,
        "seed": config.data.seed,
        "samples": {
            name: [_sample(row) for row in written[name].first] for name in ("train", "test")
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("ray", "transformers", "tokenizers", "pyarrow")},
        },
        "duration_s": outcome.seconds,
    }


def _licence(path: str) -> str:
    if path != DOCSTRINGS:
        return "as stated by whoever published the source; tuneloop does not know it"
    interpreter = f"{platform.python_implementation()} {platform.python_version()}"
    return f"Python Software Foundation License 2.0 (documentation of {interpreter})"


def _funnel(outcome: Outcome) -> list[dict[str, Any]]:
    tokens = outcome.table["num_tokens"].to_numpy()
    stage = np.array(outcome.stage, dtype=object)
    left = np.ones(len(stage), dtype=bool)
    funnel = [{"stage": "found", "rows": len(stage), "removed": 0, "tokens": int(tokens.sum())}]
    for name in STAGES:
        removed = stage == name
        left &= ~removed
        funnel.append(
            {
                "stage": name,
                "rows": int(left.sum()),
                "removed": int(removed.sum()),
                "tokens": int(tokens[left].sum()),
            }
        )
    return funnel


def _reasons(outcome: Outcome) -> list[dict[str, Any]]:
    """Return how often rows were removed for which reason; row ids and numbers are left out."""
    counts: Counter[tuple[str, str]] = Counter()
    for stage, reason in zip(outcome.stage, outcome.reason, strict=True):
        if stage == "dedup":
            reason = reason.partition(" of ")[0]
        elif stage == "decontamination":
            reason = reason.partition(":")[0]
            reason = re.sub(r"(test|validation) row \S+", r"\1 rows", reason)
            reason = re.sub(r"^\d+% of the ", "", reason)
        elif stage == "tokenize" and " tokens, " in reason:
            reason = "more tokens than max_seq_len"
        elif stage in ("read", "filter", "tokenize"):
            reason = reason.partition(":")[0]
        if stage:
            counts[stage, reason] += 1
    return [
        {"stage": stage, "reason": reason, "rows": rows}
        for (stage, reason), rows in counts.most_common()
    ]


def _split_summary(config: TuneloopConfig, outcome: Outcome) -> dict[str, Any]:
    assert outcome.split is not None
    summary: dict[str, Any] = {
        **config.data.split.model_dump(),
        **{f"num_units_{side}": count for side, count in outcome.split.num_groups.items()},
    }
    if config.data.split.group_by is not None:
        groups = np.array(outcome.table["group"].to_pylist(), dtype=object)
        for name, side in (("train", ray_rows.TRAIN), ("test", ray_rows.TEST)):
            counts = Counter(groups[outcome.side == side].tolist())
            summary[f"groups_{name}"] = dict(counts.most_common(20))
            summary[f"num_groups_{name}"] = len(counts)
    if is_stratified(config):
        strata = np.array(outcome.table["stratum"].to_pylist(), dtype=object)
        summary["strata"] = {
            name: dict(Counter(strata[outcome.side == side].tolist()).most_common())
            for name, side in ray_rows.SIDES.items()
            if (outcome.side == side).any()
        }
    return summary


def _synthetic_ratios(outcome: Outcome) -> dict[str, float]:
    """Return the share of generated rows in each split; the others are people's."""
    synthetic = outcome.table["synthetic"].to_numpy(zero_copy_only=False)
    return {
        name: round(float(synthetic[outcome.side == side].mean()), 4)
        for name, side in ray_rows.SIDES.items()
        if (outcome.side == side).any()
    }


def _dedup_summary(config: TuneloopConfig, outcome: Outcome) -> dict[str, Any]:
    assert outcome.duplicates is not None
    found = outcome.duplicates
    bands, rows = band_shape(config.data.dedup.threshold)
    removed = found.removed
    sizes = np.bincount(found.cluster) if len(found.cluster) else np.zeros(0, dtype=int)
    near = removed[~found.exact[removed]]
    # The least similar pairs are the ones worth a reader's doubt.
    doubtful = near[np.argsort(found.similarity[near], kind="stable")][:5]
    place = outcome.table["source"]
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
                "removed": place[int(outcome.usable[index])].as_py(),
                "kept": place[int(outcome.usable[found.kept[index]])].as_py(),
                "similarity": round(float(found.similarity[index]), 4),
            }
            for index in doubtful.tolist()
        ],
    }


def _packing(
    config: TuneloopConfig, outcome: Outcome, num_tokens: Sequence[int]
) -> dict[str, Any] | None:
    """Return how full the rows of a corpus are; None for conversations."""
    if config.task.type != "language_modeling":
        return None
    room = len(num_tokens) * config.data.max_seq_len
    return {
        "num_documents": int((outcome.side == ray_rows.TRAIN).sum()),
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
