"""The Python API, cell by cell: open it as a notebook, or run `python docs/first_steps.py`.

Needs no data of yours and no GPU; from the root of the repository a few minutes on two CPU cores.
"""

# %% The same YAML as on the command line, the same dotted overrides.
import pyarrow.parquet as pq

import tuneloop

config = tuneloop.load_config(
    "jobs/configs/classification.yaml", ["name=first-steps", "training.num_epochs=2"]
)
workspace = tuneloop.Workspace(config.workspace)

# %% Prepare. Every step returns what it published, and whether it was there already.
(dataset,) = tuneloop.prepare(config, workspace)
print(dataset.artifact.ref, "reused" if dataset.reused else "new", dataset.artifact.path)

# %% A dataset is Parquet files: look at what is learned.
row = pq.read_table(dataset.artifact.path / "train").slice(0, 1).to_pylist()[0]
for message in row["messages"]:
    print(f"{message['role']:>9}: {message['content']}")
print(f"{sum(row['loss_mask'])} of {row['num_tokens']} tokens are targets")

# %% The whole loop: the base model is measured, one is trained, and both are compared.
_, baseline, model, evaluation = tuneloop.run(config, workspace)
scores = evaluation.artifact.manifest["metrics"]
for arm, score in scores["scores"].items():
    print(f"{arm:>14}: {score:.1%}")
for other, difference in scores["differences"].items():
    low, high = difference["low"], difference["high"]
    print(f"over {other}: {difference['value']:+.1%} ({low:+.1%} to {high:+.1%})")

# %% Every answer is a row.
predictions = pq.read_table(evaluation.artifact.path / "predictions.parquet").to_pandas()
wrong = predictions[(predictions.arm == "finetuned") & (predictions.accuracy == 0)]
print(wrong[["reference", "completion", "error_tags"]].to_string(index=False))

# %% Artifacts are found again by reference; this needs no Ray.
print([artifact.ref for artifact in workspace.published()])
print(workspace.open("models/first-steps").manifest["metrics"]["final_loss"])

# %% A mistake in the configuration is an exception that says what to do.
try:
    tuneloop.load_config("jobs/configs/classification.yaml", ["training.learning_rat=1e-4"])
except tuneloop.UserError as error:
    print(error)
