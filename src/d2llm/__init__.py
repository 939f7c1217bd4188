"""D2LLM: semantic search with students that were distilled from large language models.

    >>> from d2llm import Index
    >>> with Index.create("tea.index", "d2llm-minilm") as index:
    ...     passages = [{"id": "tea", "text": "Green tea is hot."}, {"id": "bees", "text": "Bees make honey."}]
    ...     report = index.upsert(passages)
    ...     for result in index.search("what do bees make?", top_k=1):
    ...         print(result.rank, result.passage.id)
    1 bees

searching:
    Index               a folder of passages that can be searched and changed
    IndexSpec           what a new index is to be: formats of vectors, fields of metadata, shards
    SearchSettings      how to search: number of results, filter, sources, explanation
    Passage             a text that can be found, with its id, title and metadata
    Query               a text to search for, with its id
    Ranking             the results of a query, best first
    encode              make the index of a corpus, also on several machines
    find_documents      the documents of files and folders
    sync_documents      bring an index up to date with files and folders

models:
    Student             the model that makes vectors and scores pairs: load, encode, rank, save
    Teacher             a large model that reads a query and a passage together
    export              write a student for other programs: ONNX, sentence-transformers, Vespa

training:
    Recipe              everything that shapes a training run
    load_recipe         the recipe in a TOML file
    Run                 the steps from a recipe to a student, in a folder
    distill             train a student
    Loss                the base of losses, also of one of your own
    fit                 a student and an index from documents alone
    FitSettings         how ``fit`` works

measuring:
    Dataset             a corpus with queries and relevance judgements
    open_data           a data set from its files, in any layout
    evaluate            compare a student with other systems on a data set
    EvaluationSettings  what ``evaluate`` measures

the rest:
    D2LLMError          the base of all errors
    showing_progress    show progress bars within a block, or none

One text gives one result, a list gives a list: ``index.search``, ``student.encode_query``, ``student.encode_document``.
``help(d2llm.Index)``, of any name, has its arguments, shapes, errors and an example. Everything else is in submodules:
rerankers, query expansion, writers, label stores, fitted scores, shards, sizes; docs/cli.md names the function of each
verb.

Names are imported on first use, so ``import d2llm`` is quick and does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2llm.core.lazy_names import lazy_names
from d2llm.core.machine import limit_spinning

if TYPE_CHECKING:
    from d2llm.core.errors import D2LLMError as D2LLMError
    from d2llm.core.progress import showing_progress as showing_progress
    from d2llm.core.types import Passage as Passage
    from d2llm.core.types import Query as Query
    from d2llm.core.types import Ranking as Ranking
    from d2llm.data.beir import Dataset as Dataset
    from d2llm.data.documents import find_documents as find_documents
    from d2llm.data.open_data import open_data as open_data
    from d2llm.evaluation.evaluate import evaluate as evaluate
    from d2llm.evaluation.settings import EvaluationSettings as EvaluationSettings
    from d2llm.fitting.fit import fit as fit
    from d2llm.fitting.settings import FitSettings as FitSettings
    from d2llm.models.export.export import export as export
    from d2llm.models.student import Student as Student
    from d2llm.models.teachers.teacher import Teacher as Teacher
    from d2llm.recipe import Recipe as Recipe
    from d2llm.recipe.losses import Loss as Loss
    from d2llm.recipe.recipe import load_recipe as load_recipe
    from d2llm.retrieval.encode import encode as encode
    from d2llm.retrieval.index import Index as Index
    from d2llm.retrieval.settings import SearchSettings as SearchSettings
    from d2llm.retrieval.sync import sync_documents as sync_documents
    from d2llm.store.index_spec import IndexSpec as IndexSpec
    from d2llm.training.distill import distill as distill
    from d2llm.training.run import Run as Run

__version__ = "0.1.0"
limit_spinning()

_HOME_OF = {
    "D2LLMError": "d2llm.core.errors",
    "Dataset": "d2llm.data.beir",
    "EvaluationSettings": "d2llm.evaluation.settings",
    "FitSettings": "d2llm.fitting.settings",
    "Index": "d2llm.retrieval.index",
    "IndexSpec": "d2llm.store.index_spec",
    "Loss": "d2llm.recipe.losses",
    "Passage": "d2llm.core.types",
    "Query": "d2llm.core.types",
    "Ranking": "d2llm.core.types",
    "Recipe": "d2llm.recipe",
    "Run": "d2llm.training.run",
    "SearchSettings": "d2llm.retrieval.settings",
    "Student": "d2llm.models.student",
    "Teacher": "d2llm.models.teachers.teacher",
    "distill": "d2llm.training.distill",
    "encode": "d2llm.retrieval.encode",
    "evaluate": "d2llm.evaluation.evaluate",
    "export": "d2llm.models.export.export",
    "find_documents": "d2llm.data.documents",
    "fit": "d2llm.fitting.fit",
    "load_recipe": "d2llm.recipe.recipe",
    "open_data": "d2llm.data.open_data",
    "showing_progress": "d2llm.core.progress",
    "sync_documents": "d2llm.retrieval.sync",
}
"""The public names and where they are. Type checkers read the imports above."""

__getattr__, __dir__ = lazy_names(globals(), _HOME_OF, "__version__")
