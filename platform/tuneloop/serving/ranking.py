"""The most probable of several answers, each as a whole.

Log-probabilities only fall along the tree of the answers' tokens. So the first answer that a
best-first search reaches is the most probable one, and what it has not looked at is bounded by the
nodes it would look at next.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class _Node:
    """A beginning of some answers."""

    path: tuple[int, ...] = ()
    children: dict[int, _Node] = field(default_factory=dict)
    answer: int | None = None  # at its end: which it is


class AnswerTree:
    """Answers as a tree of their tokens; read by any number of searches.

    Args:
        answers: Token ids of each, all different, a stop token last and nowhere else.
    """

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self.answers = [tuple(answer) for answer in answers]
        self.longest = max(map(len, self.answers))
        self.root = _Node()
        for index, answer in enumerate(self.answers):
            node = self.root
            for token in answer:
                node = node.children.setdefault(token, _Node((*node.path, token)))
            node.answer = index


class _Candidate(NamedTuple):
    """A node to look at, ordered by its probability; nodes of one have numbers of their own."""

    negative_logprob: float
    number: int
    node: _Node


class RankedAnswer(NamedTuple):
    """One of the answers, by its place among those given, with its log-probability."""

    place: int
    logprob: float


class AnswerSearch:
    """One search through a tree, moved on by the logits behind the tokens it asks for.

    Args:
        coverage: Go on until the answers found have this share of the probability of all of them;
            0: until there is one, 1: until there are all.

    Attributes:
        found: Answers, most probable first.
        path: The tokens behind the prompt, the next one to be fed last.
        num_to_drop: Tokens behind the prompt that were fed and are not on the path.
        is_over: Whether there is nothing more to find.
    """

    def __init__(self, tree: AnswerTree, coverage: float = 0.0) -> None:
        self.tree = tree
        self.found: list[RankedAnswer] = []
        self.path: tuple[int, ...] = ()
        self.num_to_drop = 0
        self._coverage = coverage
        self._node, self._logprob = tree.root, 0.0
        self._open: list[_Candidate] = []
        self._num_seen = 0
        self.is_over = False

    @property
    def coverage(self) -> float:
        """The share of all answers' probability that those found have, at least."""
        if not self.found:
            return 0.0
        # Beside the most probable one: the probabilities of long answers are too small themselves.
        best = self.found[0].logprob
        found = math.fsum(math.exp(answer.logprob - best) for answer in self.found)
        rest = math.fsum(math.exp(-one.negative_logprob - best) for one in self._open)
        return found / (found + rest)

    def advance(self, logits: Tensor) -> int | None:
        """Return the token to feed next, or None: the search has ended. Shape (V,).

        Args:
            logits: Those behind the last token that was fed, at first behind the prompt.
        """
        self.num_to_drop = 0
        if len(self.path) == len(self._node.path):
            self._look(logits)
            if not self._choose():
                self.is_over = True
                return None
        self.path = self._node.path[: len(self.path) - self.num_to_drop + 1]
        return self.path[-1]

    def _look(self, logits: Tensor) -> None:
        """Add what follows the node."""
        tokens = list(self._node.children)
        # By NumPy: for one row PyTorch's threads cost more than they save.
        values = logits.float().cpu().numpy()
        values = values - values.max()
        logprobs = (values[tokens] - np.log(np.exp(values).sum())).tolist()
        for child, logprob in zip(self._node.children.values(), logprobs, strict=True):
            self._num_seen += 1
            total = self._logprob + logprob
            heapq.heappush(self._open, _Candidate(-total, self._num_seen, child))

    def _choose(self) -> bool:
        """Set the node to look at next; return whether there is one."""
        while self._open:
            best = heapq.heappop(self._open)
            if best.node.answer is None:
                self._node, self._logprob = best.node, -best.negative_logprob
                shared = 0
                for mine, theirs in zip(self.path, best.node.path, strict=False):
                    if mine != theirs:
                        break
                    shared += 1
                self.num_to_drop = len(self.path) - shared
                return True
            self.found.append(RankedAnswer(best.node.answer, -best.negative_logprob))
            if self._coverage < 1 and self.coverage >= self._coverage:
                return False
        return False
