"""The verb ``evaluate``: BM25, cosine, D2LLM and the teacher on the same judged queries, in one report."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.types import Passage, Query, Task
from d2llm.data.beir import Dataset
from d2llm.index.folder import FolderIndex, content_hash
from d2llm.index.lexical import LexicalIndex
from d2llm.index.vectors import VectorDtype
from d2llm.ops.measures import per_query_measures
from d2llm.ops.significance import paired_randomisation
from d2llm.pipeline.cosine import AnchorStudent, CosineStudent
from d2llm.pipeline.encode import encode
from d2llm.pipeline.protocols import PairJudge, SearchStudent, TextEncoder
from d2llm.pipeline.report import EvaluationReport, EvaluationRow, MissingRow, Significance
from d2llm.pipeline.systems import System, Trial, lexical_system, student_system, teacher_system

NAME_BM25 = "BM25"
NAME_UNTUNED = "cosine, untuned"
NAME_ANCHOR = "cosine, D2LLM vectors"
NAME_D2LLM = "D2LLM"
NUM_PERMUTATIONS = 10_000
_TESTED = "nDCG@10"
_RECALL_DEPTH = 100


def evaluate(
    dataset: Dataset,
    *,
    student: SearchStudent,
    split: str = "test",
    baseline: TextEncoder | None = None,
    teacher: PairJudge | None = None,
    task: Task = "asymmetric",
    top_k: int = 100,
    num_candidates: int = 1000,
    teacher_depth: int = 20,
    teacher_queries: int | None = None,
    latency_queries: int = 50,
    seed: int = 0,
    dtype: VectorDtype = "bfloat16",
    work_folder: Path | None = None,
    show_progress: bool | None = None,
) -> EvaluationReport:
    """Measure a student beside BM25, the untuned cosine and the teacher, on one split of a data set.

    Queries without a relevant passage in the corpus are counted and left out. Judgements of unknown passages do not
    count (``read_beir`` reports them).

    Args:
        dataset: from ``read_beir``.
        student: the D2LLM student.
        split: the judgements to measure by.
        baseline: an untuned encoder; the cosine of its vectors is one row. None leaves the row out.
        teacher: reranks the first ``teacher_depth`` of BM25 together with those of the student; the rest of the
            student's ranking follows behind. None leaves the row out.
        task: which branch of the IEM and which prompt.
        top_k: length of the rankings, at least 100 (Recall@100).
        num_candidates: passages that the student scores in full.
        teacher_depth: see ``teacher``.
        teacher_queries: let the teacher judge a random sample of this many queries; None means all.
        latency_queries: queries (at most) that are asked one at a time to measure the time.
        seed: of the samples and the significance test.
        dtype: how vectors are stored.
        work_folder: where the indexes are kept, and found again by the next call; None means a temporary folder.
        show_progress: None means: if standard error is a terminal.

    Raises:
        DataFormatError: the data set was read without this split, or none of its queries has a relevant passage.
        InputError: a number out of range.
    """
    _check_numbers(top_k, num_candidates, teacher_depth, teacher_queries, latency_queries)
    queries, num_left_out = _judged_queries(dataset, split)
    passages = list(dataset.passages.values())
    trial = Trial(queries, _sample(queries, latency_queries, seed), task, top_k, show_progress)
    notes = list(dataset.issues)
    missing: list[MissingRow] = []
    systems = [lexical_system(NAME_BM25, LexicalIndex(passages), trial)]
    with nullcontext(work_folder) if work_folder is not None else tempfile.TemporaryDirectory() as folder:
        for name, model in _contenders(student, baseline):
            if isinstance(model, str):
                missing.append(MissingRow(name, model))
                continue
            index = _index(Path(folder), passages, model, dtype, show_progress)
            if index.num_truncated and not isinstance(model, AnchorStudent):  # whose index is the student's
                notes.append(f"{name}: {index.num_truncated:,} passages were truncated")
            rescored = num_candidates if model is student else top_k
            systems.append(student_system(name, index, model, trial, num_candidates=rescored))

    sample = queries if teacher_queries is None else _sample(queries, teacher_queries, seed)
    teacher_name = f"teacher (reranking {NAME_BM25} ∪ {NAME_D2LLM}, top {teacher_depth})"
    if teacher is None:
        missing.append(MissingRow(teacher_name, "no teacher was given"))
    else:
        stages = (systems[0], systems[-1])
        asked = replace(trial, queries=sample)
        system, num_truncated = teacher_system(
            teacher_name, teacher, stages, dataset.passages, asked, depth=teacher_depth
        )
        systems.append(system)
        if num_truncated:
            notes.append(f"teacher: {num_truncated:,} pairs were truncated")

    values = _measure(systems, dataset, split, queries)
    rows = [_row(system, values, sample if system.name == teacher_name else queries) for system in systems]
    sampled = teacher is not None and len(sample) < len(queries)
    return EvaluationReport(
        dataset=dataset.name,
        split=split,
        task=task,
        num_passages=len(passages),
        num_queries=len(queries),
        num_left_out=num_left_out,
        rows=tuple(rows),
        missing=tuple(missing),
        sample_rows=tuple(_row(system, values, sample) for system in systems) if sampled else (),
        significance=_significance(values, queries, seed),
        settings={
            "student": student.fingerprint,
            "teacher": None if teacher is None else teacher.fingerprint,
            "top_k": top_k,
            "num_candidates": num_candidates,
            "teacher_depth": teacher_depth,
            "teacher_queries": teacher_queries,
            "latency_queries": len(trial.probes),
            "dtype": dtype,
            "seed": seed,
        },
        notes=tuple(notes),
    )


def _check_numbers(
    top_k: int, num_candidates: int, teacher_depth: int, teacher_queries: int | None, latency_queries: int
) -> None:
    limits = {
        "top_k": (top_k, _RECALL_DEPTH),
        "num_candidates": (num_candidates, 1),
        "teacher_depth": (teacher_depth, 1),
        "teacher_queries": (1 if teacher_queries is None else teacher_queries, 1),
        "latency_queries": (latency_queries, 1),
    }
    for name, (value, least) in limits.items():
        if value < least:
            raise InputError(f"{name} is {value}, but must be at least {least}")


def _judged_queries(dataset: Dataset, split: str) -> tuple[list[Query], int]:
    """The queries with a relevant passage in the corpus, and how many of the split have none."""
    positives = dataset.positives(split)
    queries = [dataset.queries[query_id] for query_id, relevant in positives.items() if relevant]
    if not queries:
        raise DataFormatError(
            dataset.path / "qrels" / f"{split}.tsv",
            f"none of its {len(dataset.qrels[split])} queries has a relevant passage in the corpus; check the ids",
        )
    return queries, len(dataset.qrels[split]) - len(queries)


def _sample(queries: Sequence[Query], size: int, seed: int) -> list[Query]:
    """A random sample in the queries' own order; all of them when there are not more."""
    if size >= len(queries):
        return list(queries)
    chosen = np.random.default_rng(seed).choice(len(queries), size, replace=False)
    return [queries[position] for position in sorted(chosen.tolist())]


def _contenders(student: SearchStudent, baseline: TextEncoder | None) -> list[tuple[str, SearchStudent | str]]:
    """The rows that a search makes: name, and the model or the reason why there is none. The student comes last."""
    untuned = (NAME_UNTUNED, "no untuned encoder was given")
    if baseline is not None:
        untuned = (f"{NAME_UNTUNED} {Path(baseline.config.backbone.model).name}", CosineStudent(baseline))
    anchor: SearchStudent | str = f"the head '{student.config.interaction.head}' has no inner-product part"
    if student.has_anchor:
        anchor = AnchorStudent(student)
    return [untuned, (NAME_ANCHOR, anchor), (NAME_D2LLM, student)]


def _index(
    folder: Path,
    passages: Sequence[Passage],
    model: TextEncoder,
    dtype: VectorDtype,
    show_progress: bool | None,
) -> FolderIndex:
    """The index of a model, made if an earlier call has not left it in ``folder``."""
    target = folder / f"{model.fingerprint}-{content_hash(passages)}-{dtype}"
    if not target.exists():
        encode(passages, model, target, dtype=dtype, show_progress=show_progress)
    return FolderIndex.open(target, student_fingerprint=model.fingerprint)


def _measure(
    systems: Sequence[System], dataset: Dataset, split: str, queries: Sequence[Query]
) -> dict[str, dict[str, dict[str, float]]]:
    """System name -> measure -> query_id -> value."""
    qrels = {
        query.id: {
            passage_id: grade
            for passage_id, grade in dataset.qrels[split][query.id].items()
            if passage_id in dataset.passages
        }
        for query in queries
    }
    return {system.name: per_query_measures(system.rankings, qrels) for system in systems}


def _row(
    system: System, values: Mapping[str, Mapping[str, Mapping[str, float]]], queries: Sequence[Query]
) -> EvaluationRow:
    measures = {
        measure: fmean(by_query[query.id] for query in queries) for measure, by_query in values[system.name].items()
    }
    return EvaluationRow(system.name, measures, system.milliseconds, system.bytes_per_passage, len(queries))


def _significance(
    values: Mapping[str, Mapping[str, Mapping[str, float]]], queries: Sequence[Query], seed: int
) -> Significance | None:
    """D2LLM against the untuned cosine, where that was measured."""
    untuned = next((name for name in values if name.startswith(NAME_UNTUNED)), None)
    if untuned is None:
        return None
    ours, theirs = ([values[name][_TESTED][query.id] for query in queries] for name in (NAME_D2LLM, untuned))
    p_value = paired_randomisation(ours, theirs, num_permutations=NUM_PERMUTATIONS, seed=seed)
    difference = fmean(ours) - fmean(theirs)
    return Significance(_TESTED, NAME_D2LLM, untuned, difference, p_value, len(queries), NUM_PERMUTATIONS)
