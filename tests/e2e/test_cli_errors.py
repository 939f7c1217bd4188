"""Every invalid input exits with code 2 and one paragraph saying what is wrong, where, and how to fix it."""

from __future__ import annotations

import gzip
import logging
import shutil
import subprocess
import sys

import pytest
from safetensors import safe_open

from d2llm.models.student import Student
from e2e.command_line import d2llm, fail, succeed, write_data, write_qrels, write_recipe
from tiny_models import tiny_student_config
from tiny_store import edit_manifest


class TestBadInput:
    @pytest.fixture
    def data(self, tmp_path):
        return write_data(tmp_path / "data")

    @pytest.fixture
    def mine(self, place, data, tmp_path):
        recipe = write_recipe(tmp_path / "r.toml", place, data)
        return ("mine", recipe, "--out", tmp_path / "run")

    @pytest.mark.parametrize("name", ["corpus", "queries"])
    def test_missing_file(self, mine, data, name):
        (data / f"{name}.jsonl").unlink()
        fail(*mine, containing=[str(data), f"looked for {name}.jsonl or {name}.jsonl.gz"])

    @pytest.mark.parametrize(("name", "contents"), [("corpus", "passages"), ("queries", "queries")])
    def test_empty_file(self, mine, data, name, contents):
        (data / f"{name}.jsonl").write_text("\n")
        fail(*mine, containing=[f"{data / name}.jsonl: holds no {contents}"])

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
    def test_malformed_line_is_located_by_file_and_line(self, mine, data, name, line, problem):
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

    def test_encode_and_search_report_bad_files_the_same_way(self, index, place, data, tmp_path):
        student = ("--student", place / "run" / "student")
        with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
            file.write('{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n')
        message = f"{tmp_path / 'corpus.jsonl.gz'}:2: id 'a' was already used in line 1"
        fail("encode", tmp_path / "corpus.jsonl.gz", *student, "--out", tmp_path / "index", containing=[message])
        fail("encode", tmp_path / "no.jsonl", *student, "--out", tmp_path / "index", containing=["no.jsonl: no such"])
        assert not (tmp_path / "index").exists()
        (tmp_path / "asked.jsonl").write_text('{"_id": "1", "text": "x"}\nx\n')
        fail("search", index, "--queries", tmp_path / "asked.jsonl", containing=["asked.jsonl:2: not valid JSON"])
        fail("search", index, containing=["there is no query"])

    def test_judgements_of_unknown_passages_are_a_warning(self, mine, data):
        dangling = [(f"q{n}", f"gone{n}") for n in range(7)]
        write_qrels(data, "train", [(f"q{n}", f"s{n}") for n in range(12)] + dangling)
        result = succeed(*mine)
        warning = next(line for line in result.stderr.splitlines() if line.startswith("warning: "))
        assert "train: 7 judgements point to unknown passages, first 5: gone0, gone1, gone2, gone3, gone4" in warning
        assert "gone5" not in warning

    def test_no_queries_left_when_all_splits_share_passages(self, mine, data):
        write_qrels(data, "dev", [(f"q{n}", f"s{n - 12}") for n in range(12, 16)])
        write_qrels(data, "train", [(f"q{n}", f"s{n}") for n in range(4)])
        fail(*mine, containing=["split 'train' has no query to mine for", "exclude_shared_passages = false"])
        recipe = mine[1]
        recipe.write_text(recipe.read_text().replace("[mining]", "exclude_shared_passages = false\n[mining]"))
        succeed(*mine)

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ("[trainig]\nepochs = 1", "unknown key 'trainig'; did you mean 'training'?"),
            (
                "[losses]\nfeature_imitatoin = 1.0",
                "losses: no loss 'feature_imitatoin'; did you mean 'feature_imitation'?",
            ),
            ("[losses]\ncontrastive_imitation.temperature = 0", "losses.contrastive_imitation.temperature"),
            ("[losses\n", "not valid TOML"),
        ],
    )
    def test_recipe_mistakes(self, place, tmp_path, section, message):
        recipe = write_recipe(tmp_path / "r.toml", place, place / "everyday", extra=section)
        fail("run", recipe, containing=[f"{recipe}: ", message])

    def test_missing_recipe(self, tmp_path):
        fail("label", tmp_path / "r.toml", containing=[f"{tmp_path / 'r.toml'}: cannot be read"])
        fail("label", "papre", containing=["no recipe 'papre'", "d2llm-pairs, "])

    @pytest.mark.parametrize("verb", ["tune-teacher", "label", "distill"])
    def test_step_run_too_early(self, place, tmp_path, verb):
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
        expected = [str(index), reports["distill"]["result"]["fingerprint"], other.fingerprint]
        fail("search", index, "x", "--student", tmp_path / "other", "--dtype", "float32", containing=expected)

    def test_missing_student(self, place, index, tmp_path):
        fail("evaluate", place / "everyday", "--student", "nobody", containing=["no student at 'nobody'"])
        shutil.copytree(index, tmp_path / "index")
        for source, message in ((str(tmp_path / "gone"), "which does not exist"), (None, "does not say where")):
            edit_manifest(tmp_path / "index", student_source=source)
            fail("search", tmp_path / "index", "x", containing=[message, "--student"])

    def test_missing_index_and_existing_index(self, place, index, tmp_path):
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

    def test_unknown_device(self, place):
        fail("judge", "a", "b", "--teacher", place / "decoder", "--device", "gpu", containing=["device 'gpu'", "cpu"])

    def test_unknown_option_suggests_the_closest_one(self):
        result = d2llm("search", "index", "x", "--topk", "3")
        assert result.exit_code == 2
        assert "--top-k" in result.stderr  # the closest valid option

    def test_error_when_run_as_a_program(self, tmp_path):
        command = [sys.executable, "-m", "d2llm", "mine", str(tmp_path / "r.toml")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (2, "")
        assert (
            result.stderr
            == f"error: {tmp_path / 'r.toml'}: cannot be read (No such file or directory); check the path\n"
        )


class TestOtherExits:
    def test_verbose_adds_the_traceback(self, tmp_path):
        result = d2llm("mine", tmp_path / "r.toml", "--verbose")
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: ")

    def test_interrupt_suggests_the_same_command(self, place, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("d2llm.training.mining.plans.mine_plans", interrupt)
        result = d2llm("mine", place / "tiny.toml")
        assert result.exit_code == 130
        assert "the same command again" in result.stderr
        assert "Traceback" not in result.stderr

    def test_internal_errors_keep_their_traceback(self, place, monkeypatch):
        def crash(*_, **__):
            raise ZeroDivisionError("ours")

        monkeypatch.setattr("d2llm.training.mining.plans.mine_plans", crash)
        result = d2llm("mine", place / "tiny.toml")
        assert isinstance(result.exception, ZeroDivisionError)

    def test_logging_is_restored(self):
        logger = logging.getLogger("d2llm")
        before = (logger.level, list(logger.handlers))
        d2llm("--verbose", "mine", "papre")
        assert (logger.level, list(logger.handlers)) == before
