"""The loop, readable from top to bottom: prepare, measure the base, train, measure again.

Each step reuses an artifact with the same fingerprint, so a run that was cut short goes on where
it stopped, and a run without changes only looks things up.
"""

from __future__ import annotations

import logging

from tuneloop.artifacts import Published, Workspace
from tuneloop.cluster import connect
from tuneloop.config import TuneloopConfig
from tuneloop.models.source import resolve_base

logger = logging.getLogger("tuneloop.pipeline")

BASE, FEW_SHOT, FINETUNED = "base", "base+few-shot", "finetuned"


def prepare(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return the dataset artifact in a list, made or reused."""
    with connect(config.resources):
        return [_prepare(config, workspace, resolve_base(config.model.base))]


def train(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return dataset and model artifact, made or reused."""
    with connect(config.resources):
        base = resolve_base(config.model.base)
        dataset = _prepare(config, workspace, base)
        return [dataset, _train(config, workspace, base, dataset.artifact)]


def run(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return dataset, baseline, model and evaluation artifact, made or reused.

    The base model is measured before anything is trained: what prompting alone reaches is the
    bar that finetuning has to clear.
    """
    with connect(config.resources):
        base = resolve_base(config.model.base)
        dataset = _prepare(config, workspace, base)
        arms = base_arms(config, base, dataset.artifact)
        baseline = _evaluate(config, workspace, dataset.artifact, arms, None)
        model = _train(config, workspace, base, dataset.artifact)
        arms = [*arms, finetuned_arm(model.artifact)]
        evaluation = _evaluate(config, workspace, dataset.artifact, arms, baseline.artifact)
        return [dataset, baseline, model, evaluation]
