"""Write the tables of docs/recipes.md: of methods, from their classes; of figures, from the files of the benchmarks.

    python scripts/recipe_tables.py

Another kind of method is another block ``<!-- methods SECTION:begin -->`` (``d2llm.reports.methods``). Reads
losses.json, untrained.json, pretraining.json, cross-lingual.json, static.json and static-trained*.json of
benchmarks/results; no figure of these tables is typed by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from prose import wrapped
from published_names import published_names

from d2llm.recipe.variants import VARIANTS
from d2llm.reports.methods import MethodFacts, describe_methods

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "recipes.md"
ADDRESS = re.compile(r"(arXiv (\d{4}\.\d{5}))")


def main() -> None:
    """Write all tables."""
    text = PAGE.read_text(encoding="utf-8")
    described = describe_methods()
    for section, kinds in described.items():
        text = between(text, f"methods {section}", methods(kinds))
    names = [("name", "where", "measured, or why not", "figures"), *published_names(described)]
    text = between(text, "names", markdown(names, num_texts=4))
    text = between(text, "losses", losses(json.loads((RESULTS / "losses.json").read_text(encoding="utf-8"))["result"]))
    text = between(text, "untrained", untrained(json.loads((RESULTS / "untrained.json").read_text(encoding="utf-8"))))
    pretrained = json.loads((RESULTS / "pretraining.json").read_text(encoding="utf-8"))
    text = between(text, "pretraining", pretraining(pretrained))
    translated = json.loads((RESULTS / "cross-lingual.json").read_text(encoding="utf-8"))
    text = between(text, "cross-lingual", cross_lingual(translated))
    trained = [
        json.loads(file.read_text(encoding="utf-8"))["result"] for file in sorted(RESULTS.glob("static-trained*"))
    ]
    text = between(text, "static", static(json.loads((RESULTS / "static.json").read_text(encoding="utf-8")), trained))
    PAGE.write_text(text, encoding="utf-8")


def between(text: str, name: str, content: str) -> str:
    """The text with other content between the markers of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}\n\n{wrapped(content)}\n\n{end}{rest.split(end)[1]}"


def methods(kinds: Mapping[str, MethodFacts]) -> str:
    """A row for each kind that ships: what it is, its paper, what it needs, what it brought, its ablations."""
    shipped = {kind: facts for kind, facts in kinds.items() if facts.module.startswith("d2llm.")}
    has_ablations = any(facts.ablations for facts in shipped.values())
    lines = [["kind", "what it is", "paper", "needs", "measured", *["ablations"] * has_ablations]]
    for kind, facts in shipped.items():
        paper = ADDRESS.sub(r"[\1](https://arxiv.org/abs/\2)", facts.paper)
        ablations = [", ".join(f"`{name}`" for name in facts.ablations)] * has_ablations
        cells = (facts.what, paper, facts.needs or "nothing", facts.measured, *ablations)
        lines.append([f"`{kind}`", *(cell.replace("|", "\\|") for cell in cells)])
    return markdown(lines, num_texts=len(lines[0]))


def losses(report: dict[str, Any]) -> str:
    """A row for each loss: its weight, and what it brought."""
    measured = {row["name"]: row for row in (report["base"], *report["rows"])}
    sets = [each["name"] for each in report["sets"]]
    lines = [("setting", "weight", "mean", "difference", *sets, "s / run")]
    for variant in VARIANTS.values():
        if variant.group != "losses" and variant.name != "no-imitation":
            continue
        row = measured.get("recipe" if variant.name == "list-imitation" else variant.name)
        if row is None:  # not measured yet
            continue
        imitation = (variant.imitation or {}).items()
        weights = {loss: value["weight"] if isinstance(value, Mapping) else value for loss, value in imitation}
        loss, weight = next(iter(weights.items()), ("none: judgements alone", 0.0))
        difference = row["difference"]
        lines.append(
            (
                f"`{loss}`" if weight else loss,
                f"{weight:g}" if weight else "",
                f"{row['mean']:.4f}",
                "–" if difference is None else f"{difference:+.4f}",
                *(f"{row['by_set'][each]:.4f}" for each in sets),
                f"{fmean(run['seconds'] for run in row['runs']):.0f}",
            )
        )
    note = (
        f"nDCG@10 on dev, {len(report['seeds'])} seed{'s' * (len(report['seeds']) > 1)}; difference: minus the row of "
        "`list_imitation`, which is the recipe as it is."
    )
    notes = [note, *(f"{each[0].upper()}{each[1:]}." for each in report["notes"])]
    return f"{markdown(lines, num_texts=2)}\n\n" + "\n".join(f"- {each}" for each in notes)


def untrained(report: dict[str, Any]) -> str:
    """A row for each backbone, layers and pooling."""
    rows = report["rows"]
    described = ("model", "layers", "kept", "pooling", "head")
    # Backwards, because the first rows lack a column: their vectors have more dimensions than there are passages.
    columns = list(dict.fromkeys(name for row in rows[::-1] for name in row if name not in described))
    columns.sort(key=lambda name: name.partition(",")[0], reverse=True)
    lines = [("model", "layers", "pooling", *columns)]
    for row in rows:
        kept = row["kept"]
        layers = f"{row['layers']}: {', '.join(map(str, kept))}" if isinstance(kept, list) else row["layers"]
        pooling = "mean" if row["pooling"] == "auto" else row["pooling"]
        if "head" in row:
            pooling += " of layer {}, head {}".format(*row["head"])
        lines.append((row["model"], layers, pooling, *(f"{row[name]:.3f}" if name in row else "" for name in columns)))
    settings = report["settings"]
    note = (
        f"nDCG@10 of the cosine before any training, {settings['queries']} dev queries among at most "
        f"{settings['passages']:,} passages (`benchmarks/untrained.py`); chosen: the layers that turn the states most; "
        "entropy: those that add most to their entropy (EntroDrop); whitened-k: with a third of the dimensions."
    )
    return f"{markdown(lines, num_texts=3)}\n\n{note}"


def pretraining(report: dict[str, Any]) -> str:
    """A row for each backbone and objective of the stage before distillation."""
    kinds = {
        "full": "minilm",
        "cut": "minilm",
        "full-narrow": "minilm, 128 dimensions",
        "narrow": "minilm, 128 dimensions",
        "by-e5": "minilm, taught by e5",
        "decoder": "smollm2",
        "two-way": "smollm2, both directions",
    }
    lines = [("backbone", "layers", "objective", "learning rate", "steps", "squad-sent", "banking77", "s")]
    for row in report["rows"]:
        kind, kept = kinds[row["row"].partition("+")[0]], row["kept"]
        layers = "all" if kept is None else f"first {kept}" if isinstance(kept, int) else ", ".join(map(str, kept))
        figures = (f"{row['squad-sent']:.3f}", f"{row['banking77']:.3f}")
        if row["objective"] is None:
            lines.append((kind, layers, "none", "", "", *figures, ""))
        else:
            trained = (f"`{row['objective']}`", f"{row['rate']:g}", f"{row['steps']}")
            lines.append((kind, layers, *trained, *figures, f"{row['processor_seconds']}"))
    settings = report["settings"]
    note = (
        f"nDCG@10 of the cosine after this stage and before distillation, {settings['queries']} dev queries among at "
        f"most {settings['passages']:,} passages; {3 * settings['texts']:,} texts of the train splits of both sets, "
        "all weights trained, one seed; s: processor time of one core (`benchmarks/pretraining.py`). `attention` is "
        "`relations` with version 1 (MiniLM)."
    )
    return f"{markdown(lines, num_texts=3)}\n\n{note}"


def cross_lingual(report: dict[str, Any]) -> str:
    """A row for each student that learns from translations: what it was trained on, and what it makes of pairs."""
    measured = ("en-zh", "zh-en", "similarity zh-en", "similarity en", "stsb", "stsb-zh")
    titles = ("layers of e5", "trained by", "en to zh", "zh to en", "graded zh, en", "graded en", "stsb", "stsb-zh")
    lines = [[*titles]]
    for row in report["rows"]:
        layers, *stages = row["row"].split("+")
        trained = ", then ".join(f"`{stage}`" for stage in stages) or "nothing"
        lines.append([layers, trained, *(f"{row[name]:.3f}" for name in measured)])
    return markdown(lines, num_texts=2)


def static(report: dict[str, Any], trained: Sequence[dict[str, Any]]) -> str:
    """Speed and quality before training, and quality of trained students."""
    rows = report["rows"]
    lines = [tuple(rows[0])]
    lines += [tuple(str(value) for value in row.values()) for row in rows]
    note = (
        f"Before training: nDCG@10 of the cosine, {report['settings']['queries']} dev queries; texts a second of one "
        f"core in {report['settings']['dtype']} (`benchmarks/static.py`)."
    )
    own = json.loads((RESULTS / "losses.json").read_text(encoding="utf-8"))["result"]["base"]
    sets = [*own["by_set"]]
    after = [("backbone", "pooling", "learning rate", "mean", *sets)]
    after.append(("minilm", "pma", "LoRA", f"{own['mean']:.4f}", *(f"{own['by_set'][each]:.4f}" for each in sets)))
    for each in sorted(trained, key=lambda each: each["base"]["mean"], reverse=True):
        recipe = each["settings"]["recipe"]
        pooling = recipe["student"]["pooling"]
        after.append(
            (
                "static",
                pooling.get("kind") or pooling["method"],  # older results have the recipes of their time
                f"{recipe['training']['learning_rate']:g}",
                f"{each['base']['mean']:.4f}",
                *(f"{each['base']['by_set'][name]:.4f}" for name in sets),
            )
        )
    last = "After training as in the table of losses above, 400 queries of each set, one seed, nDCG@10 on dev."
    return f"{markdown(lines, num_texts=1)}\n\n{note}\n\n{markdown(after, num_texts=3)}\n\n{last}"


def markdown(lines: Sequence[Sequence[str]], *, num_texts: int) -> str:
    """The lines as a table, the first one as its head; all columns but the first few are aligned to the right."""
    rule = ["---" if column < num_texts else "---:" for column in range(len(lines[0]))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


if __name__ == "__main__":
    main()
