"""Settings of `d2llm serve`: one schema for TOML file, environment and command line."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from d2llm.core.errors import InputError
from d2llm.core.names import suggestion
from d2llm.core.problems import requirement, shown_for
from d2llm.core.settings import DTYPE_HELP, Shown, narrowed, setting
from d2llm.core.toml import read_toml
from d2llm.core.types import EngineName, NumberFormat
from d2llm.data.settings import ReadingSettings
from d2llm.store.index_manifest import find_index

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PREFIX = "D2LLM_SERVE_"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_WILDCARD_ADDRESSES = {"", "0.0.0.0", "::"}


def _split(value: object) -> object:
    """Split a comma-separated list: the environment and the command line can only pass strings."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _named_folders(value: object) -> object:
    """Folders of indexes by name: from a folder or several, each FOLDER or NAME=FOLDER, or from a table of them."""
    if value is None or isinstance(value, Mapping):
        return value or {}
    words = [value] if isinstance(value, Path) else _split(value)
    if not isinstance(words, list | tuple):
        raise ValueError("write FOLDER or NAME=FOLDER, or a list of these")
    folders: dict[str, Path] = {}
    for word in map(str, cast("Sequence[object]", words)):
        own_name = None if Path(word).is_dir() else _NAMED_FOLDER.fullmatch(word)
        folder = Path(own_name["folder"] if own_name else word)
        name = own_name["name"] if own_name else folder.absolute().name
        if name in folders:
            raise ValueError(
                f"two indexes are named '{name}' ({folders[name]} and {folder}); give one of them another name, as in "
                f"{name}-2={folder}"
            )
        folders[name] = folder
    return folders


def _indexes_in(folders: dict[str, Path]) -> dict[str, Path]:
    """The folders of the indexes themselves, where a folder of ``fit`` is given."""
    return {name: find_index(folder) for name, folder in folders.items()}


_NAMED_FOLDER = re.compile(r"(?P<name>[^\s=/\\:,]+)=(?P<folder>.+)")
IndexName = Annotated[str, Field(pattern="^[^/]+$")]
Folders = Annotated[dict[IndexName, Path], BeforeValidator(_named_folders), AfterValidator(_indexes_in)]


def _only(is_valid: Callable[[str], object], remedy: str) -> AfterValidator:
    """Refuse an item of a list that no request can match, except ``*``."""

    def check(value: str) -> str:
        if value != "*" and not is_valid(value):
            raise ValueError(remedy)
        return value

    return AfterValidator(check)


def _is_network(value: str) -> bool:
    try:
        return bool(ipaddress.ip_network(value))
    except ValueError:
        return False


_HOST = _only(
    re.compile(r"(?:\*\.)?[\w.-]+|\[?[\da-fA-F]*:[\da-fA-F]*:[\da-fA-F:.]*\]?").fullmatch,
    "write host names without scheme, port and path, as in search.example.com",
)
_ORIGIN = _only(
    re.compile(r"null|[a-z][a-z\d+.-]*://[^/\s]+").fullmatch,
    "write scheme and host (and port), as browsers send them: https://app.example.com",
)
_LIST = BeforeValidator(_split)
_PROXY = _only(_is_network, "write IP addresses, or networks as in 10.0.0.0/8; names are not looked up")
Count = Annotated[int, Field(gt=0)]
Milliseconds = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]


class ServeSettings(BaseModel):
    """The settings of a server; each field has a description. ``load_settings`` reads them from their sources."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    index: Folders = Field(
        default_factory=dict[str, Path],
        description="Folders of indexes, each FOLDER or NAME=FOLDER; without any, only a student is served.",
    )
    student: str | None = setting(
        None,
        "Folder or name of the student; by default the one that made each index.",
        Shown(metavar="NAME_OR_FOLDER", default="the one that made each index"),
    )
    teacher: str | None = setting(None, "A teacher that can rerank search results.", Shown(metavar="MODEL"))
    prompt: str | None = setting(
        None, "Prompt for an untuned teacher: a name or a TOML file.", Shown(metavar="NAME", default="paper")
    )
    reranker: str | None = setting(
        None,
        "A reranker that searches can name: KIND, KIND:MODEL, or a TOML file; the teacher brings others.",
        Shown(metavar="KIND:MODEL"),
    )
    writer: str | None = setting(
        None, "A language model that can expand or rewrite queries; see writers.md.", Shown(metavar="MODEL")
    )
    writer_endpoint: str | None = Field(
        default=None, description="OpenAI-compatible endpoint of the writer, up to /v1; without it, it runs here."
    )
    writer_key_env: str | None = Field(
        default=None, description="Environment variable with the key of the writer's endpoint."
    )
    model_name: str | None = Field(default=None, min_length=1, description="Name of the student for clients.")
    host: str = setting("127.0.0.1", "Address to listen on.", Shown(metavar="ADDRESS", default="127.0.0.1"))
    port: int = setting(8000, "Port to listen on; 0 chooses a free one.", Shown(default="8000"), ge=0, le=65_535)
    device: str | None = setting(
        None, "Device for the models: cpu, cuda, cuda:1, mps.", Shown(metavar="NAME", default="the best available")
    )
    dtype: NumberFormat | None = setting(None, DTYPE_HELP, Shown(default="one that is fast on the device"))
    engine: EngineName = setting(
        "auto", "Engine that encodes texts; auto: the fastest available with the same vectors.", Shown(default="auto")
    )
    allow_missing_shards: bool = setting(
        False,
        "Whether a sharded index is served without the shards that cannot be read; answers name them.",
        Shown(option="allow-missing-shards/--all-shards", default="all shards"),
    )
    runner: str = setting(
        "local",
        "Where shards are searched and texts encoded: local, in this process; ray or ray:HOST:PORT.",
        Shown(metavar="RUNNER", default="local"),
    )
    shard_replicas: Count = Field(default=1, description="On Ray: actors of each shard.")
    shard_cpus: Positive = Field(default=1.0, description="On Ray: CPUs that each actor of a shard reserves.")
    shard_seconds: Seconds = Field(
        default=2.0, description="On Ray: seconds within which a shard must answer each step of a search."
    )
    student_replicas: int = Field(
        default=1, ge=0, description="On Ray: replicas of each student that encode; 0: this process encodes."
    )
    max_student_replicas: Count | None = Field(
        default=None, description="On Ray: replicas of each student while requests wait, if more than the above."
    )
    student_cpus: Positive = Field(default=1.0, description="On Ray: CPUs that each replica of a student reserves.")
    student_gpus: float = Field(default=0.0, ge=0, description="On Ray: GPUs that each replica of a student reserves.")
    writable: bool = setting(
        True, "Whether the indexes may be changed over HTTP.", Shown(option="writable/--read-only", default="writable")
    )
    keys_file: Path | None = setting(None, "File of API keys, made by `d2llm keys`.", Shown(metavar="FILE"))
    allow_unauthenticated: bool = Field(
        default=False, description="Allow an address that other machines can reach without API keys."
    )
    requests_per_minute: Count | None = Field(
        default=None, description="Rate limit: requests per minute of a key, or of a client address without one."
    )
    rate_limit_storage: SecretStr | None = Field(
        default=None,
        description="Redis for rate limits shared by several servers, as in redis://localhost:6379 (extra redis).",
    )
    allowed_hosts: Annotated[tuple[Annotated[str, _HOST], ...], _LIST] = Field(
        default=LOOPBACK_NAMES,
        description="Accepted Host names; may contain patterns like `*.example.com` and `*`.",
    )
    trusted_proxies: Annotated[tuple[Annotated[str, _PROXY], ...], _LIST] = Field(
        default=(),
        description="Addresses or networks of reverse proxies whose X-Forwarded-For is trusted; `*` means all.",
    )
    cors_origins: Annotated[tuple[Annotated[str, _ORIGIN], ...], _LIST] = Field(
        default=(), description="Origins whose pages may send requests from a browser, or `*`."
    )
    max_body_bytes: Count = Field(default=16 * 2**20, description="Maximum size of a request body, in bytes.")
    request_seconds: Seconds = Field(
        default=30.0, description="Time limit for a client to send a request's headers, and again for its body."
    )
    max_texts: Count = Field(default=2_048, description="Maximum number of texts, or files, per request.")
    max_text_chars: Count = Field(default=100_000, description="Maximum length of a text and its title, in characters.")
    max_document_chars: Count = Field(
        default=4_000_000, description="Maximum length of a document, which is split into passages, in characters."
    )
    ocr: str | None = Field(
        default=None,
        description=f"{ReadingSettings.model_fields['ocr'].description} By default eng if tesseract is installed.",
    )
    max_top_k: Count = Field(default=1_000, description="Maximum number of passages per answer.")
    max_num_candidates: Count = Field(default=10_000, description="Maximum number of candidates per search.")
    max_context_tokens: Count = Field(default=32_000, description="Maximum number of tokens of a context.")
    queue_texts: Count = Field(
        default=8_192, description="Maximum number of queued texts, and of searches in progress; beyond that, 429."
    )
    batch_tokens: Count | None = Field(
        default=None,
        description="Maximum tokens per batch; by default 512 on each core; on an accelerator 32,768, or 8,192 with a "
        "model of a billion weights or more.",
    )
    batch_wait_ms: Milliseconds = Field(default=0.0, description="How long a batch waits for texts, in milliseconds.")
    teacher_ms: Milliseconds = Field(
        default=2_000.0, description="Time limit of the teacher per search, in milliseconds."
    )
    reload_seconds: Seconds = Field(default=2.0, description="Interval of checks for new versions of the indexes.")
    shutdown_seconds: Seconds = Field(default=30.0, description="Time limit for accepted requests at shutdown.")
    log_format: Literal["text", "json"] = Field(default="text", description="Format of log lines.")
    log_texts: bool = Field(default=False, description="Also log queries and passages, and the messages of exceptions.")
    report: Path | None = setting(None, "HTML report of `d2llm evaluate` to serve.", Shown(metavar="FILE"))
    otel: bool = Field(default=False, description="Send OpenTelemetry traces (extra otel).")

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """A number is not true or false, which pydantic would read as 1 and 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        numbers = {int, float} & {annotation, *get_args(annotation)}
        if isinstance(value, bool) and numbers:
            raise PydanticKnownError("int_type" if int in numbers else "float_type")
        return value

    @model_validator(mode="after")
    def _check_exposure(self) -> ServeSettings:
        if self.keys_file is None and not self.allow_unauthenticated and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host!r} can be reached from other machines, and there are no keys: make some with "
                "`d2llm keys FILE add NAME` and give keys_file, or set allow_unauthenticated = true"
            )
        return self

    @model_validator(mode="after")
    def _check_writer(self) -> ServeSettings:
        if self.writer_endpoint is not None and self.writer is None:
            raise ValueError("writer_endpoint needs writer, the name of a model there")
        if self.writer_key_env is not None and self.writer_endpoint is None:
            raise ValueError("writer_key_env is about an endpoint; give its address as writer_endpoint")
        return self

    @model_validator(mode="after")
    def _check_index(self) -> ServeSettings:
        for name in ("teacher", "reranker", "writer"):
            if getattr(self, name) is not None and not self.index:
                raise ValueError(
                    f"a {name} works on searches, and there is no index to search: give the folder of one, or leave "
                    f"{name} out"
                )
        return self

    @property
    def host_names(self) -> tuple[str, ...]:
        """``allowed_hosts``, plus ``host`` unless it is a wildcard address."""
        own_address = () if self.host in _WILDCARD_ADDRESSES else (self.host,)
        return tuple(dict.fromkeys((*self.allowed_hosts, *own_address)))


_HIDDEN = Shown(python_only=True)


class AgentSettings(ServeSettings):
    """The settings of ``d2llm mcp``, which has no address and no keys: its client has started it."""

    host: str = narrowed(ServeSettings, "host", _HIDDEN)
    port: int = narrowed(ServeSettings, "port", _HIDDEN)
    keys_file: Path | None = narrowed(ServeSettings, "keys_file", _HIDDEN)
    report: Path | None = narrowed(ServeSettings, "report", _HIDDEN)
    writable: bool = setting(
        False,
        "Whether the client may change the indexes.",
        Shown(option="writable/--read-only", default="read-only"),
    )


def is_loopback(host: str) -> bool:
    """Whether ``host`` is only reachable from this machine; names other than localhost count as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings, with the source of each field's value ("default", "file serve.toml", ...)."""

    settings: ServeSettings
    sources: dict[str, str]

    def lines(self) -> list[tuple[str, str, str]]:
        """(field, value in TOML notation, source) of every field; passwords in addresses are masked."""
        values = self.settings.model_dump(mode="json")
        return [(name, _shown(values[name]), source) for name, source in self.sources.items()]


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    file: Path | None = None,
    assignments: Mapping[str, str] | None = None,
) -> LoadedSettings:
    """Merge the sources: command-line flags override the environment, which overrides the file.

    Args:
        flags: values of command-line options by field; None means that the option was not given.
        file: TOML with fields at the top level. Relative paths are relative to the current directory.
        assignments: values of ``--set``, by field; they override the file and the environment.

    Raises:
        InputError: a field is unknown (the message suggests the nearest), a value is invalid (the message names its
            source), the file cannot be read, a field is given twice on the command line, or the server would be open to
            other machines without keys.
    """
    layers: list[tuple[dict[str, Any], dict[str, str]]] = []
    if file is not None:
        values = read_toml(file)
        layers.append((values, dict.fromkeys(values, f"file {file}")))
    values = {
        variable[len(PREFIX) :].lower(): value
        for variable, value in os.environ.items()
        if variable.upper().startswith(PREFIX) and value  # an empty variable counts as unset
    }
    layers.append((values, {name: f"environment {PREFIX}{name.upper()}" for name in values}))
    options = {name: value for name, value in (flags or {}).items() if value is not None}
    assigned = dict(assignments or {})
    if repeated := sorted(options.keys() & assigned.keys()):
        raise InputError(f"{repeated[0]}: given twice, as an option and by --set; give it once")
    layers.append((assigned, dict.fromkeys(assigned, "--set")))
    layers.append((options, {name: _flag_of(name) for name in options}))
    merged: dict[str, Any] = {}
    known = sorted(ServeSettings.model_fields)
    sources = dict.fromkeys(ServeSettings.model_fields, "default")
    for values, origins in layers:
        for name in values:
            if name not in sources:
                hint = suggestion(name, known, "known settings")
                raise InputError(f"{origins[name]}: unknown setting '{name}'; {hint}")
        merged.update(values)
        sources.update(origins)
    try:
        return LoadedSettings(ServeSettings(**merged), sources)
    except ValidationError as error:
        raise InputError("; ".join(_explain(problem, sources) for problem in error.errors())) from error


def _flag_of(name: str) -> str:
    return "INDEX" if name == "index" else "--" + name.replace("_", "-")


def _explain(problem: ErrorDetails, sources: Mapping[str, str]) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name, needed = str(problem["loc"][0]), requirement([problem])
    what = f"{name} is {shown_for(problem)}, but must {needed}"
    if needed is None:
        what = f"{name}: {message} (got {problem['input']!r})"
    return f"{sources[name]}: {what}"


def _shown(value: object) -> str:
    if value is None or value == {}:
        return "(not set)"
    if isinstance(value, dict):
        named = cast("dict[str, object]", value).items()
        return "{" + ", ".join(f'"{name}" = {_shown(item)}' for name, item in named) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, cast("list[object]", value))) + "]"
    if isinstance(value, str):
        return '"' + re.sub(r"://[^/@\s]+@", "://***@", value) + '"'
    return str(value)
