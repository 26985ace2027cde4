"""Models on Ray Serve behind one OpenAI-compatible HTTP address.

One small ingress deployment checks the key, finds the model and hands the request on. Weights are
a deployment of their own, with a decode engine in the replica; a base model and the adapters on it
share one.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve as ray_serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from tuneloop.cluster import end_abandoned_serving, served_name
from tuneloop.config import ServingConfig
from tuneloop.errors import Problem, ResourceError, find_user_error
from tuneloop.serving import protocol
from tuneloop.serving.replica import ModelServer, ServedModel

__all__ = ["ServedModel", "build_application", "free_port", "host", "listen", "serve"]

log = logging.getLogger("tuneloop.serving")

API_KEY_VARIABLE = "TUNELOOP_API_KEY"
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


class Ingress:
    """The HTTP side. Knows the protocol's addresses and which model is where."""

    def __init__(self, models: Mapping[str, DeploymentHandle], api_key: str) -> None:
        self.models = models
        self.api_key = api_key
        self.created = int(time.time())

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request."""
        method, path = request.method, request.url.path.rstrip("/")
        if path == "/health":
            return JSONResponse({"status": "ok"})
        refused = self._refused(request)
        if refused is not None:
            return refused
        match method, path:
            case "POST", "/v1/chat/completions":
                return await self._answer("chat", request)
            case "POST", "/v1/completions":
                return await self._answer("completions", request)
            case "GET", "/v1/models":
                return JSONResponse(protocol.model_list(list(self.models), self.created))
            case "GET", _ if path.startswith("/v1/models/"):
                name = path.removeprefix("/v1/models/")
                if name in self.models:
                    return JSONResponse(protocol.model_card(name, self.created))
                return _refusal(protocol.unknown_model(name, list(self.models)))
        return _refusal(protocol.ProtocolError(404, f"there is no {method} {path} here"))

    def _refused(self, request: Request) -> Response | None:
        api_key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not self.api_key or hmac.compare_digest(api_key.encode(), self.api_key.encode()):
            return None
        error = protocol.ProtocolError(
            401, "the API key is missing or wrong", code="invalid_api_key"
        )
        return _refusal(error)

    async def _answer(self, route: str, request: Request) -> Response:
        try:
            body = await request.json()
        except ValueError as error:
            return _refusal(protocol.ProtocolError(400, f"the body is not JSON: {error}"))
        if not isinstance(body, dict):
            return _refusal(protocol.ProtocolError(400, "the body is not a JSON object"))
        name = body.get("model")
        handle = self.models.get(name) if isinstance(name, str) else None
        if handle is None:
            return _refusal(protocol.unknown_model(name, list(self.models)))
        try:
            if body.get("stream") is True:
                items = aiter(handle.options(stream=True).stream.remote(route, body))
                status, answer = await anext(items)
                if status == 200:
                    return StreamingResponse(_events(items), media_type="text/event-stream")
            else:
                status, answer = await handle.answer.remote(route, body)
        except BackPressureError:
            return _refusal(protocol.ProtocolError(503, "too many requests wait; try again later"))
        except Exception as error:
            return _refusal(_lost(error))
        return JSONResponse(answer, status)


async def _events(items: AsyncIterator[str]) -> AsyncIterator[str]:
    """Pass events on; a replica that dies meanwhile ends the stream with an error event."""
    try:
        async for item in items:
            yield item
    except Exception as error:
        yield protocol.event(_lost(error).body())


def _lost(error: Exception) -> protocol.ProtocolError:
    log.warning("a model's replica did not answer: %s", error)
    reason = (str(error).splitlines() or [""])[0]
    return protocol.ProtocolError(
        500, f"the model's replica did not answer: {type(error).__name__}: {reason}"
    )


def _refusal(error: protocol.ProtocolError) -> JSONResponse:
    return JSONResponse(error.body(), error.status)


def build_application(
    models: Mapping[str, ServedModel], serving: ServingConfig, model_options: dict[str, Any]
) -> ray_serve.Application:
    """Return the Serve application, for `serve.run` or a `serve deploy` configuration.

    Args:
        models: What to serve, by the name requests call it.
        model_options: `ray_actor_options` of each replica.
    """
    server = ray_serve.deployment(ModelServer)
    handles: dict[str, Any] = {}
    for deployment, group in _by_weights(models).items():
        handle = server.options(
            name=deployment,
            ray_actor_options=model_options,
            max_ongoing_requests=_MAX_ONGOING,
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=5,
            logging_config=_QUIET,
        ).bind(group, serving.max_batch_size)
        handles |= dict.fromkeys(group, handle)
    # In the order asked for, which is the order they are listed in.
    handles = {name: handles[name] for name in models}
    ingress = ray_serve.deployment(Ingress).options(
        name="ingress",
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=5,
        logging_config=_QUIET,
    )
    return ingress.bind(handles, os.environ.get(API_KEY_VARIABLE, ""))


@contextlib.contextmanager
def serve(models: Mapping[str, ServedModel], serving: ServingConfig) -> Iterator[str]:
    """Serve models inside the `with` block; needs a connected Ray.

    The API key, if any, is taken from the environment variable TUNELOOP_API_KEY.

    Yields:
        The base URL, which ends in `/v1`, once every model is loaded.

    Raises:
        ResourceError: The port is taken, no CPU is free, or Serve runs already.
        ModelError: A model cannot be loaded.
    """
    with listen(serving) as url:
        host(models, serving, url)
        yield url


@contextlib.contextmanager
def listen(serving: ServingConfig) -> Iterator[str]:
    """Listen at one address inside the `with` block, for models that come and go: see `host`.

    Yields:
        The base URL, which ends in `/v1`.

    Raises:
        ResourceError: The port is taken, or Serve runs already.
    """
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
        reached = "127.0.0.1" if serving.host in ("0.0.0.0", "") else serving.host
        yield f"http://{reached}:{port}/v1"
    finally:
        ray_serve.shutdown()


def host(models: Mapping[str, ServedModel], serving: ServingConfig, url: str) -> None:
    """Serve models at the address of `listen`, in place of those before. Raises as `serve`."""
    name = served_name()
    if name in ray_serve.status().applications:
        ray_serve.delete(name)
    options = _model_options(len(_by_weights(models)))
    ray_serve.run(build_application(models, serving, options), name=name, logging_config=_QUIET)
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
    raise ResourceError(
        Problem(
            "the models are loaded, but nothing answers at their address",
            where=url,
            got=answer,
            remedy="run the command on the machine of the cluster's head, which listens, for "
            "example as a job: `tuneloop submit`",
        )
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


def _model_options(num_models: int) -> dict[str, Any]:
    """Return what each replica reserves; small, because an engine works only when asked."""
    free = ray.available_resources()
    share = min(MODEL_CPUS, (free.get("CPU", 0.0) - INGRESS_CPUS) / num_models)
    if share < 0.01:
        raise ResourceError(
            Problem(
                "no CPU is free to serve on",
                where="Ray",
                got=f"{free.get('CPU', 0.0):g} CPUs",
                allowed=f"more than {INGRESS_CPUS}",
                remedy="wait for other jobs, or raise resources.num_cpus",
            )
        )
    # Two decimals, rounded down: Ray adds fractions up exactly.
    options: dict[str, Any] = {
        "num_cpus": int(share * 100) / 100,
        "runtime_env": REPLICA_ENVIRONMENT,
    }
    if free.get("GPU", 0) > 0:
        options["num_gpus"] = _gpu_share(free["GPU"], num_models)
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
            raise ResourceError(
                Problem(
                    "cannot listen",
                    where="serving.host and serving.port",
                    got=f"{serving.host}:{serving.port}: {error.strerror or error}",
                    allowed="an address of this machine and a free port, or port 0 for any",
                    remedy="stop what listens there, or set serving.port=0",
                )
            ) from error
        return int(probe.getsockname()[1])


def _refuse_running_serve() -> None:
    """Fail if this cluster serves something already: Serve has one address per cluster."""
    end_abandoned_serving()
    status = ray_serve.status()
    if not status.proxies and not status.applications:
        return
    raise ResourceError(
        Problem(
            "Ray Serve runs already on this cluster",
            where="Ray",
            got=", ".join(status.applications) or "no application",
            remedy="`serve shutdown` ends it; or run on another cluster",
        )
    )
