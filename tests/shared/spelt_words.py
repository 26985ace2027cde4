"""Words to spell: rows, a dataset of them, and a model that spells better when shown how."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.evals.scoring.questions import choose_shots
from tuneloop.records import Arm, Endpoint

SYSTEM = {"role": "system", "content": "Spell it in capitals as JSON."}


def row(index: int, word: str) -> dict:
    answer = json.dumps({"word": word.upper(), "letters": len(word)})
    return {
        "row_id": f"row-{index:03d}",
        "source": f"words.jsonl:{index + 1}",
        "messages": [
            SYSTEM,
            {"role": "user", "content": f"spell {word}"},
            {"role": "assistant", "content": answer},
        ],
        "num_tokens": 10 + index % 7,
    }


WORDS = ["apple", "pear", "plum", "cherry", "fig", "grape", "lemon", "mango", "melon", "kiwi"]


def publish_dataset(
    workspace: Workspace, test: list[dict], train: list[dict], fingerprint: str = "f" * 64
) -> Artifact:
    with workspace.draft("datasets", "words", fingerprint) as draft:
        for split, rows in (("train", train), ("test", test)):
            (draft.path / split).mkdir()
            if rows:
                pq.write_table(pa.Table.from_pylist(rows), draft.path / split / "part-0.parquet")
        return draft.publish(config={}, resources={}, inputs=[], metrics={})


def spell(messages: list[dict[str, str]]) -> tuple[str, str]:
    """Answer well when shown how, badly otherwise."""
    word = messages[-1]["content"].removeprefix("spell ")
    if len(messages) > 2:
        return json.dumps({"word": word.upper(), "letters": len(word)}), "stop"
    if word == "fig":
        return '{"word": "FIG", "let', "length"
    return json.dumps({"word": word.upper(), "letters": 5}), "stop"


def arms(server, dataset: Artifact, num_shots: int = 2) -> list[Arm]:
    endpoint = Endpoint(server.url, "parrot")
    shots = choose_shots(dataset, num_shots, 0)
    return [
        Arm("base", endpoint, (), "weights-1"),
        Arm("base+few-shot", endpoint, shots, "weights-1"),
    ]
