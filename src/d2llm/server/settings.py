"""The settings of `d2llm serve`: one schema for a TOML file, for the environment and for the command line."""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from d2llm.core.errors import InputError
from d2llm.core.names import nearest
from d2llm.core.types import EngineName, NumberFormat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "D2LLM_SERVE_"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_WILDCARD_ADDRESSES = {"", "0.0.0.0", "::"}


def _split(value: object) -> object:
    """A list may be written with commas, as the environment and the command line have only text."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Count = Annotated[int, Field(gt=0)]
Milliseconds = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]


class ServeSettings(BaseSettings):
    """The settings of a server; each is explained by its description.

    Made from keywords alone it takes nothing from the environment: ``load_settings`` puts the sources together.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    index: Path | None = Field(default=None, description="Folder of the index; without one, a student alone is served.")
    student: str | None = Field(
        default=None, description="A student's folder or name; with an index, the one that made it by default."
    )
    teacher: str | None = Field(default=None, description="A teacher that may read again what a search found.")
    prompt: str | None = Field(default=None, description="How an untuned teacher is asked: a name or a TOML file.")
    model_name: str | None = Field(default=None, min_length=1, description="What clients call the student.")
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65_535, description="Port to listen on; 0 takes a free one.")
    device: str | None = Field(default=None, description="Where to compute: cpu, cuda, cuda:1, mps.")
    dtype: NumberFormat | None = Field(default=None, description="Number format of the models.")
    engine: EngineName = Field(
        default="auto", description="What encodes texts; auto: the fastest here that gives the same vectors."
    )
    writable: bool = Field(default=True, description="Whether passages may be written and deleted over HTTP.")
    keys_file: Path | None = Field(default=None, description="File of API keys, as `d2llm keys` writes it.")
    allow_unauthenticated: bool = Field(
        default=False, description="Listen on an address that other machines reach, without keys."
    )
    requests_per_minute: Count | None = Field(
        default=None, description="Most requests per minute of one key; without keys, of one client address."
    )
    rate_limit_storage: SecretStr | None = Field(
        default=None,
        description="Redis where several servers count requests together, as in redis://localhost:6379 (extra redis).",
    )
    allowed_hosts: Names = Field(
        default=LOOPBACK_NAMES,
        description="Host names that are answered; `*.example.com` and `*` are patterns.",
    )
    trusted_proxies: Names = Field(
        default=(), description="Addresses of reverse proxies whose X-Forwarded-For is believed; `*` means all."
    )
    cors_origins: Names = Field(default=(), description="Origins whose pages may send requests from a browser, or `*`.")
    max_body_bytes: Count = Field(default=16 * 2**20, description="Largest body of a request.")
    request_seconds: Seconds = Field(
        default=30.0, description="How long a client may take to send a request's headers, and again its body."
    )
    max_texts: Count = Field(default=512, description="Most texts of a request.")
    max_text_chars: Count = Field(default=100_000, description="Longest text, in characters.")
    max_top_k: Count = Field(default=1_000, description="Most passages of an answer.")
    max_num_candidates: Count = Field(default=10_000, description="Most candidates of a search.")
    queue_texts: Count = Field(
        default=2_048, description="Most texts that wait to be encoded, and searches under way; beyond, 429."
    )
    batch_tokens: Count | None = Field(
        default=None, description="Most tokens of a batch; by default 512 on each core, 8,192 on an accelerator."
    )
    batch_wait_ms: Milliseconds = Field(default=0.0, description="How long a batch waits for more, in milliseconds.")
    teacher_ms: Milliseconds = Field(
        default=2_000.0, description="Longest time that a teacher reads for a search, in milliseconds."
    )
    reload_seconds: Seconds = Field(default=2.0, description="How often to look for a new version of the index.")
    shutdown_seconds: Seconds = Field(default=30.0, description="How long accepted requests may take when it stops.")
    log_format: Literal["text", "json"] = Field(default="text", description="How log lines are written.")
    log_texts: bool = Field(default=False, description="Also log queries and passages, and the messages of exceptions.")
    report: Path | None = Field(default=None, description="HTML report of `d2llm evaluate` to show.")
    otel: bool = Field(default=False, description="Send traces by OpenTelemetry (extra otel).")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keywords alone; ``load_settings`` knows of each value where it came from, which pydantic does not keep."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)

    @model_validator(mode="after")
    def _check_exposure(self) -> ServeSettings:
        if self.keys_file is None and not self.allow_unauthenticated and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host!r} can be reached from other machines, and there are no keys: make some with "
                "`d2llm keys FILE add NAME` and give keys_file, or set allow_unauthenticated = true"
            )
        return self

    @property
    def host_names(self) -> tuple[str, ...]:
        """``allowed_hosts``, and the address that it listens on where that is one address."""
        own_address = () if self.host in _WILDCARD_ADDRESSES else (self.host,)
        return tuple(dict.fromkeys((*self.allowed_hosts, *own_address)))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there; names other than localhost count as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings, and of each field where its value came from ("default", "file serve.toml", ...)."""

    settings: ServeSettings
    sources: dict[str, str]

    def lines(self) -> list[tuple[str, str, str]]:
        """(field, value as TOML has it, source) of every field; passwords inside addresses are left out."""
        values = self.settings.model_dump(mode="json")
        return [(name, _shown(values[name]), source) for name, source in self.sources.items()]


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    file: Path | None = None,
    assignments: Mapping[str, str] | None = None,
) -> LoadedSettings:
    """Put the sources together: flags win over the environment, which wins over the file.

    Args:
        flags: values of the command line's own options by field; None means that it was not given.
        file: TOML with fields at the top level. Relative paths are taken from the current directory.
        assignments: values given by ``--set``, by field; they win over the file and the environment.

    Raises:
        InputError: an unknown field (the nearest right one is named), a bad value (with where it came from), a file
            that cannot be read, one field given twice on the command line, or settings that would let everybody in.
    """
    layers: list[tuple[dict[str, Any], dict[str, str]]] = []
    if file is not None:
        values = _read_file(file)
        layers.append((values, dict.fromkeys(values, f"file {file}")))
    values = _read_environment()
    layers.append((values, {name: f"environment {PREFIX}{name.upper()}" for name in values}))
    options = {name: value for name, value in (flags or {}).items() if value is not None}
    assigned = dict(assignments or {})
    if repeated := sorted(options.keys() & assigned.keys()):
        raise InputError(f"{repeated[0]}: given twice, as an option and by --set; give it once")
    layers.append((assigned, dict.fromkeys(assigned, "--set")))
    layers.append((options, {name: _flag_of(name) for name in options}))
    merged: dict[str, Any] = {}
    sources = dict.fromkeys(ServeSettings.model_fields, "default")
    for values, origins in layers:
        for name in values:
            if name not in sources:
                raise InputError(f"{origins[name]}: unknown setting '{name}'; {_meant_instead(name)}")
        merged.update(values)
        sources.update(origins)
    try:
        return LoadedSettings(ServeSettings(**merged), sources)
    except ValidationError as error:
        raise InputError("; ".join(_explain(problem, sources) for problem in error.errors())) from error


def parse_assignments(words: list[str]) -> dict[str, str]:
    """``["max_texts=64"]`` -> ``{"max_texts": "64"}``.

    Raises:
        InputError: a word without "=", or one field twice.
    """
    values: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise InputError(f"--set {word}: write --set NAME=VALUE, as in --set max_texts=64")
        if name in values:
            raise InputError(f"--set {name}: given twice; give it once")
        values[name] = value.strip()
    return values


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a mark of UTF-8 first
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}; correct it there") from error


def _read_environment() -> dict[str, Any]:
    """Fields by name; empty variables count as not set. Unknown names are kept, so that they become errors."""
    values = EnvSettingsSource(ServeSettings)()
    for variable, value in os.environ.items():
        if variable.upper().startswith(PREFIX) and value:
            values.setdefault(variable[len(PREFIX) :].lower(), value)
    return values


def _flag_of(name: str) -> str:
    return "INDEX" if name == "index" else "--" + name.replace("_", "-")


def _meant_instead(name: str) -> str:
    known = sorted(ServeSettings.model_fields)
    suggestion = nearest(name, known)
    return f"known settings: {', '.join(known)}" if suggestion is None else f"did you mean '{suggestion}'?"


def _explain(problem: Any, sources: Mapping[str, str]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    return f"{sources[name]}: {name}: {message} (got {problem['input']!r})"


def _shown(value: object) -> str:
    if value is None:
        return "(not set)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    if isinstance(value, str):
        return '"' + re.sub(r"://[^/@\s]+@", "://***@", value) + '"'
    return str(value)
