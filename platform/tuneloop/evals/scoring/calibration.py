"""Whether a model is right as often as it is sure: probabilities of labels against what was right.

Source: expected calibration error, Guo et al. 2017 (arXiv:1706.04599), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tuneloop.evals.scoring.predictions import Prediction

_NUM_BINS = 10


def describe_calibration(predictions: Sequence[Prediction], metric: str) -> dict[str, Any] | None:
    """Return the expected calibration error with its table; None where nothing has a probability.

    Bins are ten of equal width; the error is the mean distance between probability and share of
    right answers in a bin, each bin weighted by its answers.

    Args:
        predictions: Of one arm.
        metric: Says which answers are right, as 1.
    """
    pairs = [
        (p.probability, score)
        for p in predictions
        if p.probability is not None and (score := p.scores.get(metric)) is not None
    ]
    if not pairs:
        return None
    probabilities, right = np.array(pairs, dtype=float).T
    bins = np.minimum((probabilities * _NUM_BINS).astype(int), _NUM_BINS - 1)
    table = [
        {
            "low": number / _NUM_BINS,
            "high": (number + 1) / _NUM_BINS,
            "n": int(inside.sum()),
            "mean_probability": float(probabilities[inside].mean()),
            "accuracy": float(right[inside].mean()),
        }
        for number in range(_NUM_BINS)
        if (inside := bins == number).any()
    ]
    gaps = [one["n"] * abs(one["mean_probability"] - one["accuracy"]) for one in table]
    return {
        "n": len(pairs),
        "expected_calibration_error": sum(gaps) / len(pairs),
        "mean_probability": float(probabilities.mean()),
        "accuracy": float(right.mean()),
        "bins": table,
    }
