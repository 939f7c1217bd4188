"""Near duplicates and clusters: are pairs that `d2llm duplicates` finds, and clusters of them, of one class?

    python benchmarks/similar.py ../shared/data/banking77

The corpus has the examples of each class as passages, named CLASS followed by a number (banking77: 77 intents of five
each). By threshold: pairs with a probability above it, the fraction of them within one class, and the V-measure of the
clusters, in which a passage outside all clusters is one of its own.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from sklearn.metrics import v_measure_score

from d2llm import Index
from d2llm.data.beir import read_beir
from d2llm.retrieval.similar import clusters_of, similar_pairs

THRESHOLDS = (0.9, 0.5, 0.3)


def class_of(passage_id: str) -> str:
    """The class by the passage's name."""
    return re.sub(r"[-_ ]?\d+$", "", passage_id)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--student", default="d2llm-minilm")
    options = parser.parse_args()
    passages = read_beir(options.data).passages
    with tempfile.TemporaryDirectory() as folder:
        index = Index.create(Path(folder) / "index", options.student, task="symmetric")
        index.upsert(list(passages.values()))
        for threshold in THRESHOLDS:
            found = similar_pairs(index, threshold=threshold)
            within = sum(class_of(pair.first) == class_of(pair.second) for pair in found.pairs)
            clusters = {name: name for name in passages}
            for cluster in clusters_of(found):
                clusters |= dict.fromkeys((cluster.centre, *cluster.members), cluster.centre)
            agreement = v_measure_score([class_of(name) for name in passages], [clusters[name] for name in passages])
            rate = within / max(len(found.pairs), 1)
            print(f"above {threshold}: {len(found.pairs):5} pairs, {rate:.3f} of one class; V-measure {agreement:.3f}")


if __name__ == "__main__":
    main()
