"""Who may ask: keys with names, known by their hashes alone, and what each of them may do."""

from __future__ import annotations

import hashlib
import ipaddress
import math
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from tuneloop.config import API_KEY_VARIABLE, Section, ServingConfig
from tuneloop.errors import ConfigError, Problem
from tuneloop.serving.protocol import ProtocolError

_MINUTE_S = 60.0


class ApiKey(Section):
    """What the holder of one key may do."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the key's text.")
    models: list[str] | None = Field(None, description="Those that it may ask; default: all.")
    requests_per_minute: int | None = Field(None, ge=1, description="Default: no bound.")


class Holder:
    """A key in use: what it may ask, and when it asked.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, name: str, key: ApiKey, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._key, self._clock = key, clock
        self._asked: deque[float] = deque()

    def served(self, models: Sequence[str]) -> list[str]:
        """Return those of the models that it may ask."""
        return [name for name in models if self._key.models is None or name in self._key.models]

    def refuse_other(self, model: str, served: Sequence[str]) -> None:
        """Raise ProtocolError 403 for a model that it may not ask."""
        allowed = self.served(served)
        if model not in allowed:
            shown = ", ".join(allowed) or "none"
            message = f"this key may not ask the model `{model}`; it may ask: {shown}"
            raise ProtocolError(403, message, "model", "model_not_found")

    def count(self) -> None:
        """Note a request; raise ProtocolError 429 where it is one too many in a minute."""
        limit = self._key.requests_per_minute
        if limit is None:
            return
        now = self._clock()
        while self._asked and self._asked[0] <= now - _MINUTE_S:
            self._asked.popleft()
        if len(self._asked) >= limit:
            wait_s = max(1, math.ceil(self._asked[0] + _MINUTE_S - now))
            message = f"this key may ask {limit} times a minute; ask again in {wait_s} s"
            raise ProtocolError(429, message, code="rate_limit_exceeded", retry_after_s=wait_s)
        self._asked.append(now)


_ANYBODY = Holder("", ApiKey(sha256="0" * 64))


class Keyring:
    """The keys of a server; without any, everybody may ask everything.

    Args:
        keys: By the name of who has them.
    """

    def __init__(self, keys: Mapping[str, ApiKey]) -> None:
        self.keys = dict(keys)
        self._holders = {key.sha256: Holder(name, key) for name, key in keys.items()}

    def __bool__(self) -> bool:
        return bool(self.keys)

    def with_secret(self, name: str, secret: str) -> Keyring:
        """Return these keys and one more, which may do everything."""
        return Keyring(self.keys | {name: ApiKey(sha256=hash_of(secret.encode()))})

    def holder(self, secret: bytes) -> Holder:
        """Return who has a key.

        Raises:
            ProtocolError: 401, nobody has it.
        """
        if not self.keys:
            return _ANYBODY
        found = self._holders.get(hash_of(secret))
        if found is None:
            raise ProtocolError(401, "the API key is missing or wrong", code="invalid_api_key")
        return found


def hash_of(secret: bytes) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(secret).hexdigest()


def keyring(serving: ServingConfig) -> Keyring:
    """Return the keys of `serving.api_keys_file` and of the environment variable TUNELOOP_API_KEY.

    Raises:
        ConfigError: The file cannot be read, others may read it, or it is wrong.
    """
    keys = read_keys(serving.api_keys_file) if serving.api_keys_file else {}
    secret = os.environ.get(API_KEY_VARIABLE, "")
    ring = Keyring(keys)
    return ring.with_secret(API_KEY_VARIABLE, secret) if secret else ring


def serving_problems(serving: ServingConfig) -> list[Problem]:
    """Return why `tuneloop serve` would not listen."""
    try:
        ring = keyring(serving)
        refuse_exposed(serving.host, ring)
    except ConfigError as error:
        return list(error.problems)
    return []


def refuse_exposed(
    host: str, ring: Keyring, where: str = "serving.host", file: str = "serving.api_keys_file"
) -> None:
    """Raise ConfigError for an address that other machines reach, without a key.

    Args:
        where: The setting that names the address.
        file: The setting that names a file of keys.
    """
    if ring or _is_loopback(host):
        return
    raise ConfigError.of(
        "other machines would reach the models, and no key is asked for",
        where=where,
        got=host,
        allowed="127.0.0.1, or any address with a key",
        remedy=f"set {file}, or the environment variable {API_KEY_VARIABLE}",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: str | Path) -> dict[str, ApiKey]:
    """Return the keys of a file, by name.

    Raises:
        ConfigError: It cannot be read, others may read it, or it is wrong.
    """
    path = Path(path).expanduser()
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(path, getattr(error, "strerror", None) or str(error)) from error
    if mode & stat.S_IRWXO:
        raise ConfigError.of(
            "everybody on this machine may read or change the keys",
            where=str(path),
            got=f"mode {stat.S_IMODE(mode):o}",
            allowed="600, or 640 for a group",
            remedy=f"chmod 600 {path}",
        )
    try:
        raw = yaml.safe_load(text)
        keys = TypeAdapter(dict[str, ApiKey]).validate_python(raw)
    except yaml.YAMLError as error:
        raise _wrong(path, str(getattr(error, "problem", None) or error)) from error
    except ValidationError as error:
        # What stands in the file is not shown: it may be a key, by mistake.
        raise ConfigError(
            *(_problem(path, _told(one["loc"], one["type"], one["msg"])) for one in error.errors())
        ) from error
    if not keys:
        raise _wrong(path, "no key")
    hashes = [key.sha256 for key in keys.values()]
    if len(set(hashes)) < len(hashes):
        raise _wrong(path, "two names have the same key")
    if hash_of(b"") in hashes:
        # A shell's variable that was not set; everybody without a key would have this one.
        raise _wrong(path, "the hash of an empty key")
    return keys


def _told(location: Sequence[object], kind: str, message: str) -> str:
    where = ".".join(map(str, location))
    if kind == "extra_forbidden":
        return f"unknown field `{where}`"
    return f"{where}: {message}" if where else message


def _problem(path: Path, got: str) -> Problem:
    return Problem(
        "the file of API keys cannot be used",
        where=f"serving.api_keys_file: {path}",
        got=got,
        allowed="NAME: {sha256: 64 hexadecimal digits, models: [NAME, …], requests_per_minute: N}, "
        "the last two optional",
        remedy="make a key and its hash as docs/serving.md shows",
    )


def _wrong(path: Path, got: str) -> ConfigError:
    return ConfigError(_problem(path, got))
