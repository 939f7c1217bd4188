"""Students in plain sentence-transformers: a virtual environment of its own, in which there is no d2llm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from transformers import AutoTokenizer

from bare_environment import write_bare_environment
from d2llm import Student
from d2llm.core.recipe import InteractionConfig, PoolingConfig
from d2llm.models.hub import find_student
from e2e.command_line import fail, succeed_with_report
from fake_hub import OWNER_TOKEN, FakeHub
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

pytest.importorskip("sentence_transformers", reason="pip install 'd2llm[sentence-transformers]'")

# Longer than any limit, with spaces around, next to nothing, and words that the tokenizers take apart.
QUERIES = [*TEXTS[:4], "  spaced   out ", "a", " ".join(TEXTS * 3), "Überzählige Wörter, 123"]
PASSAGES = [*TEXTS[2:], "a", " ".join(reversed(TEXTS * 4))]
TOLERANCE = 1e-5  # of the largest number: what the card says
PROGRAM = """
import json, sys
try:
    import d2llm
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("d2llm can be imported here: " + d2llm.__file__)
import numpy as np
from sentence_transformers import SentenceTransformer

job = json.load(open(sys.argv[1]))
for name, folder in job["folders"].items():
    model = SentenceTransformer(folder, device="cpu", local_files_only=True)
    queries, passages = model.encode_query(job["queries"]), model.encode_document(job["passages"])
    np.savez(
        f"{job['out']}/{name}.npz",
        queries=queries,
        passages=passages,
        plain=model.encode(job["passages"]),
        similarity=model.similarity(queries, passages).numpy(),
    )
assert not any(module.split(".")[0] == "d2llm" for module in sys.modules)
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A shipped student of which only an adapter is kept, as it comes back from the Hub."""
    fake = FakeHub()
    root = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(root / "cache"))
        patch.setenv("HF_TOKEN", OWNER_TOKEN)
        set_client_factory(fake.client)
        result, report = succeed_with_report("push", "d2llm-minilm-cosine", "me/mine", folder=root)
        assert "sentence-transformers can load it without d2llm" in result.stderr
        assert report["result"]["needs_d2llm"] is None
        yield find_student("me/mine")
        set_client_factory(default_client_factory)


def write_student(folder: Path, architecture: str, head: str, pooling: str, **settings) -> Student:
    """One whose two sides and two tasks differ, with prefixes, lengths and a chat template; all weights are kept."""
    config = tiny_student_config(
        write_tiny_model(folder / "base", architecture),
        pooling=pooling,
        query_prefix="rain: ",
        passage_prefix=" the ",
        max_query_tokens=12,
        max_passage_tokens=40,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} says {% endfor %}"
    tokenizer.pad_token, tokenizer.padding_side = None, "left"
    tokenizer.save_pretrained(folder / "base")
    interaction = InteractionConfig(head=head, hidden_dim=16, feature_dim=8)
    config = config.model_copy(update={"pooling": PoolingConfig(method="backbone"), "interaction": interaction})
    student = Student.create(config, device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.1)
    student.eval()
    student.save(folder / "student", merge=True, **settings)
    return student


@pytest.fixture(scope="module")
def students(tmp_path_factory, pushed):
    """By name: the student, its folder, and the task whose inner product the library gets."""
    root = tmp_path_factory.mktemp("students")
    made = {
        "decoder": (write_student(root / "decoder", "llama", "anchored", "last"), "asymmetric"),
        "encoder": (write_student(root / "encoder", "bert", "anchored", "mean"), "asymmetric"),
        "first": (write_student(root / "first", "modernbert", "cosine", "first"), "asymmetric"),
        "symmetric": (
            write_student(root / "symmetric", "bert", "anchored", "mean", content={"tasks": ["symmetric"]}),
            "symmetric",
        ),
    }
    found = {name: (student, root / name / "student", task) for name, (student, task) in made.items()}
    return found | {"pushed": (Student.load("d2llm-minilm-cosine", dtype="float32"), pushed, "asymmetric")}


@pytest.fixture(scope="module")
def answers(students, tmp_path_factory):
    """What the library gives of each, in an environment without d2llm."""
    root = tmp_path_factory.mktemp("without-d2llm")
    python = write_bare_environment(root / "environment")
    folders = {name: str(folder) for name, (_, folder, _) in students.items()}
    job = {"folders": folders, "queries": QUERIES, "passages": PASSAGES, "out": str(root)}
    (root / "job.json").write_text(json.dumps(job))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [python, "-I", "-c", PROGRAM, str(root / "job.json")],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return {name: dict(np.load(root / f"{name}.npz")) for name in students}


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("name", ["decoder", "encoder", "first", "symmetric", "pushed"])
def test_the_library_alone_gives_the_students_numbers(students, answers, name):
    student, _, task = students[name]
    passages = student.encode_passages(PASSAGES).vectors
    queries = student.anchor_queries(student.encode_queries(QUERIES).vectors, task)
    found = answers[name]
    assert_close(found["queries"], queries)
    assert_close(found["passages"], passages)
    assert_close(found["plain"], passages)
    assert_close(found["similarity"], queries @ passages.T)
    if name == "pushed":  # which has no interaction: that is all of its score
        logits = student.score_many(student.encode_queries(QUERIES).vectors, passages, task)
        assert_close(found["similarity"], logits)
    if name == "symmetric":
        other = student.anchor_queries(student.encode_queries(QUERIES).vectors, "asymmetric")
        assert np.abs(queries - other).max() > 0.1


@pytest.mark.parametrize(
    ("head", "method", "reason"), [("anchored", "pma", "PMA"), ("paper", "backbone", "no inner product")]
)
def test_what_the_library_has_not_is_told_and_no_other_numbers_are_given(tmp_path, head, method, reason):
    from sentence_transformers import SentenceTransformer

    config = tiny_student_config(write_tiny_model(tmp_path / "base", "bert"))
    interaction = config.interaction.model_copy(update={"head": head})
    pooling = config.pooling.model_copy(update={"method": method})
    student = Student.create(config.model_copy(update={"pooling": pooling, "interaction": interaction}), device="cpu")
    student.save(tmp_path / "student", merge=True)
    assert not (tmp_path / "student" / "modules.json").exists()
    card = (tmp_path / "student" / "README.md").read_text()
    assert "Sentence-transformers alone cannot load it" in card
    assert reason in card
    with pytest.raises((OSError, ValueError)):
        SentenceTransformer(str(tmp_path / "student"), local_files_only=True)


def test_a_merged_copy_keeps_what_the_folder_had(pushed):
    shipped = find_student("d2llm-minilm-cosine")
    before, after = (json.loads((folder / "manifest.json").read_text()) for folder in (shipped, pushed))
    own = {"packages", "merged_sha256"}
    assert {name: value for name, value in after.items() if name not in own} == {
        name: value for name, value in before.items() if name not in own
    }
    cards = [(folder / "README.md").read_text(encoding="utf-8") for folder in (shipped, pushed)]
    marks = [card.split("<!-- sentence-transformers:begin -->") for card in cards]
    assert "loads it" in marks[1][1]
    assert marks[0][0].split("---", 2)[2] == marks[1][0].split("---", 2)[2]
    assert not (pushed / "adapter.safetensors").exists()


def test_an_adapter_alone_is_pushed_on_demand_and_says_what_it_needs(pushed, tmp_path):
    result, report = succeed_with_report("push", "d2llm-minilm-cosine", "me/small", "--adapter", folder=tmp_path)
    assert "sentence-transformers cannot load it without d2llm: its folder holds only what" in result.stderr
    assert report["result"]["needs_d2llm"]
    folder = find_student("me/small")
    assert (folder / "adapter.safetensors").is_file()
    assert not (folder / "modules.json").exists()
    assert "Sentence-transformers alone cannot load it" in (folder / "README.md").read_text(encoding="utf-8")
    fail("push", pushed, "me/small", "--adapter", containing=["has all weights", "leave out --adapter"])


def test_a_merged_student_of_an_earlier_version_gets_the_librarys_files(pushed, tmp_path):
    old = shutil.copytree(pushed, tmp_path / "old")
    for path in ("modules.json", "config_sentence_transformers.json", "backbone/sentence_bert_config.json"):
        (old / path).unlink()
    for path in ("1_Pooling", "2_Normalize", "3_Router"):
        shutil.rmtree(old / path)
    result, _ = succeed_with_report("push", old, "me/again", folder=tmp_path)
    assert "can load it without d2llm" in result.stderr
    assert (find_student("me/again") / "modules.json").is_file()


def test_the_interaction_of_a_student_with_pma_is_pushed_as_it_is(pushed, tmp_path):
    result, _ = succeed_with_report("push", "d2llm-minilm", "me/full", folder=tmp_path)
    assert "cannot load it without d2llm: its pooling by attention (PMA)" in result.stderr
    assert (find_student("me/full") / "adapter.safetensors").is_file()
