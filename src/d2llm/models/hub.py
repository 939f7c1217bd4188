"""Students on the Hugging Face Hub: find them by name, download and check them, and push them.

Weights are safetensors and the rest is JSON and text: no code is ever downloaded or pushed.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from d2llm.core.errors import InputError, ModelError, ModelNotFoundError
from d2llm.core.inputs import path_of
from d2llm.core.json_values import read_model_json
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.names import did_you_mean
from d2llm.core.shipped import PACKAGES, shipped_models
from d2llm.models.downloads import check_snapshot, find_saved
from d2llm.models.sources import HUB_ID, first_sentence
from d2llm.models.student_files import (
    BACKBONE_FOLDER,
    CARD_FILE,
    MODULES_FILE,
    check_content,
    read_student_manifest,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.md", "LICENSE*")
"""Files of a student. Pickled weights and code are not among them."""


@dataclass(frozen=True, slots=True)
class PushReport:
    """Where a student was pushed: repository, commit and its page, number of files and their total size in bytes.

    ``needs_d2llm`` says why plain sentence-transformers cannot load it; None if it can.
    """

    repo_id: str
    commit: str
    url: str
    num_files: int
    num_bytes: int
    needs_d2llm: str | None


def is_on_hub(name: str) -> bool:
    """Whether a name that no saved student has is looked for on the Hub."""
    repo_id = name.partition("@")[0]
    is_path = Path(name).exists() or Path(repo_id.partition("/")[0]).is_dir()
    return HUB_ID.fullmatch(repo_id) is not None and not is_path


def find_student(folder_or_name: str | Path) -> Path:
    """The folder of a student: one that ``save`` wrote, one shipped with d2llm, or a local copy of one on the Hub.

    A name on the Hub is ``owner/name`` or, for a branch, tag or commit, ``owner/name@revision``. The Hub is contacted
    only if there is no folder of that name, nor a folder ``owner``.

    Raises:
        ModelNotFoundError: there is no such student.
        ModelError: the student on the Hub is damaged, or refers to code or to an address.
    """
    folder, name = path_of(folder_or_name, "folder_or_name"), str(folder_or_name)
    if (saved := find_saved(name, "students")) is not None:
        return saved
    if is_on_hub(name):
        repo_id, _, revision = name.partition("@")
        return fetch_student(repo_id, revision=revision or None)
    if (folder / MODULES_FILE).is_file():
        raise ModelNotFoundError(
            f"'{name}' is a model of sentence-transformers; make a student of it with `d2llm export {name} "
            "--to student --out FOLDER`, or give it to Index.create in Python"
        )
    raise ModelNotFoundError(
        f"no student at '{name}': give a folder that `d2llm distill` wrote, or a name on the Hub (owner/name)"
        f", or one of the shipped students: {', '.join(known := PACKAGES['students'] | shipped_models('students'))}"
        + did_you_mean(name, known)
    )


def fetch_student(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a student from the Hub into the Hub's local cache and return its folder; cached files are reused.

    Args:
        repo_id: ``owner/name``.
        revision: a branch, tag or commit; by default the branch ``main``.
        token: token of an account with read access; by default that of the environment (``HF_TOKEN``) or the login.

    Raises:
        ModelNotFoundError: there is no readable student, or the Hub cannot be reached (or ``HF_HUB_OFFLINE`` is set)
            and there is no cached copy.
        ModelError: the student is damaged, or its backbone refers to code of its own or to an address.
        DataFormatError: the repository is not a student.
    """
    from huggingface_hub import snapshot_download

    with _read_errors(repo_id, revision):
        # First only the manifest: a repository that is not a student may have many gigabytes.
        folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=[MANIFEST]))
        if not (folder / MANIFEST).is_file():
            raise ModelNotFoundError(
                f"'{repo_id}' on the Hub is not a d2llm student: it has no {MANIFEST}; check the name, or, if it is a "
                "sentence-transformers model, use it as a backbone or baseline instead"
            )
        # The cache names the folder after the commit, so both downloads are of the same version.
        folder = Path(snapshot_download(repo_id, revision=folder.name, token=token, allow_patterns=[*PATTERNS]))
    check_snapshot(folder)
    _refuse_code(folder)
    if (address := read_student_manifest(folder)[1].backbone.address) is not None:
        raise ModelError(
            f"the student '{repo_id}' would send your texts, and the key in an environment variable of its choice, to "
            f"{address}; download it yourself, check config.backbone in its {MANIFEST}, and give its folder"
        )
    check_content(folder)
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
    """Push a student's folder to the Hub in one commit, which also removes the files of an earlier student there.

    Args:
        folder: a folder that ``Student.save`` wrote.
        repo_id: ``owner/name``; created if it does not exist.
        private: whether a new repository is private; by default the account's setting.
        revision: the branch to commit to, created from ``main`` if it does not exist.
        licence: licence of the weights, as a Hub identifier ("apache-2.0"); by default that of the card.
        token: token of an account with write access; by default that of the environment (``HF_TOKEN``) or the login.
        message: commit message.

    Raises:
        InputError: the folder holds files that do not belong to a student, its backbone is a local folder or an API,
            or the repository cannot be written.
        ModelError: the folder's weights do not match its manifest.
    """
    from huggingface_hub import CommitOperationDelete, HfApi

    from d2llm import __version__
    from d2llm.models.model_card import why_not_loadable  # imports torch

    if not HUB_ID.fullmatch(repo_id):
        raise InputError(f"'{repo_id}' is not a valid repository name on the Hub; give owner/name")
    additions = _additions(folder, licence)
    api = HfApi(token=token, library_name="d2llm", library_version=__version__)
    with _write_errors(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        kept = {addition.path_in_repo for addition in additions}
        present = api.list_repo_files(repo_id, revision=revision)
        stale = [name for name in present if _is_ours(name) and name not in kept]
        commit = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
            commit_message=message or "Upload a d2llm student",
            revision=revision,
        )
    num_bytes = sum(addition.upload_info.size for addition in additions)
    needs_d2llm = why_not_loadable(folder, read_student_manifest(folder)[0])
    return PushReport(repo_id, str(commit.oid), str(commit.commit_url), len(additions), num_bytes, needs_d2llm)


def _additions(folder: Path, licence: str | None) -> list[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    from d2llm.models.model_card import model_card

    manifest, config = read_student_manifest(folder)
    if config.backbone.address is not None:
        raise InputError(
            f"{folder}: its backbone is an API, and nobody should load a student that sends texts to an address "
            "unseen, so the Hub is no place for it; pass its folder on instead"
        )
    check_content(folder)
    merged = (folder / BACKBONE_FOLDER).is_dir()
    if not merged and Path(config.backbone.model).expanduser().exists():
        remedy = "save the student with merge=True, and push that copy"
        if config.backbone.why_not_merged:  # these cannot be merged
            remedy = "push the backbone to the Hub first, and train the student on it by its name there"
        raise InputError(
            f"{folder}: its backbone is {config.backbone.model} on this machine, which others do not have; {remedy}"
        )
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    if others := [name for name in names.values() if not _is_ours(name)]:
        raise InputError(
            f"{folder}: holds files that do not belong to a student ({', '.join(others[:5])}); only safetensors, JSON "
            "and text files are pushed to the Hub, so move the others elsewhere"
        )
    written = {
        MANIFEST: json.dumps(manifest, indent=2, ensure_ascii=False) + "\n",
        CARD_FILE: model_card(folder, manifest, licence=licence),
    }
    return [
        *(CommitOperationAdd(name, text.encode()) for name, text in written.items()),
        *(CommitOperationAdd(name, path) for path, name in names.items() if name not in written),
    ]


def _is_ours(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in PATTERNS)


def _refuse_code(folder: Path) -> None:
    """Refuse ``auto_map`` in a configuration: it names code, perhaps elsewhere, that transformers offers to run."""
    for path in folder.rglob("*config.json"):
        if "auto_map" in read_model_json(path):
            raise ModelError(f"{path}: refers to custom code (auto_map), which d2llm never runs; use another student")


@contextmanager
def _read_errors(repo_id: str, revision: str | None) -> Generator[None]:
    """Turn errors while reading from the Hub into errors that say what to do."""
    from huggingface_hub import errors as hub
    from huggingface_hub import is_offline_mode

    name = f"'{repo_id}'" + ("" if revision is None else f" at revision '{revision}'")
    nowhere = f"no student {name}: there is no such folder here, d2llm ships no student of that name, and"
    try:
        yield
    except hub.HFValidationError as error:
        raise InputError(f"'{repo_id}' is not a valid repository name on the Hub ({error}); give owner/name") from error
    except hub.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{nowhere} the one on the Hub is gated; request access on its page, then log in (hf auth login)"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{nowhere} the one on the Hub has no such revision; check it") from error
    except hub.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{nowhere} the Hub has none that you may read; check the name, or log in if it is private (hf auth login)"
        ) from error
    except (hub.HTTPError, hub.RevisionResolutionError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        problem = (
            "HF_HUB_OFFLINE is set, so the Hub was not contacted, and there is no cached copy; unset it, or download "
            "the student where there is a network"
            if is_offline_mode()
            else f"the Hub cannot be reached ({first_sentence(error)}); check the network and try again: finished "
            "downloads are kept"
        )
        raise ModelNotFoundError(f"{nowhere} {problem}") from error


@contextmanager
def _write_errors(repo_id: str) -> Generator[None]:
    """Turn errors while writing to the Hub into errors that say what to do."""
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
        raise InputError(f"'{repo_id}' on the Hub cannot be written ({first_sentence(error)}); {advice}") from error
