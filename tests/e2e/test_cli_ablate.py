"""``d2llm ablate`` as a user runs it."""

from __future__ import annotations

import shutil

import pytest

from d2llm.recipe.variants import VARIANTS
from e2e.command_line import succeed, succeed_with_report


@pytest.fixture(scope="module")
def ablated(workspace, reports, tmp_path_factory):
    """An ablation of the recipe against the cosine variant, one seed, on the plans and labels of the shared run."""
    folder = tmp_path_factory.mktemp("ablate")
    shutil.copytree(workspace / "run", folder / "run")
    arguments = ("ablate", workspace / "tiny.toml", "--out", folder / "run", "--dtype", "float32", "--seeds", 1)
    options = ("--variants", "cosine, rich", "--markdown", folder / "a.md", "--html", folder / "a.html")
    result, report = succeed_with_report(*arguments, *options, folder=folder)
    return folder, (*arguments, *options), result, report


def test_recipe_and_variants_are_trained_and_compared(workspace, reports, ablated):
    folder, _, result, report = ablated
    comparison = report["result"]
    assert comparison["report_version"] == 1
    assert [row["name"] for row in comparison["rows"]] == ["cosine"]
    assert comparison["same"] == {"rich": "recipe"}
    # With the recipe's own seed, training reproduces the student that distill made.
    assert comparison["base"]["runs"][0]["fingerprint"] == reports["distill"]["result"]["fingerprint"]
    assert comparison["sets"] == [
        {
            "name": "everyday",
            "task": "asymmetric",
            "num_queries": 4,
            "num_passages": 60,
            "num_training_queries": 12,
            "measure": "nDCG@10",
        }
    ]
    assert comparison["folder"].startswith(str(folder / "run" / "ablation"))
    assert "ablate: run 2 of 2: cosine, seed 0" in result.stderr
    for text in (result.stdout, (folder / "a.md").read_text(), (folder / "a.html").read_text()):
        assert f"{comparison['base']['mean']:.4f}" in text
        assert f"{comparison['rows'][0]['difference']:+.4f}" in text
        assert "tuned cosine: the plain bi-encoder" in " ".join(text.split())
        assert "rich: not trained, the same as the recipe" in text
        assert "one seed only" in text
    assert '<svg id="plot-ablation"' in (folder / "a.html").read_text()


def test_listing_needs_no_run(tmp_path):
    result, report = succeed_with_report("ablate", "--list", folder=tmp_path)
    assert [row["name"] for row in report["result"]] == list(VARIANTS)
    for variant in VARIANTS.values():
        assert f"\n{variant.name}\t" in result.stdout
    assert "changes nothing" not in result.stdout
    assert "changes nothing" in succeed("ablate", "d2llm-paper", "--list").stdout
