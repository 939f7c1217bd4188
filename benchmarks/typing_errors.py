"""What correcting typing errors is worth: nDCG@10 on dev queries, with and without random errors.

python benchmarks/typing_errors.py ../shared/data/squad-sent ../shared/data/banking77 ../shared/data/stackfaq
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
from pathlib import Path
from string import ascii_lowercase

from d2llm import Index, Query
from d2llm.data.beir import read_beir
from d2llm.ops.measures import per_query_measures

_WORD = re.compile(r"[A-Za-z]{4,}")


def with_error(word: str, chance: random.Random) -> str:
    """A word with a random one of Damerau's four errors at a random place."""
    kind, at, letter = chance.randrange(4), chance.randrange(len(word)), chance.choice(ascii_lowercase)
    if kind == 3:
        at = min(at, len(word) - 2)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + ("", letter, letter)[kind] + word[at + (kind != 1) :]


def misspelt(text: str, num_errors: int, chance: random.Random) -> str:
    """A text with errors in so many of its words, as far as it has them."""
    words = list(_WORD.finditer(text))
    for match in sorted(chance.sample(words, min(num_errors, len(words))), key=lambda match: -match.start()):
        text = text[: match.start()] + with_error(match[0].lower(), chance) + text[match.end() :]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--student", default="d2llm-minilm")
    parser.add_argument("--queries", type=int, default=400)
    arguments = parser.parse_args()
    for folder in arguments.data:
        dataset, chance = read_beir(folder), random.Random(0)
        qrels = dataset.qrels["dev"]
        queries = [dataset.queries[name] for name in list(qrels)[: arguments.queries]]
        with tempfile.TemporaryDirectory() as work_folder:
            task = "symmetric" if folder.name == "banking77" else "asymmetric"
            index = Index.create(Path(work_folder) / "index", arguments.student, task=task)
            index.upsert(dataset.passages)
            for num_errors in range(3):
                asked = [Query(query.id, misspelt(query.text, num_errors, chance)) for query in queries]
                for tolerant in (False, True):
                    rankings = index.search(asked, typo_tolerance=tolerant)
                    results = {one.query.id: [result.passage.id for result in one] for one in rankings}
                    values = per_query_measures(results, {name: qrels[name] for name in results})["nDCG@10"].values()
                    num_changed = sum(bool(ranking.corrections) for ranking in rankings)
                    print(
                        f"{folder.name}: {num_errors} errors, {'on' if tolerant else 'off'}: "
                        f"{sum(values) / len(values):.4f}, {num_changed} of {len(queries)} queries corrected"
                    )


if __name__ == "__main__":
    main()
