import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm import Index, Passage
from d2llm.core.errors import InputError
from d2llm.store.index_spec import FORMATS
from d2llm.store.vector_formats import FloatFormat, RotatedFormat, VectorFormat, make_format
from e2e.command_line import succeed
from fake_models import FakeStudent
from tiny_evaluations import everyone, make_dataset, measure

# Bytes of a row of 384 dimensions.
QUANTISED = {"int8": 384, "int3": 144, "binary": 48}


def sphere(num, dim, seed=0):
    """Vectors like those of a student, on the sphere of radius sqrt(dim)."""
    vectors = np.random.default_rng(seed).standard_normal((num, dim))
    return (vectors * np.sqrt(dim) / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def names(num):
    return [f"p{i}" for i in range(num)]


def relative_error(vector_format, vectors):
    decoded = vector_format.decode(vector_format.encode(vectors, names(len(vectors))))
    return np.linalg.norm(decoded - vectors, axis=1) / np.linalg.norm(vectors, axis=1)


def test_float_formats_match_hand_computed_bytes():
    vectors = np.array([[1.0, -2.5], [0.1, 3.140625]], np.float32)
    rows = {name: make_format(name, 2).encode(vectors, names(2)) for name in ("float32", "float16", "bfloat16")}
    assert rows["float32"].tobytes() == struct.pack("<4f", *vectors.ravel())
    assert rows["float16"].tobytes() == struct.pack("<4e", *vectors.ravel())
    # The upper 16 bits of float32, rounded to the nearest: 0.1 is 3dcccccd, so 3dcd; 3.140625 = 40490000 is exact.
    assert rows["bfloat16"].tobytes() == struct.pack("<4H", 0x3F80, 0xC020, 0x3DCD, 0x4049)
    assert make_format("bfloat16", 2).decode(rows["bfloat16"]).tolist() == [[1.0, -2.5], [0.10009765625, 3.140625]]


@pytest.mark.parametrize(("name", "code_size"), [("float32", 1536), ("float16", 768), *QUANTISED.items()])
def test_row_sizes(name, code_size):
    rows = make_format(name, 384).encode(sphere(3, 384), names(3))
    assert make_format(name, 384).code_size == code_size
    assert rows.shape == (3, code_size)
    assert rows.dtype == np.uint8


def test_dimensions_are_padded_to_a_multiple_of_8():
    assert make_format("int3", 13).code_size == 3 * 2
    vectors = sphere(50, 13)
    assert np.median(relative_error(make_format("int3", 13), vectors)) < 0.3
    assert np.median(relative_error(make_format("int8", 13), vectors)) < 0.03


@pytest.mark.parametrize(
    ("name", "low", "high"), [("int8", 0.015, 0.022), ("int3", 0.17, 0.22), ("binary", 0.58, 0.68)]
)
def test_quantisation_error_matches_theory(name, low, high):
    """8 bits: step / sqrt(12). 3 bits: near sqrt(.037) (Max 1960, uniform). Signs: sqrt(2 - 2 sqrt(2 / pi))."""
    errors = relative_error(make_format(name, 384), sphere(500, 384))
    assert low < errors.mean() < high


@pytest.mark.parametrize("name", QUANTISED)
def test_one_large_dimension_is_stored_as_accurately_as_any_vector(name):
    vectors = np.zeros((1, 384), np.float32)
    vectors[0, 7] = np.sqrt(384)
    mean_error = relative_error(make_format(name, 384), sphere(100, 384)).mean()
    assert relative_error(make_format(name, 384), vectors)[0] < 1.5 * mean_error


@pytest.mark.parametrize("name", FORMATS)
def test_levels_times_turned_query_give_the_decoded_product(name):
    vector_format = make_format(name, 40)
    rows = vector_format.encode(sphere(20, 40), names(20))
    query = np.random.default_rng(1).standard_normal(40).astype(np.float32)
    expected = vector_format.decode(rows).astype(np.float64) @ query
    np.testing.assert_allclose(vector_format.levels(rows) @ vector_format.turn(query), expected, atol=1e-4)
    assert np.linalg.norm(vector_format.levels(rows), axis=1).max() <= vector_format.largest_norm(rows)


def test_int3_bit_planes_match_hand_computed_values():
    """Eight levels of (number - 3.5) steps; the first byte has the highest bits, bit 0 is the first dimension."""
    vector_format, step = make_format("int3", 2), 0.5975
    rows = np.array([[0b01, 0b11, 0b10]], np.uint8)  # numbers 0b110 = 6 and 0b011 = 3
    np.testing.assert_allclose(vector_format.levels(rows), [[2.5 * step, -0.5 * step]], rtol=1e-6)
    assert vector_format.encode(vector_format.decode(rows), ["p"]).tolist() == rows.tolist()


def test_the_rotation_never_changes():
    """Existing indexes depend on it: signs from SHAKE-256 of a word, then an orthonormal DCT-II."""
    turned = make_format("int8", 16).turn(np.ones(16, np.float32))
    signs = np.array([-1, -1, 1, -1, 1, -1, 1, -1, 1, -1, -1, -1, 1, 1, -1, 1])
    positions = np.arange(16) + 0.5
    expected = [np.sqrt(2 / 16) * np.sum(signs * np.cos(np.pi / 16 * positions * k)) for k in range(16)]
    expected[0] /= np.sqrt(2)
    np.testing.assert_allclose(turned, expected, atol=1e-12)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_vectors_are_named(name, value):
    vectors = sphere(4, 24)
    vectors[2, 5] = value
    with pytest.raises(InputError, match=r"1 vector is not finite.*'p2'"):
        make_format(name, 24).encode(vectors, names(4))


def test_out_of_range_vectors_are_named():
    with pytest.raises(InputError, match="'p1'"):
        make_format("float16", 2).encode(np.array([[1, 2], [70000, 1]], np.float32), names(2))
    vectors = sphere(3, 64)
    vectors[1] *= 20
    for name in ("int8", "int3"):
        with pytest.raises(InputError, match=rf"cannot be stored as {name}.*'p1'.*norm is 160.*sqrt\(dim\) = 8;"):
            make_format(name, 64).encode(vectors, names(3))
    with pytest.raises(InputError, match="cannot be stored as int3"):
        make_format("int3", 64).encode(sphere(1, 64) / 20, ["p0"])


def test_unknown_formats_are_rejected():
    with pytest.raises(InputError, match=r"'int5' is unknown; use one of float32, .*binary"):
        make_format("int5", 8)


@pytest.mark.parametrize("name", FORMATS)
def test_empty_input_gives_empty_rows(name):
    vector_format = make_format(name, 16)
    rows = vector_format.encode(np.zeros((0, 16), np.float32), [])
    assert rows.shape == (0, vector_format.code_size)
    assert vector_format.decode(rows).shape == (0, 16)


@given(st.sampled_from(FORMATS), st.integers(2, 70), st.integers(0, 2**32 - 1))
def test_rows_do_not_depend_on_their_neighbours(name, dim, seed):
    # A vector of few dimensions may lie so near one axis of the rotation that 3 bits cannot hold it.
    vector_format, vectors = make_format(name, dim), sphere(6, dim, seed).clip(-2, 2)
    try:
        rows = vector_format.encode(vectors, names(6))
    except InputError:
        assert name == "int3"
        assert dim < 8
        return
    np.testing.assert_array_equal(rows[3:4], vector_format.encode(vectors[3:4], names(1)))
    np.testing.assert_array_equal(vector_format.decode(rows)[2:5], vector_format.decode(rows[2:5]))


# --- another format ---------------------------------------------------------------------------------------------------


class Int2(RotatedFormat, kind="int2"):
    """Of a family that is there: its numbers are enough."""

    bits, step, largest_error = 2, 0.9957, np.inf


class Sixteenths(FloatFormat, kind="sixteenths"):
    """Of a kind of its own, which FAISS does not know."""

    stored_as = np.dtype("<i2")

    def rounded(self, vectors):
        return np.round(np.asarray(vectors) * 16).astype(self.stored_as)

    def decode(self, codes):
        return super().decode(codes) / np.float32(16)

    def empty_faiss_index(self, faiss):
        raise AttributeError


@pytest.fixture(params=[Int2, Sixteenths])
def another(request, monkeypatch):
    monkeypatch.setitem(VectorFormat.kinds._classes, request.param.kind, request.param)
    yield request.param.kind
    monkeypatch.undo()


for each in (Int2, Sixteenths):  # known only where a test asks for it
    VectorFormat.kinds._classes.pop(each.kind)


def test_another_format_is_one_class(another, tmp_path):
    """A subclass with a name is stored and searched, here, by the command line and in an evaluation."""
    texts = [
        f"text {position} on {word}" for position, word in enumerate(["cats", "dogs", "fish", "cows", "mice", "hens"])
    ]
    passages = [Passage(str(position), text) for position, text in enumerate(texts)]
    student = FakeStudent()
    Index.create(tmp_path / "exact", student, vector_format="float32").upsert(passages)
    index = Index.create(tmp_path / "index", student, vector_format=another)
    index.upsert(passages)
    assert index.spec.vector_format == index.stats().vector_format == another
    index = Index.open(tmp_path / "index", student)
    view, exact = index.unsharded_view, Index.open(tmp_path / "exact", student).unsharded_view
    assert view.format.code_size == {"int2": 4, "sixteenths": 32}[another]
    rows = np.arange(len(passages))
    pairs = zip(view.vectors(rows), exact.vectors(rows), strict=True)
    cosines = [one @ other / np.linalg.norm(one) / np.linalg.norm(other) for one, other in pairs]
    assert min(cosines) > {"int2": 0.8, "sixteenths": 0.999}[another]
    found = index.search(["text 3 on cows"], top_k=6, exact=True)[0]
    assert {each.passage.id for each in found.passages} == {passage.id for passage in passages}
    assert found.certificate.proved == 6
    assert exact.stored_as(another).format.kind == another
    report = measure(make_dataset(), everyone(), tmp_path / "work", stored_as=[another])
    assert report.row(f"D2LLM, {another} vectors").num_items == 4
    assert another in succeed("size", "--passages", "1M", "--vectors", another).output


def test_a_format_that_exists_is_not_replaced():
    with pytest.raises(ValueError, match="there is a vector format 'int8'"):

        class Int8(RotatedFormat, kind="int8"):
            pass
