"""The verb ``evaluate``: one report on BM25, cosines, D2LLM and the teacher, on the same judged queries or pairs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.inputs import check_kind, path_of, paths_of
from d2llm.data.beir import Dataset
from d2llm.data.pairs import PairDataset
from d2llm.data.run_folder import is_finished
from d2llm.evaluation.contenders import Contenders
from d2llm.evaluation.pairs import evaluate_pairs
from d2llm.evaluation.report import EvaluationReport
from d2llm.evaluation.retrieval import evaluate_retrieval
from d2llm.evaluation.settings import EvaluationSettings
from d2llm.runners.placement import Placement, find_runner
from d2llm.runners.runner import Runner


def evaluate(
    dataset: Dataset | PairDataset,
    contenders: Contenders,
    settings: EvaluationSettings | None = None,
    *,
    work_folder: str | Path | None = None,
    labels: str | Path | None = None,
    indexes: Sequence[str | Path] | str | Path = (),
    runner: str | Runner = "local",
    device: str | None = None,
) -> EvaluationReport:
    """Compare a student with BM25, fusions, cosines, the paper's head and the teacher, on one split of a data set.

    Retrieval (a ``Dataset``): every system ranks the corpus for every query that has a relevant passage in it; queries
    without one are counted and left out. The teacher reranks, for a sample of queries, the top of BM25 and of the
    student. Pairs (a ``PairDataset``): every system scores every pair; thresholds come from the dev split.

    Every measure has a 95 % bootstrap interval over queries (pairs), and every row is compared with the baseline by a
    paired test, Holm-corrected over the rows compared in one measure.

    Args:
        dataset: from ``read_beir``, ``read_pairs`` or ``open_data``.
        contenders: the student and what it is compared with.
        settings: split, task, depths, samples, seed.
        work_folder: where indexes, measured systems and labels are kept, so that an interrupted evaluation can
            continue and a repeated one can reuse them. None means a temporary folder.
        labels: a label store, opened read-only; pairs that have a label in it are not scored again.
        indexes: indexes of this corpus. One that a student made, with vectors stored as the evaluation stores them and
            with all that the student's score counts, is searched, so that the passages are not encoded again. Others
            (of other passages, late-chunked, sharded) are not used, which the notes say.
        runner: where passages and, if they are many, queries are encoded and where teachers score: in this process
            (``local``), or on the workers of a Ray cluster (``ray``, ``ray:ADDRESS``, or a ``RayRunner``), which load
            the models as ``contenders.loads`` says. Searches, and all latencies, are of this process; a remote teacher
            is asked from it.
        device: for a cluster: where its workers compute.

    Raises:
        DataFormatError: the data set was read without the split, nothing in it can be measured, ``labels`` is not a
            label store, or one of ``indexes`` is not an index.
        InputError: the baseline is not among the rows, search settings or indexes are given for a data set of pairs,
            there is no such runner or cluster, or its workers cannot know how to load a model.
        MismatchError: a worker has other versions than this process, or another model at a path.

    Example:
        >>> from d2llm import EvaluationSettings, evaluate, open_data
        >>> from d2llm.evaluation.contenders import load_contenders
        >>> contenders = load_contenders("d2llm-minilm", with_teacher=False)
        >>> report = evaluate(open_data("DATA"), contenders, EvaluationSettings(split="test"))  # doctest: +SKIP
    """
    check_kind(dataset, "dataset", Dataset, PairDataset)
    check_kind(contenders, "contenders", Contenders)
    labels = None if labels is None else path_of(labels, "labels")
    if labels is not None and not is_finished(labels):
        raise DataFormatError(labels, "holds no teacher labels; give the folder that d2llm label wrote")
    begin = time.perf_counter()
    chosen = EvaluationSettings.of(settings).settled(contenders.student)
    indexes = paths_of(indexes, "indexes")
    needing_corpus = [*chosen.shortcuts, *(["indexes"] if indexes else [])]
    if isinstance(dataset, PairDataset) and needing_corpus:
        raise InputError(
            f"'{dataset.name}' has single pairs and no corpus to search; leave {', '.join(needing_corpus)} out"
        )
    placed = Placement(find_runner(runner), device, contenders.loads, contenders.gpus)
    with (
        nullcontext(work_folder) if work_folder is not None else tempfile.TemporaryDirectory() as folder,
        placed.connected() as placement,
    ):
        scores_folder = Path(folder)
        if isinstance(dataset, Dataset):
            report = evaluate_retrieval(
                dataset,
                contenders,
                chosen,
                folder=scores_folder,
                labels=labels,
                placement=placement,
                indexes=indexes,
            )
        else:
            report = evaluate_pairs(
                dataset, contenders, chosen, folder=scores_folder, labels=labels, placement=placement
            )
    return replace(report, seconds=time.perf_counter() - begin)
