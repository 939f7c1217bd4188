"""A student as an application of Vespa: a schema, a rank profile for each task, and the graphs that it computes.

The vectors of passages and queries, and those of their tokens, come from d2llm (``Student.encode_with_tokens``); Vespa
stores, searches and ranks. A rank profile has three phases: the inner product of the vectors; the student's score, with
its interaction as an ONNX graph and MaxSim over token embeddings; and the words. Vespa has its own BM25, so that part
is not the one of an index of d2llm: it is scaled to [0, 1] over the passages that are ranked again.

Written by the documentation of Vespa 8: reference/schemas/schemas, ranking/onnx, ranking/phased-ranking.
"""

from __future__ import annotations

from pathlib import Path

from d2llm.core.errors import InputError
from d2llm.core.types import TASKS, Task
from d2llm.models.export.graphs import write_score_graph
from d2llm.models.interaction import CosineHead
from d2llm.models.student import Student

RERANKED = 200
"""Candidates whose full score is computed."""

_SERVICES = """\
<?xml version="1.0" encoding="UTF-8"?>
<services version="1.0">
  <container id="default" version="1.0">
    <search/>
    <document-api/>
  </container>
  <content id="passages" version="1.0">
    <redundancy>1</redundancy>
    <documents>
      <document type="passage" mode="index"/>
    </documents>
    <nodes>
      <node distribution-key="0" hostalias="node1"/>
    </nodes>
  </content>
</services>
"""
_SCHEMA = """\
schema passage {{
  document passage {{
    field id type string {{
      indexing: attribute | summary
    }}
    field title type string {{
      indexing: index | summary
      index: enable-bm25
    }}
    field text type string {{
      indexing: index | summary
      index: enable-bm25
    }}
    field vector type tensor<float>(x[{dim}]) {{
      indexing: attribute | index
      attribute {{
        distance-metric: dotproduct
      }}
    }}
{tokens}  }}
  fieldset default {{
    fields: title, text
  }}
{profiles}}}
"""
_TOKENS = """\
    field tokens type tensor<bfloat16>(token{{}}, x[{dim}]) {{
      indexing: attribute
    }}
"""
_PROFILE = """\
  rank-profile {task} {{
    inputs {{
{inputs}
    }}
{functions}
    first-phase {{
      expression: inner_product
    }}
    second-phase {{
      rerank-count: {reranked}
      expression: student
    }}
    global-phase {{
      rerank-count: {reranked}
      expression: student + query(words_weight) * normalize_linear(words)
    }}
    match-features: student words
  }}
"""
_ONNX = """\
    onnx-model head {{
      file: models/{file}
      input query_vectors: query(vector)
      input passage_vectors: passage_vectors
      output logits: logits
    }}
"""


def write_vespa(student: Student, folder: Path) -> None:
    """Write an application package into a folder.

    Raises:
        InputError: the student has no inner product, by which Vespa could search.
        MissingExtraError: the student has an interaction, and ``onnx`` is not installed.
    """
    if not student.has_dot:
        raise InputError("Vespa searches by an inner product, which a student with the head 'paper' does not have")
    (folder / "schemas").mkdir()
    (folder / "services.xml").write_text(_SERVICES, encoding="utf-8")
    profiles = "".join(_profile(student, task) for task in TASKS)
    tokens = _TOKENS.format(dim=student.token_dim) if student.token_dim else ""
    schema = _SCHEMA.format(dim=student.vector_dim, tokens=tokens, profiles=profiles)
    (folder / "schemas" / "passage.sd").write_text(schema, encoding="utf-8")
    for task in TASKS:
        if _needs_graph(student, task):
            (folder / "models").mkdir(exist_ok=True)
            write_score_graph(student.interaction, task, folder / "models" / _graph_name(task))


def _needs_graph(student: Student, task: Task) -> bool:
    return not isinstance(student.interaction, CosineHead) and student.interaction.has_interaction(task)


def _graph_name(task: Task) -> str:
    return f"score_{task}.onnx"


def _profile(student: Student, task: Task) -> str:
    """A rank profile, with the weights of the student's score features."""
    terms = student.feature_weights(task, stored=("token",) if student.token_dim else ()).terms
    maxsim = terms.get("maxsim", 0.0)
    words = sum(terms.get(term, 0.0) for term in ("bm25_fraction", "window_bm25_fraction"))
    inputs = [  # the same in each task, so that one query suits both
        f"query(dot) tensor<float>(x[{student.vector_dim}])",
        f"query(vector) tensor<float>(d0[1], d1[{student.vector_dim}])",
        *([f"query(tokens) tensor<float>(query_token{{}}, x[{student.token_dim}])"] if student.token_dim else []),
        f"query(words_weight) double: {words:.4f}",
    ]
    functions = {
        "inner_product": "sum(query(dot) * attribute(vector))",
        "words": "bm25(title) + bm25(text)",
        "student": "inner_product",
    }
    graph = ""
    if _needs_graph(student, task):
        functions["passage_vectors"] = "tensor<float>(d0[1])(1) * rename(attribute(vector), x, d1)"
        functions["student"] = "onnx(head).logits{d0:0, d1:0}"
        graph = _ONNX.format(file=_graph_name(task))
    if maxsim:
        functions["maxsim"] = "sum(reduce(sum(query(tokens) * attribute(tokens), x), max, token), query_token)"
        functions["student"] += f" + {maxsim:.4f} * maxsim"
    definitions = "".join(
        f"    function {name}() {{\n      expression: {expression}\n    }}\n" for name, expression in functions.items()
    )
    return _PROFILE.format(
        task=task,
        inputs="\n".join(f"      {line}" for line in inputs),
        functions=(graph + definitions).rstrip("\n"),
        reranked=RERANKED,
    )
