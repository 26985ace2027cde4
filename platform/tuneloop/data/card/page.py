"""The dataset card as a page for people."""

from __future__ import annotations

import re
from typing import Any

from tuneloop.data.schema import Stage
from tuneloop.data.synthetic_rows import synthetic_lines
from tuneloop.marks import FIX_LABELS
from tuneloop.models.chat.tokenizer_backends import BackendChoice
from tuneloop.records import Message
from tuneloop.text import counted, shorten

_STAGES = {
    "found": "found in the sources",
    Stage.READ: "read: could not be read or checked",
    Stage.FILTER: "filter: dropped by a quality filter",
    Stage.TOKENIZE: "tokenize: could not be rendered, or too long",
    Stage.DEDUP: "dedup: repeated another row",
    Stage.MARKS: "marks: dropped by people's marks",
    Stage.DECONTAMINATION: "decontamination: repeated what is evaluated on",
    Stage.SPLIT: "split: in no split",
}
_BAR = 30
_TRUNCATED_SHOWN = 20
_FIXES_SHOWN, _FIX_CHARACTERS = 50, 120


def readme(card: dict[str, Any]) -> str:
    """Return the card as a page of Markdown."""
    train, test = card["splits"]["train"], card["splits"]["test"]
    parts = [
        f"# Dataset `{card['name']}`",
        f"{train['num_rows']:,} train rows and {test['num_rows']:,} test rows for "
        f"{_task_text(card['task'])}, tokenized for `{card['base']}` "
        f"(chat template `{card['chat_template']}`, at most {card['max_seq_len']:,} tokens a row, "
        f"seed {card['seed']}).",
        "## Sources",
        "\n".join(f"- `{s['path']}`. Licence: {s['licence']}." for s in card["sources"]),
        _parts_table("source", [(f"`{s['path']}`", s) for s in card["sources"]]),
        *_notices(card["notices"]),
        *_tasks(card["tasks"]),
        _synthetic_text(card["synthetic_ratios"]),
        *(["\n".join(synthetic_lines(found))] if (found := card["synthetic_rows"]) else []),
        "## What happened to the rows",
        _table(
            ["stage", "removed", "rows left", "tokens left"],
            [
                [
                    _STAGES[step["stage"]],
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
        rows = [[r["stage"], _literal(r["reason"]), f"{r['rows']:,}"] for r in card["reasons"][:15]]
        parts.append(_table(["stage", "reason", "rows"], rows))
    if card["truncated"]["num_rows"]:
        parts += _truncations(card["truncated"])
    parts += [
        "## Lengths",
        _table(
            ["split", "rows", "tokens", "learned tokens", "share learned", "tokens a row"],
            [
                [
                    name,
                    f"{split['num_rows']:,}",
                    f"{split['num_tokens']:,}",
                    f"{split['num_target_tokens']:,}",
                    f"{split['target_ratio']:.1%}",
                    _lengths(split["length_tokens"]),
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
        *_wording(card["wording"]),
        "## Duplicates",
        _dedup_text(card["dedup"], card["packing"] is not None),
        *_filters(card["filters"]),
        *_fixes(card["fixes"]["applied"]),
        *_conflicts(card["conflicts"]),
        "## Contamination",
        _contamination_text(card["decontamination"]),
        "## Split",
        _split_text(card["split"], bool(card["tasks"])),
        "## Samples",
        *[_sample_text(name, row) for name, rows in card["samples"].items() for row in rows[:2]],
        "## Made with",
        ", ".join(f"{name} {number}" for name, number in card["versions"].items())
        + "; "
        + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in card["duration_s"].items())
        + ".",
        f"Tokenizer engine: {BackendChoice(**card['tokenizer_engine'])}.",
    ]
    return "\n\n".join(parts) + "\n"


def _task_text(task: dict[str, Any]) -> str:
    tasks = ", ".join(f"`{name}`" for name in task["tasks"])
    return f"a mixture of {tasks}" if tasks else f"`{task['type']}`"


def _tasks(tasks: list[dict[str, Any]]) -> list[str]:
    """Return the table of a mixture's tasks, if there are any."""
    parts = [(f"`{task['name']}`: {task['type']}", task) for task in tasks]
    return [_parts_table("task", parts)] if parts else []


def _notices(notices: list[dict[str, str]]) -> list[str]:
    """Return a list of what is unusual in the files, if anything is."""
    lines = [f"- {notice['what']}: {notice['where']}" for notice in notices]
    return ["\n".join(lines)] if lines else []


def _parts_table(what: str, parts: list[tuple[str, dict[str, Any]]]) -> str:
    header = [what, "weight", "found", "unreadable", "removed", "train", "validation", "test"]
    rows = [
        [
            name,
            "–" if part["weight"] is None else f"{part['weight']:g}",
            *(f"{part[f'num_{column}']:,}" for column in header[2:]),
            f"{part['train_row_share']:.1%}",
            f"{part['train_token_share']:.1%}",
            f"{part['synthetic_ratio']:.1%}",
        ]
        for name, part in parts
    ]
    return _table([*header, "of the train rows", "of the train tokens", "synthetic"], rows)


def _synthetic_text(ratios: dict[str, float]) -> str:
    listed = ", ".join(f"{ratio:.1%} of the {name} rows" for name, ratio in ratios.items())
    return f"Made by a program and not by people (rows with `synthetic: true`): {listed}."


def _lengths(found: dict[str, int]) -> str:
    """Return percentiles in words: `half up to 142, 90% up to 190, longest 250`."""
    names = {"p50": "half up to", "max": "longest"}
    return ", ".join(f"{names.get(k, f'{k[1:]}% up to')} {v:,}" for k, v in found.items())


def _wording(found: dict[str, Any]) -> list[str]:
    """Return the section on how varied the train rows are."""
    parts = ["## Variety", f"Of the first {found['num_rows']:,} train rows."]
    if found["lead_words"]:
        listed = ", ".join(f"{_literal(w)} {count:,}" for w, count in found["lead_words"].items())
        parts.append(
            f"Prompts begin with {found['num_lead_words']:,} different words ({listed}). That is "
            f"as varied as {found['effective_lead_words']:g} words that are equally frequent."
        )
    listed = ", ".join(f"{_literal(t)} {share:.0%}" for t, share in found["terms"].items())
    parts.append(f"{found['num_terms']:,} different terms; in most rows: {listed or 'none'}.")
    return parts


def _dedup_text(dedup: dict[str, Any], is_text: bool) -> str:
    side = {"both": "prompt and answer", "prompt": "the prompt", "completion": "the answer"}
    text = (
        f"Compared on {'the text' if is_text else side[dedup['on']]}. Exact copies after case and "
        f"white space removed: {dedup['num_exact']:,}"
        f"{'' if dedup['exact'] else ' (switched off)'}. Near-duplicates (Jaccard similarity of "
        f"{dedup['ngram_words']}-word shingles at least "
        f"{dedup['threshold']:g}) removed: {dedup['num_near']:,}"
        f"{'' if dedup['near'] else ' (switched off)'}. Clusters of two or more rows: "
        f"{dedup['num_clusters']:,}; the largest has {dedup['largest_cluster']:,}. Candidates come "
        f"from MinHash ({dedup['bands']} bands of {dedup['rows_per_band']} hash values); each pair "
        "is then compared exactly."
    )
    listed = ", ".join(
        f"{size} row{'s' * (size != '1')}: {count:,}"
        for size, count in dedup["cluster_sizes"].items()
    )
    text += f" Clusters by size: {listed or 'none'}."
    if dedup["least_similar_removed"]:
        rows = [
            [f"{pair['similarity']:.3f}", f"`{pair['removed']}`", f"`{pair['kept']}`"]
            for pair in dedup["least_similar_removed"]
        ]
        text += "\n\nThe least similar rows that were removed:\n\n"
        text += _table(["similarity", "removed", "kept"], rows)
    return text


def _truncations(found: dict[str, Any]) -> list[str]:
    """Return the section on rows that were cut to fit."""
    rows = [[f"`{row['source']}`", row["cut"]] for row in found["rows"][:_TRUNCATED_SHOWN]]
    return [
        "## Rows that were cut to fit",
        f"{found['num_rows']:,} rows that stay were longer than allowed. Answers and system "
        "prompts are whole; `truncated` in `card.json` lists the rows.",
        _table(["row", "of its tokens"], rows),
    ]


def _filters(found: dict[str, Any]) -> list[str]:
    """Return the section on filters, if any did something."""
    if not found["changes"] and not found["examples"]:
        return []
    changed = ", ".join(
        f"{name} in {counted(count, 'row')}" for name, count in found["changes"].items()
    )
    parts = ["## Filters", f"Mended: {changed or 'nothing'}."]
    if found["examples"]:
        rows = [
            [_literal(example[key]) for key in ("source", "reason")] + [_cut(example["text"])]
            for example in found["examples"]
        ]
        parts += [
            "Rows that were dropped, a few of each kind:",
            _table(["row", "why", "text"], rows),
        ]
    return parts


def _fixes(applied: list[dict[str, Any]]) -> list[str]:
    """Return the section on what people's marks have changed, if anything."""
    if not applied:
        return []
    rows = [
        [
            _literal(item["source"]),
            item["side"],
            FIX_LABELS[item["action"]],
            _literal(shorten(item["before"], _FIX_CHARACTERS)),
            _literal(shorten(item["after"], _FIX_CHARACTERS)) if item["after"] else "–",
            _literal(", ".join(item["reviewers"])),
            item["created_at"][:10],
        ]
        for item in applied[:_FIXES_SHOWN]
    ]
    header = ["row", "split", "done", "the files say", "now", "by", "on"]
    more = f" The first {_FIXES_SHOWN} are shown." * (len(applied) > _FIXES_SHOWN)
    plural = "mark has" if len(applied) == 1 else "marks have"
    return [
        "## Fixes",
        f"People's {plural} changed {len(applied):,} row{'s' * (len(applied) != 1)}; none of them "
        f"went to another split. All are in `fixes` of `card.json`.{more}",
        _table(header, rows),
    ]


def _conflicts(found: dict[str, Any]) -> list[str]:
    """Return the section on conflicts; documents have none."""
    return ["## Conflicting answers", _conflicts_text(found)] if found else []


def _conflicts_text(found: dict[str, Any]) -> str:
    if not found["num_same_prompt"] and not found["num_near_prompt"]:
        return "No two rows ask the same, or nearly the same, and answer differently."
    text = (
        f"{found['num_same_prompt']:,} prompts have several answers "
        f"({found['num_rows_same_prompt']:,} rows). {found['num_near_prompt']:,} pairs of prompts "
        f"share at least {found['near_threshold']:.0%} of their words and have different answers. "
        "Nothing was removed for it. Several answers to one prompt cannot all be learned: task "
        "clarity is the first thing to fix. Prompts that nearly agree may differ for good reason; "
        "they are worth a look."
    )
    rows = [
        [
            f"{example['kind']} {example['similarity']:.2f}" if position == 0 else "",
            _literal(row["source"]),
            _cut(row["prompt"]),
            _cut(row["answer"]),
        ]
        for example in found["examples"]
        for position, row in enumerate(example["rows"])
    ]
    return text + "\n\n" + _table(["", "row", "prompt", "answer"], rows)


def _cut(text: str, length: int = 120) -> str:
    return _literal(shorten(" ".join(text.split()), length))


def _literal(text: str) -> str:
    """Return data as a code span: nothing in it is read as Markdown, no address is fetched."""
    text = " ".join(text.split())
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    fence = "`" * (longest + 1)
    return f"{fence}{space}{text}{space}{fence}" if text else ""


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
            [
                _literal(example["removed"]),
                f"{example['similarity']:.2f}",
                _literal(example["reason"]),
            ]
            for example in examples[:10]
        ]
        text += "\n\n" + _table(["removed", "similarity", "reason"], lines)
    return text


def _split_text(split: dict[str, Any], is_mixture: bool) -> str:
    wanted = (
        f"{split['num_test_examples']:,} test rows"
        if split["num_test_examples"] is not None
        else f"about {split['test_ratio']:.0%} of the rows for the test"
    )
    text = (
        f"Asked for: {wanted}. Rows with the same prompt or in the same cluster of duplicates are "
        f"on the same side: {split['num_units_train']:,} such groups are kept for training, "
        f"{split['num_units_test']:,} for the test."
    )
    if split["num_units_validation"]:
        text += f" {split['num_units_validation']:,} more are for validation."
    if split["group_by"] is not None:
        names = [
            f"{side} has {split[f'num_groups_{side}']:,} ("
            + ", ".join(f"{_literal(n)} {rows:,}" for n, rows in split[f"groups_{side}"].items())
            + ("…" if split[f"num_groups_{side}"] > len(split[f"groups_{side}"]) else "")
            + ")"
            for side in ("train", "test")
        ]
        text += f"\n\nNo `{split['group_by']}` is on both sides: " + "; ".join(names) + "."
    if "strata" in split:
        by = ["task"] * is_mixture + [f"`{split['stratify_by']}`"] * bool(split["stratify_by"])
        text += f"\n\nStratified by {' and '.join(by)}:\n\n" + _strata(split["strata"])
    return text


def _strata(strata: dict[str, dict[str, int]]) -> str:
    total = {name: sum(counts.values()) for name, counts in strata.items()}
    values = list(strata["train"])[:20]
    rows = [
        [_literal(value)]
        + [
            f"{counts.get(value, 0):,} ({counts.get(value, 0) / total[name]:.1%})"
            for name, counts in strata.items()
        ]
        for value in values
    ]
    return _table(["value", *strata], rows)


def _sample_text(name: str, row: dict[str, Any]) -> str:
    if "messages" in row:
        text = "\n".join(f"[{m['role']}]\n{Message.of(m).text}" for m in row["messages"])
    else:
        text = row["text"]
    text = shorten(text, 2001)
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
