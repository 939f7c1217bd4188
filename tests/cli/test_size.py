"""``d2llm size`` on the command line."""

from __future__ import annotations

import json

import pytest

from d2llm.sizing import measure, speeds
from d2llm.sizing.speeds import read_speeds
from e2e.command_line import fail, succeed, succeed_with_report
from sizing.sized_index import made_up_speeds, passages, token_student
from tiny_models import write_tiny_model

MACHINE = ("--machine-memory", "64GiB", "--machine-cores", "16")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    token_student(folder).save(folder / "saved")
    return folder / "saved"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No speeds of this machine are kept."""
    monkeypatch.setattr(speeds, "user_cache_path", lambda name: tmp_path / name)


def test_a_plan_with_everything(student, tmp_path):
    options = ("--passages", "50M", "--tokens", "180", "--qps", "200", "--recall", "0.99", "--teacher", "smollm2")
    prices = ("--core-hour-price", "0.04", "--memory-price", "3", "--disk-price", "0.1")
    result, report = succeed_with_report("size", *options, *prices, *MACHINE, "--student", student, folder=tmp_path)
    answer = report["result"]["size"]
    assert answer["plan"]["passages"] == 50_000_000
    assert answer["plan"]["machine_memory"] == 64 << 30
    assert answer["disk_bytes"] == sum(part["disk"] for part in answer["parts"])
    assert answer["num_shards"] >= 1
    assert answer["machines"]["cores"] >= 1
    assert {cost["item"] for cost in answer["costs"]} >= {"memory", "disk", "cores for searches"}
    assert report["result"]["speeds"] is None
    for text in (
        "50,000,000 passages of 180 tokens",
        "texts and ids",
        "For 200 queries a second",
        "At the given prices",
    ):
        assert text in result.stdout
    assert "note: the speeds are not this machine's" in result.stderr


def test_texts_of_ones_own(student, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"_id": one.id, "text": one.text}) + "\n" for one in passages(200)))
    options = ("--passages", "1000", "--corpus", path, *MACHINE, "--student", student)
    _, report = succeed_with_report("size", *options, folder=tmp_path)
    assert report["result"]["size"]["texts"] == str(path)


def test_measuring_is_remembered(student, tmp_path, monkeypatch):
    measured = made_up_speeds("fingerprint")
    monkeypatch.setattr(measure, "measure_speeds", lambda student, *args, **options: measured)
    result, report = succeed_with_report("size", "--measure", "--student", student, folder=tmp_path)
    assert "kept in" in result.stderr
    assert "a machine, 1 thread" in result.stdout
    assert report["result"]["size"] is None
    assert report["result"]["speeds"]["query_ms"] == {"value": 10, "source": "a test"}
    assert read_speeds("fingerprint", 1) == measured


def test_the_memory_of_a_training(tmp_path):
    model = write_tiny_model(tmp_path / "model", vocab_size=400)
    (tmp_path / "model" / "model.safetensors").unlink()  # the shape is enough
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'student.backbone.model = "{model}"\nstudent.pooling.num_heads = 4')
    options = ("--train", recipe, "--train-on", "cuda", "--machine-memory", "80GiB")
    result, report = succeed_with_report("size", *options, folder=tmp_path)
    memory = report["result"]["training"]
    assert memory["memory_bytes"] == sum(part["memory"] for part in memory["items"])
    assert "32768 tokens" not in result.stdout
    assert "states of the optimiser" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --passages, such as --passages 50M, --measure to measure this machine, or --train"),
        (["--passages", "0"], "--passages is '0'; give a whole number above 0"),
        (["--passages", "lots"], "--passages is 'lots'"),
        (["--passages", "5M", "--tokens", "-3"], "--tokens is '-3'"),
        (["--passages", "5M", "--qps", "0"], "qps is 0"),
        (["--passages", "5M", "--machine-memory", "64"], "--machine-memory is '64'"),
        (["--passages", "5M", "--vectors", "int7"], "vector format 'int7' is unknown"),
        (["--passages", "5M", "--student", "d2llm-minilmm"], "did you mean 'd2llm-minilm'?"),
    ],
)
def test_nonsense(options, message):
    fail("size", *options, containing=[message])


def test_help_names_every_figure():
    shown = succeed("size", "--help").stdout
    for option in ("--passages", "--tokens", "--qps", "--recall", "--teacher", "--measure", "--core-hour-price"):
        assert option in shown
