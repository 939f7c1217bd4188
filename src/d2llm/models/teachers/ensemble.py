"""Several teachers combined: each scores a pair, and their scores are combined into one calibrated log-odds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from d2llm.core.errors import DataFormatError, InputError, MismatchError
from d2llm.core.files import new_folder
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.manifest import FILE_NAME, read_manifest, write_manifest
from d2llm.core.progress import Advance
from d2llm.core.types import TASKS, Task
from d2llm.models.teachers.identity import find_kind
from d2llm.models.teachers.pair_teacher import (
    InterruptibleTeacher,
    PairTeacher,
    PartialScores,
    TeacherScores,
    TextPair,
    identify_teacher,
    load_teacher,
    ranks_lists,
    score_until_error,
    shared_steps,
    whole_queries,
)
from d2llm.ops.ensemble import Ensemble
from d2llm.ops.pair_measures import mean_ranks
from d2llm.recipe import FusedTeacherConfig, TeacherConfig, TeacherIdentity

ENSEMBLE_KIND = "ensemble"
ENSEMBLE_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class EnsembleMember:
    """A teacher of an ensemble: its configuration, and its fingerprint when the ensemble was fitted."""

    config: TeacherConfig
    fingerprint: str


class EnsembleTeacher(InterruptibleTeacher):
    """A teacher made of several; for each task, log-odds = bias + sum of weights times standardised scores."""

    def __init__(
        self, members: Sequence[PairTeacher], ensembles: Mapping[Task, Ensemble], *, name: str = "the ensemble"
    ) -> None:
        """Combine ``members``, in the order of the weights in ``ensembles``; ``name`` is for errors."""
        self.members = tuple(members)
        self.ensembles = dict(ensembles)
        self.ranks_lists = any(map(ranks_lists, self.members))
        self._name = name
        self._fingerprint = _fingerprint([member.fingerprint for member in members], ensembles)

    @classmethod
    def load(cls, config: TeacherConfig, *, device: str | None = None, dtype: str | None = None) -> EnsembleTeacher:
        """Load the members of the ensemble in the folder ``config.model``.

        Raises:
            DataFormatError: there is no ensemble.
            ModelNotFoundError: a member is no longer where it was.
            MismatchError: a member is not the one that the ensemble was fitted with.
        """
        folder = Path(config.model)
        members, ensembles = _read(folder)
        teachers = [load_teacher(member.config, device=device, dtype=dtype) for member in members]
        for member, teacher in zip(members, teachers, strict=True):
            _require_same(folder, member, teacher.fingerprint)
        return cls(teachers, ensembles, name=str(folder))

    @staticmethod
    def identify(config: TeacherConfig) -> TeacherIdentity:
        """The identity of ``load(config)``, computed without loading a model. Raises the same errors as ``load``."""
        folder = Path(config.model)
        members, ensembles = _read(folder)
        identities = [identify_teacher(member.config) for member in members]
        for member, identity in zip(members, identities, strict=True):
            _require_same(folder, member, identity.fingerprint)
        prompts: dict[Task, str] = {
            task: fingerprint_json([identity.prompts[task] for identity in identities]) for task in ensembles
        }
        return TeacherIdentity(_fingerprint([member.fingerprint for member in members], ensembles), prompts)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def prompt_fingerprint(self, task: Task) -> str:
        """Identity of the questions to all members of an ensemble fitted for ``task`` (else ``InputError``)."""
        self._ensemble(task)
        return fingerprint_json([member.prompt_fingerprint(task) for member in self.members])

    def score_until_error(
        self, pairs: Sequence[TextPair], task: Task, *, with_features: bool = False, advance: Advance | None = None
    ) -> PartialScores:
        """Score pairs by every member with a weight for ``task``, until the first error (``InterruptibleTeacher``).

        The members after the one with the error score only what it has scored before. The features are those of the
        first member that has any. Counts are summed over the members: a pair that two of them cut counts twice.

        Raises:
            InputError: the ensemble was not fitted for ``task``.
        """
        counting = self._counting(task)
        step = shared_steps(advance, len(counting))
        is_scored = np.ones(len(pairs), np.bool_)
        scores = np.zeros((len(pairs), len(counting)), np.float32)
        by_member: list[TeacherScores] = []
        features: NDArray[np.float32] | None = None
        first_error: BaseException | None = None
        for column, member_index in enumerate(counting):
            positions = np.flatnonzero(is_scored)
            if not len(positions):
                break
            partly = score_until_error(
                self.members[member_index],
                [pairs[index] for index in positions.tolist()],
                task,
                with_features=with_features and features is None,
                advance=step,
            )
            by_member.append(partly.scores)
            scores[positions, column] = partly.scores.log_odds
            if partly.scores.features is not None and features is None:
                features = np.zeros((len(pairs), partly.scores.features.shape[1]), np.float32)
                features[positions] = partly.scores.features
            if partly.error is not None:
                first_error = first_error or partly.error
                is_scored[positions] = partly.is_scored
                is_scored = whole_queries(pairs, is_scored) if self.ranks_lists else is_scored
        joined = TeacherScores(
            self._joined(pairs, scores, task).astype(np.float32),
            features,
            # Members mostly truncate the same pairs.
            max(one.num_truncated for one in by_member),
            sum(one.num_tokens for one in by_member),
            sum(one.num_bounded for one in by_member),
            sum(one.num_undecided for one in by_member),
            num_written_tokens=sum(one.num_written_tokens for one in by_member),
            cost=sum(one.cost for one in by_member),
        )
        return PartialScores(joined, is_scored, first_error)

    def _counting(self, task: Task) -> list[int]:
        """The members that score, by their places."""
        return [index for index, weight in enumerate(self._ensemble(task).weights) if weight > 0]

    def _joined(self, pairs: Sequence[TextPair], scores: NDArray[np.float32], task: Task) -> NDArray[np.floating[Any]]:
        """The log-odds [n] of pairs from the scores [n, members] of those that score."""
        return self._ensemble(task).only(self._counting(task)).log_odds(scores)

    def _ensemble(self, task: Task) -> Ensemble:
        if task not in self.ensembles:
            raise InputError(
                f"{self._name}: was fitted for {', '.join(sorted(self.ensembles))} and has no weights for {task}; "
                "combine the teachers on a data set of that task too"
            )
        return self.ensembles[task]


def write_ensemble(
    folder: Path, members: Sequence[EnsembleMember], ensembles: Mapping[Task, Ensemble], content: Mapping[str, Any]
) -> str:
    """Write an ensemble that ``EnsembleTeacher.load`` reads, atomically; returns its fingerprint.

    Members with weight 0 in all tasks are left out. A member inside the parent folder of ``folder`` is recorded by its
    relative path, so that both can be moved together. ``members`` are in the order of the weights; ``content`` are
    additional fields for the manifest (data, figures). An existing ensemble is replaced.

    Raises:
        InputError: no member has any weight, or ``folder`` holds something else.
    """
    counting = [
        index for index in range(len(members)) if any(ensemble.weights[index] > 0 for ensemble in ensembles.values())
    ]
    if not all(any(ensemble.weights) for ensemble in ensembles.values()):
        raise InputError(
            "no member's score increases with relevance on the dev lists, so there is nothing to combine; "
            "check the members and the data sets' tasks"
        )
    kept = [members[index] for index in counting]
    narrowed: dict[Task, Ensemble] = {task: ensemble.only(counting) for task, ensemble in ensembles.items()}
    fingerprint = _fingerprint([member.fingerprint for member in kept], narrowed)
    with new_folder(folder, kind=ENSEMBLE_KIND) as temporary:
        identity = {
            "fingerprint": fingerprint,
            "members": [_member_entry(folder.resolve(), member) for member in kept],
            "tasks": {task: asdict(ensemble) for task, ensemble in narrowed.items()},
        }
        write_manifest(temporary, ENSEMBLE_KIND, ENSEMBLE_FORMAT_VERSION, {**content, **identity})
    return fingerprint


def ensemble_queries(config: TeacherConfig) -> dict[str, frozenset[str]]:
    """The dev queries, by data set, that an ensemble's weights were fitted on; empty if the teacher is not an ensemble.

    Raises:
        DataFormatError: the ensemble cannot be read.
    """
    if not (Path(config.model) / FILE_NAME).is_file() or find_kind(config) != ENSEMBLE_KIND:
        return {}  # an ensemble is always a local folder, so the Hub need not be contacted
    fitted_on = read_manifest(Path(config.model), ENSEMBLE_KIND, ENSEMBLE_FORMAT_VERSION).get("fitted_on", {})
    return {name: frozenset(fitted["dev_queries"]) for name, fitted in fitted_on.items()}


def ensemble_members(config: TeacherConfig) -> list[TeacherConfig]:
    """The members of the ensemble in the folder ``config.model``."""
    return [member.config for member in _read(Path(config.model))[0]]


def _member_entry(folder: Path, member: EnsembleMember) -> dict[str, Any]:
    config, path = member.config, Path(member.config.model)
    relative = None
    if path.is_dir():
        path = path.resolve()
        config = config.model_copy(update={"model": str(path)})
        if path.is_relative_to(folder.parent):
            relative = Path(os.path.relpath(path, folder)).as_posix()
    changed = config.model_dump(mode="json", exclude_unset=True) | {"model": config.model}
    return {"config": changed, "relative": relative, "fingerprint": member.fingerprint}


def _read(folder: Path) -> tuple[tuple[EnsembleMember, ...], dict[Task, Ensemble]]:
    manifest = read_manifest(folder, ENSEMBLE_KIND, ENSEMBLE_FORMAT_VERSION)
    try:
        members = tuple(_read_member(folder, entry) for entry in manifest["members"])
        ensembles = TypeAdapter(dict[Task, Ensemble]).validate_python(manifest["tasks"])
    except (ValidationError, LookupError, TypeError) as error:
        raise DataFormatError(
            folder / FILE_NAME, f"cannot be read as an ensemble ({error}); combine the teachers again"
        ) from error
    if any(len(ensemble.weights) != len(members) for ensemble in ensembles.values()):
        raise DataFormatError(folder / FILE_NAME, "has more or fewer members than weights; combine the teachers again")
    return members, ensembles


def _read_member(folder: Path, entry: Mapping[str, Any]) -> EnsembleMember:
    values = dict(entry["config"])
    if entry["relative"] is not None:
        values["model"] = str((folder / entry["relative"]).resolve())
    return EnsembleMember(TeacherConfig.model_validate(values), str(entry["fingerprint"]))


def _require_same(folder: Path, member: EnsembleMember, fingerprint: str) -> None:
    if fingerprint != member.fingerprint:
        raise MismatchError(
            f"{folder}: was fitted with '{member.config.model}' of fingerprint {member.fingerprint}, which is now "
            f"{fingerprint}; restore the member, or combine them again"
        )


def _fingerprint(members: Sequence[str], ensembles: Mapping[Task, Ensemble]) -> str:
    return fingerprint_json(["stack", list(members), {task: asdict(ensemble) for task, ensemble in ensembles.items()}])


class FusedTeacher(EnsembleTeacher):
    """log R of each pair, over the passages of its query in one call; passages that a teacher ties share a rank.

    R(q, p) is the sum over the teachers of 1 / r(q, p), r the rank from 1 among the passages of q. The softmax of log R
    gives each passage its part of the query's R. Source: Lee et al., "Gecko: Versatile Text Embeddings Distilled from
    Large Language Models", 2024 (arXiv 2403.20327), which fuses the rankings by query likelihood and by relevance.
    """

    def __init__(self, members: Sequence[PairTeacher]) -> None:
        """Fuse the rankings of ``members``."""
        super().__init__(members, {})
        self.ranks_lists = True

    @classmethod
    def load(cls, config: TeacherConfig, *, device: str | None = None, dtype: str | None = None) -> FusedTeacher:
        """Load all of ``config.teachers``."""
        return cls([load_teacher(one, device=device, dtype=dtype) for one in _teachers(config)])

    @staticmethod
    def identify(config: TeacherConfig) -> TeacherIdentity:
        identities = [identify_teacher(one) for one in _teachers(config)]
        prompts: dict[Task, str] = {task: fingerprint_json([one.prompts[task] for one in identities]) for task in TASKS}
        return TeacherIdentity(_fused_fingerprint([one.fingerprint for one in identities]), prompts)

    @property
    def fingerprint(self) -> str:
        return _fused_fingerprint([member.fingerprint for member in self.members])

    def prompt_fingerprint(self, task: Task) -> str:
        return fingerprint_json([member.prompt_fingerprint(task) for member in self.members])

    def _counting(self, task: Task) -> list[int]:
        return [*range(len(self.members))]

    def _joined(self, pairs: Sequence[TextPair], scores: NDArray[np.float32], task: Task) -> NDArray[np.float64]:
        by_query: dict[str, list[int]] = {}
        for index, (query, _) in enumerate(pairs):
            by_query.setdefault(query, []).append(index)
        fused = np.empty(len(pairs))
        for rows in by_query.values():
            fused[rows] = sum(1 / mean_ranks(-values.astype(np.float64)) for values in scores[rows].T)
        return np.log(fused)


def _teachers(config: TeacherConfig) -> Sequence[TeacherConfig]:
    assert isinstance(config, FusedTeacherConfig)
    return config.teachers


def _fused_fingerprint(members: Sequence[str]) -> str:
    return fingerprint_json(["reciprocal ranks", *members])
