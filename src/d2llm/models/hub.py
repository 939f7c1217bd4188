"""Students on the Hugging Face Hub: found by name, fetched, checked, and put there.

Weights are safetensors and the rest is JSON: nothing that could run is ever fetched or put there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from d2llm.core.errors import InputError, ModelError, ModelNotFoundError
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.shipped import shipped_models
from d2llm.models.model_card import HUB_ID, model_card, why_not_loadable
from d2llm.models.student_files import (
    BACKBONE_FOLDER,
    CARD_FILE,
    MERGED_HASH,
    check_weights,
    merged_sha256,
    read_student_manifest,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

logger = logging.getLogger(__name__)

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.md", "LICENSE*")
"""Files of a student. Pickled weights and code are none of them."""


@dataclass(frozen=True, slots=True)
class PushReport:
    """Where a student was put: its repository, the commit and its page, how many files of how many bytes.

    ``needs_d2llm`` says why plain sentence-transformers cannot load it; None where it can.
    """

    repo_id: str
    commit: str
    url: str
    num_files: int
    num_bytes: int
    needs_d2llm: str | None


def find_student(folder_or_name: str | Path) -> Path:
    """The folder of a student: what ``save`` wrote, one shipped with d2llm by its name, or a copy of one on the Hub.

    A name on the Hub is ``owner/name`` or, of a branch, tag or commit, ``owner/name@revision``. It is asked only where
    there is no folder of that name, nor a folder ``owner``.

    Raises:
        ModelNotFoundError: none of these.
        ModelError: what the Hub has is damaged, or could run code.
    """
    folder = Path(folder_or_name)
    if (folder / MANIFEST).is_file():
        return folder
    name = str(folder_or_name)
    shipped = shipped_models("students")
    if name in shipped:
        return shipped[name]
    repo_id, _, revision = name.partition("@")
    if HUB_ID.fullmatch(repo_id) and not folder.exists() and not Path(repo_id.partition("/")[0]).is_dir():
        return fetch_student(repo_id, revision=revision or None)
    raise ModelNotFoundError(
        f"no student at '{name}': give a folder that `d2llm distill` wrote, or a name on the Hub (owner/name)"
        + (f", or one of the shipped students: {', '.join(shipped)}" if shipped else "")
    )


def fetch_student(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder, in the Hub's own cache, of a student on the Hub; files already there are not fetched again.

    Args:
        repo_id: ``owner/name``.
        revision: a branch, tag or commit; by default the branch ``main``.
        token: of an account that may read it; by default that of the environment (``HF_TOKEN``) or the login.

    Raises:
        ModelNotFoundError: there is none that can be read, or the Hub cannot be reached (``HF_HUB_OFFLINE`` too) and
            there is no copy.
        ModelError: it is damaged, or its backbone wants to run code of its own.
        DataFormatError: it is not a student.
    """
    from huggingface_hub import snapshot_download

    with _told(repo_id, revision):
        # First the manifest alone: a repository that is no student may be many gigabytes.
        folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=[MANIFEST]))
        if not (folder / MANIFEST).is_file():
            raise ModelNotFoundError(
                f"'{repo_id}' on the Hub is not a d2llm student: it has no {MANIFEST}; check the name, or, for a model "
                "of sentence-transformers, name it as a backbone or baseline instead"
            )
        # The cache names the folder after the commit, so that both are of one version.
        folder = Path(snapshot_download(repo_id, revision=folder.name, token=token, allow_patterns=[*PATTERNS]))
    _refuse_code(folder)
    check_weights(folder)
    return folder


def push_student(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    licence: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> PushReport:
    """Put a student's folder on the Hub, in one commit; files of an earlier student there are removed in it.

    Args:
        folder: what ``Student.save`` wrote.
        repo_id: ``owner/name``; made if it is not there.
        private: only its owner may read a repository that is made; by default what the account has as its default.
        revision: the branch to commit to, made from ``main`` if it is not there.
        licence: of the weights, by the Hub's identifier ("apache-2.0"); by default what the card says.
        token: of an account that may write there; by default that of the environment (``HF_TOKEN``) or the login.
        message: of the commit.

    Raises:
        InputError: the folder holds files that are no student's, its backbone is a folder of this machine, or the
            repository cannot be written.
        ModelError: the folder's weights are not those of its manifest.
    """
    from huggingface_hub import CommitOperationDelete, HfApi

    from d2llm import __version__

    if not HUB_ID.fullmatch(repo_id):
        raise InputError(f"'{repo_id}' cannot be a repository's name on the Hub; give owner/name")
    additions = _additions(folder, licence)
    api = HfApi(token=token, library_name="d2llm", library_version=__version__)
    with _writable(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        kept = {addition.path_in_repo for addition in additions}
        before = [name for name in _names_in(api, repo_id, revision) if _is_ours(name) and name not in kept]
        commit = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(path_in_repo=name) for name in before)],
            commit_message=message or "Put a d2llm student here",
            revision=revision,
        )
    num_bytes = sum(addition.upload_info.size for addition in additions)
    needs_d2llm = why_not_loadable(folder, read_student_manifest(folder)[0])
    return PushReport(repo_id, str(commit.oid), str(commit.commit_url), len(additions), num_bytes, needs_d2llm)


def _additions(folder: Path, licence: str | None) -> list[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    manifest, config = read_student_manifest(folder)
    check_weights(folder)
    merged = (folder / BACKBONE_FOLDER).is_dir()
    if not merged and Path(config.backbone.model).expanduser().exists():
        raise InputError(
            f"{folder}: its backbone is {config.backbone.model} on this machine, which others do not have; save the "
            "student with merge=True, and push that"
        )
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    if others := [name for name in names.values() if not _is_ours(name)]:
        raise InputError(
            f"{folder}: holds files that are no student's ({', '.join(others[:5])}); only safetensors, JSON and texts "
            "are put on the Hub, so move them elsewhere"
        )
    if merged:
        manifest |= {MERGED_HASH: merged_sha256(folder)}
    written = {
        MANIFEST: json.dumps(manifest, indent=2, ensure_ascii=False) + "\n",
        CARD_FILE: model_card(folder, manifest, licence=licence),
    }
    return [
        *(CommitOperationAdd(name, text.encode()) for name, text in written.items()),
        *(CommitOperationAdd(name, path) for path, name in names.items() if name not in written),
    ]


def _names_in(api: HfApi, repo_id: str, revision: str | None) -> list[str]:
    return [str(name) for name in api.list_repo_files(repo_id, revision=revision)]


def _is_ours(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in PATTERNS)


def _refuse_code(folder: Path) -> None:
    """``auto_map`` in a configuration names code, perhaps elsewhere, that transformers would offer to run."""
    for path in folder.rglob("*config.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path}: is not valid JSON ({error}); fetch it again") from error
        if isinstance(content, dict) and "auto_map" in content:
            raise ModelError(f"{path}: names code of its own (auto_map), which d2llm never runs; use another student")


@contextmanager
def _told(repo_id: str, revision: str | None) -> Generator[None]:
    """What goes wrong while reading from the Hub, as an error that says what to do."""
    from huggingface_hub import errors as hub
    from huggingface_hub import is_offline_mode

    name = f"'{repo_id}'" + ("" if revision is None else f" at revision '{revision}'")
    nowhere = f"no student {name}: there is no such folder here, no student of that name comes with d2llm, and"
    try:
        yield
    except hub.HFValidationError as error:
        raise InputError(f"'{repo_id}' cannot be a repository's name on the Hub ({error}); give owner/name") from error
    except hub.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{nowhere} the one on the Hub is gated; ask for access on its page, then log in (hf auth login)"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{nowhere} the one on the Hub has no such revision; check it") from error
    except hub.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{nowhere} the Hub has none that you may read; check the name, or log in if it is private (hf auth login)"
        ) from error
    except (hub.HTTPError, hub.RevisionResolutionError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        problem = (
            "HF_HUB_OFFLINE is set, so the Hub was not asked, and there is no copy from before; unset it, or fetch the "
            "student where there is a network"
            if is_offline_mode()
            else f"the Hub cannot be read ({_first_line(error)}); check the network and try again: what was fetched "
            "is kept"
        )
        raise ModelNotFoundError(f"{nowhere} {problem}") from error


@contextmanager
def _writable(repo_id: str) -> Generator[None]:
    """What goes wrong while writing to the Hub, as an error that says what to do."""
    from huggingface_hub import errors as hub
    from huggingface_hub import is_offline_mode

    try:
        yield
    except (hub.HTTPError, ValueError, RuntimeError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        advice = (
            "HF_HUB_OFFLINE is set; unset it"
            if is_offline_mode()
            else "log in with an account that may write there (hf auth login, or HF_TOKEN), and check the network"
        )
        raise InputError(f"'{repo_id}' on the Hub cannot be written ({_first_line(error)}); {advice}") from error


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
