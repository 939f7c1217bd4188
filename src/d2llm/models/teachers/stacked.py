"""Several teachers combined: each judges a pair, and their scores are combined into one calibrated log-odds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
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
from d2llm.core.types import Task
from d2llm.models.teachers.identity import find_kind
from d2llm.models.teachers.judge import (
    Judge,
    Judgements,
    LastingJudge,
    PartlyJudged,
    TextPair,
    identify_judge,
    judge_until_error,
    load_judge,
    ranks_lists,
    shared_steps,
    whole_queries,
)
from d2llm.ops.stacking import Stack
from d2llm.recipe import TeacherConfig, TeacherIdentity

STACK_KIND = "stack"
STACK_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class StackMember:
    """A teacher of a stack: its configuration, and its fingerprint when the stack was fitted."""

    config: TeacherConfig
    fingerprint: str


class StackedTeacher(LastingJudge):
    """A judge made of several; for each task, log-odds = bias + sum of weights times standardised scores."""

    def __init__(self, members: Sequence[Judge], stacks: Mapping[Task, Stack], *, name: str = "the stack") -> None:
        """Combine ``members``, in the order of the weights in ``stacks``; ``name`` is for errors."""
        self.members = tuple(members)
        self.stacks = dict(stacks)
        self.ranks_lists = any(map(ranks_lists, self.members))
        self._name = name
        self._fingerprint = _fingerprint([member.fingerprint for member in members], stacks)

    @classmethod
    def load(cls, config: TeacherConfig, *, device: str | None = None, dtype: str | None = None) -> StackedTeacher:
        """Load the members of the stack in the folder ``config.model``.

        Raises:
            DataFormatError: there is no stack.
            ModelNotFoundError: a member is no longer where it was.
            MismatchError: a member is not the one that the stack was fitted with.
        """
        folder = Path(config.model)
        members, stacks = _read(folder)
        judges = [load_judge(member.config, device=device, dtype=dtype) for member in members]
        for member, judge in zip(members, judges, strict=True):
            _require_same(folder, member, judge.fingerprint)
        return cls(judges, stacks, name=str(folder))

    @staticmethod
    def identify(config: TeacherConfig) -> TeacherIdentity:
        """The identity of ``load(config)``, computed without loading a model. Raises the same errors as ``load``."""
        folder = Path(config.model)
        members, stacks = _read(folder)
        identities = [identify_judge(member.config) for member in members]
        for member, identity in zip(members, identities, strict=True):
            _require_same(folder, member, identity.fingerprint)
        prompts: dict[Task, str] = {
            task: fingerprint_json([identity.prompts[task] for identity in identities]) for task in stacks
        }
        return TeacherIdentity(_fingerprint([member.fingerprint for member in members], stacks), prompts)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the members and their weights."""
        return self._fingerprint

    def prompt_fingerprint(self, task: Task) -> str:
        """Identity of the questions to all members of a stack that was fitted for ``task`` (else ``InputError``)."""
        self._stack(task)
        return fingerprint_json([member.prompt_fingerprint(task) for member in self.members])

    def judge_until_error(
        self,
        pairs: Sequence[TextPair],
        task: Task,
        *,
        with_features: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> PartlyJudged:
        """Judge pairs by every member with a weight for ``task``, until the first error (``LastingJudge``).

        The members after the one with the error judge only what it has judged before. The features are those of the
        first member that has any. Counts are summed over the members: a pair that two of them cut counts twice.

        Raises:
            InputError: the stack was not fitted for ``task``.
        """
        stack = self._stack(task)
        counting = [place for place, weight in enumerate(stack.weights) if weight > 0]
        step = shared_steps(advance, len(counting))
        is_judged = np.ones(len(pairs), np.bool_)
        scores = np.zeros((len(pairs), len(counting)), np.float32)
        judgements: list[Judgements] = []
        features: NDArray[np.float32] | None = None
        first_error: BaseException | None = None
        for column, place in enumerate(counting):
            places = np.flatnonzero(is_judged)
            if not len(places):
                break
            partly = judge_until_error(
                self.members[place],
                [pairs[each] for each in places.tolist()],
                task,
                with_features=with_features and features is None,
                advance=step,
            )
            judgements.append(partly.judgements)
            scores[places, column] = partly.judgements.log_odds
            if partly.judgements.features is not None and features is None:
                features = np.zeros((len(pairs), partly.judgements.features.shape[1]), np.float32)
                features[places] = partly.judgements.features
            if partly.error is not None:
                first_error = first_error or partly.error
                is_judged[places] = partly.is_judged
                is_judged = whole_queries(pairs, is_judged) if self.ranks_lists else is_judged
        log_odds = stack.only(counting).log_odds(scores).astype(np.float32)
        joined = Judgements(
            log_odds,
            features,
            # Members mostly truncate the same pairs.
            max(judgement.num_truncated for judgement in judgements),
            sum(judgement.num_tokens for judgement in judgements),
            sum(judgement.num_bounded for judgement in judgements),
            sum(judgement.num_undecided for judgement in judgements),
            num_written_tokens=sum(judgement.num_written_tokens for judgement in judgements),
            cost=sum(judgement.cost for judgement in judgements),
        )
        return PartlyJudged(joined, is_judged, first_error)

    def _stack(self, task: Task) -> Stack:
        if task not in self.stacks:
            raise InputError(
                f"{self._name}: was fitted for {', '.join(sorted(self.stacks))} and has no weights for {task}; stack "
                "on a data set of that task too"
            )
        return self.stacks[task]


def write_stack(
    folder: Path, members: Sequence[StackMember], stacks: Mapping[Task, Stack], content: Mapping[str, Any]
) -> str:
    """Write a stack that ``StackedTeacher.load`` reads, atomically; returns its fingerprint.

    Members with weight 0 in all tasks are left out. A member inside the parent folder of ``folder`` is recorded by its
    relative path, so that both can be moved together. ``members`` are in the order of the weights; ``content`` are
    additional fields for the manifest (data, figures). An existing stack is replaced.

    Raises:
        InputError: no member has any weight, or ``folder`` holds something else.
    """
    counting = [place for place in range(len(members)) if any(stack.weights[place] > 0 for stack in stacks.values())]
    if not all(any(stack.weights) for stack in stacks.values()):
        raise InputError(
            "no member's score increases with relevance on the dev lists, so there is nothing to stack; "
            "check the members and the data sets' tasks"
        )
    kept = [members[place] for place in counting]
    narrowed: dict[Task, Stack] = {task: stack.only(counting) for task, stack in stacks.items()}
    fingerprint = _fingerprint([member.fingerprint for member in kept], narrowed)
    with new_folder(folder, kind=STACK_KIND) as temporary:
        own = {
            "fingerprint": fingerprint,
            "members": [_member_entry(folder.resolve(), member) for member in kept],
            "tasks": {task: asdict(stack) for task, stack in narrowed.items()},
        }
        write_manifest(temporary, STACK_KIND, STACK_FORMAT_VERSION, {**content, **own})
    return fingerprint


def stacked_queries(config: TeacherConfig) -> dict[str, frozenset[str]]:
    """The dev queries, by data set, that a stack's weights were fitted on; empty if the teacher is not a stack.

    Raises:
        DataFormatError: the stack cannot be read.
    """
    if not (Path(config.model) / FILE_NAME).is_file() or find_kind(config) != STACK_KIND:
        return {}  # a stack is always a local folder, so the Hub need not be contacted
    fitted_on = read_manifest(Path(config.model), STACK_KIND, STACK_FORMAT_VERSION).get("fitted_on", {})
    return {name: frozenset(fitted["dev_queries"]) for name, fitted in fitted_on.items()}


def stacked_members(config: TeacherConfig) -> list[TeacherConfig]:
    """The members of the stack in the folder ``config.model``."""
    return [member.config for member in _read(Path(config.model))[0]]


def _member_entry(folder: Path, member: StackMember) -> dict[str, Any]:
    config, place = member.config, Path(member.config.model)
    relative = None
    if place.is_dir():
        place = place.resolve()
        config = config.model_copy(update={"model": str(place)})
        if place.is_relative_to(folder.parent):
            relative = Path(os.path.relpath(place, folder)).as_posix()
    changed = config.model_dump(mode="json", exclude_unset=True) | {"model": config.model}
    return {"config": changed, "relative": relative, "fingerprint": member.fingerprint}


def _read(folder: Path) -> tuple[tuple[StackMember, ...], dict[Task, Stack]]:
    manifest = read_manifest(folder, STACK_KIND, STACK_FORMAT_VERSION)
    try:
        members = tuple(_read_member(folder, entry) for entry in manifest["members"])
        stacks = TypeAdapter(dict[Task, Stack]).validate_python(manifest["tasks"])
    except (ValidationError, LookupError, TypeError) as error:
        raise DataFormatError(
            folder / FILE_NAME, f"cannot be read as a stack ({error}); stack the teachers again"
        ) from error
    if any(len(stack.weights) != len(members) for stack in stacks.values()):
        raise DataFormatError(folder / FILE_NAME, "has more or fewer members than weights; stack the teachers again")
    return members, stacks


def _read_member(folder: Path, entry: Mapping[str, Any]) -> StackMember:
    values = dict(entry["config"])
    if entry["relative"] is not None:
        values["model"] = str((folder / entry["relative"]).resolve())
    return StackMember(TeacherConfig.model_validate(values), str(entry["fingerprint"]))


def _require_same(folder: Path, member: StackMember, fingerprint: str) -> None:
    if fingerprint != member.fingerprint:
        raise MismatchError(
            f"{folder}: was fitted with '{member.config.model}' of fingerprint {member.fingerprint}, which is now "
            f"{fingerprint}; restore the member, or stack again"
        )


def _fingerprint(members: Sequence[str], stacks: Mapping[Task, Stack]) -> str:
    return fingerprint_json([STACK_KIND, list(members), {task: asdict(stack) for task, stack in stacks.items()}])
