"""Could one training draw a learning curve? `python benchmarks/shared_curve.py CONFIG WORKSPACE`.

A sweep over data volumes trains a model for each. This trains one more on the largest volume, at a
constant learning rate, measures it as it passes each of the others, and compares the validation
losses: what is saved, and how far the cheap curve is from the real one. One epoch, several seeds;
trainings that the workspace has are not repeated. Prints Markdown.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import tuneloop


def main() -> None:
    """Train, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--volumes", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--seeds", type=int, default=2, help="default: %(default)s")
    options = parser.parse_args()
    logging.basicConfig(level="INFO")
    volumes = sorted(options.volumes)
    batch = tuneloop.load_config(options.config).training.global_batch_size
    fewest = volumes[0]
    if fewest % batch or any(volume % fewest for volume in volumes):
        parser.error(f"volumes are multiples of the smallest one, and that of the batch of {batch}")
    steps = [volume // batch for volume in volumes]
    own, shared = [], []
    for seed in range(options.seeds):
        own.append([_losses(options, volume, seed)[volume // batch] for volume in volumes])
        passed = _losses(
            options, volumes[-1], seed, "training.lr_scheduler=constant",
            f"training.eval_every_steps={steps[0]}",
        )  # fmt: skip
        shared.append([passed[step] for step in steps])
    saved = 1 - volumes[-1] / sum(volumes)
    print(f"One training in place of {len(volumes)}: {saved:.0%} of the rows saved.\n")
    print("| rows | validation loss, own training | passed by one training | difference |")
    print("|---|---|---|---|")
    for index, volume in enumerate(volumes):
        alone, passing = (np.array(losses)[:, index] for losses in (own, shared))
        gap = ", ".join(f"{value:+.3f}" for value in passing - alone)
        print(f"| {volume} | {_shown(alone)} | {_shown(passing)} | {gap} |")


def _shown(losses: np.ndarray) -> str:
    return ", ".join(f"{loss:.3f}" for loss in losses)


def _losses(
    options: argparse.Namespace, volume: int, seed: int, *overrides: str
) -> dict[int, float]:
    """Return the validation losses of a training, by step."""
    config = tuneloop.load_config(
        options.config,
        [
            f"data.num_train_examples={volume}", f"training.seed={seed}", "training.num_epochs=1",
            "data.split.num_validation_examples=48", *overrides,
        ],
    )  # fmt: skip
    model = tuneloop.train(config, tuneloop.Workspace(str(options.workspace)))[-1].artifact
    log = pq.read_table(model.path / "trainer_log.parquet", columns=["step", "validation_loss"])
    return {
        row["step"]: row["validation_loss"] for row in log.to_pylist() if row["validation_loss"]
    }


if __name__ == "__main__":
    main()
