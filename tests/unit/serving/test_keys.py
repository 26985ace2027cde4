"""Keys with names: who may ask which model how often, and which files of keys are refused."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from tuneloop.config import ServingConfig
from tuneloop.errors import ConfigError
from tuneloop.serving import deploy
from tuneloop.serving.deploy import DeployArguments, DeployedModel, application
from tuneloop.serving.keys import ApiKey, Holder, Keyring, hash_of, keyring, serving_problems
from tuneloop.serving.protocol import ProtocolError


def written(path: Path, text: str, mode: int = 0o600) -> ServingConfig:
    path.write_text(text)
    path.chmod(mode)
    return ServingConfig(api_keys_file=str(path))


def test_a_key_is_known_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = written(tmp_path / "keys", f"ann: {{sha256: {hash_of(b'secret')}, models: [b]}}")
    ring = keyring(serving)
    ann = ring.holder(b"secret")
    assert (ann.name, ann.served(["a", "b"])) == ("ann", ["b"])
    with pytest.raises(ProtocolError) as caught:
        ann.refuse_other("a", ["a", "b"])
    assert (caught.value.status, caught.value.code) == (403, "model_not_found")
    ann.refuse_other("b", ["a", "b"])
    for wrong in (b"", b"Secret", hash_of(b"secret").encode()):
        with pytest.raises(ProtocolError, match="missing or wrong"):
            ring.holder(wrong)
    monkeypatch.setenv("TUNELOOP_API_KEY", "other")
    ring = keyring(serving)
    assert ring.holder(b"other").served(["a", "b"]) == ["a", "b"]
    assert ring.holder(b"secret").name == "ann"
    assert Keyring({}).holder(b"anything").served(["a"]) == ["a"]


def test_requests_are_bounded_in_every_minute() -> None:
    now = 100.0
    holder = Holder("a", ApiKey(sha256="0" * 64, requests_per_minute=2), lambda: now)
    holder.count()
    now = 130.5
    holder.count()
    with pytest.raises(ProtocolError) as caught:
        holder.count()
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert caught.value.retry_after_s == 30
    now = 160.0
    holder.count()
    with pytest.raises(ProtocolError):
        holder.count()
    now = 190.5
    holder.count()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "valid dictionary"),
        ("{}", "no key"),
        ("ann: [", "expected"),
        ("ann: {sha256: secret}", "ann.sha256"),
        (f"ann: {{sha256: {'a' * 64}, model: [a]}}", "ann.model"),
        (f"ann: {{sha256: {'a' * 64}, requests_per_minute: 0}}", "ann.requests_per_minute"),
        (f"a: {{sha256: {'a' * 64}}}\nb: {{sha256: {'a' * 64}}}", "two names"),
        (f"ann: {{sha256: {hash_of(b'')}}}", "empty key"),
    ],
)
def test_a_wrong_file_is_told_without_what_stands_in_it(
    tmp_path: Path, text: str, told: str
) -> None:
    (problem,) = serving_problems(written(tmp_path / "keys", text))
    assert told in problem.got
    assert "secret" not in str(problem)


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    text = f"ann: {{sha256: {'a' * 64}}}"
    for mode in (0o644, 0o604, 0o602):
        with pytest.raises(ConfigError, match="chmod 600"):
            keyring(written(tmp_path / "keys", text, mode))
    assert keyring(written(tmp_path / "keys", text, 0o640))
    (problem,) = serving_problems(ServingConfig(api_keys_file=str(tmp_path / "none")))
    assert "No such file" in problem.got


def test_no_address_is_open_to_other_machines_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "machine.example", ""):
        (problem,) = serving_problems(ServingConfig(host=host))
        assert problem.where == "serving.host"
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert not serving_problems(ServingConfig(host=host))
    keys = written(tmp_path / "keys", f"ann: {{sha256: {'a' * 64}}}")
    assert not serving_problems(keys.model_copy(update={"host": "0.0.0.0"}))
    monkeypatch.setenv("TUNELOOP_API_KEY", "secret")
    assert not serving_problems(ServingConfig(host="0.0.0.0"))


def test_a_deployed_application_is_not_open_to_other_machines_without_a_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = DeployArguments(models={"m": DeployedModel(path="/models/m")})
    assert application(arguments), "Serve does not run here"
    for host in ("127.0.0.1", "0.0.0.0", ""):
        monkeypatch.setattr(deploy, "serve_host", lambda host=host: host)
        if host == "127.0.0.1":
            assert application(arguments)
            continue
        with pytest.raises(ConfigError) as caught:
            application(arguments)
        assert caught.value.problems[0].where == "http_options.host"
    monkeypatch.setenv("TUNELOOP_API_KEY", "secret")
    assert application(arguments)


def test_serve_tells_its_controller_where_it_listens() -> None:
    """Where this fails, `serve_host` has to ask otherwise."""
    from ray.serve._private.controller import ServeController
    from ray.serve.config import HTTPOptions

    told = inspect.signature(ServeController.get_http_config, eval_str=True).return_annotation
    assert told is HTTPOptions
    assert HTTPOptions(host="0.0.0.0").host == "0.0.0.0"
