"""What a backbone is worth before any training: by pooling, by the layers that are kept, and whitened.

The head of the pooling `ditto` is the one with the best mean reciprocal rank on other dev queries of both sets
(``methods.poolings.ditto.choose_head``).

    python benchmarks/untrained.py                      smollm2 and minilm on two data sets, some ten minutes
    python benchmarks/untrained.py --json benchmarks/results/untrained.json
    python benchmarks/untrained.py --rows entropy --json benchmarks/results/untrained.json     only some of the rows

nDCG@10 of the plain cosine on dev queries, among their relevant passages and random ones. Layers: all, the first
ones (``backbone.layers = N``), those that turn the tokens' states most (chosen), or those that add most to their
entropy (entropy), both by ``models.layer_choice``, measured on other passages. Whitened: mean and covariance of the
passages made 0 and 1, as in Su et al., "Whitening Sentence Representations for Better Semantics and Faster Retrieval",
2021 (arXiv 2103.15316), with all dimensions; whitened-k: with a third of them, those in which the passages differ most.
Whitened `first_last` is WhiteningBERT.

Licences: squad-sent CC BY-SA 4.0, banking77 CC BY 4.0; they are only measured on.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scaling.data_sets import DATA, require

from d2llm.data.beir import Dataset, read_beir
from d2llm.methods.poolings.ditto import Ditto, choose_head
from d2llm.models.backbone import Backbone
from d2llm.models.layer_choice import choose_layers, entropy_gains, layer_distances
from d2llm.models.student import Student
from d2llm.ops.measures import per_query_measures
from d2llm.ops.whitening import whitening
from d2llm.recipe import AutoPooling, BackboneConfig, InteractionConfig, Pooling, StudentConfig

SETS = ("squad-sent", "banking77")
POOLINGS = ("mean", "first_last", "weighted_mean", "last", "ditto")
KEPT = {"smollm2": (4, 8, 16), "minilm": (2, 4, 5)}
ROWS = ("all", "first", "chosen", "entropy")
NUM_TEXTS = 100
NUM_CHOOSING, NUM_OTHERS = 50, 100  # of each set, for the head of ditto


def sample(data: Dataset, num_queries: int, num_passages: int) -> tuple[dict[str, str], dict[str, str], Any]:
    """Queries, passages and judgements: the first dev queries, their relevant passages, and random ones."""
    query_ids = list(data.qrels["dev"])[:num_queries]
    qrels = {query_id: data.qrels["dev"][query_id] for query_id in query_ids}
    relevant = dict.fromkeys(passage_id for judged in qrels.values() for passage_id in judged)
    others = [passage_id for passage_id in data.passages if passage_id not in relevant]
    random.Random(0).shuffle(others)
    ids = [*relevant, *others[: max(0, num_passages - len(relevant))]]
    return (
        {query_id: data.queries[query_id].text for query_id in query_ids},
        {passage_id: data.passages[passage_id].full_text for passage_id in ids},
        qrels,
    )


def sample_parser(description: str | None, *, num_passages: int = 1_000) -> argparse.ArgumentParser:
    """The arguments that say how much of each set is measured, and where figures go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--passages", type=int, default=num_passages)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser


def make_student(
    model: str,
    pooling: Pooling | None = None,
    layers: int | tuple[int, ...] | None = None,
) -> Student:
    """The backbone alone, with the cosine of its own pooling."""
    settings = {"model": model, "layers": layers, "tuning": "frozen"}
    config = StudentConfig(
        backbone=BackboneConfig.model_validate(settings),
        pooling=pooling or AutoPooling(),
        interaction=InteractionConfig(head="cosine"),
    )
    return Student.create(config, device="cpu", seed=0)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def whitened(
    passages: NDArray[np.float32], queries: NDArray[np.float32], dim: int | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both after the transform that makes the passages' mean 0 and their covariance 1."""
    mean, matrix = whitening(passages, dim)
    return (passages - mean) @ matrix, (queries - mean) @ matrix


def ndcg(ids: list[str], passages: NDArray[Any], query_ids: list[str], queries: NDArray[Any], qrels: Any) -> float:
    return ndcg_of_scores(ids, query_ids, unit(queries) @ unit(passages).T, qrels)


def ndcg_of_scores(ids: list[str], query_ids: list[str], scores: NDArray[Any], qrels: Any) -> float:
    rankings = {
        query_id: [ids[column] for column in np.argsort(-row, kind="stable")[:10]]
        for query_id, row in zip(query_ids, scores, strict=True)
    }
    values = per_query_measures(rankings, qrels)
    return float(np.mean(list(values["nDCG@10"].values())))


def pairs_for_choice(data: Dataset, num_measured: int) -> tuple[list[str], list[str], list[str]]:
    """Queries that are not measured, a relevant passage of each, and other passages: none of them twice."""
    positives = data.positives("dev")
    measured = list(data.qrels["dev"])[:num_measured]
    own = {  # by passage, so that no two queries have the same
        ids[0]: query_id for query_id, ids in positives.items() if ids and query_id not in measured
    }
    chosen = random.Random(0).sample([*own], min(NUM_CHOOSING, len(own)))
    others = random.Random(1).sample([each for each in data.passages if each not in own], NUM_OTHERS)
    queries = [data.queries[own[passage_id]].text for passage_id in chosen]
    return (
        queries,
        [data.passages[each].full_text for each in chosen],
        [data.passages[each].full_text for each in others],
    )


def find_ditto(model: str, pairs: list[tuple[list[str], list[str], list[str]]]) -> Ditto:
    """``ditto`` with the best head, by the queries of all sets among the passages of all."""
    config = BackboneConfig(model=model, max_passage_tokens=128)
    queries, passages, others = ([text for each in pairs for text in each[index]] for index in range(3))
    backbone = Backbone.load(config, Ditto(layer=0, head=0), device="cpu")
    return choose_head(backbone, queries, passages + others)


def rows_of(
    model: str,
    samples: dict[str, Any],
    texts: list[str],
    pairs: list[tuple[list[str], list[str], list[str]]],
    chosen_rows: list[str],
) -> list[dict[str, Any]]:
    """One row for each pooling of all layers, and for the model's own pooling of fewer layers."""
    own = "auto" if model == "minilm" else "mean"
    backbone = Backbone.load(BackboneConfig(model=model, layers=None), device="cpu")
    distances, gains = layer_distances(backbone, texts), entropy_gains(backbone, texts)
    print(f"{model}: angles of the layers", " ".join(f"{distance:.3f}" for distance in distances), flush=True)
    print(f"{model}: entropy they add", " ".join(f"{gain:.0f}" for gain in gains), flush=True)
    cases: list[tuple[str, str, int | tuple[int, ...] | None]] = [("all", pooling, None) for pooling in POOLINGS]
    ditto = find_ditto(model, pairs) if "all" in chosen_rows else Ditto(layer=0, head=0)
    for count in KEPT[model]:
        cases += [(f"first {count}", own, count), (f"chosen {count}", own, choose_layers(distances, count))]
        cases.append((f"entropy {count}", own, choose_layers(gains, count)))
    rows: list[dict[str, Any]] = []
    for layers, pooling, kept in cases:
        if layers.split()[0] not in chosen_rows:
            continue
        student = make_student(model, ditto if pooling == "ditto" else Pooling.of(pooling), kept)
        row: dict[str, Any] = {"model": model, "layers": layers, "kept": kept, "pooling": pooling}
        if pooling == "ditto":
            row["head"] = (ditto.layer, ditto.head)
        for name, (queries, passages, qrels) in samples.items():
            passage_vectors = student.encode_passages([*passages.values()]).vectors
            query_vectors = student.encode_queries([*queries.values()]).vectors
            row[name] = round(ndcg([*passages], passage_vectors, [*queries], query_vectors, qrels), 4)
            dim = passage_vectors.shape[1]
            for title, kept_dim in (("whitened", dim), ("whitened-k", dim // 3)):
                # Fewer passages do not determine the covariance; of fewer layers, all dimensions are enough.
                if len(passages) > kept_dim and (layers == "all" or kept_dim == dim):
                    p, q = whitened(passage_vectors, query_vectors, kept_dim)
                    row[f"{name}, {title}"] = round(ndcg([*passages], p, [*queries], q, qrels), 4)
        rows.append(row)
        print(" | ".join(f"{value}" for value in row.values()), flush=True)
    return rows


def main() -> None:
    parser = sample_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=[*KEPT], choices=[*KEPT])
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=ROWS)
    arguments = parser.parse_args()
    require(*(DATA / name for name in SETS))
    data = {name: read_beir(DATA / name, splits=["dev"]) for name in SETS}
    samples = {name: sample(each, arguments.queries, arguments.passages) for name, each in data.items()}
    used = samples["squad-sent"][1]
    texts = [p.full_text for i, p in data["squad-sent"].passages.items() if i not in used][:NUM_TEXTS]
    pairs = [pairs_for_choice(each, arguments.queries) for each in data.values()]
    rows = [row for model in arguments.models for row in rows_of(model, samples, texts, pairs, arguments.rows)]
    if arguments.json is not None:
        settings = {"queries": arguments.queries, "passages": arguments.passages}
        if len(arguments.rows) < len(ROWS):  # the others stay as they are
            measured = {(row["model"], row["layers"], row["pooling"]) for row in rows}
            before = json.loads(arguments.json.read_text(encoding="utf-8"))["rows"]
            rows += [row for row in before if (row["model"], row["layers"], row["pooling"]) not in measured]
            rows.sort(key=lambda row: ([*KEPT].index(row["model"]), row["layers"] != "all"))
        arguments.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
