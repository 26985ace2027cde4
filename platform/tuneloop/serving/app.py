"""Models on Ray Serve behind one OpenAI-compatible HTTP address.

One small ingress deployment is the HTTP side (`api.py`). Weights are
a deployment of their own, with an engine in the replica; a base model and the adapters on it
share one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from tuneloop.cluster import end_abandoned_serving, served_name
from tuneloop.config import EngineName, ServingConfig, VllmConfig
from tuneloop.errors import ResourceError, find_user_error
from tuneloop.serving.api import build_api
from tuneloop.serving.asked import Route
from tuneloop.serving.keys import Keyring, keyring, refuse_exposed
from tuneloop.serving.loaded import ServedModel
from tuneloop.serving.protocol import ProtocolError
from tuneloop.serving.replica import ModelServer
from tuneloop.serving.requests import Activity
from tuneloop.serving.room import refuse_small_memory

__all__ = ["ServedModel", "build_application", "free_port", "host", "listen", "serve"]

log = logging.getLogger("tuneloop.serving")

PROGRESS_EVERY_S = 5.0
INGRESS_CPUS = 0.1
_ROUTE_WITHIN_S = 30.0
MODEL_CPUS = 0.5  # reserved, not a limit: an engine uses all cores while others are idle
_MAX_ONGOING = 2048  # requests in a replica; the engine's own queue is shorter, and says so
_QUIET = {"enable_access_log": False, "log_level": "WARNING"}
# Threads that wait for each other sleep instead of spinning: with as many threads as cores,
# spinning keeps the thread that is waited for off its core as soon as anything else runs (another
# model, the client). On a busy machine this is three times faster.
REPLICA_ENVIRONMENT = {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}


@dataclass(frozen=True)
class Rollout:
    """How replicas are replaced when a running application is changed.

    Args:
        drain_s: Seconds that a replica which is to go may take to end its answers.
        has_spare: The new one is loaded while the old one still answers, in memory of its own.
        load_s: Seconds that requests may wait for a model that is being loaded.
    """

    drain_s: float = 5
    has_spare: bool = False
    load_s: float = 0


AT_ONCE = Rollout()


class RayBackend:
    """A deployment of `ModelServer`, asked through its handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    async def activity(self) -> Activity | None:
        """Return what the engine does; None while the models load."""
        return await self.handle.activity.remote()

    async def answer(
        self, route: Route, body: dict[str, Any], request_id: str
    ) -> tuple[int, dict[str, Any]]:
        """Return status and JSON for one request."""
        try:
            return await self.handle.answer.remote(route, body, request_id)
        except Exception as error:
            raise _lost(error, request_id) from error

    async def stream(
        self, route: Route, body: dict[str, Any], request_id: str
    ) -> AsyncGenerator[tuple[int, dict[str, Any]] | str]:
        """Yield status and JSON, then, if the status is 200, server-sent events."""
        try:
            handle = self.handle.options(stream=True)
            async for item in handle.stream.remote(route, body, request_id):
                yield item
        except Exception as error:
            raise _lost(error, request_id) from error


def _lost(error: Exception, request_id: str) -> ProtocolError:
    if isinstance(error, BackPressureError):
        return ProtocolError(
            429, "too many requests wait; try again later", code="rate_limit_exceeded"
        )
    log.warning("request %r: a model's replica did not answer: %s", request_id, error)
    reason = (str(error).splitlines() or [""])[0]
    return ProtocolError(
        500, f"the model's replica did not answer: {type(error).__name__}: {reason}"
    )


def build_application(
    models: Mapping[str, ServedModel],
    serving: ServingConfig,
    model_options: dict[str, Any],
    keys: Keyring,
    rollout: Rollout = AT_ONCE,
) -> ray_serve.Application:
    """Return the Serve application, for `serve.run` or a `serve deploy` configuration.

    Args:
        models: What to serve, by the name requests call it.
        model_options: `ray_actor_options` of each replica.
        keys: Who may ask.
    """
    server = ray_serve.deployment(ModelServer)
    deployments: dict[str, str] = {}
    bound = []
    engine = _engine(serving, model_options)
    for deployment, group in _by_weights(models).items():
        bound.append(
            server.options(
                name=deployment,
                ray_actor_options=model_options,
                **_replica_options(rollout),
            ).bind(group, serving.max_batch_size, engine, rollout.has_spare)
        )
        deployments |= dict.fromkeys(group, deployment)
    # In the order asked for, which is the order they are listed in.
    deployments = {name: deployments[name] for name in models}
    named = keys.keys

    def api() -> FastAPI:
        """Return the HTTP side; called in the ingress' replica."""
        backends = {
            deployment: RayBackend(ray_serve.get_deployment_handle(deployment))
            for deployment in deployments.values()
        }
        return build_api({name: backends[d] for name, d in deployments.items()}, Keyring(named))

    ingress = ray_serve.deployment(ray_serve.ingress(api)()).options(
        name="ingress",
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        # Requests that wait for a model wait here, also when this replica is to go.
        **_replica_options(Rollout(rollout.drain_s + rollout.load_s, has_spare=True)),
    )
    return ingress.bind(*bound)


def _engine(serving: ServingConfig, model_options: Mapping[str, Any]) -> EngineName | VllmConfig:
    """Return what decodes in a replica; for vLLM how, with its part of a GPU that it shares."""
    if serving.engine != "vllm":
        return serving.engine
    share = serving.vllm.gpu_memory_share * min(1, model_options.get("num_gpus") or 1)
    return serving.vllm.model_copy(update={"gpu_memory_share": share})


def _replica_options(rollout: Rollout) -> dict[str, Any]:
    return {
        "max_ongoing_requests": _MAX_ONGOING,
        "max_surge_percent": 100 if rollout.has_spare else 0,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": rollout.drain_s,
        "logging_config": _QUIET,
    }


@contextlib.contextmanager
def serve(
    models: Mapping[str, ServedModel], serving: ServingConfig, keys: Keyring | None = None
) -> Iterator[str]:
    """Serve models inside the `with` block; needs a connected Ray.

    Args:
        keys: Who may ask; None: as `keyring` has it.

    Yields:
        The base URL, which ends in `/v1`, once every model is loaded.

    Raises:
        ResourceError: The port is taken, no CPU is free, or Serve runs already.
        ModelError: A model cannot be loaded.
        ConfigError: The keys are wrong, or other machines would reach the models without one.
    """
    keys = keyring(serving) if keys is None else keys
    with listen(serving, keys) as url:
        host(models, serving, url, keys)
        yield url


@contextlib.contextmanager
def listen(serving: ServingConfig, keys: Keyring | None = None) -> Iterator[str]:
    """Listen at one address inside the `with` block, for models that come and go: see `host`.

    Yields:
        The base URL, which ends in `/v1`.

    Raises:
        ResourceError: The port is taken, or Serve runs already.
        ConfigError: Other machines would reach the models without a key.
    """
    refuse_exposed(serving.host, keyring(serving) if keys is None else keys)
    _refuse_running_serve()
    port = free_port(serving)
    # Its warnings are about queue lengths of replicas that still load.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        ray_serve.start(
            proxy_location="HeadOnly",
            http_options={"host": serving.host, "port": port},
            logging_config=_QUIET,
        )
        yield _base_url(serving.host, port)
    finally:
        ray_serve.shutdown()


def _base_url(host: str, port: int) -> str:
    """Return where this machine reaches a server that listens at a host."""
    reached = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{reached}]' if ':' in reached else reached}:{port}/v1"


def host(
    models: Mapping[str, ServedModel],
    serving: ServingConfig,
    url: str,
    keys: Keyring | None = None,
) -> None:
    """Serve models at the address of `listen`, in place of those before. Raises as `serve`."""
    keys = keyring(serving) if keys is None else keys
    name = served_name()
    if name in ray_serve.status().applications:
        ray_serve.delete(name)
    if len(ray.nodes()) == 1 and not ray.available_resources().get("GPU"):
        # OpenVINO reorders the weights for its kernels, and keeps them as they were as well.
        refuse_small_memory(list(models.values()), 2 if serving.engine == "openvino" else 1)
    options = _model_options(len(_by_weights(models)), serving)
    application = build_application(models, serving, options, keys)
    ray_serve.run(application, name=name, logging_config=_QUIET)
    _await_models(models)
    _await_route(url)
    log.info("serving %s at %s", ", ".join(models), url)


def _await_route(url: str) -> None:
    """Return when the HTTP side knows of the application, which it learns of after the deployment.

    Raises:
        ResourceError: It does not answer, as from a machine that is not the one that listens.
    """
    deadline, answer = time.monotonic() + _ROUTE_WITHIN_S, ""
    with httpx.Client(trust_env=False, timeout=5) as client:
        while time.monotonic() < deadline:
            try:
                response = client.get(url.removesuffix("/v1") + "/health")
                if response.is_success:
                    return
                answer = f"status {response.status_code}"
            except httpx.TransportError as error:
                answer = str(error) or type(error).__name__
            time.sleep(0.05)
    raise ResourceError.of(
        "the models are loaded, but nothing answers at their address",
        where=url,
        got=answer,
        remedy="run the command on the machine of the cluster's head, which listens, for "
        "example as a job: `tuneloop submit`",
    )


def _by_weights(models: Mapping[str, ServedModel]) -> dict[str, dict[str, ServedModel]]:
    """Return the models that share weights together, by the name of their deployment."""
    groups: dict[Path, dict[str, ServedModel]] = {}
    for name, model in models.items():
        groups.setdefault(model.path, {})[name] = model
    return {f"model-{next(iter(group))}": group for group in groups.values()}


def _await_models(models: Mapping[str, ServedModel]) -> None:
    """Return when every model is loaded, logging meanwhile which one is not."""
    started = time.monotonic()
    for deployment, group in _by_weights(models).items():
        names, path = ", ".join(group), next(iter(group.values())).path
        handle = ray_serve.get_deployment_handle(deployment, served_name())
        response = handle.ready.remote()
        while True:
            try:
                notice = response.result(timeout_s=PROGRESS_EVERY_S)
                break
            except TimeoutError:
                log.info("loading %s from %s, %.0f s", names, path, time.monotonic() - started)
            except Exception as error:
                user_error = find_user_error(error)
                if user_error is not None:
                    raise user_error from error
                raise
        log.info("loaded %s, %.0f s", names, time.monotonic() - started)
        if notice:
            log.warning("%s: %s", names, notice)


def _model_options(num_models: int, serving: ServingConfig) -> dict[str, Any]:
    """Return what each replica reserves; small, because an engine works only when asked."""
    free = ray.available_resources()
    share = min(MODEL_CPUS, (free.get("CPU", 0.0) - INGRESS_CPUS) / num_models)
    if share < 0.01:
        raise ResourceError.of(
            "no CPU is free to serve on",
            where="Ray",
            got=f"{free.get('CPU', 0.0):g} CPUs",
            allowed=f"more than {INGRESS_CPUS}",
            remedy="wait for other jobs, or raise resources.num_cpus",
        )
    # Two decimals, rounded down: Ray adds fractions up exactly.
    options: dict[str, Any] = {
        "num_cpus": int(share * 100) / 100,
        "runtime_env": REPLICA_ENVIRONMENT,
    }
    if free.get("GPU", 0) > 0 and serving.engine != "openvino":
        size = serving.vllm.tensor_parallel_size if serving.engine == "vllm" else 1
        options["num_gpus"] = size if size > 1 else _gpu_share(free["GPU"], num_models)
    return options


def _gpu_share(num_gpus: float, num_models: int) -> float:
    """Return the share of one GPU that each replica reserves; a replica is never on two of them."""
    if num_gpus < 1:
        return int(num_gpus / num_models * 100) / 100
    return int(100 / math.ceil(num_models / int(num_gpus))) / 100


def free_port(serving: ServingConfig) -> int:
    """Return the configured port, or any free one for 0.

    Raises:
        ResourceError: The port is taken, or the host is not this machine's.
    """
    with socket.socket(socket.AF_INET6 if ":" in serving.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.host, serving.port))
        except OSError as error:
            raise ResourceError.of(
                "cannot listen",
                where="serving.host and serving.port",
                got=f"{serving.host}:{serving.port}: {error.strerror or error}",
                allowed="an address of this machine and a free port, or port 0 for any",
                remedy="stop what listens there, or set serving.port=0",
            ) from error
        return int(probe.getsockname()[1])


def _refuse_running_serve() -> None:
    """Fail if this cluster serves something already: Serve has one address per cluster."""
    end_abandoned_serving()
    status = ray_serve.status()
    if not status.proxies and not status.applications:
        return
    raise ResourceError.of(
        "Ray Serve runs already on this cluster",
        where="Ray",
        got=", ".join(status.applications) or "no application",
        remedy="`serve shutdown` ends it; or run on another cluster",
    )
