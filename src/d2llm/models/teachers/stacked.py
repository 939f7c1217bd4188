"""Several teachers as one: each judges a pair, and their scores are combined into one calibrated log-odds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from d2llm.core.errors import DataFormatError, InputError, MismatchError
from d2llm.core.files import new_folder
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.manifest import FILE_NAME, read_manifest, write_manifest
from d2llm.core.recipe import TeacherConfig
from d2llm.core.types import Task
from d2llm.models.teachers.identity import TeacherIdentity, find_kind
from d2llm.models.teachers.judge import Judge, Judgements, TextPair, identify_judge, load_judge
from d2llm.ops.stacking import Stack

STACK_KIND = "stack"
STACK_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class StackMember:
    """A teacher of a stack: how it is loaded, and which it was when the stack was fitted."""

    config: TeacherConfig
    fingerprint: str


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What a stack's folder says."""

    members: tuple[StackMember, ...]
    stacks: Mapping[Task, Stack]


class StackedTeacher:
    """A judge made of others; for each task, log-odds = bias + sum of weight times standardised score."""

    def __init__(self, members: Sequence[Judge], stacks: Mapping[Task, Stack], *, name: str = "the stack") -> None:
        """Join ``members``, whose order is that of the weights in ``stacks``; ``name`` is for errors."""
        self.members = tuple(members)
        self.stacks = dict(stacks)
        self._name = name
        self._fingerprint = _fingerprint([member.fingerprint for member in members], stacks)

    @classmethod
    def load(cls, config: TeacherConfig, *, device: str | None = None, dtype: str | None = None) -> StackedTeacher:
        """Load the members of the stack in the folder ``config.model``.

        Raises:
            DataFormatError: no stack there.
            ModelNotFoundError: a member is not where it was.
            MismatchError: a member is another than the one that the stack was fitted with.
        """
        folder = Path(config.model)
        recorded = _read(folder)
        members = [load_judge(member.config, device=device, dtype=dtype) for member in recorded.members]
        for member, judge in zip(recorded.members, members, strict=True):
            _require_same(folder, member, judge.fingerprint)
        return cls(members, recorded.stacks, name=str(folder))

    @staticmethod
    def identify(config: TeacherConfig) -> TeacherIdentity:
        """The identity that ``load(config)`` has, found without loading a model. Raises what ``load`` raises."""
        folder = Path(config.model)
        recorded = _read(folder)
        identities = [identify_judge(member.config) for member in recorded.members]
        for member, identity in zip(recorded.members, identities, strict=True):
            _require_same(folder, member, identity.fingerprint)
        prompts: dict[Task, str] = {
            task: _join_prompts([identity.prompts[task] for identity in identities]) for task in recorded.stacks
        }
        return TeacherIdentity(_fingerprint([one.fingerprint for one in recorded.members], recorded.stacks), prompts)

    @property
    def fingerprint(self) -> str:
        """Of the members and their weights."""
        return self._fingerprint

    def prompt_fingerprint(self, task: Task) -> str:
        """The identity of the questions to all members.

        Raises:
            InputError: the stack was not fitted for ``task``.
        """
        self._stack(task)
        return _join_prompts([member.prompt_fingerprint(task) for member in self.members])

    def judge(
        self,
        pairs: Sequence[TextPair],
        task: Task,
        *,
        with_features: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Judgements:
        """Judge pairs by every member that counts for ``task``.

        The features are those of the first such member that has any. Counts are sums over the members: a pair that two
        of them cut counts twice.

        Raises:
            InputError: the stack was not fitted for ``task``.
        """
        stack = self._stack(task)
        counting = [place for place, weight in enumerate(stack.weights) if weight > 0]
        step = _shared_steps(advance, len(counting)) if advance is not None else None
        judgements: dict[int, Judgements] = {}
        features = None
        for place in counting:
            needs_features = with_features and features is None
            judgements[place] = self.members[place].judge(pairs, task, with_features=needs_features, advance=step)
            features = judgements[place].features if needs_features else features
        scores = np.stack([judgements[place].log_odds for place in counting], axis=1)
        return Judgements(
            stack.only(counting).log_odds(scores).astype(np.float32),
            features,
            sum(one.num_truncated for one in judgements.values()),
            sum(one.num_tokens for one in judgements.values()),
            sum(one.num_bounded for one in judgements.values()),
            sum(one.num_undecided for one in judgements.values()),
        )

    def _stack(self, task: Task) -> Stack:
        if task not in self.stacks:
            raise InputError(
                f"{self._name}: was fitted for {', '.join(sorted(self.stacks))} and does not know how much each "
                f"member counts for {task}; stack on a data set of that task too"
            )
        return self.stacks[task]


def write_stack(
    folder: Path, members: Sequence[StackMember], stacks: Mapping[Task, Stack], content: Mapping[str, Any]
) -> str:
    """Write a stack that ``StackedTeacher.load`` reads, atomically; returns its fingerprint.

    Members without weight in any task are left out. A member that lies beside ``folder`` or below that place is kept
    by its relative path, so that both can be moved together.

    Args:
        folder: where to write; a stack already there is replaced.
        members: in the order of the weights.
        stacks: by task.
        content: what the manifest should say besides (data, figures).

    Raises:
        InputError: no member has any weight, or ``folder`` holds something else.
    """
    counting = [place for place in range(len(members)) if any(stack.weights[place] > 0 for stack in stacks.values())]
    if not all(any(stack.weights) for stack in stacks.values()):
        raise InputError(
            "no member's score goes up with relevance on the dev lists, so there is nothing to stack; "
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
    """The dev queries by data set that fitted the teacher's weights; none where it is no stack.

    Raises:
        DataFormatError: the stack cannot be read.
    """
    if not (Path(config.model) / FILE_NAME).is_file() or find_kind(config) != STACK_KIND:
        return {}  # a stack is always a folder here: no need to ask the Hub what a name stands for
    fitted_on = read_manifest(Path(config.model), STACK_KIND, STACK_FORMAT_VERSION).get("fitted_on", {})
    return {name: frozenset(fitted["dev_queries"]) for name, fitted in fitted_on.items()}


def _member_entry(folder: Path, member: StackMember) -> dict[str, Any]:
    config, place = member.config, Path(member.config.model)
    relative = None
    if place.is_dir():
        place = place.resolve()
        config = config.model_copy(update={"model": str(place)})
        if place.is_relative_to(folder.parent):
            relative = Path(os.path.relpath(place, folder)).as_posix()
    changed = config.model_dump(mode="json", exclude_unset=True) | {"model": config.model, "kind": config.kind}
    return {"config": changed, "relative": relative, "fingerprint": member.fingerprint}


def _read(folder: Path) -> _Recorded:
    manifest = read_manifest(folder, STACK_KIND, STACK_FORMAT_VERSION)
    try:
        members = tuple(_read_member(folder, entry) for entry in manifest["members"])
        stacks = TypeAdapter(dict[Task, Stack]).validate_python(manifest["tasks"])
    except (ValidationError, LookupError, TypeError) as error:
        raise DataFormatError(
            folder / FILE_NAME, f"is no stack that can be read ({error}); stack the teachers again"
        ) from error
    if any(len(stack.weights) != len(members) for stack in stacks.values()):
        raise DataFormatError(folder / FILE_NAME, "names more or fewer members than weights; stack the teachers again")
    return _Recorded(members, stacks)


def _read_member(folder: Path, entry: Mapping[str, Any]) -> StackMember:
    values = dict(entry["config"])
    if entry["relative"] is not None:
        values["model"] = str((folder / entry["relative"]).resolve())
    return StackMember(TeacherConfig.model_validate(values), str(entry["fingerprint"]))


def _require_same(folder: Path, member: StackMember, fingerprint: str) -> None:
    if fingerprint != member.fingerprint:
        raise MismatchError(
            f"{folder}: was fitted with '{member.config.model}' of fingerprint {member.fingerprint}, but now that is "
            f"{fingerprint}; restore the member, or stack again"
        )


def _fingerprint(members: Sequence[str], stacks: Mapping[Task, Stack]) -> str:
    return fingerprint_json([STACK_KIND, list(members), {task: asdict(stack) for task, stack in stacks.items()}])


def _join_prompts(prompts: Sequence[str]) -> str:
    return fingerprint_json(list(prompts))


def _shared_steps(advance: Callable[[int], None], num_members: int) -> Callable[[int], None]:
    """Counts a pair as finished when, on average, every member is."""
    finished = 0

    def step(count: int) -> None:
        nonlocal finished
        before, finished = finished, finished + count
        advance(finished // num_members - before // num_members)

    return step
