"""Loads the systems of an evaluation by name or folder; a missing one becomes a missing row with a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from d2llm.core.errors import InputError, ModelNotFoundError
from d2llm.core.inputs import paths_of, strings_of
from d2llm.core.manifest import read_manifest
from d2llm.core.shipped import shipped_models
from d2llm.core.types import SystemKind
from d2llm.data.run_folder import RunFolder, companion, is_finished
from d2llm.data.trec import TrecRun, read_run
from d2llm.evaluation.contenders import NAME_D2LLM, OWN_NAMES, Contenders
from d2llm.models.external import ExternalBiEncoder, load_external
from d2llm.models.sources import is_student
from d2llm.models.student import Student, find_student
from d2llm.models.student_files import FORMAT_VERSION, KIND
from d2llm.models.teachers.judge import Judge, asks_endpoint, identify_judge, load_judge
from d2llm.recipe import TeacherConfig, untuned_config
from d2llm.retrieval.protocols import SearchStudent, TextEncoder
from d2llm.retrieval.text_workers import create_student, encoder_loads, load_student
from d2llm.runners.placement import Load

TUNED_COSINE, PAPER_HEAD = "cosine", "paper"
"""The variants (``recipe.variants``) that every report has a row for."""


def load_contenders(
    student: str | Path,
    *,
    tuned_cosine: str | Path | None = None,
    paper_head: str | Path | None = None,
    teacher: TeacherConfig | None = None,
    with_teacher: bool = True,
    models: Sequence[str] | str = (),
    runs: Sequence[str | Path] | str | Path = (),
    device: str | None = None,
    dtype: str | None = None,
) -> Contenders:
    """Load a student and the systems to compare it with.

    Args:
        student: folder, or name of a shipped student.
        tuned_cosine: the variant ``cosine`` of the student; by default the one beside it (``<student>-cosine``).
        paper_head: the variant ``paper``; by default ``<student>-paper``.
        teacher: by default the teacher whose labels the student was trained on: ``teacher`` beside the student, or a
            shipped one.
        with_teacher: False leaves the teacher out.
        models: other students, and bi-encoders and cross-encoders for sentence-transformers, as names or folders.
        runs: TREC run files.
        device: where to compute; by default the best device available.
        dtype: number format of d2llm's models; by default the fastest on that device. Other models are float32.

    Raises:
        ModelNotFoundError: one of the named systems does not exist.
        InputError: two systems have the same name, or a run file cannot be read.
    """
    folder = find_student(student)
    manifest = read_manifest(folder, KIND, FORMAT_VERSION)
    loads: dict[str, Load | None] = {}

    def load_encoder(load: Callable[[], Student]) -> Student:
        encoder = load()
        loads.update(encoder_loads(encoder, load))
        return encoder

    model = load_encoder(partial(load_student, folder, device=device, dtype=dtype))
    why: dict[SystemKind, str] = {}
    untuned: TextEncoder | None = None
    try:
        untuned = load_encoder(partial(create_student, untuned_config(model.config), device=device, dtype=dtype))
    except ModelNotFoundError as error:
        why["cosine_untuned"] = str(error)
    companions: dict[str, Student | None] = {}
    for variant, named in ((TUNED_COSINE, tuned_cosine), (PAPER_HEAD, paper_head)):
        place = companion(folder, variant) if named is None else find_student(named)
        exists = is_finished(place)
        load = partial(load_student, place, device=device, dtype=dtype)
        companions[variant] = load_encoder(load) if exists else None
        if not exists:
            kind: SystemKind = "cosine_tuned" if variant == TUNED_COSINE else "paper_head"
            why[kind] = f"{place.name} is not beside the student; train it: d2llm distill RECIPE --variant {variant}"
    judge: Judge | None = None
    gpus: dict[str, int] = {}
    if with_teacher:
        config = teacher or _own_teacher(folder, manifest.get("teacher"))
        if config is None:
            why["teacher"] = "the teacher that the student was trained with was not found; name one"
        else:
            load_teacher = partial(load_judge, config, device=device, dtype=dtype)
            judge = load_teacher()
            loads[judge.fingerprint] = None if asks_endpoint(config) else load_teacher
            gpus[judge.fingerprint] = config.num_gpus
    else:
        why["teacher"] = "it was left out"
    named = strings_of(models, "models")
    bi_encoders, cross_encoders = _externals(named, device, dtype, loads)
    trained_on = {NAME_D2LLM: _trained_on(folder)}
    trained_on |= {Path(name).name: _trained_on(find_student(name)) for name in named if is_student(Path(name))}
    return Contenders(
        student=model,
        untuned=untuned,
        tuned_cosine=companions[TUNED_COSINE],
        paper_head=companions[PAPER_HEAD],
        teacher=judge,
        bi_encoders=bi_encoders,
        cross_encoders=cross_encoders,
        runs=[_named(read_run(path)) for path in paths_of(runs, "runs")],
        why_missing=why,
        provenance={
            "student": _provenance(folder.name, manifest),
            "tuned_cosine": None if (cosine := companions[TUNED_COSINE]) is None else cosine.fingerprint,
            "paper_head": None if (paper := companions[PAPER_HEAD]) is None else paper.fingerprint,
            "teacher": None if judge is None else judge.fingerprint,
        },
        notes=_gate_notes(manifest),
        trained_on=trained_on,
        loads=loads,
        gpus=gpus,
    )


def _own_teacher(student: Path, fingerprint: str | None) -> TeacherConfig | None:
    """The teacher with this fingerprint: that of the student's run, or a shipped one."""
    run = RunFolder(student.parent)
    beside = [str(place) for place in (run.teacher, run.ensemble) if is_finished(place)]
    configs = [TeacherConfig(model=model) for model in (*beside, *shipped_models("teachers"))]
    return next((config for config in configs if identify_judge(config).fingerprint == fingerprint), None)


def _named(run: TrecRun) -> TrecRun:
    """Rename a run that has the name of a standard row, because an earlier report saved it from that row."""
    return replace(run, name=f"{run.name} (run)") if run.name in OWN_NAMES else run


def _externals(
    models: Sequence[str], device: str | None, dtype: str | None, loads: dict[str, Load | None]
) -> tuple[dict[str, SearchStudent], dict[str, Judge]]:
    """Other models by the names of their rows; how a worker loads each is added to ``loads``."""
    bi_encoders: dict[str, SearchStudent] = {}
    cross_encoders: dict[str, Judge] = {}
    for name in models:
        if is_student(Path(name)):
            load = partial(load_student, find_student(name), device=device, dtype=dtype)
        else:
            load = partial(load_external, name, device=device)
        loaded = load()
        loads[loaded.fingerprint] = load
        label = Path(name).name
        if label in bi_encoders or label in cross_encoders:
            raise InputError(f"two models are called '{label}', which their rows would share; rename one folder")
        if isinstance(loaded, Student | ExternalBiEncoder):
            bi_encoders[label] = loaded
        else:
            cross_encoders[label] = loaded
    return bi_encoders, cross_encoders


def _trained_on(student: Path) -> tuple[str, ...]:
    """Names of the data sets that a student was trained on, as its manifest has them."""
    recipe: Mapping[str, Any] = read_manifest(student, KIND, FORMAT_VERSION).get("recipe") or {}
    return tuple(Path(data["path"]).name for data in recipe.get("data", ()))


def _provenance(name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How the student was made, from its manifest."""
    names = ("fingerprint", "base_fingerprint", "teacher", "recipe", "interaction_weights", "packages")
    optional = ("closed_gates", "share_kept")
    return {"name": name, **{key: manifest[key] for key in (*names, *optional) if key in manifest}}


def _gate_notes(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Remarks on how the student was trained: closed gates, the share kept, interactions with weight 0."""
    notes: list[str] = []
    if closed := manifest.get("closed_gates"):
        notes.append(
            f"the teacher's gate was closed for {', '.join(closed)}: there the student was trained on the data set's "
            "own judgements"
        )
    if (share := manifest.get("share_kept", 1.0)) < 1:
        limit = manifest["recipe"]["training"]["max_interpolation"]
        why = "the recipe's maximum" if share == limit else "a larger share was no better on dev"
        notes.append(f"{share:.0%} of the change of weights in training was kept: {why}")
    off = [task for task, weight in manifest.get("interaction_weights", {}).items() if weight == 0]
    if off and manifest["config"]["interaction"]["head"] == "anchored":
        notes.append(f"the interaction is switched off for {' and '.join(off)} search: on dev it added nothing")
    return tuple(notes)
