"""The application of Vespa: its expressions, as they are written, give the student's scores of real texts.

There is no Vespa here. The schema is read by the rules of its documentation, and the few functions of tensors that it
uses are defined below: https://docs.vespa.ai/en/reference/ranking/ranking-expressions.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from d2llm import Index, Passage, export
from d2llm.core.errors import InputError
from d2llm.core.types import TASKS
from d2llm.models.student import Student
from d2llm.recipe import InteractionConfig
from late_import import late_import
from tiny_models import tiny_student_config, write_tiny_model

onnxruntime = late_import("onnxruntime", reason="pip install 'd2llm[export]'")

QUESTION = "how often is a kettle descaled?"
SCHEMA = "schemas/passage.sd"
TEXTS = (
    "A kettle is descaled every month.",
    "The night train to Vienna has two sleeping cars.",
    "Tea is served at four.",
)


@dataclass
class Tensor:
    """An array whose axes have names."""

    array: np.ndarray
    names: list[str]

    def __mul__(self, other):
        if not isinstance(other, Tensor):
            return Tensor(self.array * other, self.names)
        names = sorted({*self.names, *other.names})
        left, right = (
            np.expand_dims(
                one.array.transpose(np.argsort(one.names)),
                [index for index, name in enumerate(names) if name not in one.names],
            )
            for one in (self, other)
        )
        return Tensor(left * right, names)


def reduce(tensor, function, *names):
    axes = tuple(tensor.names.index(name) for name in names or tensor.names)
    array, left = function(tensor.array, axis=axes), [name for name in tensor.names if name not in names]
    return Tensor(array, left) if names and left else float(array)


def rename(tensor, old, new):
    return Tensor(tensor.array, [new if name == old else name for name in tensor.names])


class Profile(dict):
    """A rank profile, computed for a query and a passage: its functions by name, and names that mean themselves."""

    def __init__(self, folder, task, query, passage, **features):
        schema = (folder / "schemas" / "passage.sd").read_text()
        assert schema.count("{") == schema.count("}")
        (self.text,) = re.findall(rf"^  rank-profile {task} {{\n(.*?)^  }}", schema, re.MULTILINE | re.DOTALL)
        self.functions = dict(re.findall(r"function (\w+)\(\) {\s+expression: (.+)\n", self.text))
        self.phases = dict(re.findall(r"(\w+)-phase {[^}]*?expression: (.+)\n", self.text))
        self.inputs = dict(re.findall(r"^ +query\((\w+)\) (.+)\n", self.text, re.MULTILINE))
        assert self.inputs.keys() == query.keys()
        self.folder = folder
        super().__init__(
            query=query.__getitem__, attribute=passage.__getitem__, onnx=self.onnx, max=np.max, rename=rename,
            reduce=reduce, sum=lambda tensor, *names: reduce(tensor, np.sum, *names),
            ones=Tensor(np.ones(1, np.float32), ["d0"]), **features,
        )  # fmt: skip

    def __missing__(self, name):
        return self.value(self.functions[name]) if name in self.functions else name

    def value(self, expression):
        python = expression.replace("tensor<float>(d0[1])(1)", "ones").replace("{d0:0, d1:0}", "[0, 0]")
        return eval(python, {"__builtins__": {}}, self)

    def onnx(self, name):
        (body,) = re.findall(rf"onnx-model {name} {{\n(.*?)\n    }}", self.text, re.DOTALL)
        tensors = {given: self.value(source) for given, source in re.findall(r"input (\w+): (.+)", body)}
        assert all(tensor.names == ["d0", "d1"] for tensor in tensors.values())
        session = onnxruntime.InferenceSession(str(self.folder / re.search("file: (.+)", body)[1]))
        (logits,) = session.run(["logits"], {given: tensor.array for given, tensor in tensors.items()})
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def student():
    return Student.load("d2llm-minilm", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def application(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vespa") / "application"
    export(student, folder, "vespa")
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_the_expressions_give_the_score_without_words(student, application, task, tmp_path):
    index = Index.create(tmp_path / "index", student, vector_format="float32", token_vectors="float32")
    index.add([Passage(str(number), text) for number, text in enumerate(TEXTS)])
    maxsim = student.feature_weights(task).terms.get("maxsim", 0.0)
    ranking = index.search(QUESTION, task=task, score_features={"maxsim": maxsim} if maxsim else {})
    scores = {int(hit.passage.id): hit.score for hit in ranking}

    query, passages = (student.encode_with_tokens(*given) for given in (([QUESTION], "query"), (TEXTS, "passage")))
    (query_tokens,), tokens = query.tokens.split(), passages.tokens.split()
    values = {
        "dot": Tensor(student.query_vectors(query.vectors, task)[0], ["x"]),
        "vector": Tensor(query.vectors, ["d0", "d1"]),
        "tokens": Tensor(query_tokens / query_tokens.size, ["query_token", "x"]),
        "words_weight": 2.0,
    }
    for number, vector in enumerate(passages.vectors):
        passage = {"vector": Tensor(vector, ["x"]), "tokens": Tensor(tokens[number], ["token", "x"])}
        words = {"bm25": {"title": 0.25, "text": 1.0}.get, "normalize_linear": lambda value: value / 5}
        profile = Profile(application, task, values, passage, **words)
        assert profile.value(profile.phases["first"]) == pytest.approx(float(values["dot"].array @ vector), abs=1e-4)
        assert profile.value(profile.phases["second"]) == pytest.approx(scores[number], abs=1e-3)
        assert profile.value(profile.phases["global"]) == pytest.approx(scores[number] + 2.0 * 0.25, abs=1e-3)


def test_the_package_has_what_vespa_requires(application):
    services = ElementTree.parse(application / "services.xml").getroot()
    assert services.tag == "services"
    assert services.find("content/documents/document").get("type") == "passage"
    assert {tag.tag for tag in services.find("container")} == {"search", "document-api"}
    schema = (application / SCHEMA).read_text()
    assert schema.startswith("schema passage {\n  document passage {\n")
    assert re.findall(r"field (\w+) type (\S.*) {", schema) == [
        ("id", "string"),
        ("title", "string"),
        ("text", "string"),
        ("vector", "tensor<float>(x[384])"),
        ("tokens", "tensor<bfloat16>(token{}, x[64])"),
    ]
    assert "distance-metric: dotproduct" in schema
    for file in re.findall("file: (.+)", schema):
        assert (application / file).is_file()


def test_a_student_without_token_embeddings_and_interaction_needs_no_graph(tmp_path):
    config = tiny_student_config(write_tiny_model(tmp_path / "bert", "bert"))
    config = config.model_copy(update={"interaction": InteractionConfig(head="cosine")})
    report = export(Student.create(config, dtype="float32"), tmp_path / "out", "vespa")
    assert report.files == ("schemas/passage.sd", "services.xml")
    schema = (tmp_path / "out" / SCHEMA).read_text()
    assert "onnx" not in schema
    assert "(tokens)" not in schema


def test_a_student_without_an_inner_product_is_refused(tmp_path):
    config = tiny_student_config(write_tiny_model(tmp_path / "bert", "bert"))
    config = config.model_copy(update={"interaction": InteractionConfig(head="paper")})
    with pytest.raises(InputError, match=r"^Vespa searches by an inner product"):
        export(Student.create(config, dtype="float32"), tmp_path / "out", "vespa")
    assert not (tmp_path / "out").exists()
