"""How probable models find the references: perplexity by tokens, and bits by bytes.

A model's perplexity is per token of its own tokenizer. Bits per byte compare models that cut texts
differently. Only models that are served here are asked: it takes their own ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tuneloop.evals.scoring.asking import EvaluationRequest, ModelAnswer
from tuneloop.evals.scoring.metrics import PERPLEXITY, REFERENCE_BITS
from tuneloop.evals.scoring.predictions import Prediction


def reference_requests(requests: Sequence[EvaluationRequest]) -> list[EvaluationRequest]:
    """Return for each question the request how probable its reference is, where it can be asked."""
    return [
        replace(request, identity=identity_of(request.identity), of_reference=True)
        for request in requests
        # With constrained answers, and for another sample, the same model is asked the same.
        if request.arm.encode and not request.arm.forms and request.question.reference.strip()
        if not request.sample
    ]


def identity_of(identity: str) -> str:
    """Return what an arm's probabilities of references are known by."""
    return f"{identity}-reference"


def perplexities(
    requests: Sequence[EvaluationRequest], answers: Sequence[ModelAnswer]
) -> dict[tuple[str, str], Mapping[str, float]]:
    """Return both metrics by arm and example; without those that could not be computed."""
    found: dict[tuple[str, str], Mapping[str, float]] = {}
    for request, answer in zip(requests, answers, strict=True):
        if answer.bits_per_byte is not None and answer.completion_tokens:
            bits = answer.bits_per_byte * len(request.question.reference.encode())
            found[request.arm.name, answer.example_id] = {
                PERPLEXITY: 2 ** min(bits / answer.completion_tokens, 1000.0),
                REFERENCE_BITS: answer.bits_per_byte,
            }
    return found


def stored_answer(prediction: Prediction, prompt: str) -> ModelAnswer:
    """Return what a published evaluation knows of a reference's probability.

    Args:
        prediction: With both metrics.
        prompt: What was asked, as `EvaluationRequest.prompt` has it.
    """
    perplexity, bits = (prediction.scores[name] for name in (PERPLEXITY, REFERENCE_BITS))
    assert perplexity is not None
    assert bits is not None
    size = len(prediction.reference.encode())
    num_tokens = max(1, round(bits * size / math.log2(perplexity))) if perplexity > 1 else 1
    return ModelAnswer(
        prediction.example_id,
        prompt,
        finish_reason="stop",
        completion_tokens=num_tokens,
        bits_per_byte=bits,
    )
