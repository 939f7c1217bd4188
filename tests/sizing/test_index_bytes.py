"""Predicted bytes beside those of a real index, made by the tiny student."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest

from d2llm import Index
from d2llm.core.files import folder_bytes
from d2llm.models.document_expansion import DocumentExpansion
from d2llm.ops.bm25_words import terms
from d2llm.sizing.index_bytes import StudentFacts, index_parts
from d2llm.sizing.plan import SizePlan
from d2llm.sizing.texts import read_text_facts
from d2llm.store.ann import NEIGHBOURS, ann_bytes
from d2llm.store.word_files import segment_bytes
from d2llm.store.word_segment import WordSegment
from sizing.sized_index import passages, token_student

NUM = 1_000


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return token_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module", params=[("bfloat16", 2, "int3"), ("int8", 1, "none")], ids=lambda each: each[0])
def built(request, student, tmp_path_factory):
    """An index of 1,000 passages, the plan for it, and what it was predicted to take from 800 other passages."""
    vector_format, copies, windows = request.param
    texts = read_text_facts(passages(800, seed=1), student, "800 others")
    options = {"vector_format": vector_format, "vector_copies": copies, "window_vectors": windows}
    plan = SizePlan(passages=NUM, tokens=round(texts.tokens), **options)
    facts = StudentFacts.of_student(student, plan)
    parts = {part.part: part for part in index_parts(plan, facts, texts, NUM, approximate=False)}
    index = Index.create(tmp_path_factory.mktemp("built") / "index", student, token_vectors="int4", **options)
    index.add(passages(NUM))
    index.compact(timedelta(0))
    return index, plan, parts


def bytes_of(index, pattern):
    return sum(path.stat().st_size for path in index.folder.glob(pattern))


def test_the_folder_is_as_large_as_predicted(built):
    index, _, parts = built
    assert sum(part.disk for part in parts.values()) == pytest.approx(folder_bytes(index.folder), rel=0.03)


def test_each_part_is_as_large_as_predicted(built):
    index, plan, parts = built
    vectors = bytes_of(index, "vectors-*")
    in_table = vectors if plan.vector_copies == 2 else 0
    table = (index.folder / "passages.db").stat().st_size - in_table
    assert parts["texts and ids"].disk == pytest.approx(table, rel=0.05)
    assert parts[f"vectors, {plan.vector_format}"].disk == pytest.approx(vectors + in_table, rel=0.01)
    assert parts["words"].disk == pytest.approx(bytes_of(index, "words-*"), rel=0.05)
    if plan.window_vectors != "none":
        assert parts["vectors of windows, int3"].disk == pytest.approx(bytes_of(index, "window-*"), rel=0.05)
    assert parts["vectors of tokens, int4"].disk == pytest.approx(bytes_of(index, "token-*"), rel=0.05)


def test_the_memory_of_a_view_is_as_predicted(built):
    index, plan, parts = built
    view = index.unsharded_view
    assert parts[f"vectors, {plan.vector_format}"].memory == view.capacity * view.format.code_size
    assert parts["texts and ids"].memory == 0
    words = view.words
    norms = words._norms.norm_of.nbytes
    assert parts["words"].memory == pytest.approx(words.num_bytes + norms, rel=0.05)
    for kind, name in (("token", "int4"), ("window", plan.window_vectors)):
        if name == "none":
            continue
        mapped = bytes_of(index, f"{kind}-*.bin")
        copied = getattr(view, f"{kind}s")._extents.nbytes
        assert parts[f"vectors of {kind}s, {name}"].memory == pytest.approx(mapped + copied, rel=0.05)


def test_every_part_names_what_it_was_computed_from(built):
    _, _, parts = built
    assert all(part.basis for part in parts.values())


def test_bytes_of_words_are_those_of_the_arrays():
    segment = WordSegment.from_texts(passage.full_text for passage in passages(100))
    arrays = segment.num_bytes
    assert segment_bytes(len(segment), len(segment.terms), len(segment.rows), len(segment.tokens)) == arrays


def test_bytes_of_an_approximate_index_are_those_of_its_file(tmp_path):
    import faiss

    vectors = np.random.default_rng(0).standard_normal((2_000, 32)).astype(np.float32)
    graph = faiss.IndexHNSWFlat(32, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    graph.add(vectors)
    faiss.write_index(graph, str(tmp_path / "file"), faiss.IO_FLAG_SKIP_STORAGE)
    assert ann_bytes(2_000) == pytest.approx((tmp_path / "file").stat().st_size, rel=0.03)


def test_words_that_passages_lack_are_counted(student, tmp_path):
    texts = [passage.full_text for passage in passages(NUM)]
    vocabulary = sorted({term for text in texts for term in terms(text)})[:200]
    random = np.random.default_rng(0)
    student.document_expansion = DocumentExpansion(
        terms=tuple(vocabulary),
        usual=np.full(len(vocabulary), 0.1, np.float32),
        middle=np.zeros(student.vector_dim, np.float32),
        weights=random.normal(size=(student.vector_dim, len(vocabulary))).astype(np.float32),
        rarity=np.ones(len(vocabulary), np.float32),
        num_passages={},
        explained={},
    )
    try:
        plan = SizePlan(passages=NUM, tokens=20)
        facts = StudentFacts.of_student(student, plan)
        with_words = Index.create(tmp_path / "with", student, window_vectors=None, token_vectors=None)
        with_words.add(passages(NUM))
    finally:
        student.document_expansion = None
    without = Index.create(tmp_path / "without", student, window_vectors=None, token_vectors=None)
    without.add(passages(NUM))
    for index in (with_words, without):
        index.compact(timedelta(0))
    read = read_text_facts(passages(800, seed=1), student, "800 others")
    parts = {part.part: part for part in index_parts(plan, facts, read, NUM, approximate=False)}
    more = folder_bytes(with_words.folder) - folder_bytes(without.folder)
    assert parts["words that passages lack"].disk == pytest.approx(more, rel=0.25)
    grown = with_words.unsharded_view.words.num_bytes - without.unsharded_view.words.num_bytes
    assert parts["words that passages lack"].memory == pytest.approx(grown, rel=0.05)
