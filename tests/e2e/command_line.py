"""Runs the command line in this process, and writes the small data set and recipe that it is tested with."""

from __future__ import annotations

import json
from unittest import mock

import typer.main
from typer.testing import CliRunner

from d2llm.cli.main import app
from e2e.small_corpus import SENTENCES

PROGRAM = typer.main.get_command(app)


def d2llm(*arguments):
    # Built once, as in a real run: typer's runner would rebuild every verb for each call.
    with mock.patch("typer.testing._get_command", return_value=PROGRAM):
        # A fixed width, because some libraries set COLUMNS in the process that imports them.
        return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = d2llm(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def fail(*arguments, containing):
    """Run a command that must exit with status 2, and return its only error line."""
    result = d2llm(*arguments)
    assert result.exit_code == 2, result.output + repr(result.exception)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert result.stderr.rstrip().splitlines()[-1] == errors[0]  # nothing follows it
    assert "Traceback" not in result.stderr
    for part in containing:
        assert part in errors[0], f"{part!r} is not in: {errors[0]}"
    return errors[0]


def succeed_with_report(*arguments, folder):
    path = folder / "report.json"
    path.unlink(missing_ok=True)
    result = succeed(*arguments, "--json", path)
    report = json.loads(path.read_text())
    assert set(report) == {"schema_version", "d2llm", "verb", "arguments", "result"}
    assert report["schema_version"] == 1
    assert report["verb"] == arguments[0]
    return result, report


def write_data(folder):
    """Write a BEIR data set: a query is the start of its sentence, splits are disjoint (12 train, 4 dev, 4 test)."""
    (folder / "qrels").mkdir(parents=True)
    write_lines(folder / "corpus.jsonl", [{"_id": f"s{n}", "text": text} for n, text in enumerate(SENTENCES)])
    queries = [{"_id": f"q{n}", "text": " ".join(SENTENCES[n].split()[:5])} for n in range(20)]
    write_lines(folder / "queries.jsonl", queries)
    for split, numbers in (("train", range(12)), ("dev", range(12, 16)), ("test", range(16, 20))):
        write_qrels(folder, split, [(f"q{n}", f"s{n}") for n in numbers])
    return folder


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_qrels(folder, split, pairs):
    lines = ["query-id\tcorpus-id\tscore", *(f"{query}\t{passage}\t1" for query, passage in pairs)]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def write_recipe(path, models, data, *, learning_rate=1e-3, prompt="short", extra=""):
    path.write_text(f"""
name = "tiny"
[student.backbone]
model = "{models / "encoder"}"
tuning = {{ kind = "lora", rank = 2, alpha = 2 }}
max_query_tokens = 64
max_passage_tokens = 64
[student.pooling]
num_heads = 4
[student.interaction]
hidden_dim = 16
feature_dim = 8
[teacher]
model = "{models / "decoder"}"
prompt = "{prompt}"
max_tokens = 200
[teacher_tuning]
lora = {{ rank = 2, alpha = 2, dropout = 0 }}
num_negatives = 2
batch_pairs = 12
[[data]]
path = "{data}"
[mining]
num_hard = 3
num_easy = 2
range_max = 10
[gate]
queries = 4
when_closed = "teacher"
[training]
learning_rate = {learning_rate}
epochs = 1
warmup_steps = 0
batch_queries = 4
num_hard = 2
num_easy = 1
unlabelled = "leave_out"
residual.epochs = 0
eval_every = 2
checkpoint_every = 1
{extra}
""")
    return path
