from __future__ import annotations

import hashlib
import re
from pathlib import Path

from d2llm.core.fingerprint import fingerprint_files, fingerprint_json, fingerprint_passages
from d2llm.core.types import Passage


def write(folder: Path, files: dict[str, bytes]) -> list[Path]:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def test_the_json_fingerprint_hashes_the_canonical_text():
    expected = hashlib.sha256(b'{"a":[1,2.5,null],"b":true}').hexdigest()[:16]
    assert fingerprint_json({"b": True, "a": [1, 2.5, None]}) == expected


def test_key_order_does_not_matter_but_list_order_does():
    assert fingerprint_json({"a": 1, "b": 2}) == fingerprint_json({"b": 2, "a": 1})
    assert fingerprint_json([1, 2]) != fingerprint_json([2, 1])


def test_json_values_of_different_type_differ():
    values = [1, "1", [1], {"1": 1}, None, True, 1.5, "", "é", "\ud800"]
    assert len({fingerprint_json(value) for value in values}) == len(values)


def test_file_fingerprints_depend_on_names_and_contents(tmp_path: Path):
    files = {"a.bin": b"one", "b.bin": b"two"}
    first = write(tmp_path / "x", files)
    second = write(tmp_path / "y", files)
    fingerprint = fingerprint_files(first)
    assert re.fullmatch(r"[0-9a-f]{16}", fingerprint)
    assert fingerprint_files(reversed(second)) == fingerprint
    assert fingerprint_files(write(tmp_path / "z", {"a.bin": b"one", "b.bin": b"twO"})) != fingerprint
    assert fingerprint_files(write(tmp_path / "w", {"a.bin": b"one", "c.bin": b"two"})) != fingerprint
    assert fingerprint_files(first[:1]) != fingerprint


def test_the_order_of_files_with_the_same_name_is_ignored(tmp_path: Path):
    paths = write(tmp_path / "x", {"same": b"1"}) + write(tmp_path / "y", {"same": b"2"})
    assert fingerprint_files(paths) == fingerprint_files(reversed(paths))


def test_content_cannot_imitate_another_file(tmp_path: Path):
    """A file that embeds a second file's name and content differs from the two files."""
    two_files = write(tmp_path / "two", {"a": b"x", "b": b"y"})
    one_file = write(tmp_path / "one", {"a": b"x\0b\0y"})
    assert fingerprint_files(two_files) != fingerprint_files(one_file)


def test_a_file_larger_than_a_block(tmp_path: Path):
    content = bytes(range(256)) * 8200  # just over 2 MiB
    first, second = (write(tmp_path / name, {"f": content}) for name in ("x", "y"))
    assert fingerprint_files(first) == fingerprint_files(second)
    second[0].write_bytes(content[:-1] + b"\0")
    assert fingerprint_files(first) != fingerprint_files(second)


def test_passage_fingerprints_cover_all_fields_and_the_order():
    base = [Passage("a", "b", "c"), Passage("d", "e", "f")]
    variants = [
        base,
        base[::-1],
        base[:1],
        [Passage("a", "bc", ""), base[1]],
        [Passage("a", "c", "b"), base[1]],
        [Passage("ab", "", "c"), base[1]],
    ]
    assert len({fingerprint_passages(passages) for passages in variants}) == len(variants)
