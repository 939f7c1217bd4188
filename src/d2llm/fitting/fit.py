"""The verb ``fit``: from documents alone to a search engine that has learnt them.

    fit("docs", hours=8)

reads the documents into an index, has a language model write queries for their passages, keeps those that a critic
finds good, fits the weights of the score and trains the student on them, compares the result with the student that it
started from on queries of documents that were held out, and keeps the better one. Everything is in one folder. The same
call continues after an interruption; after changes to the documents it updates the index.
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2llm.core.errors import IndexMismatchError, InputError, MissingExtraError, OutOfTimeError
from d2llm.core.files import new_folder, replace_folder, write_bytes, write_json
from d2llm.core.fingerprint import fingerprint_files, fingerprint_json, fingerprint_passages
from d2llm.core.inputs import paths_of
from d2llm.core.manifest import read_any_manifest, write_manifest
from d2llm.core.progress import showing_progress
from d2llm.core.settings import shows
from d2llm.core.shipped import DEFAULT_STUDENT, DEFAULT_WRITER, MULTILINGUAL_STUDENT
from d2llm.core.time_limit import time_limit
from d2llm.core.types import Passage, Query, Task
from d2llm.data.beir import read_beir
from d2llm.data.check_texts import guess_languages
from d2llm.data.documents import SkippedFile
from d2llm.data.indexed_corpus import Corpus, is_corpus_file, open_corpus
from d2llm.data.run_folder import is_finished
from d2llm.evaluation.judging import place_judge
from d2llm.fitting.critic import Review, review_queries
from d2llm.fitting.draft_store import DraftStore
from d2llm.fitting.fit_folder import FORMAT_VERSION, default_folder, require_fit_folder
from d2llm.fitting.recipes import NUM_NEGATIVES, dev_queries, recipe_for_queries, recipe_with_teacher
from d2llm.fitting.report import FitReport
from d2llm.fitting.settings import FitSettings
from d2llm.fitting.stages import Stages
from d2llm.fitting.time_plan import TimePlan, plan_time, searches_compared
from d2llm.fitting.training_data import DataReport, part_of, read_judged, write_users_data, write_written_data
from d2llm.fitting.write_queries import WritingBudget, WritingReport, write_queries
from d2llm.ops.gating import GateTest, better
from d2llm.recipe import DataConfig, GradedTeacherConfig, Recipe, TeacherConfig, WriterConfig, untuned_config
from d2llm.recipe.recipe_file import parse_recipe
from d2llm.retrieval.protocols import expansion_fingerprint, task_for
from d2llm.retrieval.text_workers import create_student, encoder_loads, load_student
from d2llm.runners.placement import HERE
from d2llm.runners.runner import Runner, find_runner
from d2llm.store.index_manifest import FIT_KIND
from d2llm.store.side_files import Chunking, write_chunking

if TYPE_CHECKING:
    from d2llm.evaluation.report import EvaluationReport
    from d2llm.models.student import Student
    from d2llm.retrieval.encode import EncodeReport
    from d2llm.retrieval.index import Index

START_NAME, BASE_NAME = "start, as it is", "start, weights fitted"
"""Names of the row of the student that the fit started from: with its own weights of words and tokens, because there
were too few dev queries, or with weights fitted to these documents."""
TRAINED_NAMES = {False: "trained, weights of the start", True: "trained, weights fitted"}
"""Name of the row of the trained student, by whether its weights were fitted to these documents too."""
MIN_USERS_QUERIES = 30
"""With at least this many held-out queries of users, the verdict is about them alone."""

_remarks = logging.getLogger("d2llm.remarks")
_STUDENT_SOURCE = "../student"
_TIMED_PASSAGES, _TIMED_AT_ONCE, _TIMED_SECONDS = 512, 64, 2.0  # encoding is timed on so many, or for so long
_TIMED_JUDGEMENTS = 8
_SECONDS_TO_LOOK_UP = 1e-5  # of a recorded grade
_TIMED_SEARCHES = 8
_QUERY_CHARACTERS = 60  # of the queries of timed judgements and searches
_SAMPLED, _SAMPLED_CHARACTERS = 30, 2_000  # documents whose language is guessed, and how much of each is read
_LISTED_AT_ONCE = 1_000


@shows(FitSettings)
def fit(
    documents: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    settings: FitSettings | None = None,
    *,
    again: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    runner: str | Runner = "local",
    show_progress: bool | None = None,
    **changes: Any,
) -> FitReport | None:
    """Fit a search engine to documents; everything is written to one folder, which ``d2llm serve`` can serve.

    Args:
        documents: folders and files of documents, or a ``corpus.jsonl``.
        output: the folder; by default beside the documents, as ``<name>.search``.
        settings: how to fit.
        again: learn anew even if an earlier call has finished, for example after many documents have changed.
        device: where to compute; by default the best device available.
        dtype: number format of the models; by default the fastest on that device.
        runner: where passages are encoded and the teacher judges: in this process (``local``), or on a Ray cluster
            (``ray``, ``ray:ADDRESS``, or a ``RayRunner``), whose machines need the folder at the same path. Writing,
            searching and training are in this process. The time plan counts passes over the corpus at the speed of the
            runner, and training and judgements at that of this process.
        show_progress: whether to show progress (``core.progress.showing_progress``).
        changes: single fields of the settings, as in ``fit("docs", hours=0.5)``.

    Returns:
        The report; None if an earlier call had finished, so that only the index was brought up to date.

    Raises:
        InputError: there is nothing to read, too little to learn from, or the folder holds something else.
        ModelError: the writer failed for longer than its patience; run the same command again to continue.

    Example:
        >>> from d2llm import fit
        >>> fit("docs", "docs.search", hours=0.5)  # doctest: +SKIP
    """
    chosen = FitSettings.of(settings, **changes)
    return Fit(
        documents, output, chosen, device=device, dtype=dtype, runner=runner, show_progress=show_progress
    ).finish(again=again)


@dataclass
class _Learnt:
    """What the stages up to training have made."""

    writing: WritingReport
    review: Review
    data: dict[str, DataReport]
    base: Path
    trained: Path | None


class Fit:
    """Trains a student on documents alone, step by step. ``finish`` runs all steps; each can be run alone, in order."""

    def __init__(
        self,
        documents: str | Path | Sequence[str | Path],
        output: str | Path | None = None,
        settings: FitSettings | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        runner: str | Runner = "local",
        show_progress: bool | None = None,
    ) -> None:
        """Prepare a fit; arguments and errors are those of ``fit``."""
        self.documents = paths_of(documents, "documents")
        if not self.documents:
            raise InputError("there are no documents; name folders or files")
        self.settings = FitSettings.of(settings)
        self.writer = self.settings.writer or WriterConfig(model=DEFAULT_WRITER)
        self.folder = require_fit_folder(default_folder(self.documents[0]) if output is None else Path(output))
        self.device, self.dtype, self.show_progress = device, dtype, show_progress
        self.runner = find_runner(runner)
        self.stages = Stages(self.folder.progress_page, str(self.folder.path), 3600 * self.settings.hours)
        self.notes: list[str] = []
        self._rate: float | None = None  # passages encoded per second by a cluster, if this call has made the index

    def finish(self, *, again: bool = False) -> FitReport | None:
        """Run every step; see ``fit``."""
        with showing_progress(self.show_progress):
            is_update = self.is_finished and not again
            if not is_update:
                self._check_teacher()
                self._begin()
            try:
                with self.stages.run("read") as stage:
                    stage.outcome = self.read()
                if not is_update:
                    return self._conclude(self._learn())
            finally:
                self.stages.finish()
        _remarks.info(
            "%s was fitted before, and its student is kept; to learn the changed documents too, repeat with --again",
            self.folder.path,
        )
        return None

    # The steps -------------------------------------------------------------------------------------------------------

    def read(self) -> str:
        """Read the documents into the index, or bring it up to date; returns what was done, in words."""
        from d2llm.retrieval.sync import sync_documents

        if is_finished(self.folder.index):
            self._serve(self._index_of(self.folder.student))  # if a call ended after replacing only one of the two
            index = self.index
            if is_corpus_file(self.documents):
                passages = list(open_corpus(self.documents).passages)
                written = index.upsert(passages, num_passages=len(passages))
                gone = {passage.id for passage in self.passages} - {passage.id for passage in passages}
                index.delete(gone)
                outcome = f"{written.num_added + written.num_updated:,} passages changed, {len(gone):,} gone"
            else:
                chunking = index.chunking or self._chunking(self._load(self.folder.student))
                report = sync_documents(index, self.documents, exclude=self._excluded, chunking=chunking)
                self._note_skipped(report.skipped)
                changed = report.num_files - report.num_unchanged
                outcome = f"{changed:,} of {report.num_files:,} files had changed, {len(report.gone):,} were gone"
            self._forget_index()
            return outcome
        student = self._load(self.start)
        student.save(self.folder.student)
        corpus = open_corpus(self.documents, exclude=self._excluded)
        encoded = self._encode(corpus, student, self.folder.index, self._chunking(student), source=self.start)
        self._forget_index()
        self._rate = None if self.runner.is_local else encoded.passages_per_second or None
        return f"{encoded.num_documents:,} documents, {encoded.num_passages:,} passages"

    def plan(self, *, is_reviewed: bool = False) -> TimePlan:
        """Plan the remaining stages from the time that is left and the measured speeds of encoding.

        Passes over the corpus are planned at the speed of the runner, training at that of this process.
        """
        is_written = self._finished_writing() is not None
        plan = plan_time(
            self.stages.seconds_left,
            num_passages=len(self.passages),
            passages_per_second=self._passages_per_second(),
            corpus_passages_per_second=self._rate,
            seconds_per_search=self._seconds_per_search(),
            num_negatives=NUM_NEGATIVES,
            is_written=is_written,
            is_reviewed=is_reviewed,
            has_vectors=self._has_vectors_of_start,
            has_teacher=self.settings.teacher is not None,
        )
        planned = {"write": plan.writing, "review": plan.reviewing, "train": plan.training, "compare": plan.measuring}
        self.stages.plan(**{name: seconds for name, seconds in planned.items() if seconds or name == "train"})
        return plan

    def write(self, seconds: float) -> WritingReport:
        """Have queries written for at most this time; nothing if an earlier call with these settings has done that."""
        from d2llm.models.writers.writer import load_writer

        finished = self._finished_writing()
        if finished is not None:
            return finished
        settings = self.settings
        if self.writer.model == DEFAULT_WRITER and self.start == MULTILINGUAL_STUDENT:
            self._note(f"{DEFAULT_WRITER} writes English, and the documents seem to be in another language")
        writer = load_writer(self.writer, device=self.device, dtype=self.dtype)
        report = write_queries(
            self.passages,
            writer,
            DraftStore(self.folder.drafts, writer.fingerprint),
            config=self.writer,
            budget=WritingBudget(seconds, settings.max_tokens, settings.max_cost, settings.max_queries),
            kinds=settings.kinds,
            examples=settings.examples,
            seed=settings.seed,
        )
        content = {
            "corpus": self._corpus_key,
            "request": self._writing_request,
            "hours": settings.hours,
            "writer": writer.fingerprint,
            "report": asdict(report),
        }
        write_json(self.folder.finished_writing, content)
        return report

    def review(self, seconds: float = math.inf) -> Review:
        """Review the written queries, of which a teacher reads as many as it has time for, and write the audit page."""
        from d2llm.fitting.report import audit_page

        teacher, placement = None, HERE
        if self.settings.teacher is not None:
            from d2llm.models.teachers.judge import load_judge

            load = partial(load_judge, self.settings.teacher, device=self.device, dtype=self.dtype)
            teacher, placement = place_judge(self.settings.teacher, load, self.runner, device=self.device)
        written = json.loads(self.folder.finished_writing.read_text(encoding="utf-8"))
        review = review_queries(
            DraftStore(self.folder.drafts, written["writer"]),
            self.passages,
            self.index,
            task=self.task,
            teacher=teacher,
            judgements=self.folder.judgements,
            seconds=seconds,
            settings=self.settings.critic,
            placement=placement,
        )
        if review.num_unjudged:
            self._note(f"the teacher had no time to read {review.num_unjudged:,} of the queries that were kept")
        if review.num_ungraded:
            self._note(
                f"the teacher gave no grade to {review.num_ungraded:,} of the queries that passed the search, so they "
                "are kept as they are"
            )
        texts = {passage.id: passage.full_text for passage in self.passages}
        write_bytes(self.folder.audit_page, audit_page(review, texts, seed=self.settings.seed).encode())
        return review

    def make_data(self, review: Review) -> dict[str, DataReport]:
        """Write the data sets to train and measure on: the reviewed queries, and the users' own if there are any."""
        seed = self.settings.seed
        users: dict[str, DataReport] = {}
        trained_on: set[str] = set()
        if self.settings.judged is not None:
            judged = read_judged(Path(self.settings.judged))
            report = write_users_data(self.folder.users, self.passages, judged, self.index, task=self.task, seed=seed)
            if report.num_unknown:
                self._note(f"{report.num_unknown:,} judged ids of users are not in the documents")
            users = {"users": report}
            positives = read_beir(self.folder.users, splits=["train"]).positives("train")
            trained_on = {passage_id for passage_ids in positives.values() for passage_id in passage_ids}
        written = write_written_data(self.folder.written, self.passages, review.kept, trained_on=trained_on, seed=seed)
        return {"written": written, **users}

    def fit_weights(self, data: Mapping[str, DataReport]) -> Path:
        """The student to start from, with the weights of words in its score fitted on dev; returns its folder.

        If dev has too few queries to fit weights, the student keeps its own.
        """
        from d2llm.training.fit_scores import fit_scores

        folder = self.folder.base(self._data_key(data))
        if not is_finished(folder):
            student = self._load(self.start)
            datasets = [read_beir(self._data_folder(name), splits=["dev"]) for name in data]
            plan = self.plan(is_reviewed=True)
            fit_scores(
                student,
                datasets,
                self.task,
                window_vectors=False,
                num_queries=dev_queries(plan),
                num_passages=plan.evaluated,
                seed=self.settings.seed,
            )
            student.save(folder)
        return folder

    def train(self, data: Mapping[str, DataReport], plan: TimePlan) -> Path:
        """Train the student on the data sets; returns its folder.

        With a teacher, the student learns from the queries alone in the first half of the time. In the second half the
        teacher judges those queries whose passages the student now ranks most differently, as many as there is time
        for, and the student learns from these judgements too.

        Raises:
            OutOfTimeError: the planned time has passed, and no student is finished.
        """
        recipe, key = self.recipe(data, plan), self._data_key(data)
        teacher = self.settings.teacher
        with time_limit(plan.training):
            with time_limit(plan.training / (1 if teacher is None else 2)):
                trained = self._finish_run(recipe, key)
            if teacher is None:
                return trained
            try:
                seconds = self._seconds_per_judgement(teacher)
                with_teacher = recipe_with_teacher(recipe, str(trained), teacher, plan, seconds_per_judgement=seconds)
                judged = f"{fingerprint_json([key, teacher.model_dump(mode='json')])}-judged"
                return self._finish_run(with_teacher, judged)
            except OutOfTimeError:
                self._note("there was no time to train on the teacher's judgements")
                return trained

    def recipe(self, data: Mapping[str, DataReport], plan: TimePlan) -> Recipe:
        """The recipe of the training on the queries alone, for as many of them as the plan has time for.

        The training begins with the weights of ``fit_weights``.
        """
        settings = self.settings
        recipe = recipe_for_queries(
            self.start,
            self._load(self.start).config,
            [
                DataConfig(
                    path=str(self._data_folder(name)),
                    task=self.task,
                    max_queries=report.queries["train"],
                    exclude_shared_passages=name == "written",
                )
                for name, report in data.items()
                if report.queries["train"]
            ],
            plan,
            seed=settings.seed,
        )
        base = self.folder.base(self._data_key(data))
        start = str(base) if is_finished(base) else recipe.training.start
        return recipe.model_copy(update={"training": recipe.training.model_copy(update={"start": start})})

    def _seconds_per_judgement(self, teacher: TeacherConfig) -> float:
        """How long a teacher takes to judge one pair here, measured on a few."""
        from d2llm.models.teachers.judge import load_judge

        if isinstance(teacher, GradedTeacherConfig) and teacher.recorded is not None:
            return _SECONDS_TO_LOOK_UP
        judge = load_judge(teacher, device=self.device, dtype=self.dtype)
        texts = [passage.full_text for passage in self.passages[:_TIMED_JUDGEMENTS]]
        started = time.perf_counter()
        judge.judge([(texts[0][:_QUERY_CHARACTERS], text) for text in texts], self.task)
        return (time.perf_counter() - started) / len(texts)

    def _finish_run(self, recipe: Recipe, key: str) -> Path:
        """Finish a run; one that an earlier call began keeps its recipe, which the new plan would change."""
        from d2llm.training.run import Run

        begun = self.folder.run(key) / "recipe.json"
        if begun.is_file():
            recipe = parse_recipe(json.loads(begun.read_text(encoding="utf-8")), where=str(begun))
        else:
            begun.parent.mkdir(parents=True, exist_ok=True)
            write_json(begun, recipe.model_dump(mode="json"))
        run = Run(recipe, self.folder.run(key), device=self.device, dtype=self.dtype)
        if self._has_vectors_of_start:
            for data in recipe.data:
                if not is_finished(run.parts.plan(data)):
                    self._put_vectors(run.parts.mining_work(data))
        run.finish(runner=self.runner)
        return run.parts.student

    @property
    def _has_vectors_of_start(self) -> bool:
        """Whether the student to start from made the index, so that mining need not encode the passages again."""
        return self.index.student.fingerprint == self._start_fingerprint

    @cached_property
    def _start_fingerprint(self) -> str:
        return self._load(self.start).fingerprint

    def _put_vectors(self, folder: Path) -> None:
        """Put the vectors of the index, which the student to start from made, into the folder in which a run mines."""
        from d2llm.training.mining.ranking import put_vectors

        view = self.index.view
        passages = {passage.id: passage for passage in self.passages}
        put_vectors(self.index.student, passages, list(passages), folder, lambda ids: view.vectors(view.rows(ids)))

    def compare(
        self, data: Mapping[str, DataReport], base: Path, trained: Path | None, *, with_untuned: bool = True
    ) -> tuple[dict[str, EvaluationReport], GateTest | None]:
        """Compare all systems on the test queries of each data set, and test whether the trained student is better.

        The test treats queries about the same part of a document as one, because they are not independent. Each system
        is measured once, however often this is called.

        Each row says what it is (``START_NAME``, ``TRAINED_NAMES``). The examples are of the student that is served.

        Args:
            data: the data sets.
            base: the folder of the student that the training started from, with its weights fitted.
            trained: the folder of the trained student, if there is one.
            with_untuned: also compare with the untuned student, for which the corpus is encoded once more.
        """
        from d2llm.evaluation.contenders import Contenders
        from d2llm.evaluation.evaluate import evaluate
        from d2llm.evaluation.retrieval import about_row
        from d2llm.evaluation.settings import EvaluationSettings

        start, fitted = self._load(base), None if trained is None else self._load(trained)
        loads = encoder_loads(start, self._loader(base))
        untuned = None
        if with_untuned:
            load_untuned = partial(create_student, untuned_config(start.config), device=self.device, dtype=self.dtype)
            untuned = load_untuned()
            loads = {**encoder_loads(untuned, load_untuned), **loads}
        if fitted is not None and trained is not None:
            loads |= encoder_loads(fitted, self._loader(trained))
        base_name = BASE_NAME if self._is_weighted(start) else START_NAME
        subject = base_name if fitted is None else TRAINED_NAMES[self._is_weighted(fitted)]
        contenders = Contenders(
            student=fitted or start,
            untuned=untuned,
            bi_encoders={} if fitted is None else {base_name: start},
            why_missing={} if with_untuned else {"cosine_untuned": "there was no time to encode the documents with it"},
            loads=loads,
        )
        indexes = [self._index_of(student) for student in (base, trained) if student is not None]
        # The start's weights, and the trained student's, were fitted on this very data set.
        settings = EvaluationSettings(task=self.task, latency_queries=10, seed=self.settings.seed, score_parts=False)
        datasets = {name: read_beir(self._data_folder(name), splits=["dev", "test"]) for name in data}
        reports = {
            name: evaluate(
                dataset,
                contenders,
                settings,
                work_folder=self.folder.measured,
                indexes=indexes,
                runner=self.runner,
                device=self.device,
            ).renamed(_row_names(subject))
            for name, dataset in datasets.items()
        }
        if fitted is None:
            return reports, None
        users = reports.get("users")
        decisive = [users] if users is not None and users.num_items >= MIN_USERS_QUERIES else list(reports.values())
        before, after = (
            {key: value for report in decisive for key, value in _values(report, name).items()}
            for name in (base_name, subject)
        )
        part_of_passage = {passage.id: part_of(passage) for passage in self.passages}
        groups = {
            f"{dataset.name}:{query_id}": part_of_passage[passage_ids[0]]
            for dataset in datasets.values()
            for query_id, passage_ids in dataset.positives("test").items()
        }
        verdict = better(before, after, groups=groups, seed=self.settings.seed)
        if not verdict.passed:
            reports = {name: about_row(report, base_name, datasets[name]) for name, report in reports.items()}
        return reports, verdict

    def _is_weighted(self, student: Student) -> bool:
        """Whether the weights of a student's score were fitted here: those that it has are not the start's."""
        own, start = (each.score_features.tasks.get(self.task) for each in (student, self._load(self.start)))
        return own is not None and (start is None or own.inherited() != start.inherited())

    def serve_with(self, student: Path) -> None:
        """Make the served index that of a student; it replaces the earlier one when it is complete."""
        index = self._index_of(student)
        with new_folder(self.folder.student, kind="student") as temporary:
            shutil.copytree(student, temporary, dirs_exist_ok=True)
            self._serve(index)

    # What the steps share --------------------------------------------------------------------------------------------

    def _learn(self) -> _Learnt:
        """The stages from writing to training; time that writing leaves is for training."""
        if self.stages.seconds_left < 0:
            self._note(
                f"to read and index the documents took longer than the {60 * self.settings.hours:.0f} minutes of the "
                "whole fit: few queries are written, and nothing is trained; give more hours"
            )
        with self.stages.run("write") as stage:
            planned = self.plan()
            writing = self.write(planned.writing)
            stage.outcome = f"{writing.num_queries:,} queries for {writing.num_answers:,} assignments"
        with self.stages.run("review") as stage:
            review = self.review(planned.reviewing)
            stage.outcome = f"{len(review.kept):,} kept, {len(review.rejected):,} rejected"
            data = self.make_data(review)
        with self.stages.run("weights"):
            base = self.fit_weights(data)
        trained, plan = None, self.plan(is_reviewed=True)
        num_queries = sum(report.queries["train"] for report in data.values())
        only = "only the weights of the score were fitted"
        if not self._is_weighted(self._load(base)):
            only = "the student to start from remains as it is, because dev has too few queries to fit its weights too"
        if not num_queries:
            self.stages.skip("train", "no queries for it")
            self._note(f"every query to train on shares a relevant passage with a held-out one: {only}")
        elif plan.training:
            with self.stages.run("train") as stage:
                try:
                    trained = self.train(data, plan)
                    stage.outcome = f"on {num_queries:,} queries"
                except OutOfTimeError:
                    stage.outcome = "not finished: out of time"
                    self._note(f"the training was not finished in its time: {only}")
        else:
            self.stages.skip("train", "no time for it")
            self._note(f"there was no time for training: {only}")
        return _Learnt(writing, review, data, base, trained)

    def _conclude(self, learnt: _Learnt) -> FitReport:
        """Compare, keep the better student, serve it, and write the report."""
        from d2llm.fitting.report import outcome, report_page

        with self.stages.run("compare") as stage:
            reports, verdict = self._compare_in_time(learnt)
            is_better = verdict is not None and verdict.passed
            stage.outcome = (
                "there is no trained student" if verdict is None else f"the trained student is {outcome(verdict)}"
            )
        with self.stages.run("serve"):
            self.serve_with(learnt.trained if is_better and learnt.trained is not None else learnt.base)
        report = FitReport(
            folder=self.folder.path,
            num_passages=len(self.passages),
            writing=learnt.writing,
            num_kept=len(learnt.review.kept),
            rejected=learnt.review.reasons,
            data=learnt.data,
            kept="fitted" if is_better else "start",
            verdict=verdict,
            reports=reports,
            seconds={name: stage.seconds for name, stage in self.stages.stages.items() if stage.seconds is not None},
            notes=tuple(self.notes),
        )
        write_json(self.folder.report, report.to_json())
        write_bytes(self.folder.report_page, report_page(report, self.stages.table()).encode())
        self._write_manifest(kept=report.kept)
        return report

    def _compare_in_time(self, learnt: _Learnt) -> tuple[dict[str, EvaluationReport], GateTest | None]:
        """Compare as many systems as there is time to encode the corpus for; notes say what is left out.

        The trained student is tried even if that seems to take twice the time that is left, which has no other use.
        """
        one_pass = len(self.passages) / (self._rate or self._passages_per_second())
        searching = self._seconds_per_search() * sum(report.queries["test"] for report in learnt.data.values())
        attempts = [(learnt.trained, True), (learnt.trained, False)] if learnt.trained else [(None, True)]
        ranking = [searching * searches_compared(trained is not None, untuned) for trained, untuned in attempts]
        ranking.append(searching * searches_compared(False, False))
        for number, (trained, with_untuned) in enumerate(attempts):
            later = sum(ranking[number + 1 :])  # to rank without what is left out
            lacks_index = trained is not None and not is_finished(self._index_folder(self._load(trained)))
            needed = one_pass * (lacks_index + with_untuned) + ranking[number]
            if trained is not None and not with_untuned:
                needed /= 2
            if self.stages.seconds_left - later >= needed:
                try:
                    with time_limit(self.stages.seconds_left - later):
                        return self.compare(learnt.data, learnt.base, trained, with_untuned=with_untuned)
                except OutOfTimeError:
                    pass
            self._note(
                "there was no time to compare with the untuned student"
                if with_untuned
                else "there was no time to compare the trained student, so the one to start from is kept"
            )
        return self.compare(learnt.data, learnt.base, None, with_untuned=False)

    def _encode(
        self,
        corpus: Corpus | Sequence[Passage],
        student: Student,
        folder: Path,
        chunking: Chunking | None,
        *,
        source: str | Path,
    ) -> EncodeReport:
        """Make an index that can be served; ``source`` is where the student was loaded from."""
        from d2llm.retrieval.encode import encode

        report = encode(
            corpus,
            student,
            folder,
            task=self.task,
            window_vectors=None,
            chunking=chunking,
            student_source=_STUDENT_SOURCE,
            runner=self.runner,
            device=self.device,
            load_student=self._loader(source),
        )
        self._note_skipped(report.skipped)
        return report

    def _index_of(self, student: Path) -> Path:
        """An index of the passages that a student made: the served one, or a new one that can be served."""
        loaded, chunking = self._load(student), self.index.chunking
        folder = self._index_folder(loaded)
        if folder != self.folder.index:
            if not is_finished(folder):
                is_late = chunking is not None and chunking.late  # needs what stands around each passage
                corpus = open_corpus(self.documents, exclude=self._excluded) if is_late else self.passages
                self._encode(corpus, loaded, folder, chunking if is_late else None, source=student)
            if chunking is not None:
                write_chunking(folder, chunking)
        return folder

    def _index_folder(self, student: Student) -> Path:
        """Where an index of the passages that a student made is, or will be made."""
        from d2llm.retrieval.index import check_parts

        try:
            self.index.store.check_student(student.fingerprint)
            check_parts(self.index.store, student, self.task)
        except IndexMismatchError:
            made_with = [student.fingerprint, student.token_fingerprint if student.token_dim else None]
            if (expansion := expansion_fingerprint(student)) is not None:
                made_with.append(expansion)
            return self.folder.work / f"index-{fingerprint_json([*made_with, self._corpus_key])}"
        return self.folder.index

    def _serve(self, index: Path) -> None:
        """Serve an index that was made for it."""
        if index != self.folder.index:
            with self.index.store.locked():
                replace_folder(index, self.folder.index)
            self._forget_index()

    def _chunking(self, student: Student) -> Chunking | None:
        """How the documents of a new index are split; the passages of a corpus file are not."""
        from d2llm.retrieval.chunking import default_chunking

        return None if is_corpus_file(self.documents) else self.settings.chunking or default_chunking(student)

    @property
    def is_finished(self) -> bool:
        """Whether an earlier call has finished this fit."""
        return self.folder.manifest.is_file() and read_any_manifest(self.folder.path).get("kept") is not None

    @cached_property
    def start(self) -> str:
        """The student to start from: as set, as in an earlier call, or by the language of the documents."""
        if self.settings.student is not None:
            return self.settings.student
        if self.folder.manifest.is_file():
            return str(read_any_manifest(self.folder.path)["start"])
        corpus = open_corpus(self.documents, exclude=self._excluded)
        return student_for([passage.text[:_SAMPLED_CHARACTERS] for passage in islice(corpus.passages, _SAMPLED)])

    @cached_property
    def task(self) -> Task:
        """What makes a passage relevant: as set, or what the student to start from was trained for."""
        return task_for(self._load(self.start), self.settings.task)

    def _check_teacher(self) -> None:
        """Find out about a teacher that cannot be used before queries are written for hours.

        One at an endpoint gets a trial request, and recorded grades are read; others are looked for.
        """
        from d2llm.models.teachers.judge import asks_endpoint, identify_judge, load_judge

        teacher = self.settings.teacher
        if teacher is not None:
            identify_judge(teacher)
            if asks_endpoint(teacher):
                load_judge(teacher, device=self.device, dtype=self.dtype)

    def _begin(self) -> None:
        """Make the folder, or prepare a finished one for learning anew."""
        was_finished = self.is_finished
        self._write_manifest()
        self.folder.work.mkdir(exist_ok=True)
        if was_finished:
            self.folder.finished_writing.unlink(missing_ok=True)  # the same documents may get more queries

    def _write_manifest(self, kept: str | None = None) -> None:
        documents = [str(path.resolve()) for path in self.documents]
        content = {"documents": documents, "start": self.start, "kept": kept}
        self.folder.path.mkdir(parents=True, exist_ok=True)  # only now: documents without text leave no folder behind
        write_manifest(self.folder.path, FIT_KIND, FORMAT_VERSION, content)

    @cached_property
    def index(self) -> Index:
        """The index that is served."""
        from d2llm.retrieval.index import Index

        return Index.open(self.folder.index, device=self.device, dtype=self.dtype)

    @cached_property
    def passages(self) -> list[Passage]:
        """Every passage of the index, by id."""
        ids: list[str] = []
        while block := self.index.list_passages(ids[-1] if ids else "", _LISTED_AT_ONCE):
            ids += block
        return sorted(self.index.get(ids), key=lambda passage: passage.id)

    def _forget_index(self) -> None:
        """Read index and passages again when they are next needed."""
        for name in ("index", "passages"):
            self.__dict__.pop(name, None)

    def _finished_writing(self) -> WritingReport | None:
        """The report of an earlier call that finished the writing for these documents, settings and as much time."""
        if not self.folder.finished_writing.is_file():
            return None
        written = json.loads(self.folder.finished_writing.read_text(encoding="utf-8"))
        is_same = written["corpus"] == self._corpus_key and written["request"] == self._writing_request
        return WritingReport(**written["report"]) if is_same and self.settings.hours <= written["hours"] else None

    @property
    def _writing_request(self) -> str:
        """Identifies what is asked of the writer, but for the time."""
        settings = self.settings
        limits = [settings.max_tokens, settings.max_cost, settings.max_queries]
        writer = self.writer.model_dump(mode="json")
        return fingerprint_json([writer, dict(settings.kinds), settings.examples, limits, settings.seed])

    @property
    def _corpus_key(self) -> str:
        return fingerprint_passages(self.passages)

    def _passages_per_second(self) -> float:
        """How fast the index's student encodes passages in this process now, measured on a few."""
        texts = [passage.full_text for passage in self._sampled_passages(_TIMED_PASSAGES)]
        self.index.student.encode_passages(texts[: _TIMED_AT_ONCE // 4])  # the first call takes longer
        started, num_encoded, seconds = time.perf_counter(), 0, 0.0
        while num_encoded < len(texts) and seconds < _TIMED_SECONDS:
            block = texts[num_encoded : num_encoded + _TIMED_AT_ONCE]
            self.index.student.encode_passages(block)
            num_encoded, seconds = num_encoded + len(block), time.perf_counter() - started
        return num_encoded / seconds

    def _seconds_per_search(self) -> float:
        """How long a search for one query takes in this process now, measured on a few."""
        from d2llm.retrieval.search import Searcher
        from d2llm.retrieval.settings import SearchSettings

        searcher = Searcher(self.index.view, self.index.student, SearchSettings(task=self.task, top_k=100))
        texts = [passage.text[:_QUERY_CHARACTERS] for passage in self._sampled_passages(_TIMED_SEARCHES)]
        queries = [Query(str(number), text) for number, text in enumerate(texts)]
        searcher.rank_ids(queries[:1])
        started = time.perf_counter()
        searcher.rank_ids(queries)
        return (time.perf_counter() - started) / len(queries)

    def _sampled_passages(self, count: int) -> list[Passage]:
        return random.Random(self.settings.seed).sample(self.passages, min(count, len(self.passages)))

    @property
    def _excluded(self) -> list[str]:
        """What to leave out of the documents: what the settings say, and this fit's own folder."""
        own = self.folder.path.resolve()
        inside = [own.relative_to(path.resolve()) for path in self.documents if own.is_relative_to(path.resolve())]
        return [*self.settings.exclude, *(f"/{path.as_posix()}/" for path in inside)]

    def _data_folder(self, name: str) -> Path:
        return self.folder.written if name == "written" else self.folder.users

    def _data_key(self, data: Mapping[str, DataReport]) -> str:
        """Identifies what is trained on: the data sets' content and the student to start from."""
        content = [
            fingerprint_files(sorted(path for path in self._data_folder(name).rglob("*") if path.is_file()))
            for name in data
        ]
        return fingerprint_json([content, self.start, self.task, self.settings.seed])

    def _load(self, student: str | Path) -> Student:
        return self._loader(student)()

    def _loader(self, student: str | Path) -> Callable[[], Student]:
        """How workers load a student too; a folder by its whole path, since they may work elsewhere."""
        source = student.resolve() if isinstance(student, Path) else student
        return partial(load_student, source, device=self.device, dtype=self.dtype)

    def _note(self, note: str) -> None:
        self.notes.append(note)
        _remarks.warning("fit: %s", note)

    def _note_skipped(self, skipped: Sequence[SkippedFile]) -> None:
        files = [each for each in skipped if not each.part]
        parts = [each for each in skipped if each.part]
        if files:
            self._note(f"{len(files):,} files could not be read, such as {files[0]}")
        if parts:
            self._note(f"{len(parts):,} parts of files were left out, such as {parts[0]}")


def student_for(texts: Sequence[str]) -> str:
    """The shipped student for the language of some texts: English, or any other.

    Without py3langid (extra ``check``), texts in which a tenth of the letters are not ASCII are taken for another
    language.
    """
    try:
        languages = guess_languages("documents", texts)
    except MissingExtraError:
        letters = [letter for text in texts for letter in text if letter.isalpha()]
        is_english = sum(letter.isascii() for letter in letters) >= 0.9 * len(letters)
    else:
        is_english = languages is None or next(iter(languages.counts)) == "en"
    return DEFAULT_STUDENT if is_english else MULTILINGUAL_STUDENT


def _row_names(student: str) -> dict[str, str]:
    """Names of rows of an evaluation -> their names in a fit, where there are several students."""
    from d2llm.evaluation.contenders import NAME_BM25, NAME_D2LLM, NAME_DOT

    hybrid = f"hybrid: {NAME_BM25} + "
    return {
        NAME_D2LLM: student,
        NAME_DOT: f"{student}: vectors alone",
        hybrid + NAME_D2LLM: hybrid + student,
    }


def _values(report: EvaluationReport, name: str) -> dict[str, float]:
    """The main measure of a row, by data set and query."""
    values = report.details.values[name][report.main_measure]
    return {f"{report.dataset}:{item}": value for item, value in zip(report.details.item_ids, values, strict=True)}
