"""The verb ``fit``: from documents alone to a search engine that has learnt them.

    fit("docs", hours=8)

reads the documents into an index, has a language model write queries for their passages, keeps those that a critic
finds good, fits the weights of the score and trains the student on them, compares the result with the student that it
started from on queries of documents that were held out, and keeps the better one. Everything is in one folder. The same
call continues after an interruption; after changes to the documents it updates the index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2llm.core.errors import InputError, OutOfTimeError
from d2llm.core.files import write_bytes, write_json
from d2llm.core.fingerprint import fingerprint_files, fingerprint_json
from d2llm.core.inputs import path_of, paths_of
from d2llm.core.json_values import parse_json
from d2llm.core.names import counted
from d2llm.core.progress import remarks, showing_progress
from d2llm.core.settings import shows
from d2llm.core.shipped import DEFAULT_WRITER, MULTILINGUAL_STUDENT
from d2llm.core.time_limit import time_limit
from d2llm.data.beir import read_beir
from d2llm.data.run_folder import is_finished
from d2llm.evaluation.pool_scores import place_teacher
from d2llm.fitting.compare import compare_students, is_weighted
from d2llm.fitting.critic import Review, review_queries
from d2llm.fitting.report import FitReport, Stages, audit_page, outcome, report_page
from d2llm.fitting.served_index import ServedIndex, default_folder, require_fit_folder
from d2llm.fitting.settings import FitSettings
from d2llm.fitting.time_plan import (
    NUM_NEGATIVES,
    TimePlan,
    dev_queries,
    passages_per_second,
    plan_time,
    recipe_for_queries,
    recipe_with_teacher,
    searches_compared,
    seconds_per_pair,
    seconds_per_search,
)
from d2llm.fitting.training_data import DataReport, read_judged, write_users_data, write_written_data
from d2llm.fitting.write_queries import DraftStore, WritingBudget, WritingReport, write_queries
from d2llm.ops.gating import GateTest
from d2llm.recipe import DataConfig, Recipe, WriterConfig
from d2llm.recipe.recipe import parse_recipe
from d2llm.runners.placement import HERE, find_runner
from d2llm.runners.runner import Runner

if TYPE_CHECKING:
    from d2llm.evaluation.report import EvaluationReport


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
        runner: where passages are encoded and the teacher scores: in this process (``local``), or on a Ray cluster
            (``ray``, ``ray:ADDRESS``, or a ``RayRunner``), whose machines need the folder at the same path. Writing,
            searching and training are in this process. The time plan counts passes over the corpus at the speed of the
            runner, and training and scoring at that of this process.
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
        self.folder = require_fit_folder(
            default_folder(self.documents[0]) if output is None else path_of(output, "output")
        )
        self.device, self.dtype, self.show_progress = device, dtype, show_progress
        self.runner = find_runner(runner)
        self.stages = Stages(self.folder.progress_page, str(self.folder.path), 3600 * self.settings.hours)
        self.notes: list[str] = []
        self.served = ServedIndex(
            self.documents,
            self.folder,
            self.settings,
            runner=self.runner,
            device=device,
            dtype=dtype,
            note=self._note,
        )

    def finish(self, *, again: bool = False) -> FitReport | None:
        """Run every step; see ``fit``."""
        with showing_progress(self.show_progress):
            is_update = self.folder.is_finished and not again
            if not is_update:
                self._check_teacher()
                self._begin()
            try:
                with self.stages.run("read") as stage:
                    stage.outcome = self.served.read()
                if not is_update:
                    return self._conclude(self._learn())
            finally:
                self.stages.finish()
        remarks.info(
            "%s was fitted before, and its student is kept; to learn the changed documents too, repeat with --again",
            self.folder.path,
        )
        return None

    # The steps -------------------------------------------------------------------------------------------------------

    def plan(self, *, is_reviewed: bool = False) -> TimePlan:
        """Plan the remaining stages from the time that is left and the measured speeds of encoding.

        Passes over the corpus are planned at the speed of the runner, training at that of this process.
        """
        is_written = self._finished_writing() is not None
        plan = plan_time(
            self.stages.seconds_left,
            num_passages=len(self.served.passages),
            passages_per_second=passages_per_second(self.served),
            corpus_passages_per_second=self.served.encoding_rate,
            seconds_per_search=seconds_per_search(self.served),
            num_negatives=NUM_NEGATIVES,
            is_written=is_written,
            is_reviewed=is_reviewed,
            has_vectors=self.served.is_of_start,
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
        if self.writer.model == DEFAULT_WRITER and self.served.start == MULTILINGUAL_STUDENT:
            self._note(f"{DEFAULT_WRITER} writes English, and the documents seem to be in another language")
        writer = load_writer(self.writer, device=self.device, dtype=self.dtype)
        report = write_queries(
            self.served.passages,
            writer,
            DraftStore(self.folder.drafts, writer.fingerprint),
            config=self.writer,
            budget=WritingBudget(seconds, settings.max_tokens, settings.max_cost, settings.max_queries),
            kinds=settings.kinds,
            examples=settings.examples,
            seed=settings.seed,
        )
        content = {
            "corpus": self.served.key,
            "request": self._writing_request,
            "hours": settings.hours,
            "writer": writer.fingerprint,
            "report": asdict(report),
        }
        write_json(self.folder.finished_writing, content)
        return report

    def review(self, seconds: float = math.inf) -> Review:
        """Review the written queries, of which a teacher reads as many as it has time for, and write the audit page."""
        teacher, placement = None, HERE
        if self.settings.teacher is not None:
            from d2llm.models.teachers.pair_teacher import load_teacher

            load = partial(load_teacher, self.settings.teacher, device=self.device, dtype=self.dtype)
            teacher, placement = place_teacher(self.settings.teacher, load, self.runner, device=self.device)
        written = parse_json(self.folder.finished_writing.read_text(encoding="utf-8"))
        review = review_queries(
            DraftStore(self.folder.drafts, written["writer"]),
            self.served.passages,
            self.served.index,
            task=self.served.task,
            teacher=teacher,
            label_store=self.folder.labels,
            seconds=seconds,
            settings=self.settings.critic,
            placement=placement,
        )
        if review.num_unscored:
            self._note(f"the teacher had no time to read {review.num_unscored:,} of the queries that were kept")
        if review.num_ungraded:
            self._note(
                f"the teacher gave no grade to {review.num_ungraded:,} of the queries that passed the search, so they "
                "are kept as they are"
            )
        texts = {passage.id: passage.full_text for passage in self.served.passages}
        write_bytes(self.folder.audit_page, audit_page(review, texts, seed=self.settings.seed).encode())
        return review

    def make_data(self, review: Review) -> dict[str, DataReport]:
        """Write the data sets to train and measure on: the reviewed queries, and the users' own if there are any."""
        seed = self.settings.seed
        users: dict[str, DataReport] = {}
        trained_on: set[str] = set()
        if self.settings.judged is not None:
            judged = read_judged(Path(self.settings.judged))
            report = write_users_data(
                self.folder.users, self.served.passages, judged, self.served.index, task=self.served.task, seed=seed
            )
            if report.num_unknown:
                self._note(f"{counted(report.num_unknown, 'judged id')} of users are not in the documents")
            users = {"users": report}
            positives = read_beir(self.folder.users, splits=["train"]).positives("train")
            trained_on = {passage_id for passage_ids in positives.values() for passage_id in passage_ids}
        written = write_written_data(
            self.folder.written, self.served.passages, review.kept, trained_on=trained_on, seed=seed
        )
        return {"written": written, **users}

    def fit_weights(self, data: Mapping[str, DataReport]) -> Path:
        """The student to start from, with the weights of words in its score fitted on dev; returns its folder.

        If dev has too few queries to fit weights, the student keeps its own.
        """
        from d2llm.training.fit_scores import fit_scores

        folder = self.folder.base(self._data_key(data))
        if not is_finished(folder):
            student = self.served.load(self.served.start)
            datasets = [read_beir(self._data_folder(name), splits=["dev"]) for name in data]
            plan = self.plan(is_reviewed=True)
            fit_scores(
                student,
                datasets,
                self.served.task,
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
        teacher scores those queries whose passages the student now ranks most differently, as many as there is time
        for, and the student learns from these scores too.

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
                seconds = seconds_per_pair(
                    teacher, self.served.passages, self.served.task, device=self.device, dtype=self.dtype
                )
                with_teacher = recipe_with_teacher(recipe, str(trained), teacher, plan, seconds_per_pair=seconds)
                taught = f"{fingerprint_json([key, teacher.model_dump(mode='json')])}-taught"
                return self._finish_run(with_teacher, taught)
            except OutOfTimeError:
                self._note("there was no time to train on the teacher's scores")
                return trained

    def recipe(self, data: Mapping[str, DataReport], plan: TimePlan) -> Recipe:
        """The recipe of the training on the queries alone, for as many of them as the plan has time for.

        The training begins with the weights of ``fit_weights``.
        """
        settings = self.settings
        recipe = recipe_for_queries(
            self.served.start,
            self.served.load(self.served.start).config,
            [
                DataConfig(
                    path=str(self._data_folder(name)),
                    task=self.served.task,
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

    def _finish_run(self, recipe: Recipe, key: str) -> Path:
        """Finish a run; one that an earlier call began keeps its recipe, which the new plan would change."""
        from d2llm.training.run import Run

        begun = self.folder.run(key) / "recipe.json"
        if begun.is_file():
            recipe = parse_recipe(parse_json(begun.read_text(encoding="utf-8")), where=str(begun))
        else:
            begun.parent.mkdir(parents=True, exist_ok=True)
            write_json(begun, recipe.model_dump(mode="json"))
        run = Run(recipe, self.folder.run(key), device=self.device, dtype=self.dtype)
        if self.served.is_of_start:
            for data in recipe.data:
                if not is_finished(run.folder.plan(data)):
                    self._put_vectors(run.folder.mining_work(data))
        run.finish(runner=self.runner)
        return run.folder.student

    def _put_vectors(self, folder: Path) -> None:
        """Put the vectors of the index, which the student to start from made, into the folder in which a run mines."""
        from d2llm.training.mining.ranking import put_vectors

        view = self.served.index.view
        passages = {passage.id: passage for passage in self.served.passages}
        put_vectors(
            self.served.index.student, passages, list(passages), folder, lambda ids: view.vectors(view.rows(ids))
        )

    def compare(
        self, data: Mapping[str, DataReport], base: Path, trained: Path | None
    ) -> tuple[dict[str, EvaluationReport], GateTest | None]:
        """Compare as many systems as there is time to encode the corpus for; notes say what is left out.

        The trained student is tried even if that seems to take twice the time that is left, which has no other use.
        """
        datasets = {name: read_beir(self._data_folder(name), splits=["dev", "test"]) for name in data}
        compare = partial(compare_students, self.served, datasets, base)
        one_pass = len(self.served.passages) / (self.served.encoding_rate or passages_per_second(self.served))
        searching = seconds_per_search(self.served) * sum(report.queries["test"] for report in data.values())
        attempts = [(trained, True), (trained, False)] if trained else [(None, True)]
        ranking = [searching * searches_compared(student is not None, untuned) for student, untuned in attempts]
        ranking.append(searching * searches_compared(False, False))
        for position, (student, with_untuned) in enumerate(attempts):
            later = sum(ranking[position + 1 :])  # to rank without what is left out
            num_passes = with_untuned + (student is not None and self.served.lacks_index_of(student))
            needed = one_pass * num_passes + ranking[position]
            if student is not None and not with_untuned:
                needed /= 2
            if self.stages.seconds_left - later >= needed:
                try:
                    with time_limit(self.stages.seconds_left - later):
                        return compare(student, with_untuned=with_untuned)
                except OutOfTimeError:
                    pass
            self._note(
                "there was no time to compare with the untuned student"
                if with_untuned
                else "there was no time to compare the trained student, so the one to start from is kept"
            )
        return compare(None, with_untuned=False)

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
            stage.outcome = f"{counted(writing.num_queries, 'query')} for {counted(writing.num_answers, 'assignment')}"
        with self.stages.run("review") as stage:
            review = self.review(planned.reviewing)
            stage.outcome = f"{len(review.kept):,} kept, {len(review.rejected):,} rejected"
            data = self.make_data(review)
        with self.stages.run("weights"):
            base = self.fit_weights(data)
        trained, plan = None, self.plan(is_reviewed=True)
        num_queries = sum(report.queries["train"] for report in data.values())
        only = "only the weights of the score were fitted"
        if not is_weighted(self.served.load(base), self.served):
            only = "the student to start from remains as it is, because dev has too few queries to fit its weights too"
        if not num_queries:
            self.stages.skip("train", "no queries for it")
            self._note(f"every query to train on shares a relevant passage with a held-out one: {only}")
        elif plan.training:
            with self.stages.run("train") as stage:
                try:
                    trained = self.train(data, plan)
                    stage.outcome = f"on {counted(num_queries, 'query')}"
                except OutOfTimeError:
                    stage.outcome = "not finished: out of time"
                    self._note(f"the training was not finished in its time: {only}")
        else:
            self.stages.skip("train", "no time for it")
            self._note(f"there was no time for training: {only}")
        return _Learnt(writing, review, data, base, trained)

    def _conclude(self, learnt: _Learnt) -> FitReport:
        """Compare, keep the better student, serve it, and write the report."""
        with self.stages.run("compare") as stage:
            reports, verdict = self.compare(learnt.data, learnt.base, learnt.trained)
            is_better = verdict is not None and verdict.passed
            stage.outcome = (
                "there is no trained student" if verdict is None else f"the trained student is {outcome(verdict)}"
            )
        with self.stages.run("serve"):
            self.served.serve(learnt.trained if is_better and learnt.trained is not None else learnt.base)
        report = FitReport(
            folder=self.folder.path,
            num_passages=len(self.served.passages),
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
        self.folder.write_manifest(self.documents, self.served.start, kept=report.kept)
        return report

    def _check_teacher(self) -> None:
        """Find out about a teacher that cannot be used before queries are written for hours.

        One at an endpoint gets a trial request, and recorded grades are read; others are looked for.
        """
        from d2llm.models.teachers.pair_teacher import asks_endpoint, identify_teacher, load_teacher

        teacher = self.settings.teacher
        if teacher is not None:
            identify_teacher(teacher)
            if asks_endpoint(teacher):
                load_teacher(teacher, device=self.device, dtype=self.dtype)

    def _begin(self) -> None:
        """Make the folder, or prepare a finished one for learning anew."""
        was_finished = self.folder.is_finished
        self.folder.write_manifest(self.documents, self.served.start)
        self.folder.work.mkdir(exist_ok=True)
        if was_finished:
            self.folder.finished_writing.unlink(missing_ok=True)  # the same documents may get more queries

    def _finished_writing(self) -> WritingReport | None:
        """The report of an earlier call that finished the writing for these documents, settings and as much time."""
        if not self.folder.finished_writing.is_file():
            return None
        written = parse_json(self.folder.finished_writing.read_text(encoding="utf-8"))
        is_same = written["corpus"] == self.served.key and written["request"] == self._writing_request
        return WritingReport(**written["report"]) if is_same and self.settings.hours <= written["hours"] else None

    @property
    def _writing_request(self) -> str:
        """Identifies what is asked of the writer, but for the time."""
        settings = self.settings
        limits = [settings.max_tokens, settings.max_cost, settings.max_queries]
        writer = self.writer.model_dump(mode="json")
        return fingerprint_json([writer, dict(settings.kinds), settings.examples, limits, settings.seed])

    def _data_folder(self, name: str) -> Path:
        return self.folder.written if name == "written" else self.folder.users

    def _data_key(self, data: Mapping[str, DataReport]) -> str:
        """Identifies what is trained on: the data sets' content and the student to start from."""
        content = [
            fingerprint_files(sorted(path for path in self._data_folder(name).rglob("*") if path.is_file()))
            for name in data
        ]
        return fingerprint_json([content, self.served.start, self.served.task, self.settings.seed])

    def _note(self, note: str) -> None:
        self.notes.append(note)
        remarks.warning("fit: %s", note)
