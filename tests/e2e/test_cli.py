"""The command line as a user types it: from a folder of texts to a table, and every wrong input on the way."""

from __future__ import annotations

import gzip
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from safetensors import safe_open
from typer.testing import CliRunner

from d2llm.apps.cli import app
from d2llm.core.recipe import load_recipe
from d2llm.core.shipped import shipped_recipes
from d2llm.models.student import Student
from e2e.small_corpus import SENTENCES
from tiny_models import tiny_student_config, write_tiny_model

VERBS = ["run", "mine", "tune-teacher", "label", "distill", "encode", "search", "demo", "evaluate", "judge"]
MAIN = "import sys; from d2llm.apps.cli import main; sys.argv[0] = 'd2llm'; main()"


def d2llm(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = d2llm(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def fail(*arguments, containing):
    """The one paragraph that a wrong input gives."""
    result = d2llm(*arguments)
    assert result.exit_code == 2, result.output + repr(result.exception)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert result.stderr.rstrip().splitlines()[-1] == errors[0]  # nothing after it
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
    """Queries are the first words of a sentence; splits share no sentence, train and dev have 12 and 4 queries."""
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
lora = {{ rank = 2, alpha = 2, dropout = 0 }}
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
depth = 10
[training]
learning_rate = {learning_rate}
epochs = 1
warmup_steps = 0
batch_queries = 4
num_hard = 2
num_easy = 1
eval_every = 2
checkpoint_every = 1
{extra}
""")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, data and recipe; tests that change them copy them first."""
    folder = tmp_path_factory.mktemp("cli")
    write_tiny_model(folder / "encoder", "bert")
    write_tiny_model(folder / "decoder", "llama")
    write_data(folder / "everyday")
    write_recipe(folder / "tiny.toml", folder, folder / "everyday")
    return folder


@pytest.fixture(scope="module")
def reports(place):
    """The four steps, one after the other, and what each reported."""
    arguments = (place / "tiny.toml", "--out", place / "run", "--dtype", "float32")
    found = {}
    for verb in ("mine", "tune-teacher", "label", "distill"):
        result, found[verb] = succeed_with_report(verb, *arguments, folder=place)
        assert result.stdout == ""  # remarks go to standard error
        assert f"{verb}: " in result.stderr
    return found


@pytest.fixture(scope="module")
def index(place, reports):
    arguments = (place / "everyday", "--student", place / "run" / "student", "--out", place / "index")
    _, report = succeed_with_report("encode", *arguments, "--dtype", "float32", folder=place)
    assert report["result"]["num_passages"] == 60
    assert report["arguments"]["vector_dtype"] == "bfloat16"
    return place / "index"


class TestHelp:
    def test_the_program_lists_every_verb_under_a_heading(self):
        text = succeed("--help").stdout
        assert [text.index(f" {heading} ─") for heading in ("Distil", "Search", "Look")]
        for verb in VERBS:
            assert f"│ {verb} " in text
        assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(VERBS)

    def test_without_arguments_the_help_is_shown(self):
        assert "Usage: d2llm" in d2llm().output

    @pytest.mark.parametrize("verb", VERBS)
    def test_every_verb_and_option_is_explained(self, verb):
        command = typer.main.get_command(app).commands[verb]
        summary = command.help.splitlines()[0]
        assert summary[0].isupper()
        assert summary.endswith(".")
        assert len(summary) <= 64  # one line of the list on a screen of 80 columns
        for parameter in command.params:
            assert parameter.help, f"{verb}: {parameter.name} is not explained"
            assert parameter.help.endswith(".")
        assert "json_path" in {parameter.name for parameter in command.params}
        assert summary.split()[0] in succeed(verb, "--help").stdout

    @pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"], ["--version"]])
    def test_help_is_quick_and_imports_nothing_heavy(self, arguments):
        code = f"""
import sys
from d2llm.apps.cli import main
try:
    main({arguments!r})
finally:
    print(*sorted(module.partition(".")[0] for module in sys.modules), file=sys.stderr)
"""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert not {"torch", "transformers", "numpy", "pyarrow"} & set(result.stderr.split())
        # Time of the processor rather than of the clock, which runs on while other programs have their turn.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.7

    def test_version(self):
        from d2llm import __version__

        assert succeed("--version").stdout == f"d2llm {__version__}\n"


class TestDistil:
    def test_each_step_reports_what_it_did(self, place, reports):
        mined = reports["mine"]["result"]["everyday"]
        assert (mined["num_entries"], mined["num_hard_negatives"], mined["num_easy_negatives"]) == (12, 36, 24)
        assert reports["mine"]["arguments"]["recipe"] == str(place / "tiny.toml")
        assert reports["tune-teacher"]["result"]["pairs"] == 12 * 3
        labelled = reports["label"]["result"]
        assert (labelled["queries"], labelled["pairs"]) == (12, 12 * 6)
        assert labelled["teacher"] == reports["tune-teacher"]["result"]["fingerprint"]
        distilled = reports["distill"]["result"]
        assert (distilled["steps"], distilled["queries"], distilled["unlabelled_queries"]) == (3, 12, 0)

    def test_the_student_of_the_run_is_the_one_reported(self, place, reports):
        student = Student.load(place / "run" / "student", dtype="float32")
        assert student.fingerprint == reports["distill"]["result"]["fingerprint"]

    def test_run_skips_what_is_finished(self, place, reports):
        plan = (place / "run" / "plans" / "everyday" / "plan.jsonl").stat().st_mtime_ns
        arguments = ("run", place / "tiny.toml", "--out", place / "run", "--dtype", "float32")
        result, report = succeed_with_report(*arguments, folder=place)
        assert "is finished" in report["result"]["mine"]["everyday"]["skipped"]
        assert "is finished" in report["result"]["tune-teacher"]["skipped"]
        assert (report["result"]["label"]["pairs"], report["result"]["label"]["finished_queries"]) == (0, 12)
        assert "is finished" in report["result"]["distill"]["skipped"]
        assert (place / "run" / "plans" / "everyday" / "plan.jsonl").stat().st_mtime_ns == plan
        for verb in ("mine", "tune-teacher", "distill"):
            assert f"{verb}: {place / 'run'}" in result.stderr

    def test_again_makes_a_student_anew_and_keeps_the_old_one(self, place, reports, tmp_path):
        shutil.copytree(place / "run", tmp_path / "run")
        arguments = (place / "tiny.toml", "--out", tmp_path / "run", "--dtype", "float32", "--again")
        _, report = succeed_with_report("distill", *arguments, folder=tmp_path)
        assert report["result"]["fingerprint"] == reports["distill"]["result"]["fingerprint"]  # the same seed
        assert (tmp_path / "run" / "student.old-1" / "manifest.json").is_file()

    def test_a_plan_of_other_settings_is_noticed(self, place, reports, tmp_path):
        shutil.copytree(place / "run", tmp_path / "run")
        recipe = tmp_path / "other.toml"
        recipe.write_text((place / "tiny.toml").read_text().replace("depth = 10", "depth = 20"))
        result = succeed("mine", recipe, "--out", tmp_path / "run")
        assert "warning: " in result.stderr
        assert "other settings than the recipe's now (mining)" in result.stderr
        _, report = succeed_with_report("mine", recipe, "--out", tmp_path / "run", "--again", folder=tmp_path)
        assert report["result"]["everyday"]["num_entries"] == 12

    def test_data_can_be_elsewhere(self, place, tmp_path):
        shutil.copytree(place / "everyday", tmp_path / "moved")
        recipe = write_recipe(tmp_path / "r.toml", place, "not/here/everyday")
        fail("mine", recipe, "--out", tmp_path / "run", containing=["not/here/everyday: no such folder"])
        places = ("--data", f"everyday={tmp_path / 'moved'}")
        _, report = succeed_with_report("mine", recipe, "--out", tmp_path / "run", *places, folder=tmp_path)
        assert set(report["result"]) == {"moved"}
        fail("mine", recipe, "--data", "weekday=x", containing=["--data weekday=x", "NAME=FOLDER", "everyday"])

    def test_quiet_says_nothing(self, place, reports):
        result = succeed("mine", place / "tiny.toml", "--out", place / "run", "--quiet")
        assert result.output == ""

    @pytest.mark.parametrize("name", sorted(shipped_recipes()))
    def test_shipped_recipes_are_found_by_name(self, name):
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.data

    def test_the_paper_s_recipe_has_the_published_settings(self):
        recipe = load_recipe("paper")
        lora, training, losses = recipe.student.backbone.lora, recipe.training, recipe.losses
        assert (lora.rank, lora.alpha, lora.dropout) == (8, 8, 0.05)
        assert (training.learning_rate, training.warmup_steps, training.batch_queries) == (1e-4, 1000, 32)
        assert (training.epochs, recipe.mining.num_hard, recipe.student.pooling.num_heads) == (5, 8, 32)
        assert (losses.contrastive_imitation, losses.rank_imitation_positive_hard) == (1, 1)
        assert (losses.rank_imitation_hard_easy, losses.feature_imitation) == (0.01, 0.001)
        assert (recipe.student.interaction.head, recipe.student.interaction.features) == ("paper", "concat")
        assert not recipe.student.pooling.warm_start


class TestSearch:
    def test_the_index_remembers_its_student(self, place, index):
        arguments = ("search", index, SENTENCES[7], "ships at sea", "--top-k", 3, "--dtype", "float32")
        result, report = succeed_with_report(*arguments, folder=place)
        rankings = report["result"]["rankings"]
        assert [ranking["query"]["text"] for ranking in rankings] == [SENTENCES[7], "ships at sea"]
        for ranking in rankings:
            scores = [found["score"] for found in ranking["passages"]]
            assert scores == sorted(scores, reverse=True)
            assert [found["rank"] for found in ranking["passages"]] == [1, 2, 3]
            for found in ranking["passages"]:
                assert SENTENCES[int(found["passage"]["id"][1:])] == found["passage"]["text"]
                assert found["passage"]["text"][:40] in result.stdout

    def test_queries_from_a_file_and_exact(self, place, index):
        arguments = ("search", index, "--queries", place / "everyday" / "queries.jsonl", "--exact", "--top-k", 1)
        _, report = succeed_with_report(*arguments, folder=place)
        rankings = report["result"]["rankings"]
        assert [ranking["query"]["id"] for ranking in rankings] == [f"q{n}" for n in range(20)]
        assert {ranking["num_candidates"] for ranking in rankings} == {60}

    def test_as_a_program_it_prints_the_answer_and_nothing_else(self, index):
        command = [sys.executable, "-c", MAIN, "search", str(index), "ships at sea", "--top-k", "2"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        lines = result.stdout.splitlines()
        assert lines[0].strip() == "ships at sea"
        assert [line.split()[0] for line in lines[1:] if line.split()[0] in {"1", "2"}] == ["1", "2"]
        assert result.stderr == ""

    def test_evaluate_prints_the_table_and_writes_it(self, place, reports):
        student = ("--student", place / "run" / "student", "--teacher", place / "run" / "teacher")
        arguments = ("evaluate", place / "everyday", *student, "--teacher-queries", 2, "--teacher-depth", 3)
        result, report = succeed_with_report(*arguments, "--dtype", "float32", folder=place)
        names = [row["name"] for row in report["result"]["rows"]]
        assert names[0] == "BM25"
        assert names[1] == "cosine, untuned encoder"
        assert names[-2] == "D2LLM"
        assert names[-1].startswith("teacher")
        assert report["result"]["num_queries"] == 4
        bm25 = report["result"]["rows"][0]["measures"]
        assert bm25["nDCG@10"] == 1.0  # each query is the beginning of its sentence
        assert "BM25" in result.stdout
        assert "1.0000" in result.stdout
        assert [row["num_queries"] for row in report["result"]["sample_rows"]] == [2] * len(names)

    def test_judge(self, place):
        arguments = ("judge", "what is [bold]this[/bold]?", "a [link] in it", "two", "--teacher", place / "decoder")
        result, report = succeed_with_report(*arguments, "--prompt", "short", "--dtype", "float32", folder=place)
        assert "what is [bold]this[/bold]?" in result.stdout  # markup in a text is text
        assert "a [link] in it" in result.stdout
        judged = report["result"]["judgements"]
        assert [item["passage"] for item in judged] == ["a [link] in it", "two"]
        assert all(isinstance(item["log_odds"], float) for item in judged)

    def test_demo_hands_over_what_it_is_told(self, tmp_path, monkeypatch):
        calls = []
        monkeypatch.setattr(
            "d2llm.apps.demo.run_demo", lambda *given, **named: calls.append((given, named)) or {"n": 1}
        )
        arguments = ("demo", "--out", tmp_path / "here", "--student", "mine", "--quiet")
        _, report = succeed_with_report(*arguments, folder=tmp_path)
        assert calls == [((tmp_path / "here",), {"student": "mine", "show_progress": False})]
        assert report["result"] == {"n": 1}


class TestBadInput:
    @pytest.fixture
    def data(self, tmp_path):
        return write_data(tmp_path / "data")

    @pytest.fixture
    def mine(self, place, data, tmp_path):
        recipe = write_recipe(tmp_path / "r.toml", place, data)
        return ("mine", recipe, "--out", tmp_path / "run")

    @pytest.mark.parametrize("name", ["corpus", "queries"])
    def test_missing(self, mine, data, name):
        (data / f"{name}.jsonl").unlink()
        fail(*mine, containing=[str(data), f"looked for {name}.jsonl or {name}.jsonl.gz"])

    @pytest.mark.parametrize(("name", "things"), [("corpus", "passages"), ("queries", "queries")])
    def test_empty(self, mine, data, name, things):
        (data / f"{name}.jsonl").write_text("\n")
        fail(*mine, containing=[f"{data / name}.jsonl: holds no {things}"])

    @pytest.mark.parametrize("name", ["corpus", "queries"])
    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ('{"_id": "x", "text": ', "not valid JSON"),
            ('["x"]', "must be a JSON object, found a list"),
            ('{"_id": "x"}', "field 'text' is missing"),
            ('{"_id": 7, "text": "t"}', "field '_id' must be a string, found a number"),
        ],
    )
    def test_malformed_with_file_and_line(self, mine, data, name, line, problem):
        path = data / f"{name}.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
        fail(*mine, containing=[f"{path}:3: ", problem])

    @pytest.mark.parametrize("name", ["corpus", "queries"])
    def test_duplicate_ids(self, mine, data, name):
        path = data / f"{name}.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines, lines[4]]))
        fail(*mine, containing=[f"{path}:{len(lines) + 1}: ", "was already used in line 5"])

    def test_the_same_for_encode_and_for_queries_of_a_search(self, index, place, data, tmp_path):
        student = ("--student", place / "run" / "student")
        with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
            file.write('{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n')
        where = f"{tmp_path / 'corpus.jsonl.gz'}:2: id 'a' was already used in line 1"
        fail("encode", tmp_path / "corpus.jsonl.gz", *student, "--out", tmp_path / "index", containing=[where])
        fail("encode", tmp_path / "no.jsonl", *student, "--out", tmp_path / "index", containing=["no.jsonl: no such"])
        assert not (tmp_path / "index").exists()
        (tmp_path / "asked.jsonl").write_text('{"_id": "1", "text": "x"}\nx\n')
        fail("search", index, "--queries", tmp_path / "asked.jsonl", containing=["asked.jsonl:2: not valid JSON"])
        fail("search", index, containing=["there is no query"])

    def test_judgements_that_point_nowhere_are_a_warning(self, mine, data):
        lost = [(f"q{n}", f"gone{n}") for n in range(7)]
        write_qrels(data, "train", [(f"q{n}", f"s{n}") for n in range(12)] + lost)
        result = succeed(*mine)
        warning = next(line for line in result.stderr.splitlines() if line.startswith("warning: "))
        assert "train: 7 judgements point to unknown passages, first 5: gone0, gone1, gone2, gone3, gone4" in warning
        assert "gone5" not in warning

    def test_nothing_left_because_all_splits_share_passages(self, mine, data):
        write_qrels(data, "dev", [(f"q{n}", f"s{n - 12}") for n in range(12, 16)])
        write_qrels(data, "train", [(f"q{n}", f"s{n}") for n in range(4)])
        fail(*mine, containing=["no query of split 'train' is left to mine", "exclude_shared_passages = false"])
        recipe = mine[1]
        recipe.write_text(recipe.read_text().replace("[mining]", "exclude_shared_passages = false\n[mining]"))
        succeed(*mine)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ("[trainig]\nepochs = 1", "unknown key 'trainig'; did you mean 'training'?"),
            ("[losses]\nfeature_imitatoin = 1.0", "'losses.feature_imitatoin'; did you mean 'feature_imitation'?"),
            ("[losses]\ntemperature = 0", "losses.temperature"),
            ("[losses\n", "not valid TOML"),
        ],
    )
    def test_recipe(self, place, tmp_path, wrong, message):
        recipe = write_recipe(tmp_path / "r.toml", place, place / "everyday", extra=wrong)
        fail("run", recipe, containing=[f"{recipe}: ", message])

    def test_recipe_that_does_not_exist(self, tmp_path):
        fail("label", tmp_path / "r.toml", containing=[f"{tmp_path / 'r.toml'}: cannot be read"])
        fail("label", "papre", containing=["no recipe 'papre'", "d2llm-minilm, paper"])

    @pytest.mark.parametrize("verb", ["tune-teacher", "label", "distill"])
    def test_step_before_its_time(self, place, tmp_path, verb):
        fail(verb, place / "tiny.toml", "--out", tmp_path, containing=["there is no training plan yet", "verb mine"])

    def test_distill_before_label(self, place, reports, tmp_path):
        shutil.copytree(place / "run" / "plans", tmp_path / "plans")
        fail("distill", place / "tiny.toml", "--out", tmp_path, containing=["there are no labels yet", "verb label"])

    def test_model_folder_without_weights(self, place, data, tmp_path):
        shutil.copytree(place / "encoder", tmp_path / "bare")
        (tmp_path / "bare" / "model.safetensors").unlink()
        recipe = write_recipe(tmp_path / "r.toml", place, data)
        recipe.write_text(recipe.read_text().replace(str(place / "encoder"), str(tmp_path / "bare")))
        message = f"{tmp_path / 'bare'}: no safetensors weights in this model folder"
        fail("mine", recipe, "--out", tmp_path / "run", containing=[message])
        fail("judge", "a", "b", "--teacher", tmp_path / "bare", containing=[message])

    def test_index_of_another_student(self, index, tmp_path, place, reports):
        other = Student.create(tiny_student_config(place / "encoder"), seed=1, dtype="float32")
        other.save(tmp_path / "other")
        both = [str(index), reports["distill"]["result"]["fingerprint"], other.fingerprint]
        fail("search", index, "x", "--student", tmp_path / "other", "--dtype", "float32", containing=both)

    def test_student_that_is_not_there(self, place, index, tmp_path):
        fail("evaluate", place / "everyday", "--student", "nobody", containing=["no student at 'nobody'"])
        shutil.copytree(index, tmp_path / "index")
        manifest = json.loads((index / "manifest.json").read_text())
        for source, message in ((str(tmp_path / "gone"), "which is not there"), (None, "does not know where")):
            (tmp_path / "index" / "manifest.json").write_text(json.dumps(manifest | {"student_source": source}))
            fail("search", tmp_path / "index", "x", containing=[message, "--student"])

    def test_not_an_index_and_an_index_in_the_way(self, place, index, tmp_path):
        fail("search", tmp_path, "x", containing=[str(tmp_path), "not a d2llm index folder"])
        arguments = ("encode", place / "everyday", "--student", place / "run" / "student", "--out", index)
        fail(*arguments, containing=["already holds an index"])

    def test_answer_word_of_two_tokens(self, place, tmp_path):
        prompt = tmp_path / "prompt.toml"
        section = 'template = "{query} {passage}?"\nyes = " indubitably"\nno = " no"\n'
        prompt.write_text(f"[asymmetric]\n{section}\n[symmetric]\n{section}")
        arguments = ("judge", "a", "b", "--teacher", place / "decoder", "--prompt", prompt)
        fail(*arguments, containing=["the answer word ' indubitably'", "is not one token"])

    def test_nan_in_training_keeps_the_last_good_checkpoint(self, place, reports, tmp_path):
        shutil.copytree(place / "run" / "plans", tmp_path / "run" / "plans")
        shutil.copytree(place / "run" / "teacher", tmp_path / "run" / "teacher")
        shutil.copytree(place / "run" / "labels", tmp_path / "run" / "labels")
        recipe = write_recipe(tmp_path / "r.toml", place, place / "everyday", learning_rate=1e30)
        arguments = ("distill", recipe, "--out", tmp_path / "run", "--dtype", "float32")
        fail(*arguments, containing=["training stopped", "last good checkpoint", str(tmp_path / "run" / "student.run")])
        assert not (tmp_path / "run" / "student").exists()
        with safe_open(tmp_path / "run" / "student.run" / "checkpoint.safetensors", framework="pt") as file:
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118

    def test_device_that_is_not_there(self, place):
        fail("judge", "a", "b", "--teacher", place / "decoder", "--device", "gpu", containing=["device 'gpu'", "cpu"])

    def test_usage_is_shown_for_an_unknown_option(self):
        result = d2llm("search", "index", "x", "--topk", "3")
        assert result.exit_code == 2
        assert "--top-k" in result.stderr  # the nearest right one

    def test_as_a_program(self, tmp_path):
        command = [sys.executable, "-c", MAIN, "mine", str(tmp_path / "r.toml")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (2, "")
        assert (
            result.stderr
            == f"error: {tmp_path / 'r.toml'}: cannot be read (No such file or directory); check the path\n"
        )


class TestOtherEnds:
    def test_verbose_shows_where_an_error_comes_from(self, tmp_path):
        result = d2llm("mine", tmp_path / "r.toml", "--verbose")
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: ")

    def test_interrupted(self, place, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("d2llm.apps.steps.mine_plans", interrupt)
        result = d2llm("mine", place / "tiny.toml")
        assert result.exit_code == 130
        assert "the same command again" in result.stderr
        assert "Traceback" not in result.stderr

    def test_a_fault_of_ours_keeps_its_traceback(self, place, monkeypatch):
        def break_down(*_, **__):
            raise ZeroDivisionError("ours")

        monkeypatch.setattr("d2llm.apps.steps.mine_plans", break_down)
        result = d2llm("mine", place / "tiny.toml")
        assert isinstance(result.exception, ZeroDivisionError)

    def test_logging_is_left_as_it_was(self):
        import logging

        logger = logging.getLogger("d2llm")
        before = (logger.level, list(logger.handlers))
        d2llm("--verbose", "mine", "papre")
        assert (logger.level, list(logger.handlers)) == before


def test_report_takes_what_verbs_return():
    import numpy as np

    from d2llm.apps.session import _plain
    from d2llm.core.types import Passage

    value = {"p": Passage("1", "t"), "a": np.float32(0.5), "b": np.arange(2), 3: (Path("x"), float("nan"), None, True)}
    expected = {"p": {"id": "1", "text": "t", "title": ""}, "a": 0.5, "b": [0, 1], "3": ["x", None, None, True]}
    assert _plain(value) == expected
