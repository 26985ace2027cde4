"""Which rows are trained on when: a pure function of seed, epoch and step.

The optimizer sees global batches of `global_batch_size` rows in an order that depends on the seed
and the epoch alone. How a batch is cut into micro-batches and spread over workers changes speed
and memory, never the result.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tuneloop.config import TrainingConfig


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Return the rows in the order of an epoch; cached, as every step asks for a part of it."""
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class Schedule:
    """The order of global batches over all epochs.

    Args:
        num_rows: Rows in the train split.
        global_batch_size: Rows of one optimizer step; the last of an epoch may have fewer.
        num_epochs: Passes over the rows.
        max_steps: Ends the training earlier.
        seed: Seed of the order.
    """

    num_rows: int
    global_batch_size: int
    num_epochs: int
    max_steps: int | None
    seed: int

    @classmethod
    def of(cls, config: TrainingConfig, num_rows: int) -> Schedule:
        """Return the order that a configuration asks for."""
        return cls(
            num_rows, config.global_batch_size, config.num_epochs, config.max_steps, config.seed
        )

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.global_batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        total = self.steps_per_epoch * self.num_epochs
        return total if self.max_steps is None else min(total, self.max_steps)

    def num_validations(self, every: int | None) -> int:
        """Return how often the validation rows are gone through.

        Args:
            every: Steps from one time to the next; None: an epoch. After the last step it is done
                in any case.
        """
        return math.ceil(self.num_steps / (every or self.steps_per_epoch))

    def epoch(self, step: int) -> int:
        """Return the epoch, from 0, that a step from 0 belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> np.ndarray:
        """Return the rows of one step. Shape (at most global_batch_size,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        order = _order(self.seed, epoch, self.num_rows)
        return order[start : start + self.global_batch_size]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of a value of each row over each step of the first epoch.

        Args:
            values: Shape (num_rows,).

        Returns:
            Shape (steps of the first epoch that are taken,).
        """
        num_steps = min(self.steps_per_epoch, self.num_steps)
        order = _order(self.seed, 0, self.num_rows)[: num_steps * self.global_batch_size]
        return np.add.reduceat(values[order], np.arange(num_steps) * self.global_batch_size)


def split_batch(
    batch: np.ndarray, lengths: np.ndarray, num_bins: int, size: int
) -> list[list[int]]:
    """Cut a global batch into micro-batches with about the same number of tokens.

    Longest first into the lightest micro-batch that has room (Graham 1969, LPT).

    Args:
        batch: Row numbers. Shape (rows,).
        lengths: Tokens of every row of the split.
        num_bins: Micro-batches of one step on all workers together.
        size: Most rows in a micro-batch.

    Returns:
        `num_bins` lists of row numbers; some are empty when the batch is an incomplete one.
    """
    if len(batch) > num_bins * size:
        raise ValueError(f"{len(batch)} rows do not fit {num_bins} micro-batches of {size}")
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, index) for index in range(num_bins)]
    for row in sorted(batch.tolist(), key=lambda row: (-int(lengths[row]), row)):
        tokens, index = heapq.heappop(heap)
        bins[index].append(row)
        if len(bins[index]) < size:
            heapq.heappush(heap, (tokens + int(lengths[row]), index))
    return bins


def micro_batches(bins: list[list[int]], rank: int, world_size: int) -> list[list[int]]:
    """Return the micro-batches of one worker: the same number on every rank."""
    if len(bins) % world_size:
        raise ValueError(f"{len(bins)} micro-batches cannot be shared by {world_size} workers")
    return bins[rank::world_size]
