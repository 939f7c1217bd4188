"""API keys: random, shown once, kept as hashes in a file that is read again when it changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.files import write_bytes

_log = logging.getLogger(__name__)

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")
"""Each may do what those before it may: search and encode; change passages; snapshots and reloading."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_PREFIX = "d2llm_"  # lets scanners for leaked secrets, and people, see what a string is
_NUM_BYTES = 32


class ApiKey(BaseModel):
    """What is known of a key; the key itself is not kept.

    Attributes:
        name: in logs, and to remove it by.
        sha256: of the key, in hexadecimal. Without salt: keys are random, so there is nothing to guess from a table.
        scope: the most that it may do.
        requests_per_minute: None takes the server's.
        created: the day, as 2026-01-31.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, StringConstraints(pattern=f"^{_NAME}$")]
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    scope: Scope = "read"
    requests_per_minute: Annotated[int, Field(gt=0)] | None = None
    created: str = ""

    def allows(self, scope: Scope) -> bool:
        """Whether it may do what needs ``scope``."""
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


class _KeysFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file.

    Raises:
        InputError: the file cannot be read.
        DataFormatError: it is no file of keys.
    """
    try:
        return _KeysFile.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); make it with: d2llm keys {path} add NAME"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of a file of keys") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise DataFormatError(path, f"is no file of API keys ({where}: {problem['msg']}); give another path") from error


def add_key(path: Path, name: str, scope: Scope = "read", requests_per_minute: int | None = None) -> str:
    """Make a key, and the file where there is none; returns the key, which nobody can tell again.

    Raises:
        InputError: a key of the name is there, or the name is none.
    """
    if not re.fullmatch(_NAME, name):
        raise InputError(f"'{name}' cannot be the name of a key: take up to 64 letters, digits, '.', '_' and '-'")
    if path.exists():
        read_keys(path)  # before a lock is laid beside what is no file of keys
    with _lock(path):
        keys = read_keys(path) if path.exists() else ()
        if any(key.name == name for key in keys):
            raise InputError(f"{path}: there is a key '{name}'; take another name, or remove that one first")
        secret = _PREFIX + secrets.token_urlsafe(_NUM_BYTES)
        created = datetime.now(timezone.utc).date().isoformat()
        key = ApiKey(
            name=name, sha256=_hash(secret), scope=scope, requests_per_minute=requests_per_minute, created=created
        )
        _write(path, (*keys, key))
    return secret


def remove_key(path: Path, name: str) -> None:
    """Take a key away; running servers refuse it from the next request on.

    Raises:
        InputError: there is no key of the name.
    """
    read_keys(path)
    with _lock(path):
        keys = read_keys(path)
        left = tuple(key for key in keys if key.name != name)
        if len(left) == len(keys):
            names = ", ".join(key.name for key in keys) or "none"
            raise InputError(f"{path}: there is no key '{name}'; it has: {names}")
        _write(path, left)


class KeyRing:
    """The keys of a file, as a server asks for them.

    When the file changes it is read again. One that is gone lets nobody in; one that cannot be read (half edited by
    hand) leaves the keys as they were, with an error in the log.

    Raises:
        InputError: at first, the file cannot be read or is no file of keys.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._state()
        self._keys = read_keys(path)

    def find(self, secret: str) -> ApiKey | None:
        """The key that ``secret`` is, or None. The time that it takes tells nothing about the keys."""
        self._refresh()
        digest = _hash(secret)
        match = None
        for key in self._keys:  # all of them, wherever the right one is
            if hmac.compare_digest(key.sha256, digest):
                match = key
        return match

    def _refresh(self) -> None:
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        if state is None:
            self._keys = ()
            _log.error("%s is gone: no key is accepted until it is there again", self._path)
            return
        try:
            self._keys = read_keys(self._path)
        except InputError as error:
            _log.error("the API keys stay as they were: %s", error)
        else:
            _log.info("read %d API keys from %s", len(self._keys), self._path)

    def _state(self) -> tuple[int, ...] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        # The second also changes with its permissions: a file that could not be read may be readable since.
        return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _lock(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"), timeout=10)


def _write(path: Path, keys: tuple[ApiKey, ...]) -> None:
    content = _KeysFile(keys=keys).model_dump_json(indent=2) + "\n"
    write_bytes(path, content.encode(), mode=0o600)
