"""Every public function that takes a list reads one string, path or object as a list of one, or refuses it.

The first test walks the public interface (d2llm's public names and their methods, and the adapters), so that a new
argument that is a list needs a case here.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

import d2llm
import d2llm.integrations
from d2llm import (
    Dataset,
    EvaluationSettings,
    FitSettings,
    Index,
    Passage,
    Run,
    SearchSettings,
    Student,
    Teacher,
    distill,
)
from d2llm.core.errors import D2LLMError, InputError
from d2llm.core.settings import Settings
from d2llm.data.beir import read_beir
from d2llm.data.label_sets import merge_labels
from d2llm.data.pairs import read_pairs
from d2llm.data.plan import TrainingPlan, TrainingSource
from d2llm.data.trec import TrecRun
from d2llm.evaluation.contenders import Contenders, load_contenders
from d2llm.fitting.fit import Fit
from d2llm.models.backbone import Backbone
from d2llm.models.listwise_reader import ListwiseReader
from d2llm.models.writers.writer import Assignment, WrittenQueries
from d2llm.recipe import BackboneConfig, TeacherConfig
from d2llm.retrieval.expansion import Expansion
from d2llm.training.distill_static import distill_static
from d2llm.training.fit_probabilities import fit_probabilities
from d2llm.training.fit_score_features import fit_score_features
from d2llm.training.fit_scores import fit_scores
from d2llm.training.fit_tokens import fit_tokens
from d2llm.training.tune_reader import tune_reader
from d2llm.training.tune_writer import tune_writer
from e2e.command_line import write_data
from fake_models import FakeStudent, FakeTeacher
from tiny_data import everyday
from tiny_models import tiny_student_config, write_tiny_model, write_trained_student

LIST = re.compile(r"\b(Iterable|Iterator|Sequence|Collection|list|tuple|set|frozenset|List|Tuple|Set)\[")
RESULTS = {"AnswerContext", "Excerpt", "Explanation", "PairDataset", "RankedPassage", "Ranking"}
"""Classes that d2llm makes and callers read."""
OTHERS = {
    "Backbone.pad.ids": "rows of numbers",
    "Backbone.states_at.depths": "numbers",
    "Dataset.issues": "made by readers of data sets",
    "Index.add.readers": "workers, not a list",
    "Index.upsert.readers": "workers, not a list",
    "Index.upsert_documents.readers": "workers, not a list",
    "ListwiseReader.rank.vectors": "arrays",
    "ListwiseReader.step_logits.orders": "rows of numbers",
    "ListwiseReader.step_logits.texts": "rows of texts",
    "Student.encode_token_rows.ids": "rows of numbers",
    "Student.encode_token_rows.starts": "numbers",
    "Student.encode_tokens.ids": "rows of numbers",
    "langchain.D2LLMRetriever.tags": "LangChain's own, checked by pydantic",
    "llama_index.D2LLMRetriever.objects": "LlamaIndex's own",
    "mteb_run.MtebReport.rows": "made by run_mteb",
    "mteb.scores_with_interaction.tasks": "made by mteb, which returns lists",
    "sentence_transformers.StudentWithTokens.encode_chunks.texts": "passed on to the student's",
    "sentence_transformers.StudentWithTokens.encode_passages.texts": "passed on to the student's",
    "sentence_transformers.StudentWithTokens.encode_queries.texts": "passed on to the student's",
    "sentence_transformers.StudentWithTokens.encode_with_tokens.texts": "passed on to the student's",
    "sentence_transformers.StudentWithTokens.feature_weights.stored": "passed on to the student's",
    "sentence_transformers.StudentWithTokens.term_factors.queries": "passed on to the student's",
}


ELSEWHERE = {
    "d2llm.data.beir": ("read_beir",),
    "d2llm.data.label_sets": ("count_labels", "export_labels", "merge_labels"),
    "d2llm.data.pairs": ("PairDataset", "read_pairs"),
    "d2llm.evaluation.contenders": ("Contenders", "load_contenders"),
    "d2llm.fitting.fit": ("Fit",),
    "d2llm.models.backbone": ("Backbone",),
    "d2llm.models.listwise_reader": ("ListwiseReader",),
    "d2llm.training.distill_static": ("distill_static",),
    "d2llm.models.teachers.pair_teacher": ("load_teacher",),
    "d2llm.models.writers.writer": ("Assignment", "load_writer"),
    "d2llm.ops.gating": ("non_inferior",),
    "d2llm.recipe": ("ReaderTuningConfig", "TeacherConfig", "WriterConfig", "WriterTuningConfig"),
    "d2llm.retrieval.chunking": ("Chunker",),
    "d2llm.retrieval.expansion": ("Expansion",),
    "d2llm.retrieval.rewriting": ("Rewriter",),
    "d2llm.retrieval.reranker": ("Reranker", "TeacherReranker", "open_reranker"),
    "d2llm.retrieval.shard": ("shard",),
    "d2llm.sizing.plan": ("SizePlan",),
    "d2llm.sizing.size": ("size",),
    "d2llm.store.index_manifest": ("Chunking",),
    "d2llm.training.check_data": ("check_data",),
    "d2llm.training.fit_score_features": ("fit_score_features",),
    "d2llm.training.fit_probabilities": ("fit_probabilities",),
    "d2llm.training.fit_scores": ("fit_scores",),
    "d2llm.training.fit_tokens": ("fit_tokens",),
    "d2llm.training.gate": ("read_gate",),
    "d2llm.training.starting_recipe": ("starting_recipe",),
    "d2llm.training.tune_reader": ("tune_reader",),
    "d2llm.training.tune_writer": ("tune_writer",),
}
"""What users call in submodules, besides the names of ``d2llm`` itself."""
PUBLIC: dict[str, Any] = {name: getattr(d2llm, name) for name in dir(d2llm)} | {
    name: getattr(importlib.import_module(module), name) for module, names in ELSEWHERE.items() for name in names
}


def parameters(function: Any, name: str) -> Iterator[str]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some classes in C have none
        return
    for parameter in signature.parameters.values():
        if LIST.search(str(parameter.annotation)):
            yield f"{name}.{parameter.name}"


def own_methods(cls: type) -> dict[str, Any]:
    """The methods that d2llm defines, also in base classes, but not those of other libraries."""
    classes = [each for each in reversed(cls.__mro__) if each.__module__.startswith("d2llm")]
    return {name: member for each in classes for name, member in vars(each).items()}


def walk() -> set[str]:
    objects = dict(PUBLIC)
    for module in pkgutil.iter_modules(d2llm.integrations.__path__):
        loaded = importlib.import_module(f"d2llm.integrations.{module.name}")
        if module.name in {"texts", "filters"}:  # what the adapters share
            continue
        for name, value in vars(loaded).items():
            if not name.startswith("_") and getattr(value, "__module__", "") == loaded.__name__:
                objects[f"{module.name}.{name}"] = value
    found: set[str] = set()
    for name, value in objects.items():
        if name in RESULTS or not callable(value):
            continue
        of_a_file = inspect.isclass(value) and issubclass(value, BaseModel) and not issubclass(value, Settings)
        if not of_a_file or name.count("."):
            found.update(parameters(value, name))
        for method, function in own_methods(value).items() if inspect.isclass(value) else ():
            plain = getattr(function, "__func__", function)
            if not method.startswith("_") and inspect.isfunction(plain):
                found.update(parameters(plain, f"{name}.{method}"))
    return found


class FakeWriter:
    """Writes nothing but the query in capitals."""

    fingerprint = "fake-writer"

    def write(self, assignments: Any, *, advance: Any = None) -> list[WrittenQueries]:
        return [WrittenQueries((each.passage.upper(),), 1, 1) for each in assignments]


@dataclass
class World:
    """What the calls need; each is made when it is first used. ``new`` is an empty folder for each call."""

    root: Path
    number: int = 0

    def new(self) -> Path:
        self.number += 1
        return self.root / f"new-{self.number}"

    @cached_property
    def fake(self) -> FakeStudent:
        return FakeStudent()

    def index(self) -> Index:
        index = Index.create(self.new(), self.fake)
        texts = {n: f"the text {n}" for n in (1, 2, 12)}
        index.upsert(
            [Passage(f"{n}", text, document_id=f"d{n % 2}", metadata={"year": 2000 + n}) for n, text in texts.items()]
        )
        return index

    @cached_property
    def student_folder(self) -> Path:
        return write_trained_student(self.root / "trained")

    @cached_property
    def student(self) -> Student:
        return Student.load(self.student_folder, device="cpu", dtype="float32")

    @cached_property
    def teacher(self) -> Teacher:
        return Teacher.load(f"cosine:{self.student_folder}", device="cpu")

    @cached_property
    def data(self) -> Path:
        return write_data(self.root / "data")

    @cached_property
    def dataset(self) -> Dataset:
        return read_beir(self.data)

    @cached_property
    def reader(self) -> ListwiseReader:
        model = write_tiny_model(self.root / "reader")
        backbone = Backbone.load(BackboneConfig(model=str(model)), device="cpu", dtype="float32")
        return ListwiseReader(backbone, 6, "a-student", steps=2).eval()

    @cached_property
    def texts_folder(self) -> Path:
        folder = self.root / "texts"
        folder.mkdir()
        for name in ("12.md", "1.md", "2.txt"):
            (folder / name).write_text(f"# A title\n\nThe text of {name}.\n")
        return folder

    def run(self) -> Run:
        recipe = d2llm.Recipe(
            student=tiny_student_config(write_tiny_model(self.new())), data=({"path": str(self.data)},)
        )
        return Run(recipe, self.new())


def adapter(name: str) -> Any:
    pytest.importorskip({"mteb_run": "mteb"}.get(name, name))
    return importlib.import_module(f"d2llm.integrations.{name}")


def langchain(name: str) -> Any:
    pytest.importorskip("langchain_core")
    return getattr(importlib.import_module("d2llm.integrations.langchain"), name)


def haystack(name: str, world: World) -> Any:
    return getattr(adapter("haystack"), name)(str(world.student_folder), device="cpu")


def llama_index(world: World, **options: Any) -> Any:
    pytest.importorskip("llama_index.core")
    retriever = importlib.import_module("d2llm.integrations.llama_index").D2LLMRetriever
    return [each.node.node_id for each in retriever(world.index(), **options).retrieve("text")]


def document_of_langchain() -> Any:
    pytest.importorskip("langchain_core")
    return importlib.import_module("langchain_core.documents").Document(page_content="a text")


def document_of_haystack() -> Any:
    pytest.importorskip("haystack")
    return importlib.import_module("haystack").Document(id="1", content="a text")


def mteb_model(world: World) -> Any:
    pytest.importorskip("mteb")
    return adapter("mteb").load_mteb_model(world.student_folder, device="cpu", work_folder=world.new())


def mteb_arguments(**changes: Any) -> dict[str, Any]:
    """What mteb gives with every call."""
    from integrations.test_mteb import describe

    described = {
        "task_metadata": describe("Local", "Retrieval", "ndcg_at_10"),
        "hf_split": "test",
        "hf_subset": "default",
    }
    return {name: value for name, value in (described | {"encode_kwargs": {}} | changes).items() if value is not None}


def mteb_search(world: World, queries: Any, **options: Any) -> Any:
    model = mteb_model(world)
    model.index([{"id": "12", "text": "a text"}, {"id": "1", "text": "another"}], **mteb_arguments())
    return model.search(queries, top_k=2, **mteb_arguments(), **options)


def mteb_values(world: World, **options: Any) -> list[float]:
    pytest.importorskip("mteb")
    report = adapter("mteb_run").run_mteb(world.student_folder, out=world.new(), device="cpu", **options)
    return [row.value for row in report.rows]


def distilled(world: World, sources: Any, closed_gates: Any = ()) -> Any:
    recipe = d2llm.Recipe(teacher=TeacherConfig(model="gone"))
    labels = world.root / "labels"
    return distill(
        sources, world.new(), recipe=recipe, labels=labels, teacher=recipe.teacher, closed_gates=closed_gates
    )


def deleted(world: World, method: str, ids: Any) -> Any:
    index = world.index()
    return getattr(index, method)(ids), index.list_passages()


def make_student_index(world: World) -> Index:
    index = Index.create(world.new(), world.student)
    index.upsert([Passage("12", "the text", metadata={"year": 2012})])
    return index


def upserted(world: World, method: str, passages: Any) -> Any:
    index = world.index()
    if method == "upsert_documents":
        index = Index.create(world.new(), world.student)
    getattr(index, method)(passages)
    return [dataclasses.replace(each) for each in index.get(index.list_passages())]


def listed(result: Any) -> list[Any]:
    """The results of a function that gives one result for one value, and a list for a list."""
    return result if isinstance(result, list) else [result]


One = Callable[[World], Any]
Call = Callable[[World, Any], Any]
CASES: dict[str, tuple[One, Call]] = {
    "Assignment.examples": (lambda _: "ab", lambda _, v: Assignment("a passage", "question", examples=v)),
    "Assignment.history": (lambda _: "ab", lambda _, v: Assignment("a query", "standalone", history=v)),
    "Backbone.first_own_tokens.texts": (lambda _: "ab", lambda w, v: w.student.backbone.first_own_tokens(v, "")),
    "Backbone.tokenize.texts": (lambda _: "ab", lambda w, v: w.student.backbone.tokenize(v, "query")),
    "Contenders.notes": (lambda _: "ab", lambda w, v: Contenders(w.fake, notes=v).notes),
    "Contenders.runs": (
        lambda _: TrecRun("ab", {"q": ("p",)}, {"q": {"p": 1.0}}),
        lambda w, v: Contenders(w.fake, runs=v).runs,
    ),
    "Contenders.trained_on": (lambda _: "ab", lambda w, v: Contenders(w.fake, trained_on={"a student": v}).trained_on),
    "Dataset.relevant_passages.splits": (lambda _: "train", lambda w, v: w.dataset.relevant_passages(v)),
    "Dataset.unshared_positives.others": (lambda _: "dev", lambda w, v: w.dataset.unshared_positives("train", v)),
    "EvaluationSettings.stored_as": (lambda _: "int8", lambda _, v: EvaluationSettings(stored_as=v)),
    "Expansion.expand.queries": (
        lambda _: "ab",
        lambda _, v: [each.texts for each in listed(Expansion(FakeWriter()).expand(v))],
    ),
    "Fit.documents": (lambda w: w.texts_folder, lambda w, v: Fit(v, w.root / "fit").documents),
    "FitSettings.examples": (lambda _: "ab", lambda _, v: FitSettings(examples=v)),
    "FitSettings.exclude": (lambda _: "ab", lambda _, v: FitSettings(exclude=v).exclude),
    "Index.add.passages": (lambda _: Passage("ab", "a text"), lambda w, v: upserted(w, "add", v)),
    "Index.around.results": (
        lambda w: w.index().search("text").passages[0],
        lambda w, v: [each.passages for each in w.index().around(v)],
    ),
    "Index.build_ann.queries": (lambda _: "ab", lambda w, v: w.index().build_ann(queries=v)),
    "Index.context.facets": (lambda _: "year", lambda w, v: make_student_index(w).context("text", facets=v).text),
    "Index.search.facets": (lambda _: "year", lambda w, v: w.index().search("text 12", facets=v).facets),
    "SearchSettings.facets": (lambda _: "year", lambda _, v: SearchSettings(facets=v)),
    "Index.context.sources": (lambda _: "bm25", lambda w, v: make_student_index(w).context("text", sources=v).text),
    "Index.search.sources": (
        lambda _: "bm25",
        lambda w, v: [each.passage.id for each in w.index().search("text 12", sources=v).passages],
    ),
    "Index.delete.ids": (lambda _: "12", lambda w, v: deleted(w, "delete", v)),
    "Index.delete_documents.ids": (lambda _: "d1", lambda w, v: deleted(w, "delete_documents", v)),
    "Index.get.ids": (lambda _: "12", lambda w, v: w.index().get(v)),
    "Index.measure_error.queries": (lambda _: "ab", lambda w, v: w.index().measure_error(FakeTeacher(), v)),
    "Index.missing.ids": (lambda _: "34", lambda w, v: w.index().missing(v)),
    "Index.search.queries": (
        lambda _: "text 12",
        lambda w, v: [[each.passage.id for each in one.passages] for one in listed(w.index().search(v))],
    ),
    "Index.upsert.passages": (lambda _: Passage("ab", "a text"), lambda w, v: upserted(w, "upsert", v)),
    "Index.upsert_documents.documents": (
        lambda _: Passage("ab", "a text"),
        lambda w, v: upserted(w, "upsert_documents", v),
    ),
    "ListwiseReader.rank.queries": (
        lambda _: "a",
        lambda w, v: [each.order for each in w.reader.rank(v, [np.eye(3, 6, dtype=np.float32)])],
    ),
    "ListwiseReader.repetition_loss.texts": (
        lambda _: "a",
        lambda w, v: w.reader.repetition_loss(
            v, np.eye(1, 6, dtype=np.float32), lambda states: states @ states.new_ones(states.shape[1], 1_000)
        ),
    ),
    "ListwiseReader.step_logits.queries": (
        lambda _: "a",
        lambda w, v: w.reader.step_logits(v, np.eye(3, 6, dtype=np.float32)[None], [[0, 1]]),
    ),
    "Run.ablate.variants": (lambda _: "gone", lambda w, v: w.run().ablate(variants=v)),
    "Run.alternate.beside": (lambda _: "gone", lambda w, v: w.run().alternate(beside=v)),
    "Run.data": (lambda w: f"data={w.data}", lambda w, v: Run(w.run().recipe, w.root / "run", data=v).recipe.data),
    "Run.filter.closed": (lambda _: "data", lambda w, v: w.run().filter(v)),
    "Run.ensemble.members": (lambda _: TeacherConfig(model="gone"), lambda w, v: w.run().ensemble(v)),
    "SearchSettings.sources": (lambda _: "bm25", lambda _, v: SearchSettings(sources=v)),
    "Student.encode_chunks.texts": (lambda _: "ab", lambda w, v: w.student.encode_chunks(v)),
    "Student.encode_document.texts": (lambda _: "ab", lambda w, v: np.atleast_2d(w.student.encode_document(v))),
    "Student.encode_query.texts": (lambda _: "ab", lambda w, v: np.atleast_2d(w.student.encode_query(v))),
    "Student.predict.pairs": (lambda _: ("a", "b"), lambda w, v: w.student.predict(v)),
    "Student.rank.passages": (lambda _: "ab", lambda w, v: [each.passage for each in w.student.rank("a", v)]),
    "Student.encode_passages.texts": (lambda _: "ab", lambda w, v: w.student.encode_passages(v).vectors),
    "Student.encode_queries.texts": (lambda _: "ab", lambda w, v: w.student.encode_queries(v).vectors),
    "Student.encode_with_tokens.texts": (lambda _: "ab", lambda w, v: w.student.encode_with_tokens(v, "query")),
    "Student.feature_weights.stored": (
        lambda _: "window",
        lambda w, v: w.student.feature_weights("asymmetric", stored=v),
    ),
    "Student.fit_pooling.passages": (lambda _: "ab", lambda w, v: w.student.fit_pooling(v)),
    "Student.term_factors.queries": (lambda _: "ab", lambda w, v: w.student.term_factors(v)),
    "Student.term_states.queries": (lambda _: "ab", lambda w, v: w.student.term_states(v)),
    "Student.tokenize.texts": (lambda _: "ab", lambda w, v: w.student.tokenize(v, "query").ids),
    "Teacher.score_pairs.pairs": (lambda _: "ab", lambda w, v: w.teacher.score_pairs(v, "asymmetric").log_odds),
    "Teacher.score_until_error.pairs": (lambda _: "ab", lambda w, v: w.teacher.score_until_error(v, "asymmetric")),
    "Teacher.score.pairs": (lambda _: "ab", lambda w, v: w.teacher.score(v)),
    "distill.closed_gates": (lambda _: "data", lambda w, v: distilled(w, [], v)),
    "distill.sources": (
        lambda w: TrainingSource(w.dataset, TrainingPlan((), {}), "asymmetric"),
        lambda w, v: distilled(w, v),
    ),
    "distill_static.passages": (
        lambda _: "ab",
        lambda w, v: distill_static(w.student.backbone, v, w.new(), smoothing=0.001),
    ),
    "encode.corpus": (lambda _: Passage("ab", "a text"), lambda w, v: d2llm.encode(v, w.fake, w.new()).num_passages),
    "evaluate.indexes": (
        lambda w: w.root / "gone",
        lambda w, v: d2llm.evaluate(w.dataset, Contenders(w.fake), indexes=v),
    ),
    "find_documents.exclude": (
        lambda _: "*.md",
        lambda w, v: [each.id for each in d2llm.find_documents([w.texts_folder], exclude=v).files],
    ),
    "find_documents.paths": (
        lambda w: str(w.texts_folder),
        lambda _, v: [each.id for each in d2llm.find_documents(v).files],
    ),
    "fit.examples": (lambda _: "ab", lambda _, v: FitSettings.of(examples=v)),
    "fit.exclude": (lambda _: "ab", lambda _, v: FitSettings.of(exclude=v).exclude),
    "fit.documents": (lambda w: w.root / "gone", lambda w, v: d2llm.fit(v, w.root / "fit-of-nothing")),
    "fit_score_features.judged": (
        lambda _: (everyday(), "asymmetric"),
        lambda w, v: fit_score_features(w.student, v).model_dump(),
    ),
    "fit_score_features.terms": (
        lambda _: "bm25",
        lambda w, v: fit_score_features(w.student, [(everyday(), "asymmetric")], terms=v).model_dump(),
    ),
    "fit_probabilities.judged": (
        lambda _: (everyday(), "asymmetric"),
        lambda w, v: fit_probabilities(w.student, v).model_dump(),
    ),
    "fit_scores.data": (lambda _: everyday(), lambda w, v: fit_scores(w.student, v, "asymmetric", token_vectors=True)),
    "fit_tokens.datasets": (lambda _: everyday(), lambda w, v: fit_tokens(w.student, v)),
    "fit_tokens.queries": (
        lambda _: "gone",
        lambda w, v: fit_tokens(w.student, [w.dataset], queries={w.dataset.name: v}),
    ),
    "load_contenders.models": (
        lambda _: "no-such-model",
        lambda w, v: load_contenders(w.student_folder, with_teacher=False, models=v, device="cpu"),
    ),
    "load_contenders.runs": (
        lambda w: w.root / "gone.run",
        lambda w, v: load_contenders(w.student_folder, with_teacher=False, runs=v, device="cpu"),
    ),
    "merge_labels.folders": (lambda w: w.root / "gone", lambda w, v: merge_labels(v, w.new())),
    "open_data.splits": (lambda _: "dev", lambda w, v: d2llm.open_data(w.data, splits=v).qrels),
    "read_beir.splits": (lambda _: "dev", lambda w, v: read_beir(w.data, splits=v).qrels),
    "read_pairs.splits": (lambda _: "gone", lambda w, v: read_pairs(pairs(w), splits=v).splits),
    "sync_documents.exclude": (
        lambda _: "*.md",
        lambda w, v: d2llm.sync_documents(Index.create(w.new(), w.student), [w.texts_folder], exclude=v).num_files,
    ),
    "sync_documents.paths": (
        lambda w: str(w.texts_folder),
        lambda w, v: d2llm.sync_documents(Index.create(w.new(), w.student), v).num_files,
    ),
    "tune_reader.datasets": (lambda _: everyday(), lambda w, v: tune_reader(w.student, v, w.root / "reader-out")),
    "tune_writer.datasets": (lambda _: everyday(), lambda w, v: tune_writer(v, w.root / "writer-out")),
    "haystack.D2LLMDocumentEmbedder.run.documents": (
        lambda _: document_of_haystack(),
        lambda w, v: [each.embedding for each in haystack("D2LLMDocumentEmbedder", w).run(v)["documents"]],
    ),
    "haystack.D2LLMRanker.run.documents": (
        lambda _: document_of_haystack(),
        lambda w, v: [each.score for each in haystack("D2LLMRanker", w).run("a", v)["documents"]],
    ),
    "langchain.D2LLMEmbeddings.embed_documents.texts": (
        lambda _: "ab",
        lambda w, v: langchain("D2LLMEmbeddings")(w.student).embed_documents(v),
    ),
    "langchain.D2LLMReranker.compress_documents.documents": (
        lambda _: document_of_langchain(),
        lambda w, v: len(langchain("D2LLMReranker")(student=w.student).compress_documents(v, "a")),
    ),
    "llama_index.D2LLMRetriever.doc_ids": (lambda _: "d0", lambda w, v: llama_index(w, doc_ids=v)),
    "llama_index.D2LLMRetriever.node_ids": (lambda _: "12", lambda w, v: llama_index(w, node_ids=v)),
    "mteb.D2LLMModel.encode.inputs": (
        lambda _: {"text": "ab"},
        lambda w, v: mteb_model(w).encode(v, **mteb_arguments(encode_kwargs=None)),
    ),
    "mteb.D2LLMModel.index.corpus": (
        lambda _: {"id": "12", "text": "a text"},
        lambda w, v: mteb_model(w).index(v, **mteb_arguments()),
    ),
    "mteb_run.run_mteb.symmetric": (lambda _: "data", lambda w, v: mteb_values(w, tasks=str(w.data), symmetric=v)),
    "mteb_run.run_mteb.tasks": (lambda w: str(w.data), lambda w, v: mteb_values(w, tasks=v)),
    "mteb.D2LLMModel.search.queries": (lambda _: {"id": "q", "text": "a text"}, mteb_search),
    "mteb.D2LLMModel.search.top_ranked": (
        lambda _: "12",
        lambda w, v: mteb_search(w, [{"id": "q", "text": "a text"}], top_ranked={"q": v}),
    ),
    "sentence_transformers.StudentCrossEncoder.rank.documents": (
        lambda _: "ab",
        lambda w, v: adapter("sentence_transformers").StudentCrossEncoder(w.student).rank("a", v),
    ),
    "sentence_transformers.StudentModule.preprocess.inputs": (
        lambda _: "ab",
        lambda w, v: adapter("sentence_transformers").StudentModule(w.student).preprocess(v)["input_ids"],
    ),
}


def pairs(world: World) -> Path:
    path = world.root / "train.jsonl"
    path.write_text('{"sentence1": "a", "sentence2": "b", "label": "1"}\n')
    return path


def test_every_list_of_the_public_interface_has_a_case():
    for name in ("haystack", "langchain_core", "llama_index.core", "mteb", "sentence_transformers"):
        pytest.importorskip(name)
    assert walk() == {*CASES, *OTHERS}


@pytest.fixture(autouse=True)
def unchecked_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types are checked in tests alone; what a user's call does is tried without that."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def outcome(call: Call, world: World, value: Any) -> Any:
    """The result as plain values, or the error's type and message."""
    try:
        result = call(world, value)
    except D2LLMError as error:
        return type(error), re.sub(r"new-\d+", "new", str(error))
    if hasattr(result, "tolist"):
        return result.tolist()
    return repr(result)


@pytest.mark.parametrize("name", CASES)
def test_one_value_is_a_list_of_one_or_refused(name: str, world: World):
    make, call = CASES[name]
    one = make(world)
    alone = outcome(call, world, one)
    refused = isinstance(alone, tuple) and alone[0] is InputError and " a list" in alone[1]
    assert refused or alone == outcome(call, world, [one])


@pytest.mark.parametrize("name", [name for name in CASES if name.rpartition(".")[2] not in ("corpus",)])
def test_what_is_no_list_is_refused_by_name(name: str, world: World):
    """A number, or bytes, which would be read as numbers."""
    _, call = CASES[name]
    for wrong in (7, b"12"):
        kind, message = outcome(call, world, wrong)
        assert kind is InputError
        assert " a list" in message or "but must be" in message, message


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (model, field)
        for model in PUBLIC.values()
        if inspect.isclass(model) and issubclass(model, BaseModel)
        for field, info in model.model_fields.items()
        if LIST.search(str(info.annotation))
    ],
)
def test_lists_of_recipes_refuse_a_string(model: type[BaseModel], field: str):
    with pytest.raises(ValidationError, match="valid"):
        model.model_validate({field: "ab"})
