"""Errors that need a run or a program of its own, and other exits; ``test_mistakes.py`` has the common mistakes."""

from __future__ import annotations

import errno
import logging
import shutil
import subprocess
import sys

import torch

from d2llm.core.progress import progress_bar
from e2e.command_line import d2llm, fail, succeed, write_data, write_qrels, write_recipe
from tiny_store import edit_manifest


class TestBadInput:
    def test_no_queries_left_when_all_splits_share_passages(self, workspace, tmp_path):
        data = write_data(tmp_path / "data")
        recipe = write_recipe(tmp_path / "r.toml", workspace, data)
        mine = ("mine", recipe, "--out", tmp_path / "run")
        write_qrels(data, "dev", [(f"q{n}", f"s{n - 12}") for n in range(12, 16)])
        write_qrels(data, "train", [(f"q{n}", f"s{n}") for n in range(4)])
        fail(*mine, containing=["split 'train' has no query to mine for", "exclude_shared_passages = false"])
        recipe.write_text(recipe.read_text().replace("[mining]", "exclude_shared_passages = false\n[mining]"))
        succeed(*mine)

    def test_distill_before_label(self, workspace, reports, tmp_path):
        shutil.copytree(workspace / "run" / "plans", tmp_path / "plans")
        fail(
            "distill", workspace / "tiny.toml", "--out", tmp_path, containing=["there are no labels yet", "d2llm label"]
        )

    def test_an_index_whose_student_is_gone(self, index, tmp_path):
        shutil.copytree(index, tmp_path / "index")
        edit_manifest(tmp_path / "index", student_source=str(tmp_path / "gone"))
        fail("search", tmp_path / "index", "x", containing=["which does not exist", "--student"])

    def test_error_when_run_as_a_program(self, tmp_path):
        command = [sys.executable, "-m", "d2llm", "mine", str(tmp_path / "r.toml")]
        result = subprocess.run(command, capture_output=True, text=True)
        message = f"error: {tmp_path / 'r.toml'}: cannot be read (No such file or directory); check the path\n"
        assert (result.returncode, result.stdout, result.stderr) == (2, "", message)


class TestOtherExits:
    def test_verbose_adds_the_traceback(self, tmp_path):
        result = d2llm("mine", tmp_path / "r.toml", "--verbose")
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: ")

    def test_interrupt_suggests_the_same_command(self, workspace, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("d2llm.training.mining.plans.mine_plans", interrupt)
        result = d2llm("mine", workspace / "tiny.toml")
        assert result.exit_code == 130
        assert "the same command again" in result.stderr
        assert "Traceback" not in result.stderr

    def test_too_few_open_files_are_an_error_with_advice(self, workspace, monkeypatch):
        def exhausted(*_, **__):
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr("d2llm.training.mining.plans.mine_plans", exhausted)
        fail("mine", workspace / "tiny.toml", containing=["error: Too many open files; free disk space", "ulimit -n"])

    def test_memory_that_ran_out_is_one_line_with_what_was_done(self, workspace, monkeypatch):
        def large(*_, **__):
            with progress_bar("mining", 5), progress_bar("choosing", 5):
                return torch.zeros(1 << 60)

        monkeypatch.setattr("d2llm.training.mining.plans.mine_plans", large)
        fail("mine", workspace / "tiny.toml", containing=["error: mine, choosing: memory ran out (", "graph_gib"])

    def test_internal_errors_keep_their_traceback(self, workspace, monkeypatch):
        def crash(*_, **__):
            raise ZeroDivisionError("ours")

        monkeypatch.setattr("d2llm.training.mining.plans.mine_plans", crash)
        result = d2llm("mine", workspace / "tiny.toml")
        assert isinstance(result.exception, ZeroDivisionError)

    def test_logging_is_restored(self):
        logger = logging.getLogger("d2llm")
        before = (logger.level, list(logger.handlers))
        d2llm("--verbose", "mine", "papre")
        assert (logger.level, list(logger.handlers)) == before
