"""The dataset card: what went in, what was removed and why, and what the rows look like."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tuneloop.config import TuneloopConfig
from tuneloop.data import stages
from tuneloop.data.files import DOCSTRINGS
from tuneloop.data.outcome import Outcome
from tuneloop.data.rendering import percentiles
from tuneloop.data.signatures import band_shape
from tuneloop.data.writing import Written

_STAGES = {
    "read": "could not be read or checked",
    "tokenize": "could not be rendered, or too long",
    "dedup": "repeated another row",
    "decontamination": "repeated what is evaluated on",
    "split": "in no split",
}
_BAR = 30


def write_card(
    config: TuneloopConfig, outcome: Outcome, written: dict[str, Written], path: Path
) -> None:
    """Write `card.json` and `README.md` into the artifact."""
    card = _card(config, outcome, written)
    text = json.dumps(card, indent=2, ensure_ascii=False)
    (path / "card.json").write_text(text, encoding="utf-8")
    (path / "README.md").write_text(_readme(card), encoding="utf-8")


def _card(config: TuneloopConfig, outcome: Outcome, written: dict[str, Written]) -> dict[str, Any]:
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
        "sources": [
            {"path": source.path, "licence": _licence(source.path)}
            for source in config.data.sources
        ],
        "funnel": _funnel(outcome),
        "reasons": _reasons(outcome),
        "splits": splits,
        "split": _split_summary(config, outcome),
        "dedup": _dedup_summary(config, outcome),
        "decontamination": {
            **config.data.decontamination.model_dump(),
            "origins": outcome.contamination.origins if outcome.contamination else [],
        },
        "packing": _packing(config, outcome, written["train"].num_tokens),
        "synthetic_ratio": round(float(np.mean(outcome.table["synthetic"].to_numpy())), 4),
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
    for name in _STAGES:
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
        elif stage in ("read", "tokenize"):
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
        for name, side in (("train", stages.TRAIN), ("test", stages.TEST)):
            counts = Counter(groups[outcome.side == side].tolist())
            summary[f"groups_{name}"] = dict(counts.most_common(20))
            summary[f"num_groups_{name}"] = len(counts)
    return summary


def _dedup_summary(config: TuneloopConfig, outcome: Outcome) -> dict[str, Any]:
    assert outcome.duplicates is not None
    found = outcome.duplicates
    bands, rows = band_shape(config.data.dedup.threshold)
    removed = found.removed
    sizes = np.bincount(found.cluster) if len(found.cluster) else np.zeros(0, dtype=int)
    near = removed[~found.exact[removed]]
    # The least similar pairs are the ones worth a reader's doubt.
    doubtful = near[np.argsort(found.similarity[near], kind="stable")][:5]
    place = outcome.table["source"].to_pylist()
    return {
        **config.data.dedup.model_dump(),
        "num_exact": int(found.exact[removed].sum()),
        "num_near": len(near),
        "num_clusters": int((sizes > 1).sum()),
        "largest_cluster": int(sizes.max(initial=0)),
        "bands": bands,
        "rows_per_band": rows,
        "least_similar_removed": [
            {
                "removed": place[outcome.usable[index]],
                "kept": place[outcome.usable[found.kept[index]]],
                "similarity": round(float(found.similarity[index]), 4),
            }
            for index in doubtful.tolist()
        ],
    }


def _packing(
    config: TuneloopConfig, outcome: Outcome, num_tokens: list[int]
) -> dict[str, Any] | None:
    """Return how full the rows of a corpus are; None for conversations."""
    if config.task.type != "language_modeling":
        return None
    room = len(num_tokens) * config.data.max_seq_len
    return {
        "num_documents": int((outcome.side == stages.TRAIN).sum()),
        "num_rows": len(num_tokens),
        "padding_ratio": round(1 - sum(num_tokens) / max(1, room), 6),
    }


def _histogram(lengths: list[int]) -> list[dict[str, int]]:
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


def _readme(card: dict[str, Any]) -> str:
    train, test = card["splits"]["train"], card["splits"]["test"]
    parts = [
        f"# Dataset `{card['name']}`",
        f"{train['num_rows']:,} train rows and {test['num_rows']:,} test rows for "
        f"`{card['task']['type']}`, tokenized for `{card['base']}` "
        f"(chat template `{card['chat_template']}`, at most {card['max_seq_len']:,} tokens a row, "
        f"seed {card['seed']}).",
        "## Sources",
        "\n".join(f"- `{s['path']}`. Licence: {s['licence']}." for s in card["sources"]),
        "## What happened to the rows",
        _table(
            ["stage", "removed", "rows left", "tokens left"],
            [
                [
                    f"{step['stage']}: {_STAGES[step['stage']]}"
                    if step["stage"] in _STAGES
                    else "found in the sources",
                    f"{step['removed']:,}",
                    f"{step['rows']:,}",
                    f"{step['tokens']:,}",
                ]
                for step in card["funnel"]
            ],
        ),
        "Every removed row is in `removed/` with its reason, its text and its place in the source.",
    ]
    if card["reasons"]:
        rows = [[r["stage"], r["reason"], f"{r['rows']:,}"] for r in card["reasons"][:15]]
        parts.append(_table(["stage", "reason", "rows"], rows))
    parts += [
        "## Lengths",
        _table(
            ["split", "rows", "tokens", "targets", "share of targets", "tokens a row"],
            [
                [
                    name,
                    f"{split['num_rows']:,}",
                    f"{split['num_tokens']:,}",
                    f"{split['num_target_tokens']:,}",
                    f"{split['target_ratio']:.1%}",
                    ", ".join(f"{k} {v:,}" for k, v in split["length_tokens"].items()),
                ]
                for name, split in card["splits"].items()
            ],
        ),
        *(
            [
                f"The train rows hold {card['packing']['num_documents']:,} documents, packed whole "
                f"or in pieces; {card['packing']['padding_ratio']:.2%} of their room is empty."
            ]
            if card["packing"]
            else []
        ),
        "Train rows by length:\n\n```text\n" + _bars(train["histogram"]) + "\n```",
        "## Duplicates",
        _dedup_text(card["dedup"], card["packing"] is not None),
        "## Contamination",
        _contamination_text(card["decontamination"]),
        "## Split",
        _split_text(card["split"]),
        "## Samples",
        *[_sample_text(name, row) for name, rows in card["samples"].items() for row in rows[:2]],
        "## Made with",
        ", ".join(f"{name} {number}" for name, number in card["versions"].items())
        + "; "
        + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in card["duration_s"].items())
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _dedup_text(dedup: dict[str, Any], is_text: bool) -> str:
    side = {"both": "prompt and answer", "prompt": "the prompt", "completion": "the answer"}
    text = (
        f"Compared on {'the text' if is_text else side[dedup['on']]}. Exact copies after case and "
        f"white space removed: {dedup['num_exact']:,}{'' if dedup['exact'] else ' (switched off)'}. Near-duplicates "
        f"(Jaccard similarity of {dedup['ngram_words']}-word shingles at least "
        f"{dedup['threshold']:g}) removed: {dedup['num_near']:,}"
        f"{'' if dedup['near'] else ' (switched off)'}. Clusters of two or more rows: "
        f"{dedup['num_clusters']:,}; the largest has {dedup['largest_cluster']:,}. Candidates come "
        f"from MinHash with {dedup['bands']} bands of {dedup['rows_per_band']} and are verified."
    )
    if dedup["least_similar_removed"]:
        rows = [
            [f"{pair['similarity']:.3f}", f"`{pair['removed']}`", f"`{pair['kept']}`"]
            for pair in dedup["least_similar_removed"]
        ]
        text += "\n\nThe least similar rows that were removed:\n\n"
        text += _table(["similarity", "removed", "kept"], rows)
    return text


def _contamination_text(found: dict[str, Any]) -> str:
    text = (
        "Train rows are held against what is evaluated on and removed if they say or ask the same, "
        f"are near-duplicates, or share at least {found['overlap_threshold']:.0%} of the long word "
        "n-grams of the shorter of the two rows."
    )
    rows = [
        [
            f"`{origin['name']}`",
            f"{origin['num_rows']:,}",
            f"{origin['num_contaminated']:,} ({origin['contamination_ratio']:.1%})",
            f"{origin['num_removed']:,}",
            ", ".join(f"{kind} {count:,}" for kind, count in origin["kinds"].items()) or "–",
            f"{origin['ngram_words'] or '–'}",
        ]
        for origin in found["origins"]
    ]
    header = ["held out", "rows", "were in the train rows", "removed", "how", "words of an n-gram"]
    text += "\n\n" + _table(header, rows)
    examples = [example for origin in found["origins"] for example in origin["examples"]]
    if examples:
        lines = [
            [f"`{example['removed']}`", f"{example['similarity']:.2f}", example["reason"]]
            for example in examples[:10]
        ]
        text += "\n\n" + _table(["removed", "similarity", "reason"], lines)
    return text


def _split_text(split: dict[str, Any]) -> str:
    wanted = (
        f"{split['num_test_examples']:,} test rows"
        if split["num_test_examples"] is not None
        else f"about {split['test_ratio']:.0%} of the rows for the test"
    )
    text = (
        f"Asked for: {wanted}. Rows with the same prompt or in the same cluster of duplicates are "
        f"on the same side: {split['num_units_train']:,} units that stay together are kept for "
        f"training, {split['num_units_test']:,} for the test."
    )
    if split["num_units_validation"]:
        text += f" {split['num_units_validation']:,} more are for validation."
    if split["group_by"] is not None:
        names = [
            f"{side} has {split[f'num_groups_{side}']:,} ("
            + ", ".join(f"{name} {rows:,}" for name, rows in split[f"groups_{side}"].items())
            + ("…" if split[f"num_groups_{side}"] > len(split[f"groups_{side}"]) else "")
            + ")"
            for side in ("train", "test")
        ]
        text += f"\n\nNo `{split['group_by']}` is on both sides: " + "; ".join(names) + "."
    return text


def _sample_text(name: str, row: dict[str, Any]) -> str:
    if "messages" in row:
        text = "\n".join(f"[{m['role']}]\n{m['content']}" for m in row["messages"])
    else:
        text = row["text"]
    text = text if len(text) <= 2000 else text[:2000] + "…"
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{name}, `{row['source']}`:\n\n{fence}text\n{text}\n{fence}"


def _bars(histogram: list[dict[str, int]]) -> str:
    most = max((item["rows"] for item in histogram), default=1)
    return "\n".join(
        f"{item['from']:>6}–{item['to']:<6} {item['rows']:>8,}  "
        + "█" * round(_BAR * item["rows"] / most)
        for item in histogram
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )
