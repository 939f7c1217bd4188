"""F2: what must not change a result: order, batches, shards, versions, copies, engines, and the way of computing.

A draw is a small random index with many ties, and the same passages in an index that came about in another way. Random
searches of both must give the same; they are also compared with brute force in NumPy, with queries asked together, and
with NumPy in place of the compiled loops. Other draws compare vectors of texts that are encoded in other batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from numpy.testing import assert_allclose

from campaign.frame import Outcome, Row, main
from compiled_loops import compiled
from d2llm.core.types import Passage, Ranking
from d2llm.models.device import cpu_has_fast_bfloat16
from d2llm.models.tokens import EncodedTexts
from d2llm.retrieval.index import Index
from d2llm.retrieval.shard import shard
from d2llm.store.vector_formats import VectorFormat
from fake_models import TokenStudent, with_exact_products
from property.test_engines import EXACT, KINDS, student
from property.test_engines import WORDS as KNOWN
from sharded_index import WORDS, BoundedStudent, random_passages

AT_ONCE = 25  # cases of a draw
ENGINES_EVERY = 8  # so many draws are indexes, for one of engines


class SphereStudent(BoundedStudent):
    """Vectors of norm sqrt(dim), which all formats can store; products of float32 are exact."""

    def _encode(self, texts: Any, advance: Any) -> EncodedTexts:
        encoded = TokenStudent._encode(self, texts, advance)
        norms = np.linalg.norm(encoded.vectors, axis=1, keepdims=True) + 1e-9
        return with_exact_products(replace(encoded, vectors=4 * encoded.vectors / norms))


STUDENT = SphereStudent()
FORMATS = tuple(VectorFormat.kinds.kinds)
FILTERS: dict[str | None, Callable[[Passage], bool]] = {
    None: lambda _: True,
    "year >= 2002": lambda passage: passage.metadata["year"] in (2002, 2003),
    "year = 1999": lambda _: False,
    "year IN (2000, 2003) AND NOT document_id = ''": lambda passage: (
        passage.metadata["year"] in (2000, 2003) and passage.document_id != ""
    ),
}
HOW: tuple[dict[str, Any], ...] = (
    {},
    {"exact": True},
    {"sources": ("bm25",)},
    {"sources": ("vectors",)},
    {"sources": ("vectors", "bm25")},
    {"hybrid": 0.4},
    {"group": "best"},
    {"group": "sum"},
    {"mmr": 0.6},
    {"near_duplicates": 0.999},
    {"neighbours": 2},
    {"explain": True},
)
TERMS: tuple[dict[str, float] | None, ...] = (None, {}, {"bm25": 1.0}, {"maxsim": 2.0}, {"window_bm25": 3.0})


def _made(folder: Path, spec: dict[str, Any], passages: list[Passage], num_shards: int | None = None) -> Index:
    index = Index.create(folder, STUDENT, num_shards=num_shards, **spec)
    index.upsert(passages)
    return index


def _shuffled(root: Path, spec: dict[str, Any], passages: list[Passage], chance: random.Random) -> Index:
    return _made(root / "other", spec, chance.sample(passages, len(passages)))


def _resumed(root: Path, spec: dict[str, Any], passages: list[Passage], chance: random.Random) -> Index:
    _made(root / "other", spec, passages[: chance.randrange(len(passages))]).close()
    index = Index.open(root / "other", STUDENT)
    index.upsert(passages)
    return index


def _changed(root: Path, spec: dict[str, Any], passages: list[Passage], chance: random.Random) -> Index:
    """Older texts, passages that are deleted, perhaps compacted, perhaps restored from a snapshot."""
    older = [replace(passage, text=chance.choice(passages).text) for passage in passages if chance.random() < 0.5]
    gone = random_passages(chance.randint(1, 20), seed=chance.getrandbits(20), start=5_000)
    index = _made(root / "other", spec, chance.sample([*older, *gone], len(older) + len(gone)))
    index.upsert(passages)
    index.delete([passage.id for passage in gone])
    if chance.random() < 0.5:
        index.snapshot("kept")
        index.upsert([replace(passages[0], text="another text")])
        index.delete([passages[-1].id])
        index.restore("kept")
    if chance.random() < 0.5:
        index.compact(timedelta(0), dense=chance.random() < 0.5)
    return index


def _sharded(root: Path, spec: dict[str, Any], passages: list[Passage], chance: random.Random) -> Index:
    return _made(root / "other", spec, passages, chance.randint(1, 5))


def _split(root: Path, spec: dict[str, Any], passages: list[Passage], chance: random.Random) -> Index:
    """A copy in shards, and again into another number of them; 1 merges them."""
    with _changed(root / "changed", spec, passages, chance):
        shard(root / "changed" / "other", root / "first", chance.randint(2, 5))
    shard(root / "first", root / "other", chance.randint(1, 4))
    return Index.open(root / "other", STUDENT)


WAYS = {
    "order": _shuffled,
    "resumed": _resumed,
    "changed": _changed,
    "shards": _sharded,
    "split and merged": _split,
}


def _same(found: Ranking, expected: Ranking, what: str) -> None:
    """The same passages and scores; those whose scores differ by rounding alone may change places."""
    scores = [np.array([one.score for one in ranking.passages]) for ranking in (found, expected)]
    assert len(scores[0]) == len(scores[1]), f"{what}: {len(scores[0])} and {len(scores[1])} passages"
    assert_allclose(*scores, rtol=1e-5, atol=1e-5, err_msg=what)
    known = {one.passage.id: one.score for one in expected.passages}
    for one, other in zip(found.passages, expected.passages, strict=True):
        if one.passage.id != other.passage.id:
            last = expected.passages[-1].score
            assert_allclose(one.score, known.get(one.passage.id, last), rtol=1e-5, atol=1e-5, err_msg=what)
        else:
            assert one.passage == other.passage, what
            assert (one.before, one.after) == (other.before, other.after), what


def _brute_force(index: Index, text: str, top_k: int, condition: str | None) -> None:
    """An exact search by the vectors is what NumPy finds in them."""
    ranking = index.search(text, exact=True, top_k=top_k, filter=condition, score_features={})
    scores: dict[str, float] = {}
    query = STUDENT.prepare(STUDENT.encode_queries([text]).vectors[0], "asymmetric")
    for segment in index.view.segments:
        rows = segment.live_rows()
        passages, vectors = segment.passages(rows), segment.vectors(rows).astype(np.float64)
        values = vectors @ query.dot_query + np.tanh(vectors[:, 0] * query.query[1])
        scores |= {p.id: value for p, value in zip(passages, values.tolist(), strict=True) if FILTERS[condition](p)}
    found = [(one.passage.id, one.score) for one in ranking.passages]
    assert len(found) == min(top_k, len(scores))
    assert found == sorted(found, key=lambda pair: (-pair[1], pair[0]))
    assert_allclose([value for _, value in found], [scores[name] for name, _ in found], rtol=1e-5, atol=1e-4)
    left_out = [value for name, value in scores.items() if name not in dict(found)]
    assert not left_out or max(left_out) <= found[-1][1] + 1e-4


def _index_case(root: Path, chance: random.Random) -> str:
    with_tokens, with_windows = chance.random() < 0.5, chance.random() < 0.5
    spec = {
        "vector_format": chance.choice(FORMATS),
        "vector_copies": chance.choice((1, 2)),
        "window_vectors": chance.choice(FORMATS) if with_windows else "none",
        "token_vectors": chance.choice(FORMATS) if with_tokens else "none",
    }
    passages = random_passages(chance.choice((1, 5, 30, 90)), seed=chance.getrandbits(30))
    way = chance.choice([*WAYS])
    with _made(root / "one", spec, passages) as one, WAYS[way](root, spec, passages, chance) as other:
        asked = [" ".join(chance.choices([*WORDS, "nowhere"], k=chance.randint(1, 4))) for _ in range(AT_ONCE)]
        for number, text in enumerate(asked):
            options: dict[str, Any] = {"top_k": chance.choice((1, 3, 10, 500)), "filter": chance.choice([*FILTERS])}
            options |= chance.choice(HOW) | {"num_candidates": 500}
            options["score_features"] = chance.choice([terms for terms in TERMS if with_tokens or terms != TERMS[3]])
            what = f"{way} {spec} {text!r} {options}"
            match number % 4:
                case 0:
                    _brute_force(chance.choice([one, other]), text, options["top_k"], options["filter"])
                case 1:
                    with compiled(chance.random() < 0.5):
                        found = other.search(text, **options)
                    assert found.passages == other.search(text, **options).passages, f"compiled: {what}"
                case 2:
                    together = other.search(asked, **options)[number]
                    assert together.passages == other.search(text, **options).passages, f"together: {what}"
                case _:
                    _same(other.search(text, **options), one.search(text, **options), what)
    return f"index: {way}"


def _engine_case(chance: random.Random) -> str:
    """A vector does not depend on its batch, and exact engines agree."""
    architecture = chance.choice(("bert", "llama", "modernbert"))
    kinds = [kind for kind in KINDS if kind != "openvino-bfloat16" or cpu_has_fast_bfloat16()]
    kind = chance.choice(kinds)
    model, tolerance = student(kind, architecture), KINDS[kind][2]
    texts = [" ".join(chance.choices(KNOWN, k=chance.choice((0, 1, 5, 20, 60)))) for _ in range(AT_ONCE)]
    together = model.encode_passages(texts).vectors
    for number, text in enumerate(texts):
        alone = model.encode_passages([text]).vectors[0]
        assert_allclose(together[number], alone, rtol=0, atol=tolerance, err_msg=f"{kind} {architecture} {text!r}")
    if tolerance == EXACT:
        expected = student("torch", architecture).encode_passages(texts).vectors
        limit = 1e-4 * float(abs(expected).max())
        assert_allclose(together, expected, rtol=0, atol=limit, err_msg=f"{kind} and torch, {architecture}")
    return f"engine: {kind}"


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[random.Random], Outcome]]:
    torch.set_num_threads(1)

    def case(chance: random.Random) -> Outcome:
        if chance.randrange(ENGINES_EVERY) == 0:
            return Outcome(_engine_case(chance), cases=AT_ONCE)
        root = folder / f"{chance.getrandbits(64):x}"
        kind = _index_case(root, chance)
        rmtree(root)
        return Outcome(kind, cases=AT_ONCE)

    yield case


ROW = Row("invariances", "F2", 10_000, prepare)

if __name__ == "__main__":
    main(ROW)
