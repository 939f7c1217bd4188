"""Rows appended to a file are there afterwards, and what is wrong with the file is noticed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xxhash

from d2llm.core.errors import DataFormatError
from d2llm.store import vector_file
from d2llm.store.vector_file import VectorFile

SIZE = 6


def _codes(number, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, SIZE), np.uint8)


@pytest.fixture
def file(tmp_path):
    made = VectorFile.create(tmp_path, 3, SIZE)
    assert made.append(_codes(5)) == 0
    assert made.append(_codes(2, seed=1)) == 5
    return made


def _change(file, **changes):
    path = file.path.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_layout(file, tmp_path):
    rows = np.concatenate([_codes(5), _codes(2, seed=1)])
    assert (tmp_path / "vectors-3.bin").read_bytes() == rows.tobytes()
    record = json.loads((tmp_path / "vectors-3.json").read_text())
    assert len(record.pop("own_checksum")) == 16
    checksum = xxhash.xxh3_64_hexdigest(rows.tobytes())
    assert record == {"code_size": SIZE, "since": 0, "extents": [[0, 7, checksum]]}
    again = VectorFile.open(tmp_path, 3, SIZE)
    assert again.capacity == 7
    np.testing.assert_array_equal(again.codes(), rows)
    assert again.damaged(again.codes()) == []
    assert not again.codes().flags.writeable


def test_a_new_extent_begins_when_one_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_file, "_JOINED_ROWS", 8)
    file = VectorFile.create(tmp_path, 0, SIZE)
    for number in (3, 5, 1, 9, 2):
        file.append(_codes(number, seed=number))
    assert [(extent.start, extent.count) for extent in file.extents] == [(0, 8), (8, 1), (9, 9), (18, 2)]
    assert file.damaged(file.codes()) == []


def test_what_a_crash_left_behind_the_last_row_is_overwritten(file, tmp_path):
    with file.path.open("ab") as stream:
        stream.write(b"half of a row")
    again = VectorFile.open(tmp_path, 3, SIZE)
    assert again.append(_codes(1, seed=2)) == 7
    np.testing.assert_array_equal(again.codes()[7], _codes(1, seed=2)[0])
    assert again.damaged(again.codes()) == []


@pytest.mark.parametrize("place", [0, 3 * SIZE, 7 * SIZE - 1])
def test_a_flipped_byte_is_noticed_and_later_rows_do_not_hide_it(file, place):
    content = bytearray(file.path.read_bytes())
    content[place] ^= 1
    file.path.write_bytes(content)
    damaged = file.damaged(file.codes())
    assert [(extent.start, extent.count) for extent in damaged] == [(0, 7)]
    again = VectorFile.open(file.path.parent, 3, SIZE)
    again.append(_codes(4, seed=5))
    assert [(extent.start, extent.count) for extent in again.extents] == [(0, 7), (7, 4)]
    assert again.damaged(again.codes()) == damaged


@pytest.mark.parametrize(
    "changes",
    [
        {"code_size": SIZE + 1},
        {"since": "0"},
        {"since": None},
        {"extents": [[0, 8, "00"]]},  # more than there is
        {"extents": [[1, 4, "00"]]},
        {"extents": [[0, 2, "00"], [3, 2, "00"]]},
        {"extents": [[0, 4, "00"], [3, 2, "00"]]},
        {"extents": [[0, -1, "00"]]},
        {"extents": [[0, 0, "00"]]},
        {"extents": [[0, 2.0, "00"]]},
        {"extents": [[0, True, "00"]]},
        {"extents": [["0", "1", "00"]]},
        {"extents": [[0, 1]]},
        {"extents": [[0, 10**40, "00"]]},
        {"extents": None},
        {"extents": 7},
    ],
)
def test_a_list_of_extents_that_does_not_fit_is_refused(file, changes):
    _change(file, **changes)
    with pytest.raises(DataFormatError, match=r"vectors-3\.bin: its vectors cannot be used .*rebuilds them"):
        VectorFile.open(file.path.parent, 3, SIZE)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b'"text"', b"\xff\xfe", b"{}"])
def test_garbage_in_the_list_of_extents(file, content):
    file.path.with_suffix(".json").write_bytes(content)
    with pytest.raises(DataFormatError, match="rebuilds them"):
        VectorFile.open(file.path.parent, 3, SIZE)


@pytest.mark.parametrize("suffix", [".bin", ".json"])
def test_a_missing_part(file, suffix):
    file.path.with_suffix(suffix).unlink()
    with pytest.raises(DataFormatError, match="No such file"):
        VectorFile.open(file.path.parent, 3, SIZE)


def test_a_truncated_file(file):
    file.path.write_bytes(file.path.read_bytes()[:-1])
    with pytest.raises(DataFormatError, match="shorter than its list of extents says"):
        VectorFile.open(file.path.parent, 3, SIZE)


def test_a_file_in_the_place_of_another_leaves_other_names_of_it_alone(file, tmp_path):
    (tmp_path / "linked").hardlink_to(file.path)
    mapped, before = file.codes(), file.path.read_bytes()
    new = VectorFile.replace(tmp_path, 3, _codes(2, seed=9), since=4)
    assert new.since == 4
    np.testing.assert_array_equal(new.codes(), _codes(2, seed=9))
    VectorFile.create(tmp_path, 3, SIZE)
    assert (tmp_path / "linked").read_bytes() == before
    np.testing.assert_array_equal(mapped[:5], _codes(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linked", "vectors-3.bin", "vectors-3.json"]


def test_half_of_a_replacement_is_noticed(file, tmp_path):
    """Killed between its two renames: the new rows under the old list."""
    (tmp_path / "new").mkdir()
    other = VectorFile.create(tmp_path / "new", 3, SIZE)
    other.append(_codes(7, seed=8))
    other.path.replace(file.path)
    again = VectorFile.open(tmp_path, 3, SIZE)
    assert len(again.damaged(again.codes())) == 1


def test_generations(tmp_path):
    for number in (0, 12):
        VectorFile.create(tmp_path, number, SIZE)
    (tmp_path / "vectors-x.bin").touch()
    assert sorted(vector_file.generations(tmp_path)) == [0, 12]
    assert vector_file.remove(tmp_path, 12) > 0
    assert vector_file.remove(tmp_path, 12) == 0
    assert list(vector_file.generations(tmp_path)) == [0]
    empty = VectorFile.open(tmp_path, 0, SIZE)
    assert empty.codes().shape == (0, SIZE)
    assert empty.damaged(empty.codes()) == []


def test_a_generation_counts_only_when_both_parts_are_there(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VectorFile, "_write_extents", refuse)
    with pytest.raises(OSError, match="No space left"):
        VectorFile.create(tmp_path, 1, SIZE)
    assert list(vector_file.generations(tmp_path)) == []
