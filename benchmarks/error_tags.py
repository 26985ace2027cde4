"""Error tags on answers with planted errors: 50 of each tag among 1,000 answers.

    python benchmarks/error_tags.py ROWS.jsonl    # question and answer in each row

Prints, as Markdown, of each tag how many of the planted errors were found (recall) and how many of
the answers it was given to have it (precision). The other answers are the references. The seed is
fixed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tuneloop.config import TaskConfig
from tuneloop.evals.scoring.error_tags import (
    ERROR_TAGS,
    Background,
    JudgedAnswer,
    find_errors,
    languages_of,
    terms_of,
    vocabulary_of,
)
from tuneloop.evals.scoring.metrics import Scorer
from tuneloop.evals.scoring.nearest import TrainRow
from tuneloop.records import Conversation, FinishReason, Message

NUM_ANSWERS, NUM_PLANTED = 1000, 50
NUMBERS = ("37", "1,250", "2019", "48%", "$15", "0.75", "640", "12.5", "8,000", "1987")
NAMES = (
    *("Elena Marquez", "Northwind Systems", "Zurich", "Professor Okafor", "Bluefin", "Tanaka"),
    *("Microsoft", "Berlin", "TensorBoard", "Apache Kafka", "Amazon", "Linus Torvalds"),
)
CLAIMS = (
    "It was shown by {} in practice.",
    "Most users at {} rely on it.",
    "According to {}, this holds.",
    "This was first done by {}.",
)
COUNTS = ("It takes {} in most cases.", "There are {} of them.", "It was changed in {}.")
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "As an AI language model, I cannot provide information on this topic.",
    "I cannot answer that question.",
    "I'm unable to assist with this request.",
    "I apologize, but I am not able to provide that.",
    "Sorry, I can't comply with this.",
    "I don't have enough information to answer this.",
    "I must decline to answer.",
    "I don't know the answer to that.",
    "I won't be able to help with that one.",
)
FOREIGN = (
    "Das Modell wird mit den Daten des Benutzers trainiert, und danach lässt es sich abfragen.",
    "El modelo se entrena con los datos del usuario y después se puede consultar sin problemas.",
    "Le modèle est entraîné avec les données de l'utilisateur, puis il peut être interrogé.",
    "Il modello viene addestrato con i dati dell'utente e poi può essere interrogato facilmente.",
    "Модель обучается на данных пользователя, после чего к ней можно обращаться с вопросами.",
    "模型使用用户的数据进行训练，然后用户可以随时向模型提出各种各样的问题，模型会给出相应的回答，用户也可以查看结果。",
)
LEAKS = (
    "{}<|im_end|>",
    "{}\n<|im_start|>user\nWhat else?",
    "{}</s>",
    "[INST] {} [/INST]",
    "{}\n\nUser: And then?\nAssistant: It goes on.",
    "{}\n### Instruction:\nSay more.",
    "{} {{{{ context }}}}",
    "<start_of_turn>model\n{}",
    "Assistant: {}",
    "{}<|endoftext|>",
)
MISSPELLINGS = {
    "the": "teh", "and": "adn", "with": "wiht", "that": "taht", "which": "whcih", "from": "form e",
    "model": "modle", "models": "modles", "data": "dtaa", "training": "trainnig", "using": "usnig",
    "language": "langauge", "specific": "speicfic", "information": "infromation",
    "provides": "provdies", "documentation": "documenattion", "code": "cdoe", "for": "fro m",
    "used": "uesd", "performance": "perfromance", "such": "scuh", "more": "mroe", "can": "cna n",
    "allows": "alolws", "through": "thruogh", "based": "bsaed", "different": "diferrent",
}  # fmt: skip


class Row(NamedTuple):
    """A question with its answer."""

    question: str
    reference: str


class Planted(NamedTuple):
    """An answer with an error.

    Args:
        twins: Training rows near its question.
        is_json: The task asks for JSON, whose only field is the reference.
    """

    completion: str
    finish_reason: FinishReason = "stop"
    twins: tuple[TrainRow, ...] = ()
    is_json: bool = False


def sentences(text: str) -> list[str]:
    """Return a text's sentences."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def unsupported(row: Row, chooser: random.Random) -> Planted:
    """Return the reference with a sentence more that names what nobody asked about."""
    if chooser.random() < 0.5:
        claim = chooser.choice(COUNTS).format(chooser.choice(NUMBERS))
    else:
        claim = chooser.choice(CLAIMS).format(chooser.choice(NAMES))
    parts = sentences(row.reference)
    parts.insert(chooser.randint(1, len(parts)), claim)
    return Planted(" ".join(parts))


def contradicts(row: Row, chooser: random.Random) -> Planted | None:
    """Return the reference turned round, beside a training row that says what it said."""
    twin = TrainRow("row", "", row.question, row.reference, 0.9)
    start = re.match(r"(Yes|No)\b", row.reference)
    if start:
        other = "No" if start[1] == "Yes" else "Yes"
        return Planted(other + row.reference[start.end() :], twins=(twin,))
    denied, count = re.subn(r"\b(is|are|can|does|will|has)\b", r"\1 not", row.reference, count=1)
    return Planted(denied, twins=(twin,)) if count else None


def misspelt(row: Row, chooser: random.Random) -> Planted | None:
    """Return the reference with at least one word in ten misspelt."""
    words = row.reference.split(" ")
    places = [i for i, word in enumerate(words) if word in MISSPELLINGS]
    wanted = max(2, len(words) // 10)
    if len(places) < wanted:
        return None
    for place in chooser.sample(places, wanted):
        words[place] = MISSPELLINGS[words[place]].replace(" ", "")
    return Planted(" ".join(words))


def cut_off(row: Row, chooser: random.Random) -> Planted:
    """Return the first half of the reference, stopped by the limit."""
    words = row.reference.split(" ")
    return Planted(" ".join(words[: max(1, len(words) // 2)]), "length")


def never_stops(row: Row, chooser: random.Random) -> Planted:
    """Return the reference said again and again, stopped by the limit."""
    return Planted(" ".join([row.reference] * 5)[: 5 * len(row.reference) - 20], "length")


def wrong_format(row: Row, chooser: random.Random) -> Planted:
    """Return JSON that is cut, has text beside it, or is none."""
    good = json.dumps({"answer": row.reference})
    bad = (good[:-2], f"Here it is: {good}", row.reference, good.replace('"', "'"))
    return Planted(chooser.choice(bad), is_json=True)


def too_long(row: Row, chooser: random.Random) -> Planted:
    """Return the reference with three times as many words of other kinds."""
    count = 3 * len(row.reference.split())
    filler = [chooser.choice(FILLER) for _ in range(count)]
    return Planted(f"{row.reference} {' '.join(filler)}.")


FILLER = (
    "simply then often where people also may find ways of doing things rather well if they want "
    "and take time over each small step before moving on to what comes after it in turn without "
    "any hurry so as to learn how it all fits into one picture worth keeping"
).split()
PLANTS: dict[str, Callable[[Row, random.Random], Planted | None]] = {
    "cut_off": cut_off,
    "never_stops": never_stops,
    "empty": lambda row, chooser: Planted(chooser.choice(("", " ", "\n"))),
    "repetitive": lambda row, chooser: Planted(
        " ".join([*sentences(row.reference)] + [sentences(row.reference)[-1]] * 6)
    ),
    "wrong_format": wrong_format,
    "too_long": too_long,
    "misspelt": misspelt,
    "leaked_template": lambda row, chooser: Planted(chooser.choice(LEAKS).format(row.reference)),
    "refusal": lambda row, chooser: Planted(chooser.choice(REFUSALS)),
    "wrong_language": lambda row, chooser: Planted(chooser.choice(FOREIGN)),
    "copies_prompt": lambda row, chooser: Planted(
        f"{chooser.choice(('', 'You asked: '))}{row.question}"
    ),
    "unsupported": unsupported,
    "contradicts_training": contradicts,
}
# What an error brings along by its nature: a refusal without end is not counted against a tag.
IMPLIED = {
    "never_stops": {"cut_off", "repetitive", "too_long"},
    "repetitive": {"too_long"},
}


def read_rows(path: Path) -> list[Row]:
    """Return the rows with a question and an answer of some length."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        question = re.sub(r"#+ *(?:Question|Answer) *:", "", record["question"]).strip()
        answer = record["answer"].strip()
        if len(question.split()) >= 6 and 12 <= len(answer.split()) <= 150:
            rows.append(Row(question, answer))
    return rows


def main() -> None:
    """Plant, tag and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="JSONL with `question` and `answer`")
    parser.add_argument("--show", action="store_true", help="print what was missed or wrongly told")
    options = parser.parse_args()
    chooser = random.Random(0)
    rows = read_rows(options.rows)
    chooser.shuffle(rows)
    rows = rows[:NUM_ANSWERS]
    conversations = [
        Conversation((Message("user", row.question), Message("assistant", row.reference)))
        for row in rows
    ]
    terms, vocabulary = terms_of(conversations), vocabulary_of(conversations)
    languages = languages_of(row.reference for row in rows)
    kinds = [tag for tag in PLANTS for _ in range(NUM_PLANTED)]
    waiting = dict.fromkeys(PLANTS, NUM_PLANTED)
    writing = Scorer(TaskConfig(type="generation"), {})
    reading = Scorer(TaskConfig(type="extraction"), {})
    planted, told, right = Counter(), Counter(), Counter()
    clean = Counter()
    started = time.perf_counter()
    for row in rows:
        tag, answer = "", Planted(row.reference)
        for kind in chooser.sample(sorted(waiting), len(waiting)):
            if waiting[kind] and (made := PLANTS[kind](row, chooser)) is not None:
                tag, answer = kind, made
                waiting[kind] -= 1
                break
        expected = json.dumps({"answer": row.reference}) if answer.is_json else row.reference
        judged = JudgedAnswer(
            expected, answer.completion, answer.finish_reason,
            json.dumps([{"role": "user", "content": row.question}]), row.question,
        )  # fmt: skip
        scorer = reading if answer.is_json else writing
        found = find_errors(scorer, judged, Background(terms, vocabulary, languages, answer.twins))
        names = {evidence.tag for evidence in found}
        allowed = {tag} | IMPLIED.get(tag, set())
        planted[tag] += 1
        for name in names:
            told[name] += name not in allowed - {tag}
            right[name] += name == tag
            clean[name] += not tag
        if options.show and (tag not in names if tag else names):
            print(
                f"missed {tag!r}" if tag else f"told {names}", found, answer.completion, sep="\n  "
            )
        elif options.show and names - allowed:
            print(f"{tag}: also {names - allowed}", found, answer.completion, sep="\n  ")
    seconds = time.perf_counter() - started
    assert len(kinds) == sum(planted[tag] for tag in PLANTS), waiting
    print(f"{len(rows):,} answers, {planted['']} of them without an error, {seconds:.1f} s\n")
    print("| tag | planted | recall | precision | on answers without error |")
    print("|---|---|---|---|---|")
    for tag in ERROR_TAGS:
        if tag in PLANTS:
            recall = right[tag] / planted[tag]
            precision = right[tag] / max(1, told[tag])
            print(f"| `{tag}` | {planted[tag]} | {recall:.2f} | {precision:.2f} | {clean[tag]} |")


if __name__ == "__main__":
    main()
