"""Chooses labelled pairs that a large language model grades, and writes them as packets for it.

A random sample of the pairs of a split, without their labels, in groups of 20, five groups a packet. The key (JSON)
has the ids; ``collect.py`` joins keys and answers as it does for lists, each pair as a list of one passage.

    python benchmarks/judgements/pairs.py DATA --train 1500 --dev 200 --out PACKETS --keys KEYS [--rubric inference]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from d2llm.data.beir import Dataset
from d2llm.data.pair_training import read_pair_training_set
from d2llm.data.pairs import read_pairs
from d2llm.training.mining.choose import key_of

RUBRICS = Path(__file__).parent
_GROUP, _GROUPS = 20, 5


def chosen_pairs(dataset: Dataset, split: str, number: int) -> list[tuple[str, str]]:
    """The ids of a random sample of the judged pairs of a split, of which a larger one contains a smaller one."""
    pairs = [(query, passage) for query, judged in dataset.qrels[split].items() for passage in judged]
    return sorted(pairs, key=lambda pair: key_of(0, f"{pair[0]} {pair[1]}"))[:number]


def packet(dataset: Dataset, rubric: str, groups: list[list[tuple[str, str]]]) -> str:
    """The text of a packet."""
    parts = [rubric]
    for position, group in enumerate(groups, start=1):
        lines = [
            f"[{number}] {_line(dataset.queries[query].text)} | {_line(dataset.passages[passage].full_text)}"
            for number, (query, passage) in enumerate(group, start=1)
        ]
        parts.append(f"## Query {position}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    """Choose and write the pairs of one data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rubric", default="pairs", choices=["pairs", "inference"])
    parser.add_argument("--train", type=int, default=1500)
    parser.add_argument("--dev", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keys", type=Path, required=True)
    given = parser.parse_args()
    dataset = read_pair_training_set(read_pairs(given.data, splits=["train", "dev"])).dataset
    rubric = (RUBRICS / f"rubric-{given.rubric}.md").read_text(encoding="utf-8").strip()
    for folder in (given.out, given.keys):
        folder.mkdir(parents=True, exist_ok=True)
    for split, number in (("train", given.train), ("dev", given.dev)):
        pairs = chosen_pairs(dataset, split, number)
        groups = [pairs[start : start + _GROUP] for start in range(0, len(pairs), _GROUP)]
        for position, start in enumerate(range(0, len(groups), _GROUPS), start=1):
            own = groups[start : start + _GROUPS]
            stem = f"{dataset.name}-{split}-1-{position:03d}"
            (given.out / f"{stem}.md").write_text(packet(dataset, rubric, own), encoding="utf-8")
            key = [{"pairs": group} for group in own]
            (given.keys / f"{stem}.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
        print(f"{dataset.name}-{split}: {len(pairs)} pairs in {-(-len(groups) // _GROUPS)} packets")


if __name__ == "__main__":
    main()
