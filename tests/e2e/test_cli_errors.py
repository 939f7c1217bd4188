"""Every wrong input gives one paragraph that says what, where and what to do, and exit code 2."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import subprocess
import sys

import pytest
from safetensors import safe_open

from d2llm.models.student import Student
from e2e.command_line import d2llm, fail, succeed, write_data, write_qrels, write_recipe
from tiny_models import tiny_student_config
from tiny_store import forget_checksums


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
            ('{"_id": 7.5, "text": "t"}', "field '_id' must be a string"),
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
        fail(*mine, containing=["no query to mine for in split 'train'", "exclude_shared_passages = false"])
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
        fail("label", "papre", containing=["no recipe 'papre'", "d2llm-pairs, "])

    @pytest.mark.parametrize("verb", ["tune-teacher", "label", "distill"])
    def test_step_before_its_time(self, place, tmp_path, verb):
        fail(verb, place / "tiny.toml", "--out", tmp_path, containing=["there is no training plan yet", "d2llm mine"])

    def test_distill_before_label(self, place, reports, tmp_path):
        shutil.copytree(place / "run" / "plans", tmp_path / "plans")
        fail("distill", place / "tiny.toml", "--out", tmp_path, containing=["there are no labels yet", "d2llm label"])

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
        forget_checksums(tmp_path / "index")
        manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
        for source, message in ((str(tmp_path / "gone"), "which does not exist"), (None, "does not say where")):
            (tmp_path / "index" / "manifest.json").write_text(json.dumps(manifest | {"student_source": source}))
            fail("search", tmp_path / "index", "x", containing=[message, "--student"])

    def test_not_an_index_and_an_index_in_the_way(self, place, index, tmp_path):
        fail("search", tmp_path, "x", containing=[str(tmp_path), "not a d2llm index folder"])
        arguments = ("encode", place / "everyday", "--student", place / "run" / "student", "--out", index)
        fail(*arguments, containing=["already holds an index", "--overwrite"])

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
        command = [sys.executable, "-m", "d2llm", "mine", str(tmp_path / "r.toml")]
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

        monkeypatch.setattr("d2llm.training.mining.plans.mine_plans", interrupt)
        result = d2llm("mine", place / "tiny.toml")
        assert result.exit_code == 130
        assert "the same command again" in result.stderr
        assert "Traceback" not in result.stderr

    def test_a_fault_of_ours_keeps_its_traceback(self, place, monkeypatch):
        def break_down(*_, **__):
            raise ZeroDivisionError("ours")

        monkeypatch.setattr("d2llm.training.mining.plans.mine_plans", break_down)
        result = d2llm("mine", place / "tiny.toml")
        assert isinstance(result.exception, ZeroDivisionError)

    def test_logging_is_left_as_it_was(self):
        logger = logging.getLogger("d2llm")
        before = (logger.level, list(logger.handlers))
        d2llm("--verbose", "mine", "papre")
        assert (logger.level, list(logger.handlers)) == before
