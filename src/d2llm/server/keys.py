"""API keys: random, shown once, stored as hashes in a file that is reloaded when it changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.files import write_bytes
from d2llm.core.problems import describe_errors

_log = logging.getLogger(__name__)

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")
"""Each includes those before it. read: search and encode; write: change passages; admin: snapshots and reloading."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_PREFIX = "d2llm_"  # lets people and secret scanners recognize keys
_NUM_BYTES = 32


class ApiKey(BaseModel):
    """The record of a key; the key itself is not stored.

    Attributes:
        name: shown in logs, and used to remove the key.
        sha256: hash of the key, in hexadecimal. It needs no salt: keys are random, so precomputed tables do not help.
        scope: the highest scope of the key.
        requests_per_minute: rate limit; None uses the server's.
        indexes: names of the indexes that it may use; None means all.
        created: date, as in 2026-01-31.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, StringConstraints(pattern=f"^{_NAME}$")]
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    scope: Scope = "read"
    requests_per_minute: Annotated[int, Field(gt=0)] | None = None
    indexes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    created: str = ""

    def allows(self, scope: Scope) -> bool:
        """Whether the key's scope includes ``scope``."""
        return SCOPES.index(self.scope) >= SCOPES.index(scope)

    def allows_index(self, name: str) -> bool:
        """Whether the key may use the index of this name."""
        return self.indexes is None or name in self.indexes


class _KeysFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Read the keys from a file.

    Raises:
        InputError: the file cannot be read.
        DataFormatError: it is not a file of API keys.
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
        message = f"is not a file of API keys ({describe_errors(error, _KeysFile)}); give another path"
        raise DataFormatError(path, message) from error


def add_key(
    path: Path,
    name: str,
    scope: Scope = "read",
    requests_per_minute: int | None = None,
    indexes: Sequence[str] | None = None,
) -> str:
    """Make a key, and the file if it does not exist; returns the key, which cannot be recovered later.

    Args:
        path: the file of keys.
        name: name of the key.
        scope: its highest scope.
        requests_per_minute: its rate limit; None uses the server's.
        indexes: names of the indexes that it may use; None or none means all.

    Raises:
        InputError: a key of this name exists, or the name is invalid.
    """
    if not re.fullmatch(_NAME, name):
        raise InputError(f"'{name}' is not a valid key name: use up to 64 letters, digits, '.', '_' and '-'")
    if path.exists():
        read_keys(path)  # before creating a lock beside a file that is not one of keys
    with _lock(path):
        keys = read_keys(path) if path.exists() else ()
        if any(key.name == name for key in keys):
            raise InputError(f"{path}: a key '{name}' exists; use another name, or remove that one first")
        secret = _PREFIX + secrets.token_urlsafe(_NUM_BYTES)
        created = datetime.now(timezone.utc).date().isoformat()
        key = ApiKey(
            name=name,
            sha256=_hash(secret),
            scope=scope,
            requests_per_minute=requests_per_minute,
            indexes=tuple(dict.fromkeys(indexes)) if indexes else None,
            created=created,
        )
        _write(path, (*keys, key))
    return secret


def remove_key(path: Path, name: str) -> None:
    """Remove a key; running servers refuse it from the next request on.

    Raises:
        InputError: there is no key of this name.
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
    """The keys of a file, reloaded when the file changes.

    If the file is deleted, no key is accepted; if it cannot be read (half edited by hand), the keys stay as they were,
    and an error is logged.

    Raises:
        InputError: initially, the file cannot be read or is not a file of API keys.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._state()
        self._keys = read_keys(path)

    def find(self, secret: str) -> ApiKey | None:
        """The key record for ``secret``, or None. The time taken reveals nothing about the keys."""
        self._refresh()
        digest = _hash(secret)
        match = None
        for key in self._keys:  # always compare all of them
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
            _log.error("%s no longer exists: no key is accepted until it is restored", self._path)
            return
        try:
            self._keys = read_keys(self._path)
        except InputError as error:
            _log.error("keeping the previous API keys: %s", error)
        else:
            _log.info("read %d API keys from %s", len(self._keys), self._path)

    def _state(self) -> tuple[int, ...] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        # ctime also changes with the permissions: an unreadable file may have become readable.
        return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _lock(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"), timeout=10)


def _write(path: Path, keys: tuple[ApiKey, ...]) -> None:
    content = _KeysFile(keys=keys).model_dump_json(indent=2) + "\n"
    write_bytes(path, content.encode(), mode=0o600)
