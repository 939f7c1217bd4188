"""A store whose vectors are derived from the texts, and reference implementations of its contents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from d2llm.core.files import MANIFEST_NAME
from d2llm.core.types import PartKind, Passage
from d2llm.store.checksums import read_checked, write_checked
from d2llm.store.index_manifest import VectorCopies
from d2llm.store.index_spec import StoredSpec
from d2llm.store.index_store import IndexStore
from d2llm.store.part_vectors import EncodedParts
from d2llm.store.schema import MetadataSchema
from d2llm.store.vector_formats import make_format
from d2llm.store.view import PassageView

DIM = 8
FIELDS = MetadataSchema({"year": "integer", "language": "string"})


def new_store(
    folder: Path,
    vector_format: str = "bfloat16",
    fields: MetadataSchema = FIELDS,
    vector_copies: VectorCopies = 2,
    window_format: str | None = None,
    token_format: str | None = None,
    document_expansion: str | None = None,
) -> IndexStore:
    return IndexStore.create(
        folder,
        StoredSpec(
            student="student",
            dim=DIM,
            vector_format=vector_format,
            vector_copies=vector_copies,
            window_format=window_format,
            token_format=token_format,
            token_dim=None if token_format is None else DIM,
            document_expansion=document_expansion,
        ),
        metadata=fields,
    )


def vector_of(passage: Passage) -> NDArray[np.float32]:
    """A stand-in for a student's vector: normal random numbers, seeded by the text."""
    seed = xxhash.xxh3_64_intdigest(passage.full_text.encode())
    return np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)


def vectors_of(passages: Iterable[Passage]) -> NDArray[np.float32]:
    vectors = [vector_of(passage) for passage in passages]
    return np.array(vectors, np.float32).reshape(len(vectors), DIM)


def parts_of(kind: PartKind, texts: Iterable[str]) -> EncodedParts:
    """Zero to three windows or tokens per text, seeded by the text."""
    vectors, counts = [np.zeros((0, DIM), np.float32)], [0][:0]
    for text in texts:
        seed = xxhash.xxh3_64_intdigest(f"{kind}s of {text}".encode())
        counts.append(seed % 4 if text else 0)
        drawn = np.random.default_rng(seed).standard_normal((counts[-1], DIM)).astype(np.float32)
        vectors.append(drawn * (DIM**0.5 / np.linalg.norm(drawn, axis=1, keepdims=True)))
    return EncodedParts(np.concatenate(vectors), np.array(counts, np.int64), 0)


def added_words(passage: Passage) -> dict[str, float]:
    """A word that the text lacks, and how often it counts, seeded by the text."""
    seed = xxhash.xxh3_64_intdigest(f"words of {passage.full_text}".encode())
    return {"melon": 0.01 + seed % 200 / 100} if seed % 3 and passage.full_text else {}


def stored_vectors(passages: Iterable[Passage], vector_format: str) -> NDArray[np.float32]:
    """The passages' vectors as a store of this format returns them."""
    codec, passage_list = make_format(vector_format, DIM), list(passages)
    return codec.decode(codec.encode(vectors_of(passage_list), [passage.id for passage in passage_list]))


def exact_products(passages: Iterable[Passage], vector_format: str, query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inner products of a query with the stored vectors: summed in float64, then rounded."""
    codec, passage_list = make_format(vector_format, DIM), list(passages)
    levels = codec.levels(codec.encode(vectors_of(passage_list), [passage.id for passage in passage_list]))
    return np.einsum("ij,j->i", levels.astype(np.float64), codec.turn(query)).astype(np.float32)


def put(store: IndexStore, passages: Iterable[Passage]) -> int:
    """Upsert passages and return the new version."""
    passage_list = list(passages)
    with store.writing():
        changes = store.compare(passage_list)
        texts = [text.full_text for text in changes.texts]
        parts = {kind: parts_of(kind, texts) for kind in store.part_formats}
        added = [added_words(passage) for passage in changes.texts] if store.adds_words else None
        return store.write(changes, vectors_of(changes.texts), parts=parts, added=added)


def live_rows(view: PassageView) -> NDArray[np.int64]:
    return np.arange(view.capacity) if view.live is None else np.flatnonzero(view.live)


def check_contents(view: PassageView, expected: Mapping[str, Passage]) -> None:
    """Check that the view holds exactly these passages with bit-identical vectors."""
    rows = live_rows(view)
    passages = view.passages(rows)
    assert len(view) == len(expected)
    assert {passage.id: passage for passage in passages} == dict(expected)
    assert view.ids(rows) == [passage.id for passage in passages]
    expected_vectors = stored_vectors(passages, view.format.kind)
    np.testing.assert_array_equal(view.vectors(rows), expected_vectors)
    np.testing.assert_array_equal(view.block(0, view.capacity)[rows], expected_vectors)


def few_passages(number: int, start: int = 0, word: str = "word") -> dict[str, Passage]:
    """Passages p<start>, ...: their texts share two words, and each has one unique word."""
    return {
        f"p{n}": Passage(f"p{n}", f"common {word} own{n}", f"title {n}", metadata={"year": 2000 + n})
        for n in range(start, start + number)
    }


def edit_manifest(folder: Path, **changes: object) -> None:
    """Change the manifest of an index, and its checksum with it."""
    path = folder / MANIFEST_NAME
    write_checked(path, read_checked(path) | changes)
