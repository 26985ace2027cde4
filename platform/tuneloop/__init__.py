"""tuneloop: finetune a small language model on your task, and prove whether it helped.

The Python API, the same steps as the command line's; each is loaded when it is first used:

    import tuneloop

    config = tuneloop.load_config("faq.yaml", ["training.num_epochs=2"])
    workspace = tuneloop.Workspace(config.workspace)
    dataset, baseline, model, evaluation = tuneloop.run(config, workspace)
    print(evaluation.artifact.ref, evaluation.artifact.manifest["metrics"])

- `load_config`, `TuneloopConfig`: the YAML with overrides, validated.
- `Workspace`, `Artifact`: where results are published and opened, `workspace.open("models/faq")`.
- `prepare`, `generate`, `train`, `evaluate`, `run`, `sweep`: one step each, from
  (config, workspace) to a list of `Published`: an artifact, and whether it was reused.
- `serve`: a context, `with tuneloop.serve(config, workspace) as (url, models): ...`.
- `TuneloopError`, `UserError`: the exceptions: our failure, and what the caller can fix.

`tuneloop check` is `tuneloop.check.check(config)`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuneloop.artifacts import Artifact, Published, Workspace
    from tuneloop.config import TuneloopConfig, load_config
    from tuneloop.errors import TuneloopError, UserError
    from tuneloop.pipeline import evaluate, generate, prepare, run, serve, train
    from tuneloop.sweeps.run import sweep

__version__ = "0.1.0"
__all__ = [
    "Artifact",
    "Published",
    "TuneloopConfig",
    "TuneloopError",
    "UserError",
    "Workspace",
    "evaluate",
    "generate",
    "load_config",
    "prepare",
    "run",
    "serve",
    "sweep",
    "train",
]
_MODULES = {
    "Artifact": "artifacts",
    "Published": "artifacts",
    "Workspace": "artifacts",
    "TuneloopConfig": "config",
    "load_config": "config",
    "TuneloopError": "errors",
    "UserError": "errors",
    "sweep": "sweeps.run",
}
# Ray reads these when its processes start, some of them when it is imported: before any room does.
for _key, _value in {
    # A local Ray keeps to 127.0.0.1, as it does on macOS and Windows. On Linux it would take the
    # address that other machines reach, and listen on all interfaces.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray's workers are nice by default and starve on a busy small machine.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Threads that wait sleep: spinning ones starve each other where processes share few cores.
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_TRAIN_V2_ENABLED": "1",
    # Ray counts a lost node in for up to 20 s and waits for its workers, by default for a minute;
    # then it counts again. It never gives up, so a node that is slow to come is waited for.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    # A worker waits with its next checkpoint, and with its end, until it is looked after: 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Workers that hang on a lost one are not given half a minute to leave.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    # Tune's newer output prints its tables whatever the verbosity.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Without this Ray hides GPUs from workers that asked for none, and warns about it.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # The controller ends while calls to it are under way, at every end of serving.
    "RAY_DEDUP_LOGS_SKIP_REGEX": r"Task ServeController\.",
}.items():
    os.environ.setdefault(_key, _value)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"tuneloop.{_MODULES.get(name, 'pipeline')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
