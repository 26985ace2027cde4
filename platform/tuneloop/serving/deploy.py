"""The application for `serve deploy`: models that answer until somebody takes them down.

Where a `tuneloop serve` ends with its terminal, a deployed application belongs to the cluster. The
configuration is a Serve config file whose `import_path` is `tuneloop.serving.deploy:application`.
"""

# No `from __future__ import annotations`: Serve looks at the annotation of `application` itself.

from pathlib import Path

from pydantic import Field
from ray.serve import Application

from tuneloop.compat.ray import serve_host
from tuneloop.config import EngineName, Section, ServingConfig, VllmConfig
from tuneloop.serving.app import (
    MODEL_CPUS,
    REPLICA_ENVIRONMENT,
    Rollout,
    ServedModel,
    build_application,
)
from tuneloop.serving.keys import keyring, refuse_exposed

_LOAD_S = 600  # the largest models of one machine are read in less


class DeployedModel(Section):
    """One model to serve."""

    path: str = Field(description="Hugging Face directory that every node can read.")
    chat_template: str = Field("auto", description="As in `model.chat_template`.")


class DeployArguments(Section):
    """`args` of the application in a Serve config file."""

    models: dict[str, DeployedModel] = Field(
        min_length=1, description="By the name that requests call it."
    )
    engine: EngineName = Field(
        "auto", description="As `serving.engine`, which has to be installed on every node."
    )
    vllm: VllmConfig = Field(VllmConfig(), description="As `serving.vllm`.")
    max_batch_size: int = Field(
        ServingConfig().max_batch_size, ge=1, description="Sequences decoded together."
    )
    api_keys_file: str = Field("", description="As `serving.api_keys_file`, on the head node.")
    cpus_per_model: float = Field(MODEL_CPUS, gt=0, description="Reserved for each replica.")
    spare_replica: bool = Field(
        True,
        description="A changed model is loaded beside the old one, which answers meanwhile; needs "
        "the memory, CPUs and GPUs of both. False: new requests wait until it is loaded.",
    )
    drain_s: float = Field(
        120, ge=0, description="Seconds that a replaced model may take to end its answers."
    )
    gpus_per_model: float = Field(0, ge=0, description="Reserved for each replica.")


def application(arguments: DeployArguments) -> Application:
    """Return the Serve application; Serve calls this on the cluster.

    Host and port are the config file's own `http_options`; keys are those of `api_keys_file` and of
    the environment variable TUNELOOP_API_KEY.

    Raises:
        ConfigError: The keys are wrong, or other machines would reach the models without one.
    """
    models = {
        name: ServedModel(Path(model.path), model.chat_template)
        for name, model in arguments.models.items()
    }
    options = {"num_cpus": arguments.cpus_per_model, "runtime_env": REPLICA_ENVIRONMENT}
    if arguments.gpus_per_model:
        options["num_gpus"] = arguments.gpus_per_model
    serving = ServingConfig(
        max_batch_size=arguments.max_batch_size,
        engine=arguments.engine,
        vllm=arguments.vllm,
        api_keys_file=arguments.api_keys_file,
    )
    keys, host = keyring(serving), serve_host()
    if host is not None:
        refuse_exposed(host, keys, "http_options.host", "api_keys_file")
    rollout = Rollout(arguments.drain_s, arguments.spare_replica, _LOAD_S)
    return build_application(models, serving, options, keys, rollout)
