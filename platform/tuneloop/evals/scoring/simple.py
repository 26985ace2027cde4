"""The cheapest thing that could do the job: a classifier, or the nearest training row's answer.

It is the opponent that a finetuned model has to beat before it is worth serving. It learns from the
train split alone and takes seconds on a CPU.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tuneloop.artifacts import Artifact
from tuneloop.config import TaskConfig
from tuneloop.evals.scoring.questions import Question, read_solved
from tuneloop.records import Arm, Conversation, Endpoint, Message

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.multiclass import OneVsRestClassifier

_log = logging.getLogger("tuneloop.evals")
# Raised when a change here changes an answer.
VERSION = 3
# Rows that are learned from at most: 20,000 rows with 150 labels take seconds.
MOST_ROWS = 20_000
_MANY_ROWS = 1_000
_AT_ONCE = 512
# A word, or a sign by itself. In scripts that put no space between words each character is a word;
# pairs of words then are what words are elsewhere.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = rf"[^\W{_UNSPACED}]+|[{_UNSPACED}]|[^\w\s]"


def simple_arm(name: str, dataset: Artifact, task: TaskConfig) -> Arm:
    """Return the arm whose answers `answer_simply` learns from a dataset's train split."""

    def answer(questions: Sequence[Question]) -> Mapping[str, str]:
        return answer_simply(read_solved(dataset, list(task.tasks)), questions, task)

    return Arm(
        name,
        Endpoint("", ""),
        (),
        f"simple/{VERSION}/{dataset.train_fingerprint}",
        answer=answer,
    )


def with_nearest_shots(arm: Arm, dataset: Artifact, num_shots: int, tasks: Collection[str]) -> Arm:
    """Return the arm with the train rows nearest to each question as its solved examples."""

    def choose(questions: Sequence[Question]) -> Mapping[str, tuple[Conversation, ...]]:
        return nearest_shots(read_solved(dataset, tasks), questions, num_shots)

    identity = f"nearest/{VERSION}/{num_shots}/{dataset.train_fingerprint}"
    return replace(arm, choose=choose, chosen_by=identity)


def answer_simply(
    train: Sequence[Conversation], questions: Sequence[Question], task: TaskConfig
) -> dict[str, str]:
    """Return an answer to every question that has a training row of its task, by example id.

    Classification: logistic regression (one label against the rest) on TF-IDF of words and pairs
    of words. Otherwise the answer of the training row whose question is most alike by TF-IDF.

    Args:
        train: Training rows; each ends with its answer.
        questions: What to answer.
        task: The task, or the mixture whose tasks the rows name.
    """
    answers: dict[str, str] = {}
    for name in task.tasks or ("",):
        rows = [row for row in train if row.task == name]
        asked = [question for question in questions if question.task == name]
        if not rows or not asked:
            continue
        if len(rows) > MOST_ROWS:
            _log.info("the simple arm learns from %d of %d rows", MOST_ROWS, len(rows))
            rows = rows[:MOST_ROWS]
        labels = [row.messages[-1].text for row in rows]
        if task.of(name).type == "classification":
            chosen = _classify(rows, labels, asked)
        else:
            chosen = [labels[indices[0]] for indices in nearest_rows(rows, asked, 1)]
        answers |= {q.example_id: text for q, text in zip(asked, chosen, strict=True)}
    return answers


def nearest_shots(
    train: Sequence[Conversation], questions: Sequence[Question], num_shots: int
) -> Mapping[str, tuple[Conversation, ...]]:
    """Return for each question the training rows of its task most alike, the nearest one last."""
    shots: dict[str, tuple[Conversation, ...]] = {}
    for name in dict.fromkeys(question.task for question in questions):
        rows = [row for row in train if row.task == name]
        asked = [question for question in questions if question.task == name]
        if rows:
            for question, indices in zip(asked, nearest_rows(rows, asked, num_shots), strict=True):
                shots[question.example_id] = tuple(rows[index] for index in reversed(indices))
    return shots


def nearest_rows(
    rows: Sequence[Conversation], questions: Sequence[Question], count: int
) -> list[list[int]]:
    """Return for each question the indices of the rows most alike, the nearest first.

    Alike is the cosine of TF-IDF vectors; of rows equally alike the earlier one comes first.
    """
    texts, asked = asked_texts(rows, questions)
    vectorizer = vectorizer_of_words()
    try:
        known = vectorizer.fit_transform(texts)
    except ValueError:  # no row has a word
        return [list(range(min(count, len(rows)))) for _ in asked]
    nearest: list[list[int]] = []
    for start in range(0, len(asked), 256):
        similarity = (vectorizer.transform(asked[start : start + 256]) @ known.T).toarray()
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
        nearest += order.tolist()
    return nearest


def _classify(
    rows: Sequence[Conversation], labels: Sequence[str], questions: Sequence[Question]
) -> list[str]:
    if len(set(labels)) == 1:
        return [labels[0]] * len(questions)
    texts, asked = asked_texts(rows, questions)
    # With many rows, words that only one of them has tell nothing and cost most: 7,500 rows of 150
    # labels take 2 s of CPU without them and 58 s with them; the multinomial solver takes 48 s.
    vectorizer = vectorizer_of_words(min_rows=2 if len(rows) >= _MANY_ROWS else 1)
    try:
        known = vectorizer.fit_transform(texts)
    except ValueError:  # no word is in two rows, as where each row is a name
        return [Counter(labels).most_common(1)[0][0]] * len(questions)
    fitted = classifier().fit(known, labels)
    return [str(label) for label in fitted.predict(vectorizer.transform(asked))]


def classifier() -> OneVsRestClassifier:
    """Return the classifier of the simple arm, to be fitted."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    return OneVsRestClassifier(LogisticRegression(C=10.0, solver="liblinear", tol=1e-2))


def vectorizer_of_words(min_rows: int = 1, most_rows: float = 1.0) -> TfidfVectorizer:
    """Return TF-IDF of words and pairs of words.

    Args:
        min_rows: Rows that have to have a word for it to count.
        most_rows: Share of the rows that may have it, 0 to 1.
    """
    # Loading it takes a second, and only an evaluation that is not there yet needs it.
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        ngram_range=(1, 2),
        min_df=min_rows,
        max_df=most_rows,
        sublinear_tf=True,
        token_pattern=_WORD,
    )


def most_alike(texts: csr_matrix, others: csr_matrix) -> NDArray[np.float64]:
    """Return the largest cosine of each text's vector with others; 0 without any. Shape (N,).

    Args:
        texts: TF-IDF vectors. Shape (N, V).
        others: Likewise. Shape (M, V).
    """
    best = np.zeros(texts.shape[0])
    if not others.shape[0]:
        return best
    for start in range(0, texts.shape[0], _AT_ONCE):
        part = (texts[start : start + _AT_ONCE] @ others.T).toarray()
        best[start : start + len(part)] = part.max(axis=1)
    return np.minimum(best, 1.0)


def asked_texts(
    rows: Sequence[Conversation], questions: Sequence[Question]
) -> tuple[list[str], list[str]]:
    """Return what each row and each question asks; a system message only where they differ."""
    turns = [row.messages[:-1] for row in rows]
    systems = {tuple(m.text for m in messages if m.role == "system") for messages in turns}

    def text(messages: Sequence[Message]) -> str:
        return "\n".join(m.text for m in messages if m.role != "system" or len(systems) > 1)

    return [text(messages) for messages in turns], [text(q.messages) for q in questions]
