"""Wrong labels in training rows: are they among the rows shown beside the answers they spoil?

    python benchmarks/label_errors.py INTENTS.jsonl    # text, intent and split in each row

2% of the training rows get another label. A wrong answer is caused by them where the same
classifier (the simple arm) answers right without them. Prints, as Markdown, for how many of these
answers one of the planted rows is among the five that are shown, and among the five most similar
ones. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from tuneloop.config import TaskConfig
from tuneloop.evals.scoring.nearest import NUM_NEAREST, NearestRows
from tuneloop.evals.scoring.questions import Question
from tuneloop.evals.scoring.simple import answer_simply, nearest_rows
from tuneloop.records import Conversation, Message

PLANTED_SHARE = 0.02


def main() -> None:
    """Plant, train, look up and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="JSONL with `text`, `intent` and `split`")
    parser.add_argument("--seeds", type=int, default=8, help="default: %(default)s")
    options = parser.parse_args()
    every = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    names = sorted({row["intent"] for row in every if row["split"] == "train"})
    print("| labels | training rows | caused | shown | five most similar | s |")
    print("|---|---|---|---|---|---|")
    for num_labels, seeds in ((30, range(options.seeds)), (len(names), [11])):
        caused = shown = similar = num_rows = 0
        seconds = 0.0
        for seed in seeds:
            chooser = random.Random(seed)
            labels = sorted(chooser.sample(names, num_labels))
            task = TaskConfig(type="classification", labels=labels)
            chosen = [row for row in every if row["intent"] in set(labels)]
            train = [row for row in chosen if row["split"] == "train"]
            questions = [
                Question(f"q{index}", (Message("user", row["text"]),), row["intent"])
                for index, row in enumerate(chosen)
                if row["split"] == "val"
            ]
            planted = set(chooser.sample(range(len(train)), round(PLANTED_SHARE * len(train))))
            clean, spoilt = [], []
            for index, row in enumerate(train):
                other = chooser.choice([label for label in labels if label != row["intent"]])
                for rows, label in (
                    (clean, row["intent"]),
                    (spoilt, other if index in planted else row["intent"]),
                ):
                    turns = Message("user", row["text"]), Message("assistant", label)
                    rows.append(Conversation(turns, str(index)))
            before = answer_simply(clean, questions, task)
            after = answer_simply(spoilt, questions, task)
            wrong = [
                q for q in questions if before[q.example_id] == q.reference != after[q.example_id]
            ]
            started = time.perf_counter()
            found = NearestRows(spoilt, task).explain(wrong)
            seconds += time.perf_counter() - started
            caused, num_rows = caused + len(wrong), len(train)
            shown += sum(any(int(r.row_id) in planted for r in rows) for rows in found.values())
            near = nearest_rows(spoilt, wrong, NUM_NEAREST)
            similar += sum(any(index in planted for index in indices) for indices in near)
        print(
            f"| {num_labels} | {num_rows:,} | {caused} | {shown / max(1, caused):.0%} "
            f"| {similar / max(1, caused):.0%} | {seconds:.1f} |"
        )


if __name__ == "__main__":
    main()
