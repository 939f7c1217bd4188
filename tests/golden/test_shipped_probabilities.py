"""The probabilities of the shipped students: near 0 for unrelated pairs of plain sentences, high for related ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from d2llm import Student
from d2llm.core.shipped import shipped_models
from e2e.small_corpus import QUESTIONS, SENTENCES

# Questions of tests/golden/test_shipped_student.py and the number of the sentence that answers each.
ANSWERED = QUESTIONS | {
    "How should a password look?": 33,
    "Where do swallows live in the cold season?": 27,
    "At what time can I catch the final train?": 5,
    "How many hearts has an octopus?": 26,
    "When are tulips planted?": 14,
    "Does medicine make a cold go away sooner?": 20,
    "How many goals decided the game?": 40,
    "When must I get my deposit back?": 45,
    "What do bees tell by dancing?": 25,
    "Why do stars twinkle?": 19,
}
SAME = {
    "Let the dough rest for roughly an hour, so the yeast can raise it.": 0,
    "In a kitchen a blunt knife is more dangerous than a sharp one, as it slips.": 1,
    "Pasta does not stick if it is boiled in a lot of salted water.": 2,
    "Tomatoes that are ripe become tasteless in the fridge.": 3,
    "From platform four the last train to the harbour departs at 11:20 pm.": 5,
    "Outside of the rush hours you can take a bicycle on regional trains.": 7,
    "Until the end of June there is no tram to the airport because of repairs.": 8,
    "Kids younger than six ride for free together with an adult.": 9,
    "Coffee grounds around the lettuce keep slugs away.": 11,
    "Prune roses at the end of winter, right above a bud that faces outwards.": 12,
    "Because it rotates once per orbit, the moon always turns the same face to us.": 15,
    "The rings of Saturn are mainly ice, in pieces from dust to house size.": 16,
    "Sunlight takes slightly over eight minutes to get to the earth.": 17,
    "Even without medicine a cold is mostly over in ten days.": 20,
    "People who sleep too little learn less easily and are moody.": 22,
}
STUDENTS = shipped_models("students")


@pytest.fixture(scope="module", params=list(STUDENTS))
def student(request):
    return Student.load(STUDENTS[request.param], device="cpu", dtype="float32")


def probabilities(student, pairs, task):
    """The calibrated probabilities of (query, passage) pairs."""
    queries = student.encode_queries([query for query, _ in pairs]).vectors
    passages = student.encode_passages([passage for _, passage in pairs]).vectors
    scores = [student.score(query, passage[None], task)[0] for query, passage in zip(queries, passages, strict=True)]
    return student.calibration.probabilities(scores, task)


def full_probabilities(student, pairs, task):
    """Those of the scores with score features, if the student has any for the task."""
    scores = student.predict(pairs, task=task)
    queries = [query for query, _ in pairs] if student.feature_weights(task) else None
    return student.calibration.probabilities(scores, task, queries=queries)


def test_both_tasks_are_calibrated(student):
    calibration = student.calibration
    assert set(calibration.tasks) == {"asymmetric", "symmetric"}
    assert set(calibration.with_features) == {task for task in calibration.tasks if student.feature_weights(task)}
    assert calibration.base_rate == pytest.approx(0.1)
    for fitted in (*calibration.tasks.values(), *calibration.with_features.values()):
        assert fitted.error_after < 0.03 < fitted.error_before


# Sentence n is about subject n // 5, so the sentence 25 further on is about another.
UNRELATED = {
    "asymmetric": [(query, SENTENCES[(n + 25) % 60]) for query, n in ANSWERED.items()]
    + [(query, SENTENCES[(n + 35) % 60]) for query, n in ANSWERED.items()],
    "symmetric": [(SENTENCES[n], SENTENCES[(n + 25) % 60]) for n in range(60)],
}
RELATED = {
    "asymmetric": [(query, SENTENCES[n]) for query, n in ANSWERED.items()],
    "symmetric": [(text, SENTENCES[n]) for text, n in SAME.items()],
}


@pytest.mark.parametrize("of_pairs", [probabilities, full_probabilities])
@pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
def test_unrelated_pairs_are_improbable_and_related_ones_probable(student, task, of_pairs):
    assert len(UNRELATED[task]) >= 30
    unrelated, related = (of_pairs(student, pairs[task], task) for pairs in (UNRELATED, RELATED))
    assert np.median(unrelated) < 0.05
    assert np.median(related) > (0.5 if of_pairs is probabilities else 0.3)  # questions and answers share few words
    # Not just the medians: most related pairs are above nearly all unrelated ones.
    assert np.quantile(related, 0.25) > np.quantile(unrelated, 0.95)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_manifest_names_no_teacher_that_took_no_part(name: str) -> None:
    manifest = json.loads((STUDENTS[name] / "manifest.json").read_text(encoding="utf-8"))
    named = {"teacher", "teacher_tuning"} & {*manifest["recipe"]}
    assert named == (set() if manifest["teacher"] == "none" else {"teacher", "teacher_tuning"})
