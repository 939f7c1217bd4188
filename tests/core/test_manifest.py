from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2llm.core.errors import DataFormatError
from d2llm.core.manifest import FILE_NAME, package_versions, read_manifest, write_manifest


def test_a_manifest_is_read_back(tmp_path: Path):
    write_manifest(tmp_path, "index", 2, {"student": "abc", "count": 3})
    manifest = read_manifest(tmp_path, "index", 2)
    assert manifest == {
        "kind": "index",
        "format_version": 2,
        "student": "abc",
        "count": 3,
        "packages": package_versions(),
    }
    assert list(manifest)[:2] == ["kind", "format_version"]


def test_content_cannot_override_reserved_fields(tmp_path: Path):
    write_manifest(tmp_path, "index", 1, {"kind": "student", "format_version": 9, "packages": {}})
    manifest = read_manifest(tmp_path, "index", 1)
    assert (manifest["kind"], manifest["format_version"]) == ("index", 1)
    assert manifest["packages"] == package_versions()


def test_package_versions_are_the_installed_versions():
    import numpy
    import torch

    versions = package_versions()
    assert versions["numpy"] == numpy.__version__
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "not found, so .* is not a d2llm index folder; check the path, or index what is in it: .* sync "),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "not a d2llm manifest"),
        ("null", "not a d2llm manifest"),
        ('{"name": "some package"}', "not a d2llm manifest"),
        ('{"kind": "index", "format_version": "1"}', "not a d2llm manifest"),
        ('{"kind": "student", "format_version": 1}', "describes a 'student', but a 'index' is needed"),
        ('{"kind": "index", "format_version": 2}', "format version 2, but this d2llm reads 1; update d2llm"),
        ('{"kind": "index", "format_version": 0}', "format version 0, .* make it again with this d2llm"),
    ],
)
def test_an_invalid_manifest_is_an_error_naming_the_file(tmp_path: Path, text: str | None, problem: str):
    if text is not None:
        (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(DataFormatError, match=problem) as error:
        read_manifest(tmp_path, "index", 1)
    assert str(error.value).startswith(str(tmp_path / FILE_NAME))


def test_binary_content_is_an_error(tmp_path: Path):
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataFormatError, match="not valid JSON"):
        read_manifest(tmp_path, "index", 1)


def test_a_manifest_is_plain_indented_json(tmp_path: Path):
    write_manifest(tmp_path, "index", 1, {"name": "中文"})
    text = (tmp_path / FILE_NAME).read_text(encoding="utf-8")
    assert '\n  "name": "中文"' in text
    assert json.loads(text)["name"] == "中文"
