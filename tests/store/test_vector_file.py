"""Appended rows can be read back, and damage to the file is detected."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xxhash

from d2llm.core.errors import DataFormatError
from d2llm.store import vector_file
from d2llm.store.vector_file import IntactExtents, VectorFile

SIZE = 6


def _codes(number, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, SIZE), np.uint8)


@pytest.fixture
def file(tmp_path):
    file = VectorFile.create(tmp_path, 3, SIZE)
    assert file.append(_codes(5)) == 0
    assert file.append(_codes(2, seed=1)) == 5
    return file


def _change_record(file, **changes):
    path = file.path.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_layout(file, tmp_path):
    rows = np.concatenate([_codes(5), _codes(2, seed=1)])
    assert (tmp_path / "vectors-3.bin").read_bytes() == rows.tobytes()
    record = json.loads((tmp_path / "vectors-3.json").read_text())
    assert len(record.pop("own_checksum")) == 16
    checksum = xxhash.xxh3_64_hexdigest(rows.tobytes())
    assert record == {"code_size": SIZE, "since": 0, "extents": [[0, 7, checksum]]}
    reopened = VectorFile.open(tmp_path, 3, SIZE)
    assert reopened.capacity == 7
    np.testing.assert_array_equal(reopened.codes(), rows)
    assert reopened.damaged(reopened.codes()) == []
    assert not reopened.codes().flags.writeable


def test_an_intact_extent_is_compared_once(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_file, "_JOINED_ROWS", 4)
    file = VectorFile.create(tmp_path, 0, SIZE)
    file.append(_codes(4))
    file.append(_codes(3, seed=1))
    compared, checksum = [], vector_file._checksum
    monkeypatch.setattr(vector_file, "_checksum", lambda codes: compared.append(len(codes)) or checksum(codes))
    intact = IntactExtents()
    assert intact.damaged(file, file.codes()) == []
    file.append(_codes(5, seed=2))  # whose checksum is computed as well
    reopened = VectorFile.open(tmp_path, 0, SIZE)
    assert intact.damaged(reopened, reopened.codes()) == []
    assert compared == [4, 3, 5, 5]


def test_a_damaged_file_with_the_inode_of_a_removed_one_is_compared(tmp_path):
    file = VectorFile.create(tmp_path, 0, SIZE)
    file.append(_codes(4))
    content = file.path.read_bytes()
    intact = IntactExtents()
    assert intact.damaged(file, file.codes()) == []
    file.path.unlink()
    file.path.write_bytes(bytes([content[0] ^ 1, *content[1:]]))
    assert intact.damaged(file, file.codes()) == file.extents


def test_extents_that_are_not_intact_are_compared_again(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_file, "_JOINED_ROWS", 4)
    file = VectorFile.create(tmp_path, 0, SIZE)
    file.append(_codes(4))
    file.append(_codes(3, seed=1))
    content = bytearray(file.path.read_bytes())
    content[-1] ^= 1
    file.path.write_bytes(content)
    intact = IntactExtents()
    assert [extent.start for extent in intact.damaged(file, file.codes())] == [4]
    assert [extent.start for extent in intact.damaged(file, file.codes())] == [4]
    replaced = VectorFile.replace(tmp_path, 0, np.concatenate([_codes(4), _codes(3, seed=1)]), since=0)
    content[0] ^= 1
    replaced.path.write_bytes(content)  # a new file, of which nothing is known
    assert [extent.start for extent in intact.damaged(replaced, replaced.codes())] == [0]


def test_a_new_extent_begins_when_one_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_file, "_JOINED_ROWS", 8)
    file = VectorFile.create(tmp_path, 0, SIZE)
    for number in (3, 5, 1, 9, 2):
        file.append(_codes(number, seed=number))
    assert [(extent.start, extent.count) for extent in file.extents] == [(0, 8), (8, 1), (9, 9), (18, 2)]
    assert file.damaged(file.codes()) == []


def test_a_partial_row_left_by_a_crash_is_overwritten(file, tmp_path):
    with file.path.open("ab") as stream:
        stream.write(b"half of a row")
    reopened = VectorFile.open(tmp_path, 3, SIZE)
    assert reopened.append(_codes(1, seed=2)) == 7
    np.testing.assert_array_equal(reopened.codes()[7], _codes(1, seed=2)[0])
    assert reopened.damaged(reopened.codes()) == []


@pytest.mark.parametrize("offset", [0, 3 * SIZE, 7 * SIZE - 1])
def test_a_flipped_byte_is_detected_even_after_appending(file, offset):
    content = bytearray(file.path.read_bytes())
    content[offset] ^= 1
    file.path.write_bytes(content)
    damaged = file.damaged(file.codes())
    assert [(extent.start, extent.count) for extent in damaged] == [(0, 7)]
    reopened = VectorFile.open(file.path.parent, 3, SIZE)
    reopened.append(_codes(4, seed=5))
    assert [(extent.start, extent.count) for extent in reopened.extents] == [(0, 7), (7, 4)]
    assert reopened.damaged(reopened.codes()) == damaged


@pytest.mark.parametrize(
    "changes",
    [
        {"code_size": SIZE + 1},
        {"since": "0"},
        {"since": None},
        {"extents": [[0, 8, "00"]]},  # more rows than the file has
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
def test_an_invalid_list_of_extents_is_rejected(file, changes):
    _change_record(file, **changes)
    with pytest.raises(DataFormatError, match=r"vectors-3\.bin: its vectors cannot be used .*rebuilds them"):
        VectorFile.open(file.path.parent, 3, SIZE)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b'"text"', b"\xff\xfe", b"{}"])
def test_a_garbage_list_of_extents_is_rejected(file, content):
    file.path.with_suffix(".json").write_bytes(content)
    with pytest.raises(DataFormatError, match="rebuilds them"):
        VectorFile.open(file.path.parent, 3, SIZE)


@pytest.mark.parametrize("suffix", [".bin", ".json"])
def test_a_missing_file_is_an_error(file, suffix):
    file.path.with_suffix(suffix).unlink()
    with pytest.raises(DataFormatError, match="No such file"):
        VectorFile.open(file.path.parent, 3, SIZE)


def test_a_truncated_file_is_an_error(file):
    file.path.write_bytes(file.path.read_bytes()[:-1])
    with pytest.raises(DataFormatError, match="shorter than its list of extents says"):
        VectorFile.open(file.path.parent, 3, SIZE)


def test_replacing_a_file_leaves_its_hard_links_alone(file, tmp_path):
    (tmp_path / "linked").hardlink_to(file.path)
    mapped, before = file.codes(), file.path.read_bytes()
    new = VectorFile.replace(tmp_path, 3, _codes(2, seed=9), since=4)
    assert new.since == 4
    np.testing.assert_array_equal(new.codes(), _codes(2, seed=9))
    VectorFile.create(tmp_path, 3, SIZE)
    assert (tmp_path / "linked").read_bytes() == before
    np.testing.assert_array_equal(mapped[:5], _codes(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linked", "vectors-3.bin", "vectors-3.json"]


def test_an_incomplete_replacement_is_detected(file, tmp_path):
    """Killed between its two renames: the new rows have the old list of extents."""
    (tmp_path / "new").mkdir()
    other = VectorFile.create(tmp_path / "new", 3, SIZE)
    other.append(_codes(7, seed=8))
    other.path.replace(file.path)
    reopened = VectorFile.open(tmp_path, 3, SIZE)
    assert len(reopened.damaged(reopened.codes())) == 1


def test_listing_and_removing_generations(tmp_path):
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


def test_a_generation_counts_only_if_both_files_exist(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VectorFile, "_write_extents", fail)
    with pytest.raises(OSError, match="No space left"):
        VectorFile.create(tmp_path, 1, SIZE)
    assert list(vector_file.generations(tmp_path)) == []


def test_a_list_of_extents_that_is_nested_too_deeply_is_refused(tmp_path):
    VectorFile.create(tmp_path, 0, 4)
    vector_file.path_of(tmp_path, 0).with_suffix(".json").write_text("[" * 100_000)
    with pytest.raises(DataFormatError, match=r"vectors.*nested too deeply"):
        VectorFile.open(tmp_path, 0, 4)
