import json

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, DuplicateIdError, IndexMismatchError, InputError
from d2llm.core.types import Passage
from d2llm.index.folder import FolderIndex, content_hash

PASSAGES = [
    Passage("p1", "A cat sleeps.", "Cats"),
    Passage("p2", "地铁首班车几点？"),
    Passage("p3", ""),
    Passage("p0", "line one\nline two\t\u2603"),
]
VECTORS = np.array([[1, 2, 3], [0.1, -4, 0], [0, 0, 0], [1e-3, 1e3, -1]], np.float32)


@pytest.fixture
def index(tmp_path):
    return FolderIndex.write(tmp_path / "index", PASSAGES, VECTORS, student_fingerprint="abc", dtype="float32")


def test_roundtrip(index):
    opened = FolderIndex.open(index.folder, student_fingerprint="abc")
    assert len(opened) == 4
    assert opened.dim == 3
    assert list(opened.all_ids) == ["p1", "p2", "p3", "p0"]
    assert opened.passages([3, 0, 1]) == [PASSAGES[3], PASSAGES[0], PASSAGES[1]]
    assert opened.passage(2) == PASSAGES[2]
    np.testing.assert_array_equal(opened.vectors([3, 0]), VECTORS[[3, 0]])
    np.testing.assert_array_equal(np.concatenate([opened.block(0, 3), opened.block(3, 4)]), VECTORS)


def test_manifest_says_what_it_is(tmp_path):
    FolderIndex.write(
        tmp_path / "i",
        PASSAGES,
        VECTORS,
        student_fingerprint="abc",
        student_config={"a": 1},
        task="symmetric",
        num_truncated=2,
    )
    manifest = json.loads((tmp_path / "i" / "manifest.json").read_text())
    assert manifest["kind"] == "index"
    assert manifest["format_version"] == 1
    assert manifest["student"] == "abc"
    assert manifest["student_config"] == {"a": 1}
    assert (manifest["count"], manifest["dim"], manifest["dtype"]) == (4, 3, "bfloat16")
    assert manifest["content_hash"] == content_hash(PASSAGES)
    assert manifest["bytes_per_passage"]["vectors"] == 6
    opened = FolderIndex.open(tmp_path / "i")
    assert (opened.task, opened.num_truncated, opened.vector_bytes_per_passage) == ("symmetric", 2, 6)


def test_bfloat16_is_rounded_to_eight_bits_of_mantissa(tmp_path):
    index = FolderIndex.write(tmp_path / "i", PASSAGES, VECTORS, student_fingerprint="s")
    # By hand: 0.1 = 1.6 * 2^-4 -> 1.6015625 * 2^-4; 1e3 = 1.953125 * 2^9 has 7 bits, so it is exact; ties to even.
    assert index.vectors([1])[0].tolist() == [0.10009765625, -4, 0]
    assert index.vectors([3])[0, 1] == 1000
    assert np.load(index.folder / "vectors.npy").dtype == np.uint16


def test_float16(tmp_path):
    index = FolderIndex.write(tmp_path / "i", PASSAGES, VECTORS, student_fingerprint="s", dtype="float16")
    np.testing.assert_array_equal(index.vectors([0, 1, 2, 3]), VECTORS.astype(np.float16).astype(np.float32))


def test_blocks_of_vectors_give_the_same_files(tmp_path, index):
    other = FolderIndex.write(
        tmp_path / "other", PASSAGES, iter([VECTORS[:1], VECTORS[1:]]), student_fingerprint="abc", dtype="float32"
    )
    for name in ("vectors.npy", "passages.arrow", "manifest.json"):
        assert (other.folder / name).read_bytes() == (index.folder / name).read_bytes()


def test_other_student(index):
    with pytest.raises(IndexMismatchError, match=r"abc.*xyz"):
        FolderIndex.open(index.folder, student_fingerprint="xyz")


def test_candidates_are_exact_and_ordered(index):
    found = index.scan(np.array([1, 0.5, 0], np.float32), 3)
    assert found.rows.tolist() == [3, 0, 2]  # 500.001, 2, 0, -1.9
    np.testing.assert_allclose(found.scores, [500.001, 2, 0], rtol=1e-6)


def test_equal_candidates_go_by_id(index):
    assert index.scan(np.zeros(3, np.float32), 3).rows.tolist() == [3, 0, 1]  # p0, p1, p2


def test_bfloat16_candidates_rank_like_float32_up_to_rounding(tmp_path):
    generator = np.random.default_rng(0)
    num = 30_000  # more than one block of the scan
    vectors = generator.standard_normal((num, 128)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    query = generator.standard_normal(128).astype(np.float32)
    query /= np.linalg.norm(query)
    passages = [Passage(f"{n:05d}", "") for n in range(num)]
    index = FolderIndex.write(tmp_path / "i", passages, vectors, student_fingerprint="s")

    found = index.scan(query, 200)
    stored = index.vectors(np.arange(num)).astype(np.float64)
    np.testing.assert_allclose(found.scores, (stored @ query.astype(np.float64))[found.rows], atol=2e-6)
    truth = vectors.astype(np.float64) @ query.astype(np.float64)
    border = np.sort(truth)[-200]
    # Rounding moves a product by at most 2^-8 |q| |p| / 2; whoever changes places lies that close to the border.
    assert (truth[found.rows] >= border - 2**-8).all()
    assert len(set(found.rows.tolist()) & set(np.argsort(-truth)[:200].tolist())) >= 195
    # The same scan over float32 vectors gives the true order.
    exact = FolderIndex.write(tmp_path / "e", passages, vectors, student_fingerprint="s", dtype="float32")
    assert exact.scan(query, 50).rows.tolist() == np.argsort(-truth)[:50].tolist()


@pytest.mark.parametrize(("query", "top_k", "message"), [([1, 2], 3, r"\(2,\).*\[3\]"), ([1, 2, 3], 0, "top_k is 0")])
def test_bad_candidate_requests(index, query, top_k, message):
    with pytest.raises(InputError, match=message):
        index.scan(np.array(query, np.float32), top_k)


def test_no_passages(tmp_path):
    with pytest.raises(InputError, match="no passages"):
        FolderIndex.write(tmp_path / "i", [], np.zeros((0, 3), np.float32), student_fingerprint="s")


def test_duplicate_ids(tmp_path):
    passages = [*PASSAGES[:3], Passage("p1", "again")]
    with pytest.raises(DuplicateIdError, match=r"passages 1 and 4 share the id 'p1'"):
        FolderIndex.write(tmp_path / "i", passages, VECTORS, student_fingerprint="s")


@pytest.mark.parametrize("vectors", [VECTORS[:3], np.vstack([VECTORS, VECTORS]), iter([VECTORS[:2], VECTORS[2:, :2]])])
def test_vectors_that_do_not_fit_leave_nothing_behind(tmp_path, vectors):
    with pytest.raises(InputError, match=r"fit|one vector per passage"):
        FolderIndex.write(tmp_path / "i", PASSAGES, vectors, student_fingerprint="s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "bfloat16"), (np.inf, "float32"), (1e6, "float16")])
def test_values_that_are_not_finite(tmp_path, value, dtype):
    vectors = VECTORS.copy()
    vectors[1, 0] = value
    with pytest.raises(InputError, match=rf"1 vectors are not finite as {dtype}.*'p2'"):
        FolderIndex.write(tmp_path / "i", PASSAGES, vectors, student_fingerprint="s", dtype=dtype)


def test_unknown_dtype(tmp_path):
    with pytest.raises(InputError, match=r"'int3' is unknown; use one of bfloat16"):
        FolderIndex.write(tmp_path / "i", PASSAGES, VECTORS, student_fingerprint="s", dtype="int3")


def test_an_index_is_replaced_only_on_request(index):
    with pytest.raises(InputError, match="already holds an index"):
        FolderIndex.write(index.folder, PASSAGES, VECTORS, student_fingerprint="new")
    FolderIndex.write(index.folder, PASSAGES, VECTORS, student_fingerprint="new", overwrite=True)
    assert FolderIndex.open(index.folder).student_fingerprint == "new"
    assert index.passage(0) == PASSAGES[0]  # the open one goes on reading what it opened


def test_another_folder_is_never_replaced(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not a d2llm index"):
        FolderIndex.write(tmp_path / "precious", PASSAGES, VECTORS, student_fingerprint="s", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("name", ["manifest.json", "vectors.npy", "passages.arrow"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_damaged_folder(index, name, damage):
    path = index.folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else content[: len(content) - 20])
    with pytest.raises(DataFormatError, match=name):
        FolderIndex.open(index.folder)


def test_files_of_another_index(tmp_path, index):
    other = FolderIndex.write(tmp_path / "o", PASSAGES[:3], VECTORS[:3], student_fingerprint="abc", dtype="float32")
    (index.folder / "passages.arrow").write_bytes((other.folder / "passages.arrow").read_bytes())
    with pytest.raises(DataFormatError, match="holds 3 passages, but the manifest says 4"):
        FolderIndex.open(index.folder)
    (index.folder / "vectors.npy").write_bytes((other.folder / "vectors.npy").read_bytes())
    with pytest.raises(DataFormatError, match=r"vectors.npy: holds float32 \(3, 3\)"):
        FolderIndex.open(index.folder)


@pytest.mark.parametrize(("key", "value"), [("count", "4"), ("dtype", "int3"), ("student", None)])
def test_manifest_with_a_bad_field(index, key, value):
    path = index.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DataFormatError, match=key):
        FolderIndex.open(index.folder)


def test_content_hash_sees_every_field_and_the_order():
    base = [Passage("a", "b", "c"), Passage("d", "e", "f")]
    variants = [
        base,
        base[::-1],
        base[:1],
        [Passage("a", "bc", ""), base[1]],
        [Passage("a", "c", "b"), base[1]],
        [Passage("ab", "", "c"), base[1]],
    ]
    assert len({content_hash(passages) for passages in variants}) == len(variants)
