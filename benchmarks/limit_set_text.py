"""The limit set as texts: who likes what, for a backbone, for shipped students and for heads fitted to frozen vectors.

Each two of 30 persons share one thing; 270 more persons like other things (d2llm.data.limit_set). The test queries ask
about things that no training query mentions. The heads get a linear map of MiniLM's frozen vectors to each width and
are fitted in 21 worlds: the test's own one and 20 with other persons.

`python benchmarks/limit_set_text.py` measures a small part in about two minutes, `--full` everything in
docs/limit-set.md.
"""

from __future__ import annotations

from functools import cache
from statistics import fmean
from typing import Any

import numpy as np
import torch
from limit_set import HEADS, Cell, Cells, arguments, draw_by_width, new_head, optimise, qrels_of
from torch import Tensor, nn

from d2llm.core.table import Column, Table
from d2llm.data.limit_set import make_limit_set
from d2llm.models.student import Student
from d2llm.ops.losses import in_batch_cross_entropy
from d2llm.recipe import StudentConfig, untuned_config
from d2llm.retrieval.cosine import CosineStudent, DotStudent
from d2llm.store.bm25 import WordIndex

TEXT_PERSONS, TEXT_DISTRACTORS, NUM_WORLDS = 30, 270, 20
TEXT_STEPS, TEXT_RATE = 400, 0.001
MEASURES = ("Recall@2", "nDCG@10", "Recall@100")


@cache
def text_world() -> tuple[list[Any], list[Any], dict[str, list[int]], Tensor]:
    """Passages in random order, queries, rows of each split, judgements [queries, passages]."""
    limit_set = make_limit_set(TEXT_PERSONS, num_distractors=TEXT_DISTRACTORS)
    passages = [limit_set.passages[row] for row in np.random.default_rng(1).permutation(len(limit_set.passages))]
    column = {passage.id: index for index, passage in enumerate(passages)}
    row = {query.id: index for index, query in enumerate(limit_set.queries)}
    relevant = torch.zeros(len(row), len(column), dtype=torch.bool)
    for judged in limit_set.qrels.values():
        for query_id, grades in judged.items():
            relevant[row[query_id], [column[passage_id] for passage_id in grades]] = True
    rows = {split: [row[query_id] for query_id in judged] for split, judged in limit_set.qrels.items()}
    return passages, list(limit_set.queries), rows, relevant


def measures(scores: Tensor, relevant: Tensor) -> Cell:
    """Recall@2, nDCG@10 and Recall@100, means over the queries; each has two relevant passages."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    hits = relevant.gather(1, order).double()
    gains = 1 / torch.log2(torch.arange(10) + 2.0)
    return {
        "Recall@2": hits[:, :2].sum(dim=1).mean().item() / 2,
        "nDCG@10": (hits[:, :10] @ gains.double()).mean().item() / gains[:2].sum().item(),
        "Recall@100": hits[:, :100].sum(dim=1).mean().item() / 2,
    }


def text_system(name: str) -> Cell:
    """BM25, the untuned backbone, or the shipped student, on the test queries."""
    passages, queries, rows, relevant = text_world()
    test = rows["test"]
    if name == "BM25":
        index = WordIndex.from_texts(passage.full_text for passage in passages)
        scores = np.stack([index.scores(index.query(queries[row].text)) for row in test])
        return measures(torch.from_numpy(scores), relevant[test])
    student = load_system(name)
    encoded = student.encode_passages([passage.text for passage in passages])
    passage_vectors = encoded.vectors
    query_vectors = student.encode_queries([queries[row].text for row in test]).vectors
    scores = np.stack([student.score(vector, passage_vectors, "asymmetric") for vector in query_vectors])
    return {**measures(torch.from_numpy(scores), relevant[test]), "truncated": encoded.num_truncated}


TEXT_SYSTEMS = ("BM25", "cosine, untuned MiniLM", "d2llm-minilm, cosine part", "d2llm-minilm")


def load_system(name: str) -> Any:
    if name == "cosine, untuned MiniLM":
        return CosineStudent(Student.create(untuned_config(StudentConfig())))
    student = Student.load("d2llm-minilm")
    return DotStudent(student) if "cosine" in name else student


@cache
def training_worlds() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Untuned MiniLM's vectors of queries and persons, with judgements: the test's own world and others.

    Queries for things that the test's world asks about in dev or test are left out everywhere.
    """
    encoder = load_system("cosine, untuned MiniLM")
    first = make_limit_set(TEXT_PERSONS, num_distractors=TEXT_DISTRACTORS)
    held_out = {query.text for query in first.queries if query.id not in first.qrels["train"]}
    worlds: list[tuple[Tensor, Tensor, Tensor]] = []
    for limit_set in (first, *(make_limit_set(TEXT_PERSONS, seed=seed) for seed in range(1, 1 + NUM_WORLDS))):
        rows = [index for index, query in enumerate(limit_set.queries) if query.text not in held_out]
        persons = limit_set.passages[:TEXT_PERSONS]
        texts = [limit_set.queries[index].text for index in rows], [person.text for person in persons]
        vectors = [torch.from_numpy(encoder.encode_passages(part).vectors) for part in texts]
        worlds.append((vectors[0], vectors[1], qrels_of(TEXT_PERSONS)[1][rows]))
    return worlds


@cache
def test_vectors() -> tuple[Tensor, Tensor]:
    """Untuned MiniLM's vectors of the test world's queries and passages."""
    passages, queries, _, _ = text_world()
    encoder = load_system("cosine, untuned MiniLM")
    texts = [query.text for query in queries], [passage.text for passage in passages]
    first, second = (torch.from_numpy(encoder.encode_passages(part).vectors) for part in texts)
    return first, second


@cache
def principal_directions(dim: int) -> Tensor:
    """[dim, width of the backbone]: the first right singular vectors of the training worlds' unit vectors."""
    vectors = torch.cat([part for queries, persons, _ in training_worlds() for part in (queries, persons)])
    return torch.linalg.svd(nn.functional.normalize(vectors, dim=1), full_matrices=False).Vh[:dim]


def fit_text(name: str, dim: int, seed: int) -> Cell:
    """A linear map of each side to ``dim`` and a head, fitted to the training worlds.

    The maps start as the principal directions, so heads with an inner product start near MiniLM's own cosine.
    """
    head = new_head(name, dim, seed, hidden=64)
    torch.manual_seed(seed)
    query_vectors, passage_vectors = test_vectors()
    _, _, rows, relevant = text_world()
    query_map, passage_map = (nn.Parameter(principal_directions(dim).clone()) for _ in range(2))

    def loss() -> Tensor:
        worlds = training_worlds()
        queries, persons, positives = worlds[int(torch.randint(len(worlds), ()))]
        batch = torch.randperm(len(queries))[:64]
        scores = head(queries[batch] @ query_map.T, persons @ passage_map.T)
        return in_batch_cross_entropy(scores, positives[batch], torch.ones_like(positives[batch]))

    def test() -> Cell:
        test_rows = rows["test"]
        scores = head(query_vectors[test_rows] @ query_map.T, passage_vectors @ passage_map.T)
        return measures(scores, relevant[test_rows])

    optimise([{"params": [query_map, passage_map, *head.parameters()], "lr": TEXT_RATE}], TEXT_STEPS, loss)
    with torch.no_grad():
        queries, persons, positives = training_worlds()[1]
        fitted_ndcg = measures(head(queries @ query_map.T, persons @ passage_map.T), positives)["nDCG@10"]
        return {"training world": fitted_ndcg, **test()}


def text(cells: Cells, name: str, dim: int, seed: int) -> Cell:
    return cells.get(("text", name, f"d={dim}", f"seed={seed}"), lambda: fit_text(name, dim, seed))


def main() -> None:
    """Measure missing cells, print the table, draw the plot."""
    options = arguments(__doc__ or "")
    cells = Cells("limit-set-text", options)
    rows = {name: [cells.get(("text", name), lambda name=name: text_system(name))] for name in TEXT_SYSTEMS}
    dims, num_seeds = ((8, 32, 128), 2) if options.full else ((128,), 1)
    fitted = {
        name: {dim: [text(cells, name, dim, seed) for seed in range(num_seeds)] for dim in dims} for name in HEADS
    }
    rows |= {f"{name}, fitted, width {dim}": fitted[name][dim] for name in HEADS for dim in dims}
    table = Table("system", Column("seeds"), *(Column(measure, ".3f") for measure in MEASURES))
    for name, seed_cells in rows.items():
        means = (fmean(cell[measure] for cell in seed_cells) for measure in MEASURES)
        table.add_row(name, len(seed_cells), *means)
    print(f"\n{table.to_markdown()}")
    cells.report()
    if options.full:
        values = {name: {dim: [cell["nDCG@10"] for cell in fitted[name][dim]] for dim in dims} for name in HEADS}
        levels = {name: rows[name][0]["nDCG@10"] for name in TEXT_SYSTEMS if name != "d2llm-minilm, cosine part"}
        draw_by_width(values, levels, "nDCG@10, queries for unseen things", "limit-set-text.svg")


if __name__ == "__main__":
    main()
