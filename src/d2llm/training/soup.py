"""Averages the weights of students that differ in their training alone, into one student of the same size.

Source: Wortsman et al., "Model Soups: Averaging Weights of Multiple Fine-Tuned Models Improves Accuracy without
Increasing Inference Time", ICML 2022 (arXiv 2203.05482): the uniform soup, and the greedy one (recipe 1).
KaLM-Embedding-V2 (Zhao et al. 2025, arXiv 2506.20923) averages its checkpoints so. Weights between a start and what was
trained from it (``training.interpolation``) are the soup of the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2llm.core.errors import InputError
from d2llm.core.inputs import objects_of
from d2llm.data.plan import TrainingSource
from d2llm.models.backbone import load_weights
from d2llm.models.interaction import Interaction
from d2llm.models.lora import merged_state_dict
from d2llm.models.student import Student
from d2llm.recipe import shaping_student_settings
from d2llm.recipe.recipe import changed_settings
from d2llm.training.choose_weights import choose_interaction_weights, mean_value
from d2llm.training.dev_sets import DevResult, evaluate_dev, make_dev_set


@dataclass(frozen=True, slots=True)
class GreedySoup:
    """A greedy soup, and what was measured.

    Attributes:
        student: the soup.
        kept: the numbers of the students in it, the best first.
        values: the mean dev measure of each student alone.
        value: that of the soup.
    """

    student: Student
    kept: tuple[int, ...]
    values: tuple[float, ...]
    value: float


def soup(students: Sequence[Student], weights: Sequence[float] | None = None) -> Student:
    """The student whose weights are the average of those of ``students``.

    It is saved with all weights of its backbone. What was fitted to the scores of single students is left out: fit it
    again (``d2llm fit-scores``).

    Args:
        students: two or more of one shape, as they were loaded.
        weights: how much each counts, by default all the same; their sum does not matter.

    Raises:
        InputError: the students differ in more than their weights, there are fewer than two, or ``weights`` are not one
            positive number for each.
    """
    students = _checked(students)
    weights = [1.0] * len(students) if weights is None else [*weights]
    if len(weights) != len(students) or not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise InputError(f"weights is {weights}, but must be a positive number for each of {len(students)} students")
    return _average_of(students, [weight / sum(weights) for weight in weights])


def greedy_soup(
    students: Sequence[Student],
    sources: Sequence[TrainingSource],
    *,
    num_queries: int = 200,
    num_passages: int = 2_000,
    seed: int = 0,
) -> GreedySoup:
    """The average of those students that make the average better on dev.

    The best student begins; each other, from the second best down, stays if the mean measure does not fall. The weight
    r of the interaction is chosen by dev too, as at the end of a training.

    Args:
        students: as for ``soup``.
        sources: data sets with a dev split; the measure of each is that of ``make_dev_set``.
        num_queries: dev queries of each data set, at most; ten times as many labelled pairs.
        num_passages: passages of each data set to rank.
        seed: seed of the samples.

    Raises:
        InputError: as for ``soup``, or a data set has no judged dev queries.
    """
    students = _checked(students)
    sources = objects_of(sources, "sources", TrainingSource)
    dev_sets = [
        make_dev_set(source, num_queries=num_queries, num_passages=num_passages, seed=seed) for source in sources
    ]
    results = [evaluate_dev(student, dev_sets) for student in students]
    values = [mean_value(result) for result in results]
    order = sorted(range(len(students)), key=lambda index: -values[index])
    kept, value, result = order[:1], values[order[0]], results[order[0]]
    best = _average_of([students[order[0]]], [1.0])
    for index in order[1:]:
        tried = [*kept, index]
        larger = _average_of([students[chosen] for chosen in tried], [1 / len(tried)] * len(tried))
        results_of_larger = evaluate_dev(larger, dev_sets)
        if (measured := mean_value(results_of_larger)) >= value:
            best, kept, value, result = larger, tried, measured, results_of_larger
    _set_interaction_weights(best, result)
    return GreedySoup(best, tuple(kept), tuple(values), value)


def _set_interaction_weights(student: Student, results: Mapping[str, DevResult]) -> None:
    if isinstance(student.interaction, Interaction) and student.has_dot:
        for task, weight in choose_interaction_weights(results).items():
            if student.interaction.has_interaction(task):
                student.interaction.interaction_weight(task).fill_(weight)


def _checked(students: Sequence[Student]) -> list[Student]:
    """Students that differ in their weights alone; adapters of any rank fit one another."""
    students = objects_of(students, "students", Student)
    if len(students) < 2:
        raise InputError(f"an average needs two students or more; {len(students)} given")
    shapes = [shaping_student_settings(student.config.model_dump(mode="json")) for student in students]
    for shape in shapes:
        shape["backbone"] = {name: value for name, value in shape["backbone"].items() if name != "tuning"}
        if changes := changed_settings(shapes[0], shape):
            raise InputError(
                f"these students are not of one shape: {', '.join(changes)}; a soup takes students of one recipe that "
                "were trained with other seeds, learning rates or data"
            )
    return students


def _average_of(students: Sequence[Student], fractions: Sequence[float]) -> Student:
    first = students[0]
    change = {"soup": [[student.fingerprint, fraction] for student, fraction in zip(students, fractions, strict=True)]}
    kept = {name: list(getattr(first, name)) for name in ("nested_dims", "nested_depths") if getattr(first, name)}
    averaged = first.changed_copy(change, kept | {"tasks": first.trained_tasks} | change, merged=True)
    backbones = (merged_state_dict(student.backbone.model) for student in students)
    load_weights(averaged.backbone.model, _average(backbones, fractions), name=first.config.backbone.model)
    for module in ("pooling", "interaction"):
        states = (getattr(student, module).state_dict() for student in students)
        getattr(averaged, module).load_state_dict(_average(states, fractions))
    return averaged


def _average(states: Iterable[Mapping[str, Tensor]], fractions: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of tensors by name; of those that hold no fractions, such as positions, the first."""
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for state, fraction in zip(states, fractions, strict=True):
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                total.setdefault(name, tensor)
                continue
            dtypes[name] = tensor.dtype
            part = fraction * tensor.detach().double()
            total[name] = part if name not in total else total[name] + part
    return {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in total.items()}
