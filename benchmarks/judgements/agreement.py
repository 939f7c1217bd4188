"""How far the judge agrees with itself, and with the data sets' judgements; prints the table of README.md.

    python benchmarks/judgements/agreement.py FOLDER_OF_DATA_SETS

On the dev queries, which were judged twice in other orders. nDCG@10 is that of the order by grades, among the 20
passages of the list, by the data set's judgements of the whole corpus; the best order of the same 20 is the ceiling.
Where grades tie, the order by which the list was chosen decides neither: ties are broken by the passage's id.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from recorded_judge import GradedList, mean_grades, read_graded_lists, sets_with_dev

from d2llm.data.beir import read_beir
from d2llm.ops.measures import per_query_measures
from d2llm.ops.ranking import kendall_tau


def measured(data: Path, name: str) -> dict[str, float]:
    """The row of one data set."""
    dataset = read_beir(data / name, splits=["dev"])
    judged = dataset.qrels["dev"]
    lists = read_graded_lists(name)
    judgings = [{each.query_id: each for each in lists if each.judging == index} for index in (1, 2)]
    dev = {name: each for name, each in judgings[0].items() if each.split == "dev" and name in judgings[1]}
    first, second = ([_grades(judgings[index][query]) for query in dev] for index in (0, 1))
    pairs = [([one[name] for name in one], [two[name] for name in one]) for one, two in zip(first, second, strict=True)]
    both = [{name: (one[name] + two[name]) / 2 for name in one} for one, two in zip(first, second, strict=True)]
    qrels = {query: judged[query] for query in dev}
    flat = np.concatenate([np.array(pair) for pair in pairs], axis=1)

    def quality(graded: list[dict[str, float]]) -> float:
        rankings = {
            query: sorted(grades, key=lambda name: (-grades[name], name))
            for query, grades in zip(dev, graded, strict=True)
        }
        return fmean(per_query_measures(rankings, qrels)["nDCG@10"].values())

    three = mean_grades([*(each for each in lists if each.split == "dev"), *read_graded_lists(f"best/{name}")])
    best = [{name: judged[query].get(name, 0.0) for name in grades} for query, grades in zip(dev, first, strict=True)]
    return {
        "train lists": sum(each.split == "train" for each in lists),
        "dev lists": len(dev),
        "Pearson": float(np.corrcoef(flat)[0, 1]),
        "Kendall": fmean(kendall_tau(*pair) for pair in pairs),
        "mean difference": float(np.abs(flat[0] - flat[1]).mean()),
        "nDCG@10, first": quality(first),
        "second": quality(second),
        "mean of both": quality(both),
        "with the third": quality([three[query] for query in dev]),
        "best order": quality(best),
    }


def _grades(each: GradedList) -> dict[str, float]:
    return dict(zip(each.passages, map(float, each.grades), strict=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    given = parser.parse_args()
    rows = {name: measured(given.data, name) for name in sets_with_dev()}
    columns = [*next(iter(rows.values()))]
    print("| set | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name, row in rows.items():
        print(
            f"| {name} | "
            + " | ".join(f"{value:.3f}" if value % 1 else f"{value:.0f}" for value in row.values())
            + " |"
        )


if __name__ == "__main__":
    main()
